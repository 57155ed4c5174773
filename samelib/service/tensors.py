"""Messages of the Open Inference Protocol, version 2: tensors in JSON, or as bytes behind it (binary data extension).

https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md, and Triton's
extension_binary_data.md. With these, `Guarded` stands in front of servers that speak it.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from samelib.service.intake import ApiError, with_body

JSON_LENGTH = "Inference-Header-Content-Length"
NUMBERS = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_OF_JSON = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}  # NumPy's kind -> Python's types


class MessageError(ValueError):
    """This is no message of the Open Inference Protocol."""


@dataclass
class Message:
    """A request or an answer.

    Attributes:
        kind: what its list of tensors is called.
        head: its JSON, without the data of its tensors. A tensor whose parameters name a `binary_data_size` has them
            behind the JSON.
        tensors: name -> array of the tensor's shape; BYTES as objects, `bytes` each.
    """

    kind: Literal["inputs", "outputs"]
    head: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @classmethod
    def read(cls, kind: Literal["inputs", "outputs"], body: bytes, json_length: str | None) -> "Message":
        """The message in a body, whose JSON has so many bytes (None: all of it is JSON).

        Raises:
            MessageError: it is none; or it has tensors of BF16, which NumPy does not know.
        """
        tensors = {}
        try:
            end = len(body) if json_length is None else _count(int(json_length))
            head = json.loads(body[:end], object_pairs_hook=_object)
            for entry in head[kind]:
                size = entry.get("parameters", {}).get("binary_data_size")
                if size is not None and "data" in entry:  # which of both would the model's server take?
                    raise ValueError("a tensor has its data twice")
                if size is None:
                    values = _of_json(entry.pop("data"), entry["datatype"])
                else:
                    values, end = _of_bytes(body[end : end + _count(size)], entry["datatype"]), end + size
                if entry["name"] in tensors:
                    raise ValueError(f"there are two tensors {entry['name']}")
                tensors[entry["name"]] = values.reshape([_count(side) for side in entry["shape"]])
            if end != len(body):
                raise ValueError(f"{len(body) - end} bytes belong to no tensor")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
            raise MessageError(f"this is no message of the Open Inference Protocol ({error})") from error
        return cls(kind, head, tensors)

    def in_json(self) -> "Message":
        """The same message with no data behind its JSON."""
        entries = []
        for entry in self.head[self.kind]:
            others = {name: value for name, value in entry.get("parameters", {}).items() if name != "binary_data_size"}
            entries.append(entry | {"parameters": others})
        return Message(self.kind, self.head | {self.kind: entries}, self.tensors)

    def write(self) -> tuple[bytes, int]:
        """The body, and how many bytes of it are JSON."""
        entries, binary = [], []
        for entry in self.head[self.kind]:
            values = self.tensors[entry["name"]]
            if "binary_data_size" in entry.get("parameters", {}):
                binary.append(_to_bytes(values))
                entry = entry | {"parameters": entry["parameters"] | {"binary_data_size": len(binary[-1])}}
            else:
                flat = values.ravel().tolist()
                entry = entry | {"data": [x.decode() if isinstance(x, bytes) else x for x in flat]}
            entries.append(entry)
        head = json.dumps(self.head | {self.kind: entries}, separators=(",", ":")).encode()
        return b"".join([head, *binary]), len(head)


def _count(number: int) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("a number that should count something is not 0 or more")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that says something twice could be read differently by the model's server."""
    if len(members := dict(pairs)) < len(pairs):
        raise ValueError("an object says something twice")
    return {name: value for name, value in members.items() if value is not None}  # KServe says null of what is absent


def _of_json(values: list, datatype: str) -> np.ndarray:
    """One dimension of the elements, nested or not. NumPy is not asked what they are: it makes texts of numbers."""
    while values and isinstance(values[0], list):
        values = list(chain.from_iterable(values))
    if datatype == "BYTES":
        return np.array([value.encode() for value in values] + [None], object)[:-1]
    dtype = np.dtype(NUMBERS[datatype])
    if not set(map(type, values)) <= _OF_JSON[dtype.kind]:
        raise ValueError(f"something else than {datatype}")
    return np.array(values, dtype)


def _of_bytes(data: bytes, datatype: str) -> np.ndarray:
    if datatype != "BYTES":
        return np.frombuffer(data, NUMBERS[datatype])
    values, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        values.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(data):
        raise ValueError("a text ends too early")
    return np.array([*values, None], object)[:-1]


