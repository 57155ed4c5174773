import numpy as np

from check_cases import Case

AREAS = {
    ("mask 0", 0.5): {"Knockoff": 0.8, "DFME": 0.9},
    ("mask 0", 0.0): {"Knockoff": 0.6, "DFME": 0.95},
    ("masked passes", 0.5): {"Knockoff": 0.7, "DFME": 0.99},
}
SAME, DEVIATION, PASSES = AREAS.values()
LABELLED = {"Knockoff": 0.79, "DFME": 0.91}


def area(how, kind, alpha=0.5):
    return AREAS[how, alpha][kind]


TOPPED = np.r_[np.full(50, 10.0), np.zeros(50)], np.linspace(1, 2, 100)

CASES = {
    "e0901": Case(5, [12, 4, 2, 7]),
    "e0902": Case(0.161, [19 / 99, 99 / 118, 0.95, 19 / 119, 16.1, 0.0095]),
    "e0903": Case(
        {"AdamW": [1.8004, 1.8004], "SGD": [1.6676, 1.5824]},
        [
            {"AdamW": [1.8004, 1.7313], "SGD": [1.6676, 1.5824]},
            {"AdamW": [1.8004, 1.8004], "SGD": [1.6676, 1.6676]},
            [1.8004, 1.8004, 1.6676, 1.5824],
        ],
    ),
    "e0904": Case(
        TOPPED,
        [
            (np.r_[np.full(5, 10.0), np.zeros(95)], np.linspace(1, 2, 100)),
            ([1.0, 2.0], [3.0, 4.0]),
            (0.98, 0.99),
        ],
    ),
    "e0905": Case(
        {"answers": SAME, "labels": LABELLED},
        [
            {"answers": LABELLED | {"DFME": 0.8}, "labels": SAME},
            {"answers": DEVIATION, "labels": LABELLED},
            {"answers": PASSES, "labels": LABELLED},
            {"answers": SAME, "labels": SAME},
            {"answers": {"Knockoff": 80, "DFME": 90}, "labels": {"Knockoff": 79, "DFME": 91}},
            SAME,
        ],
        ({"Knockoff": "Knockoff", "DFME": "DFME"}, area),
    ),
}
