"""The command of teachers; see `course.grade`."""

import argparse
import json
from pathlib import Path

from course.grade import GradeError, grade
from samelib.presets import TIERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m course")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("grade", help="run a student's notebook and say which exercises are right")
    command.add_argument("notebook", type=Path, nargs="+")
    command.add_argument("--tier", default="smoke", choices=TIERS, help="default: smoke")
    command.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take (default: 600)")
    command.add_argument("--json", action="store_true", help="a list for a program instead of lines")
    arguments = parser.parse_args()
    reports = []
    for path in arguments.notebook:
        try:
            grades = grade(path, arguments.tier, arguments.timeout)
        except GradeError as error:
            raise SystemExit(f"error: {error}") from None
        reports.append({"notebook": str(path)} | grades.as_dict())
        if not arguments.json:
            print(f"{path}: {grades.passed} of {len(grades.verdicts)}", *grades.verdicts, sep="\n  ")
    if arguments.json:
        print(json.dumps(reports, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
