import time

import numpy as np
import pytest
import torch
from scipy.stats import shapiro

from samelib.data.synthetic import glyphs
from samelib.detectors.prada import GrowingSet, Prada, watch_accounts


def spots(values) -> torch.Tensor:
    """Images [n, 1, 1, n], the first empty and image i with value i at pixel i: just that far from the first.

    It is farther from all others, so the distances that PRADA sees are the values, whatever joins the set.
    """
    return torch.diag(torch.tensor(values).round()).byte()[:, None, None, :]


def one_class(n: int) -> torch.Tensor:
    return torch.ones(n, 1)


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.r_[0, np.random.default_rng(seed).normal(128, 25, n).clip(1, 255)]


def mixed(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.r_[0, np.where(rng.random(n) < 0.5, rng.normal(40, 5, n), rng.normal(200, 5, n))]


def by_the_letter(images: np.ndarray, classes: np.ndarray, delta: float, minimum: int):
    """PRADA as its authors' pseudo-code has it, a query and a distance at a time."""
    sets, joined, thresholds, found = {}, {}, {}, {}
    for number, (x, c) in enumerate(zip(images, classes, strict=True), 1):
        if c not in sets:
            sets[c], joined[c], thresholds[c] = [x], [0.0], 0.0
            continue
        distance = min(np.sqrt(((x - y) ** 2).sum()) for y in sets[c])
        found.setdefault(c, []).append(distance)
        if distance > thresholds[c]:
            sets[c].append(x)
            joined[c].append(distance)
            thresholds[c] = max(thresholds[c], np.mean(joined[c]) - np.std(joined[c]))
        pool = np.array([d for ds in found.values() if len(ds) >= 10 for d in ds])
        pool = pool[np.abs(pool - pool.mean()) < 3 * pool.std()] if len(pool) else pool
        if len(pool) > minimum and shapiro(pool).statistic < delta:
            return number, pool, sets
    return None, pool, sets


def test_the_growing_set_by_hand():
    """Joined at 0, 10, 20: mean 10, deviation 8.16, so the threshold is 1.84 and a query at 1 stays outside."""
    grown = GrowingSet()
    images = torch.zeros(5, 4, dtype=torch.uint8)
    images[1, 0], images[2, 1], images[3, 2], images[4, 2] = 10, 20, 1, 1
    distances = grown.add(images) * 127.5
    assert np.isnan(distances[0]) and distances[1:].tolist() == pytest.approx([10, 20, 1, 1])
    assert np.array(grown.joined) * 127.5 == pytest.approx([0, 10, 20])
    assert grown.threshold * 127.5 == pytest.approx(10 - np.sqrt(200 / 3))
    assert len(grown.images) == 3
    assert grown.add(images[1:2]).tolist() == [0.0]


def test_it_does_what_the_pseudo_code_says():
    images = glyphs("victim", 260)
    answers = torch.nn.functional.one_hot(images.labels % 4, 4).float()
    pixels, classes = images.pixels().flatten(1).double().numpy(), images.labels.numpy() % 4
    for delta in (0.9, 0.9999):
        prada = Prada(4, delta)
        flags = prada.watch(images.images, answers)
        alarm, pool, sets = by_the_letter(pixels, classes, delta, 100)
        assert prada.alarm_at == alarm
        assert flags.tolist() == [alarm is not None and i + 1 >= alarm for i in range(260)]
        if alarm is None:
            assert np.sort(prada.distances.numpy()) == pytest.approx(np.sort(pool), abs=1e-6)
            assert prada.statistic == pytest.approx(shapiro(pool).statistic, abs=1e-6)
            assert [len(prada.sets[c].joined) for c in range(4)] == [len(sets[c]) for c in range(4)]
        else:
            assert alarm > 100
    assert by_the_letter(pixels, classes, 0.9, 100)[0] is None  # or neither of the two checks would be made
    assert alarm is not None


def test_how_the_queries_are_cut_makes_no_difference(monkeypatch):
    images = glyphs("proxy", 300)
    answers = torch.nn.functional.one_hot(images.labels % 10, 10).float()
    whole, parts = Prada(10, 0.99), Prada(10, 0.99)
    flags = whole.watch(images.images, answers)
    monkeypatch.setattr("samelib.detectors.prada.BLOCK", 64)
    cut = [parts.watch(x, y) for x, y in zip(images.pixels().split(37), answers.split(37), strict=True)]
    assert torch.equal(torch.cat(cut), flags) and flags.any() and not flags.all()
    assert parts.alarm_at == whole.alarm_at and parts.queries == 300
    assert torch.equal(parts.distances, whole.distances)


def test_normal_distances_raise_no_alarm_mixed_ones_do():
    watched, caught = Prada(1), Prada(1)
    assert not watched.watch(spots(normal(400)), one_class(401)).any()
    assert watched.alarm_at is None and watched.statistic > 0.98
    flags = caught.watch(spots(mixed(400)), one_class(401))
    assert caught.alarm_at is not None and 102 <= caught.alarm_at < 150
    assert flags.sum() == 401 - caught.alarm_at + 1 and flags[-1] and not flags[caught.alarm_at - 2]
    assert caught.statistic < 0.9


def test_the_distances_are_the_streams():
    values = normal(300).round()
    prada = Prada(1)
    prada.watch(spots(values), one_class(301))
    kept = values[1:][np.abs(values[1:] - values[1:].mean()) < 3 * values[1:].std()]
    assert (prada.distances.numpy() * 127.5) == pytest.approx(kept)
    assert len(kept) < 300 or np.abs(values[1:] - values[1:].mean()).max() < 3 * values[1:].std()


def test_an_alarm_stays():
    """Benign queries after the attack do not clear the account."""
    prada = Prada(1)
    images = torch.nn.functional.pad(spots(mixed(150)), (0, 650))
    prada.watch(images, one_class(151))
    at = prada.alarm_at
    assert at is not None
    later = torch.nn.functional.pad(spots(normal(600)), (151, 801 - 151 - 601))
    assert prada.watch(later, one_class(601)).all()
    assert prada.alarm_at == at


def test_small_classes_stay_out_of_the_pool():
    answers = torch.zeros(101, 20)
    answers[torch.arange(101), torch.arange(101) % 20] = 1  # 5 each, of which 4 have distances
    answers[60:] = torch.eye(20)[3]  # class 3 gets 41 more
    prada = Prada(20)
    prada.watch(spots(normal(100)), answers)
    assert 35 <= len(prada.distances) <= 43


def test_equal_queries_are_no_alarm():
    prada = Prada(1)
    assert not prada.watch(torch.zeros(300, 1, 4, 4, dtype=torch.uint8), one_class(300)).any()
    assert np.isnan(prada.statistic)


def test_many_accounts_blind_it():
    queries, answers = spots(mixed(999)), one_class(1000)
    alone = watch_accounts(queries, answers, 1, 1)
    assert len(alone) == 1 and alone[0].alarm_at is not None
    many = watch_accounts(queries, answers, 100, 1)
    assert len(many) == 100 and [p.queries for p in many] == [10] * 100
    assert all(p.alarm_at is None for p in many)
    three = watch_accounts(queries[:5], answers[:5], 3, 1, threshold=0.95, minimum=50)
    assert [p.queries for p in three] == [2, 2, 1] and three[0].threshold == 0.95 and three[0].minimum == 50
    own = Prada(1, 0.95, 50)
    own.watch(queries[1::3][:400], answers[1::3][:400])
    dealt = watch_accounts(queries, answers, 3, 1, threshold=0.95, minimum=50)[1]
    assert torch.equal(dealt.distances, own.distances) and dealt.alarm_at == own.alarm_at


def test_more_accounts_than_queries():
    watchers = watch_accounts(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), one_class(2), 4, 1)
    assert [p.queries for p in watchers] == [1, 1, 0, 0]
    assert len(watchers[3].distances) == 0 and np.isnan(watchers[3].statistic)


