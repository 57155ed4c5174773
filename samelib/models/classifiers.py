"""Victims, substitutes and auxiliary models: the paper's Conv3 (MNIST) and ResNet-18 (CIFAR-10), and a small ResNet-10."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

from samelib.store import ArtifactError, load_folder, save_folder

ARCHITECTURES = ("conv3", "resnet10", "resnet18", "resnet18-imagenet")
SMALLEST_SIDE = 14  # pixels that Conv3's unpadded convolutions need
BATCH = 512


class Classifier(nn.Module):
    """A `trunk`, images [N, C, H, W] -> features [N, D], and a `head`, features -> logits [N, K]."""

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Conv3(Classifier):
    """Three convolutions and two linear layers: images [N, C, H, W] -> logits [N, K]; 1.15 M parameters at 28 x 28."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int):
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(
                f"conv3 needs images of {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more, got {height} x {width}"
            )
        rows, columns = (((side - 2) // 2 - 4) // 2 for side in (height, width))  # after unpadded convolutions
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.ReLU(),
            nn.Conv2d(64, 128, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128 * rows * columns, 512), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(512, classes)


class ResNet18(Classifier):
    """torchvision's ResNet-18: images [N, C, H, W] -> logits [N, K].

    Args:
        stem: "cifar", a 3 x 3 convolution of stride 1 and no pooling, for 32 x 32 pixels; or "imagenet", 7 x 7 of
            stride 2 and max-pooling, as the authors' code has it (and plausibly why the paper's victim has 83 %).
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, stem: str = "cifar"):
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be cifar or imagenet, got {stem!r}")
        self.trunk = resnet18(num_classes=1)
        channels = image_shape[0]
        if stem == "cifar":
            self.trunk.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            self.trunk.maxpool = nn.Identity()
        elif channels != 3:
            self.trunk.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.trunk.fc = nn.Identity()
        self.head = nn.Linear(512, classes)


class ResNet10(Classifier):
    """Images [N, C, H, W] -> logits [N, K]: one of He et al.'s basic blocks for each of 16, 32, 64 and 128 channels.

    For training without a GPU: 32 million operations for an image of 32 x 32 pixels, where ResNet-18 takes 1,111 million
    ("cifar") or 74 million ("imagenet", of which processors do fewer a second); 0.31 M parameters.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int):
        super().__init__()
        widths = (16, 16, 32, 64, 128)
        self.trunk = nn.Sequential(
            nn.Conv2d(image_shape[0], widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(),
            BasicBlock(widths[0], widths[1]),
            *(self._halving(narrow, wide) for narrow, wide in pairwise(widths[1:])),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(widths[-1], classes)

    @staticmethod
    def _halving(narrow: int, wide: int) -> BasicBlock:
        shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))
        return BasicBlock(narrow, wide, stride=2, downsample=shortcut)


class SharedTrunk(Classifier):
    """An auxiliary model on the victim's frozen trunk, with a normalisation and a head of its own.

    The paper's structure sharing ("Fidelity and Efficiency"): the only new parameters are 2 D + D K + K.
    The trunk is held, not registered: it stays the victim's, is never trained and is not saved twice.
    """

    def __init__(self, victim: nn.Module):
        super().__init__()
        self._trunk = (victim.trunk,)
        self.norm = nn.LayerNorm(victim.head.in_features)
        self.head = nn.Linear(victim.head.in_features, victim.head.out_features)

    def features(self, x: Tensor) -> Tensor:
        trunk = self._trunk[0].eval().requires_grad_(False)
        return self.norm(trunk(x.contiguous(memory_format=torch.channels_last)))


def build_classifier(architecture: str, image_shape: tuple[int, int, int], classes: int, seed: int = 0) -> nn.Module:
    """A freshly initialised classifier; the seed alone decides its weights.

    Raises:
        ValueError: an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "conv3":
            model = Conv3(image_shape, classes)
        elif architecture == "resnet10":
            model = ResNet10(image_shape, classes)
        else:
            model = ResNet18(image_shape, classes, stem="imagenet" if architecture.endswith("imagenet") else "cifar")
        return model.to(memory_format=torch.channels_last)  # the faster order of pixels for bf16 convolutions


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities [N, K] on the model's device, of x [N, C, H, W] anywhere: eval mode, no gradients, in batches."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part.to(device)).float().softmax(1) for part in x.split(BATCH)])
    finally:
        model.train(training)


def _ask(model: Callable[[Tensor], Tensor], device: torch.device, x: Tensor) -> Tensor:
    return model(x.to(device))


@dataclass(frozen=True, eq=False)
class Victim:
    """A black box: images in, probabilities out. Any callable will do; a model of ours is one case.

    Attributes:
        answer: float [N, C, H, W] in [-1, 1] -> probabilities [N, K].
        image_shape: (C, H, W) that it accepts.
        classes: K.
        model: the module behind it, where it is at hand (needed for structure sharing and for saving it along).
        architecture: the name `build_classifier` knows it by, where it has one.

    Raises:
        TypeError: what answers cannot be called.
        ValueError: an image shape that is none, or fewer than two classes.
    """

    answer: Callable[[Tensor], Tensor]
    image_shape: tuple[int, int, int]
    classes: int
    model: nn.Module | None = None
    architecture: str | None = None

    def __post_init__(self):
        if not callable(self.answer):
            raise TypeError(
                f"a victim must be callable: images in, probabilities out; got {type(self.answer).__name__}"
            )
        shape = tuple(int(side) for side in self.image_shape)
        if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
            raise ValueError(f"image_shape must be (1 or 3, height, width), got {self.image_shape}")
        if self.classes < 2:
            raise ValueError(f"a victim names two classes or more, got {self.classes}")
        object.__setattr__(self, "image_shape", shape)

    @classmethod
    def wrap(cls, model: "Victim | nn.Module | Callable[[Tensor], Tensor]", images: Tensor) -> "Victim":
        """Whatever can answer as a victim: one already, a module that returns logits or probabilities, or a function
        that returns probabilities.

        Args:
            images: some images [N, C, H, W] that it takes, float in [-1, 1]; two of them are asked.

        Raises:
            TypeError: it cannot be called.
            ValueError: it does not answer with one row for each image.
        """
        if isinstance(model, Victim):
            return model
        if not callable(model):
            raise TypeError(f"a victim must be callable: images in, probabilities out; got {type(model).__name__}")
        shape, few = tuple(images.shape[1:]), images[:2]
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
            few = few.to(next(model.parameters(), few).device)
        with torch.no_grad():
            rows = torch.as_tensor(model(few))
        if rows.ndim != 2 or len(rows) != len(few):
            raise ValueError(
                f"the victim answered {list(rows.shape)} to {len(few)} images, expected [{len(few)}, classes]"
            )
        probabilities = bool(rows.min() >= 0 and (rows.sum(1) - 1).abs().max() < 1e-2)
        if isinstance(model, nn.Module) and not probabilities:
            return cls.of(model, shape, rows.shape[1])
        return cls(partial(_ask, model, few.device), shape, rows.shape[1])

    @classmethod
    def of(cls, model: nn.Module, image_shape: tuple[int, int, int], classes: int, architecture=None) -> "Victim":
        """The black box around a classifier that returns logits."""
        model.eval().requires_grad_(False)
        return cls(partial(predict, model), tuple(image_shape), classes, model, architecture)

    @classmethod
    def elsewhere(cls, image_shape: tuple[int, int, int], classes: int) -> "Victim":
        """A model that another server asks: its answers are brought along to `Defence.judge`."""

        def answer(_: Tensor) -> Tensor:
            raise RuntimeError("this victim answers elsewhere and cannot be asked here; bring its answers along")

        return cls(answer, image_shape, classes)

    def save(self, folder: Path | str, **card) -> None:
        """Writes the model as one folder: safetensors and a JSON card, to which `card` is added.

        Raises:
            ValueError: the model is not at hand or of no architecture that samelib can build again.
            ArtifactError: the place cannot be written.
        """
        if self.model is None or self.architecture is None:
            raise ValueError(f"only a model of samelib's own architectures ({', '.join(ARCHITECTURES)}) can be saved")
        card |= {"kind": "classifier", "architecture": self.architecture}
        card |= {"image_shape": self.image_shape, "classes": self.classes}
        save_folder(Path(folder), self.model.state_dict(), card)

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> "Victim":
        """Reads a folder written by `save`.

        Raises:
            ArtifactError: the folder is damaged, of another version, or holds something else.
        """
        tensors, card = load_folder(Path(folder))
        if card.get("kind") != "classifier":
            raise ArtifactError(f"{folder} holds a {card.get('kind')}, not a classifier")
        shape, classes, architecture = tuple(card["image_shape"]), card["classes"], card["architecture"]
        model = build_classifier(architecture, shape, classes)
        model.load_state_dict(tensors)
        return cls.of(model.to(device), shape, classes, architecture)

    def __call__(self, x: Tensor) -> Tensor:
        """Probabilities float32 [N, K].

        Raises:
            ValueError: the answer is not a probability vector for each image.
        """
        with torch.no_grad():  # in batches: whatever answers need not take a whole data set at once
            answer = torch.cat([torch.as_tensor(self.answer(part)).float() for part in x.split(BATCH)])
        return self.checked(answer, len(x))

    def checked(self, answer: Tensor, count: int) -> Tensor:
        """The answers to so many images, if they are [count, K] probabilities (ValueError where they are not)."""
        if tuple(answer.shape) != (count, self.classes):
            raise ValueError(f"the victim answered {list(answer.shape)}, expected [{count}, {self.classes}]")
        if not torch.isfinite(answer).all():
            raise ValueError("the victim answered NaN or infinite values")
        if answer.min() < -1e-4 or (answer.sum(1) - 1).abs().max() > 1e-2:
            raise ValueError("the victim must answer probabilities (rows >= 0 that sum to 1); apply softmax to logits")
        return answer

    def require(self, image_shape: tuple[int, int, int], classes: int) -> None:
        """Raises ValueError when the victim takes other images or names other classes than the detector knows."""
        if self.image_shape != tuple(image_shape):
            raise ValueError(f"the victim takes images {self.image_shape}, the detector {tuple(image_shape)}")
        if self.classes != classes:
            raise ValueError(f"the victim has {self.classes} classes, the detector {classes}")

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the weights; None for a victim that is only a callable."""
        if self.model is None:
            return None
        digest = hashlib.sha256(str(self.architecture).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy())
        return digest.hexdigest()
