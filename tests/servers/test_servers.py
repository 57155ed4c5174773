"""Guarded and the proxy where people have them: inside and in front of servers that others wrote, each a process of its
own. `make servers` runs this, with the environments that these servers need."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from conftest import TINY_SAME, fit_beside
from defended import SECRET, WORK
from serving import CLASSES, SHAPE, Ranked, grey, noise, outputs, quarters
from torch import Tensor

from samelib import Defence, Reject, SamePlus, Victim
from samelib.data.image_set import to_float
from samelib.service.app import create_app
from samelib.service.client import as_png
from samelib.service.middleware import METRICS, STAMP
from samelib.service.proxy import create_proxy
from samelib.service.server import running
from samelib.service.stamps import StampOffice, solve
from samelib.service.tensors import JSON_LENGTH

HERE = Path(__file__).parent
UPSTREAMS = Path(sys.prefix).with_name("upstreams") / "bin"  # see the Makefile
ELSEWHERE = Victim.elsewhere(SHAPE, CLASSES)
BYTES = {"Content-Type": "application/octet-stream"}  # KServe takes a body without this header for JSON

DARK = noise(3, 1) // 8  # each quarter in its own tone, all far from strange for `Ranked`
BRIGHT = noise(1, 2) | 224
BETWEEN = grey(160)

given_out: set[int] = set()  # ports


def free_port() -> int:
    """One that was not given out before: the system gives some twice before they are taken."""
    while True:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        if port not in given_out:
            given_out.add(port)
            return port


@contextmanager
def processes(commands: dict[Path, list], ready: list[str], **environment: str | Path) -> Iterator[None]:
    """Runs servers until the block ends, side by side; it begins when each of the URLs in `ready` answers 200.

    Args:
        commands: log -> command; the log's name without its ending becomes CASE.
    """
    paths = os.pathsep.join(map(str, (HERE, HERE.parent)))
    environment = os.environ | {"PYTHONPATH": paths} | {name: str(value) for name, value in environment.items()}
    environment.pop("OMP_NUM_THREADS", None)  # as people run them: what forks after PyTorch's threads began may hang
    with ExitStack() as stack:
        servers = {}
        for log, command in commands.items():
            servers[log] = subprocess.Popen(
                list(map(str, command)),
                cwd=log.parent,
                env=environment | {"CASE": log.stem},
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context(log.open("wb")),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(stop, servers[log])
        end = time.monotonic() + 180
        while ready:
            for log, server in servers.items():
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            ready = [url for url in ready if not is_up(url)]
            time.sleep(0.1)
        yield


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def stop(server: subprocess.Popen) -> None:
    """The process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@dataclass
class Server:
    """A live server.

    Attributes:
        urls: case -> where it answers.
        calls: the file in which its models write how many images they were asked for.
    """

    name: str
    urls: dict[str, str]
    calls: Path

    def ask(self, images: Tensor, case: str = "tiny", **headers: str) -> httpx.Response:
        """Over a connection of its own: where several processes answer, any of them may get it."""
        if self.name == "litserve":
            content = {"json": {"images": images.tolist()}}
        else:
            content = {"files": [("images", ("x.png", as_png(image), "image/png")) for image in images]}
        return httpx.post(f"{self.urls[case]}/predict", headers=headers, timeout=60, **content)

    def asked(self) -> list[int]:
        """How many images the models were asked each time since the last look."""
        return calls_since(self.calls)


def calls_since(path: Path) -> list[int]:
    found = [int(line) for line in path.read_text().split()] if path.exists() else []
    path.write_text("")
    return found


@pytest.fixture(scope="module")
def fitted(group, victim, store) -> SamePlus:
    return fit_beside(SamePlus(TINY_SAME), group, victim, store)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory) -> Path:
    return fitted.save(tmp_path_factory.mktemp("saved") / "detector")


def litserve(case: str, port: int) -> list:
    return [sys.executable, HERE / "lit_server.py", case, port]


