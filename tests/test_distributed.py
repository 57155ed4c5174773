"""Real runs of two processes under torchrun, on the CPU, against one process that does the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import samelib
from reproduction import pretrain
from samelib import training
from samelib.data.groups import load_group
from samelib.detectors import same
from samelib.detectors.same import SameDetector
from samelib.presets import preset
from samelib.store import ArtifactStore

# Trains, and asks for the same again. In float32, because rounding to bfloat16 hides what is compared here; with a
# checkpoint after every epoch; and process 1 dies after the epoch it was told (0: never).
SCRIPT = """
import os, signal, sys, torch
from samelib import training
from samelib.data.real import DataError
from samelib.detectors import same
from reproduction.pretrain import joined, pretrain

def train_mae(*given, on_epoch, **how):
    def tell(epoch, *rest):
        on_epoch(epoch, *rest)
        if epoch == int(sys.argv[1]) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    print("trains")
    return training.train_mae(*given, on_epoch=tell, checkpoint_every=0, **how)

training.autocast = lambda device: torch.autocast(device.type, enabled=False)
same.train_mae = train_mae
with joined() as device:
    pretrain("glyphs", "smoke", 0, device)
    pretrain("glyphs", "smoke", 0, device)
    try:
        pretrain("path:nowhere", "smoke", 0, device)
    except DataError as error:
        print("heard:", error)
"""


def torchrun(folder: Path, *words: str) -> tuple[int, list[str], list[str]]:
    """(exit status, standard output and standard error of each process); the cache is folder/cache."""
    root = str(Path(samelib.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"SAMELIB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "0"}
    logs = folder / "logs"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--redirects", "3", "--log-dir", str(logs), *words]
    status = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, timeout=300).returncode
    out, error = ([p.read_text() for p in sorted(logs.rglob(f"{name}.log"))] for name in ("stdout", "stderr"))
    return status, out, error


def run_script(folder: Path, dies_after: int = 0):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    return torchrun(folder, str(folder / "script.py"), str(dies_after))


def entry(cache: Path) -> tuple[dict, list[float]]:
    """(weights, history) of the one model in a cache."""
    (folder,) = cache.glob("mae-*[0-9a-f]")
    return load_file(folder / "weights.safetensors"), json.loads((folder / "card.json").read_text())["losses"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """An undisturbed run of two processes: its folder and what each of them wrote."""
    folder = tmp_path_factory.mktemp("two")
    status, out, error = run_script(folder)
    assert status == 0, error
    return folder, out, error


@pytest.fixture(scope="module")
def group():
    return load_group("glyphs", "smoke")


def test_two_processes_give_the_losses_and_weights_of_one(two, group, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    SameDetector(preset("smoke", group.image_shape).same).fit_autoencoder(group.victim_train, ArtifactStore(tmp_path))
    (weights, history), (shared_weights, shared_history) = entry(tmp_path), entry(two[0] / "cache")
    assert len(history) == 4 and shared_history == pytest.approx(history, rel=1e-5)
    assert weights.keys() == shared_weights.keys()  # the plain module's names
    for name, tensor in weights.items():
        torch.testing.assert_close(shared_weights[name], tensor, rtol=0, atol=1e-3, msg=name)


def test_it_is_trained_once_and_by_all(two):
    for shown in two[1]:
        assert shown.count("trains\n") == 1
    first, second = two[1]
    assert "masked autoencoder: 4 epochs" in first and "masked autoencoder: was there" in first
    assert "masked autoencoder" not in second


def test_the_first_process_alone_shows_progress(two):
    first, second = two[2]
    assert "72/72" in first and "72" not in second


def test_an_error_of_the_first_process_reaches_the_other(two):
    for shown in two[1]:
        assert "heard: " in shown and "nowhere" in shown


def test_fit_and_a_single_process_find_the_entry(two, group, monkeypatch, capsys):
    monkeypatch.setattr(same, "train_mae", lambda *_, **__: pytest.fail("it was trained again"))
    monkeypatch.setenv("SAMELIB_CACHE", str(two[0] / "cache"))
    monkeypatch.setattr(pretrain, "best_device", lambda: "cpu")
    settings = preset("smoke", group.image_shape).same
    module, card = SameDetector(settings).fit_autoencoder(group.victim_train, ArtifactStore())
    weights, history = entry(two[0] / "cache")
    assert card["losses"] == history and all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
    pretrain.main(["--tier", "smoke"])
    assert "masked autoencoder: was there" in capsys.readouterr().out


def test_a_killed_run_goes_on_from_its_checkpoint(two, tmp_path):
    status, _, _ = run_script(tmp_path, dies_after=3)
    (checkpoint,) = (tmp_path / "cache").glob("*.checkpoint")
    assert status != 0 and not list((tmp_path / "cache").glob("mae-*[0-9a-f]"))
    weights, history = entry(two[0] / "cache")
    state = torch.load(checkpoint)
    done = len(state["losses"])
    assert 2 <= done <= 3 and state["losses"] == history[:done]
    state["losses"][0] = 7.0  # would be lost if the training began anew
    torch.save(state, checkpoint)
    status, _, error = run_script(tmp_path)
    assert status == 0, error
    resumed_weights, resumed_history = entry(tmp_path / "cache")
    assert resumed_history == [7.0, *history[1:]] and not checkpoint.exists()
    assert all(torch.equal(resumed_weights[name], tensor) for name, tensor in weights.items())


def test_a_batch_that_cannot_be_shared_equally_ends_the_run(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(61, 1, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=pixels, labels=np.arange(61) % 2)  # 49 of them train
    words = ["--data", f"path:{tmp_path / 'own.npz'}", "--tier", "smoke"]
    status, out, error = torchrun(tmp_path, "-m", "reproduction.pretrain", *words)
    assert status != 0 and any(
        "pretrain: 2 processes cannot share a batch of 49 images equally" in shown for shown in error
    )
    assert not list((tmp_path / "cache").glob("mae-*[0-9a-f]"))
