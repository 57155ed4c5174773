"""A defence in front of another inference server, and the messages of the Open Inference Protocol."""

import asyncio
import json
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from serving import CLASSES, INFER, SHAPE, WORK, Ranked, as_tensors, grey, noise, outputs, quarters, service
from test_middleware import ELSEWHERE, SECRET, outcomes

from samelib import Reject
from samelib.data.image_set import to_float
from samelib.service.intake import Limits
from samelib.service.middleware import STAMP
from samelib.service.proxy import create_proxy
from samelib.service.server import running
from samelib.service.stamps import StampOffice, solve
from samelib.service.tensors import JSON_LENGTH, NUMBERS, InferAnswers, InferImages, Message, MessageError

FLOATS = InferImages(SHAPE, "image", (-1, 1))  # as the service of samelib takes them


@contextmanager
def proxied(upstream: str, response=None, **changes):
    """A client of a live proxy."""
    given = {"decode": FLOATS, "answers": InferAnswers("probabilities"), "victim": ELSEWHERE} | changes
    app = create_proxy(upstream, Ranked(), response, **given)
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@contextmanager
def before_samelib(response=None, **changes):
    """A proxy before a service of samelib that has no defence."""
    with service() as inner, proxied(f"{inner.base_url}/v2/models/victim", response, **changes) as client:
        yield client


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_an_answer_passes_as_it_was(datatype):
    with service() as inner, proxied(f"{inner.base_url}/v2/models/victim", Reject(0.05)) as client:
        images = grey(0, 10)
        answer = client.post(INFER, **as_tensors(images, datatype=datatype))
        assert answer.json() == inner.post(INFER, **as_tensors(images, datatype=datatype)).json()
        assert outcomes(client) == {"answered": 2}


def test_a_strange_image_gets_zeros_in_every_output():
    with before_samelib(Reject(0.05)) as client:
        answer = client.post(INFER, **as_tensors(grey(0, 255, 10)))
        given, right = outputs(answer), quarters(to_float(grey(0, 255, 10)))
        rows = torch.tensor(given["probabilities"]).reshape(3, CLASSES)
        assert torch.allclose(rows[[0, 2]], right[[0, 2]]) and not rows[1].any()
        assert given["status"] == ["answered", "", "answered"]
        assert answer.json()["parameters"] == {"samelib_refused": "1"}
        assert client.post(INFER, **as_tensors(grey(255))).status_code == 403


def test_work_goes_through_a_header():
    with before_samelib(WORK, office=StampOffice(SECRET)) as client:
        challenge = client.post(INFER, **as_tensors(grey(255)))
        assert challenge.status_code == 402
        stamp, _ = solve(challenge.json()["challenge"])
        assert client.post(INFER, **as_tensors(grey(255)), headers={STAMP: stamp}).status_code == 200


def test_health_and_metadata_pass_and_nothing_else():
    with before_samelib(Reject(0.05)) as client:
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/victim", "/v2/models/victim/ready"):
            assert client.get(path).status_code == 200
        assert client.get("/v2/models/victim").json()["inputs"][0]["shape"] == [-1, *SHAPE]
        for method, path in [
            ("GET", "/metrics"),
            ("GET", "/docs"),
            ("GET", "/v2/%2e%2e/metrics"),
            ("POST", "/v1/predict"),
            ("POST", "/v2/models/other/infer"),
            ("POST", "/v2/repository/models/victim/unload"),
        ]:
            assert client.request(method, path, **(as_tensors(grey(0)) if method == "POST" else {})).status_code == 404


