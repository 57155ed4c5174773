import base64
import sqlite3
import threading
from pathlib import Path

import pytest
import torch

from samelib.service.stamps import (
    Challenge,
    SpentFull,
    SpentStamps,
    StampError,
    StampOffice,
    query_digest,
    read_challenge,
    solve,
    zero_bits,
)

SECRET = b"a secret of tests" * 2


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def office(clock):
    return StampOffice(SECRET, 60, clock=clock)


@pytest.fixture
def query():
    return query_digest(torch.zeros(1, 4, 4, dtype=torch.uint8))


def refused(office, stamp, query):
    with pytest.raises(StampError) as caught:
        office.check(stamp, query)
    return caught.value.reason


def test_zero_bits():
    digests = [bytes(32), b"\x80" + bytes(31), b"\x01" + bytes(31), b"\x00\x10" + bytes(30), bytes(31) + b"\x01"]
    assert [zero_bits(digest) for digest in digests] == [256, 0, 7, 11, 255]


def test_a_solved_challenge_is_taken_once(office, query):
    stamp, hashes = solve(office.issue(query, 5))
    challenge = office.check(stamp, query)
    assert (challenge.bits, challenge.query, hashes) == (5, query, int(stamp.split(".")[1]) + 1)
    office.spend([challenge])
    assert refused(office, stamp, query) == "spent"
    with pytest.raises(StampError, match="spent before"):  # as when two requests were both checked before one was spent
        office.spend([challenge])


def test_the_same_query_needs_a_new_stamp_each_time(office, query):
    stamps = {solve(office.issue(query, 3))[0] for _ in range(2)}
    assert len(stamps) == 2
    office.spend([office.check(stamp, query) for stamp in stamps])


def test_a_nonce_is_spent_whatever_number_solves_it(office, query):
    challenge = office.issue(query, 0)
    office.spend([office.check(f"{challenge}.1", query)])
    assert refused(office, f"{challenge}.2", query) == "spent"
    assert refused(office, f"{challenge}.01", query) == "spent"


def test_expired(office, query, clock):
    stamp, _ = solve(office.issue(query, 3))
    clock.now += 59.9
    office.check(stamp, query)
    clock.now += 0.2
    assert refused(office, stamp, query) == "expired"


def test_mismatched(office, query):
    other = query_digest(torch.zeros(1, 2, 8, dtype=torch.uint8))  # the same bytes in another shape
    stamp, _ = solve(office.issue(query, 3))
    assert refused(office, stamp, other) == "mismatched"


def test_unsolved(office, query):
    challenge = office.issue(query, 20)
    unsolved = [n for n in range(3) if refused(office, f"{challenge}.{n}", query) == "unsolved"]
    assert unsolved == [0, 1, 2]


def test_forged(office, query, clock):
    stranger = StampOffice(b"another secret....", 60, clock=clock)
    assert refused(office, solve(stranger.issue(query, 1))[0], query) == "forged"
    raw = bytearray(base64.urlsafe_b64decode(office.issue(query, 20)))
    for place in (1, 5, 20, 40, -1):  # bits, expiry, nonce, query, signature
        changed = bytearray(raw)
        changed[place] ^= 1
        stamp = base64.urlsafe_b64encode(changed).decode() + ".1"
        assert refused(office, stamp, query) == "forged"


@pytest.mark.parametrize(
    "stamp",
    ["", ".", "1", "x.1", "A" * 120, "A" * 119 + ".1", "A" * 120 + ".-1", "A" * 120 + ".1\n", "A" * 120 + ".١",
     "A" * 120 + "." + "9" * 21, "=" * 120 + ".1", "\x00" * 50],
)  # fmt: skip
def test_malformed(office, query, stamp):
    assert refused(office, stamp, query) == "malformed"


def test_work_done_beforehand_is_worth_nothing(office, query, clock):
    """Without a challenge of this service there is nothing to hash: nonce and signature are inside what is hashed."""
    ready = solve(office.issue(query, 8))[0]
    later = office.issue(query, 8)
    number = ready.split(".")[1]
    assert f"{later}.{number}" != ready
    reasons = {refused(office, f"{office.issue(query, 64)}.{number}", query) for _ in range(3)}
    assert reasons == {"unsolved"}


