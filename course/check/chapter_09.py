"""Checks of chapter 9, the ablations."""

import math

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers


@exercise("the number of seeds, in all")
def e0901(answer):
    seeds = number(answer)
    expect(seeds != 12, "twelve is what the square root alone asks for; Student's factor falls as well.")
    expect(seeds in range(3, 13), "give a whole number of seeds, all of them, the first three included.")
    half = {n: stats.t.ppf(0.975, n - 1) / math.sqrt(n) for n in range(2, 13)}
    right = next(n for n in half if half[n] <= half[3] / 2)
    expect(seeds >= right, f"{seeds:g} seeds leave {half[seeds] / half[3]:.2f} of the interval.")
    expect(seeds == right, "fewer do: compare the factors of Student's interval, one number of seeds after the other.")


@exercise("the precision at one malicious query in a hundred, a number between 0 and 1, to three digits")
def e0902(answer):
    precision, odds = number(answer), 19 / 99
    expect(precision <= 1, "give the precision as a share, not in percent.")
    expect(not close(precision, odds), "those are the odds of precision; turn them back into a share.")
    expect(not close(precision, 1 / (1 + odds)), "that is the share of false flags.")
    expect(
        not close(precision, 0.95, absolute=0.006),
        "recall and false-positive rate stay; precision does not, for the benign queries are more.",
    )
    expect(
        not close(precision, 19 / 119, absolute=0.0005),
        "one in a hundred is odds of 1 to 99, not of 1 to 100; and three digits are asked for.",
    )
    expect(
        close(precision, odds / (1 + odds), absolute=0.0006),
        "the odds of precision are those of the share times TPR / FPR. Which of the two factors changes?",
    )


@exercise('{"AdamW": (end, end with the divided loss), "SGD": (end, end with the divided loss)}')
def e0903(answer):
    expect(isinstance(answer, dict) and set(answer) == {"AdamW", "SGD"}, 'name the optimisers, "AdamW" and "SGD".')
    adam, sgd = (numbers(answer[name], 2) for name in ("AdamW", "SGD"))
    apart, gap = abs(adam[0] - adam[1]), abs(sgd[0] - sgd[1])
    expect(
        gap > 1e-6 * abs(sgd[0]),
        "both runs of SGD end at one place. Is the loss of one of them divided, and are they stopped before they arrive?",
    )
    expect(
        apart < 0.02 * gap,
        "AdamW's two runs end apart as well. Both need the same start, the same rate and a new optimiser.",
    )
    return f"dividing the loss moved SGD's end by {gap:.2g}, AdamW's by {apart:.1g}."


def _aupr_at(share, benign, malicious):
    """The average precision if that share of the queries were malicious."""
    weights = np.r_[np.full(len(benign), (1 - share) / len(benign)), np.full(len(malicious), share / len(malicious))]
    labels = np.r_[np.zeros(len(benign)), np.ones(len(malicious))]
    return average_precision_score(labels, np.r_[benign, malicious], sample_weight=weights)


@exercise("(benign scores, malicious scores), two lists of numbers")
def e0904(answer):
    expect(
        isinstance(answer, (tuple, list)) and len(answer) == 2 and all(np.ndim(scores) == 1 for scores in answer),
        "two lists of scores are asked for, the benign ones first.",
    )
    before, after = (_aupr_at(share, *map(numbers, answer)) for share in (0.5, 0.9))
    low, high = sorted([9 * before / (1 + 8 * before), 0.9 + (before - 0.5) * 0.1 / 0.5])
    words = f"your AUPR of {before:.3f} at 0.5 allows {low:.3f} to {high:.3f} at 0.9, where it is {after:.3f}"
    inside = low - 1e-6 <= after <= high + 1e-6
    expect(
        not inside or before < 0.999,
        "a perfect detector stays perfect at every share: some benign queries must score higher than malicious ones.",
    )
    expect(not inside, f"{words}. How low can the ROC curve run at its left end?")
    return f"{words}: outside."


@exercise('{"answers": {attack: AUROC}, "labels": {attack: AUROC}}, of SAME at mask 0')
def e0905(answer, attacks, area):
    expect(isinstance(answer, dict) and set(answer) == {"answers", "labels"}, 'name the rows, "answers" and "labels".')
    for row in answer.values():
        expect(isinstance(row, dict) and set(row) == set(attacks), f"each row names the attacks: {', '.join(attacks)}.")
    answers, labels = (np.array(numbers([answer[row][kind] for kind in attacks])) for row in ("answers", "labels"))
    expect_shares(*answers, *labels)

    def fits(found, how="mask 0", alpha=0.5):
        return np.allclose(found, [area(how, kind, alpha) for kind in attacks], atol=0.005)

    expect(fits(answers) or not fits(labels), "are the two rows exchanged?")
    expect(fits(answers) or not fits(answers, alpha=0.0), "that is the deviation alone; combine both terms.")
    expect(fits(answers) or not fits(answers, "masked passes"), "that is the detector of the masked passes.")
    expect(fits(answers), "without the switch it is the chapter's detector at mask 0: the first figure has its AUROCs.")
    expect(
        not np.array_equal(answers, labels) or np.isin(answers, (0, 1)).all(),
        "both rows are the same to the last digit: was another auxiliary model trained?",
    )
    changes = ", ".join(f"{100 * d:+.1f} ({kind})" for kind, d in zip(attacks, labels - answers, strict=True))
    return f"labels change the AUROC by {changes} points. Which signs had you predicted?"
