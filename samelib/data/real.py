"""Real image sets: the paper's, through torchvision, and any folder or .npz file of one's own.

`SAMELIB_DATA` names a local data root in torchvision's layout. Where it is set nothing is downloaded: a set that is
missing there is an error, never another set in its place.
"""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from samelib.data.image_set import ImageSet

MAX_CLASSES = 100_000  # a larger label is a mistake, not a class
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")


# CIFAR-100's own hierarchy (Krizhevsky 2009): twenty superclasses of five classes.
CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
""".strip().splitlines()


class DataError(RuntimeError):
    """A data set is missing, damaged or of the wrong shape; the message names the file and the remedy."""


def data_root() -> tuple[Path, bool]:
    """(root folder, whether samelib may download into it)."""
    local = os.environ.get("SAMELIB_DATA")
    if local:
        return Path(local), False
    return Path.home() / ".cache" / "samelib" / "data", True


def _torchvision(name: str, **options) -> ImageSet:
    root, download = data_root()
    title, folder = f"{name} {'train' if options['train'] else 'test'}", root / _folder(name)
    try:
        source = getattr(datasets, name)(str(root), download=download, **options)
        pixels = torch.as_tensor(np.asarray(source.data))
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        if name == "EMNIST":
            images = images.transpose(-1, -2)  # the files hold every digit mirrored along its diagonal
        classes = tuple(source.classes) if name.startswith("CIFAR") else tuple(map(str, range(10)))
        labels = torch.as_tensor(source.targets, dtype=torch.int64)
        image_set = ImageSet(images.contiguous(), labels, classes, title)
        expected = (3, 32, 32) if name.startswith("CIFAR") else (1, 28, 28)
        if image_set.image_shape != expected:
            raise ValueError(f"images are {image_set.image_shape}, they should be {expected}")
        return image_set
    except Exception as error:  # torchvision raises everything from RuntimeError to struct.error on a damaged file
        remedy = (
            "delete that folder and run again to download it afresh, or set SAMELIB_DATA to a local data root"
            if download
            else "complete the data root that SAMELIB_DATA names (torchvision's layout), or unset it to download"
        )
        raise DataError(f"cannot read {title} below {folder}: {error}; {remedy}") from error


def _folder(name: str) -> str:
    return {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}.get(name, f"{name}/raw")


def mnist(train: bool) -> ImageSet:
    """MNIST, 60,000 training or 10,000 test digits [N, 1, 28, 28]."""
    return _torchvision("MNIST", train=train)


def emnist_digits(train: bool) -> ImageSet:
    """EMNIST digits, upright as MNIST is (the raw files are transposed)."""
    return _torchvision("EMNIST", split="digits", train=train)


def kmnist(train: bool) -> ImageSet:
    """Kuzushiji-MNIST: ten cursive Japanese characters."""
    return _torchvision("KMNIST", train=train)


def cifar10(train: bool) -> ImageSet:
    """CIFAR-10 [N, 3, 32, 32]."""
    return _torchvision("CIFAR10", train=train)


def cifar100() -> ImageSet:
    """CIFAR-100's training images, or their first 10,000 where the data root holds cifar100-first10k.npz instead."""
    root, _ = data_root()
    subset = root / "cifar100-first10k.npz"
    if subset.exists() and not (root / "cifar-100-python").exists():
        return from_npz(subset, "CIFAR100 train, first 10,000")
    return _torchvision("CIFAR100", train=True)


def cifar100_superclasses() -> list[int]:
    """For each of CIFAR-100's 100 classes, which are numbered by name, its superclass 0..19."""
    parent = {name: number for number, line in enumerate(CIFAR100_SUPERCLASSES) for name in line.split()}
    return [parent[name] for name in sorted(parent)]


