"""What a check is, and what it says."""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

MIME = "application/vnd.samelib.verdict+json"  # by which a grader finds verdicts among a notebook's outputs


class Verdict(NamedTuple):
    """What a check says of an answer.

    Attributes:
        exercise: "4.2" is the second of chapter 4.
        passed: None where there is no answer yet.
        message: what is right, or what to look at again.
    """

    exercise: str
    passed: bool | None
    message: str

    def __str__(self) -> str:
        mark = {True: "✓", False: "✗", None: "…"}[self.passed]
        return f"{mark} Exercise {self.exercise}: {self.message}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/plain": str(self), MIME: self._asdict()}


class Wrong(Exception):
    """An answer is not right; the message says what to look at again."""


class Check:
    """A check by its exercise. Called with an answer, and with what its signature names of the chapter, it gives a
    `Verdict`, and never raises: a notebook whose answers are wrong, or not there, runs to its end.

    Attributes:
        name: "e0402".
        asks: what the answer is to be, in words.
        needs: names of the chapter's variables that it takes beside the answer.
    """

    def __init__(self, function: Callable[..., str | None], asks: str):
        functools.update_wrapper(self, function)
        self.name, self.asks, self._function = function.__name__, asks, function
        self.needs = list(inspect.signature(function).parameters)[1:]
        chapter, number = re.fullmatch(r"e(\d\d)(\d\d)", self.name).groups()
        self.exercise = f"{int(chapter)}.{int(number)}"

    def __call__(self, answer: Any, *given: Any) -> Verdict:
        if answer is ...:
            return Verdict(self.exercise, None, f"not answered yet. The answer is {self.asks}.")
        try:
            praise = self._function(answer, *given)
        except Wrong as wrong:
            return Verdict(self.exercise, False, str(wrong))
        except Exception as error:  # whatever a student's answer may be, or its code may do
            kind = type(error).__name__
            return Verdict(
                self.exercise, False, f"the check met {kind} ({error}) in your answer. It should be {self.asks}."
            )
        return Verdict(self.exercise, True, praise or "right.")

    def call(self) -> str:
        """How a notebook calls it."""
        return f"check.{self.name}({', '.join(['answer', *self.needs])})"


CHECKS: dict[str, Check] = {}


def exercise(asks: str) -> Callable[[Callable[..., str | None]], Check]:
    """Makes a function a check: it raises `Wrong`, mostly through `expect`, or returns words of praise, or None."""

    def register(function: Callable[..., str | None]) -> Check:
        check = Check(function, asks)
        if check.name in CHECKS:
            raise ValueError(f"{check.name} is there twice")
        CHECKS[check.name] = check
        return check

    return register


# What checks say and compare


def expect(condition: Any, hint: str) -> None:
    """Raises `Wrong` with this hint unless the condition holds."""
    if not bool(condition):
        raise Wrong(hint)


def expect_shares(*values: float) -> None:
    """Raises `Wrong` where one of them is no share, as percent are not."""
    expect(all(0 <= value <= 1 for value in values), "give shares between 0 and 1, not percent.")


def number(answer: Any) -> float:
    """A number of Python, NumPy or PyTorch as a float.

    Raises:
        Wrong: not one finite number.
    """
    values = numbers(answer)
    expect(len(values) == 1, f"one number is asked for, your answer has {len(values)}.")
    return values[0]


def numbers(answer: Any, count: int | None = None) -> list[float]:
    """The numbers of an answer, in its order: a number, a sequence, the values of a dictionary, an array or tensor.

    Raises:
        Wrong: something else than finite numbers, or not so many.
    """
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().cpu().numpy()
    if isinstance(answer, (list, tuple)):
        answer = [v.item() if isinstance(v, torch.Tensor) else v for v in answer]
    try:
        values = [float(v) for v in np.atleast_1d(np.asarray(answer, dtype=float)).ravel()]
    except (TypeError, ValueError):
        raise Wrong(f"numbers are asked for, not {type(answer).__name__}.") from None
    expect(all(math.isfinite(v) for v in values), "your answer holds a value that is not finite.")
    if count is not None:
        expect(len(values) == count, f"{count} numbers are asked for, your answer has {len(values)}.")
    return values


def close(value: float, right: float, relative: float = 0.005, absolute: float = 1e-9) -> bool:
    """Is a value right, but for rounding?"""
    return math.isclose(value, right, rel_tol=relative, abs_tol=absolute)
