"""Images that an attacker changes, or chooses, before anything is asked: so that a detector takes them for benign ones.

Each disguise maps the attacker's images to others, ImageSet -> ImageSet, and Knockoff asks these: for instance
`Knockoff(Preprocessing(seeds)(proxy))`. What it takes to know is said by each, from little to everything. The bound for
all of them is whoever holds benign images themselves: `Knockoff(benign)`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from samelib.data.image_set import LEVELS, ImageSet, to_float, to_uint8
from samelib.detectors.same import SameDetector, Terms, deviation, pass_noise, reconstruction_error
from samelib.detectors.same_plus import SamePlus, Sweep, complementary_masks
from samelib.models.mae import MaskedAutoencoder
from samelib.presets import preset
from samelib.store import ArtifactStore
from samelib.training import TrainSettings, seed_of, train_mae

BATCH = 256
INK = 6  # levels of 255 by which a pixel of the stroke differs from the paper
AUTOENCODER_TRAIN = TrainSettings(seen=60_000, batch=64, lr=2e-3, warmup=0.1)


def paper_level(images: Tensor) -> Tensor:
    """The level of the paper behind the stroke, [N, C, 1, 1] of images [N, C, H, W]: the median of the outermost pixels."""
    border = [images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]]
    return torch.cat(border, dim=-1).median(-1).values[..., None, None]


def ink_mask(images: Tensor) -> Tensor:
    """Where the stroke is, bool [N, 1, H, W] of images uint8 [N, C, H, W]: pixels that are not paper, in any channel."""
    levels = images.short()
    return ((levels - paper_level(levels)).abs() > INK).any(1, keepdim=True)


def sharpness(x: Tensor) -> Tensor:
    """The mean step at an edge, [N] of images [N, C, H, W]: sum of the squared differences of neighbouring pixels over
    the sum of the absolute ones.

    An edge of height h has h where it takes one pixel and h / k where it takes k, however much of it there is.
    """
    steps = torch.cat([x.diff(dim=2).flatten(1), x.diff(dim=3).flatten(1)], dim=1)
    return steps.square().sum(1) / steps.abs().sum(1).clamp_min(1e-9)


def sharpened(x: Tensor, amount: float) -> Tensor:
    """x + amount (x - blurred x), of images [N, C, H, W]: sharper above 0, blurred below; -1 is the blur itself."""
    weights = torch.tensor([0.25, 0.5, 0.25], device=x.device)
    kernel = (weights[:, None] * weights).expand(x.shape[1], 1, 3, 3)
    blurred = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
    return x + amount * (x - blurred)


class Preprocessing:
    """Knows how the service's benign images look, from a few of them, and nothing of its defence.

    Grey images are taken for writing on plain paper: the stroke is cut out, scaled, and put on paper of its own, so that
    the sides of their boxes, their centres of mass and their heaviest ink are spread as the seeds' are (by rank, see
    `spread_like`). Of colour images each channel is given the mean and the deviation that it has in the seeds. Both are
    then sharpened (or blurred) by one amount, until the mean `sharpness` is that of the seeds.

    Args:
        seeds: benign images; twenty will do, and their labels are not used.

    Attributes:
        sharpness: the seeds' mean.
        paper, sign, strokes: of grey seeds: the level of the paper in [-1, 1], 1 where the ink is the brighter and -1
            where the paper is, and what is measured of each stroke [n] (`Strokes`).
        mean, deviation: of colour seeds, [1, 3, 1, 1].

    Raises:
        ValueError: no seeds, or grey ones without any ink; in use, images of another shape than the seeds.
    """

    def __init__(self, seeds: ImageSet):
        if len(seeds) == 0:
            raise ValueError(f"preprocessing learns from benign images, and the set {seeds.name} is empty")
        self.image_shape, x = seeds.image_shape, seeds.pixels()
        if self.image_shape[0] == 1:
            x = x[ink_mask(seeds.images).flatten(1).any(1)]
            if not len(x):
                raise ValueError(f"all images of {seeds.name} are of one level: there is no stroke to learn from")
            self.paper, self.strokes = paper_level(x).mean(), measure_strokes(x)
            self.sign = _reach(x).mean().sign()
        else:
            self.mean, self.deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        self.sharpness = float(sharpness(x).mean())

    def __call__(self, images: ImageSet) -> ImageSet:
        if images.image_shape != self.image_shape:
            raise ValueError(f"{images.name} holds images {images.image_shape}, the seeds are {self.image_shape}")
        if not len(images):
            return images
        x = images.pixels()
        drawn = self._writing(x) if self.image_shape[0] == 1 else self._picture(x)
        return replace(images, images=to_uint8(drawn(self._amount(drawn))))

    def _writing(self, x: Tensor) -> Callable[[float], Tensor]:
        """Grey images as the seeds are written, sharpened by an amount that is still open."""
        own = measure_strokes(x)
        side, row, column, reach = (spread_like(a, b) for a, b in zip(own, self.strokes, strict=True))
        scale = side / own.side
        theta = torch.zeros(len(x), 2, 3, device=x.device)  # where each pixel comes from, in [-1, 1], x before y
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
        for axis, (here, there, length) in enumerate(((own.column, column, x.shape[3]), (own.row, row, x.shape[2]))):
            theta[:, axis, 2] = (2 * here + 1) / length - 1 - ((2 * there + 1) / length - 1) / scale
        grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
        stroke = functional.grid_sample(stroke_of(x), grid, mode="bicubic", align_corners=False).clamp(0, 1)

        def drawn(amount: float) -> Tensor:
            ink = sharpened(stroke, amount).clamp(0, 1)
            ink = ink / ink.amax((2, 3), keepdim=True).clamp_min(1e-6)
            return self.paper + self.sign * ink * reach[:, None, None, None]

        return drawn

    def _picture(self, x: Tensor) -> Callable[[float], Tensor]:
        """Colour images in the seeds' colours, sharpened by an amount that is still open."""
        own = x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / own * self.deviation + self.mean
        return lambda amount: sharpened(x, amount).clamp(-1, 1)

    def _amount(self, drawn: Callable[[float], Tensor]) -> float:
        """The amount at which images are as sharp as the seeds, by bisection."""
        low, high = -1.0, 8.0
        for _ in range(12):
            middle = (low + high) / 2
            sharper = float(sharpness(drawn(middle)).mean()) > self.sharpness
            low, high = (low, middle) if sharper else (middle, high)
        return (low + high) / 2


