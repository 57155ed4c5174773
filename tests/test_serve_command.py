"""`samelib serve`: what it refuses at the start, and what it does as a process: restart, stop."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest
import torch
from serving import (
    as_files,
    as_tensors,
    ask,
    connect,
    fault,
    grey,
    is_closed,
    new_stamps,
    noise,
    outputs,
    probabilities,
    read_all,
    wait_for,
)

import samelib.service
from samelib import cli
from samelib.accounts import AccountBook
from samelib.data.image_set import to_float
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import Victim, build_classifier
from samelib.service import server
from samelib.service.app import create_app
from samelib.service.commands import serve
from samelib.service.server import bound_socket
from samelib.store import save_folder

SECRET = "a secret of these tests"


@pytest.fixture(scope="module")
def folder(detector, tmp_path_factory):
    return detector.save(tmp_path_factory.mktemp("saved") / "detector")


@pytest.fixture(autouse=True)
def no_secret_and_no_service_in_this_process(monkeypatch):
    monkeypatch.delenv("SAMELIB_SECRET", raising=False)

    def served(*_):
        raise AssertionError("this should have been refused, and would be served for ever")

    monkeypatch.setattr(server, "serve", served)


def refusal(*words: object) -> str:
    """The one line in which `samelib serve` ends."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *map(str, words), *([] if "--port" in words else ["--port", "0"])])
    said = str(stop.value)
    assert said.startswith("samelib: ") and "\n" not in said
    return said


def classifier(path, shape, classes):
    Victim.of(build_classifier("conv3", shape, classes), shape, classes, "conv3").save(path)
    return path


def test_a_victim_that_does_not_match(folder, tmp_path):
    said = refusal(folder, "--victim", classifier(tmp_path / "colour", (3, 32, 32), 10))
    assert "victim takes images (3, 32, 32), the detector (1, 28, 28)" in said
    said = refusal(folder, "--victim", classifier(tmp_path / "classes", (1, 28, 28), 7))
    assert "victim has 7 classes, the detector 10" in said


def test_a_detector_that_was_saved_without_its_victim(detector, tmp_path):
    black_box = Victim(detector.victim.answer, detector.victim.image_shape, detector.victim.classes)
    alone = SameDetector.load(detector.save(tmp_path / "whole"), black_box)
    assert "without its victim" in refusal(alone.save(tmp_path / "alone"))


def test_folders_that_hold_no_detector(folder, tmp_path):
    assert "nowhere holds no readable card.json" in refusal(tmp_path / "nowhere")
    assert "holds a classifier, not a detector" in refusal(classifier(tmp_path / "victim", (1, 28, 28), 10))
    assert "holds a same-detector, not a classifier" in refusal(folder, "--victim", folder)
    save_folder(tmp_path / "other", {}, {"kind": "log"})
    assert "holds a log, not a detector" in refusal(tmp_path / "other")
    (tmp_path / "file").write_text("something else")
    assert "holds no readable card.json" in refusal(tmp_path / "file")


