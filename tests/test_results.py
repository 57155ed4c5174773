import json

import pytest
import torch

from samelib.attacks.base import TransferSet
from samelib.attacks.dfme import DFMESettings
from samelib.experiments import results, run
from samelib.experiments.config import DFME_TRAIN, TIERS, Preset, preset
from samelib.experiments.report import attack_table, benchmark_tables
from samelib.experiments.results import append_rows, load_rows, provenance, reported
from samelib.experiments.run import make_attack

PROVENANCE = {"samelib", "commit", "torch", "device", "machine", "data", "seed", "tier", "seconds", "peak_mib", "when"}


def test_rows_come_back_and_are_filtered(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [{"attack": "noise", "auroc": 1.0}])
    append_rows(path, [{"attack": "knockoff", "auroc": 0.5}])
    assert [r["auroc"] for r in load_rows(path=path)] == [1.0, 0.5]
    assert [r["attack"] for r in load_rows(path=path, attack="noise")] == ["noise"]


@pytest.mark.parametrize("change", [lambda t: t.replace("0.5", "0.9"), lambda t: t[:-20], lambda t: t + "nonsense\n"])
def test_edited_rows_are_refused(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"auroc": 0.25}, {"auroc": 0.5}])
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"rows.jsonl, row [23]: not as samelib wrote it"):
        load_rows(path=path)


def test_provenance_is_complete():
    assert set(provenance("cpu", "abc", 0, "smoke", 1.0)) == PROVENANCE


def test_every_published_row_is_whole():
    folder = results.repository_results()
    rows = [row for path in folder.glob("*.jsonl") for row in load_rows(path=path)]
    for row in rows:
        assert set(row) >= PROVENANCE and ("auroc" in row or "benchmark" in row)
        assert row["commit"] and not row["commit"].endswith("-changed")


def test_the_readme_says_what_the_rows_say():
    readme = (results.repository_results().parent / "README.md").read_text()
    for table in (attack_table(), benchmark_tables()):
        assert table in readme, "put the output of `python -m samelib.experiments.report` into README.md"


def test_the_papers_figures_are_there():
    (row,) = reported("table1_mnist", method="same", attack="knockoff", budget=1000)
    assert (row["auroc"], row["aupr"], row["fpr95"]) == (99.37, 99.47, 1.3)
    assert {t: len(reported(t)) for t in ("table1_mnist", "table2_cifar10", "table3_cifar10", "table4")} == {
        "table1_mnist": 18, "table2_cifar10": 18, "table3_cifar10": 3, "table4": 12,
    }  # fmt: skip


def test_presets_know_tier_and_group(group):
    for tier in TIERS:
        assert preset(tier, group).architecture == "conv3"
    assert preset("paper", group).same.mae_train.epochs == 500
    with pytest.raises(ValueError, match="tier must be one of"):
        preset("huge", group)
    with pytest.raises(ValueError, match="attack must be one of noise, knockoff"):
        make_attack("theft", group, preset("smoke", group), 0)


@pytest.fixture
def defence(group, monkeypatch, store):
    from conftest import TINY_SAME, TINY_TRAIN

    train = dict.fromkeys(("victim_train", "substitute_train", "round_train"), TINY_TRAIN)
    how = {"dfme_train": DFME_TRAIN, "dfme": DFMESettings(width=4), "budgets": (50, 100), "dfme_budget": 140}
    tiny = Preset(architecture="conv3", augment=False, same=TINY_SAME, **train, **how)
    monkeypatch.setattr(run, "preset", lambda tier, group: tiny)
    return run.Defence(group, "smoke", 0, store)


def test_an_experiment_gives_a_row_a_cell(defence, tmp_path):
    rows = [row for cell, budget in run.attack_cells(defence.settings) for row in defence.rows(cell, budget)]
    cells = {(r["attack"], r["budget"], r["scoring"], r["alpha"]) for r in rows}
    full, variants, seedless = 4 * 2 + 1, 5 * 2, 5 * 2  # attacks x budgets; DFME has a third budget
    assert len(cells) == len(rows) == 2 * (11 * full + 3 * (variants + seedless))
    assert {r["scoring"] for r in rows} == {"mask 0", "2 passes"}
    assert {r["budget"] for r in rows if r["attack"] == "dfme"} == {50, 100, 140}
    assert all(0 <= r[m] <= 1 for r in rows for m in ("auroc", "aupr", "fpr95", "tpr_at_5%", "substitute_fidelity"))
    append_rows(tmp_path / "rows.jsonl", rows)
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["digest"]


def test_seeds_left_out_are_the_first_queries(defence, monkeypatch):
    """Of 50 queries the first 20 are seeds; what is measured without them are the other 30."""
    scored = []
    for detector in defence.detectors.values():
        monkeypatch.setattr(detector, "terms", lambda x, terms=detector.terms: scored.append(x) or terms(x))
    cell = next(c for c in run.CELLS if c.label == "jbda")
    list(defence.rows(cell, 50))
    assert [len(x) for x in scored] == [50, 50, 30, 30]
    assert torch.equal(scored[0][20:], scored[2]) and torch.equal(scored[0][:20], defence.group.seeds.images)


def test_an_attack_that_stops_early_gives_no_row(defence, monkeypatch):
    monkeypatch.setattr(run.JBDA, "collect", lambda self, service: TransferSet(
        self.seeds.images, service.ask(self.seeds.images), "tired"))  # fmt: skip
    with pytest.raises(RuntimeError, match="jbda, 50 queries: stopped after 20, tired"):
        list(defence.rows(next(c for c in run.CELLS if c.label == "jbda"), 50))


def test_a_long_log_is_measured_at_even_distances():
    log = torch.arange(1000)[:, None]
    assert run.evenly(log, 4)[:, 0].tolist() == [0, 333, 666, 999]
    assert run.evenly(log, 1000) is log


def test_a_second_run_measures_only_what_is_missing(defence, group, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "CELLS", run.CELLS[:1])
    monkeypatch.setattr(run, "load_group", lambda *how: group)
    monkeypatch.setattr(run, "Defence", lambda *how: defence)
    monkeypatch.setattr(run, "repository_results", lambda: tmp_path)
    monkeypatch.setattr("sys.argv", ["run", "--data", "glyphs", "--tier", "smoke", "--seeds", "0"])
    run.main()
    written = (tmp_path / "same_glyphs.jsonl").read_text()
    assert len(written.splitlines()) == 2 * 2 * 11 and "noise, 100 queries, seed 0" in capsys.readouterr().out
    monkeypatch.delattr(run, "Defence")  # nothing is trained or read for it
    run.main()
    assert (tmp_path / "same_glyphs.jsonl").read_text() == written and not capsys.readouterr().out
