"""Views: what SAME's models say of a query beyond the two terms of the paper's score, and SamePlus, which combines them.

The paper averages the squared residual of a reconstruction over all pixels. Its *profile*, where on the image the
residual is large, says more, and the same models offer further views: what the encoder makes of the query, how sure the
victim is, how unlike the benign ones the auxiliary model's features are. Each view gets a p-value of its own, and the
detector's score combines these.

Mahalanobis distances of latent vectors were proposed by Denouden et al. (2018), of residuals as MaRS by Di Salvo et al.
(2026), nearest neighbours of features by Sun et al. (2022), the doubt of a classifier by Hendrycks and Gimpel (2017);
Magesh et al. (2023) combine conformal p-values of several scores. All references are benign images that trained nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from samelib.data.image_set import ImageSet
from samelib.detectors.base import check_fpr
from samelib.detectors.same import BATCH, SameDetector, deviation
from samelib.models.classifiers import Classifier
from samelib.models.mae import patchify, unpatchify, visible_count
from samelib.presets import SameSettings
from samelib.store import ArtifactStore
from samelib.training import autocast, seed_of

COMBINATIONS = ("minimum", "cauchy", "fisher")
FEWEST = 100  # calibration images below which neither covariance nor tails mean anything
NEIGHBOURS = 5
PRIOR = 10  # images: a class that the victim seldom answers borrows so much from all classes together


class Look(NamedTuple):
    """What one sweep over queries [N] brings to light; T patches, K classes.

    Attributes:
        answers: the victim's probabilities [N, K].
        hidden, visible: mean squared residual of each patch [N, T]: over the passes that hide it, in the one that shows
            it.
        latent: [N, 2 width]: the encoder's class token and the mean of its patch tokens, both averaged over the passes.
        deviation: [N], of the auxiliary model's prediction on the mean reconstruction.
        features: [N, F], the auxiliary model's, of that reconstruction, of unit length.
        query: [N, F'], a classifier's features of the query itself, of unit length; [N, 0] where no view asks for them.
    """

    answers: Tensor
    hidden: Tensor
    visible: Tensor
    latent: Tensor
    deviation: Tensor
    features: Tensor
    query: Tensor


@lru_cache  # a detector asks for its own with every batch
def complementary_masks(tokens: int, mask_ratio: float, seed: int) -> tuple[tuple[Tensor, int], ...]:
    """One random permutation of the patches, cut in about 1 / (1 - mask_ratio) parts: (noise [T], patches to keep) of
    the pass that shows each part, so that every patch is visible in exactly one pass."""
    passes = max(1, round(tokens / visible_count(tokens, mask_ratio)))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed_of(seed, "complementary masks")))
    masks = []
    for part in order.tensor_split(passes):
        noise = torch.ones(tokens)
        noise[part] = 0.0
        masks.append((noise, len(part)))
    return tuple(masks)


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
}
# Each is, of all sets of views and combinations, the one with the largest mean of AUROC and share caught at 5 %: on
# glyphs (proxy, outliers, JBDA) and MNIST against KMNIST, before EMNIST was looked at; and on CIFAR-10 against Tiny
# ImageNet and JBDA, before CIFAR-100 was. Photographs are reconstructed too badly for the digits' views to help.
CHOSEN = {"grey": ("error", "deviation", "trace", "doubt"), "colour": ("visible profile, both sides", "query features")}
COMBINATION = "fisher"


def chosen_views(image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The views of `SamePlus` for images (C, H, W)."""
    return CHOSEN["colour" if image_shape[0] == 3 else "grey"]


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


class SamePlus(SameDetector):
    """SAME's autoencoder and auxiliary model, asked for several views of each query (see `VIEWS`) in place of eq. 6.

    It shares SAME's trained models through the store, and needs what SAME needs: benign images and the victim's answers.

    Args:
        settings, seed: as for SameDetector; `mask_ratio` says how many complementary passes there are, and `passes`,
            `alpha` and `scale` are not used.
        views: names from `VIEWS`; by default the `chosen_views` of the images that it is fitted to.
        combination: one of `COMBINATIONS`.

    Raises:
        ValueError: an unknown view or combination, or a mask ratio below 1/2: with one pass no patch would ever be hidden.
    """

    kind = "same-plus"

    def __init__(
        self,
        settings: SameSettings,
        seed: int = 0,
        views: Iterable[str] | None = None,
        combination: str = COMBINATION,
    ):
        super().__init__(settings, seed)
        names = None if views is None else tuple(views)
        if settings.mask_ratio < 0.5:
            raise ValueError(f"complementary masks need a mask_ratio of 0.5 or more, got {settings.mask_ratio}")
        if names is not None and (not names or set(names) - set(VIEWS)):
            raise ValueError(f"views must be some of {', '.join(VIEWS)}, got {', '.join(names) or 'none'}")
        if combination not in COMBINATIONS:
            raise ValueError(f"combination must be one of {', '.join(COMBINATIONS)}, got {combination!r}")
        self.combination = combination
        self._scores: Tensor | None = None
        self._given = names is not None
        self._take(names or ())

    def _take(self, names: Iterable[str]) -> None:
        """Makes these views, unfitted."""
        self.views = nn.ModuleDict({name: VIEWS[name]() for name in names})
        self.tails = nn.ModuleDict({name: view.tail() for name, view in self.views.items()})

    def fit(self, images: ImageSet, calibration: ImageSet, victim, *, store=None, fpr: float = 0.05) -> "SamePlus":
        """Trains autoencoder and auxiliary model as SAME does (or reads them from the store), then fits the views.

        The calibration set is cut in three: two fifths are the views' references, one fifth gives each view its
        p-values, and two fifths the threshold and the p-values of the combination, which is fixed before it sees them.

        Raises:
            ValueError: images that do not fit together, or too few for the covariances or the rate.
            ArtifactError: the store cannot be written.
        """
        self.check_calibration(len(calibration), fpr)
        if not self._given:
            self._take(chosen_views(images.image_shape))
        reference, tails, threshold = calibration.split(*_parts(len(calibration)))
        self._learn(images, calibration, victim, store or ArtifactStore())
        look = self.look(reference.pixels())
        for view in self.views.values():
            view.fit(look)
        look = self.look(tails.pixels())
        for name, view in self.views.items():
            self.tails[name].fit(view(look))
        return self.calibrate(threshold.pixels(), fpr)

    @staticmethod
    def check_calibration(count: int, fpr: float) -> None:
        """Raises ValueError where so many calibration images are too few for the views or the rate."""
        if count < FEWEST:
            raise ValueError(
                f"the views need {FEWEST} calibration images or more, got {count}; give more benign images, or take SAME as "
                "the paper has it (SameDetector, --method same)"
            )
        check_fpr(fpr, _parts(count)[2])

    def look(self, x: Tensor, answers: Tensor | None = None) -> Look:
        """One sweep of complementary masks over images [N, C, H, W]; arguments and errors as for `score`."""
        return self._look(self._received(x), answers)

    def _look(self, x: Tensor, answers: Tensor | None) -> Look:
        device = self.mae.mask_token.device
        answers = self.victim(x) if answers is None else answers
        batches = zip(x.split(BATCH), answers.split(BATCH), strict=True)
        masks = complementary_masks(self.mae.tokens, self.settings.mask_ratio, self.seed)
        with torch.inference_mode():
            looks = [self.sweep(images.to(device), rows.to(device), masks) for images, rows in batches]
        return Look(*(torch.cat(column) for column in zip(*looks, strict=True)))

    def sweep(self, x: Tensor, answers: Tensor, masks: Sequence[tuple[Tensor, int]]) -> Look:
        """The look at one batch of images [n, C, H, W] on the 8-bit grid under these masks (see `complementary_masks`),
        with gradients where they are wanted."""
        s, mae = self.settings.mae, self.mae
        target = patchify(x, s.patch)
        visible = hidden = latent = mean = 0.0
        for noise, keep in masks:
            with autocast(x.device):
                tokens, mask, ids_restore = mae.forward_encoder(x, keep, noise.to(x.device).expand(len(x), -1))
                patches = mae.forward_decoder(tokens, ids_restore)
            residual, mask = (target - patches.float()).square().mean(2), mask.float()
            visible = visible + residual * (1 - mask)
            hidden = hidden + residual * mask / (len(masks) - 1)
            latent = latent + torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1).float() / len(masks)
            mean = mean + patches.float() / len(masks)
        with autocast(x.device):
            features = self.auxiliary.features(unpatchify(mean, s.patch, mae.image_shape))
            prediction = self.auxiliary.head(features).float().softmax(1)
            query = self._onlooker.features(x) if "query features" in self.views else features[:, :0]
        features, query = (nn.functional.normalize(f.float(), dim=1) for f in (features, query))
        return Look(answers, hidden, visible, latent, deviation(answers, prediction), features, query)

    @property
    def _features_of(self) -> str | None:
        """Whose features of the query are looked at, "victim" or "auxiliary"; None where no view asks for them."""
        if "query features" not in self.views:
            return None
        return "victim" if self._onlooker is self.victim.model else "auxiliary"

    @property
    def _onlooker(self) -> nn.Module:
        """Whose features of the query are looked at: the victim's own where it is a classifier of ours, which knows the
        most of the service's images; or the auxiliary model's."""
        model = self.victim.model
        return model if isinstance(model, Classifier) else self.auxiliary

    def surprises(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """Minus the logarithm of each view's p-value, float64 [N, V], in the order of `self.views`."""
        return self.surprises_of(self.look(x, answers))

    def surprises_of(self, look: Look) -> Tensor:
        """The surprises of a look that was taken already."""
        return torch.stack([self.tails[name](view(look)) for name, view in self.views.items()], dim=1)

    def seen_by(self, x: Tensor, answers: Tensor | None = None) -> list[str]:
        """The view to which each query looks strangest, whether it is flagged or not."""
        names = tuple(self.views)
        return [names[i] for i in self.surprises(x, answers).argmax(1)]

    def explain(self, x: Tensor) -> dict[str, Tensor]:
        """The scores [N] of images, and the p-value [N] of each view."""
        surprises = self.surprises(x)
        p_values = dict(zip(self.parts, (-surprises).exp().unbind(1), strict=True))
        return {"score": combined(surprises, self.combination)} | p_values

    @property
    def parts(self) -> tuple[str, ...]:
        """Of a score, as `explain` names them: "p_trace" and its kin."""
        return tuple(f"p_{name}" for name in self.views)

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        return combined(self.surprises_of(self._look(x, answers)), self.combination)

    def _remember(self, benign: Tensor) -> None:
        self._scores = self.score(benign)

    @property
    def calibration_scores(self) -> Tensor | None:
        return self._scores

    def _fitted_state(self) -> tuple[dict[str, Tensor], dict]:
        modules = {"views": self.views, "tails": self.tails}
        tensors = {f"{prefix}.{name}": t for prefix, m in modules.items() for name, t in m.state_dict().items()}
        card = {"views": list(self.views), "combination": self.combination, "features_of": self._features_of}
        return tensors | {"scores": self._scores}, card

    def _restore(self, tensors: dict[str, Tensor], card: dict) -> None:
        if self._features_of != card.get("features_of"):
            raise ValueError(
                f"the view query features was fitted to features of the {card['features_of']} model, and with this victim "
                f"would read those of the {self._features_of} one; load it with the victim that it was fitted beside"
            )
        for name, value in tensors.items():
            kind, *path = name.split(".")
            if kind in ("views", "tails"):
                module = getattr(self, kind).get_submodule(".".join(path[:-1]))
                module.register_buffer(path[-1], value)
        self._scores = tensors["scores"]

    @classmethod
    def _from_card(cls, card: dict) -> "SamePlus":
        return cls(SameSettings.from_card(card["settings"]), card["seed"], card["views"], card["combination"])


def _parts(count: int) -> tuple[int, int, int]:
    """How many calibration images are references, give the tails, and give the threshold."""
    fifth = count // 5
    return 2 * fifth, fifth, count - 3 * fifth