def test_a_damaged_detector(detector, tmp_path):
    damaged = detector.save(tmp_path / "damaged")
    weights = bytearray((damaged / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (damaged / "weights.safetensors").write_bytes(weights)
    assert "weights.safetensors is damaged" in refusal(damaged)
    card = (damaged / "card.json").read_text().replace('"classes": 10', '"classes": 9')
    (damaged / "card.json").write_text(card)
    assert "card.json is damaged" in refusal(damaged)


def test_a_taken_port(folder):
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal(folder, "--port", port)
    assert f"cannot serve on 127.0.0.1 port {port}" in said and "choose another" in said


def test_a_refused_start_leaves_its_port_free(tmp_path):
    with bound_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    refusal(tmp_path / "nowhere", "--port", port)
    bound_socket("127.0.0.1", port).close()


WORK = ("--response", "proof-of-work")


def test_a_secret_and_a_file_of_stamps_go_together(folder, tmp_path, monkeypatch):
    stamps = tmp_path / "stamps.sqlite"
    assert "go together" in refusal(folder, *WORK, "--stamps", stamps)
    monkeypatch.setenv("SAMELIB_SECRET", SECRET)
    said = refusal(folder, *WORK)
    assert "go together" in said and SECRET not in said
    monkeypatch.setenv("SAMELIB_SECRET", "short")
    assert "5 bytes, it needs 16" in refusal(folder, *WORK, "--stamps", stamps)
    monkeypatch.setenv("SAMELIB_SECRET", SECRET)
    other = tmp_path / "notes.txt"
    other.write_text("something else " * 500)
    assert "cannot hold the spent stamps" in refusal(folder, *WORK, "--stamps", other)


BAN = ("--response", "ban")
UPSTREAM = ("--upstream", "http://127.0.0.1:1/v2/models/victim")


def test_a_secret_and_a_file_of_accounts_go_together(folder, tmp_path, monkeypatch):
    accounts = tmp_path / "accounts.sqlite"
    assert "SAMELIB_SECRET and --accounts FILE go together" in refusal(folder, *BAN, "--accounts", accounts)
    monkeypatch.setenv("SAMELIB_SECRET", SECRET)
    assert "go together" in refusal(folder, *BAN)
    AccountBook(accounts, SECRET[::-1].encode()).close()
    said = refusal(folder, *BAN, "--accounts", accounts)
    assert "hashed with another secret" in said and SECRET not in said
    monkeypatch.setenv("SAMELIB_SECRET", "short")
    assert "5 bytes, it needs 16" in refusal(folder, *BAN, "--accounts", tmp_path / "new.sqlite")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fpr", "0"], "above 0 and below 1"),
        ([*WORK, "--base-bits", "39"], "40 together"),
        ([*WORK, "--most-bits", "-1"], "at least 0"),
        (["--response", "reject", "--base-bits", "5"], "reject ignores --base-bits"),
        ([*WORK, "--fpr", "0.1"], "proof-of-work ignores --fpr"),
        (["--response", "watch", "--stamps", "spent.sqlite"], "watch ignores --stamps"),
        (["--share", "0.5"], "reject ignores --share"),
        (["--response", "watch", "--share", "0"], "a share of queries"),
        (["--response", "watch", "--share", "0.5", "--delta", "0.01"], "a share of queries"),
        (["--response", "reject", "--delta", "0.01"], "reject ignores --delta"),
        ([*WORK, "--accounts", "accounts.sqlite"], "proof-of-work ignores --accounts"),
        ([*BAN, "--stamps", "spent.sqlite"], "ban ignores --stamps"),
        ([*BAN, "--delta", "1"], "above 0 and below 1"),
        (["--pixels", "0", "1"], "a model of one's own ignores --pixels"),
        (["--fail-open"], "a model of one's own ignores --fail-open"),
        ([*UPSTREAM, "--victim", "folder"], "--upstream ignores --victim"),
        ([*UPSTREAM, "--response", "off"], "nothing to do before --upstream"),
        ([*UPSTREAM, "--pixels", "1", "0"], "black must have a lower value than white"),
        (["--upstream", "http://127.0.0.1:1"], "the upstream is http://HOST:PORT/v2/models/NAME"),
        (["--host", "192.0.2.1"], "cannot serve on 192.0.2.1"),  # an address of nobody's, kept for documents
    ],
)
def test_settings_that_cannot_be(folder, words, message):
    assert message in refusal(folder, *words)


@pytest.mark.parametrize(("response", "option"), [(WORK, "--stamps"), (BAN, "--accounts")])
def test_a_refused_start_leaves_no_file_behind(folder, tmp_path, monkeypatch, response, option):
    monkeypatch.setenv("SAMELIB_SECRET", SECRET)
    refusal(folder, *response, option, tmp_path / "new.sqlite", "--upstream", "http://127.0.0.1:1")
    assert not list(tmp_path.iterdir())
    book = AccountBook(tmp_path / "new.sqlite", SECRET.encode())  # what was there before stays
    refusal(folder, *BAN, "--accounts", tmp_path / "new.sqlite", "--upstream", "http://127.0.0.1:1")
    assert not book.entries()


def test_a_missing_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "samelib.service.app", raising=False)
    monkeypatch.delattr(samelib.service, "app", raising=False)
    said = refusal(folder)
    assert "needs fastapi" in said and "pip install 'samelib[serve]'" in said


def test_it_is_for_this_machine_alone_unless_told():
    assert {option.name: option.default for option in serve.params}["host"] == "127.0.0.1"


