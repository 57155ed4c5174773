"""Checks of chapter 12, the reproduction."""

import math
from pathlib import Path

from scipy.stats import norm, t

from course.check.verdict import close, exercise, expect, number, numbers


@exercise("(mean lead on MNIST, mean lead on CIFAR-10, mean lead on CIFAR-10 by the text), in points of AUROC")
def e1201(answer, tables, said):
    mnist, cifar, by_text = numbers(answer, 3)
    best_mnist, best_cifar = (_mean(_leads(tables[data])) for data in ("MNIST", "CIFAR-10"))
    expect(not (close(mnist, best_cifar) and close(cifar, best_mnist)), "MNIST comes first.")
    expect(
        not close(mnist, _mean(_leads(tables["MNIST"], min))),
        "the better baseline is the one with the higher AUROC, cell by cell.",
    )
    expect(
        close(mnist, best_mnist), "MNIST: SAME less the better of the two others in each of six cells, then the mean."
    )
    expect(close(cifar, best_cifar), "CIFAR-10: the same six cells as by `margins`, then the mean.")
    told = {
        (budget, attack): figure
        for data, attack, budget, method, metric, figure in said
        if (data, method, metric) == ("CIFAR-10", "same", "auroc")
    }
    with_text = _leads(tables["CIFAR-10"], told=told)
    expect(not close(by_text, best_cifar), "by the text SAME has other figures in two cells of CIFAR-10.")
    expect(
        not close(by_text, _mean({cell: with_text[cell] for cell in told})),
        "the text's figures replace two of six leads; keep the other four.",
    )
    expect(close(by_text, _mean(with_text)), "put the text's two figures into the leads, then take the mean.")
    return "by the tables the mean lead is larger on MNIST, by the text's figures on CIFAR-10."


def _leads(table, better=max, told: dict | None = None) -> dict:
    """SAME's AUROC less the better baseline's, by budget and attack; in some cells another figure is told of SAME."""
    cells = {}
    for r in table.itertuples():
        cells.setdefault((r.budget, r.attack), {})[r.method] = r.auroc
    ours = {cell: found.pop("same") for cell, found in cells.items()} | (told or {})
    return {cell: ours[cell] - better(baselines.values()) for cell, baselines in cells.items()}


def _mean(leads: dict) -> float:
    return sum(leads.values()) / len(leads)


@exercise("four numbers of malicious queries: as a share at 0.5 and at 0.9, as a quotient at 0.5 and at 0.9")
def e1202(answer):
    shares, quotients = numbers(answer, 4)[:2], numbers(answer, 4)[2:]
    expect((shares, quotients) != ([2_000, 3_600], [4_000, 36_000]), "the share comes first, the quotient second.")
    expect(shares != [8_000, 40_000], "those are all queries, benign ones included; how many of them are malicious?")
    expect(shares != [2_000, 3_600], "a share is a part of all queries, not of the benign ones.")
    expect(
        shares != [4_000, round(4_000 / 9)],
        "at a share of 0.9 the malicious ones are the many, the benign ones the few.",
    )
    expect(
        all(close(a, b) for a, b in zip(shares, (4_000, 36_000), strict=True)),
        "as a share: if a part rho of all queries is malicious, the 4,000 benign ones are the part 1 - rho.",
    )
    expect(
        all(close(a, b) for a, b in zip(quotients, (2_000, 3_600), strict=True)),
        "as a quotient: so many malicious queries for each benign one.",
    )


@exercise("the smallest number of seeds that would decide it")
def e1203(answer):
    seeds, half, needed = number(answer), 15.4, 48.1 - (43.6 + 2)
    deviation = half * math.sqrt(3) / t.ppf(0.975, 2)

    def enough(width: float, deviation: float, normal: bool = False) -> int:
        quantiles = ((n, norm.ppf(0.975) if normal else t.ppf(0.975, n - 1)) for n in range(2, 1_000))
        return next(n for n, quantile in quantiles if quantile * deviation / math.sqrt(n) < width)

    right = enough(needed, deviation)
    expect(seeds == round(seeds), "a number of seeds is whole.")
    expect(
        seeds != enough(48.1 - 43.6, deviation),
        "the interval must keep clear of the 2 points around the paper's figure.",
    )
    expect(seeds != enough(needed, half), "15.4 is the half width of the interval for three seeds, not the deviation.")
    expect(
        seeds != math.ceil(3 * (half / needed) ** 2),
        "with more seeds the quantile of Student's t falls, too: fewer are enough.",
    )
    expect(seeds != enough(needed, deviation, normal=True), "the quantile is Student's, with n - 1 degrees of freedom.")
    expect(seeds >= right, "with so few seeds the interval still reaches within 2 points of the paper's figure.")
    expect(seeds == right, "fewer seeds do: find the first half width that is small enough.")


@exercise("the path of the file that holds your forged row")
def e1204(answer, measured):
    from reproduction.rows import load_cells  # only here: it needs pandas, which the first chapters do not

    expect(not isinstance(answer, (dict, list)), "give the path of the file, not the row: the file is what is read.")
    path = Path(answer)
    expect(path.is_file(), f"there is no file {path}.")
    try:
        rows = load_cells(path)
    except ValueError:
        rows = None
    expect(rows is not None, "`load_cells` refuses it: its digest is that of other figures. Who computes the digest?")
    forged = [row for row in rows if row.get("cell") == measured["cell"]]
    expect(forged, f"the file has no row of the cell {measured['cell']!r}.")
    expect(
        any(row["measured"] != measured["measured"] for row in forged),
        "the row is accepted, but its figures are those that were measured: change one.",
    )
    return "it is accepted, and nothing in the file says that the figure was never measured."


@exercise("a function that takes FPR95 and returns (lowest AUROC, highest AUROC), all in percent")
def e1205(answer):
    expect(callable(answer), "a function is asked for: give the function itself, not what it returns.")
    found = {rate: numbers(answer(rate), 2) for rate in (0, 12.5, 40, 100)}
    low, high = found[40]
    expect(not (close(low, 0.57) and close(high, 0.98)), "return percent, not shares.")
    expect(low >= -100, "FPR95 comes in percent: 40 means 40 %.")
    expect(not (close(low, 98) and close(high, 57)), "the lowest comes first.")
    expect(not close(low, 60), "right of FPR95 the curve need not rise above 95 % before the very end.")
    expect(not close(high, 60), "left of FPR95 the curve may be just below 95 % all the way.")
    expect(
        not close(high, 38 + 60 * 0.975) and not close(high, 19 + 60),
        "without ties the curve goes up in jumps: at best straight up, not along a slope.",
    )
    for rate, (low, high) in found.items():
        expect(
            close(low, 95 - 0.95 * rate),
            f"lowest, at {rate} %: keep the curve at zero as long as it may be, and then as low as it may be.",
        )
        expect(
            close(high, 100 - 0.05 * rate),
            f"highest, at {rate} %: keep the curve as high as it may be on both sides of the point.",
        )
    return "all lines of Tables 1 and 2 keep within these limits."
