"""Measures one cell of the grid. What cells share (models, query logs) is made once and kept in the store."""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reproduction.bench import OWN_VICTIM, Bench
from reproduction.cells import HEADLINES, INTERPOLATED, SAME, STEMS, Cell, without_seeds
from reproduction.defended import IN_GATEWAY, IN_SERVICE, in_gateway, in_service
from reproduction.results import provenance
from reproduction.run import evenly, parts_of_log
from samelib.data.image_set import ImageSet, to_float
from samelib.detectors.base import Detector, conformal_threshold
from samelib.detectors.edm import EDM
from samelib.detectors.prada import watch_accounts
from samelib.detectors.same import SameDetector, pass_noise, reconstruction_error
from samelib.metrics import accuracy, detection_metrics, tpr_at_threshold
from samelib.models.classifiers import Victim
from samelib.models.mae import MaskedAutoencoder
from samelib.store import ArtifactStore
from samelib.training import autocast, train_mae

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
WEIGHTS = (0.0, 0.5, 1.0)  # SAME-Y, SAME, SAME-X
RATIOS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.9)  # the paper's Table 4
ACCOUNTS = (1, 10, 100)
CURVE_IMAGES, CURVE_POINTS = 256, 20
BINS = 40

Reading = tuple[dict, Tensor]  # what distinguishes it from others of the same detector, and the scores [N]


def measure(cell: Cell, cache: Path | None = None) -> dict:
    """The result row of a cell: its names, its readings under `measured`, its provenance."""
    start = time.perf_counter()
    bench = _bench(cell.group, cell.tier, cell.seed, cache)
    measured = list(_how(cell)(bench, cell))
    device, data = bench.group.victim_train.device, bench.group.fingerprint
    origin = provenance(device, data, cell.seed, cell.tier, time.perf_counter() - start)
    return {"cell": str(cell)} | cell._asdict() | {"measured": measured} | origin


def _how(cell: Cell) -> Callable[[Bench, Cell], Iterator[dict]]:
    if cell.detector in IN_GATEWAY:
        return in_gateway
    if cell.detector in IN_SERVICE:
        return in_service
    return {"cost": _cost, "curve": _curve}.get(cell.attack, _accounts if cell.detector == "prada" else _detection)


@lru_cache(maxsize=1)  # cells of one seed follow one another
def _bench(group: str, tier: str, seed: int, cache: Path | None) -> Bench:
    return Bench(group, tier, seed, ArtifactStore(cache))


def readings(detector: Detector, x: Tensor, protocol: str) -> list[Reading]:
    """All scores that a detector offers for images [N, C, H, W]: SAME's at each alpha, EDM's consensus scores."""
    if isinstance(detector, SameDetector):
        terms, own = detector.terms(x), detector.settings.alpha
        alphas = ALPHAS if protocol == "fixed" else WEIGHTS if own in WEIGHTS else (own,)
        return [({"alpha": alpha}, detector.combine(terms, alpha)) for alpha in alphas]
    if isinstance(detector, EDM):
        return [({"consensus": name}, scores) for name, scores in detector.consensus_scores(x).items()]
    return [({}, detector.score(x))]


