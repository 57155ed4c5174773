"""One seed's victims, detectors and query logs: each is made once, and kept in the store for every cell that needs it."""

import warnings
from dataclasses import asdict, is_dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from reproduction.author_code import AuthorCodeDetector
from reproduction.plan import SCALES, VIT_TINY, AttackVariant, DetectorVariant, preset_of
from samelib.attacks import Attack, make_attack
from samelib.data.groups import Group, load_group
from samelib.data.image_set import ImageSet, OutOfRangeWarning, to_float
from samelib.detectors.base import Detector
from samelib.detectors.controls import CONTROLS, Control
from samelib.detectors.edm import EDM
from samelib.detectors.outlier_exposure import OutlierExposure
from samelib.detectors.posthoc import METHODS, PostHoc
from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import SamePlus
from samelib.detectors.views import VIEWS
from samelib.gateway import QueryGateway
from samelib.metrics import accuracy
from samelib.models.classifiers import Victim
from samelib.presets import SameSettings, evaluation, preset, scoring_variants, victim_and_card
from samelib.store import ArtifactStore
from samelib.training import TrainSettings, best_device

KEPT = 20_000  # queries of a log that are kept for scoring, at even distances
WITH_OWN_VICTIM = {"outlier_exposure": OutlierExposure, "edm": EDM}


def group_of(name: str, tier: str) -> Group:
    """The images of a group as the lab uses them."""
    return trimmed(load_group(name, tier), tier)


def trimmed(group: Group, tier: str) -> Group:
    """At smoke tier few of a group's images, for every cell trains or scores on them; else all."""
    if tier != "smoke":
        return group
    few = {"victim_train": group.victim_train[:500], "benign_test": group.benign_test[:150], "seeds": group.seeds[:40]}
    return replace(group, **few)


