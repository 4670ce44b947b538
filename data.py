"""Splits opened, data and latents made ready, and where batches come from."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import configs
from batches.batch import Batch
from batches.frames import FrameTriples
from batches.latents import LatentTriples, cache_latents, latent_dir
from batches.stream import StreamTriples, windows_of
from batches.windows import Windows, check_long_enough, spaced_windows
from configs import DATASETS, Config, Latent
from runtime import checkpoints
from runtime.console import UserError
from runtime.process import Process
from shards import Shards


# ------------------------------------------------------------------------------------------------------------- results
def read_clips(shards: Shards, windows: Windows) -> np.ndarray:
    """(V, clip, H, W, 3) uint8"""
    offsets = np.arange(windows.clip) * windows.stride
    return np.stack(
        [shards.read(v, start + offsets) for v, start in zip(windows.video, windows.start)]
    )


def mean_frame(
    shards: Shards, shown: Callable[[np.ndarray], np.ndarray] = lambda frames: frames
) -> np.ndarray:
    """The mean over (at most 2,000 of) a split's frames, (H, W, 3) uint8. shown: Forecaster's, where shards hold latents."""
    frames = random_frames(shards, min(2_000, int(shards.lengths.sum())), np.random.default_rng(0))
    return shown(frames[None])[0].mean(0).round().astype(np.uint8)


def frame_rate(shards: Shards, config: Config) -> float:
    return (shards.fps or 10) / (config.data.skip + 1)


def open_split(config: Config, split: str) -> Shards:
    root = Path(config.data.root)
    if not any((root / split).glob("shard_*.hdf5")):
        there = [
            name for name in ("train", "val", "test") if any((root / name).glob("shard_*.hdf5"))
        ]
        instead = f"; for {there[0]}: --set sample.split={there[0]}" if there else ""
        raise UserError(
            f"no shards in {root / split}; splits that are there: {', '.join(there) or 'none'}{instead}"
        )
    if config.vqvae.kind == "latents":
        return Shards(root / split, "latents", config.data.skip_bad)
    shards = Shards(root / split, skip_bad=config.data.skip_bad)
    if shards.shape[:2] != (config.data.image_size,) * 2:
        raise UserError(
            f"{shards.dir}: frames of {shards.shape[1]}x{shards.shape[0]} pixels, but data.image_size is "
            f"{config.data.image_size}; set it, or prepare the shards again"
        )
    return shards


OVERFIT_CLIPS = 4


def check_lengths(config: Config, shards: Shards) -> None:
    """Are there clips long enough to train and to forecast? Asked before the VQVAE is trained."""
    whole, skip = config.data.condition + config.data.predict, config.data.skip
    check_long_enough(shards, config.data.clip, skip, "data.clip")
    held_out = shards if config.train.overfit else open_split(config, config.sample.split)
    check_long_enough(held_out, whole, skip, "data.condition + data.predict")


def with_steps(config: Config, shards: Shards) -> Config:
    """train.steps = 0 becomes the number of windows in the stream, which more steps would run out of."""
    if config.data.mode == "clips":
        return config
    count = len(windows_of(config, shards))
    if config.data.mode == "stream" and config.train.steps > count:
        raise UserError(
            f"train.steps = {config.train.steps:,}, but the stream of {shards.dir} has {count:,} windows, each "
            "seen once; lower train.steps (0: all of them) or lengthen the stream"
        )
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=config.train.steps or count)
    )


# -------------------------------------------------------------------------------------------------------- data to batches
def missing(config: Config) -> list[str]:
    """What a run needs and neither finds nor can make, each with the command that makes or fetches it."""
    found, root = [], Path(config.data.root)
    if not config.data.generate and not any((root / "train").glob("shard_*.hdf5")):
        command = DATASETS[config.dataset].prepare.format(root=root, size=config.data.image_size)
        found.append(f"no shards {root / 'train' / 'shard_*.hdf5'} (make them: {command})")
    if (
        config.vqvae.ckpt
        and config.vqvae.kind != "latents"
        and not Path(config.vqvae.ckpt).is_file()
    ):
        command = DATASETS[config.dataset].fetch
        fetch = f"fetch them: {command}; or " if command else ""
        found.append(
            f"no VQVAE weights {config.vqvae.ckpt} ({fetch}train our own: --set vqvae.kind=small vqvae.ckpt=)"
        )
    return found


def ensure_data(config: Config, process: Process) -> None:
    """Make the stream where it is to be generated and absent; where it is there, is it the one that is asked for?"""
    if not config.data.generate:
        return
    generator = importlib.import_module(f"prepare.{config.data.generate}")
    options = {"color_shift": config.data.color_shift} if config.data.generate == "balls" else {}
    wanted = {
        "train": config.data.stream,
        "val": config.data.held_out,
        "test": config.data.held_out,
    }
    if not Path(config.data.root).exists() and process.first:
        command = f"main.py --dataset {config.dataset}"
        generator.make(
            config.data.root, wanted, size=config.data.image_size, command=command, **options
        )
    process.barrier()
    for split, count in wanted.items():
        shards = open_split(config, split)
        there, source = (
            shards.files[0].file.attrs.get("source", ""),
            generator.source_name(**options),
        )
        if (shards.lengths.sum(), there) != (count, source):
            raise UserError(
                f"{shards.dir} holds {shards.lengths.sum()} frames ({there or 'of unknown source'}), but data."
                f"stream, held_out and color_shift ask for {count} ({source}); set them, or another data.root"
            )


def held_out_split(config: Config) -> str:
    return next(
        s
        for s in ("val", "test", "train")
        if any((Path(config.data.root) / s).glob("shard_*.hdf5"))
    )


def overfit_windows(config: Config, shards: Shards) -> Windows:
    return spaced_windows(
        shards.lengths, config.data.condition + config.data.predict, config.data.skip, OVERFIT_CLIPS
    )


class Source(NamedTuple):
    """Where batches come from: batches(start, stop, whole=False) are this process's share of those, or the whole. `measured`,
    called alike, gives those that the latents' statistics are of; the rest is what a stream has to remember."""

    batches: Callable[..., Iterator[Batch]]
    measured: Callable[..., Iterator[Batch]]
    state_dict: Callable[[int], dict | None] = lambda step: None  # after `step` updates
    load_state_dict: Callable[[dict | None], None] = lambda state: None


