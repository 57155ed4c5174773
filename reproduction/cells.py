"""The experiment grid: what a cell is, and which cells each of the paper's tables and figures is made of."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from samelib.data.groups import COLOUR, SOURCES
from samelib.detectors.posthoc import METHODS
from samelib.gateway import Policy
from samelib.presets import AUTHOR_CODE, FIXED, TIERS, Preset, SameSettings, preset_for
from samelib.responses import ProofOfWork, Reject


class Cell(NamedTuple):
    """One measurement; everything it needs follows from these names.

    Attributes:
        detector: SAME under one of its names, also with a response (`RESPONSES`), a baseline, or a victim alone (`STEMS`).
        protocol: "fixed", "author_code", or one of its faults alone (see `FAULTS`).
        attack: a key of `ATTACK_VARIANTS`; or `BENIGN` (honest users) where there is a response; or "cost" (what the
            defence itself costs) or "curve" (reconstruction error over the epochs of the autoencoder), without budget.
    """

    group: str
    tier: str
    seed: int
    detector: str
    protocol: str
    attack: str
    budget: int

    def __str__(self) -> str:
        where = f"{self.attack}, {self.budget:,} queries" if self.budget else self.attack
        protocol = "" if self.protocol == "fixed" else f" ({self.protocol})"
        return f"{self.group} {self.tier}, seed {self.seed}: {self.detector}{protocol} / {where}"


# The paper's three attacks, what it leaves open about them (chapters 5 and 6), and noise.
ATTACK_VARIANTS: dict[str, tuple[str, dict]] = {
    "noise": ("noise", {}),
    "knockoff": ("knockoff", {}),
    "knockoff, adaptive": ("adaptive-knockoff", {}),
    "jbda": ("jbda", {}),
    "jbda, step 0.2": ("jbda", {"step": 0.2}),
    "jbda, direction -": ("jbda", {"direction": "-"}),
    "jbda, direction -, step 0.2": ("jbda", {"direction": "-", "step": 0.2}),
    "jbda, targeted": ("jbda", {"direction": "targeted"}),
    "jbda, unclipped": ("jbda", {"clip": False}),
    "dfme": ("dfme", {}),
}
NEAREST_JBDA = "jbda, direction -, step 0.2"  # the choice that comes nearest to the paper's figures, seeds left out
HEADLINES = ("knockoff", "jbda", NEAREST_JBDA, "dfme")


def without_seeds(jbda: str) -> str:
    """The name in the rows of what a variant of JBDA asked beyond its seeds."""
    return f"{jbda}, seeds left out"


# SAME as it is scored by default (several masked passes), as the authors' code scores, and its variants.
SAME, SAME_MASK_0, SAME_SHARED = "same", "same, mask 0", "same, shared trunk"
BASELINES = ("outlier_exposure", "edm")


STEMS = {f"victim, {name}": name for name in ("resnet18", "resnet18-imagenet")}  # both readings of "ResNet-18"


def width_name(width: int) -> str:
    return f"same, width {width}"


# What is done about strange queries (the paper's Figure 4): in a gateway, and some also over real HTTP.
RESPONSES: dict[str, Policy | None] = {
    "no response": None,
    "reject 1 %": Reject(0.01),
    "reject 5 %": Reject(0.05),
    "proof of work": ProofOfWork(),
}
OVER_HTTP = ("no response", "reject 5 %", "proof of work")
BENIGN = "benign"
ASKERS = (BENIGN, *HEADLINES)


def response_name(response: str, http: bool = False) -> str:
    """SAME with that response at the door."""
    return f"same, {response}" + (", HTTP" if http else "")


def _fault(**switch) -> Callable[[SameSettings], SameSettings]:
    return lambda same: replace(same, protocol=replace(FIXED, **switch))


# Each fault of the released code alone, as a change of the settings of SAME at mask 0; chapter 9 explains them. The last
# one is in how its figures are computed.
FAULTS: dict[str, Callable[[SameSettings], SameSettings]] = {
    "trained on labels": _fault(auxiliary_target=AUTHOR_CODE.auxiliary_target),
    "trained on masked reconstructions": _fault(auxiliary_mask_ratio=AUTHOR_CODE.auxiliary_mask_ratio),
    "KL deviation": _fault(deviation=AUTHOR_CODE.deviation),
    "scores raw queries": _fault(quantise=AUTHOR_CODE.quantise),
    "divided loss": _fault(divide_loss=AUTHOR_CODE.divide_loss),
    "batch statistics": _fault(eval_mode=AUTHOR_CODE.eval_mode),
    "raw scale, alpha 0.99": lambda same: replace(same, scale="raw", alpha=0.99),
    "interpolated ROC": lambda same: same,
}
INTERPOLATED = ("interpolated ROC", "author_code")
PROTOCOLS: dict[str, Callable[[SameSettings], SameSettings]] = {
    "fixed": lambda same: same,
    "author_code": SameSettings.as_author_code,
} | FAULTS

Plan = Iterable[tuple[str, str, str, int]]  # detector, protocol, attack, budget


def _table(settings: Preset) -> Plan:
    for detector in (SAME, SAME_MASK_0, *BASELINES):
        for attack in HEADLINES:
            for budget in settings.budgets:
                yield detector, "fixed", attack, budget


def _large(settings: Preset, detectors: Iterable[str], attacks: Iterable[str] = HEADLINES) -> Plan:
    for detector in detectors:
        for attack in attacks:
            yield detector, "fixed", attack, settings.budgets[1]


def _cost(detectors: Iterable[str]) -> Plan:
    return ((detector, "fixed", "cost", 0) for detector in detectors)


def _attacks(settings: Preset) -> Plan:
    for detector in (SAME, SAME_MASK_0):
        for attack in ATTACK_VARIANTS:
            if attack != "jbda, unclipped":
                yield from ((detector, "fixed", attack, budget) for budget in settings.budgets)
        yield detector, "fixed", "dfme", settings.dfme_budget


def _audit(settings: Preset) -> Plan:
    for protocol in PROTOCOLS:
        for attack in ("knockoff", "jbda", "jbda, unclipped", NEAREST_JBDA, "dfme"):
            yield SAME_MASK_0, protocol, attack, settings.budgets[1]


def _responses(settings: Preset) -> Plan:
    for name in RESPONSES:
        yield from ((response_name(name), "fixed", user, settings.budgets[1]) for user in ASKERS)


def _over_http(settings: Preset) -> Plan:
    for name in OVER_HTTP:
        yield from ((response_name(name, http=True), "fixed", user, 0) for user in ASKERS)


def _widths(settings: Preset) -> list[str]:
    """The detector of each embedding size; the tier's own size is SAME itself."""
    return [SAME if w == settings.same.mae.width else width_name(w) for w in settings.widths]


