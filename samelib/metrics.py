"""Detection and extraction metrics. Malicious is the positive class; a higher score is more suspicious."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import auc as area
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor


def _labelled(benign: ArrayLike, malicious: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    benign, malicious = (np.asarray(torch.as_tensor(s).cpu(), dtype=np.float64) for s in (benign, malicious))
    for name, scores in (("benign", benign), ("malicious", malicious)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} scores must be a non-empty vector, got shape {scores.shape}")
        if not np.isfinite(scores).all():
            raise ValueError(f"{name} scores hold NaN or infinite values; a detector must give finite scores")
    return np.r_[np.zeros(len(benign)), np.ones(len(malicious))], np.r_[benign, malicious]


def auroc(benign: ArrayLike, malicious: ArrayLike) -> float:
    """Probability that a malicious query scores above a benign one, ties counting half."""
    return float(roc_auc_score(*_labelled(benign, malicious)))


def aupr(benign: ArrayLike, malicious: ArrayLike) -> float:
    """Average precision (scikit-learn's step-wise sum), not the trapezoidal area that pytorch-ood reports.

    It depends on the ratio of malicious to benign queries.
    """
    return float(average_precision_score(*_labelled(benign, malicious)))


def fpr_at_tpr(benign: ArrayLike, malicious: ArrayLike, tpr: float = 0.95, interpolate: bool = False) -> float:
    """Share of benign queries flagged at the first threshold that catches at least `tpr` of the malicious ones.

    Only thresholds that exist count (a step ROC). `interpolate=True` draws straight lines between them, as the
    authors' code does: where scores tie it reports an operating point that no threshold reaches, and where a threshold
    catches exactly `tpr` it takes the far end of that step.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    false_positive, true_positive, _ = roc_curve(*_labelled(benign, malicious), drop_intermediate=False)
    return _fpr_on_curve(false_positive, true_positive, tpr, interpolate)


def _fpr_on_curve(false_positive: np.ndarray, true_positive: np.ndarray, tpr: float, interpolate: bool) -> float:
    if interpolate:
        return float(np.interp(tpr, true_positive, false_positive))
    return float(false_positive[np.argmax(true_positive >= tpr - 1e-12)])


def tpr_at_threshold(malicious: ArrayLike, threshold: float) -> float:
    """Share of malicious queries above a threshold that was set on the calibration set alone."""
    return float((np.asarray(torch.as_tensor(malicious).cpu()) > threshold).mean())


def detection_metrics(benign: ArrayLike, malicious: ArrayLike, interpolate: bool = False) -> dict[str, float]:
    """AUROC, AUPR (average precision), FPR95 and FPR90, all as fractions: from one ROC curve, as the functions above."""
    labels, scores = _labelled(benign, malicious)
    false_positive, true_positive, _ = roc_curve(labels, scores, drop_intermediate=False)
    caught, flagged = true_positive[1:] * labels.sum(), false_positive[1:] * (labels == 0).sum()
    return {
        "auroc": float(area(false_positive, true_positive)),
        "aupr": float(np.sum(np.diff(true_positive) * caught / (caught + flagged))),
        "fpr95": _fpr_on_curve(false_positive, true_positive, 0.95, interpolate),
        "fpr90": _fpr_on_curve(false_positive, true_positive, 0.90, interpolate),
    }


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of the predictions [N, K] whose largest entry is the label [N]."""
    return float((probabilities.argmax(1) == labels).float().mean())


def fidelity(substitute: Tensor, victim: Tensor) -> float:
    """Share of the images on which substitute and victim, both [N, K], name the same class."""
    return float((substitute.argmax(1) == victim.argmax(1)).float().mean())


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """(mean, half width of Student's interval) over independent runs; the half width of one run is NaN."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def binomial_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """(low, high): the exact interval of Clopper and Pearson for a share of which `count` of `total` were seen."""
    interval = stats.binomtest(count, total).proportion_ci(level)
    return float(interval.low), float(interval.high)


def drift_p_value(small: int, queries: int, calibration: int, fpr: float = 0.05) -> float:
    """How likely at least so many queries with p-values up to `fpr`, or at most so many, twice the smaller of the two: small
    where queries have moved away from the calibration images.

    While both are exchangeable, the number is beta-binomial: the calibration images are a sample too, and with few of them
    the true rate may be far from `fpr` for good (Vovk 2012, "Conditional validity of inductive conformal predictors").

    Args:
        small: queries whose conformal p-value is at most `fpr`.
        queries: all of them.
        calibration: images that the detector was calibrated with.

    Raises:
        ValueError: counts that cannot be, or too few calibration images for the rate.
    """
    rank = math.floor(fpr * (calibration + 1) + 1e-9)
    if not 0 <= small <= queries or not 0 < rank <= calibration:
        raise ValueError(
            f"{small} of {queries} queries and {calibration} calibration images say nothing of a rate of {fpr}"
        )
    law = stats.betabinom(queries, rank, calibration + 1 - rank)
    return float(min(1.0, 2 * min(law.cdf(small), law.sf(small - 1))))


def bootstrap_interval(
    metric, benign: ArrayLike, malicious: ArrayLike, level: float = 0.95, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """(low, high) percentiles of `metric` over resampled queries: the spread that one run alone can show."""
    generator = np.random.default_rng(seed)
    benign, malicious = (np.asarray(torch.as_tensor(s).cpu()) for s in (benign, malicious))

    def resample(scores: np.ndarray) -> np.ndarray:
        return scores[generator.integers(len(scores), size=len(scores))]

    values = [metric(resample(benign), resample(malicious)) for _ in range(draws)]
    return tuple(float(q) for q in np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
