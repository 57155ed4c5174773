"""The HTTP side of a defended prediction service: routes, errors, metrics (extra `samelib[serve]`)."""

import asyncio
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException
from torch import Tensor

from samelib import __version__
from samelib.detectors.base import Detector
from samelib.gateway import Defence
from samelib.models.classifiers import Victim
from samelib.responses import Response as DefenceResponse
from samelib.service import schema
from samelib.service.guard import Guard, Reply
from samelib.service.intake import API_KEY, ApiError, BodyLimits, Limits, decode_images
from samelib.service.metrics import CountRequests, Metrics, Outcome
from samelib.service.open_inference import open_inference
from samelib.service.stamps import StampOffice


def create_app(
    victim: Victim,
    detector: Detector | None = None,
    response: DefenceResponse | None = None,
    office: StampOffice | None = None,
    limits: Limits | None = None,
    name: str = "victim",
    share: float = 1.0,
) -> FastAPI:
    """A prediction service, to be run by uvicorn (see samelib.service.server).

    Args:
        victim: answers; any callable will do (see Victim).
        detector: scores each query; None for a service without defence.
        response: what is done about strange queries; None: they are only counted in the metrics.
        office: signs and takes stamps of proof of work; by default one whose secret dies with the process.
        limits: see Limits.
        name: of the model, in the paths of the Open Inference Protocol.
        share: of the queries that the detector looks at, where nothing is decided.

    Raises:
        ValueError: a response without a detector, or one that cannot work with it (`Response.prepare`), a detector that
            was fitted to other images or classes, or a name that is no part of a path.
    """
    limits = limits or Limits()
    guard = Guard(Defence(victim, detector, response, share), office, limits)
    metrics = Metrics(guard)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        await asyncio.to_thread(guard.warm_up)
        yield
        await guard.close()

    # For /docs alone: the guard reads the key, and says more than FastAPI does of one that is missing.
    key_in_docs = APIKeyHeader(name=API_KEY, auto_error=False) if guard.accounts else lambda: None

    async def admitted(request: Request, _: Annotated[str | None, Depends(key_in_docs)]) -> str:
        return await guard.admit(request)

    async def reply(images: Tensor, stamps: list[str], account: str) -> list[Reply]:
        try:
            replies = await guard.reply(images, stamps, account)
        except ApiError as error:
            if error.status == 403:
                metrics.stamps.labels(error.code).inc()
            raise
        metrics.count(Outcome(reply.status, reply.p_value) for reply in replies)
        return replies

    app = FastAPI(
        title="samelib: a prediction service with SAME in front",
        version=__version__,
        description=schema.DESCRIPTION,
        lifespan=lifespan,
    )
    ImageForm = schema.image_form(limits.images)

    @app.post(
        "/v1/predict",
        summary="Probabilities of the classes for image files",
        responses=schema.ERRORS,
        response_model_exclude_none=True,
    )
    async def predict(
        form: Annotated[ImageForm, Form(media_type="multipart/form-data")], account: Annotated[str, Depends(admitted)]
    ) -> schema.Results:
        files = [await file.read() for file in form.image]
        images = await asyncio.to_thread(decode_images, files, victim.image_shape)
        return schema.Results(results=[r._asdict() for r in await reply(images, form.stamp, account)])

    @app.get("/v1/model", summary="What the service takes and names")
    async def model() -> schema.Model:
        return schema.Model(image_shape=victim.image_shape, classes=victim.classes, most_images=limits.images)

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def prometheus():
        return metrics.page()

    app.include_router(open_inference(admitted, reply, victim, limits.images, name))
    app.add_middleware(BodyLimits, limits=limits)
    app.add_middleware(CountRequests, metrics=metrics)  # outside the other: what that refuses is counted too
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.state.limits = limits
    return app


async def _api_error(_: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong with a body; names that the client made up are not said back."""
    first = error.errors()[0]
    where = "" if first["type"] == "extra_forbidden" else " ".join(map(str, first["loc"][1:]))
    return ApiError(422, "invalid", f"{where or 'body'}: {first['msg']}; /docs says what the service takes").response()


async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    """400, 404 and 405, in the same form."""
    response = ApiError(error.status_code, "http", str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    """A fault of the service or of its victim: uvicorn writes it into the log and closes the connection, which the client
    must know before it asks again; it is told no more than that."""
    return ApiError(500, "fault", "the service failed; this is no fault of the request").response()