def test_help_teaches(capsys):
    cli.main(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("SAMELIB_SECRET", "samelib[serve]", "/docs", "reject"):
        assert word in shown


@contextmanager
def process(folder, *words, **environment):
    """A running `samelib serve`, and a client of it."""
    name, *words = words if words and words[0] == "listen" else ("serve", *words)
    page = "/metrics" if name == "listen" else "/v2" if "--upstream" in words else "/docs"
    command = [sys.executable, "-m", "samelib.cli", name, str(folder), "--port", "0", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as running:
        try:
            line = running.stdout.readline()
            url = re.match(rf"(http://127\.0\.0\.1:\d+){page}(  response: |\n)", line)
            assert url, f"{line}{running.stderr.read()} exit status {running.wait()}"
            with httpx.Client(base_url=url[1], timeout=60) as client:
                assert client.get("/metrics" if page == "/metrics" else "/v2/health/ready").status_code == 200
                yield running, client
        finally:
            running.kill()


@pytest.mark.slow
def test_a_stamp_cannot_be_spent_twice_across_a_restart(folder, group, tmp_path):
    few = [*WORK, "--base-bits", 2, "--most-bits", 2, "--stamps", tmp_path / "stamps.sqlite"]
    images = group.benign_test.images[:2]
    with process(folder, *few, SAMELIB_SECRET=SECRET) as (first, client):
        stamps = new_stamps(client, images)
        answer = ask(client, images[:1], stamps[:1])
        assert answer.json()["results"][0]["status"] == "answered"
        first.kill()  # it has no time to put anything away
    with process(folder, *few, SAMELIB_SECRET=SECRET) as (second, client):
        assert fault(ask(client, images[:1], stamps[:1])) == (403, "spent")
        assert probabilities(ask(client, images[1:], stamps[1:])).shape == (1, 10)  # the other is still good
        second.send_signal(signal.SIGINT)
        assert second.wait(30) == 0


@pytest.mark.slow
def test_a_stop_answers_what_was_accepted(folder, group, victim):
    images = group.benign_test.images[:6]
    with process(folder, "--response", "watch") as (running, client):
        bodies = [httpx.Request("POST", "http://here", **as_tensors(image[None])).content for image in images]
        accepted = [begun(client, body) for body in bodies]
        running.send_signal(signal.SIGTERM)
        wait_for(lambda: is_closed(client))
        for connection, body in zip(accepted, bodies, strict=True):
            connection.sendall(body[10:])
        answers = [httpx_response(read_all(connection)) for connection in accepted]
        assert running.wait(30) == 0
        said = running.stderr.read()
    expected = victim(to_float(images))
    for answer, row in zip(answers, expected, strict=True):
        assert outputs(answer)["probabilities"] == pytest.approx(row.tolist(), abs=1e-4)
    assert "Traceback" not in said and "rror" not in said


def test_clients_are_told_to_close_before_a_stop(folder, group):
    image = group.benign_test.images[:1]
    with process(folder, "--response", "watch") as (running, client):
        assert "connection" not in ask(client, image).headers
        running.send_signal(signal.SIGTERM)
        wait_for(lambda: ask(client, image).headers.get("connection") == "close")
        assert running.wait(30) == 0


STUCK = """
import time, torch
from samelib.models.classifiers import Victim
from samelib.service.app import create_app
from samelib.service.intake import Limits
from samelib.service.server import bound_socket, serve, url_of

def answer(x):
    while x.min() > 0.9:
        time.sleep(1)
    return torch.full([len(x), 2], 0.5)

bound = bound_socket("127.0.0.1", 0)
bound.listen()
print(url_of(bound), flush=True)
serve(create_app(Victim(answer, (1, 8, 8), 2), limits=Limits(answer_seconds=0.5)), bound)
"""


def test_a_model_that_never_answers_does_not_hold_up_the_stop():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as running:
        try:
            with httpx.Client(base_url=running.stdout.readline().strip(), timeout=60) as client:
                assert ask(client, grey(0)).status_code == 200
                assert ask(client, grey(255)).status_code == 504
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) == 0
        finally:
            running.kill()


@pytest.mark.slow
def test_a_ban_survives_a_killed_process(folder, group, tmp_path, capsys):
    file, key = tmp_path / "accounts.sqlite", {"X-API-Key": "a thief"}
    words = [*BAN, "--delta", 0.05, "--accounts", file]
    thief, honest = noise(200, 0, group.image_shape), group.benign_test.images[:1]
    with process(folder, *words, SAMELIB_SECRET=SECRET) as (first, client):
        for part in thief.split(50):
            answer = client.post("/v1/predict", headers=key, **as_files(part))
        assert fault(answer) == (403, "banned")
        first.kill()  # it has no time to put anything away
    cli.main(["accounts", str(file)])
    header, line = capsys.readouterr().out.splitlines()
    label, queries, *_ = line.split()
    assert header.split()[:2] == ["account", "queries"] and label in answer.json()["error"] and int(queries) < 150
    with process(folder, *words, SAMELIB_SECRET=SECRET) as (second, client):
        answer = client.post("/v1/predict", headers=key, **as_files(honest))
        assert fault(answer) == (403, "banned")
        cli.main(["accounts", str(file), "--lift", label])
        answer = client.post("/v1/predict", headers=key, **as_files(honest))
        assert probabilities(answer).shape == (1, 10)
        second.send_signal(signal.SIGINT)
        assert second.wait(30) == 0


def test_accounts_that_cannot_be_listed_or_lifted(tmp_path, capsys):
    def said(*words) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["accounts", *map(str, words)])
        return str(stop.value) + capsys.readouterr().err

    assert "does not exist" in said(tmp_path / "nowhere.sqlite") and not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("something else " * 500)
    assert "samelib: " in (words := said(tmp_path / "notes.txt")) and "cannot hold accounts" in words
    AccountBook(tmp_path / "empty.sqlite", SECRET.encode()).close()
    assert "samelib: no account begins with 'abc'" in said(tmp_path / "empty.sqlite", "--lift", "abc")


