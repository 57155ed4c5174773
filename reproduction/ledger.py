"""The ledger: every figure of the paper's tables and every claim of its text, beside ours, with a verdict by rule; and the
claims of this book, by the same rule. reproduction/ledger_page.py shows it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from reproduction.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    LITTLE,
    NAMES,
    OWN_CLAIMS,
    READINGS,
    Claim,
    Comparison,
    NotMeasured,
    by_seed,
    points,
)
from reproduction.cost import costs
from reproduction.detection import METRICS, TABLES, detected
from reproduction.plan import SAME, DetectorVariant
from reproduction.rows import load_rows, reported
from reproduction.tables import select, spread
from samelib.metrics import mean_interval

TIE = 1.0  # percentage points: figures as near to each other as this are level
FACTOR = 1.25  # of seconds, as multiples of another defence's
VERDICTS = REPRODUCED, OPEN, SMALLER, DIFFERENT, GIVEN, NOT_RUN = (
    "reproduced",
    "undecided",
    "not comparable",
    "different",
    "no test",
    "not run",
)
# The sign of what too little training does.
WORSE = {"auroc": -1, "aupr": -1, "fpr95": 1, "fpr90": 1, "victim_accuracy": -1}


class Entry(NamedTuple):
    """One line of the ledger.

    Attributes:
        source, what: where in the paper (or this book), and the figure or claim.
        paper, ours: as they are printed; the paper's empty for a claim.
        tier: of our rows, and their seeds.
        verdict: one of VERDICTS.
        evidence: the notebook that shows it.
        place: of a figure, what it stands for: method, attack, budget, metric, or the like.
        details: of a claim, its comparisons, each with its outcome.
    """

    source: str
    what: str
    paper: str
    ours: str
    tier: str
    verdict: str
    evidence: str
    place: tuple = ()
    details: tuple[str, ...] = ()


def evidence(*groups: str) -> pd.DataFrame:
    """The rows a verdict may rest on: the paper tier's where all groups have it, else the lecture tier's, never smoke."""
    for tier in ("paper", "lecture"):
        frames = [load_rows(group, tier) for group in groups]
        if all(map(len, frames)):
            break
    return pd.concat(frames)


def judged(figure: float, rows: pd.DataFrame, metric: str, method: str = "same") -> str:
    """The verdict on one figure of the paper, in percent, by our rows: does our 95 % interval lie within two points of
    it, or beyond them? Where SAME's is the worse one and its autoencoder smaller, they are not comparable."""
    if rows.empty or metric not in rows:
        return NOT_RUN
    ours = points(rows, metric)
    outcome = Comparison("", ours.tolist(), figure - LITTLE, figure + LITTLE).outcome
    if outcome == FAILS:
        worse = WORSE[metric] * (ours.mean() - figure) > 0
        return SMALLER if worse and method == "same" and rows["tier"].iloc[0] != "paper" else DIFFERENT
    return REPRODUCED if outcome == HOLDS else OPEN


def level(figures: Sequence[float]) -> bool:
    """Are these so near to each other that no order is told from them?"""
    return len(figures) > 1 and max(figures) - min(figures) <= TIE


def entries() -> list[Entry]:
    """Every cell of Tables 1 to 4, then every claim of the paper's text."""
    mnist = evidence("mnist")
    # The lecture tier of CIFAR-10 has other budgets and another victim than the paper: only its paper tier would count.
    cifar10 = load_rows("cifar10", "paper")
    frames = {"mnist": mnist, "cifar10": cifar10 if len(cifar10) else mnist[:0]}
    tables = [entry for group in TABLES for entry in _detection(group, frames[group])]
    tables += [*_cost(frames["cifar10"]), *(entry for group in TABLES for entry in _ratios(group, frames[group]))]
    return tables + [claimed(claim) for claim in CLAIMS]


def own_entries() -> list[Entry]:
    """The claims of this book."""
    return [claimed(claim) for claim in OWN_CLAIMS]


