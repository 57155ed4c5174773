import pytest
import torch

from samelib.attacks.knockoff import (
    AdaptiveKnockoff,
    Arms,
    GradientBandit,
    Knockoff,
    Learner,
    Rewards,
    TreeBandit,
    certainty_reward,
    diversity_reward,
    loss_reward,
    rescaled,
)
from samelib.data.image_set import ImageSet, to_float
from samelib.gateway import QueryGateway
from samelib.models.classifiers import Victim, build_classifier, predict
from samelib.training import TrainSettings

SETTINGS = TrainSettings(1, 32, 1e-3)


def close(tensor, values) -> bool:
    return torch.allclose(tensor.double(), torch.tensor(values, dtype=torch.float64), atol=1e-6)


# The bandit against hand values


def test_one_pull_by_hand():
    """Two arms, H = 0, arm 0 pulled once, R - Rbar = 1: H = (0.5, -0.5)."""
    bandit = GradientBandit(2)
    bandit.update(0, 1.0)
    assert close(bandit.preferences, [0.5, -0.5])


def test_the_second_pull_of_an_arm_counts_half():
    bandit = GradientBandit(2)
    bandit.update(0, 1.0)
    p = 1 / (1 + torch.e**-1)  # softmax of (0.5, -0.5)
    bandit.update(0, 2.0)
    assert close(bandit.preferences, [0.5 + 2 / 2 * (1 - p), -0.5 - 2 / 2 * (1 - p)])
    bandit.update(1, -1.0)  # the other arm's first pull
    assert bandit.pulls.tolist() == [2, 1]


def test_preferences_keep_their_sum_and_do_not_overflow():
    bandit = GradientBandit(5)
    for arm in range(5):
        bandit.update(arm, 1e4 * (arm - 2))
    assert abs(float(bandit.preferences.sum())) < 1e-6
    assert close(bandit.policy().sum(), 1.0) and torch.isfinite(bandit.policy()).all()


def test_the_bandit_finds_the_arm_that_pays():
    bandit, generator = GradientBandit(4), torch.Generator().manual_seed(0)
    for _ in range(300):
        arm = int(torch.multinomial(bandit.policy(), 1, generator=generator))
        bandit.update(arm, 2.0 if arm == 2 else -1.0)
    assert int(bandit.policy().argmax()) == 2 and bandit.policy()[2] > 0.9


def test_a_closed_arm_is_never_chosen_and_not_changed():
    bandit, open_arms = GradientBandit(3), torch.tensor([True, False, True])
    assert close(bandit.policy(open_arms), [0.5, 0, 0.5])
    bandit.update(0, 1.0, open_arms)
    assert close(bandit.preferences, [0.5, 0, -0.5])


def test_the_tree_learns_along_its_path():
    """Classes 0, 1 | 2, 3, 4. A pull of class 3 updates the superclass, and its branch, and nothing else."""
    tree = TreeBandit([0, 0, 1, 1, 1])
    assert close(tree.policy(), [1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6])
    tree.update(3, 1.0)
    assert close(tree.root.preferences, [-0.5, 0.5])
    assert close(tree.branches[1].preferences, [-1 / 3, 2 / 3, -1 / 3])
    assert close(tree.branches[0].preferences, [0, 0])
    assert close(tree.policy().sum(), 1.0) and int(tree.policy().argmax()) == 3


def test_a_used_up_branch_leaves_its_share_to_the_others():
    tree = TreeBandit([0, 0, 1, 1, 1])
    assert close(tree.policy(torch.tensor([False, False, True, False, True])), [0, 0, 0.5, 0, 0.5])


@pytest.mark.parametrize("superclasses", [[0, 0, 0], [0, 2, 2]])
def test_a_tree_needs_branches(superclasses):
    with pytest.raises(ValueError, match="at least two superclasses"):
        TreeBandit(superclasses)


# Rewards


def test_rewards_by_hand():
    answers = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    assert close(certainty_reward(answers), [0.5, 0.0])
    assert close(diversity_reward(answers, torch.tensor([0.5, 0.3, 0.2])), [0.2, 0.5])
    assert close(loss_reward(answers, torch.full((2, 3), 1 / 3)), [torch.log(torch.tensor(3.0))] * 2)


def test_log_of_zero_is_finite():
    sure = torch.tensor([[1.0, 0.0]])
    assert loss_reward(sure, sure) == 0 and torch.isfinite(loss_reward(sure, sure.flip(1))).all()


def test_rescaling_is_to_the_window_and_survives_no_variance():
    window = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert close(rescaled(torch.tensor([[2.0, 4.0], [3.0, 4.0]]), window), [[0.5, 0.0], [1.0, 0.0]])


def test_a_reward_counts_above_the_mean_of_earlier_ones():
    rewards = Rewards("certainty", 8)
    first = rewards.advantages(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), None)
    assert close(first, [0.5, -0.5])  # against its own mean, 0.5
    assert close(rewards.advantages(torch.tensor([[0.9, 0.1]]), None), [0.3])
    assert close(rewards.advantages(torch.tensor([[0.5, 0.5]]), None), [-1.8 / 3])


def test_diversity_is_measured_against_the_recent_answers_only():
    rewards = Rewards("diversity", 1)
    rewards.advantages(torch.tensor([[1.0, 0.0]]), None)  # 1, against nothing
    rewards.advantages(torch.tensor([[0.0, 1.0]]), None)
    again = rewards.advantages(torch.tensor([[0.0, 1.0]]), None)  # what the window of one holds already
    assert close(again, [0 - (1 + 1) / 2])


# Drawing


