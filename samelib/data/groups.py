"""Groups: the six disjoint image sets that one experiment needs, by name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from samelib.data import real, synthetic
from samelib.data.image_set import ImageSet

SPLIT_SEED = 20231218  # fixed: an experiment's seed decides training and sampling, never who is in which split


@dataclass(frozen=True, eq=False)
class Group:
    """Who holds which images (paper, "Datasets and Model Architectures").

    Attributes:
        name: e.g. "mnist".
        victim_train: trains the victim, the autoencoder and the auxiliary model.
        calibration: benign images that set the detector's scale and threshold; never trained on.
        benign_test: benign queries; also the victim's test set.
        seeds: in-distribution images that the JBDA attacker was given.
        proxy: the Knockoff attacker's images (the paper's D_A).
        outliers: the outlier set of the baselines (the paper's D_OE).
        tier: the scale it was loaded at.
    """

    name: str
    victim_train: ImageSet
    calibration: ImageSet
    benign_test: ImageSet
    seeds: ImageSet
    proxy: ImageSet
    outliers: ImageSet
    tier: str = "lecture"

    def sets(self) -> dict[str, ImageSet]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "tier")}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.victim_train.image_shape

    @property
    def classes(self) -> int:
        return len(self.victim_train.classes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all six sets."""
        return hashlib.sha256("".join(s.fingerprint for s in self.sets().values()).encode()).hexdigest()

    def to(self, device: str | torch.device) -> "Group":
        return replace(self, **{name: images.to(device) for name, images in self.sets().items()})


@dataclass(frozen=True)
class Sizes:
    """How many images each set of a group holds at most (it holds fewer where the source has fewer)."""

    victim_train: int
    calibration: int
    benign_test: int
    proxy: int
    outliers: int
    seeds: int = 200  # the paper's

    def scaled_to(self, held_out: int) -> "Sizes":
        """The same shares of a held-out set that is too small for the full sizes."""
        share = min(1.0, held_out / (self.calibration + self.benign_test + self.seeds))
        names = ("calibration", "benign_test", "seeds")
        return replace(self, **{n: int(getattr(self, n) * share) for n in names})


# "mnist" at paper scale is the whole of MNIST: 60,000 for the victim, 10,000 held out.
SIZES = {
    "smoke": Sizes(victim_train=1_200, calibration=300, benign_test=400, proxy=1_000, outliers=300),
    "lecture": Sizes(victim_train=60_000, calibration=2_000, benign_test=4_000, proxy=10_000, outliers=10_000),
    "paper": Sizes(victim_train=60_000, calibration=3_000, benign_test=6_800, proxy=60_000, outliers=60_000),
}
EMBEDDED_SIZES = replace(SIZES["lecture"], victim_train=12_000, proxy=6_000, outliers=3_000)


class Source(NamedTuple):
    """Where the sets of a named group come from; only what is needed is loaded."""

    victim: Callable[[Sizes], tuple[ImageSet, ImageSet]]  # training, held out
    proxy: Callable[[Sizes], ImageSet]
    outliers: Callable[[Sizes], ImageSet]


def _embedded(draw: Callable[..., ImageSet], proxy: str = "proxy") -> Source:
    def victim(sizes: Sizes) -> tuple[ImageSet, ImageSet]:
        held_out = sizes.calibration + sizes.benign_test + sizes.seeds
        return tuple(draw("victim", sizes.victim_train + held_out).split(sizes.victim_train, held_out))

    return Source(victim, lambda s: draw(proxy, s.proxy), lambda s: draw("outliers", s.outliers))


def _both(load: Callable[[bool], ImageSet]) -> Callable[[Sizes], tuple[ImageSet, ImageSet]]:
    return lambda _: (load(True), load(False))


SOURCES = {
    "glyphs": _embedded(synthetic.glyphs),
    "glyphs-matched": _embedded(synthetic.glyphs, proxy="matched"),
    "shapes": _embedded(synthetic.shapes),
    "mnist": Source(_both(real.mnist), lambda _: real.emnist_digits(True), lambda _: real.kmnist(True)),
    "cifar10": Source(_both(real.cifar10), lambda _: real.cifar100(), lambda _: real.tiny_imagenet()),
}

EMBEDDED = ("glyphs", "glyphs-matched", "shapes")
COLOUR = ("shapes", "cifar10")  # the others are grey


def sizes_of(name: str, tier: str) -> Sizes:
    """How many images the sets of a group hold at most at that tier."""
    return EMBEDDED_SIZES if name in EMBEDDED and tier != "smoke" else SIZES[tier]


def load_group(
    name: str,
    tier: str = "lecture",
    *,
    proxy: str | None = None,
    outliers: str | None = None,
    device: str | torch.device = "cpu",
) -> Group:
    """Loads a group and cuts its disjoint splits, the same ones every time.

    Args:
        name: glyphs, glyphs-matched, shapes, mnist, cifar10, or path:FOLDER / path:FILE.npz for a victim set of one's
            own, whose proxy and outlier sets are empty unless they are given too.
        tier: smoke, lecture or paper: how many images.
        proxy, outliers: path:... of sets to use instead of the group's own.

    Raises:
        ValueError: an unknown name or tier.
        DataError: a file is missing or damaged.
    """
    if tier not in SIZES:
        raise ValueError(f"tier must be one of {', '.join(SIZES)}, got {tier!r}")
    sizes = sizes_of(name, tier)
    if name in SOURCES:
        source = SOURCES[name]
    elif name.startswith("path:"):
        source = _own_source(name)
    else:
        raise ValueError(f"unknown group {name!r}; known: {', '.join(SOURCES)}, path:FOLDER, path:FILE.npz")
    train, held_out = source.victim(sizes)
    proxy_set = _own(proxy, train.image_shape) if proxy else source.proxy(sizes)
    outlier_set = _own(outliers, train.image_shape) if outliers else source.outliers(sizes)
    return replace(_cut(name, train, held_out, proxy_set, outlier_set, sizes), tier=tier).to(device)


def _own_source(name: str) -> Source:
    """A victim set of one's own, a fifth of it held out; SAME needs neither proxy nor outliers, so these are empty."""
    everything = real.from_path(name[5:]).shuffled(SPLIT_SEED)
    fifth = len(everything) // 5
    parts = tuple(everything.split(len(everything) - fifth, fifth))
    return Source(lambda _: parts, lambda _: everything[:0], lambda _: everything[:0])


def _own(path: str, image_shape: tuple[int, int, int]) -> ImageSet:
    if not path.startswith("path:"):
        raise ValueError(f"proxy and outlier sets are given as path:FOLDER or path:FILE.npz, got {path!r}")
    return real.from_path(path[5:], image_shape)


def _cut(name: str, train: ImageSet, held_out: ImageSet, proxy: ImageSet, outliers: ImageSet, sizes: Sizes) -> Group:
    sizes = sizes.scaled_to(len(held_out))
    calibration, benign, seeds = held_out.shuffled(SPLIT_SEED).split(sizes.calibration, sizes.benign_test, sizes.seeds)
    if min(len(calibration), len(benign), len(seeds)) == 0:
        raise real.DataError(f"{name}: {len(held_out)} held-out images are too few for calibration, test and seeds")

    def head(images: ImageSet, count: int) -> ImageSet:
        return images.shuffled(SPLIT_SEED)[:count]

    return Group(
        name=name,
        victim_train=head(train, sizes.victim_train),
        calibration=calibration,
        benign_test=benign,
        seeds=seeds,
        proxy=head(proxy, sizes.proxy),
        outliers=head(outliers, sizes.outliers),
    )
