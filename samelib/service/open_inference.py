"""The Open Inference Protocol, version 2, over REST: tensors in, tensors out, in JSON or as bytes (see samelib.service.tensors).

https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. Its tensors have no NaN: the
probabilities of an image that was not answered are zeros, and `status` says so.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from itertools import chain
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from torch import Tensor

from samelib import __version__
from samelib.data.image_set import to_uint8
from samelib.models.classifiers import Victim
from samelib.service.guard import Reply
from samelib.service.intake import ApiError, replay, with_body
from samelib.service.schema import ERRORS
from samelib.service.tensors import JSON_LENGTH, Message, wants_bytes

PIXELS = {"UINT8": (0, 255), "FP32": (-1, 1)}  # range of each datatype that images may have


class InputTensor(BaseModel):
    """Elements in row-major order, nested by the shape or flat. (`parameters`, here and elsewhere, are ignored.)"""

    name: Literal["image", "stamp"]
    shape: list[int]
    datatype: Literal["UINT8", "FP32", "BYTES"]
    data: list[Any]  # checked by `_elements`: pydantic would report every wrong element


class RequestedOutput(BaseModel):
    name: Literal["probabilities", "status", "challenge", "bits"]


class InferRequest(BaseModel):
    """`image` UINT8 or FP32 in [-1, 1] of shape [N, C, H, W]; and `stamp` BYTES [N], empty for an image without one."""

    id: str | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=2)]
    outputs: list[RequestedOutput] | None = None


class OutputTensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float] | list[int] | list[str]


class InferResponse(BaseModel):
    """`probabilities` FP32 [N, K]; `status` BYTES [N], "answered", "refused" or "challenge"; `challenge` BYTES [N] and
    `bits` INT64 [N], of a proof of work."""

    model_name: str
    id: str | None = None
    outputs: list[OutputTensor]


def _elements(tensor: InputTensor, shape: tuple[int, ...], types: set[type]) -> list:
    """The elements in row-major order, of these types alone. Nothing is given to NumPy before: of a long text among short
    ones it would make gigabytes.

    Raises:
        ApiError: 422.
    """
    values, nested = tensor.data, tensor.data and isinstance(tensor.data[0], list)
    if tensor.shape != list(shape):
        raise ApiError(422, "shape", f"{tensor.name} must have shape {list(shape)} in this request")
    for size in shape[1:] if nested else ():
        if not all(isinstance(row, list) and len(row) == size for row in values):
            raise ApiError(422, "shape", f"the data of {tensor.name} are not nested as its shape says")
        values = list(chain.from_iterable(values))
    if len(values) != math.prod(shape):
        raise ApiError(422, "shape", f"{tensor.name} holds {len(values):,} elements, its shape {math.prod(shape):,}")
    if not set(map(type, values)) <= types:
        raise ApiError(422, "values", f"{tensor.name} holds something else than {tensor.datatype}")
    return values


def read_inputs(request: InferRequest, shape: tuple[int, int, int], most_images: int) -> tuple[Tensor, list[str]]:
    """Images uint8 [N, C, H, W] and their stamps.

    Raises:
        ApiError: 422.
    """
    inputs = {tensor.name: tensor for tensor in request.inputs}
    image, stamp = inputs.get("image"), inputs.get("stamp")
    if image is None or len(inputs) < len(request.inputs):
        raise ApiError(422, "inputs", "the inputs are image, once, and stamp where it was asked for")
    if image.datatype not in PIXELS or (stamp and stamp.datatype != "BYTES"):
        raise ApiError(422, "datatype", "image is UINT8 or FP32, stamp is BYTES")
    count = image.shape[0] if image.shape else 0
    if not 1 <= count <= most_images:
        raise ApiError(
            422, "shape", f"image has shape [N, {', '.join(map(str, shape))}] with N from 1 to {most_images}"
        )
    low, high = PIXELS[image.datatype]
    values = _elements(image, (count, *shape), {int} if image.datatype == "UINT8" else {int, float})
    if not all(low <= value <= high for value in values):  # nor is NaN
        raise ApiError(422, "values", f"pixels of datatype {image.datatype} lie between {low} and {high}")
    pixels = torch.tensor(values, dtype=torch.uint8 if image.datatype == "UINT8" else torch.float32)
    images = pixels.reshape(count, *shape)
    stamps = _elements(stamp, (count,), {str}) if stamp else []
    return images if images.dtype == torch.uint8 else to_uint8(images), stamps


def output_tensors(replies: list[Reply], classes: int) -> list[OutputTensor]:
    """All output tensors; zeros and empty texts where there is nothing to say."""
    zeros, count = [0.0] * classes, len(replies)
    probabilities = list(chain.from_iterable(reply.probabilities or zeros for reply in replies))
    return [
        OutputTensor(name="probabilities", shape=[count, classes], datatype="FP32", data=probabilities),
        OutputTensor(name="status", shape=[count], datatype="BYTES", data=[reply.status for reply in replies]),
        OutputTensor(name="challenge", shape=[count], datatype="BYTES", data=[r.challenge or "" for r in replies]),
        OutputTensor(name="bits", shape=[count], datatype="INT64", data=[reply.bits or 0 for reply in replies]),
    ]


class BinaryRoute(APIRoute):
    """Takes tensors as bytes behind the JSON too, and gives them so where a request wants that: for the route itself, both
    are JSON."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        answered = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                body, length = await request.body(), request.headers.get(JSON_LENGTH)
            except ClientDisconnect:
                return Response(status_code=400)  # which nobody reads
            if length is None and b"binary_data" not in body:
                return await answered(request)
            try:
                asked = Message.read("inputs", body, length)
                wanted = wants_bytes(asked.head)
                in_json, _ = asked.in_json().write()
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ApiError(422, "message", str(error)) from error
            headers = [pair for pair in request.scope["headers"] if pair[0] not in (b"content-type", b"content-length")]
            scope = request.scope | {"headers": [*headers, (b"content-type", b"application/json")]}
            message = {"type": "http.request", "body": in_json, "more_body": False}
            answer = await answered(Request(scope, replay(message, request.receive)))
            return _with_bytes(answer, wanted)

        return handler


