"""What a theft costs the thief: queries a second of each attack beside the victim's own pace, and growth with the budget.

    python benchmarks/attacks.py --append

Everything runs in one process, attack after attack, on the lecture tier's settings and a victim that is not trained
(the time does not depend on its weights). The victim alone is timed before each run on as many queries; its pace is the
median. An attack's time holds its queries and all its training, the final substitute's too. Growth is the exponent e in
time ~ budget^e between the smallest and the largest budget: 1 is linear.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import median

import torch

from reproduction.results import append_rows, provenance
from reproduction.run import make_attack
from samelib.data.groups import Group
from samelib.data.synthetic import glyphs
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim, build_classifier
from samelib.presets import preset
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


def seconds(run) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--append", action="store_true", help="add the rows to results/benchmarks.jsonl")
    arguments = parser.parse_args()
    budgets = sorted(arguments.budgets)
    train, calibration, benign, seeds = glyphs("victim", 700).split(200, 200, 100, 200)
    group = Group("glyphs", train, calibration, benign, seeds, glyphs("proxy", budgets[-1]), glyphs("outliers", 10))
    group = group.to(best_device())
    settings = preset("lecture", group)
    model = build_classifier(settings.architecture, group.image_shape, group.classes).to(best_device())
    victim = Victim.of(model, group.image_shape, group.classes, settings.architecture)
    make_attack("dfme", group, settings).run(QueryGateway(victim, 2000))  # warm up

    start, times, alone = time.perf_counter(), {}, []
    for label, (name, options) in SETUPS.items():
        for budget in budgets[:1] if label == ONE_BY_ONE else budgets:
            queries = group.proxy.pixels(slice(budget))
            alone.append(budget / seconds(lambda x=queries: QueryGateway(victim).query(x)))
            attack, gateway = make_attack(name, group, settings, **options), QueryGateway(victim, budget)
            times[label, budget] = seconds(lambda a=attack, g=gateway: a.run(g))
    rows, pace = [], median(alone)
    print(f"victim alone: {pace:,.0f} queries/s (median of {len(alone)}, {min(alone):,.0f} to {max(alone):,.0f})")
    for label in SETUPS:
        spent = {budget: found for (name, budget), found in times.items() if name == label}
        least, most = min(spent), max(spent)
        row = {"benchmark": f"attack: {label}", "attack": label, "budget": most, "victim_queries_per_second": pace}
        row["queries_per_second"] = most / spent[most]
        row["times_the_victim"] = pace / row["queries_per_second"]
        row["seconds_by_budget"] = {str(budget): round(found, 2) for budget, found in spent.items()}
        row["growth"] = math.log(spent[most] / spent[least]) / math.log(most / least) if most > least else None
        rows.append(row)
        print(
            label,
            {name: row[name] for name in ("queries_per_second", "times_the_victim", "growth", "seconds_by_budget")},
        )
    if arguments.append:
        origin = provenance(best_device(), group.fingerprint, 0, "benchmark", time.perf_counter() - start)
        append_rows(Path(__file__).parent.parent / "results" / "benchmarks.jsonl", [row | origin for row in rows])


if __name__ == "__main__":
    main()
