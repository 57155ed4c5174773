"""What a response does to honest users and to attackers (the paper's Figure 4), and to the copy that is stolen."""

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reproduction.detection import LABELS, SHORT
from reproduction.lab import Bench, evenly, parts_of_log
from reproduction.plan import BENIGN, OVER_HTTP, RESPONSES, SAME, AttackVariant, Cell
from reproduction.tables import markdown, select, spread
from samelib.gateway import QueryGateway, QueryLog
from samelib.plots import COLOURS, grouped_bars, legend_above
from samelib.presets import evaluation
from samelib.responses import ProofOfWork, Reject, Response, draw_hashes
from samelib.training import seed_of

HASH_RATE = 1e6  # hashes a second, of the client that is modelled in a gateway: about one core's, in Python
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of the response times that are kept
USERS = (str(BENIGN), *LABELS)  # by their labels
NAMES = {str(BENIGN): "benign"} | SHORT  # under an axis


def measure(bench: Bench, cell: Cell) -> Iterator[dict]:
    """One user at a gateway or a live service with one response."""
    return (_in_service if cell.transport == "http" else _in_gateway)(bench, cell)


def _in_gateway(bench: Bench, cell: Cell) -> Iterator[dict]:
    """An attack, or honest users, at a gateway with this response; proof of work in modelled time.

    Where nothing is refused, the attack asks what it asks the undefended victim: that log is sent again.
    """
    response, victim = RESPONSES[cell.response], bench.undefended[0]
    gateway = QueryGateway(victim, cell.budget, _detector(bench, response), response)
    if isinstance(response, Reject) and cell.attack != BENIGN:
        substitute = bench.attack(cell.attack).run(gateway, evaluation(victim, bench.group.benign_test)).curve[-1]
    else:
        queries, substitute = _queries(bench, cell.attack, cell.budget)
        gateway.query(queries)
    hashes = torch.zeros(gateway.spent, dtype=torch.int64)
    if isinstance(response, ProofOfWork):
        hashes = draw_hashes(gateway.log.bits, np.random.default_rng(seed_of(bench.seed, "hashes")))
    copy = {f"substitute_{k}": round(substitute[k], 6) for k in ("accuracy", "fidelity") if k in substitute}
    positions = torch.arange(gateway.spent)
    yield from (row | copy for row in _readings(gateway.log, hashes, hashes / HASH_RATE, positions, bench, cell))


def _queries(bench: Bench, user: AttackVariant, budget: int) -> tuple[Tensor, dict]:
    """What honest users, or an attack on the undefended victim, asked, [N, C, H, W]; and what the copy is worth."""
    if user == BENIGN:
        return bench.group.benign_test.images[:budget], {}
    return bench.log(bench.undefended[0], user, budget)


def _in_service(bench: Bench, cell: Cell) -> Iterator[dict]:
    """Queries of an attack on the undefended victim, or of honest users, sent one by one to a live service on loopback.

    Raises:
        ValueError: the optional packages of the service are not installed.
    """
    try:
        from samelib.service.app import create_app
        from samelib.service.client import RemoteGateway
        from samelib.service.server import running
    except ImportError as error:
        raise ValueError(f"Figure 4 needs {error.name}: pip install 'samelib[serve]'") from error
    response = RESPONSES[cell.response]
    queries, _ = _queries(bench, cell.attack, cell.budget)
    positions = evenly(torch.arange(len(queries)), bench.scale.http_queries)
    app = create_app(bench.undefended[0], _detector(bench, response), response)
    with running(app) as url, RemoteGateway(url) as gateway:
        for query in queries[positions.to(queries.device)].split(1):
            gateway.query(query)
    yield from _readings(gateway.log, gateway.log.hashes, gateway.log.seconds, positions, bench, cell)


def _detector(bench: Bench, response: Response | None):
    return bench.detector(SAME) if response else None


def _readings(
    log: QueryLog, hashes: Tensor, seconds: Tensor, positions: Tensor, bench: Bench, cell: Cell
) -> Iterator[dict]:
    """What was answered and what it cost. `positions` [N] is where each query stands in the attack's log."""
    answers = log.answers.cpu().isfinite().all(1)
    for seeds, part in parts_of_log(cell.attack, positions, len(bench.group.seeds)).items():
        answered = part & answers
        times = seconds[answered].double().quantile(torch.tensor(SHARES).double()) if answered.any() else []
        yield ({} if seeds == "in" else {"seeds": seeds}) | {
            "queries": int(part.sum()),
            "answered": round(float(answered.sum() / part.sum()), 6),
            "hashes": round(float(hashes[part].double().mean()), 1),
            "times": [float(f"{t:.4g}") for t in times],
        }


