"""samelib's own endpoints against the description of the Open Inference Protocol that MLServer comes with."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
from serving import CLASSES, INFER, SHAPE, WORK, as_tensors, grey, noise, service

from samelib import Reject

UPSTREAMS = Path(sys.prefix).with_name("upstreams")  # see the Makefile
(DESCRIPTION,) = UPSTREAMS.glob("lib/python*/site-packages/mlserver/rest/openapi/dataplane.json")
# It allows data of a type "bytes", which JSON has not: nothing is of it.
NO_BYTES = {"type": "bytes"}
COMPONENTS = json.loads(DESCRIPTION.read_text(), object_hook=lambda part: {"not": {}} if part == NO_BYTES else part)[
    "components"
]


def conforms(body: dict, name: str) -> None:
    """Raises where a body is not what the description says; names that it does not know count too."""
    schema = COMPONENTS["schemas"][name]
    jsonschema.validate(body, {"$ref": f"#/components/schemas/{name}", "components": COMPONENTS})
    assert set(body) <= set(schema["properties"])


@pytest.mark.parametrize(
    ("path", "name"), [("/v2", "MetadataServerResponse"), ("/v2/models/victim", "MetadataModelResponse")]
)
def test_what_server_and_model_say_of_themselves(path, name):
    with service() as client:
        conforms(client.get(path).json(), name)


@pytest.mark.parametrize("response", [None, Reject(0.05), WORK], ids=["none", "reject", "work"])
def test_requests_and_answers(response):
    with service(response=response) as client:
        for images in (noise(2), grey(255, 0)):
            asked = as_tensors(images)["json"] | {"id": "7"}
            conforms(asked, "InferenceRequest")
            answer = client.post(INFER, json=asked)
            assert answer.status_code == 200
            conforms(answer.json(), "InferenceResponse")


def test_every_datatype_and_shape_is_one_of_the_protocol():
    with service() as client:
        model = client.get("/v2/models/victim").json()
    for tensor in (*model["inputs"], *model["outputs"]):
        conforms(tensor, "MetadataTensor")
    assert {"shape": [-1, *SHAPE], "datatype": "UINT8", "name": "image"} in model["inputs"]
    assert {"shape": [-1, CLASSES], "datatype": "FP32", "name": "probabilities"} in model["outputs"]


@pytest.mark.parametrize("body", [{}, {"inputs": []}, {"inputs": [{"name": "image"}]}])
def test_errors_say_so_under_the_name_of_the_protocol(body):
    with service() as client:
        answer = client.post(INFER, json=body)
        assert 400 <= answer.status_code < 500
        jsonschema.validate(
            answer.json(), {"$ref": "#/components/schemas/InferenceErrorResponse", "components": COMPONENTS}
        )
        assert isinstance(answer.json()["error"], str)