def tiny_imagenet() -> ImageSet:
    """Tiny ImageNet's training images at 32 x 32 [N, 3, 32, 32]: an .npz in the data root, or the official archive."""
    root, download = data_root()
    for subset in (root / "tiny-imagenet-32-10k.npz", root / "tiny-imagenet-32.npz"):
        if subset.exists():
            return from_npz(subset, "Tiny ImageNet at 32 x 32")
    folder = root / "tiny-imagenet-200" / "train"
    if not folder.exists():
        if not download:
            raise DataError(
                f"neither {root / 'tiny-imagenet-32-10k.npz'} nor {folder} exists; put one of them there, "
                "pass outliers=path:FOLDER, or unset SAMELIB_DATA to download"
            )
        try:
            download_and_extract_archive(TINY_IMAGENET[0], str(root), md5=TINY_IMAGENET[1])
        except Exception as error:
            raise DataError(f"cannot download {TINY_IMAGENET[0]} to {root}: {error}; pass outliers=path:...") from error
    return from_folder(folder, (3, 32, 32), "Tiny ImageNet at 32 x 32")


def from_path(path: str | Path, image_shape: tuple[int, int, int] | None = None) -> ImageSet:
    """A folder of images or an .npz file; images of a folder are resized to `image_shape` where it is given.

    Raises:
        DataError: the path does not exist, is of another kind, or does not hold what it should.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return from_folder(path, image_shape, path.name)
    if path.suffix == ".npz":
        images = from_npz(path, path.stem)
        if image_shape and images.image_shape != tuple(image_shape):
            raise DataError(f"{path}: images are {images.image_shape}, this group needs {tuple(image_shape)}")
        return images
    raise DataError(f"{path}: give a folder of images ({', '.join(sorted(IMAGE_SUFFIXES))}) or an .npz file")


def from_npz(path: Path, name: str) -> ImageSet:
    """`images` uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], `labels` integers [N] (optional: then all 0)."""
    shape = "images must be uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error}); write it again with numpy.savez") from error
    if "images" not in arrays:
        raise DataError(f"{path} has no array `images` (it holds {sorted(arrays)}); {shape}")
    images = arrays["images"]
    labels = arrays.get("labels", np.zeros(len(images), np.int64))
    if np.issubdtype(images.dtype, np.floating):
        shape += "; of floats in [0, 1] make them with (255 * images).round().astype('uint8')"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise DataError(f"{path}: {shape}, got {images.dtype} {list(images.shape)}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if labels.size and np.issubdtype(labels.dtype, np.integer) and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise DataError(f"{path}: labels run from {labels.min()} to {labels.max()}; they must be 0 to K - 1")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise DataError(
            f"{path}: labels must be integers >= 0 [{len(images)}], got {labels.dtype} {list(labels.shape)}"
        )
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    try:
        return ImageSet(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long(), classes, name)
    except ValueError as error:
        raise DataError(f"{path}: {error}; {shape}") from error


def list_images(folder: Path) -> list[Path]:
    """The image files below a folder, in order; DataError where there are none."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def from_folder(folder: Path, image_shape: tuple[int, int, int] | None, name: str) -> ImageSet:
    """All images below `folder`; the first folder level names the classes, where there is one."""
    files = list_images(folder)
    owners = [f.relative_to(folder).parts[0] if f.parent != folder else "" for f in files]
    classes = tuple(sorted(set(owners)))
    pixels = [read_image(file, image_shape) for file in files]
    if len({p.shape for p in pixels}) > 1:
        raise DataError(f"{folder}: images of several sizes; bring them to one size first")
    labels = torch.tensor([classes.index(owner) for owner in owners])
    return ImageSet(torch.from_numpy(np.stack(pixels)), labels, classes, name)


def read_image(path: Path, image_shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """One image file as uint8 [C, H, W], converted and resized to `image_shape` where given.

    Raises:
        DataError: the file is missing or no image that can be read.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise DataError(f"{path} has more than 8 bits a pixel ({image.mode}); convert it to 8 bits first")
            grey = image_shape[0] == 1 if image_shape else image.mode in ("1", "L")
            image = image.convert("L" if grey else "RGB")
            if image_shape and image.size != (image_shape[2], image_shape[1]):
                image = image.resize((image_shape[2], image_shape[1]), Image.Resampling.BILINEAR)
            pixels = np.array(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} is missing, or no readable image: {error}; repair or remove it") from error
    return pixels[None] if grey else pixels.transpose(2, 0, 1)
