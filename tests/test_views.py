import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY_SAME, fit_beside
from scipy import stats

from samelib import load_group, train_victim
from samelib.data.groups import Group
from samelib.data.synthetic import shapes
from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import CHOSEN, EXITS, Exit, SamePlus, complementary_masks
from samelib.detectors.views import PRIOR, VIEWS, BothTails, Tail, class_means, combined
from samelib.metrics import auroc
from samelib.models.classifiers import Victim, build_classifier, predict
from samelib.models.mae import patchify
from samelib.store import ArtifactError, ArtifactStore


@pytest.fixture(scope="module")
def plus(group, victim, store) -> SamePlus:
    return fit_beside(SamePlus(TINY_SAME, views=VIEWS), group, victim, store)


@pytest.fixture(scope="module")
def on_glyphs(store) -> tuple[Group, SamePlus]:
    """With the models that come with the package."""
    group = load_group("glyphs")
    plus = SamePlus.preset("lecture", group.image_shape)
    return group, plus.fit(group.victim_train, group.calibration, train_victim(group, store=store), store=store)


@pytest.mark.parametrize(("tokens", "ratio", "passes"), [(49, 0.75, 4), (16, 0.75, 4), (64, 0.5, 2), (49, 0, 1)])
def test_every_patch_is_visible_in_exactly_one_pass(tokens, ratio, passes):
    masks = complementary_masks(tokens, ratio, seed=0)
    assert len(masks) == passes
    shown = torch.zeros(tokens)
    for noise, keep in masks:
        shown[noise.argsort(stable=True)[:keep]] += 1
    assert (shown == 1).all()


def test_a_look_is_what_the_passes_say_one_by_one(plus, group):
    x = group.benign_test[:3].pixels()
    look = plus.look(x)
    visible, hidden = torch.zeros_like(look.visible), torch.zeros_like(look.hidden)
    masks = complementary_masks(plus.mae.tokens, 0.75, plus.seed)
    for noise, keep in masks:
        reconstruction, mask = plus.mae(x, noise.expand(3, -1), 1 - keep / plus.mae.tokens)
        residual = (patchify(x, 7) - patchify(reconstruction, 7)).square().mean(2)
        visible += residual * (1 - mask)
        hidden += residual * mask / (len(masks) - 1)
    assert torch.allclose(look.visible, visible, atol=1e-5) and torch.allclose(look.hidden, hidden, atol=1e-5)
    assert torch.allclose(look.answers, plus.victim(x))
    assert look.latent.shape == (3, 48) and look.features.norm(dim=1).allclose(torch.ones(3))


def test_a_score_does_not_depend_on_its_batch(plus, group):
    x = group.proxy[:20].pixels()
    whole = plus.score(x)
    assert torch.allclose(whole[7:9], plus.score(x[7:9]), rtol=1e-4, atol=1e-4)


def test_the_models_are_those_of_same(plus, group, victim, store, tmp_path):
    again = fit_beside(SamePlus(TINY_SAME), group, victim, ArtifactStore(tmp_path, store.root))
    assert again.cards["mae"]["sha256"] == plus.cards["mae"]["sha256"]
    assert [path for path, _ in ArtifactStore(tmp_path).entries()] == []
    same = fit_beside(SameDetector(TINY_SAME), group, victim, store)
    assert same.cards["auxiliary"]["sha256"] == plus.cards["auxiliary"]["sha256"]


def test_a_strange_query_is_flagged_and_the_view_that_saw_it_named(plus, group):
    noise = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert plus.flag(noise).all()
    assert set(plus.seen_by(noise)) <= set(VIEWS)
    assert plus.seen_by(noise) == [tuple(VIEWS)[i] for i in plus.surprises(noise).argmax(1)]


def test_five_percent_are_five_percent(group, victim, store):
    flagged = fit_beside(SamePlus(TINY_SAME), group, victim, store).flag(group.benign_test.pixels())
    # The rate that this calibration set gives is random itself: Beta(k, n + 1 - k) of n = 96 images.
    low, high = stats.betabinom(150, 4, 93).interval(0.999)
    assert low <= int(flagged.sum()) <= high


def test_five_percent_are_five_percent_on_glyphs(on_glyphs):
    check_rate(*on_glyphs)


@pytest.mark.data
def test_five_percent_are_five_percent_on_mnist(real_data):
    group = load_group("mnist")
    plus = SamePlus.preset("lecture", group.image_shape)
    check_rate(group, plus.fit(group.victim_train, group.calibration, train_victim(group)))


def check_rate(group: Group, plus: SamePlus) -> None:
    flagged = plus.flag(group.benign_test[:1000].pixels())
    low, high = stats.betabinom(1000, 40, 761).interval(0.999)
    assert low <= int(flagged.sum()) <= high


