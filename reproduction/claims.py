"""What the paper's text claims, each as comparisons between result rows that either hold or do not."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd

from reproduction.ablations import widths_of
from reproduction.accounts import ACCOUNTS
from reproduction.cost import PARTS, costs
from reproduction.detection import OTHER_READING, RATIOS, detected
from reproduction.plan import (
    BASELINES,
    BENIGN,
    HEADLINES,
    OUTLIER_EXPOSURE,
    SAME,
    SAME_MASK_0,
    SAME_SHARED,
    budgets_of,
)
from reproduction.responses import responded
from reproduction.tables import select

LITTLE = 0.02  # two points: what counts as no difference
Held = Iterator[bool]


class NotMeasured(LookupError):
    """A claim cannot be judged: rows are missing."""


class Claim(NamedTuple):
    """A claim of the paper's text.

    Attributes:
        where: section, table or figure of the paper.
        what: the claim, in our words.
        group: the rows it is judged on, results/GROUP.jsonl.
        chapter: the notebook with the evidence.
        holds: rows -> the comparisons it is made of (NotMeasured where rows are missing); None: no row could judge it.
        most: the claim speaks of most cases: more than half of the comparisons must hold, not all.
    """

    where: str
    what: str
    group: str
    chapter: str
    holds: Callable[[pd.DataFrame], Held] | None
    most: bool = False


def mean(rows: pd.DataFrame, metric: str = "auroc") -> float:
    """Over seeds.

    Raises:
        NotMeasured: there are no rows.
    """
    if rows.empty or metric not in rows or rows[metric].isna().all():
        raise NotMeasured(metric)
    return float(rows[metric].mean())


def _better_than_baselines(metric: str, sign: int = 1, labels=("knockoff", "jbda")) -> Callable[[pd.DataFrame], Held]:
    def holds(frame: pd.DataFrame) -> Held:
        for budget in budgets_of(frame):
            for label in labels:
                same, *others = (mean(detected(frame, d, label, budget), metric) for d in (SAME, *BASELINES))
                yield all(sign * (same - other) >= 0 for other in others)

    return holds


def _budget_matters_little(frame: pd.DataFrame) -> Held:
    for label in ("knockoff", "jbda", "dfme"):
        small, large = (mean(detected(frame, SAME, label, budget)) for budget in budgets_of(frame))
        yield abs(large - small) <= LITTLE


def _baselines_cost_accuracy(frame: pd.DataFrame) -> Held:
    undefended = mean(costs(frame, SAME), "victim_accuracy")
    return (mean(costs(frame, baseline), "victim_accuracy") < undefended for baseline in BASELINES)


def _baselines_train_longer(parts: tuple[str, ...]) -> Callable[[pd.DataFrame], Held]:
    def holds(frame: pd.DataFrame) -> Held:
        same = sum(mean(costs(frame, SAME), f"{part}_seconds") for part in parts)
        return (mean(costs(frame, baseline), "victim_seconds") > same for baseline in BASELINES)

    return holds


def _sharing_saves_memory(frame: pd.DataFrame) -> Held:
    own, shared = costs(frame, SAME), costs(frame, SAME_SHARED)
    yield mean(shared, "auxiliary_parameters") < mean(own, "auxiliary_parameters")
    yield mean(shared, "victim_accuracy") >= mean(own, "victim_accuracy")


def _exposure_overlaps_more(frame: pd.DataFrame) -> Held:
    yield mean(detected(frame, SAME, "knockoff")) > mean(detected(frame, OUTLIER_EXPOSURE, "knockoff"))


def _auxiliary_repairs_jbda(frame: pd.DataFrame) -> Held:
    for detector in (SAME, SAME_MASK_0):
        for label in ("jbda", OTHER_READING):
            both, alone = (mean(detected(frame, detector, label, alpha=alpha)) for alpha in (0.5, 1.0))
            yield both > alone


def _same_near_same_x(frame: pd.DataFrame) -> Held:
    for label in ("knockoff", "jbda", "dfme"):
        both, alone = (mean(detected(frame, SAME, label, alpha=alpha)) for alpha in (0.5, 1.0))
        yield abs(both - alone) <= LITTLE


def _over_ratios(frame: pd.DataFrame, metric: str) -> list[float]:
    rows = select(frame, experiment="detection", label="knockoff", **SAME._asdict())
    return [mean(select(rows, ratio=ratio), metric) for ratio in RATIOS]


def _auroc_does_not_follow_the_ratio(frame: pd.DataFrame) -> Held:
    aurocs = _over_ratios(frame, "auroc")
    yield max(aurocs) - min(aurocs) <= LITTLE


def _aupr_follows_the_ratio(frame: pd.DataFrame) -> Held:
    auprs = _over_ratios(frame, "aupr")
    return (high > low for low, high in zip(auprs, auprs[1:], strict=False))


def _gap(frame: pd.DataFrame, label: str, scoring: str, epoch: int) -> float:
    """How much worse than benign queries an attack's are reconstructed, relative to them."""
    rows = select(frame, experiment="curve", scoring=scoring)
    rows = rows.assign(error=rows.get("errors", pd.Series(dtype=object)).str[epoch])
    return mean(select(rows, label=label), "error") / mean(select(rows, label="benign"), "error")


def _gaps_widen(frame: pd.DataFrame) -> Held:
    for scoring in ("mask 0", "passes"):
        for label in ("knockoff", "dfme"):
            yield _gap(frame, label, scoring, -1) > _gap(frame, label, scoring, 0)


