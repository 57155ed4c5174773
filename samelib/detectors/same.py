"""SAME: sample reconstruction against model extraction (paper, "Methodology").

A masked autoencoder reconstructs the query, an auxiliary model predicts on the reconstruction, and the anomaly score is
    S(x) = alpha * r(x) + (1 - alpha) * d(x)                                                     (paper, eq. 6)
with r the reconstruction error and d the deviation of the two predictions.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from samelib.data.image_set import ImageSet
from samelib.detectors.base import Detector, check_fpr
from samelib.detectors.power import POWER_IMAGES, power
from samelib.evidence import Likeness
from samelib.models.classifiers import SharedTrunk, Victim, build_classifier, predict
from samelib.models.mae import MaskedAutoencoder
from samelib.presets import SameSettings, check_alpha, preset
from samelib.store import ArtifactError, ArtifactStore, load_folder, save_folder
from samelib.training import Training, autocast, seed_of, train, train_mae

BATCH = 256


def reconstruction_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """r(x): the squared error of [N, C, H, W], averaged over the pixels of each image -> [N]."""
    return (x - reconstruction).square().flatten(1).mean(1)


def deviation(victim: Tensor, auxiliary: Tensor) -> Tensor:
    """d(x): the squared distance of two probability vectors, both [N, K] -> [N], between 0 and 2."""
    return (victim - auxiliary).square().sum(1)


def auxiliary_loss(victim: Tensor, logits: Tensor) -> Tensor:
    """Paper eq. 5: the mean squared distance between the victim's probabilities and the auxiliary model's own."""
    return deviation(victim, logits.softmax(1)).mean()


def anomaly_score(r: Tensor, d: Tensor, alpha: float) -> Tensor:
    """Paper eq. 6. alpha = 1 is SAME-X (reconstruction alone), alpha = 0 is SAME-Y (deviation alone)."""
    return alpha * r + (1 - alpha) * d


def pass_noise(tokens: int, passes: int, seed: int) -> Tensor:
    """[passes, tokens]: the masks of the scoring passes, the same for every image and every day."""
    return torch.rand(passes, tokens, generator=torch.Generator().manual_seed(seed_of(seed, "scoring masks", passes)))


class Terms(NamedTuple):
    """Both terms of the score of each query: any alpha can be tried on them without scoring again."""

    reconstruction: Tensor
    deviation: Tensor


class SameDetector(Detector):
    """Scores queries by how badly they are reconstructed and how far the prediction moves (paper eq. 6).

    It needs benign images and the victim's answers: no outliers, no history, no weights of the victim.

    Args:
        settings: see SameSettings; `SameDetector.preset` has ready-made ones.
        seed: of initial weights, training order and masks.

    Attributes:
        mae, auxiliary: the masked autoencoder and the auxiliary model; None before `fit`.
        victim: whose answers are compared with the auxiliary model's.
        cards: "mae" and "auxiliary": how each was trained (see `ArtifactStore.trained`).
    """

    kind = "same-detector"  # on the card of a saved one
    parts = ("reconstruction_error", "deviation")  # of a score, as `explain` names them
    loss_factor = 1.0  # of eq. 4
    auxiliary_target = "victim"  # what the auxiliary model learns: the victim's answers (eq. 5)

    def __init__(self, settings: SameSettings, seed: int = 0):
        self.settings, self.seed = settings, seed
        self.mae: MaskedAutoencoder | None = None
        self.auxiliary: nn.Module | None = None
        self.victim: Victim | None = None
        self.calibration_terms: Terms | None = None
        self.cards: dict[str, dict] = {}

    @classmethod
    def preset(cls, tier: str, image_shape: tuple[int, int, int], seed: int = 0) -> "SameDetector":
        """The detector of a tier (smoke, lecture or paper) for images (C, H, W); errors: see `samelib.preset`."""
        return cls(preset(tier, image_shape).same, seed)

    def fit(
        self,
        images: ImageSet,
        calibration: ImageSet,
        victim: Victim | nn.Module | Callable[[Tensor], Tensor],
        *,
        store: ArtifactStore | None = None,
        fpr: float = 0.05,
    ) -> "SameDetector":
        """Trains autoencoder and auxiliary model (or reads them from the store), scales, calibrates, measures its power.

        One half of the calibration set gives the scale of the two terms, the other the threshold and the p-values:
        conformal validity wants a score that was fixed before it saw the calibration images.

        Args:
            images: benign images to train on; their labels are not used.
            calibration: benign images that trained nothing, neither here nor the victim.
            victim: see `Victim.wrap`.
            fpr: share of benign queries to flag.

        Raises:
            ValueError: images that are not alike or not what the victim takes, or too few of them for the rate.
            ArtifactError: the store cannot be written.
        Warns:
            WeakDetectorWarning: it flags few of black, faint or otherwise altered images (see `samelib.detectors.power`).
        """
        self.check_calibration(len(calibration), fpr)
        half = len(calibration) // 2
        store = store or ArtifactStore()
        self._learn(images, calibration, victim, store)
        terms = self._terms_of(calibration[: 2 * half], store)
        self.scale = torch.stack([torch.stack([t[:half].mean(), t[:half].std().clamp_min(1e-12)]) for t in terms])
        self.calibration_terms = Terms(*(t[half:] for t in terms))
        return self._settle(calibration.images[half : 2 * half], fpr)

    @staticmethod
    def check_calibration(count: int, fpr: float) -> None:
        """Raises ValueError where so many calibration images are too few for the rate; half of them give the scale."""
        check_fpr(fpr, count // 2)

    def _learn(self, images: ImageSet, calibration: ImageSet, victim, store: ArtifactStore) -> None:
        """Both models, trained or from the store, once it is clear that everything fits together."""
        self._stand_before(victim, images, calibration)
        self.mae, self.cards["mae"] = self.fit_autoencoder(images, store)
        self.auxiliary, self.cards["auxiliary"] = self._fit_auxiliary(images, store)
        self._freeze()

    def _terms_of(self, images: ImageSet, store: ArtifactStore) -> Terms:
        """The terms of images that every detector with these models asks for: from the store where they are there."""
        s = self.settings
        spec = {"kind": "terms", "auxiliary": self.cards["auxiliary"]["sha256"], "data": images.fingerprint}
        spec |= {"mask_ratio": s.mask_ratio, "passes": s.passes, "seed": self.seed}

        def make(_) -> tuple[dict[str, Tensor], dict]:
            start = time.perf_counter()
            terms = self.terms(images.pixels())
            return terms._asdict(), {"seconds": time.perf_counter() - start}

        device = self.mae.mask_token.device
        return Terms(**{name: values.to(device) for name, values in store.get(spec, make)[0].items()})

    def _freeze(self) -> None:
        self.mae.eval().requires_grad_(False)
        self.auxiliary.eval().requires_grad_(False)

    def fit_autoencoder(self, images: ImageSet, store: ArtifactStore, on_epoch=None) -> tuple[nn.Module, dict]:
        """The trained autoencoder and its card, from the store where it is there; `on_epoch` watches (see `train`)."""
        s, seed = self.settings, seed_of(self.seed, "mae")
        spec = {"kind": "mae", "mae": asdict(s.mae), "train": asdict(s.mae_train), "loss_factor": self.loss_factor}
        spec |= {"data": images.fingerprint, "seed": self.seed}
        return store.trained(
            spec,
            lambda: MaskedAutoencoder(images.image_shape, s.mae, seed).to(images.device),
            lambda model, checkpoint: train_mae(
                model,
                images,
                s.mae_train,
                seed=seed,
                loss_factor=self.loss_factor,
                checkpoint=checkpoint,
                on_epoch=on_epoch,
            ),
        )

    @property
    def auxiliary_mask_ratio(self) -> float:
        """The auxiliary model is trained under the masking that will be scored."""
        return self.settings.mask_ratio

    def _fit_auxiliary(self, images: ImageSet, store: ArtifactStore) -> tuple[nn.Module, dict]:
        s = self.settings
        images = images[: s.auxiliary_images]
        identity = self.victim.fingerprint
        answers = None if identity else self.victim(images.pixels())
        if identity is None:  # a victim whose weights are not at hand is known by its answers
            identity = hashlib.sha256(answers.cpu().numpy().tobytes()).hexdigest()
        spec = {"kind": "auxiliary", "architecture": s.auxiliary, "train": asdict(s.auxiliary_train)}
        spec |= {"ratio": self.auxiliary_mask_ratio, "target": self.auxiliary_target, "views": s.views}
        spec |= {"shared": s.share_backbone, "mae": self.cards["mae"]["sha256"], "victim": identity}
        spec |= {"data": images.fingerprint, "seed": self.seed}
        return store.trained(
            spec,
            lambda: self._build_auxiliary().to(images.device),
            lambda model, checkpoint: self._train_auxiliary(model, images, answers, checkpoint),
        )

    def _build_auxiliary(self) -> nn.Module:
        seed = seed_of(self.seed, "auxiliary")
        if not self.settings.share_backbone:
            return build_classifier(self.settings.auxiliary, self.image_shape, self.victim.classes, seed)
        if self.victim.model is None:
            raise ValueError("share_backbone needs the victim's model; a black-box victim has no trunk to share")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SharedTrunk(self.victim.model)

    def _train_auxiliary(
        self, model: nn.Module, images: ImageSet, answers: Tensor | None, checkpoint: Path
    ) -> Training:
        """Eq. 5 on reconstructions under the masking that will be scored, each view under masks of its own."""
        start = time.perf_counter()
        answers = (self.victim(images.pixels()) if answers is None else answers).to(images.device)
        reconstructions = self._training_views(images)
        preparation = time.perf_counter() - start

        def loss(index: Tensor, generator: torch.Generator) -> Tensor:
            view = torch.randint(len(reconstructions), index.shape, generator=generator, device=index.device)
            logits = model(reconstructions[view, index].float()).float()
            return self._auxiliary_loss(logits, answers[index], images.labels[index])

        losses, seconds = train(
            model,
            loss,
            len(images),
            self.settings.auxiliary_train,
            seed=seed_of(self.seed, "auxiliary"),
            checkpoint=checkpoint,
            label="auxiliary model",
        )
        return Training(losses, seconds + preparation)

    def _training_views(self, images: ImageSet) -> Tensor:
        """Reconstructions of the images, float16 [views, N, C, H, W], each under random masks of its own."""
        ratio = self.auxiliary_mask_ratio
        generator = torch.Generator(images.device).manual_seed(seed_of(self.seed, "training views"))
        views = []
        for _ in range(1 if ratio == 0 else self.settings.views):
            noise = torch.rand(len(images), self.mae.tokens, generator=generator, device=images.device)
            parts = torch.arange(len(images), device=images.device).split(BATCH)
            views.append(torch.cat([self.reconstruct(images.pixels(i), noise[i], ratio) for i in parts]).half())
        return torch.stack(views)

    def _auxiliary_loss(self, logits: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        return auxiliary_loss(answers, logits)

    @torch.inference_mode()
    def reconstruct(self, x: Tensor, noise: Tensor, mask_ratio: float | None = None) -> Tensor:
        """x [N, C, H, W] and noise [N or 1, T] -> reconstruction [N, C, H, W]."""
        with autocast(x.device):
            return self.mae(x, noise.expand(len(x), -1), mask_ratio)[0]

    def terms(self, x: Tensor, answers: Tensor | None = None) -> Terms:
        """Reconstruction error [N] and deviation [N] of images [N, C, H, W]; arguments and errors as for `score`."""
        return self._terms(self._received(x), answers)

    def _terms(self, x: Tensor, answers: Tensor | None) -> Terms:
        """The terms of images that were checked and rounded."""
        noise = pass_noise(self.mae.tokens, self.settings.passes, self.seed).to(self.mae.mask_token.device)
        parts = [self._batch_terms(*batch, noise) for batch in self._batches(x, answers)]
        return Terms(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _batches(self, x: Tensor, answers: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and answers on the models' device; the victim is asked where there are no answers."""
        device = self.mae.mask_token.device
        answers = self.victim(x) if answers is None else answers
        for images, rows in zip(x.split(BATCH), answers.split(BATCH), strict=True):
            yield images.to(device), rows.to(device)

    def _batch_terms(self, x: Tensor, answers: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r = d = 0.0
        for rows in noise.split(max(1, BATCH // len(x))):  # few images: several passes at once, as one batch
            passes = len(rows)
            images = x.repeat(passes, 1, 1, 1)
            reconstruction = self.reconstruct(images, rows.repeat_interleave(len(x), 0), self.settings.mask_ratio)
            predictions = self._predict_auxiliary(reconstruction)
            r = r + reconstruction_error(images, reconstruction).view(passes, -1).sum(0)
            d = d + self._distance(answers.repeat(passes, 1), predictions).view(passes, -1).sum(0)
        return r / len(noise), d / len(noise)

    def _distance(self, victim: Tensor, auxiliary: Tensor) -> Tensor:
        return deviation(victim, auxiliary)

    @torch.inference_mode()
    def _predict_auxiliary(self, reconstruction: Tensor) -> Tensor:
        with autocast(reconstruction.device):  # as it was trained
            return predict(self.auxiliary, reconstruction)

    def combine(self, terms: Terms, alpha: float | None = None) -> Tensor:
        """Anomaly scores [N] from both terms, in the detector's scale (eq. 6)."""
        alpha = self.settings.alpha if alpha is None else alpha
        check_alpha(alpha)
        if self.settings.scale == "standardised":
            terms = Terms(*((t - mean) / std for t, (mean, std) in zip(terms, self.scale, strict=True)))
        return anomaly_score(*terms, alpha)

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        return self.combine(self._terms(x, answers))

    def _settle(self, benign: Tensor, fpr: float) -> "SameDetector":
        super()._settle(benign, fpr)
        self.power = power(self, benign[:POWER_IMAGES])
        return self

    def explain(self, x: Tensor) -> dict[str, Tensor]:
        """The scores [N] of images, and their `parts` [N]: reconstruction error and deviation."""
        terms = self.terms(x)
        return {"score": self.combine(terms)} | dict(zip(self.parts, terms, strict=True))

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
        tensors, card = self._fitted_state()
        if self.likeness is not None:
            tensors["likeness"] = torch.from_numpy(self.likeness.calibration)
        modules = {"mae": self.mae, "auxiliary": self.auxiliary}
        if self.victim.architecture:
            modules["victim"] = self.victim.model
        for prefix, module in modules.items():
            tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        card |= {"kind": self.kind, "settings": asdict(self.settings), "seed": self.seed, "fpr": self.fpr}
        card |= {"image_shape": self.victim.image_shape, "classes": self.victim.classes, "power": self.power}
        save_folder(folder, tensors, card | {"victim": self.victim.architecture})
        return folder

    def _fitted_state(self) -> tuple[dict[str, Tensor], dict]:
        """What the calibration images decided: tensors, and entries of the card."""
        return {"scale": self.scale, "calibration_terms": torch.stack(self.calibration_terms)}, {}

    def _restore(self, tensors: dict[str, Tensor], card: dict) -> None:
        """The inverse of `_fitted_state`."""
        self.scale, self.calibration_terms = tensors["scale"], Terms(*tensors["calibration_terms"])

    @classmethod
    def _from_card(cls, card: dict) -> "SameDetector":
        return cls(SameSettings.from_card(card["settings"]), card["seed"])

    @classmethod
    def load(cls, folder: Path | str, victim: Victim | None = None, device: str = "cpu") -> "SameDetector":
        """Reads a folder written by `save`; `victim` replaces the one saved along (and is needed where none was).

        Raises:
            ArtifactError: the folder is damaged, of another version, or no detector.
            ValueError: the victim does not match the detector, or is missing.
        """
        tensors, card = load_folder(Path(folder))
        if card.get("kind") != cls.kind:
            raise ArtifactError(f"{folder} holds a {card.get('kind')}, not a {cls.kind}")
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
        detector = cls._from_card(card)
        detector.victim, detector.image_shape = victim, shape
        detector.mae = part("mae", MaskedAutoencoder(shape, detector.settings.mae))
        detector.auxiliary = part("auxiliary", detector._build_auxiliary())
        detector._freeze()
        detector.fpr, detector.power = card["fpr"], card.get("power")
        detector.likeness = Likeness(tensors["likeness"].numpy()) if "likeness" in tensors else None
        detector._restore({name: value.to(device) for name, value in tensors.items()}, card)
        return detector
