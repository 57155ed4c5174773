"""Training step and scoring of the masked autoencoder, against a plain reference and the machine's own ceiling.

    python -m reproduction.benchmarks.mae --append

Ours and the reference live in a process each, since samelib changes how its process keeps memory, and take turns, so
that a drifting machine touches both: what counts is the ratio, pair by pair. Floating-point operations are counted by
PyTorch's FlopCounterMode, not guessed.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from reproduction.benchmarks.reference_mae import ReferenceMAE
from reproduction.rows import RESULTS, append_rows, provenance
from samelib.memory import keep_freed_memory
from samelib.models.mae import MAESettings, MaskedAutoencoder, mae_loss
from samelib.precision import autocast, precision
from samelib.training import TrainSettings, best_device, descend, make_optimiser


class Work(NamedTuple):
    """What is timed: the model's shape, a batch of images, and at which mask ratio it is scored (None: trained)."""

    settings: MAESettings
    image_shape: tuple[int, int, int]
    batch: int
    scoring_ratio: float | None

    def images(self) -> torch.Tensor:
        return torch.rand(self.batch, *self.image_shape, device=best_device()) * 2 - 1


SHAPES = {
    "ViT-Tiny (paper)": Work(MAESettings(), (3, 32, 32), 64, None),
    "lecture tier": Work(MAESettings(4, 96, 4, 3, 2, 3), (1, 28, 28), 128, None),
}
GPU_FACTOR = 8  # a GPU wants larger batches


def ours(work: Work) -> Callable[[], object]:
    """Takes one training step, or scores one batch, as samelib does."""
    x, device = work.images(), torch.device(best_device())
    model = MaskedAutoencoder(work.image_shape, work.settings).to(device)
    if work.scoring_ratio is not None:
        noise = torch.rand(1, model.tokens, device=device).expand(work.batch, -1)
        model.eval()

        @torch.inference_mode()
        def score():
            with autocast(device):
                return (x - model(x, noise, work.scoring_ratio)[0]).square().flatten(1).mean(1)

        return score

    keep_freed_memory()  # as `train` does
    optimiser = make_optimiser(model, TrainSettings(1))

    def step():
        with autocast(device):
            loss = mae_loss(x, model(x, torch.rand(work.batch, model.tokens, device=device))[0])
        descend(optimiser, loss)

    return step


def reference(work: Work) -> Callable[[], object]:
    """The same for the plain reference."""
    x, s = work.images(), work.settings
    channels, side = work.image_shape[:2]
    model = ReferenceMAE(side, channels, s.patch, s.width, s.depth, s.heads, s.decoder_depth).to(x.device)
    if work.scoring_ratio is not None:
        model.eval()
        return torch.no_grad()(lambda: (x - model(x, work.scoring_ratio)).square().flatten(1).mean(1))

    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)

    def step():
        loss = (x - model(x)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def serve(connection: Connection, side: Callable[[Work], Callable], work: Work) -> None:
    """One side's process: sends the operations of a run, then for every message received the seconds of a run."""
    run = side(work)
    run()  # the first run allocates
    with FlopCounterMode(display=False) as counter:
        run()
    connection.send(counter.get_total_flops())
    while connection.recv():
        connection.send(seconds(run))


def take_turns(work: Work, turns: int) -> tuple[int, list[tuple[float, float]]]:
    """The operations of one run of ours, and (our seconds, the reference's) of every turn."""
    context, connections, operations = multiprocessing.get_context("spawn"), [], []
    for side in (ours, reference):
        here, there = context.Pipe()
        context.Process(target=serve, args=(there, side, work), daemon=True).start()
        connections.append(here)
        operations.append(here.recv())

    def turn(connection: Connection) -> float:
        connection.send(True)
        return connection.recv()

    times = [(turn(connections[0]), turn(connections[1])) for _ in range(turns)]
    for connection in connections:
        connection.send(False)
    return operations[0], times


def matrix_ceiling(dtype: torch.dtype) -> float:
    """The best of ten products of two 2048 x 2048 matrices: operations/s."""
    a = torch.randn(2048, 2048, device=best_device()).to(dtype)
    a @ a
    return 2 * 2048**3 / min(seconds(lambda: a @ a) for _ in range(10))


def measure(name: str, work: Work, turns: int, ceiling: float) -> dict:
    operations, times = take_turns(work, turns)
    ratios = sorted(reference_time / our_time for our_time, reference_time in times)
    typical = statistics.median(our_time for our_time, _ in times)
    row = {
        "benchmark": name,
        "images_per_second": work.batch / typical,
        "ratio_to_reference": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "runs": turns,
        "batch": work.batch,
        "image_shape": work.image_shape,
        "operations_per_image": operations / work.batch,
        "share_of_matrix_ceiling": operations / typical / ceiling,
    }
    print(
        f"{name:44} {row['images_per_second']:9.1f} images/s   {row['ratio_to_reference']:5.2f} x the reference "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f}, {turns} turns)   {row['operations_per_image'] / 1e6:7.0f} M operations an "
        f"image, {row['share_of_matrix_ceiling']:.0%} of the matrix ceiling",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="pairs of timed runs (default 7)")
    parser.add_argument("--append", action="store_true", help="add the rows to reproduction/results/benchmarks.jsonl")
    arguments = parser.parse_args()
    start, device = time.perf_counter(), torch.device(best_device())
    chosen = precision(device)  # the other type may take minutes a product
    ceiling = matrix_ceiling(getattr(torch, chosen))
    print(f"samelib computes in {chosen}, {torch.get_num_threads()} threads on {device}")
    print(f"matrix ceiling: {ceiling / 1e9:.1f} G operations/s")
    rows = []
    for name, work in SHAPES.items():
        work = work._replace(batch=work.batch * (GPU_FACTOR if device.type == "cuda" else 1))
        rows.append(measure(f"{name}, training step", work, arguments.turns, ceiling))
        for ratio in (0.0, 0.75):
            scoring = work._replace(scoring_ratio=ratio)
            rows.append(measure(f"{name}, scoring at mask {ratio}", scoring, arguments.turns, ceiling))
    if arguments.append:
        origin = provenance(device, "random pixels", 0, "benchmark", time.perf_counter() - start, None)
        common = {"matrix_ceiling": ceiling, "precision": chosen} | origin
        append_rows(RESULTS / "benchmarks.jsonl", [row | common for row in rows])


if __name__ == "__main__":
    main()
