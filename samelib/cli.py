"""The command line: samelib data | fit | score | attack | serve | listen | accounts | cache."""

import csv
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm.auto import tqdm

from samelib import __version__
from samelib.attacks import ATTACKS, AttackResult, make_attack
from samelib.attacks.jbda import DIRECTIONS, PLACES
from samelib.attacks.knockoff import ORACLES, REWARDS
from samelib.data.groups import SIZES, load_group
from samelib.data.image_set import OutOfRangeWarning
from samelib.data.real import DataError, cifar100_superclasses, from_npz, list_images, read_image
from samelib.detectors import SAVED, load_detector
from samelib.detectors.power import WeakDetectorWarning, power_table
from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import SamePlus
from samelib.gateway import Gateway, QueryGateway
from samelib.metrics import accuracy, binomial_interval
from samelib.models.classifiers import Victim
from samelib.plots import image_rows
from samelib.presets import evaluation, preset, train_victim
from samelib.service.commands import accounts, extra, listen, serve, used_options
from samelib.store import ArtifactStore, load_card
from samelib.training import best_device

CHUNK = 1024  # images read and scored together
METHODS = {"same": SameDetector, "same-plus": SamePlus}
ATTACK_OPTIONS = {  # the others are refused: who gives one expects it to matter
    "noise": {"labels"},
    "knockoff": {"labels", "proxy"},
    "adaptive-knockoff": {"labels", "proxy", "reward", "superclasses", "clusters"},
    "jbda": {"labels", "step", "step_range", "direction", "reservoir", "where"},
    "dfme": {"epsilon", "directions", "student_steps"},
    "knockoff-preprocessed": {"labels", "proxy"},
    "knockoff-filtered": {"labels", "proxy"},
    "knockoff-purified": {"labels", "proxy"},
    "knockoff-bargain": {"labels", "proxy"},
    "knockoff-mixed": {"labels", "proxy", "share"},
    "knockoff-self-trained": {"labels", "proxy", "confidence"},
}


class Commands(click.Group):
    """Commands that end in one line where they cannot do what they were asked."""

    def invoke(self, context: click.Context):
        warnings.simplefilter("once", OutOfRangeWarning)
        try:
            return super().invoke(context)
        except click.exceptions.Exit:  # a RuntimeError that means success
            raise
        except (RuntimeError, ValueError, ArithmeticError, OSError) as error:
            sys.exit(f"samelib: {error}")
        except KeyboardInterrupt:
            sys.exit("samelib: stopped; the training of a victim or detector goes on from its last checkpoint")


@click.group(
    cls=Commands,
    context_settings={"show_default": True, "max_content_width": 110},
    epilog="A first round: samelib fit my-detector --tier smoke; samelib score my-detector FOLDER_OF_IMAGES",
)
@click.version_option(__version__, message="samelib %(version)s")
def samelib() -> None:
    """Detects model extraction queries with SAME: reconstruction error plus deviation of predictions."""


def new_folder(name: str) -> Path:
    if Path(name).exists():
        raise FileExistsError(f"{name} exists; remove it or choose another name")
    return Path(name)


def superclasses(text: str) -> list[int]:
    return cifar100_superclasses() if text == "cifar100" else [int(number) for number in text.split(",")]


OWN_GROUP = "glyphs, glyphs-matched or shapes (embedded), mnist, cifar10, or path:FOLDER / path:FILE.npz of your own."
HOW_MUCH = "How much data and training: seconds, minutes on two cores, or a GPU's work."
data_option = click.option("--data", default="glyphs", help=OWN_GROUP)
tier_option = click.option("--tier", type=click.Choice(list(SIZES)), default="lecture", help=HOW_MUCH)
seed_option = click.option("--seed", default=0, help="Of weights, order, masks and queries.")
detector_argument = click.argument("detector", type=Path)


