import errno
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from samelib import training
from samelib.data.synthetic import glyphs
from samelib.models.classifiers import build_classifier
from samelib.models.mae import MAESettings, MaskedAutoencoder
from samelib.training import CheckpointWarning, TrainSettings, augmented, make_optimiser, seed_of, train

SCRIPT = """
import sys, time, torch
from pathlib import Path
from samelib.data.synthetic import glyphs
from samelib.models.mae import MAESettings, MaskedAutoencoder
from samelib.training import TrainSettings, train_mae

torch.set_num_threads(1)
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
model = MaskedAutoencoder((1, 28, 28), MAESettings(7, 24, 1, 2, 1, 2))

def tell(epoch, model, loss):
    (folder / "epoch").write_text(str(epoch))
    time.sleep(pause)

losses, seconds = train_mae(model, glyphs("victim", 300), TrainSettings(8, 32, 1e-3),
                            checkpoint=folder / "state.checkpoint", checkpoint_every=0, on_epoch=tell)
torch.save({"weights": model.state_dict(), "losses": losses, "seconds": seconds}, folder / "done.pt")
"""


def run(folder, pause=0.0) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(pause)], stderr=subprocess.DEVNULL)


def test_sigkill_and_resume_end_in_the_same_weights(tmp_path):
    undisturbed = run(tmp_path / "a")
    process = run(tmp_path / "b", pause=0.5)
    epoch, deadline = tmp_path / "b" / "epoch", time.monotonic() + 300
    while not (epoch.exists() and int(epoch.read_text() or 0) >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "b" / "state.checkpoint").exists() and not (tmp_path / "b" / "done.pt").exists()
    assert run(tmp_path / "b").wait() == 0 and undisturbed.wait() == 0
    whole, resumed = (torch.load(tmp_path / name / "done.pt") for name in "ab")
    assert whole["losses"] == resumed["losses"] and len(whole["losses"]) == 8
    assert resumed["seconds"] > 1.0  # two pauses of half a second before the kill count, though it began anew without
    assert all(torch.equal(whole["weights"][k], resumed["weights"][k]) for k in whole["weights"])


def linear_problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
    return model, lambda index, _: (model(x[index]) - y[index]).float().square().mean()


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_it_learns(optimiser):
    model, loss = linear_problem()
    losses, _ = train(model, loss, 256, TrainSettings(20, 32, 0.05, optimiser, weight_decay=0))
    assert len(losses) == 20 and losses[-1] < 0.05 * losses[0]
    assert not model.training


def test_schedule_warms_up_and_ends_at_zero():
    settings = TrainSettings(10, warmup=0.2)
    assert settings.lr_factor(0) == 0 and settings.lr_factor(0.1) == 0.5 and settings.lr_factor(0.2) == 1
    assert settings.lr_factor(0.6) == pytest.approx(0.5) and settings.lr_factor(1) == pytest.approx(0)
    released = TrainSettings(500, schedule="author_code")
    assert released.lr_factor(0.7 / 500, 500) == pytest.approx(1 / 50)
    assert released.lr_factor(250.5 / 500, 500) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)


def test_a_training_of_one_step_changes_the_weights():
    model, loss = linear_problem()
    before = model.weight.clone()
    train(model, loss, 32, TrainSettings(1, 32, 0.1))
    assert (model.weight - before).abs().min() > 0.01


def test_a_training_may_be_an_amount_of_images():
    settings = TrainSettings(seen=1_000, batch=32)
    assert [settings.epochs_of(count) for count in (100, 400, 5_000)] == [10, 2, 1]
    model, loss = linear_problem()
    assert len(train(model, loss, 250, settings).losses) == 4


def test_only_matrices_are_decayed():
    decayed, rest = make_optimiser(build_classifier("conv3", (1, 28, 28), 10), TrainSettings(1)).param_groups
    assert decayed["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in rest["params"])


def test_nothing_to_train_on_and_divergence_are_said():
    model, loss = linear_problem()
    with pytest.raises(ValueError, match="nothing to train on"):
        train(model, loss, 0, TrainSettings(1))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(model, lambda i, g: loss(i, g) * float("nan"), 256, TrainSettings(1))


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": 1, "lr": 0},
        {"epochs": 1, "optimiser": "adam"},
        {},
        {"epochs": 1, "seen": 9},
        {"seen": 0},
        {"epochs": 1, "warmup": 2},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError):
        TrainSettings(**bad)


def test_augmentation_shifts_and_never_mirrors_digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((64, 1, 28, 28), -1.0)
    x[:, :, 10:18, 10] = 1  # a bar with a foot to the right: its mirror image would have it to the left
    x[:, :, 17, 10:14] = 1
    moved = augmented(x, generator)
    assert len({m.numpy().tobytes() for m in moved}) > 20
    for picture in moved[:, 0]:
        rows, columns = torch.nonzero(picture == 1, as_tuple=True)
        assert len(rows) == 11 and columns[rows == rows.min()].max() == columns.min()
    colour = augmented(torch.rand(32, 3, 32, 32), generator)
    assert colour.shape == (32, 3, 32, 32)


def test_streams_of_random_numbers_are_apart():
    seeds = {seed_of(a, "epoch", b) for a in range(30) for b in range(30)}
    seeds |= {seed_of(a, name) for a in range(30) for name in ("victim", "substitute", "auxiliary")}
    assert len(seeds) == 990 and min(seeds) >= 0 and max(seeds) < 2**63


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    model, loss = linear_problem()
    with pytest.warns(CheckpointWarning, match="No space left on device; training goes on"):
        losses, _ = train(
            model, loss, 256, TrainSettings(3), checkpoint=tmp_path / "state.checkpoint", checkpoint_every=0
        )
    assert len(losses) == 3 and list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    path = tmp_path / "state.checkpoint"
    model, loss = linear_problem()
    train(model, loss, 256, TrainSettings(2), checkpoint=path, checkpoint_every=0)
    path.write_bytes(path.read_bytes()[:300])
    model, loss = linear_problem()
    with pytest.warns(CheckpointWarning, match="is damaged .* begins anew"):
        assert len(train(model, loss, 256, TrainSettings(2), checkpoint=path).losses) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["damaged-state.checkpoint"]


@pytest.mark.parametrize("images, batch", [(300, 32), (31, 31)])  # a set smaller than the batch is the batch
def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch, images, batch):
    monkeypatch.setattr(training, "process_group", lambda: (0, 3))
    model = MaskedAutoencoder((1, 28, 28), MAESettings(7, 24, 1, 2, 1, 2))
    with pytest.raises(ValueError, match=f"3 processes cannot share a batch of {batch} images equally"):
        training.train_mae(model, glyphs("victim", images), TrainSettings(1, 32))
