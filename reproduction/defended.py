"""What a response does to honest users and to attackers (the paper's Figure 4), and to the copy that is stolen."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from reproduction.bench import Bench
from reproduction.cells import BENIGN, RESPONSES, SAME, Cell, response_name
from reproduction.run import evaluation, evenly, parts_of_log
from samelib.gateway import Gateway, Policy, QueryGateway
from samelib.responses import ProofOfWork, Reject

HASH_RATE = 1e6  # hashes a second, of the client that is modelled in a gateway: about one core's, in Python
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of the response times that are kept
HTTP_QUERIES = 100
IN_GATEWAY = {response_name(name): response for name, response in RESPONSES.items()}
IN_SERVICE = {response_name(name, http=True): response for name, response in RESPONSES.items()}


def in_gateway(bench: Bench, cell: Cell) -> Iterator[dict]:
    """An attack, or honest users, at a gateway with this response; proof of work in modelled time.

    Where nothing is refused, the attack asks what it asks the undefended victim: that log is sent again.
    """
    response, victim = IN_GATEWAY[cell.detector], bench.plain[0]
    if isinstance(response, ProofOfWork):
        response = replace(response, hash_rate=HASH_RATE, seed=bench.seed)
    gateway = QueryGateway(victim, cell.budget, _detector(bench, response), response)
    if isinstance(response, Reject) and cell.attack != BENIGN:
        worth = bench.attack(cell.attack).run(gateway, evaluation(victim, bench.group.benign_test)).curve[-1]
    else:
        queries, worth = _queries(bench, cell.attack, cell.budget)
        gateway.query(queries)
    copy = {f"substitute_{k}": round(worth[k], 6) for k in ("accuracy", "fidelity") if k in worth}
    yield from (row | copy for row in _readings(gateway, torch.arange(gateway.spent), bench, cell))


def _queries(bench: Bench, user: str, budget: int) -> tuple[Tensor, dict]:
    """What honest users, or an attack on the undefended victim, asked, [N, C, H, W]; and what the copy is worth."""
    if user == BENIGN:
        return bench.group.benign_test.images[:budget], {}
    return bench.log(bench.plain[0], user, budget)


def in_service(bench: Bench, cell: Cell) -> Iterator[dict]:
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
    response, budget = IN_SERVICE[cell.detector], bench.settings.budgets[1]
    queries, _ = _queries(bench, cell.attack, budget)
    place = evenly(torch.arange(len(queries)), min(HTTP_QUERIES, budget // 10))
    app = create_app(bench.plain[0], _detector(bench, response), response)
    with running(app) as url, RemoteGateway(url) as gateway:
        for query in queries[place.to(queries.device)].split(1):
            gateway.query(query)
    yield from _readings(gateway, place, bench, cell)


def _detector(bench: Bench, response: Policy | None):
    return bench.detector(SAME) if response else None


def _readings(gateway: Gateway, place: Tensor, bench: Bench, cell: Cell) -> Iterator[dict]:
    """What was answered and what it cost. `place` [N] is where each query stands in the attack's log."""
    answers = gateway.log.answers.cpu()
    hashes, seconds = _logged(gateway, "hashes"), _logged(gateway, "seconds")
    for label, part in parts_of_log(cell.attack, place, len(bench.group.seeds)).items():
        answered = part & answers.isfinite().all(1)
        times = seconds[answered].double().quantile(torch.tensor(SHARES).double()) if answered.any() else []
        yield {
            "attack": label,
            "queries": int(part.sum()),
            "answered": round(float(answered.sum() / part.sum()), 6),
            "hashes": round(float(hashes[part].double().mean()), 1),
            "times": [float(f"{t:.4g}") for t in times],
        }


def _logged(gateway: Gateway, name: str) -> Tensor:
    try:
        return getattr(gateway.log, name)
    except LookupError:
        return torch.zeros(gateway.spent)  # where there is no response, nobody has to work
