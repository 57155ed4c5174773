import pytest
import torch

from samelib import precision
from samelib.detectors.same import SameDetector
from samelib.models.mae import MAESettings, MaskedAutoencoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_probe(monkeypatch):
    """No test reads or leaves behind what the probe answered."""
    monkeypatch.delenv("SAMELIB_PRECISION", raising=False)
    precision.bfloat16_pays.cache_clear()
    yield
    precision.bfloat16_pays.cache_clear()


def takes(monkeypatch, *seconds: float) -> list[str]:
    """Runs whose times are given: the candidate's, the standard's, in turn for ever; returns the runs as they come."""
    runs = []
    monkeypatch.setattr(precision, "_seconds", lambda run: run() or seconds[(len(runs) - 3) % len(seconds)])
    return runs


@pytest.mark.parametrize(
    ("seconds", "wins"),
    [
        ((1.0, 1.5), True),
        ((1.0, 1.2), False),  # faster, but not clearly
        ((2.0, 1.0), False),
        ((1.0, 1.5) * 8 + (1.0, 1.0) * 2, True),  # two bad turns in ten
        ((1.0, 1.0) * 3 + (1.0, 9.0) * 7, False),  # three
    ],
)
def test_a_clear_winner_wins_eight_turns_of_ten(monkeypatch, seconds, wins):
    runs = takes(monkeypatch, *seconds)
    assert precision._clearly_faster(lambda: runs.append("candidate"), lambda: runs.append("standard")) is wins
    assert runs == ["candidate", "standard"] * (len(runs) // 2)


def test_the_probe_decides_once(monkeypatch):
    monkeypatch.setattr(precision.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    answers = [True]
    monkeypatch.setattr(precision, "_clearly_faster", lambda candidate, standard: answers.pop(0))
    assert [precision.precision(CPU) for _ in range(2)] == ["bfloat16", "bfloat16"]
    with precision.autocast(CPU):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert not answers


def test_without_a_kernel_for_it_bfloat16_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(precision, "_clearly_faster", lambda candidate, standard: pytest.fail("it was measured"))
    assert precision.precision(CPU) == "float32"


def test_the_probe_runs_anywhere_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        precision.bfloat16_pays("cpu")
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    after = torch.get_rng_state(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_the_environment_decides_instead_of_the_probe(monkeypatch, chosen):
    monkeypatch.setenv("SAMELIB_PRECISION", chosen)
    monkeypatch.setattr(precision, "_clearly_faster", lambda candidate, standard: pytest.fail("it was measured"))
    assert precision.precision(CPU) == chosen
    with precision.autocast(CPU):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == getattr(torch, chosen)


def test_an_unknown_precision_is_refused(monkeypatch):
    monkeypatch.setenv("SAMELIB_PRECISION", "fp16")
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got 'fp16'; unset it"):
        precision.autocast(CPU)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_chosen_when_the_model_is_built(monkeypatch, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: fused)
    model = MaskedAutoencoder((1, 28, 28), MAESettings(7, 24, 1, 2, 1, 2))
    model(torch.rand(2, 1, 28, 28), torch.rand(2, 16))
    assert {block.attn.fused_attn for block in (*model.blocks, *model.decoder_blocks)} == {fused}


def in_both(monkeypatch, compute) -> tuple[torch.Tensor, torch.Tensor]:
    """(in float32, in bfloat16)."""
    results = []
    for chosen in ("float32", "bfloat16"):
        monkeypatch.setenv("SAMELIB_PRECISION", chosen)
        results.append(compute())
    return tuple(results)


def test_reconstructions_agree_within_rounding(monkeypatch):
    """bfloat16 rounds to 1 in 256; over the layers of a model pixels in [-1, 1] may be off by a few such steps."""
    model = MaskedAutoencoder((1, 28, 28), MAESettings(4, 48, 4, 3, 2, 3)).eval()
    x, noise = torch.rand(8, 1, 28, 28) * 2 - 1, torch.rand(8, 49)

    @torch.inference_mode()
    def reconstruct() -> torch.Tensor:
        with precision.autocast(CPU):
            return model(x, noise)[0]

    single, reduced = in_both(monkeypatch, reconstruct)
    assert not torch.equal(single, reduced)
    assert (single - reduced).abs().max() < 4 / 256 * single.abs().max()


def test_scores_agree_within_rounding(monkeypatch, detector: SameDetector, group):
    """By less than a twentieth of the spread of benign scores: no decision at a quantile moves by more than its noise."""
    images = group.benign_test.pixels(slice(64))
    single, reduced = in_both(monkeypatch, lambda: detector.score(images))
    assert not torch.equal(single, reduced)
    assert (single - reduced).abs().max() < 0.05 * single.std()
