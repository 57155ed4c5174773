"""What a theft costs the thief: queries a second of each attack beside the victim's own pace, and growth with the budget.

    python -m reproduction.benchmarks.attacks --append

Everything runs in one process, attack after attack, on the lecture tier's settings and a victim that is not trained
(the time does not depend on its weights). The victim alone is timed before each run on as many queries; its pace is the
median. An attack's time holds its queries and all its training, the final substitute's too. Growth is the exponent e in
time ~ budget^e between the smallest and the largest budget: 1 is linear.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from reproduction.rows import RESULTS, append_rows, provenance
from reproduction.run import PeakMemory
from samelib.attacks import make_attack
from samelib.data.groups import Group
from samelib.data.synthetic import glyphs
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim, build_classifier
from samelib.presets import Preset, preset
from samelib.training import best_device

BUDGETS = (1600, 3200, 6400)  # whole rounds of JBDA
ONE_BY_ONE = "knockoff, adaptive, one image a round"  # what rounds of 32 are worth; at the smallest budget only
SETUPS = {
    "noise": ("noise", {}),
    "knockoff": ("knockoff", {}),
    "knockoff, adaptive": ("adaptive-knockoff", {}),
    "jbda": ("jbda", {}),
    "dfme": ("dfme", {}),
    ONE_BY_ONE: ("adaptive-knockoff", {"batch": 1}),
}


def seconds(run: Callable[[], object]) -> float:
    """How long `run` takes, to the end of what it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(group: Group, settings: Preset, victim: Victim, budgets: list[int]) -> tuple[dict, list[float]]:
    """The seconds of each attack by label and budget, and the victim's own queries a second before each run."""
    times, paces = {}, []
    for label, (name, options) in SETUPS.items():
        times[label] = {}
        for budget in budgets[:1] if label == ONE_BY_ONE else budgets:
            queries = group.proxy.pixels(slice(budget))
            paces.append(budget / seconds(partial(QueryGateway(victim).query, queries)))
            attack = make_attack(name, group, settings, **options)
            times[label][budget] = seconds(partial(attack.run, QueryGateway(victim, budget)))
    return times, paces


def row_of(label: str, times: dict[int, float], pace: float) -> dict:
    """The row of one attack, from its seconds by budget and the victim's own pace."""
    least, most = min(times), max(times)
    return {
        "benchmark": f"attack: {label}",
        "attack": label,
        "budget": most,
        "victim_queries_per_second": pace,
        "queries_per_second": most / times[most],
        "times_the_victim": pace * times[most] / most,
        "seconds_by_budget": {str(budget): round(duration, 2) for budget, duration in times.items()},
        "growth": math.log(times[most] / times[least]) / math.log(most / least) if most > least else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--append", action="store_true", help="add the rows to reproduction/results/benchmarks.jsonl")
    arguments = parser.parse_args()
    budgets = sorted(arguments.budgets)
    train, calibration, benign, seeds = glyphs("victim", 700).split(200, 200, 100, 200)
    group = Group("glyphs", train, calibration, benign, seeds, glyphs("proxy", budgets[-1]), glyphs("outliers", 10))
    group = group.to(best_device())
    settings = preset("lecture", group.image_shape)
    model = build_classifier(settings.architecture, group.image_shape, group.classes).to(best_device())
    victim = Victim.of(model, group.image_shape, group.classes, settings.architecture)
    make_attack("dfme", group, settings).run(QueryGateway(victim, 2000))  # warm up

    start = time.perf_counter()
    with PeakMemory() as memory:
        times, paces = measured(group, settings, victim, budgets)
    pace = median(paces)
    print(f"victim alone: {pace:,.0f} queries/s (median of {len(paces)}, {min(paces):,.0f} to {max(paces):,.0f})")
    rows = [row_of(label, times[label], pace) for label in SETUPS]
    for row in rows:
        printed = ("queries_per_second", "times_the_victim", "growth", "seconds_by_budget")
        print(row["attack"], {name: row[name] for name in printed})
    if arguments.append:
        duration = time.perf_counter() - start
        origin = provenance(best_device(), group.fingerprint, 0, "benchmark", duration, memory.peak)
        append_rows(RESULTS / "benchmarks.jsonl", [row | origin for row in rows])


if __name__ == "__main__":
    main()
