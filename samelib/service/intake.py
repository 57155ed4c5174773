"""From the bytes of a request to checked images: every limit is enforced before what it bounds is unpacked."""

import asyncio
import io
import json
import logging
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from torch import Tensor

from samelib.stamps import STAMP_LENGTH

# Pillow warns of large images before it unpacks them; here they are refused by then (see decode_image). Set once, because
# warnings.catch_warnings is not safe in threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of characters that a client sent

MODES = {1: ("1", "L"), 3: ("L", "P", "RGB")}  # Pillow's modes that an image of so many channels may come in


@dataclass(frozen=True)
class Limits:
    """What one client, and all together, may ask of the service.

    Attributes:
        images: of one request, and of one batch of the model.
        body: bytes of one request.
        queue: images that wait or are in work; more get 429.
        header_seconds, body_seconds: in which the headers and the body of a request must arrive.
        answer_seconds: a request may wait for the model.
        connections: open at a time; more get 503.

    Raises:
        ValueError: one is not positive, or a request does not fit into the queue.
    """

    images: int = 64
    body: int = 4 * 2**20
    queue: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 10.0
    answer_seconds: float = 10.0
    connections: int = 512

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the limit {name} must be positive, got {value}")
        if self.queue < self.images:
            raise ValueError(f"a queue of {self.queue} images cannot take a request of {self.images}")


class ApiError(Exception):
    """A refusal as the client reads it.

    Args:
        status: of HTTP.
        code: one or two words for programs.
        message: a sentence for people: what is wrong and what to do.
        image: which image of the request it is about, from 0.
        retry_after: seconds after which it may go better.
    """

    def __init__(self, status: int, code: str, message: str, image: int | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.image, self.retry_after = status, code, image, retry_after

    def body(self) -> dict:
        place = {} if self.image is None else {"image": self.image}
        return {"error": {"code": self.code, "message": str(self)} | place}


class Query(NamedTuple):
    """Images uint8 [N, C, H, W], and for each the stamp that came with it, or None."""

    images: Tensor
    stamps: list[str | None]


async def read_body(stream: AsyncIterator[bytes], headers: Headers, limits: Limits) -> bytes:
    """The body, if it is not too large and arrives in time.

    Raises:
        ApiError: 413, 408, or 400 that nobody reads: the client is gone.
    """
    too_large = ApiError(413, "too_large", f"a request has at most {limits.body:,} bytes; send fewer images")
    if int(headers.get("content-length", 0)) > limits.body:  # the server has checked that it is a number
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in stream:
                body += chunk
                if len(body) > limits.body:
                    raise too_large
    except ClientDisconnect:
        raise ApiError(400, "malformed", "the connection ended within the request") from None
    except TimeoutError:
        raise ApiError(408, "too_slow", f"the request did not arrive in {limits.body_seconds:g} seconds") from None
    return bytes(body)


async def read_query(body: bytes, headers: Headers, image_shape: tuple[int, int, int], limits: Limits) -> Query:
    """Images and stamps of a request; they are decoded in another thread.

    Raises:
        ApiError: 415, 413, 400 or 422.
    """
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "media_type", "send the body as it is, not compressed")
    if kind == "multipart/form-data":
        files, stamps = await _form_fields(body, headers, limits)
        images = await asyncio.to_thread(_decoded, files, image_shape)
    elif kind == "application/json":
        images, stamps = await asyncio.to_thread(_from_json, body, image_shape, limits)
    else:
        raise ApiError(415, "media_type", "send multipart/form-data with PNG or JPEG files, or application/json")
    if stamps and len(stamps) != len(images):
        raise ApiError(
            422, "stamps", f"{len(images)} images came with {len(stamps)} stamps; send one for each, or none"
        )
    return Query(images, [stamp or None for stamp in stamps] or [None] * len(images))


def _check_count(count: int, limits: Limits) -> None:
    if count == 0:
        raise ApiError(422, "no_image", "the request holds no image; send at least one")
    if count > limits.images:
        raise ApiError(413, "too_many", f"a request has at most {limits.images} images, this one has {count:,}")