def test_signatures_and_queries_are_compared_in_constant_time(office, query, monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    stamp, _ = solve(office.issue(query, 0))
    office.check(stamp, query)
    assert [len(a) for a, _ in compared] == [32, 32] and compared[1][1] == query


def test_a_client_does_not_work_for_ever(office, query):
    with pytest.raises(ValueError, match="2\\^33 hashes"):
        solve(office.issue(query, 33))
    with pytest.raises(StampError, match="no challenge"):
        solve("nothing")


@pytest.mark.parametrize(("secret", "lifetime", "words"), [(b"short", 60, "5 bytes"), (SECRET, 0, "more than 0")])
def test_bad_offices_are_refused(secret, lifetime, words):
    with pytest.raises(ValueError, match=words):
        StampOffice(secret, lifetime)


def test_spent_stamps_survive_a_restart(tmp_path, query, clock):
    stamp, _ = solve(StampOffice(SECRET, 60, clock=clock).issue(query, 2))
    first = StampOffice(SECRET, 60, SpentStamps(tmp_path / "spent.sqlite"), clock)
    first.spend([first.check(stamp, query)])  # and no close: the process was killed
    second = StampOffice(SECRET, 60, SpentStamps(tmp_path / "spent.sqlite"), clock)
    assert refused(second, stamp, query) == "spent" and len(second.spent) == 1


def test_all_stamps_of_a_request_are_spent_or_none(office, query):
    spent, fresh = (office.check(solve(office.issue(query, 0))[0], query) for _ in range(2))
    office.spend([spent])
    with pytest.raises(StampError):
        office.spend([fresh, spent])
    assert len(office.spent) == 1
    with pytest.raises(StampError):  # the same stamp twice in one request
        office.spend([fresh, fresh])
    office.spend([fresh])


def test_the_record_is_bounded_and_forgets_only_what_expired(clock):
    spent = SpentStamps(most=3)
    office = StampOffice(SECRET, 60, spent, clock)

    def one():
        return read_challenge(office.issue(bytes(32), 0))

    kept = [one() for _ in range(3)]
    office.spend(kept)
    with pytest.raises(SpentFull, match="3 stamps"):
        office.spend([one()])
    assert all(spent.holds(challenge) for challenge in kept)
    clock.now += 61
    office.spend([one()])
    assert len(spent) == 1 and not spent.holds(kept[0])


def test_of_two_at_once_one_is_taken(tmp_path):
    stores = [SpentStamps(tmp_path / "spent.sqlite") for _ in range(4)]
    challenge, taken = Challenge(0, 10**15, bytes(16), bytes(32)), []

    def spend(store):
        try:
            store.add([challenge], 0)
            taken.append(store)
        except StampError:
            pass

    threads = [threading.Thread(target=spend, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_processes_may_share_the_file_of_stamps(tmp_path):
    """Two connections stand for two processes; their clocks differ a little, as where one waits for the other."""
    one, two = (SpentStamps(tmp_path / "stamps.sqlite", most=3) for _ in range(2))

    def challenge(number: int, expires: int) -> Challenge:
        return Challenge(0, expires, number.to_bytes(16, "big"), bytes(32))

    one.add([challenge(0, 10)], 0)
    with pytest.raises(StampError, match="spent before"):
        two.add([challenge(0, 10)], 0)
    one.add([challenge(number, 10) for number in (1, 2)], 0)
    with pytest.raises(SpentFull):
        two.add([challenge(3, 20)], 9)
    two.add([challenge(3, 20)], 10)  # forgets what the other has taken
    assert len(one) == len(two) == 1
    with pytest.raises(StampError, match="expired"):  # forgotten by the other: it may have been spent
        one.add([challenge(0, 10)], 9)
    one.add([challenge(number, 20) for number in (4, 5)], 10)
    assert len(one) == len(two) == 3


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "spent.sqlite").write_text("something else altogether, of some length " * 30)
    with pytest.raises(ValueError, match="spent.sqlite cannot hold"):
        SpentStamps(tmp_path / "spent.sqlite")
    with pytest.raises(ValueError, match="cannot hold"):
        SpentStamps(tmp_path / "no" / "folder" / "spent.sqlite")


def test_nothing_is_pickled():
    """Neither stamps nor what is stored are more than bytes and numbers."""
    import samelib.service.stamps

    assert "pickle" not in Path(samelib.service.stamps.__file__).read_text()
    assert sqlite3.sqlite_version_info > (3, 24)
