"""What every attack is: it spends a query budget at one door and comes back with a substitute."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from samelib.gateway import QueryGateway
from samelib.models.classifiers import build_classifier
from samelib.training import TrainSettings, best_device, seed_of, train_classifier

QUERY_BATCH = 256
Evaluate = Callable[[nn.Module], dict[str, float]]
Curve = list[dict[str, float]]


def answered(answers: Tensor) -> Tensor:
    """bool [N]: which rows of [N, K] are answers; those of refused queries are NaN, and teach nothing."""
    return answers.isfinite().all(1)


class Service(NamedTuple):
    """All that an attacker has of the victim: its public description, and the right to ask so many times.

    Attributes:
        ask: images [N, C, H, W], uint8 or float in [-1, 1] -> probabilities [N, K], NaN where the service refused.
        budget: how many images may be asked in all.
        image_shape, classes: (C, H, W) and K.
    """

    ask: Callable[[Tensor], Tensor]
    budget: int
    image_shape: tuple[int, int, int]
    classes: int


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
    curve: Curve
    queries: int
    answered: int
    seconds: float
    stopped: str | None = None


class Attack(ABC):
    """Steals a model through `gateway.query` and nothing else. A query that the service refuses is spent all the same.

    Args:
        architecture: of the substitute ("conv3", "resnet18", ...); the paper gives the attacker the victim's.
        settings: the substitute's training.
        seed: of the choice of queries and the substitute's weights.
    """

    smallest_round = 1  # the fewest queries it can do anything with

    def __init__(self, architecture: str, settings: TrainSettings, seed: int = 0):
        self.architecture, self.settings, self.seed = architecture, settings, seed

    def run(self, gateway: QueryGateway, evaluate: Evaluate | None = None, points: Sequence[int] = ()) -> AttackResult:
        """Spends what remains of the gateway's budget, and never a query more.

        Args:
            gateway: the door to the victim; it must have a budget.
            evaluate: the experimenter's measure of a substitute; the attacker learns nothing from it.
            points: numbers of queries after which to evaluate a substitute on the way.

        Raises:
            ValueError: no budget, one that this attack cannot spend, or a point below 1; nothing was asked then.
        """
        start = time.perf_counter()
        if gateway.budget is None:
            raise ValueError("an attack needs a gateway with a budget")
        if gateway.remaining < 1:
            raise ValueError(f"the budget of {gateway.budget:,} queries is spent")
        if min(points, default=1) < 1:
            raise ValueError(f"points are numbers of queries, 1 or more, got {list(points)}")
        budget, refused = int(gateway.remaining), 0
        self.check_budget(budget)
        with tqdm(total=budget, desc=type(self).__name__, unit="query", leave=False, mininterval=0.5) as bar:

            def ask(x: Tensor) -> Tensor:
                nonlocal refused
                answers = []
                for part in x.split(QUERY_BATCH):
                    answers.append(gateway.query(part))
                    bar.update(len(part))
                found = torch.cat(answers).to(best_device())  # where the attacker computes
                refused += int((~answered(found)).sum())
                return found

            service = Service(ask, budget, gateway.image_shape, gateway.classes)
            substitute, curve, stopped = self.steal(service, evaluate, points if evaluate else ())
        spent = budget - int(gateway.remaining)
        return AttackResult(substitute, curve, spent, spent - refused, time.perf_counter() - start, stopped)

    def check_budget(self, budget: int) -> None:
        """Raises ValueError when this attack cannot spend `budget` queries."""
        if budget < self.smallest_round:
            raise ValueError(
                f"{budget:,} queries are fewer than the smallest round of {type(self).__name__}, {self.smallest_round:,}; "
                "raise the budget"
            )

    @abstractmethod
    def steal(
        self, service: Service, evaluate: Evaluate | None, points: Sequence[int]
    ) -> tuple[nn.Module, Curve, str | None]:
        """The attack itself: (substitute, curve, why it stopped early or None)."""

    def build_substitute(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A fresh substitute. Its seed is not the victim's: who starts from those weights has half the copy."""
        return build_classifier(self.architecture, image_shape, classes, seed_of(self.seed, "substitute"))


class TransferSet(NamedTuple):
    """Images uint8 [N, C, H, W] as they were asked, the answers [N, K] (NaN where there was none), and why there are not
    more (or None)."""

    images: Tensor
    answers: Tensor
    stopped: str | None = None


class TransferAttack(Attack):
    """An attack that collects a transfer set first and trains its substitute on it afterwards.

    Args:
        labels: "soft" trains on the probabilities that were answered, "hard" on the class they name.

    Raises:
        ValueError: other labels.
    """

    def __init__(self, architecture: str, settings: TrainSettings, seed: int = 0, *, labels: str = "soft"):
        super().__init__(architecture, settings, seed)
        if labels not in ("soft", "hard"):
            raise ValueError(f"labels must be soft or hard, got {labels!r}")
        self.labels = labels

    @abstractmethod
    def collect(self, service: Service) -> TransferSet:
        """Asks until the budget is spent. The first n images are what a budget of n would have asked, so that one
        transfer set gives the whole curve."""

    def steal(self, service, evaluate, points):
        images, answers, stopped = self.collect(service)
        curve = []
        for count in sorted({*(p for p in points if p < len(images)), len(images)}):
            substitute = self.train_substitute(images[:count], answers[:count])
            if evaluate:
                curve.append({"queries": count} | evaluate(substitute))
        return substitute, curve, stopped

    def targets(self, answers: Tensor) -> Tensor:
        """What the attacker learns from, [N, K]: the probabilities, or 1 for the class they name."""
        return answers if self.labels == "soft" else nn.functional.one_hot(answers.argmax(1), answers.shape[1]).float()

    def train_substitute(self, images: Tensor, answers: Tensor, settings: TrainSettings | None = None) -> nn.Module:
        """A fresh substitute trained with cross-entropy on the victim's answers (images uint8 [N, C, H, W]); untrained,
        where none of the images was answered."""
        substitute = self.build_substitute(tuple(images.shape[1:]), answers.shape[1]).to(answers.device)
        known = answered(answers)
        if not known.any():
            return substitute.eval()
        images, answers = images[known.to(images.device)], answers[known]
        train_classifier(
            substitute,
            images.to(answers.device),
            self.targets(answers),
            settings or self.settings,
            seed=seed_of(self.seed, "substitute"),
            label="substitute",
        )
        return substitute


class FixedQueries(TransferAttack):
    """An attack whose queries do not depend on the answers."""

    @abstractmethod
    def draw(self, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        """`count` images uint8 [count, C, H, W] to ask."""

    def collect(self, service: Service) -> TransferSet:
        images = self.draw(service.budget, service.image_shape)
        return TransferSet(images, service.ask(images))


class UniformNoise(FixedQueries):
    """Pixels drawn uniformly: the simplest attacker, who has no data at all."""

    def draw(self, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, (count, *image_shape), dtype=torch.uint8, generator=generator)