def bentoml(case: str, port: int) -> list:
    serve = [Path(sys.executable).with_name("bentoml"), "serve", "bento_service:Service", "--working-dir", HERE]
    return [*serve, "--host", "127.0.0.1", "--port", port]


def ray(_: str, port: int) -> list:
    return [sys.executable, HERE / "ray_app.py", port]


# How it starts, and the page that answers once the model is there.
SERVERS = {"litserve": (litserve, "/health"), "bentoml": (bentoml, "/readyz"), "ray": (ray, "/docs")}
CASES = ("tiny", "fitted")


@pytest.fixture(scope="module", params=SERVERS)
def live(request, saved, tmp_path_factory) -> Iterator[Server]:
    folder, (command, ready) = tmp_path_factory.mktemp(request.param), SERVERS[request.param]
    ports = {case: free_port() for case in CASES}
    if request.param == "ray":  # one process for both
        urls = {case: f"http://127.0.0.1:{ports['tiny']}/{case}" for case in CASES}
        commands = {folder / "both.log": command("both", ports["tiny"])}
    else:
        urls = {case: f"http://127.0.0.1:{port}" for case, port in ports.items()}
        commands = {folder / f"{case}.log": command(case, port) for case, port in ports.items()}
    given = {"DETECTOR": saved, "CALLS": folder / "calls", "STAMPS": folder / "stamps.sqlite"}
    with processes(commands, [url + ready for url in urls.values()], **given):
        yield Server(request.param, urls, folder / "calls")


@pytest.fixture
def server(live) -> Server:
    live.asked()  # what a test before this one left, where it failed
    return live


def is_right(probabilities: list, images: Tensor) -> bool:
    return np.allclose(probabilities, quarters(to_float(images)), atol=1e-6)


def test_an_answer_that_may_go_goes_as_it_was_after_one_call(server):
    answer = server.ask(DARK)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert is_right(body.pop("probabilities"), DARK)
    assert body == {"labels": quarters(to_float(DARK)).argmax(1).tolist(), "model": "victim"}
    assert server.asked() == [3]


def test_a_strange_image_is_refused_after_one_call(server):
    answer = server.ask(BRIGHT)
    assert answer.status_code == 403 and answer.json()["code"] == "refused" and answer.json()["images"] == [0]
    assert "probabilities" not in answer.json() and server.asked() == [1]


def test_of_several_images_the_strange_one_is_withheld(server):
    answer = server.ask(torch.cat([DARK[:1], BRIGHT, DARK[1:]]))
    assert answer.status_code == 200 and set(answer.json()) == {"probabilities", "labels"}
    rows = answer.json()["probabilities"]
    assert rows.pop(1) is None and answer.json()["labels"][1] is None
    assert is_right(rows, DARK) and server.asked() == [4]


def test_work_is_paid_once_whichever_process_is_asked(server):
    images = torch.cat([DARK, BETWEEN])
    answer = server.ask(images)
    assert answer.status_code == 402 and answer.json()["code"] == "challenge" and "probabilities" not in answer.json()
    assert answer.json()["bits"] == WORK.decide(Ranked().p_value(BETWEEN))[1] > 0
    stamp, _ = solve(answer.json()["challenge"])

    other = server.ask(BETWEEN, **{STAMP: stamp})
    assert other.status_code == 403 and other.json()["code"] == "mismatched"
    paid = server.ask(images, **{STAMP: stamp})
    assert paid.status_code == 200 and is_right(paid.json()["probabilities"], images)
    again = [server.ask(images, **{STAMP: stamp}) for _ in range(6)]
    assert {(answer.status_code, answer.json()["code"]) for answer in again} == {(403, "spent")}
    assert server.asked() == [4, 4]


