"""The door to a victim: what an attacker's or a user's query passes on its way to an answer."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from samelib.data.image_set import check_queries, quantise, to_uint8
from samelib.models.classifiers import Victim


class BudgetExceeded(RuntimeError):
    """A query would overspend the query budget; nothing of it was answered or counted."""


class Scorer(Protocol):
    """What the gateway asks of a detector: queries [N, C, H, W] and answers [N, K] -> anomaly scores [N]; and, where
    there is a response, scores [N] -> conformal p-values [N]."""

    def score(self, x: Tensor, answers: Tensor) -> Tensor: ...
    def p_values_of(self, scores: Tensor) -> Tensor: ...


class Decision(NamedTuple):
    """What a response decides about queries: `refused` bool [N], and `bits` int64 [N] of work that the answer costs."""

    refused: Tensor
    bits: Tensor


class Work(NamedTuple):
    """What clients did for their answers: `hashes` int64 [N], and `seconds` float64 [N], measured or modelled."""

    hashes: Tensor
    seconds: Tensor


class Policy(Protocol):
    """What the gateway asks of a response (see samelib.responses)."""

    def decide(self, p_values: Tensor) -> Decision: ...
    def work(self, queries: Tensor, bits: Tensor) -> Work: ...


_COLUMNS = ("queries", "answers", "scores", "refused", "hashes", "seconds")


@dataclass
class QueryLog:
    """Everything that went through the door, in order; the parts are joined when read."""

    _parts: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})

    def add(self, **parts: Tensor) -> None:
        for name, value in parts.items():
            self._parts[name].append(value)

    def _joined(self, name: str) -> Tensor:
        if not self._parts[name]:
            raise LookupError(f"the log holds no {name}")
        self._parts[name] = [torch.cat(self._parts[name])]
        return self._parts[name][0]

    def save(self, path: Path | str) -> None:
        """Writes `images`, `answers` and what else the log holds as one .npz file, whole or not at all.

        Raises:
            LookupError: nothing was asked yet.
        """
        path = Path(path)
        arrays = {"images": self.queries, "answers": self.answers}
        arrays |= {name: self._joined(name) for name in _COLUMNS[2:] if self._parts[name]}
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
        """Probabilities [N, K]; NaN where the query was refused."""
        return self._joined("answers")

    @property
    def scores(self) -> Tensor:
        """Anomaly scores [N]; LookupError where the gateway had no detector."""
        return self._joined("scores")

    @property
    def refused(self) -> Tensor:
        """bool [N]; LookupError where the gateway had no response, as for the next two."""
        return self._joined("refused")

    @property
    def hashes(self) -> Tensor:
        """int64 [N]: the work that was done for each answer."""
        return self._joined("hashes")

    @property
    def seconds(self) -> Tensor:
        """float64 [N]: how long that work took the client, measured or modelled (see ProofOfWork)."""
        return self._joined("seconds")


class Gateway(ABC):
    """A door to a victim: checks, counts and logs what goes through it.

    Args:
        image_shape, classes: (C, H, W) and K of the victim.
        budget: how many queries may be asked, answered or refused; None for no limit.

    Raises:
        ValueError: a budget below 1.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, budget: int | None = None):
        if budget is not None and not budget >= 1:
            raise ValueError(f"the query budget must be at least 1, got {budget}")
        self.image_shape, self.classes = tuple(image_shape), classes
        self.budget, self.spent, self.log = budget, 0, QueryLog()

    @property
    def remaining(self) -> float:
        """Queries left; infinite without a budget."""
        return float("inf") if self.budget is None else self.budget - self.spent

    def query(self, x: Tensor) -> Tensor:
        """Probabilities [N, K] for images [N, C, H, W] in [-1, 1] (or uint8); NaN in the rows of refused ones.

        Raises:
            BudgetExceeded: N is more than what remains; nothing is answered or counted.
            TypeError, ValueError: the images are not what the service takes (see `check_queries`).
        """
        x = check_queries(x, self.image_shape)
        if len(x) > self.remaining:
            raise BudgetExceeded(f"{len(x)} asked, {self.remaining} of {self.budget} queries left; send fewer")
        parts = self._ask(x)
        self.log.add(**parts)
        self.spent += len(x)
        return parts["answers"]

    @abstractmethod
    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        """What the log is to hold of these queries: `queries`, `answers`, and what else there is."""


class QueryGateway(Gateway):
    """Counts, cleans, scores, answers or refuses, and logs queries.

    Every query, benign or malicious, is clamped to [-1, 1] and rounded to the 8-bit grid before the victim sees it:
    what a real image API receives. The detector scores the query under its own protocol (`fixed` sees the same 8-bit
    image; the authors' code scored the raw one).

    Args:
        victim: the model behind the door.
        budget: how many queries may be asked, answered or refused; None for no limit.
        detector: scores every query into the log.
        response: what is done about a query that looks strange to the detector (see samelib.responses).

    Raises:
        ValueError: a budget below 1, or a response without a detector.
    """

    def __init__(
        self,
        victim: Victim,
        budget: int | None = None,
        detector: Scorer | None = None,
        response: Policy | None = None,
    ):
        super().__init__(victim.image_shape, victim.classes, budget)
        if response is not None and detector is None:
            raise ValueError("a response needs a detector that says which queries look strange; pass detector=...")
        self._victim, self._detector, self._response = victim, detector, response

    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        received = quantise(x)
        parts = {"queries": to_uint8(received), "answers": self._victim(received)}
        if self._detector is not None:
            parts["scores"] = self._detector.score(x, parts["answers"])
        if self._response is not None:
            parts |= self._respond(**parts)
        return parts

    def _respond(self, queries: Tensor, answers: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """What the response makes of the answers, and what it adds to the log."""
        refused, bits = self._response.decide(self._detector.p_values_of(scores))
        answers = answers.masked_fill(refused[:, None].to(answers.device), torch.nan)
        return {"answers": answers, "refused": refused} | self._response.work(queries, bits)._asdict()
