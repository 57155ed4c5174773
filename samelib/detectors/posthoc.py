"""Detectors of out-of-distribution images that need no training of the victim, adapted from pytorch-ood.

Sanity rows beside the paper's baselines: they need neither outliers nor history, but the victim's weights, which SAME
does not.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from samelib.data.image_set import ImageSet
from samelib.detectors.base import Detector, check_fpr
from samelib.models.classifiers import Victim
from samelib.store import ArtifactStore

BATCH = 256
TRAINING_IMAGES = 10_000  # at most, whose features Mahalanobis and nearest neighbours remember
CLASSES = {"max-softmax": "MaxSoftmax", "energy": "EnergyBased", "mahalanobis": "Mahalanobis", "knn": "KNN"}
METHODS = tuple(CLASSES)
ON_FEATURES = ("mahalanobis", "knn")


def _pytorch_ood():
    try:
        import pytorch_ood.detector
    except ImportError as error:
        raise ImportError("PostHoc adapts the detectors of pytorch-ood: pip install pytorch-ood") from error
    return pytorch_ood.detector


@contextmanager
def _double_by_default():
    """pytorch-ood sums covariances in the default type; those of ReLU features are near singular, too much for float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class PostHoc(Detector):
    """One of pytorch-ood's detectors on the victim's logits or features.

    - "max-softmax": minus the largest probability (Hendrycks and Gimpel 2017).
    - "energy": minus the logsumexp of the logits (Liu et al. 2020).
    - "mahalanobis": half the squared distance to the nearest class mean, under one covariance for all classes, of the
      last layer's features (Lee et al. 2018, without their perturbation of the input).
    - "knn": distance to the 50th nearest training feature, features of unit length (Sun et al. 2022).

    Args:
        method: one of METHODS.

    Raises:
        ValueError: an unknown method.
        ImportError: pytorch-ood is not installed.
    """

    def __init__(self, method: str):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.method = method
        self.victim: Victim | None = None
        self._adapted = getattr(_pytorch_ood(), CLASSES[method])(None)  # no model: it is given logits or features

    def fit(
        self,
        images: ImageSet,
        calibration: ImageSet,
        victim: Victim,
        *,
        store: ArtifactStore | None = None,
        fpr: float = 0.05,
    ) -> "PostHoc":
        """Remembers the features of at most 10,000 training images where the method needs them, then calibrates.

        Args:
            store: not used, nothing is trained; here so that detectors with a given victim are fitted alike.

        Raises:
            ValueError: a black-box victim or one of another kind, or too few images.
        """
        check_fpr(fpr, len(calibration))
        victim.require(images.image_shape, len(images.classes))
        if victim.model is None:
            raise ValueError(
                "these detectors need the victim's logits or features, and this victim is a black box; "
                "give one with its model (Victim.of), or use SAME, which needs its answers alone"
            )
        if self.method in ON_FEATURES and not isinstance(getattr(victim.model, "trunk", None), nn.Module):
            raise ValueError(f"{self.method} needs the features of victim.model.trunk, which this victim has not")
        self.victim, self.image_shape = victim, images.image_shape
        if self.method in ON_FEATURES:
            self._remember_features(images[:TRAINING_IMAGES])
        return self.calibrate(calibration.pixels(), fpr)

    def _remember_features(self, images: ImageSet) -> None:
        if self.method == "knn" and len(images) < self._adapted.k:
            raise ValueError(f"knn needs at least {self._adapted.k} training images, got {len(images)}")
        parts = torch.arange(len(images), device=images.device).split(BATCH)
        features = torch.cat([self._outputs(images.pixels(part)) for part in parts])
        _, classes = images.labels.unique(return_inverse=True)  # without gaps, as pytorch-ood asks
        with _double_by_default():
            self._adapted.fit_features(features, classes.cpu())

    @torch.no_grad()
    def _outputs(self, x: Tensor) -> Tensor:
        """x [n, C, H, W] -> features [n, D] or logits [n, K], float64 on the CPU."""
        model = self.victim.model.trunk if self.method in ON_FEATURES else self.victim.model
        outputs = model(x.to(next(model.parameters()).device).contiguous(memory_format=torch.channels_last))
        if outputs.ndim != 2:
            raise ValueError(f"the victim's model gives {list(outputs.shape)}, these detectors need one row an image")
        return outputs.double().cpu()

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """Scores float64 [N]; the answers are not needed. In 32 bits the largest probability of a sure answer is 1, and
        most queries would tie."""
        predict = self._adapted.predict_features if self.method in ON_FEATURES else self._adapted.predict_logits
        scores = torch.cat([predict(self._outputs(part)) for part in x.split(BATCH)])
        return scores.to(next(self.victim.model.parameters()).device)
