"""What there is to measure: the names of a cell, and the cells that each of the paper's tables and figures is made of."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import pandas as pd

from reproduction.author_code import ALL_FAULTS, FAULTS
from samelib.data.groups import COLOUR, SOURCES, sizes_of
from samelib.detectors.controls import CONTROLS
from samelib.detectors.posthoc import METHODS
from samelib.presets import TIERS, Preset, preset
from samelib.responses import BanAccount, ProofOfWork, Reject, Response
from samelib.training import TrainSettings


class DetectorVariant(NamedTuple):
    """What watches the queries, or "none".

    Attributes:
        detector: "same", "same_plus", "outlier_exposure", "edm", "prada", one of `METHODS` or `CONTROLS`, or "none".
        scoring: of SAME: "passes" (several masked passes, averaged) or "mask 0" (as the authors' code scores); of SamePlus
            "passes", or "every view" (fitted and read, beside those that it combines).
        width: of SAME: the autoencoder's embedding size; None: the tier's own.
        autoencoder: of SAME: `VIT_TINY`, the paper tier's autoencoder with its training; None: the tier's own.
        seen: of SAME: images that the training of the autoencoder sees in all; None: the tier's own.
        shared_trunk: of SAME: its auxiliary model sits on the victim's frozen trunk.
        fault: of SAME: one of the released code's `FAULTS`, `ALL_FAULTS`, or "none".
        architecture: of the victim; None: the tier's own.
    """

    detector: str = "same"
    scoring: str = "passes"
    width: int | None = None
    autoencoder: str | None = None
    seen: int | None = None
    shared_trunk: bool = False
    fault: str = "none"
    architecture: str | None = None

    def __str__(self) -> str:
        words = [f"victim, {self.architecture}" if self.architecture else self.detector]
        words += [self.scoring] if self.scoring != "passes" else []
        words += [f"width {self.width}"] if self.width else []
        words += [self.autoencoder] if self.autoencoder else []
        words += [f"{self.seen:,} images seen"] if self.seen else []
        words += ["shared trunk"] if self.shared_trunk else []
        words += [self.fault] if self.fault != "none" else []
        return ", ".join(words)


SAME, SAME_MASK_0 = DetectorVariant(), DetectorVariant(scoring="mask 0")
SAME_SHARED = DetectorVariant(shared_trunk=True)
SAME_PLUS = DetectorVariant("same_plus")
EVERY_VIEW = DetectorVariant("same_plus", "every view")
OUTLIER_EXPOSURE, EDM, PRADA = (DetectorVariant(name) for name in ("outlier_exposure", "edm", "prada"))
BASELINES = (OUTLIER_EXPOSURE, EDM)
STEMS = tuple(DetectorVariant("none", architecture=a) for a in ("resnet18", "resnet18-imagenet"))  # of "ResNet-18"


VIT_TINY = "ViT-Tiny"


class AttackVariant(NamedTuple):
    """Who asks: an attack of samelib by its name, "outliers" (Knockoff with the outlier set for a proxy set), or "benign"
    (honest users).

    Attributes:
        attack: or "in-distribution" (Knockoff with benign images) or "white-box" (with images moved down the gradient of
            the detector's score): whoever knows everything of the data, or of the detector.
        step, direction, clip, where: of JBDA, in [-1, 1]; None for the others.
        reward, clusters: of adaptive Knockoff; None: samelib's own.
        share: of benign queries, where they are mixed in.
        labels: None: probabilities, or "hard".
        epsilon: of "white-box", in levels.
        change: of "benign": what another camera or program does to the images.
    """

    attack: str | None = None
    step: float | None = None
    direction: str | None = None
    clip: bool | None = None
    where: str | None = None
    reward: str | None = None
    clusters: int | None = None
    share: float | None = None
    labels: str | None = None
    epsilon: int | None = None
    change: str | None = None

    @property
    def options(self) -> dict:
        """What the attack's constructor is told."""
        return {name: value for name, value in self._asdict().items() if name != "attack" and value is not None}

    def __str__(self) -> str:
        words = ["knockoff, adaptive" if self.attack == "adaptive-knockoff" else str(self.attack)]
        if self.direction is not None and self.direction != "+":
            words.append("targeted" if self.direction == "targeted" else f"direction {self.direction}")
        words += [f"step {self.step:g}"] if self.step not in (None, 0.1) else []
        words += ["unclipped"] if self.clip is False else []
        words += [f"in {self.where}"] if self.where else []
        words += [f"{self.clusters} clusters"] if self.clusters else []
        words += [f"paid by {self.reward}"] if self.reward else []
        words += [f"{self.share:.0%} benign"] if self.share is not None else []
        words += [f"{self.labels} labels"] if self.labels else []
        words += [f"{self.epsilon} levels"] if self.epsilon else []
        words += [self.change] if self.change else []
        return ", ".join(words)


def _jbda(step: float = 0.1, direction: str = "+", clip: bool = True) -> AttackVariant:
    return AttackVariant("jbda", step, direction, clip)


BENIGN, NOISE, KNOCKOFF, OUTLIERS, ADAPTIVE, DFME = map(
    AttackVariant, ("benign", "noise", "knockoff", "outliers", "adaptive-knockoff", "dfme")
)
JBDA, UNCLIPPED_JBDA = _jbda(), _jbda(clip=False)
NEAREST_JBDA = _jbda(0.2, "-")  # the choice that comes nearest to the paper's figures, seeds left out
# Honest users whose images come from elsewhere than those that the service was calibrated on.
CHANGES = ("shifted by a pixel", "turned by 10 degrees", "JPEG of quality 75", "a fifth darker")
HONEST = (BENIGN, *(BENIGN._replace(change=change) for change in CHANGES))
HEADLINES = (KNOCKOFF, JBDA, NEAREST_JBDA, DFME)
# The paper's three attacks, what it leaves open about them (chapters 5 and 6), and noise.
VARIANTS = (
    NOISE,
    KNOCKOFF,
    ADAPTIVE,
    JBDA,
    _jbda(0.2),
    _jbda(direction="-"),
    NEAREST_JBDA,
    _jbda(direction="targeted"),
    DFME,
)


# Attackers who know that somebody looks (chapter 11), by how much they know; the others beside them are who does not.
PREPROCESSED, FILTERED, PURIFIED, BARGAIN, SELF_TRAINED = (
    AttackVariant(f"knockoff-{how}") for how in ("preprocessed", "filtered", "purified", "bargain", "self-trained")
)
REFUSALS, BITS = (AttackVariant("adaptive-knockoff", reward=reward, clusters=20) for reward in ("answered", "bits"))
MIXED = tuple(AttackVariant("knockoff-mixed", share=share) for share in (0.5, 0.9))
INK_JBDA = JBDA._replace(where="ink")
IN_DISTRIBUTION, WHITE_BOX = AttackVariant("in-distribution"), AttackVariant("white-box", epsilon=32)
KNOWING = (
    KNOCKOFF,
    PREPROCESSED,
    FILTERED,
    PURIFIED,
    REFUSALS,
    *MIXED,
    SELF_TRAINED,
    SELF_TRAINED._replace(labels="hard"),
    IN_DISTRIBUTION,
    JBDA,
    INK_JBDA,
    WHITE_BOX,
)


def label_of(fields: dict) -> str | None:
    """The queries of a row in words: "jbda, direction -, step 0.2, seeds left out"; None where nobody asked."""
    if fields["attack"] is None:
        return None
    variant = AttackVariant(*(fields[name] for name in AttackVariant._fields))
    return f"{variant}, seeds left out" if fields["seeds"] == "left out" else str(variant)


@dataclass(frozen=True)
class Cell:
    """One measurement; everything it needs follows from these names.

    Attributes:
        experiment: "detection", "accounts", "cost" (what a defence costs before the first query), "curve" (reconstruction
            error over the epochs of the autoencoder), "responses", "adaptive" or "bans".
        attack: None for cost and curve.
        budget: queries of the attack, or of honest users.
        response: a key of `RESPONSES` or `ALL_RESPONSES`; None where it is not asked about.
        transport: "gateway" or "http".
        accounts: among which the queries are dealt out in turn.
    """

    experiment: str
    group: str
    tier: str
    seed: int
    detector: DetectorVariant = SAME
    attack: AttackVariant | None = None
    budget: int = 0
    response: str | None = None
    transport: str = "gateway"
    accounts: int = 1

    def __str__(self) -> str:
        watched = ", ".join(filter(None, [str(self.detector), self.response]))
        where = " over HTTP" if self.transport == "http" else ""
        where += f" from {self.accounts} accounts" if self.accounts > 1 else ""
        asked = f"{self.attack}, {self.budget:,} queries{where}" if self.attack else self.experiment
        return f"{self.group} {self.tier}, seed {self.seed}: {watched} / {asked}"

    def fields(self) -> dict:
        """The fields of its row that differ from `DEFAULTS`."""
        values = {name: getattr(self, name) for name in ("experiment", "group", "tier", "seed")}
        values |= self.detector._asdict() | (self.attack or AttackVariant())._asdict()
        values |= {name: getattr(self, name) for name in ("budget", "response", "transport", "accounts")}
        return {name: value for name, value in values.items() if name not in DEFAULTS or value != DEFAULTS[name]}


# What a row means by a field that it does not have. `seeds`: JBDA's seed images count as its queries, or are left out.
DEFAULTS = DetectorVariant()._asdict() | AttackVariant()._asdict()
DEFAULTS |= {"budget": 0, "response": None, "transport": "gateway", "accounts": 1, "seeds": "in"}
del DEFAULTS["detector"]

# What is done about strange queries (the paper's Figure 4): in a gateway, and some also over real HTTP.
RESPONSES: dict[str, Response | None] = {
    "no response": None,
    "reject 1 %": Reject(0.01),
    "reject 5 %": Reject(0.05),
    "proof of work": ProofOfWork(),
}
OVER_HTTP = ("no response", "reject 5 %", "proof of work")
COARSE_WORK = "proof of work, steps of 5 bits"
WORK = ("proof of work", COARSE_WORK)
ALARM = "refuse from the alarm on"  # PRADA's, which watches accounts and decides on no single query
BAN, BAN_BY_STRANGENESS = "ban at 1 in 1,000", "ban at 1 in 1,000, by strangeness alone"
ALL_RESPONSES = RESPONSES | {COARSE_WORK: ProofOfWork(step=5), ALARM: None, BAN: BanAccount(delta=0.001)}
ALL_RESPONSES[BAN_BY_STRANGENESS] = BanAccount(delta=0.001, streams=("strangeness",))
# Attackers who know meet these at benign 1 and 5 %, and those where accounts are watched.
GUARDS = tuple(product((SAME_PLUS, SAME, SAME_MASK_0, *BASELINES), ("reject 1 %", "reject 5 %")))
BY_ACCOUNT = ((PRADA, ALARM), (SAME, BAN), (SAME_PLUS, BAN))


class Scale(NamedTuple):
    """What a tier decides here beyond samelib's preset.

    Attributes:
        widths: embedding sizes of the autoencoder that Figure 7 compares.
        curve_train, curve_images: the autoencoder's training for Figure 6; None: as the detector's own, on all images.
        small_budgets: are controls, and the variants of the attacks, measured at the small budget too?
        http_queries: of each user, sent to a live service.
        seen: the points of the scaling curve: the autoencoder, and how many images it has seen.
        adaptive_queries: of each attacker who knows.
        guards: the detectors and responses that they meet.
        knowing: who they are.
        accounts: among how many their queries are dealt out, where accounts are watched.
    """

    widths: tuple[int, ...]
    curve_train: TrainSettings | None = None
    curve_images: int | None = None
    small_budgets: bool = True
    http_queries: int = 100
    seen: tuple[tuple[str | None, int], ...] = ()
    adaptive_queries: int = 2_000
    guards: tuple[tuple[DetectorVariant, str], ...] = GUARDS
    knowing: tuple[AttackVariant, ...] = KNOWING
    accounts: tuple[int, ...] = (1, 10, 100, 1_000)


SCALES = {
    "smoke": Scale(
        (24, 48), small_budgets=False, http_queries=8, seen=((None, 1_000),), adaptive_queries=60,
        guards=((SAME, "reject 5 %"),), knowing=(KNOCKOFF, PREPROCESSED, REFUSALS, INK_JBDA), accounts=(10,),
    ),
    "lecture": Scale(
        (24, 48, 96),
        TrainSettings(12, 128, 3e-3, warmup=2 / 12),
        12_000,
        seen=(
            *((None, seen) for seen in (60_000, 240_000, 960_000, 3_840_000, 30_000_000)),
            *((VIT_TINY, seen) for seen in (960_000, 3_840_000)),
        ),
    ),
    "paper": Scale((48, 96, 192), adaptive_queries=3_000),
}  # fmt: skip


def image_shape_of(group: str) -> tuple[int, int, int]:
    """(C, H, W) of its pictures, known without loading them."""
    return (3, 32, 32) if group in COLOUR else (1, 28, 28)


def preset_of(group: str, tier: str) -> Preset:
    """samelib's settings for the pictures of that group; at smoke tier with shorter trainings, of which there are dozens."""
    p = preset(tier, image_shape_of(group))
    if tier != "smoke":
        return p
    brief = TrainSettings(seen=320, batch=32, lr=2e-3)
    same = replace(p.same, mae_train=replace(p.same.mae_train, epochs=2), auxiliary_train=brief)
    trainings = dict.fromkeys(("victim_train", "substitute_train", "round_train"), brief)
    return replace(p, same=same, budgets=(60, 90), dfme_budget=180, **trainings)


def budgets_of(frame: pd.DataFrame) -> tuple[int, int]:
    """The small and the large budget of these rows."""
    return preset_of(frame["group"].iloc[0], frame["tier"].iloc[0]).budgets


def width_variant(width: int, own: int) -> DetectorVariant:
    """SAME at that embedding size; the tier's own is SAME itself."""
    return SAME if width == own else DetectorVariant(width=width)


Plan = Iterator[dict]  # the names of cells, but for group, tier and seed


def _detection(detectors: Iterable, attacks: Iterable, budgets: Iterable[int], experiment: str = "detection") -> Plan:
    for detector, attack, budget in product(detectors, attacks, budgets):
        yield {"experiment": experiment, "detector": detector, "attack": attack, "budget": budget}


def _table(p: Preset, s: Scale) -> Plan:
    return _detection((SAME, SAME_MASK_0, *BASELINES), HEADLINES, p.budgets)


def _large(p: Preset, detectors: Iterable[DetectorVariant], attacks: Iterable[AttackVariant] = HEADLINES) -> Plan:
    return _detection(detectors, attacks, p.budgets[1:])


def _cost(detectors: Iterable[DetectorVariant]) -> Plan:
    return ({"experiment": "cost", "detector": detector} for detector in detectors)


def _defences(p: Preset, s: Scale) -> Plan:
    return _cost((SAME, *BASELINES, *(STEMS if p.architecture.startswith("resnet") else ())))


def _attacks(p: Preset, s: Scale) -> Plan:
    yield from _detection((SAME, SAME_MASK_0), VARIANTS, p.budgets if s.small_budgets else p.budgets[1:])
    yield from _detection((SAME, SAME_MASK_0), (DFME,), (p.dfme_budget,))


def _controls(p: Preset, s: Scale) -> Plan:
    return _detection(map(DetectorVariant, CONTROLS), HEADLINES, p.budgets if s.small_budgets else p.budgets[1:])


def _widths(p: Preset, s: Scale) -> Plan:
    return _large(p, [width_variant(width, p.same.mae.width) for width in s.widths])


def _sharing(p: Preset, s: Scale) -> Plan:
    yield from _large(p, (SAME, SAME_SHARED))
    yield from _cost((SAME, SAME_SHARED))


def _audit(p: Preset, s: Scale) -> Plan:
    faulty = [SAME_MASK_0._replace(fault=fault) for fault in ("none", ALL_FAULTS, *FAULTS)]
    return _large(p, faulty, (KNOCKOFF, JBDA, UNCLIPPED_JBDA, NEAREST_JBDA, DFME))


def _scaling(p: Preset, s: Scale) -> Plan:
    variants = [SAME, SAME_MASK_0, SAME_PLUS]
    points = [v._replace(autoencoder=name, seen=seen) for name, seen in s.seen for v in variants]
    return _large(p, points, (KNOCKOFF, JBDA, NEAREST_JBDA))


def _views(p: Preset, s: Scale) -> Plan:
    return _large(p, (SAME, EVERY_VIEW), (*HEADLINES, OUTLIERS))


def _responses(names: Iterable[str], transport: str) -> Callable[[Preset, Scale], Plan]:
    def cells(p: Preset, s: Scale) -> Plan:
        for name, cell in product(names, list(_detection((SAME,), (BENIGN, *HEADLINES), p.budgets[1:], "responses"))):
            yield cell | {"response": name, "transport": transport}

    return cells


def _adaptive(p: Preset, s: Scale) -> Plan:
    for detector, response in s.guards:
        attacks = [attack for attack in s.knowing if attack != WHITE_BOX or detector.detector in ("same", "same_plus")]
        yield from _met(s, detector, response, (BENIGN, *attacks))
    attacks = (KNOCKOFF, PREPROCESSED, MIXED[-1], IN_DISTRIBUTION, JBDA, INK_JBDA)
    for (detector, response), accounts in product(BY_ACCOUNT, s.accounts):
        yield from _met(s, detector, response, (BENIGN, *(a for a in attacks if a in s.knowing)), accounts)


def _bans(p: Preset, s: Scale) -> Plan:
    for cell in _detection((SAME, SAME_PLUS), (*HONEST, KNOCKOFF), (s.adaptive_queries,), "bans"):
        yield cell | {"response": BAN_BY_STRANGENESS}


def _prices(p: Preset, s: Scale) -> Plan:
    for response in WORK:
        yield from _met(s, SAME, response, (BENIGN, KNOCKOFF, PREPROCESSED, BITS, BARGAIN))


def _met(
    s: Scale, detector: DetectorVariant, response: str, attacks: Iterable[AttackVariant], accounts: int = 1
) -> Plan:
    for cell in _detection((detector,), attacks, (s.adaptive_queries,), "adaptive"):
        yield cell | {"response": response, "accounts": accounts}


class Target(NamedTuple):
    """A table or figure: what it is, its cells, and which part of a group's rows it is drawn from.

    A part is a file of its own, with rows of one MEASUREMENT: it is measured again without the others.
    """

    what: str
    cells: Callable[[Preset, Scale], Plan]
    part: str = ""


# Everything that `python -m reproduction run` knows. Figure 3 is a diagram, without measurements.
TARGETS: dict[str, Target] = {
    "table1": Target("detection on MNIST, three detectors, three attacks, two budgets", _table),
    "table2": Target("the same on CIFAR-10", _table),
    "table3": Target("accuracy and training time of the victim under each defence", _defences),
    "table4": Target("SAME at malicious ratios from 0.01 to 0.9", lambda p, s: _large(p, (SAME,))),
    "figure1": Target("score distributions: outlier exposure and SAME on Knockoff",
                      lambda p, s: _large(p, (SAME, OUTLIER_EXPOSURE), (KNOCKOFF,))),
    "figure2": Target("score distributions: JBDA without and with the auxiliary model",
                      lambda p, s: _large(p, (SAME, SAME_MASK_0), (JBDA, NEAREST_JBDA))),
    "figure4": Target("queries answered, and time spent on proof of work, by users and attackers",
                      _responses(RESPONSES, "gateway"), "responses"),
    "http": Target("Figure 4's response times over real HTTP", _responses(OVER_HTTP, "http"), "http"),
    "figure5": Target("SAME, SAME-X and SAME-Y", lambda p, s: _large(p, (SAME, SAME_MASK_0))),
    "figure6": Target("reconstruction error of four kinds of queries over the autoencoder's epochs",
                      lambda p, s: iter([{"experiment": "curve"}])),
    "figure7": Target("SAME-X at several embedding sizes", _widths),
    "alpha": Target("SAME at every weight alpha", lambda p, s: _large(p, (SAME, SAME_MASK_0))),
    "sharing": Target("the auxiliary model on the victim's trunk, or on its own", _sharing),
    "audit": Target("each fault of the released code alone", _audit),
    "views": Target("SamePlus, each of its views, and their combinations", _views, "views"),
    "scaling": Target("SAME and SamePlus against the images that the autoencoder has seen", _scaling, "scaling"),
    "posthoc": Target("scores that need no training, from pytorch-ood",
                      lambda p, s: _large(p, map(DetectorVariant, METHODS))),
    "controls": Target("what one line tells of a query, without a network; the queries of Tables 1, 2 and 4",
                       _controls, "controls"),
    "accounts": Target("PRADA against one account, ten and a hundred",
                       lambda p, s: _detection((PRADA,), HEADLINES, p.budgets[1:], "accounts")),
    "attacks": Target("every variant of every attack against SAME", _attacks),
    "adaptive": Target("attackers who know that somebody looks, in front of each detector", _adaptive, "adaptive"),
    "bans": Target("whom a ban by account strikes: honest users with another camera or file format, and thieves",
                   _bans, "bans"),
    "prices": Target("what such attackers pay where a puzzle says how strange a query looks", _prices, "adaptive"),
}  # fmt: skip


def check_names(group: str, tier: str, targets: Iterable[str]) -> None:
    """Raises ValueError for an unknown group, tier or target, or one that is not of this group."""
    if group not in SOURCES:
        raise ValueError(f"unknown group {group!r}; the grid knows {', '.join(SOURCES)}")
    if tier not in TIERS:
        raise ValueError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
    for target in targets:
        if target not in TARGETS and target != "all":
            raise ValueError(f"unknown table or figure {target!r}; known: {', '.join(TARGETS)}, all")
        if target in ("table1", "table2") and target != own_table(group):
            data = "mnist or glyphs" if target == "table1" else "cifar10 or shapes"
            raise ValueError(f"{target} is a table of --data {data}; for {group} take {own_table(group)}")


def own_table(group: str) -> str:
    """Which of the paper's first two tables is of this kind of pictures."""
    return "table2" if group in COLOUR else "table1"


def targets_of(group: str, targets: Iterable[str]) -> list[str]:
    """The targets that are meant, in the order of `TARGETS`; "all" is every one of this group."""
    other = {"table1": "table2", "table2": "table1"}[own_table(group)]
    return [t for t in TARGETS if t in targets or ("all" in targets and t != other)]


def cells_of(group: str, tier: str, seeds: Iterable[int], targets: Iterable[str]) -> list[Cell]:
    """Every cell of these targets, once, in the order in which nothing is trained twice.

    Raises:
        ValueError: see `check_names`.
    """
    check_names(group, tier, targets)
    p, s = preset_of(group, tier), SCALES[tier]
    plans = [names for target in targets_of(group, targets) for names in TARGETS[target].cells(p, s)]
    outliers = sizes_of(group, tier).outliers  # of embedded groups there are fewer than some budgets
    plans = [names for names in plans if names.get("attack") != OUTLIERS or names["budget"] <= outliers]
    cells = dict.fromkeys(Cell(group=group, tier=tier, seed=seed, **names) for seed in seeds for names in plans)
    order = list(dict.fromkeys((cell.seed, cell.detector) for cell in cells))  # a detector's cells lie together, the
    # curve's first: it watches the training of the autoencoder that the others find in the store
    return sorted(cells, key=lambda c: (order.index((c.seed, c.detector)), c.experiment != "curve"))
