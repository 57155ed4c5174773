"""A detector that listens: the payload logger of KServe sends it what was asked and answered, and nobody waits for it.

The logger posts CloudEvents (binary mode, https://cloudevents.io), one for a request and one for its answer, with the
same `ce-id`. What comes of them stands in /metrics; nothing can be refused here.
"""

from collections import OrderedDict
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from samelib.detectors.base import Detector
from samelib.gateway import Defence
from samelib.models.classifiers import Victim
from samelib.service.guard import Guard
from samelib.service.intake import ApiError, BodyLimits, Limits
from samelib.service.metrics import CountRequests, Metrics, Outcome
from samelib.service.tensors import InferAnswers, InferImages

REQUEST = "org.kubeflow.serving.inference.request"
ANSWER = "org.kubeflow.serving.inference.response"
MOST_PAIRS = 1_000  # requests whose answer has not come, or the other way round; then the oldest are dropped


class Pairs:
    """Requests and answers, each kept until the other comes."""

    def __init__(self):
        self._waiting: OrderedDict[str, tuple[str, Tensor | Response]] = OrderedDict()

    def add(self, number: str, kind: str, part: Tensor | Response) -> tuple[Tensor, Response] | None:
        """(images, answer) if this part completes a pair."""
        other = self._waiting.pop(number, None)
        if other is None or other[0] == kind:
            self._waiting[number] = (kind, part)
            if len(self._waiting) > MOST_PAIRS:
                self._waiting.popitem(last=False)
            return None
        return (part, other[1]) if kind == REQUEST else (other[1], part)


def create_listener(
    detector: Detector,
    *,
    decode: InferImages | None = None,
    answers: InferAnswers | None = None,
    limits: Limits | None = None,
    share: float = 1.0,
    victim: Victim | None = None,
) -> Starlette:
    """An app to be run by uvicorn (see samelib.service.server): POST / takes events, GET /metrics tells what came of them.

    Args:
        detector: fitted.
        decode, answers: which tensors are images and probabilities; by default the only ones that can be.
        limits: see Limits.
        share: of the queries that the detector looks at.
        victim: shape and classes of the model, where the detector does not know them.

    Raises:
        NotFittedError, ValueError: see `Defence.elsewhere`.
    """
    limits, pairs = limits or Limits(), Pairs()
    guard = Guard(Defence.elsewhere(detector, share=share, victim=victim), None, limits)
    metrics = Metrics(guard)
    decode, answers = decode or InferImages(detector.image_shape), answers or InferAnswers()

    @asynccontextmanager
    async def lifespan(_: Starlette):
        guard.warm_up(ask=False)
        yield
        await guard.close()

    async def judge(images: Tensor, answer: Response) -> None:
        _, p_values, _, _ = await guard.judge(images, "", answers=answers(answer))
        metrics.count(Outcome("watched", p_value) for p_value in p_values.tolist())

    async def event(request: Request) -> Response:
        number, kind = request.headers.get("ce-id"), request.headers.get("ce-type")
        if not number or kind not in (REQUEST, ANSWER):
            return ApiError(422, "event", f"send CloudEvents with ce-id, of ce-type {REQUEST} or {ANSWER}").response()
        try:
            part = guard.received(await decode(request)) if kind == REQUEST else Response(await request.body())
            if pair := pairs.add(number, kind, part):
                await judge(*pair)
        except ApiError as error:
            return error.response()
        except (ValueError, TypeError) as error:
            return ApiError(422, "event", str(error)).response()
        return Response(status_code=202)

    async def page(_: Request) -> Response:
        return metrics.page()

    app = Starlette(
        routes=[Route("/", event, methods=["POST"]), Route("/metrics", page)],
        middleware=[Middleware(CountRequests, metrics=metrics), Middleware(BodyLimits, limits=limits)],
        lifespan=lifespan,
    )
    app.state.limits = limits
    return app
