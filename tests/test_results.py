import shutil
from pathlib import Path

import pytest
import torch

import samelib
from reproduction import results, run
from reproduction.readme import readme_tables
from reproduction.results import append_rows, code_version, load_cells, load_rows, provenance, reported
from reproduction.run import make_attack
from samelib.presets import TIERS, preset

PROVENANCE = {
    "samelib", "commit", "code", "torch", "device", "machine", "data", "seed", "tier", "seconds", "peak_mib", "when",
}  # fmt: skip


def test_rows_come_back_and_are_filtered(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [{"attack": "noise", "auroc": 1.0}])
    append_rows(path, [{"attack": "knockoff", "auroc": 0.5}])
    assert [r["auroc"] for r in load_rows(path=path)] == [1.0, 0.5]
    assert [r["attack"] for r in load_rows(path=path, attack="noise")] == ["noise"]


def test_a_cell_is_one_line_and_its_readings_are_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(
        path, [{"cell": "a", "attack": "jbda", "measured": [{"auroc": 0.1}, {"auroc": 0.2, "attack": "other"}]}]
    )
    assert len(load_cells(path)) == 1
    assert [(r["cell"], r["attack"], r["auroc"]) for r in load_rows(path=path)] == [
        ("a", "jbda", 0.1),
        ("a", "other", 0.2),
    ]
    assert load_rows(path=path, attack="other")[0]["auroc"] == 0.2


def test_a_cell_is_not_kept_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"cell": "a", "auroc": 0.1}])
    append_rows(path, [{"cell": "a", "auroc": 0.9}, {"cell": "b", "auroc": 0.2}])
    assert [(r["cell"], r["auroc"]) for r in load_cells(path)] == [("a", 0.1), ("b", 0.2)]


def test_rows_are_added_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"cell": "a"}])
    before = path.read_bytes()
    monkeypatch.setattr(results.os, "replace", lambda *how: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        append_rows(path, [{"cell": "b"}])
    assert path.read_bytes() == before and not list(tmp_path.glob(".part-*"))


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of samelib's sources that `code_version` looks at instead."""
    shutil.copytree(Path(samelib.__file__).parent, tmp_path / "samelib")
    monkeypatch.setattr(samelib, "__file__", str(tmp_path / "samelib" / "__init__.py"))
    return tmp_path / "samelib"


@pytest.mark.parametrize(
    ("file", "old", "new", "another"),
    [
        ("attacks/jbda.py", "LEVEL = 2 / 255", "LEVEL = 3 / 255", True),
        ("detectors/same.py", "BATCH = 256", "BATCH = 256  # a comment", False),
        ("metrics.py", '"""AUROC, AUPR', '"""Another docstring: AUROC, AUPR', False),
        ("experiments/config.py", "budgets=(1_000, 4_000)", "budgets=(1_000, 5_000)", True),
        ("experiments/report.py", '"fpr90": "FPR90"', '"fpr90": "FPR at 90"', False),
        ("training.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.99)", True),
    ],
)
def test_the_code_version_follows_what_decides_a_number(sources, file, old, new, another):
    before = code_version.__wrapped__()
    text = (sources / file).read_text()
    assert old in text
    (sources / file).write_text(text.replace(old, new))
    assert (code_version.__wrapped__() != before) == another


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
        assert set(row) >= (PROVENANCE if "cell" in row else PROVENANCE - {"code"})
        assert "cell" in row or "benchmark" in row
        assert row["commit"] and not row["commit"].endswith("-changed")


def test_the_readme_says_what_the_rows_say():
    readme = (results.repository_results().parent / "README.md").read_text()
    for table in readme_tables():
        assert table in readme, "put the output of `python -m reproduction.readme` into README.md"


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


def test_a_long_log_is_measured_at_even_distances():
    log = torch.arange(1000)[:, None]
    assert run.evenly(log, 4)[:, 0].tolist() == [0, 333, 666, 999]
    assert run.evenly(log, 1000) is log
