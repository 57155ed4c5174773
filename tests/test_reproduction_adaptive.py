"""The measures of attackers who know, on the tests' small group: what they say is what gateway and detector do."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from reproduction import adaptive
from reproduction.adaptive import (
    PradaGateway,
    adaptive_figure,
    adaptive_table,
    attacker,
    by_account_table,
    measure,
    prices_figure,
    prices_table,
)
from reproduction.plan import (
    ALARM,
    BAN,
    BARGAIN,
    BENIGN,
    EDM,
    IN_DISTRIBUTION,
    INK_JBDA,
    KNOCKOFF,
    MIXED,
    PRADA,
    PREPROCESSED,
    SAME,
    WHITE_BOX,
    WORK,
    AttackVariant,
    Cell,
)
from reproduction.rows import as_frame
from samelib.attacks import Evasion, make_attack
from samelib.detectors.prada import Prada
from samelib.metrics import auroc
from samelib.presets import preset
from samelib.responses import BanAccount, ProofOfWork, Reject
from samelib.training import TrainSettings

BUDGET = 60


@pytest.fixture
def bench(group, victim, detector, store) -> SimpleNamespace:
    """What the measures ask of a Bench."""
    settings = replace(preset("smoke", group.image_shape), substitute_train=TrainSettings(1, 32, 1e-3))
    halves = tuple(group.benign_test.split(75, 75))
    return SimpleNamespace(
        group=group, settings=settings, seed=0, store=store, halves=halves,
        victim=lambda variant: victim, detector=lambda variant: detector, accuracy=lambda victim: 0.5,
        benign_scores=lambda variant: detector.score(halves[0].pixels()),
        attack=lambda variant, **given: make_attack(
            variant.attack, group, settings, 0, store, **variant.options | given
        ),
    )  # fmt: skip


def cell(attack: AttackVariant, response: str = "reject 5 %", detector=SAME, accounts: int = 1, seed: int = 0) -> Cell:
    names = {"detector": detector, "attack": attack, "budget": BUDGET, "response": response, "accounts": accounts}
    return Cell("adaptive", "glyphs", "smoke", seed, **names)


def test_honest_users_are_refused_what_the_detector_flags(bench, detector):
    (row,) = measure(bench, cell(BENIGN))
    p_values = detector.p_value(bench.halves[0].pixels()[:BUDGET])
    assert row["answered"] == pytest.approx(1 - float(Reject(0.05).decide(p_values)[0].float().mean()), abs=1e-6)
    assert row["queries"] == BUDGET and "hashes" not in row and "substitute_fidelity" not in row


def test_an_attack_is_scored_beside_honest_users_and_its_copy_measured(bench, detector, group):
    (row,) = measure(bench, cell(KNOCKOFF))
    scores = detector.score(group.proxy.shuffled(0).images[:BUDGET])
    assert row["auroc"] == pytest.approx(auroc(bench.benign_scores(SAME), scores), abs=1e-4)
    assert 0 < row["answered"] < 1 and 0 <= row["substitute_fidelity"] <= 1 and row["victim_accuracy"] == 0.5


def test_jbda_is_read_a_second_time_without_its_seeds(bench):
    whole, grown = measure(bench, cell(INK_JBDA))
    assert grown["seeds"] == "left out" and (whole["queries"], grown["queries"]) == (BUDGET, BUDGET - 20)
    assert whole["auroc"] != grown["auroc"] and whole["substitute_fidelity"] == grown["substitute_fidelity"]


def test_who_holds_benign_images_holds_none_that_copies_are_measured_on(bench):
    honest, own = ({image.numpy().tobytes() for image in half.images} for half in bench.halves)
    for variant, share in ((IN_DISTRIBUTION, 1.0), (MIXED[-1], 0.9), (KNOCKOFF, 0.0)):
        asked = [i.numpy().tobytes() for i in attacker(bench, cell(variant)).draw(BUDGET, bench.group.image_shape)]
        assert sum(image in own for image in asked) == BUDGET * share and not honest & set(asked)


def test_white_box_images_are_made_once(bench, detector, monkeypatch):
    """The second response finds them in the store; and they look more ordinary than they were."""
    variant = WHITE_BOX._replace(epsilon=24)
    moved = attacker(bench, cell(variant)).proxy
    monkeypatch.setattr(Evasion, "__call__", None)
    assert torch.equal(attacker(bench, cell(variant, "reject 1 %")).proxy.images, moved.images)
    plain = bench.group.proxy.shuffled(0)[:BUDGET]
    assert (moved.images.int() - plain.images.int()).abs().max() == 24
    assert detector.score(moved.images).mean() < detector.score(plain.images).mean()


@pytest.mark.parametrize("response", WORK)
def test_where_work_is_asked_for_there_is_a_reading_for_each_point(response, bench, detector, group):
    rows = list(measure(bench, cell(BARGAIN, response)))
    assert [row["queries"] for row in rows] == [15, 30, 60] and all(row["answered"] == 1 for row in rows)
    step = 5 if response == WORK[1] else 1
    bits = ProofOfWork(step=step).decide(detector.p_value(group.proxy.pixels()))[1].sort().values
    for row in rows:
        expected = 2.0 ** bits[: row["queries"]]
        error = float(expected.square().sum().sqrt()) / row["queries"]  # a geometric number is as wide as it is large
        assert abs(row["hashes"] - float(expected.mean())) < 4 * error


def test_prada_refuses_from_its_alarm_on_and_sees_no_account_alone(bench, victim, group, monkeypatch):
    monkeypatch.setattr(adaptive, "Prada", lambda classes: Prada(classes, threshold=0.99, minimum=10))
    gateway = PradaGateway(victim, 200)
    for part in group.proxy.shuffled(0).images.split(33):
        gateway.query(part)
    first = gateway.prada.alarm_at
    assert 1 < first < 200 and gateway.log.refused.tolist() == [number >= first for number in range(1, 201)]
    assert torch.equal(gateway.log.answers.isnan().all(1), gateway.log.refused)

    def answered(accounts: int) -> float:
        (row,) = measure(bench, replace(cell(KNOCKOFF, ALARM, PRADA, accounts), budget=200))
        assert "auroc" not in row and row["queries"] == 200
        return row["answered"]

    assert answered(1) == pytest.approx((first - 1) / 200) and answered(10) == 1


def test_a_ban_ends_an_account_and_no_other(bench, detector, group, monkeypatch):
    """With evidence that suffices at once: each of ten accounts is banned by itself, later than one that asks all."""
    monkeypatch.setitem(adaptive.ALL_RESPONSES, BAN, BanAccount(delta=0.9, streams=("strangeness",)))

    def refused(accounts: int) -> int:
        (row,) = measure(bench, replace(cell(KNOCKOFF, BAN, SAME, accounts), budget=200))
        assert "auroc" in row and row["queries"] == 200
        return round(200 * (1 - row["answered"]))

    assert refused(1) > refused(10) > 0


def frame_of(cells, values) -> object:
    """Rows as `run` writes them, of made-up readings, for two seeds."""
    rows = []
    for number, (one, readings) in enumerate(zip(cells, values, strict=True)):
        for seed in (0, 1):
            measured = [reading | {"auroc": 0.5 + number / 10 + seed / 50} for reading in readings]
            named = replace(one, seed=seed)
            rows.append({"cell": str(named)} | named.fields() | {"measured": measured})
    return as_frame(rows)


def test_tables_and_figures_have_a_line_for_everybody_who_was_measured():
    reading = {"queries": 60, "answered": 0.8, "substitute_fidelity": 0.6}
    watched = [cell(a, r, d) for a in (BENIGN, PREPROCESSED) for d in (SAME, EDM) for r in ("reject 1 %", "reject 5 %")]
    alarmed = [cell(KNOCKOFF, ALARM, PRADA), cell(KNOCKOFF, ALARM, PRADA, 10), cell(KNOCKOFF, BAN, SAME, 10)]
    paid = [cell(attack, response) for response in WORK for attack in (KNOCKOFF, BARGAIN)]
    points = [reading | {"queries": queries, "hashes": 1_000.0} for queries in (15, 30, 60)]
    frame = frame_of([*watched, *alarmed, *paid], [[reading]] * 11 + [points] * 4)
    table = adaptive_table(frame).splitlines()
    assert table[0].count("|") == 8 and [line.split(" | ")[:2] for line in table[2:]] == [
        ["| benign", "EDM"],
        ["| benign", "SAME"],
        ["| knockoff-preprocessed", "EDM"],
        ["| knockoff-preprocessed", "SAME"],
    ]
    assert "| 80.0 ± 0.0 | 60.0 ± 0.0 |" in table[2]
    header, _, *accounts = by_account_table(frame).splitlines()
    assert header.endswith("| 1 account: answered / fidelity | 10 accounts: answered / fidelity |")
    figures = "80.0 ± 0.0 / 60.0 ± 0.0"
    assert accounts == [
        f"| knockoff | PRADA | {figures} | {figures} |",
        f"| knockoff | SAME, bans | – | {figures} |",
    ]
    prices = prices_table(frame).splitlines()
    assert len(prices) == 2 + 2 * 2 * 3 and "| knockoff | 60 | 1,000 | 60,000 | 60.0 ± 0.0 |" in prices[4]
    for draw, axes in ((adaptive_figure, 2), (prices_figure, 2)):
        figure = draw(frame)
        assert len(figure.axes) == axes and all(axis.lines for axis in figure.axes)
        plt.close(figure)
