"""The Open Inference Protocol: what it says of the model, good tensors, and bad ones, each with its own clear refusal."""

import json

import httpx
import pytest
import torch
from serving import CLASSES, INFER, WORK, as_tensors, ask, fault, grey, noise, outputs, quarters, right, service

import samelib
from samelib.data.image_set import to_float
from samelib.responses import Reject
from samelib.service.intake import Limits
from samelib.service.stamps import solve
from samelib.service.tensors import JSON_LENGTH, Message

GOOD = noise(1)
PIXELS = GOOD.flatten().tolist()
STAMP = {"name": "stamp", "datatype": "BYTES", "shape": [1], "data": [""]}


@pytest.fixture(scope="module")
def shared():
    with service(response=Reject(0.05), limits=Limits(images=8, body=2**20)) as client:
        yield client


@pytest.fixture
def client(shared):
    """After each test the service must be alive."""
    yield shared
    assert right(ask(shared, GOOD), GOOD)


def image(**changes) -> dict:
    """The input tensor of GOOD, changed."""
    return {"name": "image", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": PIXELS} | changes


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("flat", [False, True])
def test_tensors_in_tensors_out(client, datatype, flat):
    images = torch.cat([noise(3), grey(255)])
    request = as_tensors(images, datatype=datatype)["json"] | {"id": "42"}
    if flat:
        request["inputs"][0]["data"] = torch.tensor(request["inputs"][0]["data"]).flatten().tolist()
    answer = client.post(INFER, json=request)
    assert answer.json()["model_name"] == "victim" and answer.json()["id"] == "42"
    tensors = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in answer.json()["outputs"]}
    assert tensors == {
        "probabilities": ("FP32", [4, CLASSES]),
        "status": ("BYTES", [4]),
        "challenge": ("BYTES", [4]),
        "bits": ("INT64", [4]),
    }
    data = outputs(answer)
    assert data["status"] == ["answered"] * 3 + ["refused"]
    assert torch.allclose(torch.tensor(data["probabilities"])[:12], quarters(to_float(images[:3])).flatten(), atol=1e-6)
    assert data["probabilities"][12:] == [0.0] * CLASSES
    assert data["challenge"] == [""] * 4 and data["bits"] == [0] * 4


def test_challenge_then_stamp_then_answer():
    images = grey(0, 255)
    with service(response=WORK) as client:
        data = outputs(client.post(INFER, **as_tensors(images)))
        assert data["status"] == ["challenge"] * 2 and data["probabilities"] == [0.0] * 2 * CLASSES
        assert data["bits"] == [WORK.base_bits, WORK.base_bits + WORK.most_bits]
        stamps = [solve(challenge)[0] for challenge in data["challenge"]]
        data = outputs(client.post(INFER, **as_tensors(images, [stamps[0], ""])))
        assert data["status"] == ["answered", "challenge"]
        assert torch.allclose(torch.tensor(data["probabilities"][:CLASSES]), quarters(to_float(images))[0])


def test_outputs_that_were_asked_for(client):
    request = as_tensors(GOOD)["json"] | {"outputs": [{"name": "status"}]}
    assert set(outputs(client.post(INFER, json=request))) == {"status"}


def test_what_server_and_model_say_of_themselves(client):
    for path, content in (
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2", {"name": "samelib", "version": samelib.__version__, "extensions": ["binary_tensor_data"]}),
        ("/v2/models/victim/ready", {"name": "victim", "ready": True}),
    ):
        assert client.get(path).json() == content
    model = client.get("/v2/models/victim").json()
    assert (model["name"], model["platform"]) == ("victim", "samelib")
    tensors = {t["name"]: (t["datatype"], t["shape"]) for t in model["inputs"] + model["outputs"]}
    assert tensors["image"] == ("UINT8", [-1, 1, 8, 8]) and tensors["probabilities"] == ("FP32", [-1, CLASSES])
    assert fault(client.get("/v2/models/other")) == (404, "http")


