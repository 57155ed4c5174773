"""What the commands of the command line do; their words and options are in cli.py."""

import argparse
import csv
import os
import secrets
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from samelib.artifacts import ArtifactStore, load_folder
from samelib.data.groups import Group, load_group
from samelib.data.image_set import OutOfRangeWarning
from samelib.data.real import from_npz, list_images, read_image
from samelib.detectors.base import check_fpr
from samelib.detectors.same import SameDetector
from samelib.experiments import grid
from samelib.experiments.cells import TARGETS, cells_of, check_names, targets_of
from samelib.experiments.config import Preset, preset
from samelib.experiments.figures import draw
from samelib.experiments.report import grid_rows
from samelib.experiments.results import code_version
from samelib.experiments.run import evaluation, make_attack, train_victim
from samelib.gateway import QueryGateway
from samelib.metrics import accuracy
from samelib.models.classifiers import Victim
from samelib.plots import image_rows, use_style
from samelib.responses import ProofOfWork, Reject
from samelib.stamps import SpentStamps, StampOffice
from samelib.training import best_device

CHUNK = 1024  # images read and scored together


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
    given = {name: getattr(arguments, name) for name in arguments.options}
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


RESPONSES = ("reject", "proof-of-work", "watch", "off")


def serve(arguments: argparse.Namespace) -> None:
    try:
        from samelib.service import app, server
    except ImportError as error:
        raise ValueError(f"samelib serve needs {error.name}: pip install 'samelib[serve]'") from error
    kind = arguments.response
    work = ProofOfWork(arguments.base_bits, arguments.most_bits)
    office = _office(arguments.stamps) if kind == "proof-of-work" else None
    with server.bound_socket(arguments.host, arguments.port) as bound:
        device = best_device()
        victim = Victim.load(arguments.victim, device) if arguments.victim else None
        detector = SameDetector.load(arguments.detector, victim, device)
        refusal = Reject(detector.fpr if arguments.fpr is None else arguments.fpr)
        check_fpr(refusal.fpr, len(detector.calibration_scores))  # below every p-value it would refuse nobody
        response = {"reject": refusal, "proof-of-work": work}.get(kind)
        made = app.create_app(detector.victim, None if kind == "off" else detector, response, office)
        bound.listen()  # who reads the next line can connect
        print(f"{server.url_of(bound)}/docs  response: {response or kind}", flush=True)
        server.serve(made, bound)


def _office(stamps: str | None) -> StampOffice:
    """The office that the environment's secret and the file of spent stamps make; without both, one for this run."""
    secret = os.environ.get("SAMELIB_SECRET")
    if (secret is None) != (stamps is None):
        raise ValueError(
            "SAMELIB_SECRET and --stamps FILE go together: with a lasting secret and no file, a stamp could be spent "
            "again after a restart; a file without the secret remembers what nobody signs any more"
        )
    if secret is None:
        return StampOffice(secrets.token_bytes(32))
    return StampOffice(secret.encode(), spent=SpentStamps(stamps))


def reproduce(arguments: argparse.Namespace) -> None:
    check_names(arguments.data, arguments.tier, arguments.targets)
    warnings.simplefilter("ignore", OutOfRangeWarning)  # one attack of the audit leaves the range on purpose
    use_style()
    targets = targets_of(arguments.data, arguments.targets)
    for part in dict.fromkeys(TARGETS[target].part for target in targets):
        _reproduce_part(arguments, part, [target for target in targets if TARGETS[target].part == part])


def _reproduce_part(arguments: argparse.Namespace, part: str, targets: list[str]) -> None:
    """Measures and draws the targets whose rows are in one file."""
    path = grid.result_path(arguments.data, arguments.results, part)
    cells = cells_of(arguments.data, arguments.tier, arguments.seeds, targets)
    if arguments.dry_run:
        print(grid.plan(cells, path))
        return
    measured = grid.run(cells, path, arguments.workers)
    names = {str(cell) for cell in cells}
    rows = [row for row in grid_rows(path.stem, arguments.tier, path) if row["cell"] in names]
    print(f"{path}: {len(cells):,} cells, {measured:,} of them measured now")
    if rows[0]["code"] != code_version():
        print(f"measured at commit {rows[0]['commit']}; samelib's code has changed since")
    folder = Path(arguments.output) / f"{arguments.data}-{arguments.tier}"
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
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
