"""The gradient bandit that adaptive Knockoff chooses its classes with (Orekondy et al. 2019, section 4.1.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def bandit_step(preferences: Tensor, policy: Tensor, arm: int, pulls: int, advantage: float) -> Tensor:
    """The preferences H [A] after arm `arm` was pulled for the `pulls`-th time and paid `advantage` above the mean.

    H_a += (1 / N_a) (R - Rbar) (1 - pi_a), and H_b -= (1 / N_a) (R - Rbar) pi_b for every other arm b.
    """
    chosen = torch.zeros_like(preferences)
    chosen[arm] = 1
    return preferences + advantage / pulls * (chosen - policy)


class GradientBandit:
    """Arms with preferences H; an arm is chosen with probability pi = softmax(H).

    Attributes:
        preferences: H, float64 [A].
        pulls: N, how often each arm was pulled, int64 [A].
    """

    def __init__(self, arms: int):
        self.preferences = torch.zeros(arms, dtype=torch.float64)
        self.pulls = torch.zeros(arms, dtype=torch.int64)

    def policy(self, open_arms: Tensor | None = None) -> Tensor:
        """pi [A]; arms outside the mask `open_arms` [A] have probability 0 (all are open by default)."""
        if open_arms is None:
            return self.preferences.softmax(0)
        return self.preferences.masked_fill(~open_arms, -torch.inf).softmax(0)

    def update(self, arm: int, advantage: float, open_arms: Tensor | None = None) -> None:
        """Learns that a pull of `arm` was worth `advantage` = R - Rbar."""
        self.pulls[arm] += 1
        policy = self.policy(open_arms)
        self.preferences = bandit_step(self.preferences, policy, arm, int(self.pulls[arm]), advantage)


class TreeBandit:
    """A bandit over superclasses, and inside each superclass one over its classes: coarse to fine.

    Args:
        superclasses: for each class (leaf) the number of its superclass, 0 upward without a gap.

    Raises:
        ValueError: fewer than two superclasses, or a number without a class.
    """

    def __init__(self, superclasses: Sequence[int]):
        self.parent = torch.as_tensor(superclasses)
        members = self.parent.clamp_min(0).bincount()
        if self.parent.min() < 0 or len(members) < 2 or not members.all():
            raise ValueError(f"a tree needs at least two superclasses, numbered from 0 without a gap: {superclasses}")
        self.root = GradientBandit(len(members))
        self.branches = [GradientBandit(int(count)) for count in members]
        self.leaves = [(self.parent == group).nonzero()[:, 0] for group in range(len(members))]

    def _open(self, open_arms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Masks of the open classes, and of the superclasses that have one."""
        arms = torch.ones(len(self.parent), dtype=torch.bool) if open_arms is None else open_arms
        return arms, torch.stack([arms[leaves].any() for leaves in self.leaves])

    def policy(self, open_arms: Tensor | None = None) -> Tensor:
        """The probability of each class: that of its superclass times its own among its siblings."""
        arms, groups = self._open(open_arms)
        policy, coarse = torch.zeros(len(self.parent), dtype=torch.float64), self.root.policy(groups)
        for group in groups.nonzero()[:, 0].tolist():
            leaves = self.leaves[group]
            policy[leaves] = coarse[group] * self.branches[group].policy(arms[leaves])
        return policy

    def update(self, arm: int, advantage: float, open_arms: Tensor | None = None) -> None:
        """Updates along the path from the root to the class."""
        arms, groups = self._open(open_arms)
        group = int(self.parent[arm])
        leaves = self.leaves[group]
        self.root.update(group, advantage, groups)
        self.branches[group].update(int((leaves == arm).nonzero()), advantage, arms[leaves])
