"""Checks of the exercises' answers, without a network: `from course import check`, then `check.e0402(answer)`.

Each exercise with a number, a function or data of a plot has a check by its name, which is e, the chapter's two digits
and the exercise's two. A check takes the answer and what it needs of the chapter, under the names that the chapter gives
them, and returns a `Verdict`.
"""

import importlib
import pkgutil

from course.check.verdict import CHECKS, Check, Verdict

for module in pkgutil.iter_modules(__path__):
    if module.name.startswith("chapter_"):
        importlib.import_module(f"{__name__}.{module.name}")

__all__ = ["CHECKS", "Check", "Verdict"]


def __getattr__(name: str) -> Check:
    if name in CHECKS:
        return CHECKS[name]
    if name.startswith("e") and name[1:].isdigit():
        raise AttributeError(f"there is no check {name}; those there are: {', '.join(sorted(CHECKS))}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *CHECKS])