class Strokes(NamedTuple):
    """What is measured of writing, [N] each: the longer side of its box and its centre of mass (row, column), in pixels;
    and how far the heaviest ink is from the paper, between 0 and 2."""

    side: Tensor
    row: Tensor
    column: Tensor
    reach: Tensor


def measure_strokes(x: Tensor) -> Strokes:
    """Of grey images [N, 1, H, W]; an empty one counts as full."""
    stroke = stroke_of(x)[:, 0]
    stroke = stroke.masked_fill(stroke.amax((1, 2), keepdim=True) == 0, 1.0)
    rows, columns = stroke.sum(2), stroke.sum(1)
    side = torch.maximum(_extent(rows > 0), _extent(columns > 0))
    return Strokes(side, _centre(rows), _centre(columns), _reach(x).abs()[:, 0, 0, 0])


def stroke_of(x: Tensor) -> Tensor:
    """Grey images [N, 1, H, W] as ink alone: 0 the paper, 1 the heaviest ink, whichever of them is the darker; what is
    fainter than a tenth is paper."""
    reach = _reach(x)
    stroke = (x - paper_level(x)) / reach.where(reach != 0, 1.0)
    return stroke.where(stroke > 0.1, 0.0)


def _reach(x: Tensor) -> Tensor:
    """From the paper to the level that is farthest from it, [N, 1, 1, 1]; negative where that is darker."""
    paper = paper_level(x)
    low, high = x.amin((2, 3), keepdim=True) - paper, x.amax((2, 3), keepdim=True) - paper
    return high.where(high >= -low, low)


def _extent(there: Tensor) -> Tensor:
    """From the first to the last True, [N] of bool [N, S]."""
    places = torch.arange(there.shape[1], device=there.device)
    last = places.where(there, -1).amax(1)
    first = places.where(there, there.shape[1]).amin(1)
    return (last - first + 1).float()


