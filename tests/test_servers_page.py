"""book/servers.md: its programs are run, its commands and options are there, its dashboard asks for metrics that exist."""

import io
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from fastapi import FastAPI, Request
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import noise
from test_middleware import METRICS, outcomes

from samelib import cli
from samelib.data.image_set import to_float
from samelib.service.client import as_png
from samelib.service.intake import Limits
from samelib.service.middleware import Guarded
from samelib.service.server import running

BOOK = Path(__file__).parents[1] / "book"
PAGE = (BOOK / "servers.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\{code-block\} (\w+)\n:name: ([\w-]+)\n(?::caption: [^\n]*\n)?\n(.*?)^```$", re.M | re.S)
BLOCKS = {name: (language, text) for language, name, text in BLOCK.findall(PAGE)}


@pytest.fixture
def namespace(detector, victim, tmp_path, monkeypatch) -> dict:
    """What the first program of the page leaves, with the detector and the victim of these tests."""
    detector.save(tmp_path / "detector")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "victim", SimpleNamespace(victim=victim))
    program: dict = {}
    exec(BLOCKS["guarded"][1].replace("SamePlus", "SameDetector"), program)
    program["app"].state.limits = Limits()
    return program


def test_the_app_is_guarded(namespace, detector, victim, group):
    images = torch.cat([group.benign_test.images[:6], noise(2, shape=group.image_shape)])
    refused = detector.p_value(images) <= 0.05
    assert refused[6:].all() and not refused[:6].all()
    with running(namespace["app"]) as url, httpx.Client(base_url=url, timeout=60) as client:
        files = [("files", ("x.png", as_png(image), "image/png")) for image in images]
        answer = client.post("/predict", files=files)
        assert answer.status_code == 200
        rows = answer.json()["probabilities"]
        assert [row is None for row in rows] == refused.tolist()
        kept = torch.tensor([row for row in rows if row])
        assert torch.allclose(kept, victim(to_float(images))[~refused], atol=1e-5)
        assert client.post("/predict", files=files[6:]).status_code == 403
        assert outcomes(client)["refused"] == refused.sum() + 2


def test_a_decode_of_ones_own(namespace, detector):
    exec(BLOCKS["decode"][1], namespace)
    app = FastAPI()
    app.state.limits = Limits()

    @app.post("/{path}")
    async def predict(request: Request):
        return {"probabilities": [0.1] * 10}

    app.add_middleware(Guarded, detector=detector, decode=namespace["decode"])
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        photo = io.BytesIO()
        Image.new("RGB", (50, 30)).save(photo, "JPEG")
        assert client.post("/predict", files={"photo": photo.getvalue()}).status_code == 200
        assert client.post("/predict", files={"photo": b"no image"}).status_code == 422
        assert client.post("/predict", files={"other": photo.getvalue()}).status_code == 422
        assert client.post("/feedback", content=b"good").status_code == 200


COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS.values()
    if language == "bash"
    for line in text.splitlines()
    if line.startswith("samelib ")
]
COMMANDS += [c["args"] for c in yaml.safe_load(BLOCKS["sidecar"][1])["containers"] if c["args"][0] == "samelib"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_read_and_end_where_the_detector_is_missing(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = ["127.0.0.1" if word == "0.0.0.0" else word for word in words[1:]]
    with pytest.raises(SystemExit) as stop:
        cli.main([*local, "--port", "0"])
    assert "detector" in str(stop.value) and "card" in str(stop.value)


def test_the_options_in_the_table_are_there(capsys):
    cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    options = re.findall(r"^\| `(--[a-z-]+)", PAGE, re.M)
    assert len(options) == 5 and all(option in shown for option in options)


def test_the_dashboard_asks_for_metrics_that_exist(namespace):
    dashboard = json.loads((BOOK / "grafana.json").read_text())
    asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    with running(namespace["app"]) as url:
        text = httpx.get(url + METRICS).text
    families = list(text_string_to_metric_families(text))
    known = {family.name + end for family in families for end in ("", "_total", "_bucket", "_count")}
    for expression in asked:
        names = re.findall(r"samelib_\w+", expression)
        assert names and set(names) <= known, expression
    labels = {"le", "outcome", "rank", "reason", "status", "quantile"}
    assert set(re.findall(r"by \((\w+)\)", " ".join(asked))) <= labels
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