@samelib.command()
@data_option
@tier_option
@click.option("--proxy", help="path:... to use as the attacker's proxy set.")
@click.option("--outliers", help="path:... to use as the baselines' outlier set.")
@click.option("--sheet", metavar="FILE.png", help="Draw a contact sheet of all six sets.")
def data(data: str, tier: str, proxy: str | None, outliers: str | None, sheet: str | None) -> None:
    """Show the six disjoint sets of a group."""
    group = load_group(data, tier, proxy=proxy, outliers=outliers)
    for name, images in group.sets().items():
        shape = " x ".join(map(str, images.image_shape))
        print(f"{name:13} {len(images):7,} images {shape:12} {len(images.classes):4} classes  {images.name}")
    print(f"fingerprint   {group.fingerprint}")
    if sheet:
        image_rows({name: images.images[:12] for name, images in group.sets().items()}).savefig(sheet)
        print(f"contact sheet {sheet}")


@samelib.command()
@click.argument("detector", type=new_folder)
@data_option
@tier_option
@seed_option
@click.option("--method", type=click.Choice(list(METHODS)), default="same-plus",
              help="The paper's score, or several views of each query from the same models.")  # fmt: skip
@click.option("--fpr", default=0.05, help="Share of benign queries to flag.")
def fit(detector: Path, data: str, tier: str, seed: int, method: str, fpr: float) -> None:
    """Train a victim and its detector.

    Trains a victim, the masked autoencoder and the auxiliary model (or takes them from the cache), calibrates the
    threshold on held-out benign images, and writes all of it as the folder DETECTOR. Says how many it flags of images that
    no honest user would send, black, noisy or faint ones among them.
    """
    warnings.simplefilter("ignore", WeakDetectorWarning)  # the table says it
    group = load_group(data, tier, device=best_device())
    settings = preset(tier, group.image_shape)
    METHODS[method].check_calibration(len(group.calibration), fpr)  # before the victim is trained
    victim, benign = train_victim(group, settings, seed), group.benign_test
    correct = accuracy(victim(benign.pixels()), benign.labels)
    print(f"victim: {settings.architecture}, accuracy {correct:.1%} on {len(benign):,} held-out images")
    same = METHODS[method](settings.same, seed).fit(group.victim_train, group.calibration, victim, fpr=fpr)
    same.save(detector)
    flagged = int(same.flag(benign.pixels()).sum())
    low, high = (100 * bound for bound in binomial_interval(flagged, len(benign)))
    print(f"benign images flagged: {100 * flagged / len(benign):.2g} %, 95 % interval {low:.2g} to {high:.2g} ", end="")
    print(f"(calibrated to {100 * fpr:g} %)\naltered benign images flagged:\n{power_table(same.power)}")
    print(f"detector: {detector}\nnext: samelib score {detector} IMAGES")


@samelib.command()
@detector_argument
@click.argument("images", type=Path)
@click.option("--output", type=click.File("w"), default="-", metavar="FILE.csv", help="Where to write the table.")
def score(detector: Path, images: Path, output) -> None:
    """Score images with a saved detector.

    IMAGES is an image, a folder of them (resized to fit) or an .npz file, DETECTOR a folder written by samelib fit. Writes one CSV row an image: score (higher = more suspicious), what it is made of, the conformal p-value
    (small = few benign images look as strange) and whether it is flagged. Of a file that cannot be read the row says why, and the
    exit status is 1.
    """
    same = load_detector(detector, device=best_device())
    table = csv.DictWriter(output, ["image", "score", *same.parts, "p_value", "flagged", "error"], lineterminator="\n")
    table.writeheader()
    count = flagged = unreadable = 0
    stream = tqdm(read_images(images, same.image_shape), unit="image", disable=not sys.stderr.isatty())
    while chunk := list(islice(stream, CHUNK)):
        rows = iter(score_rows(same, [image for _, image in chunk if torch.is_tensor(image)]))
        for name, image in chunk:
            row = next(rows) if torch.is_tensor(image) else {"error": image}
            table.writerow({"image": name} | row)
            count, flagged, unreadable = count + 1, flagged + row.get("flagged", 0), unreadable + ("error" in row)
    print(f"{flagged:,} of {count - unreadable:,} images flagged at {same.fpr:.1%}", file=sys.stderr)
    if unreadable:
        sys.exit(f"samelib: {unreadable:,} of {count:,} images cannot be read; the column error says why")


