"""Evidence by account: bets that honest accounts lose, p-values that hold for one calibration set, and likeness."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from samelib.data.image_set import quantise, to_float, to_uint8
from samelib.data.synthetic import glyphs
from samelib.evidence import FEWEST, MOST, Likeness, Wealth, log_e_values, safe_p_values, sketches

DELTA = 0.01


def log_e(p_value: float) -> float:
    return float(log_e_values(torch.tensor([p_value], dtype=torch.float64)))


# e-values


def test_e_values_by_hand():
    e = math.e
    p_values = torch.tensor([1.0, 1 / e, e**-2, e**-10], dtype=torch.float64)
    by_hand = [1 / 2, e - 2, (e**2 - 3) / 4, (e**10 - 11) / 100]
    assert log_e_values(p_values).exp().tolist() == pytest.approx(by_hand)


def test_the_mean_e_value_of_an_honest_query_is_one():
    """Over p-values that are even between 0 and 1; those below exp(-700) contribute 1 / 700."""
    share, _ = integrate.quad(lambda surprise: math.exp(log_e(math.exp(-surprise)) - surprise), 0, 700, limit=500)
    assert share == pytest.approx(1 - 1 / 700, abs=1e-7)


def test_e_values_fall_with_the_p_value_and_never_jump():
    small = torch.logspace(-300, -2, 500, dtype=torch.float64)
    p_values = torch.cat([small, torch.linspace(0.0101, 1, 20_001, dtype=torch.float64)])
    found = log_e_values(p_values)
    assert found.isfinite().all() and (found.diff() < 1e-9).all()
    around = log_e_values(torch.tensor([-1.0001e-3, -0.9999e-3], dtype=torch.float64).exp())  # where the series begins
    assert abs(float(around.diff())) < 1e-7


# Safe p-values


@pytest.mark.parametrize(("count", "eta"), [(20, 0.05), (150, 0.05), (150, 0.2), (1_000, 0.05)])
def test_safe_p_values_hold_for_nearly_all_calibration_sets(count, eta):
    """Given a set, the chance of the p-value k / (n + 1) or less is the k-th smallest of n uniform numbers."""
    chances = np.sort(np.random.default_rng(0).random((3_000, count)), 1)
    safe = safe_p_values(count, eta).numpy()
    held = (chances <= safe[:-1]).all(1).mean()
    assert held >= 1 - eta - 3 * math.sqrt(eta * (1 - eta) / 3_000)
    assert (chances <= np.arange(1, count + 1) / (count + 1)).all(1).mean() < 0.1  # which the usual ones do not
    assert (np.diff(safe) >= 0).all() and safe[-1] == 1 and safe[0] < 8 / count


@pytest.mark.parametrize(("count", "eta"), [(0, 0.05), (100, 0), (100, 1)])
def test_safe_p_values_of_nothing(count, eta):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        safe_p_values(count, eta)


# Wealth


def test_wealth_is_the_sum_over_all_beginnings():
    e_values = np.random.default_rng(0).uniform(0.3, 2.5, 40)
    wealth = Wealth()
    assert wealth.log_wealth == 0
    for t in range(1, 41):
        begun = [np.prod(e_values[s - 1 : t]) / (s * (s + 1)) for s in range(1, t + 1)]
        assert wealth.add(math.log(e_values[t - 1])) == pytest.approx(math.log(sum(begun) + 1 / (t + 1)))
    assert wealth.log_wealth == wealth.add(0.0) and wealth.count == 41  # a bet that wins nothing changes nothing


def test_wealth_neither_overflows_nor_vanishes():
    wealth = Wealth()
    for _ in range(50_000):
        wealth.add(100.0)
    assert wealth.log_wealth == pytest.approx(5e6, rel=1e-5)
    for _ in range(50_000):
        wealth.add(-200.0)
    assert math.log(1 / 100_001) <= wealth.log_wealth < 0


def honest_log_e(sets: int, accounts: int, queries: int, count: int, safe: bool, seed: int = 0) -> np.ndarray:
    """float64 [queries, sets * accounts], of honest accounts, so many for each calibration set of `count` scores.

    Scores are uniform numbers, low ones strange.
    """
    generator = np.random.default_rng(seed)
    calibration = np.sort(generator.random((sets, count)), 1)
    queries = generator.random((sets, accounts * queries))
    stranger = np.stack([np.searchsorted(*pair) for pair in zip(calibration, queries, strict=True)])
    p_values = safe_p_values(count) if safe else torch.arange(1, count + 2).double() / (count + 1)
    return log_e_values(p_values).numpy()[stranger].reshape(sets * accounts, -1).T


def test_at_most_delta_of_thousands_of_honest_accounts_are_banned():
    """By Ville's inequality, over 200 calibration sets; wealth that starts anew at 1 would ban more, and does here."""
    most = stats.binom.ppf(0.999, 4_000, DELTA)
    wealth, banned = Wealth(), np.zeros(4_000, dtype=bool)
    for won in honest_log_e(200, 20, 1_000, 200, safe=True):
        banned |= wealth.add(won) >= -math.log(DELTA)
    assert banned.sum() <= most
    restarted, banned = np.zeros(4_000), np.zeros(4_000, dtype=bool)
    for won in honest_log_e(200, 20, 1_000, 200, safe=False):
        restarted = np.maximum(restarted, 0) + won
        banned |= restarted >= -math.log(DELTA)
    assert banned.sum() > most


