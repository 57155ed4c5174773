"""Controls: statistics by hand, the sides, and the rate that they promise."""

import math

import pytest
import torch

from samelib.data.image_set import ImageSet
from samelib.data.synthetic import glyphs
from samelib.detectors.base import NotFittedError
from samelib.detectors.controls import (
    COMPONENTS,
    CONTROLS,
    SIDES,
    STATISTICS,
    Control,
    largest_difference,
    log_distance,
    log_variance,
    pca_error,
    squared_laplacian,
)
from samelib.detectors.power import altered

# Statistics


def test_largest_difference_by_hand():
    flat = torch.ones(1, 4, 3)
    down = torch.zeros(1, 4, 3)
    down[0, 2, 1] = -0.75  # a lone pixel: 0.75 from each of its neighbours
    across = torch.tensor([-1.0, -0.5, 0.5]).expand(1, 4, 3)
    assert largest_difference(torch.stack([flat, down, across])).tolist() == [0.0, 0.75, 1.0]
    assert largest_difference(torch.stack([torch.cat([flat, down, across])])).tolist() == [1.0], "of all channels"


def test_squared_laplacian_by_hand():
    x = torch.zeros(3, 1, 4, 3)  # two inner pixels
    x[0, 0, 1, 1] = 0.5  # -4 * 0.5 there, and 0.5 for the one below
    x[1, 0, 0, 0] = 1.0  # a corner is nobody's neighbour
    x[2] = torch.tensor([-0.5, 0.0, 0.5])  # a ramp has no curvature
    assert squared_laplacian(x).tolist() == [(4 + 0.25) / 2, 0.0, 0.0]


def test_log_variance_by_hand():
    x = torch.full((1, 1, 4, 4), 0.25)
    x[0, 0, :2, 2:] = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    expected = torch.tensor([[1e-7, 0.25, 1e-7, 1e-7]]).log()  # the floor stands for nothing at all
    assert torch.allclose(log_variance(x, 2), expected)


def test_log_distance_by_hand():
    mean = torch.full((1, 2, 4), -1.0)
    x = torch.full((1, 1, 2, 4), -1.0)
    x[0, 0, 0, 2] = 1.0  # 2 away from the mean, one pixel of four
    assert torch.allclose(log_distance(x, mean, 2), torch.tensor([[1e-7, 1.0]]).log())


def test_pca_error_by_hand():
    components = torch.eye(4)[:2]
    x = torch.tensor([[[[0.5, 1.0], [0.0, 0.0]]], [[[0.5, 1.0], [0.4, -0.2]]]])
    assert pca_error(x, torch.zeros(4), components).tolist() == pytest.approx([0.0, (0.16 + 0.04) / 4])


# Detectors


@pytest.fixture(scope="module")
def benign():
    """Training, calibration and test images."""
    return glyphs("victim", 2400, seed=5).split(400, 1000, 1000)


@pytest.fixture(scope="module")
def fitted(benign, victim):
    images, calibration, _ = benign
    return {name: Control(*how).fit(images, calibration, victim) for name, how in CONTROLS.items()}


@pytest.mark.parametrize("name", CONTROLS)
def test_five_percent_means_five_percent(name, fitted, benign):
    flagged = fitted[name].flag(benign[2].images).double().mean()
    noise = math.sqrt(0.05 * 0.95 * (1 / 500 + 1 / 1000))  # of the threshold, and of the test
    assert abs(flagged - 0.05) < 3 * noise


def test_pca_finds_the_directions_in_which_images_vary(group, victim):
    """Nothing but 20 pixels of training images varies, so what happens elsewhere is all error."""
    x = torch.full((300, 1, 28, 28), 100, dtype=torch.uint8)
    x[:, 0, 0, :COMPONENTS] = torch.randint(0, 256, (300, COMPONENTS), generator=torch.Generator().manual_seed(0))
    images = ImageSet(x, torch.zeros(300, dtype=torch.int64), ("none",), "twenty pixels")
    pca = Control("pca", "high").fit(images[:100], images[100:], victim)
    query = x[:1].clone()
    query[0, 0, 9, 9] = 151  # 0.4 brighter
    assert pca.score(x).max() < 1e-8
    assert float(pca.score(query)) == pytest.approx(0.16 / 784, rel=1e-4)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_sides(statistic, fitted, benign):
    high, low, both = (fitted[f"{statistic}-{side}"].score(benign[2].images) for side in SIDES)
    assert torch.equal(high, -low)
    assert both.min() >= 0 and both.max() <= 0.5
    order = high.sort().indices
    ranked = both[order]
    lowest = int(ranked.argmin())  # from there the score rises in both directions
    assert (ranked[: lowest + 1].diff() <= 0).all() and (ranked[lowest:].diff() >= 0).all()


