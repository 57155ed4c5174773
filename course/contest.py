"""A leaderboard of thieves and detectors that a class has written, on images that the class has not seen.

    python -m course.contest FOLDER --data path:hidden.npz --proxy path:theirs.npz

Each file of the folder, NAME.py, has one of these functions, or both:

    def steal(gateway, proxy, seeds):         # asks gateway.query(images): probabilities, NaN where it is refused
        return copy                           # a torch module: images [N, C, H, W] in [-1, 1] -> logits [N, K]

    def detect(train, calibration, victim):   # benign image sets; victim(images) gives probabilities
        return score                          # a function: images [N, C, H, W] in [-1, 1] -> scores [N], high if strange

A thief is judged by the fidelity of the copy, in front of SamePlus with bans by account; a detector by the share of each
attack's queries that it catches where 1 % of benign ones are flagged. The house takes part, so that there is something to
beat. Submissions run in this process and can reach everything in it: read them first.
"""

import argparse
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reproduction.tables import markdown
from samelib import (
    BanAccount,
    Group,
    ImageSet,
    Knockoff,
    QueryGateway,
    RoundRobin,
    SameDetector,
    SamePlus,
    Victim,
    evaluation,
    load_group,
    make_attack,
    preset,
    train_victim,
)
from samelib.attacks import shares
from samelib.attacks.base import answered
from samelib.data.image_set import to_float
from samelib.data.real import DataError
from samelib.detectors.base import conformal_threshold
from samelib.metrics import tpr_at_threshold

ATTACKS = ("knockoff", "jbda", "dfme", "knockoff-preprocessed")
RATE = 0.01  # of benign images that a detector may flag
BATCH = 500

Thief = Callable[[RoundRobin, ImageSet, ImageSet], nn.Module]
Score = Callable[[Tensor], Tensor]
Maker = Callable[[ImageSet, ImageSet, Victim], Score]


class Contest:
    """The victim, its guard and the attacks' queries: made once for all who take part.

    Args:
        group: its proxy set must hold as many images as there are queries.
        queries, accounts: that a thief has; the queries are dealt out to the accounts in turn.
        delta: honest accounts that may be banned, as a share.
        seed: of everything that the contest trains.

    Raises:
        ValueError: too few proxy images, or what victim or detector refuse.
    """

    def __init__(self, group: Group, queries: int = 1_000, accounts: int = 10, delta: float = 0.001, seed: int = 0):
        if len(group.proxy) < queries:
            raise ValueError(f"{queries:,} queries need as many proxy images, {group.name} has {len(group.proxy):,}")
        self.group, self.queries, self.accounts, self.delta, self.seed = group, queries, accounts, delta, seed
        self.settings = preset(group.tier, group.image_shape)
        self.victim = train_victim(group, self.settings, seed)
        half = len(group.calibration) // 2
        self.given, self.kept = group.calibration[:half], group.calibration[half:]  # what is kept sets the thresholds
        self.guard = SamePlus(self.settings.same, seed).fit(group.victim_train, group.calibration, self.victim)
        self.logs = {name: self._log(name) for name in ATTACKS}

    def _log(self, name: str) -> Tensor:
        gateway = QueryGateway(self.victim, self.queries)
        make_attack(name, self.group, self.settings, self.seed).run(gateway)
        return gateway.log.queries

    def thief(self, steal: Thief) -> dict[str, float]:
        """Fidelity of the copy, and the share of the queries that were answered."""
        response, budgets = BanAccount(delta=self.delta), shares(self.queries, self.accounts)
        gateway = RoundRobin([QueryGateway(self.victim, budget, self.guard, response) for budget in budgets])
        copy = steal(gateway, self.group.proxy, self.group.seeds)
        fidelity = evaluation(self.victim, self.group.benign_test)(copy.eval())["fidelity"]
        share = float(answered(gateway.log.answers).float().mean()) if gateway.spent else 0.0
        return {"fidelity": fidelity, "answered": share}

    def detector(self, detect: Maker) -> dict[str, float]:
        """The share of each attack's queries that is caught, their mean first, and that of benign queries last."""
        score = detect(self.group.victim_train, self.given, self.victim)
        threshold = conformal_threshold(_scores(score, self.kept.images), RATE)
        caught = {name: tpr_at_threshold(_scores(score, queries), threshold) for name, queries in self.logs.items()}
        benign = tpr_at_threshold(_scores(score, self.group.benign_test.images), threshold)
        return {"mean": sum(caught.values()) / len(caught)} | caught | {"benign": benign}

    def house(self) -> dict[str, dict]:
        """What the house enters with."""

        def knockoff(gateway: RoundRobin, proxy: ImageSet, seeds: ImageSet) -> nn.Module:
            attack = Knockoff(proxy, self.settings.architecture, self.settings.substitute_train, self.seed)
            return attack.run(gateway).substitute

        def fitted(kind: type) -> Maker:
            return lambda train, calibration, victim: (
                kind(self.settings.same, self.seed).fit(train, calibration, victim).score
            )

        same, plus = fitted(SameDetector), fitted(SamePlus)
        return {
            "Knockoff (house)": {"steal": knockoff},
            "SAME (house)": {"detect": same},
            "SamePlus (house)": {"detect": plus},
        }


