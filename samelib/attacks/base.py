"""What every attack is: it spends a query budget at one gateway and comes back with a substitute."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from samelib.gateway import Gateway
from samelib.models.classifiers import build_classifier
from samelib.presets import Preset, preset
from samelib.training import TrainSettings, best_device, seed_of, train_classifier

QUERY_BATCH = 256


def answered(answers: Tensor) -> Tensor:
    """bool [N]: which rows of [N, K] are answers; those of refused queries are NaN, and teach nothing."""
    return answers.isfinite().all(1)


class Querier:
    """All that an attack has of the victim: what the service says of itself, and so many queries.

    Args:
        gateway: the door to the victim; it must have a budget.
        description: stands before the progress bar.

    Attributes:
        budget: how many images may be asked in all: what was left of the gateway's budget.
        image_shape, classes: (C, H, W) and K of the victim.
        refused: how many of the images asked so far got no answer.
        stopped: why the attack asks no more before the budget is spent; set by the attack.
        progress: the bar of the queries asked.

    Raises:
        ValueError: the gateway has no budget, or nothing of it is left.
    """

    def __init__(self, gateway: Gateway, description: str = "attack"):
        if gateway.budget is None:
            raise ValueError("an attack needs a gateway with a budget, as in QueryGateway(victim, budget=1_000)")
        if gateway.remaining < 1:
            raise ValueError(f"the budget of {gateway.budget:,} queries is spent")
        self.budget = int(gateway.remaining)
        self.image_shape, self.classes = gateway.image_shape, gateway.classes
        self.refused, self.stopped = 0, None
        self.progress = tqdm(total=self.budget, desc=description, unit="query", leave=False, mininterval=0.5)
        self._gateway = gateway

    def ask(self, images: Tensor) -> Tensor:
        """Probabilities [N, K] for images [N, C, H, W], uint8 or float in [-1, 1]; NaN where the service refused.

        They lie where the attacker computes (`best_device`).

        Raises:
            BudgetExceeded: more images than the budget has left.
        """
        parts = []
        for part in images.split(QUERY_BATCH):
            parts.append(self._gateway.query(part))
            self.progress.update(len(part))
        answers = torch.cat(parts).to(best_device())
        self.refused += int((~answered(answers)).sum())
        return answers

    def quote(self, images: Tensor) -> Tensor:
        """Bits of work, int64 [N], that answers to images [N, C, H, W] would cost: said before anything is paid, and no
        query of the budget."""
        return torch.cat([self._gateway.quote(part) for part in images.split(QUERY_BATCH)])


@dataclass
class AttackResult:
    """What an attack brought home.

    Attributes:
        substitute: the copy, trained on all queries.
        curve: for each point asked for, the queries spent and what `evaluate` said of the substitute trained on them.
        queries: how many queries were spent in all.
        answered: to how many of them there was an answer; the others were refused.
        seconds: how long the attack took: queries, training, and what `evaluate` needed.
        stopped: why it spent less than its budget; None where it spent all.
    """

    substitute: nn.Module
    curve: list[dict[str, float]]
    queries: int
    answered: int
    seconds: float
    stopped: str | None = None


class Attack(ABC):
    """Steals a model through `gateway.query` and nothing else. A query that the service refuses is spent all the same.

    Args:
        architecture: of the substitute ("conv3", "resnet18", ...); the paper gives the attacker the victim's. By default
            the lecture tier's for the victim's images.
        settings: the substitute's training; by default the lecture tier's.
        seed: of the choice of queries and the substitute's weights.
    """

    smallest_round = 1  # the fewest queries it can do anything with

    def __init__(self, architecture: str | None = None, settings: TrainSettings | None = None, seed: int = 0):
        self.architecture, self.settings, self.seed = architecture, settings, seed

    def run(
        self,
        gateway: Gateway,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        points: Sequence[int] = (),
    ) -> AttackResult:
        """Spends what remains of the gateway's budget, and never a query more.

        Args:
            gateway: the door to the victim; it must have a budget.
            evaluate: the experimenter's measure of a substitute; the attacker learns nothing from it.
            points: numbers of queries after which to evaluate a substitute on the way.

        Raises:
            ValueError: no budget, one that this attack cannot spend, images that its substitute cannot take, or a point
                below 1; nothing was asked then.
        """
        start = time.perf_counter()
        if min(points, default=1) < 1:
            raise ValueError(f"points are numbers of queries, 1 or more, got {list(points)}")
        querier = Querier(gateway, type(self).__name__)
        curve = []
        with querier.progress:
            self.check_budget(querier.budget)
            # A substitute that cannot be built or trained is said before anything is asked.
            self.train_settings(querier.image_shape)
            self.build_substitute(querier.image_shape, querier.classes)
            for queries, substitute in self.steal(querier, points if evaluate else ()):
                if evaluate:
                    curve.append({"queries": queries} | evaluate(substitute))
        spent = querier.budget - int(gateway.remaining)
        seconds = time.perf_counter() - start
        return AttackResult(substitute, curve, spent, spent - querier.refused, seconds, querier.stopped)

    def check_budget(self, budget: int) -> None:
        """Raises ValueError when this attack cannot spend `budget` queries."""
        if budget < self.smallest_round:
            raise ValueError(
                f"{budget:,} queries are fewer than the smallest round of {type(self).__name__}, {self.smallest_round:,}; "
                "raise the budget"
            )

    @abstractmethod
    def steal(self, querier: Querier, points: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """The attack itself: yields (queries, substitute) for each of the points below the budget, then the last one."""

    def build_substitute(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A fresh substitute. Its seed is nobody else's: who starts from the victim's weights has half the copy."""
        architecture = self.architecture or _lecture(image_shape).architecture
        return build_classifier(architecture, image_shape, classes, seed_of(self.seed, "substitute"))

    def train_settings(self, image_shape: tuple[int, int, int]) -> TrainSettings:
        """The substitute's training: the one that was given, or the lecture tier's."""
        return self.settings or self.tier_settings(_lecture(image_shape))

    def tier_settings(self, tier: Preset) -> TrainSettings:
        """Which training of a tier is this attack's."""
        return tier.substitute_train


