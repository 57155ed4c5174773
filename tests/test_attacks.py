"""What holds for every attack: one door, the exact budget, the seed, and clear words when it cannot work."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samelib.attacks import (
    ATTACKS,
    DFME,
    JBDA,
    AdaptiveKnockoff,
    Attack,
    Bargain,
    Knockoff,
    Mixing,
    SelfTraining,
    UniformNoise,
    make_attack,
)
from samelib.attacks.base import Querier
from samelib.data.groups import Group
from samelib.data.image_set import ImageSet
from samelib.detectors.edm import Ensemble
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim, build_classifier, predict
from samelib.presets import preset
from samelib.training import TrainSettings, seed_of

SETTINGS = TrainSettings(2, 16, 1e-3)
SHAPE = (1, 16, 16)
MAKERS = {
    "noise": lambda data, train, seed=0, batch=32: UniformNoise("conv3", train, seed),
    "knockoff": lambda data, train, seed=0, batch=32: Knockoff(data, "conv3", train, seed),
    "adaptive": lambda data, train, seed=0, batch=32: AdaptiveKnockoff(data, "conv3", train, seed, batch=batch),
    "mixing": lambda data, train, seed=0, batch=32: Mixing(data[:4000], data[4000:], "conv3", train, seed, share=0.3),
    "bargain": lambda data, train, seed=0, batch=32: Bargain(data, "conv3", train, seed),
    "self-training": lambda data, train, seed=0, batch=32: SelfTraining(data, "conv3", train, seed, unasked=50),
    "jbda": lambda data, train, seed=0, batch=32: JBDA(data[:20], "conv3", train, seed),
    "jbda-reservoir": lambda data, train, seed=0, batch=32: JBDA(data[:50], "conv3", train, seed, reservoir=10 * batch),
    "dfme": lambda data, train, seed=0, batch=32: DFME(
        "conv3", replace(train, batch=batch), seed, directions=2, noise=8, width=4
    ),
}
every_attack = pytest.mark.parametrize("name", MAKERS)


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
    """Besides `query` only what the service says of itself: its budget, image size, number of classes, and prices."""
    recorder = Recorder(QueryGateway(linear_victim(), 100))
    result = MAKERS[name](data, SETTINGS).run(recorder)
    assert recorder.touched - {"quote"} == {"query", "budget", "remaining", "image_shape", "classes"}
    assert recorder.images == recorder.gateway.spent == result.queries == 100


@every_attack
@settings(max_examples=5, deadline=None, derandomize=True)
@given(budget=st.integers(1, 600), batch=st.integers(20, 200))
def test_the_budget_is_spent_to_the_last_query_and_never_more(name, data, budget, batch):
    attack = MAKERS[name](data, TrainSettings(1, 64, 1e-3), batch=batch)
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
        return gateway.log, MAKERS[name](data, SETTINGS, seed).run(gateway).substitute

    (first, model), (again, same), (_, other) = steal(0), steal(0), steal(1)
    x = data[:50].pixels()
    assert torch.equal(first.queries, again.queries)
    assert torch.equal(predict(model, x), predict(same, x)) and not torch.equal(predict(model, x), predict(other, x))
    untrained = MAKERS[name](data, SETTINGS, 0).build_substitute(SHAPE, 3)
    assert not torch.equal(predict(model, x).cpu(), predict(untrained, x))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "dfme"])
def test_a_smaller_budget_asks_the_same_first_images(name, data):
    """So the curve of one transfer set is the curve over budgets."""

    def asked(budget):
        gateway = QueryGateway(linear_victim(), budget)
        MAKERS[name](data, SETTINGS).run(gateway)
        return gateway.log.queries

    assert torch.equal(asked(50), asked(110)[:50])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_substitute_starts_from_nobody_elses_weights(seed):
    """Not from the victim's, the auxiliary model's or those of one of EDM's members, which answer in the victim's place."""
    substitute = UniformNoise("conv3", SETTINGS, seed).build_substitute(SHAPE, 3)
    members = list(Ensemble("conv3", SHAPE, 3, 5, seed).members)
    names = ("victim", "auxiliary", "outlier exposure")
    streams = [build_classifier("conv3", SHAPE, 3, seed_of(seed, name)) for name in names]
    for other in (*members, *streams, build_classifier("conv3", SHAPE, 3, seed)):
        assert not torch.allclose(substitute.head.weight, other.head.weight)


@every_attack
def test_the_curve_ends_with_the_substitute_that_comes_back(name, data):
    seen = []

    def evaluate(substitute):
        seen.append(substitute)
        return {"accuracy": float(len(seen))}

    attack = MAKERS[name](data, SETTINGS, batch=5)
    result = attack.run(QueryGateway(linear_victim(), 120), evaluate, points=(30, 70, 120, 900))
    asked, reached = [30, 70, 120], [point["queries"] for point in result.curve]
    assert reached[-1] == 120 and all(0 <= r - a < 40 for a, r in zip(asked, reached, strict=True))
    assert result.curve[-1]["accuracy"] == 3 and seen[-1] is result.substitute and not result.substitute.training


@every_attack
def test_an_attack_spends_what_is_left(name, data):
    gateway = QueryGateway(linear_victim(), 110)
    gateway.query(data[:40].images)
    assert MAKERS[name](data, SETTINGS).run(gateway).queries == 70 and gateway.remaining == 0


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
        MAKERS[name](data, SETTINGS).run(gateway)
    assert gateway.spent == 0


@every_attack
def test_a_point_before_the_first_query_is_said(name, data):
    gateway = QueryGateway(linear_victim(), 60)
    with pytest.raises(ValueError, match="points are numbers of queries"):
        MAKERS[name](data, SETTINGS).run(gateway, lambda substitute: {}, points=(0, 30))
    assert gateway.spent == 0


@every_attack
def test_a_missing_or_spent_budget_is_said(name, data):
    with pytest.raises(ValueError, match="gateway with a budget"):
        MAKERS[name](data, SETTINGS).run(QueryGateway(linear_victim()))
    gateway = QueryGateway(linear_victim(), 10)
    gateway.query(data[:10].images)
    with pytest.raises(ValueError, match="budget of 10 queries is spent"):
        MAKERS[name](data, SETTINGS).run(gateway)


def test_a_substitute_learns_the_victim(group, victim):
    """With in-distribution proxies and a few more steps the copy is far better than chance."""
    attack = Knockoff(group.victim_train, "conv3", TrainSettings(8, 32, 1e-3))
    substitute = attack.run(QueryGateway(victim, 250)).substitute
    x = group.benign_test.pixels()
    assert (predict(substitute, x).argmax(1).cpu() == victim(x).argmax(1)).float().mean() > 0.5


def test_soft_labels_tell_more_than_hard_ones(data):
    """Hard labels are the class alone: the substitute's probabilities come closer to the victim's with soft ones."""
    victim, x = linear_victim(), data[:500].pixels()

    def distance(labels):
        attack = Knockoff(data, "conv3", TrainSettings(12, 32, 1e-3), labels=labels)
        substitute = attack.run(QueryGateway(victim, 200)).substitute
        return float((predict(substitute, x).cpu() - victim(x)).abs().mean())

    assert distance("soft") < distance("hard")
    with pytest.raises(ValueError, match="labels must be soft or hard"):
        Knockoff(data, "conv3", SETTINGS, labels="medium")


def test_noise_is_uniform_and_seeded():
    def draw(seed):
        return UniformNoise(seed=seed).draw(50, (1, 28, 28))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert abs(draw(0).float().mean() - 127.5) < 2 and len(draw(0).unique()) == 256


# Refusals


@every_attack
@settings(max_examples=4, deadline=None, derandomize=True)
@given(share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_refused_queries_are_spent_and_teach_nothing(name, data, share):
    """A row of NaN never reaches a training; whoever is always refused comes back with an untrained copy."""
    generator = torch.Generator().manual_seed(0)
    gateway = QueryGateway(linear_victim(), 100)
    query = gateway.query

    def refusing(x):
        answers = query(x)
        return answers.masked_fill((torch.rand(len(x), generator=generator) < share)[:, None], torch.nan)

    gateway.query = refusing
    result = MAKERS[name](data, SETTINGS, batch=10).run(gateway)
    assert all(torch.isfinite(p).all() for p in result.substitute.parameters())
    assert result.queries == gateway.spent and (share < 1 or result.answered == 0)
    assert share > 0 or result.answered == result.queries == 100
    if share == 1 and name.startswith("jbda"):
        assert result.stopped == "the service refused every query" and result.queries < 100
    else:
        assert result.queries == 100 and result.stopped is None


def test_the_querier_counts_what_was_refused(data):
    gateway = QueryGateway(linear_victim(), 30)
    query, gateway.query = gateway.query, lambda x: query(x).index_fill(0, torch.tensor([0]), torch.nan)
    querier = Querier(gateway)
    assert querier.ask(data[:10].images).isnan().any(1).sum() == 1
    assert (querier.budget, querier.refused, gateway.remaining) == (30, 1, 20)


# What is not given


@pytest.mark.parametrize("name", ["noise", "knockoff", "adaptive-knockoff", "jbda", "dfme"])
def test_what_is_not_given_is_the_lecture_tiers(name, data):
    """The preset's names and numbers, for whatever images the victim takes."""
    attack = ATTACKS[name]
    attack = attack(data) if "knockoff" in name else attack(data[:9]) if name == "jbda" else attack()
    for shape in (SHAPE, (3, 32, 32)):
        tier = preset("lecture", shape)
        assert attack.train_settings(shape) == (tier.dfme_train if name == "dfme" else tier.substitute_train)
        given = build_classifier(tier.architecture, shape, 3, seed_of(0, "substitute"))
        assert torch.equal(attack.build_substitute(shape, 3).head.weight, given.head.weight)
    if name == "dfme":
        assert {option: getattr(attack, option) for option in tier.dfme} == tier.dfme


