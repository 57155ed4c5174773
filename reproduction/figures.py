"""The paper's figures, drawn from result rows alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, StrMethodFormatter

from reproduction.cells import BENIGN, OVER_HTTP, RESPONSES, SAME, SAME_MASK_0, without_seeds
from reproduction.defended_report import copies_table, http_table, responded, responses_table
from reproduction.report import (
    LABELS,
    NAMES,
    OTHER_READING,
    VARIANTS,
    Rows,
    accounts_table,
    attack_table,
    audit_table,
    budgets_of,
    cost_table,
    detected,
    detection_table,
    pick,
    posthoc_table,
    preset_of,
    ratio_table,
    sharing_table,
    width_names,
    width_table,
)
from samelib.metrics import mean_interval
from samelib.plots import COLOURS, HATCHES, LINES, grouped_bars, legend_above

# Names that fit under an axis.
SHORT = dict(zip(LABELS, LABELS, strict=True)) | {OTHER_READING: "jbda, −, 0.2,\nno seeds"}
KINDS = {"benign": "benign", "knockoff": "Knockoff", without_seeds("jbda"): "JBDA, no seeds", "dfme": "DFME"}


def score_histograms(axis: Axes, rows: Rows, title: str) -> None:
    """Benign and malicious scores, all seeds together, over the bins that were kept (even in asinh of the score)."""
    low = min(r["histogram"]["edges"][0] for r in rows)
    high = max(r["histogram"]["edges"][-1] for r in rows)
    edges = np.sinh(np.linspace(np.arcsinh(low), np.arcsinh(high), 41))
    for name, colour, hatch in zip(("benign", "malicious"), COLOURS, HATCHES, strict=False):
        density = sum(_rebinned(r["histogram"]["edges"], r["histogram"][name], edges) for r in rows) / len(rows)
        axis.stairs(density, edges, fill=True, alpha=0.45, color=colour, hatch=hatch, label=name)
        axis.stairs(density, edges, color=colour)
    axis.set_xscale("asinh")
    decades = [t for t in (-30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300) if low <= t <= high]
    axis.xaxis.set_major_locator(FixedLocator(decades) if len(decades) > 2 else MaxNLocator(5))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set(title=title, xlabel="anomaly score (asinh scale)", ylabel="share of queries")
    axis.legend()


def _rebinned(edges: list[float], counts: list[int], wanted: np.ndarray) -> np.ndarray:
    """Shares of a histogram over other edges, each bin's queries spread evenly within it."""
    below = np.r_[0, np.cumsum(counts)] / sum(counts)
    return np.diff(np.interp(wanted, edges, below))


