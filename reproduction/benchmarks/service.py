"""The prediction service under load: queries a second and response times without detection, with reject, with proof of work.

    locust -f reproduction/benchmarks/service.py --host http://127.0.0.1:8000     any running service, and locust's own page
    python reproduction/benchmarks/service.py DETECTOR --append                   starts `samelib serve` itself, turn by turn

A client sends its next query when it has the answer to the last. With proof of work a query is two requests and the puzzle
between them, and takes as long as all three. Service and clients share the cores of one machine, and the clients one of
them: what counts are the ratios. `service_cpu_ms`, the service's own processor time for each query, does not depend on
the clients. Locust rounds response times to two digits.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median

import gevent
import psutil
from locust import HttpUser, events, task

from samelib.data.groups import load_group
from samelib.service.client import as_png
from samelib.service.stamps import solve
from samelib.training import best_device

RESPONSES = {"off": "detection off", "reject": "reject", "proof-of-work": "proof of work"}
DATA = ("glyphs", "shapes")  # embedded: every locust draws them for itself


@events.init_command_line_parser.add_listener
def add_options(parser) -> None:
    parser.add_argument("--images", type=int, default=1, help="images a request (default 1)")
    parser.add_argument("--data", choices=DATA, default="glyphs", help="what is asked (default glyphs)")


@events.init.add_listener
def draw_images(environment, **_) -> None:
    images = load_group(environment.parsed_options.data).benign_test.images[:100]  # that trained nothing
    Client.files = cycle([("image", ("image.png", as_png(image), "image/png")) for image in images])
    gevent.get_hub().loop.update_now()  # it would count the seconds of imports and drawing into --run-time


class Client(HttpUser):
    """Asks for the next image, round and round. Locust's "query" is one with its puzzles, and its length their hashes."""

    @task
    def query(self) -> None:
        start, hashes = time.perf_counter(), 0
        files = [next(self.files) for _ in range(self.environment.parsed_options.images)]
        results = self.predict(files)
        if results and results[0]["status"] == "challenge":
            solved = [solve(result["challenge"]) for result in results]
            results, hashes = self.predict(files, [stamp for stamp, _ in solved]), sum(work for _, work in solved)
        milliseconds = 1000 * (time.perf_counter() - start)
        error = None if results else RuntimeError("not answered")
        self.environment.events.request.fire(
            request_type="query", name="query", response_time=milliseconds, response_length=hashes, exception=error
        )

    def predict(self, files: list, stamps: list[str] = ()) -> list[dict]:
        """The results of one request; none where it failed, which locust notes."""
        reply = self.client.post("/v1/predict", files=files, data={"stamp": stamps})
        return reply.json()["results"] if reply.ok else []


@contextmanager
def serving(detector: str, response: str) -> Iterator[tuple[str, psutil.Popen]]:
    """`samelib serve` on a free port: its URL and its process, stopped in the end."""
    command = [sys.executable, "-m", "samelib.cli", "serve", detector, "--response", response, "--port", "0"]
    with psutil.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split("/docs")[0], process
        finally:
            process.terminate()


def window(url: str, service: psutil.Popen, images: int, arguments: argparse.Namespace) -> dict:
    """All clients on one service for some seconds: locust's record of the queries, and the processor time of the service."""
    command = [sys.executable, "-m", "locust", "-f", __file__, "--headless", "--skip-log", "--json", "--host", url]
    options = {"users": arguments.clients, "spawn-rate": arguments.clients, "images": images, "data": arguments.data}
    options["run-time"] = f"{arguments.seconds}s"
    before = service.cpu_times()
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    records = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    (record,) = [record for record in records if record["method"] == "query"]
    after = service.cpu_times()
    record["rate"] = images * record["num_requests"] / (record["last_request_timestamp"] - record["start_time"])
    return record | {"cpu": after.user + after.system - before.user - before.system}


def row_of(response: str, images: int, windows: list[dict], off: list[dict]) -> dict:
    """One row of results/benchmarks.jsonl, from the windows of a response and those without detection beside them."""
    ratios = [mine["rate"] / other["rate"] for mine, other in zip(windows, off, strict=True)]
    times = sorted(float(t) for w in windows for t, count in w["response_times"].items() for _ in range(count))
    queries = images * len(times)
    return {
        "benchmark": f"service: {RESPONSES[response]}, {'one image' if images == 1 else f'{images} images'} a request",
        "queries_per_second": median(w["rate"] for w in windows),
        "p50_ms": times[len(times) // 2],
        "p99_ms": times[len(times) * 99 // 100],
        "ratio_to_off": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "service_cpu_ms": 1000 * sum(w["cpu"] for w in windows) / queries,
        "hashes_per_query": sum(w["total_content_length"] for w in windows) / queries,
        "answered": queries,
        "rounds": len(windows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", metavar="DETECTOR", help="a folder written by samelib fit")
    parser.add_argument("--data", choices=DATA, default="glyphs", help="what it was fitted on (default glyphs)")
    parser.add_argument("--clients", type=int, default=16, help="(default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="of all responses (default 5)")
    parser.add_argument("--seconds", type=int, default=10, help="of each response in a round (default 10)")
    parser.add_argument("--sizes", type=int, nargs="+", default=(1, 16), help="images a request (default 1 16)")
    parser.add_argument("--append", action="store_true", help="add the rows to results/benchmarks.jsonl")
    arguments, start = parser.parse_args(), time.perf_counter()
    windows = {(response, images): [] for images in arguments.sizes for response in RESPONSES}
    with ExitStack() as stack:
        services = {response: stack.enter_context(serving(arguments.detector, response)) for response in RESPONSES}
        for _ in range(arguments.rounds):
            for response, images in windows:
                windows[response, images].append(window(*services[response], images, arguments))
    rows = [row_of(*setup, windows[setup], windows["off", setup[1]]) for setup in windows]
    print("\n".join(map(json.dumps, rows)))
    if arguments.append:
        from reproduction.rows import append_rows, provenance  # here, because every locust loads this file

        origin = provenance(best_device(), arguments.data, 0, "benchmark", time.perf_counter() - start, None)
        origin |= {"clients": arguments.clients, "detector": Path(arguments.detector).name}
        append_rows(Path(__file__).parents[1] / "results" / "benchmarks.jsonl", [row | origin for row in rows])


if __name__ == "__main__":
    main()
