"""Checks of chapter 3, auxiliary repair."""

import math

import torch

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers
from reproduction.author_code import ALL_FAULTS, BATCH_STATISTICS, KL, LABELS
from samelib.detectors.same import deviation
from samelib.models.classifiers import predict


@exercise("L_aux for ten classes")
def e0301(answer):
    loss = number(answer)
    expect(not close(loss, math.log(10)), "that is the cross-entropy. L_aux is a squared distance.")
    expect(not close(loss, 0.9**2), "that is one of the ten differences, squared; the other nine count too.")
    expect(not close(loss, 0.9**0.5), "that is the distance; L_aux is its square.")
    expect(not close(loss, 1.8), "those are the sizes of the ten differences; square each before you add.")
    expect(not close(loss, 0.09), "add the ten squared differences, that of the certain class too, without dividing.")
    expect(close(loss, 0.9), "square the ten differences of the two vectors, and add them up.")


@exercise("{kind of query: ([naive distance of each query], [d of each query])}")
def e0302(answer, detector, victim, queries, one_mask):
    expect(isinstance(answer, dict) and set(queries) <= set(answer), f"two lists for each of {', '.join(queries)}.")
    for kind, x in queries.items():
        expect(len(answer[kind]) == 2, f"{kind}: two scores are asked for, the naive one and d.")
        found = [numbers(scores, len(x))[:FEW] for scores in answer[kind]]
        few = x[:FEW]
        hat = detector.reconstruct(few, one_mask, detector.settings.mask_ratio).clone()
        said, read = victim(hat), predict(detector.auxiliary, hat)
        naive, d = (deviation(victim(few), p).tolist() for p in (said, read))
        expect(
            not (_near(found[0], d) and _near(found[1], naive)) or _near(naive, d),
            "exchanged: the naive distance first.",
        )
        expect(
            _near(found[0], naive) or not _near(found[0], deviation(said, read).tolist()),
            f"{kind}: the naive distance is of the victim's answers to x and to its reconstruction.",
        )
        expect(
            not _near(found[0], [v**0.5 for v in naive]) or _near(found[0], naive),
            "that is the distance; take its square, as the deviation does.",
        )
        expect(
            _near(found[0], naive),
            f"{kind}, naive: ask the victim about x and about its reconstruction under `one_mask`.",
        )
        expect(
            _near(found[1], d), f"{kind}, d: the victim reads x, the auxiliary model the same reconstruction as before."
        )


@exercise("{step with its sign: (AUROC of r, AUROC of d)}, as shares, for the eight steps 0.05, -0.05, 0.1 and so on")
def e0303(answer, areas):
    steps = [sign * step for step in (0.05, 0.1, 0.2, 0.4) for sign in (1, -1)]
    expect(isinstance(answer, dict) and set(steps) <= set(answer), f"two figures for each of the steps {steps}.")
    found = {step: numbers(answer[step], 2) for step in steps}
    expect_shares(*(area for pair in found.values() for area in pair))
    plus, minus = ([area / 100 for area, *_ in areas[f"perturbed {sign}"]] for sign in "+−")
    for step, right, other in ((0.1, plus, minus), (-0.1, minus, plus)):
        pair = found[step]
        if not _near(pair, right):
            expect(not _near(pair, right[::-1]), "exchanged: r comes first, then d.")
            expect(not _near(pair, other), "the signs are exchanged: plus climbs towards the class that was named.")
            expect(not _near(pair, [1 - area for area in right]), "`auroc` takes the benign scores first.")
            expect(False, f"at {step:+} the table above has other figures. Does each step start from the seed samples?")
    expect(
        len({tuple(pair) for pair in found.values()}) > 2,
        "all steps give the same figures. Does `perturb` get the step?",
    )


