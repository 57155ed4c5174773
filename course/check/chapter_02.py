"""Checks of chapter 2, the masked autoencoder."""

import numpy as np
import torch

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers
from samelib import auroc
from samelib.models.mae import patchify, visible_count
from samelib.precision import autocast


@exercise("the AUROC of the mean brightness by the kind of query, {'proxy': ..., 'outliers': ..., 'noise': ...}")
def e0201(answer, queries):
    brightness = {name: x.flatten(1).mean(1).cpu() for name, x in queries.items()}
    right = {name: auroc(brightness["benign"], b) for name, b in brightness.items() if name != "benign"}
    expect(isinstance(answer, dict) and set(right) <= set(answer), f"an AUROC for each of {', '.join(right)}.")
    found = {name: number(answer[name]) for name in right}
    expect_shares(*found.values())
    wrong = [name for name in right if not close(found[name], right[name], absolute=0.005)]
    turned = all(close(found[name], 1 - right[name], absolute=0.005) for name in wrong)
    expect(
        not wrong or not turned,
        f"{' and '.join(wrong)}: turned around. Take the brightness as it is, and the benign scores first.",
    )
    expect(not wrong, f"{' and '.join(wrong)}: compare one mean for each image with that of the benign images.")


@exercise("a function of (images [N, C, H, W], patch) that makes the patches [N, T, patch * patch * C] by `unfold`")
def e0202(answer):
    expect(callable(answer), "a function is asked for.")
    for shape, patch in {(2, 3, 8, 12): 4, (1, 1, 6, 6): 2}.items():
        images = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)
        found, right = answer(images, patch), patchify(images, patch)
        expect(isinstance(found, torch.Tensor), "the function should return a tensor.")
        channel_first = torch.nn.functional.unfold(images, patch, stride=patch)
        expect(
            found.shape != channel_first.shape or found.shape == right.shape,
            "the patches are to be the second dimension, the numbers in each the third.",
        )
        expect(
            found.shape == right.shape, f"for images {list(shape)} and patch {patch}, {list(right.shape)} is wanted."
        )
        expect(
            torch.equal(found, right) or not torch.equal(found, channel_first.mT),
            "right for grey images; in colour, `unfold` has the channel first within a patch, `patchify` last.",
        )
        expect(
            torch.equal(found, right), f"images {list(shape)}: the right shape, but the numbers are in another order."
        )


@exercise("{ratio in training: (benign error, AUROC of the proxy set)} for 0 and 0.75, both scored at mask ratio 0")
def e0203(answer):
    expect(
        isinstance(answer, dict) and set(answer) == {0, 0.75}, "a pair for each of the ratios in training, 0 and 0.75."
    )
    (copied, first), (guessed, second) = (numbers(answer[ratio], 2) for ratio in (0, 0.75))
    _errors_and_areas([copied, guessed], [first, second])
    expect((copied, first) != (guessed, second), "both networks give the same numbers. Were they trained differently?")
    expect(
        copied < guessed,
        "with nothing hidden, copying is enough. Which of the two networks has practised nothing else?",
    )


