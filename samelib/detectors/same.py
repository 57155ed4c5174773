"""SAME: sample reconstruction against model extraction (paper, "Methodology").

A masked autoencoder reconstructs the query, an auxiliary model predicts on the reconstruction, and the anomaly score is
    S(x) = alpha * r(x) + (1 - alpha) * d(x)                                                     (paper, eq. 6)
with r the reconstruction error and d the deviation of the two predictions.
"""

import copy
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from samelib.artifacts import ArtifactError, ArtifactStore, load_folder, save_folder
from samelib.data.groups import Group
from samelib.data.image_set import ImageSet, check_queries, quantise
from samelib.detectors.base import Detector, NotFittedError, check_fpr
from samelib.detectors.same_settings import SameSettings, check_alpha, settings_from_card
from samelib.models.classifiers import SharedTrunk, Victim, build_classifier, predict
from samelib.models.mae import MaskedAutoencoder
from samelib.training import autocast, hash_seed, train, train_mae

BATCH = 256


def reconstruction_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """r(x): the squared error of [N, C, H, W], averaged over the pixels of each image -> [N]."""
    return (x - reconstruction).square().flatten(1).mean(1)


def deviation(victim: Tensor, auxiliary: Tensor) -> Tensor:
    """d(x): the squared distance of two probability vectors, both [N, K] -> [N], between 0 and 2."""
    return (victim - auxiliary).square().sum(1)


def kl_deviation(victim: Tensor, auxiliary: Tensor) -> Tensor:
    """The authors' code instead: KL(victim || auxiliary) / K."""
    tiny = torch.finfo(victim.dtype).tiny
    ratio = victim.clamp_min(tiny).log() - auxiliary.clamp_min(tiny).log()
    return (victim * ratio).mean(1)


def auxiliary_loss(victim: Tensor, logits: Tensor) -> Tensor:
    """Paper eq. 5: the mean squared distance between the victim's probabilities and the auxiliary model's own."""
    return deviation(victim, logits.softmax(1)).mean()


def anomaly_score(r: Tensor, d: Tensor, alpha: float) -> Tensor:
    """Paper eq. 6. alpha = 1 is SAME-X (reconstruction alone), alpha = 0 is SAME-Y (deviation alone)."""
    return alpha * r + (1 - alpha) * d


def pass_noise(tokens: int, passes: int, seed: int) -> Tensor:
    """[passes, tokens]: the masks of the scoring passes, the same for every image and every day."""
    return torch.rand(passes, tokens, generator=torch.Generator().manual_seed(hash_seed(seed, passes)))


class Terms(NamedTuple):
    """Both terms of the score of each query: any alpha can be tried on them without scoring again."""

    reconstruction: Tensor
    deviation: Tensor


