import json
from pathlib import Path

import pytest

from reproduction import claims, ledger
from reproduction.ledger import NOT, OPEN, ORDER, REPRODUCED, VERDICTS, entries, page, verdict
from reproduction.plan import KNOCKOFF, Cell, DetectorVariant
from reproduction.rows import as_frame, reported

ROOT = Path(__file__).parents[1]
PAPER = {"same": 93.3, "edm": 66.1, "outlier_exposure": 58.7}


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ({"same": 91.4, "edm": 99.0, "outlier_exposure": 99.0}, REPRODUCED),  # within two points, whatever the others
        ({"same": 91.2, "edm": 66.0, "outlier_exposure": 60.0}, ORDER),  # above both, as in the paper
        ({"same": 70.0, "edm": 69.5, "outlier_exposure": 60.0}, NOT),  # beside EDM; in the paper above it
        ({"same": 60.0, "edm": 66.0, "outlier_exposure": 50.0}, NOT),
        ({"same": 60.0}, NOT),  # nothing to compare it with: no order was shown
        ({"same": 70.0, "edm": 60.0}, NOT),  # nor with one of the two alone
        ({"edm": 66.0, "outlier_exposure": 58.0}, OPEN),
        ({}, OPEN),
    ],
)
def test_the_rule(ours, expected):
    assert verdict(PAPER, ours, "same") == expected


def test_figures_that_are_alike_in_the_paper_must_be_alike_in_ours():
    paper = {"a": 100.0, "b": 99.5}
    assert verdict(paper, {"a": 90.0, "b": 90.5}, "a") == ORDER
    assert verdict(paper, {"a": 90.0, "b": 95.0}, "a") == NOT


def test_every_cell_of_the_four_tables_is_there():
    found = entries()
    count = {
        source: len([e for e in found if e.source == source and e.paper])
        for source in ("Table 1", "Table 2", "Table 3", "Table 4")
    }
    jbda = len(reported("table1_mnist", attack="jbda"))  # these are judged under two readings
    assert count == {
        "Table 1": 3 * (18 + jbda),
        "Table 2": 3 * (18 + jbda),
        "Table 3": 2 * len(reported("table3_cifar10")),
        "Table 4": 4 * len(reported("table4")),
    }  # fmt: skip
    assert len([e for e in found if not e.paper]) == len(claims.CLAIMS)
    assert {e.verdict for e in found} <= set(VERDICTS)
    for entry in found:
        assert (ROOT / "notebooks" / f"{entry.evidence}.ipynb").is_file()


def test_a_verdict_has_rows_and_their_provenance_behind_it():
    for entry in entries():
        attempted = entry.verdict != OPEN
        assert attempted == (entry.ours != "–") == (entry.tier != "–") == (entry.device != "–"), entry
        assert not attempted or entry.tier.startswith(("lecture", "paper"))


def test_the_page_is_as_it_was():
    """Every verdict of the published rows, as the fixture has them: what a change of the code must not move."""
    fixture = json.loads((Path(__file__).parent / "ledger.json").read_text(encoding="utf-8"))
    assert [[e.source, e.what, e.ours, e.verdict] for e in entries()] == fixture
    text = page()
    for what in ("# The ledger", "## Summary", "## Claims of the text", "**Withdrawn**", "## Where the rows come from"):
        assert what in text
    assert "nan" not in text and text.count("\n| ") > len(fixture)


def test_no_time_is_compared_with_itself():
    paper = {"outlier_exposure": 1000.0, "edm": 2000.0, "same": 500.0}
    alike = {"outlier_exposure": 10.0, "edm": 20.0, "same": 5.0}
    assert {ledger._time_verdict(paper, alike, name) for name in paper} == {REPRODUCED}
    slow = alike | {"outlier_exposure": 40.0}  # also slower than EDM
    assert ledger._time_verdict(paper, slow, "outlier_exposure") == ORDER
    assert ledger._time_verdict(paper, slow, "edm") == NOT
    quick = alike | {"outlier_exposure": 1.0}  # than SAME, too
    assert ledger._time_verdict(paper, quick, "outlier_exposure") == NOT


def frame(budget: int = 1000, **aurocs: float):
    readings = {"same": {"alpha": 0.5}, "outlier_exposure": {}, "edm": {"consensus": "mean cosine"}}
    rows = []
    for name, auroc in aurocs.items():
        cell = Cell("detection", "mnist", "lecture", 0, DetectorVariant(name), KNOCKOFF, budget)
        figures = {"auroc": auroc, "aupr": auroc, "fpr95": 1 - auroc, "fpr90": 1 - auroc, "device": "CPU, 1 threads"}
        rows.append({"cell": str(cell)} | cell.fields() | readings[name] | figures)
    return as_frame(rows)


@pytest.fixture
def rows():
    return frame(same=0.99, outlier_exposure=0.915, edm=0.7)


def test_entries_follow_the_rows(rows, monkeypatch):
    monkeypatch.setattr(ledger, "evidence", lambda group: rows if group == "mnist" else as_frame([]))
    found = {e.what: e for e in entries() if e.source == "Table 1"}
    same = found["SAME, knockoff, 1,000 queries, AUROC"]
    assert (same.paper, same.ours, same.verdict, same.tier) == ("99.4", "99.0", REPRODUCED, "lecture, 1 seed")
    assert found["OE, knockoff, 1,000 queries, AUROC"].verdict == REPRODUCED  # 91.8
    assert found["EDM, knockoff, 1,000 queries, AUROC"].verdict == ORDER  # 86.0, the lowest of the three in both
    assert found["SAME, jbda, 1,000 queries, AUROC"].verdict == OPEN


def test_rows_of_the_smoke_tier_are_no_evidence(monkeypatch):
    asked = []
    monkeypatch.setattr(ledger, "load_rows", lambda group, tier: asked.append(tier) or as_frame([]))
    assert ledger.evidence("mnist").empty and asked == ["paper", "lecture"]


def test_a_claim_holds_or_does_not(rows):
    claim = next(c for c in claims.CLAIMS if c.where == "Figure 1")
    assert list(claim.holds(frame(4000, same=0.99, outlier_exposure=0.915))) == [True]
    worse = frame(4000, same=0.5, outlier_exposure=0.915)
    assert list(claim.holds(worse)) == [False]
    with pytest.raises(claims.NotMeasured):
        list(claim.holds(rows))  # they are of the other budget
    assert ledger._claim(claim, rows).verdict == OPEN and ledger._claim(claim, worse).verdict == NOT


def test_a_claim_of_most_cases_needs_more_than_half(rows):
    def entry(held: list[bool], most: bool):
        return ledger._claim(claims.Claim("x", "y", "mnist", "08_baselines", lambda rows: iter(held), most), rows)

    assert entry([True, True, False], most=True).verdict == REPRODUCED
    assert entry([True, False], most=True).verdict == NOT
    assert entry([True, True, False], most=False).verdict == NOT
    assert entry([True, True], most=False).verdict == REPRODUCED
    assert entry([True, True], most=False).ours == "2 of 2 comparisons hold"
    assert entry([], most=False).verdict == OPEN
