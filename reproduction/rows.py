"""Result rows: one JSON line a measured cell, with its provenance, read as a table of one row a reading.

Every number in the book is read from here.
"""

import importlib.resources
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

import samelib
from reproduction.plan import DEFAULTS, label_of
from reproduction.tables import select
from samelib.store import MEASUREMENT, json_digest

RESULTS = Path(str(importlib.resources.files("reproduction"))) / "results"  # the published rows


def provenance(device: str | torch.device, data: str, seed: int, tier: str, seconds: float, peak: int | None) -> dict:
    """Where a number comes from: versions, machine class, data, seed, tier, wall seconds, peak memory.

    Models that came from the cache do not count into the seconds.

    Args:
        data: fingerprint of the images.
        peak: the most memory that this measurement held, in bytes; None where it is not known.
    """
    on_gpu = torch.device(device).type == "cuda"
    commit, clean = _commit()
    return {
        "samelib": samelib.__version__,
        "commit": commit,
        "clean": clean,
        "measurement": MEASUREMENT,
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


@cache
def _commit() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether its code is as committed; None, None outside a checkout."""
    top = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=top, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD"), not git("status", "--porcelain", "samelib", "reproduction/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _digest(row: dict) -> str:
    return json_digest(row, without="digest")[:16]


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


def load_cells(path: Path) -> list[dict]:
    """The lines of a result file; empty where there is no such file.

    Raises:
        ValueError: a line whose digest is wrong: it was edited, or cut off.
    """
    cells = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            cell = json.loads(line)
            intact = cell["digest"] == _digest(cell)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise ValueError(f"{path}, row {number}: not as it was written; delete that line to measure its cell again")
        cells.append(cell)
    return cells


def load_rows(name: str, tier: str | None = None, path: Path | None = None) -> pd.DataFrame:
    """The published rows of that name (or those of the file at `path`), of one tier or of all.

    Raises:
        ValueError: a line was edited or cut off, or rows come from different measurements or data: their figures do not
            belong into one table.
    """
    cells = [cell for cell in load_cells(path or RESULTS / f"{name}.jsonl") if tier in (None, cell.get("tier"))]
    for kind, words in (("measurement", "measurements (MEASUREMENT)"), ("data", "data")):
        origins = {(cell["tier"], cell[kind]) for cell in cells if "cell" in cell}
        if len(origins) > len({tier for tier, _ in origins}):
            raise ValueError(f"rows of {name} come from different {words}; measure them again into one folder")
    return as_frame(cells)


def as_frame(cells: Iterable[dict]) -> pd.DataFrame:
    """One row for each of the readings that a cell has under `measured`, with what the cell says, its defaults filled
    in, and `label`: the queries in words (see `label_of`)."""
    rows = []
    for cell in cells:
        for reading in cell.get("measured", [{}]):
            row = (DEFAULTS if "cell" in cell else {}) | cell | reading
            row.pop("measured", None)
            rows.append(row | {"label": label_of(row)} if "cell" in cell else row)
    return pd.DataFrame(rows)


def reported(table: str, **fields) -> pd.DataFrame:
    """The paper's own figures (percent), from results/reported.json: e.g. reported("table1_mnist", method="same")."""
    return select(pd.DataFrame(json.loads((RESULTS / "reported.json").read_text())[table]), **fields)
