"""Result rows: one JSON line a measured cell, with its provenance. Every number in the book is read from here."""

import ast
import hashlib
import importlib.resources
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

import samelib
from samelib.store import json_digest


def repository_results() -> Path | None:
    """The results/ folder of the checkout this samelib was imported from, if it was."""
    folder = Path(samelib.__file__).parent.parent / "results"
    return folder if folder.is_dir() else None


def results_folder():
    """Where the published rows are: the checkout's results/, or what an installed samelib brought along."""
    return repository_results() or importlib.resources.files("samelib.published")


def _digest(row: dict) -> str:
    return json_digest(row, without="digest")[:16]


def provenance(device: str | torch.device, data: str, seed: int, tier: str, seconds: float) -> dict:
    """Where a number comes from: versions, commit, machine class, data, seed, tier, wall seconds, peak memory in MiB.

    `code` is `code_version`, which knows changes that were not committed and ignores those that change no number.

    Models that came from the cache do not count into the seconds.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_memory()
    return {
        "samelib": samelib.__version__,
        "commit": _commit(),
        "code": code_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "data": data,
        "seed": seed,
        "tier": tier,
        "seconds": round(seconds, 1),
        "peak_mib": peak and round(peak / 2**20),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _peak_memory() -> int | None:
    """The most memory this process has held, in bytes; None on Windows, which does not say it this way."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _commit() -> str | None:
    """The checkout's commit, marked where samelib/ differs from it; None outside a checkout."""
    here = Path(samelib.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-changed" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def code_version(attacks_only: bool = False) -> str:
    """A digest of all code of samelib that decides a measured number: whatever its comments and docstrings say.

    Attacks, detectors, models, data, training, the service and measures count; storage, tables, figures and the command
    line do not.

    Args:
        attacks_only: only what decides the queries of an attack on a given victim.
    """
    here = Path(samelib.__file__).parent
    folders = ("attacks", "data", "models") if attacks_only else ("attacks", "data", "detectors", "models", "service")
    modules = () if attacks_only else ("config", "run", "cells", "bench", "measure", "defended")
    files = [*here.glob("*.py"), *(p for f in folders for p in (here / f).glob("*.py"))]
    files += [here / "experiments" / f"{name}.py" for name in modules]
    decisive = sorted(p for p in files if p.stem not in _INDIFFERENT)
    text = json.dumps([[p.relative_to(here).as_posix(), _skeleton(ast.parse(p.read_bytes()))] for p in decisive])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_INDIFFERENT = ("__init__", "artifacts", "cli", "commands", "environment", "plots")


def _skeleton(node):
    """A syntax tree as lists, without docstrings, the same in every Python version."""
    if isinstance(node, list):
        documented = node and isinstance(node[0], ast.Expr) and isinstance(node[0].value, ast.Constant)
        return [_skeleton(n) for n in (node[1:] if documented else node)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [[name, _skeleton(value)] for name, value in ast.iter_fields(node) if value not in (None, [])]
    return [type(node).__name__, *fields]


def append_rows(path: Path | str, rows: Iterable[dict]) -> None:
    """Adds rows to a JSON-lines file, each with a digest of its content: all of them or, if killed on the way, none.

    A row of a cell that is there already is not added again, whoever measured it in the meantime.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        old = path.read_text() if path.exists() else ""
        there = {row["cell"] for row in map(json.loads, old.splitlines()) if "cell" in row}
        new = "".join(json.dumps(row | {"digest": _digest(row)}) + "\n" for row in rows if row.get("cell") not in there)
        temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
        try:
            temporary.write_text(old + new)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_rows(name: str | None = None, path: Path | None = None, **where) -> list[dict]:
    """The rows of results/NAME.jsonl (or of the file at `path`) whose fields equal `where`.

    A cell is one line in the file; each of the readings under its `measured` is a row here, with what the cell says.

    Raises:
        ValueError: a line whose digest is wrong: it was edited, or cut off.
    """
    cells = load_cells(path or results_folder() / f"{name}.jsonl")
    rows = [cell | measured for cell in cells for measured in cell.pop("measured", [{}])]
    return [row for row in rows if all(row.get(k) == v for k, v in where.items())]


def load_cells(path: Path) -> list[dict]:
    """The lines of a result file; empty where there is no such file (errors: see `load_rows`)."""
    cells = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            cell = json.loads(line)
            intact = cell["digest"] == _digest(cell)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise ValueError(
                f"{path}, row {number}: not as samelib wrote it; delete that line to measure its cell again"
            )
        cells.append(cell)
    return cells


def reported(table: str, **where) -> list[dict]:
    """The paper's own figures (percent), from results/reported.json: e.g. reported("table1_mnist", method="same")."""
    rows = json.loads((results_folder() / "reported.json").read_text())[table]
    return [row for row in rows if all(row.get(k) == v for k, v in where.items())]
