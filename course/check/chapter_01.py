"""Checks of chapter 1, the threat model."""

import math

import numpy as np
import torch

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers
from samelib import auroc
from samelib.metrics import mean_interval


@exercise("(fidelity of the copy, [how many of the answers name each class])")
def e0101(answer, small, doors, loot, invented):
    expect(isinstance(answer, (tuple, list)) and len(answer) == 2, "two things are asked for: fidelity and counts.")
    log, classes = doors["Knockoff"].log.answers, doors["Knockoff"].log.answers.shape[1]
    fidelity, counts = number(answer[0]), np.array(numbers(answer[1], classes))
    expect_shares(fidelity)
    expect(
        not close(counts.sum(), 1), "count the answers that name each class; you have divided by how many there are."
    )
    expect(counts.sum() == small, f"each of the {small:,} answers names one class, so what do the counts add up to?")
    proxy = np.bincount(log[:small].argmax(1).cpu(), minlength=classes)
    expect(not (counts == proxy).all(), "these are the answers to the proxy images. Does this thief send the outliers?")
    usual = np.bincount(invented.cpu(), minlength=classes) / len(invented)
    expect(
        abs(counts / small - usual).sum() < 0.5,
        "the victim spreads its answers to the outliers otherwise: `invented` has them. What has this thief sent?",
    )
    near = next(point["fidelity"] for point in loot["Knockoff"].curve if point["queries"] == small)
    noise = loot["noise"].curve[-1]
    return (
        f"fidelity {fidelity:.1%}. The proxy thief has {near:.1%} after as many queries, the noise thief "
        f"{noise['fidelity']:.1%} after {noise['queries']:,}."
    )


@exercise("(True or False, the levels by which x + 0.4 / LEVELS arrives above x, the same of x + 0.6 / LEVELS)")
def e0102(answer):
    equal, less, more = numbers(answer, 3)
    expect(equal == 1, "a pixel that is on the grid already: which of the 256 levels is nearest to it?")
    for moved in (less, more):
        expect(moved == round(moved), "the door lets whole levels through, nothing between: count those.")
    expect(less == 0, "0.4 levels away from one level and 0.6 from the next: which one is nearer?")
    expect(more == 1, "0.6 levels away from one level and 0.4 from the next: which one is nearer?")


@exercise("([the three gaps], (their mean, half width of the 95 % interval)), as shares")
def e0103(answer):
    expect(isinstance(answer, (tuple, list)) and len(answer) == 2, "two things are asked for: gaps and interval.")
    gaps, (mean, half) = numbers(answer[0], 3), numbers(answer[1], 2)
    expect(max(map(abs, gaps)) <= 1, "a gap is a difference of two shares; do not multiply by 100.")
    expect(len(set(gaps)) > 1, "the three gaps are equal. Has each thief a seed of its own?")
    expect(close(mean, np.mean(gaps), absolute=5e-4), "the mean is not that of your three gaps.")
    right, spread = mean_interval(gaps)[1], np.std(gaps, ddof=1)
    if not close(half, right, absolute=5e-4):
        expect(
            not close(half, 2 * right, absolute=5e-4),
            "that is the whole width; the interval reaches half of it each way.",
        )
        expect(
            not close(half, spread, absolute=5e-4), "that is the spread of single gaps, not the interval of their mean."
        )
        expect(
            not close(half, 1.96 * spread / math.sqrt(3), relative=0.01, absolute=5e-4),
            "1.96 is for many runs; with three, take the quantile of Student's distribution.",
        )
        expect(False, "the half width does not fit the three gaps; `mean_interval` has both numbers.")
    contains = "contains zero: three runs do not show a difference" if abs(mean) < half else "does not contain zero"
    return f"the interval {contains}."


@exercise("(share of the outliers on which the honest model names the victim's class, the same share of the copy)")
def e0104(answer, invented, repeated):
    honest, copy = numbers(answer, 2)
    right = float((invented == repeated).float().mean())
    expect_shares(honest, copy)
    expect(
        close(copy, right, absolute=0.001) or not close(honest, right, absolute=0.001), "the honest model comes first."
    )
    first, second = (torch.bincount(classes, minlength=99) / len(classes) for classes in (invented, repeated))
    expect(
        close(copy, right, absolute=0.001) or not close(copy, float(first @ second), absolute=0.001),
        "that is the copy's agreement by chance; count the outliers on which it does agree.",
    )
    expect(
        close(copy, right, absolute=0.001), "the copy: on which share of the outliers is `repeated` the victim's class?"
    )
    expect(honest < 1, "this model agrees with the victim on every outlier. Is it another model, with another seed?")
    return f"copy less honest model: {100 * (copy - honest):+.1f} points."


@exercise('{"entropy": {"Knockoff": AUROC, "noise": AUROC}, "margin": {"Knockoff": AUROC, "noise": AUROC}}')
def e0105(answer, told):
    expect(isinstance(answer, dict) and set(answer) >= {"entropy", "margin"}, "name both scores, entropy and margin.")
    for score, measure in {"entropy": _entropy, "margin": _margin}.items():
        scores = {name: measure(answers) for name, answers in told.items()}
        expect(isinstance(answer[score], dict), f"{score}: an AUROC for each thief, by its name.")
        for name in ("Knockoff", "noise"):
            expect(name in answer[score], f"{score}: the AUROC of {name} is missing.")
            found, right = number(answer[score][name]), auroc(scores["benign"], scores[name])
            expect_shares(found)
            if not close(found, right, absolute=0.02):
                expect(
                    not close(found, 1 - right, absolute=0.02),
                    f"{score} of {name}: does a higher score mean more doubt?",
                )
                expect(False, f"{score} of {name}: this is not the AUROC of that score against the benign answers.")


def _entropy(answers: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(answers).sum(1)


def _margin(answers: torch.Tensor) -> torch.Tensor:
    top = answers.topk(2, dim=1).values
    return top[:, 1] - top[:, 0]
