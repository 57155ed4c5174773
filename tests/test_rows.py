import re
import shutil

import pytest

from reproduction import rows
from reproduction.plan import DEFAULTS
from reproduction.rows import RESULTS, append_rows, as_frame, load_cells, load_rows, provenance, reported
from reproduction.tables import change, select, spread
from samelib.store import MEASUREMENT

PROVENANCE = {
    "samelib", "commit", "clean", "measurement", "torch", "device", "machine", "data", "seed", "tier", "seconds",
    "peak_mib", "when",
}  # fmt: skip


def cell(name: str, **fields) -> dict:
    names = {"cell": name, "group": "mnist", "tier": "lecture", "seed": 0, "detector": "same", "attack": "knockoff"}
    return names | {"measurement": MEASUREMENT, "data": "d"} | fields


# The file


def test_lines_come_back(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [{"attack": "noise", "auroc": 1.0}])
    append_rows(path, [{"attack": "knockoff", "auroc": 0.5}])
    assert [r["auroc"] for r in load_cells(path)] == [1.0, 0.5]


def test_a_cell_is_not_kept_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"cell": "a", "auroc": 0.1}])
    append_rows(path, [{"cell": "a", "auroc": 0.9}, {"cell": "b", "auroc": 0.2}])
    assert [(r["cell"], r["auroc"]) for r in load_cells(path)] == [("a", 0.1), ("b", 0.2)]


def test_rows_are_added_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"cell": "a"}])
    before = path.read_bytes()
    monkeypatch.setattr(rows.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        append_rows(path, [{"cell": "b"}])
    assert path.read_bytes() == before and not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize("edit", [lambda t: t.replace("0.5", "0.9"), lambda t: t[:-20], lambda t: t + "nonsense\n"])
def test_edited_rows_are_refused(tmp_path, edit):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"auroc": 0.25}, {"auroc": 0.5}])
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=r"rows.jsonl, row [23]: not as it was written"):
        load_cells(path)


# The table


def test_each_reading_of_a_cell_is_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    readings = [{"auroc": 0.1}, {"auroc": 0.2, "attack": "jbda", "step": 0.2, "direction": "-", "seeds": "left out"}]
    append_rows(path, [cell("a", measured=readings)])
    frame = load_rows("mnist", "lecture", path)
    assert frame["auroc"].tolist() == [0.1, 0.2] and "measured" not in frame
    assert frame["label"].tolist() == ["knockoff", "jbda, direction -, step 0.2, seeds left out"]


def test_a_field_that_a_row_lacks_means_its_default():
    frame = as_frame([cell("a"), cell("b", fault="KL deviation", width=24)])
    assert {name: frame[name].iloc[0] for name in ("fault", "scoring", "transport")} == {
        name: DEFAULTS[name] for name in ("fault", "scoring", "transport")
    }
    assert select(frame, width=None)["cell"].tolist() == ["a"]
    assert select(frame, width=24, fault="KL deviation")["cell"].tolist() == ["b"]


@pytest.mark.parametrize(("field", "words"), [("measurement", "measurements"), ("data", "data")])
def test_rows_of_two_origins_are_not_put_into_one_table(tmp_path, field, words):
    path = tmp_path / "mnist.jsonl"
    append_rows(path, [cell("a"), cell("b", **{field: 99})])
    with pytest.raises(ValueError, match=f"rows of mnist come from different {words}.*measure them again"):
        load_rows("mnist", "lecture", path)
    append_rows(tmp_path / "tiers.jsonl", [cell("a"), cell("b", tier="smoke", **{field: 99})])
    assert len(load_rows("mnist", path=tmp_path / "tiers.jsonl")) == 2, "tiers have their own"


def test_no_rows_are_an_empty_table(tmp_path):
    assert load_rows("nothing", path=tmp_path / "nothing.jsonl").empty
    assert select(as_frame([]), detector="same").empty


def test_spread_and_change_are_in_percent():
    assert spread([0.5, 0.5, 0.5]) == "50.0 ± 0.0" and spread([0.25]) == "25.0" and spread([]) == "–"
    assert change([0.1]) == "+10.0" and change([-0.1]) == "-10.0" and change([-0.0001]) == "+0.0"
    assert spread([0.5, float("nan")]) == "–", "what was withdrawn has no mean"


# Provenance, and what is published


def test_provenance_is_complete():
    origin = provenance("cpu", "abc", 0, "smoke", 1.0, 3 * 2**20)
    assert set(origin) == PROVENANCE and origin["peak_mib"] == 3 and origin["measurement"] == MEASUREMENT
    assert provenance("cpu", "abc", 0, "smoke", 1.0, None)["peak_mib"] is None


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_row_says_whether_the_code_was_as_committed(tmp_path, monkeypatch):
    package = tmp_path / "reproduction"
    package.mkdir()
    (package / "rows.py").write_text("1")
    monkeypatch.setattr(rows, "__file__", str(package / "rows.py"))
    commit_of = rows._commit.__wrapped__
    assert commit_of() == (None, None), "no checkout"

    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        rows.subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit, clean = commit_of()
    assert re.fullmatch("[0-9a-f]{12}", commit) and clean is True
    (package / "rows.py").write_text("2")
    assert commit_of() == (commit, False)


def test_every_published_row_is_whole():
    files = sorted(RESULTS.glob("*.jsonl"))
    parts = {f"mnist-{part}" for part in ("adaptive", "bans", "controls", "http", "responses", "scaling", "views")}
    parts |= {f"{group}-{part}" for group in ("cifar10", "shapes") for part in ("controls", "views")}
    assert {path.stem for path in files} == {"benchmarks", "cifar10", "mnist", "shapes"} | parts
    for row in (row for path in files for row in load_cells(path)):
        assert set(row) >= PROVENANCE - {"peak_mib"}
        assert "cell" in row or "benchmark" in row
        assert row["commit"] and row["clean"]


def test_the_papers_figures_are_there():
    (row,) = reported("table1_mnist", method="same", attack="knockoff", budget=1000).to_dict("records")
    assert (row["auroc"], row["aupr"], row["fpr95"]) == (99.37, 99.47, 1.3)
    counts = {"table1_mnist": 18, "table2_cifar10": 18, "table3_cifar10": 3, "table4": 12}
    assert {table: len(reported(table)) for table in counts} == counts
