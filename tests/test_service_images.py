"""Image files that are none, or not what the service takes: each with its own refusal, and the service alive afterwards."""

import io
import random
import struct
import tracemalloc
import warnings
import zlib

import pytest
from PIL import Image, PngImagePlugin
from serving import SHAPE, ask, fault, noise, right, service

from samelib.service.client import as_png
from samelib.service.intake import ApiError, decode_image

GOOD = noise(1)
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def shared():
    with service() as client:
        yield client


@pytest.fixture
def client(shared):
    """After each test the service must be alive."""
    yield shared
    assert right(ask(shared, GOOD), GOOD)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, pixels: bytes = bytes(64)) -> bytes:
    """A grey PNG that claims that size, whatever its pixels are."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def saved(mode: str, kind: str = "PNG", size=(8, 8), frames: int = 1, **options) -> bytes:
    file, images = io.BytesIO(), [Image.effect_noise(size, 9 + n).convert("L").convert(mode) for n in range(frames)]
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(file, kind, **more, **options)
    return file.getvalue()


def text_bomb() -> bytes:
    """A megabyte of nothing for each kilobyte, as a compressed comment."""
    comments = PngImagePlugin.PngInfo()
    comments.add_text("bomb", "0" * 60_000_000, zip=True)
    return saved("L", pnginfo=comments)


FILES = {
    "no image": (b"this is text", "image_file"),
    "nothing": (b"", "image_file"),
    "the magic number alone": (b"\x89PNG\r\n\x1a\n", "image_file"),
    "a truncated PNG": (as_png(GOOD[0])[:-30], "image_file"),
    "a PNG without pixels": (png(8, 8, pixels=b""), "image_file"),
    "a truncated JPEG": (saved("L", "JPEG")[:200], "image_file"),
    "a wrong checksum": (as_png(GOOD[0]).replace(b"IDAT", b"IDAT\x00", 1), "image_file"),
    "a header of 4 gigapixels": (png(65_535, 65_535), "image_file"),
    "a header of 100 megapixels": (png(10_000, 10_000), "image_size"),
    "a bomb: 25 MB of pixels in 25 kB": (png(5_000, 5_000, pixels=bytes(25_005_000)), "image_size"),
    "a bomb in a comment": (text_bomb(), "image_file"),
    "no size": (png(0, 0), "image_file"),
    "a wrong size": (saved("L", size=(8, 9)), "image_size"),
    "colour": (saved("RGB"), "image_mode"),
    "transparency": (saved("LA"), "image_mode"),
    "16 bits": (saved("I;16"), "image_mode"),
    "a colour JPEG": (saved("RGB", "JPEG"), "image_mode"),
    "a GIF": (saved("L", "GIF"), "image_file"),
    "an animated GIF": (saved("L", "GIF", frames=3), "image_file"),
    "an animated PNG": (saved("L", frames=3), "image_file"),
    "a WebP": (saved("RGB", "WEBP"), "image_file"),
    "a TIFF": (saved("L", "TIFF"), "image_file"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"></svg>', "image_file"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(client, name):
    data, code = FILES[name]
    files = [("image", ("good.png", as_png(GOOD[0]), "image/png")), ("image", ("bad.png", data, "image/png"))]
    answer = client.post("/v1/predict", files=files)
    assert fault(answer) == (422, code) and answer.json()["image"] == 1


def test_pixels_that_are_left_over_are_not_unpacked():
    """The right size, but 25 MB of pixels after it."""
    data = png(8, 8, pixels=(b"\x00" + bytes(range(8))) * 8 + bytes(25_000_000))
    tracemalloc.start()
    try:
        assert decode_image(data, SHAPE, 0)[0, 0].tolist() == list(range(8))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_damaged_files_are_read_or_refused():
    """Nothing but an ApiError, whatever bytes are changed or missing."""
    rng, refused = random.Random(0), 0
    for kind in ("PNG", "JPEG"):
        whole = saved("L", kind)
        for _ in range(400):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                assert decode_image(bytes(data[: rng.randint(1, 2 * len(data))]), SHAPE, 0).shape == SHAPE
            except ApiError as error:
                assert error.status == 422
                refused += 1
    assert 200 < refused < 800


def test_decoding_leaves_the_filters_of_warnings_alone(monkeypatch):
    """They are the whole process's, and images are decoded in several threads."""
    with monkeypatch.context() as changed:
        changed.setattr(warnings, "catch_warnings", None)
        try:
            image = decode_image(as_png(GOOD[0]), SHAPE, 0)
        except ApiError:
            image = None
    assert image is not None


def test_jpeg_and_png_of_any_compression_are_taken(client):
    for level in (0, 9):
        file = io.BytesIO()
        Image.fromarray(GOOD[0, 0].numpy()).save(file, "PNG", compress_level=level)
        assert right(client.post("/v1/predict", files=[("image", ("x", file.getvalue()))]), GOOD)
    assert client.post("/v1/predict", files=[("image", saved("L", "JPEG", progressive=True))]).status_code == 200