class SameDetector(Detector):
    """Scores queries by how badly they are reconstructed and how far the prediction moves (paper eq. 6).

    It needs benign images and the victim's answers: no outliers, no history, no weights of the victim.

    Args:
        settings: see SameSettings.
        seed: of initial weights, training order and masks.
    """

    def __init__(self, settings: SameSettings, seed: int = 0):
        self.settings, self.seed = settings, seed
        self.mae: MaskedAutoencoder | None = None
        self.auxiliary: nn.Module | None = None
        self.calibration_terms: Terms | None = None
        self.cards: dict[str, dict] = {}

    def fit(self, group: Group, victim: Victim, store: ArtifactStore | None = None, fpr: float = 0.05):
        """Trains autoencoder and auxiliary model (or reads them from the store), then scales and calibrates.

        One half of the calibration set gives the scale of the two terms, the other the threshold and the p-values:
        conformal validity wants a score that was fixed before it saw the calibration images.
        """
        store, half = store or ArtifactStore(), len(group.calibration) // 2
        check_fpr(fpr, half)
        needs_labels = self.settings.protocol.auxiliary_target == "labels"
        victim.require(group.image_shape, group.classes if needs_labels else victim.classes)
        self.victim = victim
        self.mae, self.cards["mae"] = self.fit_autoencoder(group.victim_train, store)
        self.auxiliary, self.cards["auxiliary"] = self._fit_auxiliary(group.victim_train, store)
        self._freeze()
        scaling, threshold = group.calibration.split(half, half)
        terms = self.terms(scaling.pixels())
        self.scale = torch.stack([torch.stack([t.mean(), t.std().clamp_min(1e-12)]) for t in terms])
        return self.calibrate(threshold.pixels(), fpr)

    def _freeze(self) -> None:
        self.mae.eval().requires_grad_(False)
        self.auxiliary.train(not self.settings.protocol.eval_mode).requires_grad_(False)

    def fit_autoencoder(self, images: ImageSet, store: ArtifactStore, on_epoch=None) -> tuple[nn.Module, dict]:
        """The trained autoencoder and its card, from the store where it is there; `on_epoch` watches (see `train`)."""
        s = self.settings
        factor = 1 / s.mae.mask_ratio if s.protocol.divide_loss and s.mae.mask_ratio else 1.0
        spec = {"kind": "mae", "mae": asdict(s.mae), "train": asdict(s.mae_train), "loss_factor": factor}
        spec |= {"data": images.fingerprint, "seed": self.seed, "device": images.device.type}
        return store.trained(
            spec,
            lambda: MaskedAutoencoder(images.image_shape, s.mae, self.seed).to(images.device),
            lambda model, file: train_mae(
                model, images, s.mae_train, seed=self.seed, loss_factor=factor, checkpoint=file, on_epoch=on_epoch
            ),
        )

    def _fit_auxiliary(self, images: ImageSet, store: ArtifactStore):
        s = self.settings
        images = images[: s.auxiliary_images]
        identity = self.victim.fingerprint
        answers = None if identity else self.victim(images.pixels())
        if identity is None:  # a victim whose weights are not at hand is known by its answers
            identity = hashlib.sha256(answers.cpu().numpy().tobytes()).hexdigest()
        ratio = s.mask_ratio if s.protocol.auxiliary_mask_ratio is None else s.protocol.auxiliary_mask_ratio
        spec = {"kind": "auxiliary", "architecture": s.auxiliary, "train": asdict(s.auxiliary_train), "ratio": ratio}
        spec |= {"target": s.protocol.auxiliary_target, "shared": s.share_backbone, "views": s.views}
        spec |= {"mae": self.cards["mae"]["sha256"], "victim": identity, "images": len(images)}
        spec |= {"data": images.fingerprint, "seed": self.seed, "device": images.device.type}
        return store.trained(
            spec,
            lambda: self._build_auxiliary().to(images.device),
            lambda model, file: self._train_auxiliary(model, images, answers, ratio, file),
        )

    def _build_auxiliary(self) -> nn.Module:
        if not self.settings.share_backbone:
            return build_classifier(
                self.settings.auxiliary, self.victim.image_shape, self.victim.classes, self.seed + 1
            )
        if self.victim.model is None:
            raise ValueError("share_backbone needs the victim's model; a black-box victim has no trunk to share")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            return SharedTrunk(self.victim.model)

    def _train_auxiliary(self, model: nn.Module, images: ImageSet, answers: Tensor | None, ratio: float, file: Path):
        """Eq. 5 on reconstructions under the masking that will be scored, each view under masks of its own."""
        answers = (self.victim(images.pixels()) if answers is None else answers).to(images.device)
        views = 1 if ratio == 0 else self.settings.views
        generator = torch.Generator(images.device).manual_seed(hash_seed(self.seed, 2))
        reconstructions = []
        for _ in range(views):
            noise = torch.rand(len(images), self.mae.tokens, generator=generator, device=images.device)
            parts = [
                self.reconstruct(images.pixels(i), noise[i], ratio) for i in torch.arange(len(images)).split(BATCH)
            ]
            reconstructions.append(torch.cat(parts).half())
        reconstructions = torch.stack(reconstructions)
        labels = images.labels if self.settings.protocol.auxiliary_target == "labels" else None

        def loss(index: Tensor, generator: torch.Generator) -> Tensor:
            view = torch.randint(views, index.shape, generator=generator, device=index.device)
            logits = model(reconstructions[view, index].float())
            if labels is not None:
                return nn.functional.cross_entropy(logits, labels[index])
            return auxiliary_loss(answers[index], logits.float())

        settings = self.settings.auxiliary_train
        return train(model, loss, len(images), settings, seed=self.seed, checkpoint=file, label="auxiliary model")

    @torch.inference_mode()
    def reconstruct(self, x: Tensor, noise: Tensor, mask_ratio: float | None = None) -> Tensor:
        """x [N, C, H, W] and noise [N or 1, T] -> reconstruction [N, C, H, W]."""
        with autocast(x.device):
            return self.mae(x, noise.expand(len(x), -1), mask_ratio)[0]

    def terms(self, x: Tensor, answers: Tensor | None = None) -> Terms:
        """Reconstruction error [N] and deviation [N] of images [N, C, H, W].

        Args:
            answers: what the victim answered to them [N, K]; without it the victim is asked.

        Raises:
            NotFittedError: before `fit` or `load`.
            TypeError, ValueError: the images are not what the victim takes (see `check_queries`).
        """
        if self.mae is None:
            raise NotFittedError(
                "this SameDetector is not fitted; call fit(group, victim) or SameDetector.load(folder)"
            )
        device = self.mae.class_token.device
        x = check_queries(x, self.victim.image_shape)
        noise = pass_noise(self.mae.tokens, self.settings.passes, self.seed).to(device)
        if answers is not None and len(answers) != len(x):
            raise ValueError(f"{len(x)} images came with {len(answers)} answers; give one answer for each image")
        batches = [slice(start, start + BATCH) for start in range(0, len(x), BATCH)]
        parts = [self._batch_terms(x[i].to(device), None if answers is None else answers[i], noise) for i in batches]
        return Terms(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _batch_terms(self, x: Tensor, answers: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        protocol = self.settings.protocol
        received = quantise(x)
        seen = received if protocol.quantise else x
        answer = (self.victim(received) if answers is None else answers).to(x.device)
        distance = deviation if protocol.deviation == "squared" else kl_deviation
        r = d = 0.0
        for rows in noise.split(max(1, BATCH // len(x))):  # few images: several passes at once, as one batch
            passes = len(rows)
            images, answers = seen.repeat(passes, 1, 1, 1), answer.repeat(passes, 1)
            reconstruction = self.reconstruct(images, rows.repeat_interleave(len(x), 0), self.settings.mask_ratio)
            r = r + reconstruction_error(images, reconstruction).view(passes, -1).sum(0)
            d = d + distance(answers, self._predict_auxiliary(reconstruction)).view(passes, -1).sum(0)
        return r / len(noise), d / len(noise)

    @torch.inference_mode()
    def _predict_auxiliary(self, reconstruction: Tensor) -> Tensor:
        if self.settings.protocol.eval_mode:
            with autocast(reconstruction.device):  # as it was trained
                return predict(self.auxiliary, reconstruction)
        statistics = copy.deepcopy(self.auxiliary)  # training mode would move the running statistics
        return statistics.train()(reconstruction).float().softmax(1)

    def combine(self, terms: Terms, alpha: float | None = None) -> Tensor:
        """Anomaly scores [N] from both terms, in the detector's scale (eq. 6)."""
        alpha = self.settings.alpha if alpha is None else alpha
        check_alpha(alpha)
        if self.settings.scale == "standardised":
            terms = Terms(*((t - mean) / std for t, (mean, std) in zip(terms, self.scale, strict=True)))
        return anomaly_score(*terms, alpha)

    def score(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        return self.combine(self.terms(x, answers))

    def _remember(self, benign: Tensor) -> None:
        self.calibration_terms = self.terms(benign)

    @property
    def calibration_scores(self) -> Tensor | None:
        return None if self.calibration_terms is None else self.combine(self.calibration_terms)

    def save(self, folder: Path | str) -> Path:
        """Writes one folder: safetensors with both models, scale and calibration terms (and the victim, where it is one
        of samelib's architectures), and a JSON card.

        Raises:
            FileExistsError: the folder exists.
            ArtifactError: the place cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or choose another name")
        self._calibrated()
        tensors = {"scale": self.scale, "calibration_terms": torch.stack(self.calibration_terms)}
        modules = {"mae": self.mae, "auxiliary": self.auxiliary}
        if self.victim.architecture:
            modules["victim"] = self.victim.model
        for prefix, module in modules.items():
            tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        card = {"kind": "same-detector", "settings": asdict(self.settings), "seed": self.seed, "fpr": self.fpr}
        card |= {"image_shape": self.victim.image_shape, "classes": self.victim.classes}
        save_folder(folder, tensors, card | {"victim": self.victim.architecture})
        return folder

    @classmethod
    def load(cls, folder: Path | str, victim: Victim | None = None, device: str = "cpu") -> "SameDetector":
        """Reads a folder written by `save`; `victim` replaces the one saved along (and is needed where none was).

        Raises:
            ArtifactError: the folder is damaged, of another version, or no detector.
            ValueError: the victim does not match the detector, or is missing.
        """
        tensors, card = load_folder(Path(folder))
        if card.get("kind") != "same-detector":
            raise ArtifactError(f"{folder} holds a {card.get('kind')}, not a detector")
        shape, classes = tuple(card["image_shape"]), card["classes"]

        def part(prefix: str, module: nn.Module) -> nn.Module:
            state = {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
            module.load_state_dict(state)
            return module.to(device)

        if victim is None:
            if card["victim"] is None:
                raise ValueError(f"{folder} was saved without its victim; pass victim=Victim(...)")
            model = part("victim", build_classifier(card["victim"], shape, classes))
            victim = Victim.of(model, shape, classes, card["victim"])
        victim.require(shape, classes)
        detector = cls(settings_from_card(card["settings"]), card["seed"])
        detector.victim = victim
        detector.mae = part("mae", MaskedAutoencoder(shape, detector.settings.mae))
        detector.auxiliary = part("auxiliary", detector._build_auxiliary())
        detector._freeze()
        detector.scale, detector.fpr = tensors["scale"].to(device), card["fpr"]
        detector.calibration_terms = Terms(*tensors["calibration_terms"].to(device))
        return detector
