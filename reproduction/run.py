"""The steps of an experiment: a victim, an attack with what the group gives it, a measure of what was stolen."""

from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from reproduction.cells import without_seeds
from samelib.attacks.base import Attack, UniformNoise
from samelib.attacks.dfme import DFME
from samelib.attacks.jbda import JBDA
from samelib.attacks.knockoff import AdaptiveKnockoff, Knockoff
from samelib.data.groups import Group
from samelib.data.image_set import ImageSet
from samelib.metrics import accuracy, fidelity
from samelib.models.classifiers import Victim, build_classifier, predict
from samelib.presets import Preset, SameSettings
from samelib.store import ArtifactStore
from samelib.training import train_classifier


def train_victim(group: Group, settings: Preset, seed: int = 0, store: ArtifactStore | None = None) -> Victim:
    """The group's victim: trained on labels once, then frozen behind the black box."""
    return victim_and_card(group, settings, seed, store)[0]


def victim_and_card(
    group: Group, settings: Preset, seed: int = 0, store: ArtifactStore | None = None
) -> tuple[Victim, dict]:
    """The victim of `train_victim`, and the card of its training."""
    images, shape = group.victim_train, group.image_shape
    spec = {"kind": "victim", "architecture": settings.architecture, "train": asdict(settings.victim_train)}
    spec |= {"augment": settings.augment, "data": images.fingerprint, "seed": seed, "device": images.device.type}
    model, card = (store or ArtifactStore()).trained(
        spec,
        lambda: build_classifier(settings.architecture, shape, group.classes, seed).to(images.device),
        lambda model, file: train_classifier(
            model,
            images.images,
            images.labels,
            settings.victim_train,
            augment=settings.augment,
            label="victim",
            seed=seed,
            checkpoint=file,
        ),
    )
    return Victim.of(model, shape, group.classes, settings.architecture), card


def evaluation(victim: Victim, test: ImageSet):
    """A function that measures a substitute on the victim's test set: accuracy, and fidelity to the victim."""
    answers, labels = victim(test.pixels()).cpu(), test.labels.cpu()

    def evaluate(substitute: nn.Module) -> dict[str, float]:
        found = predict(substitute, test.pixels()).cpu()  # wherever the attacker computes
        return {"accuracy": accuracy(found, labels), "fidelity": fidelity(found, answers)}

    return evaluate


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
    how = {"architecture": settings.architecture, "settings": settings.substitute_train, "seed": seed}
    if name in ("knockoff", "adaptive-knockoff"):
        how["proxy"] = group.proxy
    elif name == "jbda":
        how |= {"seeds": group.seeds, "round_settings": settings.round_train}
    elif name == "dfme":
        how |= {"settings": settings.dfme_train, "attack": settings.dfme}
    return ATTACKS[name](**how | options)


def scoring_variants(same: SameSettings) -> dict[str, SameSettings]:
    """The scoring that the book compares: as the authors' code does, and averaged over masked passes."""
    return {
        "mask 0": replace(same, mask_ratio=0.0, passes=1),
        f"{same.passes} passes": replace(same, mask_ratio=same.mae.mask_ratio),
    }


def parts_of_log(attack: str, place: Tensor, seeds: int) -> dict[str, Tensor]:
    """What is measured of an attack's queries that stand at `place` [N] in its log: by its name in the rows, a mask [N].

    JBDA is measured a second time without its seeds: these are benign images, and no detector tells them apart.
    """
    parts = {attack: torch.ones_like(place, dtype=torch.bool)}
    return parts | ({without_seeds(attack): place >= seeds} if attack.startswith("jbda") else {})


def evenly(queries: Tensor, most: int) -> Tensor:
    """At most `most` queries, at even distances over the whole log."""
    if len(queries) <= most:
        return queries
    return queries[torch.linspace(0, len(queries) - 1, most).long().to(queries.device)]
