"""Attackers who know that somebody looks: what each detector still sees of them, and what their copies are worth."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from reproduction.detection import DETECTORS
from reproduction.lab import Bench, parts_of_log
from reproduction.plan import (
    ALARM,
    ALL_RESPONSES,
    BAN,
    BENIGN,
    BITS,
    BY_ACCOUNT,
    IN_DISTRIBUTION,
    KNOCKOFF,
    REFUSALS,
    SAME,
    SAME_PLUS,
    WHITE_BOX,
    WORK,
    Cell,
    DetectorVariant,
)
from reproduction.tables import markdown, select, spread
from samelib.attacks import Attack, Evasion, RoundRobin, expected_score, shares
from samelib.attacks.base import answered
from samelib.data.image_set import ImageSet
from samelib.detectors.prada import Prada
from samelib.gateway import Gateway, QueryGateway, QueryLog
from samelib.metrics import auroc
from samelib.models.classifiers import Victim
from samelib.plots import COLOURS, LINES, legend_above
from samelib.presets import evaluation
from samelib.responses import Reject, draw_hashes
from samelib.training import seed_of

MARKERS = "osD^vP"
WATCHERS = {"SamePlus": SAME_PLUS} | DETECTORS
GUARDS = {"prada": "PRADA", "same_plus": "SamePlus, bans", "same": "SAME, bans"}  # that watch accounts
SHORT = {str(REFUSALS): "bandit, refusals", str(BITS): "bandit, bits"}


# Measuring


def measure(bench: Bench, cell: Cell) -> Iterator[dict]:
    """An attack, or honest users, in front of one detector and its response, from one account or several.

    Where work is asked for, the copy is measured on the way too: one reading for each point of the budget.
    """
    gateway = _service(bench, cell)
    victim, honest = bench.victim(cell.detector), bench.halves[0]
    if cell.attack == BENIGN:
        gateway.query(honest.images[: cell.budget])
        curve = [{"queries": gateway.spent}]
    else:
        points = (cell.budget // 4, cell.budget // 2) if cell.response in WORK else ()
        curve = attacker(bench, cell).run(gateway, evaluation(victim, honest), points).curve
    log, positions = gateway.log, torch.arange(gateway.spent)
    benign = bench.benign_scores(cell.detector) if hasattr(log, "scores") else None
    hashes = _hashes(log, bench.seed)
    for point in curve:
        copy = {f"substitute_{k}": round(point[k], 6) for k in ("accuracy", "fidelity") if k in point}
        copy["victim_accuracy"] = bench.accuracy(victim)
        for seeds, part in parts_of_log(cell.attack, positions[: point["queries"]], len(bench.group.seeds)).items():
            chosen = positions[: point["queries"]][part]
            if len(chosen):  # JBDA asks no more than its seeds where all of them are refused
                yield ({} if seeds == "in" else {"seeds": seeds}) | _reading(log, hashes, chosen, benign) | copy


def _service(bench: Bench, cell: Cell) -> Gateway:
    """The gateway, or one for each account; no two of them share a book of accounts."""
    victim, response, count = bench.victim(cell.detector), ALL_RESPONSES[cell.response], cell.accounts
    budgets = shares(cell.budget, count)
    if cell.response == ALARM:
        accounts = [PradaGateway(victim, budget) for budget in budgets]
    else:
        accounts = [QueryGateway(victim, budget, bench.detector(cell.detector), response) for budget in budgets]
    return accounts[0] if count == 1 else RoundRobin(accounts)


class PradaGateway(QueryGateway):
    """Refuses what an account asks from the query on that raises its alarm."""

    def __init__(self, victim: Victim, budget: int):
        super().__init__(victim, budget)
        self.prada = Prada(victim.classes)

    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        records = super()._ask(x)
        refused = self.prada.watch(records["queries"], records["answers"])
        answers = records["answers"].masked_fill(refused[:, None].to(records["answers"].device), torch.nan)
        return records | {"answers": answers, "refused": refused}


def attacker(bench: Bench, cell: Cell) -> Attack:
    """The attack, with what the group gives its attacker, and benign images or the detector where it knows them."""
    variant, benign = cell.attack, bench.halves[1]
    if variant == IN_DISTRIBUTION:
        return bench.attack(KNOCKOFF, proxy=benign)
    if variant.attack == WHITE_BOX.attack:
        return bench.attack(KNOCKOFF, proxy=_evading(bench, cell))
    return bench.attack(variant, **({"benign": benign} if variant.share is not None else {}))


def _evading(bench: Bench, cell: Cell) -> ImageSet:
    """The proxy images that are asked, moved down the gradient of this detector's score; kept in the store, for they
    are the same under every response."""
    proxy = bench.group.proxy.shuffled(bench.seed)[: cell.budget]
    detector = bench.detector(cell.detector)
    evasion = Evasion(expected_score(detector, seed=bench.seed), cell.attack.epsilon)
    spec = {"kind": "evading", "epsilon": evasion.epsilon, "moves": evasion.moves, "proxy": proxy.fingerprint}
    spec |= {name: card["sha256"] for name, card in detector.cards.items()}
    spec |= {"settings": asdict(detector.settings), "seed": bench.seed}
    tensors, _ = bench.store.get(spec, lambda _: ({"images": evasion(proxy).images}, {}))
    return replace(proxy, images=tensors["images"].to(proxy.device))


def _hashes(log: QueryLog, seed: int) -> Tensor | None:
    """The work of each query, modelled; None where none was asked for."""
    if not hasattr(log, "bits") or not log.bits.any():
        return None
    return draw_hashes(log.bits, np.random.default_rng(seed_of(seed, "hashes")))


def _reading(log: QueryLog, hashes: Tensor | None, chosen: Tensor, benign: Tensor | None) -> dict:
    """Of the queries with these numbers [n]: how many were answered, what they cost each, and how they score beside
    honest ones."""
    share = answered(log.answers)[chosen.to(log.answers.device)].float().mean()
    reading = {"queries": len(chosen), "answered": round(float(share), 6)}
    if hashes is not None:
        reading["hashes"] = round(float(hashes[chosen].double().mean()), 1)
    if benign is not None:
        reading["auroc"] = round(auroc(benign, log.scores[chosen]), 6)
    return reading


# Tables and figures


def met(frame: pd.DataFrame, response: str, detector: DetectorVariant, label: str) -> pd.DataFrame:
    """One row a seed, number of accounts and point of the budget: the attacker of that label in front of that detector
    and response."""
    fields = {"response": response, "label": label} | detector._asdict()
    return select(frame, experiment="adaptive", **fields).sort_values(["queries", "seed"])


def _labels(frame: pd.DataFrame, *responses: str) -> list[str]:
    """Who was measured under one of these responses, in the order of the plan."""
    return frame.loc[(frame["experiment"] == "adaptive") & frame["response"].isin(responses), "label"].unique().tolist()


def _rejects(frame: pd.DataFrame) -> list[str]:
    return [name for name in ALL_RESPONSES if isinstance(ALL_RESPONSES[name], Reject) and _labels(frame, name)]


def adaptive_table(frame: pd.DataFrame) -> str:
    """Each attacker in front of each detector: AUROC, queries answered and the copy's fidelity at each rate."""
    rejects, lines = _rejects(frame), []
    for label, (name, detector) in product(_labels(frame, *rejects), WATCHERS.items()):
        found = [met(frame, response, detector, label) for response in rejects]
        if all(len(rows) for rows in found):
            figures = [spread(rows[word]) for rows in found for word in ("answered", "substitute_fidelity")]
            fullest = max(found, key=len)  # the response with the most seeds: single queries hardly depend on it
            lines.append([label, name, spread(fullest["auroc"]), *figures])
    words = [f"{word}, {response}" for response in rejects for word in ("answered", "fidelity")]
    return markdown(["queries", "detector", "AUROC", *words], lines, 2)


