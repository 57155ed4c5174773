"""Keeps the memory of one training step for the next."""

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def give_back_freed_memory() -> None:
    """Has glibc's malloc return to the system what it kept (see `keep_freed_memory`), so that a peak can be measured."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@cache
def keep_freed_memory() -> None:
    """Lets glibc's malloc keep large freed blocks, for the rest of the process; elsewhere it does nothing.

    As shipped, glibc fetches every tensor above 32 MiB from the system anew and gives it back when it is freed. The
    kernel then clears each page again in every step, and the ViT-Tiny's activations are of that size
    (reproduction/benchmarks/mae.py measures it). The process stays as large as it was at its peak.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
