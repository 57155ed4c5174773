import pickle
import threading

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from samelib.detectors.base import (
    Detector,
    DetectorEstimator,
    NotFittedError,
    conformal_p_values,
    conformal_threshold,
)


class Distance(Detector):
    """Mean squared pixel: a detector of any image shape, cheap enough for scikit-learn's checks."""

    def fit(self, images, calibration, *, store=None, fpr=0.05):
        return self.calibrate(calibration.pixels(), fpr)

    def _received(self, x):
        return x

    def score_received(self, x, answers=None):
        return x.flatten(1).square().mean(1)


def test_p_values_by_hand():
    calibration = torch.tensor([3.0, 1.0, 2.0, 2.0])
    p_values = conformal_p_values(torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 9.0]), calibration)
    assert p_values.tolist() == pytest.approx([1.0, 1.0, 0.8, 0.4, 0.4, 0.2])


def test_flagging_is_p_at_most_the_rate():
    generator = torch.Generator().manual_seed(0)
    calibration, scores = torch.rand(99, generator=generator), torch.rand(5000, generator=generator)
    for fpr in (0.01, 0.05, 0.2, 0.25):
        threshold = conformal_threshold(calibration, fpr)
        assert torch.equal(scores > threshold, conformal_p_values(scores, calibration) <= fpr + 1e-9)


def test_benign_queries_are_flagged_as_often_as_promised():
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        scores = torch.randn(100 + 199, generator=generator)
        rates.append((scores[:100] > conformal_threshold(scores[100:], 0.05)).double().mean())
    assert float(torch.stack(rates).mean()) == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize("fpr", [0, 1, -0.1])
def test_bad_rates_are_refused(fpr):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        Distance().calibrate(torch.rand(50, 1, 2, 2), fpr)


def test_too_few_images_for_the_rate():
    with pytest.raises(ValueError, match="needs 99 benign images for the threshold, got 50"):
        Distance().calibrate(torch.rand(50, 1, 2, 2), 0.01)


def test_uncalibrated_is_said():
    for call in ("p_value", "flag"):
        with pytest.raises(NotFittedError, match="call calibrate"):
            getattr(Distance(), call)(torch.rand(2, 1, 2, 2))


def test_scikit_learn_accepts_the_adapter():
    check_estimator(DetectorEstimator(Distance(), fpr=0.1))


def test_the_adapter_agrees_with_the_detector():
    rng = np.random.default_rng(0)
    X, new = rng.uniform(-1, 1, (200, 16)), rng.uniform(-1, 1, (50, 16))
    estimator = DetectorEstimator(Distance(), (1, 4, 4), fpr=0.1).fit(X)
    images = torch.tensor(new, dtype=torch.float32).reshape(-1, 1, 4, 4)
    detector = Distance().calibrate(torch.tensor(X, dtype=torch.float32).reshape(-1, 1, 4, 4), 0.1)
    assert np.array_equal(estimator.predict(new) == -1, detector.flag(images).numpy())
    assert np.allclose(estimator.score_samples(new), -detector.score(images).numpy())
    with pytest.raises(ValueError, match="no image of shape"):
        DetectorEstimator(Distance(), (1, 5, 5)).fit(X)


@pytest.fixture(scope="module")
def estimator(group, detector):
    """Of a real SAME detector; it takes the shape of a row from the detector."""
    return DetectorEstimator(detector, fpr=0.1).fit(rows(group.calibration))


def rows(images) -> np.ndarray:
    return images.pixels().flatten(1).numpy()


def test_the_adapter_is_pickled_with_its_detector(estimator, group):
    copy = pickle.loads(pickle.dumps(estimator))
    assert np.array_equal(copy.score_samples(rows(group.benign_test)), estimator.score_samples(rows(group.benign_test)))
    assert copy.offset_ == estimator.offset_


def test_the_adapter_is_cloned_unfitted_and_scores_the_same(estimator, group):
    copy = clone(estimator)
    assert copy.get_params() == estimator.get_params() and not hasattr(copy, "detector_")
    copy.fit(rows(group.calibration))
    assert np.array_equal(copy.score_samples(rows(group.benign_test)), estimator.score_samples(rows(group.benign_test)))


def test_clones_share_what_cannot_be_copied():
    detector = Distance()
    detector.connection = threading.Lock()  # as of a victim on another machine
    assert clone(DetectorEstimator(detector)).detector is detector


def test_a_list_is_taken_for_a_tuple():
    X = np.random.default_rng(0).uniform(-1, 1, (50, 16))
    as_list, as_tuple = (DetectorEstimator(Distance(), shape).fit(X) for shape in ([1, 4, 4], (1, 4, 4)))
    assert np.array_equal(as_list.score_samples(X), as_tuple.score_samples(X))


def test_what_a_detector_is_not_asked_with(detector, group):
    with pytest.raises(NotFittedError, match="call fit first"):
        type(detector)(detector.settings).score(group.benign_test.images[:2])
    with pytest.raises(ValueError, match="3 images came with 2 answers"):
        detector.score(group.benign_test.images[:3], torch.full((2, 10), 0.1))
