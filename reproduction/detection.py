"""Detection of attacks: Tables 1, 2 and 4, Figures 1, 2 and 5, the weight alpha, attack variants, post-hoc scores,
controls."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reproduction.author_code import INTERPOLATED, faults_of
from reproduction.lab import Bench, evenly, parts_of_log
from reproduction.plan import (
    EDM,
    HEADLINES,
    NEAREST_JBDA,
    NOISE,
    OUTLIER_EXPOSURE,
    SAME,
    SAME_MASK_0,
    Cell,
    DetectorVariant,
    budgets_of,
)
from reproduction.rows import reported
from reproduction.tables import markdown, select, spread
from samelib.detectors import edm
from samelib.detectors.base import Detector, conformal_threshold
from samelib.detectors.controls import CONTROLS
from samelib.detectors.posthoc import METHODS
from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import CHOSEN, SamePlus, picture_kind
from samelib.detectors.views import COMBINATION, COMBINATIONS, combined
from samelib.metrics import detection_metrics, mean_interval, tpr_at_threshold
from samelib.plots import COLOURS, HATCHES, LINES, grouped_bars, legend_above

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
VARIANTS = {"SAME": 0.5, "SAME-X": 1.0, "SAME-Y": 0.0}  # alpha, on standardised terms
RATIOS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.9)  # the paper's Table 4
BINS = 40  # each holds 2.5 % of the benign queries

# The headline attacks as `label` has them: of the JBDA variant only what it asked beyond its seeds.
OTHER_READING = f"{NEAREST_JBDA}, seeds left out"
LABELS = tuple(OTHER_READING if attack == NEAREST_JBDA else str(attack) for attack in HEADLINES)
SHORT = dict(zip(LABELS, LABELS, strict=True)) | {OTHER_READING: "jbda, −, 0.2,\nno seeds"}  # that fit under an axis
METRICS = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95", "fpr90": "FPR90"}
DETECTORS = {"OE": OUTLIER_EXPOSURE, "EDM": EDM, "SAME": SAME, "SAME, mask 0": SAME_MASK_0}
TABLES = {"mnist": "table1_mnist", "cifar10": "table2_cifar10"}

Reading = tuple[dict, Tensor]  # what distinguishes it from others of the same detector, and the scores [N]


# Measuring


def measure(bench: Bench, cell: Cell) -> Iterator[dict]:
    """Detection of an attack that was run against this detector's own victim."""
    victim, group, variant = bench.victim(cell.detector), bench.group, cell.detector
    queries, substitute = bench.log(victim, cell.attack, cell.budget)
    positions = evenly(torch.arange(len(queries)), len(group.benign_test))  # in the log, of the queries that are scored
    scored = readings(bench.detector(variant), queries[positions], variant.fault)
    known = _benign_readings(bench, variant)
    common = {"victim_accuracy": bench.accuracy(victim)}
    common |= _rounded({f"substitute_{name}": substitute[name] for name in ("accuracy", "fidelity")})
    drawn = (
        variant.fault == "none"
        and variant.seen is None
        and cell.budget == bench.settings.budgets[1]
        and cell.attack in HEADLINES
    )
    for seeds, part in parts_of_log(cell.attack, positions, len(group.seeds)).items():
        for (fields, scores), (_, benign), (_, calibration) in zip(scored, *known, strict=True):
            alpha, malicious = fields.get("alpha", 0.5), scores[part.to(scores.device)]
            if cell.attack not in (*HEADLINES, NOISE) and alpha not in (*VARIANTS.values(), 0.99):
                continue
            row = ({} if seeds == "in" else {"seeds": seeds}) | fields | common
            ranks = drawn and alpha in VARIANTS.values() and "view" not in fields
            yield (
                row
                | _one_to_one(benign, malicious, calibration, variant.fault)
                | ({"ranks": _ranks(benign, malicious)} if ranks else {})
            )
            if drawn and alpha == VARIANTS["SAME"] and (variant == SAME or variant.detector in CONTROLS):
                for ratio in RATIOS:
                    yield row | {"ratio": ratio} | _at_ratio(benign, malicious, ratio, bench.seed)


