from types import SimpleNamespace

import numpy as np
import torch

from check_cases import Case

FIRST, SECOND = torch.tensor([-0.2, 0.4, -0.2]), [-0.1215, 0.2430, -0.1215]
NARROW, EVEN = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), [1 / 3] * 3
PILE = SimpleNamespace(classes=tuple("abcde"))
FIDELITIES = {"certainty": 61.5}
CAUGHT = np.array([True, False, False, False])

CASES = {
    "e0501": Case(
        (FIRST, SECOND),
        [
            (FIRST, [0.0, 0.0, 0.0]),
            (FIRST, [-0.043, 0.086, -0.043]),
            (FIRST, [-0.1, 0.2, -0.1]),
            ([0.4, -0.2, -0.2], SECOND),
            ([0.0, 0.6, 0.0], SECOND),
            SECOND,
        ],
    ),
    "e0502": Case(
        {8: NARROW, 32: [0.4, 0.4, 0.2], 128: [0.4, 0.3, 0.3]},
        [
            {8: NARROW, 128: NARROW},
            {8: NARROW, 128: EVEN},
            {8: 2.8, 128: 2.9},
            {8: [50, 30, 20], 128: [40, 30, 30]},
            [NARROW, EVEN],
        ],
        (3,),
    ),
    "e0503": Case((0.45, 0.52), [(45, 52), (0.45, 0.45), (-0.1, 0.5), 0.52]),
    "e0504": Case(
        (0.6, 0.9, 0.55), [(60, 90, 55), (0.5, 0.9, 0.55), (0.6, 0.6, 0.55), (0.6, 0.9)], (3, PILE, FIDELITIES)
    ),
    "e0505": Case(
        {"hidden": (0.1, 0.4), "random": (0.3, 0.45), "all": (0.28, 0.7)},
        [
            {"hidden": (10, 40), "random": (30, 45), "all": (28, 70)},
            {"hidden": (0.9, 0.4), "random": (0.7, 0.45), "all": (0.72, 0.7)},
            {"hidden": (0.5, 0.4), "random": (0.5, 0.45), "all": (0.5, 0.7)},
            {"hidden": 0.1, "random": 0.3, "all": 0.28},
            {"hidden": (0.1, 0.4)},
        ],
        (CAUGHT,),
    ),
}
