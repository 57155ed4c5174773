"""Measures the cells that are missing, one after another or on a Ray cluster, and keeps each as soon as it is there."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

from reproduction import accounts, adaptive, bans, cost, curve, detection, responses
from reproduction.lab import Bench, group_of
from reproduction.plan import AttackVariant, Cell, DetectorVariant
from reproduction.rows import RESULTS, append_rows, load_cells, provenance
from samelib.memory import give_back_freed_memory
from samelib.store import MEASUREMENT, ArtifactStore

WORKERS = ("serial", "ray")
EXPERIMENTS = {
    "detection": detection.measure,
    "accounts": accounts.measure,
    "cost": cost.measure,
    "curve": curve.measure,
    "responses": responses.measure,
    "adaptive": adaptive.measure,
    "bans": bans.measure,
}


class CellError(RuntimeError):
    """A cell could not be measured; the message names it and its log. All others are kept."""


# One cell


def measure(cell: Cell, cache: Path | None = None) -> dict:
    """The result row of a cell: its names, its readings under `measured`, its provenance."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        bench = _bench(cell.group, cell.tier, cell.seed, cache)
        measured = list(EXPERIMENTS[cell.experiment](bench, cell))
    device, seconds = bench.group.victim_train.device, time.perf_counter() - start
    origin = provenance(device, bench.group.fingerprint, cell.seed, cell.tier, seconds, memory.peak)
    return {"cell": str(cell)} | cell.fields() | {"measured": measured} | origin


@lru_cache(maxsize=1)  # cells of one seed follow one another
def _bench(group: str, tier: str, seed: int, cache: Path | None) -> Bench:
    return Bench(group, tier, seed, ArtifactStore(cache))


class PeakMemory:
    """The most memory that is held within a `with` block: of the GPU where there is one, else of this process.

    Attributes:
        peak: bytes; None where the system does not let it be measured anew (Linux does).
    """

    peak: int | None = None

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_freed_memory()  # what an earlier cell held is not this one's
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
                self.peak = 0
        return self

    def __exit__(self, *_) -> None:
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        elif self.peak is not None:
            status = Path("/proc/self/status").read_text()
            self.peak = 1024 * int(status.split("VmHWM:")[1].split()[0])


# All cells


def result_path(group: str, folder: Path | str | None = None, part: str = "") -> Path:
    """FOLDER/GROUP.jsonl, or FOLDER/GROUP-PART.jsonl; without a folder that of the checkout, or else results/ here, begun
    with the published rows."""
    name = f"{group}-{part}.jsonl" if part else f"{group}.jsonl"
    if folder or (RESULTS.parents[1] / "pyproject.toml").is_file():
        return Path(folder or RESULTS) / name
    path = Path("results") / name
    if (RESULTS / name).is_file() and not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((RESULTS / name).read_bytes())
    return path


def missing(cells: Sequence[Cell], path: Path) -> list[Cell]:
    """The cells that have no row in the file."""
    there = {row["cell"] for row in load_cells(path)}
    return [cell for cell in cells if str(cell) not in there]


def check_rows(path: Path, group: str, tier: str) -> None:
    """Raises ValueError when rows of this tier cannot stand beside new ones: measured by code that gives other figures,
    or on other data than the group holds now."""
    rows = [row for row in load_cells(path) if row["tier"] == tier]
    data = group_of(group, tier).fingerprint if rows else None
    for row in rows:
        if row["measurement"] != MEASUREMENT:
            raise ValueError(
                f"{path} holds rows of the {tier} tier of MEASUREMENT {row['measurement']} (commit {row['commit']}), "
                f"this code's is {MEASUREMENT}; measure into another folder (--results FOLDER), or check out that commit"
            )
        if row["data"] != data:
            raise ValueError(
                f"{path} holds rows of the {tier} tier that were measured on other images (fingerprint "
                f"{row['data'][:12]}, {group} is now {data[:12]}); measure into another folder (--results FOLDER), "
                "or restore the data"
            )


def estimates(cells: Iterable[Cell], path: Path) -> list[float | None]:
    """Seconds that each cell will take, from rows of the like: the same cell of other seeds, here or published, or of
    another group of this tier; None where there is none."""
    known: dict[tuple, list[float]] = {}
    for row in load_cells(path) or [row for file in sorted(RESULTS.glob("*.jsonl")) for row in load_cells(file)]:
        if "cell" in row:
            for key in _likeness(row):
                known.setdefault(key, []).append(row["seconds"])
    alike = [next((known[key] for key in _likeness(c.fields()) if key in known), []) for c in cells]
    return [statistics.median(seconds) if seconds else None for seconds in alike]


