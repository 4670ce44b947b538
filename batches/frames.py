"""Frames, where augmentation forbids the latent cache, and their colour jitter on the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batches.batch import Batch
from batches.windows import Windows, check_long_enough, draw_batch, share
from configs import Config, Data
from runtime.console import UserError
from runtime.process import numpy_generator, to_device
from shards import Shards

GRAY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


class Jitter(NamedTuple):
    """factors (B, 4) float32: of brightness, contrast, saturation, and the turn of the hue; order (B, 4): which comes when."""

    factors: np.ndarray
    order: np.ndarray

    def share(self, part: slice) -> Jitter:
        return Jitter(self.factors[part], self.order[part])


def draw_jitter(data: Data, n: int, rng: np.random.Generator) -> Jitter:
    """For n clips: factors uniform in 1 +- their strength, the hue's turn in +- its own."""
    strength = np.array([data.brightness, data.contrast, data.saturation, data.hue])
    around = np.array([1.0, 1.0, 1.0, 0.0])
    factors = around + strength * rng.uniform(-1, 1, (n, 4))
    return Jitter(factors.astype(np.float32), np.argsort(rng.random((n, 4)), 1))


def apply_jitter(frames: Tensor, jitter: Jitter) -> Tensor:
    """frames (B, T, 3, H, W) in [0, 1] -> the same, jittered."""
    factors = to_device(jitter.factors, frames.device)
    for turn in range(4):
        out = torch.empty_like(frames)
        for k, change in enumerate((brightness, contrast, saturation, hue)):
            clips = np.flatnonzero(
                jitter.order[:, turn] == k
            )  # known here, so that the device is not waited for
            if len(clips):
                at = to_device(clips, frames.device)
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
    sixth = (
        torch.where(
            value == red,
            (green - blue) / per,
            torch.where(value == green, 2 + (blue - red) / per, 4 + (red - green) / per),
        )
        + 6 * turn
    )
    corner = torch.arange(5.0, 0.0, -2.0, device=x.device).view(
        3, 1, 1
    )  # how far each colour lies from red, in sixths
    way = (corner + sixth) % 6
    return value - chroma * torch.minimum(way, 4 - way).clamp(0, 1)


# ----------------------------------------------------------------- frames, where augmentation forbids the cache
class FrameTriples(torch.utils.data.Dataset):
    """Item k is batch k as it is stored: (b, 3, H, W, 3) uint8 (target, reference, context), and gap (b,). `batches` jitters
    and encodes them on the device."""

    def __init__(
        self,
        config: Config,
        shards: Shards,
        rank: int = 0,
        world: int = 1,
        fixed: Windows | None = None,
    ):
        check_long_enough(shards, config.data.clip, config.data.skip, "data.clip")
        self.config, self.shards, self.rank, self.world, self.fixed = (
            config,
            shards,
            rank,
            world,
            fixed,
        )

    def __len__(self) -> int:
        return self.config.train.steps

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        at = draw_batch(self.config, self.shards.lengths, k, self.rank, self.world, self.fixed)
        clips = [
            self.shards.read(video, np.array(frames))
            for video, *frames in zip(at.video, at.target, at.reference, at.context)
        ]
        return np.stack(clips), at.gap.astype(np.float32)

    def jittered(self, frames: Tensor, k: int) -> Tensor:
        """This process's share of batch k, (b, 3, H, W, 3) uint8 -> (b, 3, 3, H, W) float32 in [-1, 1]."""
        n = self.config.train.batch_size
        jitter = draw_jitter(
            self.config.data, n, numpy_generator(self.config.train.seed, "augment", k)
        )
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
        """Batches start..stop-1, this process's share of them or the whole, read by workers and encoded on the device."""
        dataset = FrameTriples(self.config, self.shards, fixed=self.fixed) if whole else self
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, stop),
            worker_init_fn=own_group,
            num_workers=min(self.config.data.workers, os.cpu_count() or 1),
            pin_memory=device.type == "cuda",
        )
        for k, (frames, gap) in enumerate(one_line(loader), start):
            with torch.no_grad():
                pixels = dataset.jittered(frames.to(device, non_blocking=True), k).flatten(0, 1)
                z = encode(pixels.contiguous(memory_format=torch.channels_last))
            yield *z.float().unflatten(0, (-1, 3)).unbind(1), gap.to(device, non_blocking=True)


def own_group(_worker: int) -> None:
    """Out of reach of a SIGTERM to the training's group of processes: that is the training's to heed, and it needs its
    workers for one more batch."""
    os.setpgid(0, 0)


def one_line(loader: torch.utils.data.DataLoader) -> Iterator:
    """A worker's UserError without the traceback that torch puts around it."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(
            str(error).strip().splitlines()[-1].removeprefix("runtime.console.UserError: ")
        ) from None
