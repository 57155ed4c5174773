"""The precision that pays on the processor at hand, measured once a process and not guessed from its name.

A processor that has bfloat16 instructions may still be slower with them. A GPU is asked, not measured. The probe takes
milliseconds and leaves random numbers, threads and modes of the process as they were.
"""

import os
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch.backends import mkldnn

OVERRIDE = "SAMELIB_PRECISION"
CLEARLY = 1.3  # times as fast: a smaller gain is not worth that two runs on one machine could choose differently


def precision(device: torch.device) -> str:
    """The precision that models compute in on `device`: "bfloat16" where it is clearly faster, else "float32".

    The environment variable SAMELIB_PRECISION (float32 or bfloat16) decides instead, if it is set.

    Raises:
        ValueError: SAMELIB_PRECISION is something else.
    """
    chosen = os.environ.get(OVERRIDE)
    if not chosen:
        return "bfloat16" if bfloat16_pays(device.type) else "float32"
    if chosen not in ("float32", "bfloat16"):
        raise ValueError(f"{OVERRIDE} must be float32 or bfloat16, got {chosen!r}; unset it to let samelib measure")
    return chosen


def autocast(device: torch.device) -> torch.autocast:
    """The context in which models compute on `device`, see `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == "bfloat16")


@cache
def bfloat16_pays(device_type: str) -> bool:
    """Whether bfloat16 is clearly faster than float32 in an MLP of the ViT-Tiny (CPU), or native (GPU)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not (mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False  # PyTorch has no fast kernel for it
    tokens, up, down = torch.full((128, 192), 0.5), torch.full((768, 192), 0.5), torch.full((192, 768), 0.5)

    def mlp(reduced: bool) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            F.linear(F.gelu(F.linear(tokens, up)), down)

    return _clearly_faster(lambda: mlp(True), lambda: mlp(False))


def _clearly_faster(candidate: Callable[[], None], standard: Callable[[], None]) -> bool:
    """Whether `candidate` wins clearly in at least eight of ten turns: one lucky turn on a busy machine says nothing."""
    candidate(), standard()  # the first run of each allocates
    losses = 0
    for _ in range(10):
        losses += CLEARLY * _seconds(candidate) >= _seconds(standard)
        if losses > 2:
            return False
    return True


def _seconds(run: Callable[[], None]) -> float:
    """Processor time: unlike the clock, it stands still while another process has the core."""
    start = time.process_time()
    run()
    return time.process_time() - start
