"""A batch, and pixels to tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runtime.process import to_device

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # target, reference, context (B, C, h, w), gap (B,)


# -------------------------------------------------------------------------------------------------------- pixels
def to_pixels(frames: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(…, H, W, 3) uint8 -> (…, 3, H, W) float32 in [-1, 1], channels last in memory."""
    frames = to_device(frames, torch.device(device))
    return frames.movedim(-1, -3).float().div_(127.5).sub_(1)


def to_frames(pixels: Tensor) -> np.ndarray:
    """(…, 3, H, W) in [-1, 1] -> (…, H, W, 3) uint8."""
    return (
        pixels.float()
        .add(1)
        .mul(127.5)
        .round_()
        .clamp_(0, 255)
        .byte()
        .movedim(-3, -1)
        .cpu()
        .numpy()
    )
