"""For each check of course/check: an answer that is right, and wrong ones that a student may well give."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """How a check is tried.

    Attributes:
        right: an answer that passes.
        wrong: two or more that somebody may give, none of which passes; each should earn a hint of its own.
        given: what the check takes of the chapter, small and made up.
    """

    right: Any
    wrong: list[Any]
    given: tuple = ()