def readings(detector: Detector, x: Tensor, fault: str = "none") -> list[Reading]:
    """All scores that a detector offers for images [N, C, H, W]: SAME's at each alpha, SamePlus's views and their
    combinations, EDM's consensus scores."""
    if isinstance(detector, SamePlus):
        views = dict(zip(detector.views, detector.surprises(x).unbind(1), strict=True))
        chosen = torch.stack([views[name] for name in CHOSEN[picture_kind(detector.image_shape)]], dim=1)
        views |= {name: combined(chosen, name) for name in COMBINATIONS}
        return [({"view": name}, scores) for name, scores in views.items()]
    if isinstance(detector, SameDetector):
        terms, own = detector.terms(x), detector.settings.alpha
        alphas = ALPHAS if fault == "none" else VARIANTS.values() if own in VARIANTS.values() else (own,)
        return [({"alpha": alpha}, detector.combine(terms, alpha)) for alpha in sorted(alphas)]
    if isinstance(detector, edm.EDM):
        return [({"consensus": name}, scores) for name, scores in detector.consensus_scores(x).items()]
    return [({}, detector.score(x))]


def _benign_readings(bench: Bench, variant: DetectorVariant) -> tuple[list[Reading], ...]:
    """Readings of the benign queries, and of the images that set the threshold."""
    if variant not in bench.benign_readings:
        detector, calibration = bench.detector(variant), bench.group.calibration
        own = len(detector.calibration_scores) if isinstance(detector, SamePlus) else (len(calibration) + 1) // 2
        sets = bench.group.benign_test, calibration[len(calibration) - own :]
        bench.benign_readings[variant] = tuple(readings(detector, s.pixels(), variant.fault) for s in sets)
    return bench.benign_readings[variant]


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}


def _one_to_one(benign: Tensor, malicious: Tensor, calibration: Tensor, fault: str) -> dict[str, float]:
    """Detection as in Tables 1 and 2: as many benign queries as malicious ones, whichever are fewer."""
    count = min(len(benign), len(malicious))
    benign, malicious = benign[:count], malicious[:count]
    rates = {}
    for fpr in (0.01, 0.05):
        threshold = conformal_threshold(calibration, fpr)
        rates[f"tpr_at_{fpr:.0%}"] = tpr_at_threshold(malicious, threshold)
        rates[f"fpr_at_{fpr:.0%}"] = tpr_at_threshold(benign, threshold)
    return _rounded(detection_metrics(benign, malicious, interpolate=INTERPOLATED in faults_of(fault)) | rates)


def _at_ratio(benign: Tensor, malicious: Tensor, ratio: float, seed: int, draws: int = 10) -> dict[str, float]:
    """Detection where `ratio` of the queries are malicious, as many as there are for it; the mean over some draws."""
    generator = torch.Generator().manual_seed(seed)
    attack = min(len(malicious), int(len(benign) * ratio / (1 - ratio)))
    clean = min(len(benign), round(attack * (1 - ratio) / ratio))

    def drawn(scores: Tensor, count: int) -> Tensor:
        return scores[torch.randperm(len(scores), generator=generator)[:count].to(scores.device)]

    return _rounded(
        pd.DataFrame([detection_metrics(drawn(benign, clean), drawn(malicious, attack)) for _ in range(draws)])
        .mean()
        .to_dict()
    )


def _ranks(benign: Tensor, malicious: Tensor) -> list[int]:
    """How many of the malicious queries score like each fortieth of the benign ones, from the least strange; what ties
    lies halfway. Unlike a histogram of scores it is the same on every scale."""
    ordered = benign.sort().values
    below, up_to = (torch.searchsorted(ordered, malicious.contiguous(), right=right) for right in (False, True))
    bins = ((below + up_to) * BINS / (2 * len(ordered))).long().clamp(max=BINS - 1)
    return torch.bincount(bins, minlength=BINS).tolist()