def test_a_long_answer_is_whole(server):
    """LitServe compresses it, outside Guarded."""
    images = DARK.repeat(20, 1, 1, 1)
    answer = server.ask(images)
    assert is_right(answer.json()["probabilities"], images)
    assert answer.headers.get("content-encoding") == ("gzip" if server.name == "litserve" else None)
    assert server.asked() == [60]


def test_what_is_no_image_reaches_no_model(server):
    answer = server.ask(DARK[:, :, :4])
    assert answer.status_code == 422 and "8" in answer.json()["error"] and server.asked() == []


def test_a_text_in_place_of_an_image_reaches_no_model(server):
    """BentoML takes it for an address, and would ask the model about what it finds there."""
    if server.name == "litserve":
        pytest.skip("it is sent JSON")
    form = {
        "data": {"images": "http://127.0.0.1:9/x.png"},
        "files": {"images": ("x.png", as_png(DARK[0]), "image/png")},
    }
    answer = httpx.post(f"{server.urls['tiny']}/predict", timeout=60, **form)
    assert answer.status_code == 422 and answer.json()["code"] == "image" and server.asked() == []


def test_the_metrics_are_where_the_app_is(server):
    answer = httpx.get(server.urls["tiny"] + METRICS)
    assert answer.status_code == 200 and "samelib_images_total" in answer.text


def test_a_detector_from_a_folder_decides_as_it_does_here(server, fitted, group):
    benign = group.benign_test.images[:24]
    images = torch.cat([benign, noise(8, shape=benign.shape[1:])])
    verdict = Defence(fitted.victim, fitted, Reject(0.05)).judge(images)
    assert verdict.refused.any() and not verdict.refused.all()

    answer = server.ask(images, "fitted")
    assert answer.status_code == 200, answer.text
    rows = answer.json()["probabilities"]
    assert [row is None for row in rows] == verdict.refused.tolist()
    kept = [row for row in rows if row is not None]
    assert np.allclose(kept, verdict.answers[~verdict.refused], atol=1e-5) and server.asked() == [32]


# Behind a proxy


@dataclass
class Upstream:
    """A live server of the Open Inference Protocol, without a defence."""

    name: str
    url: str
    calls: Path

    def asked(self) -> list[int]:
        return calls_since(self.calls)

    @contextmanager
    def proxied(self, response=None, **given) -> Iterator[httpx.Client]:
        """A client of a live proxy before it, which finds images and probabilities by itself."""
        app = create_proxy(f"{self.url}{MODEL}", Ranked(), response, victim=ELSEWHERE, **given)
        with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client


MODEL = "/v2/models/quarters"
INFER = f"{MODEL}/infer"


def mlserver(folder: Path, port: int) -> list:
    (folder / "model-settings.json").write_text(json.dumps({"name": "quarters", "implementation": "ml_model.Quarters"}))
    ports = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    (folder / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "parallel_workers": 0} | ports))
    return [UPSTREAMS / "mlserver", "start", folder]


def kserve(_: Path, port: int) -> list:
    return [UPSTREAMS / "python", HERE / "kserve_model.py", "--http_port", port, "--enable_grpc", "false"]


@pytest.fixture(scope="module", params=[mlserver, kserve], ids=["mlserver", "kserve"])
def upstream(request, tmp_path_factory) -> Iterator[Upstream]:
    if sys.version_info >= (3, 13):
        pytest.skip("MLServer and KServe do not run on this Python")
    folder, port = tmp_path_factory.mktemp("upstream"), free_port()
    url, calls = f"http://127.0.0.1:{port}", folder / "calls"
    with processes({folder / "server.log": request.param(folder, port)}, [f"{url}{MODEL}/ready"], CALLS=calls):
        yield Upstream(request.param.__name__, url, calls)


def as_floats(images: Tensor) -> dict:
    """What httpx needs to send pixels in [0, 1]."""
    data = (images / 255).flatten().tolist()
    return {"json": {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(images.shape), "data": data}]}}


