"""What a request must be before anything is computed: limits, refusals, and image files as checked pixels."""

import asyncio
import io
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

API_KEY = "X-API-Key"
LONGEST_KEY = 256  # characters
_MODES = {1: ("1", "L"), 3: ("L", "P", "RGB")}  # Pillow's modes that an image of so many channels may come in


@dataclass(frozen=True)
class Limits:
    """What one client, and all together, may ask of the service.

    Attributes:
        images: of one request, and of one batch of the model.
        body: bytes of one request.
        queue: images that wait or are in work; more get 429.
        body_seconds: in which the body of a request must arrive. (Headers are the reverse proxy's to time.)
        answer_seconds: a request may wait for the model.
        connections: open at a time; more get 503.

    Raises:
        ValueError: one is not positive, or a request does not fit into the queue.
    """

    images: int = 64
    body: int = 4 * 2**20
    queue: int = 1024
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

    def response(self) -> JSONResponse:
        """The refusal over HTTP: `error` is a text, as the Open Inference Protocol has it."""
        body = {"error": str(self), "code": self.code} | ({} if self.image is None else {"image": self.image})
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "APIKey"
        if (
            self.status in (408, 500) or self.code == "connections"
        ):  # not after 413: a connection closed while the client sends may lose the answer
            headers["Connection"] = "close"
        return JSONResponse(body, self.status, headers)


def api_key(request: Request) -> str:
    """The account that a request names in its header X-API-Key.

    Raises:
        ApiError: 401 without one; 400 for several, for one of more than 256 characters, or not printable ASCII.
    """
    keys = request.headers.getlist(API_KEY)
    if not any(keys):
        raise ApiError(401, "no_key", f"this service answers known accounts; send your API key as the header {API_KEY}")
    if len(keys) > 1 or len(keys[0]) > LONGEST_KEY or not (keys[0].isascii() and keys[0].isprintable()):
        words = f"the header {API_KEY} has one API key, of at most {LONGEST_KEY} printable ASCII characters"
        raise ApiError(400, "bad_key", words)
    return keys[0]


def replay(body: Message, receive: Receive) -> Receive:
    """A `receive` that gives this message, then whatever comes."""
    messages = [body]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _last(send: Send) -> Send:
    """A `send` that ends the connection with its answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return sending


class BodyLimits:
    """ASGI middleware: reads the body of each request, bounded in bytes and in seconds, before anything parses it. It turns
    requests away where too many connections are open, and ends connections with their answer before a stop."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = getattr(scope.get("app"), "state", None)  # of an app whose server is samelib's
        if getattr(state, "stopping", False):
            send = _last(send)
        try:
            self._admit(getattr(state, "connections", ()))
            body = await self._body(receive, Headers(scope=scope))
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await self._app(scope, replay(body, receive), send)

    def _admit(self, connections: Collection) -> None:
        if len(connections) > self._limits.connections:
            raise ApiError(503, "connections", "too many connections are open; try again later", retry_after=1)

    async def _body(self, receive: Receive, headers: Headers) -> Message:
        """One message with the whole body, or the one that says that the client is gone.

        Raises:
            ApiError: 413 or 408.
        """
        limits = self._limits
        too_large = ApiError(413, "too_large", f"a request has at most {limits.body:,} bytes; send fewer images")
        if int(headers.get("content-length", 0)) > limits.body:  # the server has checked that it is a number
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return message
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limits.body:
                        raise too_large
        except TimeoutError:
            words = f"the request did not arrive in {limits.body_seconds:g} seconds"
            raise ApiError(408, "too_slow", words) from None
        return {"type": "http.request", "body": bytes(body), "more_body": False}


def with_body(answer: Response, body: bytes) -> Response:
    """The same answer with another body."""
    other = Response(body, answer.status_code)
    other.raw_headers = [(name, value) for name, value in answer.raw_headers if name.lower() != b"content-length"]
    other.headers["content-length"] = str(len(body))
    return other


def decode_images(files: list[bytes], image_shape: tuple[int, int, int]) -> Tensor:
    """PNG and JPEG files as uint8 [N, C, H, W] (ApiError: see `decode_image`)."""
    return torch.from_numpy(np.stack([decode_image(data, image_shape, index) for index, data in enumerate(files)]))


def decode_image(data: bytes, image_shape: tuple[int, int, int], index: int = 0) -> np.ndarray:
    """One PNG or JPEG file as uint8 [C, H, W]. Its size is read from its header, before any pixel is unpacked.

    Raises:
        ApiError: 422, of the image at `index`.
    """
    channels, height, width = image_shape
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.size != (width, height):
                words = f"image is {image.width} x {image.height} pixels, the service takes {width} x {height}"
                raise ApiError(422, "image_size", words, index)
            if getattr(image, "n_frames", 1) != 1:
                raise ApiError(422, "image_file", "the file holds several pictures; send one a file", index)
            if image.mode not in _MODES[channels]:
                kind = "8-bit grey" if channels == 1 else "8-bit RGB, without transparency"
                raise ApiError(422, "image_mode", f"image has mode {image.mode}, the service takes {kind}", index)
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except ApiError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise ApiError(422, "image_file", "this is no PNG or JPEG file that can be read", index) from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
