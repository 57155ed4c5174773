"""Training step and scoring of the masked autoencoder, against a plain reference and the machine's own ceiling.

    python benchmarks/mae.py                      prints the table
    python benchmarks/mae.py --append             also adds the rows to results/benchmarks.jsonl

Ours and the reference take turns in one process, so that a drifting machine touches both: what counts is the ratio,
pair by pair. Floating-point operations are counted by PyTorch's FlopCounterMode, not guessed.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from reference_mae import ReferenceMAE
from torch.utils.flop_counter import FlopCounterMode

from reproduction.results import append_rows, provenance
from samelib.models.mae import MAESettings, MaskedAutoencoder, mae_loss
from samelib.training import TrainSettings, autocast, best_device, make_optimiser

SHAPES = {"ViT-Tiny (paper)": MAESettings(), "lecture tier": MAESettings(4, 96, 4, 3, 2, 3)}


def seconds(run, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_ceiling(device: torch.device) -> float:
    """The best of ten products of two 2048 x 2048 matrices in the precision that samelib computes in: operations/s."""
    with autocast(device):
        size, a = 2048, torch.randn(2048, 2048, device=device)
        reduced = (a @ a).dtype
    a = a.to(reduced)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


def steps(settings: MAESettings, batch: int, device: torch.device):
    """(ours, reference): functions that take one training step each."""
    x = torch.rand(batch, 1, 28, 28, device=device) * 2 - 1
    ours = MaskedAutoencoder((1, 28, 28), settings).to(device)
    optimiser = make_optimiser(ours, TrainSettings(1))
    s = settings
    reference = ReferenceMAE(28, 1, s.patch, s.width, s.depth, s.heads, s.decoder_depth).to(device)
    plain = torch.optim.AdamW(reference.parameters(), 1e-3)

    def our_step():
        noise = torch.rand(batch, ours.tokens, device=device)
        with autocast(device):
            loss = mae_loss(x, ours(x, noise)[0])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    def reference_step():
        loss = (x - reference(x)).square().mean()
        plain.zero_grad()
        loss.backward()
        plain.step()

    return our_step, reference_step


def scorings(settings: MAESettings, batch: int, device: torch.device, mask_ratio: float):
    """(ours, reference): functions that score one batch by its reconstruction error."""
    x = torch.rand(batch, 1, 28, 28, device=device) * 2 - 1
    ours = MaskedAutoencoder((1, 28, 28), settings).to(device).eval()
    s = settings
    reference = ReferenceMAE(28, 1, s.patch, s.width, s.depth, s.heads, s.decoder_depth).to(device).eval()
    noise = torch.rand(1, ours.tokens, device=device)

    @torch.inference_mode()
    def our_scores():
        with autocast(device):
            return (x - ours(x, noise.expand(batch, -1), mask_ratio)[0]).square().flatten(1).mean(1)

    @torch.no_grad()
    def reference_scores():
        return (x - reference(x, mask_ratio)).square().flatten(1).mean(1)

    return our_scores, reference_scores


def compare(name: str, pair, batch: int, runs: int, device: torch.device, ceiling: float) -> dict:
    ours, reference = pair
    ours(), reference()  # the first run of each allocates
    with FlopCounterMode(display=False) as counter:
        ours()
    times = [(seconds(ours, device), seconds(reference, device)) for _ in range(runs)]
    ratios = sorted(r / o for o, r in times)
    typical = statistics.median(o for o, _ in times)
    row = {
        "benchmark": name,
        "images_per_second": batch / typical,
        "ratio_to_reference": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "runs": runs,
        "batch": batch,
        "operations_per_image": counter.get_total_flops() / batch,
        "share_of_matrix_ceiling": counter.get_total_flops() / typical / ceiling,
    }
    print(
        f"{name:44} {row['images_per_second']:9.0f} images/s   {row['ratio_to_reference']:5.2f} x the reference "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f}, {runs} pairs)   {row['operations_per_image'] / 1e6:7.0f} M operations an "
        f"image, {row['share_of_matrix_ceiling']:.0%} of the matrix ceiling"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="pairs of timed runs (default 7)")
    parser.add_argument("--batch", type=int, help="images a step (default 32 on a CPU, 512 on a GPU)")
    parser.add_argument("--append", action="store_true", help="add the rows to results/benchmarks.jsonl")
    arguments = parser.parse_args()
    device = torch.device(best_device())
    batch = arguments.batch or (512 if device.type == "cuda" else 32)
    ceiling = matrix_ceiling(device)
    print(f"matrix ceiling: {ceiling / 1e9:.0f} G operations/s on {device}, {torch.get_num_threads()} threads")
    start, rows = time.perf_counter(), []
    for name, settings in SHAPES.items():
        size = batch if name.startswith("ViT") else 4 * batch
        common = (size, arguments.runs, device, ceiling)
        rows.append(compare(f"{name}, training step", steps(settings, size, device), *common))
        for ratio in (0.0, 0.75):
            rows.append(compare(f"{name}, scoring at mask {ratio}", scorings(settings, size, device, ratio), *common))
    if arguments.append:
        origin = provenance(device, "random pixels", 0, "benchmark", time.perf_counter() - start)
        path = Path(__file__).parent.parent / "results" / "benchmarks.jsonl"
        append_rows(path, [row | {"matrix_ceiling": ceiling} | origin for row in rows])


if __name__ == "__main__":
    main()