def as_input(images: Tensor, binary: bool) -> list[triton.InferInput]:
    """The same for Triton's client."""
    tensor = triton.InferInput("x", list(images.shape), "FP32")
    tensor.set_data_from_numpy((images / 255).numpy(), binary_data=binary)
    return [tensor]


@contextmanager
def triton_client(url: str | httpx.URL) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(str(url).removeprefix("http://").rstrip("/"), network_timeout=60) as client:
        yield client


def test_an_answer_passes_the_proxy_as_it_was(upstream):
    with upstream.proxied(Reject(0.05)) as client:
        direct = httpx.post(upstream.url + INFER, **as_floats(DARK)).json()
        assert upstream.asked() == [3]
        answer = client.post(INFER, **as_floats(DARK))
        assert answer.status_code == 200 and answer.json() | {"id": 0} == direct | {"id": 0}
        assert upstream.asked() == [3]
        given = outputs(answer)
        assert is_right(np.reshape(given["probabilities"], (3, CLASSES)), DARK)
        assert given["labels"] == [f"quarter {index}" for index in quarters(to_float(DARK)).argmax(1)]


def test_the_proxy_refuses_what_is_strange_and_of_several_its_row_alone(upstream):
    with upstream.proxied(Reject(0.05)) as client:
        answer = client.post(INFER, **as_floats(BRIGHT))
        assert answer.status_code == 403 and answer.json()["code"] == "refused" and upstream.asked() == [1]
        answer = client.post(INFER, **as_floats(torch.cat([DARK[:1], BRIGHT, DARK[1:]])))
        given = outputs(answer)
        rows = np.reshape(given["probabilities"], (4, CLASSES))
        assert is_right(rows[[0, 2, 3]], DARK) and not rows[1].any()
        assert given["labels"][1] == "" and all(given["labels"][i] for i in (0, 2, 3))
        assert answer.json()["parameters"]["samelib_refused"] == "1" and upstream.asked() == [4]


def test_a_strange_image_beside_one_that_the_detector_would_see_is_refused(upstream):
    """MLServer and KServe take the data in JSON, and do not look at what comes behind it."""
    decoy = {"parameters": {"binary_data_size": 64}, "datatype": "UINT8", "shape": [1, *SHAPE], "name": "x"}
    head = json.dumps({"inputs": [decoy | {"data": BRIGHT.flatten().tolist()}]}).encode()
    body = {"content": head + b" " * 64, "headers": {JSON_LENGTH: str(len(head))}}  # spaces: to JSON nothing, or dark
    if upstream.name == "mlserver":
        body["headers"]["Content-Type"] = "application/json"
    assert httpx.post(upstream.url + INFER, **body).status_code == 200 and upstream.asked() == [1]
    with upstream.proxied(Reject(0.05)) as client:
        answer = client.post(INFER, **body)
        assert answer.status_code == 422 and "twice" in answer.json()["error"] and upstream.asked() == []


def test_health_and_metadata_pass_the_proxy(upstream):
    with upstream.proxied(Reject(0.05)) as proxy, triton_client(proxy.base_url) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("quarters")
        assert client.get_server_metadata()["name"] == upstream.name
        assert client.get_model_metadata("quarters")["name"] == "quarters"


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_tritonclient_before_a_proxy(upstream, binary):
    """MLServer knows no binary tensors: what it says then passes."""
    with upstream.proxied(Reject(0.05)) as proxy, triton_client(proxy.base_url) as client:
        names = ("probabilities", "labels")

        def ask(images: Tensor) -> dict[str, np.ndarray]:
            wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
            headers = BYTES if binary else None
            found = client.infer("quarters", as_input(images, binary), outputs=wanted, headers=headers)
            assert ("data" in found.get_output("probabilities")) is not binary
            return {name: found.as_numpy(name) for name in names}

        if binary and upstream.name == "mlserver":
            with pytest.raises(triton.InferenceServerException, match=r"\[[45]\d\d\]"):
                ask(DARK)
            assert upstream.asked() == []
            return
        assert is_right(ask(DARK)["probabilities"], DARK)
        found = ask(torch.cat([DARK[:1], BRIGHT, DARK[1:]]))
        assert is_right(found["probabilities"][[0, 2, 3]], DARK) and not found["probabilities"][1].any()
        labels = found["labels"].flatten()
        assert len(labels[1]) == 0 and all(len(labels[i]) for i in (0, 2, 3))
        with pytest.raises(triton.InferenceServerException, match=r"\[403\] these images are not answered"):
            ask(BRIGHT)
        assert upstream.asked() == [3, 4, 1]


