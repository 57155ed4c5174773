"""Bans by account, without a service: when they come, what they cost honest accounts, and the book that keeps them."""

import copy
import math
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_SAME, TINY_TRAIN, fit_beside
from test_responses import MeanPixel

from samelib.accounts import SMALLEST_SECRET, Account, AccountBook, AccountsFull
from samelib.attacks import ATTACKS, make_attack
from samelib.data.image_set import to_float
from samelib.detectors.base import NotFittedError
from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import SamePlus
from samelib.evidence import MOST, Wealth, log_e_values, safe_p_values, sketches
from samelib.gateway import Defence, QueryGateway
from samelib.models.classifiers import Victim
from samelib.presets import preset
from samelib.responses import BanAccount
from samelib.service.stamps import Challenge, SpentStamps

SHAPE = (1, 4, 4)
SECRET = b"a secret of these tests"
VICTIM = Victim(lambda x: torch.full((len(x), 2), 0.5), SHAPE, 2)


def benign(count: int, seed: int) -> torch.Tensor:
    """uint8 [count, *SHAPE]: noise of a brightness of its own each."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(count, 1, 1, 1, generator=generator)
    return (255 * (0.2 + 0.4 * level + 0.2 * torch.rand(count, *SHAPE, generator=generator))).to(torch.uint8)


def strange(count: int, seed: int = 0) -> torch.Tensor:
    """uint8 [count, *SHAPE]: brighter than any benign image, and not like each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(215, 256, (count, *SHAPE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def watcher() -> MeanPixel:
    return MeanPixel().fit(to_float(benign(999, 100)))


@pytest.fixture
def book():
    with closing(AccountBook(secret=SECRET)) as book:
        yield book


def gateway(watcher, response, account="thief", budget=None) -> QueryGateway:
    return QueryGateway(VICTIM, budget, watcher, response, account)


# When a ban comes


def test_a_thief_is_banned_at_the_query_that_completes_the_evidence(watcher):
    """And that query is refused already. Nothing else is evidence here: the stream of likeness is left out."""
    bet, wealth = float(log_e_values(safe_p_values(999, 0.05))[0]), Wealth()
    expected = next(query for query in range(1, 100) if wealth.add(bet) >= math.log(1_000))
    door = gateway(watcher, BanAccount(streams=("strangeness",)))
    answers = door.query(strange(30))
    assert door.log.refused.tolist() == [False] * (expected - 1) + [True] * (31 - expected) and 4 < expected < 9
    assert torch.equal(answers.isnan().all(1), door.log.refused) and not door.log.bits.any()
    assert door.query(benign(3, 0)).isnan().all()  # and nothing is answered any more


def test_honest_accounts_are_answered(watcher):
    door = gateway(watcher, BanAccount(0.01), "honest")
    assert door.query(benign(2_000, 1)).isfinite().all()


def test_honesty_at_first_does_not_help_for_long(watcher):
    door = gateway(watcher, BanAccount())
    assert door.query(benign(1_000, 2)).isfinite().all()
    door.query(strange(30))
    assert 5 < int(door.log.refused[1_000:].logical_not().sum()) < 20


def test_a_smaller_delta_asks_for_more_evidence(watcher):
    answered = []
    for delta in (0.1, 0.001, 1e-9):
        door = gateway(watcher, BanAccount(delta))
        door.query(strange(60))
        answered.append(int(door.log.refused.logical_not().sum()))
    assert answered == sorted(set(answered)) and answered[-1] < 60


def variations(count: int, seed: int) -> torch.Tensor:
    """Of one benign image: a pixel or two differ a little, each time others."""
    changes = torch.randint(-3, 4, (count, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return (benign(1, seed).int() + changes).to(torch.uint8)


def test_variations_of_one_image_are_found_though_none_is_strange(watcher):
    queries = variations(80, 5)
    assert (watcher.p_value(queries) > 0.01).all()
    for streams, found in ((("strangeness",), False), (("likeness",), True), (("strangeness", "likeness"), True)):
        door = gateway(watcher, BanAccount(streams=streams))
        door.query(queries)
        assert bool(door.log.refused[-1]) == found and not door.log.refused[:16].any()


def test_streams_share_one_bound(watcher, book):
    response = BanAccount(accounts=book).prepare(watcher)
    queries = torch.cat([benign(30, 3), strange(3)])
    response.decide(watcher.p_value(queries), queries, ["one"] * 33)
    (account,) = book.entries()
    wealths = [math.exp(wealth.log_wealth) for wealth in account.wealth.values()]
    assert math.exp(account.log_wealth) == pytest.approx(sum(wealths) / 2) and wealths[0] != wealths[1]
    assert [wealth.count for wealth in account.wealth.values()] == [33, 33 - 16] and account.queries == 33


def test_the_same_query_again_and_again_is_no_evidence(watcher, book):
    """It teaches nothing, and is what a client sends that got no answer."""
    response = BanAccount(accounts=book)
    assert gateway(watcher, response).query(strange(2).repeat(100, 1, 1, 1)).isfinite().all()
    (account,) = book.entries()
    assert account.queries == 2 and account.wealth["strangeness"].count == 2
    assert gateway(watcher, response).query(strange(30)).isnan().any()


def test_each_account_has_its_own_evidence_in_its_own_order(watcher):
    """Whatever the batches: two accounts in turn, in one batch or alone."""
    queries = torch.cat([strange(30), benign(30, 4), strange(30, 1)])
    names = ["thief"] * 30 + ["honest"] * 30 + ["other"] * 30
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    order = torch.cat([order[order < 30].sort().values, order[(order >= 30) & (order < 60)].sort().values])
    mixed = torch.stack([order[:30], order[30:], torch.arange(60, 90)], dim=1).flatten()
    together = Defence(VICTIM, watcher, BanAccount())
    refused = torch.zeros(90, dtype=torch.bool)
    for part in mixed.split(13):
        refused[part] = together.judge(queries[part], accounts=[names[i] for i in part]).refused
    for name in ("thief", "honest", "other"):
        own = torch.tensor([other == name for other in names])
        alone = Defence(VICTIM, watcher, BanAccount())
        one_by_one = [alone.judge(query[None], accounts=[name]).refused for query in queries[own]]
        assert torch.equal(torch.cat(one_by_one), refused[own]) and refused[own].any() == (name != "honest")


def test_a_book_is_shared_by_gateways_only_where_it_is_given(watcher, book):
    gateway(watcher, BanAccount()).query(strange(30))
    assert gateway(watcher, BanAccount()).query(strange(1, 7)).isfinite().all()
    gateway(watcher, BanAccount(accounts=book)).query(strange(30))
    assert gateway(watcher, BanAccount(accounts=book)).query(benign(1, 7)).isnan().all()
    assert gateway(watcher, BanAccount(accounts=book), "another").query(benign(1, 7)).isfinite().all()


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_runs_to_its_end_though_it_is_banned(name, victim, group):
    """To this detector everything is strange that is not nearly black. Whose price was asked has been seen."""
    images = torch.randint(0, 9, (500, *group.image_shape), dtype=torch.uint8)
    watcher = MeanPixel()
    watcher.image_shape = group.image_shape
    door = QueryGateway(victim, 90, watcher.fit(to_float(images)), BanAccount())
    settings = preset("smoke", group.image_shape)
    short = {
        "substitute_train": TINY_TRAIN,
        "round_train": TINY_TRAIN,
        "dfme_train": replace(settings.dfme_train, batch=8),
    }
    result = make_attack(name, group, replace(settings, **short)).run(door)
    assert door.spent == result.queries and (result.queries == 90 or result.stopped)
    assert 4 < result.answered < 12 or (name == "knockoff-bargain" and result.answered == 0)
    assert door.log.refused[result.answered :].all()


# What cannot be


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BanAccount(0), "above 0 and below 1"),
        (lambda: BanAccount(delta=float("nan")), "above 0 and below 1"),
        (lambda: BanAccount(eta=1), "above 0 and below 1"),
        (lambda: BanAccount(streams=()), "got none"),
        (lambda: BanAccount(streams=("strangeness", "speed")), "some of strangeness, likeness, got strangeness, speed"),
        (lambda: AccountBook(most=0), "place for one"),
        (lambda: AccountBook(secret=b"short"), f"5 bytes, it needs {SMALLEST_SECRET}"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_bans_need_to_know_who_asks(watcher):
    defence = Defence(VICTIM, watcher, BanAccount())
    for accounts, count in ((None, 0), (["one"], 1), (["one"] * 3, 3)):
        with pytest.raises(ValueError, match=f"2 images came with {count} accounts"):
            defence.judge(strange(2), accounts=accounts)


def test_what_a_detector_must_bring(watcher):
    with pytest.raises(NotFittedError, match="not calibrated"):
        Defence(VICTIM, MeanPixel(), BanAccount())
    with pytest.raises(ValueError, match="with 30 calibration images the strangest query is no evidence"):
        Defence(VICTIM, MeanPixel().fit(to_float(benign(30, 0))), BanAccount())
    old = MeanPixel().fit(to_float(benign(200, 0)))
    old.likeness = None
    with pytest.raises(ValueError, match="knows no likeness"):
        Defence(VICTIM, old, BanAccount())
    assert gateway(old, BanAccount(streams=("strangeness",))).query(strange(2)).isfinite().all()
    with pytest.raises(NotFittedError, match="works beside a detector"):
        BanAccount().decide(watcher.p_value(strange(2)), strange(2), ["one", "one"])


@pytest.mark.parametrize("kind", [SameDetector, SamePlus])
def test_a_saved_detector_keeps_its_likeness(kind, group, victim, store, tmp_path):
    """Of the calibration images that gave the threshold."""
    detector = fit_beside(kind(TINY_SAME), group, victim, store)
    again = kind.load(detector.save(tmp_path / "detector"))
    assert np.array_equal(again.likeness.calibration, detector.likeness.calibration)
    last = group.calibration.images[-len(detector.calibration_scores) :]
    assert np.array_equal(detector.likeness.calibration, sketches(last))


def test_a_detector_calibrated_again_has_another_likeness(detector, group):
    again = copy.copy(detector).calibrate(group.benign_test.images)
    assert len(again.likeness) == 150 and len(detector.likeness) == 120


# The book


def test_accounts_survive_a_restart(watcher, tmp_path):
    """Evidence as well as bans: two strange queries today, the rest tomorrow."""
    queries, file = torch.cat([benign(40, 6), strange(30)]), tmp_path / "accounts.sqlite"
    whole = gateway(watcher, BanAccount(accounts=AccountBook(secret=SECRET)))
    whole.query(queries)
    for part in queries.split([41, 2, 26, 1]):
        with closing(AccountBook(file, SECRET)) as book:
            door = gateway(watcher, BanAccount(accounts=book))
            door.query(part)
    answered = 70 - int(whole.log.refused.sum())
    assert door.log.refused.all() and 43 < answered < 60
    with closing(AccountBook(file)) as book:
        (account,) = book.entries()
        assert account.queries == answered + 1 and account.banned is not None


def test_two_processes_share_the_evidence(watcher, tmp_path):
    books = [AccountBook(tmp_path / "accounts.sqlite", SECRET) for _ in range(2)]
    doors = [gateway(watcher, BanAccount(accounts=book)) for book in books]
    for i, query in enumerate(strange(30)):
        doors[i % 2].query(query[None])
    refused = torch.stack([door.log.refused for door in doors], dim=1).flatten()
    alone = gateway(watcher, BanAccount(accounts=AccountBook(secret=SECRET)))
    alone.query(strange(30))
    assert torch.equal(refused, alone.log.refused) and sum(book.bans for book in books) == 1
    for book in books:
        book.close()


def test_no_name_is_stored(watcher, tmp_path):
    file, name = tmp_path / "accounts.sqlite", "key-of-somebody"
    with closing(AccountBook(file, SECRET)) as book:
        gateway(watcher, BanAccount(accounts=book), name).query(strange(30))
        assert book.digest(name) == book.digest(name) != AccountBook(secret=SECRET[::-1]).digest(name)
        stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert name.encode() not in stored and SECRET not in stored and book.digest(name) in stored


def test_a_banned_account_leaves_no_sketches(watcher, book):
    door = gateway(watcher, BanAccount(accounts=book))
    door.query(strange(4))
    with book.changing(["thief"]) as known:
        assert len(known["thief"].memory) == 4
    door.query(strange(30, 1))
    banned = book.find_banned("thief")
    assert not len(banned.memory) and not banned.marks and book.find_banned("nobody") is None


def test_another_secret_would_find_nobody_and_is_refused(watcher, tmp_path):
    file = tmp_path / "accounts.sqlite"
    AccountBook(file, SECRET).close()
    with pytest.raises(ValueError, match="hashed with another secret") as error:
        AccountBook(file, SECRET[::-1])
    assert SECRET.decode() not in str(error.value)
    with closing(AccountBook(file)) as unkeyed, pytest.raises(ValueError, match="takes the secret"):
        gateway(watcher, BanAccount(accounts=unkeyed)).query(strange(1))


def test_a_file_of_another_version_is_refused(tmp_path):
    file = tmp_path / "accounts.sqlite"
    AccountBook(file, SECRET).close()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE about_accounts SET version = 7")
    for secret in (SECRET, None):
        with pytest.raises(ValueError, match="accounts of version 7, this samelib reads version 1"):
            AccountBook(file, secret)


def test_files_that_hold_no_accounts(tmp_path):
    (tmp_path / "notes.txt").write_text("something else " * 500)
    with pytest.raises(ValueError, match="cannot hold accounts"):
        AccountBook(tmp_path / "notes.txt", SECRET)
    with pytest.raises(ValueError, match="cannot hold accounts"):
        AccountBook(tmp_path / "nowhere" / "accounts.sqlite", SECRET)
    SpentStamps(tmp_path / "stamps.sqlite").close()
    with pytest.raises(ValueError, match="holds no accounts"):
        AccountBook(tmp_path / "stamps.sqlite")


def test_accounts_and_stamps_share_a_file(watcher, tmp_path):
    stamps, book = SpentStamps(tmp_path / "both.sqlite"), AccountBook(tmp_path / "both.sqlite", SECRET)
    stamps.add([Challenge(1, 100, b"nonce", b"query")], 0)
    gateway(watcher, BanAccount(accounts=book)).query(strange(1))
    assert len(stamps) == len(book.entries()) == 1
    stamps.close()
    book.close()


def judged(watcher, book, name: str, queries: torch.Tensor) -> bool:
    """Is the account banned after these queries?"""
    return bool(gateway(watcher, BanAccount(accounts=book), name).query(queries).isnan().any())


def test_the_poorest_account_is_forgotten_and_never_a_banned_one(watcher):
    with closing(AccountBook(secret=SECRET, most=3)) as book:
        assert judged(watcher, book, "banned", strange(30))
        judged(watcher, book, "suspect", strange(3))
        judged(watcher, book, "honest", benign(50, 0))
        judged(watcher, book, "new", benign(1, 1))
        kept = {account.digest for account in book.entries()}
        assert kept == {book.digest(name) for name in ("banned", "suspect", "new")}
        assert judged(watcher, book, "banned", benign(1, 2))


def test_a_book_full_of_bans_takes_no_more_and_changes_nothing(watcher):
    with closing(AccountBook(secret=SECRET, most=2)) as book:
        for name in ("one", "two"):
            judged(watcher, book, name, strange(30))
        with pytest.raises(AccountsFull, match="2 accounts are remembered"):
            judged(watcher, book, "three", benign(1, 0))
        assert len(book.entries()) == 2 and judged(watcher, book, "one", benign(1, 0))


def test_what_fails_half_way_changes_nothing(book):
    with pytest.raises(RuntimeError, match="out of order"), book.changing(["one"]) as known:
        known["one"].count(b"query")
        raise RuntimeError("out of order")
    assert book.entries() == []


def test_a_lifted_ban_starts_anew(watcher, book):
    for name in ("one", "two"):
        judged(watcher, book, name, strange(30))
    assert book.bans == 2
    lifted = book.lift(book.digest("one").hex()[:8].upper())
    assert lifted.digest == book.digest("one") and book.find_banned("one") is None and book.find_banned("two")
    door = gateway(watcher, BanAccount(accounts=book), "one")
    assert door.query(strange(4)).isfinite().all()  # it may begin as anybody
    door.query(strange(30, 1))
    assert door.log.refused[-1] and book.bans == 3


def test_bans_that_cannot_be_lifted(watcher, book):
    names = [str(i) for i in range(17)]  # two of them begin with the same digit
    for name in names:
        judged(watcher, book, name, benign(1, 0))
    digits = [book.digest(name).hex()[0] for name in names]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    for prefix, words in (("x", "no account begins"), ("", "17 accounts begin"), (twice, "accounts begin with")):
        with pytest.raises(ValueError, match=words):
            book.lift(prefix)
    with pytest.raises(ValueError, match="is not banned"):
        book.lift(book.digest("3").hex())


def test_a_memory_is_a_fair_sample_and_the_same_each_time():
    """Numbers 1 to 1,000 through the memories of 20 accounts, each of 200 places."""

    def sample(number: int) -> np.ndarray:
        account = Account(bytes([number]) * 32)
        for account.queries in range(1, 1_001):
            account.remember(np.full(64, account.queries, np.int32), 200)
        return account.memory[:, 0]

    samples = [sample(number) for number in range(20)]
    assert all(len(set(numbers)) == 200 for numbers in samples)
    assert np.array_equal(samples[0], sample(0)) and not np.array_equal(samples[0], samples[1])
    quarters, _ = np.histogram(samples, bins=[1, 251, 501, 751, 1_001])
    assert np.abs(quarters - 1_000).max() < 100  # 27 is the standard deviation


def test_a_memory_stays_small(watcher, book):
    gateway(watcher, BanAccount(0.01, accounts=book), "honest").query(benign(600, 8))
    with book.changing(["honest"]) as known:
        assert len(known["honest"].memory) == MOST
        assert sum(map(len, (known["honest"].memory.tobytes(), known["honest"].marks))) < 70_000
