"""The command line: samelib data | fit | score | attack | reproduce | cache."""

import argparse
import csv
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from samelib import __version__
from samelib.artifacts import ArtifactError, ArtifactStore, load_folder
from samelib.attacks.jbda import DIRECTIONS
from samelib.attacks.knockoff import REWARDS
from samelib.data.groups import SIZES, Group, load_group
from samelib.data.image_set import OutOfRangeWarning
from samelib.data.real import DataError, cifar100_superclasses, from_npz, list_images, read_image
from samelib.detectors.same import SameDetector
from samelib.experiments import grid
from samelib.experiments.cells import TARGETS, cells_of
from samelib.experiments.config import Preset, preset
from samelib.experiments.figures import draw
from samelib.experiments.report import grid_rows
from samelib.experiments.results import code_version
from samelib.experiments.run import ATTACKS, evaluation, make_attack, train_victim
from samelib.gateway import QueryGateway
from samelib.metrics import accuracy
from samelib.models.classifiers import Victim
from samelib.plots import image_rows, use_style
from samelib.training import best_device

GROUP_HELP = "glyphs or shapes (embedded, no download), mnist, cifar10, or path:FOLDER / path:FILE.npz of your own"
TIER_HELP = "how much data and training: smoke (seconds), lecture (minutes on two cores), paper (a GPU)"
CHUNK = 1024


def superclasses(text: str) -> list[int]:
    """The command line's "0,0,1,..." or "cifar100"."""
    return cifar100_superclasses() if text == "cifar100" else [int(number) for number in text.split(",")]


ATTACK_OPTIONS = {
    "labels": {"choices": ("soft", "hard"), "help": "train on probabilities (default) or on the class named alone"},
    "reward": {"choices": (*REWARDS, "all"), "help": "what the bandit is paid for (default: all)"},
    "superclasses": {"type": superclasses, "metavar": "N,N,...", "help": "for each proxy class its superclass, or cifar100: a tree of bandits"},
    "step": {"type": float, "help": "how far a pixel moves in a round (default: 0.1)"},
    "step_range": {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH"),
                   "help": "range of pixel values in which the step is meant (default: -1 1)"},
    "direction": {"choices": DIRECTIONS, "help": "raise (+, default) or lower (-) the victim's class, or raise another"},
    "reservoir": {"type": int, "help": "the most new images a round (default: no limit)"},
    "epsilon": {"type": float, "help": "length of a forward difference"},
    "directions": {"type": int, "help": "random directions of a gradient estimate"},
    "student_steps": {"type": int, "help": "steps of the substitute for each of the generator"},
}  # fmt: skip
OPTIONS_OF = {
    "noise": ("labels",),
    "knockoff": ("labels",),
    "adaptive-knockoff": ("labels", "reward", "superclasses"),
    "jbda": ("labels", "step", "step_range", "direction", "reservoir"),
    "dfme": ("epsilon", "directions", "student_steps"),
}


def data(arguments: argparse.Namespace) -> None:
    group = _group(arguments)
    for name, images in group.sets().items():
        shape = " x ".join(map(str, images.image_shape))
        print(f"{name:13} {len(images):7,} images {shape:12} {len(images.classes):4} classes  {images.name}")
    print(f"fingerprint   {group.fingerprint}")
    if arguments.sheet:
        image_rows({name: images.images[:12] for name, images in group.sets().items()}).savefig(arguments.sheet)
        print(f"contact sheet {arguments.sheet}")


def fit(arguments: argparse.Namespace) -> None:
    folder = _new_folder(arguments.detector)
    group = _group(arguments).to(best_device())
    settings = preset(arguments.tier, group)
    store = ArtifactStore()
    victim = train_victim(group, settings, arguments.seed, store)
    found = accuracy(victim(group.benign_test.pixels()), group.benign_test.labels)
    print(f"victim: {settings.architecture}, accuracy {found:.1%} on {len(group.benign_test):,} held-out images")
    same = settings.same.as_author_code() if arguments.protocol == "author_code" else settings.same
    detector = SameDetector(same, arguments.seed).fit(group, victim, store, arguments.fpr)
    detector.save(folder)
    flagged = float(detector.flag(group.benign_test.pixels()).float().mean())
    print(f"benign images flagged: {flagged:.1%} (calibrated to {arguments.fpr:.1%})")
    print(f"detector: {folder}\nnext: samelib score {folder} IMAGES")