def test_work_is_paid_by_tritonclient_in_a_header(upstream):
    """Its errors carry the message alone: the challenge must be asked for by other means."""
    with upstream.proxied(WORK, office=StampOffice(SECRET)) as proxy, triton_client(proxy.base_url) as client:
        with pytest.raises(triton.InferenceServerException, match=r"\[402\] solve this puzzle"):
            client.infer("quarters", as_input(BETWEEN, binary=False))
        stamp, _ = solve(proxy.post(INFER, **as_floats(BETWEEN)).json()["challenge"])
        paid = client.infer("quarters", as_input(BETWEEN, binary=False), headers={STAMP: stamp})
        assert is_right(paid.as_numpy("probabilities"), BETWEEN)
        with pytest.raises(triton.InferenceServerException, match=r"\[403\] this stamp was spent"):
            client.infer("quarters", as_input(BETWEEN, binary=False), headers={STAMP: stamp})
        assert upstream.asked() == [1, 1, 1]


# samelib's own service


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_tritonclient_before_samelib(binary, datatype):
    images = torch.cat([DARK[:1], BRIGHT])
    pixels = images if datatype == "UINT8" else to_float(images)
    tensor = triton.InferInput("image", list(images.shape), datatype)
    tensor.set_data_from_numpy(pixels.numpy(), binary_data=binary)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probabilities", "status")]
    app = create_app(Victim(quarters, SHAPE, CLASSES), Ranked(), Reject(0.05))
    with running(app) as url, triton_client(url) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("victim")
        assert client.get_server_metadata()["name"] == "samelib"
        assert client.get_model_metadata("victim")["inputs"][0]["shape"] == [-1, *SHAPE]
        found = client.infer("victim", [tensor], outputs=wanted)
        assert is_right(found.as_numpy("probabilities")[:1], DARK[:1]) and not found.as_numpy("probabilities")[1].any()
        status = [text if isinstance(text, str) else text.decode() for text in found.as_numpy("status")]
        assert status == ["answered", "refused"]
        assert ("data" in found.get_output("probabilities")) is not binary


def test_tritonclient_pays_samelib_with_a_tensor_of_stamps():
    app = create_app(Victim(quarters, SHAPE, CLASSES), Ranked(), WORK)
    with running(app) as url, triton_client(url) as client:
        images = torch.cat([DARK[:1], BETWEEN])

        def ask(*stamps: str) -> triton.InferResult:
            image = triton.InferInput("image", list(images.shape), "UINT8")
            inputs = [image.set_data_from_numpy(images.numpy(), binary_data=False)]
            if stamps:
                stamp = triton.InferInput("stamp", [len(stamps)], "BYTES")
                inputs.append(stamp.set_data_from_numpy(np.array(stamps, object), binary_data=False))
            names = ("probabilities", "status", "challenge")
            return client.infer(
                "victim", inputs, outputs=[triton.InferRequestedOutput(n, binary_data=False) for n in names]
            )

        asked = ask()
        assert list(asked.as_numpy("status")) == ["answered", "challenge"]
        paid = ask("", solve(asked.as_numpy("challenge")[1])[0])
        assert list(paid.as_numpy("status")) == ["answered", "answered"]
        assert is_right(paid.as_numpy("probabilities"), images)
