"""The prediction service under load: what the defence costs, whether anything is lost or leaks, and how it stops.

    python benchmarks/service.py load --append      detection off, on, on with proof of work, turn by turn
    python benchmarks/service.py soak --append      every answer checked, memory and counters watched
    python benchmarks/service.py stop --append      SIGTERM under load, over and over

Service and clients are processes of one machine, on loopback, and share its cores: a client that encodes a request or
solves a puzzle takes its time from the service. What counts are the ratios; `service_cpu_ms`, the processor time of the
service alone for each query, does not depend on the clients. A client sends its next query when it has the answer to the
last. With proof of work a query is two requests and the puzzle between them, and takes as long as all three.
The detector is calibrated as it should be but hardly trained, the victim not at all: the time does not depend on weights,
and the answers of an untrained victim tell images apart.
"""

import argparse
import json
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from detector import build_victim
from service_client import TOLERANCE, Images, Service, load, soak, until_stopped

from reproduction.results import append_rows, provenance
from samelib.data.groups import SIZES, Group
from samelib.data.synthetic import glyphs
from samelib.detectors.same import SameDetector
from samelib.presets import preset
from samelib.responses import ProofOfWork, Reject
from samelib.service import app, server
from samelib.service.stamps import SpentStamps, StampOffice
from samelib.store import ArtifactStore
from samelib.training import best_device

RESPONSES = {"off": "detection off", "reject": "reject", "proof-of-work": "proof of work"}
IMAGES = 1024  # that clients ask for, over and over
WARM_UP = 1.0  # seconds before each timed window
STAMP_SECONDS = 20  # a stamp of the soak lives so long: that many are remembered, not all
TWICE = 50  # every so many-th stamp of the soak is spent twice


class Recorder:
    """Between uvicorn and the app: notes the name of each request as soon as its headers are read."""

    def __init__(self, inner, accepted: list[str]):
        self._inner, self._accepted = inner, accepted

    async def __call__(self, scope, receive, send) -> None:
        self._accepted += [value.decode() for name, value in scope.get("headers", ()) if name == b"x-request"]
        await self._inner(scope, receive, send)


def build(tier: str, folder: str) -> None:
    """Saves a detector with the settings of a tier, and the images to ask with what must be answered to them."""
    count = SIZES[tier].calibration
    train, calibration, benign, seeds = glyphs("victim", 300 + count + IMAGES).split(200, count, IMAGES, 100)
    group = Group("glyphs", train, calibration, benign, seeds, glyphs("proxy", 10), glyphs("outliers", 10))
    group, victim = group.to(best_device()), build_victim()
    settings = preset(tier, group).same
    quick = {"mae_train": replace(settings.mae_train, epochs=1), "views": 1}
    quick["auxiliary_train"] = replace(settings.auxiliary_train, epochs=1)
    with TemporaryDirectory() as cache:
        detector = SameDetector(replace(settings, **quick)).fit(group, victim, ArtifactStore(cache))
    detector.save(f"{folder}/detector")
    x = group.benign_test.pixels()
    answers, p_values = victim(x).cpu().numpy(), detector.p_value(x).cpu().numpy()
    if torch.pdist(torch.from_numpy(answers), p=torch.inf).min() < 10 * TOLERANCE:
        raise RuntimeError("the victim's answers are too much alike: a swapped one would not be seen")
    clear = np.abs(p_values - detector.fpr) > 0.01  # rounding cannot carry these across the threshold
    kept = {"images": benign.images.numpy(), "answers": answers, "refused": p_values <= detector.fpr}
    np.savez(f"{folder}/images.npz", **{name: values[clear] for name, values in kept.items()})


def run_service(folder: str, response: str, stamps: str, lifetime: float, record: bool) -> None:
    """What `samelib serve` does, with a say in how long stamps live; prints the URL and, once stopped, the names of the
    requests that it accepted, where they are recorded."""
    detector = SameDetector.load(f"{folder}/detector", device=best_device())
    policy = {"reject": Reject(detector.fpr), "proof-of-work": ProofOfWork()}.get(response)
    office = StampOffice(secrets.token_bytes(32), lifetime, SpentStamps(stamps))
    made, accepted = app.create_app(detector.victim, detector if policy else None, policy, office), []
    if record:
        made.add_middleware(Recorder, accepted)
    bound = server.bound_socket("127.0.0.1", 0)
    print(server.url_of(bound), flush=True)
    try:
        server.serve(made, bound)
    finally:
        print(json.dumps(accepted))


def child(*words: str) -> subprocess.Popen:
    """This file in a process of its own."""
    return subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)


