"""Checks: each passes on a right answer, fails on a stub and on wrong ones, and never raises."""

import importlib
import json
from pathlib import Path

import nbformat
import pytest
import torch
from check_cases import Case

from course import check
from course.check.verdict import MIME, Verdict, Wrong, number, numbers
from course.editions import ROOT, Book, chapter_number, check_of, edition, solutions

MODULES = sorted(path.stem for path in (Path(__file__).parent / "check_cases").glob("chapter_*.py"))
CASES: dict[str, Case] = {}
for module in MODULES:
    CASES |= importlib.import_module(f"check_cases.{module}").CASES


def test_every_check_is_tried():
    assert sorted(CASES) == sorted(check.CHECKS)
    for name, case in CASES.items():
        assert len(case.wrong) >= 2 and len(case.given) == len(check.CHECKS[name].needs), name


@pytest.mark.parametrize("name", sorted(check.CHECKS))
def test_a_check_knows_right_from_wrong(name):
    this, case = getattr(check, name), CASES[name]
    verdict = this(case.right, *case.given)
    assert verdict.passed, verdict
    stub = this(..., *case.given)
    assert stub.passed is None and this.asks in stub.message
    hints = [this(answer, *case.given) for answer in case.wrong]
    assert not any(hint.passed for hint in hints), hints
    assert len({hint.message for hint in hints}) > 1, "wrong answers of several kinds earn hints of several kinds"
    assert this("an essay", *case.given).passed is False


def test_a_verdict_is_text_and_data():
    verdict = check.e0402((0.875, 0.5))
    bundle = verdict._repr_mimebundle_()
    assert bundle["text/plain"].startswith("✗ Exercise 4.2: ") and json.loads(json.dumps(bundle[MIME])) == {
        "exercise": "4.2",
        "passed": False,
        "message": verdict.message,
    }
    assert str(Verdict("1.1", True, "right.")) == "✓ Exercise 1.1: right."


def test_numbers_are_read_from_what_people_have():
    assert (
        numbers({"a": 1, "b": torch.tensor(2.0)}) == numbers((1, 2)) == numbers(torch.tensor([1.0, 2.0])) == [1.0, 2.0]
    )
    assert number(torch.tensor(3)) == 3
    for bad in ("x", None, [1, float("nan")]):
        with pytest.raises(Wrong):
            numbers(bad)
    with pytest.raises(Wrong, match="2 numbers are asked for, your answer has 1"):
        numbers(1, 2)


def test_a_check_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="there is no check e9901; those there are: .*e0402"):
        check.e9901()
    assert "e0402" in dir(check)


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_students_find_the_check_below_the_exercise(path):
    chapter = nbformat.read(path, as_version=4)
    student = edition(chapter, "student", Book.of(ROOT))
    cells = [cell.source for cell in student.cells if cell.cell_type == "code"]
    for number_, codes in solutions(chapter).items():
        if this := check_of(chapter_number(chapter), number_):
            assert [c for c in cells if c.endswith(f"answer = ...\n{this.call()}")], this.name
            assert "answer" in "\n".join(codes), f"the solution of {this.name} leaves no answer"
