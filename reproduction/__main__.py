"""python -m reproduction run | ledger: measures and draws the paper's tables and figures; prints the ledger."""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from reproduction import ablations, accounts, adaptive, bans, cost, curve, detection, ledger_page, responses, run, views
from reproduction.plan import TARGETS, cells_of, check_names, targets_of
from reproduction.rows import load_rows
from samelib.data.image_set import OutOfRangeWarning
from samelib.data.real import DataError
from samelib.detectors.power import WeakDetectorWarning
from samelib.plots import use_style
from samelib.store import MEASUREMENT, ArtifactError

AUDITED = (*detection.LABELS, "jbda, unclipped")
# The tables and figures of each target.
TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "table1": detection.detection_table,
    "table2": detection.detection_table,
    "table3": cost.cost_table,
    "table4": lambda frame: detection.ratio_table(frame, detection.LABELS),
    "figure4": lambda frame: f"{responses.responses_table(frame)}\n\n{responses.copies_table(frame)}",
    "http": responses.http_table,
    "figure7": ablations.width_table,
    "sharing": ablations.sharing_table,
    "audit": lambda frame: "\n\n".join(f"{label}\n\n{ablations.audit_table(frame, label)}" for label in AUDITED),
    "views": views.views_table,
    "scaling": views.scaling_table,
    "posthoc": detection.posthoc_table,
    "controls": detection.controls_table,
    "accounts": accounts.accounts_table,
    "attacks": lambda frame: detection.attack_table(frame, frame["label"].dropna().unique().tolist()),
    "adaptive": lambda frame: f"{adaptive.adaptive_table(frame)}\n\n{adaptive.by_account_table(frame)}",
    "bans": bans.bans_table,
    "prices": adaptive.prices_table,
}
FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "table1": detection.detectors_figure,
    "table2": detection.detectors_figure,
    "figure1": detection.figure1,
    "figure2": detection.figure2,
    "figure4": responses.figure4,
    "http": responses.http_figure,
    "figure5": detection.figure5,
    "figure6": curve.figure6,
    "figure7": ablations.figure7,
    "alpha": detection.alpha_figure,
    "scaling": views.scaling_figure,
    "adaptive": adaptive.adaptive_figure,
    "prices": adaptive.prices_figure,
}


def draw(target: str, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes the table (Markdown) and the figure (PNG) of a target; returns the files."""
    files = []
    if target in TABLES:
        files.append(folder / f"{target}.md")
        files[-1].write_text(TABLES[target](frame) + "\n")
    if target in FIGURES:
        files.append(folder / f"{target}.png")
        figure = FIGURES[target](frame)
        figure.savefig(files[-1], dpi=150)
        plt.close(figure)
    return files


def reproduce(arguments: argparse.Namespace) -> None:
    """Measures what is missing, and draws all of it."""
    check_names(arguments.data, arguments.tier, arguments.targets)
    warnings.simplefilter("ignore", OutOfRangeWarning)  # one attack of the audit leaves the range on purpose
    warnings.simplefilter("ignore", WeakDetectorWarning)  # what detectors are worth is what is measured here
    use_style()
    targets = targets_of(arguments.data, arguments.targets)
    for part in dict.fromkeys(TARGETS[target].part for target in targets):
        _reproduce_part(arguments, part, [target for target in targets if TARGETS[target].part == part])


def _reproduce_part(arguments: argparse.Namespace, part: str, targets: list[str]) -> None:
    """Measures and draws the targets whose rows are in one file."""
    path = run.result_path(arguments.data, arguments.results, part)
    cells = cells_of(arguments.data, arguments.tier, arguments.seeds, targets)
    if arguments.dry_run:
        print(run.describe(cells, path))
        return
    measured = run.run(cells, path, arguments.workers)
    frame = load_rows(path.stem, arguments.tier, path)
    frame = frame[frame["cell"].isin([str(cell) for cell in cells])]
    print(f"{path}: {len(cells):,} cells, {measured:,} of them measured now")
    if frame["measurement"].iloc[0] != MEASUREMENT:
        print(f"measured at commit {frame['commit'].iloc[0]}; this code would give other figures")
    folder = Path(arguments.output) / f"{arguments.data}-{arguments.tier}"
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        for file in draw(target, frame, folder):
            print(f"{target}: {file}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m reproduction", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "run",
        help="measure and draw the paper's tables and figures",
        description="Measures what is missing for these tables and figures, a cell at a time (it may be killed and run "
        "again at any point), adds the rows to the results, and draws all from the rows.",
        epilog="; ".join(f"{name}: {target.what}" for name, target in TARGETS.items()),
    )
    command.set_defaults(run=reproduce)
    command.add_argument("targets", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    command.add_argument("--data", default="mnist", help="mnist (default), cifar10, glyphs, glyphs-matched or shapes")
    command.add_argument("--tier", default="lecture", help="smoke, lecture (default) or paper")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    command.add_argument("--results", metavar="FOLDER", help="where the rows are (default: those of the checkout)")
    command.add_argument(
        "--output", metavar="FOLDER", default="reproduced", help="where to draw (default: reproduced/)"
    )
    command.add_argument(
        "--workers", choices=run.WORKERS, default="serial", help="one process, or Ray (pip install 'samelib[scale]')"
    )
    command.add_argument("--dry-run", action="store_true", help="only say what would be measured, and for how long")
    command = commands.add_parser("ledger", help="print every figure and claim of the paper beside ours, in Markdown")
    command.set_defaults(run=lambda arguments: print(ledger_page.page(), end=""))
    return top


def main(words: list[str] | None = None) -> None:
    arguments = parser().parse_args(words)
    try:
        arguments.run(arguments)
    except (DataError, ArtifactError, run.CellError, ArithmeticError, ValueError, TypeError, OSError) as error:
        sys.exit(f"reproduction: {error}")
    except KeyboardInterrupt:
        sys.exit("reproduction: stopped; run it again to go on with the cell that was being measured")


if __name__ == "__main__":
    main()
