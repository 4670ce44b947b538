"""A small residual network at latent resolution, the default for small data. Training takes minutes
on two CPU cores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.shared import StepSize, repeat_given, run_block, sinusoidal


class Block(nn.Module):
    """A residual block of two convolutions. The conditioning scales and shifts the input of the
    second one (FiLM). At initialisation the block is the identity."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.film, self.dropout = nn.Linear(width, 2 * width), nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over all pixels. At initialisation it is the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, W, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, W // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(B, W, h, w))


class ConvNet(nn.Module):
    """`depth` input blocks, `mid_depth` middle blocks with one attention layer after the first of
    them, `depth` output blocks with long skips from the input blocks.

    recompute: activation checkpointing.
    """

    recompute = False

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        width: int = 128,
        depth: int = 3,
        mid_depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        contexts: int = 1,
        step_size: bool = False,
    ):
        super().__init__()
        C = latent_shape[0]
        self.width = width
        self.condition = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.conv_in = nn.Conv2d((2 + contexts) * C, width, 3, padding=1)
        self.in_blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.mid_blocks = nn.ModuleList(Block(width, dropout) for _ in range(mid_depth))
        self.attention = Attention(width, heads)
        self.joins = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(depth))
        self.out_blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm_out, self.conv_out = nn.GroupNorm(8, width), nn.Conv2d(width, C, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.step_size = StepSize(width, width) if step_size else None

    def forward(
        self,
        z: Tensor,
        s: Tensor,
        reference: Tensor,
        contexts: Tensor,
        gaps: Tensor,
        noise: Tensor | None = None,
        step: Tensor | None = None,
    ) -> Tensor:
        reference, contexts, gaps = repeat_given(len(z), reference, contexts, gaps)
        # The gap embedding is the mean over the K contexts. The scales of the embeddings spread
        # log(gap) and s over a wide range of angles.
        gap_embedding = sinusoidal(gaps.log().flatten(), self.width, 10.0)
        gap_embedding = gap_embedding.unflatten(0, gaps.shape).mean(1)
        condition = self.condition(torch.cat([sinusoidal(s, self.width, 200.0), gap_embedding], 1))
        if self.step_size is not None:
            condition = condition + self.step_size(step, s)
        x = torch.cat([z, reference, contexts.flatten(1, 2)], 1)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        # The outputs of the input blocks, for the long skips.
        stored = []
        for block in self.in_blocks:
            x = run_block(block, self.recompute, x, condition)
            stored.append(x)
        for i, block in enumerate(self.mid_blocks):
            x = run_block(block, self.recompute, x, condition)
            if i == 0:
                x = self.attention(x)
        for join, block in zip(self.joins, self.out_blocks):
            x = run_block(block, self.recompute, join(torch.cat([stored.pop(), x], 1)), condition)
        return self.conv_out(F.silu(self.norm_out(x)))

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are compiled, sharded and checkpointed one by one."""
        return [*self.in_blocks, *self.mid_blocks, *self.out_blocks]
