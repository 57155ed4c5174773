import warnings

import numpy as np
import pytest
import torch

from samelib.data import image_set
from samelib.data.image_set import ImageSet, OutOfRangeWarning, check_queries, quantise, to_float, to_uint8

SHAPE = (1, 28, 28)


def make(count=4, classes=2, **changes) -> ImageSet:
    images = torch.arange(count * 28 * 28).reshape(count, 1, 28, 28).to(torch.uint8)
    parts = {"images": images, "labels": torch.arange(count) % classes, "classes": tuple("ab"), "name": "own"}
    return ImageSet(**(parts | changes))


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).min() == -1 and to_float(levels).max() == 1


def test_quantise_is_idempotent_and_clamps():
    x = torch.linspace(-1.5, 1.5, 1000).reshape(1, 1, 20, 50)
    once = quantise(x)
    assert torch.equal(quantise(once), once)
    assert once.min() == -1 and once.max() == 1
    assert (once - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.full((2, *SHAPE), float("nan")), ValueError, "2 of 2 images hold NaN"),
        (torch.full((1, *SHAPE), float("inf")), ValueError, "infinite"),
        (torch.zeros(2, 3, 28, 28), ValueError, r"\[N, 1, 28, 28\]"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"got \[2, 1, 32, 32\]"),
        (torch.zeros(1, 28, 28), ValueError, "shape"),
        (torch.zeros(0, *SHAPE), ValueError, "empty"),
        (torch.zeros(1, *SHAPE, dtype=torch.int64), TypeError, "int64"),
    ],
)
def test_bad_queries_are_refused_with_a_reason(x, error, words):
    with pytest.raises(error, match=words):
        check_queries(x, SHAPE)


def test_out_of_range_is_said():
    with pytest.warns(OutOfRangeWarning, match="clamped"):
        check_queries(torch.full((1, *SHAPE), 1.2), SHAPE)


def test_out_of_range_is_said_once(monkeypatch):
    monkeypatch.setattr(image_set, "_WARNED", {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            check_queries(torch.full((1, *SHAPE), 1.2), SHAPE)
    assert len(said) == 1


def test_floats_in_0_to_1_are_noticed(monkeypatch):
    monkeypatch.setattr(image_set, "_WARNED", {})
    x = torch.rand(4, *SHAPE)
    with pytest.warns(OutOfRangeWarning, match=r"all pixels lie in \[0, 1\].*2 \* x - 1"):
        check_queries(x, SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_queries(2 * x - 1, SHAPE)
        check_queries(torch.full((4, *SHAPE), 200, dtype=torch.uint8), SHAPE)  # bright pictures, and no floats


def test_arrays_and_uint8_are_taken():
    assert check_queries(np.zeros((1, *SHAPE)), SHAPE).dtype == torch.float32
    assert check_queries(torch.zeros(1, *SHAPE, dtype=torch.uint8), SHAPE).max() == -1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"images": torch.rand(4, 1, 28, 28)}, TypeError, r"uint8.*float32; .* of floats in \[0, 1\]"),
        ({"images": torch.zeros(4, 2, 28, 28, dtype=torch.uint8)}, ValueError, "1 or 3"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"int64 \[4\]"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, ValueError, "labels run from 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, ValueError, "labels run from -1"),
    ],
)
def test_bad_sets_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        make(**changes)


def test_split_is_disjoint_and_complete():
    first, second = make(10).split(4, 6)
    assert torch.equal(torch.cat([first.images, second.images]), make(10).images)
    with pytest.raises(ValueError, match="11 were asked for"):
        make(10).split(11)


def test_fingerprint_sees_pixels_and_labels():
    same, pixels, labels = make(), make(), make(labels=torch.tensor([1, 0, 1, 0]))
    pixels.images[0, 0, 0, 0] += 1
    assert make().fingerprint == same.fingerprint
    assert len({same.fingerprint, pixels.fingerprint, labels.fingerprint}) == 3


def test_shuffled_keeps_pairs_together():
    shuffled = make(10).shuffled(3)
    pairs = {int(i[0, 0, 0]): int(y) for i, y in zip(make(10).images, make(10).labels, strict=True)}
    assert all(pairs[int(i[0, 0, 0])] == int(y) for i, y in zip(shuffled.images, shuffled.labels, strict=True))
    assert not torch.equal(shuffled.images, make(10).images)
