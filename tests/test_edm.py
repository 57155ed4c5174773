import math
from dataclasses import replace

import pytest
import torch
from conftest import fit_exposed

from samelib.data.image_set import to_uint8
from samelib.data.synthetic import glyphs
from samelib.detectors.base import NotFittedError
from samelib.detectors.edm import (
    CONSENSUS,
    EDM,
    Ensemble,
    consensus,
    diversity_loss,
    half_perturbed,
    pairwise_cosines,
    perturbed,
    pick_models,
)
from samelib.gateway import QueryGateway
from samelib.metrics import accuracy, auroc
from samelib.models.classifiers import predict
from samelib.training import TrainSettings

TRAIN = TrainSettings(5, 32, 1e-3)
TINY = TrainSettings(1, 32, 1e-3)


@pytest.fixture(scope="module")
def edm(group, store) -> EDM:
    return fit_exposed(EDM("conv3", TRAIN, models=3), group, store)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_consensus_by_hand():
    """Three models, two images: on the first two models agree and one is alone, on the second all are alike."""
    sure, other = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    p = torch.tensor([[sure, [0.5, 0.25, 0.25]], [sure, [0.5, 0.25, 0.25]], [other, [0.5, 0.25, 0.25]]])
    assert torch.allclose(pairwise_cosines(p)[:, 0], torch.tensor([1.0, 0.0, 0.0]))
    found = consensus(p)
    assert tuple(found) == CONSENSUS == ("mean cosine", "max cosine", "vote entropy")
    assert found["mean cosine"].tolist() == pytest.approx([2 / 3, 0], abs=1e-6)
    assert found["max cosine"].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert found["vote entropy"].tolist() == pytest.approx([math.log(3) - 2 / 3 * math.log(2), 0], abs=1e-6)


def test_five_votes_that_all_differ():
    votes = consensus(torch.eye(5)[:, None])
    assert votes["vote entropy"].item() == pytest.approx(math.log(5))
    assert votes["mean cosine"].item() == votes["max cosine"].item() == 1


def test_diversity_loss_by_hand():
    alike = torch.tensor([0.6, 0.4]).expand(4, 3, 2)  # 6 pairs of cosine 1
    assert diversity_loss(alike) == pytest.approx(math.log(6 * math.e))
    apart = torch.eye(2)[:, None]
    assert diversity_loss(apart) == pytest.approx(0)
    both = torch.cat([apart, torch.tensor([0.6, 0.4]).expand(2, 1, 2)], 1)
    assert diversity_loss(both) == pytest.approx(0.5)  # the mean of 0 and 1 over the images


def test_diversity_loss_pushes_predictions_apart():
    logits = torch.randn(3, 4, 5, generator=generator(), requires_grad=True)
    optimiser = torch.optim.Adam([logits], 0.1)
    for _ in range(200):
        optimiser.zero_grad()
        diversity_loss(logits.softmax(-1)).backward()
        optimiser.step()
    assert pairwise_cosines(logits.softmax(-1)).max() < 0.05


def test_perturbed_images_differ_from_theirs_and_each_other():
    x = glyphs("outliers", 6).pixels()
    one = perturbed(x, generator())
    assert one.shape == x.shape and one.min() >= -1 and one.max() <= 1 and torch.isfinite(one).all()
    assert torch.equal(one, perturbed(x, generator()))
    assert not torch.equal(one, perturbed(x, generator(1)))
    same = perturbed(x[:1].expand(6, -1, -1, -1), generator())
    difference = (same[:, None] - same[None]).abs().flatten(2).mean(2) + torch.eye(6)
    assert difference.min() > 0.02