def by_account_table(frame: pd.DataFrame) -> str:
    """Attackers, and honest users, where accounts are watched: which share of their queries is answered, and what their
    copy is worth, by the number of accounts among which the queries are dealt out."""
    watched = frame[(frame["experiment"] == "adaptive") & frame["response"].isin([ALARM, BAN])]
    counts, lines = sorted(watched["accounts"].unique()), []
    for (detector, response), label in product(BY_ACCOUNT, _labels(frame, ALARM, BAN)):
        found = [select(met(frame, response, detector, label), accounts=count) for count in counts]
        if any(map(len, found)):
            pairs = [(spread(f["answered"]), spread(f["substitute_fidelity"])) for f in found]
            cells = [" / ".join(pair) if len(f) else "–" for pair, f in zip(pairs, found, strict=True)]
            lines.append([label, GUARDS[detector.detector], *cells])
    header = [f"{count:,} account{'s' if count > 1 else ''}: answered / fidelity" for count in counts]
    return markdown(["queries", "watched by", *header], lines, 2)


def prices_table(frame: pd.DataFrame) -> str:
    """What answers cost in hashes, in front of SAME, and what the copy is worth at each point of the budget."""
    lines = []
    for response, label in product(WORK, _labels(frame, *WORK)):
        for queries, rows in met(frame, response, SAME, label).groupby("queries"):
            each = rows["hashes"].mean()
            hashes = [f"{each:,.0f}", f"{each * queries:,.0f}"]
            lines.append([response, label, f"{queries:,}", *hashes, spread(rows["substitute_fidelity"])])
    return markdown(["response", "queries", "how many", "hashes each", "hashes in all", "fidelity"], lines, 2)


