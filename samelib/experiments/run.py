"""The steps of an experiment: a victim, a detector, an attack at the gateway, and the row that comes of it."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from samelib.artifacts import ArtifactStore
from samelib.attacks.base import Attack, UniformNoise
from samelib.attacks.dfme import DFME
from samelib.attacks.jbda import JBDA
from samelib.attacks.knockoff import AdaptiveKnockoff, Knockoff
from samelib.data.groups import Group, load_group
from samelib.data.image_set import ImageSet
from samelib.detectors.base import conformal_threshold
from samelib.detectors.same import SameDetector, SameSettings, Terms
from samelib.experiments.config import TIERS, Preset, preset
from samelib.experiments.results import append_rows, load_rows, provenance, repository_results
from samelib.gateway import QueryGateway
from samelib.metrics import accuracy, detection_metrics, fidelity, tpr_at_threshold
from samelib.models.classifiers import Victim, build_classifier, predict
from samelib.training import best_device, train_classifier

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
WEIGHTS = (0.0, 0.5, 1.0)  # SAME-Y, SAME, SAME-X


def train_victim(group: Group, settings: Preset, seed: int = 0, store: ArtifactStore | None = None) -> Victim:
    """The group's victim: trained on labels once, then frozen behind the black box."""
    images, shape = group.victim_train, group.image_shape
    spec = {"kind": "victim", "architecture": settings.architecture, "train": asdict(settings.victim_train)}
    spec |= {"augment": settings.augment, "data": images.fingerprint, "seed": seed, "device": images.device.type}
    model, _ = (store or ArtifactStore()).trained(
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
    return Victim.of(model, shape, group.classes, settings.architecture)


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


class Cell(NamedTuple):
    """An attack to measure: its label in the rows, its name and options, and the weights alpha to try."""

    label: str
    attack: str
    options: dict
    alphas: tuple[float, ...] = WEIGHTS


# The paper's three attacks and noise with every alpha; what it leaves open (chapters 5 and 6) as SAME, SAME-X, SAME-Y.
CELLS = (
    Cell("noise", "noise", {}, ALPHAS),
    Cell("knockoff", "knockoff", {}, ALPHAS),
    Cell("knockoff, adaptive", "adaptive-knockoff", {}),
    Cell("jbda", "jbda", {}, ALPHAS),
    Cell("jbda, step 0.2", "jbda", {"step": 0.2}),
    Cell("jbda, direction -", "jbda", {"direction": "-"}),
    Cell("jbda, direction -, step 0.2", "jbda", {"direction": "-", "step": 0.2}),
    Cell("jbda, targeted", "jbda", {"direction": "targeted"}),
    Cell("dfme", "dfme", {}, ALPHAS),
)


def attack_cells(settings: Preset) -> Iterator[tuple[Cell, int]]:
    """Every (cell, budget); DFME's also with the budget that trains its generator."""
    for cell in CELLS:
        for budget in settings.budgets:
            yield cell, budget
        if cell.attack == "dfme":
            yield cell, settings.dfme_budget


class Defence:
    """One seed's victim and SAME in front of it, in every scoring variant, with the benign queries' terms."""

    def __init__(self, group: Group, tier: str, seed: int, store: ArtifactStore | None = None):
        start = time.perf_counter()
        self.group, self.tier, self.seed, self.settings = group, tier, seed, preset(tier, group)
        self.victim = train_victim(group, self.settings, seed, store)
        self.evaluate = evaluation(self.victim, group.benign_test)
        self.victim_accuracy = accuracy(self.victim(group.benign_test.pixels()), group.benign_test.labels)
        self.detectors = {
            name: SameDetector(same, seed).fit(group, self.victim, store)
            for name, same in scoring_variants(self.settings.same).items()
        }
        self.benign = {name: found.terms(group.benign_test.pixels()) for name, found in self.detectors.items()}
        self.seconds = time.perf_counter() - start

    def rows(self, cell: Cell, budget: int) -> Iterator[dict]:
        """Runs the attack and measures its queries, a row for each scoring variant and alpha.

        JBDA's are measured a second time without the seeds: these are benign images, and no detector tells them apart.

        Raises:
            RuntimeError: the attack stopped before its budget was spent.
        """
        start = time.perf_counter()
        gateway = QueryGateway(self.victim, budget)
        attack = make_attack(cell.attack, self.group, self.settings, self.seed, **cell.options)
        result = attack.run(gateway, self.evaluate)
        if result.stopped:
            raise RuntimeError(f"{cell.label}, {budget:,} queries: stopped after {result.queries:,}, {result.stopped}")
        common = {"group": self.group.name, "budget": budget, "victim_accuracy": self.victim_accuracy}
        common |= {f"substitute_{k}": result.curve[-1][k] for k in ("accuracy", "fidelity")}
        parts = {cell.label: (gateway.log.queries, cell.alphas)}
        if cell.attack == "jbda":
            parts[f"{cell.label}, seeds left out"] = gateway.log.queries[len(self.group.seeds) :], WEIGHTS
        for label, (queries, alphas) in parts.items():
            for scoring, detector in self.detectors.items():
                malicious = detector.terms(evenly(queries, len(self.group.benign_test)))
                seconds = self.seconds + time.perf_counter() - start
                device = self.group.victim_train.device
                origin = provenance(device, self.group.fingerprint, self.seed, self.tier, seconds)
                for alpha in alphas:
                    row = {"method": "same", "protocol": "fixed", "scoring": scoring, "alpha": alpha}
                    found = _measured(detector, self.benign[scoring], malicious, alpha)
                    yield {"attack": label} | common | row | found | origin


def evenly(queries: Tensor, most: int) -> Tensor:
    """At most `most` queries, at even distances over the whole log."""
    if len(queries) <= most:
        return queries
    return queries[torch.linspace(0, len(queries) - 1, most).long().to(queries.device)]


def _measured(detector: SameDetector, benign: Terms, malicious: Terms, alpha: float) -> dict[str, float]:
    """Detection at 1:1, as in the paper's Table 1: as many benign queries as malicious ones, whichever are fewer."""
    count = min(len(benign.deviation), len(malicious.deviation))
    clean, attack = (detector.combine(Terms(*(t[:count] for t in terms)), alpha) for terms in (benign, malicious))
    rates = {}
    for fpr in (0.01, 0.05):
        threshold = conformal_threshold(detector.combine(detector.calibration_terms, alpha), fpr)
        rates[f"tpr_at_{fpr:.0%}"] = tpr_at_threshold(attack, threshold)
        rates[f"fpr_at_{fpr:.0%}"] = tpr_at_threshold(clean, threshold)
    return detection_metrics(clean, attack) | rates


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m samelib.experiments.run",
        description="Measures every attack against SAME and adds the rows to results/same_GROUP.jsonl, an attack and "
        "budget at a time; what is already there for this tier and seed is left alone.",
    )
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--tier", default="lecture", choices=TIERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    path = (repository_results() or Path("results")) / f"same_{arguments.data}.jsonl"
    group = load_group(arguments.data, arguments.tier).to(best_device())
    for seed in arguments.seeds:
        there = load_rows(path=path, tier=arguments.tier, seed=seed) if path.exists() else []
        done = {(row["attack"], row["budget"]) for row in there}
        missing = [pair for pair in attack_cells(preset(arguments.tier, group)) if (pair[0].label, pair[1]) not in done]
        defence = Defence(group, arguments.tier, seed) if missing else None
        for cell, budget in missing:
            append_rows(path, list(defence.rows(cell, budget)))
            print(f"{path.name}: {cell.label}, {budget:,} queries, seed {seed}, {arguments.tier} tier", flush=True)


if __name__ == "__main__":
    main()
