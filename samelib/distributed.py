"""A group of processes that torchrun started: who this one is, and what the first does for all."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def process_group() -> tuple[int, int]:
    """(rank of this process, number of processes) under torchrun; (0, 1) for a process on its own."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def by_first(work: Callable[[], Any]) -> Any:
    """Does `work` in process 0 alone; every process of the group calls this, and gets what it returned or raised."""
    rank, processes = process_group()
    if processes == 1:
        return work()
    outcome = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # the others wait for the outcome, whatever it is
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
