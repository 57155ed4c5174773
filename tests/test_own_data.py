"""What a newcomer with images and a model of their own meets: sizes, labels, victims of any kind, counts and rates."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_SAME, TINY_TRAIN
from torch import nn

from samelib import cli, presets
from samelib.data.groups import load_group
from samelib.data.image_set import ImageSet
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import Victim
from samelib.presets import TIERS, fitting_patch, preset, train_victim


def pictures(count: int, *shape: int) -> np.ndarray:
    """uint8 [count, *shape]: smooth, so that there is something to reconstruct."""
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
    phase = np.linspace(0, 6, count)[:, None, None]
    grey = (127 + 120 * np.sin(rows / 3 + phase) * np.cos(columns / 4 - phase)).astype(np.uint8)
    return grey if len(shape) == 2 else np.repeat(grey[..., None], shape[2], axis=-1)


def save(path, count=400, shape=(16, 16), **more) -> str:
    np.savez(path, images=pictures(count, *shape), **more)
    return f"path:{path}"


@pytest.fixture
def untrained(monkeypatch):
    """Whatever is wrong has to be said before the first training."""

    def trained(*_, **__):
        raise AssertionError("a training has begun")

    for name in ("train_classifier", "train_victim"):
        monkeypatch.setattr(presets, name, trained)


@pytest.fixture
def untrained_command(untrained, monkeypatch):
    monkeypatch.setattr(cli, "train_victim", presets.train_victim)


def fault(*words) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words)])
    assert str(stop.value).startswith("samelib: ")
    return str(stop.value)


# ---- what fit refuses at once ----


def test_images_without_labels_train_no_victim(tmp_path, untrained, capsys):
    own = save(tmp_path / "own.npz")
    words = ["--tier", "smoke", "--method", "same", "--fpr", 0.2]
    message = fault("fit", tmp_path / "detector", "--data", own, *words)
    assert "add the array `labels`" in message and "bring your own victim" in message
    assert "100" not in capsys.readouterr().out and not (tmp_path / "detector").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "same", "--fpr", "0.001"], "needs 999 benign images for the threshold, got "),
    (["--method", "same", "--fpr", "1"], "above 0 and below 1"),
    ([], "the views need 100 calibration images or more, got 26; give more benign images, or take SAME as the paper"),
])  # fmt: skip
def test_rates_are_checked_before_the_first_training(tmp_path, untrained_command, words, message):
    own = save(tmp_path / "own.npz", labels=np.arange(400) % 4)
    assert message in fault("fit", tmp_path / "detector", "--data", own, "--tier", "smoke", *words)


def test_an_existing_folder_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_group", lambda *_, **__: pytest.fail("the data were read"))
    assert "exists; remove it" in fault("fit", tmp_path)


@pytest.mark.parametrize(("shape", "message"), [
    ((8, 8), "8 x 8 pixels are too small, each side needs 14 or more"),
    ((29, 31), "29 x 31 pixels cannot be cut .* resize or crop .* such as 28 x 28"),
])  # fmt: skip
def test_sizes_that_do_not_work_are_said_before_the_first_training(tmp_path, untrained_command, shape, message):
    own = save(tmp_path / "own.npz", shape=shape, labels=np.arange(400) % 4)
    assert re.search(message, fault("fit", tmp_path / "detector", "--data", own, "--tier", "smoke"))


# ---- sizes ----


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 16, 16), (3, 40, 60), [3, 64, 64], (3, 224, 224)])
def test_every_usual_size_has_a_patch_that_divides_it(tier, shape):
    patch = preset(tier, shape).same.mae.patch
    assert shape[1] % patch == shape[2] % patch == 0


def test_the_papers_sizes_keep_the_papers_patch():
    assert [preset("paper", shape).same.mae.patch for shape in ((1, 28, 28), (3, 32, 32))] == [2, 2]
    assert preset("lecture", (1, 28, 28)).same.mae.patch == 4


@pytest.mark.parametrize("patches", [4, 7, 14])
def test_where_a_size_does_not_work_the_one_that_is_suggested_does(patches):
    refused = 0
    for height in range(14, 130, 3):
        for width in range(height, min(4 * height, 130), 5):
            try:
                patch = fitting_patch((1, height, width), patches)
            except ValueError as error:
                refused += 1
                sides = map(int, re.search(r"such as (\d+) x (\d+)", str(error)).groups())
                patch = fitting_patch((1, *sides), patches)
                continue
            assert height % patch == width % patch == 0
            assert patches**2 / 4 <= height * width / patch**2 <= 4 * patches**2
    assert refused


def test_a_detector_of_images_that_are_not_square(tmp_path):
    own = save(tmp_path / "own.npz", count=200, shape=(40, 60))
    group = load_group(own, "smoke")
    assert group.image_shape == (1, 40, 60)
    patch = preset("smoke", group.image_shape).same.mae.patch
    settings = replace(TINY_SAME, mae=replace(TINY_SAME.mae, patch=patch))
    detector = SameDetector(settings).fit(group.victim_train, group.calibration, colours, fpr=0.2)
    assert detector.score(group.benign_test.images).isfinite().all()


# ---- a victim of any kind ----


def colours(x: torch.Tensor) -> torch.Tensor:
    """A plain function: float [N, C, H, W] -> probabilities [N, 3]."""
    return torch.stack([x.flatten(1).mean(1), x.flatten(1).std(1), x[:, 0, 0, 0]], 1).softmax(1)


def linear(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 3), *layers)


VICTIMS = {
    "a function": colours,
    "a module of logits": linear(),
    "a module of probabilities": linear(nn.Softmax(1)),
    "a function over numpy": lambda x: np.eye(3)[(x.numpy().mean((1, 2, 3)) > 0).astype(int)],
}


@pytest.fixture(scope="module")
def own() -> tuple[ImageSet, ImageSet]:
    images = torch.from_numpy(pictures(300, 16, 16))[:, None]
    return tuple(ImageSet(images, torch.zeros(300, dtype=torch.int64), ("?",), "own").shuffled(0).split(200, 100))


@pytest.mark.parametrize("name", VICTIMS)
def test_what_is_taken_for_a_victim(name, own):
    mae = replace(TINY_SAME.mae, patch=4)
    detector = SameDetector(replace(TINY_SAME, mae=mae)).fit(*own, VICTIMS[name], fpr=0.1)
    assert isinstance(detector.victim, Victim) and detector.victim.classes == 3
    rows = detector.victim(own[1].pixels())
    expected = torch.as_tensor(VICTIMS[name](own[1].pixels())).detach().float()
    assert torch.allclose(rows, expected.softmax(1) if name == "a module of logits" else expected, atol=1e-6)
    assert detector.flag(own[1].images).float().mean() < 0.5


@pytest.mark.parametrize(("victim", "error", "message"), [
    (3, TypeError, "must be callable"),
    (lambda x: x.flatten(1).mean(1), ValueError, r"answered \[2\] to 2 images, expected \[2, classes\]"),
    (lambda x: x.flatten(1)[:, :3] - 5, ValueError, "apply softmax to logits"),
])  # fmt: skip
def test_what_is_not(victim, error, message, own):
    with pytest.raises(error, match=message):
        SameDetector(replace(TINY_SAME, mae=replace(TINY_SAME.mae, patch=4))).fit(*own, victim, fpr=0.1)


def test_lists_are_taken_for_tuples(own):
    assert Victim(colours, [1, 16, 16], 3).image_shape == (1, 16, 16)
    assert preset("smoke", [1, 28, 28]) == preset("smoke", (1, 28, 28))
    assert SameDetector.preset("smoke", [1, 16, 16]).settings == preset("smoke", (1, 16, 16)).same
    assert Victim.of(linear(), [1, 16, 16], 3).image_shape == (1, 16, 16)


def test_a_victim_of_ones_own_images(tmp_path):
    """Labelled images are all it needs; the group knows its own tier."""
    group = load_group(save(tmp_path / "own.npz", count=120, labels=np.arange(120) % 3), "smoke")
    settings = replace(preset("smoke", group.image_shape), victim_train=TINY_TRAIN)
    assert train_victim(group, settings)(group.benign_test.pixels()).shape == (len(group.benign_test), 3)
