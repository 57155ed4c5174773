"""Figure 4's measures on the tests' small group: what they say is what gateway and detector do."""

import sys
from types import SimpleNamespace

import pytest
import torch

from reproduction.plan import BENIGN, JBDA, KNOCKOFF, SCALES, AttackVariant, Cell
from reproduction.responses import HASH_RATE, SHARES, measure
from samelib.attacks import make_attack
from samelib.presets import preset
from samelib.responses import ProofOfWork, Reject


@pytest.fixture
def bench(group, victim, detector) -> SimpleNamespace:
    """What the measures ask of a Bench; its log of JBDA is the seeds and then outliers."""
    settings = preset("smoke", group.image_shape)
    logs = {"knockoff": group.proxy.images, "jbda": torch.cat([group.seeds.images, group.outliers.images])}
    return SimpleNamespace(
        group=group, settings=settings, scale=SCALES["smoke"], seed=0, undefended=(victim, {}),
        detector=lambda variant: detector,
        log=lambda victim, variant, budget: (logs[variant.attack][:budget], {"accuracy": 0.5, "fidelity": 0.25}),
        attack=lambda variant: make_attack(variant.attack, group, settings),
    )  # fmt: skip


def cell(response: str, user: AttackVariant, transport: str = "gateway") -> Cell:
    names = {"attack": user, "budget": 100, "response": response, "transport": transport}
    return Cell("responses", "glyphs", "smoke", 0, **names)


def test_honest_users_are_refused_what_the_detector_flags(bench, detector, group):
    (row,) = measure(bench, cell("reject 5 %", BENIGN))
    p_values = detector.p_value(group.benign_test.pixels()[:100])
    assert row["answered"] == pytest.approx(1 - float(Reject(0.05).decide(p_values)[0].float().mean()))
    assert row["queries"] == 100 and row["hashes"] == 0 and set(row["times"]) == {0.0} and len(row) == 4


def test_without_a_response_all_is_answered_and_the_copy_is_the_logs(bench):
    (row,) = measure(bench, cell("no response", KNOCKOFF))
    assert (row["answered"], row["substitute_accuracy"], row["substitute_fidelity"]) == (1.0, 0.5, 0.25)


def test_a_refused_attack_is_run_and_its_copy_measured(bench, victim, detector, group):
    (row,) = measure(bench, cell("reject 5 %", KNOCKOFF))
    assert 0 < row["answered"] <= 1 and row["queries"] == 100
    assert row["substitute_accuracy"] != 0.5 and 0 <= row["substitute_fidelity"] <= 1


def assert_work(row: dict, detector, images) -> None:
    """The hashes of a row are as many as the p-values of these images ask for."""
    bits = ProofOfWork().decide(detector.p_value(images.pixels()))[1].double()
    spread = float((2.0**bits).square().sum().sqrt()) / len(bits)  # a geometric number is as wide as it is large
    assert abs(row["hashes"] - float((2.0**bits).mean())) < 4 * spread


def test_the_work_follows_the_p_values_and_its_seconds_are_modelled(bench, detector, group):
    (row,) = measure(bench, cell("proof of work", KNOCKOFF))
    assert_work(row, detector, group.proxy[:100])
    assert len(row["times"]) == len(SHARES) and row["times"][2] * HASH_RATE > 2**9
    assert row["answered"] == 1.0


def test_jbda_is_read_a_second_time_without_its_seeds(bench, detector, group):
    whole, grown = measure(bench, cell("proof of work", JBDA))
    assert "seeds" not in whole and grown["seeds"] == "left out"
    assert (whole["queries"], grown["queries"]) == (100, 100 - len(group.seeds))
    assert_work(grown, detector, group.outliers[:80])


def test_the_live_service_refuses_what_the_gateway_refuses(bench, detector, group):
    (row,) = measure(bench, cell("reject 5 %", KNOCKOFF, "http"))
    positions = torch.linspace(0, 99, row["queries"]).long()
    refused = Reject(0.05).decide(detector.p_value(group.proxy.pixels()[positions]))[0]
    assert row["queries"] == bench.scale.http_queries
    assert row["answered"] == pytest.approx(1 - float(refused.float().mean()))
    assert 0 < row["times"][0] <= row["times"][-1]


def test_without_the_service_the_remedy_is_named(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "samelib.service.app", raising=False)
    with pytest.raises(ValueError, match=r"needs fastapi: pip install 'samelib\[serve\]'"):
        next(iter(measure(bench, cell("no response", BENIGN, "http"))))