def _origin(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "–"
    seeds = rows["seed"].nunique()
    return f"{rows['tier'].iloc[0]}, {seeds} seed{'s' if seeds > 1 else ''}"


def _detection(group: str, frame: pd.DataFrame) -> Iterator[Entry]:
    table = reported(TABLES[group])
    source = f"Table {1 if group == 'mnist' else 2}"
    readings = sorted(READINGS, key=lambda label: _distance(table, frame, label))
    for budget in sorted(table["budget"].unique()):
        for attack in ("jbda", "knockoff", "dfme"):
            cells = select(table, budget=budget, attack=attack).set_index("method")
            rows = {
                method: [_rows(frame, method, label, budget) for label in (readings if attack == "jbda" else [attack])]
                for method in cells.index
            }
            for metric in ("auroc", "aupr", "fpr95"):
                yield from _compared(source, (attack, budget, metric), cells[metric].to_dict(), rows, metric)


def _rows(frame: pd.DataFrame, method: str, label: str, budget: int) -> pd.DataFrame:
    return frame if frame.empty else detected(frame, DetectorVariant(method), label, budget)


def _distance(table: pd.DataFrame, frame: pd.DataFrame, label: str) -> float:
    """How far our AUROCs against JBDA in this reading lie from the paper's, summed over detectors and budgets."""
    total = 0.0
    for cell in select(table, attack="jbda").itertuples():
        rows = _rows(frame, cell.method, label, cell.budget)
        total += abs(100 * rows["auroc"].mean() - cell.auroc) if len(rows) else 0.0
    return total


def _compared(
    source: str, place: tuple, paper: Mapping[str, float], rows: Mapping[str, list[pd.DataFrame]], metric: str
) -> Iterator[Entry]:
    """Entries of the figures that the paper sets beside each other: name -> its figure, and name -> our rows, those of
    each reading of it, the first of which counts. Where all are level in the paper and in ours, agreeing shows nothing."""
    means = [100 * r[0][metric].mean() for r in rows.values() if len(r[0]) and metric in r[0]]
    flat = level(list(paper.values())) and level(means)
    for name, figure in paper.items():
        verdict = judged(figure, rows[name][0], metric, "same" if source == "Table 4" else name)
        texts = [spread(r[metric]) for r in rows[name] if len(r)]
        ours = texts[0] + (f" (other reading {texts[1]})" if len(texts) > 1 else "") if texts else "–"
        words = ", ".join([NAMES.get(name, name), *map(_words, place)])
        evidence = "09_ablations" if source == "Table 4" else "08_baselines"
        verdict = GIVEN if flat and verdict == REPRODUCED else verdict
        yield Entry(source, words, f"{figure:.2f}", ours, _origin(rows[name][0]), verdict, evidence, (name, *place))


def _words(part: object) -> str:
    return f"{part:,} queries" if isinstance(part, int | np.integer) else METRICS.get(part, str(part))


def _cost(frame: pd.DataFrame) -> Iterator[Entry]:
    table = reported("table3_cifar10").set_index("method")
    rows = {method: costs(frame, DetectorVariant(method)) for method in table.index}
    accuracies = {method: [ours] for method, ours in rows.items()}
    yield from _compared("Table 3", ("accuracy",), table["accuracy"].to_dict(), accuracies, "victim_accuracy")
    printed = table["training_seconds"].to_dict()
    for method, seconds in printed.items():
        unit = "same" if method == "outlier_exposure" else "outlier_exposure"  # its own as multiples of SAME's
        try:
            own, other = (by_seed(rows[name], "victim_seconds") for name in (method, unit))
            ratios = own / other * printed[unit] / seconds
            outcome = Comparison("", np.log(ratios.dropna()).tolist(), -np.log(FACTOR), np.log(FACTOR)).outcome
            verdict = {HOLDS: REPRODUCED, FAILS: DIFFERENT}.get(outcome, OPEN)
            ours = f"{own.mean():,.0f} s"
        except NotMeasured:
            verdict, ours = NOT_RUN, "–"
        what = f"{NAMES[method]}, training time"
        origin = _origin(rows[method])
        yield Entry("Table 3", what, f"{seconds:,.0f} s", ours, origin, verdict, "08_baselines", (method, "seconds"))


def _ratios(group: str, frame: pd.DataFrame) -> Iterator[Entry]:
    table = reported("table4", group=group).set_index("malicious_ratio")
    rows = select(frame, experiment="detection", label="knockoff", **SAME._asdict())
    ours = {f"{ratio:.2f}": [select(rows, ratio=ratio)] for ratio in table.index}
    for metric in METRICS:
        paper = {f"{ratio:.2f}": figure for ratio, figure in table[metric].items()}
        yield from _compared("Table 4", (group, metric), paper, ours, metric)


def claimed(claim: Claim) -> Entry:
    """The verdict on a claim: reproduced where all its comparisons hold (of most cases: more than half), different where
    one fails (half of them), else undecided."""
    frame = evidence(*claim.groups)
    if claim.settled:
        return Entry(claim.where, claim.what, "", f"against {claim.settled}", "paper", DIFFERENT, claim.chapter)
    try:
        comparisons = list(claim.compare(frame)) if len(frame) and claim.compare else []
    except NotMeasured:
        comparisons = []
    if not comparisons:
        return Entry(claim.where, claim.what, "", "–", "–", NOT_RUN, claim.chapter)
    outcomes = [comparison.outcome for comparison in comparisons]
    held, failed = outcomes.count(HOLDS), outcomes.count(FAILS)
    verdict = OPEN
    if claim.given:
        verdict = GIVEN
    elif held > len(outcomes) / 2 if claim.most else held == len(outcomes):
        verdict = REPRODUCED
    elif failed >= len(outcomes) / 2 if claim.most else failed:
        verdict = SMALLER if claim.grows and frame["tier"].iloc[0] != "paper" else DIFFERENT
    parts = {"hold": held, "fail": failed, "undecided": len(outcomes) - held - failed}
    ours = ", ".join(f"{count} {word}" for word, count in parts.items() if count)
    details = tuple(map(told, comparisons))
    return Entry(claim.where, claim.what, "", ours, _origin(frame), verdict, claim.chapter, (), details)


def told(comparison: Comparison) -> str:
    """A comparison in words, with its interval and outcome."""
    if not len(comparison.values):
        return f"{comparison.what}: not run"
    mean, half = mean_interval(comparison.values)
    interval = f"{mean:+,.2f}" if np.isnan(half) else f"{mean:+,.2f} ± {half:,.2f}"
    return f"{comparison.what}: {interval} ({comparison.outcome})"