@pytest.mark.parametrize(("version", "seen_by", "missed_by"), [("blurred", "low", "high"), ("noise", "high", "low")])
def test_a_side_sees_what_lies_there(version, seen_by, missed_by, fitted, benign):
    x = altered(benign[2].images[:200], version)
    shares = {side: float(fitted[f"laplacian-{side}"].flag(x).double().mean()) for side in SIDES}
    assert shares[seen_by] > 0.95 and shares["both"] > 0.95 and shares[missed_by] < 0.01


def test_ties_share_the_middle_of_their_ranks(group, victim):
    """All benign images have one value: a query with the same is in the middle, any other at an end."""
    same = group.calibration[torch.zeros(240, dtype=torch.int64)]
    control = Control("laplacian", "both").fit(group.victim_train, same, victim)
    assert control.score(torch.cat([same.images[:1], group.proxy.images[:3]])).tolist() == [0.0, 0.5, 0.5, 0.5]


def test_the_profile_goes_by_the_class_that_is_answered(fitted, benign, victim):
    x = benign[2].images[:300]
    answers, control = victim(benign[2].pixels(slice(300))), fitted["local-variance-high"]
    wrong = control.score(x, answers.roll(1, dims=1))
    assert torch.equal(control.score(x, answers), control.score(x))
    assert (wrong > control.score(x)).double().mean() > 0.8, "digits of another class look otherwise"
    assert torch.equal(fitted["laplacian-high"].score(x, answers.roll(1, dims=1)), fitted["laplacian-high"].score(x))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_score_does_not_depend_on_its_batch(name, fitted, benign):
    x = benign[2].images[:300]
    whole = fitted[name].score(x)
    assert whole.shape == (300,) and whole.dtype == torch.float64
    one_rank = 1 / 500
    tolerance = 1.01 * one_rank if name.endswith("both") else 1e-4 * float(whole.std())
    assert torch.allclose(torch.cat([fitted[name].score(i) for i in x[:20].split(1)]), whole[:20], atol=tolerance)


def test_colour_will_do():
    """A black-box victim of colour images."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8, generator=rng)
    images = ImageSet(x, torch.arange(400) % 2, ("a", "b"), "noise")
    for statistic in STATISTICS:
        control = Control(statistic).fit(images[:100], images[100:], lambda x: x.mean((2, 3)).softmax(1))
        assert control.flag(altered(x[:50], "black")).all()


# Bad use


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="statistic must be one of largest-difference, .*, pca, got 'entropy'"):
        Control("entropy")
    with pytest.raises(ValueError, match="side must be one of high, low, both, got 'left'"):
        Control("pca", "left")


@pytest.mark.parametrize("statistic", STATISTICS)
def test_before_fit_it_says_so(statistic, images):
    with pytest.raises(NotFittedError, match="call fit first"):
        Control(statistic).score(images)


def test_too_few_or_unlike_images_are_named(group, victim):
    train, calibration = group.victim_train, group.calibration
    with pytest.raises(ValueError, match="needs 100 calibration images or more, got 99"):
        Control("laplacian").fit(train, calibration[:99], victim)
    with pytest.raises(ValueError, match="needs 999 benign images for the threshold, got 120"):
        Control("laplacian").fit(train, calibration, victim, fpr=0.001)
    with pytest.raises(ValueError, match="pca needs at least 20 training images of as many pixels, got 19 of 784"):
        Control("pca").fit(train[:19], calibration, victim)
    small = ImageSet(calibration.images[..., :23, :23], calibration.labels, calibration.classes, "small")
    with pytest.raises(ValueError, match=r"training images are \(1, 28, 28\), calibration \(1, 23, 23\)"):
        Control("laplacian").fit(train, small, victim)
    with pytest.raises(ValueError, match="23 x 23 pixels cannot be cut into about 7 x 7 square patches"):
        Control("local-variance").fit(small, small, lambda x: torch.full((len(x), 2), 0.5))
    with pytest.raises(ValueError, match="the victim takes images"):
        Control("laplacian").fit(small, small, victim)
