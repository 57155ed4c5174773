import ast
import sys
import threading
from pathlib import Path

import pytest
import torch

import samelib.service.stamps
from samelib.service.stamps import (
    GRACE,
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
    assert (challenge.bits, challenge.query, hashes) == (5, query, int(stamp.rpartition(".")[2]) + 1)
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
    challenge = office.issue(query, 20)
    bits, expires, nonce, digest, signature = challenge.split(".")
    assert len(signature) == 43  # HMAC-SHA256; the default of itsdangerous is SHA-1
    for changed in (
        challenge.replace(bits, "1", 1),
        challenge.replace(expires, str(int(expires) + 1)),
        challenge.replace(nonce, "0" * 32),
        challenge.replace(digest, "0" * 64),
        challenge.replace(signature, "A" * 43),
    ):
        assert changed != challenge and refused(office, f"{changed}.1", query) == "forged"


GOOD = f"1.1.{'0' * 32}.{'0' * 64}.{'A' * 43}"


@pytest.mark.parametrize(
    "stamp",
    ["", ".", "1", "x.1", GOOD, "1" * 4 + GOOD[1:] + ".1", f"{GOOD}A.1", f"{GOOD[:-1]}=.1", f"{GOOD}.-1", f"{GOOD}.1\n",
     f"{GOOD}.١", f"{GOOD}." + "9" * 21, f"١{GOOD[1:]}.1", f"{GOOD}.", "\x00" * 50],
)  # fmt: skip
def test_malformed(office, query, stamp):
    assert refused(office, stamp, query) == "malformed"
    assert refused(office, f"{GOOD}.1", query) == "forged"  # what these spoil


def test_work_done_beforehand_is_worth_nothing(office, query, clock):
    """Without a challenge of this service there is nothing to hash: nonce and signature are inside what is hashed."""
    ready = solve(office.issue(query, 8))[0]
    later = office.issue(query, 8)
    number = ready.rpartition(".")[2]
    assert f"{later}.{number}" != ready
    reasons = {refused(office, f"{office.issue(query, 64)}.{number}", query) for _ in range(3)}
    assert reasons == {"unsolved"}


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
    clock.now += 60 + GRACE / 1000
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
    late = GRACE + 10
    with pytest.raises(SpentFull):
        two.add([challenge(3, late + 10)], late - 1)
    with pytest.raises(StampError, match="spent before"):  # expired for the other clock, which has not forgotten it
        one.add([challenge(0, 10)], 9)
    two.add([challenge(3, late + 10)], late)  # forgets what the other has taken
    assert len(one) == len(two) == 1
    with pytest.raises(StampError, match="expired"):
        one.add([challenge(0, 10)], late)


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "spent.sqlite").write_text("something else altogether, of some length " * 30)
    with pytest.raises(ValueError, match="spent.sqlite cannot hold"):
        SpentStamps(tmp_path / "spent.sqlite")
    with pytest.raises(ValueError, match="cannot hold"):
        SpentStamps(tmp_path / "no" / "folder" / "spent.sqlite")


def test_stamps_need_none_of_the_packages_of_the_service():
    tree = ast.parse(Path(samelib.service.stamps.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names} == {"itsdangerous", "torch"}
    assert "import" not in Path(samelib.service.__file__).read_text()
