"""The measures of one cell by hand; whole cells are in test_reproduce.py."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reproduction import measure
from reproduction.bench import Bench
from reproduction.cells import FAULTS, PROTOCOLS
from samelib.metrics import aupr, auroc
from samelib.store import ArtifactStore


def test_a_ratio_uses_as_many_queries_as_there_are(monkeypatch):
    seen = []

    def metrics(benign, malicious):
        seen.append((len(benign), len(malicious)))
        return {"auroc": auroc(benign, malicious)}

    monkeypatch.setattr(measure, "detection_metrics", metrics)
    benign, malicious = torch.zeros(400), torch.ones(400)
    for ratio in measure.RATIOS:
        assert measure._at_ratio(benign, malicious, ratio, seed=0, draws=1) == {"auroc": 1.0}
    assert seen == [(396, 4), (399, 21), (396, 44), (399, 171), (400, 400), (44, 400)]
    assert all(abs(m / (b + m) - r) < 0.005 for (b, m), r in zip(seen, measure.RATIOS, strict=True))


def test_auroc_does_not_depend_on_the_ratio_and_aupr_does():
    generator = torch.Generator().manual_seed(0)
    benign, malicious = torch.randn(4000, generator=generator), torch.randn(4000, generator=generator) + 1
    few, many = (measure._at_ratio(benign, malicious, ratio, seed=0) for ratio in (0.05, 0.9))
    assert abs(few["auroc"] - many["auroc"]) < 0.02 and many["aupr"] > few["aupr"] + 0.5
    assert measure._at_ratio(benign, malicious, 0.5, 0)["aupr"] == pytest.approx(aupr(benign, malicious), abs=1e-6)


def test_a_histogram_counts_every_query_once():
    scores = torch.cat([torch.randn(300), torch.tensor([1e4])])
    found = measure._histogram(scores, scores + 2)
    assert sum(found["benign"]) == sum(found["malicious"]) == 301
    assert len(found["edges"]) == measure.BINS + 1 and (np.diff(found["edges"]) > 0).all()
    assert json.loads(json.dumps(found)) == found


@pytest.fixture
def bench(group, monkeypatch, tmp_path) -> Bench:
    """A bench of the tests' small group at smoke tier."""
    monkeypatch.setattr("reproduction.bench.load_group", lambda *how: group)
    return Bench("glyphs", "smoke", 0, ArtifactStore(tmp_path / "store"))


def test_a_log_is_made_once_and_the_small_budget_begins_it(bench, monkeypatch):
    victim, _ = bench.plain
    large, worth = bench.log(victim, "noise", 500)
    monkeypatch.setattr(Bench, "_attacked", None)
    small, less = bench.log(victim, "noise", 250)
    assert torch.equal(small, large[:250]) and (less["queries"], worth["queries"]) == (250, 500) == (250, len(large))


def test_an_attack_that_stops_early_gives_no_row(bench, monkeypatch):
    from samelib.attacks.base import TransferSet
    from samelib.attacks.jbda import JBDA

    monkeypatch.setattr(JBDA, "collect", lambda self, service: TransferSet(
        self.seeds.images, service.ask(self.seeds.images), "tired"))  # fmt: skip
    with pytest.raises(RuntimeError, match="jbda: stopped after 20 of 500 queries, tired"):
        bench.log(bench.plain[0], "jbda", 500)


def test_unclipped_queries_are_kept_as_they_were_sent(bench, monkeypatch):
    queries, _ = bench.log(bench.plain[0], "jbda, unclipped", 250)
    assert queries.dtype == torch.float32 and queries.abs().max() > 1
    assert torch.equal(queries[:20], bench.group.seeds.pixels()), "the seeds come first"
    entry = next(p for p in bench.store.root.glob("queries-*") if p.is_dir())
    assert torch.equal(load_file(entry / "weights.safetensors")["queries"][:250], queries)


def test_each_fault_is_one_change_of_the_settings(bench):
    sound = bench.same_settings("same, mask 0")
    for name, fault in FAULTS.items():
        changed = fault(sound)
        if name == "interpolated ROC":
            assert changed == sound
        elif name == "raw scale, alpha 0.99":
            assert (changed.scale, changed.alpha, changed.protocol) == ("raw", 0.99, sound.protocol)
        else:
            different = [k for k, v in vars(changed.protocol).items() if v != getattr(sound.protocol, k)]
            assert len(different) == 1 and changed.alpha == sound.alpha
    everything = PROTOCOLS["author_code"](sound)
    assert everything.alpha == 0.99 and everything.scale == "raw" and everything.protocol.deviation == "kl"


@pytest.mark.data
@pytest.mark.slow
def test_cifar10_goes_through_the_same_code(real_data, tmp_path):
    """Real colour pictures, ResNet-18 with both stems, and a detector of each kind."""
    from reproduction.cells import Cell, cells_of

    cells = [Cell("cifar10", "smoke", 0, detector, "fixed", "cost", 0) for detector in ("same", "edm")]
    cells += [c for c in cells_of("cifar10", "smoke", [0], ["table3"]) if c.detector.startswith("victim")]
    cells += [Cell("cifar10", "smoke", 0, "same", "fixed", "knockoff", 250)]
    found = {cell.detector + cell.attack: measure.measure(cell, tmp_path) for cell in cells}
    stems = [found[f"victim, resnet18{stem}cost"]["measured"][0] for stem in ("", "-imagenet")]
    assert stems[0]["victim_seconds"] > stems[1]["victim_seconds"], "the stem without stride has more to compute"
    assert all(0.1 <= cost["victim_accuracy"] <= 1 for cost in stems)
    assert found["edmcost"]["measured"][0]["parameters"] > 40_000_000, "five ResNets instead of one"
    assert {r["alpha"] for r in found["sameknockoff"]["measured"]} == set(measure.ALPHAS)
