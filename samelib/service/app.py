"""The HTTP side of a defended prediction service: routes, errors, metrics (extra `samelib[serve]`)."""

import asyncio
import time
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from samelib import __version__
from samelib.detectors.base import Detector
from samelib.gateway import Policy
from samelib.models.classifiers import Victim
from samelib.service import schema
from samelib.service.batching import QueueFull
from samelib.service.guard import CHALLENGED, BadStamp, Guard, Reply
from samelib.service.intake import ApiError, Limits, read_body, read_query
from samelib.stamps import SpentFull, StampOffice, read_challenge


class Metrics:
    """What Prometheus reads at /metrics. No label comes from a client."""

    def __init__(self, guard: Guard):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "samelib_requests", "Requests to /v1/predict by HTTP status", ["status"], registry=self.registry
        )
        self.images = Counter("samelib_images", "Images by what became of them", ["outcome"], registry=self.registry)
        self.stamps = Counter("samelib_refused_stamps", "Refused stamps by reason", ["reason"], registry=self.registry)
        self.seconds = Histogram(
            "samelib_request_seconds", "From the headers of a request to its answer", registry=self.registry
        )
        self.p_values = Histogram(
            "samelib_p_value", "Conformal p-values: even between 0 and 1 where all queries are benign",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0), registry=self.registry,
        )  # fmt: skip
        waiting = Gauge("samelib_queue_images", "Images that wait or are in work", registry=self.registry)
        waiting.set_function(lambda: guard.batcher.pending)
        spent = Gauge("samelib_spent_stamps", "Spent stamps that have not expired", registry=self.registry)
        spent.set_function(lambda: len(guard.office.spent))

    def count(self, replies: list[Reply]) -> None:
        for reply in replies:
            self.images.labels(reply.kind).inc()
            if reply.p_value is not None:
                self.p_values.observe(reply.p_value)


def create_app(
    victim: Victim,
    detector: Detector | None = None,
    response: Policy | None = None,
    office: StampOffice | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """A prediction service, to be run by uvicorn (see samelib.service.server).

    Args:
        victim: answers; any callable will do (see Victim).
        detector: scores each query; None for a service without defence.
        response: what is done about strange queries; None: they are only counted in the metrics.
        office: signs and takes stamps of proof of work; by default one whose secret dies with the process.
        limits: see Limits.

    Raises:
        ValueError: a response without a detector, or a detector that was fitted to other images or classes.
    """
    limits = limits or Limits()
    guard = Guard(victim, detector, response, office, limits.images, limits.queue)
    metrics = Metrics(guard)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        await asyncio.to_thread(guard.warm_up)
        guard.batcher.start()
        yield
        await guard.batcher.close()
        guard.office.spent.close()

    app = FastAPI(
        title="samelib: a prediction service with SAME in front",
        version=__version__,
        description=schema.DESCRIPTION,
        lifespan=lifespan,
    )

    @app.post("/v1/predict", **schema.predict(victim, limits))
    async def predict(request: Request):
        start, status = time.perf_counter(), 500
        try:
            body = await read_body(request.stream(), request.headers, limits)
            query = await read_query(body, request.headers, victim.image_shape, limits)
            replies = await _replied(guard, query, limits)
            status = 200
        except ApiError as error:
            status = error.status
            if error.status == 403:
                metrics.stamps.labels(error.code).inc()
            raise
        finally:
            metrics.requests.labels(status).inc()
            metrics.seconds.observe(time.perf_counter() - start)
        metrics.count(replies)
        return JSONResponse({"results": [as_json(reply) for reply in replies]})

    @app.get("/v1/model", summary="What the service takes and names", response_model=schema.Model)
    async def model():
        return schema.Model(image_shape=victim.image_shape, classes=victim.classes, most_images=limits.images)

    @app.get("/healthz", summary="200 while the service answers")
    async def healthz():
        return {"status": "ok"}

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def prometheus():
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.state.limits = limits
    return app


async def _replied(guard: Guard, query, limits: Limits) -> list[Reply]:
    """The guard's replies, its refusals as the client reads them.

    Raises:
        ApiError: 403, 429, 503 or 504.
    """
    try:
        return await guard.reply(query.images, query.stamps, limits.answer_seconds)
    except BadStamp as error:
        raise ApiError(403, error.reason, str(error), error.image) from error
    except QueueFull as error:
        raise ApiError(429, "busy", "too many images are waiting; try again later", retry_after=1) from error
    except SpentFull as error:
        raise ApiError(503, "stamps_full", "too many stamps were spent; try again later", retry_after=60) from error
    except TimeoutError as error:
        raise ApiError(504, "timeout", "the answer took too long; nothing was spent", retry_after=1) from error


def as_json(reply: Reply) -> dict:
    """One entry of "results"."""
    result = {"status": reply.kind}
    if reply.probabilities is not None:
        result["probabilities"] = reply.probabilities
    if reply.kind == CHALLENGED:
        result |= {"challenge": reply.challenge, "bits": read_challenge(reply.challenge).bits}
    return result


async def _api_error(_: Request, error: ApiError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 408:  # but not after 413: a connection that is closed while the client sends may lose the answer
        headers["Connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    """404 and 405, in the same form."""
    return JSONResponse(ApiError(error.status_code, "http", str(error.detail)).body(), error.status_code, error.headers)


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    """A fault of the service or of its victim: uvicorn writes it into the log and closes the connection, which the client
    must know before it asks again; it is told no more than that."""
    body = ApiError(500, "fault", "the service failed; this is no fault of the request").body()
    return JSONResponse(body, 500, {"Connection": "close"})
