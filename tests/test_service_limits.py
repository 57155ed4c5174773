"""Slow clients, full queues, late answers, failing victims, and a stop while requests are in work."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serving import (
    CLASSES,
    SHAPE,
    Gate,
    as_files,
    as_tensors,
    ask,
    connect,
    dribble,
    fault,
    grey,
    is_closed,
    metrics,
    noise,
    quarters,
    read_all,
    right,
    service,
    wait_for,
    wait_for_queue,
)

from samelib.models.classifiers import Victim
from samelib.responses import Reject
from samelib.service.app import create_app
from samelib.service.intake import Limits
from samelib.service.server import bound_socket, running, url_of

HEAD = b"POST /v2/models/victim/infer HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
IMAGE = noise(1)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def impatient():
    with service(limits=Limits(body_seconds=0.4)) as client:
        yield client


@pytest.mark.parametrize("head", [b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_body_that_dribbles_ends_in_408(impatient, head):
    with connect(impatient) as slow:
        slow.sendall(HEAD + head)
        assert right(ask(impatient, IMAGE), IMAGE)
        dribble(slow, b" " if b"Length" in head else b"1\r\n \r\n")
        answer = read_all(slow)
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"too_slow"' in answer
    assert b"connection: close" in answer.lower()


def test_many_slow_clients_do_not_keep_others_waiting(impatient):
    slow = [connect(impatient) for _ in range(60)]
    for connection in slow:
        connection.sendall(HEAD + b"Content-Length: 9\r\n\r\n")
    assert right(ask(impatient, IMAGE), IMAGE)
    for connection in slow:
        with connection:
            assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_too_many_connections_are_turned_away():
    with service(limits=Limits(connections=4)) as client:
        idle = [connect(client) for _ in range(4)]
        refused = httpx.post(client.base_url.join("/v1/predict"), **as_files(IMAGE))
        assert fault(refused) == (503, "connections") and refused.headers["connection"] == "close"
        assert httpx.get(client.base_url.join("/v2/health/live")).status_code == 503
        for connection in idle:
            connection.close()
        wait_for(lambda: httpx.get(client.base_url.join("/v2/health/live")).status_code == 200)
        assert 'samelib_requests_total{status="503"} 1.0' in client.get("/metrics").text


def test_requests_that_wait_together_are_computed_together(gate, pool):
    with service(gate, response=Reject(0.005), limits=Limits(images=4)) as client:
        gate.shut()
        batches = [noise(count, seed) for seed, count in enumerate([1, 1, 2, 3, 1, 4])]
        asked, waiting = [], 0
        for images in batches:  # one after the other, so that their order is known
            asked.append(pool.submit(ask, client, images))
            waiting += len(images)
            wait_for_queue(client, waiting)
        gate.open()
        assert all(right(answer.result(), images) for answer, images in zip(asked, batches, strict=True))
        assert gate.batches == [1, 3, 4, 4]  # 1 was in work; 1 + 2; 3 + 1; 4: never more than a batch takes


def test_a_full_queue_says_when_to_come_back(gate, pool):
    with service(gate, limits=Limits(images=4, queue=6)) as client:
        gate.shut()
        taken = [noise(4, 1), noise(2, 2)]
        asked = []
        for waiting, images in zip((4, 6), taken, strict=True):
            asked.append(pool.submit(ask, client, images))
            wait_for_queue(client, waiting)
        refused = ask(client, IMAGE)
        assert fault(refused) == (429, "busy") and int(refused.headers["retry-after"]) >= 1
        assert client.get("/v2/health/live").status_code == 200
        gate.open()
        assert all(right(answer.result(), images) for answer, images in zip(asked, taken, strict=True))
        assert right(ask(client, IMAGE), IMAGE)
        assert metrics(client)["samelib_requests_total", "429"] == 1


def test_a_late_answer_is_504_and_leaves_the_queue(gate, pool):
    with service(gate, limits=Limits(images=2, queue=4, answer_seconds=0.3)) as client:
        gate.shut()
        asked = [pool.submit(ask, client, noise(2, seed)) for seed in range(2)]
        assert [fault(answer.result()) for answer in asked] == [(504, "timeout")] * 2
        gate.open()
        wait_for_queue(client, 0)
        assert gate.batches == [2]  # the one that still waited was not computed for nobody
        assert right(ask(client, IMAGE), IMAGE)


def test_a_client_that_hangs_up_takes_nothing_with_it(gate):
    with service(gate) as client:
        gate.shut()
        body = as_body(IMAGE)
        with connect(client) as gone:
            gone.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert gate.entered.wait(20)
        with connect(client) as gone:
            gone.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:20])
        gate.open()
        assert right(ask(client, IMAGE), IMAGE)
        wait_for(lambda: metrics(client).get(("samelib_requests_total", "400")) == 1)
        assert ("samelib_requests_total", "500") not in metrics(client)


def as_body(images: torch.Tensor) -> bytes:
    return httpx.Request("POST", "http://here", **as_tensors(images)).content


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 1 / 0,
        lambda x: quarters(x)[:, :2],
        lambda x: quarters(x) * torch.nan,
        lambda x: {}["a secret detail"],
    ],
)
def test_a_victim_that_fails_is_500_without_details(wrong):
    white_fails = lambda x: wrong(x) if (x == 1).all() else quarters(x)  # noqa: E731
    with service(white_fails) as client:
        answer = ask(client, grey(255))
        assert fault(answer) == (500, "fault")
        assert not {"secret", "Error", "Traceback", "victim"} & set(answer.text.replace('"', " ").split())
        assert right(ask(client, IMAGE), IMAGE)
        assert metrics(client)["samelib_requests_total", "500"] == 1


def test_a_stop_answers_what_was_accepted(gate, pool):
    app = create_app(Victim(gate, SHAPE, CLASSES), limits=Limits(images=1))
    with httpx.Client(timeout=60) as client:
        with running(app) as url:
            client.base_url = url
            gate.shut()
            asked = [pool.submit(ask, client, noise(1, seed)) for seed in range(8)]
            wait_for_queue(client, 8)
            stopping = threading.Thread(target=lambda: (wait_for(lambda: is_closed(client)), gate.open()))
            stopping.start()
        stopping.join()
        assert all(right(answer.result(), noise(1, seed)) for seed, answer in enumerate(asked))
        assert gate.batches == [1] * 8  # all of them after the stop


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit, which threads ignore
def test_a_service_that_does_not_start_is_said_to_be():
    def broken(x):
        raise RuntimeError("no model")

    with (
        pytest.raises(RuntimeError, match="did not start"),
        running(create_app(Victim(broken, SHAPE, CLASSES))),
    ):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_is_written_as_clients_need_it(host):
    with bound_socket(host.strip("[]"), 0) as bound:
        assert url_of(bound) == f"http://{host}:{bound.getsockname()[1]}"


def test_a_taken_port_is_named():
    with bound_socket("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(OSError, match=f"127.0.0.1 port {bound.getsockname()[1]}.*choose another"):
            bound_socket("127.0.0.1", bound.getsockname()[1])
