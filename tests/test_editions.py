"""Editions of the chapters: nothing of MyST is left, and the solutions go where they belong."""

import ast
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from course.colab import PACKAGES
from course.editions import (
    KINDS,
    MYST,
    Book,
    EditionError,
    citations,
    edition,
    glossary,
    resolve,
    solutions,
    with_solutions,
    write,
)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOOK = Book("https://book", {"a2020one": "A, 2020"}, {"query budget": "term-query-budget"})
EXERCISES = """## Exercises

**1 ★** Why {term}`query budget`s?

:::{admonition} Hint
:class: dropdown
Think of {cite}`a2020one`.
:::

:::{admonition} Solution
:class: dropdown
Because.
```python
print(1)
```
So it is.
:::

**2 ★★** And then?

## Recap

- See [chapter 2](02_b.ipynb#there) and [](../book/data.md).
"""


def chapter(text: str = EXERCISES) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell('TIER = "lecture"  # which\nSEED = 0', metadata={"tags": ["parameters"]})]
    return nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_markdown_cell(text, id="end")])


def answers_of(path: Path) -> list[str]:
    """The code of all solutions in a chapter."""
    return [code for codes in solutions(nbformat.read(path, as_version=4)).values() for code in codes]


def made(kind: str, text: str = EXERCISES) -> list[tuple[str, str]]:
    cells = edition(chapter(text), kind, BOOK).cells
    return [(cell.cell_type, cell.source) for cell in cells]


@pytest.mark.parametrize("kind", KINDS)
def test_every_chapter_has_every_edition(kind, tmp_path):
    written = write(kind, tmp_path)
    assert [path.name for path in written] == [path.name for path in NOTEBOOKS]
    for path, source in zip(written, NOTEBOOKS, strict=True):
        notebook, answers = nbformat.read(path, as_version=4), answers_of(source)
        nbformat.validate(notebook)
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert not MYST.search(text) and answers
        assert (set(answers) <= set(code)) == (kind == "solution")


def test_a_student_gets_a_cell_to_answer_in_and_no_solution():
    (_, _), (_, head), (_, first), stub, (_, second), stub_2, (_, recap) = made("student")
    assert head == "## Exercises" and stub == ("code", "# your answer to exercise 1") and stub_2[1].endswith("2")
    assert "[query budget](https://book/book/glossary.html#term-query-budget)s" in first
    assert "<details><summary>Hint</summary>\n\nThink of (A, 2020).\n\n</details>" in first
    assert "Because" not in first + second and second == "**2 ★★** And then?"
    assert "[chapter 2](https://book/notebooks/02_b.html#there)" in recap and "https://book/book/data.html" in recap


def test_a_solution_is_text_and_code():
    cells = made("solution")[3:6]
    words = "**Solution to exercise 1.** Because."
    assert cells == [("markdown", words), ("code", "print(1)"), ("markdown", "So it is.")]


def test_colab_has_forms():
    parameters = made("colab")[0][1]
    assert (
        parameters == 'TIER = "lecture"  # @param ["smoke", "lecture", "paper"]\nSEED = 0  # @param {type: "integer"}'
    )


@pytest.mark.parametrize(
    "text", ["{ref}`here`", ":::{note}\nx\n:::", "```{figure} a.png\n```", "{cite}`b1999`", "{term}`b`"]
)
def test_what_no_edition_can_show_is_an_error(text):
    with pytest.raises(EditionError, match="end"):
        made("student", text)


def test_questions_for_a_section_that_is_not_there_are_an_error(monkeypatch):
    monkeypatch.setattr("course.editions.quizzes", lambda chapter: {"Nowhere": []})
    with pytest.raises(EditionError, match="Nowhere"):
        made("student")


def test_a_box_becomes_a_quotation():
    assert resolve("```{admonition} Care\n:class: tip\na\n\nb\n```", BOOK, "x") == "> **Care**\n>\n> a\n> \n> b"


def test_citations_are_read_from_the_bibliography():
    found = citations((ROOT / "book" / "references.bib").read_text(encoding="utf-8"))
    assert found["xie2024same"] == "Xie et al., 2024" and found["tramer2016stealing"].startswith("Tram")
    assert found["mitre_atlas"].startswith("The MITRE Corporation, ")
    assert all(text.endswith("n.d.") or text[-4:].isdigit() for text in found.values())


def test_terms_are_found_whatever_their_case():
    assert glossary("```{glossary}\nROC curve\n  A curve.\n\nTPR at 1 %\n  A rate.\n```\n") == {
        "roc curve": "term-ROC-curve",
        "tpr at 1 %": "term-TPR-at-1",
    }
    terms = Book.of(ROOT).terms
    assert terms["prada"] == "term-PRADA" and resolve("{term}`Views <view>`", Book.of(ROOT), "x").startswith("[Views](")


def test_solutions_run_behind_the_chapter_and_are_not_shown():
    last = with_solutions(chapter()).cells[-1]
    assert last.source == "print(1)" and last.metadata.tags == ["remove-cell"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_solution_is_python(path):
    for code in answers_of(path):
        ast.parse(code)


def test_colab_keeps_models_in_drive_if_asked_and_links_its_chapters(tmp_path):
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    first, *_, last = (nbformat.read(path, as_version=4) for path in write("colab", tmp_path))
    tag = f"{config['url'].removeprefix('https://github.com')}/blob/{config['branch']}/notebooks"
    assert first.cells[0].source.count(tag) == len(NOTEBOOKS) - 1 and "**1** [2](" in first.cells[0].source
    drive = next(cell.source for cell in first.cells if "KEEP_MODELS_IN_DRIVE" in cell.source)
    exec(drive, {})  # outside Colab nothing happens
    assert first.metadata.accelerator == "GPU" and "accelerator" not in last.metadata


def colab_packages() -> dict[str, str]:
    """The version that Colab had of each package; empty where it is not written down."""
    lines = [line for line in PACKAGES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def test_colab_has_what_the_packages_need_in_versions_that_they_take():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*declared["dependencies"], *declared["optional-dependencies"]["reproduction"]]
    found = colab_packages()
    for requirement in map(Requirement, needed):
        assert requirement.name in found, f"Colab has no {requirement.name}, and the setup cell installs nothing else"
        version = found[requirement.name]
        assert not version or requirement.specifier.contains(version)


def test_chapters_import_nothing_that_colab_lacks():
    modules = {"PIL": "pillow", "sklearn": "scikit-learn", "IPython": "ipython"}
    for path in NOTEBOOKS:
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        nodes = [node for source in code for node in ast.parse(source).body]  # not what a chapter asks for first
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"samelib", "reproduction"}
        assert {modules.get(root, root) for root in roots} <= set(colab_packages()), path.stem
