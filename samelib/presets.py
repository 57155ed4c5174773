"""The three tiers: every setting of victims, detectors and attacks in one place, and the victim that they train."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from torch import nn

from samelib.data.groups import SIZES, Group
from samelib.data.image_set import ImageSet
from samelib.metrics import accuracy, fidelity
from samelib.models.classifiers import SMALLEST_SIDE, Victim, build_classifier, predict
from samelib.models.mae import MAESettings, check_mask_ratio
from samelib.store import ArtifactStore
from samelib.training import TrainSettings, seed_of, train_classifier

TIERS = tuple(SIZES)


@dataclass(frozen=True)
class SameSettings:
    """Everything that decides a SAME detector, given the data and the victim.

    Attributes:
        mae, mae_train: the autoencoder and its training.
        auxiliary, auxiliary_train: the auxiliary model's architecture (the victim's) and its training.
        mask_ratio, passes: how queries are scored: 0 and 1 as the authors' code does, or 0.75 and several random
            masks averaged.
        alpha: weight of the reconstruction error.
        scale: "raw" (paper) or "standardised": each term minus its benign mean, over its benign deviation.
        share_backbone: the auxiliary model uses the victim's frozen trunk.
        views: reconstructions of each training image, each under another mask, that the auxiliary model learns from.
        auxiliary_images: at most so many images train the auxiliary model.

    Raises:
        ValueError: a value outside its range.
    """

    mae: MAESettings
    mae_train: TrainSettings
    auxiliary: str
    auxiliary_train: TrainSettings
    mask_ratio: float = 0.75
    passes: int = 8
    alpha: float = 0.5
    scale: str = "standardised"
    share_backbone: bool = False
    views: int = 2
    auxiliary_images: int = 60_000

    def __post_init__(self):
        check_mask_ratio(self.mask_ratio)
        check_alpha(self.alpha)
        if self.scale not in ("raw", "standardised"):
            raise ValueError(f"scale must be raw or standardised, got {self.scale!r}")
        if self.passes < 1 or self.views < 1:
            raise ValueError(f"passes and views must be at least 1, got {self.passes} and {self.views}")
        if self.mask_ratio == 0 and self.passes > 1:
            raise ValueError("with mask_ratio 0 nothing is random: use passes=1")

    @classmethod
    def from_card(cls, card: dict) -> "SameSettings":
        """The settings that `asdict` wrote into a card."""
        nested = {"mae": MAESettings, "mae_train": TrainSettings, "auxiliary_train": TrainSettings}
        return cls(**{name: nested[name](**v) if name in nested else v for name, v in card.items()})


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")


@dataclass(frozen=True)
class Preset:
    """Settings of one experiment.

    Attributes:
        architecture: of victim, substitute and auxiliary model.
        victim_train, augment: the victim's training.
        same: the detector.
        substitute_train: the attacker's training.
        round_train: the substitute's training in each round of JBDA.
        dfme_train, dfme: training of DFME's substitute, and the attack's own options.
        budgets: query budgets, small and large.
        dfme_budget: queries that train DFME's generator in earnest.
    """

    architecture: str
    victim_train: TrainSettings
    augment: bool
    same: SameSettings
    substitute_train: TrainSettings
    round_train: TrainSettings
    dfme_train: TrainSettings
    dfme: dict
    budgets: tuple[int, int]
    dfme_budget: int


def preset(tier: str, image_shape: tuple[int, int, int]) -> Preset:
    """The settings of a tier (smoke, lecture or paper) for images (C, H, W).

    Below paper scale an epoch count would mean another amount of work for every data set, so trainings are set by how
    many images they see in all.

    Raises:
        ValueError: an unknown tier, or images of a size that its models cannot take.
    """
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    return {"smoke": _smoke, "lecture": _lecture, "paper": _paper}[tier](tuple(image_shape))


def fitting_patch(image_shape: tuple[int, int, int], patches: int) -> int:
    """The side of the square patches that cut an image (C, H, W) into about `patches` x `patches`.

    Raises:
        ValueError: the image is too small, or no patch of 2 pixels or more divides both of its sides.
    """
    _, height, width = image_shape
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"images of {height} x {width} pixels are too small, each side needs {SMALLEST_SIDE} or more; enlarge them"
        )
    sides = [p for p in range(2, min(height, width) // 2 + 1) if height % p == 0 and width % p == 0]
    # Few patches make a coarse autoencoder, many a slow one: the number grows with the square of the side.
    sides = [p for p in sides if patches**2 / 4 <= height * width / p**2 <= 4 * patches**2]
    if not sides:
        patch = max(2, round(math.sqrt(height * width) / patches))
        fewest = max(2, math.ceil(SMALLEST_SIDE / patch))
        near = " x ".join(str(patch * max(fewest, round(side / patch))) for side in (height, width))
        raise ValueError(
            f"images of {height} x {width} pixels cannot be cut into about {patches} x {patches} square patches; "
            f"resize or crop them to sides with a common divisor, such as {near}"
        )
    return min(sides, key=lambda p: abs(math.log(height * width / (p * patches) ** 2)))


# Truong et al.'s optimiser and batch; the one "epoch" is the whole budget, over which the rate falls to zero.
DFME_TRAIN = TrainSettings(1, 256, 0.1, "sgd", weight_decay=5e-4, warmup=0)
# Theirs too, but for a difference that survives 8-bit rounding (chapter 7).
DFME_OPTIONS = {"epsilon": 1.0, "width": 64, "generator_lr": 1e-4}


def _classifier(seen: float) -> TrainSettings:
    return TrainSettings(seen=round(seen), batch=64, lr=1e-3, warmup=0.05)


def _smoke(image_shape: tuple[int, int, int]) -> Preset:
    architecture = "resnet10" if image_shape[0] == 3 else "conv3"
    mae = MAESettings(fitting_patch(image_shape, 4), 48, depth=2, heads=3, decoder_depth=1, decoder_heads=3)
    mae_train = TrainSettings(4, 64, 2e-3, warmup=0.25)
    substitute = TrainSettings(5, 32, 1e-3, warmup=0.05)
    return Preset(
        architecture=architecture,
        victim_train=_classifier(5_000),
        augment=False,
        same=SameSettings(mae, mae_train, architecture, _classifier(1_800), passes=2, views=1),
        substitute_train=substitute,
        round_train=substitute,
        dfme_train=replace(DFME_TRAIN, batch=32),
        dfme=DFME_OPTIONS | {"width": 8, "generator_lr": 1e-3},
        budgets=(250, 500),
        dfme_budget=4_000,
    )


def _lecture(image_shape: tuple[int, int, int]) -> Preset:
    colour = image_shape[0] == 3
    architecture = "resnet10" if colour else "conv3"
    # Photographs ask for more than digits: a classifier of 80 %, and an autoencoder whose pictures can be recognised.
    victim = TrainSettings(seen=250_000, batch=128, lr=5e-3) if colour else _classifier(60_000)
    mae = MAESettings(fitting_patch(image_shape, 7), 96, depth=4, heads=3, decoder_depth=2, decoder_heads=3)
    mae_train = TrainSettings(seen=480_000 if colour else 240_000, batch=128, lr=3e-3, warmup=0.08)
    auxiliary = _classifier(192_000 if colour else 48_000)
    substitute = TrainSettings(10, 32, 1e-3, warmup=0.05)
    return Preset(
        architecture=architecture,
        victim_train=victim,
        augment=colour,
        same=SameSettings(
            mae, mae_train, architecture, auxiliary, views=2, auxiliary_images=24_000 if colour else 12_000
        ),
        substitute_train=substitute,
        round_train=substitute,
        dfme_train=replace(DFME_TRAIN, batch=64),
        dfme=DFME_OPTIONS | {"width": 16, "generator_lr": 1e-3},
        budgets=(1_000, 4_000),
        dfme_budget=200_000,
    )


def _paper(image_shape: tuple[int, int, int]) -> Preset:
    colour = image_shape[0] == 3
    architecture = "resnet18" if colour else "conv3"
    victim = TrainSettings(20, 128, 0.1 if colour else 0.05, "sgd", weight_decay=5e-4, warmup=0.05)
    # Orekondy et al.'s, with a cosine in place of their steps.
    substitute = TrainSettings(100, 64, 0.01, "sgd", weight_decay=5e-4, momentum=0.5, warmup=0.01)
    mae = MAESettings(patch=fitting_patch(image_shape, 14))
    return Preset(
        architecture=architecture,
        victim_train=victim,
        augment=True,
        same=SameSettings(mae, TrainSettings(500, 512, 2e-3, warmup=0.1), architecture, victim, views=8),
        substitute_train=substitute,
        round_train=replace(substitute, epochs=20),
        dfme_train=DFME_TRAIN,
        dfme=DFME_OPTIONS,
        budgets=(6_000, 10_000) if colour else (1_000, 4_000),
        dfme_budget=2_000_000,
    )


def scoring_variants(same: SameSettings) -> dict[str, SameSettings]:
    """The scoring that the book compares: as the authors' code does, and averaged over masked passes."""
    return {
        "mask 0": replace(same, mask_ratio=0.0, passes=1),
        f"{same.passes} passes": replace(same, mask_ratio=same.mae.mask_ratio),
    }


