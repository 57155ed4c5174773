"""Detectors of extraction queries, and the folders that SAME's are kept in."""

from pathlib import Path

from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import SamePlus
from samelib.models.classifiers import Victim
from samelib.store import ArtifactError, load_card

SAVED = {kind.kind: kind for kind in (SameDetector, SamePlus)}


def load_detector(folder: Path | str, victim: Victim | None = None, device: str = "cpu") -> SameDetector:
    """The detector that `save` wrote into a folder, whichever it is; arguments and errors as for `SameDetector.load`."""
    kind = load_card(Path(folder)).get("kind")
    if kind not in SAVED:
        raise ArtifactError(f"{folder} holds a {kind}, not a detector")
    return SAVED[kind].load(folder, victim, device)