def read_images(path: Path, image_shape: tuple[int, int, int]) -> Iterator[tuple[str, Tensor | DataError]]:
    """(name, uint8 [C, H, W]) of each image of a file, a folder or an .npz; in place of an unreadable one its error."""
    if path.suffix == ".npz":
        yield from ((f"{path.name}[{i}]", image) for i, image in enumerate(from_npz(path, path.stem).images))
        return
    for file in list_images(path) if path.is_dir() else [path]:
        try:
            yield str(file), torch.from_numpy(read_image(file, image_shape))
        except DataError as error:
            yield str(file), error


def score_rows(detector: SameDetector, images: list[Tensor]) -> list[dict]:
    """What the table says of images uint8 [C, H, W]."""
    if not images:
        return []
    parts = detector.explain(torch.stack(images))
    parts["p_value"], flags = detector.p_values_of(parts["score"]), parts["score"] > detector.threshold
    rows = zip(*(values.tolist() for values in parts.values()), flags.tolist(), strict=True)
    return [{k: f"{v:.6g}" for k, v in zip(parts, row, strict=False)} | {"flagged": int(row[-1])} for row in rows]


@samelib.command(epilog="\n\n".join(f"{name}: {kind.__doc__.splitlines()[0]}" for name, kind in ATTACKS.items()))
@click.argument("attack", type=click.Choice(list(ATTACKS)))
@click.argument("folder", type=new_folder)
@data_option
@tier_option
@click.option(
    "--victim",
    type=Path,
    metavar="FOLDER",
    help="Of a detector (it then watches), or of a substitute; without it the group's own.",
)
@click.option("--url", help="A live service to attack; --victim then only measures the copy.")
@click.option(
    "--api-key", envvar="SAMELIB_API_KEY", help="--url: names the account, where the service bans by account."
)
@click.option("--budget", type=int, help="Queries to spend; by default the tier's larger budget.")
@seed_option
@click.option("--labels", type=click.Choice(["soft", "hard"]), help="All but dfme: learn probabilities, or the class.")
@click.option("--proxy", help="every knockoff: path:... to use in place of the group's proxy set.")
@click.option(
    "--reward", type=click.Choice([*REWARDS, "all", *ORACLES]), help="adaptive-knockoff: what the bandit is paid for."
)
@click.option(
    "--superclasses",
    type=superclasses,
    metavar="N,N,...",
    help="adaptive-knockoff: for each proxy class its superclass, or cifar100: a tree of bandits.",
)
@click.option("--clusters", type=int, help="adaptive-knockoff: so many clusters of the proxy set, not its classes.")
@click.option("--step", type=float, help="jbda: how far a pixel moves in a round.")
@click.option("--step-range", type=(float, float), help="jbda: the range of pixels in which the step is meant.")
@click.option("--direction", type=click.Choice(DIRECTIONS), help="jbda: raise or lower the class, or raise another.")
@click.option("--reservoir", type=int, help="jbda: the most new images a round.")
@click.option("--where", type=click.Choice(PLACES), help="jbda: which pixels are touched.")
@click.option("--share", type=float, help="knockoff-mixed: of benign queries among all.")
@click.option("--confidence", type=float, help="knockoff-self-trained: from which on the copy teaches itself.")
@click.option("--epsilon", type=float, help="dfme: length of a forward difference.")
@click.option("--directions", type=int, help="dfme: random directions of a gradient estimate.")
@click.option("--student-steps", type=int, help="dfme: steps of the substitute for each of the generator.")
def attack(
    attack, folder: Path, data, tier, victim: Path | None, url, api_key, budget: int | None, seed: int, **options
) -> None:
    """Steal a model; save the query log and the copy.

    Attacks a group's own victim, a saved one or a live service, and writes into FOLDER: queries.npz (images, answers, and
    scores where a detector watched), and the substitute. The attacker's proxy and seed images are those of the group.
    """
    options = used_options(attack, ATTACK_OPTIONS, options)
    group = load_group(data, tier, proxy=options.pop("proxy", None), device=best_device())
    settings = preset(tier, group.image_shape)
    attacker = make_attack(attack, group, settings, seed, **options)
    budget = settings.budgets[1] if budget is None else budget
    attacker.check_budget(budget)  # before a victim is trained for it

    owned, detector = load_victim(victim) if victim else (None, None)
    if not url:
        owned = owned or train_victim(group, settings, seed)
    gateway = remote_gateway(url, budget, api_key) if url else QueryGateway(owned, budget, detector)
    for source in filter(None, (gateway, owned)):
        if (source.image_shape, source.classes) != (group.image_shape, group.classes):
            raise ValueError(
                f"the victim takes images {source.image_shape} and names {source.classes} classes, {data} has "
                f"{group.image_shape} and {group.classes}; choose its --data"
            )
    try:
        result = attacker.run(gateway, evaluation(owned, group.benign_test) if owned else None)
    finally:
        if gateway.spent:  # whatever happened: answered queries were paid for
            gateway.log.save(folder / "queries.npz")
            print(f"query log: {folder / 'queries.npz'}, {gateway.spent:,} queries")
    measured = result.curve[-1] if result.curve else {}
    Victim.of(result.substitute, group.image_shape, group.classes, settings.architecture).save(
        folder / "substitute", attack=attack, seed=seed, data=group.fingerprint, **measured
    )
    print(f"substitute: {folder / 'substitute'}")
    print_result(result, gateway, detector)


