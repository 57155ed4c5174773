"""Measures the cells that are missing, one after another or on a Ray cluster, and keeps each as soon as it is there."""

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from reproduction.cells import Cell
from reproduction.measure import measure
from reproduction.results import append_rows, code_version, load_cells, repository_results, results_folder
from samelib.data.groups import load_group

WORKERS = ("serial", "ray")


class CellError(RuntimeError):
    """A cell could not be measured; the message names it and its log. All others are kept."""


def result_path(group: str, folder: Path | str | None = None, part: str = "") -> Path:
    """FOLDER/GROUP.jsonl, or FOLDER/GROUP-PART.jsonl; without a folder that of the checkout, or else results/ here, begun
    with the published rows."""
    name = f"{group}-{part}.jsonl" if part else f"{group}.jsonl"
    if folder or repository_results():
        return Path(folder or repository_results()) / name
    path, published = Path("results") / name, results_folder() / name
    if published.is_file() and not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(published.read_bytes())
    return path


def missing(cells: Sequence[Cell], path: Path) -> list[Cell]:
    """The cells that have no row in the file."""
    there = {row["cell"] for row in load_cells(path)}
    return [cell for cell in cells if str(cell) not in there]


def check_code(path: Path, tier: str) -> None:
    """Raises ValueError when the rows of this tier were measured with other code than this."""
    for row in load_cells(path):
        if row["tier"] == tier and row["code"] != code_version():
            raise ValueError(
                f"{path} holds rows of the {tier} tier that other code measured (commit {row['commit']}, {row['code']}; "
                f"this is {code_version()}); measure into another folder (--results FOLDER), or check out that commit"
            )


def check_data(path: Path, group: str, tier: str) -> None:
    """Raises ValueError when the rows of this tier were measured on other data than what the group holds now."""
    known = {row["data"] for row in load_cells(path) if row["tier"] == tier}
    found = load_group(group, tier).fingerprint if known else None
    if known - {found}:
        raise ValueError(
            f"{path} holds rows of the {tier} tier that were measured on other images (fingerprint {known.pop()[:12]}, "
            f"{group} is now {found[:12]}); measure into another folder (--results FOLDER), or restore the data"
        )


def estimates(cells: Iterable[Cell], path: Path) -> list[float | None]:
    """Seconds that each cell will take, from rows of the like: the same cell of other seeds, here or published, or of
    another group of this tier; None where there is none."""
    rows = load_cells(path) or [r for p in sorted(results_folder().glob("*.jsonl")) for r in load_cells(p)]
    known: dict[tuple, list[float]] = {}
    for row in rows:
        if "cell" in row:
            cell = Cell(*(row[name] for name in Cell._fields))
            for key in (_kind(cell), _kind(cell)[1:]):
                known.setdefault(key, []).append(row["seconds"])
    found = [known.get(_kind(cell)) or known.get(_kind(cell)[1:]) for cell in cells]
    return [statistics.median(seconds) if seconds else None for seconds in found]


def _kind(cell: Cell) -> tuple:
    return cell.group, cell.tier, cell.detector, cell.protocol, cell.attack, cell.budget


def plan(cells: Sequence[Cell], path: Path) -> str:
    """What `run` would do, by detector, with the estimated minutes."""
    todo = missing(cells, path)
    lines = [f"{path}: {len(cells)} cells, {len(cells) - len(todo)} there, {len(todo)} to measure"]
    seconds = dict(zip(todo, estimates(todo, path), strict=True))
    for detector in dict.fromkeys(cell.detector for cell in todo):
        part = [cell for cell in todo if cell.detector == detector]
        lines.append(f"  {detector:24} {len(part):5} cells  {_minutes([seconds[cell] for cell in part])}")
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
        ValueError: rows that are there come from other code or data, or were edited; unknown workers.
        CellError: a worker died twice on a cell, or a cell failed; the others are kept.
    """
    if workers not in WORKERS:
        raise ValueError(f"workers must be {' or '.join(WORKERS)}, got {workers!r}")
    todo = missing(cells, path)
    if not todo:
        return 0
    check_code(path, todo[0].tier)
    check_data(path, todo[0].group, todo[0].tier)
    expected = estimates(todo, path)
    usual = statistics.median([s for s in expected if s is not None] or [1.0])
    weight = {cell: usual if s is None else s for cell, s in zip(todo, expected, strict=True)}
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"  # time to finish: by expected seconds
    with tqdm(total=sum(weight.values()), desc=f"{len(todo)} cells", bar_format=layout) as bar:
        how = _serial if workers == "serial" else _ray
        for done, (cell, row) in enumerate(how(todo, path, cache, measure), 1):
            append_rows(path, [row])
            bar.update(weight[cell])
            bar.set_description(f"{done} of {len(todo)} cells", refresh=False)
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
    place = {cell: [c for c in todo if c.seed == cell.seed].index(cell) for cell in todo}
    waiting = {}  # seeds take turns, so that workers rarely wait for a model that another one is training
    for cell in sorted(todo, key=place.__getitem__):
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
