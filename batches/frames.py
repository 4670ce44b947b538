"""Batches that are read as frames and encoded anew: random augmentation rules out the latent cache.
Colour jitter on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batches.batch import Batch
from batches.latents import draw_copies, flip_frames
from batches.transforms import ClipTransform
from batches.windows import Windows, check_long_enough, draw_batch, share
from batches.workers import read_batches
from configs import Config, Data
from runtime.process import numpy_generator, seed_of, to_device
from shards import Shards

GRAY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


class Jitter(NamedTuple):
    """Colour jitter of B clips.

    factors: (B, 4) float32, of brightness, contrast and saturation, and the turn of the hue.
    order: (B, 4), the numbers of the changes in the order in which they are applied.
    """

    factors: np.ndarray
    order: np.ndarray

    def share(self, part: slice) -> Jitter:
        return Jitter(self.factors[part], self.order[part])


def draw_jitter(data: Data, n: int, rng: np.random.Generator) -> Jitter:
    """Draw for n clips: factors uniform in 1 +- strength, hue turns uniform in +- strength."""
    strength = np.array([data.brightness, data.contrast, data.saturation, data.hue])
    around = np.array([1.0, 1.0, 1.0, 0.0])
    factors = around + strength * rng.uniform(-1, 1, (n, 4))
    return Jitter(factors.astype(np.float32), np.argsort(rng.random((n, 4)), 1))


def apply_jitter(frames: Tensor, jitter: Jitter) -> Tensor:
    """Jitter frames (B, T, 3, H, W) in [0, 1]. -> the same shape and range."""
    factors = to_device(jitter.factors, frames.device)
    # The order of the changes differs between clips: at each of the four places, every change is
    # applied to the clips that have it at this place.
    for place in range(4):
        out = torch.empty_like(frames)
        for k, change in enumerate((brightness, contrast, saturation, hue)):
            # Selected on the host, so that the host does not wait for the device.
            clips = np.flatnonzero(jitter.order[:, place] == k)
            if len(clips):
                at = to_device(clips, frames.device)
                out[at] = change(frames[at], factors[at, k].view(-1, 1, 1, 1, 1)).clamp_(0, 1)
        frames = out
    return frames


def gray(x: Tensor) -> Tensor:
    """Convert RGB to luma: (…, 3, H, W) -> (…, 1, H, W)."""
    red, green, blue = x.split(1, -3)
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale all values."""
    return x * factor


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each value from the mean grey level of its frame."""
    mean = gray(x).mean((-2, -1), keepdim=True)
    return mean + factor * (x - mean)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each value from the grey level of its pixel."""
    level = gray(x)
    return level + factor * (x - level)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue of each pixel by `turn` turns. Value and saturation (of HSV) do not change."""
    # From RGB to the hue in sixths of a turn: red is 0, green 2, blue 4.
    value, least = x.amax(-3, keepdim=True), x.amin(-3, keepdim=True)
    chroma = value - least
    red, green, blue = x.split(1, -3)
    per = chroma.clamp(min=1e-8)
    sixths = (
        torch.where(
            value == red,
            (green - blue) / per,
            torch.where(value == green, 2 + (blue - red) / per, 4 + (red - green) / per),
        )
        + 6 * turn
    )
    # Back to RGB in closed form: V - C clamp(min(k, 4 - k), 0, 1), with value V, chroma C,
    # k = (n + hue) mod 6, and n = 5, 3, 1 for red, green, blue.
    n = torch.arange(5.0, 0.0, -2.0, device=x.device).view(3, 1, 1)
    k = (n + sixths) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


# -------------------------------------------------------------------- batches from frames
class FrameTriples(torch.utils.data.Dataset):
    """A data set whose item k is batch k as stored: frames (b, 2 + K, H, W, 3) uint8, in the order
    target, reference, contexts, and gaps (b, K) float32. `batches` jitters and encodes the frames
    on the device."""

    def __init__(
        self,
        config: Config,
        shards: Shards,
        rank: int = 0,
        world: int = 1,
        fixed: Windows | None = None,
    ):
        check_long_enough(shards, config.data.clip, config.data.skip, "data.clip")
        self.config, self.shards = config, shards
        self.rank, self.world, self.fixed = rank, world, fixed
        self.transform = None
        if config.data.augment:
            self.transform = ClipTransform(config.data.augment, config.data.image_size)

    def __len__(self) -> int:
        return self.config.train.steps

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        at = draw_batch(self.config, self.shards.lengths, k, self.rank, self.world, self.fixed)
        rows = np.column_stack([at.target, at.reference, at.contexts])
        clips = [self.shards.read(video, frames) for video, frames in zip(at.video, rows)]
        if self.config.data.flips:
            own = share(self.config.train.batch_size, self.rank, self.world)
            copies = draw_copies(self.config, k)[own]
            clips = [
                flip_frames(clip, self.config.data.flips, copy) for clip, copy in zip(clips, copies)
            ]
        if self.transform is not None:
            clips = self.transform_clips(clips, k)
        return np.stack(clips), at.gaps.astype(np.float32)

    def transform_clips(self, clips: list[np.ndarray], k: int) -> list[np.ndarray]:
        """Transform this process's share of batch k, each clip with its own random parameters."""
        # Clips are numbered in the whole batch: the parameters do not depend on the processes.
        first = share(self.config.train.batch_size, self.rank, self.world).start
        seeds = [
            seed_of(self.config.train.seed, "transform", k, first + i) for i in range(len(clips))
        ]
        return [self.transform(clip, seed) for clip, seed in zip(clips, seeds)]

    def jitter_batch(self, frames: Tensor, k: int) -> Tensor:
        """Jitter this process's share of batch k: (b, T, H, W, 3) uint8 -> (b, T, 3, H, W) float32
        in [-1, 1]."""
        n = self.config.train.batch_size
        rng = numpy_generator(self.config.train.seed, "augment", k)
        jitter = draw_jitter(self.config.data, n, rng)
        pixels = frames.movedim(-1, -3).float().div_(255)
        return apply_jitter(pixels, jitter.share(share(n, self.rank, self.world))).mul_(2).sub_(1)

    def batches(
        self,
        start: int,
        stop: int,
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        whole: bool = False,
    ) -> Iterator[Batch]:
        """Batches start..stop-1: this process's share of each, or the whole batch. Worker processes
        read the frames; the device encodes them."""
        per_item = 2 + self.config.data.contexts
        dataset = FrameTriples(self.config, self.shards, fixed=self.fixed) if whole else self
        items = read_batches(dataset, self.config, start, stop, device)
        for k, (frames, gaps) in enumerate(items, start):
            with torch.no_grad():
                pixels = dataset.jitter_batch(frames.to(device, non_blocking=True), k).flatten(0, 1)
                z = encode(pixels.contiguous(memory_format=torch.channels_last))
            z = z.float().unflatten(0, (-1, per_item))
            yield Batch(z[:, 0], z[:, 1], z[:, 2:], gaps.to(device, non_blocking=True))
