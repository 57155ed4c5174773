import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from samelib import store as store_module
from samelib.store import ArtifactError, ArtifactStore, DamagedArtifactWarning

SPEC = {"kind": "linear", "seed": 0}


class Trainer:
    """Counts how often it was asked to train."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, checkpoint):
        self.calls += 1
        nn.init.constant_(module.weight, 0.5)
        return [1.0, 0.5], 3.0


def build():
    return nn.Linear(3, 2)


def test_trained_once_then_read(tmp_path):
    store, trainer = ArtifactStore(tmp_path), Trainer()
    first, card = store.trained(SPEC, build, trainer)
    second, again = store.trained(SPEC, build, trainer)
    assert trainer.calls == 1 and card == again
    assert card["losses"] == [1.0, 0.5] and card["seconds"] == 3.0 and card["spec"] == SPEC
    assert torch.equal(first.weight, second.weight) and not second.training
    store.trained(SPEC | {"seed": 1}, build, trainer)
    assert trainer.calls == 2


def test_what_other_code_made_is_made_again(tmp_path, monkeypatch):
    """A row may not claim weights that the code it names did not train."""
    store, trainer = ArtifactStore(tmp_path), Trainer()
    _, card = store.trained(SPEC, build, trainer)
    assert card["measurement"] == store_module.MEASUREMENT
    monkeypatch.setattr(store_module, "MEASUREMENT", store_module.MEASUREMENT + 1)
    _, card = store.trained(SPEC, build, trainer)
    assert trainer.calls == 2 and card["measurement"] == store_module.MEASUREMENT


def test_published_models_are_read_and_never_written(tmp_path):
    publisher, trainer = ArtifactStore(tmp_path / "published"), Trainer()
    module, _ = publisher.trained(SPEC, build, trainer)
    reader = ArtifactStore(tmp_path / "own", publisher.root)
    again, card = reader.trained(SPEC, build, trainer)
    assert trainer.calls == 1 and card["spec"] == SPEC and torch.equal(again.weight, module.weight)
    assert reader.entries() == []
    reader.trained(SPEC | {"seed": 1}, build, trainer)
    assert trainer.calls == 2 and len(publisher.entries()) == len(reader.entries()) == 1


@pytest.mark.parametrize("file", ["weights.safetensors", "card.json"])
def test_damage_is_set_aside_and_trained_again(tmp_path, file):
    store, trainer = ArtifactStore(tmp_path), Trainer()
    store.trained(SPEC, build, trainer)
    damaged = store.path(SPEC) / file
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content if file.endswith("safetensors") else b"{")
    with pytest.warns(DamagedArtifactWarning, match="made again"):
        module, _ = store.trained(SPEC, build, trainer)
    assert trainer.calls == 2 and (module.weight == 0.5).all()
    assert [p for p, _ in store.entries() if p.name.startswith("damaged-linear")]


CHILD = """
import sys, time
from pathlib import Path
from torch import nn
from samelib.store import ArtifactStore

def fit(module, checkpoint):
    with open(Path(sys.argv[1]) / "trainings.txt", "a") as file:
        file.write("x")
    time.sleep(1.5)
    return [], 1.5

ArtifactStore(sys.argv[1] + "/store").trained({"kind": "linear"}, lambda: nn.Linear(3, 2), fit)
"""


def test_two_processes_train_once(tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)]) for _ in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    assert (tmp_path / "trainings.txt").read_text() == "x"


def test_another_version_is_named(tmp_path):
    folder = tmp_path / "model"
    store_module.save_folder(folder, {"w": torch.zeros(2)}, {})
    card = json.loads((folder / "card.json").read_text()) | {"format": 99}
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match="format version 99, this samelib reads 1"):
        store_module.load_folder(folder)


def test_unwritable_cache_is_said(tmp_path):
    """A file stands where the cache should be (permissions do not stop the superuser, who runs many CI machines)."""
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ArtifactError, match="choose a place you may write .SAMELIB_CACHE names"):
        ArtifactStore(tmp_path / "cache").trained(SPEC, build, Trainer())


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_cache_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="SAMELIB_CACHE names"):
        ArtifactStore(tmp_path / "cache").trained(SPEC, build, Trainer())


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = ArtifactStore(tmp_path)

    def fit(module, checkpoint):
        checkpoint.write_bytes(b"state")
        return [], 1.0

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(ArtifactError, match="no space left for .*goes on from its last checkpoint"):
        store.trained(SPEC, build, fit)
    left = [p.name for p, _ in store.entries()]
    assert left == [store.path(SPEC).with_suffix(".checkpoint").name]  # no half-written folder, the checkpoint kept
    monkeypatch.undo()
    store.trained(SPEC, build, fit)
    assert [p.name for p, _ in store.entries()] == [store.path(SPEC).name]


def test_errors_of_the_training_are_not_taken_for_disk_errors(tmp_path):
    def fit(module, checkpoint):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="^out of memory$"):
        ArtifactStore(tmp_path).trained(SPEC, build, fit)


def test_clear_frees_everything(tmp_path):
    store = ArtifactStore(tmp_path)
    store.trained(SPEC, build, Trainer())
    size = sum(s for _, s in store.entries())
    assert size > 0 and store.clear() == size and store.entries() == []
    assert ArtifactStore(tmp_path / "none").entries() == []