def _jbda_stays_near_benign(frame: pd.DataFrame) -> Held:
    for scoring in ("mask 0", "passes"):
        yield _gap(frame, "jbda", scoring, -1) < min(_gap(frame, x, scoring, -1) for x in ("knockoff", "dfme"))


def _wider_is_better(frame: pd.DataFrame) -> Held:
    widths = list(widths_of(frame).values())
    if len(widths) < 2:
        raise NotMeasured("width")
    for label in ("knockoff", "jbda"):
        narrow, wide = (mean(detected(frame, detector, label, alpha=1.0)) for detector in (widths[0], widths[-1]))
        yield wide > narrow


def _accounts_blind_prada(frame: pd.DataFrame) -> Held:
    for label in map(str, HEADLINES):
        rows = select(frame, experiment="accounts", label=label)
        one, many = (mean(select(rows, accounts=n), "alarmed") for n in (1, max(ACCOUNTS)))
        yield one > 0 and many == 0


def _attackers_suffer(response: str, suffered: Callable[[pd.DataFrame], pd.Series]) -> Callable[[pd.DataFrame], Held]:
    """Each attack suffers at least twice as much from the response as honest users do."""

    def holds(frame: pd.DataFrame) -> Held:
        def average(label: str) -> float:
            rows = responded(frame, response, label)
            return mean(rows.assign(suffered=suffered(rows)), "suffered")

        return (average(label) >= 2 * average(str(BENIGN)) for label in ("knockoff", "jbda", "dfme"))

    return holds


_8, _9, _10, _12 = "08_baselines", "09_ablations", "10_responses", "12_reproduction"
CLAIMS = (
    Claim("Introduction", "a detector that needs each user's history (PRADA) catches the attack from one account and "
          "loses it when the queries come from many", "mnist", _8, _accounts_blind_prada),
    Claim("Figure 1", "scores of outlier exposure overlap more with Knockoff's queries than SAME's do",
          "mnist", _8, _exposure_overlaps_more),
    Claim("Figure 2 (CIFAR-10)", "the auxiliary model brings out JBDA's queries, which the reconstruction error alone "
          "misses; judged on MNIST", "mnist", _9, _auxiliary_repairs_jbda),
    Claim("Effectiveness", "on MNIST SAME has the higher AUROC against JBDA and Knockoff, at both budgets",
          "mnist", _8, _better_than_baselines("auroc")),
    Claim("Effectiveness", "likewise the higher AUPR", "mnist", _8, _better_than_baselines("aupr")),
    Claim("Effectiveness", "SAME has the lowest FPR95 for most attacks and budgets", "mnist", _8,
          _better_than_baselines("fpr95", -1, ("knockoff", "jbda", "dfme")), most=True),
    Claim("Effectiveness", "from 1,000 to 4,000 queries SAME changes little (two points of AUROC)",
          "mnist", _8, _budget_matters_little),
    Claim("Effectiveness", "on CIFAR-10 at 6,000 queries SAME has 92.53 against Knockoff and 100.00 against DFME (its own "
          "Table 2: 84.03 and 97.64)", "cifar10", _12, None),
    Claim("Effectiveness", "on CIFAR-10 the advantage of SAME is more pronounced than on MNIST", "cifar10", _8, None),
    Claim("Table 3 (CIFAR-10)", "outlier exposure and EDM cost the victim accuracy; judged on MNIST",
          "mnist", _8, _baselines_cost_accuracy),
    Claim("Table 3 (CIFAR-10)", "they train longer than victim and auxiliary model under SAME; judged on MNIST",
          "mnist", _8, _baselines_train_longer(PARTS[:2])),
    Claim("Table 3 (CIFAR-10)", "the same where SAME's time includes its autoencoder",
          "mnist", _8, _baselines_train_longer(PARTS)),
    Claim("Fidelity and Efficiency", "sharing the victim's structure saves memory and costs the victim no accuracy",
          "mnist", _9, _sharing_saves_memory),
    Claim("Figure 4, queries", "refusing flagged queries leaves normal users least affected (an attack's queries are "
          "refused at least twice as often)", "mnist-responses", _10,
          _attackers_suffer("reject 5 %", lambda rows: 1 - rows["answered"])),
    Claim("Figure 4, response time", "proof of work delays attackers more than users (at least twice as many hashes a "
          "query)", "mnist-responses", _10, _attackers_suffer("proof of work", lambda rows: rows["hashes"])),
    Claim("Figure 5", "on MNIST SAME and SAME-X perform alike (within two points)", "mnist", _9, _same_near_same_x),
    Claim("Figure 5", "on CIFAR-10 SAME leads and its variants are alike", "cifar10", _9, None),
    Claim("Table 4", "SAME's AUROC does not depend on the malicious ratio (within two points)",
          "mnist", _9, _auroc_does_not_follow_the_ratio),
    Claim("Table 4", "its AUPR rises with the ratio", "mnist", _9, _aupr_follows_the_ratio),
    Claim("Figure 6", "with training, the reconstruction gap of Knockoff and DFME widens", "mnist", _9, _gaps_widen),
    Claim("Figure 6", "JBDA's queries stay the nearest to benign ones", "mnist", _9, _jbda_stays_near_benign),
    Claim("Figure 6", "after 100 epochs reconstruction is stable", "mnist", _9, None),
    Claim("Figure 7", "a larger embedding detects better (largest against smallest, Knockoff and JBDA)",
          "mnist", _9, _wider_is_better),
)  # fmt: skip
