"""Attackers who know that somebody looks: each does what it says, within its budget, and says early what it cannot do."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY_SAME
from torch import nn

from samelib import attacks
from samelib.attacks import (
    ATTACKS,
    JBDA,
    AdaptiveKnockoff,
    Bargain,
    Evasion,
    Filter,
    Knockoff,
    Mixing,
    Preprocessing,
    Purification,
    RoundRobin,
    SelfTraining,
    expected_score,
    make_attack,
    own_autoencoder,
)
from samelib.attacks.disguise import ink_mask, measure_strokes, sharpness
from samelib.attacks.knockoff import clustered
from samelib.data.image_set import ImageSet, to_float
from samelib.data.synthetic import shapes
from samelib.detectors.base import Detector
from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import SamePlus
from samelib.gateway import BudgetExceeded, QueryGateway
from samelib.models.classifiers import Victim, predict
from samelib.presets import preset
from samelib.responses import ProofOfWork, Reject
from samelib.training import TrainSettings

SETTINGS = TrainSettings(1, 32, 1e-3)
SHAPE = (1, 16, 16)


# A toy service: the images of a class are of one level, and the detector finds the brighter ones stranger.

LEVELS = (0, 80, 160, 240)


@pytest.fixture(scope="module")
def toy() -> ImageSet:
    labels = torch.arange(400) % len(LEVELS)
    images = torch.tensor(LEVELS, dtype=torch.uint8)[labels][:, None, None, None].repeat(1, *SHAPE)
    images[:, 0, 0, 0] = torch.arange(400) % 256  # no two alike
    return ImageSet(images, labels, ("black", "dark", "light", "white"), "levels")


class Brightness(Detector):
    """Half of the benign images are darker than the dark ones, all are darker than the white ones."""

    image_shape = SHAPE
    calibration_scores = torch.linspace(-1, 0.5, 1_999)

    def fit(self, *sets, store=None, fpr=0.05):
        return self

    def score_received(self, x, answers=None):
        return x.flatten(1).median(1).values


def toy_gateway(budget, response=None) -> QueryGateway:
    def answer(x):
        level = x.flatten(1).median(1).values[:, None]
        return torch.cat([level, -level, level.square()], dim=1).softmax(1)

    return QueryGateway(Victim(answer, SHAPE, 3), budget, response and Brightness(), response)


def asked(gateway: QueryGateway, attack: Knockoff) -> torch.Tensor:
    """The queries of an attack, in order."""
    attack.run(gateway)
    return gateway.log.queries


def classes_of(queries: torch.Tensor, toy: ImageSet) -> torch.Tensor:
    """Of which class each query is, as shares of all [4]."""
    levels = queries[:, 0, 8, 8]
    return torch.stack([(levels == level).float().mean() for level in LEVELS])


# Preprocessing


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far two means are apart, in deviations of the second."""
    return float((a.mean() - b.mean()).abs() / b.std())


def test_preprocessing_makes_writing_like_the_seeds(group):
    """Larger, darker, blurred and shifted digits become as large, as black, as sharp, and as well placed as the seeds."""
    small = torch.nn.functional.interpolate(group.proxy.pixels(), scale_factor=0.6, mode="bilinear")
    moved = torch.nn.functional.pad(small, (1, 11, 9, 3), value=-1.0)
    own = replace(group.proxy, images=((moved + 1) * 60).to(torch.uint8))
    ready = Preprocessing(group.seeds)(own)
    x, seeds = ready.pixels(), group.seeds.pixels()
    assert ready.images.dtype == torch.uint8 and torch.equal(ready.labels, own.labels)
    for before, after, theirs in zip(*map(measure_strokes, (own.pixels(), x, seeds)), strict=True):
        assert apart(before, theirs) > 0.7 and apart(after, theirs) < 0.4
    assert (
        apart(sharpness(own.pixels()), sharpness(seeds))
        > 2
        > 20 * abs(float(sharpness(x).mean() - sharpness(seeds).mean()))
    )


def test_black_on_white_becomes_white_on_black(group):
    own, ready = replace(group.proxy, images=255 - group.proxy.images), Preprocessing(group.seeds)
    difference = ready(own).images.int() - ready(group.proxy).images.int()
    assert difference.abs().max() <= 1  # of rounding


