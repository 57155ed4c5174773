"""The grid's bookkeeping, with a stand-in for the measuring: what is run, kept, resumed, refused and reported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reproduction import run
from reproduction.plan import KNOCKOFF, SAME, Cell, cells_of
from reproduction.rows import append_rows, load_cells
from samelib.memory import keep_freed_memory
from samelib.store import MEASUREMENT

DATA = "no fingerprint"


def row(cell: Cell, seconds: float = 2.0, **more) -> dict:
    origin = {"seconds": seconds, "measurement": MEASUREMENT, "commit": "abc", "data": DATA}
    return {"cell": str(cell)} | cell.fields() | {"measured": [{"auroc": 0.5}]} | origin | more


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """The fingerprint of the group without loading it."""
    monkeypatch.setattr(run, "group_of", lambda *_: type("Group", (), {"fingerprint": DATA}))


@pytest.fixture
def cells() -> list[Cell]:
    return cells_of("glyphs", "smoke", [0], ["figure5"])


# Measuring, keeping, resuming


def test_only_what_is_missing_is_measured(cells, tmp_path):
    path, asked = tmp_path / "glyphs.jsonl", []

    def measure(cell, cache):
        asked.append(cell)
        return row(cell)

    append_rows(path, [row(cells[2])])
    assert run.run(cells, path, measure=measure) == len(cells) - 1
    assert asked == [c for c in cells if c != cells[2]]
    assert sorted(r["cell"] for r in load_cells(path)) == sorted(map(str, cells))
    assert run.run(cells, path, measure=None) == 0, "a finished grid asks for nothing"


def test_a_failure_keeps_what_was_measured(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"

    def measure(cell, cache):
        if cell == cells[3]:
            raise OSError("no space left")
        return row(cell)

    with pytest.raises(OSError, match="no space left"):
        run.run(cells, path, measure=measure)
    assert [r["cell"] for r in load_cells(path)] == [str(c) for c in cells[:3]]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_run import row
from reproduction import run
from reproduction.plan import cells_of
run.check_rows = lambda *_: None

def measure(cell, cache):
    time.sleep(0.1)
    return row(cell)

run.run(cells_of("glyphs", "smoke", [0], ["all"]), Path(sys.argv[2]), measure=measure)
"""


def test_sigkill_at_any_moment_loses_and_doubles_nothing(tmp_path):
    path = tmp_path / "glyphs.jsonl"
    everything = cells_of("glyphs", "smoke", [0], ["all"])
    environment = os.environ | {"PYTHONPATH": str(Path(run.__file__).parents[1])}
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
    run.run(everything, path, measure=lambda cell, cache: row(cell))
    assert [r["cell"] for r in load_cells(path)] == [str(c) for c in everything]


def test_rows_of_another_measurement_are_refused(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(cells[0], measurement=MEASUREMENT - 1, commit="feed")])
    with pytest.raises(ValueError, match=rf"of MEASUREMENT {MEASUREMENT - 1} \(commit feed\).*--results FOLDER"):
        run.run(cells, path, measure=None)
    assert run.run(cells[:1], path, measure=None) == 0, "what is complete may be drawn"
    other_tier = cells_of("glyphs", "lecture", [0], ["figure1"])
    assert run.run(other_tier, path, measure=lambda cell, cache: row(cell)) == len(other_tier)


def test_rows_of_other_data_are_refused(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(cells[0], data="0" * 64)])
    with pytest.raises(ValueError, match="measured on other images .*restore the data"):
        run.run(cells, path, measure=None)


def test_an_edited_row_is_refused(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(cell) for cell in cells[:2]])
    path.write_text(path.read_text().replace('"auroc": 0.5', '"auroc": 0.6', 1))
    with pytest.raises(ValueError, match="glyphs.jsonl, row 1: not as it was written; delete that line"):
        run.run(cells, path, measure=None)


def test_unknown_workers_are_refused(cells, tmp_path):
    with pytest.raises(ValueError, match="workers must be serial or ray, got 'slurm'"):
        run.run(cells, tmp_path / "glyphs.jsonl", "slurm")


