"""Trained models and query logs on disk: each under the hash of all that decides it, made once, checked when read."""

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samelib.distributed import by_first
from samelib.precision import precision

MEASUREMENT = 2  # raise it when a change of the code moves a figure: older models are then made again
FORMAT = 1
WEIGHTS, CARD = "weights.safetensors", "card.json"
PUBLISHED = Path(__file__).parent / "published"  # see samelib.publish


class ArtifactError(RuntimeError):
    """A folder of weights cannot be written or does not hold what its card says; the message gives the remedy."""


class DamagedArtifactWarning(UserWarning):
    """A cached entry did not match its checksum; it was set aside and made again."""


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(record: dict, without: str | None = None) -> str:
    """SHA-256 of a JSON record, whatever the order of its keys; `without` is the key that will hold the digest."""
    text = json.dumps({k: v for k, v in record.items() if k != without}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _write_errors(folder: Path):
    """Says what to do about the two ways in which writing fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise ArtifactError(
                f"no space left for {folder}; free some and run again: training goes on from its last checkpoint"
            ) from error
        raise ArtifactError(
            f"cannot write {folder}: {error}; choose a place you may write (SAMELIB_CACHE names that of the cache)"
        ) from error


def save_folder(folder: Path, tensors: dict[str, Tensor], card: dict) -> dict:
    """Writes weights and card as one folder: complete under its name, or not there at all. Returns the whole card.

    Raises:
        ArtifactError: the place cannot be written, or the disk is full.
    """
    with _write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / WEIGHTS)
            card = card | {"format": FORMAT, "sha256": file_digest(temporary / WEIGHTS)}
            card = json.loads(json.dumps(card))  # as it will be read: tuples are lists
            card["card_sha256"] = json_digest(card, without="card_sha256")
            (temporary / CARD).write_text(json.dumps(card, indent=1) + "\n")
            temporary.chmod(0o755)  # a temporary folder is its owner's alone; a cache may be shared
            os.replace(temporary, folder)
            return card
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def load_card(folder: Path) -> dict:
    """The card of a folder written by `save_folder`; its weights are not read.

    Raises:
        ArtifactError: it is missing, damaged, or of another format version.
    """
    try:
        card = json.loads((folder / CARD).read_text())
        version, _ = card["format"], card["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder} holds no readable {CARD} ({error}); make the folder again") from error
    if version != FORMAT:
        raise ArtifactError(
            f"{folder} has format version {version}, this samelib reads {FORMAT}; "
            "make it again with this version, or install the one that wrote it"
        )
    if card.get("card_sha256") != json_digest(card, without="card_sha256"):
        raise ArtifactError(f"{folder / CARD} is damaged: its SHA-256 is not what it says; make the folder again")
    return card


def load_folder(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, card) of a folder written by `save_folder`.

    Raises:
        ArtifactError: a file is missing, of another format version, or a byte of the weights was changed.
    """
    card = load_card(folder)
    try:
        if file_digest(folder / WEIGHTS) != card["sha256"]:
            raise ArtifactError(f"{folder / WEIGHTS} is damaged: its SHA-256 is not the card's; make the folder again")
        return load_file(folder / WEIGHTS), card
    except OSError as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read ({error}); make the folder again") from error


def cache_root() -> Path:
    """`SAMELIB_CACHE`, or ~/.cache/samelib/models."""
    return Path(os.environ.get("SAMELIB_CACHE") or Path.home() / ".cache" / "samelib" / "models")


class ArtifactStore:
    """A folder of trained models and other tensors that took work to make, over a read-only layer of published ones.

    In a group of processes (torchrun) all of them call `get` and `trained` together: process 0 takes the lock, reads and
    writes; the others help to make what is missing, and end with the same tensors.

    Args:
        root: where; by default `SAMELIB_CACHE` or ~/.cache/samelib/models.
        published: folder of models that are read and never written; by default those that come with samelib.
    """

    def __init__(self, root: Path | str | None = None, published: Path | str | None = None):
        self.root = Path(root) if root else cache_root()
        self.published = Path(published) if published else PUBLISHED

    def path(self, spec: dict) -> Path:
        """The folder of the entry that `spec` decides, together with `MEASUREMENT`: the code it was made with."""
        return self.root / f"{spec['kind']}-{json_digest(spec | {'format': FORMAT, 'measurement': MEASUREMENT})[:16]}"

    def trained(
        self, spec: dict, build: Callable[[], nn.Module], fit: Callable[[nn.Module, Path], tuple[list[float], float]]
    ) -> tuple[nn.Module, dict]:
        """The trained module of `spec` and its card: read if it is there, else trained once, whoever asks.

        Args:
            spec: everything that decides the weights but the code, as JSON: kind, settings, data fingerprint, seed.
            build: makes the untrained module.
            fit: trains it in place, given the file for its checkpoints; returns (losses of every epoch, seconds).

        Returns:
            the module in eval mode; the card with `spec`, `losses`, `seconds` (restarts included), what it was trained
            on, and `sha256`.

        Raises:
            ArtifactError: the cache cannot be written.
        """

        def make(checkpoint: Path) -> tuple[dict[str, Tensor], dict]:
            module = build()
            losses, seconds = fit(module, checkpoint)
            device = next(module.parameters()).device
            card = {"losses": losses, "seconds": seconds, "device": device.type, "precision": precision(device)}
            card |= {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
            return module.state_dict(), card

        tensors, card = self.get(spec, make)
        module = build()
        module.load_state_dict(tensors)
        return module.eval(), card

    def get(self, spec: dict, make: Callable[[Path], tuple[dict[str, Tensor], dict]]) -> tuple[dict[str, Tensor], dict]:
        """The tensors and the card of `spec`: read if they are there, else made once, whoever asks.

        Args:
            spec: everything that decides the tensors, as JSON; `kind` begins the name of the entry.
            make: given a file for checkpoints, returns (tensors, what to write on the card); in a group of processes
                the same tensors in each.

        Raises:
            ArtifactError: the cache cannot be written.
        """
        folder = self.path(spec)
        checkpoint = folder.with_suffix(".checkpoint")
        with self._locked(folder):
            entry = by_first(lambda: self._read(folder))
            if entry is None:
                tensors, card = make(checkpoint)
                card = {"spec": spec, "measurement": MEASUREMENT} | card
                entry = tensors, by_first(lambda: save_folder(folder, tensors, card))
                by_first(lambda: checkpoint.unlink(missing_ok=True))
        return entry

    @contextmanager
    def _locked(self, folder: Path):
        """Others wait while process 0 of this group holds the lock of an entry; they hold none themselves."""
        lock = FileLock(f"{folder}.lock", mode=0o666)

        def acquire() -> None:
            with _write_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                lock.acquire()

        by_first(acquire)
        try:
            yield
        finally:
            lock.release()  # nothing to do where it was not acquired

    def _read(self, folder: Path) -> tuple[dict[str, Tensor], dict] | None:
        """The entry in this folder, or the published one of its name; a damaged one is set aside and counts as none."""
        if not folder.exists():
            published = self.published / folder.name
            return load_folder(published) if published.exists() else None
        try:
            return load_folder(folder)
        except ArtifactError as error:
            aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns()}")
            os.replace(folder, aside)
            warnings.warn(f"{error}; it is now {aside.name}, and is made again", DamagedArtifactWarning, stacklevel=5)
            return None

    def entries(self) -> list[tuple[Path, int]]:
        """(path, bytes) of everything the store holds: models, checkpoints, entries set aside."""
        if not self.root.is_dir():
            return []
        paths = [p for p in sorted(self.root.iterdir()) if p.suffix != ".lock"]
        return [(p, sum(f.stat().st_size for f in [p, *p.rglob("*")] if f.is_file())) for p in paths]

    def clear(self) -> int:
        """Deletes all entries; returns the bytes freed. Locks stay: another process may hold one."""
        entries = self.entries()
        for path, _ in entries:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return sum(size for _, size in entries)