@pytest.mark.parametrize("attack", [lambda data: Knockoff(data), lambda data: JBDA(data[:30]), lambda data: DFME()])
def test_an_attack_runs_without_any_settings(attack, data):
    result = attack(data).run(QueryGateway(linear_victim(), 40))
    assert result.queries == 40 and predict(result.substitute, data[:5].pixels()).shape == (5, 3)


@pytest.mark.parametrize(
    ("shape", "architecture", "words"),
    [
        ((1, 29, 31), None, "pass architecture and settings: images of 29 x 31"),
        ((1, 8, 8), "conv3", "conv3 needs images of 14 x 14"),
    ],
)
def test_images_that_the_substitute_cannot_take_are_said_before_the_first_query(shape, architecture, words):
    gateway = QueryGateway(Victim(lambda x: torch.full((len(x), 3), 1 / 3), shape, 3), 10)
    with pytest.raises(ValueError, match=words):
        UniformNoise(architecture, architecture and SETTINGS).run(gateway)
    assert gateway.spent == 0


# By name


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_by_name_gets_what_the_group_gives(name, group: Group):
    tier = preset("smoke", group.image_shape)
    attack = make_attack(name, group, tier, seed=3)
    kind = ATTACKS[name] if issubclass(ATTACKS[name], Attack) else Knockoff  # in disguise
    assert type(attack) is kind and (attack.architecture, attack.seed) == (tier.architecture, 3)
    assert attack.settings == (tier.dfme_train if name == "dfme" else tier.substitute_train)
    if name == "jbda":
        assert attack.seeds is group.seeds and attack.round_settings == tier.round_train
    if "knockoff" in name:
        assert (attack.proxy is group.proxy) == issubclass(ATTACKS[name], Attack)
    if name == "knockoff-mixed":
        assert attack.benign is group.seeds
    if name == "dfme":
        assert (attack.width, attack.epsilon) == (tier.dfme["width"], tier.dfme["epsilon"])


def test_options_go_to_the_attack_and_unknown_names_are_said(group):
    tier = preset("smoke", group.image_shape)
    assert make_attack("jbda", group, tier, direction="-").direction == "-"
    assert make_attack("dfme", group, tier, width=5).width == 5
    with pytest.raises(ValueError, match="attack must be one of noise, knockoff, .*, knockoff-self-trained, got 'x'"):
        make_attack("x", group, tier)
