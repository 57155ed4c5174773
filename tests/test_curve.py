"""Figure 6 watches one training of the autoencoder, through the store, and goes on where it was killed."""

import pytest
import torch

from reproduction import curve
from reproduction.lab import Bench
from reproduction.plan import SAME
from samelib import training
from samelib.detectors import same
from samelib.store import ArtifactStore


@pytest.fixture
def bench(group, monkeypatch, tmp_path) -> Bench:
    monkeypatch.setattr("reproduction.lab.load_group", lambda *_: group)
    return Bench("glyphs", "smoke", 0, ArtifactStore(tmp_path / "store"))


@pytest.fixture
def trainings(monkeypatch) -> list:
    """The autoencoder's trainings, of both modules that start one."""
    started = []

    def train_mae(*arguments, **options):
        started.append(options)
        return training.train_mae(*arguments, checkpoint_every=0, **options)

    monkeypatch.setattr(same, "train_mae", train_mae)
    monkeypatch.setattr(curve, "train_mae", train_mae)
    return started


def weights(model) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_it_is_the_training_of_the_detector_itself(bench, trainings):
    models = [weights(model) for model in curve._models(bench)]
    assert len(models) == len(curve._epochs(bench)) == 2 and not torch.equal(*models)
    detector = bench.detector(SAME)
    assert torch.equal(weights(detector.mae), models[-1]) and len(trainings) == 1
    assert all(torch.equal(a, weights(b)) for a, b in zip(models, curve._models(bench), strict=True))
    assert len(trainings) == 1, "a second look trains nothing"


def test_a_training_that_nobody_watched_is_watched_once(bench, trainings):
    detector = bench.detector(SAME)
    models = [weights(model) for model in curve._models(bench)]
    assert torch.equal(weights(detector.mae), models[-1]) and len(trainings) == 2
    list(curve._models(bench))
    assert len(trainings) == 2 and all(options["checkpoint"] for options in trainings)


def test_a_killed_curve_goes_on(bench, trainings, monkeypatch):
    whole = Bench("glyphs", "smoke", 0, ArtifactStore(bench.store.root.with_name("other")))
    expected = [weights(model) for model in curve._models(whole)]
    epoch, done = training._epoch, []

    def killed(*arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return epoch(*arguments)

    monkeypatch.setattr(training, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        list(curve._models(bench))
    asked = []
    monkeypatch.setattr(training, "_epoch", lambda *arguments: asked.append(1) or epoch(*arguments))
    models = [weights(model) for model in curve._models(bench)]
    assert len(asked) == 1, "the first epoch is not trained again"
    assert all(torch.equal(a, b) for a, b in zip(models, expected, strict=True))


def test_a_shorter_training_of_its_own(bench):
    bench.scale = bench.scale._replace(curve_train=training.TrainSettings(1, 64, 1e-3), curve_images=128)
    assert curve._epochs(bench) == [1] and len(curve._training(bench)[1]) == 128
