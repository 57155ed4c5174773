"""Checks of chapter 11, attackers who know."""

import math

import torch

from course.check.verdict import close, exercise, expect, number, numbers
from samelib import auroc

FEW = 64  # images that are scored, so that the check takes a moment; chance moves their AUROC by some points


@exercise("(the e-value of the query, how many such queries reach wealth 1,000)")
def e1101(answer):
    value, queries = numbers(answer, 2)
    p = 0.001
    log = math.log(p)
    right = (1 - p + p * log) / (p * log**2)
    expect(not close(value, 1 / p), "1 / p is no e-value: its mean over honest queries has no bound.")
    expect(not close(value, math.log(right)), "that is the logarithm of the e-value.")
    expect(not close(value, right * abs(log)), "the logarithm in the denominator is squared.")
    decades = math.log10(p)
    expect(not close(value, (1 - p + p * decades) / (p * decades**2)), "log is the natural logarithm here.")
    expect(not close(value, (1 - p - p * log) / (p * log**2)), "log p is below zero: watch its sign.")
    expect(close(value, right), "put p = 0.001 into the closed form of e(p).")
    expect(queries == round(queries), "a number of queries is whole: the wealth has to reach 1,000, so round up.")
    expect(queries != math.ceil(1_000 / right), "wealth is the product of the payoffs, not their sum.")
    count = math.ceil(math.log(1_000) / math.log(right))
    expect(queries >= count, "the wealth after so few queries is below 1,000: multiply.")
    expect(queries == count, "fewer queries are enough: the wealth is multiplied by the e-value at each.")


@exercise("your disguise, a function that turns an `ImageSet` of the attacker into another, as `disguise` does")
def e1103(answer, group, plus, scores, disguise):
    expect(callable(answer), "a function of an ImageSet is asked for: give the function itself, not what it returns.")
    before = group.proxy[:FEW]
    result = answer(before)
    after = getattr(result, "images", result)
    expect(isinstance(after, torch.Tensor), "return an ImageSet: `replace(images, images=...)`.")
    expect(after.shape == before.images.shape, "return as many images as there were, of the same shape.")
    expect(after.dtype == torch.uint8, "a service receives 8-bit images: finish with `to_uint8`.")
    expect(not torch.equal(after, before.images), "the images are as they were.")
    expect(not torch.equal(after, disguise(before).images), "that is the chapter's own disguise, pixel by pixel.")
    copies = (after[:, None] == group.seeds.images).flatten(2).all(2).any(1)
    expect(
        copies.float().mean() < 0.5,
        "those are benign images themselves. A disguise changes the attacker's own, and keeps what they show.",
    )
    expect(
        len(after.unique(dim=0)) > len(after) / 2,
        "different images became one and the same: the victim's answers would teach nothing.",
    )
    benign, bare = scores["SamePlus"]["benign"], scores["SamePlus"]["Knockoff"][:FEW]
    bare, yours = number(auroc(benign, bare)), number(auroc(benign, plus.score(after)))
    expect(
        yours <= max(0.6, bare + 0.1),
        f"SamePlus finds these more easily ({100 * yours:.0f} %) than the images as they were ({100 * bare:.0f} %). What did the "
        "disguise add that no benign image has?",
    )
    verdict = "below 60 %" if yours < 0.6 else "not below 60 % yet"
    return f"an AUROC of {100 * yours:.0f} % on {FEW} images, where they had {100 * bare:.0f} % undisguised: {verdict}."
