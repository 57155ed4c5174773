"""Bad input, each kind with its own clear refusal, and the service alive afterwards."""

import io
import json
import random
import struct
import tracemalloc
import warnings
import zlib

import httpx
import pytest
from PIL import Image, PngImagePlugin
from serving import SHAPE, as_files, as_json, ask, connect, fault, noise, read_all, right, service

from samelib.service.client import as_png
from samelib.service.intake import ApiError, Limits, decode_image

GOOD = noise(1)
NUMBERS = GOOD.tolist()[0]
LIMITS = Limits(images=8, body=2**20)
pytestmark = pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")  # as intake.py has it


@pytest.fixture(scope="module")
def shared():
    with service(limits=LIMITS) as client:
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
    "a header of 100 megapixels": (png(10_000, 10_000), "image_file"),
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
    assert fault(answer) == (422, code) and answer.json()["error"]["image"] == 1


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
    monkeypatch.setattr(warnings, "catch_warnings", None)
    assert decode_image(as_png(GOOD[0]), SHAPE, 0).shape == SHAPE


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def changed(value) -> str:
    """An image with one pixel changed to that text of JSON."""
    return json.dumps([NUMBERS]).replace(str(NUMBERS[0][0][0]), value, 1)


BODIES = {
    "NaN": (changed("NaN"), 400, "malformed"),
    "Infinity": (changed("Infinity"), 400, "malformed"),
    "minus Infinity": (changed("-Infinity"), 400, "malformed"),
    "an overflow to infinity": (changed("1e999"), 422, "image_values"),
    "a float": (changed("0.5"), 422, "image_values"),
    "a whole float": (changed("7.0"), 422, "image_values"),
    "a negative": (changed("-1"), 422, "image_values"),
    "256": (changed("256"), 422, "image_values"),
    "more than 64 bits": (changed("9" * 40), 422, "image_values"),
    "more digits than Python reads": (changed("9" * 5000), 400, "malformed"),
    "true": (changed("true"), 422, "image_values"),
    "null": (changed("null"), 422, "image_values"),
    "a text": (changed('"7"'), 422, "image_values"),
    "a list among numbers": (changed("[7]"), 422, "image_values"),
    "ragged": (changed("1, 1"), 422, "image_shape"),
    "a row that is none": (json.dumps([[[7] * 8]]), 422, "image_shape"),
    "another shape": (json.dumps([[[[7] * 8] * 7]]), 422, "image_shape"),
    "no channels": (json.dumps([[[7] * 8] * 8]), 422, "image_shape"),
    "a number": ("[7]", 422, "image_shape"),
    "an empty image": ("[[]]", 422, "image_shape"),
    "an object": ('[{"a": 1}]', 422, "image_shape"),
    "an image of a million numbers": (json.dumps([[0] * 300_000]), 422, "image_shape"),
    "a long text among many": (json.dumps([["a" * 500_000] + [""] * 50_000]), 422, "image_shape"),
    "a batch of many": (json.dumps([0] * 300_000), 413, "too_many"),
    "nine images": (json.dumps([NUMBERS] * 9), 413, "too_many"),
    "no image": ("[]", 422, "no_image"),
    "images that are no list": ('"images"', 422, "fields"),
    "nested 900 deep": (nested(900), 422, "image_shape"),
    "nested 100,000 deep": (nested(100_000), 400, "malformed"),
}


@pytest.mark.parametrize("name", BODIES)
def test_images_as_json(client, name):
    text, status, code = BODIES[name]
    body = f'{{"images": {text}}}'
    answer = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert fault(answer) == (status, code)


def test_a_million_numbers_are_too_large_or_too_many(client):
    content = json.dumps({"images": [0] * 1_000_000}).encode()
    sent = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
    assert fault(sent) == (413, "too_large")
    with service() as usual:
        sent = usual.post("/v1/predict", content=content, headers={"content-type": "application/json"})
        assert fault(sent) == (413, "too_many")
        assert right(ask(usual, GOOD), GOOD)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ([], "fields"),
        ("images", "fields"),
        ({}, "fields"),
        ({"images": [NUMBERS], "model": 1}, "fields"),
        ({"images": {"0": NUMBERS}}, "fields"),
        ({"images": [NUMBERS], "stamps": "a"}, "fields"),
        ({"images": [NUMBERS], "stamps": None}, "fields"),
        ({"images": [NUMBERS], "stamps": [1]}, "fields"),
        ({"images": [NUMBERS], "stamps": ["a.1"] * 2}, "stamps"),
    ],
)
def test_other_objects(client, content, code):
    assert fault(client.post("/v1/predict", json=content)) == (422, code)