def batches_from(
    config: Config,
    shards: Shards,
    autoencoder: nn.Module,
    windows: Windows | None,
    process: Process,
) -> Source:
    """From the latent cache, as a stream or not, or from frames where augmentation forbids the cache."""
    if config.data.augmented and windows is None:
        frames = FrameTriples(config, shards, process.rank, process.world)
        read = lambda start, stop, whole=False: frames.batches(
            start, stop, autoencoder.encode, process.device, whole
        )  # noqa: E731
        return Source(read, read)
    dir = ensure_latents(config, shards, autoencoder, process)
    if config.data.mode != "clips":
        stream = StreamTriples(config, dir, process.device, process.rank, process.world)
        return Source(stream.batches, stream.anywhere, stream.state_dict, stream.load_state_dict)
    latents = LatentTriples(config, dir, process.device, process.rank, process.world, windows)
    return Source(latents.batches, latents.batches)


def ensure_latents(
    config: Config, shards: Shards, autoencoder: nn.Module, process: Process
) -> Path:
    """The folder with the latents of a split, each frame encoded once."""
    weights = checkpoints.digest(autoencoder) + " bf16" * getattr(autoencoder, "bf16", False)
    if process.first:
        cache_latents(shards, autoencoder.encode, weights, config.output.root, process.device)
    process.barrier()
    return latent_dir(shards, weights, config.output.root)


def latents_of(
    config: Config, source: Source, autoencoder: nn.Module, start: dict | None, process: Process
) -> Latent:
    """The latents' statistics: of the run that goes on, or measured by the first process."""
    weights = checkpoints.digest(autoencoder)
    if start and "config" in start:
        latent = configs.from_dict(start["config"]).latent
        if latent.vqvae != weights:
            raise UserError(
                f"run {config.run_id} was trained on the latents of another VQVAE; restore its weights, or name "
                "a new run: --set output.run_id=NAME"
            )
        return latent
    return process.agree(dataclasses.replace(measure_latents(config, source), vqvae=weights))


def measure_latents(config: Config, source: Source) -> Latent:
    """Shape and statistics of the latents, from some 2,000 triples (300 where each must be encoded first)."""
    count = -(-(300 if config.data.augmented else 2_000) // config.train.batch_size)
    pairs = [
        (target, reference) for target, reference, _, _ in source.measured(0, count, whole=True)
    ]
    x1, x0 = (torch.cat(part).double().cpu() for part in zip(*pairs))
    C = x1.shape[1]
    mean, std = torch.zeros(C, dtype=x1.dtype), torch.ones(C, dtype=x1.dtype)
    if config.flow.normalize:
        mean, std = x1.mean((0, 2, 3)), x1.std((0, 2, 3)).clamp(min=1e-6)
    delta = ((x1 - x0) / std.view(-1, 1, 1)).square().mean().sqrt().item()
    if not 0 < delta < float("inf"):
        raise UserError(
            f"{config.data.root}: the training videos stand still (or their latents are not finite: {delta}); "
            "there is nothing to forecast"
        )
    scale = ((x1 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).square().mean().sqrt().item()
    C, h, w = x1.shape[1:]
    h //= config.halves[1] if config.halves else 1  # of frames that lie below one another
    return Latent((C, h, w), tuple(mean.tolist()), tuple(std.tolist()), delta, scale)


def random_frames(shards: Shards, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, H, W, 3) uint8, uniform over all frames of a split."""
    flat = np.sort(rng.integers(shards.lengths.sum(), size=n))
    videos = np.searchsorted(shards.starts, flat, side="right") - 1
    return np.concatenate(
        [shards.read(v, flat[videos == v] - shards.starts[v]) for v in np.unique(videos)]
    )
