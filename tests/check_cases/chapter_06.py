from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import nn

from check_cases import Case

PAPER = pd.DataFrame({"aupr": [92.95]}, index=[1_000])

random = torch.Generator().manual_seed(0)
SEEDS, PLUS, MINUS = torch.randint(0, 256, (3, 2, 1, 4, 4), generator=random, dtype=torch.uint8)
TWICE_PLUS, TWICE_MINUS = torch.randint(0, 256, (2, 4, 1, 4, 4), generator=random, dtype=torch.uint8)
DOORS = {
    "+": SimpleNamespace(log=SimpleNamespace(queries=torch.cat([SEEDS, PLUS, TWICE_PLUS]))),
    "-": SimpleNamespace(log=SimpleNamespace(queries=torch.cat([SEEDS, MINUS, TWICE_MINUS]))),
}
TURNED = torch.cat([SEEDS, MINUS, TWICE_PLUS])
AREAS = [0.55, 0.6]

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
MODEL[1].weight.data = torch.linspace(-1, 1, 48).sin().view(3, 16)
MODEL[1].bias.data.zero_()
X = torch.linspace(-0.7, 0.7, 64).cos().view(4, 1, 4, 4) * 0.5
GROUP = SimpleNamespace(seeds=SimpleNamespace(pixels=lambda: X))
THIEVES = {"-": SimpleNamespace(kept=[(4, MODEL)])}


def victim(x):
    return (2 * MODEL(x)).softmax(1).detach()


def moved(sign):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(victim_logits(x).sum(), x)
    return float((victim(X + 0.2 * sign * gradient.sign()) - victim(X)).abs().sum(1).mean())


def victim_logits(x):
    return MODEL(x).log_softmax(1).gather(1, victim(X).argmax(1)[:, None])


DOWN, UP = moved(-1), moved(1)


def two_sided(d, benign):
    d, benign = d.clamp_min(1e-12).log(), benign.clamp_min(1e-12).log()
    return (d - benign.median()).abs()


CASES = {
    "e0601": Case(
        np.array([1, 4, 6, 4, 1]) / 16,
        [[1, 4, 6, 4, 1], [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2], [0.25] * 4, [0.2] * 5, [6.25, 25, 37.5, 25, 6.25]],
    ),
    "e0602": Case((0.975, 0), [(97.5, 0), (0.9, 0.75), (0.95, 0), (0.975, 0.75)]),
    "e0603": Case(0.935, [93.5, 0.9295, 1.0, 0.9, 0.8], (PAPER,)),
    "e0604": Case(
        (TURNED, 0.9, AREAS),
        [
            (DOORS["-"].log.queries, 0.9, AREAS),
            (TURNED, 90, AREAS),
            (TURNED[:6], 0.9, AREAS),
            (torch.cat([SEEDS, SEEDS, TWICE_PLUS]), 0.9, AREAS),
            (0.9, *AREAS),
        ],
        (DOORS, [2, 4, 8]),
    ),
    "e0605": Case(
        two_sided,
        [
            lambda d, benign: d,
            lambda d, benign: -d,
            lambda d, benign: (d - benign.median()).abs(),
            lambda d, benign: (d.log() - benign.log().median()).abs(),
            torch.tensor([1.0, 2.0]),
        ],
    ),
    "e0606": Case(
        {"pixels": (DOWN, 0.9, 0.8), "blocks": (0.1, 0.7, 0.6)},
        [
            {"pixels": (UP, 0.9, 0.8), "blocks": (0.1, 0.7, 0.6)},
            {"pixels": (DOWN / 3, 0.9, 0.8), "blocks": (0.1, 0.7, 0.6)},
            {"pixels": (DOWN, 90, 80), "blocks": (0.1, 70, 60)},
            {"pixels": (DOWN, 0.9, 0.8)},
        ],
        (victim, GROUP, THIEVES),
    ),
}