def train_victim(
    group: Group, settings: Preset | None = None, seed: int = 0, store: ArtifactStore | None = None
) -> Victim:
    """The group's victim: trained on labels once (or read from the store), then frozen behind the black box.

    Args:
        settings: by default those of the group's own tier.

    Raises:
        ValueError: images of one class only, or of a size that the tier's models cannot take.
        ArtifactError: the store cannot be written.
    """
    return victim_and_card(group, settings, seed, store)[0]


def victim_and_card(
    group: Group, settings: Preset | None = None, seed: int = 0, store: ArtifactStore | None = None
) -> tuple[Victim, dict]:
    """The victim of `train_victim`, and the card of its training."""
    images, shape = group.victim_train, group.image_shape
    settings = settings or preset(group.tier, shape)
    if group.classes < 2:
        raise ValueError(
            f"{images.name} has no labels, or those of one class only, and a victim needs two classes: add the array "
            "`labels` to an .npz, or a folder for each class; or bring your own victim (SameDetector.fit needs no labels)"
        )
    spec = {"kind": "victim", "architecture": settings.architecture, "train": asdict(settings.victim_train)}
    spec |= {"augment": settings.augment, "data": images.fingerprint, "seed": seed}
    model, card = (store or ArtifactStore()).trained(
        spec,
        lambda: build_classifier(settings.architecture, shape, group.classes, seed_of(seed, "victim")).to(
            images.device
        ),
        lambda model, checkpoint: train_classifier(
            model,
            images.images,
            images.labels,
            settings.victim_train,
            augment=settings.augment,
            label="victim",
            seed=seed_of(seed, "victim"),
            checkpoint=checkpoint,
        ),
    )
    return Victim.of(model, shape, group.classes, settings.architecture), card


def evaluation(victim: Victim, test: ImageSet) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures a substitute on the victim's test set: accuracy, and fidelity to the victim."""
    answers, labels = victim(test.pixels()).cpu(), test.labels.cpu()

    def evaluate(substitute: nn.Module) -> dict[str, float]:
        predictions = predict(substitute, test.pixels()).cpu()  # wherever the attacker computes
        return {"accuracy": accuracy(predictions, labels), "fidelity": fidelity(predictions, answers)}

    return evaluate
