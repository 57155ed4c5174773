"""Chapters say what their figures show, and speak of people as the book does."""

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