def test_what_the_model_refuses_passes_and_what_is_no_message_does_not_reach_it():
    with before_samelib(Reject(0.05)) as client:
        answer = client.post(
            INFER, json={"inputs": [{"name": "image", "datatype": "INT64", "shape": [1, *SHAPE], "data": [0] * 64}]}
        )
        assert answer.status_code == 422 and "'UINT8', 'FP32'" in answer.json()["error"]
        answer = client.post(INFER, json={"inputs": []})
        assert answer.status_code == 422 and "the images are the only input of numbers, image" in answer.json()["error"]
        answer = client.post(INFER, **as_tensors(grey(0)), headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415


@pytest.mark.parametrize("name", [None, "image"])
def test_a_second_input_of_numbers_is_refused(name):
    """A model that takes the first, whatever it is called, would be asked about what the detector does not see."""
    inputs = [as_tensors(image)["json"]["inputs"][0] for image in (grey(255), grey(0))]
    inputs[0]["name"] = "other"
    with before_samelib(Reject(0.05), decode=InferImages(SHAPE, name, (-1, 1))) as client:
        answer = client.post(INFER, json={"inputs": inputs})
        assert answer.status_code == 422 and "the only input of numbers" in answer.json()["error"]


def test_pixels_that_the_detector_would_see_clamped_are_refused():
    inputs = {"name": "image", "datatype": "FP32", "shape": [1, *SHAPE], "data": [1.5] * 64}
    with before_samelib(Reject(0.05)) as client:
        answer = client.post(INFER, json={"inputs": [inputs]})
        assert answer.status_code == 422 and "pixels lie between -1 and 1" in answer.json()["error"]


def test_a_model_that_is_not_there_or_never_answers():
    with proxied("http://127.0.0.1:9/v2/models/victim") as client:
        answer = client.post(INFER, **as_tensors(grey(0)))
        assert answer.status_code == 502 and "cannot be reached" in answer.json()["error"]

    slow = FastAPI()
    slow.state.limits = Limits()

    @slow.post(INFER)
    async def never(request: Request):
        while not await request.is_disconnected():
            pass

    limits = Limits(answer_seconds=0.3)
    with running(slow) as url, proxied(f"{url}/v2/models/victim", limits=limits) as client:
        assert client.post(INFER, **as_tensors(grey(0))).status_code == 504


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://h:1", "http://h:1/v2/models", "ftp://h/v2/models/a", "http://h/v2/models/a/infer"]
)
def test_an_address_that_is_no_model_is_refused(url):
    with pytest.raises(ValueError, match="the upstream is http://HOST:PORT/v2/models/NAME"):
        create_proxy(url, Ranked(), victim=ELSEWHERE)


def test_what_guarded_refuses_is_refused_before_anything_is_served():
    with pytest.raises(ValueError, match="how many classes"):
        create_proxy("http://h:1/v2/models/a", Ranked())


def binary_server() -> FastAPI:
    """A server as Triton is one: tensors as bytes, pixels in [0, 1], channels last, logits; and a name for each image."""
    app = FastAPI()
    app.state.limits = Limits()

    @app.post("/v2/models/digits/versions/3/infer")
    async def infer(request: Request):
        asked = Message.read("inputs", await request.body(), request.headers[JSON_LENGTH])
        x = torch.from_numpy(asked.tensors["x"].copy()).permute(0, 3, 1, 2) * 2 - 1
        logits = quarters(x).log().numpy() + 3
        names = np.array([f"class {i}".encode() for i in logits.argmax(1)], object)
        entries = [
            {"name": "logits", "datatype": "FP32", "shape": list(logits.shape), "parameters": {"binary_data_size": 0}},
            {"name": "names", "datatype": "BYTES", "shape": [len(names)], "parameters": {"binary_data_size": 0}},
        ]
        body, length = Message(
            "outputs", {"model_name": "digits", "outputs": entries}, {"logits": logits, "names": names}
        ).write()
        return Response(body, headers={JSON_LENGTH: str(length)}, media_type="application/octet-stream")

    return app


def as_binary(images: torch.Tensor) -> dict:
    x = (images.permute(0, 2, 3, 1) / 255).numpy().astype("<f4")
    entry = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    body, length = Message("inputs", {"inputs": [entry]}, {"x": x}).write()
    return {"content": body, "headers": {JSON_LENGTH: str(length)}}


def test_binary_tensors_channels_last_logits_and_versions():
    with running(binary_server()) as url:
        upstream = f"{url}/v2/models/digits/versions/3"
        given = {"decode": InferImages(SHAPE), "answers": InferAnswers(softmax=True)}
        with proxied(upstream, Reject(0.05), **given) as client:
            images = torch.cat([grey(0), grey(255), noise(1)])
            answer = client.post("/v2/models/digits/versions/3/infer", **as_binary(images))
            assert answer.status_code == 200
            tensors = Message.read("outputs", answer.content, answer.headers[JSON_LENGTH]).tensors
            right = quarters(to_float(images)).log() + 3
            assert np.allclose(tensors["logits"][[0, 2]], right[[0, 2]], atol=1e-5)
            assert (
                not tensors["logits"][1].any()
                and tensors["names"][1] == b""
                and tensors["names"][2].startswith(b"class")
            )


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 8, 8, 1), (2, 64)])
def test_the_arrangements_of_images(shape):
    images = noise(2)

    class Asked:
        headers = {}

        async def body(self):
            entry = {"name": "x", "datatype": "UINT8", "shape": shape, "data": images.flatten().tolist()}
            return json.dumps({"inputs": [entry]}).encode()

    assert torch.equal(asyncio.run(InferImages(SHAPE)(Asked())), images)


