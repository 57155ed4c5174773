"""Controls: what one line tells of a query, without any network.

A detector that is no better than these has learnt nothing that they do not see. Between MNIST and EMNIST they see a lot:
one set was drawn by another program than the other, and that is all that the largest difference of neighbouring pixels
needs to know.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from samelib.data.image_set import ImageSet
from samelib.detectors.base import Detector, check_fpr
from samelib.detectors.views import FEWEST, Profile, log_patches, log_variance
from samelib.models.classifiers import Victim
from samelib.models.mae import patchify
from samelib.presets import fitting_patch
from samelib.store import ArtifactStore

BATCH = 256
GRID = 7  # patches along a side, about
COMPONENTS = 20
TRAINING_IMAGES = 10_000  # at most, of which the mean image and the principal components are taken
SIDES = ("high", "low", "both")


# Statistics: x float [N, C, H, W] in [-1, 1] -> one number a query [N], or one a patch [N, T].


def largest_difference(x: Tensor) -> Tensor:
    """The largest difference of two pixels that are neighbours in a row or column [N]: how hard the hardest edge is."""
    across, down = (x.diff(dim=axis).abs().flatten(1).amax(1) for axis in (3, 2))
    return torch.maximum(across, down)


def squared_laplacian(x: Tensor) -> Tensor:
    """The squared sum of a pixel's four differences from its neighbours, averaged over all inner pixels [N]."""
    inner = x[..., 1:-1, 1:-1]
    neighbours = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return (neighbours - 4 * inner).square().flatten(1).mean(1)


def log_distance(x: Tensor, mean: Tensor, patch: int) -> Tensor:
    """The logarithm of the mean squared distance from a mean image [C, H, W], patch by patch [N, T]."""
    return log_patches(patchify((x - mean).square(), patch).mean(2))


def pca_error(x: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """The squared error of the reconstruction from orthonormal components [D, C H W] about their mean [C H W],
    averaged over pixels [N]: an autoencoder without a network."""
    centred = x.flatten(1) - mean
    return (centred - centred @ components.T @ components).square().mean(1)


# What each statistic learns of benign training images: images [N, C, H, W] -> the statistic of queries.


def _patch_of(images: Tensor) -> int:
    return fitting_patch(tuple(images.shape[1:]), GRID)


def _distance_from_mean(images: Tensor) -> Callable[[Tensor], Tensor]:
    return partial(log_distance, mean=images.mean(0), patch=_patch_of(images))


def _error_of_pca(images: Tensor) -> Callable[[Tensor], Tensor]:
    rows = images.flatten(1)
    if min(rows.shape) < COMPONENTS:
        raise ValueError(
            f"pca needs at least {COMPONENTS} training images of as many pixels, got {len(rows)} of {rows.shape[1]}"
        )
    pca = PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit(rows.cpu().numpy())
    mean, components = (torch.from_numpy(part).to(rows) for part in (pca.mean_, pca.components_))
    return partial(pca_error, mean=mean, components=components)


STATISTICS: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "largest-difference": lambda images: largest_difference,
    "laplacian": lambda images: squared_laplacian,
    "local-variance": lambda images: partial(log_variance, patch=_patch_of(images)),
    "mean-image": _distance_from_mean,
    "pca": _error_of_pca,
}
CONTROLS = {f"{statistic}-{side}": (statistic, side) for statistic in STATISTICS for side in SIDES}


class Measured(NamedTuple):
    """Queries as a `Profile` looks at them: a statistic [N] or [N, T], and where it is needed the victim's
    probabilities [N, K]."""

    values: Tensor
    answers: Tensor | None


class Control(Detector):
    """One statistic of a query's pixels.

    - "largest-difference": of two neighbouring pixels, the hardest edge.
    - "laplacian": the mean squared Laplacian, the sharpness of the whole image.
    - "local-variance": the logarithm of each patch's variance.
    - "mean-image": the logarithm of each patch's squared distance from the mean training image.
    - "pca": the error of a reconstruction from 20 principal components of the training images.

    Those that have a number for each patch become one by the Mahalanobis distance from benign images of the class that
    the victim answers (see `Profile`).

    Args:
        statistic: one of `STATISTICS`.
        side: which values are suspicious: "high" ones, "low" ones, or "both". The score is then how far the rank among
            benign values lies from the middle, between 0 and 1/2.

    Raises:
        ValueError: an unknown statistic or side.
    """

    def __init__(self, statistic: str, side: str = "both"):
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
        if side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
        self.statistic, self.side = statistic, side
        self.victim: Victim | None = None

    def fit(
        self,
        images: ImageSet,
        calibration: ImageSet,
        victim: Victim,
        *,
        store: ArtifactStore | None = None,
        fpr: float = 0.05,
    ) -> "Control":
        """Takes mean image and components from at most 10,000 training images, then calibrates.

        One half of the calibration set gives benign values to compare with (ranks, means and covariance), the other the
        threshold and the p-values.

        Args:
            victim: see `Victim.wrap`; it is asked where a statistic goes by class.
            store: not used, nothing is trained; here so that detectors with a given victim are fitted alike.

        Raises:
            ValueError: images that do not fit together, of a size that cannot be cut into patches, or too few of them.
        """
        if len(calibration) < FEWEST:
            raise ValueError(f"a control needs {FEWEST} calibration images or more, got {len(calibration)}")
        half = len(calibration) // 2
        check_fpr(fpr, half)
        self._stand_before(victim, images, calibration)
        self._device = images.device
        self._read = STATISTICS[self.statistic](images[:TRAINING_IMAGES].pixels())
        reference, threshold = calibration.split(half, half)
        benign = self._measured(reference.pixels(), None)
        if benign.values.ndim == 2:
            self._profile = Profile(lambda measured: measured.values).fit(benign)
        self._benign = self._number(benign).sort().values
        return self.calibrate(threshold.pixels(), fpr)

    def _measured(self, x: Tensor, answers: Tensor | None) -> Measured:
        values = torch.cat([self._read(part.to(self._device)) for part in x.split(BATCH)]).double()
        if values.ndim == 2:
            answers = (self.victim(x) if answers is None else answers).to(self._device)
        return Measured(values, answers)

    def _number(self, measured: Measured) -> Tensor:
        """One number a query, float64 [N]."""
        return self._profile(measured) if measured.values.ndim == 2 else measured.values

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        number = self._number(self._measured(x, answers))
        if self.side != "both":
            return number if self.side == "high" else -number
        below, not_above = (torch.searchsorted(self._benign, number, right=right) for right in (False, True))
        rank = (below + not_above).double() / (2 * len(self._benign))  # ties share the middle of theirs
        return (rank - 0.5).abs()
