"""Grades a student's notebook: runs it afresh, and collects what the checks say.

python -m course grade 04_anomaly_score.ipynb --json
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from course.check import CHECKS, Verdict
from course.check.verdict import MIME
from course.editions import chapter_number


class GradeError(ValueError):
    """A notebook cannot be graded; the message says why."""


class Grade(NamedTuple):
    """Of one notebook.

    Attributes:
        chapter: its number.
        verdicts: of every exercise of the chapter that has a check; not passed where the notebook came to none.
    """

    chapter: int
    verdicts: list[Verdict]

    @property
    def passed(self) -> int:
        return sum(verdict.passed is True for verdict in self.verdicts)

    def as_dict(self) -> dict:
        verdicts = [verdict._asdict() for verdict in self.verdicts]
        return {"chapter": self.chapter, "passed": self.passed, "of": len(verdicts), "exercises": verdicts}


def grade(path: Path, tier: str = "smoke", timeout: int = 600) -> Grade:
    """Runs a notebook in a kernel of its own; a cell that fails stops no other.

    What the notebook printed when it was handed in does not count. Whoever writes over `check` in a cell can still deceive
    the grader: read the answers of a course that ends in a mark.

    Args:
        path: of a student edition with answers.
        tier: at which it runs; the checks hold at every tier.
        timeout: seconds that one cell may take.

    Raises:
        GradeError: no notebook, no chapter of the course, or its kernel died.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, UnicodeDecodeError, nbformat.reader.NotJSONError) as error:
        raise GradeError(f"{path} cannot be read as a notebook: {error}") from None
    chapter = chapter_number(notebook)
    checks = [check for name, check in sorted(CHECKS.items()) if name.startswith(f"e{chapter:02}")]
    if not checks:
        raise GradeError(f"{path} is no chapter with checks: its title should begin with '# 4. ' or the like")
    own = nbformat.v4.new_code_cell(f'TIER, DATA, SEED = "{tier}", "glyphs", 0')
    places = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(places[0] + 1 if places else 0, own)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            allow_errors=True,
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute()
        except (CellTimeoutError, DeadKernelError) as error:
            raise GradeError(f"{path}: {str(error).strip().splitlines()[0]}") from None
    found = dict(_verdicts(notebook))
    missing = "the notebook came to no verdict: its cell is missing, or it failed before its check."
    return Grade(chapter, [found.get(c.exercise) or Verdict(c.exercise, False, missing) for c in checks])


def _verdicts(notebook: NotebookNode) -> Iterator[tuple[str, Verdict]]:
    """(exercise, verdict), in the order of the cells: the last one of an exercise counts."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if fields := output.get("data", {}).get(MIME):
                yield fields["exercise"], Verdict(**fields)
