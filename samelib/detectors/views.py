"""Views: what SAME's models say of a query beyond the two terms of the paper's score, and how several are combined.

The paper averages the squared residual of a reconstruction over all pixels. Its *profile*, where on the image the
residual is large, says more, and the same models offer further views: what the encoder makes of the query, how sure the
victim is, how unlike the benign ones the auxiliary model's features are. Each view gets a p-value of its own, and a
`Panel` combines several to one number; `SamePlus` is the detector made of them.

Mahalanobis distances of latent vectors were proposed by Denouden et al. (2018), of residuals as MaRS by Di Salvo et al.
(2026), nearest neighbours of features by Sun et al. (2022), the doubt of a classifier by Hendrycks and Gimpel (2017);
Magesh et al. (2023) combine conformal p-values of several scores. All references are benign images that trained nothing.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from samelib.models.mae import patchify

COMBINATIONS = ("minimum", "cauchy", "fisher")
COMBINATION = "fisher"
FEWEST = 100  # calibration images below which neither covariance nor tails mean anything
NEIGHBOURS = 5
PRIOR = 10  # images: a class that the victim seldom answers borrows so much from all classes together


class Look(NamedTuple):
    """What a sweep over queries [N] brings to light; T patches, K classes. A sweep that was not finished has zeros for
    patches that no pass has shown or hidden yet, and [N, 0] for what comes last.

    Attributes:
        answers: the victim's probabilities [N, K].
        pixels: [N, 2 T], what needs no model: the logarithm of each patch's variance, and its mean.
        hidden, visible: mean squared residual of each patch [N, T]: over the passes that hide it, in the one that shows
            it.
        latent: [N, 2 width]: the encoder's class token and the mean of its patch tokens, both averaged over the passes.
        deviation: [N], of the auxiliary model's prediction on the mean reconstruction.
        features: [N, F], the auxiliary model's, of that reconstruction, of unit length.
        query: [N, F'], a classifier's features of the query itself, of unit length; [N, 0] where no view asks for them.
    """

    answers: Tensor
    pixels: Tensor
    hidden: Tensor
    visible: Tensor
    latent: Tensor
    deviation: Tensor
    features: Tensor
    query: Tensor


class Tail(nn.Module):
    """p-values of a statistic against benign ones: their ranks, and beyond the largest tenth an exponential tail.

    Ranks alone would give all strange queries the same p-value, and a combination could not tell them apart.
    """

    def fit(self, statistics: Tensor) -> "Tail":
        ordered = statistics.double().sort().values
        start = ordered[int(0.9 * (len(ordered) - 1))].clone()  # safetensors refuses tensors that share memory
        excess = (ordered[ordered > start] - start).mean().nan_to_num(0.0).clamp_min(1e-12)
        for name, value in {"ordered": ordered, "start": start, "excess": excess}.items():
            self.register_buffer(name, value)
        return self

    def forward(self, statistics: Tensor) -> Tensor:
        """[N] -> minus the natural logarithm of the p-value [N]."""
        s = statistics.double()
        count = len(self.ordered)
        ranks = (1 + count - torch.searchsorted(self.ordered, s)) / (count + 1)
        at_start = (1 + count - torch.searchsorted(self.ordered, self.start)) / (count + 1)
        return torch.where(s > self.start, -torch.log(at_start) + self.excesses(s), -ranks.log())

    def excesses(self, statistics: Tensor) -> Tensor:
        """How far beyond the start of the tail, in its mean excesses [N]; below it, negative."""
        return (statistics.double() - self.start) / self.excess


class BothTails(nn.Module):
    """p-values of a statistic that may be too small as well as too large: twice the smaller of the two."""

    def __init__(self):
        super().__init__()
        self.high, self.low = Tail(), Tail()

    def fit(self, statistics: Tensor) -> "BothTails":
        self.high.fit(statistics)
        self.low.fit(-statistics)
        return self

    def forward(self, statistics: Tensor) -> Tensor:
        """[N] -> minus the natural logarithm of the p-value [N]."""
        either = torch.maximum(self.high(statistics), self.low(-statistics))
        return (either - math.log(2)).clamp_min(0)

    def excesses(self, statistics: Tensor) -> Tensor:
        """As `Tail.excesses`, of the tail that is nearer."""
        return torch.maximum(self.high.excesses(statistics), self.low.excesses(-statistics))


# Views: a benign reference is remembered, then each look becomes one number, higher = stranger.


class View(nn.Module):
    """One way of looking: fitted to benign looks, it maps a look to statistics [N], higher = stranger. This one needs no
    reference: what it reads is the statistic.

    Attributes:
        tail: what makes p-values of its statistics.

    Args:
        read: look -> statistics [N], or vectors [N, D] where the kind of view says so.
    """

    tail: type[nn.Module] = Tail

    def __init__(self, read: Callable[[Look], Tensor]):
        super().__init__()
        self.read = read

    def fit(self, look: Look) -> "View":
        """Remembers benign images that trained nothing."""
        return self

    def forward(self, look: Look) -> Tensor:
        return self.read(look).double()

    def remember(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            self.register_buffer(name, value)


def class_means(values: Tensor, answers: Tensor) -> Tensor:
    """Mean of values [N, D] over the images that the victim gives each class -> [K, D], drawn towards the mean of all
    where there are few."""
    members = nn.functional.one_hot(answers.argmax(1), answers.shape[1]).to(values.dtype)  # [N, K]
    return (members.T @ values + PRIOR * values.mean(0)) / (members.sum(0)[:, None] + PRIOR)


class ByClass(View):
    """How far the logarithm of a positive statistic lies above its mean over benign images of the answered class, in
    standard deviations."""

    def fit(self, look: Look) -> "ByClass":
        values = self._values(look)
        means = class_means(values, look.answers)
        self.remember(means=means, deviation=(values - means[look.answers.argmax(1)]).std().clamp_min(1e-9))
        return self

    def _values(self, look: Look) -> Tensor:
        return self.read(look).double().clamp_min(1e-12).log()[:, None]

    def forward(self, look: Look) -> Tensor:
        return ((self._values(look) - self.means[look.answers.argmax(1)]) / self.deviation)[:, 0]


class Profile(View):
    """Mahalanobis distance of a vector to its mean over benign images of the answered class.

    One covariance for all classes, shrunk by Ledoit and Wolf's rule (scikit-learn).
    """

    def fit(self, look: Look) -> "Profile":
        values = self.read(look).double()
        means = class_means(values, look.answers)
        centred = values - means[look.answers.argmax(1)]
        precision = LedoitWolf(assume_centered=True).fit(centred.cpu().numpy()).precision_
        self.remember(means=means, precision=torch.from_numpy(precision).to(values.device))
        return self

    def forward(self, look: Look) -> Tensor:
        centred = self.read(look).double() - self.means[look.answers.argmax(1)]
        return ((centred @ self.precision) * centred).sum(1).clamp_min(0).sqrt()


class TwoSidedProfile(Profile):
    """A profile that may also lie too near to the mean: noise added to every pixel levels out what varies from one
    benign photograph to the next."""

    tail = BothTails


class Neighbours(View):
    """Distance of a vector to the `NEIGHBOURS`th nearest of the benign ones."""

    def fit(self, look: Look) -> "Neighbours":
        self.remember(reference=self.read(look).float())
        return self

    def forward(self, look: Look) -> Tensor:
        distances = torch.cdist(self.read(look).float(), self.reference)
        return distances.kthvalue(min(NEIGHBOURS, len(self.reference)), dim=1).values.double()


def log_patches(residual: Tensor) -> Tensor:
    """Residuals [N, T] -> logarithms; the floor is far below what an 8-bit image leaves."""
    return residual.clamp_min(1e-7).log()


def log_variance(x: Tensor, patch: int) -> Tensor:
    """The logarithm of the variance of the pixels of each patch [N, T]."""
    return log_patches(patchify(x, patch).var(2, correction=0))


def doubt(look: Look) -> Tensor:
    """How unsure the victim is [N]: one minus its largest probability."""
    return 1 - look.answers.double().amax(1)


def trace(look: Look) -> Tensor:
    """[N, T + 2 width]: where the visible patches are missed, and what the encoder makes of the query."""
    return torch.cat([log_patches(look.visible), look.latent], 1)


VIEWS: dict[str, Callable[[], View]] = {
    "error": lambda: ByClass(lambda look: look.hidden.mean(1)),
    "deviation": lambda: ByClass(lambda look: look.deviation),
    "hidden profile": lambda: Profile(lambda look: log_patches(look.hidden)),
    "visible profile": lambda: Profile(lambda look: log_patches(look.visible)),
    "visible profile, both sides": lambda: TwoSidedProfile(lambda look: log_patches(look.visible)),
    "latent": lambda: Profile(lambda look: look.latent),
    "trace": lambda: Profile(trace),
    "doubt": lambda: View(doubt),
    "features": lambda: Neighbours(lambda look: look.features),
    "query features": lambda: Profile(lambda look: look.query),
    "pixels": lambda: Profile(lambda look: look.pixels),
}


def combined(surprises: Tensor, combination: str) -> Tensor:
    """Scores [N] of the views' surprises [N, V], minus the logarithms of their p-values; higher = stranger.

    - "minimum": the smallest p-value decides: one view that sees something is enough (Tippett).
    - "cauchy": the mean of tan((1/2 - p) pi), on a scale of its asinh: nearly the minimum, but several small p-values
      count for more than one (Liu and Xie 2020).
    - "fisher": the sum of the surprises: all views count alike (Fisher).
    """
    if combination == "minimum":
        return surprises.amax(1)
    if combination == "fisher":
        return surprises.sum(1)
    p = (-surprises).exp().clamp(max=0.99)  # a p-value of 1 would outweigh everything
    near = torch.tan((0.5 - p) * math.pi)
    far = torch.exp(surprises.clamp(max=700)) / math.pi  # where tan has no digits left
    return torch.asinh(torch.where(p > 1e-9, near, far).mean(1))


class Panel(nn.Module):
    """Several views of one look, combined to one number.

    Args:
        names: of the views, from `VIEWS`.
        combination: one of `COMBINATIONS`.

    Raises:
        ValueError: no view, an unknown one, or an unknown combination.
    """

    def __init__(self, names: Iterable[str], combination: str = COMBINATION):
        super().__init__()
        names = tuple(names)
        if not names or set(names) - set(VIEWS):
            raise ValueError(f"views must be some of {', '.join(VIEWS)}, got {', '.join(names) or 'none'}")
        if combination not in COMBINATIONS:
            raise ValueError(f"combination must be one of {', '.join(COMBINATIONS)}, got {combination!r}")
        self.views = nn.ModuleDict({name: VIEWS[name]() for name in names})
        self.tails = nn.ModuleDict({name: view.tail() for name, view in self.views.items()})
        self.combination = combination

    def fit(self, reference: Look, tails: Look) -> "Panel":
        """Remembers looks at benign images that trained nothing: some for the views, others for their p-values."""
        for name, view in self.views.items():
            self.tails[name].fit(view.fit(reference)(tails))
        return self

    def surprises(self, look: Look) -> Tensor:
        """Minus the logarithm of each view's p-value, float64 [N, V]."""
        return torch.stack([self.tails[name](view(look)) for name, view in self.views.items()], dim=1)

    def forward(self, look: Look) -> Tensor:
        """Scores [N], higher = stranger."""
        return combined(self.surprises(look), self.combination)
