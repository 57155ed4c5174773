"""One training loop for every model: the data lies whole on the device, an epoch is a pure function of (state, seed).

In a group of processes (torchrun) all call `train` together; the history is their mean, process 0 alone shows progress
and reads and writes the checkpoint. Only `train_mae` shares the work out: a classifier is trained whole in each.
"""

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from samelib.data.image_set import ImageSet, to_float
from samelib.distributed import by_first, process_group
from samelib.models.mae import MaskedAutoencoder, mae_loss


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs, batch: passes over the data and images a step.
        lr: peak learning rate, reached after `warmup` epochs, then cosine to zero at the last step.
        optimiser: "adamw" (betas 0.9, 0.95) or "sgd" (momentum 0.9).
        schedule: "cosine", or "author_code" (the released code's per-epoch factor for the autoencoder).

    Raises:
        ValueError: an unknown name or a number that cannot be.
    """

    epochs: int
    batch: int = 128
    lr: float = 1e-3
    optimiser: str = "adamw"
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: float = 1.0
    schedule: str = "cosine"

    def __post_init__(self):
        if self.epochs < 1 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"epochs, batch and lr must be positive: {self}")
        if self.optimiser not in ("adamw", "sgd"):
            raise ValueError(f"optimiser must be adamw or sgd, got {self.optimiser!r}")
        if self.schedule not in ("cosine", "author_code"):
            raise ValueError(f"schedule must be cosine or author_code, got {self.schedule!r}")

    def lr_factor(self, epoch: float) -> float:
        """Share of the peak learning rate `epoch` epochs into the training."""
        if self.schedule == "author_code":
            whole = max(0, math.ceil(epoch) - 1)  # one factor for all steps of an epoch
            return min((whole + 1) / 50, (1 + math.cos(math.pi * whole / self.epochs)) / 2)
        warmup = min(self.warmup, self.epochs / 2)
        if epoch < warmup:
            return epoch / warmup
        return (1 + math.cos(math.pi * (epoch - warmup) / (self.epochs - warmup))) / 2


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


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the processor multiplies it natively, float32 elsewhere."""
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=pays)


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
) -> list[float]:
    """Trains `model` in place and returns the mean loss of every epoch.

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
    optimiser = make_optimiser(model, settings)
    history = _resume(model, optimiser, checkpoint)
    steps = max(1, count // settings.batch)
    first, saved = process_group()[0] == 0, time.monotonic()
    how = {"initial": len(history) * steps, "total": settings.epochs * steps, "disable": not first}
    with tqdm(desc=label, unit="step", leave=False, mininterval=0.5, **how) as bar:
        for epoch in range(len(history), settings.epochs):
            history.append(_epoch(model, loss, count, optimiser, settings, seed, epoch, bar))
            if not math.isfinite(history[-1]):
                raise FloatingPointError(
                    f"{label}: the loss of epoch {epoch + 1} is not finite; lower the learning rate"
                )
            bar.set_postfix(loss=f"{history[-1]:.4f}")
            if on_epoch:
                on_epoch(epoch + 1, model, history[-1])
            if checkpoint and first and time.monotonic() - saved >= checkpoint_every:
                _save(model, optimiser, history, checkpoint)
                saved = time.monotonic()
    model.eval()
    return history


def _epoch(model, loss, count, optimiser, settings: TrainSettings, seed: int, epoch: int, bar: tqdm) -> float:
    """One pass over the data in batches of one size (what is left over waits for another epoch); the mean loss."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(hash_seed(seed, epoch))
    batch = min(settings.batch, count)
    order = torch.randperm(count, generator=generator, device=device)
    batches = order[: count // batch * batch].split(batch)
    total = torch.zeros((), device=device)
    model.train()
    for step, index in enumerate(batches, 1):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * settings.lr_factor(epoch + step / len(batches))
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
    **how,
) -> list[float]:
    """Trains the autoencoder on eq. 4 with a fresh random mask for every image and step; returns the losses.

    `loss_factor` scales the loss (the authors' code divides it by the mask ratio); `how` goes to `train`.

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

    return train(model, loss, len(images), settings, seed=seed, label="masked autoencoder", **how)


def train_classifier(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    settings: TrainSettings,
    *,
    augment: bool = False,
    label: str = "classifier",
    **how,
) -> list[float]:
    """Cross-entropy on class labels [N] or on probability vectors [N, K] (a victim's answers); returns the losses.

    Args:
        images: uint8 [N, C, H, W].
        augment: shift by up to an eighth of the size, and mirror colour pictures (never digits).
    """

    def loss(index: Tensor, generator: torch.Generator) -> Tensor:
        x = to_float(images[index])
        return nn.functional.cross_entropy(model(augmented(x, generator) if augment else x), targets[index])

    return train(model, loss, len(images), settings, label=label, **how)


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


def hash_seed(*parts: int) -> int:
    """One 63-bit seed from several small integers, so that (seed 1, epoch 0) and (seed 0, epoch 1) differ."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ (part + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
    return value


def _save(model: nn.Module, optimiser: torch.optim.Optimizer, history: list[float], path: Path) -> None:
    """Written beside and renamed: at no moment is there a half-written checkpoint under its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": history}
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk must not end a training that needs none of it
        temporary.unlink(missing_ok=True)
        warnings.warn(f"no checkpoint written to {path}: {error}; training goes on", CheckpointWarning, stacklevel=3)


def _resume(model: nn.Module, optimiser: torch.optim.Optimizer, path: Path | None) -> list[float]:
    state = by_first(lambda: _read(path)) if path else None
    if state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    return state["history"] if state else []


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
