"""Outlier Exposure (Hendrycks, Mazeika and Dietterich 2018; paper, eq. 2): a victim that was taught to be unsure.

Also here: `train_exposed`, by which every baseline trains a victim of its own with the help of an outlier set.
"""

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samelib.data.image_set import ImageSet
from samelib.detectors.base import Detector, check_fpr
from samelib.models.classifiers import Victim, build_classifier
from samelib.store import ArtifactStore
from samelib.training import TrainSettings, augmented, seed_of, train


def outlier_exposure_loss(logits_in: Tensor, targets: Tensor, logits_out: Tensor, weight: float) -> Tensor:
    """Paper eq. 2: cross-entropy on labelled images, plus `weight` times that of the outliers to the uniform answer.

    The second term is mean(logsumexp(z) - mean_k z), which is log K for a uniform prediction and more for any other.

    Args:
        logits_in, targets: [B, K] and the labels int64 [B].
        logits_out: of outliers [B', K].
    """
    z = logits_out.float()
    return F.cross_entropy(logits_in.float(), targets) + weight * (z.logsumexp(1) - z.mean(1)).mean()


def check_weight(name: str, value: float) -> None:
    """Raises ValueError for a weight of a loss that is negative or not finite."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or more, got {value}")


def train_exposed(
    spec: dict,
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    images: ImageSet,
    outliers: ImageSet,
    settings: TrainSettings,
    seed: int,
    augment: bool,
    store: ArtifactStore | None,
    perturb: Callable[[Tensor, torch.Generator], Tensor] = lambda x, generator: x,
) -> tuple[nn.Module, dict]:
    """A model trained on labelled images and outliers, and its card, from the store where it is there.

    Every step sees as many outliers as labelled images, drawn with replacement and augmented like the rest, so that
    augmentation does not give them away.

    Args:
        spec: what decides the weights beside images, outliers, settings, seed and augmentation; `kind` among it.
        build: makes the untrained model.
        loss: (model, images [2 B, C, H, W], labels [B] of their first half, generator) -> scalar; the second half of the
            images are outliers.
        perturb: the outliers [B, C, H, W] as this method wants to see them.

    Raises:
        ValueError: no outliers, or images that are not alike.
    """
    check_outliers(outliers, images.image_shape)

    def batch_loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(len(outliers), index.shape, generator=generator, device=index.device)
        x = torch.cat([images.pixels(index), perturb(outliers.pixels(drawn), generator)])
        return loss(model, augmented(x, generator) if augment else x, images.labels[index], generator)

    spec = spec | {"train": asdict(settings), "augment": augment, "data": images.fingerprint}
    spec |= {"outliers": outliers.fingerprint, "seed": seed}
    return (store or ArtifactStore()).trained(
        spec,
        lambda: build().to(images.device),
        lambda model, checkpoint: train(
            model,
            lambda index, generator: batch_loss(model, index, generator),
            len(images),
            settings,
            seed=seed_of(seed, spec["kind"]),
            checkpoint=checkpoint,
            label=spec["kind"],
        ),
    )


def check_outliers(outliers: ImageSet, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError where there are no outliers, or such as the victim could not take."""
    if len(outliers) == 0:
        raise ValueError(
            "these baselines need an outlier set and this one is empty; give load_group outliers='path:...' "
            "(SAME needs none)"
        )
    if outliers.image_shape != image_shape:
        raise ValueError(f"the outliers are images {outliers.image_shape}, the victim's {image_shape}; make them alike")


class OutlierExposure(Detector):
    """Scores a query by the victim's doubt, after teaching it to answer outliers uniformly.

    Score: 1 - max_k F(x)_k (paper, "Outlier Exposure"), as the sum of the other probabilities: sure answers, whose
    largest one rounds to 1, do not tie then.

    Args:
        architecture: see `build_classifier`.
        train: how the victim is trained.
        seed: of initial weights, order and outliers.
        augment: shift (and mirror) images while training, see `samelib.training.augmented`.
        weight: of the outliers' term (0.5: Hendrycks et al.'s for pictures; from memory).

    Attributes:
        victim: what answers the queries, trained here; None before `fit`.
        cards: "victim": the card of its training, with `seconds` and `losses` (see `ArtifactStore.trained`).

    Raises:
        ValueError: a negative weight.
    """

    def __init__(
        self, architecture: str, train: TrainSettings, seed: int = 0, *, augment: bool = False, weight: float = 0.5
    ):
        check_weight("weight", weight)
        self.architecture, self.train, self.seed, self.augment = architecture, train, seed, augment
        self.weight = weight
        self.victim: Victim | None = None
        self.cards: dict[str, dict] = {}

    def fit(
        self,
        images: ImageSet,
        outliers: ImageSet,
        calibration: ImageSet,
        *,
        store: ArtifactStore | None = None,
        fpr: float = 0.05,
    ) -> "OutlierExposure":
        """Trains the victim on labelled images and outliers (or reads it from the store), then calibrates.

        Raises:
            ValueError: no outliers, images that are not alike, or too few calibration images for the rate.
        """
        check_fpr(fpr, len(calibration))
        classes, seed = len(images.classes), seed_of(self.seed, "outlier exposure")
        model, self.cards["victim"] = train_exposed(
            {"kind": "outlier-exposure", "architecture": self.architecture, "weight": self.weight},
            lambda: build_classifier(self.architecture, images.image_shape, classes, seed),
            self._loss,
            images,
            outliers,
            self.train,
            self.seed,
            self.augment,
            store,
        )
        self.victim, self.image_shape = (
            Victim.of(model, images.image_shape, classes, self.architecture),
            images.image_shape,
        )
        return self.calibrate(calibration.pixels(), fpr)

    def _loss(self, model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        logits = model(x)
        return outlier_exposure_loss(logits[: len(labels)], labels, logits[len(labels) :], self.weight)

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """Scores [N] between 0 and 1 - 1/K; `answers` [N, K] are those of this detector's own victim."""
        answers = self.victim(x) if answers is None else answers
        return answers.sort(1).values[:, :-1].sum(1)
