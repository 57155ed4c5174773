from types import SimpleNamespace

import numpy as np
import torch

from check_cases import Case

FLAGGED = np.array([1, 1, 0, 0, 1, 0, 0, 0], dtype=float)  # of 4 queries of class a, then 4 of class b
GROUP = SimpleNamespace(classes=2, benign_test=SimpleNamespace(labels=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])))
SCORES = {"knockoff": torch.linspace(0, 1, 30)}

CASES = {
    "e0401": Case(9.9 / 10.9, [0.99, 990 / 991, 9.9], (0.01, 0.1)),
    "e0402": Case((0.90625, 0.5), [(14 / 16, 0.5), (15 / 16, 0.5), (0.90625, 0.25), 0.90625]),
    "e0403": Case(
        {"a": 0.5, "b": 0.25}, [{"a": 0.25, "b": 0.125}, {"a": 0.25, "b": 0.5}, 0.375], (FLAGGED, {0.05: 0.5}, GROUP)
    ),
    "e0404": Case((0.00427, 14), [(0.00282, 14), (0.00145, 14), (0.00427, 13)]),
    "e0405": Case(
        {"least suspicious": (0.0, 0.7), "random": (0.5, 0.75)},
        [
            {"least suspicious": (0.5, 0.7), "random": (0.5, 0.75)},
            {"least suspicious": (0.0, 70), "random": (80, 75)},
            (0.0, 0.7),
        ],
        (SCORES, {0.05: 0.5}),
    ),
}
