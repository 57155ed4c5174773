"""One seed's victims, detectors and query logs: each is made once, and kept in the store for every cell that needs it."""

import warnings
from dataclasses import asdict, is_dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from reproduction.cells import ATTACK_VARIANTS, PROTOCOLS, SAME, SAME_MASK_0, SAME_SHARED, width_name
from reproduction.results import code_version
from reproduction.run import evaluation, evenly, make_attack, scoring_variants, victim_and_card
from samelib.attacks.base import Attack
from samelib.data.groups import load_group
from samelib.data.image_set import ImageSet, OutOfRangeWarning
from samelib.detectors.base import Detector
from samelib.detectors.edm import EDM
from samelib.detectors.outlier_exposure import OutlierExposure
from samelib.detectors.posthoc import METHODS, PostHoc
from samelib.detectors.same import SameDetector
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim
from samelib.presets import preset
from samelib.store import ArtifactStore
from samelib.training import best_device

KEPT = 20_000  # queries of a log that are kept for scoring, at even distances
OWN_VICTIM = {"outlier_exposure": OutlierExposure, "edm": EDM}


class Bench:
    """One seed's victim, detectors and query logs; each is made when it is first asked for."""

    def __init__(self, group: str, tier: str, seed: int, store: ArtifactStore | None = None):
        self.group = load_group(group, tier).to(best_device())
        self.settings = preset(tier, self.group)
        self.seed, self.store = seed, store or ArtifactStore()
        self.known: dict[tuple[str, str], tuple] = {}  # what is measured once for each detector and protocol
        self._detectors: dict[tuple[str, str], Detector] = {}

    @cached_property
    def plain(self) -> tuple[Victim, dict]:
        """The victim that no defence has touched, and the card of its training."""
        return self.victim_of(self.settings.architecture)

    def victim_of(self, architecture: str) -> tuple[Victim, dict]:
        """An undefended victim of that architecture, and its card."""
        return victim_and_card(self.group, replace(self.settings, architecture=architecture), self.seed, self.store)

    def victim(self, detector: str) -> Victim:
        """The victim that this detector stands in front of."""
        return self.detector(detector).victim if detector in OWN_VICTIM else self.plain[0]

    def detector(self, name: str, protocol: str = "fixed") -> Detector:
        """The fitted detector of that name."""
        key = name, protocol
        if key not in self._detectors:
            self._detectors[key] = self._fitted(name, protocol)
        return self._detectors[key]

    def _fitted(self, name: str, protocol: str) -> Detector:
        s = self.settings
        if name in OWN_VICTIM:
            detector = OWN_VICTIM[name](s.architecture, s.victim_train, self.seed, augment=s.augment)
            return detector.fit(self.group, self.store)
        if name in METHODS:
            return PostHoc(name).fit(self.group, self.plain[0], self.store)
        same = PROTOCOLS[protocol](self.same_settings(name))
        return SameDetector(same, self.seed).fit(self.group, self.plain[0], self.store)

    def same_settings(self, name: str):
        """Settings of SAME under one of its names."""
        s = self.settings.same
        mask_0, passes = scoring_variants(s).values()
        widths = {width_name(w): replace(passes, mae=replace(s.mae, width=w)) for w in self.settings.widths}
        names = {SAME: passes, SAME_MASK_0: mask_0, SAME_SHARED: replace(passes, share_backbone=True)}
        return (names | widths)[name]

    def attack(self, label: str) -> Attack:
        """The attack of that label, with what the group gives its attacker."""
        name, options = ATTACK_VARIANTS[label]
        return make_attack(name, self.group, self.settings, self.seed, **options)

    def log(self, victim: Victim, label: str, budget: int) -> tuple[Tensor, dict]:
        """What the attack asked of this victim, [N, C, H, W], and what its substitute is worth.

        An attack whose larger budget begins with the queries of the smaller is run once for both.
        """
        s = self.settings
        name, attack = ATTACK_VARIANTS[label][0], self.attack(label)
        once = name != "dfme" and budget in s.budgets
        budgets = s.budgets if once else (budget,)
        how = {k: _as_json(v) for k, v in vars(attack).items() if not isinstance(v, Tensor)}  # tensors are records
        spec = {"kind": "queries", "attack": name, "how": how, "budgets": budgets, "code": code_version(True)}
        spec |= {"victim": victim.fingerprint, "data": self.group.fingerprint}
        tensors, card = self.store.kept(spec, lambda _: self._attacked(attack, victim, label, budgets))
        return tensors["queries"][: budget if once else None], card["curve"][budgets.index(budget)]

    def _attacked(self, attack: Attack, victim: Victim, label: str, budgets: tuple[int, ...]):
        sent = _Sent() if label == "jbda, unclipped" else None
        gateway = QueryGateway(victim, budgets[-1], sent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutOfRangeWarning)  # "jbda, unclipped" is meant to leave the range
            result = attack.run(gateway, evaluation(victim, self.group.benign_test), budgets[:-1])
        if result.stopped:
            raise RuntimeError(
                f"{label}: stopped after {result.queries:,} of {budgets[-1]:,} queries, {result.stopped}"
            )
        queries = torch.cat(sent.queries) if sent else gateway.log.queries
        return {"queries": evenly(queries, KEPT)}, {"curve": result.curve}


class _Sent:
    """A scorer that scores nothing and keeps the queries as they were sent; the gateway's log has them as received."""

    def __init__(self):
        self.queries: list[Tensor] = []

    def score(self, x: Tensor, answers: Tensor) -> Tensor:
        self.queries.append(x)
        return torch.zeros(len(x))


def _as_json(value):
    """A setting of an attack as JSON."""
    if isinstance(value, ImageSet):
        return value.fingerprint
    return asdict(value) if is_dataclass(value) else value
