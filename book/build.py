"""Build the book: run its notebooks, write the generated pages, make the HTML, check it.

    python book/build.py --tier lecture --data glyphs

Everything happens under _build/TIER-DATA/, the checkout itself is never written to:

    source/   staged copy of the book, notebooks executed      logs/   what notebooks and Jupyter Book printed
    html/     the pages: open html/index.html                  valid   digest of all that the last good build was made of
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from chapters import Build, BuildError, digest, metadata, notebooks, run_chapters, too_many_operations
from check_pages import check_notebook, check_pages

from course import slides
from course.editions import EditionError, chapter_number
from course.quizzes import QuizError, quizzes, with_quizzes

TIERS = ("smoke", "lecture", "paper")
STATUS_MARKER = "<!-- STATUS TABLE -->"


def stage(build: Build) -> None:
    """Copy the book to build.source; executed notebooks that are still in the table of contents stay there."""
    keep = {build.source / name for name in notebooks(build.root)}
    for path in build.source.rglob("*"):
        if path.is_file() and path not in keep:
            path.unlink()
    build.source.mkdir(parents=True, exist_ok=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(build.root / name, build.source)
    ignore = shutil.ignore_patterns("*.ipynb", "*.py", "__pycache__", ".*")
    for name in ("book", "notebooks"):
        shutil.copytree(build.root / name, build.source / name, ignore=ignore, dirs_exist_ok=True)


def ask(build: Build, names: list[str]) -> None:
    """Put the questions of each chapter into its page, which need no run."""
    for path in (build.source / name for name in names):
        chapter = nbformat.read(path, as_version=4)
        try:
            chapter.cells = with_quizzes(chapter, quizzes(chapter_number(chapter)))
        except QuizError as error:
            raise BuildError(f"{path.name}: {error}") from None
        nbformat.write(chapter, path)


def write_generated_pages(build: Build) -> None:
    """Pages made from measured rows and from the runs; none of them is in git, so none can go stale."""
    from course import expected  # only here: they bring torch along
    from reproduction import ledger_page
    from reproduction.benchmarks import report

    pages = build.source / "book"
    (pages / "ledger.md").write_text(ledger_page.page(), encoding="utf-8")
    (pages / "measurements.md").write_text(report.page(), encoding="utf-8")
    (pages / "expected.md").write_text(expected.page(), encoding="utf-8")
    status = (pages / "status.md").read_text(encoding="utf-8")
    if STATUS_MARKER not in status:
        raise BuildError(f"book/status.md lacks the line {STATUS_MARKER}")
    (pages / "status.md").write_text(status.replace(STATUS_MARKER, status_table(build)), encoding="utf-8")
    draw_contact_sheets(build)


def status_table(build: Build) -> str:
    """Markdown table of the runs, from papermill's metadata (Jupyter Book's own is empty when it executes nothing)."""
    rows = [("notebook", "run with", "when (UTC)", "seconds", "memory", "operations", "outcome", "on")]
    rows.append(("---",) * len(rows[0]))
    for name in notebooks(build.root):
        run = metadata(build, name).papermill
        book = metadata(build, name).samelib_book
        link = f"[{Path(name).stem}](../{name})"
        scale = ", ".join(f"{key.lower()} {run.parameters[key]}" for key in build.parameters)
        when = run.start_time[:16].replace("T", " ")
        machine = f"samelib {book.samelib}, torch {book.torch}, {book.device}"
        outcome = "failed" if run.exception else "passed"
        rows.append(
            (
                link,
                scale,
                when,
                f"{run.duration:.0f}",
                f"{book.peak_mib:,} MiB",
                f"{book.operations:.1e}",
                outcome,
                machine,
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_contact_sheets(build: Build) -> None:
    """The data page's pictures of the embedded sets, drawn from the sets themselves, so that they cannot go stale."""
    from samelib.data.groups import load_group
    from samelib.plots import image_rows

    folder = build.source / "book" / "figures"
    folder.mkdir(exist_ok=True)
    for name in ("glyphs", "shapes"):
        sets = load_group(name, "smoke").sets()
        image_rows({part: images.images[:12] for part, images in sets.items()}).savefig(folder / f"contact_{name}.png")


def render(build: Build) -> None:
    """Make the pages, always all of them: a page kept from an earlier build would keep its warnings to itself."""
    made, log = build.folder / "_build", build.log("jupyter-book")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(build.source)]
    command += ["--path-output", str(build.folder), "-W", "-n", "--keep-going"]
    print(f"  making the pages (log: {log})", flush=True)
    shutil.rmtree(made, ignore_errors=True)
    shutil.rmtree(build.index.parent, ignore_errors=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    printed = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)  # colours, which Jupyter Book puts even into a pipe
    log.write_text(printed, encoding="utf-8")
    if done.returncode:
        worst = [line for line in printed.splitlines() if re.search("WARNING|ERROR|Error:|Exception", line)]
        raise BuildError("\n".join(["Jupyter Book failed:", *worst, f"its log: {log}"]))
    shutil.move(made / "html", build.index.parent)
    shutil.rmtree(made)


def build_book(
    root: Path, tier: str = "lecture", data: str = "glyphs", seed: int = 0, jobs: int | None = None
) -> tuple[Build, list[str]]:
    """The whole way from checkout to checked pages.

    Returns:
        The build, and the notebooks that had to run. Where nothing at all has changed since the last good build, its
        pages stay as they are.

    Raises:
        BuildError: a notebook fails, Jupyter Book warns, or a page does not pass `check_pages`.
    """
    build = Build(root.resolve(), tier, data, seed)
    names = notebooks(build.root)
    wanted = digest(build, *names, "_config.yml", "_toc.yml", "book/**/*", "course/**/*")
    valid = build.folder / "valid"
    if build.index.is_file() and valid.is_file() and valid.read_text() == wanted:
        print("Nothing has changed since the last build: its pages are still valid", flush=True)
        return build, []
    valid.unlink(missing_ok=True)
    print(f"Building the book ({len(names)} notebooks, {build.parameters}) in {build.folder}", flush=True)
    stage(build)
    ran = run_chapters(build, names, jobs)
    ask(build, names)
    write_generated_pages(build)
    render(build)
    try:
        slides.write(build.source / "notebooks", build.index.parent / "slides")
    except EditionError as error:
        raise BuildError(f"slides: {error}") from None
    print("  checking the pages", flush=True)
    problems = [p for name in names for p in check_notebook(build.source / name) + too_many_operations(build, name)]
    problems += check_pages(build.index.parent)
    if problems:
        raise BuildError("\n".join([f"{len(problems)} problems in {build.index.parent}:", *problems]))
    valid.write_text(wanted)
    return build, ran


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="lecture", help="scale of the experiments (default: lecture)")
    parser.add_argument("--data", default="glyphs", help="glyphs (default), glyphs-matched, shapes, mnist or cifar10")
    parser.add_argument("--seed", type=int, default=0, help="seed of every notebook (default: 0)")
    parser.add_argument("--jobs", type=int, help="notebooks that run at a time (default: as many as there are cores)")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        root = Path(__file__).parents[1]
        build, _ = build_book(root, options.tier, options.data, options.seed, options.jobs)
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(f"Built in {time.monotonic() - started:.0f} s. The book is here: {build.index}")


if __name__ == "__main__":
    main()
