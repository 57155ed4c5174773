"""The book's API page and the door of samelib name the same things."""

import re
from pathlib import Path

import samelib

API = Path(__file__).parents[1] / "book" / "api.md"


def test_the_api_page_shows_the_door():
    names = re.findall(r"^\.\. auto\w+:: (\w+)$", API.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(samelib.__all__)
