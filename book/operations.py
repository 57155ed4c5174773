"""Counts the floating-point operations of a chapter: `build.py` has each kernel import it before the first cell.

Linear layers, convolutions and attention's products count, a multiplication and an addition as two operations; where a
gradient follows, its two passes count too. The number is written when the kernel ends, to the file that
SAMELIB_OPERATIONS names. It is the same on every machine, which seconds are not.
"""

import atexit
import os
import sys
from pathlib import Path

total = 0


def forward_operations(module, inputs: tuple, output) -> int:
    """Operations of one forward pass of a layer; 0 for those that do not count, or whose parts count themselves."""
    kind = type(module).__name__
    if kind == "Linear":
        return 2 * output.numel() * module.in_features
    if kind == "Conv2d":
        return 2 * output.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
    if kind == "Attention":  # timm's
        samples, tokens, width = inputs[0].shape
        return 4 * samples * tokens**2 * width
    return 0


def count(module, inputs: tuple, output) -> None:
    global total
    operations = forward_operations(module, inputs, output)
    if operations:
        total += 3 * operations if output.requires_grad else operations


def watch(*_) -> None:
    """Counts from now on, if the kernel has loaded PyTorch: a notebook that does not need it need not wait for it."""
    if "torch" in sys.modules and not watch.done:
        sys.modules["torch"].nn.modules.module.register_module_forward_hook(count)
        watch.done = True


watch.done = False
watch()
if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
    shell.events.register("post_run_cell", watch)  # the cell that sets a chapter up computes nothing
if path := os.environ.get("SAMELIB_OPERATIONS"):
    atexit.register(lambda: Path(path).write_text(str(total)))
