"""What every detector is: scores, a calibrated threshold, conformal p-values, and a door to scikit-learn."""

import copy
import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from samelib.data.image_set import ImageSet, received, to_uint8
from samelib.evidence import Likeness, sketches
from samelib.models.classifiers import Victim
from samelib.store import ArtifactStore


class NotFittedError(RuntimeError):
    """The detector was asked for something that needs `fit` or `calibrate` first."""


def conformal_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """(1 + number of calibration scores >= s) / (n + 1) for each score s [N]: benign queries get p <= u at most u often."""
    ordered = calibration.sort().values
    smaller = torch.searchsorted(ordered, scores.to(ordered.dtype))
    return (1 + len(ordered) - smaller) / (len(ordered) + 1)


def check_fpr(fpr: float, count: int) -> None:
    """Raises ValueError for a rate outside (0, 1), or too few calibration scores for so small a rate."""
    if not 0 < fpr < 1:
        raise ValueError(f"the false-positive rate must be above 0 and below 1, got {fpr}")
    needed = math.ceil(1 / fpr - 1e-9) - 1
    if count < needed:
        raise ValueError(f"a false-positive rate of {fpr} needs {needed} benign images for the threshold, got {count}")


def conformal_threshold(calibration: Tensor, fpr: float) -> float:
    """The score above which a query's conformal p-value is at most `fpr` (errors: see `check_fpr`)."""
    check_fpr(fpr, len(calibration))
    rank = math.floor(fpr * (len(calibration) + 1) + 1e-9)
    return float(calibration.sort(descending=True).values[rank - 1])


