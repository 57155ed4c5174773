"""What bans cost: how many honest accounts are banned whose images come from another camera, program or hand."""

import math
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pandas as pd
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as pictures

from reproduction.lab import Bench
from reproduction.plan import ALL_RESPONSES, BENIGN, HONEST, KNOCKOFF, SAME, SAME_PLUS, Cell
from reproduction.tables import markdown, select, spread
from samelib.detectors.base import Detector
from samelib.evidence import Wealth, log_e_values, safe_p_values
from samelib.metrics import tpr_at_threshold
from samelib.training import seed_of

ACCOUNTS, LENGTH = 1_000, 1_000  # simulated accounts, and queries of each
APPLIED: dict[str | None, Callable[[Tensor], Tensor]] = {  # to images uint8 [N, C, H, W]
    None: lambda images: images,
    "shifted by a pixel": lambda images: pictures.affine(images, 0.0, [1, 1], 1.0, [0.0, 0.0]),
    "turned by 10 degrees": lambda images: pictures.rotate(images, 10.0, InterpolationMode.BILINEAR),
    "JPEG of quality 75": lambda images: pictures.jpeg(images, 75),
    "a fifth darker": lambda images: pictures.adjust_brightness(images, 0.8),
}


def measure(bench: Bench, cell: Cell) -> Iterator[dict]:
    """Accounts that draw their queries from honest images, changed as the cell says (or from the proxy set: other
    hands, another scanner), and are watched by evidence of strangeness alone."""
    images = bench.halves[0].images if cell.attack.attack == BENIGN.attack else bench.group.proxy.images
    changed = APPLIED[cell.attack.change](images[: cell.budget].cpu())
    detector = bench.detector(cell.detector)
    scores = detector.score(changed.to(images.device))
    banned_at = bans(detector, scores, ALL_RESPONSES[cell.response].delta, bench.seed)
    banned = np.isfinite(banned_at)
    yield {
        "queries": LENGTH,
        "flagged": round(tpr_at_threshold(scores, detector.threshold), 6),
        "banned": round(float(banned.mean()), 6),
        "banned_at": float(np.median(banned_at[banned])) if banned.any() else None,
    }


def bans(detector: Detector, scores: Tensor, delta: float, seed: int) -> np.ndarray:
    """At which query each of `ACCOUNTS` accounts is banned, which draw `LENGTH` queries from those with these scores [N]:
    float64 [ACCOUNTS]; infinite where the evidence never suffices."""
    count = len(detector.calibration_scores)
    ranks = (detector.p_values_of(scores).cpu() * (count + 1)).round().long() - 1
    log_e = log_e_values(safe_p_values(count)).numpy()[ranks.numpy()]
    draws = np.random.default_rng(seed_of(seed, "bans")).integers(len(log_e), size=(LENGTH, ACCOUNTS))
    wealth, banned_at = Wealth(log_bets=np.full(ACCOUNTS, -math.inf)), np.full(ACCOUNTS, math.inf)
    for query, drawn in enumerate(draws, 1):
        enough = wealth.add(log_e[drawn]) >= -math.log(delta)
        banned_at[enough & np.isinf(banned_at)] = query
    return banned_at


def bans_table(frame: pd.DataFrame) -> str:
    """Honest users, and thieves who send the proxy set: share of queries flagged at 5 %, share of accounts banned, and the
    median query of the ban."""
    lines = []
    for attack, detector in product((*HONEST, KNOCKOFF), (SAME, SAME_PLUS)):
        fields = {"experiment": "bans", "label": str(attack)} | detector._asdict()
        rows = select(frame, **fields)
        if len(rows):
            first = "–" if rows["banned_at"].isna().all() else f"{rows['banned_at'].mean():,.0f}"
            lines.append([attack, detector, spread(rows["flagged"]), spread(rows["banned"]), first])
    header = ["queries", "watched by", "flagged at 5 %", f"accounts banned within {LENGTH:,} queries", "median query"]
    return markdown(header, lines, 2)