def _known(bench: Bench, name: str, protocol: str) -> tuple[list[Reading], ...]:
    """Readings of the benign queries, and of the images that set the threshold."""
    key = name, protocol
    if key not in bench.known:
        sets = bench.group.benign_test, bench.group.calibration[len(bench.group.calibration) // 2 :]
        bench.known[key] = tuple(readings(bench.detector(*key), images.pixels(), protocol) for images in sets)
    return bench.known[key]


def _detection(bench: Bench, cell: Cell) -> Iterator[dict]:
    """Detection of an attack that was run against this detector's own victim."""
    victim, detector, group = bench.victim(cell.detector), bench.detector(cell.detector, cell.protocol), bench.group
    queries, worth = bench.log(victim, cell.attack, cell.budget)
    benign, calibration = _known(bench, cell.detector, cell.protocol)
    common = {"victim_accuracy": _accuracy(victim, group.benign_test)}
    common |= _rounded({f"substitute_{k}": worth[k] for k in ("accuracy", "fidelity")})
    if isinstance(detector, SameDetector):
        same = detector.settings
        common["scoring"] = f"{same.passes} passes" if same.mask_ratio else "mask 0"
    place = evenly(torch.arange(len(queries)), len(group.benign_test))  # in the log, of the queries that are scored
    found = readings(detector, queries[place], cell.protocol)
    figures = cell.protocol == "fixed" and cell.budget == bench.settings.budgets[1] and cell.attack in HEADLINES
    for label, part in parts_of_log(cell.attack, place, len(group.seeds)).items():
        for (fields, scores), (_, clean), (_, known) in zip(found, benign, calibration, strict=True):
            alpha, malicious = fields.get("alpha", 0.5), scores[part.to(scores.device)]
            if cell.attack not in (*HEADLINES, "noise") and alpha not in (*WEIGHTS, 0.99):
                continue
            row = {"attack": label} | fields | common
            histogram = {"histogram": _histogram(clean, malicious)} if figures and alpha in WEIGHTS else {}
            yield row | _one_to_one(clean, malicious, known, cell.protocol) | histogram
            if figures and cell.detector == SAME and alpha == detector.settings.alpha:
                for ratio in RATIOS:
                    yield row | {"ratio": ratio} | _at_ratio(clean, malicious, ratio, bench.seed)


@torch.no_grad()
def _accuracy(victim: Victim, test: ImageSet) -> float:
    return round(accuracy(victim(test.pixels()), test.labels), 6)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}


def _one_to_one(benign: Tensor, malicious: Tensor, known: Tensor, protocol: str) -> dict[str, float]:
    """Detection as in Tables 1 and 2: as many benign queries as malicious ones, whichever are fewer."""
    count = min(len(benign), len(malicious))
    clean, attack = benign[:count], malicious[:count]
    rates = {}
    for fpr in (0.01, 0.05):
        threshold = conformal_threshold(known, fpr)
        rates[f"tpr_at_{fpr:.0%}"] = tpr_at_threshold(attack, threshold)
        rates[f"fpr_at_{fpr:.0%}"] = tpr_at_threshold(clean, threshold)
    return _rounded(detection_metrics(clean, attack, interpolate=protocol in INTERPOLATED) | rates)


def _at_ratio(benign: Tensor, malicious: Tensor, ratio: float, seed: int, draws: int = 10) -> dict[str, float]:
    """Detection where `ratio` of the queries are malicious, as many as there are for it; the mean over some draws."""
    generator = torch.Generator().manual_seed(seed)
    attack = min(len(malicious), int(len(benign) * ratio / (1 - ratio)))
    clean = min(len(benign), round(attack * (1 - ratio) / ratio))

    def drawn(scores: Tensor, count: int) -> Tensor:
        return scores[torch.randperm(len(scores), generator=generator)[:count].to(scores.device)]

    found = [detection_metrics(drawn(benign, clean), drawn(malicious, attack)) for _ in range(draws)]
    return _rounded({name: float(np.mean([f[name] for f in found])) for name in found[0]})


def _histogram(benign: Tensor, malicious: Tensor) -> dict[str, list]:
    """Counts over bins that are even in asinh(score), so that long tails show; the outermost hold 0.2 % of a tail."""
    scores = {"benign": benign.cpu().numpy(), "malicious": malicious.cpu().numpy()}
    low, high = np.quantile(np.concatenate(list(scores.values())), [0.002, 0.998])
    edges = np.sinh(np.linspace(np.arcsinh(low), np.arcsinh(max(high, low + 1e-6)), BINS + 1))
    counts = {k: np.histogram(v.clip(edges[0], edges[-1]), edges)[0].tolist() for k, v in scores.items()}
    return {"edges": [float(f"{e:.4g}") for e in edges]} | counts


