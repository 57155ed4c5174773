"""The book: notebooks as they stand in git, their runs at smoke tier, the built pages, and the checks themselves."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from build import build_book, stage
from chapters import Build, BuildError, digest, notebooks, run_chapters, too_many_operations
from check_pages import check_notebook, check_pages

import samelib

ROOT = Path(__file__).parents[1]
NOTEBOOKS = notebooks(ROOT)
SMOKE = Build(ROOT, "smoke", "glyphs", 0)
MENTION = r"github(?:\.com)?/([\w-]+/same-book)(?:\.git)?(?:/blob/|/tree/|/archive/|@)((?:colab-)?v[\d.]*\d|\w+)"  # (repository, tag)
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS, ids=lambda name: Path(name).stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    """One for all chapters, as a reader has."""
    monkeypatch.setenv("SAMELIB_CACHE", str(cache))


@pytest.fixture(scope="module")
def runs(cache, pytestconfig) -> str:
    """Every notebook at smoke tier, one after another: a second core has other tests. What went wrong, or nothing."""
    stage(SMOKE)
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with pytest.MonkeyPatch.context() as patch, capture.global_and_fixture_disabled():
        patch.setenv("SAMELIB_CACHE", str(cache))
        print()
        try:
            run_chapters(SMOKE, NOTEBOOKS, jobs=1)
        except BuildError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def book(runs) -> Build:
    """The book at smoke tier, of notebooks that have run."""
    build, _ = build_book(ROOT, "smoke")
    return build


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
    assert assigned == {"TIER": "lecture", "DATA": "glyphs", "SEED": 0}


def test_repository_and_tag_are_those_of_the_config():
    repository = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    tag = f"v{samelib.__version__}"
    assert repository["branch"] == f"colab-{tag}"
    sources = [ROOT / "README.md", *(ROOT / "book").glob("*.md"), *(ROOT / name for name in NOTEBOOKS)]
    mentions = [found for path in sources for found in re.findall(MENTION, path.read_text(encoding="utf-8"))]
    name = repository["url"].removeprefix("https://github.com/")
    assert set(mentions) <= {(name, tag), (name, f"colab-{tag}")}


# Runs and pages


@every_notebook
def test_notebook_runs(name, runs):
    assert f"{name} failed" not in runs, runs
    assert not check_notebook(SMOKE.source / name) + too_many_operations(SMOKE, name)
    run = read(SMOKE.source / name).metadata.papermill
    assert run.parameters == SMOKE.parameters and not run.exception


def test_book_is_built_and_nothing_is_done_twice(book, capsys):
    rendered = book.index.stat().st_mtime_ns
    again, ran = build_book(ROOT, "smoke")
    assert ran == [] and again.index.stat().st_mtime_ns == rendered
    with capsys.disabled():
        print(f"\nThe book, smoke tier: {again.index}")


def test_generated_pages_are_in_the_book_and_not_in_git(book):
    for name in ("ledger", "measurements", "expected"):
        assert (book.index.parent / "book" / f"{name}.html").is_file()
        assert not (ROOT / "book" / f"{name}.md").exists()


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


# What makes a run invalid, and how a failing notebook is reported: on a book of few cells


def tiny_book(root: Path, **chapters: str) -> Build:
    """A book of one chapter for each name, with this code in its only cell after the parameters."""
    for folder in ("book", "notebooks", "samelib", "reproduction/results"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", root)
    (root / "samelib" / "a.py").write_text("")
    (root / "_config.yml").write_text("title: tiny\n")
    files = [{"file": f"notebooks/{name}"} for name in chapters]
    (root / "_toc.yml").write_text(yaml.safe_dump({"root": "book/intro", "parts": [{"chapters": files}]}))
    cell = nbformat.v4.new_code_cell('TIER = "smoke"\nDATA = "glyphs"\nSEED = 0', metadata={"tags": ["parameters"]})
    for name, code in chapters.items():
        cells = [cell, nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "notebooks" / f"{name}.ipynb")
    return Build(root, "smoke", "glyphs", 0)


def test_digest_follows_all_that_a_notebook_depends_on(tmp_path, monkeypatch):
    monkeypatch.delenv("SAMELIB_DATA", raising=False)
    book = tiny_book(tmp_path / "root", one="1")
    seen = [digest(book, "notebooks/one.ipynb")]
    assert digest(book, "notebooks/one.ipynb") == seen[0]
    decisive = ("samelib/a.py", "samelib/new.py", "reproduction/run.py", "reproduction/results/rows.jsonl")
    for path in (*decisive, "requirements.txt", "notebooks/one.ipynb"):
        with (book.root / path).open("a") as file:
            file.write("\n")
        seen.append(digest(book, "notebooks/one.ipynb"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").write_bytes(b"123")
    monkeypatch.setenv("SAMELIB_DATA", str(tmp_path / "data"))
    seen.append(digest(book, "notebooks/one.ipynb"))
    seen.append(digest(Build(book.root, "smoke", "glyphs", 1), "notebooks/one.ipynb"))
    assert len(set(seen)) == len(seen)


def test_failing_notebook_is_reported_and_kept_and_stops_no_other(tmp_path):
    book = tiny_book(tmp_path, one="print('so far')\nraise ValueError('no such victim')", two="1", three="1")
    stage(book)
    with pytest.raises(BuildError, match="(?s)one.ipynb failed.*In \\[3\\].*no such victim"):
        run_chapters(book, notebooks(book.root), jobs=1)
    kept = book.source / "notebooks" / "one.ipynb"
    assert "so far" in kept.read_text(encoding="utf-8")
    assert ["no such victim" in problem for problem in check_notebook(kept)] == [True]
    (book.root / "notebooks" / "one.ipynb").write_bytes((book.root / "notebooks" / "two.ipynb").read_bytes())
    assert run_chapters(book, notebooks(book.root)) == ["notebooks/one.ipynb"], "only a run that failed is repeated"


def test_chapters_run_side_by_side_with_one_thread_each(tmp_path, cache):
    meet = """
import os, time
from pathlib import Path
Path({own!r}).touch()
while not Path({other!r}).exists():
    time.sleep(0.05)
print(os.environ["OMP_NUM_THREADS"], os.environ["SAMELIB_CACHE"])
"""
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    book = tiny_book(tmp_path, one=meet.format(own=here, other=there), two=meet.format(own=there, other=here))
    stage(book)
    assert len(run_chapters(book, notebooks(book.root), jobs=2)) == 2  # one after the other, they would wait for ever
    for name in notebooks(book.root):
        assert read(book.source / name).cells[-1].outputs[0].text == f"1 {cache}\n"


def test_the_longest_chapter_starts_first(tmp_path):
    """And before it one whose last run was interrupted: papermill has noted no duration."""
    book = tiny_book(tmp_path, short="pass", long="pass", interrupted="pass")
    stage(book)
    for name, duration in zip(notebooks(book.root), (1.0, 2.0, None), strict=True):
        past = nbformat.v4.new_notebook(metadata={"papermill": {"duration": duration}})
        (book.source / name).parent.mkdir(exist_ok=True)
        nbformat.write(past, book.source / name)
    order = [f"notebooks/{name}.ipynb" for name in ("interrupted", "long", "short")]
    assert run_chapters(book, notebooks(book.root), jobs=1) == order


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
