"""What the paper's text claims, each as comparisons between result rows that either hold or do not."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from reproduction.cells import BASELINES, BENIGN, HEADLINES, SAME, SAME_MASK_0, SAME_SHARED
from reproduction.defended_report import responded
from reproduction.report import LABELS, Rows, budgets_of, detected, pick, width_names

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
    holds: Callable[[Rows], Held] | None
    most: bool = False


def mean(rows: Rows, metric: str = "auroc") -> float:
    """Over seeds.

    Raises:
        NotMeasured: there are no rows.
    """
    if not rows:
        raise NotMeasured(metric)
    return float(np.mean([r[metric] for r in rows]))


def _better_than_baselines(metric: str, sign: int = 1, attacks=("knockoff", "jbda")) -> Callable[[Rows], Held]:
    def holds(rows: Rows) -> Held:
        for budget in budgets_of(rows):
            for attack in attacks:
                same = mean(detected(rows, SAME, attack, budget), metric)
                yield all(sign * (same - mean(detected(rows, b, attack, budget), metric)) >= 0 for b in BASELINES)

    return holds


def _budget_matters_little(rows: Rows) -> Held:
    for attack in ("knockoff", "jbda", "dfme"):
        small, large = (mean(detected(rows, SAME, attack, budget)) for budget in budgets_of(rows))
        yield abs(large - small) <= LITTLE


def _costs(rows: Rows, detector: str) -> Rows:
    return pick(rows, detector=detector, attack="cost")


def _baselines_cost_accuracy(rows: Rows) -> Held:
    plain = mean(_costs(rows, SAME), "victim_accuracy")
    return (mean(_costs(rows, b), "victim_accuracy") < plain for b in BASELINES)


def _baselines_train_longer(parts: tuple[str, ...]) -> Callable[[Rows], Held]:
    def holds(rows: Rows) -> Held:
        same = sum(mean(_costs(rows, SAME), f"{part}_seconds") for part in parts)
        return (mean(_costs(rows, b), "victim_seconds") > same for b in BASELINES)

    return holds


def _sharing_saves_memory(rows: Rows) -> Held:
    own, shared = (_costs(rows, name) for name in (SAME, SAME_SHARED))
    yield mean(shared, "auxiliary_parameters") < mean(own, "auxiliary_parameters")
    yield mean(shared, "victim_accuracy") >= mean(own, "victim_accuracy")


def _exposure_overlaps_more(rows: Rows) -> Held:
    budget = budgets_of(rows)[-1]
    yield mean(detected(rows, SAME, "knockoff", budget)) > mean(detected(rows, "outlier_exposure", "knockoff", budget))


def _auxiliary_repairs_jbda(rows: Rows) -> Held:
    for detector in (SAME, SAME_MASK_0):
        for attack in LABELS[1:3]:
            both, alone = (mean(detected(rows, detector, attack, budgets_of(rows)[-1], a)) for a in (0.5, 1.0))
            yield both > alone


def _same_near_same_x(rows: Rows) -> Held:
    for attack in ("knockoff", "jbda", "dfme"):
        both, alone = (mean(detected(rows, SAME, attack, budgets_of(rows)[-1], a)) for a in (0.5, 1.0))
        yield abs(both - alone) <= LITTLE


def _ratios(rows: Rows, metric: str) -> list[float]:
    ratios = sorted({r["ratio"] for r in rows if r.get("ratio")})
    if not ratios:
        raise NotMeasured("ratio")
    return [mean(pick(rows, detector=SAME, attack="knockoff", ratio=ratio), metric) for ratio in ratios]


def _auroc_does_not_follow_the_ratio(rows: Rows) -> Held:
    found = _ratios(rows, "auroc")
    yield max(found) - min(found) <= LITTLE


def _aupr_follows_the_ratio(rows: Rows) -> Held:
    found = _ratios(rows, "aupr")
    return (high > low for low, high in zip(found, found[1:], strict=False))


def _gap(rows: Rows, attack: str, scoring: str, epoch: int) -> float:
    """How much worse than benign queries an attack's are reconstructed, relative to them."""
    curves = [r | {"error": r["errors"][epoch]} for r in pick(rows, scoring=scoring) if "errors" in r]
    return mean(pick(curves, attack=attack), "error") / mean(pick(curves, attack="benign"), "error")


def _gaps_widen(rows: Rows) -> Held:
    for scoring in ("mask 0", "passes"):
        for attack in ("knockoff", "dfme"):
            yield _gap(rows, attack, scoring, -1) > _gap(rows, attack, scoring, 0)


def _jbda_stays_near_benign(rows: Rows) -> Held:
    for scoring in ("mask 0", "passes"):
        yield _gap(rows, "jbda", scoring, -1) < min(_gap(rows, a, scoring, -1) for a in ("knockoff", "dfme"))


def _wider_is_better(rows: Rows) -> Held:
    names, budget = width_names(rows), budgets_of(rows)[-1]
    if len(names) < 2:
        raise NotMeasured("width")
    for attack in HEADLINES[:2]:
        found = [mean(detected(rows, name, attack, budget, alpha=1.0)) for name in names]
        yield found[-1] > found[0]


def _accounts_blind_prada(rows: Rows) -> Held:
    for attack in HEADLINES:
        one, hundred = (mean(pick(rows, detector="prada", attack=attack, accounts=n), "alarmed") for n in (1, 100))
        yield one > 0 and hundred == 0


def _attackers_suffer(response: str, suffered: Callable[[dict], float]) -> Callable[[Rows], Held]:
    """Each attack suffers at least twice as much from the response as honest users do."""

    def holds(rows: Rows) -> Held:
        def average(user: str) -> float:
            return mean([{"suffered": suffered(r)} for r in responded(rows, response, user)], "suffered")

        return (average(attack) >= 2 * average(BENIGN) for attack in ("knockoff", "jbda", "dfme"))

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
          "mnist", _8, _baselines_train_longer(("victim", "auxiliary"))),
    Claim("Table 3 (CIFAR-10)", "the same where SAME's time includes its autoencoder",
          "mnist", _8, _baselines_train_longer(("victim", "auxiliary", "mae"))),
    Claim("Fidelity and Efficiency", "sharing the victim's structure saves memory and costs the victim no accuracy",
          "mnist", _9, _sharing_saves_memory),
    Claim("Figure 4, queries", "refusing flagged queries leaves normal users least affected (an attack's queries are "
          "refused at least twice as often)", "mnist-responses", _10,
          _attackers_suffer("reject 5 %", lambda row: 1 - row["answered"])),
    Claim("Figure 4, response time", "proof of work delays attackers more than users (at least twice as many hashes a "
          "query)", "mnist-responses", _10, _attackers_suffer("proof of work", lambda row: row["hashes"])),
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
