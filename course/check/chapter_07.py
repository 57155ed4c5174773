"""Checks of chapter 7, DFME."""

import numpy as np
import torch
from torch.nn import functional

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers
from samelib.attacks.dfme import recover_logits


@exercise("(whole iterations, the factor by which the cosine grows)")
def e0701(answer, d):
    whole, factor = numbers(answer, 2)
    expect(whole != 1_000_000 // (256 * 7), "that is with one direction.")
    expect(whole != 1_000_000 // (256 * 11), "the five steps of the student ask as well.")
    expect(whole != 1_000_000 // (256 * 15), "L(x) itself, without a step, is a query too.")
    expect(whole != 1 + 1_000_000 // (256 * 16), "the last of these has a smaller batch: how many are whole?")
    expect(
        whole == 1_000_000 // (256 * 16), "what does one image cost, for generator and student? An iteration has 256."
    )
    right = ((10 / (10 + d)) / (1 / (1 + d))) ** 0.5
    expect(not close(factor, right**2, 0.03), "the cosine is a root.")
    expect(
        close(factor, right, 0.03) or close(factor, 10**0.5, 0.01),
        "divide the formula's cosine with m = 10 by that with m = 1.",
    )


@exercise("a function of a loss, a number x and epsilon that returns the estimated slope")
def e0702(answer):
    expect(callable(answer), "the answer is the function itself, not what it returns.")
    asked = []

    def square(x):
        asked.append(x)
        return x**2

    slope, asks = number(answer(square, 3.0, 0.5)), len(asked)
    expect(not close(slope, 6.5), "that is the forward difference, with its error of 0.5.")
    expect(not close(slope, 12), "the two points are twice epsilon apart.")
    expect(close(slope, 6), "the slope of the square at 3 is 6, and the central difference makes no error on it.")
    expect(asks == 2, f"two values are enough; your function asks for {asks}, and each is a query.")
    expect(close(number(answer(square, -1.0, 0.1)), -2), "it should work at every x and with every epsilon.")
    return "2 m queries an image, where forward differences take m + 1."


@exercise('{"trained": three fidelities, "frozen": three fidelities}')
def e0703(answer):
    expect(isinstance(answer, dict) and set(answer) == {"trained", "frozen"}, 'name the two: "trained" and "frozen".')
    found = {name: numbers(values) for name, values in answer.items()}
    expect(all(len(values) == 3 for values in found.values()), "three seeds make three fidelities for each generator.")
    expect(all(v <= 1 for values in found.values() for v in values), "give shares between 0 and 1, not percent.")
    expect(all(v >= 0 for values in found.values() for v in values), "a fidelity is not negative.")
    gap = np.mean(found["trained"]) - np.mean(found["frozen"])
    widest = max(np.ptp(values) for values in found.values())
    return f"trained less frozen {100 * gap:+.1f} points; the seeds of one of them differ by up to {100 * widest:.1f}."


@exercise("(the four logits that are recovered after rounding, the copy's fidelity)")
def e0704(answer, true_logits):
    expect(len(answer) == 2, "give the recovered logits and the fidelity.")
    logits, fidelity = numbers(answer[0]), number(answer[1])
    expect_shares(fidelity)
    expect(len(logits) == 4, "the answer by hand has four classes: four logits.")
    probabilities = true_logits.softmax(1)
    kept = (1_000 * probabilities).round() / 1_000

    def same(right):
        return np.allclose(logits, np.array(right.tolist()).ravel(), rtol=0.01, atol=0.05)

    expect(not same(recover_logits(probabilities)), "those come back without rounding.")
    expect(
        not same(recover_logits(kept.clamp_min(0.0005))), "a wiser attacker gets those; `recover_logits` meets zeros."
    )
    expect(
        same(recover_logits(kept)) or same(recover_logits(kept.double())),
        "round the four probabilities to three digits, then recover the logits: what becomes of the zeros?",
    )


@exercise("{window: (median of r, median of d)} for the windows 1, 3, 5 and 7")
def e0705(answer, x, detector):
    expect(isinstance(answer, dict) and set(answer) == {1, 3, 5, 7}, "a pair for each window: the keys are 1, 3, 5, 7.")
    found = {k: numbers(answer[k]) for k in answer}
    expect(all(len(pair) == 2 for pair in found.values()), "of each window two numbers: the medians over the images.")

    pairs = list(found.values())
    expect(
        not any(np.allclose(a, b, rtol=1e-6) for i, a in enumerate(pairs) for b in pairs[:i]),
        "two windows have the same figures: does the window reach the blur?",
    )

    def medians(stretch=True):  # of the widest window alone: to redraw images takes its time
        image = functional.avg_pool2d(x.tanh(), 7, stride=1, padding=3)
        if stretch:
            image = image / image.flatten(1).abs().amax(1)[:, None, None, None]
        terms = detector.terms(image)
        return [float(term.median()) for term in (terms.reconstruction, terms.deviation)]

    def same(right):
        return np.allclose(found[7], right, rtol=0.03, atol=1e-4)

    right = medians()
    if not same(right):
        expect(not same(right[::-1]), "the order is r, then d.")
        expect(
            not same(medians(stretch=False)),
            "stretch each image after the blur, so that its largest pixel is 1 or its smallest is -1.",
        )
        expect(False, "window 7: blur `x.tanh()` with padding, one pixel a stride, then stretch.")


@exercise("(the copy's fidelity, how many answers name each class)")
def e0706(answer, victim, real):
    expect(len(answer) == 2, "give the fidelity and the counts.")
    fidelity, counts = number(answer[0]), np.array(numbers(answer[1]))
    expect_shares(fidelity)
    expect(len(counts) == victim.classes, f"a count for each of the {victim.classes} classes.")
    expect(not close(counts.sum(), 1), "count the answers; shares do not tell how many there were.")
    expect(
        counts.sum() == real,
        f"noise gets the budget of the frozen run, {real:,}; your counts add up to {counts.sum():,.0f}.",
    )
    noise = 2 * torch.rand(300, *victim.image_shape, generator=torch.Generator().manual_seed(0)) - 1
    shares = victim(noise).argmax(1).bincount(minlength=victim.classes).cpu().numpy() / 300
    expect(
        abs(counts / real - shares).sum() < 0.4,
        "the victim answers uniform noise otherwise: are those the answers from the log of the noise?",
    )
    return f"{counts.max() / real:.0%} of the answers name one class."
