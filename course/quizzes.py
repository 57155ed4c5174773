"""Questions at the ends of a chapter's sections, from course/quizzes/chapter_NN.yml.

They are Markdown with `<details>`, which a page, JupyterLab and Colab fold without a script: a reader chooses an answer,
opens it, and reads why it is right or wrong.
"""

import re
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from nbformat import NotebookNode

FOLDER = Path(__file__).parent / "quizzes"
TAG = "quiz"
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


class QuizError(ValueError):
    """A file of questions cannot be used; the message says what is wrong with it."""


class Answer(NamedTuple):
    text: str
    why: str
    right: bool = False


class Question(NamedTuple):
    ask: str
    answers: list[Answer]


def quizzes(chapter: int, folder: Path = FOLDER) -> dict[str, list[Question]]:
    """The questions of a chapter by the heading of the section at whose end they stand; none where it has no file.

    Raises:
        QuizError: no section, or a question without exactly one right answer among three or more, each with its reason.
    """
    path = folder / f"chapter_{chapter:02}.yml"
    if not path.is_file():
        return {}
    try:
        parts = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = {part["after"]: [_question(question) for question in part["questions"]] for part in parts}
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise QuizError(f"{path.name}: {error!r}") from None
    for question in (question for questions in found.values() for question in questions):
        if len(question.answers) < 3 or sum(answer.right for answer in question.answers) != 1:
            raise QuizError(f"{path.name}: one right answer among three or more is needed: {question.ask}")
    return found


def with_quizzes(chapter: NotebookNode, found: dict[str, list[Question]]) -> list[NotebookNode]:
    """The cells of a chapter with questions at the ends of their sections; those that were there are put anew.

    Raises:
        QuizError: questions for a section that the chapter does not have.
    """
    cells, waiting, left = [], [], dict(found)

    def ask() -> None:
        if waiting:
            cells.append(_cell(waiting[:], f"quiz-{len(found) - len(left)}"))
            waiting.clear()

    for cell in (cell for cell in chapter.cells if TAG not in cell.metadata.get("tags", [])):
        if cell.cell_type != "markdown" or not HEADING.search(cell.source):
            cells.append(cell)
            continue
        for number, piece in enumerate(re.split(r"(?m)^(?=## )", cell.source)):
            if heading := HEADING.match(piece):
                ask()
                waiting += left.pop(heading[1].strip(), [])
            if piece.strip():
                cells.append(_piece(cell, piece, number))
    ask()
    if left:
        raise QuizError(f"there are questions after sections that the chapter does not have: {', '.join(left)}")
    return cells


def _question(fields: dict) -> Question:
    return Question(str(fields["ask"]).strip(), [Answer(**answer) for answer in fields["answers"]])


def _piece(cell: NotebookNode, text: str, number: int) -> NotebookNode:
    """A part of a cell of text, which begins with a heading."""
    if text == cell.source:
        return cell
    return nbformat.v4.new_markdown_cell(text.strip(), id=f"{cell.id}-{number}"[-64:], metadata=dict(cell.metadata))


def _cell(questions: list[Question], name: str) -> NotebookNode:
    texts = ['<details class="questions"><summary>Questions on this section</summary>']
    texts.append("Choose an answer, then open its letter.")
    for number, question in enumerate(questions, 1):
        letters = [chr(ord("A") + i) for i in range(len(question.answers))]
        choices = [f"- **{k}** {_line(a.text)}" for k, a in zip(letters, question.answers, strict=True)]
        texts += [f"**{number}.** {question.ask}", "\n".join(choices)]
        for letter, answer in zip(letters, question.answers, strict=True):
            verdict = "Yes." if answer.right else "No."
            # Markdown inside the element is drawn only after a blank line.
            texts.append(
                f'<details class="quiz"><summary>{letter}</summary>\n\n{verdict} {_line(answer.why)}\n\n</details>'
            )
    texts.append("</details>")
    return nbformat.v4.new_markdown_cell("\n\n".join(texts), id=name, metadata={"tags": [TAG]})


def _line(text: str) -> str:
    return " ".join(str(text).split())
