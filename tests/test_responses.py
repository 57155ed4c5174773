"""Responses decide by the p-value alone, so that what benign users suffer is bounded."""

import numpy as np
import pytest
import torch

from samelib.detectors.base import Detector
from samelib.responses import ProofOfWork, Reject, draw_hashes, puzzle_bits


@pytest.mark.parametrize("n", [19, 99, 199, 1_234, 2_500])
@pytest.mark.parametrize("fpr", [0.05, 0.1, 1 / 3])
def test_reject_refuses_the_share_it_promises(n, fpr):
    """Exactly: a benign query's p-value is each of k / (n + 1) equally often."""
    refused, bits = Reject(fpr).decide(torch.arange(1, n + 2) / (n + 1))
    assert int(refused.sum()) == int(fpr * (n + 1) + 1e-9) and refused[0] and not refused[-1]
    assert refused.dtype == torch.bool and bits.dtype == torch.int64 and not bits.any()


class MeanPixel(Detector):
    image_shape = (1, 4, 4)

    def fit(self, images, *, store=None, fpr=0.05):
        return self.calibrate(images, fpr)

    def score_received(self, x, answers=None):
        return x.flatten(1).mean(1)


@pytest.mark.parametrize("count", [19, 100, 333])
def test_reject_agrees_with_flag(count):
    generator = torch.Generator().manual_seed(0)
    benign, x = (torch.rand(n, 1, 4, 4, generator=generator) * 2 - 1 for n in (count, 1000))
    detector = MeanPixel().fit(benign, fpr=0.1)
    refused, _ = Reject(0.1).decide(detector.p_value(x))
    assert torch.equal(refused, detector.flag(x)) and refused.any()


def test_bits_grow_with_strangeness_and_never_below_the_base():
    p_values = torch.tensor([1.0, 0.51, 0.5, 0.26, 0.25, 1 / 1000, 1 / 1024, 1e-9])
    assert puzzle_bits(p_values, 3, 10).tolist() == [3, 3, 4, 4, 5, 12, 13, 13]


def test_nobody_is_charged_for_being_too_good():
    """A fault of public code: the distance from what is usual cost work in both directions."""
    p_values = torch.linspace(0.001, 1, 1000)
    refused, bits = ProofOfWork(4, 10).decide(p_values)
    assert bits[p_values > 0.5].eq(4).all() and (bits.diff() <= 0).all() and not refused.any()


@pytest.mark.parametrize("n", [99, 1_023, 2_500])
def test_the_bound_on_what_benign_users_pay_holds(n):
    """Exactly, not by drawing: a benign query's p-value is each of k / (n + 1) equally often."""
    for most in (0, 3, 10):
        for step in (1, 2, 5):
            response = ProofOfWork(5, most, step)
            _, bits = response.decide(torch.arange(1, n + 2) / (n + 1))
            assert 2**5 <= float((2.0**bits).mean()) <= response.benign_hashes


def test_coarser_bits_tell_less_and_benign_users_pay_less():
    p_values = torch.tensor([1.0, 0.26, 0.12, 1 / 40, 1 / 1100, 1e-9])
    assert ProofOfWork(3, 10, 5).decide(p_values)[1].tolist() == [3, 3, 3, 8, 13, 13]
    assert ProofOfWork(3, 7, 5).decide(p_values)[1].tolist() == [3, 3, 3, 8, 8, 8]
    assert [ProofOfWork(0, 10, step).benign_hashes for step in (1, 2, 10)] == [6, 1 + 5 * 0.75, 2 - 2**-10]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reject(0), "above 0 and below 1"),
        (lambda: Reject(1.0), "above 0 and below 1"),
        (lambda: Reject(float("nan")), "above 0 and below 1"),
        (lambda: ProofOfWork(-1), "at least 0"),
        (lambda: ProofOfWork(10, -1), "at least 0"),
        (lambda: ProofOfWork(30, 20), "40 together"),
        (lambda: ProofOfWork(10, 10, 0), "step between puzzles must be at least 1 bit"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("bits", [3, 6])
def test_the_hashes_of_clients_are_geometric(bits):
    """2^bits on average, with the tail of tries that fail independently; the seed decides them."""
    hashes = draw_hashes(torch.full((20_000,), bits), np.random.default_rng(0))
    assert hashes.dtype == torch.int64 and hashes.min() >= 1
    assert abs(float(hashes.double().mean()) / 2**bits - 1) < 0.03  # about 4 standard errors
    assert abs(float((hashes > 2**bits).double().mean()) - (1 - 2.0**-bits) ** 2**bits) < 0.015
    assert torch.equal(hashes, draw_hashes(torch.full((20_000,), bits), np.random.default_rng(0)))


def test_no_bits_are_one_try_and_each_query_has_its_own():
    hashes = draw_hashes(torch.tensor([0] * 500 + [10] * 500), np.random.default_rng(1))
    assert hashes[:500].eq(1).all() and hashes[500:].double().mean() > 700