def begun(client: httpx.Client, body: bytes) -> socket.socket:
    """A connection whose request the service has begun to read: it has asked for the body and got a part of it."""
    connection = connect(client)
    connection.sendall(
        b"POST /v2/models/victim/infer HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    assert connection.recv(65_536).startswith(b"HTTP/1.1 100 ")
    connection.sendall(body[:10])
    return connection


def httpx_response(raw: bytes) -> httpx.Response:
    head, _, body = raw.partition(b"\r\n\r\n")
    return httpx.Response(int(head.split()[1]), content=body)


def test_it_stands_in_front_of_another_server(folder, detector, group):
    """The other one here: samelib's own without a defence, which takes pixels in [-1, 1]."""
    images = torch.cat([group.benign_test.images[:4], noise(1, shape=group.image_shape)])
    app = create_app(detector.victim)
    words = ["--pixels", "-1", "1", "--image", "image", "--probabilities", "probabilities", "--fpr", "0.02"]
    with server.running(app) as inner:
        upstream = f"{inner}/v2/models/victim"
        with process(folder, "--upstream", upstream, *words) as (running, client):
            answer = client.post("/v2/models/victim/infer", **as_tensors(images, datatype="FP32"))
            rows = torch.tensor(outputs(answer)["probabilities"]).reshape(len(images), -1)
            refused = detector.p_value(images) <= 0.02
            assert refused.any() and not refused.all()
            assert torch.allclose(rows[~refused], detector.victim(to_float(images))[~refused], atol=1e-5)
            assert not rows[refused].any()
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) == 0


def test_it_listens_to_the_logger_of_kserve(folder, detector, group):
    images = group.benign_test.images[:3]
    outputs = [{"name": "p", "datatype": "FP32", "shape": [3, 10], "data": [0.1] * 30}]
    with process(folder, "listen") as (_, client):
        for kind, body in (("request", as_tensors(images)["json"]), ("response", {"outputs": outputs})):
            headers = {"ce-id": "1", "ce-type": f"org.kubeflow.serving.inference.{kind}"}
            assert client.post("/", json=body, headers=headers).status_code == 202
        assert 'samelib_images_total{outcome="watched"} 3.0' in client.get("/metrics").text


def test_watching_counts_accounts_and_answers_them_all(folder, group, tmp_path):
    file = tmp_path / "accounts.sqlite"
    with process(folder, "--response", "watch", "--accounts", file, SAMELIB_SECRET=SECRET) as (_, client):
        client.headers["X-API-Key"] = "thief"
        for seed in range(20):
            assert len(probabilities(ask(client, noise(8, seed, group.image_shape)))) == 8
        assert "samelib_bans_total 1.0" in client.get("/metrics").text
    assert [account.banned is None for account in AccountBook(file).entries()] == [False]
