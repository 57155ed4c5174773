"""What the tests of the prediction service share: a victim and a detector whose answers can be worked out by hand, and
clients for them."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from samelib.data.image_set import to_float
from samelib.detectors.base import Detector
from samelib.evidence import Likeness, sketches
from samelib.models.classifiers import Victim
from samelib.responses import ProofOfWork
from samelib.service.app import create_app
from samelib.service.client import as_png
from samelib.service.intake import Limits
from samelib.service.server import running
from samelib.service.stamps import StampOffice, solve

SHAPE = (1, 8, 8)
CLASSES = 4
INFER = "/v2/models/victim/infer"
SECRET = b"a secret of tests" * 2
WORK = ProofOfWork(3, 4)


def quarters(x: Tensor) -> Tensor:
    """float [N, 1, 8, 8] -> probabilities [N, 4]: the softmax of the mean pixels of the four 4 x 4 quarters."""
    return torch.nn.functional.avg_pool2d(x, 4).flatten(1).softmax(1)


class Ranked(Detector):
    """A detector whose score is the mean pixel: with p-value 1 at -1, and 1 / 200 at +1."""

    calibration_scores = torch.linspace(-0.5, 0.5, 199)

    def __init__(self, image_shape: tuple[int, int, int] = SHAPE):
        self.image_shape = image_shape
        self.likeness = Likeness(sketches(noise(199, 99, image_shape)))

    def fit(self, *sets, store=None, fpr=0.05):
        return self

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        return x.flatten(1).mean(1)


class Gate:
    """Answers as `quarters`, but waits while it is shut; remembers how many images came at a time since then."""

    def __init__(self):
        self.opened, self.entered, self.batches = threading.Event(), threading.Event(), []
        self.opened.set()

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.entered.set()
        assert self.opened.wait(60), "nobody opened the gate"
        return quarters(x)

    def shut(self) -> None:
        self.batches.clear()
        self.entered.clear()
        self.opened.clear()

    def open(self) -> None:
        self.opened.set()


class Clock:
    """Seconds since 1970, as they are set."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def service(answer=quarters, detector=None, response=None, clock=time.time, limits=None) -> Iterator[httpx.Client]:
    """A client of a live service on loopback, for images of SHAPE."""
    victim = Victim(answer, SHAPE, CLASSES)
    if response is not None:
        detector = detector or Ranked()
    app = create_app(victim, detector, response, StampOffice(SECRET, 60, clock=clock), limits or Limits())
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def noise(count: int, seed: int = 0, shape=SHAPE) -> Tensor:
    """uint8 [count, *shape]"""
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def grey(*levels: int) -> Tensor:
    """uint8 [N, *SHAPE]: images of one colour each."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, *SHAPE).contiguous()


def as_files(images: Tensor, stamps=()) -> dict:
    """What httpx needs to send images as PNG files."""
    files = [("image", ("x.png", as_png(image), "image/png")) for image in images]
    return {"files": files, "data": {"stamp": list(stamps)}}


def as_tensors(images: Tensor, stamps=None, datatype: str = "UINT8") -> dict:
    """What httpx needs to send images by the Open Inference Protocol."""
    pixels = images if datatype == "UINT8" else to_float(images)
    inputs = [{"name": "image", "datatype": datatype, "shape": list(images.shape), "data": pixels.tolist()}]
    if stamps is not None:
        inputs.append({"name": "stamp", "datatype": "BYTES", "shape": [len(stamps)], "data": list(stamps)})
    return {"json": {"inputs": inputs}}


def outputs(answer: httpx.Response) -> dict[str, list]:
    """Name -> data of each output tensor."""
    assert answer.status_code == 200, answer.text
    return {tensor["name"]: tensor["data"] for tensor in answer.json()["outputs"]}


def ask(client: httpx.Client, images: Tensor, stamps=()) -> httpx.Response:
    return client.post("/v1/predict", **as_files(images, stamps))


def results(answer: httpx.Response) -> list[dict]:
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def probabilities(answer: httpx.Response) -> Tensor:
    """[N, K] of a request whose images were all answered."""
    found = results(answer)
    assert {result["status"] for result in found} == {"answered"}
    return torch.tensor([result["probabilities"] for result in found])


def right(answer: httpx.Response, images: Tensor) -> bool:
    """Are these the victim's probabilities for these images?"""
    return torch.allclose(probabilities(answer), quarters(to_float(images)), atol=1e-6)


def fault(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal, which has the form that every refusal has."""
    content = answer.json()
    assert {"error", "code"} <= set(content) <= {"error", "code", "image"} and len(content["error"]) < 200
    return answer.status_code, content["code"]


def new_stamps(client: httpx.Client, images: Tensor) -> list[str]:
    """Stamps for images to each of which the service answers with a challenge."""
    return [solve(result["challenge"])[0] for result in results(ask(client, images))]


def metrics(client: httpx.Client) -> dict[tuple[str, ...], float]:
    """(name, value of the label, if there is one) -> value, of every sample at /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """For what gives no sign of its own: looks again and again, and fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def wait_for_queue(client: httpx.Client, images: int) -> None:
    """Until so many images wait or are in work."""
    wait_for(lambda: metrics(client)["samelib_queue_images",] == images)


def connect(client: httpx.Client) -> socket.socket:
    """A plain connection to the same service."""
    url = urlsplit(str(client.base_url))
    return socket.create_connection((url.hostname, url.port), timeout=20)


def is_closed(client: httpx.Client) -> bool:
    """Has the service stopped taking connections?"""
    try:
        connect(client).close()
    except ConnectionRefusedError:
        return True
    return False


def dribble(connection: socket.socket, data: bytes, seconds: float = 20) -> None:
    """Sends a byte of `data` again and again, at 50 a second, until there is an answer or the connection ends."""
    end = time.monotonic() + seconds
    for place in range(10**6):
        if select.select([connection], [], [], 0.02)[0]:
            return
        assert time.monotonic() < end, "the service goes on waiting"
        connection.send(data[place % len(data)].to_bytes())


def read_all(connection: socket.socket) -> bytes:
    """What comes until the service closes the connection."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)
