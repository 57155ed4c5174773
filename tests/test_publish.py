from dataclasses import replace

import pytest
import torch
from conftest import TINY_SAME

from samelib import presets, publish
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import build_classifier
from samelib.store import PUBLISHED, ArtifactStore, load_folder
from samelib.training import TrainSettings, seed_of, train_classifier


@pytest.fixture
def published(tmp_path, group, monkeypatch):
    """The models of a tiny group, published."""
    settings = replace(presets.preset("smoke", group.image_shape), same=TINY_SAME, victim_train=TrainSettings(1, 64))
    monkeypatch.setattr(publish, "load_group", lambda *_: group)
    monkeypatch.setattr(publish, "preset", lambda *_: settings)
    monkeypatch.setattr(presets, "preset", lambda *_: settings)
    folder = tmp_path / "published"
    publish.publish("glyphs", "smoke", folder)
    return folder


def test_cards_say_how_to_train_the_models_again(published, group):
    entries = {path.name.split("-")[0]: load_folder(path) for path in published.iterdir()}
    assert set(entries) == {"victim", "mae", "auxiliary", "terms"}
    weights, card = entries["victim"]
    assert card["seconds"] > 0 and {"device", "precision", "torch", "losses"} <= set(card)
    spec = card["spec"]
    assert spec["data"] == group.victim_train.fingerprint
    model = build_classifier(spec["architecture"], group.image_shape, group.classes, seed_of(spec["seed"], "victim"))
    images, train = group.victim_train, TrainSettings(**spec["train"])
    train_classifier(model, images.images, images.labels, train, augment=spec["augment"], seed=seed_of(0, "victim"))
    for name, value in model.state_dict().items():
        assert weights[name].dtype == torch.bfloat16
        assert torch.allclose(weights[name].float(), value, rtol=2**-8, atol=1e-6)


def test_published_models_are_trained_beside_each_other(published, group, tmp_path):
    """The auxiliary model belongs to the rounded victim and autoencoder: with these it is found, not trained."""
    store = ArtifactStore(tmp_path / "own", published)
    victim = presets.train_victim(group, store=store)
    detector = SameDetector(TINY_SAME).fit(group.victim_train, group.calibration, victim, store=store)
    assert detector.cards["auxiliary"]["spec"]["victim"] == victim.fingerprint
    calibration = group.calibration[len(group.calibration) // 2 :]
    assert torch.equal(detector.calibration_terms.reconstruction, detector.terms(calibration.pixels()).reconstruction)
    assert store.entries() == []


@pytest.mark.parametrize("name", ["glyphs", pytest.param("mnist", marks=pytest.mark.data)])
def test_what_a_lecture_needs_comes_with_the_package(name, tmp_path, request):
    if name == "mnist":
        request.getfixturevalue("real_data")
    group = publish.load_group(name)
    store = ArtifactStore(tmp_path)
    victim = presets.train_victim(group, store=store)
    SameDetector.preset("lecture", group.image_shape).fit(group.victim_train, group.calibration, victim, store=store)
    assert store.entries() == []
    assert sum(file.stat().st_size for file in PUBLISHED.rglob("*")) < 15 * 2**20
