"""`serving.quarters` where there is no PyTorch."""

import os

import numpy as np


def quarters(pixels: np.ndarray) -> np.ndarray:
    """float [N, 1, 8, 8] in [0, 1] -> probabilities, float32 [N, 4]. The file CALLS gets a line with N."""
    with open(os.environ["CALLS"], "a") as calls:
        print(len(pixels), file=calls)
    means = (pixels * 2 - 1).reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, 4)
    odds = np.exp(means)
    return (odds / odds.sum(1, keepdims=True)).astype(np.float32)


def labels(rows: np.ndarray) -> list[str]:
    return [f"quarter {index}" for index in rows.argmax(1)]
