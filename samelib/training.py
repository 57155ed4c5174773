"""One training loop for every model: the data lies whole on the device, an epoch is a pure function of (state, seed).

In a group of processes (torchrun) all call `train` together; the losses are their mean, process 0 alone shows progress
and reads and writes the checkpoint. Only `train_mae` shares the work out: a classifier is trained whole in each.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from samelib.data.image_set import ImageSet, to_float
from samelib.distributed import by_first, process_group
from samelib.memory import keep_freed_memory
from samelib.models.mae import MaskedAutoencoder, mae_loss
from samelib.precision import autocast


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the data; None where `seen` says how long to train.
        batch: images a step.
        lr: peak learning rate, reached after the share `warmup` of all steps, then a cosine that ends near zero.
        optimiser: "adamw" (betas 0.9, 0.95) or "sgd" (momentum 0.9).
        warmup: share of the training, at least 0 and below 1.
        schedule: "cosine", or "author_code" (the released code's per-epoch factor for the autoencoder).
        seen: images to be seen in all, whatever the size of the data set: an amount of work, where `epochs` is none.

    Raises:
        ValueError: an unknown name or a number that cannot be.
    """

    epochs: int | None = None
    batch: int = 128
    lr: float = 1e-3
    optimiser: str = "adamw"
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: float = 0.1
    schedule: str = "cosine"
    seen: int | None = None

    def __post_init__(self):
        if (self.epochs is None) == (self.seen is None):
            raise ValueError(f"give either epochs or seen (images in all): {self}")
        if (self.seen if self.epochs is None else self.epochs) < 1 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"epochs (or seen), batch and lr must be positive: {self}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the training, at least 0 and below 1, got {self.warmup}")
        if self.optimiser not in ("adamw", "sgd"):
            raise ValueError(f"optimiser must be adamw or sgd, got {self.optimiser!r}")
        if self.schedule not in ("cosine", "author_code"):
            raise ValueError(f"schedule must be cosine or author_code, got {self.schedule!r}")

    def epochs_of(self, count: int) -> int:
        """Passes over a data set of `count` images."""
        return self.epochs or max(1, round(self.seen / count))

    def lr_factor(self, progress: float, epochs: int = 1) -> float:
        """Share of the peak learning rate when the share `progress` of a training of so many epochs is done."""
        if self.schedule == "author_code":
            epoch = max(0, math.ceil(progress * epochs) - 1)  # one factor for all steps of an epoch
            return min((epoch + 1) / 50, (1 + math.cos(math.pi * epoch / epochs)) / 2)
        if progress < self.warmup:
            return progress / self.warmup
        return (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))) / 2


