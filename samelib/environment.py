"""Says what samelib runs on, and plainly what is missing: the first cell of every notebook."""

import platform
from importlib import metadata

import torch
from packaging.requirements import Requirement

import samelib


def check_environment() -> None:
    """Prints versions and device.

    Raises:
        RuntimeError: a package is missing or outside the range samelib was made for, with the command that mends it.
    """
    try:
        requirements = [Requirement(text) for text in metadata.requires("samelib") or []]
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed: nothing declares what it needs
        requirements = []
    needed = [need for need in requirements if not need.marker or need.marker.evaluate({"extra": ""})]
    if faults := [fault for need in needed if (fault := _fault_of(need))]:
        command = "pip install " + " ".join(f"'{need}'" for need in needed)
        raise RuntimeError(f"{'; '.join(faults)}. Mend it with: {command}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"samelib {samelib.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"device: {device}")


def _fault_of(requirement: Requirement) -> str | None:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, samelib needs {requirement.specifier}"
    return None