class Bench:
    """One seed's victims, detectors and query logs; each is made when it is first asked for."""

    def __init__(self, group: str, tier: str, seed: int, store: ArtifactStore | None = None):
        whole = load_group(group, tier).to(best_device())
        self.group, self._benign = trimmed(whole, tier), whole.benign_test
        self.settings, self.scale = preset_of(group, tier), SCALES[tier]
        self.seed, self.store = seed, store or ArtifactStore()
        self.benign_readings: dict[DetectorVariant, tuple] = {}  # see reproduction.detection
        self._detectors: dict[DetectorVariant, Detector] = {}
        self._benign_scores: dict[DetectorVariant, Tensor] = {}
        self._accuracies: dict[Victim, float] = {}

    @cached_property
    def halves(self) -> tuple[ImageSet, ImageSet]:
        """The benign test set in two: honest users' queries, on which copies are measured; and what attackers hold who
        have benign images of their own."""
        half = len(self._benign) // 2
        return self.group.benign_test[:half], self._benign[half:]

    @cached_property
    def undefended(self) -> tuple[Victim, dict]:
        """The victim that no defence has touched, and the card of its training."""
        return self.victim_of(self.settings.architecture)

    def victim_of(self, architecture: str) -> tuple[Victim, dict]:
        """An undefended victim of that architecture, and its card."""
        return victim_and_card(self.group, replace(self.settings, architecture=architecture), self.seed, self.store)

    def victim(self, variant: DetectorVariant) -> Victim:
        """The victim that this detector stands in front of."""
        return self.detector(variant).victim if variant.detector in WITH_OWN_VICTIM else self.undefended[0]

    def accuracy(self, victim: Victim) -> float:
        """Of the victim on its test set."""
        if victim not in self._accuracies:
            test = self.group.benign_test
            self._accuracies[victim] = round(accuracy(victim(test.pixels()), test.labels), 6)
        return self._accuracies[victim]

    def detector(self, variant: DetectorVariant) -> Detector:
        """The fitted detector."""
        if variant not in self._detectors:
            self._detectors[variant] = self._fitted(variant)
        return self._detectors[variant]

    def _fitted(self, variant: DetectorVariant) -> Detector:
        s, group, name = self.settings, self.group, variant.detector
        images, calibration = group.victim_train, group.calibration
        if name in WITH_OWN_VICTIM:
            detector = WITH_OWN_VICTIM[name](s.architecture, s.victim_train, self.seed, augment=s.augment)
            return detector.fit(images, group.outliers, calibration, store=self.store)
        if name in METHODS:
            return PostHoc(name).fit(images, calibration, self.undefended[0])
        if name in CONTROLS:
            return Control(*CONTROLS[name]).fit(images, calibration, self.undefended[0])
        same = self.same_settings(variant)
        if name == "same_plus":
            views = VIEWS if variant.scoring == "every view" else None
            detector = SamePlus(same, self.seed, views, exits=())  # rows show what all passes see
        elif variant.fault != "none":
            detector = AuthorCodeDetector(same, variant.fault, self.seed)
        else:
            detector = SameDetector(same, self.seed)
        return detector.fit(images, calibration, self.undefended[0], store=self.store)

    def same_settings(self, variant: DetectorVariant) -> SameSettings:
        """Settings of SAME in that variant, without its fault."""
        mask_0, passes = scoring_variants(self.settings.same).values()
        same = mask_0 if variant.scoring == "mask 0" else passes
        source = preset("paper", self.group.image_shape).same if variant.autoencoder == VIT_TINY else same
        mae = replace(source.mae, width=variant.width or source.mae.width)
        train = trained_on(source.mae_train, variant.seen) if variant.seen else source.mae_train
        return replace(same, mae=mae, mae_train=train, share_backbone=variant.shared_trunk)

    def benign_scores(self, variant: DetectorVariant) -> Tensor:
        """The detector's scores of honest users' queries, the first of the `halves`."""
        if variant not in self._benign_scores:
            self._benign_scores[variant] = self.detector(variant).score(self.halves[0].pixels())
        return self._benign_scores[variant]

    def attack(self, variant: AttackVariant, **given) -> Attack:
        """The attack, with what the group gives its attacker; or what is `given` in its place."""
        name, options = variant.attack, variant.options | given
        if name == "outliers":
            name, options = "knockoff", options | {"proxy": self.group.outliers}
        return make_attack(name, self.group, self.settings, self.seed, self.store, **options)

    def log(self, victim: Victim, variant: AttackVariant, budget: int) -> tuple[Tensor, dict]:
        """What the attack asked of this victim, [N, C, H, W], and what its substitute is worth.

        An attack whose larger budget begins with the queries of the smaller is run once for both.

        Raises:
            RuntimeError: the attack stopped before it had spent its budget.
        """
        attack = self.attack(variant)
        once = variant.attack != "dfme" and budget in self.settings.budgets
        budgets = self.settings.budgets if once else (budget,)
        settings = {k: _as_json(v) for k, v in vars(attack).items() if not isinstance(v, Tensor)}  # tensors are records
        spec = {"kind": "queries", "attack": variant.attack, "settings": settings, "budgets": budgets}
        spec |= {"victim": victim.fingerprint, "data": self.group.fingerprint}
        tensors, card = self.store.get(spec, lambda _: self._attacked(attack, victim, variant, budgets))
        return tensors["queries"][: budget if once else None], card["curve"][budgets.index(budget)]

    def _attacked(self, attack: Attack, victim: Victim, variant: AttackVariant, budgets: tuple[int, ...]):
        gateway = RecordingGateway(victim, budgets[-1]) if variant.clip is False else QueryGateway(victim, budgets[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutOfRangeWarning)  # JBDA without clipping is meant to leave the range
            result = attack.run(gateway, evaluation(victim, self.group.benign_test), budgets[:-1])
        if result.stopped:
            raise RuntimeError(
                f"{variant}: stopped after {result.queries:,} of {budgets[-1]:,} queries, {result.stopped}"
            )
        queries = torch.cat(gateway.sent) if variant.clip is False else gateway.log.queries
        return {"queries": evenly(queries, KEPT)}, {"curve": result.curve}


def trained_on(settings: TrainSettings, seen: int) -> TrainSettings:
    """The same training on so many images in all; with larger batches where there would be more than 20,000 steps."""
    batch = settings.batch
    while seen / batch > 20_000:
        batch *= 2
    return replace(settings, epochs=None, seen=seen, batch=batch)


class RecordingGateway(QueryGateway):
    """Keeps the queries as they were sent; its log has them as they were received.

    Attributes:
        sent: float32 [n, C, H, W] each.
    """

    def __init__(self, victim: Victim, budget: int):
        super().__init__(victim, budget)
        self.sent: list[Tensor] = []

    def query(self, x: Tensor) -> Tensor:
        answers = super().query(x)
        self.sent.append(to_float(x) if x.dtype == torch.uint8 else x)
        return answers


def _as_json(value):
    """A setting of an attack as JSON."""
    if isinstance(value, ImageSet):
        return value.fingerprint
    return asdict(value) if is_dataclass(value) else value


def parts_of_log(variant: AttackVariant, positions: Tensor, seeds: int) -> dict[str, Tensor]:
    """What is measured of an attack's queries that stand at `positions` [N] in its log: masks [N].

    All of them ("in"); and of JBDA those that are not its seeds ("left out"): seeds are benign images, and no detector
    tells them apart.
    """
    parts = {"in": torch.ones_like(positions, dtype=torch.bool)}
    return parts | ({"left out": positions >= seeds} if variant.attack == "jbda" else {})


def evenly(queries: Tensor, most: int) -> Tensor:
    """At most `most` queries, at even distances over the whole log."""
    if len(queries) <= most:
        return queries
    return queries[torch.linspace(0, len(queries) - 1, most).long().to(queries.device)]
