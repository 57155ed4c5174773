"""The door to a victim: what an attacker's or a user's query passes on its way to an answer."""

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from samelib.data.image_set import received, to_uint8
from samelib.detectors.base import Detector, NotFittedError
from samelib.models.classifiers import Victim
from samelib.responses import Response


class Verdict(NamedTuple):
    """What becomes of queries.

    Attributes:
        queries: uint8 [N, C, H, W], as they were received.
        answers: the victim's probabilities [N, K]; NaN in the rows of refused queries.
        scores, p_values: the detector's, [N]; NaN where it did not look, None where there is no detector.
        refused: bool [N].
        bits: int64 [N]: work that the answer costs, 0 for none.
    """

    queries: Tensor
    answers: Tensor
    scores: Tensor | None
    p_values: Tensor | None
    refused: Tensor
    bits: Tensor


class Defence:
    """The one way to a decision, in a gateway and in a service: victim, detector, response.

    Every query, benign or malicious, is clamped to [-1, 1] and rounded to the 8-bit grid before anything sees it: what a
    real image API receives.

    Args:
        victim: answers.
        detector: scores; None: nothing is scored.
        response: decides by the detector's p-values; None: everything is answered.
        share: of the queries that the detector looks at, drawn by chance; below 1 only where nothing is decided by it.

    Raises:
        ValueError: a share outside (0, 1], or below 1 with a response; a response without a detector; a detector that was
            fitted to other images or classes; or what the response refuses (`Response.prepare`).
        NotFittedError: a detector that was not fitted.
    """

    def __init__(
        self,
        victim: Victim,
        detector: Detector | None = None,
        response: Response | None = None,
        share: float = 1.0,
    ):
        if not 0 < share <= 1 or (share < 1 and response is not None):
            raise ValueError(
                f"a share of queries can be looked at only where all are answered, got {share} and {response}"
            )
        if response is not None and detector is None:
            raise ValueError("a response needs a detector that says which queries look strange; pass detector=...")
        if detector is not None:
            if detector.image_shape is None:
                raise NotFittedError(f"this {type(detector).__name__} knows no images yet; call fit first")
            watched = getattr(detector, "victim", None) or victim
            victim.require(detector.image_shape, watched.classes)
        self.victim, self.detector, self.share = victim, detector, share
        self.response = None if response is None else response.prepare(detector)

    @classmethod
    def elsewhere(
        cls, detector: Detector, response: Response | None = None, share: float = 1.0, victim: Victim | None = None
    ) -> "Defence":
        """The defence of a model that another server asks: its answers come along with the images.

        Args:
            victim: shape and classes of the model, where the detector does not know them.

        Raises:
            NotFittedError, ValueError: as above; or a detector that knows no victim, and none is given.
        """
        if detector.image_shape is None:
            raise NotFittedError(f"this {type(detector).__name__} knows no images yet; call fit first")
        known = victim or getattr(detector, "victim", None)
        if known is None:
            raise ValueError("this detector does not say how many classes there are; pass victim=Victim.elsewhere(...)")
        return cls(Victim.elsewhere(known.image_shape, known.classes), detector, response, share)

    def judge(
        self,
        images: Tensor,
        paid: Tensor | None = None,
        accounts: Sequence[str] | None = None,
        answers: Tensor | None = None,
    ) -> Verdict:
        """What becomes of images [N, C, H, W], uint8 or float in [-1, 1].

        Args:
            paid: bool [N]: queries whose work is done already are answered, and not scored again.
            accounts: who sent each image; `BanAccount` needs it.
            answers: the victim's probabilities [N, K], where it was asked already; else it is asked now.

        Raises:
            TypeError, ValueError: the images are not what the victim takes (see `check_queries`), or there is not one
                account for each where the response goes by accounts.
            AccountsFull: see `AccountBook`.
        """
        x = received(images, self.victim.image_shape)
        queries = to_uint8(x)
        if self.response is not None and self.response.by_account and len(accounts or ()) != len(x):
            raise ValueError(f"{len(x)} images came with {len(accounts or ())} accounts; say who sent each image")
        answers = self.victim(x) if answers is None else self.victim.checked(answers.float(), len(x))
        refused, bits = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.int64)
        if self.detector is None:
            return Verdict(queries, answers, None, None, refused, bits)
        unpaid = torch.ones(len(x), dtype=torch.bool) if paid is None else ~paid
        if self.share < 1:
            unpaid &= torch.tensor([random.random() < self.share for _ in x])  # no seed of an experiment is touched
        scores, p_values = torch.full((2, len(x)), torch.nan)
        if unpaid.any():
            new_scores = self.detector.score_received(x[unpaid.to(x.device)], answers[unpaid.to(answers.device)])
            scores[unpaid] = new_scores.cpu().float()
            p_values[unpaid] = self.detector.p_values_of(new_scores).cpu().float()
            if self.response is not None:
                new = unpaid.nonzero()[:, 0].tolist()
                names = None if accounts is None else [accounts[i] for i in new]
                refused[unpaid], bits[unpaid] = self.response.decide(p_values[unpaid], queries[new], names)
        answers = answers.masked_fill(refused[:, None].to(answers.device), torch.nan)
        return Verdict(queries, answers, scores, p_values, refused, bits)