class Training(NamedTuple):
    """What a training was: the mean loss of every epoch, and its seconds, those before a restart included."""

    losses: list[float]
    seconds: float


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, or not be read; the training goes on without it."""


def best_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_optimiser(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The fused optimiser of `settings`; biases, norms and tokens are not decayed by AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(
            parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=False, fused=True
        )
    decayed = [p for p in parameters if p.ndim in (2, 4)]  # matrices and convolutions; tokens and positions have 3
    rest = [p for p in parameters if p.ndim not in (2, 4)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.lr, betas=(0.9, 0.95), fused=True)


def train(
    model: nn.Module,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    count: int,
    settings: TrainSettings,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: float = 20.0,
    on_epoch: Callable[[int, nn.Module, float], None] | None = None,
    label: str = "training",
) -> Training:
    """Trains `model` in place.

    The order of the data and all randomness of an epoch come from (seed, epoch) alone, so a run that is killed and
    started again with the same `checkpoint` file ends in the same weights, on the CPU bit for bit.

    Args:
        loss: (index [B] on the model's device, generator of that device) -> scalar loss.
        count: number of samples; indices run over 0..count-1.
        checkpoint: file for the state, written at the end of an epoch, at most every `checkpoint_every` seconds;
            whoever stores the finished model removes it. None: no checkpoint.
        on_epoch: called after every epoch with (epochs done, model, mean loss).

    Raises:
        ValueError: no samples.
        FloatingPointError: the loss is no longer finite.
    """
    if count < 1:
        raise ValueError(f"{label}: there is nothing to train on")
    keep_freed_memory()
    optimiser = make_optimiser(model, settings)
    losses, earlier = _resume(model, optimiser, checkpoint)
    epochs, steps = settings.epochs_of(count), max(1, count // settings.batch)
    leader, started = process_group()[0] == 0, time.monotonic()
    saved = started
    progress = {"initial": len(losses) * steps, "total": epochs * steps, "disable": not leader}
    with tqdm(desc=label, unit="step", leave=False, mininterval=0.5, **progress) as bar:
        for epoch in range(len(losses), epochs):
            losses.append(_epoch(model, loss, count, optimiser, settings, seed, epoch, epochs, bar))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"{label}: the loss of epoch {epoch + 1} is not finite; lower the learning rate"
                )
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            if on_epoch:
                on_epoch(epoch + 1, model, losses[-1])
            now = time.monotonic()
            if checkpoint and leader and now - saved >= checkpoint_every:
                _save(model, optimiser, Training(losses, earlier + now - started), checkpoint)
                saved = now
    model.eval()
    return Training(losses, earlier + time.monotonic() - started)


def _epoch(model, loss, count, optimiser, settings: TrainSettings, seed: int, epoch: int, epochs: int, bar) -> float:
    """One pass over the data in batches of one size (what is left over waits for another epoch); the mean loss."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed_of(seed, "epoch", epoch))
    batch = min(settings.batch, count)
    order = torch.randperm(count, generator=generator, device=device)
    batches = order[: count // batch * batch].split(batch)
    total = torch.zeros((), device=device)
    model.train()
    for step, index in enumerate(batches):
        for group in optimiser.param_groups:  # the rate of the middle of the step: that of its end may be 0
            progress = (epoch + (step + 0.5) / len(batches)) / epochs
            group["lr"] = settings.lr * settings.lr_factor(progress, epochs)
        with autocast(device):
            value = loss(index, generator)
        descend(optimiser, value)
        total += value.detach()
        bar.update()
    processes = process_group()[1]
    if processes > 1:
        dist.all_reduce(total)
    return float(total) / (len(batches) * processes)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of `optimiser` down the gradient of a scalar loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def train_mae(
    model: MaskedAutoencoder,
    images: ImageSet,
    settings: TrainSettings,
    *,
    seed: int = 0,
    loss_factor: float = 1.0,
    **options,
) -> Training:
    """Trains the autoencoder on eq. 4 with a fresh random mask for every image and step.

    `loss_factor` scales the loss (the authors' code divides it by the mask ratio); `options` go to `train`.

    In a group of processes (torchrun) `settings.batch` is that of all together: each draws the order and the masks of the
    whole and computes an equal part, and the gradients are averaged. The losses are one process's, but for rounding.

    Raises:
        ValueError: the batch cannot be shared out equally (further errors: see `train`).
    """
    rank, processes = process_group()
    batch = min(settings.batch, len(images))
    if batch % processes:
        raise ValueError(
            f"{processes} processes cannot share a batch of {batch} images equally; choose a number that divides it"
        )
    parallel = nn.parallel.DistributedDataParallel(model) if processes > 1 else model

    def loss(index: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(len(index), model.tokens, generator=generator, device=index.device)
        own = slice(rank * batch // processes, (rank + 1) * batch // processes)
        x = images.pixels(index[own])
        return loss_factor * mae_loss(x, parallel(x, noise[own])[0])

    return train(model, loss, len(images), settings, seed=seed, label="masked autoencoder", **options)


def train_classifier(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    settings: TrainSettings,
    *,
    augment: bool = False,
    label: str = "classifier",
    **options,
) -> Training:
    """Cross-entropy on class labels [N] or on probability vectors [N, K] (a victim's answers); `options` go to `train`.

    Args:
        images: uint8 [N, C, H, W].
        augment: shift by up to an eighth of the size, and mirror colour pictures (never digits).
    """

    def loss(index: Tensor, generator: torch.Generator) -> Tensor:
        x = to_float(images[index])
        return nn.functional.cross_entropy(model(augmented(x, generator) if augment else x), targets[index])

    return train(model, loss, len(images), settings, label=label, **options)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N, C, H, W] shifted by its own random offset; colour images are also mirrored with probability 1/2."""
    n, c, h, w = x.shape
    reach = h // 8

    def offsets(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=x.device)

    rows = offsets(2 * reach + 1) + torch.arange(h, device=x.device)
    columns = offsets(2 * reach + 1) + torch.arange(w, device=x.device)
    if c == 3:
        columns = torch.where(offsets(2) == 1, columns.flip(1), columns)
    edge = "reflect" if c == 3 else "replicate"
    padded = nn.functional.pad(x, (reach,) * 4, mode=edge)
    sample = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def seed_of(seed: int, *stream: str | int) -> int:
    """The 63-bit seed of a named stream of random numbers, as in seed_of(0, "substitute") or seed_of(0, "epoch", 3).

    No two streams share their numbers: a substitute must not start from the weights of one of the victim's members.
    """
    digest = hashlib.sha256(json.dumps([seed, *stream]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _save(model: nn.Module, optimiser: torch.optim.Optimizer, training: Training, path: Path) -> None:
    """Written beside and renamed: at no moment is there a half-written checkpoint under its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), **training._asdict()}
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk must not end a training that needs none of it
        temporary.unlink(missing_ok=True)
        warnings.warn(f"no checkpoint written to {path}: {error}; training goes on", CheckpointWarning, stacklevel=3)


def _resume(model: nn.Module, optimiser: torch.optim.Optimizer, path: Path | None) -> Training:
    state = by_first(lambda: _read(path)) if path else None
    if not state:
        return Training([], 0.0)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return Training(state["losses"], state["seconds"])


def _read(path: Path) -> dict | None:
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    except Exception as error:  # torch.load raises anything on a damaged file
        aside = path.with_name(f"damaged-{path.name}")
        os.replace(path, aside)
        warnings.warn(
            f"{path} is damaged ({error}); it is now {aside.name}, and training begins anew", CheckpointWarning, 6
        )
        return None