async def _form_fields(body: bytes, headers: Headers, limits: Limits) -> tuple[list[bytes], list[str]]:
    """The files named image and the fields named stamp, in order."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    most = {"max_files": limits.images, "max_fields": limits.images, "max_part_size": 2 * STAMP_LENGTH}
    try:
        form = await MultiPartParser(headers, stream(), **most).parse()
    except (MultiPartException, ValueError) as error:
        if str(getattr(error, "message", "")).startswith("Too many"):  # of files or fields: the parser's words
            raise ApiError(413, "too_many", f"a form has at most {limits.images} images and stamps") from error
        raise ApiError(400, "malformed", "this is no form of images and stamps that can be read") from error
    try:
        files, stamps = form.getlist("image"), form.getlist("stamp")
        wanted = all(isinstance(f, UploadFile) for f in files) and all(isinstance(s, str) for s in stamps)
        if not wanted or set(form) - {"image", "stamp"}:
            raise ApiError(422, "fields", "a form has files named image, and fields named stamp")
        _check_count(len(files), limits)
        return [await file.read() for file in files], stamps
    finally:
        await form.close()


def _decoded(files: list[bytes], shape: tuple[int, int, int]) -> Tensor:
    return torch.from_numpy(np.stack([decode_image(data, shape, place) for place, data in enumerate(files)]))


def decode_image(data: bytes, image_shape: tuple[int, int, int], place: int) -> np.ndarray:
    """One PNG or JPEG file as uint8 [C, H, W]. Its size is read from its header, before any pixel is unpacked.

    Raises:
        ApiError: 422, of the image at `place`.
    """
    channels, height, width = image_shape
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.size != (width, height):
                words = f"image is {image.width} x {image.height} pixels, the service takes {width} x {height}"
                raise ApiError(422, "image_size", words, place)
            if getattr(image, "n_frames", 1) != 1:
                raise ApiError(422, "image_file", "the file holds several pictures; send one a file", place)
            if image.mode not in MODES[channels]:
                kind = "8-bit grey" if channels == 1 else "8-bit RGB, without transparency"
                raise ApiError(422, "image_mode", f"image has mode {image.mode}, the service takes {kind}", place)
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except ApiError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise ApiError(422, "image_file", "this is no PNG or JPEG file that can be read", place) from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _from_json(body: bytes, shape: tuple[int, int, int], limits: Limits) -> tuple[Tensor, list[str]]:
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "malformed", "the body is no JSON (NaN and Infinity are none)") from error
    if not isinstance(content, dict) or set(content) - {"images", "stamps"}:
        raise ApiError(
            422, "fields", 'the body must be an object with "images", and "stamps" where they were asked for'
        )
    images, stamps = content.get("images"), content.get("stamps", [])
    if not isinstance(images, list):
        raise ApiError(422, "fields", '"images" must be a list of images [C][H][W] of integers 0..255')
    if not isinstance(stamps, list) or not all(stamp is None or isinstance(stamp, str) for stamp in stamps):
        raise ApiError(422, "fields", '"stamps" must be a list of texts')
    _check_count(len(images), limits)
    return torch.from_numpy(np.stack([_pixels(image, shape, place) for place, image in enumerate(images)])), stamps


def _pixels(image, shape: tuple[int, int, int], place: int) -> np.ndarray:
    """Nested lists as uint8 [C, H, W]. NumPy sees them last: of a long text among short ones it would make gigabytes."""
    words = f"an image is [{shape[0]}][{shape[1]}][{shape[2]}] integers 0..255"
    values = [image]
    for size in shape:
        if not all(isinstance(part, list) and len(part) == size for part in values):
            raise ApiError(422, "image_shape", f"{words}; this one has another shape", place)
        values = list(chain.from_iterable(values))
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) > 255:
        raise ApiError(422, "image_values", f"{words}; this one holds something else", place)
    return np.array(values, dtype=np.uint8).reshape(shape)
