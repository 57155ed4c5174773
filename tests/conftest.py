import os

import pytest
import torch

from samelib.data.groups import Group
from samelib.data.synthetic import glyphs
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import Victim, build_classifier
from samelib.models.mae import MAESettings
from samelib.presets import SameSettings
from samelib.store import ArtifactStore
from samelib.training import TrainSettings, train_classifier

TINY_MAE = MAESettings(patch=7, width=24, depth=1, heads=2, decoder_depth=1, decoder_heads=2)
TINY_TRAIN = TrainSettings(epochs=1, batch=64, lr=1e-3)
TINY_SAME = SameSettings(TINY_MAE, TrainSettings(8, 32, 3e-3), "conv3", TINY_TRAIN, passes=2, views=1)

# Figures that tests compare must not depend on how busy the machine is at which moment (see samelib.precision).
os.environ.setdefault("SAMELIB_PRECISION", "float32")

LONGEST = ("test_reproduce.py", "test_book.py")

collect_ignore = ["servers"]  # it needs environments of its own: `make servers` names it


def pytest_configure(config):
    """The tests' detectors are trained for seconds, and every one of them is weak at something."""
    config.addinivalue_line("filterwarnings", "ignore::samelib.detectors.power.WeakDetectorWarning")


def pytest_collection_modifyitems(items):
    """The longest files first: processes that share the files out among them then end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the cache of whoever runs it."""
    monkeypatch.setenv("SAMELIB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def group() -> Group:
    train, calibration, benign, seeds = glyphs("victim", 810).split(400, 240, 150, 20)
    return Group("glyphs", train, calibration, benign, seeds, glyphs("proxy", 200), glyphs("outliers", 100))


@pytest.fixture(scope="session")
def victim(group) -> Victim:
    model = build_classifier("conv3", group.image_shape, group.classes)
    train_classifier(model, group.victim_train.images, group.victim_train.labels, TrainSettings(2, 32, 1e-3))
    return Victim.of(model, group.image_shape, group.classes, "conv3")


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


def fit_beside(detector, group, victim, store=None):
    """A detector that watches over a victim that is given."""
    return detector.fit(group.victim_train, group.calibration, victim, store=store)


def fit_exposed(detector, group, store=None):
    """A detector that trains a victim of its own, with outliers."""
    return detector.fit(group.victim_train, group.outliers, group.calibration, store=store)


@pytest.fixture(scope="session")
def detector(group, victim, store) -> SameDetector:
    return fit_beside(SameDetector(TINY_SAME), group, victim, store)


@pytest.fixture(scope="session")
def real_data() -> str:
    if not os.environ.get("SAMELIB_DATA"):
        pytest.skip("no real data: SAMELIB_DATA is not set")
    return os.environ["SAMELIB_DATA"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