def score(arguments: argparse.Namespace) -> None:
    detector = SameDetector.load(arguments.detector, device=best_device())
    shape = detector.victim.image_shape
    names, chunks = _images(arguments.images, shape)
    output = open(arguments.output, "w", newline="") if arguments.output else sys.stdout  # noqa: SIM115
    try:
        table = csv.writer(output)
        table.writerow(["image", "score", "reconstruction_error", "deviation", "p_value", "flagged"])
        flagged, threshold = 0, detector.threshold
        bar = tqdm(total=len(names), unit="image", disable=not sys.stderr.isatty())
        for start, images in chunks:
            terms = detector.terms(images)
            scores = detector.combine(terms)
            columns = (scores, *terms, detector.p_values_of(scores))
            for i, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
                suspicious = values[0] > threshold
                flagged += suspicious
                table.writerow([names[start + i], *(f"{v:.6g}" for v in values), int(suspicious)])
            bar.update(len(images))
    finally:
        if arguments.output:
            output.close()
    where = f"; table: {arguments.output}" if arguments.output else ""
    print(f"{flagged:,} of {len(names):,} images flagged at {detector.fpr:.1%}{where}", file=sys.stderr)


def _images(path: str, shape: tuple[int, int, int]):
    """(names, iterator of (start, uint8 images)) of an image file, a folder or an .npz; a folder is read in chunks."""
    source = Path(path)
    if source.suffix == ".npz":
        images = from_npz(source, source.stem).images
        return [f"{source.name}[{i}]" for i in range(len(images))], _chunks(len(images), lambda i: images[i])
    files = list_images(source) if source.is_dir() else [source]

    def read(part: slice) -> torch.Tensor:
        return torch.stack([torch.from_numpy(read_image(file, shape)) for file in files[part]])

    return [str(file) for file in files], _chunks(len(files), read)


def _chunks(count: int, read):
    return ((start, read(slice(start, start + CHUNK))) for start in range(0, count, CHUNK))


def attack(arguments: argparse.Namespace) -> None:
    folder = _new_folder(arguments.output)
    group = _group(arguments).to(best_device())
    settings = preset(arguments.tier, group)
    thief = make_attack(arguments.attack, group, settings, arguments.seed, **_attack_options(arguments, settings))
    budget = settings.budgets[1] if arguments.budget is None else arguments.budget
    thief.check_budget(budget)  # before a victim is trained for it
    victim, detector = _victim(arguments, group, settings)
    gateway = QueryGateway(victim, budget, detector)
    try:
        result = thief.run(gateway, evaluation(victim, group.benign_test))
    finally:
        if gateway.spent:  # whatever happened: answered queries were paid for
            gateway.log.save(folder / "queries.npz")
            print(f"query log: {folder / 'queries.npz'}, {gateway.spent:,} queries")
    worth = result.curve[-1]
    Victim.of(result.substitute, group.image_shape, group.classes, settings.architecture).save(
        folder / "substitute", attack=arguments.attack, seed=arguments.seed, data=group.fingerprint, **worth
    )
    print(f"substitute: {folder / 'substitute'}, accuracy {worth['accuracy']:.1%}, fidelity {worth['fidelity']:.1%}")
    if result.stopped:
        print(f"stopped after {result.queries:,} of {gateway.budget:,} queries: {result.stopped}")
    if detector:
        flagged = float((gateway.log.scores > detector.threshold).float().mean())
        print(f"queries flagged: {flagged:.1%} (benign ones: {detector.fpr:.1%} by calibration)")
    else:
        print(f"next: samelib score DETECTOR {folder / 'queries.npz'}")


