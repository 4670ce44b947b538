"""A U-Net: residual blocks at several resolutions, attention at the lowest, for fields and for
latents with much detail.

With circular padding a shift of the inputs around the edges, by a multiple of `stride` pixels,
shifts the output: the symmetry of a periodic domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import convnet
from models.convnet import Attention
from models.shared import StepSize, repeat_given, run_block, sinusoidal
from runtime.console import UserError


class CircularConv(nn.Conv2d):
    """A 3 x 3 convolution whose input continues around the edges."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        # F.pad would lose the memory format channels_last.
        x = torch.cat([x[..., -1:], x, x[..., :1]], -1)
        return super().forward(torch.cat([x[..., -1:, :], x, x[..., :1, :]], -2))


def convolution(inputs: int, outputs: int, padding: str) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size."""
    if padding == "circular":
        return CircularConv(inputs, outputs)
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Block(convnet.Block):
    """The block of the convnet, of `width` channels and conditioned on `condition` channels."""

    def __init__(self, width: int, condition: int, dropout: float, padding: str):
        super().__init__(width, dropout)
        self.film = nn.Linear(condition, 2 * width)
        if padding == "circular":
            self.conv1, self.conv2 = CircularConv(width, width), CircularConv(width, width)
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)


class UNet(nn.Module):
    """`depth` blocks at each of the resolutions on the way down, and as many on the way up, with a
    long skip each; `mid_depth` blocks at the lowest, with attention after the first of them.

    Resolution i has width * multipliers[i] channels and half the height and width of the one
    before. patch: pixels per side that are joined to one before the first resolution. padding:
    zeros or circular. recompute: activation checkpointing.
    """

    recompute = False

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        width: int = 128,
        depth: int = 2,
        mid_depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        contexts: int = 1,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        padding: str = "zeros",
        patch: int = 1,
        step_size: bool = False,
    ):
        super().__init__()
        C, h, w = latent_shape
        self.patch = patch
        self.stride = patch * 2 ** (len(multipliers) - 1)
        if h % self.stride or w % self.stride:
            raise UserError(
                f"unet with {len(multipliers)} resolutions and model.patch={patch} needs "
                f"multiples of {self.stride} as height and width, got {h} x {w}; shorten "
                "model.multipliers, or lower model.patch"
            )
        self.width = width
        self.condition = nn.Sequential(
            nn.Linear((1 + contexts) * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.step_size = StepSize(width, width) if step_size else None
        widths = [width * multiplier for multiplier in multipliers]
        self.conv_in = convolution((2 + contexts) * C * patch**2, widths[0], padding)

        def build_blocks(channels: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(channels, width, dropout, padding) for _ in range(count))

        self.in_blocks, self.downs = nn.ModuleList(), nn.ModuleList()
        self.joins, self.out_blocks = nn.ModuleList(), nn.ModuleList()
        for i, channels in enumerate(widths):
            self.in_blocks.append(build_blocks(channels, depth))
            if i + 1 < len(widths):
                self.downs.append(nn.Conv2d(channels, widths[i + 1], 2, stride=2))
        self.mid_blocks = build_blocks(widths[-1], mid_depth)
        self.attention = Attention(widths[-1], heads)
        # `below` is the width of what comes from the resolution below.
        below = widths[-1]
        for channels in reversed(widths):
            joins = []
            for _ in range(depth):
                joins.append(nn.Conv2d(channels + below, channels, 1))
                below = channels
            self.joins.append(nn.ModuleList(joins))
            self.out_blocks.append(build_blocks(channels, depth))
        self.norm_out = nn.GroupNorm(8, widths[0])
        self.conv_out = convolution(widths[0], C * patch**2, padding)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

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
        # The scales of the embeddings spread log(gap) and s over a wide range of angles.
        of_gaps = sinusoidal(gaps.log().flatten(), self.width, 10.0).view(len(z), -1)
        condition = self.condition(torch.cat([sinusoidal(s, self.width, 200.0), of_gaps], 1))
        if self.step_size is not None:
            condition = condition + self.step_size(step, s)
        x = torch.cat([z, reference, contexts.flatten(1, 2)], 1)
        x = F.pixel_unshuffle(x, self.patch)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        # The outputs of the input blocks, for the long skips.
        stored = []
        for i, blocks in enumerate(self.in_blocks):
            if i:
                x = self.downs[i - 1](x)
            for block in blocks:
                x = run_block(block, self.recompute, x, condition)
                stored.append(x)
        for i, block in enumerate(self.mid_blocks):
            x = run_block(block, self.recompute, x, condition)
            if i == 0:
                x = self.attention(x)
        for i, (joins, blocks) in enumerate(zip(self.joins, self.out_blocks)):
            if i:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            for join, block in zip(joins, blocks):
                x = join(torch.cat([stored.pop(), x], 1))
                x = run_block(block, self.recompute, x, condition)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are compiled, sharded and checkpointed one by one."""
        found = []
        for blocks in (*self.in_blocks, self.mid_blocks, *self.out_blocks):
            found += blocks
        return found
