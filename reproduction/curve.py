"""Figure 6: how well benign and malicious queries are reconstructed while the autoencoder is trained."""

from collections.abc import Iterator
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from reproduction.detection import band
from reproduction.lab import Bench, evenly, parts_of_log
from reproduction.plan import BENIGN, DFME, JBDA, KNOCKOFF, Cell
from reproduction.tables import select
from samelib.data.image_set import to_float
from samelib.detectors.same import SameDetector, pass_noise, reconstruction_error
from samelib.models.mae import MaskedAutoencoder
from samelib.plots import legend_above
from samelib.precision import autocast
from samelib.training import seed_of, train_mae

IMAGES, POINTS, PASSES = 256, 20, 4
KINDS = {"benign": "benign", "knockoff": "Knockoff", "jbda, seeds left out": "JBDA, no seeds", "dfme": "DFME"}


def measure(bench: Bench, cell: Cell) -> Iterator[dict]:
    """Mean reconstruction error of benign and malicious queries at epochs of an autoencoder's training."""
    victim, budget = bench.undefended[0], bench.settings.budgets[1]
    queries = {(BENIGN, "in"): bench.group.benign_test.images}
    for variant in (KNOCKOFF, JBDA, DFME):
        log = bench.log(victim, variant, budget)[0]
        parts = parts_of_log(variant, torch.arange(len(log)), len(bench.group.seeds))
        queries |= {(variant, seeds): log[part.to(log.device)] for seeds, part in parts.items()}
    images = {key: to_float(evenly(log, IMAGES)) for key, log in queries.items()}
    errors = [
        {
            (scoring, *key): _error(model, x, scoring, bench.seed)
            for scoring in ("mask 0", "passes")
            for key, x in images.items()
        }
        for model in _models(bench)
    ]
    for scoring, variant, seeds in errors[0]:
        named = variant._asdict() | {"scoring": scoring, "seeds": seeds, "epochs": _epochs(bench)}
        yield named | {"errors": [round(point[scoring, variant, seeds], 6) for point in errors]}


def _training(bench: Bench):
    """(settings of SAME, images) of the training that is watched: the detector's own, or the tier's shorter one."""
    same, images = bench.settings.same, bench.group.victim_train
    return replace(same, mae_train=bench.scale.curve_train or same.mae_train), images[: bench.scale.curve_images]


def _epochs(bench: Bench) -> list[int]:
    """At even distances of their logarithm, up to the last."""
    same, images = _training(bench)
    return sorted({round(epoch) for epoch in np.geomspace(1, same.mae_train.epochs_of(len(images)), POINTS)})


def _models(bench: Bench) -> Iterator[MaskedAutoencoder]:
    """The autoencoder after each of the epochs. Each is kept in the store as soon as it is there, so that a training that
    is killed goes on from its checkpoint; where the detector itself is so trained, this is its training."""
    (same, images), epochs, store = _training(bench), _epochs(bench), bench.store
    spec = {"mae": asdict(same.mae), "train": asdict(same.mae_train), "data": images.fingerprint, "seed": bench.seed}

    def build() -> MaskedAutoencoder:
        return MaskedAutoencoder(images.image_shape, same.mae, seed_of(bench.seed, "mae")).to(images.device)

    def kept(epoch: int) -> dict:
        return spec | {"kind": "mae-epoch", "epoch": epoch}

    def keep(epoch: int, model: MaskedAutoencoder, loss: float) -> None:
        if epoch in epochs:
            store.get(kept(epoch), lambda _: (model.state_dict(), {"loss": loss}))

    SameDetector(same, bench.seed).fit_autoencoder(images, store, keep)
    if not all(store.path(kept(epoch)).exists() for epoch in epochs):  # it was there: nobody had watched its training
        seed = seed_of(bench.seed, "mae")
        store.trained(
            spec | {"kind": "mae-watched"},
            build,
            lambda model, file: train_mae(model, images, same.mae_train, seed=seed, checkpoint=file, on_epoch=keep),
        )
    for epoch in epochs:
        model = build()
        model.load_state_dict(store.get(kept(epoch), _missing)[0])
        yield model.eval()


def _missing(_):
    raise RuntimeError("an epoch of the autoencoder went missing while it was read; run again")


@torch.no_grad()
def _error(model: MaskedAutoencoder, x: Tensor, scoring: str, seed: int) -> float:
    """Mean error of images [N, C, H, W], at mask 0 or over some masked passes."""
    device = model.mask_token.device
    ratio, passes = (0.0, 1) if scoring == "mask 0" else (None, PASSES)
    x, errors = x.to(device), []
    for noise in pass_noise(model.tokens, passes, seed).to(device):
        with autocast(device):
            reconstruction = model(x, noise[None].expand(len(x), -1), ratio)[0]
        errors.append(float(reconstruction_error(x, reconstruction.float()).mean()))
    return float(np.mean(errors))


def figure6(frame: pd.DataFrame) -> Figure:
    """Reconstruction error of benign and malicious queries over the autoencoder's epochs."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, scoring, title in zip(axes, ("mask 0", "passes"), ("mask 0", "masked passes"), strict=True):
        for number, (label, name) in enumerate(KINDS.items()):
            rows = select(frame, experiment="curve", scoring=scoring, label=label)
            if len(rows):
                band(axis, rows["epochs"].iloc[0], rows["errors"].tolist(), name, number, log=True)
        axis.set(title=title, xlabel="epoch of the autoencoder", ylabel="mean reconstruction error", yscale="log")
    return legend_above(figure)
