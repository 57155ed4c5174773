import numpy as np
import pytest
import torch

from samelib.detectors.base import conformal_p_values
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim
from samelib.responses import ProofOfWork, Reject, puzzle_bits


class Ranked:
    """A detector whose score is the mean pixel, with known p-values."""

    def __init__(self, calibration):
        self.calibration = calibration

    def score(self, x, answers):
        return x.flatten(1).mean(1)

    def p_values_of(self, scores):
        return conformal_p_values(scores, self.calibration)


@pytest.fixture
def even():
    return Victim(lambda x: torch.full((len(x), 4), 0.25), (1, 28, 28), 4)


@pytest.fixture
def ranked():
    return Ranked(torch.linspace(-0.5, 0.5, 199))


def grey(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 1, 28, 28).contiguous()


@pytest.mark.parametrize("n", [19, 99, 199, 1_234, 2_500])
@pytest.mark.parametrize("fpr", [0.05, 0.1, 1 / 3])
def test_reject_refuses_what_the_detector_flags(n, fpr):
    p_values = torch.arange(1, n + 2) / (n + 1)
    refused, bits = Reject(fpr).decide(p_values)
    assert int(refused.sum()) == int(fpr * (n + 1) + 1e-9) and refused[0] and not refused[-1]
    assert not bits.any()


def test_reject_agrees_with_flag(detector, group):
    x = group.benign_test.pixels()
    assert torch.equal(Reject(detector.fpr).decide(detector.p_value(x)).refused, detector.flag(x))


def test_bits_grow_with_strangeness_and_never_below_the_base():
    p_values = torch.tensor([1.0, 0.51, 0.5, 0.26, 0.25, 1 / 1000, 1 / 1024, 1e-9])
    assert puzzle_bits(p_values, 3, 10).tolist() == [3, 3, 4, 4, 5, 12, 13, 13]


def test_nobody_is_charged_for_being_too_good():
    """A fault of public code: the distance from what is usual cost work in both directions."""
    p_values = torch.linspace(0.001, 1, 1000)
    bits = ProofOfWork(4, 10).decide(p_values).bits
    assert bits[p_values > 0.5].eq(4).all() and (bits.diff() <= 0).all()


@pytest.mark.parametrize("n", [99, 1_023, 2_500])
def test_the_bound_on_what_benign_users_pay_holds(n):
    """Exactly, not by drawing: a benign query's p-value is each of k / (n + 1) equally often."""
    for most in (0, 3, 10):
        response = ProofOfWork(5, most)
        expected = float((2.0 ** response.decide(torch.arange(1, n + 2) / (n + 1)).bits).mean())
        assert 2**5 <= expected <= response.benign_hashes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reject(0), "above 0 and below 1"),
        (lambda: Reject(1.0), "above 0 and below 1"),
        (lambda: ProofOfWork(-1), "at least 0"),
        (lambda: ProofOfWork(30, 20), "40 together"),
        (lambda: ProofOfWork(hash_rate=0), "positive number"),
        (lambda: ProofOfWork(hash_rate=float("nan")), "positive number"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_gateway_refuses_and_counts(even, ranked):
    gateway = QueryGateway(even, 10, ranked, Reject(0.05))
    answers = gateway.query(grey(-0.4, 0.6, 0.0, 0.9))
    assert answers.isfinite().all(1).tolist() == [True, False, True, False]
    assert gateway.log.refused.tolist() == [False, True, False, True]
    assert gateway.spent == 4  # a refused query was asked
    assert torch.equal(gateway.log.answers.isnan(), answers.isnan())
    assert not gateway.log.hashes.any() and not gateway.log.seconds.any()


def test_a_response_needs_a_detector(even):
    with pytest.raises(ValueError, match="needs a detector"):
        QueryGateway(even, response=Reject())


def test_simulated_work_is_geometric_and_its_seconds_are_modelled(even, ranked):
    response = ProofOfWork(6, 0, hash_rate=1e6, seed=3)
    hashes, seconds = response.work(grey(*[0.0] * 4_000), torch.full((4_000,), 6))
    assert hashes.min() >= 1 and abs(float(hashes.double().mean()) / 64 - 1) < 0.06  # about 4 standard errors
    assert abs(float((hashes > 64).double().mean()) - (1 - 1 / 64) ** 64) < 0.04
    assert torch.equal(seconds, hashes.double() / 1e6)
    again = ProofOfWork(6, 0, hash_rate=1e6, seed=3).work(grey(*[0.0] * 4_000), torch.full((4_000,), 6))
    assert torch.equal(again.hashes, hashes)


def test_real_work_is_done_and_logged(even, ranked, tmp_path):
    gateway = QueryGateway(even, detector=ranked, response=ProofOfWork(2, 7))
    x = grey(*np.linspace(-0.4, 0.9, 40).tolist())
    assert gateway.query(x).isfinite().all()  # it costs, and is answered
    log = gateway.log
    assert not log.refused.any() and log.hashes.min() >= 1 and log.seconds.min() > 0
    assert log.hashes[-10:].double().mean() > 8 * log.hashes[:10].double().mean()  # 2^9 beside 2^2 or 2^3
    log.save(tmp_path / "queries.npz")
    with np.load(tmp_path / "queries.npz") as saved:
        assert {"images", "answers", "scores", "refused", "hashes", "seconds"} == set(saved.files)
