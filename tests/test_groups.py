import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from samelib.data import real
from samelib.data.groups import EMBEDDED, load_group


def pixel_rows(images) -> set[bytes]:
    return {i.numpy().tobytes() for i in images.images}


def assert_disjoint(group):
    rows = {name: pixel_rows(images) for name, images in group.sets().items()}
    for a in rows:
        for b in rows:
            assert a == b or not rows[a] & rows[b], f"{a} and {b} share images"


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_groups_are_disjoint_and_repeatable(name):
    group = load_group(name, "smoke")
    assert_disjoint(group)
    assert load_group(name, "smoke").fingerprint == group.fingerprint
    assert len(group.seeds) == 200 and group.tier == group.to("cpu").tier == "smoke"
    assert {images.image_shape for images in group.sets().values()} == {group.image_shape}


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_real_groups_are_disjoint(name, real_data):
    group = load_group(name, "smoke")
    assert_disjoint(group)
    assert group.classes == 10
    assert len(group.proxy) and len(group.outliers)


@pytest.mark.data
def test_whole_mnist_is_used_at_paper_tier(real_data):
    group = load_group("mnist", "paper")
    assert [len(s) for s in group.sets().values()] == [60_000, 3_000, 6_800, 200, 60_000, 60_000]
    assert_disjoint(group)


@pytest.mark.data
def test_emnist_is_upright(real_data):
    """Upright EMNIST digits look like MNIST's of the same class, transposed ones do not."""
    mnist, emnist = real.mnist(True)[:5000], real.emnist_digits(True)[:5000]

    def means(images, labels):
        return torch.stack([images[labels == k].float().mean(0).flatten() for k in range(10)])

    target = means(mnist.images, mnist.labels)
    upright = (means(emnist.images, emnist.labels) - target).square().sum(1)
    transposed = (means(emnist.images.transpose(-1, -2), emnist.labels) - target).square().sum(1)
    assert (upright < transposed).sum() >= 8


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown group 'minst'; known: glyphs"):
        load_group("minst")
    with pytest.raises(ValueError, match="tier must be one of"):
        load_group("glyphs", "large")


def test_a_missing_set_is_an_error_not_another_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMELIB_DATA", str(tmp_path))
    with pytest.raises(real.DataError, match=r"MNIST train below .*MNIST.raw.*SAMELIB_DATA"):
        load_group("mnist", "smoke")
    with pytest.raises(real.DataError, match="tiny-imagenet-32-10k.npz"):
        real.tiny_imagenet()


def test_tiny_imagenet_is_read_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMELIB_DATA", str(tmp_path))
    write_folder(tmp_path / "tiny-imagenet-200" / "train", size=(64, 64), mode="RGB")
    assert real.tiny_imagenet().image_shape == (3, 32, 32)


def write_idx(path, array):
    """The format of MNIST's files: a magic number that says 'unsigned bytes' and the rank, the sizes, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((5, 30, 30)), np.arange(5), r"images are \(1, 30, 30\), they should be \(1, 28, 28\)"),
        (np.zeros((5, 28, 28)), np.arange(4), r"labels must be int64 \[5\]"),
        (np.zeros((5, 28, 28)), np.full(5, 11), "labels run from 11 to 11"),
        (None, np.arange(5), "complete the data root"),
    ],
    ids=["wrong shape", "too few labels", "label out of range", "truncated"],
)
def test_a_wrong_file_is_named(tmp_path, monkeypatch, images, labels, words):
    raw = tmp_path / "MNIST" / "raw"
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.zeros((5, 28, 28)) if images is None else images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    if images is None:
        whole = (raw / "train-images-idx3-ubyte").read_bytes()
        (raw / "train-images-idx3-ubyte").write_bytes(whole[:1000])
    monkeypatch.setenv("SAMELIB_DATA", str(tmp_path))
    with pytest.raises(real.DataError, match=f"cannot read MNIST train below .*MNIST.raw: .*{words}"):
        real.mnist(True)


def write_folder(folder, count=3, size=(28, 28), mode="L"):
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, size[::-1], dtype=np.uint8)).convert(mode).save(
                folder / name / f"{i}.png"
            )


def test_a_folder_of_images_becomes_a_set(tmp_path):
    write_folder(tmp_path)
    images = real.from_path(tmp_path)
    assert images.image_shape == (1, 28, 28) and images.classes == ("a", "b")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert real.from_path(tmp_path, [3, 32, 32]).image_shape == (3, 32, 32)  # a list will do


def test_own_victim_proxy_and_outliers(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("victim", "proxy", "outliers"):
        images = rng.integers(0, 256, (400, 28, 28), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(400) % 4)
    proxy, outliers = f"path:{tmp_path}/proxy.npz", f"path:{tmp_path}/outliers.npz"
    group = load_group(f"path:{tmp_path}/victim.npz", "smoke", proxy=proxy, outliers=outliers)
    assert group.classes == 4 and len(group.victim_train) == 320
    assert_disjoint(group)
    alone = load_group(f"path:{tmp_path}/victim.npz", "smoke")
    assert (len(alone.proxy), len(alone.outliers)) == (0, 0) and len(alone.calibration)
    assert load_group("glyphs", "smoke", proxy=proxy).proxy.name == "proxy"
    with pytest.raises(real.DataError, match=r"images are \(1, 28, 28\)"):
        load_group("shapes", "smoke", proxy=proxy)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros((2, 28, 28), np.uint8)}, "no array `images`"),
        ({"images": np.zeros((2, 28, 28), np.float32)}, r"of floats in \[0, 1\] make them with .* got float32"),
        ({"images": np.zeros((2, 28), np.uint8)}, r"got uint8 \[2, 28\]"),
        (
            {"images": np.zeros((2, 28, 28), np.uint8), "labels": np.zeros(3, np.int64)},
            r"labels must be integers >= 0 \[2\]",
        ),
        ({"images": np.zeros((2, 28, 28), np.uint8), "labels": np.array([0, -1])}, "labels run from -1 to 0"),
        ({"images": np.zeros((2, 5, 28, 28), np.uint8)}, "1 or 3"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, words):
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(real.DataError, match=words):
        real.from_path(tmp_path / "own.npz")


def test_damaged_and_missing_files_are_named(tmp_path):
    np.savez(tmp_path / "whole.npz", images=np.zeros((20, 28, 28), np.uint8))
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(real.DataError, match="half.npz is missing or damaged"):
        real.from_path(tmp_path / "half.npz")
    with pytest.raises(real.DataError, match="none.npz is missing"):
        real.from_path(tmp_path / "none.npz")
    with pytest.raises(real.DataError, match="text.png is missing, or no readable image"):
        real.from_path(tmp_path)
    with pytest.raises(real.DataError, match="give a folder of images"):
        real.from_path(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(real.DataError, match="holds no images"):
        real.from_path(tmp_path / "empty")


def test_images_of_several_sizes_need_a_size(tmp_path):
    write_folder(tmp_path / "x")
    write_folder(tmp_path / "y", size=(32, 30))
    with pytest.raises(real.DataError, match="several sizes"):
        real.from_path(tmp_path)


def test_a_gzip_is_no_image_set(tmp_path):
    (tmp_path / "set.npz").write_bytes(gzip.compress(b"nothing"))
    with pytest.raises(real.DataError, match="missing or damaged"):
        real.from_path(tmp_path / "set.npz")
