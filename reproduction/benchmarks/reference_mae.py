"""A straightforward masked autoencoder to measure against: same model, written the plain way.

As public code for tiny images does it: every sample's mask is shuffled by NumPy in a Python loop, everything is float32,
and timm's blocks run as timm ships them. It computes what samelib's does (tests/test_benchmarks.py compares the two).
"""

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class ReferenceMAE(nn.Module):
    def __init__(self, image_size=28, channels=1, patch=2, width=192, depth=12, heads=3, decoder_depth=4):
        super().__init__()
        self.patch, self.side = patch, image_size // patch
        tokens = self.side**2
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.decoder_blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, channels * patch * patch)

    def shuffled(self, count: int) -> tuple[Tensor, Tensor]:
        """A permutation of the tokens and its inverse for every sample, one sample after the other."""
        forward, backward = [], []
        for _ in range(count):
            order = np.arange(self.side**2)
            np.random.shuffle(order)
            forward.append(order)
            backward.append(np.argsort(order))
        return torch.as_tensor(np.stack(forward)), torch.as_tensor(np.stack(backward))

    def forward(self, x: Tensor, mask_ratio: float = 0.75, orders: tuple[Tensor, Tensor] | None = None) -> Tensor:
        n, channels = len(x), x.shape[1]
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        forward, backward = (order.to(x.device) for order in orders or self.shuffled(n))
        shuffled = tokens.gather(1, forward[:, :, None].expand_as(tokens))
        visible = shuffled[:, : int(self.side**2 * (1 - mask_ratio))]
        latent = self.norm(self.blocks(torch.cat([self.cls_token.expand(n, -1, -1), visible], dim=1)))
        hidden = self.mask_token.expand(n, self.side**2 - visible.shape[1], -1)
        patches = torch.cat([latent[:, 1:], hidden], dim=1)
        patches = patches.gather(1, backward[:, :, None].expand_as(patches)) + self.decoder_pos_embed
        decoded = self.decoder_norm(self.decoder_blocks(torch.cat([latent[:, :1], patches], dim=1)))
        pixels = self.decoder_pred(decoded[:, 1:]).reshape(n, self.side, self.side, self.patch, self.patch, channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, *x.shape[2:])
