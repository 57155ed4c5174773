import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from samelib.attacks.base import Querier
from samelib.attacks.dfme import (
    DFME,
    AdversarialTraining,
    Generator,
    disagreement,
    estimate_gradient,
    iterations,
    recover_logits,
)
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim, build_classifier
from samelib.training import TrainSettings, best_device

SMALL = {"noise": 16, "width": 4}
ORIGINAL_EPSILON = 1e-3


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The gradient estimate against autograd


def similarity(loss, x, directions: int, epsilon: float = 1e-3) -> float:
    """Mean cosine of the estimated and the true gradient."""
    estimate = estimate_gradient(loss, x, directions, epsilon, rng())
    x = x.clone().requires_grad_()
    (true,) = torch.autograd.grad(loss(x).sum(), x)
    return float(cosine_similarity(estimate.flatten(1), true.flatten(1)).mean().detach())


def quadratic(x):
    scale = torch.arange(1, 1 + x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    return (scale * x.square()).flatten(1).sum(1)


def test_the_estimate_converges_to_the_gradient_of_a_quadratic():
    x = torch.randn(3, 1, 4, 4, generator=rng(1), dtype=torch.float64)
    estimate = estimate_gradient(quadratic, x, 40_000, 1e-5, rng().manual_seed(2))
    true = 2 * torch.arange(1.0, 17, dtype=torch.float64).view(1, 4, 4) * x
    assert float((estimate - true).norm() / true.norm()) < 0.05  # in length too: the factor d is right


@pytest.mark.parametrize("directions", [1, 16, 256])
def test_the_cosine_grows_with_the_directions_as_theory_says(directions):
    """For m random directions in d dimensions it is about sqrt(m / (m + d))."""
    x = torch.randn(200, 1, 8, 8, generator=rng(1), dtype=torch.float64)
    expected = (directions / (directions + 64)) ** 0.5
    assert abs(similarity(quadratic, x, directions, 1e-6) - expected) < 0.05


def test_the_cosine_grows_on_a_network():
    model = build_classifier("conv3", (1, 16, 16), 5).double().eval()
    victim = build_classifier("conv3", (1, 16, 16), 5, seed=1).double().eval()

    def loss(x):
        return -disagreement(model(x.tanh()), victim(x.tanh()).softmax(1))

    x = torch.randn(6, 1, 16, 16, generator=rng(1), dtype=torch.float64)
    one, sixteen, many = (similarity(loss, x, m) for m in (1, 16, 256))
    assert 0 < one < sixteen < many and many > 0.5


def test_the_default_difference_survives_the_8_bit_door(group, victim):
    """The original's does not: rounding at the door turns it into noise."""
    student = build_classifier("conv3", (1, 28, 28), 10, seed=7).eval()

    def loss(x, door):
        return -disagreement(student(x.tanh()), door(x.tanh()))

    x = torch.randn(12, 1, 28, 28, generator=rng(1)).requires_grad_()
    logits = victim.model(x.tanh())
    (true,) = torch.autograd.grad((student(x.tanh()) - logits + logits.mean(1, keepdim=True)).abs().mean(1).sum(), x)
    x = x.detach()

    def cosine(epsilon):
        estimate = estimate_gradient(lambda x: loss(x, QueryGateway(victim).query).detach(), x, 64, epsilon, rng())
        return float(cosine_similarity(-estimate.flatten(1), true.flatten(1)).mean())

    assert cosine(DFME().epsilon) > 0.2 and cosine(ORIGINAL_EPSILON) < 0.1


def test_an_estimate_costs_m_plus_one_queries_an_image():
    sizes = []

    def loss(x):
        sizes.append(len(x))
        return x.flatten(1).sum(1)

    estimate_gradient(loss, torch.zeros(7, 1, 4, 4), 3, 1e-3, rng())
    assert sizes == [7 * 4]


# Logits


def test_logits_are_recovered_up_to_a_constant():
    logits = 8 * torch.randn(50, 10, generator=rng(), dtype=torch.float64)
    centred = logits - logits.mean(1, keepdim=True)
    assert torch.allclose(recover_logits(logits.softmax(1)), centred, atol=1e-9)
    assert torch.allclose(recover_logits((logits + 3).softmax(1)), centred, atol=1e-9)


def test_a_probability_of_zero_is_finite():
    assert torch.isfinite(recover_logits(torch.tensor([[1.0, 0.0]]))).all()


def test_disagreement_is_zero_for_the_same_logits():
    logits = torch.tensor([[1.0, -1.0], [3.0, 0.0]])
    assert torch.allclose(disagreement(logits, logits.softmax(1)), torch.tensor([0.0, 1.5]))  # 3, 0 is not centred


# The budget


@given(budget=st.integers(1, 5000), batch=st.integers(2, 600), cost=st.integers(3, 30))
def test_iterations_spend_exactly_the_budget(budget, batch, cost):
    batches, extra = iterations(budget, batch, cost)
    assert sum(batches) * cost + extra == budget
    assert all(2 <= size <= batch for size in batches) and 0 <= extra < 2 * cost


def test_the_papers_budgets_are_one_to_five_iterations():
    cost = DFME().queries_per_image
    assert 256 * cost == 1792
    assert [len(iterations(budget, 256, cost)[0]) for budget in (1000, 4000, 6000, 10_000)] == [1, 3, 4, 6]
    full = [sum(n == 256 for n in iterations(budget, 256, cost)[0]) for budget in (1000, 4000, 6000, 10_000)]
    assert full == [0, 2, 3, 5]


# The generator


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 30, 18)])
def test_the_generator_draws_images_of_any_shape(shape):
    x = Generator(shape, 16, 4)(torch.randn(9, 16, generator=rng()))
    assert x.shape == (9, *shape)
    assert (
        abs(float(x.detach().mean())) < 0.05 and abs(float(x.detach().std()) - 1) < 0.05
    )  # the last normalisation: tanh stays alive


