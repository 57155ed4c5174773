import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from samelib.memory import keep_freed_memory

keep_freed_memory()
for _ in range(2):
    torch.ones(2**25)  # 128 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_freed_tensor_is_not_fetched_from_the_system_again():
    faults = int(subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout)
    assert faults < 2 * 32_768  # of four times the 32,768 pages of 128 MiB; the heap may still grow once
