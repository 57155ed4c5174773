"""What a service does about a suspicious query: refuse it, or ask for work first (paper, "Flexibility as an Add-on")."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_BITS = 40  # in all; a day of a thousand cores is about as much


class Response(ABC):
    """Decides by the conformal p-value of a query alone, so that what benign users suffer is bounded, whatever the scores.

    The bounds hold for benign queries that are exchangeable with the calibration images, on average over these.
    """

    @abstractmethod
    def decide(self, p_values: Tensor) -> tuple[Tensor, Tensor]:
        """p-values [N] in (0, 1] -> which queries are refused, bool [N]; and the bits of work that the answers to the
        others cost, int64 [N]."""


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

    def decide(self, p_values: Tensor) -> tuple[Tensor, Tensor]:
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

    def decide(self, p_values: Tensor) -> tuple[Tensor, Tensor]:
        extra = puzzle_bits(p_values.cpu(), 0, self.most_bits)
        bits = self.base_bits + extra // self.step * self.step
        return torch.zeros_like(bits, dtype=torch.bool), bits


def puzzle_bits(p_values: Tensor, base_bits: int, most_bits: int) -> Tensor:
    """base_bits + min(most_bits, floor(log2(1 / p))), int64 [N], of p-values [N] in (0, 1]."""
    extra = (1 / p_values.double()).log2().floor().long()
    return base_bits + extra.clamp(max=most_bits)


def draw_hashes(bits: Tensor, generator: np.random.Generator) -> Tensor:
    """The hashes, int64 [N], that clients would need for puzzles of so many bits [N]: geometric, 2^bits on average.

    To model work without doing it; 0 bits are answered by the first number tried.
    """
    return torch.from_numpy(generator.geometric(2.0 ** -bits.double().numpy()))
