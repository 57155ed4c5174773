"""Makes the models that come with samelib, so that a lecture begins in seconds: python -m samelib.publish

Victim, masked autoencoder and auxiliary model of each group at the lecture tier, as bfloat16 safetensors with the card of
their training, and the terms of its calibration images, in the read-only layer under every `ArtifactStore`. What is there
already is not made again; a training that was stopped goes on.
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
    """Makes what is not in `folder` yet of a group, each model beside the published ones before it.

    Raises:
        DataError: the group's data is missing.
        ArtifactError: a place cannot be written.
    """
    group = load_group(group_name, tier).to(best_device())
    store = ArtifactStore(cache_root() / "unpublished", folder)
    detector = SameDetector(preset(tier, group.image_shape).same)
    train_victim(group, store=store)
    _publish(store, "victim")
    detector.fit_autoencoder(group.victim_train, store)
    _publish(store, "mae")
    for kind in ("auxiliary", "terms"):  # the terms are those of the rounded auxiliary model
        detector.fit(group.victim_train, group.calibration, train_victim(group, store=store), store=store)
        _publish(store, kind)


def _publish(store: ArtifactStore, kind: str) -> None:
    """From now on the rounded weights are the model: what is trained beside it next sees these. What else was made is of
    the model before that, and goes; checkpoints are files, and stay."""
    for path in (path for path, _ in store.entries() if path.is_dir()):
        if path.name.startswith(f"{kind}-"):
            tensors, card = load_folder(path)
            if kind != "terms":  # a threshold among rounded scores would meet many ties
                tensors = {name: _rounded(tensor) for name, tensor in tensors.items()}
            save_folder(store.published / path.name, tensors, card)
            print(f"published {path.name}: {card['seconds']:.0f} s")
        shutil.rmtree(path)


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    for name in sys.argv[1:] or GROUPS:
        publish(name)
