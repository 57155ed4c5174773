"""Makes the models that come with samelib, so that a lecture begins in seconds: python -m samelib.publish

Victim, masked autoencoder and auxiliary model of each group at the lecture tier, as bfloat16 safetensors with the card of
their training, in the read-only layer under every `ArtifactStore`. A model that is there already is not made again; a
training that was stopped goes on.
"""

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from samelib.data.groups import load_group
from samelib.detectors.same import SameDetector
from samelib.presets import preset, train_victim
from samelib.store import PUBLISHED, ArtifactStore, cache_root, load_folder, save_folder
from samelib.training import best_device

GROUPS = ("glyphs", "mnist")


def publish(group_name: str, tier: str = "lecture", folder: Path = PUBLISHED) -> None:
    """Trains the three models of a group that are not in `folder` yet, each beside the published ones before it.

    Raises:
        DataError: the group's data is missing.
        ArtifactError: a place cannot be written.
    """
    group = load_group(group_name, tier).to(best_device())
    store = ArtifactStore(cache_root() / "unpublished", folder)
    detector = SameDetector(preset(tier, group.image_shape).same)
    train_victim(group, store=store)
    _move_entries(store)
    detector.fit_autoencoder(group.victim_train, store)
    _move_entries(store)
    detector.fit(group.victim_train, group.calibration, train_victim(group, store=store), store=store)
    _move_entries(store)


def _move_entries(store: ArtifactStore) -> None:
    """From now on the rounded weights are the model: what is trained beside it next sees these."""
    for path, _ in store.entries():
        if path.is_dir():
            tensors, card = load_folder(path)
            save_folder(store.published / path.name, {name: _rounded(t) for name, t in tensors.items()}, card)
            shutil.rmtree(path)
            print(f"published {path.name}: {card['seconds']:.0f} s of training")


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    for name in sys.argv[1:] or GROUPS:
        publish(name)