@pytest.mark.parametrize(
    ("content", "headers", "expected"),
    [
        (b"x", {}, (415, "media_type")),
        (b"x", {"content-type": "image/png"}, (415, "media_type")),
        (b"x", {"content-type": "text/json"}, (415, "media_type")),
        (b"x" * 40, {"content-type": "application/x-www-form-urlencoded"}, (415, "media_type")),
        (b"\x80", {"content-type": "application/cloudpickle"}, (415, "media_type")),
        (zlib.compress(b"{}"), {"content-type": "application/json", "content-encoding": "gzip"}, (415, "media_type")),
        (b'{"images": "\xff\xfe"}', {"content-type": "application/json"}, (400, "malformed")),
        (b"\xff\xfe\x00", {"content-type": "application/json"}, (400, "malformed")),
        (b"", {"content-type": "application/json"}, (400, "malformed")),
        (b"images", {"content-type": "application/json"}, (400, "malformed")),
        (b'{"images": [[[', {"content-type": "application/json"}, (400, "malformed")),
        (b"x", {"content-type": "multipart/form-data"}, (400, "malformed")),
        (b"x", {"content-type": "multipart/form-data; boundary="}, (400, "malformed")),
        (b"x", {"content-type": "multipart/form-data; boundary=b"}, (400, "malformed")),
        (b"--b\r\n\r\nx\r\n--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}, (400, "malformed")),
        (b"--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}, (422, "no_image")),
    ],
)
def test_other_bodies(client, content, headers, expected):
    assert fault(client.post("/v1/predict", content=content, headers=headers)) == expected


IMAGE = ("image", ("x.png", as_png(GOOD[0]), "image/png"))


@pytest.mark.parametrize(
    ("files", "data", "expected"),
    [
        ([IMAGE] * 9, {}, (400, "malformed")),  # the parser stops at the ninth
        ([IMAGE], {"stamp": ["a"] * 9}, (400, "malformed")),
        ([IMAGE], {"stamp": ["a"] * 2}, (422, "stamps")),
        ([IMAGE], {"stamp": "a" * 1_000}, (400, "malformed")),
        ([IMAGE], {"other": "a"}, (422, "fields")),
        ([("other", IMAGE[1])], {}, (422, "fields")),
        ([IMAGE, ("stamp", IMAGE[1])], {}, (422, "fields")),
        ([("stamp", (None, "a"))], {"image": "text"}, (422, "fields")),
    ],
)
def test_other_forms(client, files, data, expected):
    assert fault(client.post("/v1/predict", files=files, data=data)) == expected


@pytest.mark.parametrize("charset", ["hex", "undefined", "utf-7", "idna", "no-such", "utf-16"])
def test_other_charsets_of_a_form(client, charset):
    body = b'--b\r\nContent-Disposition: form-data; name="im\xffage"\r\n\r\na\xff\\\r\n--b--\r\n'
    headers = {"content-type": f"multipart/form-data; charset={charset}; boundary=b"}
    assert fault(client.post("/v1/predict", content=body, headers=headers)) in [(400, "malformed"), (422, "fields")]


@pytest.mark.parametrize("size", [LIMITS.body + 1, 20 * LIMITS.body])
@pytest.mark.parametrize("with_length", [True, False])
def test_a_body_that_is_too_large(client, size, with_length):
    """The client sees the refusal although it is still sending: the service reads on, and drops what it reads."""
    block = bytes(2**16)
    parts = (block[: min(len(block), size - start)] for start in range(0, size, len(block)))
    headers = {"content-type": "application/json"} | ({"content-length": str(size)} if with_length else {})
    assert fault(client.post("/v1/predict", content=parts, headers=headers)) == (413, "too_large")


def test_a_connection_outlives_a_body_that_is_too_large(client):
    """Closed at once, with bytes on their way to it, it would be reset, and the refusal perhaps lost."""
    size = 3 * LIMITS.body
    with connect(client) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % size)
        answer = b""
        while not answer.endswith(b"}}"):
            assert (part := connection.recv(65_536)), "closed before it was answered"
            answer += part
        assert answer.startswith(b"HTTP/1.1 413 ")
        connection.sendall(bytes(size) + b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_body_of_just_the_largest_size_is_read(client):
    body = httpx.Request("POST", "http://here", **as_json(GOOD)).content
    body += b" " * (LIMITS.body - len(body))
    assert right(client.post("/v1/predict", content=body, headers={"content-type": "application/json"}), GOOD)


def test_a_claim_of_gigabytes_is_refused_before_they_are_sent(client):
    with connect(client) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nConnection: close\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"9" * 30, b"1\r\nContent-Length: 2"])
def test_a_length_that_is_no_number(client, length):
    with connect(client) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: here\r\nContent-Length: " + length + b"\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_headers_without_end(client):
    with connect(client) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 70_000)
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_jpeg_and_png_of_any_compression_are_taken(client):
    for level in (0, 9):
        file = io.BytesIO()
        Image.fromarray(GOOD[0, 0].numpy()).save(file, "PNG", compress_level=level)
        assert right(client.post("/v1/predict", files=[("image", ("x", file.getvalue()))]), GOOD)
    assert client.post("/v1/predict", files=[("image", saved("L", "JPEG", progressive=True))]).status_code == 200
    assert right(client.post("/v1/predict", **as_files(GOOD)), GOOD)
