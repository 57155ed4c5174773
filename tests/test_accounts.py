from types import SimpleNamespace

import pytest

from reproduction.accounts import accounts_table, alarms_of
from reproduction.plan import HEADLINES, PRADA, Cell
from reproduction.rows import as_frame


def watched(*accounts: tuple[int, int | None]) -> list:
    return [SimpleNamespace(queries=queries, alarm_at=alarm) for queries, alarm in accounts]


def test_only_what_an_account_asked_after_its_alarm_counts():
    """10 queries over three accounts are 4, 3 and 3: with a remainder, no two accounts need ask alike."""
    assert alarms_of(watched((4, 4), (3, 2), (3, None))) == {
        "alarmed": pytest.approx(2 / 3),
        "alarm_at": 3.0,
        "after_alarm": 0.1,
    }


def test_without_an_alarm_nothing_came_after_it():
    assert alarms_of(watched((5, None), (5, None))) == {"alarmed": 0.0, "alarm_at": None, "after_alarm": 0.0}


def test_honest_users_stand_in_the_table_once_a_seed():
    cells = [Cell("accounts", "mnist", "lecture", seed, PRADA, attack, 4000) for seed in (0, 1) for attack in HEADLINES]
    readings = [{"attack": name, "step": None, "direction": None, "clip": None, "accounts": 1} for name in ("benign",)]
    rows = []
    for cell in cells:
        measured = [{"accounts": 1, "alarmed": 1.0, "alarm_at": 300.0, "after_alarm": 0.9}]
        measured += [r | {"alarmed": float(cell.seed), "alarm_at": None, "after_alarm": 0.0} for r in readings]
        rows.append({"cell": str(cell)} | cell.fields() | {"measured": measured})
    lines = accounts_table(as_frame(rows)).splitlines()
    assert lines[2] == "| knockoff | 1 | 100.0 ± 0.0 | 300 | 90.0 ± 0.0 |"
    (benign,) = [line for line in lines if line.startswith("| benign | 1 |")]
    assert benign.startswith("| benign | 1 | 50.0 ± 635.3 | – |"), "two seeds, not eight rows"
