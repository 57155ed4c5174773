"""What benchmarks/service.py sees of a service from outside: what it does to its clients and, by the system, to itself.

Each client is a process with one connection, so that none waits for the puzzle of another.
"""

import http.client
import itertools
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from samelib.service.client import as_png
from samelib.service.stamps import solve

PATIENCE = 60.0  # seconds to wait for any answer
STOPPED_BY = 180.0  # seconds after which a service must have been stopped
TOLERANCE = 1e-5  # of probabilities: batches of other sizes are rounded otherwise
BOUNDARY = "benchmark"
FILE = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="i.png"\r\n\r\n'.encode()
STAMP = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="stamp"\r\n\r\n'.encode()


class Images(NamedTuple):
    """What is asked, and what must be answered.

    Attributes:
        files: M images as PNG files.
        answers: the victim's own, float32 [M, K].
        refused: bool [M], what the detector at its own false-positive rate says of them.
    """

    files: list[bytes]
    answers: np.ndarray
    refused: np.ndarray

    @classmethod
    def read(cls, path: str) -> "Images":
        """From what `build` of benchmarks/service.py wrote."""
        with np.load(path) as found:
            files = [as_png(torch.from_numpy(image)) for image in found["images"]]
            return cls(files, found["answers"], found["refused"])

    def parts(self, clients: int) -> "list[Images]":
        """What each client asks: no two ever ask the same image, so that a swapped answer is a wrong one."""
        return [Images(*(values[n::clients] for values in self)) for n in range(clients)]

    def turns(self, size: int):
        """Places of images, `size` at a time, round and round."""
        places = itertools.cycle(range(len(self.files)))
        while True:
            yield [next(places) for _ in range(size)]


class Service(NamedTuple):
    """A running service: where it is, its process, and the file of its spent stamps."""

    url: str
    process: subprocess.Popen
    stamps: Path

    def listens(self) -> bool:
        """Raises RuntimeError when it has ended instead."""
        if self.process.poll() is not None:
            raise RuntimeError("the service did not start; it says why above")
        try:
            return bool(self.counters())
        except urllib.error.URLError:
            return False

    def counters(self) -> dict:
        """Its Prometheus metrics: (name, values of labels...) -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    def requests(self) -> float:
        """Answered requests to /v1/predict, whatever the answer."""
        return sum(value for (name, *_), value in self.counters().items() if name == "samelib_requests_total")

    def resident(self) -> float:
        """MiB that it holds now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_seconds_at(self, moment: float) -> float:
        """Processor time that it has used by then, a time of the monotonic clock."""
        time.sleep(max(0.0, moment - time.monotonic()))
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class NotOK(Exception):
    """An answer of another status than 200: its status and its code."""


class Client:
    """One connection to a service. `sent` numbers its requests, `answered` holds the numbers of those that were."""

    def __init__(self, url: str, files: list[bytes], name: int):
        self._http = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
        self._files, self._name = files, name
        self.sent, self.answered = 0, []

    def predict(self, places: list[int], stamps: tuple[str, ...] = ()) -> list[dict]:
        """The results of one request.

        Raises:
            NotOK: another status than 200.
            OSError, HTTPException: no answer, or half of one.
        """
        parts = [FILE + self._files[place] for place in places] + [STAMP + stamp.encode() for stamp in stamps]
        body = b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        number, self.sent = self.sent, self.sent + 1
        headers = {"Content-Type": kind, "X-Request": f"{self._name}-{number}"}
        try:
            self._http.request("POST", "/v1/predict", body, headers)
            answer = self._http.getresponse()
            content = json.loads(answer.read())
        except (OSError, http.client.HTTPException):
            self._http.close()
            raise
        self.answered.append(number)
        if answer.status != 200:
            raise NotOK(answer.status, content["error"]["code"])
        return content["results"]

    def query(self, places: list[int]) -> tuple[list[dict], tuple[str, ...], int]:
        """The final results of one query or a batch; the stamps and the hashes that they cost. (Errors: see `predict`.)"""
        results = self.predict(places)
        if results[0]["status"] != "challenge":
            return results, (), 0
        stamps, hashes = zip(*(solve(result["challenge"]) for result in results), strict=True)
        return self.predict(places, stamps), stamps, sum(hashes)


def load(url: str, images: Images, name: int, size: int, begin: float, end: float) -> tuple[list[float], int]:
    """Asks `size` images a request, over and over: seconds of each query that ended between `begin` and `end` of the
    monotonic clock, and the hashes that these cost in all."""
    client, times, worked = Client(url, images.files, name), [], 0
    for places in images.turns(size):
        start = time.monotonic()
        hashes = client.query(places)[2]
        now = time.monotonic()
        if now >= end:
            return times, worked
        if now >= begin:
            times.append(now - start)
            worked += hashes


def soak(url: str, images: Images, name: int, queries: int, refuses: bool, twice: int) -> Counter:
    """Asks one image a request and checks each answer against the victim's own.

    Args:
        refuses: the service rejects at the detector's false-positive rate, else it answers everything in the end.
        twice: every so many-th stamp is sent again, to be refused.

    Returns:
        How many queries were `answered`, `refused`, `wrong` (not what they should have been) or `lost`; requests `sent`,
        `stamps` spent, and how many were sent `again`, and of these `taken`.
    """
    client, seen = Client(url, images.files, name), Counter()
    for number, (place,) in enumerate(itertools.islice(images.turns(1), queries)):
        wanted = "refused" if refuses and images.refused[place] else "answered"
        try:
            results, stamps, _ = client.query([place])
            right = len(results) == 1 and _as_wanted(**results[0], wanted=wanted, answer=images.answers[place])
            seen[wanted if right else "wrong"] += 1
            seen["stamps"] += len(stamps)
            if stamps and number % twice == 0:
                seen["again"] += 1
                seen["taken"] += not _is_spent(client, place, stamps)
        except (NotOK, OSError, http.client.HTTPException):
            seen["lost"] += 1
    seen["sent"] = client.sent
    return seen


def _as_wanted(status: str, wanted: str, answer: np.ndarray, probabilities: list[float] | None = None) -> bool:
    if status != wanted or (probabilities is None) != (wanted == "refused"):
        return False
    return probabilities is None or np.abs(np.array(probabilities) - answer).max() < TOLERANCE


def _is_spent(client: Client, place: int, stamps: tuple[str, ...]) -> bool:
    try:
        client.predict([place], stamps)
    except NotOK as error:
        return error.args == (403, "spent")
    return False


def until_stopped(url: str, images: Images, name: int, size: int) -> dict:
    """Asks until the service takes no more connections.

    Returns:
        `answered`: names of the requests that were; `unanswered`: of those on whose way the connection closed.

    Raises:
        TimeoutError: it never stops.
    """
    client, turns, end = Client(url, images.files, name), images.turns(size), time.monotonic() + STOPPED_BY
    unanswered = []
    while time.monotonic() < end:
        try:
            client.query(next(turns))
        except ConnectionRefusedError:
            answered = [f"{name}-{number}" for number in client.answered]
            return {"answered": answered, "unanswered": unanswered}
        except (OSError, http.client.HTTPException):
            unanswered.append(f"{name}-{client.sent - 1}")
    raise TimeoutError("the service was asked to stop and still takes connections")