class Detector(ABC):
    """Gives each query an anomaly score; the score of a query never depends on the rest of its batch.

    SAME and `PostHoc` watch over a victim that is given: `fit(images, calibration, victim)`. Outlier exposure and EDM
    train one of their own: `fit(images, outliers, calibration)`. All take `store` and `fpr` by keyword.

    Attributes:
        image_shape: (C, H, W) of the queries; None before `fit`.
        calibration_scores: [n], of benign images that nothing was trained on; None before `calibrate`.
        likeness: of queries to earlier ones of their account, for `BanAccount`; of the same images.
        fpr: share of benign queries to flag.
        power: the share flagged of altered benign images (see `samelib.detectors.power`); None where it was not measured.
    """

    image_shape: tuple[int, int, int] | None = None
    calibration_scores: Tensor | None = None
    likeness: Likeness | None = None
    fpr: float | None = None
    power: dict[str, float] | None = None

    def __sklearn_clone__(self) -> "Detector":
        """A fitted detector is a parameter like any other: clones of a `DetectorEstimator` share it."""
        return self

    @abstractmethod
    def fit(self, *sets, store: ArtifactStore | None = None, fpr: float = 0.05) -> "Detector":
        """Trains what it needs (or reads it from the store), then calibrates on benign images that trained nothing.

        Raises:
            ValueError: image sets that do not fit together, or too few calibration images for the rate.
        """

    def _stand_before(self, victim, images: ImageSet, calibration: ImageSet) -> None:
        """Takes a victim that is given (see `Victim.wrap`), once it is clear that the images are alike and such as it takes
        (ValueError where they are not)."""
        if calibration.image_shape != images.image_shape:
            raise ValueError(f"training images are {images.image_shape}, calibration {calibration.image_shape}")
        self.victim = Victim.wrap(victim, images.pixels(slice(2)))
        self.victim.require(images.image_shape, self.victim.classes)
        self.image_shape = images.image_shape

    def score(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """Images [N, C, H, W], uint8 or float in [-1, 1] -> anomaly scores [N], higher = more suspicious.

        Args:
            answers: the victim's probabilities [N, K], where they are at hand; else a detector asks for what it needs.

        Raises:
            NotFittedError: before `fit`.
            TypeError, ValueError: not what the victim takes (see `check_queries`), or not one answer for each image.
        """
        x = self._received(x)
        if answers is not None and len(answers) != len(x):
            raise ValueError(f"{len(x)} images came with {len(answers)} answers; give one answer for each image")
        return self.score_received(x, answers)

    @abstractmethod
    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """Like `score`, of images float32 [N, C, H, W] that were checked and rounded to the 8-bit grid already."""

    def _received(self, x: Tensor) -> Tensor:
        if self.image_shape is None:
            raise NotFittedError(f"this {type(self).__name__} knows no images yet; call fit first")
        return received(x, self.image_shape)

    def calibrate(self, benign: Tensor, fpr: float = 0.05) -> "Detector":
        """Remembers scores and sketches of benign images [n, C, H, W] that nothing was trained on, and the rate to flag.

        Raises:
            ValueError: a rate outside (0, 1), or too few images for so small a rate.
        """
        check_fpr(fpr, len(benign))
        self._remember(benign)
        return self._settle(benign, fpr)

    def _remember(self, benign: Tensor) -> None:
        self.calibration_scores = self.score(benign)

    def _settle(self, benign: Tensor, fpr: float) -> "Detector":
        """What else there is to do once the scores of the calibration images are there."""
        self.likeness = Likeness(sketches(to_uint8(self._received(benign))))
        self.fpr = fpr
        return self

    def _calibrated(self) -> Tensor:
        if self.calibration_scores is None:
            raise NotFittedError(f"{type(self).__name__} is not calibrated; call calibrate(benign, fpr) first")
        return self.calibration_scores

    @property
    def threshold(self) -> float:
        """A query is flagged when its score is above this."""
        return conformal_threshold(self._calibrated(), self.fpr)

    def p_value(self, x: Tensor) -> Tensor:
        """Conformal p-values [N] in (0, 1]: how many benign queries out of one look at least as strange."""
        return self.p_values_of(self.score(x))

    def p_values_of(self, scores: Tensor) -> Tensor:
        """The p-values of scores that are already there."""
        return conformal_p_values(scores, self._calibrated())

    def flag(self, x: Tensor) -> Tensor:
        """bool [N]: is the score above the threshold, that is, the p-value at most the calibrated rate?"""
        threshold = self.threshold
        return self.score(x) > threshold


class DetectorEstimator(OutlierMixin, BaseEstimator):
    """A detector for people who live in scikit-learn: rows of flattened pixels in [-1, 1].

    Args:
        detector: fitted; `fit` here calibrates it on the rows of X, benign ones.
        image_shape: (C, H, W) of a row; None: the detector's own, or, where it has none, an image of one line.
        fpr: share of benign rows to flag.
    """

    def __init__(self, detector: Detector, image_shape: tuple[int, int, int] | None = None, fpr: float = 0.05):
        self.detector = detector
        self.image_shape = image_shape
        self.fpr = fpr

    def _images(self, X) -> Tensor:
        shape = self.image_shape or self.detector.image_shape or (1, 1, X.shape[1])
        if math.prod(shape) != X.shape[1]:
            raise ValueError(f"a row of {X.shape[1]} features is no image of shape {tuple(shape)}")
        return torch.tensor(X, dtype=torch.float32).reshape(len(X), *shape)

    def fit(self, X, y=None) -> "DetectorEstimator":
        """Calibrates on benign rows X [n, C*H*W]."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self.detector_ = copy.copy(self.detector).calibrate(self._images(X), self.fpr)  # parameters stay as given
        self.offset_ = -self.detector_.threshold
        return self

    def score_samples(self, X) -> np.ndarray:
        """[N], higher = more normal (scikit-learn's sense)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return -self.detector_.score(self._images(X)).cpu().numpy().astype(np.float64)

    def decision_function(self, X) -> np.ndarray:
        """[N], negative = flagged."""
        return self.score_samples(X) - self.offset_

    def predict(self, X) -> np.ndarray:
        """+1 for normal rows, -1 for flagged ones."""
        return np.where(self.decision_function(X) < 0, -1, 1)
