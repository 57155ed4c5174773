"""Tables from result rows, as Markdown: what the book says is written by these functions, never by hand."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from reproduction.cells import (
    BASELINES,
    HEADLINES,
    NEAREST_JBDA,
    PROTOCOLS,
    SAME,
    SAME_MASK_0,
    SAME_SHARED,
    STEMS,
    without_seeds,
)
from reproduction.results import load_rows, reported
from samelib.data.groups import COLOUR
from samelib.detectors.posthoc import METHODS
from samelib.metrics import mean_interval
from samelib.presets import Preset, preset_for

Rows = list[dict]
# The headline attacks as the rows name them: of the JBDA variant only what it asked beyond its seeds.
OTHER_READING = without_seeds(NEAREST_JBDA)
LABELS = tuple(OTHER_READING if a == NEAREST_JBDA else a for a in HEADLINES)
METRICS = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95", "fpr90": "FPR90"}
NAMES = {"outlier_exposure": "OE", "edm": "EDM", SAME: "SAME", SAME_MASK_0: "SAME, mask 0"}
VARIANTS = {"SAME": 0.5, "SAME-X": 1.0, "SAME-Y": 0.0}  # alpha, on standardised terms
TABLES = {"mnist": "table1_mnist", "cifar10": "table2_cifar10"}


def grid_rows(group: str, tier: str, path: Path | None = None) -> Rows:
    """All readings of a group and tier, from the published results or the file at `path`.

    Raises:
        ValueError: rows of different code or data: their figures do not belong into one table.
    """
    rows = load_rows(group, path, tier=tier)
    for kind, word in (("code", "versions of samelib's code"), ("data", "data")):
        if len({row[kind] for row in rows}) > 1:
            raise ValueError(
                f"the {tier} rows of {group} come from different {word}; measure them again into one folder"
            )
    return rows


def pick(rows: Rows, **where) -> Rows:
    """The rows whose fields equal `where`; plain detection rows have no `ratio`, and alpha 0.5 is SAME itself."""
    return [row for row in rows if all(row.get(k) == v for k, v in where.items())]


def same_rows(rows: Rows) -> Rows:
    """Detection by SAME as it is, in both ways of scoring and at every alpha: no faults, no other malicious ratios."""
    names = (SAME, SAME_MASK_0)
    return [r for r in pick(rows, protocol="fixed", ratio=None) if r["detector"] in names and "alpha" in r]


def detected(rows: Rows, detector: str, attack: str, budget: int, alpha: float = 0.5, **more) -> Rows:
    """One row a seed: the detector's own score (SAME at `alpha`, EDM by its first consensus) on an attack."""
    where = {"detector": detector, "attack": attack, "budget": budget, "ratio": None, "protocol": "fixed"} | more
    if detector.startswith("same"):
        where["alpha"] = alpha
    if detector == "edm":
        where.setdefault("consensus", "mean cosine")
    return pick(rows, **where)


def _aurocs(rows: Rows, detector: str, **how) -> list[str]:
    """AUROC of a detector on each headline attack at the large budget; `how` goes to `detected`."""
    budget = budgets_of(rows)[-1]
    return [spread(r["auroc"] for r in detected(rows, detector, attack, budget, **how)) for attack in LABELS]


def spread(values: Iterable[float]) -> str:
    """Mean and half width of the 95 % interval over seeds, of fractions, in percent: "81.3 ± 0.9"."""
    values = [100 * v for v in values]
    if not values:
        return "–"
    mean, half = mean_interval(values)
    return f"{mean:.1f}" if half != half else f"{mean:.1f} ± {half:.1f}"


def change(values: Iterable[float]) -> str:
    """Like `spread`, of differences: with their sign."""
    text = spread(values)
    return text.replace("-0.0", "+0.0") if text.startswith(("-", "–")) else f"+{text}"


