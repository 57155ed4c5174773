"""Tables of what a response does to honest users and to attackers, from result rows, as Markdown."""

from statistics import mean, median

from reproduction.cells import BENIGN, OVER_HTTP, RESPONSES, response_name
from reproduction.report import LABELS, Rows, markdown, pick, spread
from samelib.responses import ProofOfWork, Reject

USERS = (BENIGN, *LABELS)  # as the rows name them


def responded(rows: Rows, response: str, user: str, *, http: bool = False) -> Rows:
    """One row a seed: honest users or an attack in front of SAME with that response, at a gateway or over HTTP."""
    return pick(rows, detector=response_name(response, http), attack=user)


def responses_table(rows: Rows) -> str:
    """Figure 4 in figures: queries answered, and hashes of proof of work."""
    rejects = [name for name, response in RESPONSES.items() if isinstance(response, Reject)]
    lines = []
    for user in USERS:
        shares = [spread(r["answered"] for r in responded(rows, name, user)) for name in rejects]
        hashes = [r["hashes"] for r in responded(rows, "proof of work", user)]
        lines.append([user, *shares, f"{mean(hashes):,.0f}" if hashes else "–"])
    return markdown(["queries", *(f"answered, {name}" for name in rejects), "hashes, proof of work"], lines)


def http_table(rows: Rows) -> str:
    """Response times over HTTP, of the queries that were answered."""
    lines = []
    for user in USERS:
        found = [responded(rows, name, user, http=True) for name in OVER_HTTP]
        times = [[1000 * median(r["times"]) for r in cell if r["times"]] for cell in found]
        lines.append([user, *(f"{mean(t):.1f}" if t else "–" for t in times)])
    return markdown(["median response time, ms", *OVER_HTTP], lines)


def copies_table(rows: Rows) -> str:
    """What the paper does not show: the copy that is stolen when SAME guards the door."""
    names = [name for name, response in RESPONSES.items() if not isinstance(response, ProofOfWork)]
    lines = []
    for attack in LABELS:
        found = [responded(rows, name, attack) for name in names]
        lines.append(
            [attack, *(spread(r[f"substitute_{k}"] for r in c) for k in ("accuracy", "fidelity") for c in found)]
        )
    return markdown(["attack", *(f"{word}, {name}" for word in ("accuracy", "fidelity") for name in names)], lines)