@exercise("{patch: (patches of an image, seconds of training, benign error, AUROC of the proxy set)} for two sizes")
def e0204(answer, group):
    expect(isinstance(answer, dict) and len(answer) == 2, "four numbers for each of two patch sizes.")
    found = {patch: numbers(values, 4) for patch, values in answer.items()}
    _, height, width = group.image_shape
    for patch, (tokens, seconds, *_) in found.items():
        expect(isinstance(patch, int) and height % patch == width % patch == 0, f"{patch!r} does not divide the image.")
        total = (height // patch) * (width // patch)
        expect(
            tokens == total or tokens != visible_count(total, 0.75),
            "count all patches of an image, not the visible ones.",
        )
        expect(tokens == total, f"patch {patch}: how many squares of {patch} by {patch} pixels cover the image?")
        expect(seconds > 0, "a training takes some time: take it before and after.")
    _errors_and_areas([values[2] for values in found.values()], [values[3] for values in found.values()])
    expect(
        len({tuple(values[2:]) for values in found.values()}) == 2,
        "both sizes give the same figures. Is it one network?",
    )


@exercise(
    '{"mean of errors": r, "error of the mean": r, "variance": r}, each r {kind of query: [one number for each image]}'
)
def e0205(answer, model, queries, masks):
    ways = "mean of errors", "error of the mean", "variance"
    expect(
        isinstance(answer, dict) and set(ways) <= set(answer), f"three quantities by their names: {', '.join(ways)}."
    )
    for kind in ("benign", "proxy"):
        mean, of_mean, variance = (_scores(answer[way], kind, len(queries[kind])) for way in ways)
        x = queries[kind][:FEW]
        drawings = _drawings(model, x, masks)
        rights = (
            (x - drawings).square().flatten(2).mean(2).mean(0),
            (x - drawings.mean(0)).square().flatten(1).mean(1),
            drawings.var(0, unbiased=False).flatten(1).mean(1),
        )
        rights = [right.cpu().numpy() for right in rights]
        pixels = x[0].numel()
        for found, right in zip((mean, of_mean, variance), rights, strict=True):
            expect(
                _near(found, right) or not _near(found, pixels * right),
                "average over the pixels of an image; you have added them up.",
            )
        expect(
            _near(mean, rights[0]) or not (_near(mean, rights[1]) and _near(of_mean, rights[0])),
            "mean of errors and error of the mean: exchanged.",
        )
        expect(_near(mean, rights[0]), "mean of errors: one error for each drawing, then their mean.")
        expect(_near(of_mean, rights[1]), "error of the mean: one mean drawing, then its error.")
        expect(
            _near(variance, rights[2]) or not _near(variance, rights[2] * len(masks) / (len(masks) - 1)),
            "for the identity to hold, the variance divides by K and not by K - 1.",
        )
        expect(_near(variance, rights[2]), "variance: of each pixel over the drawings, then the mean over the pixels.")
        expect(
            np.allclose(mean, of_mean + variance, rtol=0.02), "the first is the second plus the third, for each image."
        )
    areas = [f"{way} {auroc(answer[way]['benign'], answer[way]['proxy']):.1%}" for way in ways]
    return f"mean of errors = error of the mean + variance. AUROC of the proxy images: {', '.join(areas)}."


@exercise("{kind of query: [the error over the hidden patches alone of each image]}")
def e0206(answer, model, queries, masks):
    expect(isinstance(answer, dict), "a dictionary by the kind of query, one number for each image.")
    patch, tokens = model.settings.patch, model.tokens
    visible = visible_count(tokens, model.settings.mask_ratio)
    hidden = (masks.argsort(1).argsort(1) >= visible)[:, None]  # [passes, 1, T]
    for kind in ("benign", "proxy"):
        x = queries[kind][:FEW]
        drawn = torch.stack([patchify(drawing, patch) for drawing in _drawings(model, x, masks)])
        errors = (patchify(x, patch) - drawn).square().mean(3)  # [passes, N, T]
        total, count = (errors * hidden).sum((0, 2)), hidden.sum()
        never = hidden.sum(0).clamp_min(1)
        mistakes = {
            "this is the error over all patches.": errors.mean((0, 2)),
            "this is the error over the visible patches; the mask is 1 where a patch is hidden.": (
                (errors * ~hidden).sum((0, 2)) / (~hidden).sum()
            ),
            "divide by how many patches were hidden, in all passes, not by all patches.": total / len(masks) / tokens,
            "divide by how many patches were hidden in all passes together, not in one.": total / (tokens - visible),
            "divide by how many patches were hidden, not by how many passes there are.": total / len(masks),
            "do not average each patch by itself first: add up over patches and passes, then divide once.": (
                ((errors * hidden).sum(0) / never).sum(1) / (hidden.sum(0) > 0).sum()
            ),
        }
        found, right = _scores(answer, kind, len(queries[kind])), (total / count).cpu().numpy()
        for hint, mistake in mistakes.items():
            expect(_near(found, right) or not _near(found, mistake.cpu().numpy()), hint)
        expect(
            _near(found, right), "for each image, add up the errors where a patch was hidden, and divide by how many."
        )
    return f"AUROC of the proxy images: {auroc(answer['benign'], answer['proxy']):.1%}."


FEW = 3  # images that a check redraws: enough to tell, and quick


@torch.inference_mode()
def _drawings(model: torch.nn.Module, x: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """[passes, N, C, H, W], masked as in training."""
    with autocast(x.device):
        return torch.stack([model(x, row.expand(len(x), -1))[0] for row in masks])


def _scores(answer: dict, kind: str, count: int) -> np.ndarray:
    expect(isinstance(answer, dict) and kind in answer, f"a number for each {kind} image, in a dictionary by the kind.")
    return np.array(numbers(answer[kind], count))


def _near(found: np.ndarray, right: np.ndarray) -> bool:
    """Are the first of these numbers right, but for rounding?"""
    return np.allclose(found[: len(right)], right, rtol=0.01, atol=1e-6)


def _errors_and_areas(errors: list[float], areas: list[float]) -> None:
    expect_shares(*areas)
    expect(all(error > 0 for error in errors), "a squared error is above zero.")
    expect(all(error < 4 for error in errors), "4 is the largest squared error of a pixel: take the mean, not the sum.")