def _lecture(image_shape: tuple[int, int, int]) -> Preset:
    try:
        return preset("lecture", image_shape)
    except ValueError as error:
        raise ValueError(f"no tier fits this victim, pass architecture and settings: {error}") from error


class TransferSet(NamedTuple):
    """Images uint8 [N, C, H, W] as they were asked, and the answers [N, K], NaN where there was none."""

    images: Tensor
    answers: Tensor


class TransferAttack(Attack):
    """An attack that collects a transfer set first and trains its substitute on it afterwards.

    Args:
        labels: "soft" trains on the probabilities that were answered, "hard" on the class they name.

    Raises:
        ValueError: other labels.
    """

    def __init__(
        self,
        architecture: str | None = None,
        settings: TrainSettings | None = None,
        seed: int = 0,
        *,
        labels: str = "soft",
    ):
        super().__init__(architecture, settings, seed)
        if labels not in ("soft", "hard"):
            raise ValueError(f"labels must be soft or hard, got {labels!r}")
        self.labels = labels

    @abstractmethod
    def collect(self, querier: Querier) -> TransferSet:
        """Asks until the budget is spent, or sets `querier.stopped` to the reason why not.

        The first n images are what a budget of n would have asked, so that one transfer set gives the whole curve.
        """

    def steal(self, querier: Querier, points: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        images, answers = self.collect(querier)
        for count in sorted({*(p for p in points if p < len(images)), len(images)}):
            yield count, self.train_substitute(images[:count], answers[:count])

    def targets(self, answers: Tensor) -> Tensor:
        """What the attacker learns from, [N, K]: the probabilities, or 1 for the class they name."""
        return answers if self.labels == "soft" else nn.functional.one_hot(answers.argmax(1), answers.shape[1]).float()

    def train_substitute(self, images: Tensor, answers: Tensor, settings: TrainSettings | None = None) -> nn.Module:
        """A fresh substitute trained with cross-entropy on the victim's answers (images uint8 [N, C, H, W]); untrained,
        where none of the images was answered."""
        image_shape = tuple(images.shape[1:])
        substitute = self.build_substitute(image_shape, answers.shape[1]).to(answers.device)
        usable = answered(answers)
        if not usable.any():
            return substitute.eval()
        train_classifier(
            substitute,
            images[usable.to(images.device)].to(answers.device),
            self.targets(answers[usable]),
            settings or self.train_settings(image_shape),
            seed=seed_of(self.seed, "substitute"),
            label="substitute",
        )
        return substitute


class UniformNoise(TransferAttack):
    """Pixels drawn uniformly: the simplest attacker, who has no data at all."""

    def draw(self, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        """The images to ask, uint8 [count, C, H, W]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, (count, *image_shape), dtype=torch.uint8, generator=generator)

    def collect(self, querier: Querier) -> TransferSet:
        images = self.draw(querier.budget, querier.image_shape)
        return TransferSet(images, querier.ask(images))