INPUTS = {
    "no input": ([], "invalid"),
    "no image": ([STAMP], "inputs"),
    "two images": ([image(), image()], "inputs"),
    "three inputs": ([image(), STAMP, STAMP], "invalid"),
    "another name": ([image(name="pixels")], "invalid"),
    "another datatype": ([image(datatype="FP64")], "invalid"),
    "pixels of bytes": ([image(datatype="BYTES")], "datatype"),
    "stamps of numbers": ([image(), STAMP | {"datatype": "UINT8", "data": [1]}], "datatype"),
    "stamps that are no texts": ([image(), STAMP | {"data": [1]}], "values"),
    "two stamps for one image": ([image(), STAMP | {"shape": [2], "data": ["", ""]}], "shape"),
    "another image size": ([image(shape=[1, 1, 4, 16])], "shape"),
    "no batch dimension": ([image(shape=[1, 8, 8])], "shape"),
    "no shape": ([image(shape=[])], "shape"),
    "no images": ([image(shape=[0, 1, 8, 8], data=[])], "shape"),
    "less than none": ([image(shape=[-1, 1, 8, 8])], "shape"),
    "nine images": ([image(shape=[9, 1, 8, 8], data=PIXELS * 9)], "shape"),
    "a pixel too few": ([image(data=PIXELS[1:])], "shape"),
    "a pixel too many": ([image(data=[*PIXELS, 1])], "shape"),
    "ragged": ([image(data=[[[[7] * 7] * 7 + [[7] * 15]]])], "shape"),
    "nested 900 deep": ([image(data=json.loads("[" * 900 + "]" * 900))], "shape"),
    "a row among numbers": ([image(data=[*PIXELS[1:], [7]])], "values"),
    "a number among rows": ([image(data=[7, *[[7]] * 63])], "values"),
    "a long text among many": ([image(data=["a" * 500_000] + [""] * 63)], "values"),
    "a float": ([image(data=[0.5, *PIXELS[1:]])], "values"),
    "a negative": ([image(data=[-1, *PIXELS[1:]])], "values"),
    "256": ([image(data=[256, *PIXELS[1:]])], "values"),
    "more than 64 bits": ([image(data=[10**40, *PIXELS[1:]])], "values"),
    "true": ([image(data=[True, *PIXELS[1:]])], "values"),
    "null": ([image(data=[None, *PIXELS[1:]])], "values"),
    "bytes as floats": ([image(datatype="FP32", data=PIXELS)], "values"),
    "a NaN": ([image(datatype="FP32", data=[float("nan")] * 64)], "values"),
    "infinity": ([image(datatype="FP32", data=[float("inf")] * 64)], "values"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_are_refused(client, name):
    inputs, code = INPUTS[name]
    answer = client.post(INFER, content=json.dumps({"inputs": inputs}), headers={"content-type": "application/json"})
    assert fault(answer) == (422, code)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"x", 422),
        (b"\xff\xfe\x00", 400),
        (b'{"inputs": [[[', 422),
        (b"[" * 100_000 + b"]" * 100_000, 400),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", 400),
        (b"[]", 422),
        (b'{"inputs": null}', 422),
        (b'{"inputs": [' + b"0, " * 300_000 + b"0]}", 422),
    ],
)
def test_bodies_that_are_refused(client, content, status):
    answer = client.post(INFER, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and fault(answer)


@pytest.mark.parametrize("kind", ["text/plain", "application/octet-stream", "application/cloudpickle", ""])
def test_other_media_types_are_refused(client, kind):
    content = httpx.Request("POST", "http://here", **as_tensors(GOOD)).content
    assert fault(client.post(INFER, content=content, headers={"content-type": kind}))[0] in (415, 422)


def binary(images: torch.Tensor, datatype: str, outputs=(), **more) -> dict:
    """What httpx needs to send images as bytes behind the JSON, and to ask for outputs."""
    pixels = (images if datatype == "UINT8" else to_float(images)).numpy()
    entry = {"name": "image", "datatype": datatype, "shape": list(pixels.shape), "parameters": {"binary_data_size": 0}}
    head = {"inputs": [entry], "outputs": list(outputs)} | more
    body, length = Message("inputs", head if outputs else head | {"outputs": None}, {"image": pixels}).write()
    return {"content": body, "headers": {JSON_LENGTH: str(length)}}


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_images_as_bytes_get_the_same_answer(client, datatype):
    images = noise(3)
    answer = client.post(INFER, **binary(images, datatype))
    assert answer.json() == client.post(INFER, **as_tensors(images)).json()
    assert JSON_LENGTH not in answer.headers


def test_outputs_come_as_bytes_where_they_are_wanted(client):
    images = noise(3)
    wanted = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "status"}]
    answer = client.post(INFER, **binary(images, "UINT8", wanted))
    message = Message.read("outputs", answer.content, answer.headers[JSON_LENGTH])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert torch.allclose(torch.from_numpy(message.tensors["probabilities"].copy()), quarters(to_float(images)))
    assert message.tensors["status"].tolist() == [b"answered"] * 3 and '"answered"' in answer.text

    everything = as_tensors(images)["json"] | {"parameters": {"binary_data_output": True}}
    answer = client.post(INFER, json=everything)
    tensors = Message.read("outputs", answer.content, answer.headers[JSON_LENGTH]).tensors
    assert (
        set(tensors) == {"probabilities", "status", "challenge", "bits"}
        and "answered" not in answer.text.split("]}")[0]
    )


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"inputs": 3}', b'{"inputs": [], "parameters": 3}', b'{"inputs": [], "outputs": [3]}']
)
def test_bad_messages_with_bytes_are_refused(client, body):
    answer = client.post(INFER, content=body, headers={JSON_LENGTH: str(len(body))})
    assert answer.status_code == 422
    answer = client.post(INFER, content=body + b"binary_data", headers={JSON_LENGTH: str(len(body))})
    assert answer.status_code == 422
