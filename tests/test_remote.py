"""RemoteGateway: the same door over HTTP, for the same attacks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from serving import WORK, Gate, Ranked, ask, grey, metrics, noise, quarters, service, wait_for, wait_for_queue

from samelib.attacks import ATTACKS, make_attack
from samelib.data.image_set import to_float
from samelib.gateway import BudgetExceeded, QueryGateway
from samelib.models.classifiers import Victim
from samelib.presets import preset
from samelib.responses import ProofOfWork, Reject
from samelib.service.app import create_app
from samelib.service.client import RemoteError, RemoteGateway
from samelib.service.intake import Limits
from samelib.service.server import bound_socket, running
from samelib.service.stamps import StampOffice

BUDGET = 60


@pytest.fixture(scope="module")
def defended(victim, detector):
    """A live service that refuses; it takes as many images at a time as the attacks ask."""
    with running(create_app(victim, detector, Reject(0.3), limits=Limits(images=256))) as url:
        yield url


@pytest.fixture(scope="module")
def settings(group):
    usual = preset("smoke", group.image_shape)
    short = replace(usual.substitute_train, epochs=1)
    return replace(usual, substitute_train=short, round_train=short, dfme_train=replace(usual.dfme_train, batch=8))


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_runs_unchanged(name, defended, victim, detector, group, settings):
    local = QueryGateway(victim, BUDGET, detector, Reject(0.3))
    with RemoteGateway(defended, BUDGET) as remote:
        here, there = (make_attack(name, group, settings).run(gateway) for gateway in (local, remote))
        assert remote.spent == local.spent == here.queries == there.queries == BUDGET
        assert torch.equal(remote.log.queries, local.log.queries)
        assert torch.allclose(remote.log.answers, local.log.answers, atol=1e-5, equal_nan=True)
        assert torch.equal(remote.log.refused, local.log.refused)
        assert here.answered == there.answered == BUDGET - int(local.log.refused.sum())
        for mine, theirs in zip(here.substitute.parameters(), there.substitute.parameters(), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4)


def test_some_are_refused_and_some_answered(defended, detector, group):
    """Without which the test above would compare less than it says."""
    with RemoteGateway(defended) as remote:
        remote.query(torch.cat([group.benign_test.images[:40], noise(20, 0, group.image_shape)]))
        assert 0 < int(remote.log.refused[:40].sum()) < 30 and remote.log.refused[40:].all()


def test_an_attack_works_for_its_answers(victim, detector, group, settings):
    local = QueryGateway(victim, BUDGET, detector, ProofOfWork(2, 5))
    app = create_app(victim, detector, ProofOfWork(2, 5), limits=Limits(images=256))
    with running(app) as url, RemoteGateway(url, BUDGET) as remote:
        for gateway in (local, remote):
            make_attack("knockoff", group, settings).run(gateway)
        assert torch.equal(remote.log.queries, local.log.queries)
        assert torch.allclose(remote.log.answers, local.log.answers, atol=1e-5) and not remote.log.refused.any()
        assert remote.log.hashes.min() >= 1 and remote.log.seconds.min() > 0


def test_harder_puzzles_cost_more_hashes(tmp_path):
    with service(response=ProofOfWork(1, 7)) as client, RemoteGateway(str(client.base_url)) as remote:
        images = grey(*[0] * 40, *[255] * 40)
        answers = remote.query(images)
        assert torch.allclose(answers, quarters(to_float(images)), atol=1e-6)
        hashes = remote.log.hashes.double()
        assert hashes[40:].mean() > 8 * hashes[:40].mean()  # 2^8 beside 2^1
        counts = metrics(client)
        assert counts["samelib_images_total", "challenge"] == counts["samelib_images_total", "answered"] == 80
        remote.log.save(tmp_path / "queries.npz")


def test_a_price_is_named_before_it_is_paid():
    with service(response=ProofOfWork(0, 4)) as client, RemoteGateway(str(client.base_url)) as remote:
        images = torch.cat([grey(255), noise(2) // 4, grey(254, 3)])
        bits = remote.quote(images)
        assert bits.dtype == torch.int64 and bits.gt(0).tolist() == [True, False, False, True, False]
        assert remote.spent == 0 and metrics(client)["samelib_images_total", "challenge"] == 2
        with pytest.raises(ValueError, match="images must have shape"):
            remote.quote(images[:, :, :3])


def test_free_images_and_challenged_ones_keep_their_places():
    with service(response=ProofOfWork(0, 4)) as client, RemoteGateway(str(client.base_url)) as remote:
        images = torch.cat([grey(255), noise(2) // 4, grey(254, 3)])
        assert torch.allclose(remote.query(images), quarters(to_float(images)), atol=1e-6)
        assert remote.log.hashes.gt(0).tolist() == [True, False, False, True, False]


def test_more_work_than_the_client_gives_is_declined():
    with service(response=ProofOfWork(20, 10)) as client, RemoteGateway(str(client.base_url), most_bits=8) as remote:
        with pytest.raises(ValueError, match="2\\^20 hashes"):
            remote.query(grey(0))
        assert remote.spent == 0


def test_the_budget_is_exact_and_nothing_is_half_answered():
    with service(limits=Limits(images=4)) as client, RemoteGateway(str(client.base_url), 10) as remote:
        assert (remote.image_shape, remote.classes, remote.most_images) == ((1, 8, 8), 4, 4)
        images = noise(9)
        assert torch.allclose(remote.query(images), quarters(to_float(images)), atol=1e-6)  # in parts of 4
        with pytest.raises(BudgetExceeded, match="2 asked, 1 of 10"):
            remote.query(noise(2))
        assert (remote.spent, len(remote.log.queries)) == (9, 9)
        assert metrics(client)["samelib_images_total", "answered"] == 9  # the service was not asked
        remote.query(noise(1))
        assert remote.remaining == 0


@pytest.mark.filterwarnings("ignore::samelib.data.image_set.OutOfRangeWarning")
def test_images_are_clamped_and_rounded_as_at_every_gateway():
    with service() as client, RemoteGateway(str(client.base_url)) as remote:
        x = torch.linspace(-1.5, 1.5, 64).reshape(1, 1, 8, 8)
        local = QueryGateway(Victim(quarters, (1, 8, 8), 4))
        assert torch.allclose(remote.query(x), local.query(x), atol=1e-6)
        assert torch.equal(remote.log.queries, local.log.queries)
        with pytest.raises(ValueError, match="NaN"):
            remote.query(x * torch.nan)
        assert remote.spent == 1


def test_colour_images_survive_the_journey():
    victim = Victim(lambda x: x.mean((2, 3)).softmax(1), (3, 4, 6), 3)
    with running(create_app(victim)) as url, RemoteGateway(url) as remote:
        images = noise(5, 0, (3, 4, 6))
        assert torch.allclose(remote.query(images), victim(to_float(images)), atol=1e-6)
        assert torch.equal(remote.log.queries, images)


def test_a_busy_service_is_asked_again():
    gate = Gate()
    with (
        service(gate, limits=Limits(images=1, queue=1)) as client,
        RemoteGateway(str(client.base_url)) as remote,
        ThreadPoolExecutor() as pool,
    ):
        gate.shut()
        first = pool.submit(ask, client, noise(1))
        wait_for_queue(client, 1)
        second = pool.submit(remote.query, noise(1, 1))
        wait_for(lambda: metrics(client).get(("samelib_requests_total", "429"), 0) >= 1)
        gate.open()
        assert torch.allclose(second.result(), quarters(to_float(noise(1, 1))), atol=1e-6)
        assert first.result().status_code == 200 and remote.spent == 1


def test_patience_ends():
    gate = Gate()
    with (
        service(gate, limits=Limits(images=1, queue=1)) as client,
        RemoteGateway(str(client.base_url), 5, patience=0.5) as remote,
        ThreadPoolExecutor() as pool,
    ):
        gate.shut()
        first = pool.submit(ask, client, noise(1))
        wait_for_queue(client, 1)
        with pytest.raises(RemoteError, match=r"\(429\): too many images are waiting"):
            remote.query(noise(1, 1))
        gate.open()
        assert remote.spent == 0 and first.result().status_code == 200
        assert remote.query(noise(1, 1)).isfinite().all()  # and later it may be asked again


def test_what_was_answered_before_an_error_is_in_the_log():
    white_fails = lambda x: quarters(x) / (x < 1).any().int()  # noqa: E731  (NaN, which a victim may not answer)
    with (
        service(white_fails, limits=Limits(images=2)) as client,
        RemoteGateway(str(client.base_url), 10) as remote,
    ):
        with pytest.raises(RemoteError, match=r"\(500\): the service failed"):
            remote.query(torch.cat([noise(2), grey(255, 255), noise(2)]))
        assert remote.spent == 2 and torch.equal(remote.log.queries, noise(2))
        assert remote.query(noise(2, 1)).isfinite().all()


def test_a_challenge_that_expired_on_the_way_is_an_error(victim):
    expired = StampOffice(bytes(16), 1e-3)
    app = create_app(Victim(quarters, (1, 8, 8), 4), Ranked(), WORK, expired)
    with (
        running(app) as url,
        RemoteGateway(url) as remote,
        pytest.raises(RemoteError, match=r"\(403\): a challenge is"),
    ):
        remote.query(noise(64))


def test_a_service_that_is_not_there():
    with bound_socket("127.0.0.1", 0) as bound:  # it does not listen
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(RemoteError, match=f"no answer from {url}"):
            RemoteGateway(url)


def test_a_service_that_stopped():
    with service() as client:
        remote = RemoteGateway(str(client.base_url), 5)
    with remote, pytest.raises(RemoteError, match="no answer from"):
        remote.query(noise(1))
    assert remote.spent == 0


@contextmanager
def other_server(status: int, body: bytes, **headers: str):
    """A server that gives everybody the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"<html>", "no service of samelib"),
        (200, b"", "no service of samelib"),
        (200, b"[1]", "no service of samelib"),
        (200, b"null", "no service of samelib"),
        (200, b'{"classes": 3}', "no service of samelib"),
        (404, b"<html>not here", r"\(404\): <html>not here"),
        (404, b'{"detail": "Not Found"}', r"\(404\)"),
        (500, b"x" * 10_000, r"\(500\)"),
    ],
)
def test_a_server_that_is_none_of_ours(status, body, words):
    with other_server(status, body) as url, pytest.raises(RemoteError, match=words) as caught:
        RemoteGateway(url)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("when", ["Wed, 21 Oct 2015 07:28:00 GMT", "-5", "soon", "999999999999"])
def test_another_way_to_say_when(when):
    with other_server(503, b"", Retry_After=when) as url, pytest.raises(RemoteError, match=r"\(503\)"):
        RemoteGateway(url, patience=0.5)


@pytest.mark.parametrize("url", ["", "nowhere", "ftp://127.0.0.1", "http://"])
def test_no_url(url):
    with pytest.raises(RemoteError, match="no answer from"):
        RemoteGateway(url)


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    with service() as client, RemoteGateway(str(client.base_url)) as remote:
        assert remote.query(noise(1)).isfinite().all()
    with pytest.raises(RemoteError, match="no answer from"):
        RemoteGateway("http://192.0.2.1", patience=5)  # an address of nobody's: here the proxy is asked, and refuses


def test_a_bad_budget_is_refused():
    with service() as client, pytest.raises(ValueError, match="budget must be at least 1"):
        RemoteGateway(str(client.base_url), 0)
