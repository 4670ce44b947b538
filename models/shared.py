"""Shared by the networks: embedding of a scalar, activation checkpointing of a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def sinusoidal(x: Tensor, dim: int, scale: float) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, of scale * x * 10000^(-k / (dim / 2)),
    k = 0, …, dim / 2 - 1."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, device=x.device, dtype=x.dtype) * (-math.log(10000) / half)
    )
    angles = scale * x[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class StepSize(nn.Module):
    """Embedding of the size of a solver step, to be added to another embedding.

    It is 0 at initialisation, so that a network with it gives the outputs of one without it.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.width = width
        self.project = nn.Linear(width, out)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, step: Tensor | None, s: Tensor) -> Tensor:
        """step: (B,), share of the whole path, or None for 0. s: (B,). -> (B, out)."""
        step = torch.zeros_like(s) if step is None else step
        return self.project(sinusoidal(step, self.width, 200.0))


def repeat_given(rows: int, *given: Tensor) -> tuple[Tensor, ...]:
    """Repeat each of the B items of tensors (B, …) rows / B times, one after the other."""
    draws = rows // len(given[0])
    if draws == 1:
        return given
    return tuple(part.repeat_interleave(draws, 0) for part in given)


def run_block(block: nn.Module, recompute: bool, *inputs: Tensor) -> Tensor:
    """Run block(*inputs). recompute: activation checkpointing, in which the backward pass
    computes the activations of the block again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