@exercise("(the bound, {+1: the images after three plus steps, -1: the images after three minus steps})")
def e0304(answer, perturb, substitute, seeds, named):
    expect(
        isinstance(answer, (tuple, list)) and len(answer) == 2, "two things are asked for: the bound and the images."
    )
    bound, images = number(answer[0]), answer[1]
    expect(not close(bound, 0.3), "so far a pixel moves; the size term is the mean of its square.")
    expect(not close(bound, 0.03), "the moves add up before they are squared.")
    expect(not close(bound, 0.01), "that bounds one step; how far can a pixel be after three?")
    expect(close(bound, 0.09), "how far can a pixel move in three steps, and what is its square?")
    expect(
        isinstance(images, dict) and set(images) == {1, -1}, "the images of both directions, by their signs +1 and -1."
    )
    few, classes = seeds[:FEW], named[:FEW]
    for sign, found in images.items():
        expect(tuple(found.shape) == tuple(seeds.shape), f"{sign:+}: one image for each seed sample.")
        found, step = found[:FEW].detach(), sign * 0.1
        expect(found.abs().max() <= 1 + 1e-6, f"{sign:+}: some pixels have left the range from -1 to 1.")
        walks = {
            "right": [step] * 3,
            "this is one step; apply `perturb` to its own result.": [step],
            "these are two steps; take a third.": [step] * 2,
            "this is one long step; take three, each with a fresh gradient.": [3 * step],
            "these images went the other way.": [-step] * 3,
        }
        far = {
            hint: float((found - _walk(perturb, substitute, few, classes, steps)).abs().mean())
            for hint, steps in walks.items()
        }
        nearest = min(
            far, key=far.get
        )  # not equal: where the gradient is nearly zero, its sign is a matter of rounding
        expect(far[nearest] < 0.02, f"{sign:+}: three calls of `perturb` by 0.1, with the class that the victim named.")
        expect(nearest == "right", f"{sign:+}: {nearest}")


@exercise("(the function that answers with classes only, {kind of query: AUROC of d as a share})")
def e0305(answer, victim, queries, areas):
    expect(
        isinstance(answer, (tuple, list)) and len(answer) == 2, "two things are asked for: the function and the AUROC."
    )
    function, found = answer
    expect(callable(function), "first the function, from images to probability vectors.")
    x = queries["benign"][:FEW]
    p, right = function(x), victim(x)
    expect(
        tuple(p.shape) == tuple(right.shape),
        f"the function returns {list(p.shape)}, where {list(right.shape)} is wanted.",
    )
    expect(p.is_floating_point(), "probabilities are floating-point numbers; yours are whole numbers.")
    certain = ((p == 0) | (p == 1)).all() and (p.sum(1) == 1).all()
    expect(certain, "certainty is 1 for one class and 0 for all others.")
    expect((p.argmax(1) == right.argmax(1)).all(), "the function should name the class that the victim names.")
    expect(isinstance(found, dict) and set(areas) <= set(found), f"an AUROC for each of {', '.join(areas)}.")
    values = [number(found[kind]) for kind in areas]
    expect_shares(*values)
    above = [area / 100 for _, (area, *_) in areas.values()]
    expect(not _near(values, above), "this is the table above. Fit a detector for the victim that names classes only.")
    return f"d has {found['perturbed +']:.1%} for the plus step, {areas['perturbed +'][1][0]:.1f} % in the table above."


@exercise(
    '{fault: {kind of query: (AUROC of r, AUROC of d)}}, as shares, for "none", ALL_FAULTS and each fault you tried'
)
def e0306(answer, malicious):
    expect(
        isinstance(answer, dict) and {"none", ALL_FAULTS} <= set(answer), f'"none" and {ALL_FAULTS!r} are asked for.'
    )
    found = {fault: [numbers(kinds[kind], 2) for kind in malicious] for fault, kinds in answer.items()}
    expect_shares(*(area for pairs in found.values() for pair in pairs for area in pair))
    r, d = ({fault: [pair[term] for pair in pairs] for fault, pairs in found.items()} for term in (0, 1))
    alone = set(found) - {"none", ALL_FAULTS}
    expect(alone, "try some faults alone as well, to see which one costs most.")
    for fault in alone & {LABELS, KL, BATCH_STATISTICS}:
        if not _near(r[fault], r["none"]):
            expect(not _near(d[fault], d["none"]), "exchanged: r comes first, then d.")
            expect(False, f"{fault}: this leaves the autoencoder alone, so why has r moved? Compare like with like.")
    expect(
        any(found[fault] != found["none"] for fault in found if fault != "none"), "all faults give the same figures."
    )
    worst = min(alone, key=lambda fault: sum(d[fault]))
    costs = 100 * (sum(d["none"]) - sum(d[worst])) / len(malicious)
    return f"alone, {worst!r} leaves d the lowest mean AUROC, {costs:.1f} points below that without faults."


FEW = 3  # queries of a kind that a check scores again: enough to tell, and quick


def _walk(perturb, model: torch.nn.Module, x: torch.Tensor, classes: torch.Tensor, steps: list[float]) -> torch.Tensor:
    for step in steps:
        x = perturb(model, x, classes, step)
    return x


def _near(found: list[float], right: list[float]) -> bool:
    return all(close(*pair, relative=0.01, absolute=5e-4) for pair in zip(found, right, strict=True))
