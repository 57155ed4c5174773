"""Runs every chapter at smoke tier as Colab has it: its packages, samelib from a wheel, no checkout on the path.

`make colab` calls it. The environment takes 5 GB and a few minutes, once; chapters run side by side, one a core.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from course.editions import ROOT, EditionError, write

PACKAGES = Path(__file__).with_name("colab-packages.txt")
PYTHON = "python3.13"  # Colab's


def environment(folder: Path) -> Path:
    """The interpreter of an environment with Colab's packages, made in `folder` unless it is there already."""
    python, ready = folder / "bin" / "python", folder / "packages.txt"
    if ready.is_file() and ready.read_bytes() == PACKAGES.read_bytes():
        return python
    made_by = shutil.which(PYTHON)
    if made_by is None or subprocess.run([made_by, "--version"], capture_output=True, check=False).returncode:
        made_by = sys.executable
        print(f"no {PYTHON} here: Python {sys.version.split()[0]} in its place", flush=True)
    print(f"Installing what Colab has into {folder}", flush=True)
    subprocess.run([made_by, "-m", "venv", "--clear", folder], check=True)
    _pip(python, "-r", PACKAGES)
    shutil.copy(PACKAGES, ready)
    return python


def _pip(python: Path, *words: str | Path) -> None:
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, *words], check=True)


def copy_sources(folder: Path) -> None:
    """What is installed, copied out of the checkout: setuptools leaves its build where it runs."""
    for name in ("samelib", "reproduction", "course"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


def install_samelib(python: Path, folder: Path) -> None:
    """samelib as the setup cell installs it."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    copy_sources(source)
    _pip(python, "--no-deps", "--force-reinstall", source)


def run(chapter: Path, folder: Path) -> bool:
    """Runs one chapter at smoke tier in the kernel "colab"; returns whether it went through."""
    words = ["-p", "TIER", "smoke", "--kernel", "colab", "--cwd", folder, "--no-progress-bar"]
    words = [sys.executable, "-m", "papermill", chapter, folder / chapter.name, *words]
    environ = os.environ | {"JUPYTER_PATH": str(folder / "jupyter"), "SAMELIB_CACHE": str(folder / "cache")}
    environ |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython" / chapter.stem)}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    print(f"{chapter.stem}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
    if done.returncode:
        print(done.stderr[-3000:], flush=True)
    return done.returncode == 0


def main() -> None:
    folder = ROOT / "_build" / "colab"
    python = environment(ROOT / ".venv-colab")
    install_samelib(python, folder)
    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    try:
        chapters = write("colab", folder / "edition")
    except EditionError as error:
        raise SystemExit(f"error: {error}") from None
    with ThreadPoolExecutor(os.cpu_count()) as side_by_side:
        passed = sum(side_by_side.map(lambda chapter: run(chapter, folder), chapters))
    print(f"{passed} passed, {len(chapters) - passed} failed; the notebooks as they ran are in {folder}")
    sys.exit(passed < len(chapters))


if __name__ == "__main__":
    main()
