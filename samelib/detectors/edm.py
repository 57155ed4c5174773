"""EDM, an ensemble of diverse models (Kariyappa, Prakash and Qureshi 2020; paper, eq. 3).

Its members agree on the victim's own images and are trained to disagree on outliers. Each query is answered by one of
them, so that answers to outliers make no sense as a whole. The paper reads an anomaly score from their disagreement.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samelib.data.image_set import ImageSet, quantise, to_uint8
from samelib.detectors.base import Detector, check_fpr
from samelib.detectors.outlier_exposure import check_weight, train_exposed
from samelib.models.classifiers import Victim, build_classifier, predict
from samelib.store import ArtifactStore
from samelib.training import TrainSettings, seed_of

BATCH = 256
CONSENSUS = ("mean cosine", "max cosine", "vote entropy")


def pairwise_cosines(probabilities: Tensor) -> Tensor:
    """Predictions of N models [N, B, K] -> cosine of each pair's predictions [N (N - 1) / 2, B]."""
    directions = F.normalize(probabilities.float(), dim=-1)
    i, j = torch.triu_indices(len(directions), len(directions), 1, device=directions.device)
    return (directions[i] * directions[j]).sum(-1)


def diversity_loss(probabilities: Tensor) -> Tensor:
    """Paper eq. 3, second term: log sum_{i<j} exp cos(f_i, f_j) of predictions [N, B, K], averaged over the B images."""
    return pairwise_cosines(probabilities).logsumexp(0).mean()


def pairwise_distances(probabilities: Tensor) -> Tensor:
    """Cosine distance, 1 - cos, of each pair's predictions [N (N - 1) / 2, B], float64.

    As half the squared distance of the directions: of two sure and nearly equal predictions 1 - cos would round to 0,
    and most queries, benign or not, would tie there.
    """
    directions = F.normalize(probabilities.double(), dim=-1)
    i, j = torch.triu_indices(len(directions), len(directions), 1, device=directions.device)
    return (directions[i] - directions[j]).square().sum(-1) / 2


def consensus(probabilities: Tensor) -> dict[str, Tensor]:
    """How little the members agree: predictions [N, B, K] -> three scores [B] (see `EDM`)."""
    distances = pairwise_distances(probabilities)
    votes = F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).float().mean(0)
    scores = (distances.mean(0).float(), distances.amin(0).float(), torch.special.entr(votes).sum(1))
    return dict(zip(CONSENSUS, scores, strict=True))


def perturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every image [N, C, H, W] in [-1, 1] moved and jittered by amounts of its own; the ranges are our choice.

    Rotated by up to 30 degrees, scaled by 0.8 to 1.25, shifted by up to an eighth of the size, contrast times 0.6 to
    1.4, brightness plus up to 0.4 either way, Gaussian noise of deviation up to 0.2; clamped to [-1, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator, device=x.device)

    turn, scale = uniform(-math.pi / 6, math.pi / 6), uniform(0.8, 1.25)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    rows = [cos, -sin, uniform(-0.25, 0.25), sin, cos, uniform(-0.25, 0.25)]  # 2 is the whole width
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 coordinates would be off by a tenth of a pixel
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast, brightness, deviation = (
        u[:, None, None, None] for u in (uniform(0.6, 1.4), uniform(-0.4, 0.4), uniform(0, 0.2))
    )
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (moved * contrast + brightness + deviation * noise).clamp(-1, 1)


def half_perturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Outliers [B, C, H, W], the first half as they are, the others `perturbed`."""
    half = len(x) // 2
    return torch.cat([x[:half], perturbed(x[half:], generator)])


def pick_models(images: Tensor, models: int) -> Tensor:
    """uint8 images [N, ...] -> int64 [N], which of `models` members answers each: BLAKE2b of the pixels, modulo.

    The original hashes with a small network, so that nearly equal queries meet the same member; this hash sends them to
    any (our choice, as there is nothing to train). Equal queries always meet the same one.

    Raises:
        TypeError: not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"the hash is of 8-bit images, got {images.dtype}; convert with to_uint8")
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in images.cpu().numpy())
    return torch.tensor([int.from_bytes(digest, "big") % models for digest in digests], dtype=torch.int64)


