"""What the paper's text claims, and what this book claims beyond it, each as comparisons that an interval decides."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from reproduction.ablations import widths_of
from reproduction.accounts import ACCOUNTS
from reproduction.adaptive import met
from reproduction.cost import PARTS, costs
from reproduction.detection import DETECTORS, OTHER_READING, RATIOS, detected
from reproduction.plan import (
    BAN,
    BASELINES,
    BENIGN,
    EVERY_VIEW,
    HEADLINES,
    NEAREST_JBDA,
    OUTLIER_EXPOSURE,
    SAME,
    SAME_MASK_0,
    SAME_PLUS,
    SAME_SHARED,
    DetectorVariant,
    budgets_of,
)
from reproduction.responses import responded
from reproduction.rows import reported
from reproduction.tables import select
from samelib.metrics import mean_interval

LITTLE = 2.0  # percentage points: what counts as no difference
HOLDS, FAILS, OPEN = "holds", "fails", "undecided"
NAMES = {str(detector): name for name, detector in DETECTORS.items()}  # of the paper's methods
SHORT = {"knockoff": "Knockoff", "jbda": "JBDA", "dfme": "DFME", str(NEAREST_JBDA): "JBDA (−, 0.2)"}
SHORT |= {OTHER_READING: "JBDA (−, 0.2, no seeds)"}
READINGS = ("jbda", OTHER_READING)  # of the paper's JBDA


class NotMeasured(LookupError):
    """A claim cannot be judged: rows are missing."""


def outcome(values: Sequence[float], low: float, high: float) -> str:
    """Does the 95 % interval of measurements, one a seed, lie between two bounds, or beyond one? One run decides nothing,
    nor does a tie with a bound."""
    mean, half = mean_interval(values)
    if low < mean - half and mean + half < high:
        return HOLDS
    return FAILS if mean + half < low or mean - half > high else OPEN


class Comparison(NamedTuple):
    """One of the comparisons that a claim is made of.

    Attributes:
        what: is compared, in words.
        values: what was measured, one a seed, paired where two things are compared; none where rows are missing.
        low, high: between which it must lie.
    """

    what: str
    values: Sequence[float]
    low: float = 0.0
    high: float = math.inf

    @property
    def outcome(self) -> str:
        """See the function of this name; undecided where nothing was measured."""
        return outcome(self.values, self.low, self.high) if len(self.values) else OPEN


Compared = Callable[[pd.DataFrame], Iterator[Comparison]]


class Claim(NamedTuple):
    """A claim in words.

    Attributes:
        where: section, table or figure of the paper; of our own, the chapter.
        what: the claim, in our words.
        groups: the rows it is judged on, files results/GROUP.jsonl.
        chapter: the notebook with the evidence.
        compare: rows -> the comparisons it is made of (NotMeasured where rows are missing); None: no row can judge it.
        most: it speaks of most cases: more than half of the comparisons must hold, not all.
        grows: it speaks of an autoencoder trained to the end; that a small one falls short does not refute it.
        given: it is true by arithmetic or by construction, and no detector could fail it.
        settled: what the paper's own tables say against it, without any row.
    """

    where: str
    what: str
    groups: tuple[str, ...]
    chapter: str
    compare: Compared | None
    most: bool = False
    grows: bool = False
    given: bool = False
    settled: str = ""


def by_seed(rows: pd.DataFrame, metric: str = "auroc") -> pd.Series:
    """One value a seed.

    Raises:
        NotMeasured: there are no rows.
    """
    if rows.empty or metric not in rows or rows[metric].isna().all():
        raise NotMeasured(metric)
    return rows.groupby("seed")[metric].mean()


def points(rows: pd.DataFrame, metric: str = "auroc") -> pd.Series:
    """The same of a share, in percent."""
    return 100 * by_seed(rows, metric)


def gap(what: str, first: pd.Series, second: pd.Series, low: float = 0.0, high: float = math.inf) -> Comparison:
    """How far the first lies above the second, seed by seed.

    Raises:
        NotMeasured: they share no seed.
    """
    values = (first - second).dropna()
    if values.empty:
        raise NotMeasured(what)
    return Comparison(what, values.tolist(), low, high)


# Claims of the paper


def _better_than_baselines(metric: str, sign: int = 1, labels=("knockoff", *READINGS)) -> Compared:
    """In each cell against the better of the baselines that were measured; level cells tell nothing and are left out."""

    def compare(frame: pd.DataFrame) -> Iterator[Comparison]:
        for budget in budgets_of(frame):
            for label in labels:
                where = f"{SHORT[label]}, {budget:,} queries"
                same = points(detected(frame, SAME, label, budget), metric)
                rivals = {}
                for baseline in BASELINES:
                    rows = detected(frame, baseline, label, budget)
                    if len(rows):
                        rivals[NAMES[str(baseline)]] = points(rows, metric)
                    else:
                        yield Comparison(f"{where}, {NAMES[str(baseline)]}", ())
                if not rivals:
                    continue
                best = max(rivals, key=lambda name: sign * rivals[name].mean())
                lead = gap(f"{where}, SAME {'less' if sign > 0 else 'below'} {best}", sign * same, sign * rivals[best])
                if any(lead.values):
                    yield lead

    return compare


def _budget_matters_little(frame: pd.DataFrame) -> Iterator[Comparison]:
    small, large = budgets_of(frame)
    for label in ("knockoff", *READINGS):
        rows = (detected(frame, SAME, label, budget) for budget in (large, small))
        yield gap(f"{SHORT[label]}, {large:,} less {small:,} queries", *map(points, rows), -LITTLE, LITTLE)


def _baselines_cost_accuracy(frame: pd.DataFrame) -> Iterator[Comparison]:
    undefended = points(costs(frame, SAME), "victim_accuracy")
    for baseline in BASELINES:
        yield gap(
            f"accuracy, plain less {NAMES[str(baseline)]}",
            undefended,
            points(costs(frame, baseline), "victim_accuracy"),
        )


def _baselines_train_longer(parts: tuple[str, ...]) -> Compared:
    def compare(frame: pd.DataFrame) -> Iterator[Comparison]:
        same = sum(by_seed(costs(frame, SAME), f"{part}_seconds") for part in parts)
        for baseline in BASELINES:
            yield gap(
                f"seconds, {NAMES[str(baseline)]} less SAME", by_seed(costs(frame, baseline), "victim_seconds"), same
            )

    return compare


def _sharing_saves_memory(frame: pd.DataFrame) -> Iterator[Comparison]:
    own, shared = costs(frame, SAME), costs(frame, SAME_SHARED)
    yield gap("parameters, own less shared", *(by_seed(rows, "auxiliary_parameters") for rows in (own, shared)))


def _overlap(rows: pd.DataFrame) -> pd.Series:
    """The part that the histograms of benign and malicious ranks share, in percent, a value a seed."""
    if "ranks" not in rows or rows["ranks"].isna().all():
        raise NotMeasured("ranks")

    def shared(ranks: list[int]) -> float:
        return 100 * float(np.minimum(np.array(ranks) / sum(ranks), 1 / len(ranks)).sum())

    rows = rows.dropna(subset="ranks")
    return rows.assign(overlap=rows["ranks"].map(shared)).groupby("seed")["overlap"].mean()


def _exposure_overlaps_more(frame: pd.DataFrame) -> Iterator[Comparison]:
    overlaps = (_overlap(detected(frame, detector, "knockoff")) for detector in (OUTLIER_EXPOSURE, SAME))
    yield gap("shared part of the histograms, OE less SAME", *overlaps)


def _second_term(labels: Sequence[str], low: float = 0.0, high: float = math.inf) -> Compared:
    """How far SAME lies above its error alone, at both ways to score."""

    def compare(frame: pd.DataFrame) -> Iterator[Comparison]:
        for name, detector in {"passes": SAME, "mask 0": SAME_MASK_0}.items():
            for label in labels:
                rows = (detected(frame, detector, label, alpha=alpha) for alpha in (0.5, 1.0))
                yield gap(f"{SHORT[label]}, {name}, SAME less SAME-X", *map(points, rows), low, high)

    return compare


def _over_ratios(frame: pd.DataFrame, metric: str) -> dict[float, pd.Series]:
    rows = select(frame, experiment="detection", label="knockoff", **SAME._asdict())
    return {ratio: points(select(rows, ratio=ratio), metric) for ratio in RATIOS}


def _auroc_does_not_follow_the_ratio(frame: pd.DataFrame) -> Iterator[Comparison]:
    aurocs = _over_ratios(frame, "auroc")
    yield gap(f"ratio {RATIOS[-1]} less {RATIOS[0]}", aurocs[RATIOS[-1]], aurocs[RATIOS[0]], -LITTLE, LITTLE)


def _aupr_follows_the_ratio(frame: pd.DataFrame) -> Iterator[Comparison]:
    auprs = _over_ratios(frame, "aupr")
    for low, high in zip(RATIOS, RATIOS[1:], strict=False):
        yield gap(f"ratio {high} less {low}", auprs[high], auprs[low])


def _errors(frame: pd.DataFrame, label: str, scoring: str, epoch: int) -> pd.Series:
    """Mean reconstruction error after an epoch, in squared units of a pixel, beyond that of benign queries."""

    def error(of: str) -> pd.Series:
        rows = select(frame, experiment="curve", scoring=scoring, label=of)
        return by_seed(rows.assign(error=rows.get("errors", pd.Series(dtype=object)).str[epoch]), "error")

    return error(label) - error("benign")


def _gaps_widen(frame: pd.DataFrame) -> Iterator[Comparison]:
    for scoring in ("mask 0", "passes"):
        for label in ("knockoff", "dfme"):
            last, first = (_errors(frame, label, scoring, epoch) for epoch in (-1, 0))
            yield gap(f"{SHORT[label]}, {scoring}, gap after training less before", last, first)


def _jbda_stays_near_benign(frame: pd.DataFrame) -> Iterator[Comparison]:
    for scoring in ("mask 0", "passes"):
        jbda, *others = (_errors(frame, label, scoring, -1) for label in ("jbda", "knockoff", "dfme"))
        for label, other in zip(("Knockoff", "DFME"), others, strict=True):
            yield gap(f"{scoring}, gap of {label} less JBDA's", other, jbda)


def _wider_is_better(frame: pd.DataFrame) -> Iterator[Comparison]:
    widths = widths_of(frame)
    if len(widths) < 2:
        raise NotMeasured("width")
    (narrow, first), *_, (wide, last) = widths.items()
    for label in ("knockoff", "jbda"):
        rows = (detected(frame, detector, label, alpha=1.0) for detector in (last, first))
        yield gap(f"{SHORT[label]}, width {wide} less {narrow}", *map(points, rows))


def _alarmed(frame: pd.DataFrame, label: str, accounts: int) -> pd.Series:
    return by_seed(select(frame, experiment="accounts", label=label, accounts=accounts), "alarmed")


def _prada_catches(frame: pd.DataFrame) -> Iterator[Comparison]:
    for label in map(str, HEADLINES):
        yield Comparison(f"{SHORT[label]}: alarm, one account", _alarmed(frame, label, 1).tolist(), 0.5)


def _accounts_blind_prada(frame: pd.DataFrame) -> Iterator[Comparison]:
    for label in map(str, HEADLINES):
        if _alarmed(frame, label, 1).mean() > 0:  # where it sees the attack at all
            many = _alarmed(frame, label, max(ACCOUNTS)).tolist()
            yield Comparison(f"{SHORT[label]}: share alarmed of {max(ACCOUNTS)} accounts", many, -0.01, 0.01)


def _attackers_suffer(response: str, suffered: Callable[[pd.DataFrame], pd.Series]) -> Compared:
    """Each attack suffers at least twice as much from the response as honest users do."""

    def average(frame: pd.DataFrame, label: str) -> pd.Series:
        rows = responded(frame, response, label)
        return by_seed(rows.assign(suffered=suffered(rows)), "suffered")

    def compare(frame: pd.DataFrame) -> Iterator[Comparison]:
        for label in ("knockoff", *READINGS, "dfme"):
            yield gap(f"{SHORT[label]} less twice the users'", average(frame, label), 2 * average(frame, str(BENIGN)))

    return compare


_8, _9, _10, _11, _12 = "08_baselines", "09_ablations", "10_responses", "11_attacker_who_knows", "12_reproduction"
_MNIST = ("mnist",)
CLAIMS = (
    Claim("Introduction", "a detector that needs each user's history (PRADA) catches the attacks from one account",
          _MNIST, _8, _prada_catches),
    Claim("Introduction", "PRADA loses the attacks that it catches when the queries come from a hundred accounts",
          _MNIST, _8, _accounts_blind_prada),
    Claim("Figure 1", "scores of outlier exposure overlap more with Knockoff's queries than SAME's do", _MNIST, _8,
          _exposure_overlaps_more, grows=True),
    Claim("Figure 2 (CIFAR-10)", "the auxiliary model brings out JBDA's queries, which the reconstruction error alone "
          "misses; judged on MNIST", _MNIST, _9, _second_term(READINGS)),
    Claim("Effectiveness", "on MNIST SAME has the higher AUROC against JBDA and Knockoff, at both budgets", _MNIST,
          _8, _better_than_baselines("auroc"), grows=True),
    Claim("Effectiveness", "on MNIST SAME has the higher AUPR against JBDA and Knockoff, at both budgets", _MNIST, _8,
          _better_than_baselines("aupr"), grows=True),
    Claim("Effectiveness", "SAME has the lowest FPR95 for most attacks and budgets", _MNIST, _8,
          _better_than_baselines("fpr95", -1, ("knockoff", *READINGS, "dfme")), most=True, grows=True),
    Claim("Effectiveness", "from 1,000 to 4,000 queries SAME changes little (two points of AUROC)", _MNIST, _8,
          _budget_matters_little),
    Claim("Effectiveness", "on CIFAR-10 at 6,000 queries SAME has 92.53 against Knockoff and 100.00 against DFME (its "
          "own Table 2: 84.03 and 97.64)", ("cifar10",), _12, None, settled="its own Table 2"),
    Claim("Effectiveness", "on CIFAR-10 the advantage of SAME is more pronounced than on MNIST", ("cifar10",), _8, None),
    Claim("Table 3 (CIFAR-10)", "outlier exposure and EDM cost the victim accuracy; judged on MNIST", _MNIST, _8,
          _baselines_cost_accuracy),
    Claim("Table 3 (CIFAR-10)", "outlier exposure and EDM train longer than victim and auxiliary model under SAME; "
          "judged on MNIST", _MNIST, _8, _baselines_train_longer(PARTS[:2])),
    Claim("Table 3, our reading", "outlier exposure and EDM train longer than SAME with its autoencoder; judged on "
          "MNIST", _MNIST, _8, _baselines_train_longer(PARTS)),
    Claim("Fidelity and Efficiency", "sharing the victim's structure saves memory", _MNIST, _9, _sharing_saves_memory,
          given=True),
    Claim("Figure 4, queries", "refusing flagged queries leaves normal users least affected (an attack's queries are "
          "refused at least twice as often)", ("mnist-responses",), _10, _attackers_suffer("reject 5 %", lambda rows:
          1 - rows["answered"]), grows=True),
    Claim("Figure 4, response time", "proof of work delays attackers more than users (at least twice as many hashes a "
          "query)", ("mnist-responses",), _10, _attackers_suffer("proof of work", lambda rows: rows["hashes"]),
          grows=True),
    Claim("Figure 5", "on MNIST SAME and SAME-X perform alike (within two points)", _MNIST, _9, 
          _second_term(("knockoff", *READINGS), -LITTLE, LITTLE)),
    Claim("Figure 5", "on CIFAR-10 SAME leads and its variants are alike", ("cifar10",), _9, None),
    Claim("Table 4", "SAME's AUROC does not depend on the malicious ratio (within two points)", _MNIST, _9,
          _auroc_does_not_follow_the_ratio, given=True),
    Claim("Table 4", "SAME's AUPR rises with the malicious ratio", _MNIST, _9, _aupr_follows_the_ratio, given=True),
    Claim("Figure 6", "with training, the reconstruction gap of Knockoff and DFME to benign queries widens", _MNIST,
          _9, _gaps_widen, grows=True),
    Claim("Figure 6", "JBDA's queries stay the nearest to benign ones", _MNIST, _9, _jbda_stays_near_benign, grows=True),
    Claim("Figure 6", "after 100 epochs reconstruction is stable", _MNIST, _9, None),
    Claim("Figure 7", "a larger embedding detects better (largest against smallest, Knockoff and JBDA)", _MNIST, _9,
          _wider_is_better, grows=True),
)  # fmt: skip


# Claims of this book


def _views_beat(*rivals: DetectorVariant) -> Compared:
    def compare(frame: pd.DataFrame) -> Iterator[Comparison]:
        for label in ("knockoff", "jbda"):
            plus = points(detected(frame, EVERY_VIEW, label))
            for rival in rivals:
                what, rows = f"{SHORT[label]}, SamePlus less {NAMES[str(rival)]}", detected(frame, rival, label)
                yield gap(what, plus, points(rows)) if len(rows) else Comparison(what, ())

    return compare


def _one_line_beats_the_paper(frame: pd.DataFrame) -> Iterator[Comparison]:
    printed = reported("table1_mnist", method="same", attack="knockoff", budget=budgets_of(frame)[1])["auroc"].iloc[0]
    edge = points(detected(frame, DetectorVariant("largest-difference-low"), "knockoff"))
    yield Comparison(f"Knockoff, largest difference less {printed}", (edge - printed).tolist())


def _preparation_undoes(frame: pd.DataFrame) -> Iterator[Comparison]:
    for name, detector in {"SAME": SAME, "SamePlus": SAME_PLUS}.items():
        rows = met(frame, "reject 5 %", detector, "knockoff-preprocessed")
        yield Comparison(f"{name}, AUROC less 50", (points(rows) - 50).tolist(), -5.0, 5.0)


def _bans_stop_knockoff(frame: pd.DataFrame) -> Iterator[Comparison]:
    refused = points(met(frame, "reject 5 %", SAME_PLUS, "knockoff"), "substitute_fidelity")
    banned = select(met(frame, BAN, SAME_PLUS, "knockoff"), accounts=1)
    yield gap(
        "fidelity of the copy, refusing less banning, one account", refused, points(banned, "substitute_fidelity"), 20.0
    )


def _bans_spare_users(frame: pd.DataFrame) -> Iterator[Comparison]:
    for name, detector in {"SAME": SAME, "SamePlus": SAME_PLUS}.items():
        rows = select(frame, experiment="bans", label=str(BENIGN), **detector._asdict())
        yield Comparison(f"{name}, honest accounts banned, in percent", points(rows, "banned").tolist(), -0.1, 0.1)


def _training_helps(label: str) -> Compared:
    def compare(frame: pd.DataFrame) -> Iterator[Comparison]:
        few, many = (SAME._replace(seen=seen) for seen in (240_000, 960_000))
        rows = (detected(frame, variant, label) for variant in (many, few))
        yield gap(f"{SHORT[label]}, 960,000 images less 240,000", *map(points, rows))

    return compare


OWN_CLAIMS = (
    Claim("Views", "SamePlus detects Knockoff and JBDA better than SAME, from the same trained models (real MNIST)",
          ("mnist-views",), _11, _views_beat(SAME)),
    Claim("Views", "SamePlus detects Knockoff and JBDA better than the baselines (real MNIST)",
          ("mnist", "mnist-views"), _11, _views_beat(*BASELINES)),
    Claim("Views", "SamePlus detects Knockoff and JBDA better than SAME and the baselines on real CIFAR-10",
          ("cifar10", "cifar10-views"), _11, _views_beat(SAME, *BASELINES)),
    Claim("Controls", "one line without a network beats the paper's figure on Knockoff", ("mnist-controls",), _8,
          _one_line_beats_the_paper),
    Claim("Controls", "images prepared as honest users prepare theirs bring SAME and SamePlus to chance (within five "
          "points)", ("mnist-adaptive",), _11, _preparation_undoes),
    Claim("Accounts", "banning costs a thief with one account at least twenty points of fidelity more than refusing",
          ("mnist-adaptive",), _11, _bans_stop_knockoff),
    Claim("Accounts", "at most one honest account in a thousand is banned", ("mnist-bans",), _11, _bans_spare_users),
    Claim("Training", "four times the images help SAME against JBDA", ("mnist-scaling",), _11, _training_helps("jbda")),
    Claim("Training", "four times the images help SAME against Knockoff", ("mnist-scaling",), _11,
          _training_helps("knockoff")),
)  # fmt: skip
