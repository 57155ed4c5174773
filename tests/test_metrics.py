import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from samelib import metrics
from samelib.detectors.base import conformal_p_values


def test_against_scikit_learn():
    rng = np.random.default_rng(0)
    benign, malicious = rng.normal(size=300), rng.normal(1, size=200)
    labels, scores = np.r_[np.zeros(300), np.ones(200)], np.r_[benign, malicious]
    values = metrics.detection_metrics(torch.tensor(benign), torch.tensor(malicious))
    assert values["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert values["aupr"] == pytest.approx(average_precision_score(labels, scores))


def test_auroc_is_the_probability_of_the_right_order():
    benign, malicious = [1, 2, 2, 3], [2, 4]
    wins = np.mean([(m > b) + (m == b) / 2 for b in benign for m in malicious])
    assert metrics.auroc(benign, malicious) == pytest.approx(wins)


def test_fpr_by_hand():
    malicious = np.arange(20.0)  # 0..19: the threshold 1 catches 19 of 20, which is 95 %
    assert metrics.fpr_at_tpr([0.5, 1.0, 1.5, 30.0], malicious) == 0.75
    assert metrics.fpr_at_tpr([-1.0, -2.0], malicious) == 0.0
    assert metrics.fpr_at_tpr([30.0, 40.0], malicious) == 1.0


def test_ties_are_not_flattered():
    """Most scores tie at 1: no threshold between catching 60 % and catching all exists, interpolation invents one."""
    malicious = np.r_[np.full(60, 2.0), np.full(40, 1.0)]
    benign = np.r_[np.full(94, 1.0), np.full(6, 0.0)]
    assert metrics.fpr_at_tpr(benign, malicious) == pytest.approx(0.94)
    assert metrics.fpr_at_tpr(benign, malicious, interpolate=True) == pytest.approx(0.94 * 0.35 / 0.40)


def test_fpr_is_a_threshold_that_exists():
    rng = np.random.default_rng(1)
    benign, malicious = rng.integers(0, 6, 200), rng.integers(2, 9, 150)
    rate = metrics.fpr_at_tpr(benign, malicious, 0.9)
    feasible = [(benign >= t).mean() for t in range(10) if (malicious >= t).mean() >= 0.9]
    assert rate == pytest.approx(min(feasible))


def test_accuracy_and_fidelity():
    a = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    b = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.9, 0.1]])
    assert metrics.accuracy(a, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    assert metrics.fidelity(a, b) == pytest.approx(2 / 3)


def test_interval_is_students():
    mean, half = metrics.mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302652729 / math.sqrt(3)))
    assert math.isnan(metrics.mean_interval([1.0])[1])


def test_a_share_has_clopper_and_pearsons_interval():
    """Their table for 8 of 20; no or all successes still have an interval."""
    assert metrics.binomial_interval(8, 20) == pytest.approx((0.1912, 0.6395), abs=1e-4)
    assert metrics.binomial_interval(0, 20) == pytest.approx((0, 1 - 0.025 ** (1 / 20)))
    low, high = metrics.binomial_interval(20, 20)
    assert (low, high) == pytest.approx((0.025 ** (1 / 20), 1))


def test_bootstrap_holds_the_value_and_repeats():
    rng = np.random.default_rng(0)
    benign, malicious = rng.normal(size=200), rng.normal(1, size=200)
    low, high = metrics.bootstrap_interval(metrics.auroc, benign, malicious)
    assert low < metrics.auroc(benign, malicious) < high
    assert metrics.bootstrap_interval(metrics.auroc, benign, malicious) == (low, high)


@pytest.mark.parametrize(
    ("benign", "malicious", "words"),
    [([], [1.0], "non-empty"), ([1.0], [float("nan")], "malicious scores hold NaN"), ([[1.0]], [1.0], "vector")],
)
def test_bad_scores_are_refused(benign, malicious, words):
    with pytest.raises(ValueError, match=words):
        metrics.detection_metrics(benign, malicious)


def test_bad_rate_is_refused():
    with pytest.raises(ValueError, match="tpr must be"):
        metrics.fpr_at_tpr([0.0], [1.0], 1.5)


def test_drift_is_called_as_often_as_it_says_where_there_is_none():
    generator = np.random.default_rng(0)
    called = 0
    for _ in range(1000):
        calibration, queries = generator.normal(size=99), generator.normal(size=400)
        p_values = conformal_p_values(torch.from_numpy(queries), torch.from_numpy(calibration))
        called += metrics.drift_p_value(int((p_values <= 0.05).sum()), 400, 99) <= 0.1
    low, high = metrics.binomial_interval(called, 1000, 0.999)
    assert low < 0.1 and called > 50  # the law is discrete: at most as often, and not much more seldom


def test_drift_shows_in_either_direction_and_more_calibration_images_see_less_of_it():
    assert metrics.drift_p_value(500, 10_000, 1999) > 0.9
    assert metrics.drift_p_value(800, 10_000, 1999) < 1e-3 and metrics.drift_p_value(250, 10_000, 1999) < 1e-3
    assert metrics.drift_p_value(700, 10_000, 99) > 0.2  # a twentieth of 99 images says little about 5 %
    for words in ((5, 4, 99), (-1, 4, 99), (1, 4, 10)):
        with pytest.raises(ValueError, match="say nothing of a rate of 0.05"):
            metrics.drift_p_value(*words)