def markdown(header: Sequence[str], lines: Iterable[Sequence], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are text, the others figures."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, rule, *lines])


def preset_of(rows: Rows) -> Preset:
    """The settings of the group and tier of these rows."""
    return preset_for(rows[0]["tier"], rows[0]["group"] in COLOUR, 1)


def budgets_of(rows: Rows) -> tuple[int, int]:
    """The small and the large budget of these rows."""
    return preset_of(rows).budgets


def detection_table(rows: Rows) -> str:
    """The paper's Table 1 or 2: AUROC, AUPR and FPR95 in percent, each beside the paper's."""
    lines, metrics = [], ("auroc", "aupr", "fpr95")
    table = reported(TABLES[rows[0]["group"]]) if rows[0]["group"] in TABLES else []
    for budget in budgets_of(rows):
        for attack in LABELS:
            for detector in (*BASELINES, SAME, SAME_MASK_0):
                found = detected(rows, detector, attack, budget)
                paper = pick(table, method=detector, attack=attack, budget=budget)
                lines.append([f"{budget:,}", attack, NAMES[detector], *_beside(found, paper, metrics, table)])
    return markdown(["budget", "attack", "detector", *_headings(metrics, table)], lines, 3)


def _beside(found: Rows, paper: Rows, metrics: Iterable[str], table: Rows) -> list[str]:
    """Our figures, each followed by the paper's where the paper has a table of this group."""
    pairs = [(spread(r[m] for r in found), f"{paper[0][m]:.1f}" if paper else "") for m in metrics]
    return [text for pair in pairs for text in (pair if table else pair[:1])]


def _headings(metrics: Iterable[str], table: Rows) -> list[str]:
    return [word for m in metrics for word in (METRICS[m], *(["paper"] if table else []))]


def cost_table(rows: Rows) -> str:
    """The paper's Table 3: the victim's accuracy and seconds of training under each defence, SAME's by their parts."""
    lines = []
    for detector in (*BASELINES, SAME, *sorted({r["detector"] for r in rows if r["detector"] in STEMS})):
        found = pick(rows, detector=detector, attack="cost")
        paper = reported("table3_cifar10", method=detector)
        parts = [[r.get(f"{part}_seconds", 0.0) for r in found] for part in ("victim", "auxiliary", "mae")]
        parts.append([sum(seed) for seed in zip(*parts, strict=True)])
        seconds = [f"{mean_interval(p)[0]:.0f}" if p else "–" for p in parts]
        more = f"{found[0]['parameters']:,}" if found else "–"
        theirs = [f"{paper[0]['accuracy']:.1f}", f"{paper[0]['training_seconds']:,.0f}"] if paper else ["", ""]
        lines.append(
            [NAMES.get(detector, detector), spread(r["victim_accuracy"] for r in found), *seconds, more, *theirs]
        )
    header = ["defence", "accuracy", "victim, s", "auxiliary, s", "autoencoder, s", "in all, s", "more parameters"]
    return markdown([*header, "paper: accuracy (CIFAR-10)", "paper: s"], lines)


def ratio_table(rows: Rows, attacks: Sequence[str] = ("knockoff",)) -> str:
    """The paper's Table 4: SAME where a share of the queries is malicious."""
    lines, table = [], reported("table4", group=rows[0]["group"])
    for attack in attacks:
        for ratio in sorted({r["ratio"] for r in rows if r.get("ratio")}):
            found = pick(rows, detector=SAME, attack=attack, ratio=ratio)
            paper = pick(table, malicious_ratio=ratio)
            lines.append([attack, f"{ratio:.2f}", *_beside(found, paper, METRICS, table)])
    return markdown(["attack", "malicious", *_headings(METRICS, table)], lines)


def detectors_table(rows: Rows, detectors: Sequence[str]) -> str:
    """AUROC of some detectors on the headline attacks at the large budget, in percent."""
    lines = [[NAMES.get(d, d), *_aurocs(rows, d)] for d in detectors]
    return markdown(["detector", *LABELS], lines)


def summary_table(rows: Rows) -> str:
    """AUROC of Table 1's detectors at the large budget, in percent, the paper's in brackets."""
    budget, table = budgets_of(rows)[-1], TABLES.get(rows[0]["group"])

    def cell(detector: str, label: str) -> str:
        attack = "jbda" if label.startswith("jbda") else label  # the paper has one figure for all its readings
        paper = reported(table, method=detector, attack=attack, budget=budget) if table else []
        ours = spread(r["auroc"] for r in detected(rows, detector, label, budget))
        return f"{ours} ({paper[0]['auroc']:.1f})" if paper else ours

    lines = [[NAMES[d], *(cell(d, label) for label in LABELS)] for d in (*BASELINES, SAME, SAME_MASK_0)]
    return markdown(["detector", *LABELS], lines)


def consensus_table(rows: Rows) -> str:
    """EDM's three scores of agreement (the paper does not say which it used)."""
    names = sorted({r["consensus"] for r in rows if "consensus" in r})
    lines = [[name, *_aurocs(rows, "edm", consensus=name)] for name in names]
    return markdown(["EDM's score", *LABELS], lines)


def posthoc_table(rows: Rows) -> str:
    """Scores that need no training beside the trained detectors."""
    return detectors_table(rows, (*METHODS, *BASELINES, SAME))


def width_table(rows: Rows) -> str:
    """Figure 7 in figures: SAME-X by the autoencoder's embedding size."""
    lines = [[name, *_aurocs(rows, name, alpha=1.0)] for name in width_names(rows)]
    return markdown(["detector (its reconstruction error alone)", *LABELS], lines)


def width_names(rows: Rows) -> list[str]:
    """Detectors of the embedding sizes that were measured; the tier's own size is "same"."""
    others = {r["detector"] for r in rows if r["detector"].startswith("same, width")}
    return [*sorted(others, key=lambda name: int(name.split()[-1])), SAME]


def sharing_table(rows: Rows) -> str:
    """The auxiliary model on the victim's frozen trunk, or on one of its own: parameters, seconds, AUROC."""
    lines = []
    for detector, name in ((SAME, "a network of its own"), (SAME_SHARED, "the victim's trunk")):
        cost = pick(rows, detector=detector, attack="cost")
        size = f"{cost[0]['auxiliary_parameters']:,}" if cost else "–"
        accuracy = spread(r["victim_accuracy"] for r in cost)
        lines.append([name, size, accuracy, *_aurocs(rows, detector)])
    return markdown(["auxiliary model", "parameters", "victim's accuracy", *LABELS], lines)


AUDIT_METRICS = METRICS | {"tpr_at_5%": "TPR at 5 %"}


def audit_table(rows: Rows, attack: str = "knockoff") -> str:
    """Each fault of the released code alone, against SAME at mask 0 without it: change in percentage points, paired by
    seed. The first line holds the figures without any."""
    sound = {r["seed"]: r for r in _audited(rows, "fixed", attack)}
    lines = [["none", *(spread(r[m] for r in sound.values()) for m in AUDIT_METRICS)]]
    for protocol in PROTOCOLS:
        if protocol != "fixed":
            faulty = [r for r in _audited(rows, protocol, attack) if r["seed"] in sound]
            changes = [change(r[m] - sound[r["seed"]][m] for r in faulty) for m in AUDIT_METRICS]
            lines.append(["all of them" if protocol == "author_code" else protocol, *changes])
    return markdown(["fault", *AUDIT_METRICS.values()], lines)


def _audited(rows: Rows, protocol: str, attack: str) -> Rows:
    found = pick(rows, detector=SAME_MASK_0, protocol=protocol, attack=attack, budget=budgets_of(rows)[-1])
    return [r for r in found if r["alpha"] in (0.5, 0.99)]


def accounts_table(rows: Rows) -> str:
    """PRADA where the same queries come from one account, ten or a hundred; and from honest users."""
    lines = []
    for attack in (*HEADLINES, "benign"):
        for accounts in sorted({r["accounts"] for r in rows if "accounts" in r}):
            found = pick(rows, detector="prada", attack=attack, accounts=accounts)
            found = list({r["seed"]: r for r in found}.values())  # every attack's cell has the honest users again
            alarms = [r["alarm_at"] for r in found if r["alarm_at"]]
            first = f"{mean_interval(alarms)[0]:,.0f}" if alarms else "–"
            shares = [spread(r[k] for r in found) for k in ("alarmed", "after_alarm")]
            lines.append([attack, accounts, shares[0], first, shares[1]])
    header = ["queries", "accounts", "accounts with an alarm, %", "at query", "queries after it, %"]
    return markdown(header, lines)


def attack_table(rows: Rows, labels: Sequence[str] = LABELS) -> str:
    """AUROC of SAME and of each term alone against the attacks of those labels, with the paper's SAME, and the
    substitute's accuracy and fidelity: a row an attack, budget and scoring."""
    rows = [r for r in same_rows(rows) if r["attack"] in labels]
    lines, table = [], TABLES.get(rows[0]["group"]) if rows else None
    for number, budget, scoring in sorted({(labels.index(r["attack"]), r["budget"], r["scoring"]) for r in rows}):
        label = labels[number]
        cell = pick(rows, attack=label, budget=budget, scoring=scoring)
        figures = [spread(r["auroc"] for r in cell if r["alpha"] == alpha) for alpha in VARIANTS.values()]
        paper = reported(table, method="same", attack=label, budget=budget) if table else []
        copy = [spread(r[f"substitute_{k}"] for r in cell if r["alpha"] == 0.5) for k in ("accuracy", "fidelity")]
        theirs = f"{paper[0]['auroc']:.1f}" if paper else ""
        lines.append([label, f"{budget:,}", scoring, *figures, theirs, *copy])
    return markdown(["attack", "budget", "scoring", *VARIANTS, "paper", "accuracy", "fidelity"], lines, 3)
