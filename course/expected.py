"""What the solutions come to: every chapter run with its solutions, for several seeds, and each answer as named figures.

    python -m course expected

The rows are kept in course/expected.jsonl, one for a chapter and a seed; what is there is not run again.
"""

import re
import tempfile
import time
from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from statistics import mean

import nbformat
import numpy as np
import papermill
import torch
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from course.check import CHECKS
from course.editions import ROOT, chapter_number, with_solutions
from reproduction.rows import append_rows, load_cells, provenance
from samelib import load_group
from samelib.training import best_device

ROWS = Path(__file__).with_name("expected.jsonl")
MIME = "application/vnd.samelib.figures+json"  # of the outputs that hold an answer's figures
ANSWER = re.compile(r"^(def )?answer\b", re.MULTILINE)
FEW = 8  # numbers in a row that are told one by one
MOST = 12  # lines of an exercise on the page
HEAD = "| exercise | what | mean | from | to |\n| --- | --- | ---: | ---: | ---: |"
OPENING = """\
# Expected figures

What our solutions come to when a chapter runs at lecture tier on `glyphs`, and how far the figures spread over its seeds.
An answer outside the range is no wrong answer: another machine rounds otherwise, and small models follow. An answer far
outside it is worth a question. Exercises whose answer is a function, a derivation or an essay have no figure here; the
[page for teachers](teaching.md) says how they are marked.
"""


class ExpectedError(RuntimeError):
    """A chapter or a solution failed; the message names it."""


def figures(answer: object, name: str = "") -> dict[str, float]:
    """The numbers of an answer by name: those of a dictionary by its keys, of a short sequence by their places, of a long
    one its mean. What is no number (a function, a text) has none."""

    def under(key: object) -> str:
        return f"{name}, {key}" if name else str(key)

    if isinstance(answer, torch.Tensor):
        answer = answer.detach().cpu().numpy()
    if hasattr(answer, "_asdict"):
        answer = answer._asdict()
    if hasattr(answer, "items"):
        return {k: v for key, part in answer.items() for k, v in figures(part, under(key)).items()}
    if isinstance(answer, Number | np.bool_) or getattr(answer, "shape", None) == ():
        return {name: float(answer)}
    if isinstance(answer, str) or not hasattr(answer, "__len__"):
        return {}
    if len(answer) > FEW and (isinstance(answer, np.ndarray) or all(isinstance(part, Number) for part in answer)):
        return {under("mean"): float(np.mean(answer))}
    return {k: v for place, part in enumerate(answer, 1) for k, v in figures(part, under(place)).items()}


def telling(chapter: NotebookNode) -> NotebookNode:
    """The chapter with its solutions, each of which leaves its answer's figures in its output."""
    made = with_solutions(chapter)
    for cell in made.cells:
        if cell.id.startswith("solution-") and ANSWER.search(cell.source):
            call = f'display({{"{MIME}": figures(answer)}}, raw=True)'
            cell.source += f"\n\nfrom course.expected import figures\nfrom IPython.display import display\n\n{call}"
    return made


def measure(path: Path, tier: str, seed: int) -> dict:
    """The row of a chapter: the figures of its exercises by their numbers, with provenance.

    Raises:
        ExpectedError: a cell failed.
    """
    chapter, start = nbformat.read(path, as_version=4), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = papermill.execute_notebook(
                telling(chapter),
                Path(folder) / path.name,
                parameters={"TIER": tier, "SEED": seed},
                kernel_name="python3",
                language="python",
                cwd=folder,
            )
        except PapermillExecutionError as error:
            raise ExpectedError(f"{path.name}, seed {seed}: {error}") from None
    told = {}
    for cell in done.cells:
        for output in cell.get("outputs", []):
            if MIME in output.get("data", {}):
                told[cell.id.removeprefix("solution-")] = output.data[MIME]
    number, data = chapter_number(chapter), load_group("glyphs", tier).fingerprint
    origin = provenance(best_device(), data, seed, tier, time.perf_counter() - start, None)
    return {"cell": f"chapter {number}, seed {seed}", "chapter": number, "figures": told} | origin


def run(tier: str = "lecture", seeds: Sequence[int] = (0, 1, 2), rows: Path = ROWS, root: Path = ROOT) -> None:
    """Measures what is missing, a chapter and a seed at a time; it may be stopped and run again at any point.

    Raises:
        ExpectedError: see `measure`.
    """
    there = {row["cell"] for row in load_cells(rows)}
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    chapters = {chapter_number(nbformat.read(path, as_version=4)): path for path in paths}
    for seed in seeds:
        for number, path in chapters.items():
            if f"chapter {number}, seed {seed}" not in there:
                print(f"{path.name}, seed {seed}", flush=True)
                append_rows(rows, [measure(path, tier, seed)])


def page(rows: Path = ROWS) -> str:
    """The page of the book, in Markdown."""
    found = load_cells(rows)
    text = [OPENING]
    for chapter in sorted({row["chapter"] for row in found}):
        of_chapter = [row for row in found if row["chapter"] == chapter]
        numbers = sorted(of_chapter[0]["figures"], key=int)
        lines = [line for number in numbers for line in _lines(of_chapter, number)]
        if lines:
            seeds = ", ".join(str(row["seed"]) for row in of_chapter)
            text.append("\n".join([f"## Chapter {chapter}\n", f"Seeds: {seeds}.\n", HEAD, *lines]) + "\n")
    return "\n".join(text)


def _lines(rows: Sequence[dict], number: str) -> list[str]:
    """The lines of an exercise: what its answer is, then a figure each, over the seeds that have it; none without figures."""
    told = [row["figures"].get(number, {}) for row in rows]
    if not told[0]:
        return []
    chapter = rows[0]["chapter"]
    check = CHECKS.get(f"e{chapter:02}{int(number):02}")
    lines = [f"| {chapter}.{number} | {check.asks if check else ''} | | | |"]
    for name in list(told[0])[:MOST]:
        values = [seed[name] for seed in told if name in seed]
        cells = [name, *(f"{value:.4g}" for value in (mean(values), min(values), max(values)))]
        lines.append(f"| | {' | '.join(cells)} |")
    return lines
