"""Chapters say what their figures show, speak of people as the book does, and have a core path that a lecture can take."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# Sentences that leave every outcome of a figure open. A sentence made from the run's own values says which it is.
HEDGES = (
    r"whichever (way|scoring|of)",
    r"in your (run|figure|left panel)",
    r"\bif (it|they|one|the \w+( \w+)?) (lies?|is|are|rises?|falls?|stands?|climbs?|sinks?|follows?|stays?|runs?)\b",
    r"\bshould (be|lie|rise|fall|stand|stay|climb|pile|follow|part|hug|stop|push|go|sit|grow)\b",
    r"\b(look|see|ask of each \w+|ask) (first )?(whether|how far|for (one|two|three|four) things)\b",
    r"\bwhether (it|its \w+|\w+ \w+) (\w+ )?depends on\b",
    r"\bdepends on whether\b",
    r"\bmay or may not\b",
    r"\b[Cc]ompare the (rows|terms|lines|figures|last|thresholds|measured)\b",
)
MOST = 5
FOLDED = {"parameters", "setup", "hide-cell", "hide-input", "hide-output"}  # tags of cells that do not stand open
MOST_CELLS, MOST_WORDS = 35, 2_800


def prose(path: Path) -> str:
    """The text of a notebook before its exercises, one line."""
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    return re.sub(r"\s+", " ", " ".join(cells).split("## Exercises")[0])


def hedges(text: str) -> list[str]:
    return [found.group() for pattern in HEDGES for found in re.finditer(pattern, text, re.IGNORECASE)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_says_what_its_figures_show(path):
    found = hedges(prose(path))
    assert len(found) <= MOST, found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_attacker_is_they(path):
    text = " ".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert not re.findall(r".{0,20}\b(?:he|his|him|himself)\b.{0,20}", text, re.IGNORECASE)


@pytest.mark.parametrize(
    "sentence",
    [
        "How to read it, whichever way it came out.",
        "If the curve rises, copying has become harder.",
        "If it lies to the left of them, the attack has bought confidence.",
        "Noise should stand far to the right.",
        "Whether its AUROC suffers depends on whether training was long.",
        "If doubt wins in your run, believe the figure.",
    ],
)
def test_a_hedge_is_found(sentence):
    assert hedges(sentence)


def test_a_sentence_with_a_figure_is_none():
    assert not hedges("The error rises from 0.003 to 0.011, four times as much.")


# The core path


def core_path(notebook: nbformat.NotebookNode) -> tuple[int, int]:
    """Open cells, and words of text, outside the exercises and the sections that are marked as optional."""
    cells = words = 0
    left_at = None  # level of the heading with which the core path was left
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cells += left_at is None and not FOLDED & set(cell.metadata.get("tags", []))
            continue
        told = 0
        for line in cell.source.splitlines():
            if heading := re.match(r"(#+) (.*)", line):
                level = len(heading[1])
                if left_at is None or level <= left_at:
                    left_at = level if re.search(r"\(optional\)$|^Exercises$", heading[2]) else None
            told += 0 if left_at else len(line.split())
        words, cells = words + told, cells + bool(told)
    return cells, words


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_core_path_is_short(path):
    cells, words = core_path(nbformat.read(path, as_version=4))
    assert cells <= MOST_CELLS and words <= MOST_WORDS, (cells, words)


def test_what_is_optional_is_off_the_core_path():
    def notebook(*texts):
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text) for text in texts])

    assert core_path(notebook("# One\ntwo three", "## Four (optional)\nfive\n### Six\nseven", "eight")) == (1, 4)
    assert core_path(notebook("## A (optional)\nb", "## C\nd e", "## Exercises\nf", "## Recap\ng")) == (2, 7)
    both = notebook("a")
    both.cells += [nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell("2", metadata={"tags": ["hide-input"]})]
    assert core_path(both) == (2, 1)
