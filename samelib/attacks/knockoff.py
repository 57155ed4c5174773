"""Knockoff Nets (Orekondy et al. 2019): steal with images of one's own, chosen at random or by what has paid so far.

The adaptive strategy (their section 4.1.2) is a gradient bandit, whose arms are the classes of the attacker's images.
Ours beyond theirs: arms that are clusters, and what a defence gives away as the reward (`ORACLES`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from samelib.attacks.base import Querier, TransferAttack, TransferSet, answered
from samelib.data.image_set import ImageSet, to_float
from samelib.models.classifiers import predict
from samelib.precision import autocast
from samelib.training import TrainSettings, best_device, descend, make_optimiser, seed_of


class Knockoff(TransferAttack):
    """Random strategy: images of the proxy set, drawn without replacement.

    Args:
        proxy: the attacker's images; their labels are not used.
        architecture, settings, seed, labels: see `TransferAttack`.
    """

    def __init__(
        self,
        proxy: ImageSet,
        architecture: str | None = None,
        settings: TrainSettings | None = None,
        seed: int = 0,
        *,
        labels: str = "soft",
    ):
        super().__init__(architecture, settings, seed, labels=labels)
        self.proxy = proxy

    def check_budget(self, budget: int) -> None:
        """Raises ValueError when the proxy set holds fewer images than the budget."""
        if budget > len(self.proxy):
            raise ValueError(
                f"the proxy set {self.proxy.name} holds {len(self.proxy):,} images, the budget is {budget:,}; "
                "lower the budget or bring more images"
            )

    def draw(self, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        """The images to ask, uint8 [count, C, H, W]."""
        self.check_budget(count)
        return self.proxy.shuffled(self.seed)[:count].images

    def collect(self, querier: Querier) -> TransferSet:
        images = self.draw(querier.budget, querier.image_shape)
        return TransferSet(images, querier.ask(images))


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


REWARDS = ("certainty", "diversity", "loss")
ORACLES = ("answered", "bits")  # what a defence says of a query by what it does: refuses it, or names a price


def certainty_reward(answers: Tensor) -> Tensor:
    """How sure the victim is: its largest probability less its second, [N] of answers [N, K]."""
    first, second = answers.topk(2, dim=1).values.T
    return first - second


def diversity_reward(answers: Tensor, mean: Tensor) -> Tensor:
    """How far an answer goes beyond the recent mean answer [K]: sum_k max(0, y_k - mean_k), [N]."""
    return (answers - mean).clamp_min(0).sum(1)


def loss_reward(answers: Tensor, predictions: Tensor) -> Tensor:
    """What the substitute does not know yet: the cross-entropy of its probabilities [N, K] with the answers, [N]."""
    return -(answers * predictions.clamp_min(torch.finfo(predictions.dtype).tiny).log()).sum(1)


def rescaled(rewards: Tensor, window: Tensor) -> Tensor:
    """Each column of rewards [N, R] on the scale of its smallest (0) to largest (1) value in the window [W, R].

    A reward that does not vary says nothing: it becomes 0.
    """
    low, high = window.min(0).values, window.max(0).values
    return torch.where(high > low, (rewards - low) / (high - low).clamp_min(1e-12), 0)


class Rewards:
    """What each answer was worth, above what answers have been worth so far.

    Args:
        kind: "certainty", "diversity", "loss" or "all".
        window: how many of the latest answers are "recent".
    """

    def __init__(self, kind: str, window: int):
        self.kinds = REWARDS if kind == "all" else (kind,)
        self.window = window
        self.answers = self.raw = None
        self.total, self.count = 0.0, 0

    def advantages(self, answers: Tensor, predictions: Tensor | None) -> Tensor:
        """R - Rbar, [N], of answers [N, K]; `predictions` [N, K] are the substitute's, needed for "loss" and "all".

        Rbar is the mean of all earlier rewards; the first round is compared with its own mean.
        """
        mean = torch.zeros_like(answers[0]) if self.answers is None else self.answers.mean(0)
        rewards = {
            "certainty": lambda: certainty_reward(answers),
            "diversity": lambda: diversity_reward(answers, mean),
            "loss": lambda: loss_reward(answers, predictions),
        }
        raw = torch.stack([rewards[kind]() for kind in self.kinds], dim=1)
        self.answers = self._recent(self.answers, answers)
        self.raw = self._recent(self.raw, raw)
        return self.above_mean(rescaled(raw, self.raw).mean(1) if len(self.kinds) > 1 else raw[:, 0])

    def above_mean(self, reward: Tensor) -> Tensor:
        """R - Rbar, [N], of rewards [N]."""
        baseline = self.total / self.count if self.count else float(reward.mean())
        self.total, self.count = self.total + float(reward.sum()), self.count + len(reward)
        return reward - baseline

    def _recent(self, old: Tensor | None, new: Tensor) -> Tensor:
        return (new if old is None else torch.cat([old, new]))[-self.window :]


def clustered(images: ImageSet, clusters: int, seed: int = 0) -> ImageSet:
    """The same images, labelled by which of so many clusters they fall into: k-means on their pixels, averaged to 7 x 7.

    Raises:
        ValueError: fewer images than clusters, or fewer than two clusters.
    """
    if not 2 <= clusters <= len(images):
        raise ValueError(f"clusters must be 2 or more, and at most as many as images ({len(images):,}), got {clusters}")
    coarse = nn.functional.adaptive_avg_pool2d(images.pixels(), 7).flatten(1).cpu().numpy()
    random_state = seed_of(seed, "clusters") % 2**32
    labels = KMeans(clusters, n_init=1, random_state=random_state).fit_predict(coarse)
    classes = tuple(f"cluster {number}" for number in range(clusters))
    return replace(images, labels=torch.from_numpy(labels).long().to(images.device), classes=classes)


class Arms:
    """The images of a labelled set, by class: drawn inside a class in random order, each once."""

    def __init__(self, labels: Tensor, arms: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        labels = labels.cpu()
        order = torch.randperm(len(labels), generator=self.generator)
        self.stock = [order[labels[order] == arm] for arm in range(arms)]

    @property
    def left(self) -> Tensor:
        """How many images each arm still has, int64 [A]."""
        return torch.tensor([len(images) for images in self.stock])

    def pull(self, bandit: GradientBandit | TreeBandit, count: int) -> tuple[Tensor, Tensor]:
        """Draws arms by the bandit's policy and the next image of each: (arms [count], image numbers [count])."""
        arms, images, missing = [], [], count
        while missing:
            left = self.left
            drawn = torch.multinomial(bandit.policy(left > 0), missing, replacement=True, generator=self.generator)
            pulls = torch.minimum(drawn.bincount(minlength=len(left)), left).tolist()
            for arm, n in enumerate(pulls):
                arms.append(torch.full((n,), arm))
                images.append(self.stock[arm][:n])
                self.stock[arm] = self.stock[arm][n:]
            missing -= sum(pulls)
        order = torch.randperm(count, generator=self.generator)  # not sorted by class: half a round is a fair half
        return torch.cat(arms)[order], torch.cat(images)[order]