def test_tails_go_on_where_ranks_end():
    tail = Tail().fit(torch.arange(100.0))
    assert tail(torch.tensor([-1.0, 49.5])).exp().reciprocal().tolist() == pytest.approx([1.0, 51 / 101])
    far = tail(torch.tensor([89.0, 95.0, 120.0, 1000.0]))
    assert (far.diff() > 0).all() and far.isfinite().all()
    start, excess = 89.0, 5.5  # the mean of 1 .. 10 above it
    assert float(tail(torch.tensor([start + excess])) - tail(torch.tensor([start]))) == pytest.approx(1.0)


def test_combinations_by_hand():
    surprises = -torch.tensor([[0.01, 0.5], [0.04, 0.02]], dtype=torch.float64).log()
    assert combined(surprises, "minimum").exp().tolist() == pytest.approx([100.0, 50.0])
    assert combined(surprises, "fisher").exp().tolist() == pytest.approx([200.0, 1250.0])
    cauchy = [(math.tan(0.49 * math.pi) + 0) / 2, (math.tan(0.46 * math.pi) + math.tan(0.48 * math.pi)) / 2]
    assert combined(surprises, "cauchy").sinh().tolist() == pytest.approx(cauchy)
    extreme = torch.tensor([[0.0, 800.0], [0.0, 20.0]], dtype=torch.float64)
    for name in ("minimum", "fisher", "cauchy"):
        assert combined(extreme, name).isfinite().all() and combined(extreme, name)[0] > combined(extreme, name)[1]


def test_classes_with_few_images_borrow_from_all():
    values = torch.tensor([[0.0], [0.0], [6.0]])
    answers = torch.eye(3)[torch.tensor([0, 0, 1])]  # the third class is never answered
    means = class_means(values, answers)[:, 0]
    assert means.tolist() == pytest.approx([PRIOR * 2 / (2 + PRIOR), (6 + PRIOR * 2) / (1 + PRIOR), 2.0])


def test_a_victim_that_never_answers_a_class(group, store):
    def two_of_ten(x):
        return torch.eye(10)[(x.flatten(1).mean(1) > x.mean()).long()]

    plus = fit_beside(SamePlus(TINY_SAME), group, Victim(two_of_ten, group.image_shape, 10), store)
    assert plus.score(group.proxy.pixels()).isfinite().all()


def test_saved_and_loaded(plus, group, tmp_path):
    x = group.proxy[:10].pixels()
    loaded = SamePlus.load(plus.save(tmp_path / "plus"))
    assert torch.equal(loaded.score(x), plus.score(x)) and loaded.threshold == plus.threshold
    assert loaded.seen_by(x) == plus.seen_by(x)
    with pytest.raises(ArtifactError, match="holds a same-plus, not a same-detector"):
        SameDetector.load(tmp_path / "plus")


def test_an_auxiliary_model_on_the_victims_trunk(group, victim, store):
    plus = fit_beside(SamePlus(replace(TINY_SAME, share_backbone=True), views=VIEWS), group, victim, store)
    assert plus.look(group.proxy[:3].pixels()).features.shape == (3, 512)
    assert plus.flag(group.benign_test.pixels()).float().mean() < 0.2


def test_what_cannot_be_combined(group, victim):
    with pytest.raises(ValueError, match="complementary masks need a mask_ratio of 0.5 or more, got 0.0"):
        SamePlus(replace(TINY_SAME, mask_ratio=0.0, passes=1))
    with pytest.raises(ValueError, match="views must be some of .* got telepathy"):
        SamePlus(TINY_SAME, views=["telepathy"])
    with pytest.raises(ValueError, match="got none"):
        SamePlus(TINY_SAME, views=[])
    with pytest.raises(ValueError, match="combination must be one of"):
        SamePlus(TINY_SAME, combination="sum")
    few = group.calibration[:60]
    with pytest.raises(ValueError, match="need 100 calibration images or more, got 60"):
        SamePlus(TINY_SAME).fit(group.victim_train, few, victim)


def test_jbda_as_published_is_caught_on_glyphs(on_glyphs):
    """Small steps everywhere, also on the paper around the digit: the mean residual hardly moves, its place does."""
    group, plus = on_glyphs
    benign = group.benign_test[:200].pixels()
    x = group.benign_test[200:400].pixels().requires_grad_()
    plus.victim.model(x).amax(1).sum().backward()
    stepped = (x.detach() + 0.1 * x.grad.sign()).clamp(-1, 1)
    assert auroc(plus.score(benign), plus.score(stepped)) > 0.95


# Colour pictures: other views, and the victim's own features where they are at hand


@pytest.fixture(scope="module")
def colour() -> tuple[Group, SamePlus]:
    train, calibration, benign, seeds = shapes("victim", 420).split(200, 150, 50, 20)
    group = Group("shapes", train, calibration, benign, seeds, shapes("proxy", 20), shapes("outliers", 20))
    victim = Victim.of(build_classifier("resnet10", (3, 32, 32), 10), (3, 32, 32), 10, "resnet10")
    settings = replace(TINY_SAME, mae=replace(TINY_SAME.mae, patch=8), auxiliary="resnet10")
    return group, fit_beside(SamePlus(settings), group, victim)


