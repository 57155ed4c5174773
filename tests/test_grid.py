"""The grid's bookkeeping, with a stand-in for the measuring: what is run, kept, resumed, refused and reported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reproduction import grid
from reproduction.cells import TARGETS, Cell, cells_of, check_names
from reproduction.results import append_rows, code_version, load_cells
from samelib.presets import preset_for

DATA = "no fingerprint"


def row(cell: Cell, seconds: float = 2.0, **more) -> dict:
    origin = {"seconds": seconds, "code": code_version(), "commit": "abc", "data": DATA}
    return {"cell": str(cell)} | cell._asdict() | {"measured": [{"auroc": 0.5}]} | origin | more


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """The fingerprint of the group without loading it."""
    monkeypatch.setattr(grid, "load_group", lambda *how: type("Group", (), {"fingerprint": DATA}))


@pytest.fixture
def cells() -> list[Cell]:
    return cells_of("glyphs", "smoke", [0], ["figure5"])


# What there is to measure


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_cells_of_its_own_names(target):
    group = "shapes" if target == "table2" else "glyphs"
    found = cells_of(group, "smoke", [0, 1], [target])
    assert len(found) == len(set(found)) == 2 * len([c for c in found if c.seed == 0]) > 0


def test_all_is_every_target_of_the_group_once():
    everything = cells_of("glyphs", "lecture", [0], ["all"])
    assert len(set(everything)) == len(everything)
    for target in TARGETS:
        if target != "table2":
            assert set(cells_of("glyphs", "lecture", [0], [target])) <= set(everything)
    assert {c.budget for c in everything} == {0, 1_000, 4_000, 200_000}


def test_a_detectors_cells_lie_together():
    """So that nothing is trained, or read from the disk, twice."""
    keys = [(c.seed, c.detector, c.protocol) for c in cells_of("glyphs", "smoke", [0, 1], ["all"])]
    changes = sum(a != b for a, b in zip(keys, keys[1:], strict=False))
    assert changes == len(set(keys)) - 1


def test_the_audit_has_each_fault_alone_and_all_together():
    protocols = {c.protocol for c in cells_of("glyphs", "smoke", [0], ["audit"])}
    assert {"fixed", "author_code", "KL deviation", "trained on labels", "interpolated ROC"} <= protocols


def test_the_colour_groups_compare_both_stems():
    detectors = {c.detector for c in cells_of("shapes", "smoke", [0], ["table3"])}
    assert {"victim, resnet18", "victim, resnet18-imagenet"} < detectors
    assert not any(c.detector.startswith("victim") for c in cells_of("glyphs", "smoke", [0], ["table3"]))


@pytest.mark.parametrize(
    ("group", "tier", "target", "words"),
    [
        ("letters", "smoke", "table1", "unknown group 'letters'; the grid knows glyphs, shapes, mnist, cifar10"),
        ("glyphs", "huge", "table1", "unknown tier 'huge'; known: smoke, lecture, paper"),
        ("glyphs", "smoke", "table9", "unknown table or figure 'table9'; known: table1, .*, all"),
        ("glyphs", "smoke", "table2", "table2 is a table of --data cifar10 or shapes; for glyphs take table1"),
        ("cifar10", "smoke", "table1", "for cifar10 take table2"),
    ],
)
def test_unknown_names_are_refused(group, tier, target, words):
    with pytest.raises(ValueError, match=words):
        check_names(group, tier, [target])


def test_widths_of_the_embedding_include_the_tiers_own():
    for tier in ("smoke", "lecture", "paper"):
        settings = preset_for(tier, False, 60_000)
        assert settings.same.mae.width in settings.widths
        assert all(w % settings.same.mae.heads == 0 for w in settings.widths)


# Measuring, keeping, resuming


def test_only_what_is_missing_is_measured(cells, tmp_path):
    path, asked = tmp_path / "glyphs.jsonl", []

    def measure(cell, cache):
        asked.append(cell)
        return row(cell)

    append_rows(path, [row(cells[2])])
    assert grid.run(cells, path, measure=measure) == len(cells) - 1
    assert asked == [c for c in cells if c != cells[2]]
    assert sorted(r["cell"] for r in load_cells(path)) == sorted(map(str, cells))
    assert grid.run(cells, path, measure=None) == 0, "a finished grid asks for nothing"


def test_a_failure_keeps_what_was_measured(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"

    def measure(cell, cache):
        if cell == cells[3]:
            raise OSError("no space left")
        return row(cell)

    with pytest.raises(OSError, match="no space left"):
        grid.run(cells, path, measure=measure)
    assert [r["cell"] for r in load_cells(path)] == [str(c) for c in cells[:3]]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_grid import row
from reproduction import grid
from reproduction.cells import cells_of
grid.check_data = lambda *how: None

def measure(cell, cache):
    time.sleep(0.1)
    return row(cell)

grid.run(cells_of("glyphs", "smoke", [0], ["all"]), Path(sys.argv[2]), measure=measure)
"""


def test_sigkill_at_any_moment_loses_and_doubles_nothing(tmp_path):
    path = tmp_path / "glyphs.jsonl"
    everything = cells_of("glyphs", "smoke", [0], ["all"])
    environment = os.environ | {"PYTHONPATH": str(Path(grid.__file__).parents[2])}
    for more in (3, 4):  # killed twice, on the way
        before = len(load_cells(path))
        words = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path)]
        process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        while len(load_cells(path)) < before + more:  # at every moment the file is whole
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert before + more <= len(load_cells(path)) < len(everything)
    grid.run(everything, path, measure=lambda cell, cache: row(cell))
    assert [r["cell"] for r in load_cells(path)] == [str(c) for c in everything]