@pytest.fixture
def small() -> Victim:
    """A linear victim of 16 x 16 pixels that prefers its first class."""
    weights, bias = torch.randn(256, 3, generator=rng()) / 8, torch.tensor([3.0, 0.0, -3.0])
    return Victim(lambda x: (x.cpu().flatten(1) @ weights + bias).softmax(1), (1, 16, 16), 3)


def test_generator_and_student_both_learn(small):
    """The student comes to agree with the victim on inventions; the generator's weights move."""
    settings = TrainSettings(1, 32, 0.02, "sgd", weight_decay=5e-4, warmup=0)
    training = AdversarialTraining(DFME("conv3", settings, **SMALL), Querier(QueryGateway(small, 10_000)))
    weights = training.generator.linear.weight.detach().clone()
    images = training.invent(64).tanh().detach()
    before = level(training.student, small, images)
    for _ in range(8):
        training.generator_step(32)
        training.student_steps(32, 0)
    assert level(training.student, small, images) < 0.8 * before
    assert not torch.equal(weights, training.generator.linear.weight)


def level(student, victim, images) -> float:
    """The mean disagreement of student and victim on images in [-1, 1]."""
    with torch.no_grad():
        return float(disagreement(student.eval()(images), victim(images).to(images.device)).mean())


def test_the_generator_goes_where_the_two_disagree(small):
    """With a true gradient (many directions) and a student at rest, disagreement on inventions grows."""
    dfme = DFME("conv3", TrainSettings(1, 16, 0.1, "sgd"), directions=40, noise=16, width=4, generator_lr=3e-2)
    training = AdversarialTraining(dfme, Querier(QueryGateway(small, 10_000)))
    noise = torch.randn(128, 16, generator=rng(3)).to(best_device())

    def inventions():
        return training.generator(noise).tanh().detach()

    before = level(training.student, small, inventions())
    for _ in range(12):
        training.generator_step(16)
    assert level(training.student, small, inventions()) > before


def test_extra_images_go_into_the_last_step(small):
    gateway = QueryGateway(small, 100)
    training = AdversarialTraining(DFME("conv3", TrainSettings(1, 8), student_steps=3, **SMALL), Querier(gateway))
    training.student_steps(8, 5)
    assert gateway.spent == 3 * 8 + 5


# Bad input


@pytest.mark.parametrize(
    "options", [{"student_steps": 0}, {"directions": 0}, {"epsilon": 0.0}, {"generator_lr": -1.0}, {"width": 0}]
)
def test_bad_options_are_said(options):
    with pytest.raises(ValueError, match="must be"):
        DFME(**options)


def test_a_diverging_substitute_is_said(small):
    attack = DFME("conv3", TrainSettings(1, 32, 1e30, "sgd", warmup=0), **SMALL)
    with pytest.raises(FloatingPointError, match="lower its learning rate"):
        attack.run(QueryGateway(small, 1000))


def test_a_batch_of_one_is_said():
    with pytest.raises(ValueError, match="batch of at least 2"):
        DFME("conv3", TrainSettings(1, 1))


def test_a_budget_below_one_round_is_said(small):
    gateway = QueryGateway(small, 13)
    with pytest.raises(ValueError, match="13 queries are fewer than the smallest round of DFME, 14"):
        DFME().run(gateway)
    assert gateway.spent == 0
