"""What the networks share: the embedding of a scalar, blocks that are computed twice to save memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def sinusoidal(x: Tensor, dim: int, scale: float) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, of scale * x * 10000^(-k / (dim / 2)), k = 0 … dim / 2 - 1."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, device=x.device, dtype=x.dtype) * (-math.log(10000) / half)
    )
    angles = scale * x[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def through(block: nn.Module, recompute: bool, *inputs: Tensor) -> Tensor:
    """block(*inputs); with `recompute` what it holds for the way back is thrown away, and computed again when it is wanted."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
