"""The commands of teachers; see `course.grade` and `course.expected`."""

import argparse
import json
from pathlib import Path

from course import expected
from course.grade import GradeError, grade
from samelib.presets import TIERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m course")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("grade", help="run a student's notebook and say which exercises are right")
    command.set_defaults(run=grade_all)
    command.add_argument("notebook", type=Path, nargs="+")
    command.add_argument("--tier", default="smoke", choices=TIERS, help="default: smoke")
    command.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take (default: 600)")
    command.add_argument("--json", action="store_true", help="a list for a program instead of lines")
    command = commands.add_parser("expected", help="measure what the solutions come to, and how far that spreads")
    command.set_defaults(run=lambda options: expected.run(options.tier, options.seeds, options.rows))
    command.add_argument("--tier", default="lecture", choices=TIERS, help="default: lecture")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    command.add_argument(
        "--rows", type=Path, default=expected.ROWS, help="the file of the rows (default: the course's)"
    )
    options = parser.parse_args()
    try:
        options.run(options)
    except (GradeError, expected.ExpectedError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def grade_all(options: argparse.Namespace) -> None:
    """Grades the notebooks, one after another, and prints what their exercises came to."""
    reports = []
    for path in options.notebook:
        grades = grade(path, options.tier, options.timeout)
        reports.append({"notebook": str(path)} | grades.as_dict())
        if not options.json:
            print(f"{path}: {grades.passed} of {len(grades.verdicts)}", *grades.verdicts, sep="\n  ")
    if options.json:
        print(json.dumps(reports, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