def _accounts(bench: Bench, cell: Cell) -> Iterator[dict]:
    """PRADA when the attacker, or an honest user, spreads as many queries over some accounts."""
    victim = bench.plain[0]
    queries, _ = bench.log(victim, cell.attack, cell.budget)
    for label, asked in {cell.attack: queries, "benign": bench.group.benign_test.images[: len(queries)]}.items():
        answers = victim(to_float(asked))
        for accounts in ACCOUNTS:
            watched = watch_accounts(asked, answers, accounts, bench.group.classes)
            alarms = [prada.alarm_at for prada in watched if prada.alarm_at]
            stopped = sum(len(asked) // accounts - at for at in alarms) / len(asked)
            yield {
                "attack": label,
                "accounts": accounts,
                "alarmed": len(alarms) / accounts,
                "alarm_at": float(np.mean(alarms)) if alarms else None,
                "after_alarm": round(stopped, 4),
            }


def _cost(bench: Bench, cell: Cell) -> Iterator[dict]:
    """What a defence costs before the first query: seconds of its trainings (alone or beside others, as the grid was
    run), the victim's accuracy, and parameters beside those of one victim."""
    victim, card = bench.plain
    found = {"parameters": 0}
    if cell.detector in STEMS:
        victim, card = bench.victim_of(STEMS[cell.detector])
    elif cell.detector in OWN_VICTIM:
        detector = bench.detector(cell.detector)
        found["parameters"] = _size(detector.victim.model) - _size(victim.model)
        victim, card = detector.victim, detector.cards["victim"]
    else:
        detector = bench.detector(cell.detector)
        found |= {f"{name}_seconds": detector.cards[name]["seconds"] for name in ("mae", "auxiliary")}
        found |= {f"{name}_parameters": _size(getattr(detector, name)) for name in ("mae", "auxiliary")}
        found["parameters"] = found["mae_parameters"] + found["auxiliary_parameters"]
    yield {"victim_accuracy": _accuracy(victim, bench.group.benign_test), "victim_seconds": card["seconds"]} | found


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _curve(bench: Bench, cell: Cell) -> Iterator[dict]:
    """Mean reconstruction error of benign and malicious queries at epochs of an autoencoder's training (Figure 6)."""
    s, group, victim = bench.settings, bench.group, bench.plain[0]
    images = {"benign": group.benign_test.images}
    images |= {name: bench.log(victim, name, s.budgets[1])[0] for name in ("knockoff", "jbda", "dfme")}
    images |= {without_seeds("jbda"): images["jbda"][len(group.seeds) :]}
    device = group.victim_train.device
    images = {name: to_float(evenly(queries, CURVE_IMAGES)).to(device) for name, queries in images.items()}
    epochs = sorted({round(e) for e in np.geomspace(1, s.curve_train.epochs, CURVE_POINTS)})
    model = MaskedAutoencoder(group.image_shape, s.same.mae, bench.seed).to(device)
    noise = {"mask 0": pass_noise(model.tokens, 1, bench.seed), "passes": pass_noise(model.tokens, 4, bench.seed)}
    found: dict[tuple[str, str], list[float]] = {(scoring, name): [] for scoring in noise for name in images}

    def watch(epoch: int, model: MaskedAutoencoder, loss: float) -> None:
        if epoch in epochs:
            for scoring, name in found:
                rows, ratio = noise[scoring].to(device), 0.0 if scoring == "mask 0" else None
                error = [_error(model, images[name], row, ratio) for row in rows]
                found[scoring, name].append(round(float(np.mean(error)), 6))

    train_mae(model, group.victim_train[: s.curve_images], s.curve_train, seed=bench.seed, on_epoch=watch)
    for (scoring, name), errors in found.items():
        yield {"scoring": scoring, "attack": name, "epochs": epochs, "errors": errors}


@torch.no_grad()
def _error(model: MaskedAutoencoder, x: Tensor, noise: Tensor, ratio: float | None) -> float:
    model.eval()
    with autocast(x.device):
        reconstruction = model(x, noise[None].expand(len(x), -1), ratio)[0]
    return float(reconstruction_error(x, reconstruction.float()).mean())