def entry(**changes) -> bytes:
    tensor = {"name": "x", "datatype": "UINT8", "shape": [2], "data": [1, 2]} | changes
    return json.dumps({"inputs": [tensor]}).encode()


def bare(size) -> bytes:
    """A tensor that says it has so many bytes behind the JSON, where there are none."""
    tensor = {"name": "x", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.parametrize(
    ("body", "length", "words"),
    [
        (b"[]", None, "no message"),
        (b"{", None, "no message"),
        (b"\xff", None, "no message"),
        (b'{"inputs": 3}', None, "no message"),
        (b"[" * 100_000, None, "no message"),
        (entry(), "9", "no message"),
        (entry() + b"1", str(len(entry())), "1 bytes belong to no tensor"),
        (entry(shape=[3]), None, "cannot reshape"),
        (entry(shape=[-1]), None, "0 or more"),
        (entry(shape=[True, 2]), None, "0 or more"),
        (b'{"inputs": [], "inputs": []}', None, "says something twice"),
        (entry(data=[1, "2"]), None, "something else than UINT8"),
        (entry(data=[1, True]), None, "something else than UINT8"),
        (entry(data=[1, 2.0]), None, "something else than UINT8"),
        (entry(data=[1, 256]), None, "no message"),
        (entry(data=[[1], 2]), None, "no message"),
        (entry(datatype="BF16"), None, "BF16"),
        (entry(datatype="BYTES"), None, "no message"),
        (entry(parameters=3), None, "no message"),
        (
            entry(parameters={"binary_data_size": 2}) + b"12",
            str(len(entry(parameters={"binary_data_size": 2}))),
            "data twice",
        ),
        (bare(2), None, "no message"),
        (bare("2"), None, "0 or more"),
        (bare(-2), None, "0 or more"),
        (bare(True), None, "0 or more"),
        (json.dumps({"inputs": json.loads(entry())["inputs"] * 2}).encode(), None, "two tensors x"),
    ],
)
def test_what_is_no_message_is_said_to_be_none(body, length, words):
    with pytest.raises(MessageError, match=words):
        Message.read("inputs", body, length)


@pytest.mark.parametrize("length", ["-1", "x", "1_0", "99999"])
def test_lengths_that_are_none(length):
    with pytest.raises(MessageError):
        Message.read("inputs", entry(), length)


# A busy machine draws slowly: no time is measured.
@settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
@given(st.data())
def test_messages_are_read_as_they_were_written(data):
    tensors, entries = {}, []
    for index in range(data.draw(st.integers(1, 3))):
        datatype = data.draw(st.sampled_from([*NUMBERS, "BYTES"]))
        shape = data.draw(arrays.array_shapes(max_dims=3, max_side=3))
        if datatype == "BYTES":
            texts = data.draw(st.lists(st.text(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
            values = np.array([text.encode() for text in texts] + [None], object)[:-1].reshape(shape)
        else:
            elements = {"allow_nan": False, "allow_infinity": False} if datatype.startswith("FP") else {}
            values = data.draw(arrays.arrays(NUMBERS[datatype], shape, elements=elements or None))
        tensor = {"name": f"t{index}", "datatype": datatype, "shape": list(shape)}
        entries.append(tensor | data.draw(st.sampled_from([{}, {"parameters": {"binary_data_size": 0}}])))
        tensors[tensor["name"]] = values
    body, length = Message("outputs", {"outputs": entries}, tensors).write()
    again = Message.read("outputs", body, str(length))
    assert again.tensors.keys() == tensors.keys()
    assert all(np.array_equal(again.tensors[name], tensors[name]) for name in tensors)