def adaptive_figure(frame: pd.DataFrame) -> Figure:
    """What each detector sees of each attacker, and what their copies are worth where 5 % of benign queries are refused."""
    response = _rejects(frame)[-1]
    labels = _labels(frame, response)
    labels = [label for label in labels if f"{label}, seeds left out" not in labels]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.3 * len(labels) + 1.6), sharey=True)
    for axis, word, title in zip(
        axes, ("auroc", "substitute_fidelity"), ("AUROC", "fidelity of the copy"), strict=True
    ):
        for number, (name, detector) in enumerate(WATCHERS.items()):
            found = [100 * met(frame, response, detector, label)[word] for label in labels]
            if any(map(len, found)):
                _dots(axis, found, name, number)
        axis.set_xlabel(f"{title} (%)")
        axis.grid(axis="x", visible=True)
    axes[0].axvline(50, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_yticks(range(len(labels)), map(_short, labels), fontsize=9)
    axes[0].invert_yaxis()
    return legend_above(figure)


def _short(label: str) -> str:
    """A label that fits beside an axis."""
    return SHORT.get(label, label.removeprefix("knockoff-"))


def _dots(axis: Axes, found: Sequence[pd.Series], name: str, number: int) -> None:
    """A mark at the mean over seeds in each line, and a thin line from the smallest to the largest."""
    style = {"color": COLOURS[number], "linestyle": "-"}
    for line, values in enumerate(found):
        axis.plot([values.min(), values.max()], [line, line], linewidth=1, **style)
    means = [values.mean() for values in found]
    axis.plot(means, range(len(found)), MARKERS[number], color=COLOURS[number], markeredgecolor="white", label=name)


def prices_figure(frame: pd.DataFrame) -> Figure:
    """Fidelity of the copy against the hashes that its answers cost, where bits are fine and where they are coarse."""
    figure, axes = plt.subplots(1, len(WORK), figsize=(9, 3.6), sharex=True, sharey=True)
    for axis, response in zip(axes, WORK, strict=True):
        thieves = [label for label in _labels(frame, response) if label != str(BENIGN)]
        for number, label in enumerate(thieves):
            points = met(frame, response, SAME, label).groupby("queries")[["hashes", "substitute_fidelity"]].mean()
            style = {"color": COLOURS[number], "linestyle": LINES[number], "marker": MARKERS[number]}
            axis.plot(
                points["hashes"] * points.index, 100 * points["substitute_fidelity"], label=_short(label), **style
            )
        axis.set(xscale="log", title=response, xlabel="hashes in all", ylabel="fidelity of the copy (%)")
        axis.xaxis.set_minor_formatter(NullFormatter())
    return legend_above(figure)