def test_an_installed_samelib_begins_with_the_published_rows(cells, tmp_path, monkeypatch):
    (tmp_path / "published").mkdir()
    append_rows(tmp_path / "published" / "glyphs.jsonl", [row(cell) for cell in cells])
    monkeypatch.setattr(run, "RESULTS", tmp_path / "published")
    monkeypatch.chdir(tmp_path)
    path = run.result_path("glyphs")
    assert path == Path("results/glyphs.jsonl") and run.run(cells, path, measure=None) == 0
    assert run.result_path("shapes") == Path("results/shapes.jsonl"), "nothing published: it begins empty"
    assert run.result_path("glyphs", "elsewhere") == Path("elsewhere/glyphs.jsonl")


# The plan


def test_the_plan_adds_up_what_the_like_took(cells, tmp_path):
    path = tmp_path / "glyphs.jsonl"
    append_rows(path, [row(c, seconds=60.0 * (1 + c.seed)) for c in cells_of("glyphs", "smoke", [1, 3], ["figure5"])])
    assert run.estimates(cells, path) == [180.0] * len(cells), "the median of seeds 1 (120 s) and 3 (240 s)"
    text = run.describe(cells, path)
    assert f"{len(cells)} cells, 0 there, {len(cells)} to measure" in text
    assert f"in all                   {len(cells):5} cells  about {3.0 * len(cells):6.1f} min" in text
    append_rows(path, [row(cells[0])])
    assert f"{len(cells)} cells, 1 there, {len(cells) - 1} to measure" in run.describe(cells, path)


def test_a_plan_says_what_it_cannot_know(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert f"{len(cells)} cells never measured before" in run.describe(cells, tmp_path / "glyphs.jsonl")


# Memory


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not forget a peak")
def test_a_small_cell_does_not_report_the_peak_of_a_large_one():
    keep_freed_memory()  # as every training does
    with run.PeakMemory() as large:
        torch.ones(100, 2**20)  # 400 MiB
    with run.PeakMemory() as small:
        torch.ones(1, 2**20)
    assert large.peak - small.peak > 300 * 2**20


def test_where_a_peak_cannot_be_forgotten_none_is_reported(monkeypatch):
    monkeypatch.setattr(run, "Path", lambda name: Path("/proc/none") / name.strip("/"))
    with run.PeakMemory() as memory:
        pass
    assert memory.peak is None


# On a Ray cluster


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # beside other tests the start takes long
    ray = pytest.importorskip("ray")
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(run.__file__).parents[1]), str(Path(__file__).parent)])}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_measure_what_one_process_does(cluster, tmp_path):
    """Real cells: the rows are equal but for when, where and how long."""
    cells = [Cell("detection", "glyphs", "smoke", seed, SAME, KNOCKOFF, 250) for seed in (0, 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray's workers have: sums are rounded in another order by two threads
    try:
        run.run(cells, tmp_path / "serial" / "glyphs.jsonl", cache=tmp_path / "cache-serial")
    finally:
        torch.set_num_threads(before)
    run.run(cells, tmp_path / "ray" / "glyphs.jsonl", "ray", cache=tmp_path / "cache-ray")
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

    with pytest.raises(run.CellError) as failure:
        run.run(cells, path, "ray", measure=measure)
    assert f"1 of {len(cells)} cells failed, the others are kept" in str(failure.value)
    assert always in str(failure.value) and "| about to measure" in str(failure.value)
    assert {r["cell"] for r in load_cells(path)} == {str(c) for c in cells} - {always}
    assert sorted(p.name for p in marks.iterdir() if p.name[0] in "01") == ["0-0", "0-1", "1-0", "1-1"]
    assert len(list((tmp_path / "logs").iterdir())) == 1, "the log of the cell that failed is kept"


def test_without_ray_the_remedy_is_named(cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'samelib\[scale\]'"):
        run.run(cells, tmp_path / "glyphs.jsonl", "ray")
