from types import SimpleNamespace

import torch

from check_cases import Case

CLASSES = torch.tensor([0, 0, 0, 1, 1, 2])  # that the victim names on 6 outliers
DOOR = SimpleNamespace(log=SimpleNamespace(answers=torch.eye(3)[torch.tensor([0, 1, 1, 2, 0, 2])]))
LOOT = {
    "Knockoff": SimpleNamespace(curve=[{"queries": 4, "fidelity": 0.8}]),
    "noise": SimpleNamespace(curve=[{"queries": 4, "fidelity": 0.2}]),
}
SURE, UNSURE = [0.9, 0.1, 0.0], [0.5, 0.3, 0.2]
TOLD = {
    "benign": torch.tensor([SURE, SURE, SURE, UNSURE]),
    "Knockoff": torch.tensor([SURE, UNSURE]),
    "noise": torch.tensor([UNSURE, UNSURE]),
}
KNOCKOFF, NOISE = (3 + 4 / 2) / 8, (6 + 2 / 2) / 8  # pairs that are higher, and ties

CASES = {
    "e0101": Case(
        (0.6, [2, 1, 1]),
        [(0.6, [1, 2, 1]), (60, [2, 1, 1]), (0.6, [0.5, 0.25, 0.25]), (0.6, [0, 0, 4]), (0.6, [3, 2, 1]), 0.6],
        (4, {"Knockoff": DOOR}, LOOT, CLASSES),
    ),
    "e0102": Case((True, 0, 1), [(False, 0, 1), (True, 0.4, 0.6), (True, 1, 1), (True, 0, 0), True]),
    "e0103": Case(
        ([0.01, 0.02, 0.06], (0.03, 0.0657)),
        [
            ([1.0, 2.0, 6.0], (3.0, 6.57)),
            ([0.03, 0.03, 0.03], (0.03, 0.0)),
            ([0.01, 0.02, 0.06], (0.02, 0.0657)),
            ([0.01, 0.02, 0.06], (0.03, 0.0299)),
            ([0.01, 0.02, 0.06], (0.03, 0.0265)),
            ([0.01, 0.02, 0.06], (0.03, 0.1314)),
            ([0.01, 0.02, 0.06], (0.03, 0.5)),
            0.03,
        ],
    ),
    "e0104": Case(
        (0.5, 4 / 6),
        [(4 / 6, 0.5), (50, 66.7), (1.0, 4 / 6), (0.5, 15 / 36), (0.5, 0.9)],
        (CLASSES, torch.tensor([0, 0, 1, 1, 1, 0])),
    ),
    "e0105": Case(
        {score: {"Knockoff": KNOCKOFF, "noise": NOISE} for score in ("entropy", "margin")},
        [
            {score: {"Knockoff": 1 - KNOCKOFF, "noise": 1 - NOISE} for score in ("entropy", "margin")},
            {score: {"Knockoff": 100 * KNOCKOFF, "noise": 100 * NOISE} for score in ("entropy", "margin")},
            {score: {"Knockoff": KNOCKOFF} for score in ("entropy", "margin")},
            {"entropy": {"Knockoff": KNOCKOFF, "noise": 0.5}, "margin": {"Knockoff": KNOCKOFF, "noise": NOISE}},
            {"entropy": KNOCKOFF, "margin": NOISE},
        ],
        (TOLD,),
    ),
}
