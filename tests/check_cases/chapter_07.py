from types import SimpleNamespace

import numpy as np
import torch

from check_cases import Case
from samelib import Victim

TRUE = torch.tensor([[12.0, 3.0, -4.0, 1.0]])
X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Detector:
    """Its r is the mean square, its d the largest difference of neighbours."""

    def terms(self, x):
        edges = (x[..., 1:] - x[..., :-1]).abs().amax((1, 2, 3))
        return SimpleNamespace(reconstruction=x.square().mean((1, 2, 3)), deviation=edges)


def blurred(windows, stretch=True):
    found = {}
    for k in windows:
        image = torch.nn.functional.avg_pool2d(X.tanh(), k, stride=1, padding=k // 2)
        if stretch:
            image = image / image.flatten(1).abs().amax(1)[:, None, None, None]
        terms = Detector().terms(image)
        found[k] = float(terms.reconstruction.median()), float(terms.deviation.median())
    return found


RIGHT = blurred((1, 3, 5, 7))


def uncertain(images):
    """Three classes; noise is always the second."""
    return torch.tensor([[0.2, 0.5, 0.3]]).expand(len(images), 3)


VICTIM = Victim(uncertain, (1, 4, 4), 3)

CASES = {
    "e0701": Case(
        (244, 3.144),
        [(245, 3.16), (558, 3.16), (355, 3.16), (260, 3.16), (244, 10), (244, 1.5), 244],
        (784,),
    ),
    "e0702": Case(
        lambda loss, x, epsilon: (loss(x + epsilon) - loss(x - epsilon)) / (2 * epsilon),
        [
            lambda loss, x, epsilon: (loss(x + epsilon) - loss(x)) / epsilon,
            lambda loss, x, epsilon: (loss(x + epsilon) - loss(x - epsilon)) / epsilon,
            lambda loss, x, epsilon: (loss(x + epsilon) - loss(x) + loss(x) - loss(x - epsilon)) / (2 * epsilon),
            lambda loss, x, epsilon: 6.0 + 0 * loss(x) * loss(x),
            6,
        ],
    ),
    "e0703": Case(
        {"trained": [0.5, 0.6, 0.7], "frozen": [0.5, 0.5, 0.4]},
        [
            {"trained": [50, 60, 70], "frozen": [50, 50, 40]},
            {"trained": 0.6, "frozen": 0.5},
            [0.5, 0.6, 0.7, 0.5, 0.5, 0.4],
        ],
    ),
    "e0704": Case(
        ([65.5, -21.83, -21.83, -21.83], 0.1),
        [
            ([9, 0, -7, -2], 0.1),
            ([5.7, -1.9, -1.9, -1.9], 0.1),
            ([65.5, -21.83, -21.83, -21.83], 10),
            ([np.inf, 0, 0, 0], 0.1),
            (65.5, 0.1),
        ],
        (TRUE,),
    ),
    "e0705": Case(
        RIGHT,
        [
            blurred((1, 3, 5, 7), stretch=False),
            {k: pair[::-1] for k, pair in RIGHT.items()},
            {k: pair[0] for k, pair in RIGHT.items()},
            RIGHT | {7: RIGHT[1]},
            RIGHT | {7: (RIGHT[7][0], 9.0)},
            list(RIGHT.values()),
        ],
        (X, Detector()),
    ),
    "e0706": Case(
        (0.1, torch.tensor([0, 400, 0])),
        [
            (10, [0, 400, 0]),
            (0.1, [0, 250, 0]),
            (0.1, [0, 1, 0]),
            (0.1, [200, 100, 100]),
            (0.1, 400),
            0.1,
        ],
        (VICTIM, 400),
    ),
}
