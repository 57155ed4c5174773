from types import SimpleNamespace

import torch

from check_cases import Case
from samelib.models.mae import MAESettings, MaskedAutoencoder, patchify, visible_count

GENERATOR = torch.Generator().manual_seed(0)
QUERIES = {kind: 2 * torch.rand(4, 1, 8, 8, generator=GENERATOR) - 1 for kind in ("benign", "proxy", "noise")}
AREA = {"proxy": 0.75, "noise": 1.0}
BRIGHT = {"benign": [0.1, 0.2], "proxy": [0.15, 0.3], "noise": [0.8, 0.9]}
BRIGHTNESS = {kind: torch.tensor(values)[:, None, None, None].expand(2, 1, 2, 2) for kind, values in BRIGHT.items()}

MODEL = MaskedAutoencoder((1, 8, 8), MAESettings(4, 12, depth=1, decoder_depth=1, mask_ratio=0.5))
MASKS = torch.rand(3, 4, generator=GENERATOR)
with torch.no_grad():
    for parameter in MODEL.parameters():  # fresh weights are so small that all drawings are alike
        parameter.normal_(generator=GENERATOR)
    DRAWN = {kind: torch.stack([MODEL(x, row.expand(len(x), -1))[0] for row in MASKS]) for kind, x in QUERIES.items()}


def three(unbiased=False, total=False):
    ways = {"mean of errors": {}, "error of the mean": {}, "variance": {}}
    for kind, x in QUERIES.items():
        values = (x - DRAWN[kind]).square().mean(0), (x - DRAWN[kind].mean(0)).square(), DRAWN[kind].var(0, unbiased)
        for way, value in zip(ways.values(), values, strict=True):
            way[kind] = value.flatten(1).sum(1) if total else value.flatten(1).mean(1)
    return ways


def by_place(count):
    """The error where a patch was hidden (or everywhere, or seen) of each image, by a function of the hidden places."""
    hidden = (MASKS.argsort(1).argsort(1) >= visible_count(4, 0.5))[:, None].float()
    found = {}
    for kind, x in QUERIES.items():
        drawn = torch.stack([patchify(drawing, 4) for drawing in DRAWN[kind]])
        found[kind] = count((patchify(x, 4) - drawn).square().mean(3), hidden)
    return found


def unfolded(images, patch):
    return torch.nn.functional.unfold(images, patch, stride=patch)


SOUND = three()
FIGURES = {4: (4, 9.0, 0.1, 0.7), 2: (16, 20.0, 0.05, 0.8)}

CASES = {
    "e0201": Case(
        AREA,
        [
            {"proxy": 0.25, "noise": 0.0},
            {"proxy": 75, "noise": 100},
            {"proxy": 0.6, "noise": 1.0},
            {"proxy": 0.75},
            0.75,
        ],
        (BRIGHTNESS,),
    ),
    "e0202": Case(
        patchify,
        [
            unfolded,
            lambda images, patch: unfolded(images, patch).mT,
            lambda images, patch: patchify(images, patch).flip(2),
            lambda images, patch: images,
            lambda images, patch: None,
            torch.zeros(1, 4, 4),
        ],
    ),
    "e0203": Case(
        {0.0: (0.01, 0.5), 0.75: (0.03, 0.6)},
        [
            {0.0: (0.03, 0.5), 0.75: (0.01, 0.6)},
            {0.0: (0.01, 50), 0.75: (0.03, 60)},
            {0.0: (0.03, 0.6), 0.75: (0.03, 0.6)},
            {0.0: (7.8, 0.6), 0.75: (23.5, 0.6)},
            (0.01, 0.03),
        ],
    ),
    "e0204": Case(
        FIGURES,
        [
            FIGURES | {4: (1, 9.0, 0.1, 0.7)},
            FIGURES | {4: (2, 9.0, 0.1, 0.7)},
            FIGURES | {4: (4, 9.0, 0.1, 70)},
            FIGURES | {4: (4, 9.0, 0.05, 0.8)},
            {3: (4, 9.0, 0.1, 0.7), 2: FIGURES[2]},
            {4: FIGURES[4]},
        ],
        (SimpleNamespace(image_shape=(1, 8, 8)),),
    ),
    "e0205": Case(
        SOUND,
        [
            three(unbiased=True),
            three(total=True),
            SOUND | {"mean of errors": SOUND["error of the mean"], "error of the mean": SOUND["mean of errors"]},
            SOUND | {"mean of errors": SOUND["variance"]},
            SOUND | {"error of the mean": SOUND["variance"]},
            {way: values for way, values in SOUND.items() if way != "variance"},
            dict.fromkeys(SOUND, 0.7),
        ],
        (MODEL, QUERIES, MASKS),
    ),
    "e0206": Case(
        by_place(lambda errors, hidden: (errors * hidden).sum((0, 2)) / hidden.sum()),
        [
            by_place(lambda errors, hidden: errors.mean((0, 2))),
            by_place(lambda errors, hidden: (errors * (1 - hidden)).sum((0, 2)) / (1 - hidden).sum()),
            by_place(lambda errors, hidden: (errors * hidden).mean((0, 2))),
            by_place(lambda errors, hidden: (errors * hidden).sum((0, 2)) / 3),
            by_place(lambda errors, hidden: (errors * hidden).sum((0, 2)) / 2),
            by_place(lambda errors, hidden: errors.sum((0, 2))),
            {"benign": 0.7, "proxy": 0.7},
        ],
        (MODEL, QUERIES, MASKS),
    ),
}