# Choosing rows


def detected(
    frame: pd.DataFrame,
    detector: DetectorVariant,
    label: str,
    budget: int | None = None,
    alpha: float = 0.5,
    consensus: str = "mean cosine",
    view: str = COMBINATION,
) -> pd.DataFrame:
    """One row a seed: the detector's score (SAME at `alpha`, SamePlus by `view`, EDM by `consensus`) on the queries of that
    label.

    Args:
        budget: None: the large one.
    """
    budget = budget or budgets_of(frame)[1]
    scores = {"same": {"alpha": alpha}, "same_plus": {"view": view}, "edm": {"consensus": consensus}}
    own = scores.get(detector.detector, {})
    fields = {"experiment": "detection", "label": label, "budget": budget, "ratio": None} | detector._asdict()
    return select(frame, **fields | own)


def same_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Detection by SAME as it is, in both ways of scoring and at every alpha: no faults, no other malicious ratios."""
    fields = SAME._asdict()
    del fields["scoring"]
    return select(frame, experiment="detection", ratio=None, **fields)


# Tables


def aurocs(frame: pd.DataFrame, detector: DetectorVariant, **how) -> list[str]:
    """AUROC of a detector on each headline attack at the large budget; `how` goes to `detected`."""
    return [spread(detected(frame, detector, label, **how)["auroc"]) for label in LABELS]


def detection_table(frame: pd.DataFrame, detectors: Mapping[str, DetectorVariant] = DETECTORS) -> str:
    """The paper's Table 1 or 2: AUROC, AUPR and FPR95 of detectors (by their printed names) in percent, each beside the
    paper's."""
    lines, metrics, table = [], ("auroc", "aupr", "fpr95"), papers_table(frame)
    for budget in budgets_of(frame):
        for label in LABELS:
            for name, detector in detectors.items():
                paper = None if table is None else select(table, method=str(detector), attack=label, budget=budget)
                figures = beside(detected(frame, detector, label, budget), paper, metrics)
                lines.append([f"{budget:,}", label, name, *figures])
    return markdown(["budget", "attack", "detector", *headings(metrics, table)], lines, 3)


def papers_table(frame: pd.DataFrame) -> pd.DataFrame | None:
    """The paper's Table 1 or 2 where it is of this group."""
    table = TABLES.get(frame["group"].iloc[0])
    return reported(table) if table else None


def beside(rows: pd.DataFrame, paper: pd.DataFrame | None, metrics: Iterable[str]) -> list[str]:
    """Our figures, each followed by the paper's where it has a table of this group."""
    cells = []
    for metric in metrics:
        cells.append(spread(rows[metric]))
        if paper is not None:
            cells.append("" if paper.empty else f"{paper[metric].iloc[0]:.1f}")
    return cells


def headings(metrics: Iterable[str], paper: pd.DataFrame | None) -> list[str]:
    return [word for metric in metrics for word in (METRICS[metric], *([] if paper is None else ["paper"]))]


def ratio_table(frame: pd.DataFrame, labels: Sequence[str] = ("knockoff",), detector: DetectorVariant = SAME) -> str:
    """The paper's Table 4: SAME (beside the paper's), or a control, where a share of the queries is malicious."""
    lines, paper = [], reported("table4", group=frame["group"].iloc[0])
    paper = None if paper.empty or detector != SAME else paper
    for label in labels:
        for ratio in RATIOS:
            rows = select(frame, experiment="detection", label=label, ratio=ratio, **detector._asdict())
            theirs = None if paper is None else select(paper, malicious_ratio=ratio)
            lines.append([label, f"{ratio:.2f}", *beside(rows, theirs, METRICS)])
    return markdown(["attack", "malicious", *headings(METRICS, paper)], lines)


