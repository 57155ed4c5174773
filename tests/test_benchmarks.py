"""The benchmark's reference computes the same thing as samelib: only then is a ratio of their times worth anything."""

import sys
from pathlib import Path

import pytest
import torch

from samelib.models.mae import MAESettings, MaskedAutoencoder

sys.path.insert(0, str(Path(__file__).parent.parent / "reproduction" / "benchmarks"))
from reference_mae import ReferenceMAE  # noqa: E402


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
