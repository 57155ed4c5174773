import json
from pathlib import Path

import pandas as pd
import pytest

from reproduction import claims, ledger, ledger_page
from reproduction.claims import FAILS, HOLDS, Claim, Comparison, gap
from reproduction.ledger import (
    DIFFERENT,
    GIVEN,
    NOT_RUN,
    OPEN,
    REPRODUCED,
    SMALLER,
    VERDICTS,
    Entry,
    claimed,
    entries,
    judged,
    level,
    own_entries,
)
from reproduction.plan import KNOCKOFF, Cell, DetectorVariant
from reproduction.rows import as_frame, reported

ROOT = Path(__file__).parents[1]


# The rule


@pytest.mark.parametrize(
    ("values", "low", "high", "outcome"),
    [
        ([1.0, 1.1, 0.9], 0.0, 10.0, HOLDS),
        ([1.0, 5.0, -3.0], 0.0, 10.0, claims.OPEN),  # the interval holds both
        ([-1.0, -1.1, -0.9], 0.0, 10.0, FAILS),
        ([11.0, 11.1, 10.9], 0.0, 10.0, FAILS),
        ([0.0, 0.0, 0.0], 0.0, 10.0, claims.OPEN),  # a tie
        ([5.0], 0.0, 10.0, claims.OPEN),  # one run has no interval
    ],
)
def test_an_interval_decides(values, low, high, outcome):
    assert Comparison("", values, low, high).outcome == outcome


def frame(tier: str = "lecture", budget: int = 1000, **aurocs: list[float]) -> pd.DataFrame:
    """Rows of detectors against Knockoff, a value a seed."""
    readings = {"same": {"alpha": 0.5}, "outlier_exposure": {}, "edm": {"consensus": "mean cosine"}}
    rows = []
    for name, values in aurocs.items():
        for seed, auroc in enumerate(values):
            cell = Cell("detection", "mnist", tier, seed, DetectorVariant(name), KNOCKOFF, budget)
            figures = {"auroc": auroc, "aupr": auroc, "fpr95": 1 - auroc, "fpr90": 1 - auroc}
            rows.append({"cell": str(cell)} | cell.fields() | readings[name] | figures)
    return as_frame(rows)


@pytest.mark.parametrize(
    ("tier", "aurocs", "verdict"),
    [
        ("lecture", [0.90, 0.901, 0.899], REPRODUCED),
        ("lecture", [0.90, 0.93, 0.87], OPEN),
        ("lecture", [0.90], OPEN),
        ("lecture", [0.80, 0.801, 0.799], SMALLER),  # less training explains it
        ("paper", [0.80, 0.801, 0.799], DIFFERENT),
        ("lecture", [0.95, 0.951, 0.949], DIFFERENT),  # less training cannot explain this
    ],
)
def test_a_figure_is_judged_by_its_interval(tier, aurocs, verdict):
    rows = frame(tier, same=aurocs)
    assert judged(90.0, rows, "auroc") == verdict
    assert judged(10.0, rows, "fpr95") == verdict, "of a rate of errors the worse side is the other"
    baseline = DIFFERENT if verdict == SMALLER else verdict
    assert judged(90.0, rows, "auroc", "outlier_exposure") == baseline, "it has no autoencoder"
    assert judged(90.0, rows[:0], "auroc") == NOT_RUN


def test_level_figures_are_no_test():
    assert level([99.9, 100.0, 99.5]) and not level([99.9, 98.0]) and not level([99.9])


def test_of_two_readings_the_first_counts():
    near, far = frame(same=[0.90, 0.901, 0.899]), frame(same=[0.50, 0.501, 0.499])
    (entry,) = ledger._compared("Table 1", ("jbda", 1000, "auroc"), {"same": 90.0}, {"same": [near, far]}, "auroc")
    assert entry.verdict == REPRODUCED and entry.ours == "90.0 ± 0.2 (other reading 50.0 ± 0.2)"


def test_agreeing_where_all_are_level_shows_nothing():
    def verdicts(**aurocs: float) -> set[str]:
        rows = {name: [frame(**{name: [a, a, a]})] for name, a in aurocs.items()}
        paper = {"same": 99.9, "outlier_exposure": 100.0}
        return {e.verdict for e in ledger._compared("Table 1", ("dfme", 1000, "auroc"), paper, rows, "auroc")}

    assert verdicts(same=1.0, outlier_exposure=0.999) == {GIVEN}
    assert verdicts(same=0.80, outlier_exposure=0.801) == {SMALLER, DIFFERENT}


def test_pairs_are_seed_by_seed():
    first, second = pd.Series({0: 5.0, 1: 7.0, 2: 1.0}), pd.Series({1: 4.0, 2: 0.0, 3: 9.0})
    assert gap("", first, second).values == [3.0, 1.0]
    with pytest.raises(claims.NotMeasured):
        gap("", first, pd.Series({9: 1.0}))


HELD, FAILED, UNDECIDED = ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, 9.0, -8.0])


