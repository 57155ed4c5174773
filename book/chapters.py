"""Run the book's notebooks into its staged copy: side by side, each in a process of its own with one thread.

A notebook is run again only if something it depends on has changed (see `digest`).
"""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import get_kernel_dict
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from course.editions import with_solutions

KERNEL_TIMEOUT = 300  # seconds for a kernel to begin, on a machine that is busy with much else
CELL_TIMEOUT = {"smoke": 300, "lecture": 1800, "paper": None}  # seconds: a cell that hangs must not hang the build
PAPERMILL_ERRORS = (PapermillExecutionError, RuntimeError, TimeoutError)  # a cell raised, its kernel died, it hung
WIDGET = "application/vnd.jupyter.widget-view+json"
# Floating-point operations of one chapter, at smoke tier with the solutions of its exercises; a model that several share
# is trained by whichever comes first. A slow core does about 5e10 a second: 60 seconds, and under 2 minutes.
MOST_OPERATIONS = {"smoke": 3e12, "lecture": 5.5e12}
DECISIVE = (  # what decides the figures of every chapter
    "book/*.py",
    "requirements.txt",
    "course/editions.py",
    "samelib/**/*.py",
    "samelib/published/*/*",
    "reproduction/**/*.py",
    "reproduction/results/*.json*",
)


class BuildError(Exception):
    """The book cannot be built; the message says why and where to look."""


@dataclass(frozen=True)
class Build:
    """One book: which checkout, at which scale, on which data."""

    root: Path
    tier: str
    data: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.root / "_build" / re.sub(r"[^\w.]+", "-", f"{self.tier}-{self.data}")

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def index(self) -> Path:
        return self.folder / "html" / "index.html"

    @property
    def parameters(self) -> dict:
        return {"TIER": self.tier, "DATA": self.data, "SEED": self.seed}

    def log(self, name: str) -> Path:
        path = self.folder / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def notebooks(root: Path) -> list[str]:
    """The notebooks of the table of contents, in its order, as paths relative to `root`."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    pages = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [f"{page}.ipynb" for page in pages if page.startswith("notebooks/")]


def digest(build: Build, *patterns: str) -> str:
    """Hash of the files that match `patterns` and of all else that decides what they show.

    That is: the parameters, both packages with their published models and rows, the pins, local data. Local data
    counts by the names, sizes and times of its files: reading gigabytes at every build would be too slow.
    """
    total = hashlib.sha256(json.dumps(build.parameters).encode())
    checks = ["course/check/*.py"] if build.tier == "smoke" else []  # solutions run at this tier, see `execute`
    for pattern in (*patterns, *DECISIVE, *checks):
        for path in sorted(p for p in build.root.glob(pattern) if p.is_file() and "__pycache__" not in p.parts):
            total.update(f"\0{path.relative_to(build.root)}\0".encode() + path.read_bytes())
    folders = [os.environ.get("SAMELIB_DATA"), build.data[5:] if build.data.startswith("path:") else None]
    for folder in filter(None, folders):
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            total.update(f"\0{path}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}".encode())
    return total.hexdigest()


def metadata(build: Build, name: str) -> NotebookNode:
    """What the staged copy of a notebook says of its last run; empty where there was none."""
    path = build.source / name
    return nbformat.read(path, as_version=4).metadata if path.is_file() else NotebookNode()


def run_chapters(build: Build, names: list[str], jobs: int | None = None) -> list[str]:
    """Run what is not valid; all of it, even after a failure, so that one build shows every failure.

    Those that took longest last time start first, so that none is left over at the end.

    Args:
        build: the book.
        names: its notebooks, as `notebooks` names them.
        jobs: how many run at a time; by default as many as there are cores.

    Returns:
        The names of those that ran.

    Raises:
        BuildError: cells failed; the message shows them, and the notebooks as far as they ran stay in build.source.
    """
    digests = {name: digest(build, name) for name in names}
    last = {name: metadata(build, name) for name in names}
    stale = [name for name in names if last[name].get("samelib_book", {}).get("digest") != digests[name]]
    for name in names:
        if name not in stale:
            print_outcome(name, "still valid")
    if not stale:
        return []
    # The run that a reader interrupted has left no duration.
    stale.sort(key=lambda name: -(last[name].get("papermill", {}).get("duration") or float("inf")))
    write_kernel(build)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["papermill"])  # it takes seconds to import: once is enough
    environment = {**os.environ, "JUPYTER_PATH": str(build.folder / "jupyter"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    )
    errors = []
    with ProcessPoolExecutor(jobs or os.cpu_count(), context, max_tasks_per_child=1) as pool:
        running = {pool.submit(execute, build, name, environment): name for name in stale}
        here = machine()
        for future in as_completed(running):
            name = running[future]
            try:
                figures = future.result()
            except BuildError as error:
                errors.append(str(error))
                print_outcome(name, "FAILED")
                continue
            finish(build, name, {"digest": digests[name], **figures, **here})
            seconds, peak, operations = metadata(build, name).papermill.duration, *figures.values()
            print_outcome(name, f"{seconds:4.0f} s {peak:6,} MiB {operations:8.1e} operations")
    if errors:
        raise BuildError("\n\n".join(errors))
    return stale


def print_outcome(name: str, outcome: str) -> None:
    print(f"  {Path(name).stem:32} {outcome}", flush=True)


def write_kernel(build: Build) -> None:
    """Make the kernel "python3" mean sys.executable: one installed in the user's home would go before it otherwise."""
    spec = build.folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["--log-level=CRITICAL", "--IPKernelApp.exec_lines=import operations"]
    spec.write_text(json.dumps(get_kernel_dict(extra_arguments=arguments)), encoding="utf-8")


