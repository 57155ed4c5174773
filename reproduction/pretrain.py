"""Trains the masked autoencoder of a group and tier, in one process or data-parallel in several.

    torchrun --nproc-per-node 4 -m reproduction.pretrain --data cifar10 --tier paper --seed 0

puts it into the cache, where `samelib fit` and `SameDetector.fit` with the same group, tier and seed find it and then
train only the auxiliary model. `python -m reproduction.pretrain` does the same in one process. Each process has
a GPU of its own (nccl), or all compute on the CPU (gloo). They are meant for one machine: several machines need nothing
but a way to reach each other (only process 0 reads the data and touches the cache), but that is untested.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from samelib.data.groups import load_group
from samelib.data.real import DataError
from samelib.detectors.same import SameDetector
from samelib.distributed import by_first, process_group
from samelib.presets import TIERS, preset
from samelib.store import ArtifactError, ArtifactStore
from samelib.training import best_device

# Process 0 may wait for the lock of another run that trains the same entry; the others then wait for process 0.
PATIENCE = timedelta(days=7)


@contextmanager
def joined() -> Iterator[str]:
    """The device of this process, which belongs to torchrun's group as long as this lasts (if torchrun started it).

    Raises:
        ValueError: more processes on this machine than it has GPUs.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield best_device()
        return
    device, here, gpus = "cpu", int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if gpus:
        if here > gpus:
            raise ValueError(f"{here} processes need a GPU each and there are {gpus}; lower --nproc-per-node")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=PATIENCE)
    yield device
    dist.destroy_process_group()  # not after an error, when nccl would wait here for processes that wait elsewhere


def pretrain(data: str, tier: str, seed: int, device: str) -> None:
    """Trains the autoencoder that `SameDetector.fit` looks for, or finds that it is there (errors: see there)."""
    images = by_first(lambda: load_group(data, tier).victim_train).to(device)  # loaded, and downloaded, once for all
    settings = preset(tier, images.image_shape).same
    store, epochs = ArtifactStore(), []
    _, card = SameDetector(settings, seed).fit_autoencoder(images, store, lambda epoch, *_: epochs.append(epoch))
    rank, processes = process_group()
    if rank == 0:
        what = f"{len(epochs)} epochs, {card['seconds']:.0f} s, processes: {processes}" if epochs else "was there"
        print(f"masked autoencoder: {what}; loss {card['losses'][-1]:.4f}; {store.path(card['spec'])}")
        print(f"next: samelib fit DETECTOR --data {data} --tier {tier} --seed {seed}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m reproduction.pretrain",
        description="Trains the masked autoencoder of a group and tier into the cache, where samelib fit finds it.",
        epilog="In N processes: torchrun --nproc-per-node N -m reproduction.pretrain ... "
        "(N divides the tier's batch; one GPU each, or all on the CPU)",
    )
    made.add_argument("--data", default="glyphs", help="as for samelib fit (default: glyphs)")
    made.add_argument("--tier", choices=TIERS, default="lecture", help="as for samelib fit (default: lecture)")
    made.add_argument("--seed", type=int, default=0, help="of weights, order and masks (default: 0)")
    return made


def main(words: list[str] | None = None) -> None:
    arguments = parser().parse_args(words)
    try:
        with joined() as device:
            pretrain(arguments.data, arguments.tier, arguments.seed, device)
    except (DataError, ArtifactError, ArithmeticError, ValueError, OSError) as error:
        sys.exit(f"pretrain: {error}")


if __name__ == "__main__":
    main()