def test_perturbing_moves_the_picture():
    """A bright spot off the centre is found elsewhere, by at most the distance that turn, scale and shift allow."""
    x = torch.full((200, 1, 29, 29), -1.0)
    x[:, :, 5:8, 13:16] = 1.0  # 8 pixels above the centre
    moved = perturbed(x, generator()).flatten(1) + 1
    rows, columns = torch.meshgrid(torch.arange(29.0), torch.arange(29.0), indexing="ij")
    weight = (moved - moved.median(1, keepdim=True).values).clamp_min(0) ** 4
    centre = torch.stack([(weight * place.flatten()).sum(1) / weight.sum(1) for place in (rows, columns)])
    reach = (centre - torch.tensor([[6.0], [14.0]])).norm(dim=0)
    assert reach.median() > 2 and (reach < 15).all()
    assert centre[1].min() < 11 and centre[1].max() > 17


def test_the_pick_is_stable_even_and_blind_to_the_batch():
    images = torch.randint(0, 256, (3000, 1, 8, 8), dtype=torch.uint8, generator=generator())
    picks = pick_models(images, 5)
    assert picks.dtype == torch.int64 and picks.shape == (3000,)
    assert picks.bincount(minlength=5).sub(600).abs().max() < 100  # 4.6 standard deviations
    assert torch.equal(torch.cat([pick_models(part, 5) for part in images.split(7)]), picks)
    assert torch.equal(pick_models(images.flip(0), 5).flip(0), picks)
    nearly = images.clone()
    nearly[:, 0, 0, 0] ^= 1
    assert abs((pick_models(nearly, 5) == picks).float().mean() - 0.2) < 0.05
    assert pick_models(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), 5).tolist() == [1, 1, 0, 2]
    with pytest.raises(TypeError, match="8-bit images"):
        pick_models(images.float(), 5)


def test_each_query_is_answered_by_the_model_it_picks(edm, group):
    x = group.proxy.pixels()
    answers, members = edm.victim(x), edm.victim.model.members
    picks = pick_models(group.proxy.images, 3)
    assert len(picks.unique()) == 3
    for i, member in enumerate(members):
        assert torch.allclose(answers[picks == i], predict(member, x)[picks == i], atol=1e-5)
    assert torch.allclose(torch.cat([edm.victim(part) for part in x.split(1)]), answers, atol=1e-5)
    fine = (x * 0.9 + 0.2 / 255).clamp(-1, 1)  # off the grid: hashed and answered as it is received
    assert torch.equal(edm.victim(fine), edm.victim((to_uint8(fine) / 127.5) - 1))
    assert torch.equal(QueryGateway(edm.victim).query(x), answers)


def test_it_separates_outliers_like_those_it_saw(edm, group):
    benign = group.benign_test
    assert accuracy(edm.victim(benign.pixels()), benign.labels) > 0.6
    low, high = (edm.consensus_scores(x.pixels()) for x in (benign, glyphs("outliers", 300)[100:]))
    assert auroc(low["mean cosine"], high["mean cosine"]) > 0.9
    assert auroc(low["max cosine"], high["max cosine"]) > 0.9
    assert auroc(low["vote entropy"], high["vote entropy"]) > 0.8


def test_the_whole_loss_by_hand(group):
    """Mean cross-entropy of the members on the first half, gamma times the diversity loss on the second."""
    x, labels = torch.cat([group.victim_train.pixels()[:6], group.outliers.pixels()[:6]]), group.victim_train.labels[:6]
    ensemble = Ensemble("conv3", group.image_shape, 10, 3)
    errors = [torch.nn.functional.cross_entropy(m(x[:6]), labels) for m in ensemble.members]
    diversity = diversity_loss(torch.stack([m(x[6:]).softmax(1) for m in ensemble.members]))
    for gamma in (0.0, 2.0):
        found = EDM("conv3", TRAIN, models=3, gamma=gamma)._loss(ensemble, x, labels, generator())
        assert torch.allclose(found, sum(errors) / 3 + gamma * diversity, atol=1e-5)


def test_half_of_the_outliers_are_perturbed(group):
    x = group.outliers.pixels()[:10]
    seen = half_perturbed(x, generator())
    assert torch.equal(seen[:5], x[:5])
    assert (seen[5:] - x[5:]).abs().flatten(1).mean(1).min() > 0.02


