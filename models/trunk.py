"""A convolutional network in two parts: a trunk reads the given frames, a head reads z.

The output depends on z and s only through the head. So one pass of the trunk serves several draws
of the noise in training, and all evaluations of a frame in sampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convnet import Attention, Block
from models.shared import StepSize, repeat_given, run_block, sinusoidal


class Trunk(nn.Module):
    """`depth` blocks on the given frames, with one attention in the middle; `mid_depth` blocks of
    half the width on the features of the trunk and z. recompute: activation checkpointing."""

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
            nn.Linear((1 + contexts) * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.conv_in = nn.Conv2d((1 + contexts) * C, width, 3, padding=1)
        self.trunk_blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.attention = Attention(width, heads)
        # The head is computed more often, so it is narrower.
        head = self.head_width = max(8, width // 2 // 8 * 8)
        self.times = nn.Sequential(
            nn.Linear(head + width, head), nn.SiLU(), nn.Linear(head, head), nn.SiLU()
        )
        self.narrow = nn.Conv2d(width, head, 1)
        self.conv_z = nn.Conv2d(C, head, 3, padding=1)
        self.head_blocks = nn.ModuleList(Block(head, dropout) for _ in range(mid_depth))
        self.norm_out, self.conv_out = nn.GroupNorm(8, head), nn.Conv2d(head, C, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.step_size = StepSize(head, head) if step_size else None

    def encode(
        self, reference: Tensor, contexts: Tensor, gaps: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The given frames of B items -> features (B, head width, h, w), embedding (B, width)."""
        B = len(gaps)
        of_gaps = sinusoidal(gaps.log().flatten(), self.width, 10.0).view(B, -1)
        level = gaps.new_zeros(B) if noise is None else noise
        of_noise = sinusoidal(level, self.width, 200.0)
        condition = self.condition(torch.cat([of_gaps, of_noise], 1))
        x = torch.cat([reference, contexts.flatten(1, 2)], 1)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for i, block in enumerate(self.trunk_blocks, 1):
            x = run_block(block, self.recompute, x, condition)
            if i == (len(self.trunk_blocks) + 1) // 2:
                x = self.attention(x)
        return self.narrow(x), condition

    def decode(
        self,
        z: Tensor,
        s: Tensor,
        features: Tensor,
        condition: Tensor,
        step: Tensor | None = None,
    ) -> Tensor:
        """z: (m B, C, h, w), s and step: (m B,), the m draws of an item one after the other.
        -> (m B, C, h, w)."""
        features, condition = repeat_given(len(z), features, condition)
        condition = self.times(torch.cat([sinusoidal(s, self.head_width, 200.0), condition], 1))
        if self.step_size is not None:
            condition = condition + self.step_size(step, s)
        x = features + self.conv_z(z.contiguous(memory_format=torch.channels_last))
        for block in self.head_blocks:
            x = run_block(block, self.recompute, x, condition)
        return self.conv_out(F.silu(self.norm_out(x)))

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
        return self.decode(z, s, *self.encode(reference, contexts, gaps, noise), step)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are compiled, sharded and checkpointed one by one."""
        return [*self.trunk_blocks, *self.head_blocks]
