"""What Prometheus reads of a defended service."""

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from samelib.service.guard import Guard

NEAREST = 5  # accounts to a ban, of which /metrics tells the wealth


class Outcome(NamedTuple):
    """What became of one image, and the detector's p-value; None or NaN where it did not look."""

    status: str
    p_value: float | None = None


class Metrics:
    """What Prometheus reads at /metrics. No label comes from a client."""

    def __init__(self, guard: Guard):
        self.registry = CollectorRegistry()
        self.requests = Counter("samelib_requests", "Requests by HTTP status", ["status"], registry=self.registry)
        self.images = Counter("samelib_images", "Images by what became of them", ["outcome"], registry=self.registry)
        self.stamps = Counter("samelib_refused_stamps", "Refused stamps by reason", ["reason"], registry=self.registry)
        self.failures = Counter(
            "samelib_defence_failures", "Answers that the defence could not judge", registry=self.registry
        )
        self.seconds = Histogram(
            "samelib_request_seconds", "From the headers of a request to its answer", registry=self.registry
        )
        self.p_values = Histogram(
            "samelib_p_value", "Conformal p-values: even between 0 and 1 where all queries are benign",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0), registry=self.registry,
        )  # fmt: skip
        waiting = Gauge("samelib_queue_images", "Images that wait or are in work", registry=self.registry)
        waiting.set_function(lambda: guard.batcher.pending)
        spent = Gauge("samelib_spent_stamps", "Spent stamps that are remembered", registry=self.registry)
        spent.set_function(lambda: len(guard.office.spent))
        self.registry.register(Accounts(guard))

    def count(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            self.images.labels(outcome.status).inc()
            if outcome.p_value is not None and not math.isnan(outcome.p_value):
                self.p_values.observe(outcome.p_value)

    def page(self) -> Response:
        return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class Accounts(Collector):
    """What Prometheus reads of accounts: bans of this process, and how near to one the nearest are."""

    def __init__(self, guard: Guard):
        self._guard = guard

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        book = self._guard.accounts
        yield CounterMetricFamily("samelib_bans", "Accounts that this process banned", value=book.bans if book else 0)
        words = "Natural logarithm of the wealth of the accounts nearest to a ban, the nearest first"
        wealth = GaugeMetricFamily("samelib_account_log_wealth", words, labels=["rank"])
        for rank, log_wealth in enumerate(book.richest(NEAREST) if book else [], 1):
            wealth.add_metric([str(rank)], log_wealth)
        yield wealth


class CountRequests:
    """ASGI middleware: how many POST requests ended with which status, and after how many seconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 500  # an unexpected error is answered further out

        async def noting(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.requests.labels(status).inc()
            self._metrics.seconds.observe(time.perf_counter() - start)
