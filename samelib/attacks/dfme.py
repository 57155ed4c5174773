"""DFME, data-free model extraction (Truong et al. 2021): a generator invents images on which the copy is still wrong."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from samelib.attacks.base import Attack, Querier, answered
from samelib.precision import autocast
from samelib.presets import Preset
from samelib.training import TrainSettings, best_device, descend, make_optimiser, seed_of


class Generator(nn.Module):
    """Noise [N, Z] -> images before tanh [N, C, H, W]; the last normalisation keeps tanh out of saturation."""

    def __init__(self, image_shape: tuple[int, int, int], noise: int = 256, width: int = 64):
        super().__init__()
        channels, *self.size = image_shape
        self.start = (2 * width, self.size[0] // 4, self.size[1] // 4)
        self.linear = nn.Linear(noise, 2 * width * self.start[1] * self.start[2])
        self.first = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)
        )
        self.second = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels, affine=False),
        )  # fmt: skip
        self.normalise = nn.BatchNorm2d(2 * width)

    def forward(self, noise: Tensor) -> Tensor:
        x = self.normalise(self.linear(noise).unflatten(1, self.start))
        x = self.first(functional.interpolate(x, (self.size[0] // 2, self.size[1] // 2)))
        return self.second(functional.interpolate(x, self.size)).float()


def recover_logits(probabilities: Tensor) -> Tensor:
    """The logits [N, K] behind probabilities, up to a constant: log p less its mean over the classes."""
    logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return logits - logits.mean(1, keepdim=True)


def disagreement(logits: Tensor, answers: Tensor) -> Tensor:
    """[N]: the mean absolute difference of the substitute's logits [N, K] and those behind the answers [N, K]."""
    return (logits - recover_logits(answers)).abs().mean(1)


def estimate_gradient(
    loss: Callable[[Tensor], Tensor], x: Tensor, directions: int, epsilon: float, generator: torch.Generator
) -> Tensor:
    """The gradient of a loss that can only be asked, by forward differences in random directions on the sphere.

    g = (d / m) sum_i [L(x + eps u_i) - L(x)] / eps * u_i, with d the number of pixels.

    Args:
        loss: [n, C, H, W] -> [n]; asked once, with N (m + 1) images.
        x: [N, C, H, W].

    Returns:
        the gradient of each image's loss [N, C, H, W].
    """
    u = torch.randn(directions, *x.shape, generator=generator, device=x.device)
    u = u / u.flatten(2).norm(dim=2)[..., None, None, None]
    losses = loss(torch.cat([x[None], x + epsilon * u]).flatten(0, 1)).view(directions + 1, len(x))
    slopes = (losses[1:] - losses[0]) / epsilon
    return x[0].numel() / directions * (slopes[..., None, None, None] * u).sum(0)


