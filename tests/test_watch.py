"""Watching: everything is answered at once, and /metrics tells what would have been done."""

import httpx
import pytest
import torch
from serving import INFER, Gate, Ranked, as_tensors, ask, grey, noise, probabilities, service
from test_middleware import ELSEWHERE, METRICS, guarded
from test_middleware import ask as ask_guarded
from test_proxy import FLOATS

from samelib import BanAccount, Defence, Reject
from samelib.service.events import ANSWER, MOST_PAIRS, REQUEST, Pairs, create_listener
from samelib.service.intake import Limits
from samelib.service.server import running
from samelib.service.tensors import InferAnswers

STRANGE = BanAccount(streams=("strangeness",), enforce=False)


def wealths(client: httpx.Client, path: str) -> list[float]:
    lines = client.get(path).text.splitlines()
    return [float(line.split()[1]) for line in lines if line.startswith("samelib_account_log_wealth{")]


def test_accounts_are_counted_and_none_is_banned():
    with service(response=STRANGE) as client:
        for seed in range(12):
            for account in ("thief", "other"):
                answer = client.post(INFER, **as_tensors(noise(1, seed) | 192), headers={"X-API-Key": account})
                assert answer.status_code == 200
        assert probabilities(ask(client, grey(0))).isfinite().all()  # without a key
        text = client.get("/metrics").text
        assert "samelib_bans_total 2.0" in text


def test_the_wealth_of_the_nearest_accounts_is_told_without_their_names():
    with guarded(STRANGE) as (client, _):
        for count, account in enumerate(("a", "b", "c", "d", "e", "f")):
            for seed in range(count):
                ask_guarded(client, noise(1, seed) | 128, X_API_Key=account)
        told = wealths(client, METRICS)
        assert len(told) == 5 and told == sorted(told, reverse=True) and told[0] > 0
        assert 'rank="1"' in client.get(METRICS).text


def test_answers_do_not_wait_for_the_score():
    gate = Gate()

    class Slow(Ranked):
        def score_received(self, x, answers=None):
            gate(x)
            return super().score_received(x, answers)

    with guarded(detector=Slow()) as (client, _):
        gate.shut()
        try:
            assert ask_guarded(client, grey(255)).status_code == 200
        finally:
            gate.open()


def test_a_share_of_queries_is_looked_at():
    images = noise(1000)
    looked = (
        ~Defence(ELSEWHERE, Ranked(), share=0.3).judge(images, answers=torch.full([1000, 4], 0.25)).p_values.isnan()
    ).sum()
    assert 230 < looked < 370  # five standard deviations about 300
    for share, response in ((0.3, Reject(0.05)), (0.0, None), (1.1, None)):
        with pytest.raises(ValueError, match="a share of queries"):
            Defence(ELSEWHERE, Ranked(), response, share)


@pytest.fixture
def listener():
    app = create_listener(
        Ranked(), decode=FLOATS, answers=InferAnswers("probabilities"), victim=ELSEWHERE, limits=Limits(images=8)
    )
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def send(client: httpx.Client, kind: str, number: str, body: dict) -> int:
    return client.post("/", json=body, headers={"ce-id": number, "ce-type": kind}).status_code


def answer_to(count: int) -> dict:
    entry = {"name": "probabilities", "datatype": "FP32", "shape": [count, 4], "data": [0.25] * 4 * count}
    return {"model_name": "m", "outputs": [entry]}


def watched(client: httpx.Client) -> float:
    lines = [line.split() for line in client.get("/metrics").text.splitlines()]
    return sum(float(line[1]) for line in lines if line[0] == 'samelib_images_total{outcome="watched"}')


@pytest.mark.parametrize("order", [1, -1])
def test_a_logged_request_and_its_answer_are_judged_together(listener, order):
    events = [(REQUEST, as_tensors(noise(3))["json"]), (ANSWER, answer_to(3))]
    for kind, body in events[::order]:
        assert watched(listener) == 0
        assert send(listener, kind, "7", body) == 202
    assert watched(listener) == 3 and "samelib_p_value_count 3.0" in listener.get("/metrics").text


def test_what_belongs_to_nothing_waits():
    pairs = Pairs()
    assert pairs.add("1", REQUEST, "images") is None and pairs.add("1", REQUEST, "images") is None
    assert pairs.add("2", ANSWER, "answer") is None and pairs.add("1", ANSWER, "its answer") == ("images", "its answer")
    for number in range(MOST_PAIRS):
        pairs.add(f"new {number}", REQUEST, "images")
    assert pairs.add("2", REQUEST, "too late") is None


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("something.else", answer_to(1)),
        (REQUEST, answer_to(1)),
        (REQUEST, as_tensors(noise(9))["json"]),
        (REQUEST, as_tensors(noise(1, shape=(1, 4, 4)))["json"]),
    ],
)
def test_bad_events_are_refused(listener, kind, body):
    assert send(listener, kind, "1", body) == 422


def test_an_answer_that_is_none_is_refused(listener):
    assert send(listener, REQUEST, "1", as_tensors(noise(2))["json"]) == 202
    assert send(listener, ANSWER, "1", answer_to(3)) == 422
    assert send(listener, REQUEST, "2", as_tensors(noise(2))["json"]) == 202
    assert send(listener, ANSWER, "2", {"error": "no"}) == 422
    assert listener.post("/", json={}).status_code == 422 and watched(listener) == 0
