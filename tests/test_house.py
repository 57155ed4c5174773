"""The door of samelib: every name it gives is documented, and stands on the book's API page."""

import inspect
import re
from pathlib import Path

import pytest

import samelib

API = (Path(__file__).parents[1] / "book" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", samelib.__all__)
def test_every_name_of_the_door_is_documented(name):
    assert re.search(rf"^\.\. auto\w+:: {name}$", API, re.MULTILINE), f"add {name} to book/api.md"
    assert inspect.getattr_static(samelib, name).__doc__, f"{name} has no docstring"


def test_the_api_page_names_nothing_that_is_gone():
    names = re.findall(r"^\.\. auto\w+:: (\w+)$", API, re.MULTILINE)
    assert sorted(names) == sorted(samelib.__all__)
