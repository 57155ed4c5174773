"""The grader: runs a notebook afresh, and counts what the checks say."""

import json
import subprocess
import sys

import nbformat
import pytest

from course.check import CHECKS
from course.check.verdict import MIME
from course.grade import GradeError, grade

OF = sum(name.startswith("e04") for name in CHECKS)


def notebook(path, *cells: str, title="# 4. A chapter"):
    parameters = nbformat.v4.new_code_cell('TIER = "lecture"', metadata={"tags": ["parameters"]})
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title), parameters, *code]), path)
    return path


def test_a_notebook_is_run_and_its_verdicts_are_counted(tmp_path):
    """What it showed when it was handed in does not count."""
    path = notebook(
        tmp_path / "handed_in.ipynb",
        "from course import check\n1 / 0",
        "check.e0402((0.90625, 0.5))",
        "answer = ...\ncheck.e0404(answer)",
        "assert TIER == 'smoke'\ncheck.e0401(0.99, 1, 2)",
    )
    forged = nbformat.read(path, as_version=4)
    verdict = {"exercise": "4.5", "passed": True, "message": "right."}
    forged.cells[-1].outputs = [nbformat.v4.new_output("display_data", {MIME: verdict})]
    nbformat.write(forged, path)
    command = [sys.executable, "-m", "course", "grade", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (report,) = json.loads(done.stdout)
    assert (report["chapter"], report["passed"], report["of"]) == (4, 1, OF)
    said = {one["exercise"]: (one["passed"], one["message"]) for one in report["exercises"]}
    assert said["4.2"] == (True, "right.")
    assert said["4.1"][0] is False and said["4.1"][1].startswith("0.99 is the alpha")
    assert said["4.4"][0] is None and said["4.3"] == (False, said["4.5"][1]) and "no verdict" in said["4.5"][1]


def test_what_cannot_be_graded_is_named(tmp_path):
    (tmp_path / "text.ipynb").write_text("no notebook")
    for path in (tmp_path / "missing.ipynb", tmp_path / "text.ipynb"):
        with pytest.raises(GradeError, match="cannot be read as a notebook"):
            grade(path)
    with pytest.raises(GradeError, match="no chapter with checks"):
        grade(notebook(tmp_path / "b.ipynb", title="# My notes"))
    with pytest.raises(GradeError, match="timed out"):
        grade(notebook(tmp_path / "c.ipynb", "import time; time.sleep(60)"), timeout=1)
