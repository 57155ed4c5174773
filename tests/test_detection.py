"""What a cell of detection measures, by hand; whole cells are in test_reproduce.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reproduction import detection
from reproduction.lab import Bench, evenly
from reproduction.plan import JBDA, KNOCKOFF, NOISE, SAME, UNCLIPPED_JBDA, Cell, DetectorVariant
from reproduction.run import measure
from samelib.attacks.base import TransferSet
from samelib.attacks.jbda import JBDA as JBDAAttack
from samelib.detectors.controls import Control
from samelib.metrics import aupr, auroc
from samelib.store import MEASUREMENT, ArtifactStore


def test_a_ratio_uses_as_many_queries_as_there_are(monkeypatch):
    seen = []

    def metrics(benign, malicious):
        seen.append((len(benign), len(malicious)))
        return {"auroc": auroc(benign, malicious)}

    monkeypatch.setattr(detection, "detection_metrics", metrics)
    benign, malicious = torch.zeros(400), torch.ones(400)
    for ratio in detection.RATIOS:
        assert detection._at_ratio(benign, malicious, ratio, seed=0, draws=1) == {"auroc": 1.0}
    assert seen == [(396, 4), (399, 21), (396, 44), (399, 171), (400, 400), (44, 400)]
    assert all(abs(m / (b + m) - r) < 0.005 for (b, m), r in zip(seen, detection.RATIOS, strict=True))


def test_auroc_does_not_depend_on_the_ratio_and_aupr_does():
    generator = torch.Generator().manual_seed(0)
    benign, malicious = torch.randn(4000, generator=generator), torch.randn(4000, generator=generator) + 1
    few, many = (detection._at_ratio(benign, malicious, ratio, seed=0) for ratio in (0.05, 0.9))
    assert abs(few["auroc"] - many["auroc"]) < 0.02 and many["aupr"] > few["aupr"] + 0.5
    assert detection._at_ratio(benign, malicious, 0.5, 0)["aupr"] == pytest.approx(aupr(benign, malicious), abs=1e-6)


def test_ranks_count_every_query_once_whatever_the_scale():
    generator = torch.Generator().manual_seed(0)
    benign, malicious = torch.randn(4000, generator=generator), torch.randn(300, generator=generator) + 2
    ranks = detection._ranks(benign, malicious)
    assert sum(ranks) == 300 and len(ranks) == detection.BINS and json.loads(json.dumps(ranks)) == ranks
    assert detection._ranks(benign.exp(), malicious.exp()) == ranks
    middle = (np.arange(detection.BINS) + 0.5) / detection.BINS
    assert np.average(middle, weights=ranks) == pytest.approx(auroc(benign, malicious), abs=0.01)


def test_benign_queries_lie_evenly_among_themselves_and_ties_in_the_middle():
    benign = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert max(detection._ranks(benign, benign)) - min(detection._ranks(benign, benign)) <= 2
    assert detection._ranks(torch.zeros(10), torch.zeros(7))[detection.BINS // 2] == 7
    assert detection._ranks(benign, benign + 100)[-1] == 4000


def test_a_long_log_is_measured_at_even_distances():
    log = torch.arange(1000)[:, None]
    assert evenly(log, 4)[:, 0].tolist() == [0, 333, 666, 999]
    assert evenly(log, 1000) is log


@pytest.fixture
def bench(group, monkeypatch, tmp_path) -> Bench:
    """A bench of the tests' small group at smoke tier."""
    monkeypatch.setattr("reproduction.lab.load_group", lambda *_: group)
    bench = Bench("glyphs", "smoke", 0, ArtifactStore(tmp_path / "store"))
    bench.settings = replace(bench.settings, budgets=(60, 100))
    return bench


