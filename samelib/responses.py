"""What a service does about a suspicious query: refuse it, or ask for work first (paper, "Flexibility as an Add-on")."""

import math
import secrets
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from samelib.gateway import Decision, Work
from samelib.stamps import StampOffice, query_digest, solve

MOST_BITS = 40  # in all; a day of a thousand cores is about as much


def puzzle_bits(p_values: Tensor, base_bits: int, most_bits: int) -> Tensor:
    """base_bits + min(most_bits, floor(log2(1 / p))), int64 [N], of p-values [N] in (0, 1]."""
    extra = (1 / p_values.double()).log2().floor().long()
    return base_bits + extra.clamp(max=most_bits)


class Response(ABC):
    """Decides by the conformal p-value of a query alone, so that what benign users suffer is bounded, whatever the scores.

    The bounds hold for benign queries that are exchangeable with the calibration images, on average over these.
    """

    @abstractmethod
    def decide(self, p_values: Tensor) -> Decision:
        """p-values [N] in (0, 1] -> which queries are refused, and the bits of work that the others cost."""

    def work(self, queries: Tensor, bits: Tensor) -> Work:
        """What the client does for queries uint8 [N, C, H, W] of that difficulty [N]: nothing, if nothing is asked."""
        none = torch.zeros(len(queries), dtype=torch.int64)
        return Work(none, none.double())


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

    def decide(self, p_values: Tensor) -> Decision:
        refused = p_values.cpu().double() <= self.fpr * (1 + 1e-6)  # p-values are fractions in float32
        return Decision(refused, torch.zeros(len(refused), dtype=torch.int64))


@dataclass(frozen=True)
class ProofOfWork(Response):
    """Every query costs a puzzle, a harder one the stranger it looks.

        bits = base_bits + min(most_bits, floor(log2(1 / p)))

    A puzzle of b bits takes 2^b hashes on average. Because P(p <= u) <= u for benign queries, these cost
    2^base_bits (1 + most_bits / 2) hashes on average at most (`benign_hashes`), the strangest queries
    2^(base_bits + most_bits). The least p-value of n calibration images is 1 / (n + 1): with few of them the largest
    difficulty is never asked for.

    Args:
        base_bits: what the most ordinary query costs.
        most_bits: how many bits can come on top.
        hash_rate: hashes a second of the client. In a gateway the puzzles are then not solved but drawn: hashes
            geometric, seconds modelled as hashes / hash_rate. None: each is solved, and takes what it takes.
        seed: of the hashes that are drawn.

    Raises:
        ValueError: negative bits, more than 40 in all, or a rate that is no positive number.
    """

    base_bits: int = 10
    most_bits: int = 10
    hash_rate: float | None = None
    seed: int = 0

    def __post_init__(self):
        if min(self.base_bits, self.most_bits) < 0 or self.base_bits + self.most_bits > MOST_BITS:
            raise ValueError(
                f"base_bits and most_bits must be at least 0 and {MOST_BITS} together at most, "
                f"got {self.base_bits} and {self.most_bits}"
            )
        if self.hash_rate is not None and not 0 < self.hash_rate < math.inf:
            raise ValueError(f"hash_rate must be a positive number of hashes a second, got {self.hash_rate}")

    @property
    def benign_hashes(self) -> float:
        """The most hashes that a benign query costs on average."""
        return 2**self.base_bits * (1 + self.most_bits / 2)

    def decide(self, p_values: Tensor) -> Decision:
        bits = puzzle_bits(p_values.cpu(), self.base_bits, self.most_bits)
        return Decision(torch.zeros_like(bits, dtype=torch.bool), bits)

    def work(self, queries: Tensor, bits: Tensor) -> Work:
        if self.hash_rate is not None:
            hashes = torch.from_numpy(self._drawn.geometric(2.0 ** -bits.double().numpy()))
            return Work(hashes, hashes.double() / self.hash_rate)
        done = [self._solved(query, int(b)) for query, b in zip(queries, bits, strict=True)]
        hashes, seconds = zip(*done, strict=True)
        return Work(torch.tensor(hashes), torch.tensor(seconds, dtype=torch.float64))

    @cached_property
    def _drawn(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @cached_property
    def _office(self) -> StampOffice:
        return StampOffice(secrets.token_bytes(32))

    def _solved(self, query: Tensor, bits: int) -> tuple[int, float]:
        """One puzzle from challenge to spent stamp: hashes and seconds."""
        start, digest = time.perf_counter(), query_digest(query)
        stamp, hashes = solve(self._office.issue(digest, bits), MOST_BITS)
        self._office.spend([self._office.check(stamp, digest)])
        return hashes, time.perf_counter() - start