class Learner:
    """The substitute while it is being collected for: a few steps after each round, on everything answered so far."""

    def __init__(self, model: nn.Module, settings: TrainSettings, seed: int, steps: int = 4):
        self.model, self.settings, self.steps = model, settings, steps
        self.optimiser = make_optimiser(model, settings)
        self.generator = torch.Generator().manual_seed(seed)

    def learn(self, images: Tensor, answers: Tensor) -> None:
        """`steps` batches drawn from images uint8 [N, C, H, W] and their answers [N, K]."""
        self.model.train()
        for _ in range(self.steps):
            index = torch.randint(len(images), (self.settings.batch,), generator=self.generator)
            x, targets = to_float(images[index.to(images.device)]), answers[index.to(answers.device)]
            with autocast(answers.device):
                loss = nn.functional.cross_entropy(self.model(x.to(answers.device)), targets)
            descend(self.optimiser, loss)


class AdaptiveKnockoff(Knockoff):
    """Adaptive strategy: a bandit whose arms are the proxy set's classes learns which of them pay.

    With a reward of `ORACLES` this attacker knows that there is a defence, and no more of it than it says of itself.

    A round draws `batch` images by the present policy, asks them all at once, and lets the bandit learn from each.
    Images of a class come in random order, without replacement; a class that is used up is closed. In the end a fresh
    substitute is trained on the whole transfer set, as after the random strategy.

    Args:
        proxy: the attacker's images and the classes the attacker knows them by.
        architecture, settings, seed, labels: see `TransferAttack`.
        reward: "certainty", "diversity", "loss", or "all": the mean of the three, each rescaled over the window. Or
            "answered": 1 for an answer, 0 for a refusal; or "bits": less the bits of work that an answer costs, as the
            service says before it is paid.
        clusters: the arms are so many clusters of the images (see `clustered`) in place of their classes.
        superclasses: for each class its superclass; the bandit is then a tree, coarse to fine. None: flat.
        batch: images a round.
        window: how many of the latest answers are "recent".

    Attributes:
        policies: after a run, the probability of each class in each round, float64 [rounds, A].

    Raises:
        ValueError: an unknown reward, fewer than two classes with images, superclasses that do not fit them, or both
            superclasses and clusters.
    """

    def __init__(
        self,
        proxy: ImageSet,
        architecture: str | None = None,
        settings: TrainSettings | None = None,
        seed: int = 0,
        *,
        reward: str = "all",
        superclasses: Sequence[int] | None = None,
        clusters: int | None = None,
        batch: int = 32,
        window: int = 512,
        labels: str = "soft",
    ):
        if clusters is not None and superclasses is not None:
            raise ValueError(
                "superclasses are of the proxy set's classes, and clusters take their place; give one of them"
            )
        proxy = proxy if clusters is None else clustered(proxy, clusters, seed)
        super().__init__(proxy, architecture, settings, seed, labels=labels)
        if reward not in (*REWARDS, *ORACLES, "all"):
            raise ValueError(f"reward must be {', '.join((*REWARDS, *ORACLES))} or all, got {reward!r}")
        if batch < 1 or window < 1:
            raise ValueError(f"batch and window must be at least 1, got {batch} and {window}")
        if len(proxy) and len(proxy.labels.unique()) < 2:
            raise ValueError(
                f"the proxy set {proxy.name} has images of one class only, and a bandit needs two to choose from; "
                "label the images, or choose them at random"
            )
        if superclasses is not None and len(superclasses) != len(proxy.classes):
            raise ValueError(f"superclasses for {len(superclasses)} classes, the proxy set has {len(proxy.classes)}")
        if superclasses is not None:
            TreeBandit(superclasses)  # says now what is wrong with them
        self.reward, self.superclasses, self.batch, self.window = reward, superclasses, batch, window
        self.policies = torch.empty(0, len(proxy.classes))

    def collect(self, querier: Querier) -> TransferSet:
        self.check_budget(querier.budget)
        classes = len(self.proxy.classes)
        arms, policies = Arms(self.proxy.labels, classes, seed_of(self.seed, "arms")), []
        bandit = TreeBandit(self.superclasses) if self.superclasses else GradientBandit(classes)
        rewards, learner = Rewards(self.reward, self.window), self._learner(querier)
        images = self.proxy.images.new_empty(querier.budget, *querier.image_shape)
        answers = torch.empty(querier.budget, querier.classes, device=best_device())
        asked = 0
        while asked < querier.budget:
            policies.append(bandit.policy(arms.left > 0))
            # A whole round, then as much of it as the budget allows: a larger budget begins with the same images.
            pulled, index = arms.pull(bandit, min(self.batch, int(arms.left.sum())))
            index = index[: querier.budget - asked].to(self.proxy.device)
            batch = slice(asked, asked + len(index))
            images[batch] = self.proxy.images[index]
            bits = querier.quote(images[batch]) if self.reward == "bits" else None
            answers[batch] = querier.ask(images[batch])
            asked = batch.stop
            if asked == querier.budget:
                break
            taught, advantages = self._advantages(rewards, learner, images[batch], answers[batch], bits)
            open_arms = arms.left > 0
            for arm, advantage in zip(pulled[taught.cpu()].tolist(), advantages.tolist(), strict=True):
                bandit.update(arm, advantage, open_arms)
            if learner and taught.any():
                usable = answered(answers[:asked])
                learner.learn(images[:asked][usable.to(images.device)], self.targets(answers[:asked][usable]))
        self.policies = torch.stack(policies)
        return TransferSet(images, answers)

    def _advantages(
        self, rewards: Rewards, learner: Learner | None, images: Tensor, answers: Tensor, bits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which images of a round teach the bandit, bool [n], and what each of those was worth above the mean."""
        usable = answered(answers)
        if self.reward in ORACLES:
            return torch.ones_like(usable), rewards.above_mean(usable.double() if bits is None else -bits.double())
        if not usable.any():  # to everybody but an oracle's listener a refusal is no reward, good or bad
            return usable, answers.new_empty(0)
        predictions = learner and predict(learner.model, to_float(images[usable.to(images.device)]))
        return usable, rewards.advantages(self.targets(answers[usable]), predictions)

    def _learner(self, querier: Querier) -> Learner | None:
        if self.reward not in ("loss", "all"):
            return None
        model = self.build_substitute(querier.image_shape, querier.classes).to(best_device())
        return Learner(model, self.train_settings(querier.image_shape), seed_of(self.seed, "learner"))
