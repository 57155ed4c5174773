"""Knockoff Nets (Orekondy et al. 2019): steal with images of one's own, chosen at random or by what has paid so far."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samelib.attacks.bandit import GradientBandit, TreeBandit
from samelib.attacks.base import FixedQueries, Service, TransferAttack, TransferSet, answered
from samelib.data.image_set import ImageSet, to_float
from samelib.models.classifiers import predict
from samelib.training import TrainSettings, autocast, best_device, descend, make_optimiser, seed_of

REWARDS = ("certainty", "diversity", "loss")


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


class Knockoff(FixedQueries):
    """Random strategy: images of the proxy set, drawn without replacement.

    Args:
        proxy: the attacker's images; their labels are not used.
    """

    def __init__(self, proxy: ImageSet, architecture: str, settings: TrainSettings, seed: int = 0, **how):
        super().__init__(architecture, settings, seed, **how)
        self.proxy = proxy

    def check_budget(self, budget: int) -> None:
        super().check_budget(budget)
        check_proxy(self.proxy, budget)

    def draw(self, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        self.check_budget(count)
        return self.proxy.shuffled(self.seed)[:count].images


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
        of = {
            "certainty": lambda: certainty_reward(answers),
            "diversity": lambda: diversity_reward(answers, mean),
            "loss": lambda: loss_reward(answers, predictions),
        }
        raw = torch.stack([of[kind]() for kind in self.kinds], dim=1)
        self.answers = self._recent(self.answers, answers)
        self.raw = self._recent(self.raw, raw)
        rewards = rescaled(raw, self.raw).mean(1) if len(self.kinds) > 1 else raw[:, 0]
        baseline = self.total / self.count if self.count else float(rewards.mean())
        self.total, self.count = self.total + float(rewards.sum()), self.count + len(rewards)
        return rewards - baseline

    def _recent(self, old: Tensor | None, new: Tensor) -> Tensor:
        return (new if old is None else torch.cat([old, new]))[-self.window :]


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
            wanted = torch.minimum(drawn.bincount(minlength=len(left)), left).tolist()
            for arm, n in enumerate(wanted):
                arms.append(torch.full((n,), arm))
                images.append(self.stock[arm][:n])
                self.stock[arm] = self.stock[arm][n:]
            missing -= sum(wanted)
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


class AdaptiveKnockoff(TransferAttack):
    """Adaptive strategy: a bandit whose arms are the proxy set's classes learns which of them pay.

    A round draws `batch` images by the present policy, asks them all at once, and lets the bandit learn from each.
    Images of a class come in random order, without replacement; a class that is used up is closed. In the end a fresh
    substitute is trained on the whole transfer set, as after the random strategy.

    Args:
        proxy: the attacker's images and the classes the attacker knows them by.
        reward: "certainty", "diversity", "loss", or "all": the mean of the three, each rescaled over the window.
        superclasses: for each class its superclass; the bandit is then a tree, coarse to fine. None: flat.
        batch: images a round.
        window: how many of the latest answers are "recent".

    Attributes:
        policies: after a run, the probability of each class in each round, float64 [rounds, A].

    Raises:
        ValueError: an unknown reward, fewer than two classes with images, or superclasses that do not fit them.
    """

    def __init__(
        self,
        proxy: ImageSet,
        architecture: str,
        settings: TrainSettings,
        seed: int = 0,
        *,
        reward: str = "all",
        superclasses: Sequence[int] | None = None,
        batch: int = 32,
        window: int = 512,
        **how,
    ):
        super().__init__(architecture, settings, seed, **how)
        if reward not in (*REWARDS, "all"):
            raise ValueError(f"reward must be {', '.join(REWARDS)} or all, got {reward!r}")
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
        self.proxy, self.reward, self.superclasses, self.batch, self.window = proxy, reward, superclasses, batch, window
        self.policies = torch.empty(0, len(proxy.classes))

    def check_budget(self, budget: int) -> None:
        super().check_budget(budget)
        check_proxy(self.proxy, budget)

    def collect(self, service: Service) -> TransferSet:
        self.check_budget(service.budget)
        classes = len(self.proxy.classes)
        arms, policies = Arms(self.proxy.labels, classes, seed_of(self.seed, "arms")), []
        bandit = TreeBandit(self.superclasses) if self.superclasses else GradientBandit(classes)
        rewards, learner = Rewards(self.reward, self.window), self._learner(service)
        images, answers = self.proxy.images.new_empty(service.budget, *service.image_shape), None
        done = 0
        while done < service.budget:
            policies.append(bandit.policy(arms.left > 0))
            # A whole round, then as much of it as the budget allows: a larger budget begins with the same images.
            pulled, index = arms.pull(bandit, min(self.batch, int(arms.left.sum())))
            new = self.proxy.images[index[: service.budget - done].to(self.proxy.device)]
            found = service.ask(new)
            if answers is None:
                answers = found.new_empty(service.budget, found.shape[1])
            part = slice(done, done + len(new))
            images[part], answers[part] = new, found
            done = part.stop
            told = answered(found)  # a refusal is no reward, good or bad
            if not told.any():
                continue
            advantages = rewards.advantages(
                self.targets(found[told]), learner and predict(learner.model, to_float(new[told.to(new.device)]))
            )
            if done < service.budget:
                open_arms = arms.left > 0
                for arm, advantage in zip(pulled[told.cpu()].tolist(), advantages.tolist(), strict=True):
                    bandit.update(arm, advantage, open_arms)
                if learner:
                    known = answered(answers[:done])
                    learner.learn(images[:done][known.to(images.device)], self.targets(answers[:done][known]))
        self.policies = torch.stack(policies)
        return TransferSet(images, answers)

    def _learner(self, service: Service) -> Learner | None:
        if self.reward not in ("loss", "all"):
            return None
        model = self.build_substitute(service.image_shape, service.classes).to(best_device())
        return Learner(model, self.settings, seed_of(self.seed, "learner"))


def check_proxy(proxy: ImageSet, budget: int) -> None:
    """Raises ValueError when the proxy set holds fewer images than the budget."""
    if budget > len(proxy):
        raise ValueError(
            f"the proxy set {proxy.name} holds {len(proxy):,} images, the budget is {budget:,}; "
            "lower the budget or bring more images"
        )
