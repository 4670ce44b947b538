"""Fields (N, C, H, W) float32 in place of frames: what suits them, and their statistics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs import Config
from runtime.console import UserError
from shards import Shards

# Number of values of fields from which statistics are measured, at most, to limit the memory.
MEASURED_VALUES = 1 << 26


def check_content(config: Config, shards: Shards) -> None:
    """Raise UserError if the autoencoder of the config cannot encode what the shards hold."""
    kind = config.vqvae.kind
    taken = {"latents": ("latents",), "none": ("fields",), "small": ("frames", "fields")}
    if shards.key not in taken.get(kind, ("frames",)):
        suit = {"frames": "small", "latents": "latents", "fields": "none"}[shards.key]
        raise UserError(
            f"{shards.dir} holds {shards.key}, but vqvae.kind={kind} is for "
            f"{' or '.join(taken.get(kind, ('frames',)))}; set vqvae.kind={suit}, or data.root"
        )
    if shards.key == "frames" and shards.shape[:2] != (config.data.image_size,) * 2:
        raise UserError(
            f"{shards.dir}: frames of {shards.shape[1]}x{shards.shape[0]} pixels, but "
            f"data.image_size is {config.data.image_size}; set it, or prepare the shards again"
        )
    if shards.key == "fields":
        check_fields(config, shards)


def check_fields(config: Config, shards: Shards) -> None:
    """Raise UserError if fields of this size cannot be encoded."""
    _, H, W = shards.shape
    factor = config.vqvae.downsample
    if config.vqvae.kind == "small" and (H % factor or W % factor):
        raise UserError(
            f"{shards.dir}: fields of {H}x{W} (height x width) cannot be divided by "
            f"vqvae.downsample = {factor}; set it lower, or prepare them with --multiple {factor}"
        )
    if config.data.augmented:
        raise UserError(
            f"{shards.dir} holds fields, and augmentation is for RGB frames: set data.brightness, "
            "data.contrast, data.saturation and data.hue to 0, and data.augment to nothing"
        )


def limit_frames(count: int, shape: tuple[int, ...]) -> int:
    """At most `count` fields of a shape (C, H, W), of MEASURED_VALUES values in total."""
    return min(count, max(1, MEASURED_VALUES // int(np.prod(shape))))


def measured_fields(shards: Shards) -> np.ndarray:
    """At most 2,000 random fields (n, C, H, W) of a split for statistics, the same at every
    call."""
    total = int(shards.lengths.sum())
    count = limit_frames(min(2_000, total), shards.shape)
    chosen = np.random.default_rng(0).integers(total, size=count)
    return shards.read_rows(np.sort(chosen))


def channel_scale(shards: Shards) -> np.ndarray | None:
    """The standard deviation (C,) of each channel of fields, in whose units they are scored: over
    at most 2,000 frames of a split, the same for all runs. None for frames and latents."""
    if shards.key != "fields":
        return None
    frames = measured_fields(shards)
    std = [frames[:, c].std(dtype=np.float64) for c in range(frames.shape[1])]
    # A constant channel is scored in its own unit. Short numbers, as metrics.json states them.
    return np.array([float(f"{value:.6g}") or 1.0 for value in std])


def field_std(mean: Tensor, std: Tensor) -> Tensor:
    """The standard deviations (C,) by which fields are divided, of any unit: those measured, but 1
    for a channel that is constant up to the rounding of float32."""
    return torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))
