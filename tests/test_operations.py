import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import chapters
import pytest
from nbformat import NotebookNode

SCRIPT = """
import torch, operations
from torch import nn
from samelib.models.mae import MAESettings, MaskedAutoencoder

def counted(run):
    before = operations.total
    run()
    return operations.total - before

linear, conv = nn.Linear(5, 3), nn.Conv2d(4, 6, 3, groups=2)
mae = MaskedAutoencoder((1, 4, 4), MAESettings(2, 8, depth=2, heads=1, decoder_depth=1, decoder_heads=1, mask_ratio=0.5))
with torch.no_grad():
    print(counted(lambda: linear(torch.ones(7, 5))))
    print(counted(lambda: conv(torch.ones(2, 4, 8, 8))))
    print(counted(lambda: mae(torch.ones(3, 1, 4, 4), torch.rand(3, 4))))
print(counted(lambda: linear(torch.ones(7, 5)).sum().backward()))
"""


def test_operations_by_hand(tmp_path):
    """In a process of its own, as the count is of the whole process; written when that ends."""
    command = [sys.executable, "-c", SCRIPT]
    environment = {"PYTHONPATH": str(Path(chapters.__file__).parent), "SAMELIB_OPERATIONS": str(tmp_path / "count")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd())
    linear, conv, mae, trained = map(int, done.stdout.split())
    assert linear == 2 * 7 * 5 * 3 and trained == 3 * linear
    assert conv == 2 * 2 * 6 * 6 * 6 * (4 // 2) * 9

    def block(tokens: int) -> int:  # qkv, projection and the two layers of the MLP: 12 width^2 weights; two products
        return 3 * (2 * tokens * 12 * 8**2 + 4 * tokens**2 * 8)

    ends = 3 * 2 * (4 * 4 * 8 + 5 * 8 * 4)  # into and out of four patches of four pixels; the class token comes along
    assert mae == 2 * block(3) + block(5) + ends
    assert int((tmp_path / "count").read_text()) == linear + conv + mae + trained


@dataclass
class FakeBuild:
    tier: str
    data: str


@pytest.mark.parametrize(("tier", "data", "operations", "problems"), [
    ("smoke", "glyphs", 1e12, 0), ("smoke", "glyphs", 4e12, 1), ("lecture", "glyphs", 3e12, 0),
    ("lecture", "glyphs", 1e13, 1), ("lecture", "mnist", 1e13, 0), ("paper", "glyphs", 1e16, 0),
])  # fmt: skip
def test_a_chapter_may_not_do_too_much(monkeypatch, tier, data, operations, problems):
    run = NotebookNode(samelib_book=NotebookNode(operations=operations))
    monkeypatch.setattr(chapters, "metadata", lambda *_: run)
    assert len(chapters.too_many_operations(FakeBuild(tier, data), "notebooks/01.ipynb")) == problems
