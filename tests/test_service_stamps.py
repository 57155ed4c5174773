"""Proof of work over HTTP; what a stamp is, tests/test_stamps.py has."""

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving import (
    INFER,
    SECRET,
    WORK,
    Clock,
    Gate,
    as_tensors,
    ask,
    fault,
    grey,
    metrics,
    new_stamps,
    noise,
    outputs,
    results,
    right,
    service,
    wait_for_queue,
)

from samelib.service.intake import Limits
from samelib.service.stamps import GRACE, SpentStamps, StampOffice, query_digest, read_challenge, solve, zero_bits


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def client(clock):
    with service(response=WORK, clock=clock) as client:
        yield client


@pytest.fixture
def image():
    return noise(1)


def spent(client) -> int:
    return metrics(client)["samelib_spent_stamps",]


def test_a_replayed_stamp_is_refused(client, image):
    stamps = new_stamps(client, image)
    assert right(ask(client, image, stamps), image)
    assert fault(ask(client, image, stamps)) == (403, "spent")
    assert fault(client.post(INFER, **as_tensors(image, stamps))) == (403, "spent")
    challenge, _, number = stamps[0].rpartition(".")
    bits = read_challenge(challenge).bits
    more = (f"{challenge}.{other}" for other in itertools.count(int(number) + 1))
    another = next(stamp for stamp in more if zero_bits(hashlib.sha256(stamp.encode()).digest()) >= bits)
    assert fault(ask(client, image, [another])) == (403, "spent") and spent(client) == 1


def test_the_same_image_asked_twice_needs_two_stamps(client, image):
    first, second = new_stamps(client, image), new_stamps(client, image)
    assert first != second
    assert right(ask(client, image, first), image) and right(ask(client, image, second), image)
    twice = torch.cat([image, image])
    stamps = new_stamps(client, twice)
    assert fault(ask(client, twice, stamps[:1] * 2)) == (403, "spent")
    assert right(ask(client, twice, stamps), twice)  # and the first of them was not spent by that


def test_a_forged_stamp_is_refused(client, image, clock):
    digest = query_digest(image[0])
    stranger = StampOffice(SECRET[::-1], 60, clock=clock)
    assert fault(ask(client, image, [solve(stranger.issue(digest, 1))[0]])) == (403, "forged")
    cheaper = StampOffice(SECRET, 60, clock=clock).issue(digest, 9).replace("9.", "0.", 1)
    assert fault(ask(client, image, [f"{cheaper}.0"])) == (403, "forged")
    assert fault(ask(client, image, ["my stamp"])) == (403, "malformed")
    assert metrics(client)["samelib_refused_stamps_total", "forged"] == 2


def test_an_expired_stamp_is_refused(client, image, clock):
    stamps = new_stamps(client, image)
    clock.now += 61
    assert fault(ask(client, image, stamps)) == (403, "expired")


def test_a_stamp_is_good_for_its_image_alone(client, image):
    other = image.clone()
    other[0, 0, 3, 3] ^= 1
    stamps = new_stamps(client, torch.cat([image, other]))
    answer = ask(client, torch.cat([image, other]), stamps[::-1])
    assert fault(answer) == (403, "mismatched") and answer.json()["image"] == 0
    answer = client.post(INFER, **as_tensors(image, stamps[:1], "FP32"))  # the same pixels in another form
    assert outputs(answer)["status"] == ["answered"]
    assert spent(client) == 1


def test_work_that_was_not_done_is_refused(client):
    challenge = results(ask(client, grey(255)))[0]["challenge"]
    number = solve(challenge)[1] - 1  # the first that solves it
    tried = {fault(ask(client, grey(255), [f"{challenge}.{n}"])) for n in range(max(0, number - 20), number)}
    assert tried <= {(403, "unsolved")}
    assert right(ask(client, grey(255), [f"{challenge}.{number}"]), grey(255))


def test_work_done_beforehand_is_refused(client):
    """What solved a challenge once solves a later one of the same image by chance alone, here once in 128."""
    number = new_stamps(client, grey(255))[0].rpartition(".")[2]
    later = [results(ask(client, grey(255)))[0]["challenge"] for _ in range(4)]
    answers = [ask(client, grey(255), [f"{challenge}.{number}"]) for challenge in later]
    assert (403, "unsolved") in [fault(answer) for answer in answers if answer.status_code != 200]