@contextmanager
def serving(folder: str, response: str, lifetime: float = 300.0, record: bool = False) -> Iterator[Service]:
    """A service of the detector that `build` put there, stopped in the end."""
    stamps = Path(folder) / f"{secrets.token_hex(4)}.sqlite"
    words = [response, str(stamps), str(lifetime), str(int(record))]
    process = child("run-service", folder, *words)
    try:
        service = Service(process.stdout.readline().strip(), process, stamps)
        while not service.listens():
            time.sleep(0.05)
        yield service
    finally:
        process.terminate()
        process.communicate()


def run_load(arguments: argparse.Namespace, folder: str, images: Images, pool: ProcessPoolExecutor) -> list[dict]:
    """Every response with one image a request and with several, turn by turn: a row of each."""
    setups = [(response, size) for size in arguments.sizes for response in RESPONSES]
    windows = {setup: [] for setup in setups}
    with ExitStack() as stack:
        services = {response: stack.enter_context(serving(folder, response)) for response in RESPONSES}
        for turn in range(arguments.rounds):
            for response, size in setups[turn % len(setups) :] + setups[: turn % len(setups)]:
                windows[response, size].append(window(services[response], images, pool, size, arguments))
    rows = []
    for response, size in setups:
        mine, off = windows[response, size], windows["off", size]
        ratios = [a["queries_per_second"] / b["queries_per_second"] for a, b in zip(mine, off, strict=True)]
        times = 1000 * np.concatenate([found["times"] for found in mine])
        total = size * len(times)
        row = {
            "benchmark": f"service: {RESPONSES[response]}, {'one image' if size == 1 else f'{size} images'} a request",
            "queries_per_second": median(found["queries_per_second"] for found in mine),
            "p50_ms": float(np.quantile(times, 0.5)),
            "p99_ms": float(np.quantile(times, 0.99)),
            "ratio_to_off": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "service_cpu_ms": 1000 * sum(found["cpu"] for found in mine) / total,
            "hashes_per_query": sum(found["hashes"] for found in mine) / total,
            "answered": total,
            "rounds": arguments.rounds,
        }
        rows.append(row)
        print(
            f"{row['benchmark']:44} {row['queries_per_second']:7.0f} queries/s, {row['ratio_to_off']:.2f} of off "
            f"({row['ratio_min']:.2f}-{row['ratio_max']:.2f})   p50 {row['p50_ms']:6.1f} ms, p99 {row['p99_ms']:6.1f} ms   "
            f"the service's own {row['service_cpu_ms']:.2f} ms and the client's {row['hashes_per_query']:.0f} hashes a query"
        )
    return rows


def window(service: Service, images: Images, pool: ProcessPoolExecutor, size: int, arguments) -> dict:
    """All clients on one service for some seconds: queries a second, seconds of each request, and what they cost."""
    parts = enumerate(images.parts(arguments.clients))
    begin = time.monotonic() + WARM_UP
    end = begin + arguments.seconds
    futures = [pool.submit(load, service.url, part, n, size, begin, end) for n, part in parts]
    before, after = (service.cpu_seconds_at(moment) for moment in (begin, end))
    times, hashes = zip(*(future.result() for future in futures), strict=True)
    times = [seconds for some in times for seconds in some]
    rate = size * len(times) / arguments.seconds
    return {"queries_per_second": rate, "times": times, "hashes": sum(hashes), "cpu": after - before}


