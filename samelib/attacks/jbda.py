"""JBDA, Jacobian-based dataset augmentation (Papernot et al. 2017): steal with a few real images and small steps."""

import math

import torch
from torch import Tensor, nn

from samelib.attacks.base import Querier, TransferAttack, TransferSet, answered
from samelib.attacks.disguise import ink_mask
from samelib.data.image_set import ImageSet, to_float, to_uint8
from samelib.training import TrainSettings, seed_of

DIRECTIONS = ("+", "-", "targeted")
PLACES = ("everywhere", "ink")
LEVEL = 2 / 255  # one of the 256 levels of an 8-bit image, in [-1, 1]
BATCH = 512


def jacobian_step(model: nn.Module, x: Tensor, labels: Tensor, step: float, clip: bool = True) -> Tensor:
    """clip(x + step * sign(dF_y / dx)): each image a step in the direction in which the model's probability of its
    label grows; against it where the step is negative.

    log F_y has the sign of the gradient of F_y, and no underflow.

    Args:
        x: float [N, C, H, W] in [-1, 1].
        labels: int64 [N].
        step: in units of x.
        clip: keep the pixels in [-1, 1].
    """
    x = x.detach().requires_grad_()
    log_probability = model(x).log_softmax(1).gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(log_probability, x)
    moved = (x + step * gradient.sign()).detach()
    return moved.clamp(-1, 1) if clip else moved


class JBDA(TransferAttack):
    """Repeats: ask the new images, train the substitute on all, add a changed copy of each image to be asked next.

    The set doubles every round: 200 seeds, 400, 800, ... 6400. Seeds count as queries, no copy is asked twice (two
    substitutes that agree take the same step), and a last round that would overspend is a random part of it. The
    substitute of each round begins anew.

    Args:
        seeds: the images that the attacker was given; their labels are not used.
        architecture, settings, seed, labels: see `TransferAttack`.
        step: lambda, the paper's 0.1; how far every pixel moves in a round.
        step_range: the range of pixel values in which `step` is meant. The paper does not say: a step of 0.1 in [0, 1]
            is one of 0.2 in [-1, 1].
        direction: "+" raises the probability of the class the victim named (as Papernot et al. write), "-" lowers it
            (as several public codes do), "targeted" raises that of another class, drawn at random.
        reservoir: the most new images a round, a uniform random part of all candidates (reservoir sampling, Papernot
            et al. 2016); None: no limit.
        round_settings: the substitute's training in each round; by default that of the last one.
        clip: False asks copies that left the range of pixels, as several public codes do; the service clamps them.
        where: "everywhere" as published; or "ink": only the stroke is touched, by an attacker who knows that noise on
            plain paper gives them away (see `ink_mask`).

    Raises:
        ValueError: no seeds, a step that changes no pixel, an unknown direction, a reservoir below 1, or no ink to touch.
    """

    def __init__(
        self,
        seeds: ImageSet,
        architecture: str | None = None,
        settings: TrainSettings | None = None,
        seed: int = 0,
        *,
        step: float = 0.1,
        step_range: tuple[float, float] = (-1, 1),
        direction: str = "+",
        reservoir: int | None = None,
        round_settings: TrainSettings | None = None,
        clip: bool = True,
        where: str = "everywhere",
        labels: str = "soft",
    ):
        super().__init__(architecture, settings, seed, labels=labels)
        if len(seeds) == 0:
            raise ValueError(f"JBDA needs seed images, the set {seeds.name} is empty")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be {', '.join(DIRECTIONS)}, got {direction!r}")
        if reservoir is not None and reservoir < 1:
            raise ValueError(f"the reservoir must hold at least 1 image, got {reservoir}")
        low, high = step_range
        if not high > low:
            raise ValueError(f"step_range must be (low, high), got {step_range}")
        self.step = step * 2 / (high - low)  # in [-1, 1]
        if not LEVEL / 2 <= self.step < math.inf:
            raise ValueError(
                f"a step of {step:g} in [{low:g}, {high:g}] changes no 8-bit image; take at least "
                f"{LEVEL / 2 * (high - low) / 2:.4f} (the paper's is 0.1; for steps downhill, direction='-')"
            )
        if where not in PLACES:
            raise ValueError(f"where must be {' or '.join(PLACES)}, got {where!r}")
        if where == "ink" and not ink_mask(seeds.images).any():
            raise ValueError(
                f"the seeds {seeds.name} are all plain paper, there is no ink to touch; use where='everywhere'"
            )
        self.seeds, self.direction, self.reservoir, self.clip = seeds, direction, reservoir, clip
        self.where = where
        self.round_settings = round_settings

    @property
    def smallest_round(self) -> int:
        return len(self.seeds)  # a smaller budget needs fewer seeds

    def collect(self, querier: Querier) -> TransferSet:
        images = self.seeds.images
        answers = querier.ask(images)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "jbda"))
        while len(images) < querier.budget:
            usable = answered(answers)  # an image without an answer has no class to step towards
            if not usable.any():
                querier.stopped = "the service refused every query"
                break
            substitute = self.train_substitute(images, answers, self.round_settings)
            candidates = self.augment(substitute, images[usable.to(images.device)], answers[usable], generator)
            received = to_uint8(candidates)
            fresh = unseen(received, images)
            if not len(fresh):
                querier.stopped = "every step ends at an image that was asked before"
                break
            most = min(self.reservoir or len(fresh), querier.budget - len(images))
            chosen = fresh[torch.randperm(len(fresh), generator=generator)[:most]].to(images.device)
            answers = torch.cat([answers, querier.ask(candidates[chosen])])
            images = torch.cat([images, received[chosen]])
        return TransferSet(images, answers)

    def augment(self, substitute: nn.Module, images: Tensor, answers: Tensor, generator: torch.Generator) -> Tensor:
        """A changed copy of every image, float [N, C, H, W]."""
        labels, step = answers.argmax(1), self.step
        if self.direction == "-":
            step = -step
        elif self.direction == "targeted":
            others = torch.randint(1, answers.shape[1], (len(labels),), generator=generator)
            labels = (labels + others.to(labels.device)) % answers.shape[1]
        parts = [
            jacobian_step(substitute, to_float(images[i].to(answers.device)), labels[i], step, self.clip)
            for i in torch.arange(len(images)).split(BATCH)
        ]
        moved = torch.cat(parts).to(images.device)
        return moved if self.where == "everywhere" else torch.where(ink_mask(images), moved, to_float(images))


def unseen(candidates: Tensor, images: Tensor) -> Tensor:
    """The indices [n] of those candidates that are neither among the images nor a second time among the candidates."""
    seen, fresh = {image.tobytes() for image in images.cpu().numpy()}, []
    for index, candidate in enumerate(candidates.cpu().numpy()):
        pixels = candidate.tobytes()
        if pixels not in seen:
            seen.add(pixels)
            fresh.append(index)
    return torch.tensor(fresh, dtype=torch.int64)
