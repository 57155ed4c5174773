from types import SimpleNamespace

import torch

from check_cases import Case
from samelib.detectors.same import deviation
from samelib.models.classifiers import predict

GENERATOR = torch.Generator().manual_seed(0)


def linear():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=GENERATOR)
    return model


MODEL, AUXILIARY = linear(), linear()
KINDS = ("benign", "perturbed +", "perturbed −")
QUERIES = {kind: 2 * torch.rand(4, 1, 2, 2, generator=GENERATOR) - 1 for kind in KINDS}
MASK = torch.zeros(1, 4)
AREAS = {"perturbed +": [(60.0, 55, 65), (45.0, 40, 50)], "perturbed −": [(58.0, 50, 65), (62.0, 55, 70)]}


def victim(x):
    return predict(MODEL, x)


def reconstruct(x, mask, ratio):
    return 0.5 * x


DETECTOR = SimpleNamespace(reconstruct=reconstruct, auxiliary=AUXILIARY, settings=SimpleNamespace(mask_ratio=0.75))


def scores(first, second):
    found = {}
    for kind, x in QUERIES.items():
        hat = reconstruct(x, MASK, 0.75)
        p = {"x": victim(x), "said": victim(hat), "read": predict(AUXILIARY, hat)}
        found[kind] = [deviation(p[a], p[b]) for a, b in (first, second)]
    return found


NAIVE, D = ("x", "said"), ("x", "read")


def steps(plus, minus):
    return {sign * step: pair for step in (0.05, 0.1, 0.2, 0.4) for sign, pair in ((1, plus), (-1, minus))} | {
        0.4: (0.9, 0.6)
    }


def perturb(model, x, y, step):
    x = x.clone().requires_grad_()
    log_probability = model(x).log_softmax(1).gather(1, y[:, None]).sum()
    (gradient,) = torch.autograd.grad(log_probability, x)
    return (x.detach() + step * gradient.sign()).clamp(-1, 1)


def curved(x):
    """Its gradient turns on the way, so that a stale one shows."""
    flat = x.flatten(1)
    return torch.stack([(5 * flat).sin().sum(1), (7 * flat).cos().sum(1)], 1)


SEEDS, NAMED = QUERIES["benign"], torch.tensor([0, 1, 0, 1])


def walked(*by, sign=1):
    images = {}
    for direction in (1, -1):
        x = SEEDS
        for step in by:
            x = perturb(curved, x, NAMED, sign * direction * step)
        images[direction] = x
    return images


def classes_only(x):
    return torch.nn.functional.one_hot(victim(x).argmax(1), 2).float()


HARD = {"perturbed +": 0.55, "perturbed −": 0.6}
FAULTS = {
    "none": {"noise": (0.9, 0.8), "proxy": (0.7, 0.6)},
    "trained on labels": {"noise": (0.9, 0.7), "proxy": (0.7, 0.5)},
    "all of them": {"noise": (0.8, 0.6), "proxy": (0.6, 0.5)},
}


def each(change):
    return {fault: {kind: change(*pair) for kind, pair in kinds.items()} for fault, kinds in FAULTS.items()}


CASES = {
    "e0301": Case(0.9, [2.302585, 0.81, 0.948683, 1.8, 0.09, 0.1]),
    "e0302": Case(
        scores(NAIVE, D),
        [
            scores(D, NAIVE),
            scores(("said", "read"), D),
            scores(D, D),
            scores(NAIVE, NAIVE),
            {kind: [v.sqrt() for v in pair] for kind, pair in scores(NAIVE, D).items()},
            {kind: [0.5, 0.6] for kind in KINDS},
            {"benign": 0.5},
        ],
        (DETECTOR, victim, QUERIES, MASK),
    ),
    "e0303": Case(
        steps((0.6, 0.45), (0.58, 0.62)),
        [
            steps((60, 45), (58, 62)),
            steps((0.45, 0.6), (0.62, 0.58)),
            steps((0.58, 0.62), (0.6, 0.45)),
            steps((0.4, 0.55), (0.42, 0.38)),
            steps((0.7, 0.45), (0.58, 0.62)),
            steps((0.6, 0.45), (0.58, 0.62)) | {0.4: (0.6, 0.45)},
            {0.1: (0.6, 0.45)},
        ],
        (AREAS,),
    ),
    "e0304": Case(
        (0.09, walked(0.1, 0.1, 0.1)),
        [
            (0.3, walked(0.1, 0.1, 0.1)),
            (0.03, walked(0.1, 0.1, 0.1)),
            (0.01, walked(0.1, 0.1, 0.1)),
            (0.09, walked(0.1)),
            (0.09, walked(0.1, 0.1)),
            (0.09, walked(0.3)),
            (0.09, walked(0.1, 0.1, 0.1, sign=-1)),
            (0.09, {sign: 2 * x for sign, x in walked(0.1, 0.1, 0.1).items()}),
            (0.09, walked(0.1, 0.1, 0.1)[1]),
            0.09,
        ],
        (perturb, curved, SEEDS, NAMED),
    ),
    "e0305": Case(
        (classes_only, HARD),
        [
            (lambda x: victim(x).argmax(1), HARD),
            (lambda x: classes_only(x).int(), HARD),
            (victim, HARD),
            (lambda x: classes_only(x).flip(1), HARD),
            (classes_only, {kind: 100 * area for kind, area in HARD.items()}),
            (classes_only, {"perturbed +": 0.45, "perturbed −": 0.62}),
            (classes_only, 0.55),
            HARD,
        ],
        (victim, QUERIES, AREAS),
    ),
    "e0306": Case(
        FAULTS,
        [
            each(lambda r, d: (d, r)),
            each(lambda r, d: (100 * r, 100 * d)),
            FAULTS | {"trained on labels": {"noise": (0.8, 0.7), "proxy": (0.7, 0.5)}},
            {fault: FAULTS[fault] for fault in ("none", "all of them")},
            dict.fromkeys(FAULTS, FAULTS["none"]),
            {"none": FAULTS["none"]},
        ],
        (["noise", "proxy"],),
    ),
}