def test_all_stamps_of_a_request_are_spent_or_none(client):
    images = noise(3)
    stamps = new_stamps(client, images)
    assert right(ask(client, images[2:], stamps[2:]), images[2:])
    answer = ask(client, images, stamps)
    assert fault(answer) == (403, "spent") and answer.json()["image"] == 2
    assert spent(client) == 1
    assert right(ask(client, images[:2], stamps[:2]), images[:2])


def test_stamped_and_unstamped_images_in_one_request(client):
    images = noise(3)
    stamps = ["", new_stamps(client, images)[1], ""]
    statuses = [result["status"] for result in results(ask(client, images, stamps))]
    assert statuses == ["challenge", "answered", "challenge"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_stamp_for_each_image_or_none(client, count):
    assert fault(ask(client, noise(2), ["a.1"] * count)) == (422, "stamps")


@pytest.fixture
def gate():
    return Gate()


def test_of_two_requests_at_once_with_one_stamp_one_is_answered(gate, image):
    with service(gate, response=WORK) as client, ThreadPoolExecutor() as pool:
        stamps = new_stamps(client, image)
        gate.shut()
        asked = [pool.submit(ask, client, image, stamps) for _ in range(4)]  # all are checked before one is spent
        wait_for_queue(client, 4)
        gate.open()
        answers = sorted((task.result() for task in asked), key=lambda answer: answer.status_code)
        assert right(answers[0], image)
        assert [fault(answer) for answer in answers[1:]] == [(403, "spent")] * 3
        assert spent(client) == 1


def test_a_stamp_that_expires_while_it_waits_is_not_answered_twice(gate, image, clock):
    """What has expired is forgotten: the second of them would find nothing of the first."""
    with service(gate, response=WORK, clock=clock) as client, ThreadPoolExecutor() as pool:
        stamps = new_stamps(client, image)
        gate.shut()
        asked = [pool.submit(ask, client, image, stamps) for _ in range(2)]
        wait_for_queue(client, 2)
        clock.now += 61
        gate.open()
        assert [fault(task.result()) for task in asked] == [(403, "expired")] * 2


def test_a_request_that_took_too_long_has_spent_nothing(gate, image):
    with service(gate, response=WORK, limits=Limits(answer_seconds=0.3)) as client:
        stamps = new_stamps(client, image)
        gate.shut()
        assert fault(ask(client, image, stamps)) == (504, "timeout")
        gate.open()
        assert spent(client) == 0
        wait_for_queue(client, 0)
        assert right(ask(client, image, stamps), image)


def test_a_request_that_found_the_queue_full_has_spent_nothing(gate, image):
    with service(gate, response=WORK, limits=Limits(images=2, queue=2)) as client, ThreadPoolExecutor() as pool:
        stamps = new_stamps(client, image)
        gate.shut()
        before = pool.submit(ask, client, noise(2))
        wait_for_queue(client, 2)
        assert fault(ask(client, image, stamps)) == (429, "busy")
        gate.open()
        assert [result["status"] for result in results(before.result())] == ["challenge"] * 2
        assert right(ask(client, image, stamps), image)


def test_a_victim_that_failed_has_spent_nothing(image):
    broken = []

    def answer(x):
        if broken:
            raise RuntimeError("out of order")
        return Gate()(x)

    with service(answer, response=WORK) as client:
        stamps = new_stamps(client, image)
        broken.append(True)
        assert fault(ask(client, image, stamps)) == (500, "fault")
        broken.clear()
        assert right(ask(client, image, stamps), image)


def test_a_full_record_of_stamps_asks_for_patience(image, clock, monkeypatch):
    monkeypatch.setattr(SpentStamps.__init__, "__defaults__", (None, 2))
    with service(response=WORK, clock=clock) as client:
        for _ in range(2):
            assert right(ask(client, image, new_stamps(client, image)), image)
        stamps = new_stamps(client, image)
        answer = ask(client, image, stamps)
        assert fault(answer) == (503, "stamps_full") and int(answer.headers["retry-after"]) > 0
        clock.now += 61 + GRACE / 1000  # those two are forgotten, and the one that waited has expired
        assert fault(ask(client, image, stamps)) == (403, "expired")
        assert right(ask(client, image, new_stamps(client, image)), image)
