"""SAME in front of an app that answers already: ASGI middleware, and how to read that app's queries and answers."""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from samelib.detectors.base import Detector
from samelib.gateway import Defence
from samelib.models.classifiers import Victim
from samelib.responses import Response as DefenceResponse
from samelib.service.guard import Guard
from samelib.service.intake import ApiError, BodyLimits, Limits, api_key, decode_images, replay, with_body
from samelib.service.metrics import CountRequests, Metrics, Outcome
from samelib.service.stamps import Challenge, StampOffice, query_digest

STAMP = "X-Stamp"
METRICS = "/samelib/metrics"
ASKS_NOTHING = ("GET", "HEAD", "OPTIONS")
OF_THE_CLIENT = (400, 401, 403, 404, 413, 422)  # status of an ApiError that is no failure of the defence

Decode = Callable[[Request], Awaitable[Tensor | None]]
Answers = Callable[[Response], Tensor]

_log = logging.getLogger("samelib")


@dataclass(frozen=True)
class Query:
    """What a request asks: images uint8 [N, C, H, W], whose they are, and the challenge that was solved for them."""

    images: Tensor
    account: str
    challenge: Challenge | None


class Guarded:
    """ASGI middleware: lets the app answer, scores the query beside the answer, and only then lets the answer go.

    Every request but GET, HEAD and OPTIONS is a query, unless `decode` says otherwise; WebSockets are closed. A request
    with refused images gets 403, unless `answers` can withhold their rows alone. Where work is asked, the request as a
    whole gets one challenge, as hard as those of its images together (402); it is sent again with the header X-Stamp.
    What the app itself refuses (any status but 2xx) passes. Where nothing is decided (`response=None`, or a `BanAccount`
    that does not enforce), answers do not wait for the score.

    Args:
        app: the service, ASGI.
        detector: fitted to images as `decode` gives them.
        response: what is done about strange queries; None: they are only counted in the metrics.
        decode: an async function: the images of a request, uint8 or float in [-1, 1] [N, C, H, W], as the model is given
            them; None where a request asks the model nothing. Where it raises, the client gets 422 (or an `ApiError` of
            its own), and the app is not asked.
        answers: the probabilities [N, K] in the app's answer. It may have a method `withhold(answer, refused)`: the answer
            without what it says of the images at these indices, or None where that cannot be done.
        account: who sends a request, for `BanAccount`; the name under which your service knows them.
        office: signs and takes stamps of proof of work; by default one whose secret dies with the process.
        limits: see Limits; of `connections` only the server can take care.
        fail_open: where the defence itself fails or is late, the answer goes out, and is counted; else nothing does.
        share: of the queries that the detector looks at, where nothing is decided.
        victim: shape and classes of the model, where the detector does not know them.

    Raises:
        NotFittedError, ValueError: see `Defence.elsewhere`.
    """

    def __init__(
        self,
        app: ASGIApp,
        detector: Detector,
        response: DefenceResponse | None = None,
        *,
        decode: Decode,
        answers: Answers | None = None,
        account: Callable[[Request], str] = api_key,
        office: StampOffice | None = None,
        limits: Limits | None = None,
        fail_open: bool = False,
        share: float = 1.0,
        victim: Victim | None = None,
    ):
        self._app, self._decode, self._answers = app, decode, answers or JsonAnswers()
        self._fail_open, limits = fail_open, limits or Limits()
        self._guard = Guard(Defence.elsewhere(detector, response, share, victim), office, limits, account)
        self._metrics = Metrics(self._guard)
        self._counted = CountRequests(BodyLimits(self._query, limits), self._metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await asyncio.to_thread(self._guard.warm_up, ask=False)
            await self._app(scope, receive, send)
            return await self._guard.close()
        if scope["type"] == "websocket":  # whatever is asked there is not looked at
            return await send({"type": "websocket.close", "code": 1008})
        if scope["method"] not in ASKS_NOTHING:
            return await self._counted(scope, receive, send)
        if scope["path"].removeprefix(scope.get("root_path", "")) == METRICS:
            return await self._metrics.page()(scope, receive, send)
        await self._app(scope, receive, send)

    async def _query(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await receive()  # one message: BodyLimits has read it
        if body["type"] == "http.disconnect":
            return
        request = Request(dict(scope), replay(body, receive))
        try:
            query = await self._read(request)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        again = replay(body, receive)
        if query is None:
            return await self._app(scope, again, send)
        whole = {name: value for name, value in scope.items() if name != "extensions"}  # answers come as bytes alone
        await self._app(whole, again, self._held(query, scope, receive, send))

    async def _read(self, request: Request) -> Query | None:
        """What the request asks (ApiError where that cannot be said, or its account is banned)."""
        account = await self._guard.admit(request)
        try:
            images = await self._decode(request)
            if images is None:
                return None
            # In a thread: in the first one of a process that was forked, PyTorch may wait for ever (LitServe).
            images = await asyncio.to_thread(self._guard.received, images)
        except ApiError:
            raise
        except (ValueError, TypeError) as error:
            raise ApiError(422, "query", str(error)) from error
        except Exception as error:  # a form without that field, a file that is no image: whatever `decode` met
            _log.warning("a request could not be decoded", exc_info=True)
            raise ApiError(422, "query", "this request cannot be read") from error
        stamp = request.headers.get(STAMP)
        return Query(images, account, self._guard.check(stamp, images) if stamp else None)

    def _held(self, query: Query, scope: Scope, receive: Receive, send: Send) -> Send:
        """A `send` for the app that keeps its answer back until it is whole and was judged."""
        answer = Response()

        async def hold(message: Message) -> None:
            if self._guard.watches:
                await send(message)
            if message["type"] == "http.response.start":
                answer.status_code, answer.raw_headers = message["status"], list(message.get("headers", ()))
            elif message["type"] == "http.response.body":
                answer.body += message.get("body", b"")
                if not message.get("more_body", False):
                    decided = await self._decided(query, answer)
                    if not self._guard.watches:
                        await decided(scope, receive, send)

        return hold

    async def _decided(self, query: Query, answer: Response) -> Response:
        """What goes to the client in place of this answer."""
        if not 200 <= answer.status_code < 300:
            return answer
        try:
            if query.challenge:
                await self._guard.spend([query.challenge])
                self._metrics.count([Outcome("answered")] * len(query.images))
                return answer
            return await self._judged(query, answer)
        except Exception as error:
            if isinstance(error, ApiError) and error.status in OF_THE_CLIENT:
                return error.response()
            if not isinstance(error, ApiError):
                _log.exception("the defence failed")
            self._metrics.failures.inc()
            if self._fail_open:
                return answer
            if not isinstance(error, ApiError):
                error = ApiError(
                    503, "defence", "the service cannot answer safely now; try again later", retry_after=60
                )
            return error.response()

    async def _judged(self, query: Query, answer: Response) -> Response:
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("the app compresses its answers; put what compresses them outside Guarded")
        probabilities = await asyncio.to_thread(self._answers, answer)
        _, p_values, refused, bits = await self._guard.judge(query.images, query.account, answers=probabilities)
        decided, others = answer, "answered"
        if refused.any():
            decided, others = await self._refusal(answer, refused.nonzero()[:, 0].tolist(), len(query.images))
        elif bits.any():
            decided, others = self._challenge(query, bits), "challenge"
        statuses = ["refused" if no else others for no in refused]
        self._metrics.count(map(Outcome, statuses, p_values.tolist()))
        return decided

    async def _refusal(self, answer: Response, refused: list[int], count: int) -> tuple[Response, str]:
        """What goes out where images are refused, and what becomes of the others."""
        withhold = getattr(self._answers, "withhold", None)
        partly = await asyncio.to_thread(withhold, answer, refused) if withhold and len(refused) < count else None
        if partly is not None:
            return partly, "answered"
        what = {"error": "these images are not answered", "code": "refused", "images": refused}
        return JSONResponse(what, 403), "withheld"

    def _challenge(self, query: Query, bits: Tensor) -> Response:
        """One puzzle for all images: 2^bits is the sum of what each of them costs."""
        whole = math.ceil(torch.exp2(bits[bits > 0].double()).sum().log2())
        challenge = self._guard.office.issue(query_digest(query.images), whole)
        words = f"solve this puzzle and send the request again, with the stamp as the header {STAMP}"
        return JSONResponse({"error": words, "code": "challenge", "challenge": challenge, "bits": whole}, 402)


def multipart_images(image_shape: tuple[int, int, int], field: str | None = None) -> Decode:
    """A `decode` for services that take PNG or JPEG files of the model's size in multipart forms.

    Args:
        image_shape: (C, H, W).
        field: of the form, in which texts are refused then; None: all files are images, and texts are not looked at.
    """

    async def decode(request: Request) -> Tensor:
        async with request.form() as form:
            named = [value for name, value in form.multi_items() if field in (None, name)]
            files = [await value.read() for value in named if isinstance(value, UploadFile)]
        if not files or (field and len(files) < len(named)):  # BentoML takes a text for the address of an image
            raise ApiError(422, "image", "there is no image file in this form, or something else in place of one")
        return await asyncio.to_thread(decode_images, files, image_shape)

    return decode


@dataclass(frozen=True)
class JsonAnswers:
    """Probabilities in a JSON body: [N, K], or [K] of one image.

    Attributes:
        name: under which they stand; None: they are the body.
    """

    name: str | None = "probabilities"

    def __call__(self, answer: Response) -> Tensor:
        body = json.loads(answer.body)
        rows = torch.tensor(body if self.name is None else body[self.name], dtype=torch.float32)
        return rows[None] if rows.ndim == 1 else rows

    def withhold(self, answer: Response, refused: list[int]) -> Response:
        """Null in place of what is refused, in every list that has an entry for each image; other things are left out."""
        body, count = json.loads(answer.body), len(self(answer))
        if self.name is None:
            return with_body(answer, _dumped(_without(body, refused)))
        lists = {name: value for name, value in body.items() if isinstance(value, list) and len(value) == count}
        return with_body(answer, _dumped({name: _without(value, refused) for name, value in lists.items()}))


def _without(entries: list, refused: list[int]) -> list:
    return [None if index in refused else entry for index, entry in enumerate(entries)]


def _dumped(body: list | dict) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
