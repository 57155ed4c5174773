"""Checks of chapter 5, Knockoff."""

import numpy as np
import torch

from course.check.verdict import close, exercise, expect, number, numbers
from samelib.attacks.knockoff import bandit_step


@exercise("(H after the first pull, H after the second), three numbers each")
def e0501(answer):
    expect(len(answer) == 2, "give H after each of the two pulls.")
    first, second = (torch.tensor(numbers(preferences, 3)) for preferences in answer)

    def same(found, wanted):  # by hand, with three digits
        return torch.allclose(found, wanted, atol=2e-3)

    start, even = torch.zeros(3), torch.full((3,), 1 / 3)
    expect(
        not same(first, bandit_step(start, even, 0, 1, 0.6)),
        "arms are numbered from 0: arm 1 is the one in the middle.",
    )
    right = bandit_step(start, even, 1, 1, 0.6)
    expect(same(first, right), "first pull: every arm has probability 1/3, and N is 1. What do the two lines add?")
    policy = right.softmax(0)
    expect(not same(second, start), "neither N nor the policy is what it was at the first pull.")
    expect(not same(second, bandit_step(right, policy, 1, 1, -0.6)), "N counts the pulls of the arm: what is it now?")
    expect(
        not same(second, bandit_step(right, even, 1, 2, -0.6)), "after the first pull the policy is no longer uniform."
    )
    expect(
        same(second, bandit_step(right, policy, 1, 2, -0.6)), "second pull: take the softmax of the H that you found."
    )


@exercise("the policy at the end for each batch, a dictionary with the keys 8 and 128")
def e0502(answer, arms):
    expect(isinstance(answer, dict) and {8, 128} <= set(answer), "a policy for each batch: the keys are 8 and 128.")
    policies = {batch: np.array(numbers(policy)) for batch, policy in answer.items()}
    expect(
        all(len(policy) == arms for policy in policies.values()),
        f"one policy is one probability for each of the {arms} arms; which row of `attack.policies` is the last?",
    )
    expect(
        all(policy.min() >= 0 and close(policy.sum(), 1) for policy in policies.values()),
        "the probabilities of a policy add up to 1.",
    )
    expect(
        not any(np.allclose(policy, 1 / arms, atol=1e-9) for policy in policies.values()),
        "a uniform policy is that of the first round, before any answer came.",
    )
    expect(
        not np.allclose(policies[8], policies[128], atol=1e-9),
        "both policies are the same: does `batch` reach the attack?",
    )
    widths = {batch: np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()) for batch, p in policies.items()}
    widths = ", ".join(f"{width:.1f} (batch {batch})" for batch, width in widths.items())
    return f"effective classes of {arms}: {widths}. Several seeds would tell a trend from luck."


@exercise("(probability of a familiar picture under the first policy, under the last)")
def e0503(answer):
    first, last = numbers(answer, 2)
    expect(max(first, last) <= 1 + 1e-6, "give shares between 0 and 1, not percent.")
    expect(min(first, last) >= 0, "a probability is not negative.")
    expect(not close(first, last, 1e-9), "that is one policy twice: `attack.policies` has a row for each round.")
    return f"from {first:.0%} to {last:.0%} familiar: a bandit is only as good as its arms."


@exercise("(probability of the familiar classes at first, at the end, the copy's fidelity)")
def e0504(answer, arms, pile, fidelities):
    first, last, fidelity = numbers(answer, 3)
    expect(max(first, last, fidelity) <= 1 + 1e-6, "give shares between 0 and 1, not percent.")
    expect(min(last, fidelity) >= 0, "neither a probability nor a fidelity is negative.")
    expect(
        close(first, arms / len(pile.classes)),
        "before the first pull the classes of the pile are equally likely: what share of them is familiar?",
    )
    expect(not close(first, last, 1e-9), "the policy has not moved: does your `update` write to `self.preferences`?")
    before = fidelities["certainty"]
    return f"{100 * fidelity:.1f} % fidelity here, {before:.1f} % with the step 1 / N: one run each, so a few points are luck."


@exercise('(share caught, fidelity) for each of "hidden", "random" and "all", a dictionary')
def e0505(answer, caught):
    names = ("hidden", "random", "all")
    expect(isinstance(answer, dict) and set(answer) == set(names), f"name the three thieves: {', '.join(names)}.")
    found = {name: numbers(answer[name], 2) for name in names}
    expect(all(v <= 1 for pair in found.values() for v in pair), "give shares between 0 and 1, not percent.")
    expect(all(v >= 0 for pair in found.values() for v in pair), "a share is not negative.")
    seen, usual = found["all"][0], number(caught.mean())
    expect(
        abs(seen - usual) < 0.25 or abs(1 - seen - usual) >= 0.25,
        "is that the share that is missed? Caught is above the threshold.",
    )
    expect(
        abs(seen - usual) < 0.25,
        f"all classes together are caught about as often as in the section above, {usual:.0%}: which threshold is yours?",
    )
    cost = found["all"][1] - found["hidden"][1]
    return f"hiding costs {100 * cost:.1f} points of fidelity here."
