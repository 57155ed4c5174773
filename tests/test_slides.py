"""Slides: what stands on them comes from the run chapter, and nothing of MyST is left."""

import nbformat
import pytest

from course.editions import Book
from course.slides import LONGEST, REVEAL, page, slides, write

FIRST = """# The title: and more

An opening.

**What you will learn**

- one thing;
- another.

**What you need**: little.
"""
SECTION = """## A section

It begins so. The {term}`victim` is asked {cite}`a2020one`.

$$
x = y
$$

\\begin{equation*}
a = b
\\end{equation*}

### A smaller one

- a list comes first
"""
SAID = "**What this figure shows.** It falls. " + "It goes on and on. " * 30
EXERCISES = """## Exercises

**1 ★ Name.** What is asked.

:::{admonition} Solution
:class: dropdown
Secret.
```python
# A comment is no heading.
```
:::

## Recap

- That was it.

## Next

More.
"""


def figure(**metadata) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell("draw()", metadata={"mystnb": {"image": {"alt": 'A "line" falls.'}}} | metadata)
    cell.outputs = [nbformat.v4.new_output("display_data", data={"image/png": "AAAA\n", "text/plain": "<Figure>"})]
    return cell


def chapter() -> nbformat.NotebookNode:
    says = nbformat.v4.new_code_cell("says")
    says.outputs = [nbformat.v4.new_output("execute_result", data={"text/markdown": SAID}, execution_count=1)]
    table = nbformat.v4.new_code_cell("table")
    table.outputs = [
        nbformat.v4.new_output("display_data", data={"text/markdown": "| a | b |\n| --- | --- |\n| 1 | 2 |"})
    ]
    text = [nbformat.v4.new_markdown_cell(text) for text in (FIRST, SECTION, EXERCISES)]
    cells = [text[0], figure(tags=["setup"]), text[1], figure(), says, table, text[2]]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_chapter_becomes_slides_in_its_order():
    title, learn, section, smaller, shown, table, exercises, recap = slides(chapter())
    assert (title.heading, title.kind) == ("The title: and more", "title") and title.notes.strip() == "An opening."
    assert learn.text.strip() == "- one thing;\n- another."
    assert section.heading == "A section" and section.text.startswith("It begins so. The {term}`victim`")
    assert "x = y" in section.text and "a = b" in section.text
    assert smaller.kind == "section" and not smaller.text.strip() and "a list" in smaller.notes
    assert shown.heading == "A smaller one" and shown.text.startswith("It falls. It goes on")
    assert len(shown.text) <= LONGEST + 20 and len(shown.notes) > 500  # what does not fit is said
    assert "<td>1</td>" in table.shown and table.heading == "A smaller one"
    assert "**1 ★ Name.** What is asked." in exercises.text and "Secret" not in exercises.text + exercises.notes
    assert recap.text.strip() == "- That was it."


def test_the_page_has_pictures_with_their_text_formulas_and_notes():
    text = page(chapter(), Book("..", {"a2020one": "A, 2020"}, {"victim": "term-victim"}), "here")
    assert 'src="data:image/png;base64,AAAA" alt="A &quot;line&quot; falls."' in text
    assert r"\[" in text and r"\begin{equation*}" in text and '<aside class="notes">' in text
    assert '<a href="../book/glossary.html#term-victim">victim</a>' in text and "(A, 2020)" in text
    assert text.count("<section") == text.count("</section>") == 8
    for file in ("reveal.js", "notes.js", "reveal.css", "reset.css", "slides.css"):
        assert f"reveal/{file}" in text and (REVEAL / file).is_file()
    assert "http" not in text.partition("<body>")[0]


@pytest.mark.parametrize("length", [0, 2])
def test_every_executed_chapter_is_written(length, tmp_path):
    (tmp_path / "run").mkdir()
    for number in range(length):
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / "run" / f"{number}.ipynb")
    written = write(tmp_path / "run", tmp_path / "slides")
    assert [path.name for path in written] == [f"{number}.html" for number in range(length)]
    assert (tmp_path / "slides" / "reveal" / "reveal.js").is_file()
