"""What a service does about a suspicious query: refuse it, or ask for work first (paper, "Flexibility as an Add-on"); or
about an account: ban it when the evidence of all its queries suffices."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from samelib.accounts import STREAMS, Account, AccountBook
from samelib.detectors.base import Detector, NotFittedError
from samelib.evidence import Likeness, log_e_values, safe_p_values, sketches

MOST_BITS = 40  # in all; a day of a thousand cores is about as much


class Response(ABC):
    """Decides by conformal p-values alone, so that what benign users suffer is bounded, whatever the scores.

    The bounds hold for benign queries that are exchangeable with the calibration images; on average over these, where
    nothing else is said.

    Attributes:
        by_account: does it need to know who asks?
        enforce: is what it decides done? Else it only keeps books.
    """

    by_account: ClassVar[bool] = False
    enforce = True

    def prepare(self, detector: Detector) -> "Response":
        """The response that works beside this detector; `Defence` asks for it once."""
        return self

    @abstractmethod
    def decide(
        self, p_values: Tensor, queries: Tensor | None = None, accounts: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """p-values [N] in (0, 1] -> which queries are refused, bool [N]; and the bits of work that the answers to the
        others cost, int64 [N].

        Args:
            queries: uint8 [N, C, H, W], in the order in which they came.
            accounts: who sent each; needed, as are the queries, where `by_account` says so.
        """


@dataclass(frozen=True)
class Reject(Response):
    """Refuses queries whose p-value is at most `fpr`: at most that share of benign ones, on average.

    Raises:
        ValueError: a rate outside (0, 1).
    """

    fpr: float = 0.05

    def __post_init__(self):
        if not 0 < self.fpr < 1:
            raise ValueError(f"the false-positive rate must be above 0 and below 1, got {self.fpr}")

    def decide(self, p_values: Tensor, queries=None, accounts=None) -> tuple[Tensor, Tensor]:
        refused = p_values.cpu().double() <= self.fpr * (1 + 1e-6)  # p-values are fractions in float32
        return refused, torch.zeros(len(refused), dtype=torch.int64)


@dataclass(frozen=True)
class ProofOfWork(Response):
    """Every query costs a puzzle, a harder one the stranger it looks.

        bits = base_bits + min(most_bits, floor(log2(1 / p))), the second part rounded down to a multiple of `step`

    A puzzle of b bits takes 2^b hashes on average. Because P(p <= u) <= u for benign queries, these cost
    2^base_bits (1 + most_bits / 2) hashes on average at most where the step is 1 (`benign_hashes`), the strangest queries
    2^(base_bits + most_bits). The least p-value of n calibration images is 1 / (n + 1): with few of them the largest
    difficulty is never asked for.

    Whoever asks learns the bits before they pay, and so the p-value to a factor of 2^step: a coarser step tells less,
    and charges less.

    Args:
        base_bits: what the most ordinary query costs.
        most_bits: how many bits can come on top.
        step: bits come on top in multiples of this.

    Raises:
        ValueError: negative bits, more than 40 in all, or a step below 1.
    """

    base_bits: int = 10
    most_bits: int = 10
    step: int = 1

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"the step between puzzles must be at least 1 bit, got {self.step}")
        if min(self.base_bits, self.most_bits) < 0 or self.base_bits + self.most_bits > MOST_BITS:
            raise ValueError(
                f"base_bits and most_bits must be at least 0 and {MOST_BITS} together at most, "
                f"got {self.base_bits} and {self.most_bits}"
            )

    @property
    def benign_hashes(self) -> float:
        """The most hashes that a benign query costs on average: each step of s bits adds 1 - 2^-s times the base."""
        return 2**self.base_bits * (1 + self.most_bits // self.step * (1 - 2.0**-self.step))

    def decide(self, p_values: Tensor, queries=None, accounts=None) -> tuple[Tensor, Tensor]:
        extra = puzzle_bits(p_values.cpu(), 0, self.most_bits)
        bits = self.base_bits + extra // self.step * self.step
        return torch.zeros_like(bits, dtype=torch.bool), bits


@dataclass
class BanAccount(Response):
    """Answers everything until the evidence against an account suffices; from the query that completes it, nothing.

    Every query is a bet in each stream (samelib.evidence), and the account is banned when the mean of its streams'
    wealths reaches 1 / delta. If the calibration set is one of a share 1 - eta, an honest account is ever banned with
    probability delta at most, however long it asks: honest meaning that its queries, different ones, are drawn
    independently as the calibration images were. With the stream "likeness" this was simulated, not proven (see
    Likeness). A query that repeats one of the account's latest is answered and is no evidence: it teaches a thief
    nothing, and is what a client sends that got no answer.

    Args:
        delta: false bans, as a share of honest accounts.
        eta: the share of calibration sets for which that need not hold.
        streams: "strangeness" (the detector's p-values), "likeness" (to the account's own earlier queries), or both.
        accounts: where wealth and bans are kept; None: in memory, a new book for each gateway and service.

    Raises:
        ValueError: delta or eta outside (0, 1), or no such streams.
    """

    by_account: ClassVar[bool] = True

    delta: float = 0.001
    eta: float = 0.05
    streams: tuple[str, ...] = STREAMS
    accounts: AccountBook | None = field(default=None, repr=False)
    enforce: bool = True

    def __post_init__(self):
        if not (0 < self.delta < 1 and 0 < self.eta < 1):
            raise ValueError(f"delta and eta must be above 0 and below 1, got {self.delta} and {self.eta}")
        if not self.streams or set(self.streams) - set(STREAMS):
            raise ValueError(f"streams must be some of {', '.join(STREAMS)}, got {', '.join(self.streams) or 'none'}")
        self._likeness: Likeness | None = None
        self._log_e: dict[str, np.ndarray] = {}  # stream -> of each p-value that there can be, float64 [n + 1]

    def prepare(self, detector: Detector) -> "BanAccount":
        """This response with what it needs of a detector: how many scores it was calibrated with, and its likeness.

        Raises:
            NotFittedError: the detector was not calibrated.
            ValueError: it was calibrated with too few images for any evidence, or knows no likeness.
        """
        if detector.calibration_scores is None:
            raise NotFittedError(f"{type(detector).__name__} is not calibrated; call calibrate(benign, fpr) first")
        if "likeness" in self.streams and detector.likeness is None:
            raise ValueError("this detector knows no likeness of queries; calibrate it again, or leave out the stream")
        prepared = replace(self, accounts=AccountBook() if self.accounts is None else self.accounts)
        prepared._likeness = detector.likeness
        counts = {"strangeness": len(detector.calibration_scores), "likeness": len(detector.likeness or ())}
        prepared._log_e = {stream: self._bets(counts[stream]) for stream in self.streams}
        return prepared

    def _bets(self, count: int) -> np.ndarray:
        log_e = log_e_values(safe_p_values(count, self.eta / len(self.streams))).numpy()
        if log_e[0] <= 0:
            words = f"with {count} calibration images the strangest query is no evidence of anything"
            raise ValueError(f"{words}; calibrate the detector with a few hundred or more")
        return log_e

    def decide(self, p_values: Tensor, queries=None, accounts=None) -> tuple[Tensor, Tensor]:
        if not self._log_e:
            raise NotFittedError(
                "BanAccount works beside a detector: give it to a Defence or a gateway, or call prepare"
            )
        rows = zip(accounts, p_values.tolist(), queries.cpu().numpy(), sketches(queries), strict=True)
        with self.accounts.changing(accounts) as known:
            refused = [self._refuses(known[account], *row) and self.enforce for account, *row in rows]
        return torch.tensor(refused), torch.zeros(len(refused), dtype=torch.int64)

    def _refuses(self, account: Account, p_value: float, query: np.ndarray, sketch: np.ndarray) -> bool:
        """Takes one query in; is its account banned now?"""
        if account.banned is None and account.count(query.tobytes()):
            if "strangeness" in self.streams:
                self._bet(account, "strangeness", p_value)
            if "likeness" in self.streams:
                self._bet(account, "likeness", self._likeness.p_value(sketch, account.memory))
                account.remember(sketch, self._likeness.most)
            wealths = [account.wealth[stream].log_wealth for stream in self.streams]
            account.log_wealth = np.logaddexp.reduce(wealths) - math.log(len(wealths))
            if account.log_wealth >= -math.log(self.delta):
                account.ban(self.accounts.clock())
        return account.banned is not None

    def _bet(self, account: Account, stream: str, p_value: float | None) -> None:
        if p_value is not None:
            log_e = self._log_e[stream]
            account.wealth[stream].add(log_e[round(p_value * len(log_e)) - 1])


def puzzle_bits(p_values: Tensor, base_bits: int, most_bits: int) -> Tensor:
    """base_bits + min(most_bits, floor(log2(1 / p))), int64 [N], of p-values [N] in (0, 1]."""
    extra = (1 / p_values.double()).log2().floor().long()
    return base_bits + extra.clamp(max=most_bits)


def draw_hashes(bits: Tensor, generator: np.random.Generator) -> Tensor:
    """The hashes, int64 [N], that clients would need for puzzles of so many bits [N]: geometric, 2^bits on average.

    To model work without doing it; 0 bits are answered by the first number tried.
    """
    return torch.from_numpy(generator.geometric(2.0 ** -bits.double().numpy()))
