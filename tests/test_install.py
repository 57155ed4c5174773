"""samelib as Colab has it: a wheel, no checkout. Chapters must find their code, their rows and their models there."""

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from chapters import notebooks

from course.colab import copy_sources

ROOT = Path(__file__).parents[1]
NOTEBOOKS = notebooks(ROOT)
PARAMETERS = 'TIER = "smoke"\nDATA = "glyphs"\nSEED = 0'


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment that has the wheel, and all else from the environment of this test."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    copy_sources(source)
    python = environment / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", site, source], check=True)
    (site / "dependencies.pth").write_text(
        sysconfig.get_path("purelib")
    )  # after the wheel, and without editable installs
    return python


def run(python: Path, folder: Path, *command: str) -> str:
    """What a Python program prints, started in `folder`, where no checkout is on its path.

    Raises:
        AssertionError: it failed; the message is the end of what it printed.
    """
    environment = os.environ | {"MPLBACKEND": "agg", "IPYTHONDIR": str(folder), "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    """A chapter's code cells, at smoke tier."""
    cells = [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = PARAMETERS
    return cells


def imports(name: str) -> list[str]:
    """The statements of a chapter that import from the two packages."""
    nodes = [node for cell in code_cells(name) for node in ast.walk(ast.parse(cell.source))]
    found = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return [line for line in found if "samelib" in line or "reproduction" in line]


def test_nothing_comes_from_the_checkout(python, tmp_path):
    origins = "print(*(find_spec(name).origin for name in ('samelib', 'reproduction')))"
    printed = run(python, tmp_path, "-c", f"from importlib.util import find_spec; {origins}")
    assert str(ROOT) not in printed and printed.count(str(python.parents[1])) == 2


def test_every_chapter_imports_what_is_installed(python, tmp_path):
    lines = [line for name in NOTEBOOKS for line in imports(name)]
    assert any("reproduction" in line for line in lines)
    run(python, tmp_path, "-c", "\n".join(lines))


def test_every_page_of_rows_is_made(python, tmp_path):
    pages = "from reproduction import ledger_page\nfrom reproduction.benchmarks import report\nprint(ledger_page.page(), report.page())"
    printed = run(python, tmp_path, "-c", pages)
    assert "lecture, 3 seeds" in printed and "ViT-Tiny" in printed


@pytest.mark.slow
def test_the_chapter_of_the_reproduction_runs(python, tmp_path):
    (name,) = (name for name in NOTEBOOKS if "reproduction" in name)
    nbformat.write(nbformat.v4.new_notebook(cells=code_cells(name)), tmp_path / "chapter.ipynb")
    run(python, tmp_path, "-m", "IPython", "--colors=nocolor", "chapter.ipynb")