def responded(frame: pd.DataFrame, response: str, label: str) -> pd.DataFrame:
    """One row a seed: honest users or an attack in front of SAME with that response."""
    return select(frame, experiment="responses", response=response, label=label)


def responses_table(frame: pd.DataFrame) -> str:
    """Figure 4 in figures: queries answered, and hashes of proof of work."""
    rejects = [name for name, response in RESPONSES.items() if isinstance(response, Reject)]
    lines = []
    for label in USERS:
        shares = [spread(responded(frame, name, label)["answered"]) for name in rejects]
        hashes = responded(frame, "proof of work", label)["hashes"].mean()
        lines.append([label, *shares, "–" if np.isnan(hashes) else f"{hashes:,.0f}"])
    return markdown(["queries", *(f"answered, {name}" for name in rejects), "hashes, proof of work"], lines)


def http_table(frame: pd.DataFrame) -> str:
    """Response times over HTTP, of the queries that were answered."""
    lines = []
    for label in USERS:
        medians = [1000 * _times(responded(frame, name, label))[:, SHARES.index(0.5)] for name in OVER_HTTP]
        lines.append([label, *(f"{m.mean():.1f}" if len(m) else "–" for m in medians)])
    return markdown(["median response time, ms", *OVER_HTTP], lines)


def _times(rows: pd.DataFrame) -> np.ndarray:
    """Quantiles of the response times [seeds, SHARES], of the seeds in which anything was answered."""
    return np.array([times for times in rows["times"] if times]).reshape(-1, len(SHARES))


def copies_table(frame: pd.DataFrame) -> str:
    """What the paper does not show: the copy that is stolen when SAME guards the door."""
    names = [name for name, response in RESPONSES.items() if not isinstance(response, ProofOfWork)]
    lines = []
    for label in LABELS:
        rows = [responded(frame, name, label) for name in names]
        lines.append([label, *(spread(r[f"substitute_{word}"]) for word in ("accuracy", "fidelity") for r in rows)])
    return markdown(["attack", *(f"{word}, {name}" for word in ("accuracy", "fidelity") for name in names)], lines)


def figure4(frame: pd.DataFrame) -> Figure:
    """Queries answered under each response, and the seconds of proof of work that they cost (modelled)."""
    figure = plt.figure(figsize=(9, 3.8))
    bars, work = figure.subplots(1, 2, width_ratios=(3, 2))
    shares = {n: (lambda label, n=n: responded(frame, n, label)["answered"].tolist()) for n in RESPONSES}
    grouped_bars(bars, NAMES, shares, chance=None)
    bars.set_ylabel("queries answered (%)")
    _time_ranges(work, frame, ("proof of work",))
    work.set_ylabel("seconds of work, modelled")
    figure.legend(*bars.get_legend_handles_labels(), ncols=len(RESPONSES), loc="outside upper center")
    for axis in (bars, work):
        axis.tick_params(axis="x", labelsize=9)
    return figure


def http_figure(frame: pd.DataFrame) -> Figure:
    """Figure 4's response times, of whole requests to a live service on loopback."""
    figure = plt.figure(figsize=(7, 3.6))
    axis = figure.subplots()
    _time_ranges(axis, frame, OVER_HTTP)
    axis.set_ylabel("response time over HTTP (s)")
    return legend_above(figure)


def _time_ranges(axis: Axes, frame: pd.DataFrame, responses: Sequence[str]) -> None:
    """Response times of answered queries: a mark at the median, lines to the quartiles (thick) and to 5 and 95 %."""
    for i, name in enumerate(responses):
        number = list(RESPONSES).index(name)
        look = {"color": COLOURS[number], "linestyle": "-"}
        for position, label in enumerate(NAMES):
            seeds = _times(responded(frame, name, label))
            if not len(seeds):  # nothing was answered
                continue
            x, times = position + 0.25 * (i - (len(responses) - 1) / 2), np.exp(np.log(seeds).mean(0))
            axis.plot([x, x], times[[0, -1]], linewidth=1, **look)
            axis.plot([x, x], times[[1, -2]], linewidth=4, **look)
            legend = name if label == str(BENIGN) else None
            axis.plot(x, times[2], marker="o^sD"[number], markersize=6, markeredgecolor="white", label=legend, **look)
    axis.set_xticks(range(len(NAMES)), list(NAMES.values()))
    axis.set_yscale("log")
    axis.grid(axis="x", visible=False)
