"""A detector's power: how many it flags of queries that no honest user would send.

A reconstruction error can be blind to what is easy to reconstruct: a black image, or a faint one. Who fits a detector
should read that from its own table, and not hear it from a thief.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from samelib.data.image_set import received, to_uint8
from samelib.detectors.base import Detector, conformal_threshold
from samelib.training import seed_of

POWER_IMAGES = 50  # are enough to tell nine of ten from seven of ten, and make one batch
BOUND = 0.9
CONTRAST = 0.3
GRID = 4  # patches along a side to be shuffled


class WeakDetectorWarning(UserWarning):
    """A detector flags too few of the altered images; the message names them."""


def faint(x: Tensor) -> Tensor:
    """Contrast 0.3: each pixel 0.3 times as far from the mean of its image and channel."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + CONTRAST * (x - mean)


def blurred(x: Tensor) -> Tensor:
    """Three moving averages, nearly a Gaussian, over about a ninth of the shorter side, 3 pixels or more."""
    reach = max(1, min(x.shape[2:]) // 18)
    for _ in range(3):
        x = avg_pool2d(x, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    return x


def noise(x: Tensor) -> Tensor:
    """Every pixel drawn uniformly."""
    return torch.rand(x.shape, generator=_generator("noise")).to(x) * 2 - 1


def shuffled(x: Tensor) -> Tensor:
    """Four by four patches in another order, the same for all images; a rim that they leave stays where it is."""
    rows, columns = (min(GRID, side) for side in x.shape[2:])
    height, width = x.shape[2] // rows, x.shape[3] // columns
    inner = x[:, :, : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
    patches = inner.transpose(3, 4).flatten(2, 3)  # [N, C, patches, height, width]
    patches = patches[:, :, torch.randperm(rows * columns, generator=_generator("patches"))]
    x = x.clone()
    whole = patches.unflatten(2, (rows, columns)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    x[:, :, : rows * height, : columns * width] = whole
    return x


def _generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(0, f"power, {purpose}"))


VERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "black": lambda x: torch.full_like(x, -1),
    "white": torch.ones_like,
    "grey": torch.zeros_like,
    "noise": noise,
    "low contrast": faint,
    "blurred": blurred,
    "inverted": torch.neg,
    "shuffled patches": shuffled,
}
CONSTANT = ("black", "white", "grey")  # the same of every image


def altered(images: Tensor, name: str) -> Tensor:
    """One of `VERSIONS` of images [N, C, H, W] of any size, uint8 or float in [-1, 1]; always the same one.

    Returns:
        uint8 [N, C, H, W].

    Raises:
        ValueError: an unknown version, or images that no detector would take (see `check_queries`).
    """
    if name not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {name!r}")
    return to_uint8(VERSIONS[name](received(images, tuple(images.shape[1:]))))


def power(detector: Detector, benign: Tensor, fpr: float | None = None, bound: float = BOUND) -> dict[str, float]:
    """The share that a calibrated detector flags of each of `VERSIONS` of benign images [N, C, H, W].

    Args:
        fpr: share of benign queries to flag; by default the detector's own.
        bound: the share below which a version is worth a warning.

    Raises:
        NotFittedError: before `fit`.
        ValueError: see `altered` and `conformal_threshold`.
    Warns:
        WeakDetectorWarning: a version is flagged less often than `bound`.
    """
    fpr = detector.fpr if fpr is None else fpr
    threshold = conformal_threshold(detector._calibrated(), fpr)
    parts = [altered(benign[:1] if name in CONSTANT else benign, name) for name in VERSIONS]
    scores = detector.score(torch.cat(parts)).split([len(part) for part in parts])
    shares = {name: float((s > threshold).double().mean()) for name, s in zip(VERSIONS, scores, strict=True)}
    if weak := ", ".join(f"{name} ({share:.0%})" for name, share in shares.items() if share < bound):
        warnings.warn(
            f"at a false-positive rate of {fpr:.1%} this detector flags fewer than {bound:.0%} of: {weak}. Such queries "
            "pass it unseen; train it longer, or put another one beside it",
            WeakDetectorWarning,
            stacklevel=2,
        )
    return shares


def power_table(shares: dict[str, float], bound: float = BOUND) -> str:
    """What `power` returned as lines of text, one a version; those below `bound` are called weak."""
    return "\n".join(f"  {name:17} {share:6.1%}{'  weak' if share < bound else ''}" for name, share in shares.items())
