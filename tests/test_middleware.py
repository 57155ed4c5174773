"""Guarded: SAME in front of an app that somebody else wrote, as a real server and as bare ASGI."""

import asyncio
import io
import json
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import JSONResponse
from PIL import Image
from serving import CLASSES, SHAPE, WORK, Gate, Ranked, grey, noise, quarters
from starlette.middleware.gzip import GZipMiddleware

from samelib import BanAccount, ProofOfWork, Reject, SamePlus
from samelib.data.image_set import to_float
from samelib.detectors.base import NotFittedError
from samelib.models.classifiers import Victim
from samelib.service.client import as_png
from samelib.service.intake import ApiError, Limits
from samelib.service.middleware import METRICS, Guarded, JsonAnswers, multipart_images
from samelib.service.server import running
from samelib.service.stamps import StampOffice, solve

SECRET = b"a secret of tests" * 2
ELSEWHERE = Victim.elsewhere(SHAPE, CLASSES)


def an_app(calls: list, answer=quarters) -> FastAPI:
    """A service as somebody writes one: a form of files, and names beside the probabilities."""
    app = FastAPI()

    @app.post("/predict")
    async def predict(files: list[UploadFile]):
        images = [np.array(Image.open(io.BytesIO(await file.read()))) for file in files]
        x = to_float(torch.from_numpy(np.stack(images))[:, None])
        calls.append(len(x))
        rows = answer(x)
        return {"probabilities": rows.tolist(), "labels": rows.argmax(1).tolist(), "model": "quarters"}

    @app.get("/about")
    async def about():
        return {"model": "quarters"}

    @app.post("/feedback")
    async def feedback(request: Request):
        return await request.json()

    return app


async def decode(request: Request):
    """Forms of images, and /feedback, which asks the model nothing."""
    if request.scope["path"] == "/feedback":
        return None
    return await multipart_images(SHAPE, "files")(request)


@contextmanager
def guarded(response=None, detector=None, answer=quarters, limits=None, **changes):
    """(a client of the live server, how many images the app was asked each time)"""
    calls, limits = [], limits or Limits()
    app = an_app(calls, answer)
    given = {"decode": decode, "victim": ELSEWHERE, "limits": limits} | changes
    app.add_middleware(Guarded, detector=detector or Ranked(), response=response, **given)
    app.state.limits = limits
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client, calls


