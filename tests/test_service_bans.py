"""Bans by account over HTTP; what a ban is, tests/test_bans.py has."""

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import httpx
import pytest
import torch
from conftest import TINY_TRAIN
from serving import (
    CLASSES,
    INFER,
    SHAPE,
    Gate,
    Ranked,
    as_files,
    as_tensors,
    connect,
    fault,
    metrics,
    noise,
    outputs,
    quarters,
    read_all,
    results,
    right,
    service,
    wait_for_queue,
)

from samelib.accounts import AccountBook
from samelib.attacks import make_attack
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim
from samelib.presets import preset
from samelib.responses import BanAccount, Reject
from samelib.service.app import create_app
from samelib.service.client import RemoteError, RemoteGateway
from samelib.service.intake import Limits
from samelib.service.server import running

BAN = BanAccount(streams=("strangeness",))
KEY = {"X-API-Key": "a key of these tests"}
SECRET = b"a secret of these tests"


@pytest.fixture
def client():
    with service(response=BAN) as client:
        yield client


def strange(count: int, seed: int = 0) -> torch.Tensor:
    """uint8 [count, *SHAPE]: brighter than what the detector was calibrated with."""
    return 224 + noise(count, seed) // 8


def ask(client, images, key: str = KEY["X-API-Key"]) -> httpx.Response:
    return client.post("/v1/predict", headers={"X-API-Key": key}, **as_files(images))


def statuses(client, images, key: str = KEY["X-API-Key"]) -> list[str]:
    return [result["status"] for result in results(ask(client, images, key))]


def test_a_thief_is_banned_and_others_are_served(client):
    found = statuses(client, strange(30))
    answered = found.count("answered")
    assert found == ["answered"] * answered + ["refused"] * (30 - answered) and 5 < answered < 20
    for answer in (ask(client, noise(1)), client.post(INFER, headers=KEY, **as_tensors(noise(1)))):
        assert fault(answer) == (403, "banned")
        assert "write to whoever runs" in answer.json()["error"] and KEY["X-API-Key"] not in answer.text
    assert right(ask(client, noise(3), "another"), noise(3))
    values = metrics(client)
    assert values["samelib_bans_total",] == 1
    assert (values["samelib_images_total", "answered"], values["samelib_images_total", "refused"]) == (
        answered + 3,
        30 - answered,
    )
    assert values["samelib_requests_total", "403"] == 2
    assert not any(name[0].startswith("samelib_refused_stamps_total") for name in values)


def test_tensors_are_evidence_as_files_are(client):
    for image in strange(6):
        assert outputs(client.post(INFER, headers=KEY, **as_tensors(image[None])))["status"] == ["answered"]
    found = statuses(client, strange(20, 1))
    with service(response=BAN) as other:
        assert statuses(other, torch.cat([strange(6), strange(20, 1)]))[6:] == found and found[-1] == "refused"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, (401, "no_key")),
        ({"X-API-Key": ""}, (401, "no_key")),
        ({"Authorization": "Bearer a key"}, (401, "no_key")),
        ({"X-API-Key": "a" * 257}, (400, "bad_key")),
        ({"X-API-Key": "clé".encode("latin-1")}, (400, "bad_key")),
        ({"X-API-Key": b"a\tkey"}, (400, "bad_key")),
        ([("X-API-Key", "one"), ("X-API-Key", "two")], (400, "bad_key")),
        ([("X-API-Key", ""), ("X-API-Key", "two")], (400, "bad_key")),
    ],
)
@pytest.mark.parametrize("path", ["/v1/predict", INFER])
def test_keys_that_are_refused(client, path, headers, expected):
    content = as_tensors(noise(1)) if path == INFER else as_files(noise(1))
    assert fault(client.post(path, headers=headers, **content)) == expected


def test_keys_that_are_taken(client):
    for key in ("a", "a" * 256, "a key, with ~every~ {kind} of \"sign\" = '1'"):
        assert right(ask(client, noise(1), key), noise(1))


def test_who_sends_no_key_learns_nothing_else(client):
    """Not even whether its body was good; and it is not scored."""
    answers = [client.post("/v1/predict", files={"image": b"no image"}), client.post(INFER, json={"inputs": []})]
    assert [fault(answer) for answer in answers] == [(401, "no_key")] * 2
    assert answers[0].headers["www-authenticate"] == "APIKey"
    assert metrics(client)["samelib_p_value_count",] == 0


def test_a_service_that_bans_nobody_asks_for_no_key():
    with service(response=Reject(0.05)) as client:
        assert right(client.post("/v1/predict", **as_files(noise(1))), noise(1))
        assert right(ask(client, noise(1), "a" * 999), noise(1))
        assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_the_key_is_documented(client):
    (scheme,) = client.get("/openapi.json").json()["components"]["securitySchemes"].values()
    assert scheme == {"type": "apiKey", "in": "header", "name": "X-API-Key"}


def test_starting_is_nobodys_query():
    with closing(AccountBook()) as book, service(response=BanAccount(accounts=book)):
        assert book.entries() == []