def test_four_thousand_queries_take_seconds():
    images = torch.randint(0, 256, (4000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    answers = torch.nn.functional.one_hot(torch.arange(4000) % 10, 10).float()
    start = time.perf_counter()
    Prada(10).watch(images, answers)
    assert time.perf_counter() - start < 15  # 0.6 s on one core of the machine this was written on


def test_bad_input_is_refused(images):
    answers = torch.full((5, 10), 0.1)
    with pytest.raises(ValueError, match=r"5 images need answers \[5, 10\], got \[4, 10\]"):
        Prada(10).watch(images, answers[:4])
    with pytest.raises(ValueError, match=r"5 images need answers \[5, 3\], got \[5, 10\]"):
        Prada(3).watch(images, answers)
    with pytest.raises(ValueError, match="NaN"):
        Prada(10).watch(images * float("nan"), answers)
    prada = Prada(10)
    prada.watch(images, answers)
    with pytest.raises(ValueError, match="shape"):
        prada.watch(images[:, :, 1:], answers)
    for options, words in (({"threshold": 1.5}, "threshold"), ({"minimum": 2}, "minimum must be at least 3")):
        with pytest.raises(ValueError, match=words):
            Prada(10, **options)
    with pytest.raises(ValueError, match="classes must be positive"):
        Prada(0)
    with pytest.raises(ValueError, match="at least one account"):
        watch_accounts(images, answers, 0, 10)