def test_rows_of_other_code_are_refused(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(cells[0], code="0123456789ab", commit="feed")])
    with pytest.raises(ValueError, match=r"other code measured \(commit feed, 0123456789ab.*--results FOLDER"):
        grid.run(cells, path, measure=None)
    assert grid.run(cells[:1], path, measure=None) == 0, "what is complete may be drawn"
    other_tier = cells_of("glyphs", "lecture", [0], ["figure1"])
    assert grid.run(other_tier, path, measure=lambda cell, cache: row(cell)) == len(other_tier)


def test_rows_of_other_data_are_refused(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(cells[0], data="0" * 64)])
    with pytest.raises(ValueError, match="measured on other images .*restore the data"):
        grid.run(cells, path, measure=None)


def test_an_edited_row_is_refused(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(cell) for cell in cells[:2]])
    path.write_text(path.read_text().replace('"auroc": 0.5', '"auroc": 0.6', 1))
    with pytest.raises(ValueError, match="glyphs.jsonl, row 1: not as samelib wrote it; delete that line"):
        grid.run(cells, path, measure=None)


def test_unknown_workers_are_refused(cells, tmp_path):
    with pytest.raises(ValueError, match="workers must be serial or ray, got 'slurm'"):
        grid.run(cells, tmp_path / "glyphs.jsonl", "slurm")


def test_an_installed_samelib_begins_with_the_published_rows(cells, tmp_path, monkeypatch):
    (tmp_path / "published").mkdir()
    append_rows(tmp_path / "published" / "glyphs.jsonl", [row(cell) for cell in cells])
    monkeypatch.setattr(grid, "repository_results", lambda: None)
    monkeypatch.setattr(grid, "results_folder", lambda: tmp_path / "published")
    monkeypatch.chdir(tmp_path)
    path = grid.result_path("glyphs")
    assert path == Path("results/glyphs.jsonl") and grid.run(cells, path, measure=None) == 0
    assert grid.result_path("shapes") == Path("results/shapes.jsonl"), "nothing published: it begins empty"
    assert grid.result_path("glyphs", "elsewhere") == Path("elsewhere/glyphs.jsonl")


# The plan


def test_the_plan_adds_up_what_the_like_took(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(c, seconds=60.0 * (1 + c.seed)) for c in cells_of("glyphs", "smoke", [1, 3], ["figure5"])])
    assert grid.estimates(cells, path) == [180.0] * len(cells), "the median of seeds 1 (120 s) and 3 (240 s)"
    text = grid.plan(cells, path)
    assert f"{len(cells)} cells, 0 there, {len(cells)} to measure" in text
    assert f"in all                   {len(cells):5} cells  about {3.0 * len(cells):6.1f} min" in text
    append_rows(path, [row(cells[0])])
    assert f"{len(cells)} cells, 1 there, {len(cells) - 1} to measure" in grid.plan(cells, path)


def test_a_plan_says_what_it_cannot_know(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "results_folder", lambda: tmp_path)
    assert f"{len(cells)} cells never measured before" in grid.plan(cells, tmp_path / "glyphs.jsonl")


# On a Ray cluster


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(grid.__file__).parents[2]), str(Path(__file__).parent)])}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_measure_what_one_process_does(cluster, tmp_path):
    """Real cells: the rows are equal but for when, where and how long."""
    import torch

    cells = [c for c in cells_of("glyphs", "smoke", [0, 1], ["figure1"]) if c.detector == "same"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray's workers have: sums are rounded in another order by two threads
    try:
        grid.run(cells, tmp_path / "serial" / "glyphs.jsonl", cache=tmp_path / "cache-serial")
    finally:
        torch.set_num_threads(before)
    grid.run(cells, tmp_path / "ray" / "glyphs.jsonl", "ray", cache=tmp_path / "cache-ray")
    serial, parallel = (
        {r["cell"]: r["measured"] for r in load_cells(tmp_path / kind / "glyphs.jsonl")} for kind in ("serial", "ray")
    )
    assert len(serial) == 2 and serial == parallel


@pytest.mark.slow
def test_a_worker_that_dies_has_its_cell_run_again_once(cluster, cells, tmp_path):
    path, marks = tmp_path / "glyphs.jsonl", tmp_path / "marks"
    marks.mkdir()
    once, always = str(cells[0]), str(cells[1])

    def measure(cell, cache):
        tries = len(list(marks.glob(f"{cells.index(cell)}-*")))
        (marks / f"{cells.index(cell)}-{tries}").touch()
        print("about to measure", flush=True)
        if str(cell) == always or (str(cell) == once and tries == 0):
            os._exit(9)
        return row(cell)

    with pytest.raises(grid.CellError) as failure:
        grid.run(cells, path, "ray", measure=measure)
    assert f"1 of {len(cells)} cells failed, the others are kept" in str(failure.value)
    assert always in str(failure.value) and "| about to measure" in str(failure.value)
    assert {r["cell"] for r in load_cells(path)} == {str(c) for c in cells} - {always}
    assert sorted(p.name for p in marks.iterdir() if p.name[0] in "01") == ["0-0", "0-1", "1-0", "1-1"]
    assert len(list((tmp_path / "logs").iterdir())) == 1, "the log of the cell that failed is kept"


def test_without_ray_the_remedy_is_named(cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'samelib\[scale\]'"):
        grid.run(cells, tmp_path / "glyphs.jsonl", "ray")
