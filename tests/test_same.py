import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_SAME, fit_beside

from samelib.detectors.base import DetectorEstimator, NotFittedError
from samelib.detectors.same import (
    SameDetector,
    Terms,
    anomaly_score,
    auxiliary_loss,
    deviation,
    pass_noise,
    reconstruction_error,
)
from samelib.metrics import auroc
from samelib.models.classifiers import Victim
from samelib.store import ArtifactError


def fitted(group, victim, store, seed=0, **changes):
    return fit_beside(SameDetector(replace(TINY_SAME, **changes), seed), group, victim, store)


def test_terms_by_hand():
    x, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    y[1] = 0.5
    assert reconstruction_error(x, y).tolist() == [0.0, 0.25]
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert deviation(p, q).tolist() == [2.0, 0.0]
    assert auxiliary_loss(p, torch.zeros(2, 2)) == pytest.approx(0.25)
    assert anomaly_score(torch.tensor(2.0), torch.tensor(10.0), 0.75) == 4.0


def test_masks_of_the_passes_are_fixed():
    assert torch.equal(pass_noise(16, 3, 0), pass_noise(16, 3, 0))
    assert not torch.equal(pass_noise(16, 3, 0), pass_noise(16, 3, 1))


def test_a_score_does_not_depend_on_its_batch(detector, group):
    x = group.benign_test.pixels()[:130].repeat(3, 1, 1, 1)[:300]
    whole = detector.score(x)
    spread = whole.std()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(whole)
    shuffled[order] = detector.score(x[order])
    ones = torch.cat([detector.score(i) for i in x[:40].split(1)])
    sevens = torch.cat([detector.score(i) for i in x[:70].split(7)])
    large = torch.cat([detector.score(i) for i in x.split(256)])
    for part in (shuffled, ones, sevens, large):  # bfloat16 products round differently in other batch shapes
        assert (part - whole[: len(part)]).abs().max() < 0.02 * spread


def test_answers_at_hand_are_not_asked_for_again(detector, group, victim):
    x = group.proxy.pixels()
    assert torch.equal(detector.score(x, victim(x)), detector.score(x))
    wrong = torch.full((len(x), 10), 0.1)
    assert not torch.equal(detector.score(x, wrong), detector.score(x))
    with pytest.raises(ValueError, match="200 images came with 150 answers"):
        detector.score(x, wrong[:150])


def test_alpha_and_scale(detector, group):
    terms = detector.terms(group.benign_test.pixels())
    assert torch.allclose(detector.combine(terms), detector.score(group.benign_test.pixels()))
    standard = (terms.reconstruction - detector.scale[0, 0]) / detector.scale[0, 1]
    assert torch.allclose(detector.combine(terms, 1.0), standard)
    first, second = detector.combine(terms, 1.0), detector.combine(terms, 0.0)
    assert torch.allclose(detector.combine(terms, 0.3), 0.3 * first + 0.7 * second, atol=1e-5)


def test_raw_scale_is_the_papers(group, victim, store):
    raw = fitted(group, victim, store, scale="raw", alpha=0.25)
    r, d = raw.terms(group.proxy.pixels())
    assert torch.allclose(raw.combine(Terms(r, d)), 0.25 * r + 0.75 * d)


