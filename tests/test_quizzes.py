"""Questions: whole, with one right answer each, where they belong, and on every edition and page."""

import re
from collections import Counter

import nbformat
import pytest

from course.editions import ROOT, Book, chapter_number, edition
from course.quizzes import TAG, Answer, Question, QuizError, quizzes, with_quizzes

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
UNASKED = {"Exercises", "Recap", "Paper versus ours", "Next"}
QUESTION = Question("Which?", [Answer("a", "no"), Answer("b", "so it is", True), Answer("c", "no")])


def chapter(*texts: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(t, id=f"c{i}") for i, t in enumerate(texts)])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_asks_three_questions_a_section(path):
    source = nbformat.read(path, as_version=4)
    found = quizzes(chapter_number(source))
    assert len(found) >= 3 and not UNASKED & set(found)
    assert all(len(questions) == 3 for questions in found.values())
    asked = [question for questions in found.values() for question in questions]
    assert len({question.ask for question in asked}) == len(asked)
    places = Counter(next(i for i, a in enumerate(q.answers) if a.right) for q in asked)
    assert max(places.values()) < 0.6 * len(asked), "the right answer stands nearly always at one place"
    longest = sum(max(q.answers, key=lambda a: len(a.text)).right for q in asked)
    assert longest < 0.6 * len(asked), "the right answer is nearly always the longest"
    cells = edition(source, "colab", Book.of(ROOT)).cells
    assert sum(TAG in cell.metadata.get("tags", []) for cell in cells) == len(found)


def test_questions_stand_at_the_end_of_their_section():
    cells = with_quizzes(
        chapter("# 1. A\n\nx\n\n## One\n\na", "b\n\n## Two\n\nc"), {"One": [QUESTION], "Two": [QUESTION]}
    )
    first = [cell.source.split("\n")[0] for cell in cells]
    assert first[:3] == ["# 1. A", "## One", "b"] and first[4] == "## Two"
    assert [TAG in cell.metadata.get("tags", []) for cell in cells] == [False, False, False, True, False, True]
    assert len({cell.id for cell in cells}) == len(cells)
    text = cells[3].source
    assert "**1.** Which?\n\n- **A** a\n- **B** b\n- **C** c\n" in text
    assert re.findall(r"<summary>([A-Z])</summary>\n\n(\w+)\. ", text) == [("A", "No"), ("B", "Yes"), ("C", "No")]


def test_they_are_put_anew_and_not_twice():
    source = chapter("## One\n\na\n\n## Two\n\nb")
    once = with_quizzes(source, {"One": [QUESTION]})
    source.cells = once
    assert with_quizzes(source, {"One": [QUESTION]}) == once
    assert [cell.source for cell in with_quizzes(source, {})] == ["## One\n\na", "## Two\n\nb"]


def test_a_section_that_is_not_there_is_an_error():
    with pytest.raises(QuizError, match="does not have: Three"):
        with_quizzes(chapter("## One\n\na"), {"Three": [QUESTION]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- after: A\n  questions: [{ask: Q, answers: [{text: a, why: b}]}]", "one right answer among three"),
        ("- after: A\n  questions: [{ask: Q}]", "answers"),
        ("- after: A\n  questions: [{ask: Q, answers: [{text: a}]}]", "why"),
        ("- [", "ParserError"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text, message, tmp_path):
    (tmp_path / "chapter_07.yml").write_text(text)
    with pytest.raises(QuizError, match=f"(?s)chapter_07.yml: .*{message}"):
        quizzes(7, tmp_path)
    assert quizzes(8, tmp_path) == {}
