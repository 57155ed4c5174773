import math
from dataclasses import replace

import pytest
import torch
from conftest import fit_exposed

from samelib.data.image_set import ImageSet
from samelib.data.synthetic import glyphs
from samelib.detectors.base import NotFittedError
from samelib.detectors.outlier_exposure import OutlierExposure, outlier_exposure_loss
from samelib.metrics import accuracy, auroc
from samelib.training import TrainSettings

TRAIN = TrainSettings(8, 32, 1e-3)


@pytest.fixture(scope="module")
def exposed(group, store):
    return fit_exposed(OutlierExposure("conv3", TRAIN), group, store)


def unseen(group) -> ImageSet:
    """Outliers of the kind, but none of those that were trained on."""
    images = glyphs("outliers", 300)[100:]
    known = {i.numpy().tobytes() for i in group.outliers.images}
    assert not known & {i.numpy().tobytes() for i in images.images}
    return images


def test_the_loss_by_hand():
    known, targets = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    uniform, sure = torch.tensor([[3.0, 3.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert outlier_exposure_loss(known, targets, uniform, 2.0) == pytest.approx(3 * math.log(2))
    # logsumexp = log 4, mean = (log 3) / 2
    assert outlier_exposure_loss(known, targets, sure, 0.5) == pytest.approx(
        math.log(2) + 0.5 * (math.log(4) - math.log(3) / 2)
    )
    assert outlier_exposure_loss(known, targets, sure, 0.0) == pytest.approx(math.log(2))
    both = torch.cat([uniform, sure])  # outliers are averaged, not summed
    halves = (outlier_exposure_loss(known, targets, z, 1.0) for z in (uniform, sure))
    assert outlier_exposure_loss(known, targets, both, 1.0) == pytest.approx(sum(float(h) for h in halves) / 2)


def test_it_separates_outliers_like_those_it_saw(exposed, group):
    benign = group.benign_test
    assert accuracy(exposed.victim(benign.pixels()), benign.labels) > 0.8
    assert auroc(exposed.score(benign.pixels()), exposed.score(unseen(group).pixels())) > 0.85


def test_the_weight_is_what_does_it(exposed, group, store):
    plain = fit_exposed(OutlierExposure("conv3", TRAIN, weight=0.0), group, store)
    largest = [d.victim(unseen(group).pixels()).max(1).values.mean() for d in (exposed, plain)]
    assert largest[0] < largest[1] - 0.2


def test_the_score_is_what_its_own_victim_leaves_to_the_other_classes(exposed, group):
    x = group.proxy.pixels()
    answers = exposed.victim(x)
    assert torch.allclose(exposed.score(x), 1 - answers.max(1).values, atol=1e-6)
    assert exposed.score(x[:2], torch.tensor([[1.0, 1e-9, 2e-9], [1.0, 0, 0]])).tolist() == pytest.approx([3e-9, 0])
    assert torch.equal(exposed.score(x, answers), exposed.score(x))
    assert torch.equal(exposed.score(group.proxy.images), exposed.score(x))
    assert torch.allclose(exposed.score(x, torch.full((200, 10), 0.1)), torch.full((200,), 0.9))
    with pytest.raises(ValueError, match="200 images came with 150 answers"):
        exposed.score(x, answers[:150])


def test_a_score_does_not_depend_on_its_batch(exposed, group):
    x = group.benign_test.pixels()
    whole = exposed.score(x)
    assert torch.allclose(torch.cat([exposed.score(i) for i in x[:40].split(1)]), whole[:40], atol=1e-5)
    assert torch.allclose(exposed.score(x.flip(0)).flip(0), whole, atol=1e-5)


def test_it_is_calibrated(exposed, group):
    assert len(exposed.calibration_scores) == 240 and exposed.fpr == 0.05
    assert exposed.flag(group.calibration.pixels()).float().mean() <= 0.05
    assert exposed.flag(group.benign_test.pixels()).float().mean() < 0.15


def test_a_second_fit_trains_nothing(exposed, group, store, monkeypatch):
    monkeypatch.setattr("samelib.detectors.outlier_exposure.train", None)
    again = fit_exposed(OutlierExposure("conv3", TRAIN), group, store)
    assert torch.equal(again.score(group.proxy.pixels()), exposed.score(group.proxy.pixels()))
    assert again.cards["victim"] == exposed.cards["victim"]
    assert again.cards["victim"]["seconds"] > 0 and len(again.cards["victim"]["losses"]) == 8


def test_everything_that_decides_the_weights_names_them(group, store):
    tiny, group = TrainSettings(1, 32, 1e-3), replace(group, victim_train=group.victim_train[:64])
    fewer = replace(group, outliers=group.outliers[:50])
    variants = [
        fit_exposed(OutlierExposure("conv3", tiny), group, store),
        fit_exposed(OutlierExposure("conv3", tiny, 1), group, store),
        fit_exposed(OutlierExposure("conv3", tiny, augment=True), group, store),
        fit_exposed(OutlierExposure("conv3", tiny, weight=1.0), group, store),
        fit_exposed(OutlierExposure("conv3", tiny), fewer, store),
        fit_exposed(OutlierExposure("conv3", replace(tiny, lr=2e-3)), group, store),
    ]
    assert len({d.cards["victim"]["sha256"] for d in variants}) == len(variants)


def test_training_goes_on_from_its_checkpoint(group, store, tmp_path, monkeypatch):
    """Killed after its first epoch, it ends in the weights of an undisturbed run and reruns no epoch."""
    from samelib.store import ArtifactStore
    from samelib.training import train

    def interrupted(*args, checkpoint, **how):
        def stop(done, model, loss):
            if done == 2:
                raise KeyboardInterrupt

        return train(*args, checkpoint=checkpoint, checkpoint_every=0, on_epoch=stop, **how)

    seen = []
    settings, other = TrainSettings(3, 64, 1e-3), ArtifactStore(tmp_path / "store")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("samelib.detectors.outlier_exposure.train", interrupted)
        fit_exposed(OutlierExposure("conv3", settings), group, other)
    with monkeypatch.context() as patch:
        watched = lambda *args, **how: train(*args, on_epoch=lambda done, *_: seen.append(done), **how)  # noqa: E731
        patch.setattr("samelib.detectors.outlier_exposure.train", watched)
        resumed = fit_exposed(OutlierExposure("conv3", settings), group, other)
    assert seen == [2, 3]  # the checkpoint is of the first epoch: the second was cut before it was written
    whole = fit_exposed(OutlierExposure("conv3", settings), group, store)
    assert resumed.cards["victim"]["sha256"] == whole.cards["victim"]["sha256"]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_cannot_be_is_refused(weight):
    with pytest.raises(ValueError, match="weight must be a finite number, 0 or more"):
        OutlierExposure("conv3", TRAIN, weight=weight)


def test_an_outlier_set_is_needed(group, store, images):
    with pytest.raises(ValueError, match="these baselines need an outlier set"):
        fit_exposed(OutlierExposure("conv3", TRAIN), replace(group, outliers=group.outliers[:0]), store)
    other = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), ("a",), "colour")
    with pytest.raises(ValueError, match=r"the outliers are images \(3, 32, 32\)"):
        fit_exposed(OutlierExposure("conv3", TRAIN), replace(group, outliers=other), store)
    with pytest.raises(ValueError, match="benign images for the threshold"):
        OutlierExposure("conv3", TRAIN).fit(group.victim_train, group.outliers, group.calibration, fpr=0.001)


def test_an_unfitted_one_says_so(images):
    detector = OutlierExposure("conv3", TRAIN)
    for call in (detector.score, detector.p_value, detector.flag):
        with pytest.raises(NotFittedError):
            call(images)


def test_bad_queries_are_refused(exposed, images):
    for bad, words in ((images * float("nan"), "NaN"), (images[:, :, 1:], "shape"), (images[:0], "empty")):
        with pytest.raises(ValueError, match=words):
            exposed.score(bad)
