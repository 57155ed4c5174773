"""The one door to a victim: what an attacker's or a user's query passes on its way to an answer."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from samelib.data.image_set import check_queries, quantise, to_uint8
from samelib.models.classifiers import Victim


class BudgetExceeded(RuntimeError):
    """A query would overspend the query budget; nothing of it was answered or counted."""


class Scorer(Protocol):
    """What the gateway asks of a detector: queries [N, C, H, W] and answers [N, K] -> anomaly scores [N]."""

    def score(self, x: Tensor, answers: Tensor) -> Tensor: ...


@dataclass
class QueryLog:
    """Everything that went through the door, in order; the parts are joined when read."""

    _parts: dict[str, list[Tensor]] = field(default_factory=lambda: {"queries": [], "answers": [], "scores": []})

    def add(self, **parts: Tensor) -> None:
        for name, value in parts.items():
            self._parts[name].append(value)

    def _joined(self, name: str) -> Tensor:
        if not self._parts[name]:
            raise LookupError(f"the log holds no {name}")
        self._parts[name] = [torch.cat(self._parts[name])]
        return self._parts[name][0]

    def save(self, path: Path | str) -> None:
        """Writes `images`, `answers` and, where a detector watched, `scores` as one .npz file, whole or not at all.

        Raises:
            LookupError: nothing was asked yet.
        """
        path = Path(path)
        arrays = {"images": self.queries, "answers": self.answers}
        if self._parts["scores"]:
            arrays["scores"] = self.scores
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **{name: values.cpu().numpy() for name, values in arrays.items()})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def queries(self) -> Tensor:
        """uint8 [N, C, H, W], as the service received them."""
        return self._joined("queries")

    @property
    def answers(self) -> Tensor:
        """Probabilities [N, K]."""
        return self._joined("answers")

    @property
    def scores(self) -> Tensor:
        """Anomaly scores [N]; LookupError where the gateway had no detector."""
        return self._joined("scores")


class QueryGateway:
    """Counts, cleans, scores, answers and logs queries.

    Every query, benign or malicious, is clamped to [-1, 1] and rounded to the 8-bit grid before the victim sees it:
    what a real image API receives. The detector scores the query under its own protocol (`fixed` sees the same 8-bit
    image; the authors' code scored the raw one).

    Args:
        victim: the model behind the door.
        budget: how many queries may be answered; None for no limit.
        detector: scores every query into the log.

    Raises:
        ValueError: a budget below 1.
    """

    def __init__(self, victim: Victim, budget: int | None = None, detector: Scorer | None = None):
        if budget is not None and not budget >= 1:
            raise ValueError(f"the query budget must be at least 1, got {budget}")
        self._victim, self._detector = victim, detector
        self.budget, self.spent, self.log = budget, 0, QueryLog()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._victim.image_shape

    @property
    def classes(self) -> int:
        return self._victim.classes

    @property
    def remaining(self) -> float:
        """Queries left; infinite without a budget."""
        return float("inf") if self.budget is None else self.budget - self.spent

    def query(self, x: Tensor) -> Tensor:
        """Probabilities [N, K] for images [N, C, H, W] in [-1, 1] (or uint8).

        Raises:
            BudgetExceeded: N is more than what remains; nothing is answered or counted.
            TypeError, ValueError: the images are not what the service takes (see `check_queries`).
        """
        x = check_queries(x, self.image_shape)
        if len(x) > self.remaining:
            raise BudgetExceeded(f"{len(x)} asked, {self.remaining} of {self.budget} queries left; send fewer")
        received = quantise(x)
        answers = self._victim(received)
        if self._detector is not None:
            self.log.add(scores=self._detector.score(x, answers))
        self.log.add(queries=to_uint8(received), answers=answers)
        self.spent += len(x)
        return answers
