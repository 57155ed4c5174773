"""The benchmark's reference computes the same thing as samelib: only then is a ratio of their times worth anything."""

import json

import pytest
import torch

from reproduction.benchmarks import mae
from reproduction.benchmarks.reference_mae import ReferenceMAE
from samelib.models.mae import MAESettings, MaskedAutoencoder


def copy_weights(ours: MaskedAutoencoder, reference: ReferenceMAE) -> None:
    target = reference.state_dict()
    for name, value in ours.state_dict().items():
        target[name].copy_(value.reshape(target[name].shape))


@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_reference_and_samelib_reconstruct_alike(ratio):
    ours = MaskedAutoencoder((1, 28, 28), MAESettings(4, 24, 2, 3, 1, 3)).eval()
    reference = ReferenceMAE(28, 1, 4, 24, 2, 3, 1).eval()
    copy_weights(ours, reference)
    x, noise = torch.rand(3, 1, 28, 28), torch.rand(3, 49)
    orders = noise.argsort(1), noise.argsort(1).argsort(1)
    with torch.no_grad():
        assert torch.allclose(ours(x, noise, ratio)[0], reference(x, ratio, orders), atol=1e-5)


def test_rows_of_a_training_step_are_kept(tmp_path, monkeypatch):
    tiny = mae.Work(MAESettings(7, 24, 1, 2, 1, 2), (1, 28, 28), 8, None)
    monkeypatch.setattr(mae, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(mae, "take_turns", lambda work, turns: (8 * 10**6, [(0.5, 1.0), (0.5, 0.6), (0.5, 0.4)]))
    monkeypatch.setattr(mae, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["mae", "--turns", "2", "--append"])
    mae.main()
    rows = [json.loads(line) for line in (tmp_path / "benchmarks.jsonl").read_text().splitlines()]
    assert [row["benchmark"] for row in rows] == [
        "tiny, training step",
        *(f"tiny, scoring at mask {r}" for r in (0.0, 0.75)),
    ]
    for row in rows:
        assert (row["ratio_min"], row["ratio_to_reference"], row["ratio_max"]) == (0.8, 1.2, 2.0)
        assert row["images_per_second"] == 16 and row["operations_per_image"] == 10**6 and row["measurement"]
