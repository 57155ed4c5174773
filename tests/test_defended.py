"""Figure 4's measures on the tests' small group: what they say is what gateway and detector do."""

import sys
from types import SimpleNamespace

import pytest
import torch

from reproduction.cells import Cell, response_name
from reproduction.defended import HASH_RATE, SHARES, in_gateway, in_service
from reproduction.run import make_attack
from samelib.presets import preset
from samelib.responses import ProofOfWork, Reject


@pytest.fixture
def bench(group, victim, detector) -> SimpleNamespace:
    """What the measures ask of a Bench; its log of "jbda" is the seeds and then outliers."""
    settings = preset("smoke", group)
    logs = {"knockoff": group.proxy.images, "jbda": torch.cat([group.seeds.images, group.outliers.images])}
    return SimpleNamespace(
        group=group, settings=settings, seed=0, plain=(victim, {}), detector=lambda name: detector,
        log=lambda victim, label, budget: (logs[label][:budget], {"accuracy": 0.5, "fidelity": 0.25}),
        attack=lambda label: make_attack(label, group, settings),
    )  # fmt: skip


def cell(response: str, user: str, budget: int = 100, http: bool = False) -> Cell:
    return Cell("glyphs", "smoke", 0, response_name(response, http), "fixed", user, 0 if http else budget)


def test_honest_users_are_refused_what_the_detector_flags(bench, detector, group):
    (row,) = in_gateway(bench, cell("reject 5 %", "benign"))
    p_values = detector.p_value(group.benign_test.pixels()[:100])
    assert row["answered"] == pytest.approx(1 - float(Reject(0.05).decide(p_values).refused.float().mean()))
    assert row["queries"] == 100 and row["hashes"] == 0 and set(row["times"]) == {0.0} and len(row) == 5


def test_without_a_response_all_is_answered_and_the_copy_is_the_logs(bench):
    (row,) = in_gateway(bench, cell("no response", "knockoff"))
    assert (row["answered"], row["substitute_accuracy"], row["substitute_fidelity"]) == (1.0, 0.5, 0.25)


def test_a_refused_attack_is_run_and_its_copy_measured(bench, victim, detector, group):
    (row,) = in_gateway(bench, cell("reject 5 %", "knockoff"))
    assert 0 < row["answered"] <= 1 and row["queries"] == 100
    assert row["substitute_accuracy"] != 0.5 and 0 <= row["substitute_fidelity"] <= 1


def assert_work(row: dict, detector, images) -> None:
    """The hashes of a row are as many as the p-values of these images ask for."""
    bits = ProofOfWork().decide(detector.p_value(images.pixels())).bits.double()
    spread = float((2.0**bits).square().sum().sqrt()) / len(bits)  # a geometric number is as wide as it is large
    assert abs(row["hashes"] - float((2.0**bits).mean())) < 4 * spread


def test_the_work_follows_the_p_values_and_its_seconds_are_modelled(bench, detector, group):
    (row,) = in_gateway(bench, cell("proof of work", "knockoff"))
    assert_work(row, detector, group.proxy[:100])
    assert len(row["times"]) == len(SHARES) and row["times"][2] * HASH_RATE > 2**9
    assert row["answered"] == 1.0


def test_jbda_is_read_a_second_time_without_its_seeds(bench, detector, group):
    whole, grown = in_gateway(bench, cell("proof of work", "jbda"))
    assert (whole["attack"], grown["attack"]) == ("jbda", "jbda, seeds left out")
    assert (whole["queries"], grown["queries"]) == (100, 100 - len(group.seeds))
    assert_work(grown, detector, group.outliers[:80])


def test_the_live_service_refuses_what_the_gateway_refuses(bench, detector, group):
    (row,) = in_service(bench, cell("reject 5 %", "knockoff", http=True))
    place = torch.linspace(0, len(group.proxy) - 1, row["queries"]).long()
    refused = Reject(0.05).decide(detector.p_value(group.proxy.pixels()[place])).refused
    assert row["queries"] == bench.settings.budgets[1] // 10
    assert row["answered"] == pytest.approx(1 - float(refused.float().mean()))
    assert 0 < row["times"][0] <= row["times"][-1]


def test_without_the_service_the_remedy_is_named(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "samelib.service.app", raising=False)
    with pytest.raises(ValueError, match=r"needs fastapi: pip install 'samelib\[serve\]'"):
        next(iter(in_service(bench, cell("no response", "benign", http=True))))