def test_colour_pictures_get_the_seeds_colours_and_edges():
    seeds, own = shapes("victim", 40), shapes("proxy", 60)
    own = replace(own, images=(own.images // 3) + 20)
    x, theirs = Preprocessing(seeds)(own).pixels(), seeds.pixels()
    for statistic in (lambda x: x.mean((0, 2, 3)), lambda x: x.std((0, 2, 3))):
        near, far = ((statistic(images) - statistic(theirs)).abs().amax() for images in (x, own.pixels()))
        assert near < 0.1 < 0.3 < far
    assert abs(sharpness(x).mean() - sharpness(theirs).mean()) < 0.01


def test_what_cannot_be_learnt_or_used_is_said(group):
    blank = replace(group.seeds, images=torch.full_like(group.seeds.images, 9))
    with pytest.raises(ValueError, match="no stroke to learn from"):
        Preprocessing(blank)
    with pytest.raises(ValueError, match="the set glyphs.* is empty"):
        Preprocessing(group.seeds[:0])
    with pytest.raises(ValueError, match=r"holds images \(3, 32, 32\), the seeds are \(1, 28, 28\)"):
        Preprocessing(group.seeds)(shapes("proxy", 3))
    assert len(Preprocessing(group.seeds)(group.proxy[:0])) == 0


def test_an_empty_image_stays_empty(group):
    one = replace(group.proxy[:2], images=torch.full_like(group.proxy.images[:2], 200))
    assert len(Preprocessing(group.seeds)(one).images.unique()) == 1


# With an autoencoder of one's own


@pytest.fixture(scope="module")
def autoencoder(group, store):
    return own_autoencoder(group.seeds, TrainSettings(20, 10, 3e-3), store=store)


def test_the_attackers_autoencoder_is_nobody_elses(group, store, autoencoder):
    again = own_autoencoder(group.seeds, TrainSettings(20, 10, 3e-3), store=store)
    other = own_autoencoder(group.seeds, TrainSettings(20, 10, 3e-3), seed=1, store=store)
    assert torch.equal(again.pos_embed, autoencoder.pos_embed)
    assert not torch.allclose(other.pos_embed, autoencoder.pos_embed)
    with pytest.raises(ValueError, match="needs images to learn from"):
        own_autoencoder(group.seeds[:0])


def test_the_filter_keeps_the_less_suspicious_half_in_its_order(group, autoencoder):
    chosen = Filter(autoencoder)
    kept, suspicion = chosen(group.proxy), chosen.suspicion(group.proxy)
    assert len(kept) == len(group.proxy) // 2
    assert chosen.suspicion(kept).max() <= suspicion.median() + 1e-6
    assert torch.equal(kept.images, group.proxy.images[suspicion <= chosen.suspicion(kept).max()])
    with pytest.raises(ValueError, match="share of images to keep must be above 0"):
        Filter(autoencoder, 0)


def test_a_purified_image_is_the_autoencoders_drawing(group, autoencoder):
    purified = Purification(autoencoder)(group.proxy)
    visible = torch.zeros(200, autoencoder.tokens)
    drawn = autoencoder(group.proxy.pixels(), visible, 0.0)[0].clamp(-1, 1)
    assert purified.images.dtype == torch.uint8 and (purified.pixels() - drawn).abs().max() <= 1 / 255 + 1e-6
    assert Filter(autoencoder).suspicion(purified).mean() < Filter(autoencoder).suspicion(group.proxy).mean()


# White-box


def test_evasion_lowers_the_score_within_epsilon(group, detector):
    """SAME's own score, under masks that the attacker did not draw, is lower on average."""
    own = group.proxy[:60]
    score = expected_score(detector)
    evaded = Evasion(score, epsilon=24, steps=6)(own)
    moved = evaded.images.int() - own.images.int()
    assert evaded.images.dtype == torch.uint8 and 0 < moved.abs().max() <= 24
    assert float(detector.score(evaded.images).mean()) < float(detector.score(own.images).mean()) - 0.1
    assert torch.equal(Evasion(expected_score(detector), 24, 6)(own).images, evaded.images)


def test_evasion_of_every_view_at_once(group, victim, store):
    views = SamePlus(TINY_SAME).fit(group.victim_train, group.calibration, victim, store=store)
    own, score = group.proxy[:60], expected_score(views)
    assert not torch.equal(score(own.pixels()), score(own.pixels())), "fresh masks"
    evaded = Evasion(score, epsilon=24, steps=6)(own)
    assert (evaded.images.int() - own.images.int()).abs().max() <= 24
    assert float(views.score(evaded.images).mean()) < float(views.score(own.images).mean()) - 0.5


def test_any_differentiable_score_will_do(toy):
    """Descending the mean pixel takes epsilon from each of them, and never leaves the range."""
    evaded = Evasion(lambda x: x.flatten(1).mean(1), epsilon=10, steps=4)(toy)
    assert torch.equal(evaded.images, (toy.images.int() - 10).clamp_min(0).to(torch.uint8))


def test_a_score_in_expectation_has_fresh_masks(detector, images):
    score = expected_score(detector)
    assert not torch.equal(score(images), score(images))


def test_a_detector_with_a_score_of_its_own_is_said():
    class Other(SameDetector):
        def score_received(self, x, answers=None):
            return x.flatten(1).mean(1)

    with pytest.raises(ValueError, match="Other is not SAME; give Evasion a differentiable"):
        expected_score(Other(TINY_SAME))


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda x: x.mean(), "one differentiable number each"),
        (lambda x: x.detach().flatten(1).mean(1), "without a gradient; for SAME take expected_score"),
    ],
)
def test_a_score_without_a_gradient_is_said(score, words, group):
    with pytest.raises(ValueError, match=words):
        Evasion(score)(group.proxy)