def test_several_accounts_share_a_batch():
    """Their requests wait together; each has the verdicts that it would have alone."""
    gate = Gate()
    with service(gate, response=BAN, limits=Limits(images=64)) as client, ThreadPoolExecutor(16) as pool:
        gate.shut()
        asked, waiting = [], 0
        for place in range(8):  # one after the other, so that their order is known
            for key, images in (("thief", strange(3, place)), ("honest", noise(2, place))):
                asked.append((key, pool.submit(ask, client, images, key)))
                waiting += len(images)
                wait_for_queue(client, waiting)
        gate.open()
        found = {"thief": [], "honest": []}
        for key, task in asked:
            found[key] += [result["status"] for result in results(task.result())]
    assert gate.batches == [3, 37] and found["honest"] == ["answered"] * 16
    alone = QueryGateway(Victim(quarters, SHAPE, CLASSES), None, Ranked(), BAN)
    for place in range(8):
        alone.query(strange(3, place))
    assert found["thief"] == ["refused" if refused else "answered" for refused in alone.log.refused]
    assert set(found["thief"]) == {"answered", "refused"}


def test_a_ban_survives_a_restart_and_ends_when_it_is_lifted(tmp_path):
    def opened():
        return closing(AccountBook(tmp_path / "accounts.sqlite", SECRET))

    with opened() as book, service(response=BanAccount(accounts=book)) as client:
        assert statuses(client, strange(30))[-1] == "refused"
    with opened() as book, service(response=BanAccount(accounts=book)) as client:
        refused = ask(client, noise(1))
        assert fault(refused) == (403, "banned") and metrics(client)["samelib_bans_total",] == 0
        with closing(AccountBook(tmp_path / "accounts.sqlite")) as operator:  # beside the running service
            operator.lift(refused.json()["error"].split()[1])
        assert right(ask(client, noise(1)), noise(1))


def test_a_request_that_nobody_waits_for_any_more_may_be_sent_again():
    """A client that was told 504 sends the same images once more: no new evidence."""
    gate = Gate()
    with (
        closing(AccountBook()) as book,
        service(gate, response=BanAccount(accounts=book), limits=Limits(answer_seconds=0.3)) as client,
    ):
        gate.shut()
        assert fault(ask(client, strange(4))) == (504, "timeout")
        gate.open()
        wait_for_queue(client, 0)
        assert statuses(client, strange(4)) == ["answered"] * 4
        (account,) = book.entries()
        assert account.queries == 4


def test_a_full_book_asks_for_patience():
    with closing(AccountBook(most=1)) as book, service(response=BanAccount(accounts=book)) as client:
        assert statuses(client, strange(30))[-1] == "refused"
        answer = ask(client, noise(1), "another")
        assert fault(answer) == (503, "accounts_full") and int(answer.headers["retry-after"]) > 0


def test_no_key_gets_into_logs_metrics_or_answers(client, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    mark = "mArKeR5150"
    shown = [ask(client, strange(30), mark).text, ask(client, noise(1), mark).text]
    shown += [ask(client, noise(1), key).text for key in (mark * 30, f"{mark}\t{mark}")]
    with connect(client) as connection:
        connection.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: here\r\nX-API-Key: {mark}\0\r\n\r\n".encode())
        shown.append(read_all(connection).decode())
    shown.append(client.get("/metrics").text)
    written = capfd.readouterr()
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    for text in (*ours, written.out, written.err, *shown):
        assert mark.lower() not in text.lower()


# The client


def test_a_remote_gateway_names_its_account(client):
    url = str(client.base_url)
    with RemoteGateway(url, 100, api_key="thief") as thief, RemoteGateway(url, api_key="honest") as honest:
        local = QueryGateway(Victim(quarters, SHAPE, CLASSES), 100, Ranked(), BAN)
        for queries in (strange(30), noise(5), noise(5)):
            here, there = local.query(queries), thief.query(queries)
            assert torch.allclose(here, there, atol=1e-5, equal_nan=True)
        assert torch.equal(local.log.refused, thief.log.refused) and thief.log.refused[-10:].all()
        assert thief.spent == 40 and honest.query(noise(3)).isfinite().all()


def test_a_remote_gateway_without_an_account_is_told(client):
    with RemoteGateway(str(client.base_url)) as remote, pytest.raises(RemoteError, match=r"\(401\): .*X-API-Key"):
        remote.query(noise(1))
    assert remote.spent == 0


@pytest.mark.parametrize("name", ["noise", "jbda"])
def test_an_attack_runs_to_its_end_over_http(name, victim, detector, group):
    response, settings = BanAccount(0.1), preset("smoke", group.image_shape)
    short = replace(settings, substitute_train=TINY_TRAIN, round_train=TINY_TRAIN)
    local = QueryGateway(victim, 100, detector, response)
    app = create_app(victim, detector, response, limits=Limits(images=256))
    with running(app) as url, RemoteGateway(url, 100, api_key="thief") as remote:
        here, there = (make_attack(name, group, short).run(door) for door in (local, remote))
    assert torch.equal(local.log.queries, remote.log.queries)
    assert torch.equal(local.log.refused, remote.log.refused) and remote.log.refused.any()
    assert here.answered == there.answered < here.queries == there.queries
