"""Expected figures: numbers out of answers, rows that are measured once, and the page."""

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from course import expected
from course.check import CHECKS
from course.expected import ExpectedError, figures
from reproduction.rows import append_rows, load_cells


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (0.5, {"": 0.5}),
        (torch.tensor(2), {"": 2.0}),
        (np.bool_(True), {"": 1.0}),
        ((0.25, [1, 2]), {"1": 0.25, "2, 1": 1.0, "2, 2": 2.0}),
        ({"SAME": {5: 0.1}}, {"SAME, 5": 0.1}),
        (pd.Series({"a": 1, "b": 3}), {"a": 1.0, "b": 3.0}),
        (torch.arange(11), {"mean": 5.0}),
        (("knockoff", lambda x: x, 3), {"3": 3.0}),
        ("a text", {}),
        (print, {}),
    ],
)
def test_the_figures_of_an_answer(answer, found):
    assert figures(answer) == found


@pytest.fixture
def root(tmp_path):
    """A course of one chapter with two exercises, one of them without an answer."""

    def exercise(number: int, code: str) -> str:
        solution = f":::{{admonition}} Solution\n:class: dropdown\n```python\n{code}\n```\n:::\n"
        return f"**{number}. An exercise ★.** What?\n\n{solution}"

    text = "## Exercises\n\n" + exercise(1, "answer = SEED + 0.5, TIER") + "\n" + exercise(2, "print(1)")
    chapter = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# 99. A chapter"),
            nbformat.v4.new_code_cell('TIER, SEED = "lecture", 0', metadata={"tags": ["parameters"]}),
            nbformat.v4.new_markdown_cell(text),
        ]
    )
    (tmp_path / "notebooks").mkdir()
    nbformat.write(chapter, tmp_path / "notebooks" / "99_a.ipynb")
    return tmp_path


def test_what_is_there_is_not_run_again(root, monkeypatch):
    rows = root / "rows.jsonl"
    expected.run("smoke", (0,), rows, root)
    expected.run("smoke", (0, 1), rows, root)
    first, second = load_cells(rows)
    assert (first["figures"], second["figures"]) == ({"1": {"1": 0.5}}, {"1": {"1": 1.5}})
    assert (first["tier"], first["chapter"], second["seed"]) == ("smoke", 99, 1) and first["commit"]
    monkeypatch.setattr(expected, "measure", None)
    expected.run("smoke", (0, 1), rows, root)


def test_a_solution_that_fails_is_named(root):
    path = root / "notebooks" / "99_a.ipynb"
    path.write_text(path.read_text().replace("answer = SEED", "answer = NOTHING"))
    with pytest.raises(ExpectedError, match="99_a.ipynb, seed 3(.|\n)*NOTHING"):
        expected.measure(path, "smoke", 3)


def test_the_page_tells_the_spread(tmp_path):
    rows = tmp_path / "rows.jsonl"
    for seed, value in enumerate((0.25, 0.5, 0.9)):
        figures_of = {"2": {"1": value, "2": 1.0}, "9": {}}
        append_rows(rows, [{"cell": f"chapter 4, seed {seed}", "chapter": 4, "seed": seed, "figures": figures_of}])
    text = expected.page(rows)
    assert "## Chapter 4\n\nSeeds: 0, 1, 2.\n" in text and "4.9" not in text
    assert f"| 4.2 | {CHECKS['e0402'].asks} | | | |\n| | 1 | 0.55 | 0.25 | 0.9 |\n| | 2 | 1 | 1 | 1 |" in text


def test_published_rows_are_of_one_tier_and_cover_the_course():
    found = load_cells(expected.ROWS)
    assert {row["tier"] for row in found} == {"lecture"}
    assert {row["chapter"] for row in found if row["seed"] == 0} == set(range(1, 13))
    assert len({row["cell"] for row in found}) == len(found)