@pytest.mark.parametrize("numbers", [(0, 3), (256, 3), (8, 0)])
def test_a_step_that_moves_nothing_is_said(numbers):
    with pytest.raises(ValueError, match="epsilon must be 1 to 255 levels, with 1 step or more"):
        Evasion(lambda x: x, *numbers)


# What a defence says of itself


@pytest.mark.parametrize(("reward", "response"), [("answered", Reject(0.05)), ("bits", ProofOfWork(2, 8))])
def test_the_bandit_learns_what_passes(reward, response, toy):
    """White images are refused, or dear: in the end they are hardly asked."""
    attack = AdaptiveKnockoff(toy, "conv3", SETTINGS, reward=reward, batch=8)
    queries = asked(toy_gateway(200, response), attack)
    assert classes_of(queries[100:], toy)[3] < 0.12
    assert attack.policies[0][3] == 0.25 and attack.policies[-1][3] < 0.1


def test_the_bandit_of_an_oracle_may_have_hard_labels(toy):
    """A refusal has no class either."""
    attack = AdaptiveKnockoff(toy, "conv3", SETTINGS, reward="answered", batch=8, labels="hard")
    asked(toy_gateway(200, Reject(0.05)), attack)
    assert attack.policies[-1].argmin() == 3


def test_clusters_are_arms_where_labels_say_nothing(toy):
    nameless = replace(toy, labels=torch.zeros_like(toy.labels))
    grouped = clustered(nameless, 4)
    assert len(grouped.classes) == 4 and torch.equal(grouped.images, toy.images)
    for level in LEVELS:
        assert len(grouped.labels[toy.images[:, 0, 8, 8] == level].unique()) == 1
    attack = AdaptiveKnockoff(nameless, "conv3", SETTINGS, reward="answered", clusters=4, batch=8)
    assert classes_of(asked(toy_gateway(200, Reject(0.05)), attack)[100:], toy)[3] < 0.12


@pytest.mark.parametrize("clusters", [1, 401])
def test_clusters_that_cannot_be_are_said(clusters, toy):
    with pytest.raises(ValueError, match=f"as images .400., got {clusters}"):
        AdaptiveKnockoff(toy, clusters=clusters)
    with pytest.raises(ValueError, match="give one of them"):
        AdaptiveKnockoff(toy, clusters=4, superclasses=[0, 0, 1, 1])


def test_a_bargain_hunter_buys_the_cheapest(toy):
    """A price is no query: the budget buys 150 of 400 images, all black or dark, in the order of their price."""
    gateway = toy_gateway(150, ProofOfWork(2, 8))
    result = Bargain(toy, "conv3", SETTINGS).run(gateway)
    assert result.queries == gateway.spent == len(gateway.log.queries) == 150
    assert (gateway.log.bits.diff() >= 0).all() and gateway.log.bits[0] == 2
    assert classes_of(gateway.log.queries, toy)[2:].eq(0).all()


def test_a_quote_is_what_the_answer_costs_and_costs_nothing(toy):
    gateway = toy_gateway(400, ProofOfWork(2, 8))
    bits = gateway.quote(toy.images)
    assert gateway.spent == 0 and bits.dtype == torch.int64 and len(bits.unique()) > 1
    gateway.query(toy.images)
    assert torch.equal(gateway.log.bits, bits)
    assert toy_gateway(5).quote(toy.images).eq(0).all()


# Mixing


