"""Images as everything in samelib sees them: uint8 sets, floats in [-1, 1], and the checks at the door."""

import hashlib
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

LEVELS = 127.5  # half of 255: pixel 0 -> -1, pixel 255 -> +1


_WARNED: dict = {}  # one registry for all callers, so that Python's default filter says a thing once


class OutOfRangeWarning(UserWarning):
    """Pixels outside [-1, 1] were clamped, as an image API that receives 8-bit files would have done; or all of them lie
    in [0, 1], as if they had been scaled for another library."""


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] in 0..255 -> float32 [N, C, H, W] in [-1, 1]."""
    return images.float() / LEVELS - 1


def to_uint8(x: Tensor) -> Tensor:
    """float [N, C, H, W] -> uint8 [N, C, H, W]: clamp to [-1, 1], round to the nearest of 256 levels."""
    return ((x.clamp(-1, 1) + 1) * LEVELS).round().to(torch.uint8)


def quantise(x: Tensor) -> Tensor:
    """What an image API receives of `x`: float [N, C, H, W] clamped to [-1, 1] and rounded to the 8-bit grid."""
    return to_float(to_uint8(x))


def check_queries(x: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Returns `x` as float32 [N, C, H, W], or says what is wrong with it.

    Raises:
        TypeError: not a tensor (or array) of numbers.
        ValueError: wrong shape, empty, NaN or infinite.
    Warns:
        OutOfRangeWarning: pixels outside [-1, 1]; the caller clamps them (`quantise`). Or floats that all lie in [0, 1].
    """
    x = torch.as_tensor(x)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"images must be uint8 in 0..255 or float in [-1, 1], got {x.dtype}; convert with to_float")
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        raise ValueError(f"images must have shape [N, {', '.join(map(str, image_shape))}], got {list(x.shape)}")
    if len(x) == 0:
        raise ValueError("the batch is empty: send at least one image")
    if x.dtype == torch.uint8:
        return to_float(x)
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise ValueError(f"{bad} of {len(x)} images hold NaN or infinite pixels; repair or drop them before the query")
    if x.abs().max() > 1:
        _warn_once("pixels outside [-1, 1] are clamped, as an 8-bit image API does")
    elif x.min() >= 0 and x.max() > x.min():
        _warn_once("all pixels lie in [0, 1], but -1 is black here and 1 is white: scale images in [0, 1] by 2 * x - 1")
    return x.float()


def received(x: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Checked queries as the service receives them: float32 [N, C, H, W] on the 8-bit grid (errors: `check_queries`)."""
    return quantise(check_queries(x, image_shape))


def _warn_once(words: str) -> None:
    warnings.warn_explicit(words, OutOfRangeWarning, __file__, 1, registry=_WARNED)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled set of images, whole in memory (on the CPU or a GPU).

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in 0..len(classes)-1.
        classes: the class names.
        name: where the images come from; shown in figures and written into provenance.

    Raises:
        TypeError, ValueError: wrong dtype, shape or length, or a label out of range.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self):
        if self.images.dtype != torch.uint8:
            raise TypeError(
                f"{self.name}: images must be uint8 in 0..255, got {self.images.dtype}; "
                "to_uint8(x) makes them of floats in [-1, 1], to_uint8(2 * x - 1) of floats in [0, 1]"
            )
        if self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise ValueError(f"{self.name}: images must be [N, 1 or 3, H, W], got {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"{self.name}: labels must be int64 [{len(self.images)}], "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(
                f"{self.name}: labels run from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"but there are {len(self.classes)} classes (0..{len(self.classes) - 1})"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> "ImageSet":
        return replace(self, images=self.images[index], labels=self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: str | torch.device) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def pixels(self, index=slice(None)) -> Tensor:
        """float32 [n, C, H, W] in [-1, 1] of the images at `index` (all by default)."""
        return to_float(self.images[index])

    def shuffled(self, seed: int) -> "ImageSet":
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order.to(self.device)]

    def split(self, *sizes: int) -> list["ImageSet"]:
        """Disjoint consecutive parts of the given sizes; what is left over is dropped.

        Raises:
            ValueError: fewer images than asked for.
        """
        if sum(sizes) > len(self):
            raise ValueError(f"{self.name} has {len(self):,} images, {sum(sizes):,} were asked for")
        parts = torch.arange(sum(sizes), device=self.device).split(list(sizes))
        return [self[part] for part in parts]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, pixels and labels, the identity of the data in caches and results."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().contiguous().numpy())
        return digest.hexdigest()
