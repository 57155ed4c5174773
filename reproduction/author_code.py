"""The detector as the authors' released code computes it, each of its faults alone or all together (chapter 9)."""

import copy
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from samelib.data.image_set import ImageSet, check_queries, received
from samelib.detectors.same import SameDetector, Terms
from samelib.presets import SameSettings
from samelib.store import ArtifactStore

LABELS, MASKED, KL = "trained on labels", "trained on masked reconstructions", "KL deviation"
RAW_QUERIES, DIVIDED, BATCH_STATISTICS = "scores raw queries", "divided loss", "batch statistics"
RAW_SCALE, INTERPOLATED = "raw scale, alpha 0.99", "interpolated ROC"
FAULTS = (LABELS, MASKED, KL, RAW_QUERIES, DIVIDED, BATCH_STATISTICS, RAW_SCALE, INTERPOLATED)
ALL_FAULTS = "all of them"


def faults_of(name: str) -> Collection[str]:
    """The faults of that name: "none", `ALL_FAULTS`, or one of `FAULTS`.

    Raises:
        ValueError: an unknown fault.
    """
    if name not in ("none", ALL_FAULTS, *FAULTS):
        raise ValueError(f"fault must be none, {', '.join(FAULTS)} or {ALL_FAULTS}, got {name!r}")
    return FAULTS if name == ALL_FAULTS else () if name == "none" else (name,)


def kl_deviation(victim: Tensor, auxiliary: Tensor) -> Tensor:
    """KL(victim || auxiliary) / K of two probability vectors [N, K] -> [N]."""
    tiny = torch.finfo(victim.dtype).tiny
    return (victim * (victim.clamp_min(tiny).log() - auxiliary.clamp_min(tiny).log())).mean(1)


class AuthorCodeDetector(SameDetector):
    """SAME with faults of the released code.

    - trained on labels: the auxiliary model learns the true labels, not the victim's answers (eq. 5).
    - trained on masked reconstructions: always, though queries are scored at mask 0.
    - KL deviation: `kl_deviation` in place of the squared distance (eq. 6).
    - scores raw queries: as they were sent; the victim answers the clamped 8-bit image all the same.
    - divided loss: eq. 4 over the mask ratio (AdamW hardly notices).
    - batch statistics: BatchNorm of the auxiliary model stays in training mode: a score depends on its batch.
    - raw scale, alpha 0.99: the terms are not standardised.
    - interpolated ROC: not of the detector but of its figures (see `samelib.metrics.fpr_at_tpr`).

    Args:
        settings: of SAME at mask 0, as the released code scores; the autoencoder's training stays that of the tier
            (theirs is TrainSettings(lr=0.01, schedule="author_code")).
        fault: one of `FAULTS`, or `ALL_FAULTS`.
        seed: see `SameDetector`.

    Raises:
        ValueError: an unknown fault.
    """

    def __init__(self, settings: SameSettings, fault: str, seed: int = 0):
        self.faults = faults_of(fault)
        if RAW_SCALE in self.faults:
            settings = replace(settings, scale="raw", alpha=0.99)
        super().__init__(settings, seed)
        if DIVIDED in self.faults:
            self.loss_factor = 1 / settings.mae.mask_ratio
        if LABELS in self.faults:
            self.auxiliary_target = "labels"

    @property
    def auxiliary_mask_ratio(self) -> float:
        return self.settings.mae.mask_ratio if MASKED in self.faults else super().auxiliary_mask_ratio

    def _auxiliary_loss(self, logits: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        if LABELS in self.faults:
            return nn.functional.cross_entropy(logits, labels)
        return super()._auxiliary_loss(logits, answers, labels)

    def _received(self, x: Tensor) -> Tensor:
        if RAW_QUERIES in self.faults:
            return check_queries(x, self.image_shape)
        return super()._received(x)

    def _terms_of(self, images: ImageSet, store: ArtifactStore) -> Terms:
        return self.terms(images.pixels())  # the store keeps those of a sound detector

    def _terms(self, x: Tensor, answers: Tensor | None) -> Terms:
        return super()._terms(x, self.victim(received(x, self.image_shape)) if answers is None else answers)

    def _distance(self, victim: Tensor, auxiliary: Tensor) -> Tensor:
        return kl_deviation(victim, auxiliary) if KL in self.faults else super()._distance(victim, auxiliary)

    def _predict_auxiliary(self, reconstruction: Tensor) -> Tensor:
        if BATCH_STATISTICS not in self.faults:
            return super()._predict_auxiliary(reconstruction)
        with torch.inference_mode():
            statistics = copy.deepcopy(self.auxiliary)  # training mode would move the running statistics
            return statistics.train()(reconstruction).float().softmax(1)
