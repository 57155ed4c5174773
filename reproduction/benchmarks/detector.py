"""What SAME costs in front of a victim: queries a second and memory, with and without, and a million queries in a row.

    python -m reproduction.benchmarks.detector --fitted DETECTOR --append
    python -m reproduction.benchmarks.detector --tier smoke --sides "mask 0" --queries 1000000 --append

Each side runs in a process of its own that loads what it needs and nothing else, so that its memory is its own. The time
of SAME does not depend on what is asked, and it is asked noise by a detector that is hardly trained. SamePlus takes longer
over what looks strange: DETECTOR, written by `samelib fit`, is asked honest glyphs, and then, with its exits closed, again.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from reproduction.rows import RESULTS, append_rows, provenance
from samelib.data.groups import load_group
from samelib.data.synthetic import glyphs
from samelib.detectors import load_detector
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import Victim, build_classifier
from samelib.presets import preset
from samelib.store import ArtifactStore
from samelib.training import best_device

BLOCK = 2048
SIDES = ("victim alone", "mask 0", "8 passes")
FITTED = ("SamePlus, honest images", "SamePlus, all passes")


def build_victim() -> Victim:
    """An untrained Conv3: the time does not depend on the weights."""
    shape = (1, 28, 28)
    return Victim.of(build_classifier("conv3", shape, 10).to(best_device()), shape, 10, "conv3")


def build_detector(tier: str, passes: int, folder: str) -> None:
    """Saves a detector with the settings of a tier, hardly trained, in a process that then ends."""
    images, calibration = (part.to(best_device()) for part in glyphs("victim", 500).split(200, 300))
    settings = preset(tier, images.image_shape).same
    settings = replace(
        settings,
        mae_train=replace(settings.mae_train, epochs=1, seen=None),
        auxiliary_train=replace(settings.auxiliary_train, epochs=1, seen=None),
        views=1,
        mask_ratio=settings.mae.mask_ratio if passes > 1 else 0.0,
        passes=passes,
    )
    with TemporaryDirectory() as cache:
        SameDetector(settings).fit(images, calibration, build_victim(), store=ArtifactStore(cache)).save(folder)


def resident() -> float:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def side(name: str, folder: str, queries: int) -> dict:
    """Runs one side in this process: throughput, memory at the start, and the most it grew by."""
    ask = noise
    if name == SIDES[0]:
        answer = build_victim()
    else:
        detector = load_detector(folder, device=best_device())
        answer = detector.score
    if name in FITTED:
        honest = load_group("glyphs").benign_test
        ask = partial(honest.pixels, slice(BLOCK))
    if name == FITTED[1]:
        detector.exits = nn.ModuleList()
    answer(ask())
    before, spent, done, growth = resident(), 0.0, 0, 0.0
    while done < queries:
        x = ask()
        start = time.perf_counter()
        answer(x)
        spent += time.perf_counter() - start
        done += BLOCK
        growth = max(growth, resident() - before)
    return {"queries": done, "queries_per_second": done / spent, "resident_mib": before, "growth_mib": growth}


def noise() -> torch.Tensor:
    return torch.rand(BLOCK, 1, 28, 28) * 2 - 1


def child(*words: str) -> str:
    """Runs this file in a process of its own and returns what it printed."""
    return subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="lecture", choices=("smoke", "lecture", "paper"))
    parser.add_argument("--queries", type=int, default=20_000, help="a side (default 20,000)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument(
        "--fitted", metavar="DETECTOR", help="also SamePlus: a folder written by samelib fit, of glyphs"
    )
    parser.add_argument("--append", action="store_true", help="add the rows to reproduction/results/benchmarks.jsonl")
    parser.add_argument("--build", nargs=2, metavar=("PASSES", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        return build_detector(arguments.tier, int(arguments.build[0]), arguments.build[1])
    if arguments.side:
        return print(json.dumps(side(*arguments.side, arguments.queries)))
    start, rows, pace = time.perf_counter(), [], None
    for name in (*arguments.sides, *(FITTED if arguments.fitted else ())):
        with TemporaryDirectory() as cache:
            folder = arguments.fitted if name in FITTED else f"{cache}/detector"
            if name in SIDES[1:]:
                child("--tier", arguments.tier, "--build", "8" if name == "8 passes" else "1", folder)
            reading = json.loads(child("--queries", str(arguments.queries), "--side", name, folder))
        asked = "glyphs" if name in FITTED else "random pixels"
        row = {"benchmark": f"{arguments.tier} tier, {name}", "data": asked, **reading}
        if name == SIDES[0]:
            pace = reading["queries_per_second"]
        if pace:
            row["times_the_victim"] = pace / reading["queries_per_second"]
        rows.append(row)
        ratio = f" ({row['times_the_victim']:.1f} x the victim's time)" if pace else ""
        print(
            f"{row['benchmark']:30} {row['queries_per_second']:9.0f} queries/s{ratio}   {row['resident_mib']:6.0f} MiB, "
            f"+{row['growth_mib']:.0f} MiB over {row['queries']:,} queries"
        )
    if arguments.append:
        duration = time.perf_counter() - start
        origin = provenance(best_device(), "", 0, "benchmark", duration, None)  # each row says its data and its memory
        append_rows(RESULTS / "benchmarks.jsonl", [origin | row for row in rows])


if __name__ == "__main__":
    main()
