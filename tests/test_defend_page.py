"""book/defend.md: every program on the page is run as it stands there, and what its tables say is so.

Only the scale and the address are changed, and a script's app is served from a thread of the test, on a free port.
"""

import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import httpx
import numpy as np
import onnx
import pytest
import torch
import yaml
from fastapi import FastAPI, Header, HTTPException, UploadFile
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from samelib import cli, presets
from samelib.accounts import AccountBook
from samelib.data import groups
from samelib.data.synthetic import glyphs
from samelib.detectors.same_plus import SamePlus
from samelib.evidence import Wealth, log_e_values, safe_p_values
from samelib.models.classifiers import Victim
from samelib.service import server
from samelib.service.app import create_app
from samelib.service.client import RemoteGateway, as_png
from samelib.service.intake import Limits
from samelib.service.stamps import StampOffice

PAGE = (Path(__file__).parents[1] / "book" / "defend.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^```\{code-block\} (\w+)\n:name: ([\w-]+)\n(?::caption: ([\w.-]+)[^\n]*\n)?\n(.*?)^```$", re.M | re.S
)
URL = "http://127.0.0.1:8000"
KEY = "of this test alone"
KINDS = ("torch", "onnx", "remote")
PROJECT = "from torch import nn\n\ndef build_model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"


class Block(NamedTuple):
    language: str
    file: str
    text: str


BLOCKS = {name: Block(language, file or f"{name}.py", text) for language, name, file, text in BLOCK.findall(PAGE)}


def linear_model() -> torch.nn.Sequential:
    """Pixels in [0, 1] -> logits, trained for a moment on glyphs."""
    images, model = glyphs("victim", 800), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(images.images / 255), images.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


def save_onnx(model: torch.nn.Sequential, path: Path) -> None:
    """The same model as an ONNX file with a free batch dimension."""
    weights = [onnx.numpy_helper.from_array(p.numpy(), n) for n, p in (("w", model[1].weight), ("b", model[1].bias))]
    nodes = [
        onnx.helper.make_node("Flatten", ["pixels"], ["flat"]),
        onnx.helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1),
    ]
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["n", 1, 28, 28])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 10])
    graph = onnx.helper.make_graph(nodes, "linear", [pixels], [logits], weights)
    linear = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(linear)
    onnx.save(linear, path)


def little_api(model: torch.nn.Sequential) -> FastAPI:
    """Somebody else's service: one PNG file a request, and a key."""
    app = FastAPI()
    app.state.limits = Limits()

    @app.post("/classify")
    async def classify(file: UploadFile, authorization: Annotated[str, Header()]):
        if authorization != f"Bearer {KEY}":
            raise HTTPException(401)
        pixels = np.array(Image.open(io.BytesIO(await file.read())), dtype=np.float32) / 255
        return {"probabilities": model(torch.from_numpy(pixels)[None]).softmax(1)[0].tolist()}

    return app


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What a reader has: images, a model in three forms, a key in the environment."""
    folder, model = tmp_path_factory.mktemp("stand-ins"), linear_model()
    benign, fresh = glyphs("victim", 700).images.split([600, 100])
    np.savez(folder / "benign.npz", images=benign.numpy())
    np.savez(folder / "fresh.npz", images=fresh.numpy())
    (folder / "digit.png").write_bytes(as_png(fresh[0]))
    (folder / "my_project.py").write_text(PROJECT)
    torch.save(model.state_dict(), folder / "model.pt")
    save_onnx(model, folder / "model.onnx")
    with server.running(little_api(model)) as url:
        yield SimpleNamespace(folder=folder, model=model, image=fresh[:1], url=url, cache=folder / "cache")


class Desk:
    """A folder with the stand-ins, in which blocks of the page are run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, name: str, url: str = URL) -> Path:
        block = BLOCKS[name]
        (self.folder / block.file).write_text(block.text.replace(URL, url))
        return self.folder / block.file

    def run(self, name: str, url: str = URL) -> dict:
        """The block's variables after it ran."""
        for module in ("victim", "my_project"):  # of another desk
            sys.modules.pop(module, None)
        return runpy.run_path(str(self.write(name, url)))

    def shell(self, name: str, before: str = "", url: str = URL) -> str:
        """What the block prints in bash after `before`."""
        words = ["bash", "-ec", before + BLOCKS[name].text.replace(URL, url)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(words, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def app(self, name: str) -> FastAPI:
        """The app that a block serves on the page's address."""
        served = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "bound_socket", lambda host, port: (host, port))
            patch.setattr(server, "serve", lambda app, bound: served.append((app, bound)))
            self.run(name)
        ((app, bound),) = served
        assert bound == ("127.0.0.1", 8000)
        return app

    def app_of_command(self, name: str) -> tuple[FastAPI, str]:
        """The app that a block's `samelib serve` serves (on any free port), and the secret that it set."""
        printed = self.shell(name, 'samelib() { printf "%s\\n" "$SAMELIB_SECRET" "$@"; }\n')
        secret, *words = printed.splitlines()
        served = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "serve", lambda app, bound: served.append(app))
            if secret:
                patch.setenv("SAMELIB_SECRET", secret)
            cli.main([*words, "--port", "0"])
        return served[0], secret


