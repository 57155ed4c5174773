"""What holds for every attack: one door, the exact budget, the seed, and clear words when it cannot work."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reproduction.run import evaluation
from samelib.attacks.base import UniformNoise
from samelib.attacks.dfme import DFME, DFMESettings
from samelib.attacks.jbda import JBDA
from samelib.attacks.knockoff import AdaptiveKnockoff, Knockoff
from samelib.data.image_set import ImageSet
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim, predict
from samelib.training import TrainSettings

SETTINGS = TrainSettings(2, 32, 1e-3)
SHAPE = (1, 16, 16)
ATTACKS = {
    "noise": lambda data, how, seed=0, batch=32: UniformNoise("conv3", how, seed),
    "knockoff": lambda data, how, seed=0, batch=32: Knockoff(data, "conv3", how, seed),
    "adaptive": lambda data, how, seed=0, batch=32: AdaptiveKnockoff(data, "conv3", how, seed, batch=batch),
    "jbda": lambda data, how, seed=0, batch=32: JBDA(data[:20], "conv3", how, seed),
    "jbda-reservoir": lambda data, how, seed=0, batch=32: JBDA(data[:50], "conv3", how, seed, reservoir=10 * batch),
    "dfme": lambda data, how, seed=0, batch=32: DFME(
        "conv3", replace(how, batch=batch), seed, attack=DFMESettings(directions=2, noise=8, width=4)
    ),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def linear_victim() -> Victim:
    weights = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    return Victim(lambda x: (x.flatten(1) @ weights / 4).softmax(1), SHAPE, 3)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5000, *SHAPE), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(5000) % 4, tuple("abcd"), "random")


class Recorder:
    """A gateway that notes everything an attack reaches for."""

    def __init__(self, gateway: QueryGateway):
        self.gateway, self.touched, self.images = gateway, set(), 0

    def __getattr__(self, name: str):
        self.touched.add(name)
        return self.query_and_count if name == "query" else getattr(self.gateway, name)

    def query_and_count(self, x):
        self.images += len(x)
        return self.gateway.query(x)


@every_attack
def test_an_attack_touches_nothing_but_the_door(name, data):
    """Besides `query` only what the service says of itself: its budget, image size and number of classes."""
    recorder = Recorder(QueryGateway(linear_victim(), 100))
    result = ATTACKS[name](data, SETTINGS).run(recorder)
    assert recorder.touched == {"query", "budget", "remaining", "image_shape", "classes"}
    assert recorder.images == recorder.gateway.spent == result.queries == 100


@every_attack
@settings(max_examples=10, deadline=None, derandomize=True)
@given(budget=st.integers(1, 5000), batch=st.integers(20, 600))
def test_the_budget_is_spent_to_the_last_query_and_never_more(name, data, budget, batch):
    attack = ATTACKS[name](data, TrainSettings(1, 512, 1e-3), batch=batch)
    gateway = QueryGateway(linear_victim(), budget)
    if budget < attack.smallest_round:
        with pytest.raises(ValueError, match="fewer than the smallest round"):
            attack.run(gateway)
        assert gateway.spent == 0
    else:
        result = attack.run(gateway)
        assert result.queries == gateway.spent == len(gateway.log.queries) == budget and result.stopped is None


@every_attack
def test_the_seed_decides_everything(name, data):
    def steal(seed):
        gateway = QueryGateway(linear_victim(), 70)
        return gateway.log, ATTACKS[name](data, SETTINGS, seed).run(gateway).substitute

    (first, model), (again, same), (_, other) = steal(0), steal(0), steal(1)
    x = data[:50].pixels()
    assert torch.equal(first.queries, again.queries)
    assert torch.equal(predict(model, x), predict(same, x)) and not torch.equal(predict(model, x), predict(other, x))
    untrained = ATTACKS[name](data, SETTINGS, 0).build_substitute(SHAPE, 3)
    assert not torch.equal(predict(model, x).cpu(), predict(untrained, x))


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "dfme"])
def test_a_smaller_budget_asks_the_same_first_images(name, data):
    """So the curve of one transfer set is the curve over budgets."""

    def asked(budget):
        gateway = QueryGateway(linear_victim(), budget)
        ATTACKS[name](data, SETTINGS).run(gateway)
        return gateway.log.queries

    assert torch.equal(asked(75), asked(170)[:75])


@every_attack
def test_a_substitute_does_not_start_from_the_victims_weights(name, data):
    from samelib.models.classifiers import build_classifier

    substitute = ATTACKS[name](data, SETTINGS).build_substitute(SHAPE, 3)
    assert not torch.allclose(substitute.head.weight, build_classifier("conv3", SHAPE, 3, 0).head.weight)


@every_attack
def test_the_curve_ends_with_the_substitute_that_comes_back(name, data):
    seen = []

    def evaluate(substitute):
        seen.append(substitute)
        return {"accuracy": float(len(seen))}

    attack = ATTACKS[name](data, SETTINGS, batch=8)
    result = attack.run(QueryGateway(linear_victim(), 400), evaluate, points=(100, 250, 400, 900))
    asked, reached = [100, 250, 400], [point["queries"] for point in result.curve]
    assert reached[-1] == 400 and all(0 <= r - a < 70 for a, r in zip(asked, reached, strict=True))
    assert result.curve[-1]["accuracy"] == 3 and seen[-1] is result.substitute and not result.substitute.training


@every_attack
def test_an_attack_spends_what_is_left(name, data):
    gateway = QueryGateway(linear_victim(), 110)
    gateway.query(data[:40].images)
    assert ATTACKS[name](data, SETTINGS).run(gateway).queries == 70 and gateway.remaining == 0


@every_attack
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.flatten(1)[:, :3] * 9, "probabilities .* apply softmax to logits"),
        (lambda x: x.flatten(1)[:, :3] * torch.nan, "NaN"),
        (lambda x: torch.full((len(x), 3), 0.5), "sum to 1"),
        (lambda x: torch.full((len(x), 2), 0.5), "expected"),
    ],
)
def test_a_victim_that_does_not_answer_probabilities_is_said(name, answer, words, data):
    gateway = QueryGateway(Victim(answer, SHAPE, 3), 60)
    with pytest.raises(ValueError, match=words):
        ATTACKS[name](data, SETTINGS).run(gateway)
    assert gateway.spent == 0


@every_attack
def test_a_point_before_the_first_query_is_said(name, data):
    gateway = QueryGateway(linear_victim(), 60)
    with pytest.raises(ValueError, match="points are numbers of queries"):
        ATTACKS[name](data, SETTINGS).run(gateway, lambda substitute: {}, points=(0, 30))
    assert gateway.spent == 0


@every_attack
def test_a_missing_or_spent_budget_is_said(name, data):
    with pytest.raises(ValueError, match="gateway with a budget"):
        ATTACKS[name](data, SETTINGS).run(QueryGateway(linear_victim()))
    gateway = QueryGateway(linear_victim(), 10)
    gateway.query(data[:10].images)
    with pytest.raises(ValueError, match="budget of 10 queries is spent"):
        ATTACKS[name](data, SETTINGS).run(gateway)


def test_a_substitute_learns_the_victim(group, victim):
    """With in-distribution proxies and a few more steps the copy is far better than chance."""
    attack = Knockoff(group.victim_train, "conv3", TrainSettings(8, 32, 1e-3))
    found = attack.run(QueryGateway(victim, 400), evaluation(victim, group.benign_test)).curve[-1]
    assert found["fidelity"] > 0.5


def test_soft_labels_tell_more_than_hard_ones(data):
    """Hard labels are the class alone: the substitute's probabilities come closer to the victim's with soft ones."""
    victim, x = linear_victim(), data[:500].pixels()

    def distance(labels):
        attack = Knockoff(data, "conv3", TrainSettings(12, 32, 1e-3), labels=labels)
        substitute = attack.run(QueryGateway(victim, 1000)).substitute
        return float((predict(substitute, x).cpu() - victim(x)).abs().mean())

    assert distance("soft") < distance("hard")
    with pytest.raises(ValueError, match="labels must be soft or hard"):
        Knockoff(data, "conv3", SETTINGS, labels="medium")


def test_noise_is_uniform_and_seeded():
    def ask(seed):
        return UniformNoise("conv3", SETTINGS, seed).draw(50, (1, 28, 28))

    assert torch.equal(ask(0), ask(0)) and not torch.equal(ask(0), ask(1))
    assert abs(ask(0).float().mean() - 127.5) < 2 and len(ask(0).unique()) == 256