def _with_bytes(answer: Response, wanted: Callable[[str], bool]) -> Response:
    """The same answer with these outputs as bytes."""
    message = Message.read("outputs", answer.body, None)
    for entry in message.head["outputs"]:
        if wanted(entry["name"]):
            entry["parameters"] = {"binary_data_size": 0}  # whatever it is: written when the bytes are there
    body, length = message.write()
    answer = with_body(answer, body)
    if length < len(body):
        answer.headers.update({JSON_LENGTH: str(length), "content-type": "application/octet-stream"})
    return answer


def open_inference(
    admitted: Callable[..., Awaitable[str]],
    reply: Callable[[Tensor, list[str], str], Awaitable[list[Reply]]],
    victim: Victim,
    most_images: int,
    name: str,
) -> APIRouter:
    """The routes under /v2, for one model of that name.

    Args:
        admitted: a dependency: the account of a request.
        reply: images, their stamps and the account -> what becomes of them.

    Raises:
        ValueError: the name is no part of a path.
    """
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError(f"the model's name must be letters, digits, _, . and -, got {name!r}")
    metadata = {
        "name": name,
        "platform": "samelib",
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [-1, *victim.image_shape]},
            {"name": "stamp", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": [-1, *tensor.shape[1:]]}
            for tensor in output_tensors([], victim.classes)
        ],
    }
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], route_class=BinaryRoute)

    @routes.get("/health/live", summary="200 while the service answers")
    async def live() -> dict:
        return {"live": True}

    @routes.get("/health/ready", summary="200 once the model is loaded and warm")
    async def ready() -> dict:
        return {"ready": True}

    @routes.get("", summary="Name and version of the server")
    async def server() -> dict:
        return {"name": "samelib", "version": __version__, "extensions": ["binary_tensor_data"]}

    @routes.get(f"/models/{name}", summary="What the model takes and gives")
    async def model() -> dict:
        return metadata

    @routes.get(f"/models/{name}/ready", summary="200 once the model is loaded and warm")
    async def model_ready() -> dict:
        return {"name": name, "ready": True}

    @routes.post(
        f"/models/{name}/infer",
        summary="Probabilities of the classes for a tensor of images",
        responses=ERRORS,
        response_model_exclude_none=True,
    )
    async def infer(request: InferRequest, account: Annotated[str, Depends(admitted)]) -> InferResponse:
        images, stamps = await asyncio.to_thread(read_inputs, request, victim.image_shape, most_images)
        tensors = output_tensors(await reply(images, stamps, account), victim.classes)
        if request.outputs is not None:
            tensors = [tensor for tensor in tensors if tensor.name in {output.name for output in request.outputs}]
        return InferResponse(model_name=name, id=request.id, outputs=tensors)

    return routes
