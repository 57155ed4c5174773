"""PRADA where the same queries come from one account, or from many (the paper's introduction)."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from reproduction.lab import Bench
from reproduction.plan import BENIGN, HEADLINES, Cell
from reproduction.tables import markdown, select, spread
from samelib.data.image_set import to_float
from samelib.detectors.prada import Prada, watch_accounts

ACCOUNTS = (1, 10, 100)


def measure(bench: Bench, cell: Cell) -> Iterator[dict]:
    """PRADA when the attacker, or an honest user, spreads as many queries over some accounts."""
    victim = bench.undefended[0]
    queries, _ = bench.log(victim, cell.attack, cell.budget)
    for variant, asked in {cell.attack: queries, BENIGN: bench.group.benign_test.images[: len(queries)]}.items():
        answers = victim(to_float(asked))
        for accounts in ACCOUNTS:
            watched = watch_accounts(asked, answers, accounts, bench.group.classes)
            yield variant._asdict() | {"accounts": accounts} | alarms_of(watched)


def alarms_of(watched: list[Prada]) -> dict:
    """The share of accounts with an alarm, the mean query of the account that raised it, and the share of all queries
    that came after their account's alarm."""
    alarmed = [prada for prada in watched if prada.alarm_at]
    after = sum(prada.queries - prada.alarm_at for prada in alarmed)
    return {
        "alarmed": len(alarmed) / len(watched),
        "alarm_at": float(np.mean([prada.alarm_at for prada in alarmed])) if alarmed else None,
        "after_alarm": round(after / sum(prada.queries for prada in watched), 4),
    }


def accounts_table(frame: pd.DataFrame) -> str:
    """PRADA where the same queries come from one account, ten or a hundred; and from honest users."""
    lines = []
    for label in map(str, (*HEADLINES, BENIGN)):
        for accounts in ACCOUNTS:
            # every attack's cell has the honest users again
            rows = select(frame, experiment="accounts", label=label, accounts=accounts).drop_duplicates("seed")
            first = "–" if rows["alarm_at"].isna().all() else f"{rows['alarm_at'].mean():,.0f}"
            lines.append([label, accounts, spread(rows["alarmed"]), first, spread(rows["after_alarm"])])
    header = ["queries", "accounts", "accounts with an alarm, %", "at query", "queries after it, %"]
    return markdown(header, lines)