@pytest.fixture
def small():
    """Random images of four classes and a victim whose answers differ from image to image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, 1, 16, 16), dtype=torch.uint8, generator=generator)
    weights = torch.randn(256, 3, generator=generator) / 4
    proxy = ImageSet(images, torch.arange(80) % 4, tuple("abcd"), "random")
    return proxy, Victim(lambda x: (x.flatten(1) @ weights).softmax(1), (1, 16, 16), 3)


def test_arms_give_each_image_once_and_close_when_empty():
    arms = Arms(torch.tensor([0, 1, 0, 2, 1, 0]), 3, seed=0)
    pulled, images = arms.pull(GradientBandit(3), 4)
    more, rest = arms.pull(GradientBandit(3), 2)
    assert sorted(torch.cat([images, rest]).tolist()) == list(range(6))
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    assert torch.equal(labels[torch.cat([images, rest])], torch.cat([pulled, more]))
    assert arms.left.tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", [Knockoff, AdaptiveKnockoff])
def test_proxy_images_are_asked_once_each(strategy, small):
    proxy, victim = small
    gateway = QueryGateway(victim, 64)
    strategy(proxy, "conv3", SETTINGS).run(gateway)
    queries = {q.numpy().tobytes() for q in gateway.log.queries}
    assert len(queries) == gateway.spent == 64
    assert queries <= {i.numpy().tobytes() for i in proxy.images}


@pytest.mark.parametrize("reward", ["certainty", "diversity", "loss", "all"])
@pytest.mark.parametrize(
    ("superclasses", "first"), [(None, [0.25] * 4), ([0, 0, 0, 1], [1 / 6] * 3 + [1 / 2])], ids=["flat", "tree"]
)
def test_every_reward_flat_and_as_a_tree(reward, superclasses, first, small):
    proxy, victim = small
    attack = AdaptiveKnockoff(proxy, "conv3", SETTINGS, reward=reward, superclasses=superclasses, batch=10)
    attack.run(QueryGateway(victim, 40))
    assert attack.policies.shape == (4, 4) and close(attack.policies.sum(1), [1.0] * 4)
    assert close(attack.policies[0], first) and not torch.equal(attack.policies[0], attack.policies[-1])


def test_the_attacker_prefers_the_class_that_pays():
    """A victim that is sure of one class only, and a reward for certainty."""
    images = torch.zeros(900, 1, 16, 16, dtype=torch.uint8)
    labels = torch.arange(900) % 3
    images[:, 0, 0, 0] = (labels * 100).to(torch.uint8)  # the class can be seen in one pixel
    proxy = ImageSet(images, labels, ("a", "b", "c"), "pixels")
    sure, unsure = torch.tensor([0.98, 0.01, 0.01]), torch.full((3,), 1 / 3)
    victim = Victim(lambda x: torch.where((x[:, 0, 0, :1] > 0.5), sure, unsure), (1, 16, 16), 3)
    attack = AdaptiveKnockoff(proxy, "conv3", SETTINGS, reward="certainty", batch=8)
    attack.run(QueryGateway(victim, 240))
    assert attack.policies[-1].argmax() == 2 and attack.policies[-1][2] > 0.6


def test_the_substitute_on_the_way_learns():
    x = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    answers = torch.eye(3)[torch.arange(64) % 3]
    model = build_classifier("conv3", (1, 16, 16), 3)
    learner = Learner(model, SETTINGS, seed=0, steps=30)
    before = loss_reward(answers, predict(model, to_float(x))).mean()
    learner.learn(x, answers)
    assert loss_reward(answers, predict(model, to_float(x))).mean() < before


# Bad input


@pytest.mark.parametrize("strategy", [Knockoff, AdaptiveKnockoff])
def test_a_small_proxy_set_is_said(strategy, small):
    proxy, victim = small
    gateway = QueryGateway(victim, 300)
    with pytest.raises(ValueError, match="holds 80 images, the budget is 300"):
        strategy(proxy).run(gateway)
    assert gateway.spent == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "money"}, "reward must be certainty, .*, bits or all"),
        ({"batch": 0}, "batch and window must be at least 1"),
        ({"superclasses": [0, 1]}, "superclasses for 2 classes, the proxy set has 4"),
        ({"superclasses": [0] * 4}, "at least two superclasses"),
        ({"superclasses": [-1, 0, 0, 1]}, "without a gap"),
    ],
)
def test_bad_options_are_said(options, words, small):
    with pytest.raises(ValueError, match=words):
        AdaptiveKnockoff(small[0], **options)


def test_a_class_without_images_is_a_closed_arm(small):
    """The proxy set's classes are four, the images only of the first three."""
    proxy, victim = small
    proxy = proxy[proxy.labels < 3]
    attack = AdaptiveKnockoff(proxy, "conv3", SETTINGS, reward="certainty", superclasses=[0, 0, 1, 1])
    assert attack.run(QueryGateway(victim, len(proxy))).queries == len(proxy)
    assert (attack.policies[:, 3] == 0).all() and torch.isfinite(attack.policies).all()


def test_hard_labels_are_all_that_the_bandit_sees(small):
    """Every class name alone is equally certain: nothing to prefer."""
    proxy, victim = small
    attack = AdaptiveKnockoff(proxy, "conv3", SETTINGS, reward="certainty", labels="hard")
    attack.run(QueryGateway(victim, 64))
    assert close(attack.policies[-1], [0.25] * 4)


def test_an_empty_proxy_set_is_said(small):
    proxy, victim = small
    with pytest.raises(ValueError, match="holds 0 images"):
        AdaptiveKnockoff(proxy[:0]).run(QueryGateway(victim, 10))


def test_one_class_is_nothing_to_choose_from(small):
    proxy, _ = small
    with pytest.raises(ValueError, match="one class only"):
        AdaptiveKnockoff(proxy[proxy.labels == 3])
