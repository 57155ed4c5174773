import pytest
import torch

from samelib.models.mae import (
    MAESettings,
    MaskedAutoencoder,
    mae_loss,
    patchify,
    random_masking,
    unpatchify,
    visible_count,
)

SMALL = MAESettings(patch=7, width=24, depth=1, heads=2, decoder_depth=1, decoder_heads=2)


@pytest.mark.parametrize(("shape", "patch"), [((1, 28, 28), 4), ((3, 32, 32), 2), ((3, 8, 12), 4)])
def test_patches_round_trip(shape, patch):
    images = torch.rand(3, *shape)
    patches = patchify(images, patch)
    assert patches.shape == (3, shape[1] * shape[2] // patch**2, patch * patch * shape[0])
    assert torch.equal(unpatchify(patches, patch, shape), images)


def test_patches_go_row_by_row():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_masking_keeps_the_lowest_noise_and_restores_the_order():
    tokens, noise = torch.rand(5, 12, 3), torch.rand(5, 12)
    kept, mask, ids_restore = random_masking(tokens, 4, noise)
    for i in range(5):
        lowest = noise[i].argsort()[:4]
        assert torch.equal(kept[i], tokens[i, lowest])
        assert (mask[i, lowest] == 0).all() and mask[i].sum() == 8
    everything, mask, ids_restore = random_masking(tokens, 12, noise)
    assert mask.sum() == 0
    assert torch.equal(everything.gather(1, ids_restore[:, :, None].expand(-1, -1, 3)), tokens)


@pytest.mark.parametrize(("ratio", "visible"), [(0, 49), (0.75, 12), (0.5, 24), (0.999, 1)])
def test_visible_counts(ratio, visible):
    assert visible_count(49, ratio) == visible


def test_hidden_patches_cannot_be_seen():
    model = MaskedAutoencoder((1, 28, 28), SMALL).eval()
    x, noise = torch.rand(2, 1, 28, 28), torch.rand(2, 16)
    first, mask = model(x, noise)
    hidden = unpatchify(mask[:, :, None].expand(-1, -1, 49), 7, (1, 28, 28)).bool()
    changed = torch.where(hidden, torch.rand_like(x), x)
    assert torch.allclose(model(changed, noise)[0], first)
    seen_changed = torch.where(hidden, x, torch.rand_like(x))
    assert not torch.allclose(model(seen_changed, noise)[0], first)


def test_loss_is_over_all_pixels():
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    y[0, 0, 0, 0] = 4.0
    assert mae_loss(x, y) == pytest.approx(16 / 32)


def test_the_paper_size():
    model = MaskedAutoencoder((1, 28, 28), MAESettings())
    assert model.tokens == 196
    assert 7.1e6 < sum(p.numel() for p in model.parameters()) < 7.3e6


def test_the_seed_decides_the_weights():
    torch.manual_seed(1)
    first = MaskedAutoencoder((1, 28, 28), SMALL, seed=3).state_dict()
    torch.manual_seed(2)
    second = MaskedAutoencoder((1, 28, 28), SMALL, seed=3).state_dict()
    other = MaskedAutoencoder((1, 28, 28), SMALL, seed=4).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["patch_embed.weight"], other["patch_embed.weight"])


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_bad_mask_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1"):
        MAESettings(mask_ratio=ratio)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="patch 5 must divide the image, 28 x 28"):
        MaskedAutoencoder((1, 28, 28), MAESettings(patch=5))
    with pytest.raises(ValueError, match="multiple of heads"):
        MAESettings(width=100, heads=3)


def test_parameters_have_the_names_of_the_original():
    names = {name.split(".")[0] for name, _ in MaskedAutoencoder((1, 28, 28), SMALL).named_parameters()}
    encoder = {"patch_embed", "cls_token", "pos_embed", "blocks", "norm"}
    assert names == encoder | {"mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}