def _scores(score: Score, images: Tensor) -> Tensor:
    """Scores [N] of images uint8 [N, C, H, W].

    Raises:
        ValueError: there is not one finite score for each image.
    """
    scores = torch.cat([torch.as_tensor(score(to_float(part))).flatten().cpu() for part in images.split(BATCH)])
    if len(scores) != len(images) or not torch.isfinite(scores).all():
        raise ValueError(f"{len(images)} images got {len(scores)} scores, {int(torch.isfinite(scores).sum())} finite")
    return scores


def submissions(folder: Path) -> dict[str, dict]:
    """What each file of a folder defines, by its name; of one that cannot be run, functions that raise its error."""
    entries = {}
    for path in sorted(folder.glob("*.py")):
        try:
            entries[path.stem] = runpy.run_path(str(path), run_name=path.stem)
        except Exception as error:
            entries[path.stem] = {"steal": _failing(error), "detect": _failing(error)}
    return entries


def _failing(error: Exception) -> Callable:
    def fail(*_):
        raise error

    return fail


def standings(contest: Contest, entries: dict[str, dict], function: str) -> list[tuple[str, dict[str, float] | str]]:
    """(name, figures, or what went wrong) of all who have that function, the best first."""
    judge = contest.thief if function == "steal" else contest.detector
    done, failed = [], []
    for name, defined in entries.items():
        if function in defined:
            print(f"{name}: {function}", file=sys.stderr)
            try:
                done.append((name, judge(defined[function])))
            except Exception as error:  # somebody else's code: it may raise anything, and must stop nobody
                traceback.print_exc()
                failed.append((name, f"{type(error).__name__}: {error}"))
    return sorted(done, key=lambda entry: -next(iter(entry[1].values()))) + failed


def table(ranked: list[tuple[str, dict[str, float] | str]], columns: tuple[str, ...]) -> str:
    """Standings as a table, in percent."""
    lines = []
    for place, (name, figures) in enumerate(ranked, 1):
        if isinstance(figures, str):
            lines.append(["–", name, figures, *[""] * (len(columns) - 1)])
        else:
            lines.append([place, name, *(f"{100 * value:.1f}" for value in figures.values())])
    return markdown(["place", "who", *columns], lines, 2)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m course.contest", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds the submissions, NAME.py")
    parser.add_argument("--data", default="glyphs", help="a group, or path:FILE.npz of the teacher's (default: glyphs)")
    parser.add_argument("--proxy", help="path:... of the thieves' images, where the group has none")
    parser.add_argument("--tier", default="lecture", help="smoke, lecture (default) or paper")
    parser.add_argument("--queries", type=int, default=1_000, help="of a thief (default: 1000)")
    parser.add_argument("--accounts", type=int, default=10, help="of a thief (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    if not given.folder.is_dir():
        sys.exit(f"contest: {given.folder} is no folder; name the one that holds the submissions")
    try:
        group = load_group(given.data, given.tier, proxy=given.proxy)
        contest = Contest(group, given.queries, given.accounts, seed=given.seed)
    except (DataError, ValueError) as error:
        sys.exit(f"contest: {error}")
    entries = contest.house() | submissions(given.folder)
    print(f"## Thieves\n\n{given.queries:,} queries from {given.accounts} accounts; percent.\n")
    print(table(standings(contest, entries, "steal"), ("fidelity", "answered")))
    print(f"\n## Detectors\n\nCaught where {RATE:.0%} of benign queries may be flagged; percent.\n")
    print(table(standings(contest, entries, "detect"), ("mean", *ATTACKS, "benign flagged")))


if __name__ == "__main__":
    main()