class Target(NamedTuple):
    """A table or figure: what it is, its cells, and which part of a group's rows it is drawn from.

    A part is a file of its own, with rows of one version of the code: what is added to one leaves the others complete.
    """

    what: str
    cells: Callable[[Preset], Plan]
    part: str = ""


# Everything that `samelib reproduce` knows. Figure 3 is a diagram, without measurements.
TARGETS: dict[str, Target] = {
    "table1": Target("detection on MNIST, three detectors, three attacks, two budgets", _table),
    "table2": Target("the same on CIFAR-10", _table),
    "table3": Target("accuracy and training time of the victim under each defence",
               lambda s: _cost((SAME, *BASELINES, *(STEMS if s.architecture in STEMS.values() else ())))),
    "table4": Target("SAME at malicious ratios from 0.01 to 0.9", lambda s: _large(s, (SAME,))),
    "figure1": Target("score distributions: outlier exposure and SAME on Knockoff",
                lambda s: _large(s, (SAME, "outlier_exposure"), ("knockoff",))),
    "figure2": Target("score distributions: JBDA without and with the auxiliary model",
                lambda s: _large(s, (SAME, SAME_MASK_0), ("jbda", NEAREST_JBDA))),
    "figure4": Target("queries answered, and time spent on proof of work, by users and attackers", _responses, "responses"),
    "http": Target("Figure 4's response times over real HTTP", _over_http, "http"),
    "figure5": Target("SAME, SAME-X and SAME-Y", lambda s: _large(s, (SAME, SAME_MASK_0))),
    "figure6": Target("reconstruction error of four kinds of queries over the autoencoder's epochs",
                lambda s: [(SAME, "fixed", "curve", 0)]),
    "figure7": Target("SAME-X at several embedding sizes", lambda s: _large(s, _widths(s))),
    "alpha": Target("SAME at every weight alpha", lambda s: _large(s, (SAME, SAME_MASK_0))),
    "sharing": Target("the auxiliary model on the victim's trunk, or on its own",
                lambda s: [*_large(s, (SAME, SAME_SHARED)), *_cost((SAME, SAME_SHARED))]),
    "audit": Target("each fault of the released code alone", _audit),
    "posthoc": Target("scores that need no training, from pytorch-ood", lambda s: _large(s, METHODS)),
    "accounts": Target("PRADA against one account, ten and a hundred", lambda s: _large(s, ("prada",))),
    "attacks": Target("every variant of every attack against SAME", _attacks),
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
    settings = preset_for(tier, group in COLOUR, 1)
    found = {entry: None for name in targets_of(group, targets) for entry in TARGETS[name].cells(settings)}
    order = list(dict.fromkeys(entry[:2] for entry in found))  # a detector's cells lie together
    entries = sorted(found, key=lambda entry: order.index(entry[:2]))
    return [Cell(group, tier, seed, *entry) for seed in seeds for entry in entries]
