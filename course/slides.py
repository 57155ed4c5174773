"""Slides of the chapters, for reveal.js: headings and formulas, figures and tables with what they show; prose in the notes.

The book's build makes them from the notebooks that it has run: html/slides/01_threat_model.html and so on. Press S for
the speaker's view, ? for all keys.
"""

import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from markdown_it import MarkdownIt
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode

from course.editions import FOLDED, ROOT, Book, resolve
from course.quizzes import TAG

REVEAL = Path(__file__).with_name("reveal")
HEADING = re.compile(r"^(#{1,3}) +(.+)$", re.MULTILINE)
FORMULA = re.compile(r"^\$\$.+?\$\$|^\\begin\{(\w+\*?)\}.+?^\\end\{\1\}", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"\*\*What (?:this|these|the|table)[^*]*\*\*\s*")
LONGEST = 330  # characters of what a figure shows that stand beside it; the rest is said
MOST_LINES = 11  # of a table

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="reveal/reset.css">
<link rel="stylesheet" href="reveal/reveal.css">
<link rel="stylesheet" href="reveal/slides.css">
</head>
<body>
<div class="reveal"><div class="slides">
{slides}
</div></div>
<script src="reveal/reveal.js"></script>
<script src="reveal/notes.js"></script>
<script>Reveal.initialize({{width: 1280, height: 720, margin: 0.02, center: false, hash: true, slideNumber: "c/t",
  transition: "none", plugins: [RevealNotes]}});</script>
<script src="../_static/mathjax/tex-chtml.js"></script>
</body>
</html>
"""


class Slide(NamedTuple):
    """One slide; `text` and `notes` are Markdown, `shown` is HTML."""

    heading: str
    text: str = ""
    shown: str = ""
    notes: str = ""
    kind: str = ""


def _formula(content: str, options: dict) -> str:
    left, right = (r"\[", r"\]") if options["display_mode"] else (r"\(", r"\)")
    return f"{left}{html.escape(content)}{right}"


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
MARKDOWN.use(dollarmath_plugin, renderer=_formula).use(amsmath_plugin)


def slides(chapter: NotebookNode) -> Iterator[Slide]:
    """The slides of a chapter that has been run, in its order."""
    section, cells = "", [cell for cell in chapter.cells if TAG not in cell.metadata.get("tags", [])]
    for position, cell in enumerate(cells):
        following = cells[position + 1] if position + 1 < len(cells) else None
        if cell.cell_type == "markdown":
            # Solutions go first: a comment of their code looks like a heading.
            for level, heading, body in _sections(FOLDED.sub("", cell.source)):
                section = heading or section
                if heading:
                    yield from _opened(level, heading, body)
        elif shown := _shown(cell):
            said = _said(following)
            yield Slide(section, _first_sentences(said), shown, said)


def _sections(text: str) -> Iterator[tuple[int, str, str]]:
    """(level, heading, what stands below it) of a cell of text; what stands above its first heading has none."""
    above, *rest = HEADING.split(text)
    yield 0, "", above
    for marks, heading, body in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        yield len(marks), heading.strip(), body


def _opened(level: int, heading: str, body: str) -> Iterator[Slide]:
    """The slides with which a section begins."""
    if level == 1:
        opening, _, learnt = body.partition("**What you will learn**")
        yield Slide(heading, "SAME: detecting model extraction", notes=opening, kind="title")
        yield Slide("What you will learn", learnt.partition("**What you need**")[0])
    elif heading == "Exercises":
        asked = re.findall(r"^\*\*(\d+[^*]*)\*\*(.*(?:\n(?!\n).*)*)", body, re.MULTILINE)
        lines = [f"- **{name.strip()}** {_first_sentences(text.strip(), 110)}" for name, text in asked]
        yield Slide(heading, "\n".join(lines), kind="small", notes=body)
    elif heading == "Recap":
        yield Slide(heading, body.partition("\n|")[0])
    elif heading not in ("Paper versus ours", "Next"):
        formulas = [found.group() for found in FORMULA.finditer(body)][:2]
        opening = _first_sentences(body, 200) if re.match(r"\s*(?!```)[\w*{`$\"]", body) else ""
        yield Slide(heading, "\n\n".join([opening, *formulas]), notes=body, kind="" if formulas else "section")


def _shown(cell: NotebookNode) -> str:
    """The figures and tables that a cell has drawn, as HTML."""
    if {"setup", "remove-cell"} & set(cell.metadata.get("tags", [])):
        return ""
    alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            source = f"data:image/png;base64,{data['image/png'].strip()}"
            parts.append(f'<img src="{source}" alt="{html.escape(alt)}">')
        elif (text := data.get("text/markdown", "")).startswith("|") and len(text.splitlines()) <= MOST_LINES + 2:
            parts.append(MARKDOWN.render(text))
    return "\n".join(parts)


def _said(cell: NotebookNode | None) -> str:
    """What a cell says of the figure above it: text, or what its code displays as Markdown."""
    if cell is None:
        return ""
    shown = [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])]
    text = cell.source if cell.cell_type == "markdown" else "\n\n".join(shown)
    if not SHOWN.match(text):
        return ""
    return HEADING.split(SHOWN.sub("", text, count=1))[0].strip()


def _first_sentences(text: str, longest: int = LONGEST) -> str:
    """As many whole sentences of the first paragraph (or list) as fit; one in any case."""
    paragraph = re.split(r"\n\s*\n", text.strip())[0] if text.strip() else ""
    sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z*\[])", paragraph)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > longest:
            break
        kept += f" {sentence}"
    return kept


def page(chapter: NotebookNode, book: Book, where: str) -> str:
    """A chapter's slides as one HTML page; `where` names the chapter in an error.

    Raises:
        EditionError: MyST that no edition knows, see `course.editions.resolve`.
    """

    def rendered(text: str) -> str:
        return MARKDOWN.render(resolve(text, book, where)) if text.strip() else ""

    parts, title = [], ""
    for slide in slides(chapter):
        title = title or slide.heading
        heading = MARKDOWN.renderInline(resolve(slide.heading, book, where))
        level = "h1" if slide.kind == "title" else "h2"
        notes = f'\n<aside class="notes">\n{rendered(slide.notes)}</aside>' if slide.notes.strip() else ""
        body = f"<{level}>{heading}</{level}>\n{slide.shown}\n{rendered(slide.text)}"
        parts.append(f'<section class="{slide.kind}">\n{body}{notes}\n</section>')
    return PAGE.format(title=html.escape(title), slides="\n".join(parts))


def write(executed: Path, folder: Path) -> list[Path]:
    """The slides of all chapters that were run, from the notebooks in `executed` into `folder`.

    Raises:
        EditionError: see `page`.
    """
    book = Book.of(ROOT, pages="..")  # for the folder slides/ of the built book
    shutil.copytree(REVEAL, folder / "reveal", dirs_exist_ok=True)
    written = []
    for path in sorted(executed.glob("*.ipynb")):
        written.append(folder / f"{path.stem}.html")
        written[-1].write_text(page(nbformat.read(path, as_version=4), book, path.name), encoding="utf-8")
    return written