def print_result(result: AttackResult, gateway: Gateway, detector: SameDetector | None) -> None:
    """What the attack was worth, and what the service made of it."""
    for measured in result.curve[-1:]:
        print(f"accuracy {measured['accuracy']:.1%}, fidelity {measured['fidelity']:.1%}")
    if result.stopped:
        print(f"stopped after {result.queries:,} of {gateway.budget:,} queries: {result.stopped}")
    print(f"answered: {result.answered:,}, refused: {result.queries - result.answered:,}", end="")
    print(f", hashes: {int(gateway.log.hashes.sum()):,}" if hasattr(gateway.log, "hashes") else "")
    if detector and hasattr(gateway.log, "scores"):
        flagged = float((gateway.log.scores > detector.threshold).float().mean())
        print(f"queries flagged: {flagged:.1%} (benign ones: {detector.fpr:.1%} by calibration)")
    else:
        print("next: samelib score DETECTOR FOLDER/queries.npz")


def remote_gateway(url: str, budget: int, api_key: str | None) -> Gateway:
    with extra("attack --url"):
        from samelib.service.client import RemoteGateway
    return RemoteGateway(url, budget, api_key=api_key)


def load_victim(folder: Path) -> tuple[Victim, SameDetector | None]:
    """The saved victim, with its detector where that was saved along."""
    if load_card(folder).get("kind") not in SAVED:
        return Victim.load(folder, best_device()), None
    detector = load_detector(folder, device=best_device())
    return detector.victim, detector


for command in (serve, listen, accounts):
    samelib.add_command(command)


@samelib.command()
@click.option("--clear", is_flag=True, help="Delete all of them.")
def cache(clear: bool) -> None:
    """List or clear the trained models.

    They are kept under the hash of everything that decides them; SAMELIB_CACHE says where.
    """
    store = ArtifactStore()
    print(f"cache: {store.root}")
    if clear:
        print(f"freed {store.clear() / 2**20:.1f} MiB")
        return
    entries = store.entries()
    for path, size in entries:
        print(f"{size / 2**20:9.2f} MiB  {path.name}")
    print(f"{sum(size for _, size in entries) / 2**20:9.2f} MiB  in {len(entries)} entries; --clear deletes them all")


def main(words: list[str] | None = None) -> None:
    """Runs one command; returns where it succeeded, so that a build can go on."""
    try:
        samelib(words, prog_name="samelib")
    except SystemExit as stop:
        if stop.code:
            raise


if __name__ == "__main__":
    main()
