import pytest
import torch
from torch import nn

from samelib.attacks import jbda
from samelib.attacks.jbda import JBDA, jacobian_step, unseen
from samelib.data.image_set import ImageSet, to_float
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim, build_classifier
from samelib.training import TrainSettings

SETTINGS = TrainSettings(2, 16, 3e-3)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def test_the_step_of_a_linear_model_by_hand():
    """dF_y/dx of softmax(W x) is F_y (W_y - sum_k F_k W_k)."""
    model, x = Linear(), torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    p = model(x).softmax(1)
    by_hand = (p.gather(1, y[:, None]) * (model.weight[y] - p @ model.weight)).sign().view_as(x)
    assert torch.equal(jacobian_step(model, x, y, 0.1), (x + 0.1 * by_hand).clamp(-1, 1))


def test_the_step_against_autograd_on_probabilities():
    """Our gradient is of the logarithm; its sign is that of the probability's own gradient."""
    model = build_classifier("conv3", (1, 28, 28), 10).double()
    x = (torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1).double().requires_grad_()
    y = torch.arange(8)
    (gradient,) = torch.autograd.grad(model(x).softmax(1).gather(1, y[:, None]).sum(), x)
    moved = jacobian_step(model, x, y, 0.05) - x
    inside = (x.abs() < 0.94) & (gradient != 0)
    assert inside.sum() > 5000 and torch.equal(moved.sign()[inside], gradient.sign()[inside])
    assert torch.allclose(moved.abs()[inside], torch.tensor(0.05, dtype=torch.float64))


def test_a_sure_model_still_gives_a_direction():
    """Where the probability itself is 1 in floats its gradient is 0, the logarithm's is not."""
    model, x = Linear(), torch.ones(1, 1, 4, 4) * 0.5
    model.weight.data[1] = 90  # logit 720 above the others
    assert model(x).softmax(1)[0, 0] == 0
    assert (jacobian_step(model, x, torch.tensor([0]), 0.1) != x).all()


def test_steps_are_clipped_to_the_pixel_range():
    x = torch.full((1, 1, 4, 4), 0.95)
    moved = jacobian_step(Linear(), x, torch.tensor([1]), 0.2)
    assert moved.max() == 1 and torch.allclose(moved[moved < 1], torch.tensor(0.75))


def attacked(group, victim, budget, **options):
    """The query log of a JBDA with these options."""
    gateway = QueryGateway(victim, budget)
    JBDA(group.seeds, "conv3", SETTINGS, **options).run(gateway)
    return gateway.log


@pytest.fixture
def rounds(monkeypatch):
    """The size of the set at the start of every round."""
    sizes, augment = [], JBDA.augment

    def watched(self, substitute, images, answers, generator):
        sizes.append(len(images))
        return augment(self, substitute, images, answers, generator)

    monkeypatch.setattr(JBDA, "augment", watched)
    return sizes


def test_twenty_seeds_become_160(rounds, group, victim):
    """Doubling, as the paper's 200 seeds become 6,400."""
    queries = attacked(group, victim, 160).queries
    assert rounds == [20, 40, 80]
    assert torch.equal(queries[:20], group.seeds.images)  # the seeds come first
    assert len({q.numpy().tobytes() for q in queries}) == 160  # and every image once


def test_the_reservoir_makes_growth_linear(rounds, group, victim):
    attacked(group, victim, 60, reservoir=15)
    assert rounds == [20, 35, 50]


def test_an_image_moves_by_the_step_and_no_more(group, victim):
    """The first copies, against their nearest seed: 0.1 in [-1, 1] is 12.75 levels; 0.1 in [0, 1] is twice that."""
    for options, level in (({}, 13), ({"step_range": (0, 1)}, 26), ({"step": 0.2}, 26)):
        queries = attacked(group, victim, 40, **options).queries.int()
        distances = (queries[20:, None] - queries[None, :20]).abs().flatten(2).amax(2).amin(1)
        assert set(distances.tolist()) <= {level - 1, level}