def run_soak(arguments: argparse.Namespace, folder: str, images: Images, pool: ProcessPoolExecutor) -> list[dict]:
    """All requests to a service that rejects, then a fifth as many queries to one that asks for work: a row of each."""
    rows = []
    for response, queries in (("reject", arguments.requests), ("proof-of-work", arguments.requests // 5)):
        common = (-(-queries // arguments.clients), response == "reject", TWICE)
        with serving(folder, response, STAMP_SECONDS) as service:
            start = time.perf_counter()
            futures = [
                pool.submit(soak, service.url, part, n, *common)
                for n, part in enumerate(images.parts(arguments.clients))
            ]
            samples = watch(service, futures)
            seconds = time.perf_counter() - start
            row = soaked(service, sum((future.result() for future in futures), Counter()), samples)
        rows.append({"benchmark": f"service: soak, {RESPONSES[response]}", "minutes": seconds / 60} | row)
        print(json.dumps(rows[-1], indent=2))
        if row["lost"] or row["wrong"] or row["miscounted"] or row["spent_twice"]:
            sys.exit("the service failed")
    return rows


def watch(service: Service, futures: list[Future]) -> list[tuple[float, float, float]]:
    """Every second until all are done, and then once more: requests answered, MiB held, stamps remembered."""
    samples, done = [], False
    while not done:
        done = not wait(futures, timeout=1).not_done
        samples.append((service.requests(), service.resident(), service.counters()["samelib_spent_stamps",]))
    return samples


def soaked(service: Service, seen: Counter, samples: list[tuple[float, float, float]]) -> dict:
    """What clients saw, whether the service counted the same, and how its memory went after the first tenth."""
    counters = service.counters()
    expected = {("samelib_requests_total", "200"): seen["sent"] - seen["again"]}
    expected |= {("samelib_requests_total", "403"): seen["again"]}
    for outcome, name in (("answered", "answered"), ("refused", "refused"), ("challenge", "stamps")):
        expected["samelib_images_total", outcome] = seen[name]
    held = [mib for requests, mib, _ in samples if requests >= seen["sent"] / 10]
    return {
        "requests": seen["sent"],
        **{outcome: seen[outcome] for outcome in ("answered", "refused", "wrong", "lost")},
        "miscounted": sum(abs(counters.get(name, 0) - count) for name, count in expected.items()),
        "resident_mib": held[0],
        "growth_mib": held[-1] - held[0],
        "growth_most_mib": max(held) - held[0],
        "stamps_spent": seen["stamps"],
        "stamps_remembered_most": max(remembered for *_, remembered in samples),
        "store_mib": sum(file.stat().st_size for file in service.stamps.parent.glob(f"{service.stamps.name}*")) / 2**20,
        "stamps_sent_again": seen["again"],
        "spent_twice": seen["taken"],
    }


def run_stop(arguments: argparse.Namespace, folder: str, images: Images, pool: ProcessPoolExecutor) -> list[dict]:
    """SIGTERM to a service that is asked for one image and for several by turns: what became of the requests."""
    total, slowest = Counter(), 0.0
    for turn in range(arguments.stops):
        with serving(folder, ("reject", "proof-of-work")[turn % 2], record=True) as service:
            parts = enumerate(images.parts(arguments.clients))
            futures = [pool.submit(until_stopped, service.url, part, n, (1, 16)[n % 2]) for n, part in parts]
            while service.requests() < 300 + 50 * turn:
                time.sleep(0.02)
            start = time.perf_counter()
            service.process.send_signal(signal.SIGTERM)
            accepted = set(json.loads(service.process.stdout.read()))
            slowest = max(slowest, time.perf_counter() - start)
            found = [future.result() for future in futures]
        answered, unanswered = ({name for f in found for name in f[kind]} for kind in ("answered", "unanswered"))
        counts = {"sent": len(answered | unanswered), "accepted": len(accepted), "answered": len(answered)}
        counts |= {"closed_before_read": len(unanswered - accepted), "refused_to_connect": len(found)}
        counts |= {"lost": len(accepted - answered), "failed_exits": int(service.process.wait() != 0)}
        print(f"stop {turn + 1}:", counts)
        total += Counter(counts)
    row = {name: total[name] for name in counts} | {"stops": arguments.stops, "stop_seconds_most": slowest}
    if row["lost"] or row["failed_exits"]:
        sys.exit("the service failed")
    return [{"benchmark": "service: SIGTERM under load"} | row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="load | soak | stop")
    for name, run, tier in (("load", run_load, "lecture"), ("soak", run_soak, "smoke"), ("stop", run_stop, "smoke")):
        command = commands.add_parser(name)
        command.set_defaults(run=run, name=name)
        command.add_argument("--tier", default=tier, choices=("smoke", "lecture", "paper"), help=f"(default {tier})")
        command.add_argument("--clients", type=int, default=16, help="(default 16)")
        command.add_argument("--append", action="store_true", help="add the rows to results/benchmarks.jsonl")
        if name == "load":
            command.add_argument("--rounds", type=int, default=5, help="of all responses (default 5)")
            command.add_argument("--seconds", type=float, default=8.0, help="of each response in a round (default 8)")
            command.add_argument(
                "--sizes", type=int, nargs="+", default=(1, 16), help="images a request (default 1 16)"
            )
        if name == "soak":
            command.add_argument("--requests", type=int, default=100_000, help="(default 100,000)")
        if name == "stop":
            command.add_argument("--stops", type=int, default=6, help="(default 6)")
    if sys.argv[1:2] == ["build"]:
        return build(*sys.argv[2:])
    if sys.argv[1:2] == ["run-service"]:
        folder, response, stamps, lifetime, record = sys.argv[2:]
        return run_service(folder, response, stamps, float(lifetime), record == "1")
    arguments, start = parser.parse_args(), time.perf_counter()
    with TemporaryDirectory() as folder, ProcessPoolExecutor(arguments.clients) as pool:
        pool.submit(int).result()  # the clients are started before anything is timed
        if child("build", arguments.tier, folder).wait():
            sys.exit("there is no detector to serve")
        rows = arguments.run(arguments, folder, Images.read(f"{folder}/images.npz"), pool)
    for row in rows:
        row |= {"clients": arguments.clients, "detector": f"{arguments.tier} tier, glyphs"}
    if arguments.append:
        origin = provenance(best_device(), "glyphs", 0, "benchmark", time.perf_counter() - start)
        append_rows(Path(__file__).parent.parent / "results" / "benchmarks.jsonl", [row | origin for row in rows])


if __name__ == "__main__":
    main()