def test_members_that_are_sure_and_nearly_agree_do_not_tie():
    """1 - cos of the first pair is about 1e-18: in 64 bits it would be 0, like that of the second."""
    pair = torch.tensor([[[1.0, 1e-9, 0]], [[1.0, 0, 1e-9]]])
    assert consensus(pair)["mean cosine"].item() == pytest.approx(1e-18, rel=1e-6)
    assert consensus(pair[[0, 0]])["mean cosine"].item() == 0


def test_the_score_is_the_chosen_consensus(edm, group):
    x = group.proxy.pixels()
    scores = edm.consensus_scores(x)
    for name in CONSENSUS:
        chosen = EDM("conv3", TRAIN, models=3, consensus=name)
        chosen.victim, chosen.image_shape = edm.victim, edm.image_shape
        assert torch.equal(chosen.score(x), scores[name])
        assert torch.equal(chosen.score(x, edm.victim(x)), scores[name])
    by_hand = consensus(torch.stack([predict(m, x) for m in edm.victim.model.members]))
    assert all(torch.allclose(by_hand[name], scores[name], atol=1e-5) for name in CONSENSUS)


def test_a_score_does_not_depend_on_its_batch(edm, group):
    x = group.benign_test.pixels().repeat(2, 1, 1, 1)
    whole = edm.score(x)
    assert torch.allclose(torch.cat([edm.score(i) for i in x[:40].split(1)]), whole[:40], atol=1e-5)
    assert torch.allclose(edm.score(x.flip(0)).flip(0), whole, atol=1e-5)


def test_a_second_fit_trains_nothing(edm, group, store, monkeypatch):
    monkeypatch.setattr("samelib.detectors.outlier_exposure.train", None)
    again = fit_exposed(EDM("conv3", TRAIN, models=3), group, store)
    assert again.cards["victim"] == edm.cards["victim"] and again.cards["victim"]["seconds"] > 0
    assert again.victim.fingerprint == edm.victim.fingerprint is not None
    assert torch.equal(again.p_value(group.proxy.pixels()), edm.p_value(group.proxy.pixels()))


def test_everything_that_decides_the_weights_names_them(group, store):
    group = replace(group, victim_train=group.victim_train[:64])
    fewer = replace(group, outliers=group.outliers[:50])
    variants = [
        fit_exposed(EDM("conv3", TINY, models=2), group, store),
        fit_exposed(EDM("conv3", TINY, 1, models=2), group, store),
        fit_exposed(EDM("conv3", TINY, models=2, gamma=0.5), group, store),
        fit_exposed(EDM("conv3", TINY, models=3), group, store),
        fit_exposed(EDM("conv3", TINY, models=2, augment=True), group, store),
        fit_exposed(EDM("conv3", TINY, models=2), fewer, store),
    ]
    assert len({d.victim.fingerprint for d in variants}) == len(variants)


def test_the_members_begin_apart(group):
    members = Ensemble("conv3", group.image_shape, 10, 2).members
    assert not torch.equal(members[0].head.weight, members[1].head.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": 1}, "models must be at least 2"),
        ({"gamma": -1.0}, "gamma must be a finite number, 0 or more"),
        ({"gamma": float("nan")}, "gamma must be a finite number"),
        ({"consensus": "median"}, "consensus must be one of mean cosine, max cosine, vote entropy, got 'median'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        EDM("conv3", TRAIN, **options)


def test_an_outlier_set_is_needed(group, store):
    with pytest.raises(ValueError, match="these baselines need an outlier set"):
        fit_exposed(EDM("conv3", TRAIN), replace(group, outliers=group.outliers[:0]), store)


def test_an_unfitted_one_says_so(images):
    detector = EDM("conv3", TRAIN)
    for call in (detector.score, detector.consensus_scores, detector.p_value, detector.flag):
        with pytest.raises(NotFittedError):
            call(images)


def test_bad_queries_are_refused(edm, images):
    for bad, words in ((images * float("nan"), "NaN"), (images[:, :, 1:], "shape"), (images[:0], "empty")):
        with pytest.raises(ValueError, match=words):
            edm.score(bad)