def _to_bytes(values: np.ndarray) -> bytes:
    if values.dtype != object:
        return values.tobytes()
    return b"".join(struct.pack("<I", len(value)) + value for value in values.ravel())


def wants_bytes(head: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a request wants the output of a name as bytes: it says so of all outputs, of one, or not at all."""
    everything = bool(head.get("parameters", {}).get("binary_data_output", False))
    asked = {output["name"]: output.get("parameters", {}) for output in head.get("outputs") or []}
    return lambda name: bool(asked.get(name, {}).get("binary_data", everything))


@dataclass(frozen=True)
class InferImages:
    """A `decode` for inference requests.

    Attributes:
        image_shape: (C, H, W). Tensors may be [N, C, H, W], [N, H, W, C], or [N, C * H * W], rows of the first.
        name: of the input, the only one that may hold numbers; None: any name.
        pixels: which values black and white have in a tensor of floats. Integers are 0 to 255.
    """

    image_shape: tuple[int, int, int]
    name: str | None = None
    pixels: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not self.pixels[0] < self.pixels[1]:
            raise ValueError(f"black must have a lower value than white, got {self.pixels[0]} and {self.pixels[1]}")

    async def __call__(self, request: Request) -> Tensor:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "encoding", "send the request without compression")
        message = Message.read("inputs", await request.body(), request.headers.get(JSON_LENGTH))
        numbers = [name for name, values in message.tensors.items() if values.dtype != object]
        if len(numbers) != 1 or self.name not in (None, *numbers):  # of two the model might take the other
            raise MessageError(f"the images are the only input of numbers{f', {self.name}' if self.name else ''}")
        return torch.from_numpy(self._pixels(self._arranged(message.tensors[numbers[0]])))

    def _arranged(self, values: np.ndarray) -> np.ndarray:
        """[N, C, H, W]"""
        channels, height, width = self.image_shape
        if values.shape[1:] == (height, width, channels):
            return values.transpose(0, 3, 1, 2)
        if values.shape[1:] == (channels * height * width,):
            return values.reshape(-1, *self.image_shape)
        return values

    def _pixels(self, values: np.ndarray) -> np.ndarray:
        """uint8. Values beyond black and white would be clamped here, and not in the model."""
        low, high = self.pixels if values.dtype.kind == "f" else (0, 255)
        if not ((values >= low) & (values <= high)).all():
            raise MessageError(f"pixels lie between {low:g} and {high:g}")
        if values.dtype.kind != "f":
            return values.astype(np.uint8)
        return np.rint((values.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)


@dataclass(frozen=True)
class InferAnswers:
    """Reads and withholds the `answers` of inference servers.

    Attributes:
        name: of the output with the probabilities [N, K]; None: the only one with two dimensions of floats.
        softmax: they are logits yet.
    """

    name: str | None = None
    softmax: bool = False

    def __call__(self, answer: Response) -> Tensor:
        tensors = self._message(answer).tensors
        rows = [name for name, values in tensors.items() if values.dtype.kind == "f" and values.ndim == 2]
        name = self.name or (rows[0] if len(rows) == 1 else None)
        if name not in rows:
            raise MessageError(f"the probabilities are no output of the model's answer ({', '.join(tensors)}); name it")
        probabilities = torch.from_numpy(tensors[name].astype(np.float32))
        return probabilities.softmax(1) if self.softmax else probabilities

    def withhold(self, answer: Response, refused: list[int]) -> Response | None:
        """Zeros and empty texts in place of what is refused, in each output; the parameter `samelib_refused` lists it.
        None where an output has not one row for each image."""
        message, count = self._message(answer), len(self(answer))
        if any(not values.ndim or len(values) != count for values in message.tensors.values()):
            return None
        for name, values in message.tensors.items():
            message.tensors[name] = values = values.copy()
            values[refused] = b"" if values.dtype == object else 0
        listed = {"samelib_refused": ",".join(map(str, refused))}
        message.head["parameters"] = message.head.get("parameters", {}) | listed
        body, json_length = message.write()
        partly = with_body(answer, body)
        if JSON_LENGTH in answer.headers:
            partly.headers[JSON_LENGTH] = str(json_length)
        return partly

    def _message(self, answer: Response) -> Message:
        return Message.read("outputs", answer.body, answer.headers.get(JSON_LENGTH))
