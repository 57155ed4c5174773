from dataclasses import replace
from types import SimpleNamespace

import torch

from check_cases import Case
from samelib.data.image_set import ImageSet


def _images(*levels: int) -> ImageSet:
    """Ten images of 2 x 2 pixels; each is flat, and a level darker than the one before."""
    images = torch.cat([torch.full((1, 1, 2, 2), level) for level in levels]).to(torch.uint8)
    return ImageSet(images, torch.zeros(len(images), dtype=torch.long), ("a",), "made up")


def _shift(by: int):
    return lambda images: replace(images, images=images.images + by)


PROXY, SEEDS = _images(*range(100, 110)), _images(*range(20, 30))
PLUS = SimpleNamespace(score=lambda images: images.float().mean((1, 2, 3)))
SCORES = {"SamePlus": {"benign": PLUS.score(SEEDS.images), "Knockoff": PLUS.score(PROXY.images)}}
SCORES["SamePlus"]["benign"][:2] = 200.0  # so that the bare images do not have the whole area yet

CASES = {
    "e1101": Case((20.8, 3), [(1_000, 1), (143.6, 2), (21.08, 3), (3.03, 3), (20.8, 2), (20.8, 49), (20.8, 2.28)]),
    "e1103": Case(
        _shift(-90),
        [
            _shift(0),
            _shift(1),
            _shift(130),
            lambda images: images.pixels(),
            lambda images: SEEDS,
            lambda images: images.images * 0,
            lambda images: images.images[:3],
            PROXY.images,
        ],
        (SimpleNamespace(proxy=PROXY, seeds=SEEDS), PLUS, SCORES, _shift(1)),
    ),
}