def detectors_table(frame: pd.DataFrame, variants: Mapping[str, DetectorVariant]) -> str:
    """AUROC of some detectors (by their printed names) on the headline attacks at the large budget, in percent."""
    return markdown(["detector", *LABELS], [[name, *aurocs(frame, variant)] for name, variant in variants.items()])


def posthoc_table(frame: pd.DataFrame) -> str:
    """Scores that need no training beside the trained detectors."""
    return _beside_trained(frame, METHODS)


def controls_table(frame: pd.DataFrame) -> str:
    """What one line tells of a query beside the trained detectors."""
    return _beside_trained(frame, CONTROLS)


def _beside_trained(frame: pd.DataFrame, names: Iterable[str]) -> str:
    measured = set(frame["detector"])
    trained = {name: DETECTORS[name] for name in ("OE", "EDM", "SAME") if DETECTORS[name].detector in measured}
    return detectors_table(frame, {name: DetectorVariant(name) for name in names} | trained)


def summary_table(frame: pd.DataFrame, metric: str = "auroc") -> str:
    """One measure of Table 1's detectors at the large budget, in percent, the paper's in brackets."""
    table = papers_table(frame)

    def cell(detector: DetectorVariant, label: str) -> str:
        ours = spread(detected(frame, detector, label)[metric])
        names = {"method": str(detector), "attack": label, "budget": budgets_of(frame)[1]}
        paper = () if table is None else select(table, **names)[metric]
        return f"{ours} ({paper.iloc[0]:.2f})" if len(paper) else ours

    lines = [[name, *(cell(detector, label) for label in LABELS)] for name, detector in DETECTORS.items()]
    return markdown([METRICS[metric], *LABELS], lines)


def consensus_table(frame: pd.DataFrame) -> str:
    """EDM's three scores of agreement (the paper does not say which it used)."""
    names = sorted(frame["consensus"].dropna().unique())
    return markdown(["EDM's score", *LABELS], [[name, *aurocs(frame, EDM, consensus=name)] for name in names])


def attack_table(frame: pd.DataFrame, labels: Sequence[str] = LABELS) -> str:
    """AUROC of SAME and of each term alone against the attacks of those labels, with the paper's SAME, and the
    substitute's accuracy and fidelity: a row an attack, budget and scoring."""
    frame = same_rows(frame)
    frame = frame[frame["label"].isin(labels)]
    lines, table = [], papers_table(frame)
    groups = dict(iter(frame.groupby(["label", "budget", "scoring"])))
    for label, budget, scoring in sorted(groups, key=lambda key: (labels.index(key[0]), *key[1:])):
        rows = groups[label, budget, scoring]
        figures = [spread(select(rows, alpha=alpha)["auroc"]) for alpha in VARIANTS.values()]
        paper = () if table is None else select(table, method="same", attack=label, budget=budget)["auroc"]
        copy = [spread(select(rows, alpha=0.5)[f"substitute_{name}"]) for name in ("accuracy", "fidelity")]
        lines.append([label, f"{budget:,}", scoring, *figures, f"{paper.iloc[0]:.1f}" if len(paper) else "", *copy])
    return markdown(["attack", "budget", "scoring", *VARIANTS, "paper", "accuracy", "fidelity"], lines, 3)


# Figures


