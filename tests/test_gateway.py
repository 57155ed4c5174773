"""The door: images are checked and rounded once, the budget is exact, and one Defence decides."""

import numpy as np
import pytest
import torch

from samelib.data.image_set import OutOfRangeWarning, quantise, to_float, to_uint8
from samelib.detectors.base import Detector, NotFittedError
from samelib.detectors.same import SameDetector
from samelib.gateway import BudgetExceeded, Defence, QueryGateway
from samelib.models.classifiers import Victim
from samelib.responses import ProofOfWork, Reject

SHAPE = (1, 28, 28)


class Recorder(Victim):
    """Answers evenly, and keeps what it was asked."""

    def __init__(self):
        self.__dict__["asked"] = []
        super().__init__(self.answer_evenly, SHAPE, 4)

    def answer_evenly(self, x):
        self.asked.append(x)
        return torch.full((len(x), 4), 0.25)


class Brightness(Detector):
    """The score is the mean pixel, calibrated to -0.5 .. 0.5; keeps what it was given."""

    image_shape = SHAPE
    calibration_scores = torch.linspace(-0.5, 0.5, 199)

    def __init__(self):
        self.received = []

    def fit(self, *sets, store=None, fpr=0.05):
        return self

    def score_received(self, x, answers=None):
        self.received.append((x, answers))
        return x.flatten(1).mean(1)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def detector():
    return Brightness()