def execute(build: Build, name: str, environment: dict[str, str]) -> dict[str, int]:
    """Run a notebook into the staged copy, which papermill saves after every cell. For a process of its own.

    At smoke tier, the one of the tests, the solutions of its exercises run behind it.

    Args:
        build: the book.
        name: of the notebook.
        environment: of its kernel; the process that all these are forked from may know an older one.

    Returns:
        "peak_mib": the most memory that its kernel held; "operations": see book/operations.py.

    Raises:
        BuildError: a cell failed.
    """
    operations = build.log(Path(name).stem).with_suffix(".operations")
    os.environ |= environment | {"SAMELIB_OPERATIONS": str(operations)}
    target, log = build.source / name, build.log(Path(name).stem)
    chapter = nbformat.read(build.root / name, as_version=4)
    if build.tier == "smoke":
        chapter = with_solutions(chapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        try:
            papermill.execute_notebook(
                chapter,
                target,
                parameters=build.parameters,
                kernel_name="python3",
                language="python",
                cwd=target.parent,
                progress_bar=False,
                stdout_file=stream,
                stderr_file=stream,
                start_timeout=KERNEL_TIMEOUT,
                execution_timeout=CELL_TIMEOUT[build.tier],
            )
        except PAPERMILL_ERRORS as error:
            message = f"{name} failed:\n{error}\nas far as it ran: {target}\nits log: {log}"
            raise BuildError(message) from None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit
    return {"peak_mib": peak, "operations": int(operations.read_text())}


def too_many_operations(build: Build, name: str) -> list[str]:
    """The problem, if a chapter does more work on the embedded digits than its tier allows."""
    most, operations = MOST_OPERATIONS.get(build.tier), metadata(build, name).samelib_book.operations
    if build.data != "glyphs" or most is None or operations <= most:
        return []
    return [f"{name}: {operations:.1e} floating-point operations, a chapter of the {build.tier} tier may do {most:.1e}"]


def machine() -> dict[str, str]:
    """What the notebooks run on, for the status page."""
    import torch  # only here: a build that runs nothing need not wait for it

    import samelib

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    return {"samelib": samelib.__version__, "torch": torch.__version__, "device": device}


def finish(build: Build, name: str, run: dict) -> None:
    """Make an executed notebook a page: say its parameters in words, drop widgets, note what `run` says of the run.

    Papermill puts a second parameters cell below the first; a reader should not wonder which one counts. A finished
    progress bar tells a reader nothing, and its script would come from a CDN.
    """
    notebook = nbformat.read(build.source / name, as_version=4)
    values = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in build.parameters.items())
    for i, cell in enumerate(notebook.cells):
        if "injected-parameters" in cell.metadata.get("tags", []):
            notebook.cells[i] = nbformat.v4.new_markdown_cell(f"*What you see on this page was run with {values}.*")
        elif cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["samelib_book"] = run
    nbformat.write(notebook, build.source / name)
