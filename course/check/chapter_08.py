"""Checks of chapter 8, the baselines."""

import numpy as np

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers
from samelib import accuracy, auroc


@exercise("how many different values the entropy can take, a whole number")
def e0801(answer):
    count = number(answer)
    expect(count != 5, "groups of 3 + 1 + 1 and of 2 + 2 + 1 name three classes both. Have they the same entropy?")
    expect(
        count < 16, "the entropy asks neither who votes for what nor in which order: only the sizes of groups count."
    )
    expect(count == 7, "write down all ways to split five members into groups, the largest group first.")


@exercise("the mean largest probability at the malicious points: (outliers on the left, outliers all around)")
def e0802(answer):
    left, around = numbers(answer, 2)
    expect(max(left, around) <= 1, "give probabilities between 0 and 1, not percent.")
    expect(
        min(left, around) >= 0.33,
        "the largest of three probabilities is a third or more. Did you take the doubt, or another class's share?",
    )
    expect(left > 0.8, "with the outliers on the left the model is sure at the malicious points: the figure has it.")
    expect(
        around < 0.6, "it is still sure there: do your outliers surround the clusters, the right-hand side included?"
    )
    return "the doubt reaches the malicious points once outliers lie near them."


@exercise("(AUROC of outlier exposure that knows the proxy set, AUROC of `oe`), on the second half of the proxy set")
def e0803(answer, oe, benign, group, budget):
    oracle, ordinary = numbers(answer, 2)
    expect_shares(oracle, ordinary)
    rest = group.proxy[len(group.proxy) // 2 :][:budget].images
    right = auroc(oe.score(benign), oe.score(rest))
    expect(
        not close(ordinary, 1 - right, absolute=0.02) or close(right, 0.5, absolute=0.06),
        "the benign scores come first in `auroc`.",
    )
    expect(
        close(ordinary, right, absolute=0.1),
        "the second figure is that of the chapter's `oe`, untouched, on the same proxy images as the first.",
    )
    expect(
        oracle > ordinary - 0.2,  # models of the smoke tier are hardly trained, and may differ by chance
        "a defender who knows the attack should not do worse. Was the first half of the proxy set the outlier set?",
    )
    return f"the choice of outliers was worth {100 * (oracle - ordinary):+.1f} points of AUROC here."


@exercise('{"OE": (accuracy, fidelity), "EDM": (accuracy, fidelity), "SAME": (accuracy, fidelity)} of the three copies')
def e0804(answer, owners, tests):
    expect(isinstance(answer, dict) and set(answer) == set(owners), f"name the victims: {', '.join(owners)}.")
    copies = {title: numbers(copy, 2) for title, copy in answer.items()}
    expect_shares(*(v for copy in copies.values() for v in copy))
    for title, (right, agrees) in copies.items():
        # Where the victim is right, a copy is right exactly where it agrees.
        wrong = 1 - accuracy(owners[title](tests.pixels()), tests.labels)
        expect(
            abs(right - agrees) <= wrong + 1e-4,
            f"{title}: accuracy and fidelity can differ only where the victim is wrong, on {wrong:.1%} of the images. "
            "Measure both on `tests`, and fidelity to the victim that was asked.",
        )
    gained = {title: 100 * (agrees - copies["SAME"][1]) for title, (_, agrees) in copies.items()}
    return f"beside a plain victim, EDM moves the copy's fidelity by {gained['EDM']:+.1f} points, OE by {gained['OE']:+.1f}."


@exercise("a function: budget -> number of accounts")
def e0805(answer):
    expect(callable(answer), "the answer is a function of the budget, to be called with a whole number.")
    budgets = (1, 100, 101, 102, 202, 203, 400, 4_000)
    found = [number(answer(budget)) for budget in budgets]

    def rule(most):
        return [-(-budget // most) for budget in budgets]

    expect(all(v == int(v) for v in found), "accounts are whole: round up.")
    expect(
        found != [budget // 101 for budget in budgets], "the queries that are left over need an account, too: round up."
    )
    expect(found != rule(100), "100 distances are not yet tested. How many queries has an account with 100 distances?")
    expect(found != rule(102), "102 queries of one class have 101 distances, and that is more than 100.")
    expect(found == rule(101), "how many queries may one account send, all of one class, until it has 101 distances?")


@exercise('{"+": (OE, EDM, SAME, sum), "-": (OE, EDM, SAME, sum)}, AUROCs of the three detectors and of the sum')
def e0806(answer, scores, group, budget):
    expect(isinstance(answer, dict) and set(answer) == {"+", "-"}, 'name the two directions, "+" and "-".')
    areas = {direction: numbers(answer[direction], 4) for direction in "+-"}
    expect_shares(*(area for row in areas.values() for area in row))
    right = np.array([auroc(scores[title]["benign"], scores[title]["jbda"]) for title in ("OE", "EDM", "SAME")])
    found = {direction: np.array(row[:3]) for direction, row in areas.items()}
    fits = {direction: np.allclose(row, right, atol=0.06) for direction, row in found.items()}
    expect(fits["-"] or not fits["+"], 'the chapter has your figures of "+" for "-": are the directions exchanged?')
    seeds = len(group.seeds) / budget
    expect(
        fits["-"] or not np.allclose(found["-"], seeds / 2 + (1 - seeds) * right, atol=0.06),
        "the seeds are benign images that no detector can tell apart: leave them out.",
    )
    expect(fits["-"], 'direction "-" is the one of the chapter: its AUROCs are in the table of all detectors.')
    expect(
        not np.allclose(found["+"], found["-"], atol=1e-6) or np.isin(right, (0, 1)).all(),
        'both directions have the same figures: change attacks["jbda"]["direction"] before each attack.',
    )
    low = [title for title, area in zip(("OE", "EDM", "SAME"), areas["+"], strict=False) if area < 0.5]
    change = {d: 100 * (areas[d][3] - areas[d][2]) for d in "+-"}
    words = f'below 50 % in direction "+": {", ".join(low) or "none"}'
    return f'{words}. The sum changes SAME by {change["+"]:+.1f} points in "+" and by {change["-"]:+.1f} in "-".'
