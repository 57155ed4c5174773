"""Masked autoencoder (He et al. 2022; SAME, section "Sample Reconstruction via Masked Auto-encoder").

The mask convention, stated once: a mask is 1 where a patch is hidden and 0 where the encoder sees it.
"""

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


@dataclass(frozen=True)
class MAESettings:
    """Shape of the masked autoencoder. The defaults are the paper's ViT-Tiny.

    Raises:
        ValueError: a mask ratio outside [0, 1), or a width that its heads do not divide.
    """

    patch: int = 2
    width: int = 192
    depth: int = 12
    heads: int = 3
    decoder_depth: int = 4
    decoder_heads: int = 3
    mask_ratio: float = 0.75

    def __post_init__(self):
        check_mask_ratio(self.mask_ratio)
        if self.width % self.heads or self.width % self.decoder_heads:
            raise ValueError(
                f"width {self.width} must be a multiple of heads {self.heads} and decoder_heads {self.decoder_heads}"
            )


def check_mask_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"mask_ratio must be at least 0 and below 1 (some patch has to stay visible), got {ratio}")


def patchify(images: Tensor, patch: int) -> Tensor:
    """[N, C, H, W] -> [N, T, patch * patch * C]: non-overlapping patches, row by row."""
    n, c, h, w = images.shape
    grid = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, image_shape: tuple[int, int, int]) -> Tensor:
    """[N, T, patch * patch * C] -> [N, C, H, W]: the inverse of `patchify`."""
    c, h, w = image_shape
    grid = patches.reshape(len(patches), h // patch, w // patch, patch, patch, c)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), c, h, w)


def visible_count(tokens: int, mask_ratio: float) -> int:
    """How many of `tokens` patches the encoder sees (at least one)."""
    return max(1, int(tokens * (1 - mask_ratio) + 1e-9))


def random_masking(tokens: Tensor, len_keep: int, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps for each sample the `len_keep` tokens whose noise is lowest; no loop over samples.

    Args:
        tokens: [N, T, D].
        len_keep: how many tokens stay.
        noise: [N, T], uniform.

    Returns:
        kept tokens [N, len_keep, D]; mask [N, T] (1 = hidden); ids_restore [N, T], which sorts kept + hidden back in
        place.
    """
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    ids_keep = ids_shuffle[:, :len_keep, None].expand(-1, -1, tokens.shape[2])
    mask = (ids_restore >= len_keep).to(tokens.dtype)
    return tokens.gather(1, ids_keep), mask, ids_restore


def restore(tokens: Tensor, ids_restore: Tensor) -> Tensor:
    """Kept tokens followed by hidden ones [N, T, D], back in their places."""
    return tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, tokens.shape[2]))


def transformer(width: int, heads: int, depth: int) -> nn.Sequential:
    """`depth` pre-norm blocks, [N, T, width] -> [N, T, width].

    Attention is PyTorch's fused kernel on a GPU and three plain products on a CPU. There the two are close, which of
    them wins differs between machines, and a probe's answer changed from run to run: a training that was stopped would
    have gone on with other rounding.
    """
    blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
    for block in blocks:
        block.attn.fused_attn = torch.cuda.is_available()
    return blocks


def mae_loss(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Paper eq. 4, divided by the number of pixels: the mean squared error over ALL patches.

    It must be all: with the masked-only loss of the original MAE nothing trains the visible patches, and the error of
    the whole reconstruction would say nothing about the image.
    """
    return (x - reconstruction).square().mean()


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Normal(0, 0.02) tokens and positions, Xavier matrices, from our own generator: the seed decides all."""
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed"):
            parameter.normal_(std=0.02, generator=generator)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


class MaskedAutoencoder(nn.Module):
    """ViT encoder over the visible patches, light ViT decoder over all of them.

    The names are those of facebookresearch/mae. Unlike there, `pos_embed` is learnt and has no row for `cls_token`, and
    the decoder is as wide as the encoder, so that there is no `decoder_embed`.

    Args:
        image_shape: (C, H, W); H and W multiples of the patch.
        settings: see MAESettings.
        seed: of the initial weights.
    """

    def __init__(self, image_shape: tuple[int, int, int], settings: MAESettings, seed: int = 0):
        super().__init__()
        c, h, w = image_shape
        s = settings
        if h % s.patch or w % s.patch:
            raise ValueError(f"patch {s.patch} must divide the image, {h} x {w} pixels")
        self.image_shape, self.settings = tuple(image_shape), settings
        self.tokens = (h // s.patch) * (w // s.patch)

        self.patch_embed = nn.Linear(s.patch * s.patch * c, s.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.tokens, s.width))
        self.blocks = transformer(s.width, s.heads, s.depth)
        self.norm = nn.LayerNorm(s.width)

        self.mask_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.tokens, s.width))
        self.decoder_blocks = transformer(s.width, s.decoder_heads, s.decoder_depth)
        self.decoder_norm = nn.LayerNorm(s.width)
        self.decoder_pred = nn.Linear(s.width, s.patch * s.patch * c)
        initialise(self, torch.Generator().manual_seed(seed))

    def forward_encoder(self, x: Tensor, len_keep: int, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, C, H, W] -> latent [N, 1 + len_keep, width], mask [N, T], ids_restore [N, T]."""
        tokens = self.patch_embed(patchify(x, self.settings.patch)) + self.pos_embed
        kept, mask, ids_restore = random_masking(tokens, len_keep, noise)
        latent = torch.cat([self.cls_token.expand(len(x), -1, -1).to(kept.dtype), kept], dim=1)
        return self.norm(self.blocks(latent)), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """latent [N, 1 + len_keep, width], ids_restore [N, T] -> predicted patches [N, T, patch * patch * C]."""
        hidden = ids_restore.shape[1] - latent.shape[1] + 1
        placeholders = self.mask_token.expand(len(latent), hidden, -1).to(latent.dtype)
        patches = restore(torch.cat([latent[:, 1:], placeholders], dim=1), ids_restore)
        tokens = torch.cat([latent[:, :1], patches + self.decoder_pos_embed], dim=1)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]

    def forward(self, x: Tensor, noise: Tensor, mask_ratio: float | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructs every pixel from the visible patches.

        Args:
            x: [N, C, H, W] in [-1, 1].
            noise: [N, T] uniform; the patches with the lowest values stay visible.
            mask_ratio: share of hidden patches, 0 <= ratio < 1; by default that of the settings.

        Returns:
            reconstruction [N, C, H, W] and mask [N, T] (1 = hidden).
        """
        ratio = self.settings.mask_ratio if mask_ratio is None else mask_ratio
        len_keep = visible_count(self.tokens, ratio)
        latent, mask, ids_restore = self.forward_encoder(x, len_keep, noise)
        patches = self.forward_decoder(latent, ids_restore)
        return unpatchify(patches, self.settings.patch, self.image_shape).float(), mask
