import json
import tempfile
from pathlib import Path

import pandas as pd

from check_cases import Case
from reproduction.rows import append_rows


def _table(*cells: tuple) -> pd.DataFrame:
    """Cells as (budget, attack, AUROC of SAME, of OE, of EDM)."""
    methods = ("same", "outlier_exposure", "edm")
    rows = [(b, a, method, auroc) for b, a, *areas in cells for method, auroc in zip(methods, areas, strict=True)]
    return pd.DataFrame(rows, columns=["budget", "attack", "method", "auroc"])


TABLES = {
    "MNIST": _table((1000, "jbda", 90, 60, 70), (4000, "jbda", 95, 85, 80)),  # leads 20 and 10
    "CIFAR-10": _table((6000, "jbda", 80, 70, 60), (6000, "dfme", 90, 60, 78)),  # leads 10 and 12
}
SAID = [
    ("MNIST", "jbda", 1000, "same", "auroc", 90),
    ("CIFAR-10", "dfme", 6000, "same", "auroc", 100),  # a lead of 22
    ("CIFAR-10", "dfme", 6000, "same", "aupr", 99),
    ("CIFAR-10", "dfme", 6000, "edm", "auroc", 78),
]

ROW = {"cell": "a cell", "measured": [{"auroc": 0.6}, {"auroc": 0.7}]}
POLISHED = ROW | {"measured": [{"auroc": 0.999}, {"auroc": 0.7}]}
FOLDER = Path(tempfile.mkdtemp())
append_rows(FOLDER / "measured.jsonl", [ROW])
append_rows(FOLDER / "forged.jsonl", [POLISHED])
append_rows(FOLDER / "other.jsonl", [POLISHED | {"cell": "another cell"}])
(FOLDER / "edited.jsonl").write_text(json.dumps(POLISHED | {"digest": "0123456789abcdef"}) + "\n")


def _limits(fpr95: float) -> tuple[float, float]:
    return 95 - 0.95 * fpr95, 100 - 0.05 * fpr95


CASES = {
    "e1201": Case(
        (15, 11, 16), [(11, 15, 16), (22.5, 20, 25), (15, 11, 11), (15, 11, 22), (15, 16, 11), (15, 11)], (TABLES, SAID)
    ),
    "e1202": Case(
        (4_000, 36_000, 2_000, 3_600),
        [(2_000, 3_600, 4_000, 36_000), (2_000, 3_600, 2_000, 3_600), (4_000, 444, 2_000, 3_600), (4_000, 36_000)],
    ),
    "e1203": Case(27, [24, 10, 114, 149, 26, 40, 26.5]),
    "e1204": Case(
        FOLDER / "forged.jsonl",
        [FOLDER / "edited.jsonl", FOLDER / "measured.jsonl", FOLDER / "other.jsonl", FOLDER / "none.jsonl", POLISHED],
        (ROW,),
    ),
    "e1205": Case(
        _limits,
        [
            lambda fpr95: _limits(fpr95)[::-1],
            lambda fpr95: tuple(limit / 100 for limit in _limits(fpr95)),
            lambda share: (95 - 95 * share, 100 - 5 * share),
            lambda fpr95: (100 - fpr95, 100 - 0.05 * fpr95),
            lambda fpr95: (95 - 0.95 * fpr95, 100 - fpr95),
            lambda fpr95: (95 - 0.95 * fpr95, 100),
            _limits(40),
        ],
    ),
}
