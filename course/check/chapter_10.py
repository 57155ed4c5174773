"""Checks of chapter 10, the responses."""

import math

import numpy as np
import torch

from course.check.verdict import close, exercise, expect, expect_shares, numbers
from samelib.data.image_set import to_float
from samelib.detectors.base import conformal_p_values


@exercise("(bits, mean number of hashes, mean seconds, probability of three times as long or longer)")
def e1001(answer):
    bits, hashes, seconds, longer = numbers(answer, 4)
    expect(bits != 5, "those are the bits on top of the base.")
    expect(bits != 16, "1 / p lies between two powers of two; the lower one counts.")
    expect(bits == 15, "the base, and the whole number of times that 1 / p can be halved before it is below 1.")
    expect(close(hashes, 2**15), "how likely is one hash to begin with so many zero bits? How many trials is that?")
    expect(not close(seconds, 32.768, relative=0.02), "give seconds, not milliseconds.")
    expect(close(seconds, 0.032768, relative=0.02), "divide the hashes by the hashes in a second.")
    expect(
        not close(longer, 1 - math.exp(-3), relative=0.02), "that is the probability that it takes less than so long."
    )
    expect(not close(longer, 1 / 3, relative=0.02), "that holds for any distribution; this one is known, so use it.")
    expect(
        close(longer, math.exp(-3), relative=0.02),
        "all of three times the mean number of hashes must fail. How likely is that?",
    )


@exercise("(b_0, b_max, the least number of calibration scores), whole numbers")
def e1002(answer):
    base, most, images = numbers(answer, 3)
    expect(all(v >= 0 and v == int(v) for v in (base, most, images)), "all three are whole numbers, none below 0.")
    mean, largest = 2**base * (1 + most / 2), 2 ** (base + most)
    expect(
        mean <= 200_000 * 0.05,
        f"the bound of the benign mean is {mean:,.0f} hashes. How many are there in 50 ms?",
    )
    expect(
        largest >= 200_000 * 5, f"the strangest queries pay {largest:,.0f} hashes on average: less than five seconds."
    )
    expect(
        largest < 2 * 200_000 * 5,
        f"the strangest queries wait {largest / 200_000:.1f} seconds, and five are asked for.",
    )
    expect(images != 2**most, "the query counts itself: p is at least 1 / (n + 1), not 1 / n.")
    expect(
        base == 0 or images != 2 ** (base + most) - 1,
        "the base is paid by everybody; only b_max depends on the p-value.",
    )
    expect(images == 2**most - 1, "how small must the least p-value be for b_max bits on top? Which n gives it?")
    return f"benign users pay {mean:,.0f} hashes on average at most, {1000 * mean / 200_000:.0f} ms."


@exercise("(queries asked, answers got, fidelity of the copy) of the patient thief")
def e1003(answer, answered, group, most):
    queries, answers, fidelity = numbers(answer, 3)
    share = max(answered("reject 5 %", "Knockoff"), 1e-3)
    needed = min(len(group.proxy), most / share)
    expect(answers <= queries, "no more answers than queries: which figure is which?")
    expect(queries <= len(group.proxy), f"the proxy set has {len(group.proxy):,} images, and Knockoff sends each once.")
    expect_shares(fidelity)
    expect(
        queries > most or needed < 1.02 * most, f"{most} queries were the unguarded thief's: the patient one asks more."
    )
    scatter = 4 * math.sqrt(queries * share * (1 - share) * (1 + queries / most)) + 2
    expect(
        answers + scatter >= most or queries == len(group.proxy),
        "too few queries: of those asked, only a share is answered. By what must the number of answers be divided?",
    )
    expect(
        abs(answers - queries * share) <= scatter,
        f"about {share:.0%} of Knockoff's queries are answered at 5 %; count the answers that are finite.",
    )
    return f"the door made this thief ask {queries / most:.2f} times as often."


@exercise("the class of an office whose stamps are good for any query, derived from `StampOffice`")
def e1004(answer):
    # Only here: Colab lacks what signs challenges until a chapter that needs it has installed it.
    from samelib.service.stamps import StampError, StampOffice, solve

    expect(
        isinstance(answer, type) and issubclass(answer, StampOffice), "a subclass of StampOffice, not an office itself."
    )
    office, foreign = answer(bytes(32), lifetime=60), answer(bytes([9] * 32), lifetime=60)
    mine, other = bytes([1] * 32), bytes([2] * 32)

    def passes(stamp, query):
        try:
            office.spend([office.check(stamp, query)])
        except StampError:
            return False
        return True

    good = solve(office.issue(mine, 4))[0]
    expect(passes(good, mine), "an honest stamp is refused now: `issue` and `check` must agree on what is signed.")
    expect(not passes(good, mine), "a stamp is good twice; only the binding to the query was to go.")
    expect(
        passes(solve(office.issue(mine, 4))[0], other),
        "a stamp for one image is still refused for another: what does the office sign, and what does it compare?",
    )
    expect(not passes(office.issue(mine, 30) + ".0", mine), "it takes stamps that nobody solved; leave that check in.")
    expect(
        not passes(solve(foreign.issue(mine, 4))[0], mine),
        "it takes challenges that another office signed; keep that check.",
    )
    return "a cheap stamp pays for any image, and everything else is still refused."


@exercise("a function: uint8 images [N, C, H, W] -> the p-value of each among calibration images of the same answer")
def e1006(answer, detector, victim, group):
    expect(callable(answer), "the answer is a function of images.")
    images, half = group.benign_test.images[:20], len(group.calibration) // 2
    scores, names = detector.score(images), victim(to_float(images)).argmax(1)
    named = victim(group.calibration[half : 2 * half].pixels()).argmax(1)

    def right(named):
        ranks = [
            conformal_p_values(scores[i : i + 1], detector.calibration_scores[named == k]) for i, k in enumerate(names)
        ]
        return torch.cat(ranks).cpu().numpy()

    def fits(values):  # a score that ties but for rounding may be off by a rank
        return np.mean(np.abs(np.array(found) - values) < 1e-3) > 0.9

    found, ranked = numbers(answer(images), len(images)), right(named)
    expect(fits(ranked) or not set(found) <= {0.0, 1.0}, "p-values are asked for, not decisions.")
    expect(
        fits(ranked) or not fits(detector.p_values_of(scores).cpu().numpy()),
        "those are the p-values among all calibration images, whatever their answer.",
    )
    expect(
        fits(ranked) or not fits(right(victim(group.calibration[:half].pixels()).argmax(1))),
        "the calibration scores are of the second half of the calibration set; name the classes of that half.",
    )
    expect(fits(ranked), "for each class: its queries' scores among the calibration scores of the images named alike.")
    smallest = int(torch.bincount(named, minlength=group.classes).min())
    return f"the smallest class has {smallest} calibration images, so its p-values go down to {1 / (smallest + 1):.3f}."
