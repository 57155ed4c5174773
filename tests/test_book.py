"""The book: notebooks as they stand in git, their runs at smoke tier, the built pages, and the checks themselves."""

import ast
import re
import shutil
from pathlib import Path

import build
import nbformat
import pytest
import yaml
from check_pages import check_notebook, check_pages

import samelib

ROOT = Path(__file__).parents[1]
NOTEBOOKS = build.notebooks(ROOT)
SMOKE = build.Build(ROOT, "smoke", "glyphs", 0)
MENTION = (
    r"github(?:\.com)?/([\w-]+/same-book)(?:\.git)?(?:/blob/|/tree/|/archive/|@)(v?[\d.]*\d|\w+)"  # (repository, tag)
)
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS, ids=lambda name: Path(name).stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def book() -> build.Build:
    """The book at smoke tier. The notebooks' own tests come first, so here they are already valid."""
    built, _ = build.build_book(ROOT, "smoke")
    return built


# Notebooks as they stand in git


@every_notebook
def test_notebook_source_is_clean(name):
    notebook = read(ROOT / name)
    nbformat.validate(notebook)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(ids) == len(set(ids)), "cell ids must be unique"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"cell {cell['id']} has outputs: clear them"
            assert len(cell.source.splitlines()) <= 40, f"cell {cell['id']} is longer than 40 lines"


@every_notebook
def test_notebook_has_one_cell_of_parameters(name):
    tagged = [c for c in read(ROOT / name).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assigned = {s.targets[0].id: s.value.value for s in ast.parse(tagged[0].source).body}
    assert assigned == {"TIER": "smoke", "DATA": "glyphs", "SEED": 0}


def test_repository_and_tag_are_those_of_the_config():
    repository = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    assert repository["branch"] == f"v{samelib.__version__}"
    sources = [ROOT / "README.md", *(ROOT / "book").glob("*.md"), *(ROOT / name for name in NOTEBOOKS)]
    mentions = [found for path in sources for found in re.findall(MENTION, path.read_text(encoding="utf-8"))]
    assert set(mentions) <= {(repository["url"].removeprefix("https://github.com/"), repository["branch"])}


# Runs and pages


@every_notebook
def test_notebook_runs(name, capsys):
    build.stage(SMOKE)
    with capsys.disabled():
        print()
        build.run_notebook(SMOKE, name)
    assert not check_notebook(SMOKE.source / name)
    run = read(SMOKE.source / name).metadata.papermill
    assert run.parameters == SMOKE.parameters and not run.exception


def test_book_is_built_and_nothing_runs_twice(book, capsys):
    again, ran = build.build_book(ROOT, "smoke")
    assert ran == 0 and again.index.is_file()
    with capsys.disabled():
        print(f"\nThe book, smoke tier: {again.index}")


def test_status_page_lists_every_run(book):
    page = (book.index.parent / "book" / "status.html").read_text(encoding="utf-8")
    for name in NOTEBOOKS:
        assert Path(name).stem in page
    assert page.count("<td><p>passed</p></td>") == len(NOTEBOOKS) and samelib.__version__ in page


def test_pages_do_not_show_the_injected_cell(book):
    for name in NOTEBOOKS:
        page = (book.index.parent / name).with_suffix(".html").read_text(encoding="utf-8")
        assert "tag_injected-parameters" not in page and "was run with" in page


def test_pages_are_in_order(book):
    assert check_pages(book.index.parent) == []


# What makes a run invalid, and how a failing notebook is reported: on a book of one notebook


def tiny_book(root: Path, code: str) -> build.Build:
    for folder in ("book", "notebooks", "samelib", "results"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", root)
    (root / "samelib" / "a.py").write_text("")
    (root / "_config.yml").write_text("title: tiny\n")
    (root / "_toc.yml").write_text("root: book/intro\nparts:\n  - chapters:\n      - file: notebooks/one\n")
    cell = nbformat.v4.new_code_cell('TIER = "smoke"\nDATA = "glyphs"\nSEED = 0', metadata={"tags": ["parameters"]})
    cells = [cell, nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "notebooks" / "one.ipynb")
    return build.Build(root, "smoke", "glyphs", 0)


def test_digest_follows_all_that_a_notebook_depends_on(tmp_path, monkeypatch):
    monkeypatch.delenv("SAMELIB_DATA", raising=False)
    book = tiny_book(tmp_path / "root", "1")
    seen = [build.digest(book, "notebooks/one.ipynb")]
    assert build.digest(book, "notebooks/one.ipynb") == seen[0]
    for path in ("samelib/a.py", "samelib/new.py", "results/row.jsonl", "requirements.txt", "notebooks/one.ipynb"):
        with (book.root / path).open("a") as file:
            file.write("\n")
        seen.append(build.digest(book, "notebooks/one.ipynb"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").write_bytes(b"123")
    monkeypatch.setenv("SAMELIB_DATA", str(tmp_path / "data"))
    seen.append(build.digest(book, "notebooks/one.ipynb"))
    seen.append(build.digest(build.Build(book.root, "smoke", "glyphs", 1), "notebooks/one.ipynb"))
    assert len(set(seen)) == len(seen)


def test_failing_notebook_is_reported_and_kept(tmp_path):
    book = tiny_book(tmp_path, "print('so far')\nraise ValueError('no such victim')")
    build.stage(book)
    with pytest.raises(build.BuildError, match="(?s)one.ipynb failed.*In \\[3\\].*no such victim"):
        build.run_notebooks(book)
    kept = book.source / "notebooks" / "one.ipynb"
    assert "so far" in kept.read_text(encoding="utf-8")
    assert ["no such victim" in problem for problem in check_notebook(kept)] == [True]
    assert "digest" not in read(kept).metadata.get("samelib_book", {}), "a failed run must never count as valid"


def test_check_finds_a_warning_on_stderr(tmp_path):
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="100%|####| 3/3"),
        nbformat.v4.new_output("stream", name="stderr", text="a.py:1: UserWarning: careful\n  f()"),
    ]
    cell = nbformat.v4.new_code_cell("f()", outputs=outputs)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "one.ipynb")
    assert check_notebook(tmp_path / "one.ipynb") == ["one.ipynb, cell 0: printed 'a.py:1: UserWarning: careful'"]


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="missing.html">x</a>', "missing.html: no such file"),
        ('<a href="other.html#nowhere">x</a>', "other.html#nowhere: no such anchor"),
        ('<a href="#nowhere">x</a>', "#nowhere: no such anchor"),
        ('<img src="missing.png" alt="A curve">', "missing.png: no such file"),
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js from the network"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "loads //cdn.example/x.css from the network"),
        ('<img src="there.png">', "no alternative text"),
        ('<img src="there.png" alt=" ">', "no alternative text"),
        ('<img src="there.png" alt="_images/there.png">', "no alternative text"),
        ('<img src="there.png" alt="A curve">', None),
        ('<h2 id="é x"></h2><a href="#%C3%A9%20x">x</a>', None),
        ('<a href="other.html?q=1#here">x</a><a href="https://elsewhere.example/">y</a><a href="#">z</a>', None),
    ],
)
def test_check_finds_what_is_broken_on_a_page(tmp_path, html, problem):
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    (tmp_path / "other.html").write_text('<p id="here"></p>', encoding="utf-8")
    (tmp_path / "there.png").write_bytes(b"")
    found = check_pages(tmp_path)
    assert len(found) == (problem is not None), found
    if problem:
        assert problem in found[0] and found[0].startswith("page.html: ")


def test_check_finds_an_empty_folder(tmp_path):
    assert check_pages(tmp_path)