def rank_histogram(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    """Where an attack's queries lie among the benign ones in order of strangeness, mean over seeds."""
    counts = np.stack(rows["ranks"].dropna().tolist())
    share = (100 * counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    edges = np.linspace(0, 100, BINS + 1)
    axis.stairs(share, edges, fill=True, alpha=0.45, color=COLOURS[1], hatch=HATCHES[1], label="malicious")
    axis.stairs(share, edges, color=COLOURS[1])
    axis.hlines(100 / BINS, 0, 100, color=COLOURS[0], linestyle="--", label="benign")
    axis.set(title=title, xlabel="benign queries that score lower (%)", ylabel="share of queries (%)")
    axis.legend(loc="upper left")


def _pair(panels: dict[str, pd.DataFrame]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        rank_histogram(axis, rows, title)
    return figure


def figure1(frame: pd.DataFrame) -> Figure:
    """Scores of Knockoff's queries: outlier exposure beside SAME."""
    exposure, same = (detected(frame, detector, "knockoff") for detector in (OUTLIER_EXPOSURE, SAME))
    return _pair({"Knockoff, outlier exposure": exposure, "Knockoff, SAME": same})


def figure2(frame: pd.DataFrame, detector: DetectorVariant = SAME_MASK_0, label: str = OTHER_READING) -> Figure:
    """Scores of JBDA's queries: the reconstruction error alone, and with the auxiliary model."""
    alone, both = (detected(frame, detector, label, alpha=alpha) for alpha in (1.0, 0.5))
    return _pair({"JBDA, reconstruction error alone": alone, "JBDA, with the auxiliary model": both})


def figure5(frame: pd.DataFrame) -> Figure:
    """SAME, SAME-X and SAME-Y against each attack, scored over masked passes and at mask 0."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, detector in zip(axes, (SAME, SAME_MASK_0), strict=True):

        def values(alpha: float, detector: DetectorVariant = detector) -> Callable[[str], list[float]]:
            return lambda label: detected(frame, detector, label, alpha=alpha)["auroc"].tolist()

        grouped_bars(axis, SHORT, {name: values(alpha) for name, alpha in VARIANTS.items()})
        axis.set_xlabel("masked passes" if detector == SAME else "mask 0")
    return legend_above(figure)


def detectors_figure(frame: pd.DataFrame) -> Figure:
    """The detectors of Table 1 side by side, at both budgets."""
    budgets = budgets_of(frame)
    figure, axes = plt.subplots(1, len(budgets), figsize=(9, 3.6), sharey=True)
    for axis, budget in zip(axes, budgets, strict=True):

        def values(detector: DetectorVariant, budget: int = budget) -> Callable[[str], list[float]]:
            return lambda label: detected(frame, detector, label, budget)["auroc"].tolist()

        grouped_bars(axis, SHORT, {name: values(detector) for name, detector in DETECTORS.items()})
        axis.set_xlabel(f"{budget:,} queries")
    return legend_above(figure)


def band(axis: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], name: str, number: int, log: bool = False):
    """The mean over seeds at each x, and its 95 % interval as a band; with `log`, of the logarithms."""
    points = np.log(seeds) if log else np.array(seeds)
    means, halves = np.transpose([mean_interval(point) for point in points.T])
    low, high = means - np.nan_to_num(halves), means + np.nan_to_num(halves)
    low, means, high = (np.exp(values) if log else values for values in (low, means, high))
    axis.plot(x, means, color=COLOURS[number], linestyle=LINES[number], label=name)
    axis.fill_between(x, low, high, color=COLOURS[number], alpha=0.15)


def alpha_figure(frame: pd.DataFrame) -> Figure:
    """AUROC of SAME at every weight alpha, for each headline attack."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, detector, title in zip(axes, (SAME, SAME_MASK_0), ("masked passes", "mask 0"), strict=True):
        for number, label in enumerate(LABELS):
            points = [100 * detected(frame, detector, label, alpha=alpha)["auroc"] for alpha in ALPHAS]
            if all(map(len, points)):
                band(axis, ALPHAS, np.transpose(points), SHORT[label].replace("\n", " "), number)
        axis.set(title=title, xlabel="alpha, weight of the reconstruction error", ylabel="AUROC (%)", ylim=(0, 105))
        axis.axhline(50, color="black", linewidth=0.8, linestyle=":")
    return legend_above(figure)