def test_a_log_is_made_once_and_the_small_budget_begins_it(bench, monkeypatch):
    victim, _ = bench.undefended
    large, worth = bench.log(victim, NOISE, 100)
    monkeypatch.setattr(Bench, "_attacked", None)
    small, less = bench.log(victim, NOISE, 60)
    assert torch.equal(small, large[:60]) and (less["queries"], worth["queries"]) == (60, 100) == (60, len(large))


def test_an_attack_that_stops_early_gives_no_row(bench, monkeypatch):
    def collect(self, querier):
        querier.stopped = "tired"
        return TransferSet(self.seeds.images, querier.ask(self.seeds.images))

    monkeypatch.setattr(JBDAAttack, "collect", collect)
    with pytest.raises(RuntimeError, match="jbda: stopped after 20 of 100 queries, tired"):
        bench.log(bench.undefended[0], JBDA, 100)


def test_unclipped_queries_are_kept_as_they_were_sent(bench):
    queries, _ = bench.log(bench.undefended[0], UNCLIPPED_JBDA, 60)
    assert queries.dtype == torch.float32 and queries.abs().max() > 1
    assert torch.equal(queries[:20], bench.group.seeds.pixels()), "the seeds come first"
    entry = next(path for path in bench.store.root.glob("queries-*") if path.is_dir())
    assert torch.equal(load_file(entry / "weights.safetensors")["queries"][:60], queries)


# Figures of one tiny cell, and the MEASUREMENT that they belong to. The tolerance is for other processors' rounding.
GOLDEN = {
    "measurement": 2,
    "auroc": {0.0: 0.6126, 0.5: 0.6169, 1.0: 0.6168},
    "substitute_fidelity": 0.4733,
    "tolerance": 0.015,
}


def test_figures_move_only_with_the_measurement(bench):
    """Raise samelib.store.MEASUREMENT when a change moves a figure, then write the new figures here."""
    cell = Cell("detection", "glyphs", "smoke", 0, SAME, KNOCKOFF, 100)
    readings = {r["alpha"]: r for r in detection.measure(bench, cell) if "ratio" not in r}
    measured = {alpha: readings[alpha]["auroc"] for alpha in GOLDEN["auroc"]}
    assert GOLDEN["measurement"] == MEASUREMENT
    assert measured == pytest.approx(GOLDEN["auroc"], abs=GOLDEN["tolerance"])
    assert readings[0.5]["substitute_fidelity"] == pytest.approx(GOLDEN["substitute_fidelity"], abs=GOLDEN["tolerance"])


def test_a_control_stands_in_tables_1_and_4(bench):
    """It is calibrated on the images that give every other detector its threshold, and measured at every ratio."""
    control = DetectorVariant("laplacian-low")
    cells = [Cell("detection", "glyphs", "smoke", 0, control, KNOCKOFF, budget) for budget in (60, 100)]
    small, large = (list(detection.measure(bench, cell)) for cell in cells)
    assert [row.get("ratio") for row in small] == [None]
    assert [row.get("ratio") for row in large] == [None, *detection.RATIOS]
    detector = bench.detector(control)
    assert isinstance(detector, Control) and (detector.statistic, detector.side) == ("laplacian", "low")
    assert torch.equal(detector.calibration_scores, detector.score(bench.group.calibration.images[120:]))
    sharp = next(detection.measure(bench, replace(cells[1], detector=DetectorVariant("laplacian-high"))))
    assert large[0]["auroc"] == pytest.approx(1 - sharp["auroc"], abs=1e-6) and sharp["auroc"] > 0.75


@pytest.mark.data
@pytest.mark.slow
def test_cifar10_goes_through_the_same_code(real_data, tmp_path):
    """Real colour pictures; the baselines would train six more victims."""
    readings = measure(Cell("detection", "cifar10", "smoke", 0, SAME, KNOCKOFF, 220), tmp_path)["measured"]
    assert {r["alpha"] for r in readings} == set(detection.ALPHAS)
    assert all(0 <= r["auroc"] <= 1 for r in readings)
