"""The attacks by name, and with what a group of data sets gives its attacker."""

from samelib.attacks.base import Attack, AttackResult, UniformNoise
from samelib.attacks.dfme import DFME
from samelib.attacks.jbda import JBDA
from samelib.attacks.knockoff import AdaptiveKnockoff, Knockoff
from samelib.data.groups import Group
from samelib.presets import Preset

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackResult",
    "AdaptiveKnockoff",
    "DFME",
    "JBDA",
    "Knockoff",
    "UniformNoise",
    "make_attack",
]

ATTACKS = {
    "noise": UniformNoise,
    "knockoff": Knockoff,
    "adaptive-knockoff": AdaptiveKnockoff,
    "jbda": JBDA,
    "dfme": DFME,
}


def make_attack(name: str, group: Group, settings: Preset, seed: int = 0, **options) -> Attack:
    """The attack of that name with what the group gives its attacker; `options` go to its constructor.

    Raises:
        ValueError: an unknown attack, or whatever its constructor refuses.
    """
    if name not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    given = {"architecture": settings.architecture, "settings": settings.substitute_train, "seed": seed}
    if name in ("knockoff", "adaptive-knockoff"):
        given["proxy"] = group.proxy
    elif name == "jbda":
        given |= {"seeds": group.seeds, "round_settings": settings.round_train}
    elif name == "dfme":
        given |= {"settings": settings.dfme_train} | settings.dfme
    return ATTACKS[name](**given | options)