class Ensemble(nn.Module):
    """N classifiers of one architecture, each from initial weights of its own: [B, C, H, W] -> logits [N, B, K]."""

    def __init__(self, architecture: str, image_shape: tuple[int, int, int], classes: int, models: int, seed: int = 0):
        super().__init__()
        seeds = (seed_of(seed, "edm member", i) for i in range(models))
        self.members = nn.ModuleList(build_classifier(architecture, image_shape, classes, s) for s in seeds)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members])

    def answer(self, x: Tensor) -> Tensor:
        """Probabilities [B, K] of images [B, C, H, W], each from the member that its hash picks."""
        received = quantise(x)
        picks = pick_models(to_uint8(x), len(self.members))
        answers = [(picks == i, predict(m, received[picks == i])) for i, m in enumerate(self.members) if i in picks]
        probabilities = torch.empty(len(x), answers[0][1].shape[1], device=answers[0][1].device)
        for picked, answer in answers:
            probabilities[picked.to(probabilities.device)] = answer
        return probabilities


class EDM(Detector):
    """Scores a query by how far the members of an ensemble of diverse models disagree on it.

    Loss (paper, eq. 3): mean cross-entropy of the members + gamma * `diversity_loss` on outliers, half of them as they
    are and half `perturbed`.
    The paper leaves its consensus score open. Offered: "mean cosine", 1 - the mean cosine of the pairs' predictions;
    "max cosine", 1 - the largest one (the "coherence" that public code of the original computes); "vote entropy", the
    entropy of the members' votes in nats.

    Args:
        architecture, train, seed, augment: as for `OutlierExposure`.
        models: N, 5 in the original (from memory).
        gamma: weight of the diversity; 1, the plain sum, is our choice: the original's value could not be checked.
        consensus: which score `score` returns.

    Attributes:
        victim, cards: as for `OutlierExposure`.

    Raises:
        ValueError: fewer than two models, a negative gamma, an unknown consensus.
    """

    def __init__(
        self,
        architecture: str,
        train: TrainSettings,
        seed: int = 0,
        *,
        augment: bool = False,
        models: int = 5,
        gamma: float = 1.0,
        consensus: str = "mean cosine",
    ):
        check_weight("gamma", gamma)
        if models < 2:
            raise ValueError(f"models must be at least 2 (one model agrees with itself), got {models}")
        if consensus not in CONSENSUS:
            raise ValueError(f"consensus must be one of {', '.join(CONSENSUS)}, got {consensus!r}")
        self.architecture, self.train, self.seed, self.augment = architecture, train, seed, augment
        self.models, self.gamma, self.consensus = models, gamma, consensus
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
    ) -> "EDM":
        """Trains the ensemble on labelled images and outliers (or reads it from the store), then calibrates.

        Raises:
            ValueError: no outliers, images that are not alike, or too few calibration images for the rate.
        """
        check_fpr(fpr, len(calibration))
        classes = len(images.classes)
        model, self.cards["victim"] = train_exposed(
            {"kind": "edm", "architecture": self.architecture, "models": self.models, "gamma": self.gamma},
            lambda: Ensemble(self.architecture, images.image_shape, classes, self.models, self.seed),
            self._loss,
            images,
            outliers,
            self.train,
            self.seed,
            self.augment,
            store,
            half_perturbed,
        )
        model.eval().requires_grad_(False)
        self.victim, self.image_shape = Victim(model.answer, images.image_shape, classes, model), images.image_shape
        return self.calibrate(calibration.pixels(), fpr)

    def _loss(self, model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        logits = model(x).float()
        known, unknown = logits[:, : len(labels)], logits[:, len(labels) :]
        error = F.cross_entropy(known.flatten(0, 1), labels.repeat(self.models))
        return error + self.gamma * diversity_loss(unknown.softmax(-1))

    def consensus_scores(self, x: Tensor) -> dict[str, Tensor]:
        """All three scores [N] of images [N, C, H, W], higher = less agreement; every member sees every image once.

        Errors as for `score`.
        """
        return self._consensus(self._received(x))

    def _consensus(self, x: Tensor) -> dict[str, Tensor]:
        members = self.victim.model.members
        parts = [consensus(torch.stack([predict(member, part) for member in members])) for part in x.split(BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in CONSENSUS}

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """The chosen consensus score [N]. The answers are of no use here: each is one member's alone."""
        return self._consensus(x)[self.consensus]