def _centre(mass: Tensor) -> Tensor:
    """The centre of mass [N] of masses [N, S] in a line."""
    places = torch.arange(mass.shape[1], device=mass.device, dtype=mass.dtype)
    return (mass * places).sum(1) / mass.sum(1)


def spread_like(values: Tensor, reference: Tensor) -> Tensor:
    """Each of the values [N] replaced by what has the same rank in the reference [n]."""
    ranks = values.argsort(stable=True).argsort(stable=True)
    return torch.quantile(reference, (ranks + 0.5) / len(values))


def own_autoencoder(
    images: ImageSet,
    train: TrainSettings = AUTOENCODER_TRAIN,
    mask_ratio: float = 0.75,
    seed: int = 0,
    store: ArtifactStore | None = None,
) -> MaskedAutoencoder:
    """The attacker's own small masked autoencoder (the smoke tier's), trained on images they hold, or from the store.

    Raises:
        ValueError: no images, or of a size that cannot be cut into patches; a mask ratio outside [0, 1).
        ArtifactError: the store cannot be written.
    """
    if not len(images):
        raise ValueError(f"an autoencoder needs images to learn from, and the set {images.name} is empty")
    shape, start = images.image_shape, seed_of(seed, "attacker's autoencoder")
    mae = replace(preset("smoke", shape).same.mae, mask_ratio=mask_ratio)
    spec = {"kind": "attackers-mae", "mae": asdict(mae), "train": asdict(train)}
    return (store or ArtifactStore()).trained(
        spec | {"data": images.fingerprint, "seed": seed},
        lambda: MaskedAutoencoder(shape, mae, start).to(images.device),
        lambda model, checkpoint: train_mae(model, images, train, seed=start, checkpoint=checkpoint),
    )[0]


class Filter:
    """Knows that strange images are what is looked for: sends only those that an autoencoder of their own finds ordinary.

    Args:
        autoencoder: see `own_autoencoder`; trained on the proxy set, or on benign seeds.
        share: of the images, those kept.
        passes: masks under which each image is reconstructed.

    Raises:
        ValueError: a share outside (0, 1].
    """

    def __init__(self, autoencoder: MaskedAutoencoder, share: float = 0.5, passes: int = 4):
        if not 0 < share <= 1:
            raise ValueError(f"the share of images to keep must be above 0 and at most 1, got {share}")
        self.autoencoder, self.share = autoencoder.requires_grad_(False), share
        self.noise = pass_noise(autoencoder.tokens, passes, 0)

    def __call__(self, images: ImageSet) -> ImageSet:
        kept = self.suspicion(images).argsort(stable=True)[: int(len(images) * self.share)]
        return images[kept.sort().values.to(images.device)]

    def suspicion(self, images: ImageSet) -> Tensor:
        """The mean reconstruction error of each image, [N]."""
        return _in_batches(images, self._errors)

    def _errors(self, x: Tensor) -> Tensor:
        errors = 0.0
        for noise in self.noise.to(x.device):
            errors = errors + reconstruction_error(x, self.autoencoder(x, noise[None].expand(len(x), -1))[0])
        return errors / len(self.noise)


class Purification:
    """Knows that a reconstruction is what is looked at: asks each image as an autoencoder of their own redraws it.

    Args:
        autoencoder: see `own_autoencoder`; it sees the whole image here, so it should have learnt with few patches hidden.
    """

    def __init__(self, autoencoder: MaskedAutoencoder):
        self.autoencoder = autoencoder.requires_grad_(False)

    def __call__(self, images: ImageSet) -> ImageSet:
        return replace(images, images=_in_batches(images, self._redrawn).to(images.device))

    def _redrawn(self, x: Tensor) -> Tensor:
        everything_visible = torch.zeros(len(x), self.autoencoder.tokens, device=x.device)
        return to_uint8(self.autoencoder(x, everything_visible, 0.0)[0])


def _in_batches(images: ImageSet, function: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(to_float(part)) for part in images.images.split(BATCH)])