@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 0.9])
def test_the_mixture_is_exact_after_every_query(share, group, victim):
    proxy, benign = group.proxy, group.benign_test[:40]
    gateway = QueryGateway(victim, 100)
    queries = asked(gateway, Mixing(proxy, benign, "conv3", SETTINGS, share=share))
    known = {image.numpy().tobytes() for image in benign.images}
    hidden = torch.tensor([query.numpy().tobytes() in known for query in queries]).cumsum(0)
    assert gateway.spent == 100 and hidden.tolist() == [int(n * share + 1e-9) for n in range(1, 101)]
    own = queries[~torch.tensor([query.numpy().tobytes() in known for query in queries])]
    assert torch.equal(own, proxy.shuffled(0).images[: len(own)])


def test_a_mixture_that_cannot_be_is_said(group, victim):
    with pytest.raises(ValueError, match="share of benign queries must be"):
        Mixing(group.proxy, group.seeds, share=1.0)
    with pytest.raises(ValueError, match="0 benign images .* cannot hide"):
        Mixing(group.proxy, group.seeds[:0])
    gateway = QueryGateway(victim, 401)
    with pytest.raises(ValueError, match="holds 200 images, the budget is 201"):
        Mixing(group.proxy, group.seeds, share=0.5).run(gateway)
    assert gateway.spent == 0


# Fewer answers


def halves(x: torch.Tensor) -> torch.Tensor:
    """Which half is brighter, as probabilities."""
    left = 20 * (x[..., :8] - x[..., 8:]).mean((1, 2, 3))[:, None]
    return torch.cat([left, -left], dim=1).softmax(1)


@pytest.fixture(scope="module")
def noise() -> ImageSet:
    """Noise with one half a little brighter."""
    labels = torch.arange(500) % 2
    x = torch.randn(500, *SHAPE, generator=torch.Generator().manual_seed(0)) * 60 + 90
    x[labels == 0, :, :, :8] += 25
    x[labels == 1, :, :, 8:] += 25
    return ImageSet(x.clamp(0, 255).to(torch.uint8), labels, ("left", "right"), "noise")


class Stingy(QueryGateway):
    """Answers the first ten queries and refuses the rest."""

    def _ask(self, x):
        records = super()._ask(x)
        records["answers"][max(0, 10 - self.spent) :] = torch.nan
        return records


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_the_first_substitute_teaches_the_second_what_it_is_sure_of(labels, noise, monkeypatch):
    """Ninety refused images and thirty that were never asked; what was answered stays as it was."""
    lessons, train = [], Knockoff.train_substitute

    def watched(self, images, answers, settings=None):
        lessons.append((images, answers, train(self, images, answers, settings)))
        return lessons[-1][2]

    monkeypatch.setattr(Knockoff, "train_substitute", watched)
    settings = TrainSettings(seen=200, batch=8, lr=1e-3)
    attack = SelfTraining(noise, "conv3", settings, labels=labels, confidence=0.7, unasked=30)
    result = attack.run(Stingy(Victim(halves, SHAPE, 2), 100))
    (asked, answers, first), (images, taught, second) = lessons
    assert result.answered == 10 and result.substitute is second and torch.equal(images[:100], asked)
    assert torch.equal(taught[:10], answers[:10]) and torch.equal(images, noise.shuffled(0).images[:130])
    guesses = predict(first, to_float(images))[10:]
    sure = guesses.amax(1) >= 0.7
    assert 0 < sure.sum() < 120 and torch.equal(taught[10:].isfinite().all(1), sure)
    assert torch.equal(taught[10:][sure], nn.functional.one_hot(guesses[sure].argmax(1), 2).float())


def test_without_any_answer_there_is_nothing_to_teach(noise):
    attack = SelfTraining(noise, "conv3", SETTINGS)
    answers = torch.full((10, 2), torch.nan)
    untrained = attack.build_substitute(SHAPE, 2)
    assert torch.equal(attack.train_substitute(noise.images[:10], answers).head.weight, untrained.head.weight)


@pytest.mark.parametrize("options", [{"confidence": 0}, {"confidence": 1.1}, {"unasked": -1}])
def test_self_training_that_cannot_be_is_said(options, noise):
    with pytest.raises(ValueError, match="confidence must be above 0 and at most 1, unasked at least 0"):
        SelfTraining(noise, **options)


# Accounts