def _likeness(fields: dict) -> list[tuple]:
    """What the rows of a cell's like have in common: with the same group, and without."""
    names = ("tier", "experiment", *DetectorVariant._fields, *AttackVariant._fields)
    names += ("budget", "response", "transport", "accounts")
    key = tuple(fields.get(name) for name in names)
    return [(fields["group"], *key), key]


def describe(cells: Sequence[Cell], path: Path) -> str:
    """What `run` would do, by detector, with the estimated minutes."""
    todo = missing(cells, path)
    lines = [f"{path}: {len(cells)} cells, {len(cells) - len(todo)} there, {len(todo)} to measure"]
    seconds = dict(zip(todo, estimates(todo, path), strict=True))
    for detector in dict.fromkeys(cell.detector for cell in todo):
        part = [cell for cell in todo if cell.detector == detector]
        lines.append(f"  {detector!s:24} {len(part):5} cells  {_minutes([seconds[cell] for cell in part])}")
    if todo:
        lines.append(f"  {'in all':24} {len(todo):5} cells  {_minutes(list(seconds.values()))}")
    return "\n".join(lines)


def _minutes(seconds: list[float | None]) -> str:
    known = [s for s in seconds if s is not None]
    new = f"{len(seconds) - len(known)} cells never measured before"
    if not known:
        return new
    return f"about {sum(known) / 60:6.1f} min" + (f", {new}" if len(known) < len(seconds) else "")


def run(
    cells: Sequence[Cell],
    path: Path,
    workers: str = "serial",
    cache: Path | None = None,
    measure: Callable[[Cell, Path | None], dict] = measure,
) -> int:
    """Measures the cells that are missing and adds their rows to the file, each as soon as it is measured.

    Args:
        cells: of one group and tier.
        workers: "serial", or "ray": on the Ray cluster that RAY_ADDRESS names, or one of this machine.
        cache: the folder of the artifact store.
        measure: what is done for a cell.

    Returns:
        how many cells were measured.

    Raises:
        ValueError: rows that are there are of another MEASUREMENT or other data, or were edited; unknown workers.
        CellError: a worker died twice on a cell, or a cell failed; the others are kept.
    """
    if workers not in WORKERS:
        raise ValueError(f"workers must be {' or '.join(WORKERS)}, got {workers!r}")
    todo = missing(cells, path)
    if not todo:
        return 0
    check_rows(path, todo[0].group, todo[0].tier)
    measured = (_serial if workers == "serial" else _ray)(todo, path, cache, measure)
    with tqdm(measured, total=len(todo), unit="cell") as bar:
        for cell, row in bar:
            append_rows(path, [row])
            bar.set_postfix_str(str(cell))
    return len(todo)


def _serial(todo: Sequence[Cell], path: Path, cache: Path | None, measure) -> Iterator[tuple[Cell, dict]]:
    for cell in todo:
        yield cell, measure(cell, cache)


def _ray(todo: Sequence[Cell], path: Path, cache: Path | None, measure) -> Iterator[tuple[Cell, dict]]:
    """Ray runs a cell whose worker died once more; what failed then is reported after all others are done."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--workers ray needs Ray: pip install 'samelib[scale]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(max_retries=1, num_cpus=1, num_gpus=gpus)(_logged)
    turn = {cell: [c for c in todo if c.seed == cell.seed].index(cell) for cell in todo}
    waiting = {}  # seeds take turns, so that workers rarely wait for a model that another one is training
    for cell in sorted(todo, key=turn.__getitem__):
        waiting[task.remote(measure, cell, cache, _log_file(path, cell))] = cell
    failed = []
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting))
        cell = waiting.pop(ready)
        try:
            row = ray.get(ready)
        except ray.exceptions.RayError as error:
            failed.append(_report(cell, error, _log_file(path, cell)))
        else:
            yield cell, row
    if failed:
        raise CellError(f"{len(failed)} of {len(todo)} cells failed, the others are kept:\n" + "\n".join(failed))


def _logged(measure, cell: Cell, cache: Path | None, log: Path) -> dict:
    """Measures a cell in a worker, with all that it says in a file of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        print(f"{cell}: begins")
        row = measure(cell, cache)
    log.unlink()
    return row


def _log_file(path: Path, cell: Cell) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in str(cell))
    return path.resolve().parent / "logs" / f"{name}.log"


def _report(cell: Cell, error: Exception, log: Path) -> str:
    tail = log.read_text().strip().splitlines()[-5:] if log.is_file() else ["(on the machine where the worker ran)"]
    reason = str(error).strip().splitlines()[-1]
    return f"{cell}: {reason}\n  log: {log}\n" + "\n".join(f"  | {line}" for line in tail)
