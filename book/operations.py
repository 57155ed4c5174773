"""Counts the floating-point operations of a chapter: `build.py` has each kernel import it before the first cell.

Linear layers, convolutions and attention's products count, a multiplication and an addition as two operations; where a
gradient follows, its two passes count too. The number is written when the kernel ends, to the file that
SAMELIB_OPERATIONS names. It is the same on every machine, which seconds are not.
"""

import atexit
import os
from pathlib import Path

from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

total = 0


def forward_operations(module: nn.Module, inputs: tuple, output: Tensor) -> int:
    """Operations of one forward pass of a layer; 0 for those that do not count, or whose parts count themselves."""
    if isinstance(module, nn.Linear):
        return 2 * output.numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        return 2 * output.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
    if isinstance(module, Attention):
        samples, tokens, width = inputs[0].shape
        return 4 * samples * tokens**2 * width
    return 0


def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    global total
    operations = forward_operations(module, inputs, output)
    if operations:
        total += 3 * operations if output.requires_grad else operations


register_module_forward_hook(count)
if path := os.environ.get("SAMELIB_OPERATIONS"):
    atexit.register(lambda: Path(path).write_text(str(total)))
