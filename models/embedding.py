"""Sinusoidal embedding of a scalar, shared by the networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal(x: Tensor, dim: int, scale: float) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, of scale * x * 10000^(-k / (dim / 2)), k = 0 … dim / 2 - 1."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=x.device, dtype=x.dtype) * (-math.log(10000) / half))
    angles = scale * x[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)