def ask(client: httpx.Client, images: torch.Tensor, **headers) -> httpx.Response:
    files = [("files", ("x.png", as_png(image), "image/png")) for image in images]
    return client.post(
        "/predict", files=files, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def outcomes(client: httpx.Client) -> dict[str, float]:
    lines = [line.split() for line in client.get(METRICS).text.splitlines() if line.startswith("samelib_images_total")]
    return {name.split('"')[1]: float(value) for name, value in lines}


def test_an_answer_that_may_go_goes_as_it_was_after_one_call():
    with guarded(Reject(0.05)) as (client, calls):
        images = grey(0, 10)
        answer = ask(client, images)
        assert answer.status_code == 200 and calls == [2]
        assert answer.json()["labels"] and answer.json()["model"] == "quarters"
        assert torch.allclose(torch.tensor(answer.json()["probabilities"]), quarters(to_float(images)))
        assert outcomes(client) == {"answered": 2}
        assert 'samelib_requests_total{status="200"} 1.0' in client.get(METRICS).text


def test_what_asks_nothing_passes():
    with guarded(Reject(0.05)) as (client, calls):
        assert client.get("/about").json() == {"model": "quarters"}
        assert client.post("/feedback", json={"stars": 5}).json() == {"stars": 5}
        assert not calls and outcomes(client) == {}


def test_a_strange_image_is_refused_and_its_row_alone():
    with guarded(Reject(0.05)) as (client, calls):
        answer = ask(client, grey(255))
        assert answer.status_code == 403 and calls == [1]
        assert answer.json()["code"] == "refused" and answer.json()["images"] == [0]

        answer = ask(client, grey(0, 255, 10))
        assert answer.status_code == 200 and set(answer.json()) == {"probabilities", "labels"}
        assert answer.json()["labels"][1] is None and answer.json()["probabilities"][1] is None
        kept = torch.tensor(answer.json()["probabilities"][::2])
        assert torch.allclose(kept, quarters(to_float(grey(0, 10))))
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert outcomes(client) == {"refused": 2, "answered": 2}


def test_without_a_way_to_withhold_rows_the_request_is_refused():
    with guarded(Reject(0.05), answers=lambda answer: JsonAnswers()(answer)) as (client, _):
        answer = ask(client, grey(0, 255, 10))
        assert answer.status_code == 403 and answer.json()["images"] == [1]
        assert outcomes(client) == {"refused": 1, "withheld": 2}


def test_work_is_asked_for_a_request_as_a_whole_and_paid_once():
    with guarded(WORK, office=StampOffice(SECRET)) as (client, calls):
        images = grey(0, 255)
        answer = ask(client, images)
        bits = [int(WORK.decide(Ranked().p_value(image[None]))[1]) for image in images]
        assert answer.status_code == 402 and answer.json()["code"] == "challenge"
        assert 2 ** answer.json()["bits"] >= sum(2**b for b in bits) > 2 ** (answer.json()["bits"] - 1)

        stamp, _ = solve(answer.json()["challenge"])
        refused = ask(client, grey(1, 255), X_Stamp=stamp)
        assert refused.status_code == 403 and refused.json()["code"] == "mismatched"
        paid = ask(client, images, X_Stamp=stamp)
        assert paid.status_code == 200 and len(paid.json()["probabilities"]) == 2
        again = ask(client, images, X_Stamp=stamp)
        assert again.status_code == 403 and again.json()["code"] == "spent"
        assert calls == [2, 2] and outcomes(client) == {"challenge": 2, "answered": 2}


def test_free_images_add_no_work():
    with guarded(ProofOfWork(0, 4)) as (client, _):
        assert ask(client, grey(0, 0)).status_code == 200  # p = 1: two puzzles of no bits
        assert ask(client, grey(0, 255)).json()["bits"] == 4


def test_an_account_is_banned_and_comes_no_further_than_the_door():
    named = {"account": lambda request: request.headers["Authorization"]}
    with guarded(BanAccount(streams=("strangeness",)), **named) as (client, calls):
        statuses = [ask(client, noise(1, seed) | 192, Authorization="thief").status_code for seed in range(12)]
        assert statuses[0] == 200 and statuses[-1] == 403
        asked = len(calls)
        answer = ask(client, grey(0), Authorization="thief")
        assert answer.status_code == 403 and answer.json()["code"] == "banned" and len(calls) == asked
        assert ask(client, grey(0), Authorization="honest").status_code == 200


def test_without_a_key_of_ones_own_the_header_names_the_account():
    with guarded(BanAccount()) as (client, calls):
        assert ask(client, grey(0)).status_code == 401 and not calls
        assert ask(client, grey(0), X_API_Key="somebody").status_code == 200


def test_what_the_app_refuses_passes_unseen():
    def refuse(_):
        raise ApiError(418, "teapot", "no")

    calls = []
    app = an_app(calls, refuse)
    app.add_exception_handler(ApiError, lambda _, error: error.response())
    app.add_middleware(Guarded, detector=Ranked(), response=Reject(0.05), decode=decode, victim=ELSEWHERE)
    app.state.limits = Limits()
    with running(app) as url, httpx.Client(base_url=url) as client:
        answer = ask(client, grey(255))
        assert answer.status_code == 418 and answer.json()["code"] == "teapot" and outcomes(client) == {}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "no image file"),
        ([("files", ("x.png", b"no picture", "image/png"))], "no PNG or JPEG"),
        ([("other", ("x.png", as_png(grey(0)[0]), "image/png"))], "no image file"),
        ([("files", ("x.png", as_png(grey(0)[0, :, :4]), "image/png"))], "8 x 4 pixels"),
        ([("files", ("x.png", as_png(grey(0)[0]), "image/png"))] * 5, "5 images came in one request; send 4"),
    ],
)
def test_what_cannot_be_decoded_never_reaches_the_app(files, words):
    with guarded(Reject(0.05), limits=Limits(images=4)) as (client, calls):
        answer = client.post("/predict", files=files) if files else client.post("/predict", data={"a": "b"})
        assert answer.status_code == 422 and words in answer.json()["error"] and not calls


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "QUERY"])
def test_every_method_that_may_ask_is_looked_at(method):
    with guarded(Reject(0.05)) as (client, calls):
        assert client.request(method, "/predict", content=b"x").status_code == 422 and not calls


def test_errors_of_a_decode_say_what_is_wrong():
    async def wrong_size(request):
        return torch.zeros(1, 1, 4, 4)

    with guarded(decode=wrong_size) as (client, calls):
        answer = ask(client, grey(0))
        assert answer.status_code == 422 and "[N, 1, 8, 8], got [1, 1, 4, 4]" in answer.json()["error"] and not calls


def test_whatever_decode_meets_the_app_is_not_asked():
    async def careless(request):
        return (await request.form())["photo"]

    with guarded(decode=careless, fail_open=True) as (client, calls):
        answer = ask(client, grey(0))
        assert answer.status_code == 422 and answer.json()["error"] == "this request cannot be read" and not calls


class Broken(Ranked):
    """Its first score, of the warm-up, is good."""

    scored = 0

    def score_received(self, x, answers=None):
        self.scored += len(x)
        if self.scored > 100:
            raise RuntimeError("out of memory")
        return super().score_received(x, answers)


LOGITS = {"answer": lambda x: quarters(x).log()}
HIDDEN = {"answers": lambda answer: torch.tensor(json.loads(answer.body)["scores"])}