class BudgetExceeded(RuntimeError):
    """A query would overspend the query budget; nothing of it was answered or counted."""


class QueryLog:
    """Everything that went through a gateway, in order, as one tensor for each kind of record.

    Attributes:
        queries: uint8 [N, C, H, W], as the service received them.
        answers: probabilities [N, K]; NaN where the query was refused.
        scores: anomaly scores [N], where there was a detector.
        refused, bits: bool [N] and the bits of work int64 [N], where there was a response.
        hashes, seconds: int64 and float64 [N], of a `RemoteGateway`: the work that was done, and how long each took.

    Raises:
        AttributeError: on reading what the log does not hold.
    """

    def __init__(self):
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, **records: Tensor) -> None:
        for name, values in records.items():
            self._parts.setdefault(name, []).append(values)

    def __getattr__(self, name: str) -> Tensor:
        parts = self.__dict__.get("_parts", {}).get(name)
        if parts is None:
            raise AttributeError(f"the log holds no {name}")
        parts[:] = [torch.cat(parts)]
        return parts[0]

    def last(self, count: int) -> dict[str, Tensor]:
        """What was noted of the latest `count` queries, by the name of the record."""
        return {name: getattr(self, name)[-count:] for name in self._parts}

    def save(self, path: Path | str) -> None:
        """Writes what the log holds as one .npz file (the queries as `images`), whole or not at all.

        Raises:
            ValueError: nothing was asked yet.
        """
        if not self._parts:
            raise ValueError("the log is empty: nothing was asked yet")
        path = Path(path)
        arrays = {"images" if name == "queries" else name: getattr(self, name).cpu().numpy() for name in self._parts}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class Gateway(ABC):
    """A door to a victim that counts and logs what goes through it.

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
        if len(x) > self.remaining:
            raise BudgetExceeded(f"{len(x)} asked, {self.remaining} of {self.budget} queries left; send fewer")
        records = self._ask(x)
        self.log.add(**records)
        self.spent += len(x)
        return records["answers"]

    @abstractmethod
    def quote(self, x: Tensor) -> Tensor:
        """Bits of work, int64 [N], that answers to images [N, C, H, W] would cost; 0 where they cost none.

        A service says them before anything is paid, to whoever asks: a quote is no query of the budget, and not logged;
        but a response to accounts has seen the images (errors: see `check_queries`).
        """

    @abstractmethod
    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        """What the log is to hold of these queries: `queries`, `answers`, and what else there is."""


class QueryGateway(Gateway):
    """The door of a course: a `Defence` with a budget and a log; work that it would ask for is only logged.

    Args:
        victim, detector, response: see `Defence`.
        budget: how many queries may be asked, answered or refused; None for no limit.
        account: whose queries these are, where the response goes by accounts.

    Raises:
        ValueError: a budget below 1, or what `Defence` refuses.
    """

    def __init__(
        self,
        victim: Victim,
        budget: int | None = None,
        detector: Detector | None = None,
        response: Response | None = None,
        account: str = "account",
    ):
        super().__init__(victim.image_shape, victim.classes, budget)
        self._defence, self.account = Defence(victim, detector, response), account

    def quote(self, x: Tensor) -> Tensor:
        return self._defence.judge(x, accounts=[self.account] * len(x)).bits

    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        verdict = self._defence.judge(x, accounts=[self.account] * len(x))
        records = {"queries": verdict.queries, "answers": verdict.answers}
        if self._defence.detector is not None:
            records["scores"] = verdict.scores
        if self._defence.response is not None:
            records |= {"refused": verdict.refused, "bits": verdict.bits}
        return records
