"""A defence in front of another server that speaks the Open Inference Protocol: Triton, KServe, MLServer, OpenVINO."""

import re
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from samelib.detectors.base import Detector
from samelib.responses import Response as DefenceResponse
from samelib.service.intake import ApiError, Limits
from samelib.service.middleware import Guarded
from samelib.service.tensors import InferAnswers, InferImages

# Of one connection alone (RFC 9110, 7.6.1), or made anew by whoever sends the message on.
OWN_HEADERS = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "accept-encoding", "content-encoding", "date", "server",
}  # fmt: skip
READABLE = re.compile(r"/v2(/[\w-][\w.-]*)*/?", re.ASCII)  # what may be read: health and metadata, no ".."


def create_proxy(
    upstream: str,
    detector: Detector,
    response: DefenceResponse | None = None,
    *,
    decode: InferImages | None = None,
    answers: InferAnswers | None = None,
    limits: Limits | None = None,
    **guarded,
) -> Starlette:
    """An app to be run by uvicorn (see samelib.service.server) that passes inference requests on to one model, and its
    answers back where the defence lets them. Health and metadata are passed on; anything else is not there.

    Args:
        upstream: the model, as http://HOST:PORT/v2/models/NAME, with /versions/VERSION where it has versions.
        detector, response: see `Guarded`, whose other arguments may follow too (office, account, fail_open, victim).
        decode, answers: which tensors are images and probabilities; by default the only ones that can be.
        limits: see Limits; `answer_seconds` are given to the model and to the detector each.

    Raises:
        ValueError: the URL is not of this form, or what `Guarded` refuses.
    """
    url, limits = urlsplit(upstream.rstrip("/")), limits or Limits()
    if url.scheme not in ("http", "https") or not re.fullmatch(r"/v2/models/[^/]+(/versions/[^/]+)?", url.path):
        raise ValueError(f"the upstream is http://HOST:PORT/v2/models/NAME, got {upstream}")
    infer = f"{url.path}/infer"

    @asynccontextmanager
    async def lifespan(app: Starlette):
        # Its own address and no other: proxies of the environment are for the outside.
        async with httpx.AsyncClient(
            base_url=f"{url.scheme}://{url.netloc}", timeout=limits.answer_seconds, trust_env=False
        ) as app.state.client:
            yield

    async def forward(request: Request) -> Response:
        path = request.scope["path"]  # not of the URL, which older Starlette makes of the Host header too
        if path != infer if request.method == "POST" else not READABLE.fullmatch(path):
            return ApiError(404, "http", f"POST {infer}, or GET what /v2 says of the model").response()
        headers = [(name, value) for name, value in request.headers.items() if name not in OWN_HEADERS]
        try:
            answer = await request.app.state.client.request(
                request.method,
                path,
                content=await request.body(),
                headers=[*headers, ("accept-encoding", "identity")],
            )
        except httpx.TimeoutException:
            return ApiError(504, "timeout", "the model took too long; try again later", retry_after=1).response()
        except httpx.HTTPError:
            return ApiError(502, "upstream", "the model cannot be reached; try again later", retry_after=1).response()
        passed = Response(answer.content, answer.status_code)
        named = {name: value for name, value in answer.headers.items() if name not in OWN_HEADERS}
        passed.headers.update(named)
        return passed

    shape = detector.image_shape
    guard = Middleware(
        Guarded,
        detector=detector,
        response=response,
        decode=decode or (shape and InferImages(shape)),
        answers=answers or InferAnswers(),
        limits=limits,
        **guarded,
    )
    app = Starlette(
        routes=[Route("/{path:path}", forward, methods=["GET", "POST"])], middleware=[guard], lifespan=lifespan
    )
    app.middleware_stack = app.build_middleware_stack()  # what Guarded refuses is known before anything is served
    app.state.limits = limits
    return app
