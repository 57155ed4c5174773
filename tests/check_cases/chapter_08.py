from types import SimpleNamespace

import torch

from check_cases import Case
from samelib import ImageSet


def images(values):
    """A made-up set: image i has all pixels of grey value i."""
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return ImageSet(pixels, torch.tensor([v % 2 for v in values]), ("even", "odd"), "made up")


GROUP = SimpleNamespace(proxy=images([*range(0, 40), *range(20, 60)]), seeds=range(5))
OE = SimpleNamespace(score=lambda x: x.float().mean((1, 2, 3)))
BENIGN = images(range(40)).images  # an AUROC of 0.875 on the second half of the proxy set
TESTS = images(range(10))


def victim(wrong):
    """A victim that errs on so many of the ten tests."""
    named = torch.where(torch.arange(10) < wrong, 1 - TESTS.labels, TESTS.labels)
    return lambda x: torch.nn.functional.one_hot(named, 2).float()


OWNERS = {"OE": victim(1), "EDM": victim(5), "SAME": victim(0)}
COPIES = {"OE": (0.7, 0.8), "EDM": (0.5, 0.3), "SAME": (0.9, 0.9)}
BELOW, EQUAL, ABOVE = torch.zeros(10), torch.ones(10), torch.full((10,), 2.0)
SCORES = {title: {"benign": EQUAL, "jbda": x} for title, x in (("OE", ABOVE), ("EDM", EQUAL), ("SAME", BELOW))}

CASES = {
    "e0801": Case(7, [5, 6, 52, 126]),
    "e0802": Case((0.99, 0.36), [(0.01, 0.64), (0.36, 0.99), (0.99, 0.97), (99, 36), 0.36]),
    "e0803": Case(
        (0.98, 0.875),
        [(0.875, 0.98), (0.02, 0.125), (0.98, 0.5), (98, 87.5), (0.5, 0.875), 0.98],
        (OE, BENIGN, GROUP, 40),
    ),
    "e0804": Case(
        COPIES,
        [COPIES | {"SAME": (0.9, 0.8)}, COPIES | {"OE": (70, 80)}, {"OE": (0.7, 0.8)}, (0.7, 0.8)],
        (OWNERS, TESTS),
    ),
    "e0805": Case(
        lambda budget: -(-budget // 101),
        [
            lambda budget: -(-budget // 100),
            lambda budget: -(-budget // 102),
            lambda budget: budget // 101,
            lambda budget: budget / 101,
            4,
        ],
    ),
    "e0806": Case(
        {"+": (0.3, 0.6, 0.7, 0.4), "-": (1.0, 0.5, 0.0, 0.4)},
        [
            {"-": (0.3, 0.6, 0.7, 0.4), "+": (1.0, 0.5, 0.0, 0.4)},
            {"+": (0.4, 0.6, 0.6, 0.4), "-": (0.75, 0.5, 0.25, 0.4)},
            {"+": (1.0, 0.5, 0.0, 0.4), "-": (1.0, 0.5, 0.0, 0.4)},
            {"+": (30, 60, 70, 40), "-": (100, 50, 0, 40)},
            {"+": (0.3, 0.6, 0.7), "-": (1.0, 0.5, 0.0)},
        ],
        (SCORES, GROUP, 10),
    ),
}