def test_a_thief_who_was_honest_for_long_is_found():
    """The bet that begins with their first strange query loses log(t (t + 1)) nats to its stake, and no more."""
    before, table = 1_000, log_e_values(safe_p_values(1_000)).numpy()
    wealth, fortune = Wealth(), 0.0
    for won in honest_log_e(1, 1, before, 1_000, safe=True)[:, 0]:
        wealth.add(won)
        fortune += won
    assert wealth.log_wealth < 0 and fortune < -100  # a plain product would not recover in 50 queries
    delay = 0
    while wealth.log_wealth < -math.log(DELTA):
        wealth.add(table[0])
        delay += 1
    t = before + 1
    assert -math.log(DELTA) / table[0] <= delay <= math.ceil((math.log(t * (t + 1)) - math.log(DELTA)) / table[0])


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_thieves_are_found_when_theory_says(share):
    """A share of their queries is among the strangest twentieth: log(1 / delta) / E[log e] queries, and what the first
    stakes cost."""
    generator, table = np.random.default_rng(0), log_e_values(safe_p_values(1_000)).numpy()
    strange = generator.random((2_000, 400)) < share
    ranks = np.where(strange, generator.integers(0, 50, strange.shape), generator.integers(0, 1_001, strange.shape))
    growth = table[ranks].mean()
    wealth, found = Wealth(), np.zeros(400)
    for t, won in enumerate(table[ranks], 1):
        found[(wealth.add(won) >= -math.log(DELTA)) & (found == 0)] = t
    assert found.all() and 0.8 < np.mean(found) / (-math.log(DELTA) / growth) < 1.8


# Likeness


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    return sketches(glyphs("victim", 4_000).images)


def test_sketches_are_exact_and_keep_distances():
    images = torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = sketches(images)
    assert found.shape == (100, 64) and found.dtype == np.int32
    assert np.array_equal(found, np.concatenate([sketches(image[None]) for image in images]))
    pixels = images.flatten(1).double()
    true = torch.cdist(pixels, pixels).square()[~torch.eye(100, dtype=torch.bool)].numpy()
    sketched = np.square(found[:, None].astype(float) - found[None]).sum(2)[~np.eye(100, dtype=bool)]
    ratios = sketched / (64 * true)
    assert abs(ratios.mean() - 1) < 0.03 and 0.15 < ratios.std() < 0.2


def test_a_memory_speaks_once_it_holds_enough(pool):
    likeness = Likeness(pool[:300])
    assert likeness.p_value(pool[400], pool[500 : 500 + FEWEST - 1]) is None
    assert likeness.p_value(pool[500], pool[500 : 500 + FEWEST]) == 1 / 301  # itself: nearer than any
    assert likeness.p_value(pool[400] + 10**6, pool[500:600]) == 1  # farther than any
    assert (likeness.most, Likeness(pool[:100]).most) == (MOST, 99)
    assert 0 < Likeness(pool[:100]).p_value(pool[400], pool[500:756]) <= 1  # a memory too large for it


def test_a_large_memory_makes_nearness_less_strange(pool):
    """The same nearest distance, among few and among many."""
    likeness, far = Likeness(pool[:1_000]), pool[2_000:2_255] + 10**6
    for query, neighbour in zip(pool[1_000:1_050], pool[1_100:1_150], strict=True):
        few, many = (np.concatenate([neighbour[None], far[: m - 1]]) for m in (FEWEST, MOST))
        assert likeness.p_value(query, few) <= likeness.p_value(query, many)


@pytest.mark.parametrize("size", [FEWEST, 100, MOST])
def test_over_many_honest_accounts_p_values_are_even(size, pool):
    """Drawn anew each time: calibration images, an account's memory, and its query."""
    generator, found = np.random.default_rng(size), []
    for _ in range(40):
        drawn = pool[generator.permutation(len(pool))]
        likeness, rest = Likeness(drawn[:300]), drawn[300:]
        found += [likeness.p_value(query, rest[-size * (i + 1) :][:size]) for i, query in enumerate(rest[:10])]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 400))


def test_honest_accounts_are_not_banned_for_likeness(pool):
    """With a memory that stays as it is once it is full: whoever has an unlucky one keeps it."""
    generator, banned = np.random.default_rng(0), 0
    for _ in range(10):
        drawn = pool[generator.permutation(len(pool))]
        likeness, table = Likeness(drawn[:300]), log_e_values(safe_p_values(300)).numpy()
        for _ in range(15):
            own, wealth = drawn[300 + generator.permutation(len(pool) - 300)[:600]], Wealth()
            p_values = [likeness.p_value(query, own[:t]) for t, query in enumerate(own)][FEWEST:]
            highest = max(wealth.add(table[round(p * 301) - 1]) for p in p_values)
            banned += highest >= -math.log(DELTA)
    assert banned <= stats.binom.ppf(0.999, 150, DELTA)


def test_near_copies_are_found_and_benign_images_are_not():
    """As JBDA makes them: every pixel one step of 0.1 up or down."""
    images = glyphs("victim", 1_400).images
    calibration, memory, fresh = images.split([1_000, 200, 200])
    generator = torch.Generator().manual_seed(0)
    steps = 0.1 * torch.randint(0, 2, memory.shape, generator=generator).mul(2).sub(1)
    copies = to_uint8(quantise(to_float(memory) + steps))
    likeness, memory = Likeness(sketches(calibration)), sketches(memory)
    near = np.array([likeness.p_value(sketch, memory) for sketch in sketches(copies)])
    benign = np.array([likeness.p_value(sketch, memory) for sketch in sketches(fresh)])
    assert (near <= 0.01).mean() > 0.95 and (benign <= 0.01).mean() < 0.05 and benign.mean() > 0.4
