"""Colour jitter on the device, a batch of clips at once: of each clip all frames alike, each clip by factors of its own.

What it computes is albumentations' ColorJitter, as tests/test_augment.py checks: brightness, contrast, saturation and hue, in
random order. It is written for GPUs, where frames need not wait for the workers. On a CPU albumentations itself is faster:
0.2 ms a frame of 128 pixels, this 2 to 4 on one or two cores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import runtime
from configs import Data

GRAY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


class Jitter(NamedTuple):
    """factors (B, 4) float32: of brightness, contrast, saturation, and the turn of the hue; order (B, 4): which comes when."""
    factors: np.ndarray
    order: np.ndarray

    def share(self, part: slice) -> Jitter:
        return Jitter(self.factors[part], self.order[part])


def draw(data: Data, n: int, rng: np.random.Generator) -> Jitter:
    """For n clips: factors uniform in 1 +- their strength, the hue's turn in +- its own."""
    strength = np.array([data.brightness, data.contrast, data.saturation, data.hue])
    around = np.array([1.0, 1.0, 1.0, 0.0])
    factors = around + strength * rng.uniform(-1, 1, (n, 4))
    return Jitter(factors.astype(np.float32), np.argsort(rng.random((n, 4)), 1))


def apply(frames: Tensor, jitter: Jitter) -> Tensor:
    """frames (B, T, 3, H, W) in [0, 1] -> the same, jittered."""
    factors = runtime.to_device(jitter.factors, frames.device)
    for turn in range(4):
        out = torch.empty_like(frames)
        for k, change in enumerate((brightness, contrast, saturation, hue)):
            clips = np.flatnonzero(jitter.order[:, turn] == k)  # known here, so that the device is not waited for
            if len(clips):
                at = runtime.to_device(clips, frames.device)
                out[at] = change(frames[at], factors[at, k].view(-1, 1, 1, 1, 1)).clamp_(0, 1)
        frames = out
    return frames


def gray(x: Tensor) -> Tensor:
    """(..., 3, H, W) -> (..., 1, H, W)"""
    red, green, blue = x.split(1, -3)
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the mean grey of each frame, or towards it."""
    mean = gray(x).mean((-2, -1), keepdim=True)
    return mean + factor * (x - mean)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    level = gray(x)
    return level + factor * (x - level)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Around the colour wheel, in turns; value and saturation of each pixel (of HSV) stay."""
    value, least = x.amax(-3, keepdim=True), x.amin(-3, keepdim=True)
    chroma = value - least
    red, green, blue = x.split(1, -3)
    per = chroma.clamp(min=1e-8)
    sixth = torch.where(value == red, (green - blue) / per, torch.where(
        value == green, 2 + (blue - red) / per, 4 + (red - green) / per)) + 6 * turn
    corner = torch.arange(5.0, 0.0, -2.0, device=x.device).view(3, 1, 1)  # how far each colour lies from red, in sixths
    way = (corner + sixth) % 6
    return value - chroma * torch.minimum(way, 4 - way).clamp(0, 1)