@pytest.mark.parametrize(("direction", "sign"), [("+", 1), ("-", -1)])
def test_direction_raises_or_lowers_the_victims_class(direction, sign, group, victim):
    """Asked of the substitute that made the step, here the victim itself."""
    attack = JBDA(group.seeds, "conv3", SETTINGS, direction=direction)
    x = group.victim_train.images[:100]
    answers = victim(to_float(x))
    moved = attack.augment(victim.model, x, answers, torch.Generator().manual_seed(0))
    y = answers.argmax(1)[:, None]
    gain = victim(moved).gather(1, y) - answers.gather(1, y)
    assert len(moved) == 100 and sign * float(gain.mean()) > 0


def test_targeted_steps_go_toward_another_class(group, victim, monkeypatch):
    targeted = []

    def spy(model, x, labels, step, clip):
        targeted.append(labels)
        return jacobian_step(model, x, labels, step, clip)

    monkeypatch.setattr(jbda, "jacobian_step", spy)
    attack = JBDA(group.seeds, "conv3", SETTINGS, direction="targeted")
    answers = victim(group.victim_train.pixels())
    attack.augment(victim.model, group.victim_train.images, answers, torch.Generator().manual_seed(0))
    targets = torch.cat(targeted)
    assert (targets != answers.argmax(1)).all() and len(targets.unique()) == 10


def test_images_that_were_asked_are_not_candidates():
    a, b, c = (torch.full((1, 1, 2, 2), value, dtype=torch.uint8) for value in (1, 2, 3))
    assert unseen(torch.cat([b, a, c, b]), torch.cat([a])).tolist() == [0, 2]


def test_it_stops_and_says_so_when_no_image_changes(group, monkeypatch):
    """Nearly white seeds and a substitute that wants every pixel brighter: all are clipped to the same white."""
    monkeypatch.setattr(jbda, "jacobian_step", lambda model, x, labels, step, clip: (x + step).clamp(-1, 1))
    white = torch.stack([torch.full((1, 28, 28), 255 - i, dtype=torch.uint8) for i in range(5)])
    seeds = ImageSet(white, torch.zeros(5, dtype=torch.int64), ("a",), "white")
    indifferent = Victim(lambda x: torch.full((len(x), 10), 0.1), (1, 28, 28), 10)
    result = JBDA(seeds, "conv3", SETTINGS).run(QueryGateway(indifferent, 50))
    assert result.queries == 5 and "asked before" in result.stopped


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 0.0}, "a step of 0 in .* changes no 8-bit image; take at least 0.0039"),
        ({"step": 0.003, "step_range": (-1, 1)}, "changes no 8-bit image"),
        ({"step": -0.1}, "direction='-'"),
        ({"step": float("nan")}, "changes no 8-bit image"),
        ({"step": float("inf")}, "changes no 8-bit image"),
        ({"step": 20, "step_range": (255, 0)}, "step_range must be"),
        ({"direction": "up"}, "direction must be"),
        ({"reservoir": 0}, "reservoir must hold at least 1"),
    ],
)
def test_bad_options_are_said(options, words, group):
    with pytest.raises(ValueError, match=words):
        JBDA(group.seeds, **options)


def test_no_seeds_are_said(group):
    with pytest.raises(ValueError, match="needs seed images"):
        JBDA(group.seeds[:0])


def test_a_budget_below_the_seeds_is_said(group, victim):
    gateway = QueryGateway(victim, 19)
    with pytest.raises(ValueError, match="19 queries are fewer than the smallest round of JBDA, 20; raise the budget"):
        JBDA(group.seeds).run(gateway)
    assert gateway.spent == 0


def test_rounds_have_a_training_of_their_own(group, victim, monkeypatch):
    epochs, train = [], jbda.TransferAttack.train_substitute

    def watched(self, images, answers, settings=None):
        epochs.append((settings or self.settings).epochs)
        return train(self, images, answers, settings)

    monkeypatch.setattr(JBDA, "train_substitute", watched)
    attacked(group, victim, 50, round_settings=TrainSettings(1, 16, 3e-3))
    attacked(group, victim, 50)
    assert epochs == [1, 1, 2] + [2, 2, 2]
