"""Editions of the chapters, made from the one source: for students, with solutions as code, for Colab.

    python -m course.editions student FOLDER

- student: without solutions; a cell to answer in after each exercise, with its check where it has one. JupyterLab and
  Colab know no MyST, so that roles become links and citations, and hints fold by HTML.
- solution: each solution's code in a cell of its own, its text above it, its check below.
- colab: the student edition with links among its chapters, forms for the parameters, a folder of Google Drive for
  trained models if somebody wants one, and a GPU where the chapter trains.
"""

import argparse
import copy
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import nbformat
import yaml
from nbformat import NotebookNode

from course.quizzes import QuizError, quizzes, with_quizzes

if TYPE_CHECKING:
    from course.check import Check

ROOT = Path(__file__).parents[1]
KINDS = ("student", "solution", "colab")

FOLDED = re.compile(r"^:::\{admonition\} (Hint|Solution)\n:class: dropdown\n(.*?)\n:::\n?", re.MULTILINE | re.DOTALL)
BOX = re.compile(r"^```\{admonition\} ([^\n]+)\n(?::class: \w+\n)?(.*?)\n```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)\n```\n?", re.MULTILINE | re.DOTALL)
EXERCISE = re.compile(r"^(?=\*\*\d+\b)", re.MULTILINE)
CHAPTER = re.compile(r"^# (\d+)\. ", re.MULTILINE)
ROLE = re.compile(r"\{(term|cite)\}`([^`<]+?)(?:\s*<([^>]+)>)?`")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+?)\.(ipynb|md)(#[^)]*)?\)")
MYST = re.compile(r"\{[\w-]+\}`|^:{3,}|^```\{", re.MULTILINE)

DRIVE = """KEEP_MODELS_IN_DRIVE = False  # @param {type: "boolean"}
# Colab forgets its disk; models that are kept in Google Drive need not be trained again.
if KEEP_MODELS_IN_DRIVE:
    import os

    from google.colab import drive

    drive.mount("/content/drive")
    os.environ["SAMELIB_CACHE"] = "/content/drive/MyDrive/samelib"
"""


class EditionError(Exception):
    """A chapter holds something that an edition cannot show; the message says what and where."""


class Book(NamedTuple):
    """What the text of a chapter refers to.

    Attributes:
        pages: address of the pages, for links.
        cited: text of each citation by its key, see `citations`.
        terms: anchor of each term of the glossary by its name in small letters.
        colab: address in Colab of the folder of the chapters' Colab edition.
    """

    pages: str
    cited: dict[str, str]
    terms: dict[str, str]
    colab: str = ""

    @classmethod
    def of(cls, root: Path, pages: str | None = None) -> "Book":
        """The book in that checkout, as it is published; or with its pages elsewhere."""
        repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
        owner, name = repository["url"].rstrip("/").split("/")[-2:]
        return cls(
            pages or f"https://{owner}.github.io/{name}",
            citations((root / "book" / "references.bib").read_text(encoding="utf-8")),
            glossary((root / "book" / "glossary.md").read_text(encoding="utf-8")),
            f"https://colab.research.google.com/github/{owner}/{name}/blob/{repository['branch']}/notebooks",
        )


def edition(chapter: NotebookNode, kind: str, book: Book) -> NotebookNode:
    """One chapter as an edition, which is one of `KINDS`.

    Raises:
        EditionError: a role or directive that is not understood, a citation or a term that the book does not have;
            questions that cannot be used.
    """
    made = copy.deepcopy(chapter)
    made.cells, number = [], chapter_number(chapter)
    try:
        source = with_quizzes(chapter, quizzes(number))
    except QuizError as error:
        raise EditionError(str(error)) from None
    for cell in source:
        if cell.cell_type == "markdown":
            made.cells += _text(cell, number, kind, book)
        elif kind == "colab" and "parameters" in cell.metadata.get("tags", []):
            made.cells.append(copy.deepcopy(cell))
            made.cells[-1].source = _form(cell.source)
            made.cells.append(nbformat.v4.new_code_cell(DRIVE.strip(), id="drive"))
        else:
            made.cells.append(copy.deepcopy(cell))
    if kind == "colab":
        made.metadata["colab"] = {"provenance": [], "toc_visible": True}
        if any("best_device" in cell.source for cell in made.cells):
            made.metadata["colab"]["gpuType"], made.metadata["accelerator"] = "T4", "GPU"
    return made


def with_solutions(chapter: NotebookNode) -> NotebookNode:
    """The chapter with the code of its solutions in cells at its end, which the page does not show; a solution that its
    exercise's check does not accept is an error there."""
    made, of = copy.deepcopy(chapter), chapter_number(chapter)
    for number, codes in solutions(chapter).items():
        code = "\n".join(codes)
        if check := check_of(of, number):
            code += f"\n\nfrom course import check\n\nverdict = {check.call()}\nassert verdict.passed, verdict"
        cell = nbformat.v4.new_code_cell(code, id=f"solution-{number}", metadata={"tags": ["remove-cell"]})
        made.cells.append(cell)
    return made


def solutions(chapter: NotebookNode) -> dict[int, list[str]]:
    """The pieces of code of each solution in a chapter, by the exercise's number."""
    texts = [cell.source for cell in chapter.cells if cell.cell_type == "markdown"]
    exercises = [text for source in texts for text in _cut(source)[1]]
    answered = {_number(text): [code for body in _answers(text) for code in CODE.findall(body)] for text in exercises}
    return {number: codes for number, codes in answered.items() if codes}


def check_of(chapter: int, exercise: int) -> "Check | None":
    """The check of an exercise, where it has one."""
    from course.check import CHECKS  # only here: they need PyTorch, for which a build that runs nothing need not wait

    return CHECKS.get(f"e{chapter:02}{exercise:02}")


def chapter_number(chapter: NotebookNode) -> int:
    """Of its title, "# 4. ..."; 0 where it has none."""
    titles = [CHAPTER.search(cell.source) for cell in chapter.cells if cell.cell_type == "markdown"]
    return next((int(title[1]) for title in titles if title), 0)


def _cut(text: str) -> tuple[str, list[str], list[str]]:
    """What stands above the first exercise of a text; the exercises, each with its hint and its solution; the sections
    below them. A text without exercises is all above."""
    before, heading, rest = text.partition("## Exercises\n")
    exercises, *below = re.split(r"(?m)^(?=## )", rest, maxsplit=1)
    opening, *asked = EXERCISE.split(exercises)
    return before + heading + opening, asked, below


def _number(exercise: str) -> int:
    return int(re.match(r"\*\*(\d+)", exercise)[1])


def _answers(text: str) -> list[str]:
    """The bodies of the solutions in a text."""
    return [body for title, body in FOLDED.findall(text) if title == "Solution"]


def citations(bibliography: str) -> dict[str, str]:
    """What stands in the text for each key of a BibTeX file: "Xie et al., 2024"."""
    found = {}
    for key, fields in re.findall(r"^@\w+\{([^,\s]+),(.*?)^\}", bibliography, re.MULTILINE | re.DOTALL):
        values = dict(re.findall(r"^\s*(author|year)\s*=\s*\{(.*?)\},?\s*$", fields, re.MULTILINE))
        names = values.get("author", key).split(" and ")
        families = [_family(name) for name in names]
        others = " et al." if len(names) > 2 else f" and {families[1]}" if len(names) == 2 else ""
        found[key] = f"{families[0]}{others}, {values.get('year', 'n.d.')}"
    return found


def glossary(page: str) -> dict[str, str]:
    """The anchor that Sphinx gives to each term of a glossary, by the term in small letters."""
    entries = page.partition("```{glossary}\n")[2].partition("\n```")[0]
    terms = [line.strip() for line in entries.splitlines() if line and not line.startswith(" ")]
    return {term.lower(): "term-" + re.sub(r"[^A-Za-z0-9]+", "-", term).strip("-") for term in terms}


def resolve(text: str, book: Book, where: str) -> str:
    """MyST as Markdown that Colab and JupyterLab draw; `where` names the cell in an error."""

    def known(names: dict[str, str], key: str) -> str:
        if key not in names:
            raise EditionError(f"{where}: {key!r} is neither in the bibliography nor in the glossary")
        return names[key]

    def role(match: re.Match) -> str:
        name, words, target = match.groups()
        if name == "term":
            anchor = known(book.terms, " ".join((target or words).lower().split()))
            return f"[{words}]({book.pages}/book/glossary.html#{anchor})"
        return f"({'; '.join(known(book.cited, key.strip()) for key in words.split(','))})"

    def link(match: re.Match) -> str:
        words, target, _, anchor = match.groups()
        folder = "notebooks/" if "/" not in target else ""
        return f"[{words or target}]({book.pages}/{folder}{target.removeprefix('../')}.html{anchor or ''})"

    text = BOX.sub(lambda box: f"> **{box[1]}**\n>\n" + "\n".join(f"> {line}" for line in box[2].split("\n")), text)
    text = FOLDED.sub(_details, LINK.sub(link, ROLE.sub(role, text)))
    if left := MYST.search(text):
        raise EditionError(f"{where}: {left.group()!r} is MyST that no edition knows; teach it to course/editions.py")
    return text


def _details(folded: re.Match) -> str:
    # Colab draws Markdown inside the element only after a blank line.
    return f"<details><summary>{folded[1]}</summary>\n\n{folded[2].strip()}\n\n</details>\n"


def _family(name: str) -> str:
    """Of "Last, First" or "First Last"; an institution, in braces, has one name."""
    bare = name.replace("{", "").replace("}", "")
    if name.startswith("{"):
        return bare
    return bare.split(",")[0] if "," in bare else bare.split()[-1]


def _text(cell: NotebookNode, chapter: int, kind: str, book: Book) -> list[NotebookNode]:
    """A cell of text; exercises are cut apart, each with a cell to answer in, or with its solution."""
    above, exercises, below = _cut(cell.source)
    parts = [("markdown", above)]
    for exercise in exercises:
        parts += _exercise(exercise, chapter, kind)
    parts += [("markdown", text) for text in below]
    cells = []
    for number, (cell_type, text) in enumerate(parts):
        text = resolve(text, book, cell.id).strip() if cell_type == "markdown" else text
        if text:
            make = nbformat.v4.new_markdown_cell if cell_type == "markdown" else nbformat.v4.new_code_cell
            name = f"{cell.id}-{number}" if exercises else cell.id
            cells.append(make(text, id=name, metadata=copy.deepcopy(cell.metadata)))
    return cells


def _exercise(text: str, chapter: int, kind: str) -> list[tuple[str, str]]:
    """One exercise as (type of cell, text)."""
    number = _number(text)
    check = check_of(chapter, number)
    asked = FOLDED.sub(lambda m: m.group() if m[1] == "Hint" else "", text)
    if kind != "solution":
        return [("markdown", asked), ("code", _stub(number, check))]
    cells = [("markdown", asked)]
    for body in _answers(text):
        words, *rest = CODE.split(body)  # words, code, words, code, ... words
        cells.append(("markdown", f"**Solution to exercise {number}.** {words}"))
        cells += [("code" if i % 2 == 0 else "markdown", part) for i, part in enumerate(rest)]
    return [*cells, ("code", f"from course import check\n\n{check.call()}")] if check else cells


def _stub(number: int, check: "Check | None") -> str:
    """The cell to answer in."""
    if check is None:
        return f"# your answer to exercise {number}"
    asks = textwrap.wrap(
        f"Exercise {number}: the answer is {check.asks}.", 96, initial_indent="# ", subsequent_indent="# "
    )
    return "\n".join([*asks, "from course import check", "", "answer = ...", check.call()])


def _form(source: str) -> str:
    """The cell of parameters with Colab's forms."""
    source = re.sub(r"^(TIER = .*?)\s*#.*$", r'\1  # @param ["smoke", "lecture", "paper"]', source, flags=re.MULTILINE)
    groups = '["glyphs", "glyphs-matched", "shapes", "mnist", "cifar10"]'
    source = re.sub(
        r"^(DATA = .*?)\s*#.*$", rf"\1  # @param {groups} {{allow-input: true}}", source, flags=re.MULTILINE
    )
    return re.sub(r"^(SEED = \d+)$", r'\1  # @param {type: "integer"}', source, flags=re.MULTILINE)


def write(kind: str, folder: Path, root: Path = ROOT) -> list[Path]:
    """All chapters as an edition in a folder.

    Raises:
        EditionError: see `edition`.
    """
    book = Book.of(root)
    folder.mkdir(parents=True, exist_ok=True)
    written, paths = [], sorted((root / "notebooks").glob("*.ipynb"))
    for path in paths:
        made = edition(nbformat.read(path, as_version=4), kind, book)
        if kind == "colab":
            chapters = [f"**{n}**" if p == path else f"[{n}]({book.colab}/{p.name})" for n, p in enumerate(paths, 1)]
            here = f"[This chapter as a page]({book.pages}/notebooks/{path.stem}.html) · In Colab: {' '.join(chapters)}"
            made.cells.insert(0, nbformat.v4.new_markdown_cell(here, id="chapters"))
        written.append(folder / path.name)
        nbformat.write(made, written[-1])
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m course.editions", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        written = write(arguments.kind, arguments.folder)
    except EditionError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{len(written)} notebooks, {arguments.kind} edition, in {arguments.folder}")


if __name__ == "__main__":
    main()