def test_noise_is_caught(detector, group):
    noise = torch.randint(0, 256, (200, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    benign, malicious = detector.terms(group.benign_test.pixels()), detector.terms(noise)
    assert auroc(benign.reconstruction, malicious.reconstruction) > 0.99
    assert detector.flag(noise).float().mean() > 0.9


def test_calibration_keeps_its_promise(detector, group):
    assert detector.flag(group.benign_test.pixels()).float().mean() < 0.15  # 120 calibration images, 150 test images
    p = detector.p_value(group.benign_test.pixels())
    assert p.min() > 0 and p.max() <= 1 and abs(float(p.mean()) - 0.5) < 0.15


def test_float_and_uint8_queries_score_alike(detector, group):
    assert torch.allclose(detector.score(group.proxy.images[:9]), detector.score(group.proxy.pixels()[:9]))


def test_a_query_is_scored_as_the_victim_sees_it(group, detector):
    x = group.benign_test.pixels()[:8] * 0.5
    fine = x + 0.3 / 255  # vanishes by rounding
    coarse = group.benign_test.pixels()[:8] * 1.3
    assert torch.allclose(detector.score(x), detector.score(fine), atol=1e-4)
    with pytest.warns(UserWarning, match="clamped"):
        assert torch.allclose(detector.score(coarse), detector.score(coarse.clamp(-1, 1)))


def test_shared_trunk_adds_little_and_stays_the_victims(group, victim, store):
    before = [p.clone() for p in victim.model.parameters()]
    shared = fitted(group, victim, store, share_backbone=True)
    added = sum(p.numel() for p in shared.auxiliary.parameters())
    assert added == 2 * 512 + 512 * 10 + 10
    assert all(torch.equal(a, b) for a, b in zip(before, victim.model.parameters(), strict=True))
    black_box = Victim(victim.answer, victim.image_shape, victim.classes)
    with pytest.raises(ValueError, match="black-box victim has no trunk"):
        fitted(group, black_box, store, share_backbone=True)


def test_a_black_box_victim_is_enough(group, victim, store, detector):
    """A careless one at that: it tracks gradients and could not take the whole data set at once."""
    sizes = []

    def answer(x):
        sizes.append(len(x))
        return victim.model(x).softmax(1) + torch.zeros(1, requires_grad=True)

    black_box = Victim(answer, victim.image_shape, victim.classes)
    again = fitted(group, black_box, store)
    assert max(sizes) <= 512
    assert torch.equal(again.score(group.proxy.pixels()), detector.score(group.proxy.pixels()))


def test_save_and_load(tmp_path, detector, group, victim):
    folder = detector.save(tmp_path / "detector")
    loaded = SameDetector.load(folder)
    x = group.proxy.pixels()
    assert torch.equal(loaded.score(x), detector.score(x))
    assert torch.equal(loaded.p_value(x), detector.p_value(x))
    assert loaded.threshold == detector.threshold and loaded.settings == detector.settings
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "weights.safetensors"]
    with pytest.raises(FileExistsError, match="choose another name"):
        detector.save(folder)
    with pytest.raises(ValueError, match="has 3 classes, the detector 10"):
        SameDetector.load(folder, Victim(victim.answer, victim.image_shape, 3))
    with pytest.raises(ValueError, match=r"takes images \(3, 32, 32\)"):
        SameDetector.load(folder, Victim(victim.answer, (3, 32, 32), 10))


def test_a_folder_without_victim_asks_for_one(tmp_path, group, victim, store):
    black_box = Victim(victim.answer, victim.image_shape, victim.classes)
    folder = fitted(group, black_box, store).save(tmp_path / "detector")
    with pytest.raises(ValueError, match="saved without its victim"):
        SameDetector.load(folder)
    assert SameDetector.load(folder, black_box).score(group.proxy.pixels()).shape == (200,)


def test_a_changed_byte_or_version_is_refused(tmp_path, detector):
    folder = detector.save(tmp_path / "detector")
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="weights.safetensors is damaged"):
        SameDetector.load(folder)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"fpr": 0.5}))
    with pytest.raises(ArtifactError, match="card.json is damaged"):
        SameDetector.load(folder)
    (folder / "card.json").write_text(json.dumps(card | {"format": 0}))
    with pytest.raises(ArtifactError, match="format version 0"):
        SameDetector.load(folder)
    with pytest.raises(ArtifactError, match="no readable card.json"):
        SameDetector.load(tmp_path / "nowhere")


def test_an_unfitted_detector_says_so(images):
    detector = SameDetector(TINY_SAME)
    for call in (detector.score, detector.terms, detector.p_value, detector.flag):
        with pytest.raises(NotFittedError):
            call(images)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 1.1}, "alpha must be between 0 and 1"),
        ({"alpha": -0.1}, "alpha must be between 0 and 1"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"scale": "log"}, "raw or standardised"),
        ({"passes": 0}, "at least 1"),
        ({"mask_ratio": 0.0, "passes": 2}, "use passes=1"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY_SAME, **changes)


def test_bad_queries_are_refused(detector, images):
    for bad, words in ((images * float("nan"), "NaN"), (images[:, :, 1:], "shape"), (images[:0], "empty")):
        with pytest.raises(ValueError, match=words):
            detector.score(bad)
    with pytest.raises(ValueError, match="alpha"):
        detector.combine(detector.terms(images), 2.0)


def test_the_adapter_takes_a_real_detector(detector, group):
    rows = group.calibration.pixels().flatten(1).numpy()
    estimator = DetectorEstimator(detector, group.image_shape, fpr=0.1).fit(rows)
    flagged = (estimator.predict(rows) == -1).mean()
    assert 0.05 <= flagged <= 0.1
