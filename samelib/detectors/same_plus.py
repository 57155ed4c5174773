"""SamePlus: SAME's models, asked for several views of each query, and no longer than it takes to be sure.

Most queries of honest users look ordinary at once. A sweep can therefore stop early (as in BranchyNet, Teerapittayanon
et al. 2016): at each exit a small panel of views looks at what has been shown so far, and those queries leave that look
more ordinary to it than a share of benign ones. Whoever leaves is taken for benign: the exits never flag anybody, and as
the calibration images go through the same doors, p-values stay what they say.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from samelib.data.image_set import ImageSet
from samelib.detectors.base import check_fpr
from samelib.detectors.same import BATCH, SameDetector, deviation
from samelib.detectors.views import COMBINATION, FEWEST, VIEWS, Look, Panel, log_variance
from samelib.models.classifiers import Classifier
from samelib.models.mae import MaskedAutoencoder, patchify, unpatchify, visible_count
from samelib.presets import SameSettings
from samelib.store import ArtifactStore
from samelib.training import autocast, seed_of

Masks = Sequence[tuple[Tensor, int]]  # of a pass: its noise [T], and how many patches it shows


class Exit(NamedTuple):
    """Where a sweep may stop.

    Attributes:
        passes: after how many.
        views: that look at what these have shown.
        share: of benign queries that look ordinary enough to leave.
    """

    passes: int
    views: tuple[str, ...]
    share: float


# Each is, of all sets of views and combinations, the one with the largest mean of AUROC and share caught at 5 %: on
# glyphs (proxy, outliers, JBDA) and MNIST against KMNIST, before EMNIST was looked at; and on CIFAR-10 against Tiny
# ImageNet and JBDA, before CIFAR-100 was. Photographs are reconstructed too badly for the digits' views to help. A network
# that tells by how much a picture was turned (Hendrycks et al. 2019), trained as long as the victim, was not taken:
# against Tiny ImageNet it had an AUROC of 67.7 %, the victim's doubt 76.7 %, both together 76.5 % (one seed).
CHOSEN = {"grey": ("error", "deviation", "trace", "doubt"), "colour": ("visible profile, both sides", "query features")}
# Chosen on the same pairs of grey images: of a hundred proxy images 1.3 leave that all passes would have flagged, of benign
# images, outliers and JBDA's queries 0.3 at most. Of colour pictures all passes are looked at.
EXITS = {"grey": (Exit(0, ("pixels", "doubt"), 0.4), Exit(2, ("error", "trace", "doubt"), 0.75)), "colour": ()}
BEFORE_PASSES = ("pixels", "doubt")  # the views that need none
AT_THE_END = ("deviation", "features", "query features")  # the views that need all of them


def picture_kind(image_shape: tuple[int, int, int]) -> str:
    """The key of `CHOSEN` and `EXITS` for images (C, H, W)."""
    return "colour" if image_shape[0] == 3 else "grey"


@lru_cache  # a detector asks for its own with every batch
def complementary_masks(tokens: int, mask_ratio: float, seed: int) -> tuple[tuple[Tensor, int], ...]:
    """One random permutation of the patches, cut in about 1 / (1 - mask_ratio) parts, the smaller ones first: noise [T]
    and patches to keep of the pass that shows each part, so that every patch is visible in exactly one pass."""
    passes = max(1, round(tokens / visible_count(tokens, mask_ratio)))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed_of(seed, "complementary masks")))
    masks = []
    for part in reversed(order.tensor_split(passes)):
        noise = torch.ones(tokens)
        noise[part] = 0.0
        masks.append((noise, len(part)))
    return tuple(masks)


class Sweep:
    """Passes over one batch of images [N, C, H, W] under complementary masks, and what they have shown so far.

    With gradients where they are wanted.
    """

    def __init__(self, mae: MaskedAutoencoder, x: Tensor, answers: Tensor):
        self.mae, self.x, self.answers, self.patch = mae, x, answers, mae.settings.patch
        self.passes = 0
        self._target = patchify(x, self.patch)
        n, tokens, _ = self._target.shape
        self.visible, self.hidden, self._hidings = x.new_zeros(3, n, tokens)
        self._latent = x.new_zeros(n, 2 * mae.settings.width)
        self._patches = torch.zeros_like(self._target)
        self._pixels = torch.cat([log_variance(x, self.patch), self._target.mean(2)], 1)

    def show(self, masks: Masks) -> "Sweep":
        """Goes on with these passes; of few images several at once, as one batch."""
        at_once = max(1, BATCH // max(1, len(self.x)))
        for keep, group in groupby(masks, key=lambda mask: mask[1]):
            noises = torch.stack([noise for noise, _ in group]).to(self.x.device)
            for part in noises.split(at_once):
                self._show(part, keep)
        return self

    def _show(self, noises: Tensor, keep: int) -> None:
        k, n = len(noises), len(self.x)
        with autocast(self.x.device):
            tokens, mask, ids_restore = self.mae.forward_encoder(
                self.x.repeat(k, 1, 1, 1), keep, noises.repeat_interleave(n, 0)
            )
            patches = self.mae.forward_decoder(tokens, ids_restore)
        patches, mask = patches.float().unflatten(0, (k, n)), mask.float().unflatten(0, (k, n))
        latent = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1).float().unflatten(0, (k, n))
        residual = (self._target - patches).square().mean(3)
        self.visible = self.visible + (residual * (1 - mask)).sum(0)
        self.hidden = self.hidden + (residual * mask).sum(0)
        self._hidings = self._hidings + mask.sum(0)
        self._latent = self._latent + latent.sum(0)
        self._patches = self._patches + patches.sum(0)
        self.passes += k

    def __getitem__(self, which: Tensor) -> "Sweep":
        """This sweep over some of its images."""
        part = copy.copy(self)
        vars(part).update({name: v[which] for name, v in vars(self).items() if isinstance(v, Tensor)})
        return part

    @property
    def reconstruction(self) -> Tensor:
        """The mean of all passes' [N, C, H, W]."""
        return unpatchify(self._patches / self.passes, self.patch, self.mae.image_shape)

    def look(self) -> Look:
        """As far as it goes: see `Look`."""
        nothing = self._latent[:, :0]
        hidden, latent = self.hidden / self._hidings.clamp_min(1), self._latent / max(1, self.passes)
        return Look(self.answers, self._pixels, hidden, self.visible, latent, nothing, nothing, nothing)


