import pytest
import torch

from samelib.models.classifiers import ARCHITECTURES, build_classifier, predict


@pytest.mark.parametrize(("architecture", "shape"), [(a, s) for a in ARCHITECTURES for s in ((1, 28, 28), (3, 32, 32))])
def test_shapes_and_probabilities(architecture, shape):
    model = build_classifier(architecture, shape, 7)
    probabilities = predict(model.train(), torch.rand(3, *shape))
    assert probabilities.shape == (3, 7) and torch.allclose(probabilities.sum(1), torch.ones(3))
    assert model.training  # predict leaves the mode as it was


def test_conv3_has_the_papers_size():
    model = build_classifier("conv3", (1, 28, 28), 10)
    assert model.trunk[-2].in_features == 128 * 4 * 4
    assert 1.14e6 < sum(p.numel() for p in model.parameters()) < 1.16e6


def test_the_two_stems():
    cifar, imagenet = (build_classifier(a, (3, 32, 32), 10).trunk for a in ("resnet18", "resnet18-imagenet"))
    assert cifar.conv1.kernel_size == (3, 3) and isinstance(cifar.maxpool, torch.nn.Identity)
    assert imagenet.conv1.kernel_size == (7, 7) and isinstance(imagenet.maxpool, torch.nn.MaxPool2d)


def test_the_seed_decides_the_weights():
    torch.manual_seed(5)
    first = build_classifier("conv3", (1, 28, 28), 10, seed=1)
    torch.manual_seed(6)
    second = build_classifier("conv3", (1, 28, 28), 10, seed=1)
    assert torch.equal(first.head.weight, second.head.weight)


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="architecture must be one of conv3"):
        build_classifier("vgg", (1, 28, 28), 10)