@pytest.fixture
def desk(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMELIB_CACHE", str(stand_ins.cache))  # the three kinds share their autoencoder
    monkeypatch.setenv("MODEL_URL", stand_ins.url)
    monkeypatch.setenv("MODEL_KEY", KEY)
    monkeypatch.delenv("SAMELIB_SECRET", raising=False)
    monkeypatch.setattr(presets, "_lecture", presets._smoke)
    monkeypatch.setattr(groups, "EMBEDDED_SIZES", groups.SIZES["smoke"])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # victim.py is another file each time
    folder = tmp_path / "desk"
    shutil.copytree(stand_ins.folder, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return Desk(folder)


@pytest.fixture
def fitted(desk):
    """A desk on which the PyTorch module has its detector."""
    desk.write("victim-torch")
    desk.run("fit")
    return desk


def predict(url: str) -> dict:
    """What a service says to digit.png."""
    answer = httpx.post(f"{url}/v1/predict", files={"image": Path("digit.png").read_bytes()}, timeout=60)
    return answer.raise_for_status().json()["results"][0]


def metrics(url: str) -> dict[str, object]:
    return {family.name: family for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}


# The programs


def test_every_program_of_the_page_has_a_name_and_is_short():
    assert set(BLOCKS) == {"first", *(f"victim-{kind}" for kind in KINDS), "fit", "estimator", "serve",
                           "serve-command", "ask-curl", "ask-tensors", "ask-gateway", "ask-httpx", "hash-rate",
                           "ban-command", "serve-bans", "accounts-command", "serve-secret", "serve-stamps", "nginx", "alerts", "drift", "backup", "recalibrate"}  # fmt: skip
    assert PAGE.count("```") == 2 * len(BLOCKS), "a block of the page is not run"
    lengths = {name: sum(bool(line.strip()) for line in block.text.splitlines()) for name, block in BLOCKS.items()}
    assert max(lengths.values()) <= 22, lengths


def test_the_first_program(desk, monkeypatch, capsys):
    smallest = presets._smoke((1, 28, 28))
    brief = replace(smallest, substitute_train=replace(smallest.substitute_train, epochs=1))
    monkeypatch.setattr(presets, "_lecture", lambda image_shape: brief)
    program = desk.run("first")
    assert program["gateway"].spent == 1_000
    rates = [float(rate) for rate in re.findall(r"tensor\(([\d.]+)\)", capsys.readouterr().out)]
    assert len(rates) == 2 and rates[1] < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_fit_and_serve(kind, desk, stand_ins, capsys):
    desk.write(f"victim-{kind}")
    fit = desk.run("fit")
    words = r"(\d+) of (\d+) benign images flagged: ([\d.]+)%, 95% interval ([\d.]+)% to ([\d.]+)%"
    flagged, checked, rate, low, high = map(float, re.search(words, capsys.readouterr().out).groups())
    assert checked == 60 and abs(rate - 100 * flagged / checked) < 0.1 and low <= rate <= high and rate < 25
    assert len(fit["detector"].calibration_scores) == 48  # as the page says: 8 % of 600 images
    expected = stand_ins.model(stand_ins.image / 255).softmax(1)
    assert torch.allclose(fit["victim"](stand_ins.image / 127.5 - 1), expected, atol=1e-4)
    with server.running(desk.app("serve")) as url:
        result = predict(url)
        assert result["status"] == "answered"
        assert torch.allclose(torch.tensor([result["probabilities"]]), expected, atol=1e-4)
        (count,) = [s.value for s in metrics(url)["samelib_p_value"].samples if s.name.endswith("_count")]
        assert count == 1  # watched


def test_clients_are_answered_for_work(fitted, stand_ins, monkeypatch, capsys):
    monkeypatch.setenv("SAMELIB_SECRET", "of this test alone")
    expected = stand_ins.model(stand_ins.image / 255).softmax(1)
    with server.running(fitted.app("serve-stamps")) as url:
        asked = fitted.run("ask-gateway", url)
        assert torch.allclose(asked["probabilities"], expected, atol=1e-4) and asked["service"].log.hashes[0] > 0
        asked = fitted.run("ask-httpx", url)
        assert torch.allclose(torch.tensor([asked["result"]["probabilities"]]), expected, atol=1e-4)
        assert metrics(url)["samelib_spent_stamps"].samples[0].value == 2
    assert "'status': 'answered'" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2\\^25 hashes"):  # it does not work for ever
        asked["solve"](StampOffice(bytes(32)).issue(bytes(32), 25), 25)


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl(fitted):
    with server.running(fitted.app("serve")) as url:
        (result,) = json.loads(fitted.shell("ask-curl", url=url))["results"]
        tensors = json.loads(fitted.shell("ask-tensors", url=url))["outputs"]
    data = {tensor["name"]: tensor["data"] for tensor in tensors}
    assert data["status"] == [result["status"]] == ["answered"]
    assert data["probabilities"] == pytest.approx(result["probabilities"])


def test_commands(detector, desk):
    detector.save("detector")  # as `samelib fit` makes it: with a victim of samelib's
    app, secret = desk.app_of_command("serve-command")
    with server.running(app) as url:
        assert predict(url)["status"] == "answered" and not secret
    app, secret = desk.app_of_command("serve-secret")
    with server.running(app) as url:
        assert predict(url)["status"] == "challenge" and len(secret) == 64
        assert Path("stamps.sqlite").exists()
    app, secret = desk.app_of_command("ban-command")
    with server.running(app) as url, RemoteGateway(url, api_key="somebody") as somebody:
        assert somebody.query(glyphs("victim", 1).images).isfinite().all() and len(secret) == 64
        assert Path("accounts.sqlite").exists()


def banned(url: str, key: str) -> str:
    """The hash by which an account is called that sends noise until it is banned."""
    images = torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for part in images.split(50):
        files = [("image", ("x.png", as_png(image), "image/png")) for image in part]
        answer = httpx.post(f"{url}/v1/predict", files=files, headers={"X-API-Key": key}, timeout=60)
    assert (answer.status_code, answer.json()["code"]) == (403, "banned")
    return answer.json()["error"].split()[1]


def test_bans(fitted, monkeypatch, capsys):
    monkeypatch.setenv("SAMELIB_SECRET", "of this test alone")
    with server.running(fitted.app("serve-bans")) as url, RemoteGateway(url, api_key="somebody") as somebody:
        label = banned(url, "a thief")
        assert somebody.query(torch.from_numpy(np.array(Image.open("digit.png")))[None, None]).isfinite().all()
        listing, lifting = BLOCKS["accounts-command"].text.splitlines()
        cli.main(shlex.split(listing)[1:])
        first, *others = capsys.readouterr().out.splitlines()[1:]
        assert first.startswith(label) and re.search(r"\d{4}-\d\d-\d\d", first) and len(others) == 1
        cli.main(shlex.split(lifting.replace("3fa9c1", label[:6]))[1:])
        with RemoteGateway(url, api_key="a thief") as again:
            assert again.query(glyphs("victim", 1).images).isfinite().all()
        assert metrics(url)["samelib_bans"].samples[0].value == 1


def test_a_backup_holds_the_bans(desk, tmp_path, monkeypatch):
    secret = b"a secret of this test"
    book = AccountBook(tmp_path / "accounts.sqlite", secret)
    with book.changing(["thief"]) as accounts:
        accounts["thief"].ban(1.0)
    monkeypatch.setattr(sys, "argv", ["backup", str(tmp_path / "accounts.sqlite"), str(tmp_path / "copy.sqlite")])
    desk.run("backup")
    assert AccountBook(tmp_path / "copy.sqlite", secret).find_banned("thief")


def test_how_fast_a_ban_is():
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
    assert len(rows) == 5
    for row in rows:
        images, *expected = (int(number.replace(",", "")) for number in row)
        bet = float(log_e_values(safe_p_values(images, 0.05 / 2))[0])
        for before, queries in zip((0, 1_000), expected, strict=True):
            wealth = Wealth(before)  # of the mean of two
            steps = itertools.takewhile(lambda won: won < math.log(2 * 1_000), (wealth.add(bet) for _ in range(999)))
            assert len(list(steps)) + 1 == queries


def test_hash_rate(desk, capsys):
    program = desk.run("hash-rate")
    assert program["wait"] == program["ProofOfWork"]().benign_hashes / program["rate"]
    assert "hashes a second" in capsys.readouterr().out


def test_recalibrate(fitted):
    program = fitted.run("recalibrate")
    again = SamePlus.load("detector-2", program["victim"])
    assert len(again.calibration_scores) == len(program["fresh"])
    assert torch.equal(again.calibration_scores, program["detector"].calibration_scores)


def test_drift_is_asked_of_a_service(fitted, capsys):
    with server.running(fitted.app("serve")) as url:
        with RemoteGateway(url) as service:
            service.query(torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8))
        fitted.run("drift", url)
    assert "40 of 40 queries" in capsys.readouterr().out


def test_the_estimator(fitted, capsys):
    program = fitted.run("estimator")
    labels = program["estimator"].predict(program["rows"])
    assert set(labels) == {1, -1} and (labels == -1).mean() <= 0.05


# What the page says


def test_alerts_and_table_name_metrics_that_exist(fitted):
    with server.running(fitted.app("serve")) as url:
        predict(url)
        there = metrics(url)
    named = set(re.findall(r"samelib_\w+", BLOCKS["alerts"].text + "".join(re.findall(r"^\| `samelib.*", PAGE, re.M))))
    assert {re.sub("_(total|bucket|count)$", "", name) for name in named} == {
        name for name in there if not name.endswith("_created")
    }
    (group,) = yaml.safe_load(BLOCKS["alerts"].text)["groups"]
    assert all({"alert", "expr", "for"} == set(rule) for rule in group["rules"])
    assert {s.labels.get("le") for s in there["samelib_p_value"].samples} > {"0.05"}
    assert there["samelib_requests"].samples[0].labels == {"status": "200"}


def test_limits_are_the_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (\d+)( MiB)? \| (\d+)", PAGE, re.M)
    assert {name: int(value) * (2**20 if mib else 1) for name, value, mib, _ in rows} == vars(Limits())


def test_the_proxy_is_no_stricter_and_no_more_lenient_than_the_service():
    block, limits = BLOCKS["nginx"].text, Limits()
    seconds = {name: float(value) for name, value in re.findall(r"(\w+)_timeout (\d+)s;", block)}
    assert seconds["client_header"] == seconds["client_body"] == limits.body_seconds
    assert seconds["proxy_read"] > limits.answer_seconds
    assert int(re.search(r"client_max_body_size (\d+)m;", block)[1]) * 2**20 == limits.body
    passed_on = re.compile(re.search(r"location ~ (\S+)", block)[1])
    paths = create_app(Victim(lambda x: x, (1, 28, 28), 10)).openapi()["paths"]
    assert {path for path in paths if not passed_on.match(path)} == {"/metrics", "/v2"}
    assert block.count("{") == block.count("}") and f"proxy_pass {URL};" in block


def test_serve_refuses_a_rate_that_would_refuse_nobody(detector, desk):
    detector.save("detector")
    with pytest.raises(SystemExit, match="needs 9999 benign images"):
        cli.main(["serve", "detector", "--fpr", "0.0001", "--port", "0"])
