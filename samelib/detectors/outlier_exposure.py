"""Outlier Exposure (Hendrycks, Mazeika and Dietterich 2018; paper, eq. 2): a victim that was taught to be unsure.

Also here: what every baseline shares whose victim is trained with the help of an outlier set.
"""

import math
from abc import abstractmethod
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samelib.artifacts import ArtifactStore
from samelib.data.groups import Group
from samelib.data.image_set import check_queries, quantise
from samelib.detectors.base import Detector, NotFittedError, check_fpr
from samelib.models.classifiers import Victim, build_classifier
from samelib.training import TrainSettings, augmented, train


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


class ExposedDetector(Detector):
    """A detector that replaces the victim by one of its own, trained from scratch with an outlier set.

    Attributes:
        victim: what answers the queries; None before `fit`.
        cards: "victim": the card of the training, with its `seconds` and losses (see `ArtifactStore.trained`).
    """

    kind: str  # begins the name of the stored victim
    victim: Victim | None = None

    def __init__(self, architecture: str, train: TrainSettings, seed: int, augment: bool):
        self.architecture, self.train, self.seed, self.augment = architecture, train, seed, augment
        self.cards: dict[str, dict] = {}

    @abstractmethod
    def _options(self) -> dict:
        """What decides the weights beside architecture, training, data and seed."""

    @abstractmethod
    def _build(self, group: Group) -> nn.Module: ...

    @abstractmethod
    def _loss(self, model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar loss of images x [2 B, C, H, W], the second half outliers, and the labels [B] of the first half."""

    @abstractmethod
    def _victim(self, model: nn.Module, group: Group) -> Victim: ...

    def _outliers(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The outliers [B, C, H, W] as this method wants to see them."""
        return x

    def fit(self, group: Group, store: ArtifactStore | None = None, fpr: float = 0.05):
        """Trains the victim on `victim_train` and `outliers` (or reads it from the store), then calibrates.

        Every step sees as many outliers as labelled images, drawn with replacement.

        Raises:
            ValueError: no outlier set, one of other images, or too few calibration images for the rate.
        """
        images, outliers = group.victim_train, group.outliers
        check_outliers(group)
        check_fpr(fpr, len(group.calibration))
        spec = {"kind": self.kind, "architecture": self.architecture, "train": asdict(self.train)}
        spec |= {"augment": self.augment, "data": images.fingerprint, "outliers": outliers.fingerprint}
        spec |= {"seed": self.seed, "device": images.device.type} | self._options()

        def fit(model: nn.Module, file) -> list[float]:
            def loss(index: Tensor, generator: torch.Generator) -> Tensor:
                drawn = torch.randint(len(outliers), index.shape, generator=generator, device=index.device)
                x = torch.cat([images.pixels(index), self._outliers(outliers.pixels(drawn), generator)])
                x = augmented(x, generator) if self.augment else x
                return self._loss(model, x, images.labels[index], generator)

            return train(model, loss, len(images), self.train, seed=self.seed, checkpoint=file, label=self.kind)

        store = store or ArtifactStore()
        model, self.cards["victim"] = store.trained(spec, lambda: self._build(group).to(images.device), fit)
        self.victim = self._victim(model, group)
        return self.calibrate(group.calibration.pixels(), fpr)

    def _received(self, x: Tensor) -> Tensor:
        """The queries as the victim receives them.

        Raises:
            NotFittedError: before `fit`.
            TypeError, ValueError: see `check_queries`.
        """
        if self.victim is None:
            raise NotFittedError(f"this {type(self).__name__} has no victim yet; call fit(group) first")
        return quantise(check_queries(x, self.victim.image_shape))


def check_outliers(group: Group) -> None:
    """Raises ValueError where the group has no outlier set, or one whose images the victim could not take."""
    if len(group.outliers) == 0:
        raise ValueError(
            "these baselines need an outlier set and the group's is empty; give load_group outliers='path:...' "
            "(SAME needs none)"
        )
    if group.outliers.image_shape != group.image_shape:
        raise ValueError(
            f"the outliers are images {group.outliers.image_shape}, the victim's {group.image_shape}; make them alike"
        )


class OutlierExposure(ExposedDetector):
    """Scores a query by the victim's doubt, after teaching it to answer outliers uniformly.

    Score: 1 - max_k F(x)_k (paper, "Outlier Exposure"), as the sum of the other probabilities: sure answers, whose
    largest one rounds to 1, do not tie then. The outliers are augmented like the rest, so that augmentation does not
    give them away.

    Args:
        architecture: see `build_classifier`.
        train: how the victim is trained.
        seed: of initial weights, order and outliers.
        augment: shift (and mirror) images while training, see `samelib.training.augmented`.
        weight: of the outliers' term (0.5: Hendrycks et al.'s for pictures; from memory).

    Raises:
        ValueError: a negative weight.
    """

    kind = "outlier-exposure"

    def __init__(
        self, architecture: str, train: TrainSettings, seed: int = 0, *, augment: bool = False, weight: float = 0.5
    ):
        super().__init__(architecture, train, seed, augment)
        check_weight("weight", weight)
        self.weight = weight

    def _options(self) -> dict:
        return {"weight": self.weight}

    def _build(self, group: Group) -> nn.Module:
        return build_classifier(self.architecture, group.image_shape, group.classes, self.seed)

    def _loss(self, model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        logits = model(x)
        return outlier_exposure_loss(logits[: len(labels)], labels, logits[len(labels) :], self.weight)

    def _victim(self, model: nn.Module, group: Group) -> Victim:
        return Victim.of(model, group.image_shape, group.classes, self.architecture)

    def score(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """Images [N, C, H, W] -> scores [N] between 0 and 1 - 1/K.

        Args:
            answers: of this detector's own victim [N, K], where they are at hand.

        Raises:
            NotFittedError: before `fit`.
            TypeError, ValueError: not what the victim takes, or not one answer for each image.
        """
        x = self._received(x)
        answers = self.victim(x) if answers is None else answers
        if len(answers) != len(x):
            raise ValueError(f"{len(x)} images came with {len(answers)} answers; give one answer for each image")
        return answers.sort(1).values[:, :-1].sum(1)
