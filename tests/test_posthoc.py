import sys
from dataclasses import replace

import pytest
import torch
from conftest import fit_beside
from torch import nn

from samelib.detectors.base import NotFittedError
from samelib.detectors.edm import Ensemble
from samelib.detectors.posthoc import METHODS, PostHoc
from samelib.metrics import auroc
from samelib.models.classifiers import Victim

pytest.importorskip("pytorch_ood")


class Quadrants(nn.Module):
    """A victim that can be checked by hand: two pixels are its features, its logits are ten times these."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        self.trunk[1].weight.data = torch.eye(2, 4)
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = 10 * torch.eye(2)

    def forward(self, x):
        return self.head(self.trunk(x))


def points(*pairs) -> torch.Tensor:
    return torch.tensor([[[[a, b], [0.0, 0.0]]] for a, b in pairs])


@pytest.fixture(scope="module")
def plane(group):
    """A group of 2 x 2 pictures, class 0 around (0.6, -0.2) and class 1 around (-0.2, 0.6); and its victim."""
    generator = torch.Generator().manual_seed(0)

    def drawn(n):
        labels = torch.arange(n) % 2
        x = torch.tensor([[0.6, -0.2], [-0.2, 0.6]])[labels] + 0.05 * torch.randn(n, 2, generator=generator)
        pixels = torch.cat([x, torch.zeros(n, 2)], 1).view(n, 1, 2, 2)
        images = ((pixels + 1) * 127.5).round().byte()
        return replace(group.victim_train, images=images, labels=labels, classes=("right", "up"))

    small = {name: drawn(200) for name in ("victim_train", "calibration", "benign_test")}
    return replace(group, **small), Victim.of(Quadrants(), (1, 2, 2), 2)


@pytest.fixture(scope="module")
def fitted(group, victim):
    return {method: fit_beside(PostHoc(method), group, victim) for method in METHODS}


def test_max_softmax_and_energy_by_hand(plane):
    x = points((0.6, -0.2), (0.2, 0.2), (0.0, 0.0))
    seen = ((x + 1) * 127.5).round() / 127.5 - 1  # the 8-bit grid
    logits = 10 * seen[:, 0, 0].double()
    assert torch.allclose(
        fit_beside(PostHoc("max-softmax"), *plane).score(x), -logits.softmax(1).max(1).values, atol=1e-5
    )
    assert torch.allclose(fit_beside(PostHoc("energy"), *plane).score(x), -logits.logsumexp(1), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "normal", "strange"),
    [
        ("max-softmax", (0.6, -0.2), (0.2, 0.2)),  # sure, undecided
        ("energy", (0.6, -0.2), (-0.6, -0.6)),  # large logits, small ones
        ("mahalanobis", (0.6, -0.2), (0.6, 0.6)),  # in a cloud, far from both
        ("knn", (0.6, -0.2), (-0.6, -0.6)),  # by direction: a class's, nobody's
    ],
)
def test_higher_is_more_suspicious(plane, method, normal, strange):
    detector = fit_beside(PostHoc(method), *plane)
    low, high = detector.score(points(normal, strange)).tolist()
    assert high > low
    assert low <= detector.threshold
    if method != "max-softmax":  # the victim is so sure of its own images that 8 bits leave nothing between
        assert detector.flag(points(normal, strange)).tolist() == [False, True]


def test_mahalanobis_by_hand(plane):
    """Half the squared distance to the nearest mean under the summed outer products, the library's scale."""
    group, victim = plane
    z, labels = group.victim_train.pixels().flatten(1)[:, :2].double(), group.victim_train.labels
    means = torch.stack([z[labels == c].mean(0) for c in (0, 1)])
    centred = z - means[labels]
    precision = torch.linalg.inv(centred.T @ centred + 1e-6 * torch.eye(2))
    gap = group.benign_test.pixels().flatten(1)[:, None, :2].double() - means
    expected = 0.5 * torch.einsum("ncd,de,nce->nc", gap, precision, gap).min(1).values
    found = fit_beside(PostHoc("mahalanobis"), group, victim).score(group.benign_test.images)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert torch.get_default_dtype() == torch.float32


def test_knn_by_hand(plane):
    group, victim = plane
    train, x = (nn.functional.normalize(s.pixels().flatten(1)[:, :2]) for s in (group.victim_train, group.benign_test))
    expected = torch.cdist(x, train).sort(1).values[:, 49].double()
    assert torch.allclose(
        fit_beside(PostHoc("knn"), group, victim).score(group.benign_test.images), expected, atol=1e-5
    )


def test_labels_with_gaps_will_do(plane):
    group, victim = plane
    gapped = replace(group.victim_train, labels=group.victim_train.labels * 4 + 3, classes=tuple("abcdefgh"))
    wide = Victim(victim.answer, victim.image_shape, 8, victim.model)
    x = points((0.6, -0.2), (0.3, 0.3))
    found = fit_beside(PostHoc("mahalanobis"), replace(group, victim_train=gapped), wide).score(x)
    assert torch.equal(found, fit_beside(PostHoc("mahalanobis"), group, victim).score(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_score_does_not_depend_on_its_batch(fitted, group, method):
    x = group.benign_test.pixels().repeat(2, 1, 1, 1)
    whole, tolerance = fitted[method].score(x), 1e-4 * float(fitted[method].score(x).std())
    assert whole.shape == (300,) and whole.dtype == torch.float64 and not whole.requires_grad
    assert torch.allclose(torch.cat([fitted[method].score(i) for i in x[:20].split(1)]), whole[:20], atol=tolerance)
    assert torch.allclose(fitted[method].score(x.flip(0)).flip(0), whole, atol=tolerance)
    assert torch.equal(fitted[method].score(x, torch.full((300, 10), 0.1)), whole)


def test_mahalanobis_sees_noise(fitted, group):
    noise = torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert auroc(*(fitted["mahalanobis"].score(x) for x in (group.benign_test.images, noise))) > 0.99


def test_the_victim_must_show_its_inside(group, victim, store):
    black_box = Victim(victim.answer, victim.image_shape, victim.classes)
    for method in METHODS:
        with pytest.raises(ValueError, match="this victim is a black box"):
            fit_beside(PostHoc(method), group, black_box)
    ensemble = Ensemble("conv3", group.image_shape, 10, 2)
    answering = Victim(ensemble.answer, group.image_shape, 10, ensemble)
    with pytest.raises(ValueError, match="features of victim.model.trunk"):
        fit_beside(PostHoc("knn"), group, answering)
    with pytest.raises(ValueError, match="need one row an image"):
        fit_beside(PostHoc("energy"), group, answering)
    with pytest.raises(ValueError, match="the victim has 3 classes"):
        fit_beside(PostHoc("energy"), group, Victim(victim.answer, victim.image_shape, 3, victim.model))
    with pytest.raises(ValueError, match="at least 50 training images, got 20"):
        fit_beside(PostHoc("knn"), replace(group, victim_train=group.victim_train[:20]), victim)


def test_bad_use_is_refused(fitted, images):
    with pytest.raises(ValueError, match="method must be one of max-softmax, energy, mahalanobis, knn, got 'odin'"):
        PostHoc("odin")
    for method in METHODS:
        with pytest.raises(NotFittedError):
            PostHoc(method).score(images)
        with pytest.raises(ValueError, match="NaN"):
            fitted[method].score(images * float("nan"))


def test_without_pytorch_ood_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    monkeypatch.setitem(sys.modules, "pytorch_ood.detector", None)
    with pytest.raises(ImportError, match="pip install pytorch-ood"):
        PostHoc("energy")
