"""Whom bans strike: honest users with another camera, thieves, and nobody else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reproduction.bans import ACCOUNTS, APPLIED, bans, bans_table, measure
from reproduction.plan import BAN_BY_STRANGENESS, CHANGES, HONEST, KNOCKOFF, SAME, Cell
from reproduction.rows import as_frame
from samelib.data.synthetic import glyphs
from samelib.detectors.base import conformal_p_values


@pytest.fixture
def watcher() -> SimpleNamespace:
    """Its scores of honest queries are standard normal."""
    calibration = torch.randn(1_000, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(
        calibration_scores=calibration, p_values_of=lambda scores: conformal_p_values(scores, calibration)
    )


def test_honest_accounts_are_left_alone_and_strange_ones_are_not(watcher):
    honest = torch.randn(2_000, generator=torch.Generator().manual_seed(1))
    assert np.isfinite(bans(watcher, honest, 0.001, 0)).sum() <= ACCOUNTS // 100
    strange = bans(watcher, honest + 2, 0.001, 0)
    assert np.isfinite(strange).all() and np.median(strange) < 100
    assert (bans(watcher, honest + 2, 0.1, 0) <= strange).all(), "less evidence is enough for a laxer bound"


def test_every_change_leaves_the_same_kind_of_image(watcher):
    assert set(APPLIED) == {None, *CHANGES} == {honest.change for honest in HONEST}
    images = glyphs("victim", 20).images
    for change, apply in APPLIED.items():
        changed = apply(images)
        assert changed.shape == images.shape and changed.dtype == torch.uint8
        assert torch.equal(changed, images) == (change is None)


def test_a_change_that_a_detector_sees_is_paid_for_by_honest_users(watcher):
    """A detector of pale ink, calibrated on pictures as they are."""
    group = SimpleNamespace(proxy=glyphs("proxy", 200))
    calibration, pool = glyphs("victim", 800).split(400, 400)

    def score(x):
        return -x.float().amax((1, 2, 3)) - 1e-3 * x.float().mean((1, 2, 3))  # the mean breaks ties

    scores = score(calibration.images)
    detector = SimpleNamespace(
        calibration_scores=scores, p_values_of=lambda s: conformal_p_values(s, scores), score=score, threshold=torch.inf
    )
    bench = SimpleNamespace(halves=(pool, pool), group=group, seed=0, detector=lambda variant: detector)

    def banned(attack) -> float:
        (row,) = measure(bench, Cell("bans", "glyphs", "smoke", 0, SAME, attack, 400, response=BAN_BY_STRANGENESS))
        return row["banned"]

    assert banned(HONEST[0]) < 0.05 < banned(HONEST[-1])


def test_the_table_has_a_line_for_everybody_who_was_measured():
    cells = [
        Cell("bans", "glyphs", "smoke", seed, SAME, a, 400, response=BAN_BY_STRANGENESS)
        for a in (HONEST[2], KNOCKOFF)
        for seed in (0, 1)
    ]
    readings = [{"queries": 1_000, "flagged": 0.1, "banned": 0.5, "banned_at": at} for at in (10.0, 20.0, None, None)]
    rows = [{"cell": str(c)} | c.fields() | {"measured": [r]} for c, r in zip(cells, readings, strict=True)]
    lines = bans_table(as_frame(rows)).splitlines()[2:]
    assert lines == [
        "| benign, turned by 10 degrees | same | 10.0 ± 0.0 | 50.0 ± 0.0 | 15 |",
        "| knockoff | same | 10.0 ± 0.0 | 50.0 ± 0.0 | – |",
    ]
