"""Bad bodies, each kind with its own clear refusal, and the service alive afterwards."""

import httpx
import pytest
from serving import INFER, as_tensors, ask, connect, fault, noise, outputs, read_all, right, service

from samelib.service.client import as_png
from samelib.service.intake import Limits

GOOD = noise(1)
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


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (b"x", None, (422, "invalid")),
        (b"x", "image/png", (422, "invalid")),
        (b"{}", "application/json", (422, "invalid")),
        (b"image=text", "application/x-www-form-urlencoded", (422, "invalid")),
        (b"x", "multipart/form-data", (400, "http")),
        (b"x", "multipart/form-data; boundary=", (400, "http")),
        (b"x", "multipart/form-data; boundary=b", (400, "http")),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", (400, "http")),
        (b"--b--\r\n", "multipart/form-data; boundary=b", (422, "invalid")),
    ],
)
def test_bodies_that_are_no_form_of_images(client, content, kind, expected):
    headers = {} if kind is None else {"content-type": kind}
    assert fault(client.post("/v1/predict", content=content, headers=headers)) == expected


IMAGE = ("image", ("x.png", as_png(GOOD[0]), "image/png"))


@pytest.mark.parametrize(
    ("files", "data", "expected"),
    [
        ([IMAGE] * 9, {}, (422, "invalid")),
        ([("image", b"")] * 1_001, {}, (400, "http")),  # the parser stops there
        ([IMAGE], {"stamp": ["a"] * 1_001}, (400, "http")),
        ([IMAGE], {"stamp": ["a"] * 2}, (422, "stamps")),
        ([IMAGE], {"stamp": "a" * 100_000}, (403, "malformed")),
        ([IMAGE], {"other": "a"}, (422, "invalid")),
        ([("other", IMAGE[1])], {}, (422, "invalid")),
        ([IMAGE, ("stamp", IMAGE[1])], {}, (422, "invalid")),
        ([("stamp", (None, "a"))], {"image": "text"}, (422, "invalid")),
    ],
)
def test_other_forms(client, files, data, expected):
    assert fault(client.post("/v1/predict", files=files, data=data)) == expected


@pytest.mark.parametrize("charset", ["hex", "undefined", "utf-7", "idna", "no-such", "utf-16"])
def test_other_charsets_of_a_form(client, charset):
    body = b'--b\r\nContent-Disposition: form-data; name="im\xffage"\r\n\r\na\xff\\\r\n--b--\r\n'
    headers = {"content-type": f"multipart/form-data; charset={charset}; boundary=b"}
    assert fault(client.post("/v1/predict", content=body, headers=headers)) in [(400, "http"), (422, "invalid")]


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
        while not answer.endswith(b"}"):
            assert (part := connection.recv(65_536)), "closed before it was answered"
            answer += part
        assert answer.startswith(b"HTTP/1.1 413 ")
        connection.sendall(bytes(size) + b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_body_of_just_the_largest_size_is_read(client):
    body = httpx.Request("POST", "http://here", **as_tensors(GOOD)).content
    body += b" " * (LIMITS.body - len(body))
    answer = client.post(INFER, content=body, headers={"content-type": "application/json"})
    assert outputs(answer)["status"] == ["answered"]


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