def grey(*levels):
    """One image of each level in [-1, 1]."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, *SHAPE).contiguous()


# What is received


def test_victim_and_detector_see_the_eight_bit_images_once(recorder, detector, images):
    with pytest.warns(OutOfRangeWarning):
        verdict = Defence(recorder, detector, Reject()).judge(images * 2)
    (asked,), ((scored, answers),) = recorder.asked, detector.received
    assert torch.equal(asked, quantise(images * 2)) and torch.equal(scored, asked)
    assert torch.equal(answers, torch.full((5, 4), 0.25))
    assert verdict.queries.dtype == torch.uint8 and torch.equal(verdict.queries, to_uint8(images * 2))


def test_bytes_and_floats_are_the_same_query(recorder, images):
    defence = Defence(recorder)
    defence.judge(images)
    defence.judge(to_uint8(images))
    assert torch.equal(*recorder.asked)


def test_a_query_that_is_no_image_costs_nothing(recorder, images):
    gateway = QueryGateway(recorder, 10)
    for bad in (images[:, :, :20], images[:0], images * float("nan")):
        with pytest.raises(ValueError):
            gateway.query(bad)
    assert gateway.spent == 0 and not recorder.asked


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: torch.randn(len(x), 4) * 5, "apply softmax"),
        (lambda x: torch.full((len(x), 4), float("nan")), "NaN"),
        (lambda x: torch.full((len(x), 4), 0.3), "sum to 1"),
        (lambda x: torch.full((len(x), 3), 1 / 3), r"expected \[5, 4\]"),
    ],
)
def test_a_victim_must_answer_probabilities(answer, words, images):
    gateway = QueryGateway(Victim(answer, SHAPE, 4), 10)
    with pytest.raises(ValueError, match=words):
        gateway.query(images)
    assert gateway.spent == 0


# The verdict


def test_without_a_detector_everything_is_answered(recorder, images):
    verdict = Defence(recorder).judge(images)
    assert verdict.scores is verdict.p_values is None
    assert verdict.answers.eq(0.25).all() and not verdict.refused.any() and verdict.bits.tolist() == [0] * 5


def test_a_detector_alone_changes_no_answer(recorder, detector):
    x = grey(-1.0, 0.0, 1.0)
    verdict = Defence(recorder, detector).judge(x)
    assert torch.allclose(verdict.scores, quantise(x).flatten(1).mean(1))
    assert torch.equal(verdict.p_values, detector.p_value(x))
    assert verdict.answers.eq(0.25).all() and not verdict.refused.any()


def test_refused_answers_are_nan(recorder, detector):
    verdict = Defence(recorder, detector, Reject(0.05)).judge(grey(-0.4, 0.6, 0.0, 0.9))
    assert verdict.refused.tolist() == [False, True, False, True]
    assert verdict.answers.isnan().all(1).tolist() == [False, True, False, True]
    assert verdict.answers[~verdict.refused].eq(0.25).all() and not verdict.bits.any()


def test_work_is_asked_for_and_every_query_answered(recorder, detector):
    verdict = Defence(recorder, detector, ProofOfWork(3, 5)).judge(grey(-1.0, 0.9))
    assert verdict.bits.tolist() == [3, 8] and verdict.bits.dtype == torch.int64
    assert not verdict.refused.any() and verdict.answers.isfinite().all()


def test_paid_queries_are_answered_and_not_scored(recorder, detector):
    x = grey(0.9, -0.4, 0.9)
    verdict = Defence(recorder, detector, Reject()).judge(x, paid=torch.tensor([True, False, False]))
    (scored, _), *rest = detector.received
    assert torch.equal(scored, quantise(x[1:])) and not rest
    assert verdict.scores.isnan().tolist() == verdict.p_values.isnan().tolist() == [True, False, False]
    assert verdict.refused.tolist() == [False, False, True] and verdict.answers[0].eq(0.25).all()
    work = Defence(recorder, detector, ProofOfWork(3, 5)).judge(x, paid=torch.tensor([True] * 3))
    assert work.bits.tolist() == [0, 0, 0] and len(detector.received) == 1


def test_a_verdict_does_not_depend_on_the_batch(recorder, detector):
    x, defence = grey(-0.4, 0.6, 0.45, 0.9), Defence(recorder, detector, Reject())
    apart = [defence.judge(image[None]) for image in x]
    together = defence.judge(x)
    assert torch.equal(together.p_values, torch.cat([verdict.p_values for verdict in apart]))
    assert torch.equal(together.refused, torch.cat([verdict.refused for verdict in apart]))


def test_a_detector_of_other_images_is_refused(detector):
    for victim in (Victim(lambda x: x, (3, 28, 28), 4), Victim(lambda x: x, (1, 32, 32), 4)):
        with pytest.raises(ValueError, match="the victim takes images"):
            Defence(victim, detector)


def test_a_detector_of_other_classes_is_refused(recorder, detector):
    detector.victim = Victim(lambda x: x, SHAPE, 10)
    with pytest.raises(ValueError, match="4 classes, the detector 10"):
        QueryGateway(recorder, detector=detector)


def test_a_detector_that_was_not_fitted_is_refused(recorder):
    with pytest.raises(NotFittedError, match="call fit first"):
        Defence(recorder, SameDetector.preset("smoke", SHAPE))


def test_a_response_needs_a_detector(recorder):
    with pytest.raises(ValueError, match="needs a detector"):
        QueryGateway(recorder, response=Reject())


# Budget and log


def test_the_budget_is_exact_and_nothing_is_half_answered(recorder, images):
    gateway = QueryGateway(recorder, 7)
    gateway.query(images)
    with pytest.raises(BudgetExceeded, match="5 asked, 2 of 7 queries left"):
        gateway.query(images)
    assert (gateway.spent, len(recorder.asked), len(gateway.log.queries)) == (5, 1, 5)
    gateway.query(images[:2])
    assert gateway.remaining == 0


@pytest.mark.parametrize("budget", [0, -3])
def test_bad_budgets_are_refused(recorder, budget):
    with pytest.raises(ValueError, match="budget must be at least 1"):
        QueryGateway(recorder, budget)


def test_the_log_keeps_what_was_asked_answered_and_scored(recorder, detector, images):
    gateway = QueryGateway(recorder, detector=detector)
    gateway.query(images[:3])
    gateway.query(images[3:])
    assert torch.equal(to_float(gateway.log.queries), quantise(images))
    assert gateway.log.answers.shape == (5, 4) and gateway.remaining == float("inf")
    assert torch.allclose(gateway.log.scores, quantise(images).flatten(1).mean(1))


def test_a_refused_query_is_spent_and_logged(recorder, detector):
    gateway = QueryGateway(recorder, 10, detector, Reject(0.05))
    answers = gateway.query(grey(-0.4, 0.6, 0.0, 0.9))
    assert answers.isfinite().all(1).tolist() == [True, False, True, False]
    assert gateway.log.refused.tolist() == [False, True, False, True]
    assert gateway.spent == 4 and torch.equal(gateway.log.answers.isnan(), answers.isnan())


def test_what_the_log_does_not_hold_is_said(recorder, detector, images):
    gateway = QueryGateway(recorder)
    for record in ("queries", "scores", "bits"):
        with pytest.raises(AttributeError, match=f"holds no {record}"):
            getattr(gateway.log, record)
    gateway.query(images)
    assert not hasattr(gateway.log, "scores")
    watched = QueryGateway(recorder, detector=detector)
    watched.query(images)
    assert hasattr(watched.log, "scores") and not hasattr(watched.log, "refused")


def test_the_latest_queries_of_a_log(recorder, detector, images):
    gateway = QueryGateway(recorder, detector=detector)
    gateway.query(images[:3])
    gateway.query(images[3:])
    last = gateway.log.last(2)
    assert set(last) == {"queries", "answers", "scores"} and torch.equal(last["queries"], to_uint8(images)[3:])


def test_a_quote_is_the_work_that_is_asked_for(recorder, detector):
    x = grey(-0.4, 0.0, 0.9)
    gateway = QueryGateway(recorder, 3, detector, ProofOfWork(2, 3))
    assert gateway.quote(x).tolist() == [2, 3, 5] and gateway.remaining == 3
    assert QueryGateway(recorder).quote(x).tolist() == QueryGateway(recorder, 3, detector, Reject()).quote(x).tolist()
    with pytest.raises(ValueError, match="images must have shape"):
        gateway.quote(x[:, :, :20])


def test_a_log_is_saved_whole(recorder, detector, tmp_path):
    gateway = QueryGateway(recorder, detector=detector, response=ProofOfWork(2, 3))
    with pytest.raises(ValueError, match="the log is empty"):
        gateway.log.save(tmp_path / "queries.npz")
    x = grey(-0.4, 0.0, 0.9)
    gateway.query(x)
    gateway.log.save(tmp_path / "new" / "queries.npz")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["queries.npz"]
    with np.load(tmp_path / "new" / "queries.npz") as saved:
        assert set(saved.files) == {"images", "answers", "scores", "refused", "bits"}
        assert np.array_equal(saved["images"], to_uint8(x).numpy()) and saved["bits"].tolist() == [2, 3, 5]