def test_both_tails_are_surprised_by_too_little_as_by_too_much():
    statistics = torch.linspace(0, 1, 101)
    both = BothTails().fit(statistics)(torch.tensor([-0.3, 0.0, 0.5, 1.0, 1.3]))
    assert torch.allclose(both, both.flip(0), atol=0.05) and both[0] > both[1] > both[2] == 0
    once = Tail().fit(statistics)(torch.tensor([1.3]))
    assert torch.allclose(both[-1:], once - math.log(2))


def test_colour_pictures_have_views_of_their_own(colour, plus, group, victim, store):
    assert tuple(colour[1].views) == CHOSEN["colour"] and len(colour[1].exits) == len(EXITS["colour"])
    assert tuple(fit_beside(SamePlus(TINY_SAME), group, victim, store).views) == CHOSEN["grey"]
    assert plus.panel.tails["visible profile, both sides"].high.start == plus.panel.tails["visible profile"].start


def test_the_features_of_a_query_are_the_victims_where_they_are_at_hand(colour):
    group, plus = colour
    x = group.benign_test[:5].pixels()
    own = torch.nn.functional.normalize(plus.victim.model.features(x), dim=1)
    assert torch.allclose(plus.look(x).query, own, atol=1e-5)
    box = Victim(plus.victim.answer, plus.victim.image_shape, plus.victim.classes)
    outside = fit_beside(SamePlus(plus.settings, views=["query features"]), group, box)
    own = torch.nn.functional.normalize(outside.auxiliary.features(x), dim=1)
    assert torch.allclose(outside.look(x).query, own, atol=1e-5)


def test_a_saved_one_asks_for_the_victim_that_it_was_fitted_beside(colour, tmp_path):
    group, plus = colour
    x = group.proxy.pixels()
    folder = plus.save(tmp_path / "saved")
    assert torch.allclose(SamePlus.load(folder).score(x), plus.score(x), atol=1e-5)
    box = Victim(lambda x: predict(plus.victim.model, x), plus.victim.image_shape, plus.victim.classes)
    with pytest.raises(ValueError, match="fitted to features of the victim model"):
        SamePlus.load(folder, victim=box)


# Exits: most benign queries leave a sweep early


def test_who_leaves_is_not_looked_at_again(group, victim, store, monkeypatch):
    exits = Exit(0, ("pixels", "doubt"), 0.3), Exit(2, ("error", "trace"), 0.7)
    plus = fit_beside(SamePlus(TINY_SAME, exits=exits), group, victim, store)
    x = group.benign_test.pixels()
    encoded = []
    encode = plus.mae.forward_encoder

    def counting(images, *arguments):
        encoded.append(len(images))
        return encode(images, *arguments)

    monkeypatch.setattr(plus.mae, "forward_encoder", counting)
    scores = plus.score(x)
    passes = list(encoded)
    panels = (*plus.exits, plus.panel)
    at_start, half_way, end = (panel(look) for panel, look in zip(panels, plus._looks(x, None), strict=True))
    first, second = at_start <= 0, (at_start > 0) & (half_way <= 0)
    rest = ~(first | second)
    assert 0.2 < first.float().mean() < 0.5 < (first | second).float().mean() < 0.9
    for who, expected in ((first, at_start), (second, half_way), (rest, end)):
        assert torch.allclose(scores[who], expected[who], atol=1e-3)
    assert sum(passes) == 2 * int((~first).sum() + rest.sum()), "two passes for each that stays, and two more"


def test_exits_cost_few_decisions_on_glyphs(on_glyphs, store):
    """Seven benign queries in ten leave; in all, one benign query in a hundred is decided otherwise than by all passes,
    and three of a thief's."""
    group, early = on_glyphs
    whole = fit_beside(SamePlus(early.settings, exits=()), group, early.victim, store)
    for images, most in ((group.benign_test[:600], 0.01), (group.proxy[:300], 0.03), (group.outliers[:300], 0.01)):
        stops, goes_on = early.score(images.pixels()), whole.score(images.pixels())
        different = (stops > early.threshold) != (goes_on > whole.threshold)
        assert different.float().mean() <= most
        assert ((stops <= 0).float().mean() > 0.7) == (len(images) == 600)


def test_what_an_exit_cannot_be():
    for exits in ([Exit(2, ("error",), 0.5), Exit(1, ("doubt",), 0.5)], [Exit(0, ("doubt",), 1.0)]):
        with pytest.raises(ValueError, match="exits must follow one another"):
            SamePlus(TINY_SAME, exits=exits)
    for exit in (Exit(0, ("trace",), 0.5), Exit(2, ("deviation",), 0.5)):
        with pytest.raises(ValueError, match=f"after {exit.passes} passes an exit can look at .*, got {exit.views[0]}"):
            SamePlus(TINY_SAME, exits=[exit])
