"""Bad bodies, each kind with its own clear refusal, and the service alive afterwards."""

import json
import zlib

import httpx
import pytest
from serving import as_json, ask, connect, fault, noise, read_all, right, service

from samelib.service.client import as_png
from samelib.service.intake import Limits

GOOD = noise(1)
NUMBERS = GOOD.tolist()[0]
LIMITS = Limits(images=8, body=2**20)


@pytest.fixture(scope="module")
def shared():
    with service(limits=LIMITS) as client:
        yield client


@pytest.fixture
def client(shared):
    """After each test the service must be alive."""
    yield shared
    assert right(ask(shared, GOOD), GOOD)


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
        ([IMAGE] * 9, {}, (413, "too_many")),  # the parser stops at the ninth
        ([IMAGE], {"stamp": ["a"] * 9}, (413, "too_many")),
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