def _attack_options(arguments: argparse.Namespace, settings: Preset) -> dict:
    """The options that were given, as the attack's constructor takes them."""
    given = {name: getattr(arguments, name, None) for name in ATTACK_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    return {"attack": replace(settings.dfme, **given)} if arguments.attack == "dfme" else given


def _victim(arguments: argparse.Namespace, group: Group, settings: Preset) -> tuple[Victim, SameDetector | None]:
    """The saved victim, with its detector where that was saved along; or the group's own."""
    if not arguments.victim:
        return train_victim(group, settings, arguments.seed), None
    detector = None
    if load_folder(Path(arguments.victim))[1].get("kind") == "same-detector":
        detector = SameDetector.load(arguments.victim, device=best_device())
    victim = detector.victim if detector else Victim.load(arguments.victim, best_device())
    if (victim.image_shape, victim.classes) != (group.image_shape, group.classes):
        raise ValueError(
            f"the victim in {arguments.victim} takes images {victim.image_shape} and names {victim.classes} classes, "
            f"{arguments.data} has {group.image_shape} and {group.classes}; choose its --data"
        )
    return victim, detector


def reproduce(arguments: argparse.Namespace) -> None:
    targets, path = arguments.targets, grid.result_path(arguments.data, arguments.results)
    cells = cells_of(arguments.data, arguments.tier, arguments.seeds, targets)
    if arguments.dry_run:
        print(grid.plan(cells, path))
        return
    measured = grid.run(cells, path, arguments.workers)
    names = {str(cell) for cell in cells}
    rows = [row for row in grid_rows(arguments.data, arguments.tier, path) if row["cell"] in names]
    print(f"{path}: {len(cells):,} cells, {measured:,} of them measured now")
    if rows[0]["code"] != code_version():
        print(f"measured at commit {rows[0]['commit']}; samelib's code has changed since")
    folder = Path(arguments.output) / f"{arguments.data}-{arguments.tier}"
    folder.mkdir(parents=True, exist_ok=True)
    use_style()
    for target in TARGETS if "all" in targets else targets:
        for file in draw(target, rows, folder):
            print(f"{target}: {file}")


def cache(arguments: argparse.Namespace) -> None:
    store = ArtifactStore()
    print(f"cache: {store.root}")
    if arguments.clear:
        print(f"freed {store.clear() / 2**20:.1f} MiB")
        return
    entries = store.entries()
    for path, size in entries:
        print(f"{size / 2**20:9.2f} MiB  {path.name}")
    print(f"{sum(size for _, size in entries) / 2**20:9.2f} MiB  in {len(entries)} entries; --clear deletes them all")


def _new_folder(name: str) -> Path:
    """Raises FileExistsError, before any work is done for it, when something of that name is there."""
    folder = Path(name)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another name")
    return folder


def _group(arguments: argparse.Namespace):
    return load_group(arguments.data, arguments.tier, proxy=arguments.proxy, outliers=arguments.outliers)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="samelib",
        description="Detects model extraction queries with SAME: reconstruction error plus deviation of predictions.",
        epilog="A first round: samelib fit my-detector --tier smoke; samelib score my-detector FOLDER_OF_IMAGES",
    )
    top.add_argument("--version", action="version", version=f"samelib {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run, help, description, **more):
        made = commands.add_parser(run.__name__, help=help, description=description, **more)
        made.set_defaults(run=run)
        return made

    def group_options(made):
        made.add_argument("--data", default="glyphs", help=GROUP_HELP + " (default: glyphs)")
        made.add_argument("--tier", choices=SIZES, default="lecture", help=TIER_HELP + " (default: lecture)")
        made.add_argument("--proxy", help="path:... to use as the attacker's proxy set")
        made.add_argument("--outliers", help="path:... to use as the baselines' outlier set")

    made = command(data, "show a group of data sets", "Loads a group, shows its six disjoint sets and what they hold.")
    group_options(made)
    made.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet of all six sets")

    made = command(fit, "train victim and detector, save the detector",
                   "Trains a victim, the masked autoencoder and the auxiliary model (or takes them from the cache), "
                   "calibrates the threshold on held-out benign images and saves all of it as one folder.")  # fmt: skip
    made.add_argument("detector", metavar="DETECTOR", help="the folder to write")
    group_options(made)
    made.add_argument("--seed", type=int, default=0, help="of weights, order and masks (default: 0)")
    made.add_argument("--protocol", choices=("fixed", "author_code"), default="fixed",
                      help="what the paper says, done soundly, or what its released code does (default: fixed)")  # fmt: skip
    made.add_argument("--fpr", type=float, default=0.05, help="share of benign queries to flag (default: 0.05)")

    made = command(score, "score images with a saved detector",
                   "Writes one CSV row an image: score (higher = more suspicious), its two terms, the conformal p-value "
                   "(small = few benign images look as strange) and whether it is flagged.")  # fmt: skip
    made.add_argument("detector", metavar="DETECTOR", help="a folder written by samelib fit")
    made.add_argument("images", metavar="IMAGES", help="an image, a folder of images (resized to fit), or an .npz file")
    made.add_argument("--output", metavar="FILE.csv", help="where to write the table (default: standard output)")

    made = command(attack, "steal a model, save the query log and the copy",
                   "Runs an attack against a saved victim or a group's own, and writes a folder: queries.npz (images, "
                   "answers, and scores where a detector watched), and the substitute as safetensors. The attacker's "
                   "proxy and seed images are those of the group.",
                   epilog="samelib attack jbda --help shows the options of one attack")  # fmt: skip
    attacks = made.add_subparsers(dest="attack", required=True, metavar="ATTACK")
    for name, kind in ATTACKS.items():
        first_line = kind.__doc__.splitlines()[0]
        made = attacks.add_parser(name, help=first_line, description=first_line)
        made.add_argument("output", metavar="FOLDER", help="the folder to write")
        group_options(made)
        made.add_argument("--victim", metavar="FOLDER", help="a detector's folder (it then watches), or a substitute's")
        made.add_argument("--budget", type=int, help="queries to spend (default: the tier's larger budget)")
        made.add_argument("--seed", type=int, default=0, help="of queries and weights (default: 0)")
        for option in OPTIONS_OF[name]:
            made.add_argument("--" + option.replace("_", "-"), **ATTACK_OPTIONS[option])

    made = command(reproduce, "measure and draw the paper's tables and figures",
                   "Measures what is missing for these tables and figures, a cell at a time (it may be killed and run "
                   "again at any point), adds the rows to results/GROUP.jsonl, and draws all from the rows.",
                   epilog="; ".join(f"{name}: {what}" for name, (what, _) in TARGETS.items()))  # fmt: skip
    made.add_argument("targets", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    made.add_argument("--data", default="mnist", help="mnist (default), cifar10, glyphs or shapes")
    made.add_argument("--tier", default="lecture", help=TIER_HELP + " (default: lecture)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    made.add_argument("--results", metavar="FOLDER", help="where the rows are (default: results/ of the checkout)")
    made.add_argument("--output", metavar="FOLDER", default="reproduced", help="where to draw (default: reproduced/)")
    made.add_argument("--workers", choices=grid.WORKERS, default="serial",
                      help="one process, or a Ray cluster (pip install 'samelib[scale]')")  # fmt: skip
    made.add_argument("--dry-run", action="store_true", help="only say what would be measured, and for how long")

    made = command(cache, "list or clear the trained models",
                   "Trained models are kept under the hash of everything that decides them; SAMELIB_CACHE says where.")  # fmt: skip
    made.add_argument("--clear", action="store_true", help="delete all of them")
    return top


def main(words: list[str] | None = None) -> None:
    arguments = parser().parse_args(words)
    warnings.simplefilter("once", OutOfRangeWarning)
    try:
        arguments.run(arguments)
    except (DataError, ArtifactError, grid.CellError, ArithmeticError, ValueError, TypeError, OSError) as error:
        sys.exit(f"samelib: {error}")
    except KeyboardInterrupt:
        sys.exit("samelib: stopped; the training of a victim or detector goes on from its last checkpoint")


if __name__ == "__main__":
    main()