def test_accounts_take_turns(toy):
    """And to an attack they are one gateway: its log is in order, and each account's log is its own."""
    accounts = [toy_gateway(budget, Reject(0.05)) for budget in (50, 20, 50)]
    gateway = RoundRobin(accounts)
    result = Knockoff(toy, "conv3", SETTINGS).run(gateway)
    assert gateway.budget == result.queries == 120 and gateway.remaining == 0
    assert [account.spent for account in accounts] == [50, 20, 50]
    assert torch.equal(gateway.log.queries, toy.shuffled(0).images[:120])
    assert torch.equal(accounts[0].log.queries[:20], gateway.log.queries[:60:3])
    assert torch.equal(accounts[2].log.queries[20:], gateway.log.queries[61::2])  # the second had spent its budget
    alone = toy_gateway(120, Reject(0.05))
    answers = alone.query(gateway.log.queries)
    assert torch.equal(gateway.log.answers.nan_to_num(9), answers.nan_to_num(9)) and answers.isnan().any()
    assert torch.equal(gateway.log.scores, alone.log.scores) and torch.equal(gateway.log.refused, alone.log.refused)


def test_accounts_have_one_budget_and_check_images_first(toy):
    gateway = RoundRobin([toy_gateway(3), toy_gateway(4)])
    with pytest.raises(BudgetExceeded, match="8 asked, 7 of 7"):
        gateway.query(toy.images[:8])
    with pytest.raises(ValueError, match="images must have shape"):
        gateway.query(torch.zeros(2, 1, 9, 9))
    assert [account.spent for account in gateway.gateways] == [0, 0]
    assert RoundRobin([toy_gateway(None), toy_gateway(4)]).budget is None
    assert RoundRobin([toy_gateway(9, ProofOfWork(3, 0))] * 2).quote(toy.images[:2]).tolist() == [3, 3]


def test_accounts_of_different_services_are_said(toy, victim):
    with pytest.raises(ValueError, match="of one service"):
        RoundRobin([toy_gateway(3), QueryGateway(victim, 3)])
    with pytest.raises(ValueError, match="at least one account"):
        RoundRobin([])


# JBDA in ink


def test_only_the_stroke_is_touched(group, victim):
    gateway = QueryGateway(victim, 80)
    JBDA(group.seeds, "conv3", SETTINGS, where="ink").run(gateway)
    seeds, grown = gateway.log.queries[:20].int(), gateway.log.queries[20:].int()
    paper = ~ink_mask(group.seeds.images).expand_as(seeds)
    for image in grown:
        near = (image - seeds).abs().flatten(1).sum(1).argmin()  # the seed that it grew from
        assert (image - seeds[near])[paper[near]].eq(0).all() and (image - seeds[near]).abs().amax() >= 12


def test_nothing_to_touch_is_said(group):
    plain = replace(group.seeds, images=torch.full_like(group.seeds.images, 30))
    with pytest.raises(ValueError, match="all plain paper, there is no ink to touch; use where='everywhere'"):
        JBDA(plain, where="ink")
    with pytest.raises(ValueError, match="where must be everywhere or ink"):
        JBDA(group.seeds, where="border")


def test_ink_is_what_is_not_paper():
    picture = torch.full((1, 3, 5, 5), 200, dtype=torch.uint8)
    picture[0, 1, 2, 2], picture[0, :, 0, 0], picture[0, :, 3, 3] = 90, 0, 197
    assert ink_mask(picture)[0, 0].nonzero().tolist() == [[0, 0], [2, 2]]


# Every one of them by name


@pytest.mark.parametrize("name", ["knockoff-preprocessed", "knockoff-filtered", "knockoff-purified"])
def test_without_a_proxy_set_nothing_is_learnt_for_it(name, group, store, monkeypatch):
    monkeypatch.setattr(attacks, "own_autoencoder", None)
    attack = make_attack(name, group, preset("smoke", group.image_shape), 0, store, proxy=group.proxy[:0])
    with pytest.raises(ValueError, match="holds 0 images"):
        attack.check_budget(10)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name.startswith("knockoff-")])
def test_by_name_it_asks_other_images_than_plain_knockoff(name, group, victim, detector, store):
    settings = replace(preset("smoke", group.image_shape), substitute_train=SETTINGS, budgets=(50, 90))
    gateways = [QueryGateway(victim, 90, detector, ProofOfWork(2, 8)) for _ in range(2)]
    for gateway, attack in zip(gateways, ("knockoff", name), strict=True):
        make_attack(attack, group, settings, 0, store).run(gateway)
    plain, knowing = (gateway.log.queries for gateway in gateways)
    assert len(knowing) == 90 and torch.equal(plain, knowing) == (name == "knockoff-self-trained")
