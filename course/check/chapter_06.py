"""Checks of chapter 6, JBDA."""

import numpy as np
import torch

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers
from samelib.attacks.jbda import jacobian_step


@exercise("five shares, of the images with 0, 1, 2, 3 and 4 steps behind them")
def e0601(answer):
    shares = numbers(answer)
    expect(len(shares) == 5, "after four rounds an image has 0, 1, 2, 3 or 4 steps behind it: give five shares.")
    right = np.array([1, 4, 6, 4, 1]) / 16
    expect(not np.allclose(shares, 16 * right), "those count the images that come from one seed; what share is that?")
    expect(not np.allclose(shares, 100 * right, atol=0.5), "give shares between 0 and 1, not percent.")
    expect(
        not np.allclose(shares, np.array([1, 1, 2, 4, 8]) / 16, atol=1e-3),
        "those are the shares that joined in each round; a parent in round 4 may be a seed, and its child is one step away.",
    )
    expect(close(sum(shares), 1, absolute=2e-3), "every image has some number of steps: the shares add up to 1.")
    expect(
        np.allclose(shares, right, atol=2e-3),
        "write down the set after one round, then after two: which images have one step behind them?",
    )


@exercise("(the AUROC at most, the FPR95 at least)")
def e0602(answer):
    auroc, fpr95 = numbers(answer, 2)
    expect(max(auroc, fpr95) <= 1, "give shares between 0 and 1, not percent.")
    expect(not close(auroc, 0.9, absolute=1e-6), "that is the limit for 200 seeds.")
    expect(not close(auroc, 0.95, absolute=1e-6), "a seed still wins half of its pairs.")
    expect(close(auroc, 0.975, 1e-4), "AUROC: what share of the 1,000 queries are seeds, and what is theirs?")
    expect(
        abs(fpr95) < 1e-9,
        "FPR95: how many of the 1,000 may be missed, and how many seeds are there to be missed first?",
    )


@exercise("the largest AUPR that is possible, a number between 0 and 1")
def e0603(answer, paper):
    limit, theirs = number(answer), float(paper.loc[1_000, "aupr"]) / 100
    expect(limit <= 1, "give a share between 0 and 1, not percent.")
    expect(
        not close(limit, theirs, 1e-6), "that is the paper's figure; the limit is what a perfect detector would have."
    )
    expect(limit < 0.999, "the 200 seeds count as malicious, and their scores are those of benign images.")
    expect(not close(limit, 0.9, absolute=1e-6), "that is the limit of AUROC.")
    found, benign = np.arange(1, 201), 1_000 * np.arange(1, 201) / 200  # seed by seed down the ranking
    right = 0.8 + ((800 + found) / (800 + found + benign)).sum() / 1_000
    expect(
        abs(limit - right) < 0.01,
        "give 1,000 benign queries and 200 seeds scores that are drawn alike, and 800 queries one that is higher.",
    )
    return f"the paper's figure, {theirs:.3f}, is {'above' if theirs > right else 'below'} it."


@exercise("(the queries in the order of the log, the copy's fidelity, [AUROC of d at mask 0, with passes])")
def e0604(answer, doors, sizes):
    queries, fidelity, areas = answer
    fidelity, areas = number(fidelity), numbers(areas, 2)
    expect(max(fidelity, *areas) <= 1, "give shares between 0 and 1, not percent.")
    expect(min(fidelity, *areas) >= 0, "neither a fidelity nor an AUROC is negative.")
    expect(len(queries) == sizes[-1], f"spend the same budget, {sizes[-1]:,} queries, and give the whole log.")

    def alike(sign, k):
        """Share of the pixels of round k that are equal to those of the chapter's run in one direction."""
        part = slice(sizes[k - 1], sizes[k])
        return float((queries[part] == doors[sign].log.queries[part]).float().mean())

    likeness = {sign: alike(sign, 1) for sign in "+-"}
    first = max(likeness, key=likeness.get)
    expect(
        likeness[first] > 0.9,
        "the first round is a step of neither sign from the seeds: keep the step, the seeds and the settings.",
    )
    # The same images and the same substitute: only the sign can differ.
    expect(len(sizes) < 3 or alike(first, 2) < 0.9, "the second round steps the same way as the first.")
    copies = f"{100 * fidelity:.1f} % fidelity, AUROC of d {100 * areas[0]:.0f} and {100 * areas[1]:.0f} %"
    return f"{copies}: compare with the runs in one direction."


@exercise("a function of two tensors, the deviations to score and those of benign calibration images")
def e0605(answer):
    expect(callable(answer), "the answer is the function itself, not what it returns.")
    benign = torch.logspace(-4, 0, 401)  # the middle is 0.01
    low, usual, high, zero = (float(v) for v in answer(torch.tensor([1e-7, 0.03, 50.0, 0.0]), benign))
    expect(
        np.isfinite([low, usual, high, zero]).all(), "a deviation may be exactly 0, and its logarithm is not finite."
    )
    expect(high > usual, "a deviation far above the usual scores no higher than one in its middle.")
    expect(
        low > usual,
        "a deviation far below the usual scores no higher than one in its middle: how far is it on the plain scale, "
        "how far on that of the logarithm?",
    )
    expect(zero >= low, "a deviation of 0 is the strangest of those below.")


@exercise('(how far the answer moved, AUROC of r at mask 0, with passes) for "pixels" and "blocks", a dictionary')
def e0606(answer, victim, group, thieves):
    expect(isinstance(answer, dict) and set(answer) == {"pixels", "blocks"}, 'name the two: "pixels" and "blocks".')
    found = {name: numbers(figures, 3) for name, figures in answer.items()}
    expect_shares(*(area for _, *areas in found.values() for area in areas))
    x, model = group.seeds.pixels(), thieves["-"].kept[0][1]
    usual = victim(x)

    def moved(step):
        change = victim(jacobian_step(model, x, usual.argmax(1), step)) - usual
        return float(change.abs().sum(1).mean())

    (pixels, *_), (blocks, *_) = found["pixels"], found["blocks"]
    right, uphill = moved(-0.2), moved(0.2)
    near = close(pixels, right, 0.05, 1e-6)
    expect(near or not close(pixels, right / usual.shape[1], 0.05), "sum over the classes; the mean is over the seeds.")
    expect(near or not close(pixels, uphill, 0.05), 'that is a step of "+": go down, away from the class.')
    expect(
        near,
        "pixels: step all seeds by 0.2 down with the substitute that learnt from the seeds alone. How far does the "
        "victim's answer move?",
    )
    expect(0 <= blocks <= 2, "blocks: two lists of probabilities differ by 2 at most.")
    return f"blocks move the victim's answer by {blocks:.3f}, pixels by {pixels:.3f}: compare at equal effect."