def iterations(budget: int, batch: int, cost: int) -> tuple[list[int], int]:
    """How a budget is spent to the last query: the batch of each iteration, and how many images the last student step
    has on top.

    An iteration costs `cost` queries for each image of its batch, and has two images or more, which batch
    normalisation needs.
    """
    batches = []
    while budget >= 2 * cost:
        batches.append(min(batch, budget // cost))
        budget -= batches[-1] * cost
    return batches, budget


class DFME(Attack):
    """Generator against substitute: it looks for images on which the two models differ, the substitute learns them.

    An iteration is one step of the generator, whose gradient through the victim is estimated by forward differences,
    and several of the substitute: batch * (m + 1 + student_steps) queries, 1792 with the original's numbers. So the
    paper's budgets, 1,000 to 10,000, buy five full iterations at most.

    The substitute on the way is the same network at a higher learning rate, not what a smaller budget would have left.

    Args:
        architecture, seed: see `Attack`.
        settings: the substitute's optimiser and the batch; the learning rate follows its schedule over the budget. By
            default the lecture tier's `dfme_train`.
        student_steps: steps of the substitute for each step of the generator.
        directions: m, random directions of a gradient estimate.
        epsilon: length of the forward difference, at the point before tanh. The original's 1e-3 does not survive the
            rounding to 8 bits.
        noise: numbers a generated image starts from.
        width: channels of the generator's last but one layer, 64 in the original.
        generator_lr: Adam's, 1e-4 in the original.

    Raises:
        ValueError: a number that cannot be, or a batch of one image, which batch normalisation cannot take.
        FloatingPointError: in `run`, when the substitute diverges.
    """

    def __init__(
        self,
        architecture: str | None = None,
        settings: TrainSettings | None = None,
        seed: int = 0,
        *,
        student_steps: int = 5,
        directions: int = 1,
        epsilon: float = 1.0,
        noise: int = 256,
        width: int = 16,
        generator_lr: float = 1e-3,
    ):
        super().__init__(architecture, settings, seed)
        if settings is not None and settings.batch < 2:
            raise ValueError(f"DFME needs a batch of at least 2 images, got {settings.batch}")
        if min(student_steps, directions, noise, width) < 1:
            raise ValueError(
                "student_steps, directions, noise and width must be at least 1, "
                f"got {student_steps}, {directions}, {noise} and {width}"
            )
        if not (0 < epsilon < math.inf and 0 < generator_lr < math.inf):
            raise ValueError(f"epsilon and generator_lr must be positive and finite, got {epsilon} and {generator_lr}")
        self.student_steps, self.directions, self.epsilon = student_steps, directions, epsilon
        self.noise, self.width, self.generator_lr = noise, width, generator_lr

    @property
    def queries_per_image(self) -> int:
        """What one more image in the batch costs in an iteration: m + 1 for the generator, one a student step."""
        return self.directions + 1 + self.student_steps

    @property
    def smallest_round(self) -> int:
        return 2 * self.queries_per_image

    def tier_settings(self, tier: Preset) -> TrainSettings:
        return tier.dfme_train

    def steal(self, querier: Querier, points: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        training = AdversarialTraining(self, querier)
        batches, extra = iterations(querier.budget, training.settings.batch, self.queries_per_image)
        points, spent = [p for p in points if p < querier.budget], 0
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            cost = batch * self.queries_per_image
            training.schedule((spent + cost / 2) / querier.budget)  # the middle of the iteration: never a rate of 0
            training.generator_step(batch)
            training.student_steps(batch, extra if last else 0)
            spent += cost
            if not last and any(p <= spent for p in points):
                points = [p for p in points if p > spent]
                yield spent, training.student
        yield querier.budget, training.student.eval()


class AdversarialTraining:
    """The generator, the student (the substitute), their optimisers, and one step of each against the other."""

    def __init__(self, dfme: DFME, querier: Querier):
        self.dfme, self.querier = dfme, querier
        self.settings = dfme.train_settings(querier.image_shape)
        device = best_device()
        self.random = torch.Generator(device).manual_seed(seed_of(dfme.seed, "dfme noise"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(dfme.seed, "dfme generator"))
            self.generator = Generator(querier.image_shape, dfme.noise, dfme.width).to(device)
        self.student = dfme.build_substitute(querier.image_shape, querier.classes).to(device)
        self.generator_optimiser = torch.optim.Adam(self.generator.parameters(), dfme.generator_lr)
        self.student_optimiser = make_optimiser(self.student, self.settings)

    def schedule(self, spent: float) -> None:
        """Sets the student's learning rate after the share `spent` of the budget."""
        for group in self.student_optimiser.param_groups:
            group["lr"] = self.settings.lr * self.settings.lr_factor(spent)

    def invent(self, count: int) -> Tensor:
        """Images before tanh [count, C, H, W]."""
        noise = torch.randn(count, self.dfme.noise, generator=self.random, device=self.random.device)
        with autocast(noise.device):
            return self.generator(noise)

    def generator_step(self, count: int) -> None:
        """Moves the generator toward images on which the two disagree more; count * (m + 1) queries."""
        self.generator.train()
        self.student.eval()  # an image's loss must not depend on its batch
        x = self.invent(count)

        @torch.no_grad()
        def loss(x: Tensor) -> Tensor:
            images = x.tanh()
            return -disagreement(self.student(images), self.querier.ask(images))

        gradient = estimate_gradient(loss, x.detach(), self.dfme.directions, self.dfme.epsilon, self.random)
        gradient = gradient.nan_to_num(0)  # a difference with a refused query says nothing
        # The gradient of this with respect to x is the estimate.
        descend(self.generator_optimiser, (x * gradient).sum() / count)

    def student_steps(self, count: int, extra: int) -> None:
        """Moves the student toward the victim's answers on fresh inventions, `count` a step, `extra` more in the last.

        The generator rests meanwhile, so the images of all steps are invented and asked at once.
        """
        sizes = [count] * (self.dfme.student_steps - 1) + [count + extra]
        with torch.no_grad():
            images = self.invent(sum(sizes)).tanh()
        answers = self.querier.ask(images)
        self.student.train()
        for x, targets in zip(images.split(sizes), answers.split(sizes), strict=True):
            usable = answered(targets)
            if usable.sum() < 2:  # batch normalisation needs two
                continue
            with autocast(x.device):
                loss = disagreement(self.student(x[usable]).float(), targets[usable]).mean()
            descend(self.student_optimiser, loss)
            if not torch.isfinite(loss):
                raise FloatingPointError("DFME: the substitute's loss is no longer finite; lower its learning rate")
