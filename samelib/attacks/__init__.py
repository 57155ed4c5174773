"""The attacks by name, and with what a group of data sets gives its attacker."""

from collections.abc import Callable
from dataclasses import replace

from samelib.attacks.adaptive import Bargain, Mixing, RoundRobin, SelfTraining, shares
from samelib.attacks.base import Attack, AttackResult, UniformNoise
from samelib.attacks.dfme import DFME
from samelib.attacks.disguise import (
    AUTOENCODER_TRAIN,
    Evasion,
    Filter,
    Preprocessing,
    Purification,
    expected_score,
    own_autoencoder,
)
from samelib.attacks.jbda import JBDA
from samelib.attacks.knockoff import AdaptiveKnockoff, Knockoff
from samelib.data.groups import Group
from samelib.data.image_set import ImageSet
from samelib.presets import Preset
from samelib.store import ArtifactStore

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackResult",
    "AdaptiveKnockoff",
    "Bargain",
    "DFME",
    "Evasion",
    "Filter",
    "JBDA",
    "Knockoff",
    "Mixing",
    "Preprocessing",
    "Purification",
    "RoundRobin",
    "SelfTraining",
    "UniformNoise",
    "expected_score",
    "make_attack",
    "own_autoencoder",
    "shares",
]

# What is the attack's own: of a Knockoff whose images are changed or chosen first, the disguise.
ATTACKS = {
    "noise": UniformNoise,
    "knockoff": Knockoff,
    "adaptive-knockoff": AdaptiveKnockoff,
    "jbda": JBDA,
    "dfme": DFME,
    "knockoff-preprocessed": Preprocessing,
    "knockoff-filtered": Filter,
    "knockoff-purified": Purification,
    "knockoff-bargain": Bargain,
    "knockoff-mixed": Mixing,
    "knockoff-self-trained": SelfTraining,
}
FEW = 20  # seeds that preprocessing learns from


def make_attack(
    name: str, group: Group, settings: Preset, seed: int = 0, store: ArtifactStore | None = None, **options
) -> Attack:
    """The attack of that name with what the group gives its attacker; `options` go to its constructor.

    Disguises learn from the group's seeds; benign queries to hide among are its seeds too.

    Args:
        store: where an autoencoder of the attacker's own is kept.

    Raises:
        ValueError: an unknown attack, or whatever its constructor refuses.
    """
    if name not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    given = {"architecture": settings.architecture, "settings": settings.substitute_train, "seed": seed}
    if "knockoff" in name:
        given["proxy"] = group.proxy
    if name == "jbda":
        given |= {"seeds": group.seeds, "round_settings": settings.round_train}
    elif name == "dfme":
        given |= {"settings": settings.dfme_train} | settings.dfme
    elif name == "knockoff-mixed":
        given["benign"] = group.seeds
    given |= options
    if issubclass(ATTACKS[name], Attack):
        return ATTACKS[name](**given)
    if len(given["proxy"]):  # without any, Knockoff says so before something is learnt for them
        given["proxy"] = _disguise(name, group, settings, seed, store)(given["proxy"])
    return Knockoff(**given)


def _disguise(
    name: str, group: Group, settings: Preset, seed: int, store: ArtifactStore | None
) -> Callable[[ImageSet], ImageSet]:
    """What is learnt from benign seeds; an autoencoder of their own sees as many images as the substitute will."""
    if name == "knockoff-preprocessed":
        return Preprocessing(group.seeds[:FEW])
    budget = settings.budgets[1]
    train = replace(AUTOENCODER_TRAIN, seen=budget * settings.substitute_train.epochs_of(budget))
    hidden = 0.25 if name == "knockoff-purified" else 0.75  # to redraw whole images is learnt with few patches hidden
    return ATTACKS[name](own_autoencoder(group.seeds, train, hidden, seed, store))