class ExitPanel(Panel):
    """The views at an exit, and the score below which queries leave there.

    Args:
        exit: see `Exit`; its views are combined by Fisher's sum.
    """

    def __init__(self, exit: Exit):
        super().__init__(exit.views)
        self.exit = exit

    def fit(self, reference: Look, tails: Look) -> "ExitPanel":
        super().fit(reference, tails)
        self.register_buffer("gate", super().forward(tails).quantile(self.exit.share))
        return self

    def forward(self, look: Look) -> Tensor:
        """[N]: how far beyond the gate; who is not beyond it leaves, with this as their score."""
        return super().forward(look) - self.gate


class SamePlus(SameDetector):
    """SAME's autoencoder and auxiliary model, asked for several views of each query (see samelib.detectors.views) in
    place of eq. 6.

    It shares SAME's trained models through the store, and needs what SAME needs: benign images and the victim's answers.

    Args:
        settings, seed: as for SameDetector; `mask_ratio` says how many complementary passes there are, and `passes`,
            `alpha` and `scale` are not used.
        views: names from `VIEWS`; by default those `CHOSEN` for the kind of images that it is fitted to.
        combination: one of `COMBINATIONS`.
        exits: where its sweep may stop, earlier ones first; () for all passes over every query; by default `EXITS`.

    Raises:
        ValueError: an unknown view or combination; an exit out of order, without a share between 0 and 1, or with views
            that nothing is known of yet; or a mask ratio below 1/2: with one pass no patch would ever be hidden.
    """

    kind = "same-plus"

    def __init__(
        self,
        settings: SameSettings,
        seed: int = 0,
        views: Iterable[str] | None = None,
        combination: str = COMBINATION,
        exits: Sequence[Exit] | None = None,
    ):
        super().__init__(settings, seed)
        if settings.mask_ratio < 0.5:
            raise ValueError(f"complementary masks need a mask_ratio of 0.5 or more, got {settings.mask_ratio}")
        self._scores: Tensor | None = None
        self._given = None if views is None else tuple(views), combination, None if exits is None else tuple(exits)
        self._take("grey")

    def _take(self, kind: str) -> None:
        """Makes the panels, unfitted: those that were asked for, or those for this kind of pictures."""
        views, combination, exits = self._given
        self.panel = Panel(CHOSEN[kind] if views is None else views, combination)
        self.exits = nn.ModuleList(ExitPanel(exit) for exit in (EXITS[kind] if exits is None else exits))
        passes = [panel.exit.passes for panel in self.exits]
        if passes != sorted(set(passes)) or not all(0 < panel.exit.share < 1 for panel in self.exits):
            raise ValueError("exits must follow one another, each with a share above 0 and below 1")
        for panel in self.exits:
            possible = [v for v in (VIEWS if panel.exit.passes else BEFORE_PASSES) if v not in AT_THE_END]
            if set(panel.views) - set(possible):
                raise ValueError(
                    f"after {panel.exit.passes} passes an exit can look at {', '.join(possible)}, "
                    f"got {', '.join(panel.views)}"
                )

    @property
    def views(self) -> nn.ModuleDict:
        """The views by their names."""
        return self.panel.views

    def fit(self, images: ImageSet, calibration: ImageSet, victim, *, store=None, fpr: float = 0.05) -> "SamePlus":
        """Trains autoencoder and auxiliary model as SAME does (or reads them from the store), then fits the views.

        The calibration set is cut in three: two fifths are the views' references, one fifth gives each view its
        p-values and the exits their gates, and two fifths the threshold and the p-values of the score, which is fixed
        before it sees them.

        Raises:
            ValueError: images that do not fit together, or too few for the covariances or the rate.
            ArtifactError: the store cannot be written.
        """
        self.check_calibration(len(calibration), fpr)
        self._take(picture_kind(images.image_shape))
        reference, tails, threshold = calibration.split(*_parts(len(calibration)))
        self._learn(images, calibration, victim, store or ArtifactStore())
        looks = zip(self._looks(reference.pixels(), None), self._looks(tails.pixels(), None), strict=True)
        for panel, (benign, others) in zip((*self.exits, self.panel), looks, strict=True):
            panel.fit(benign, others)
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
        """A whole sweep of complementary masks over images [N, C, H, W]; arguments and errors as for `score`."""
        return self._looks(self._received(x), answers)[-1]

    def _looks(self, x: Tensor, answers: Tensor | None) -> list[Look]:
        """Of images that were checked and rounded, at each exit and at the end."""
        with torch.inference_mode():
            looks = [self._stages(*batch) for batch in self._batches(x, answers)]
        return [Look(*map(torch.cat, zip(*stage, strict=True))) for stage in zip(*looks, strict=True)]

    def _stages(self, x: Tensor, answers: Tensor) -> list[Look]:
        sweep, looks = Sweep(self.mae, x, answers), []
        for panel in self.exits:
            looks.append(sweep.show(self._masks(sweep.passes, panel.exit.passes)).look())
        return [*looks, self.complete(sweep.show(self._masks(sweep.passes)))]

    def _masks(self, start: int, stop: int | None = None) -> Masks:
        return complementary_masks(self.mae.tokens, self.settings.mask_ratio, self.seed)[start:stop]

    def complete(self, sweep: Sweep) -> Look:
        """The look at the end of a sweep, with what the classifiers make of it."""
        with autocast(sweep.x.device):
            features = self.auxiliary.features(sweep.reconstruction)
            prediction = self.auxiliary.head(features).float().softmax(1)
            query = self._onlooker.features(sweep.x) if "query features" in self.views else features[:, :0]
        features, query = (nn.functional.normalize(f.float(), dim=1) for f in (features, query))
        moved = deviation(sweep.answers, prediction)
        return sweep.look()._replace(deviation=moved, features=features, query=query)

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
        """Minus the logarithm of each view's p-value, float64 [N, V], in the order of `self.views`; of all passes."""
        return self.panel.surprises(self.look(x, answers))

    def seen_by(self, x: Tensor, answers: Tensor | None = None) -> list[str]:
        """The view to which each query looks strangest, whether it is flagged or not."""
        names = tuple(self.views)
        return [names[i] for i in self.surprises(x, answers).argmax(1)]

    def explain(self, x: Tensor) -> dict[str, Tensor]:
        """The scores [N] of images, and the p-value [N] of each view after all passes."""
        p_values = dict(zip(self.parts, (-self.surprises(x)).exp().unbind(1), strict=True))
        return {"score": self.score(x)} | p_values

    @property
    def parts(self) -> tuple[str, ...]:
        """Of a score, as `explain` names them: "p_trace" and its kin."""
        return tuple(f"p_{name}" for name in self.views)

    def score_received(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self._batch_scores(*batch) for batch in self._batches(x, answers)])

    def _batch_scores(self, x: Tensor, answers: Tensor) -> Tensor:
        sweep, left = Sweep(self.mae, x, answers), torch.arange(len(x), device=x.device)
        scores = torch.empty(len(x), dtype=torch.float64, device=x.device)
        for panel in self.exits:
            beyond = panel(sweep.show(self._masks(sweep.passes, panel.exit.passes)).look())
            scores[left] = beyond
            left, sweep = left[beyond > 0], sweep[beyond > 0]
            if not len(left):
                return scores
        scores[left] = self.panel(self.complete(sweep.show(self._masks(sweep.passes))))
        return scores

    def _remember(self, benign: Tensor) -> None:
        self._scores = self.score(benign)

    @property
    def calibration_scores(self) -> Tensor | None:
        return self._scores

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"views": self.panel.views, "tails": self.panel.tails, "exits": self.exits}

    def _fitted_state(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"{prefix}.{name}": t for prefix, m in self._modules.items() for name, t in m.state_dict().items()}
        card = {"views": list(self.views), "combination": self.panel.combination, "features_of": self._features_of}
        return tensors | {"scores": self._scores}, card | {"exits": [panel.exit for panel in self.exits]}

    def _restore(self, tensors: dict[str, Tensor], card: dict) -> None:
        if self._features_of != card.get("features_of"):
            raise ValueError(
                f"the view query features was fitted to features of the {card['features_of']} model, and with this victim "
                f"would read those of the {self._features_of} one; load it with the victim that it was fitted beside"
            )
        for name, value in tensors.items():
            kind, *path = name.split(".")
            if kind in self._modules:
                module = self._modules[kind].get_submodule(".".join(path[:-1]))
                module.register_buffer(path[-1], value)
        self._scores = tensors["scores"]

    @classmethod
    def _from_card(cls, card: dict) -> "SamePlus":
        exits = [Exit(passes, tuple(views), share) for passes, views, share in card["exits"]]
        return cls(SameSettings.from_card(card["settings"]), card["seed"], card["views"], card["combination"], exits)


def _parts(count: int) -> tuple[int, int, int]:
    """How many calibration images are references, give the tails, and give the threshold."""
    fifth = count // 5
    return 2 * fifth, fifth, count - 3 * fifth
