"""A batch, and the conversion of pixels to tensors and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.process import to_device


class Batch(NamedTuple):
    """B items of latents: predict `target` from `reference` and K `contexts`.

    target, reference: (B, C, h, w). contexts: (B, K, C, h, w). gaps: (B, K) float32, the frames
    from each context to the reference, >= 1.
    """

    target: Tensor
    reference: Tensor
    contexts: Tensor
    gaps: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; asynchronously from pinned memory."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    def normalize(self, mean: Tensor, std: Tensor) -> Batch:
        """Subtract the mean of each channel and divide by its standard deviation.

        mean, std: (C, 1, 1). The gaps do not change.
        """
        latents = [(part - mean) / std for part in self[:3]]
        return Batch(*latents, self.gaps)

    def chunk(self, n: int) -> list[Batch]:
        """Split into at most n parts along B."""
        return [Batch(*parts) for parts in zip(*(part.chunk(n) for part in self))]


class Earlier(NamedTuple):
    """The frames up to the references of n items of a batch, from which the network forecasts the
    last ones of these frames itself, see train.own. Not normalised.

    rows: (n,) int64, the items. frames: (n, H, C, h, w), the last one is the reference.
    """

    rows: Tensor
    frames: Tensor


class Later(NamedTuple):
    """The n frames after the targets of b items of a batch, see flow.unroll.

    frames: (b, n, C, h, w). valid: (b, n) float32, 1, or 0 for a frame after the end of the video,
    in whose place stands the last one.
    """

    frames: Tensor
    valid: Tensor

    def chunk(self, n: int) -> list[Later]:
        """Split into at most n parts along b."""
        return [Later(*parts) for parts in zip(*(part.chunk(n) for part in self))]


def to_pixels(frames: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(…, H, W, 3) uint8 -> (…, 3, H, W) float32 in [-1, 1], channels last in memory.

    Fields and stored latents (…, C, H, W) are only converted to float32.
    """
    frames = to_device(frames, torch.device(device))
    if frames.is_floating_point():
        return frames.float()
    return frames.movedim(-1, -3).float().div_(127.5).sub_(1)


def to_frames(pixels: Tensor) -> np.ndarray:
    """(…, 3, H, W) in [-1, 1] -> (…, H, W, 3) uint8."""
    levels = pixels.float().add(1).mul(127.5).round_().clamp_(0, 255).byte()
    return levels.movedim(-3, -1).cpu().numpy()