def _pair(left: tuple[Rows, str], right: tuple[Rows, str]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, (found, title) in zip(axes, (left, right), strict=True):
        score_histograms(axis, found, title)
    return figure


def figure1(rows: Rows) -> Figure:
    """Scores of Knockoff's queries: outlier exposure beside SAME."""
    budget = budgets_of(rows)[-1]
    exposure, same = (detected(rows, name, "knockoff", budget) for name in ("outlier_exposure", SAME))
    return _pair((exposure, "Knockoff, outlier exposure"), (same, "Knockoff, SAME"))


def figure2(rows: Rows, detector: str = SAME_MASK_0, attack: str = LABELS[2]) -> Figure:
    """Scores of JBDA's queries: the reconstruction error alone, and with the auxiliary model."""
    budget = budgets_of(rows)[-1]
    alone, both = (detected(rows, detector, attack, budget, alpha=alpha) for alpha in (1.0, 0.5))
    return _pair((alone, "JBDA, reconstruction error alone"), (both, "JBDA, with the auxiliary model"))


def figure4(rows: Rows) -> Figure:
    """Queries answered under each response, and the seconds of proof of work that they cost (modelled)."""
    figure = plt.figure(figsize=(9, 3.8))
    bars, work = figure.subplots(1, 2, width_ratios=(3, 2))
    shares = {n: (lambda user, n=n: [r["answered"] for r in responded(rows, n, user)]) for n in RESPONSES}
    grouped_bars(bars, USER_NAMES, shares, chance=None)
    bars.set_ylabel("queries answered (%)")
    _time_ranges(work, rows, ("proof of work",))
    work.set_ylabel("seconds of work, modelled")
    figure.legend(*bars.get_legend_handles_labels(), ncols=len(RESPONSES), loc="outside upper center")
    for axis in (bars, work):
        axis.tick_params(axis="x", labelsize=9)
    return figure


def http_figure(rows: Rows) -> Figure:
    """Figure 4's response times, of whole requests to a live service on loopback."""
    figure = plt.figure(figsize=(7, 3.6))
    axis = figure.subplots()
    _time_ranges(axis, rows, OVER_HTTP, http=True)
    axis.set_ylabel("response time over HTTP (s)")
    return legend_above(figure)


USER_NAMES = {BENIGN: BENIGN} | SHORT


def _time_ranges(axis: Axes, rows: Rows, responses: Sequence[str], **how) -> None:
    """Response times of answered queries: a mark at the median, lines to the quartiles (thick) and to 5 and 95 %."""
    for i, name in enumerate(responses):
        number = list(RESPONSES).index(name)
        look = {"color": COLOURS[number], "linestyle": "-"}
        for place, user in enumerate(USER_NAMES):
            seeds = [r["times"] for r in responded(rows, name, user, **how) if r["times"]]
            if not seeds:  # nothing was answered
                continue
            x, times = place + 0.25 * (i - (len(responses) - 1) / 2), np.exp(np.log(seeds).mean(0))
            axis.plot([x, x], times[[0, -1]], linewidth=1, **look)
            axis.plot([x, x], times[[1, -2]], linewidth=4, **look)
            label = name if user == BENIGN else None
            axis.plot(x, times[2], marker="o^sD"[number], markersize=6, markeredgecolor="white", label=label, **look)
    axis.set_xticks(range(len(USER_NAMES)), list(USER_NAMES.values()))
    axis.set_yscale("log")
    axis.grid(axis="x", visible=False)


def figure5(rows: Rows) -> Figure:
    """SAME, SAME-X and SAME-Y against each attack, scored over masked passes and at mask 0."""
    budget = budgets_of(rows)[-1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, detector in zip(axes, (SAME, SAME_MASK_0), strict=True):

        def values(alpha: float, detector: str = detector) -> Callable[[str], list[float]]:
            return lambda attack: [r["auroc"] for r in detected(rows, detector, attack, budget, alpha)]

        grouped_bars(axis, SHORT, {name: values(alpha) for name, alpha in VARIANTS.items()})
        scoring = {r["scoring"] for r in rows if r["detector"] == detector and "scoring" in r and "alpha" in r}
        axis.set_xlabel(", ".join(sorted(scoring)))
    return legend_above(figure)


def detectors_figure(rows: Rows, detectors: tuple[str, ...] = ("outlier_exposure", "edm", SAME, SAME_MASK_0)) -> Figure:
    """The detectors of Table 1 side by side, at both budgets."""
    budgets = budgets_of(rows)
    figure, axes = plt.subplots(1, len(budgets), figsize=(9, 3.6), sharey=True)
    for axis, budget in zip(axes, budgets, strict=True):

        def values(detector: str, budget: int = budget) -> Callable[[str], list[float]]:
            return lambda attack: [r["auroc"] for r in detected(rows, detector, attack, budget)]

        grouped_bars(axis, SHORT, {NAMES.get(d, d): values(d) for d in detectors})
        axis.set_xlabel(f"{budget:,} queries")
    return legend_above(figure)


def _band(axis: Axes, x: list[float], seeds: list[list[float]], name: str, number: int, log: bool = False) -> None:
    """The mean over seeds, and its 95 % interval as a band; with `log`, of the logarithms."""
    points = np.log(seeds) if log else np.array(seeds)
    means, halves = np.transpose([mean_interval(point) for point in points.T])
    low, high = means - np.nan_to_num(halves), means + np.nan_to_num(halves)
    low, means, high = (np.exp(values) if log else values for values in (low, means, high))
    axis.plot(x, means, color=COLOURS[number], linestyle=LINES[number], label=name)
    axis.fill_between(x, low, high, color=COLOURS[number], alpha=0.15)


def figure6(rows: Rows) -> Figure:
    """Reconstruction error of benign and malicious queries over the autoencoder's epochs."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, scoring, title in zip(axes, ("mask 0", "passes"), ("mask 0", "masked passes"), strict=True):
        for number, (kind, name) in enumerate(KINDS.items()):
            found = [r for r in pick(rows, scoring=scoring, attack=kind) if "errors" in r]
            if found:
                _band(axis, found[0]["epochs"], [r["errors"] for r in found], name, number, log=True)
        axis.set(title=title, xlabel="epoch of the autoencoder", ylabel="mean reconstruction error", yscale="log")
    return legend_above(figure)


def figure7(rows: Rows) -> Figure:
    """AUROC of the reconstruction error alone, by the autoencoder's embedding size."""
    budget, figure = budgets_of(rows)[-1], plt.figure(figsize=(6.5, 3.6))
    axis, own = figure.subplots(), preset_of(rows).same.mae.width
    widths = {name: own if name == SAME else int(name.split()[-1]) for name in width_names(rows)}
    names = sorted(widths, key=widths.__getitem__)
    for number, label in enumerate(LABELS):
        found = {name: detected(rows, name, label, budget, alpha=1.0) for name in names}
        seeds = sorted(set.intersection(*({r["seed"] for r in cell} for cell in found.values())))
        values = [[100 * next(r["auroc"] for r in found[n] if r["seed"] == seed) for n in names] for seed in seeds]
        if values:
            _band(axis, [widths[n] for n in names], values, SHORT[label].replace("\n", " "), number)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(widths.values()), [str(w) for w in widths.values()])
    axis.set(xlabel="embedding size", ylabel="AUROC of SAME-X (%)", ylim=(0, 105))
    axis.legend()
    return figure


def alpha_figure(rows: Rows) -> Figure:
    """AUROC of SAME at every weight alpha, for each headline attack."""
    budget = budgets_of(rows)[-1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    alphas = sorted({r["alpha"] for r in rows if r["detector"] == SAME and "alpha" in r})
    for axis, detector, title in zip(axes, (SAME, SAME_MASK_0), ("masked passes", "mask 0"), strict=True):
        for number, label in enumerate(LABELS):
            points = [[100 * r["auroc"] for r in detected(rows, detector, label, budget, a)] for a in alphas]
            if all(points):
                _band(axis, alphas, list(zip(*points, strict=True)), SHORT[label].replace("\n", " "), number)
        axis.set(title=title, xlabel="alpha, weight of the reconstruction error", ylabel="AUROC (%)", ylim=(0, 105))
        axis.axhline(50, color="black", linewidth=0.8, linestyle=":")
    return legend_above(figure)


# The tables of each target of `samelib reproduce`.
TARGET_TABLES: dict[str, Callable[[Rows], str]] = {
    "table1": detection_table,
    "table2": detection_table,
    "table3": cost_table,
    "table4": lambda rows: ratio_table(rows, LABELS),
    "figure4": lambda rows: f"{responses_table(rows)}\n\n{copies_table(rows)}",
    "http": http_table,
    "figure7": width_table,
    "sharing": sharing_table,
    "audit": lambda rows: "\n\n".join(f"{a}\n\n{audit_table(rows, a)}" for a in (*LABELS, "jbda, unclipped")),
    "posthoc": posthoc_table,
    "accounts": accounts_table,
    "attacks": lambda rows: attack_table(rows, list(dict.fromkeys(r["attack"] for r in rows if "alpha" in r))),
}

# The figures of each target of `samelib reproduce`.
TARGET_FIGURES: dict[str, Callable[[Rows], Figure]] = {
    "table1": detectors_figure,
    "table2": detectors_figure,
    "figure1": figure1,
    "figure2": figure2,
    "figure4": figure4,
    "http": http_figure,
    "figure5": figure5,
    "figure6": figure6,
    "figure7": figure7,
    "alpha": alpha_figure,
}


def draw(target: str, rows: Rows, folder: Path) -> list[Path]:
    """Writes the table (Markdown) and the figure (PNG) of a target; returns the files."""
    files = []
    if target in TARGET_TABLES:
        files.append(folder / f"{target}.md")
        files[-1].write_text(TARGET_TABLES[target](rows) + "\n")
    if target in TARGET_FIGURES:
        files.append(folder / f"{target}.png")
        figure = TARGET_FIGURES[target](rows)
        figure.savefig(files[-1], dpi=150)
        plt.close(figure)
    return files