@pytest.mark.parametrize(
    ("values", "kind", "verdict"),
    [
        ([HELD, HELD], {}, REPRODUCED),
        ([HELD, FAILED], {}, DIFFERENT),
        ([HELD, UNDECIDED], {}, OPEN),
        ([HELD, FAILED], {"grows": True}, SMALLER),
        ([HELD, FAILED, HELD], {"most": True}, REPRODUCED),
        ([HELD, FAILED], {"most": True}, DIFFERENT),
        ([HELD, UNDECIDED, UNDECIDED], {"most": True}, OPEN),
        ([HELD], {"given": True}, GIVEN),
        ([HELD, []], {}, OPEN),  # one was not measured
        ([], {}, NOT_RUN),
    ],
)
def test_a_claim_is_judged_by_its_comparisons(monkeypatch, values, kind, verdict):
    monkeypatch.setattr(ledger, "evidence", lambda *groups: frame(same=[0.9, 0.9, 0.9]))
    compare = lambda rows: (Comparison(f"number {i}", v) for i, v in enumerate(values))  # noqa: E731
    entry = claimed(Claim("x", "y", ("mnist",), "08_baselines", compare, **kind))
    assert entry.verdict == verdict and len(entry.details) == len(values)
    if values == [HELD, FAILED]:
        assert entry.ours == "1 hold, 1 fail" and entry.details[1] == "number 1: -1.00 ± 0.25 (fails)"


def test_what_needs_no_rows(monkeypatch):
    monkeypatch.setattr(ledger, "evidence", lambda *groups: frame(same=[0.9, 0.9, 0.9]))
    assert claimed(Claim("x", "y", ("mnist",), "08_baselines", None, settled="its Table 2")).verdict == DIFFERENT


# The page


@pytest.fixture(scope="module")
def found() -> list[Entry]:
    return entries()


@pytest.fixture(scope="module")
def own() -> list[Entry]:
    return own_entries()


def test_every_cell_of_the_four_tables_is_there_once(found, own):
    count = {
        source: len([e for e in found if e.source == source and e.paper])
        for source in ("Table 1", "Table 2", "Table 3", "Table 4")
    }
    assert count == {"Table 1": 54, "Table 2": 54, "Table 3": 6, "Table 4": 48}
    assert len([e for e in found if not e.paper]) == len(claims.CLAIMS)
    assert len(own) == len(claims.OWN_CLAIMS)
    for entry in found + own:
        assert entry.verdict in VERDICTS and (ROOT / "notebooks" / f"{entry.evidence}.ipynb").is_file()


def test_figures_are_printed_as_the_paper_prints_them(found):
    printed = {e.paper for e in found if e.source == "Table 1"}
    table = reported("table1_mnist")
    assert printed == {f"{value:.2f}" for metric in ("auroc", "aupr", "fpr95") for value in table[metric]}


def test_a_verdict_has_rows_behind_it(found, own):
    for entry in found + own:
        assert (entry.verdict != NOT_RUN) == (entry.ours != "–") == (entry.tier != "–"), entry
        assert entry.verdict == NOT_RUN or entry.tier.startswith(("lecture", "paper"))


def test_the_page_is_as_it_was(found, own):
    """Every verdict of the published rows, as the fixture has them: what a change of the code must not move."""
    fixture = json.loads((Path(__file__).parent / "ledger.json").read_text(encoding="utf-8"))
    assert [[e.source, e.what, e.ours, e.verdict] for e in found + own] == fixture
    text = ledger_page.page()
    for what in ("# The ledger", "## The report", "## Table 1", "## Claims", "## Our own claims", "## The rule"):
        assert what in text
    assert "nan" not in text and text.count("\n| ") > 150 and text.count('<td class="verdict-') == 9 + 24


def test_rows_of_the_smoke_tier_are_no_evidence(monkeypatch):
    asked = []
    monkeypatch.setattr(ledger, "load_rows", lambda group, tier: asked.append(tier) or as_frame([]))
    assert ledger.evidence("mnist").empty and asked == ["paper", "lecture"]


def test_no_time_is_compared_with_itself():
    def cost(**seconds: float) -> pd.DataFrame:
        rows = []
        for name, value in seconds.items():
            for seed in range(3):
                cell = Cell("cost", "cifar10", "paper", seed, DetectorVariant(name), None, None)
                figures = {"victim_seconds": value, "auxiliary_seconds": 0.0, "mae_seconds": 0.0}
                rows.append({"cell": str(cell)} | cell.fields() | figures | {"victim_accuracy": 0.9})
        return as_frame(rows)

    def verdicts(**seconds: float) -> dict[str, str]:
        found = ledger._cost(cost(**seconds))
        return {e.place[0]: e.verdict for e in found if e.place[1] == "seconds"}

    printed = reported("table3_cifar10").set_index("method")["training_seconds"] / 10
    assert set(verdicts(**printed).values()) == {REPRODUCED}
    slow = printed.to_dict() | {"outlier_exposure": 4 * printed["outlier_exposure"]}
    assert verdicts(**slow)["outlier_exposure"] == verdicts(**slow)["edm"] == DIFFERENT
