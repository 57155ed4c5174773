from pathlib import Path

import pytest

from reproduction import claims, ledger, report
from reproduction.ledger import NOT, OPEN, ORDER, REPRODUCED, VERDICTS, entries, page, verdict
from reproduction.results import reported

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


def test_the_page_says_what_the_rows_say():
    written = (ROOT / "book" / "ledger.md").read_text(encoding="utf-8")
    assert written == page(), "put the output of `python -m reproduction.ledger` into book/ledger.md"


def row(detector: str, attack: str, auroc: float, seed: int = 0, **more) -> dict:
    return {
        "cell": f"{detector} {attack} {seed}", "group": "mnist", "tier": "lecture", "seed": seed, "detector": detector,
        "protocol": "fixed", "attack": attack, "budget": 1000, "device": "CPU, 1 threads", "auroc": auroc, "aupr": auroc,
        "fpr95": 1 - auroc, "fpr90": 1 - auroc,
    } | more  # fmt: skip


@pytest.fixture
def rows() -> list[dict]:
    values = {"same": {"alpha": 0.5}, "outlier_exposure": {}, "edm": {"consensus": "mean cosine"}}
    aurocs = {"same": 0.99, "outlier_exposure": 0.915, "edm": 0.7}
    return [row(d, "knockoff", aurocs[d], **more) for d, more in values.items()]


def test_entries_follow_the_rows(rows, monkeypatch):
    monkeypatch.setattr(ledger, "evidence", lambda group: rows if group == "mnist" else [])
    found = {e.what: e for e in entries() if e.source == "Table 1"}
    same = found["SAME, knockoff, 1,000 queries, AUROC"]
    assert (same.paper, same.ours, same.verdict, same.tier) == ("99.4", "99.0", REPRODUCED, "lecture, 1 seed")
    assert found["OE, knockoff, 1,000 queries, AUROC"].verdict == REPRODUCED  # 91.8
    assert found["EDM, knockoff, 1,000 queries, AUROC"].verdict == ORDER  # 86.0, the lowest of the three in both
    assert found["SAME, jbda, 1,000 queries, AUROC"].verdict == OPEN


def test_rows_of_the_smoke_tier_are_no_evidence(monkeypatch):
    asked = []
    monkeypatch.setattr(ledger, "grid_rows", lambda group, tier: asked.append(tier) or [])
    assert ledger.evidence("mnist") == [] and asked == ["paper", "lecture"]


def test_rows_of_two_versions_are_not_put_into_one_table(rows, tmp_path):
    from reproduction.results import append_rows

    path = tmp_path / "mnist.jsonl"
    append_rows(path, [r | {"code": f"version {i % 2}", "data": "d"} for i, r in enumerate(rows)])
    with pytest.raises(ValueError, match="come from different versions of samelib's code; measure them again"):
        report.grid_rows("mnist", "lecture", path)


def test_a_claim_holds_or_does_not(rows, monkeypatch):
    claim = next(c for c in claims.CLAIMS if c.where == "Figure 1")
    large = [r | {"budget": 4000} for r in rows]
    assert list(claim.holds(large)) == [True]
    worse = [r | ({"auroc": 0.5} if r["detector"] == "same" else {}) for r in large]
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
