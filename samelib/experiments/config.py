"""The three tiers: every setting of an experiment, by tier and group, in one place."""

from dataclasses import dataclass, replace

from samelib.attacks.dfme import DFMESettings
from samelib.data.groups import SIZES, Group
from samelib.detectors.same import SameSettings
from samelib.models.mae import MAESettings
from samelib.training import TrainSettings

TIERS = tuple(SIZES)


@dataclass(frozen=True)
class Preset:
    """Settings of one experiment.

    Attributes:
        architecture: of victim, substitute and auxiliary model.
        victim_train, augment: the victim's training.
        same: the detector.
        substitute_train: the attacker's training.
        round_train: the substitute's training in each round of JBDA.
        dfme_train, dfme: DFME's substitute and generator.
        budgets: query budgets, small and large.
        dfme_budget: queries that train DFME's generator in earnest.
        widths: embedding sizes of the autoencoder that Figure 7 compares.
        curve_train, curve_images: the autoencoder's training, epoch by epoch, for Figure 6.
    """

    architecture: str
    victim_train: TrainSettings
    augment: bool
    same: SameSettings
    substitute_train: TrainSettings
    round_train: TrainSettings
    dfme_train: TrainSettings
    dfme: DFMESettings
    budgets: tuple[int, int]
    dfme_budget: int
    widths: tuple[int, ...]
    curve_train: TrainSettings
    curve_images: int


def preset(tier: str, group: Group) -> Preset:
    """The settings of `tier` for `group`.

    Below paper scale an epoch count would mean another amount of work for every data set, so trainings are set by how
    many images they see in all.

    Raises:
        ValueError: an unknown tier.
    """
    return preset_for(tier, group.image_shape[0] == 3, len(group.victim_train))


def preset_for(tier: str, colour: bool, images: int) -> Preset:
    """The settings of `tier` for grey or colour pictures and so many training images (errors: see `preset`)."""
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    return {"smoke": _smoke, "lecture": _lecture, "paper": _paper}[tier](colour, images)


# Truong et al.'s optimiser and batch; the one "epoch" is the whole budget, over which the rate falls to zero.
DFME_TRAIN = TrainSettings(1, 256, 0.1, "sgd", weight_decay=5e-4, warmup=0)
DFME = DFMESettings(epsilon=1.0)  # theirs, but a difference that survives the gateway's 8-bit rounding (chapter 7)


def _epochs(seen: float, images: int) -> int:
    return max(1, round(seen / images))


def _classifier(seen: float, images: int) -> TrainSettings:
    return TrainSettings(_epochs(seen, images), 64, 1e-3, warmup=0.1)


def _smoke(colour: bool, images: int) -> Preset:
    architecture = "resnet18-imagenet" if colour else "conv3"
    share = 0.3 if colour else 1.0  # a ResNet's step takes that much longer
    mae = MAESettings(patch=8 if colour else 7, width=48, depth=2, heads=3, decoder_depth=1, decoder_heads=3)
    substitute = TrainSettings(round(8 * share), 32, 1e-3, warmup=0.5)
    return Preset(
        architecture=architecture,
        victim_train=_classifier(6_000 * share, images),
        augment=False,
        same=SameSettings(
            mae, TrainSettings(4, 64, 2e-3), architecture, _classifier(3_000 * share, images), passes=2, views=1
        ),
        substitute_train=substitute,
        round_train=substitute,
        dfme_train=replace(DFME_TRAIN, batch=32),
        dfme=replace(DFME, width=8, generator_lr=1e-3),
        budgets=(250, 500),
        dfme_budget=4_000,
        widths=(24, 48),
        curve_train=TrainSettings(8, 64, 2e-3),
        curve_images=600,
    )


def _lecture(colour: bool, images: int) -> Preset:
    architecture = "resnet18-imagenet" if colour else "conv3"
    mae = MAESettings(patch=4, width=96, depth=4, heads=3, decoder_depth=2, decoder_heads=3)
    mae_train = TrainSettings(_epochs(240_000, images), 128, 3e-3, warmup=20_000 / images)
    auxiliary = _classifier(48_000, min(images, 12_000))
    substitute = TrainSettings(10, 32, 1e-3, warmup=0.5)
    return Preset(
        architecture=architecture,
        victim_train=_classifier(60_000, images),
        augment=colour,
        same=SameSettings(mae, mae_train, architecture, auxiliary, views=2, auxiliary_images=12_000),
        substitute_train=substitute,
        round_train=substitute,
        dfme_train=replace(DFME_TRAIN, batch=64),
        dfme=replace(DFME, width=16, generator_lr=1e-3),
        budgets=(1_000, 4_000),
        dfme_budget=200_000,
        widths=(24, 48, 96),
        curve_train=TrainSettings(12, 128, 3e-3, warmup=2),
        curve_images=12_000,
    )


def _paper(colour: bool, images: int) -> Preset:
    architecture = "resnet18" if colour else "conv3"
    victim = TrainSettings(20, 128, 0.1 if colour else 0.05, "sgd", weight_decay=5e-4, warmup=1)
    # Orekondy et al.'s, with a cosine in place of their steps.
    substitute = TrainSettings(100, 64, 0.01, "sgd", weight_decay=5e-4, momentum=0.5, warmup=1)
    mae_train = TrainSettings(500, 512, 2e-3, warmup=50)
    return Preset(
        architecture=architecture,
        victim_train=victim,
        augment=True,
        same=SameSettings(MAESettings(), mae_train, architecture, victim, views=8),
        substitute_train=substitute,
        round_train=replace(substitute, epochs=20),
        dfme_train=DFME_TRAIN,
        dfme=DFME,
        budgets=(6_000, 10_000) if colour else (1_000, 4_000),
        dfme_budget=2_000_000,
        widths=(48, 96, 192),
        curve_train=mae_train,
        curve_images=images,
    )