@pytest.mark.parametrize("broken", [{"detector": Broken()}, LOGITS, HIDDEN], ids=["detector", "logits", "no answers"])
@pytest.mark.parametrize("fail_open", [False, True])
def test_a_defence_that_fails_is_open_or_closed_as_was_chosen(broken, fail_open):
    if "detector" in broken:
        broken = {"detector": Broken()}
    with guarded(Reject(0.05), fail_open=fail_open, **broken) as (client, calls):
        answer = ask(client, noise(50))
        assert calls == [50] and answer.status_code == (200 if fail_open else 503)
        assert "samelib_defence_failures_total 1.0" in client.get(METRICS).text
        assert ("probabilities" in answer.json()) is fail_open


@pytest.mark.parametrize("fail_open", [False, True])
def test_a_late_defence_counts_as_one_that_failed(fail_open):
    gate = Gate()

    class Slow(Ranked):
        def score_received(self, x, answers=None):
            gate(x)
            return super().score_received(x, answers)

    with guarded(Reject(0.05), Slow(), limits=Limits(answer_seconds=0.2), fail_open=fail_open) as (client, _):
        gate.shut()
        try:
            answer = ask(client, grey(0))
        finally:
            gate.open()
        assert answer.status_code == (200 if fail_open else 504)


def test_compressed_answers_are_not_taken_for_text():
    app = an_app([])
    app.add_middleware(GZipMiddleware, minimum_size=1)
    app.add_middleware(Guarded, detector=Ranked(), response=Reject(0.05), decode=decode, victim=ELSEWHERE)
    app.state.limits = Limits()
    with running(app) as url, httpx.Client(base_url=url) as client:
        assert ask(client, grey(0)).status_code == 503
    app = an_app([])
    app.add_middleware(Guarded, detector=Ranked(), response=Reject(0.05), decode=decode, victim=ELSEWHERE)
    app.add_middleware(GZipMiddleware, minimum_size=1)
    app.state.limits = Limits()
    with running(app) as url, httpx.Client(base_url=url) as client:
        answer = ask(client, grey(0))
        assert answer.status_code == 200 and answer.headers["content-encoding"] == "gzip"


def test_bodies_are_bounded():
    with guarded(limits=Limits(body=2000)) as (client, calls):
        assert ask(client, noise(20)).status_code == 413 and not calls


async def conversation(app, scope: dict, *messages: dict) -> list[dict]:
    """What a bare ASGI app sends."""
    waiting, sent = list(messages), []

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_an_answer_in_pieces_is_held_back_until_it_is_whole():
    """And background work of the app goes on after its answer went out."""
    order = []

    async def app(scope, receive, send):
        assert "extensions" not in scope and (await receive())["body"] == b"pixels"
        body = json.dumps({"probabilities": [[0.25] * 4]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Own", b"1")]})
        await send({"type": "http.response.body", "body": body[:5], "more_body": True})
        order.append("half")
        await send({"type": "http.response.body", "body": body[5:]})
        order.append("background")

    async def black(request):
        assert await request.body() == b"pixels"
        return grey(0)

    guard = Guarded(app, Ranked(), Reject(0.05), decode=black, victim=ELSEWHERE)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "extensions": {"http.response.pathsend": {}}}

    start, body = asyncio.run(conversation(guard, scope, {"type": "http.request", "body": b"pixels"}))
    assert start["status"] == 200 and (b"X-Own", b"1") in start["headers"] and json.loads(body["body"])
    assert order == ["half", "background"]


def test_websockets_are_closed():
    async def app(scope, receive, send):
        pytest.fail("the app was asked over a WebSocket")

    guard = Guarded(app, Ranked(), decode=decode, victim=ELSEWHERE)
    sent = asyncio.run(conversation(guard, {"type": "websocket", "path": "/"}, {"type": "websocket.connect"}))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_what_cannot_work_is_refused_at_once():
    with pytest.raises(ValueError, match=r"how many classes there are; pass victim=Victim.elsewhere"):
        Guarded(None, Ranked(), decode=decode)
    with pytest.raises(NotFittedError, match="call fit first"):
        Guarded(None, SamePlus.preset("smoke", (1, 28, 28)), decode=decode, victim=ELSEWHERE)
    with pytest.raises(ValueError, match="takes images"):
        Guarded(None, Ranked((1, 4, 4)), decode=decode, victim=ELSEWHERE)


def test_a_victim_elsewhere_cannot_be_asked_here():
    with pytest.raises(RuntimeError, match="bring its answers along"):
        ELSEWHERE(to_float(grey(0)))


def test_json_answers_of_one_image_and_without_a_name():
    answer = JSONResponse([0.5, 0.5])
    assert JsonAnswers(None)(answer).tolist() == [[0.5, 0.5]]
    rows = JSONResponse([[0.5, 0.5], [1, 0]])
    assert json.loads(JsonAnswers(None).withhold(rows, [0]).body) == [None, [1, 0]]
