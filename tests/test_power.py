"""Altered images by hand, the shares that are flagged of them, and what `fit` makes of these."""

import copy
import warnings

import pytest
import torch

from samelib.data.image_set import to_uint8
from samelib.detectors.base import Detector, NotFittedError
from samelib.detectors.power import VERSIONS, WeakDetectorWarning, altered, power, power_table
from samelib.detectors.same import SameDetector
from samelib.store import load_folder, save_folder

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 15, 17), (3, 2, 5)]


def drawn(shape, count=6) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_of_every_kind_of_image(name, shape):
    x = drawn(shape)
    first, again = altered(x, name), altered(x, name)
    assert first.dtype == torch.uint8 and first.shape == x.shape
    assert torch.equal(first, again) and (first != x).flatten(1).any(1).all()
    assert torch.equal(altered(x.float() / 127.5 - 1, name), first), "floats in [-1, 1] will do"


def test_versions_by_hand():
    x = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
    x[..., 0, 0] = 228
    for name, level in {"black": 0, "white": 255, "grey": 128}.items():
        assert (altered(x, name) == level).all()
    assert torch.equal(altered(x, "inverted"), 255 - x)
    # The mean is 102: a pixel 126 above it comes to lie 37.8 above, the others 0.6 below.
    faint = altered(x, "low contrast")
    assert faint[0, 0, 0, 0] == 140 and (faint.flatten()[1:] == 101).all()
    # A corner is averaged with the three pixels that are there; three times, so it still stands out a little.
    blurred = altered(x, "blurred").int()
    assert 100 < blurred[0, 0, 0, 0] < 130 and (blurred[0, 0, 4:, 4:] == 100).all()
    assert blurred[0, 0, 0, 0] > blurred[0, 0, 0, 1] > blurred[0, 0, 1, 1] > 100


def test_a_blur_grows_with_the_image():
    x = torch.zeros(1, 1, 72, 72, dtype=torch.uint8)
    x[..., 36, 36] = 255
    small, large = (altered(i, "blurred") for i in (x[..., 22:50, 22:50], x))
    assert (small > 0).any(3).sum() == 7, "three averages of three pixels"
    assert large.max() < small.max()


@pytest.mark.parametrize("shape", SHAPES)
def test_patches_are_shuffled_whole(shape):
    x = drawn(shape)
    found = altered(x, "shuffled patches")
    assert torch.equal(found.flatten(1).sort().values, x.flatten(1).sort().values)
    rows, columns = (min(4, side) for side in shape[1:])
    height, width = shape[1] // rows, shape[2] // columns

    def patches(images):
        inner = images[:, :, : rows * height, : columns * width]
        return [p.flatten() for i in inner.split(height, 2) for p in i.split(width, 3)]

    before, after = ({tuple(p.tolist()) for p in patches(images)} for images in (x, found))
    assert before == after
    assert torch.equal(found[:, :, rows * height :], x[:, :, rows * height :])


def test_bad_use_of_altered():
    with pytest.raises(ValueError, match="version must be one of black, .*, shuffled patches, got 'upside down'"):
        altered(drawn((1, 8, 8)), "upside down")
    with pytest.raises(ValueError, match="NaN"):
        altered(torch.full((1, 1, 8, 8), float("nan")), "black")


class MeanPixel(Detector):
    """Bright images are suspicious."""

    image_shape = (1, 8, 8)

    def fit(self, images, *, store=None, fpr=0.05):
        return self.calibrate(images, fpr)

    def score_received(self, x, answers=None):
        return x.flatten(1).mean(1)


@pytest.fixture
def dim() -> torch.Tensor:
    """200 images with a mean of about 64."""
    return to_uint8(torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 1)


def test_power_by_hand(dim):
    detector = MeanPixel().fit(dim)
    with pytest.warns(WeakDetectorWarning) as seen:
        shares = power(detector, dim)
    assert list(shares) == list(VERSIONS)
    assert [shares[n] for n in ("black", "white", "grey", "noise", "inverted")] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert shares["shuffled patches"] == float(detector.flag(dim).double().mean()) <= 0.05
    words = str(seen[0].message)
    assert "at a false-positive rate of 5.0%" in words and "fewer than 90% of: black (0%), low contrast" in words
    assert "white" not in words and seen[0].filename == __file__


def test_the_bound_and_the_rate_can_be_chosen(dim):
    detector = MeanPixel().fit(dim)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = power(detector, dim, fpr=0.5, bound=0.0)
    assert shares["shuffled patches"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="needs 999 benign images"):
        power(detector, dim, fpr=0.001)
    with pytest.raises(NotFittedError, match="call calibrate"):
        power(MeanPixel(), dim)


def test_the_table():
    lines = power_table({"black": 0.0, "noise": 0.9, "inverted": 0.899}).splitlines()
    assert [line.split() for line in lines] == [
        ["black", "0.0%", "weak"],
        ["noise", "90.0%"],
        ["inverted", "89.9%", "weak"],
    ]


def test_fit_measures_it_and_the_card_keeps_it(detector, tmp_path):
    assert list(detector.power) == list(VERSIONS)
    folder = detector.save(tmp_path / "detector")
    assert SameDetector.load(folder).power == detector.power
    tensors, card = load_folder(folder)
    del card["power"]  # as an earlier samelib wrote it
    save_folder(tmp_path / "earlier", tensors, card)
    assert SameDetector.load(tmp_path / "earlier").power is None


def test_another_threshold_has_another_power(detector, group):
    strict, lenient = (copy.copy(detector).calibrate(group.calibration.pixels(), fpr) for fpr in (0.01, 0.5))
    assert sum(strict.power.values()) < sum(lenient.power.values())
    with pytest.warns(WeakDetectorWarning, match=r"at a false-positive rate of 1.0% .* fewer than 90% of: "):
        assert copy.copy(detector).calibrate(group.calibration.pixels(), 0.01).power == strict.power