class Evasion:
    """Knows the detector itself (white-box): moves each image down the gradient of its score, a few levels a pixel.

    Projected gradient descent (Madry et al. 2018) on whole levels: what is asked is what was computed. A score that
    draws its masks anew each time is descended in expectation (Athalye et al. 2018). Whoever holds the detector can do
    so much at least.

    Args:
        score: float [n, C, H, W] in [-1, 1] -> scores [n], differentiable; see `expected_score`.
        epsilon: the most levels, of 255, by which a pixel moves.
        steps: how many steps, the first of 2.5 epsilon / steps levels, the last of one.

    Attributes:
        moves: the levels of each step.

    Raises:
        ValueError: numbers that move nothing; in use, a score that is not one number an image, or has no gradient.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], epsilon: int = 16, steps: int = 20):
        if not (1 <= epsilon <= 255 and steps >= 1):
            raise ValueError(f"epsilon must be 1 to 255 levels, with 1 step or more, got {epsilon} and {steps}")
        self.score, self.epsilon = score, epsilon
        # Short ones in the end: noise of several levels on plain paper is seen.
        self.moves = [max(1, round(2.5 * epsilon / steps * (1 - number / steps))) for number in range(steps)]

    def __call__(self, images: ImageSet) -> ImageSet:
        parts = [self._moved(part.short()) for part in images.images.split(BATCH)]
        return replace(images, images=torch.cat(parts))

    def _moved(self, start: Tensor) -> Tensor:
        low, high = (start - self.epsilon).clamp_min(0), (start + self.epsilon).clamp_max(int(2 * LEVELS))
        levels = start
        for move in self.moves:
            levels = (levels - move * self._gradient(levels).sign().short()).clamp(low, high)
        return levels.to(torch.uint8)

    def _gradient(self, levels: Tensor) -> Tensor:
        x = to_float(levels).requires_grad_()
        scores = self.score(x)
        if tuple(scores.shape) != (len(x),) or not scores.requires_grad:
            raise ValueError(
                f"score must give {len(x)} images one differentiable number each, got {list(scores.shape)}"
                f"{'' if scores.requires_grad else ' without a gradient'}; for SAME take expected_score(detector)"
            )
        return torch.autograd.grad(scores.sum(), x)[0]


def expected_score(detector: SameDetector, passes: int = 2, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """The score of SAME or SamePlus as whoever holds the detector computes it, with gradients, for `Evasion`.

    They have its models, not the victim: the auxiliary model's prediction on the query takes the place of the answer.
    Nor do they count on the detector's masks, which can be changed: each call draws others (`passes` of SAME's, or a
    sweep of SamePlus's). Of SamePlus they descend the sum of the views' statistics, each measured in the scale of its
    tail, which has a slope where the p-values themselves have steps.

    Raises:
        ValueError: another detector, which needs a differentiable score of its own.
    """
    if isinstance(detector, SamePlus):
        return partial(_expected_surprise, detector, (seed_of(seed, "attacker's masks", call) for call in count()))
    if type(detector).score_received is not SameDetector.score_received:
        raise ValueError(f"{type(detector).__name__} is not SAME; give Evasion a differentiable score of its own")
    generator = torch.Generator(detector.mae.mask_token.device).manual_seed(seed_of(seed, "attacker's masks"))
    passes = passes if detector.settings.mask_ratio else 1  # at mask 0 nothing is drawn
    return partial(_expected_terms, detector, passes, generator)


def _expected_terms(detector: SameDetector, passes: int, generator: torch.Generator, x: Tensor) -> Tensor:
    r = d = 0.0
    answers = detector.auxiliary(x).softmax(1)
    for _ in range(passes):
        noise = torch.rand(len(x), detector.mae.tokens, generator=generator, device=x.device)
        reconstruction, _ = detector.mae(x, noise, detector.settings.mask_ratio)
        r = r + reconstruction_error(x, reconstruction)
        d = d + deviation(answers, detector.auxiliary(reconstruction).softmax(1))
    return detector.combine(Terms(r / passes, d / passes))


def _expected_surprise(detector: SamePlus, seeds: Iterator[int], x: Tensor) -> Tensor:
    masks = complementary_masks(detector.mae.tokens, detector.settings.mask_ratio, next(seeds))
    look = detector.complete(Sweep(detector.mae, x, detector.auxiliary(x).softmax(1)).show(masks))
    panel = detector.panel
    return sum(panel.tails[name].excesses(view(look)) for name, view in panel.views.items())
