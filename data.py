"""The data of a run: open splits, prepare shards and latents, give batches for training, measure
latent statistics. Other modules use the package batches through this module."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import configs
from batches.batch import Batch, Earlier, Later
from batches.fields import (
    channel_scale,
    check_content,
    field_std,
    limit_frames,
    measured_fields,
)
from batches.frames import FrameTriples
from batches.latents import MIRRORS, LatentTriples, cache_latents, encode_frames, latent_dir
from batches.stream import StreamTriples, describe_stream_batch, windows_of
from batches.windows import Windows, check_long_enough, describe_batch, spaced_windows
from configs import DATASETS, Config, Latent
from runtime import checkpoints
from runtime.budget import seconds_per_item
from runtime.console import UserError
from runtime.process import Process
from shards import Shards

SPLITS = ("train", "val", "test")
OVERFIT_CLIPS = 4
PREVIEW_VIDEOS = 4
# Number of frames that are generated to measure the rate of a generator, and of a generator of
# fields, which solves a differential equation.
GENERATED = 500
GENERATED_FIELDS = 100
# Number of batch items from which the statistics of latents are measured. With augmentation the
# number is lower, because each frame must be encoded.
MEASURED_ITEMS = 2_000
MEASURED_ITEMS_AUGMENTED = 300


# -------------------------------------------------------------------- splits
def read_clips(shards: Shards, windows: Windows) -> np.ndarray:
    """Read the frames of windows: (V, clip, H, W, 3) uint8, or latents or fields as stored."""
    offsets = np.arange(windows.clip) * windows.stride
    clips = [shards.read(v, start + offsets) for v, start in zip(windows.video, windows.start)]
    return np.stack(clips)


def mean_frame(
    shards: Shards, to_display: Callable[[np.ndarray], np.ndarray] = lambda frames: frames
) -> np.ndarray:
    """Mean over at most 2,000 frames of a split, (H, W, 3) uint8; of fields (C, H, W) float32.

    to_display: Forecaster.to_display, which decodes stored latents.
    """
    if shards.key == "fields":
        return measured_fields(shards).mean(0, dtype=np.float64).astype(np.float32)
    frames = random_frames(shards, min(2_000, int(shards.lengths.sum())), np.random.default_rng(0))
    return to_display(frames[None])[0].mean(0).round().astype(np.uint8)


class Clips(NamedTuple):
    """Clips to preview forecasts on. frames: as read_clips. fps: frames per second. channels,
    scale: names, if they are known, and scale of the channels of fields."""

    frames: np.ndarray
    fps: float
    channels: tuple[str, ...] = ()
    scale: np.ndarray | None = None


def preview_clips(config: Config, shards: Shards, windows: Windows | None) -> Clips:
    """Read PREVIEW_VIDEOS clips of a split: the first of `windows`, or evenly spaced ones."""
    length = config.data.condition + config.data.predict
    if windows is None:
        windows = spaced_windows(shards.lengths, length, config.data.skip, PREVIEW_VIDEOS)
    frames = read_clips(shards, windows)[:PREVIEW_VIDEOS]
    return Clips(frames, frame_rate(shards, config), shards.channels, channel_scale(shards))


def frame_rate(shards: Shards, config: Config) -> float:
    """Frames per second of the clips, after data.skip."""
    # Videos of unknown rate are shown at 10 frames per second.
    return (shards.fps or 10) / (config.data.skip + 1)


def clip_rates(shards: Shards, windows: Windows, config: Config) -> dict[str, list[float]]:
    """{"rates": frames per second of each clip, after data.skip}; {} if all have one rate."""
    rates = np.nan_to_num(shards.rates[windows.video], nan=shards.fps or 10)
    if len(set(rates.tolist())) < 2:
        return {}
    return {"rates": (rates / (config.data.skip + 1)).tolist()}


def has_shards(dir: Path) -> bool:
    return any(dir.glob("shard_*.hdf5"))


def open_split(config: Config, split: str) -> Shards:
    """Open the shards of a split. UserError if there are none, or if they do not suit the settings:
    frames of another size than data.image_size, or fields where vqvae.kind expects frames."""
    root = Path(config.data.root)
    if not has_shards(root / split):
        there = [name for name in SPLITS if has_shards(root / name)]
        instead = f"; for {there[0]}: --set sample.split={there[0]}" if there else ""
        raise UserError(
            f"no shards in {root / split}; splits that are there: "
            f"{', '.join(there) or 'none'}{instead}"
        )
    shards = Shards(root / split, skip_bad=config.data.skip_bad)
    check_content(config, shards)
    return shards


def check_lengths(config: Config, shards: Shards) -> None:
    """Raise UserError if no clip is long enough to train or to forecast. Called before the VQVAE is
    trained."""
    length, skip = config.data.condition + config.data.predict, config.data.skip
    check_long_enough(shards, config.data.clip, skip, "data.clip")
    held_out = shards if config.train.overfit else open_split(config, config.sample.split)
    check_long_enough(held_out, length, skip, "data.condition + data.predict")


def resolve_steps(config: Config, shards: Shards) -> Config:
    """Replace train.steps = 0 by the number of windows in the stream. UserError if train.steps is
    larger than that number."""
    if config.data.mode == "clips":
        return config
    count = len(windows_of(config, shards))
    if config.data.mode == "stream" and config.train.steps > count:
        raise UserError(
            f"train.steps = {config.train.steps:,}, but the stream of {shards.dir} has {count:,} "
            "windows, each seen once; lower train.steps (0: all of them) or lengthen the stream"
        )
    train = dataclasses.replace(config.train, steps=config.train.steps or count)
    return dataclasses.replace(config, train=train)


# -------------------------------------------------------------------- preparation
def missing(config: Config) -> list[str]:
    """List the inputs that a run needs and can neither find nor make, each with the command that
    makes or fetches it."""
    found, root = [], Path(config.data.root)
    if not config.data.generate and not has_shards(root / "train"):
        command = DATASETS[config.dataset].prepare.format(root=root, size=config.data.image_size)
        found.append(f"no shards {root / 'train' / 'shard_*.hdf5'} (make them: {command})")
    weights = config.vqvae.ckpt
    if weights and not config.vqvae.stored and not Path(weights).is_file():
        command = DATASETS[config.dataset].fetch
        fetch = f"fetch them: {command}; or " if command else ""
        found.append(
            f"no VQVAE weights {weights} ({fetch}train our own: --set vqvae.kind=small vqvae.ckpt=)"
        )
    return found


def ensure_data(config: Config, process: Process) -> None:
    """Generate the dataset if it is synthetic and absent. UserError if an existing dataset does not
    match the config."""
    if not config.data.generate:
        return
    wanted = {
        "train": config.data.stream,
        "val": config.data.held_out,
        "test": config.data.held_out,
    }
    if Path(config.data.root).exists() and generates_fields(config):
        # Shards with other parameters of the equation are as good.
        if process.first:
            report_sizes(config, wanted)
        process.barrier()
        return
    generator = importlib.import_module(f"prepare.{config.data.generate}")
    options = {"color_shift": config.data.color_shift} if config.data.generate == "balls" else {}
    if not Path(config.data.root).exists() and process.first:
        command = f"main.py --dataset {config.dataset}"
        generator.make(
            config.data.root, wanted, size=config.data.image_size, command=command, **options
        )
    process.barrier()
    # Existing shards are never replaced, so other settings must be an error.
    for split, count in wanted.items():
        shards = open_split(config, split)
        found = shards.files[0].file.attrs.get("source", "")
        expected = generator.source_name(**options)
        if (shards.lengths.sum(), found) != (count, expected):
            raise UserError(
                f"{shards.dir} holds {shards.lengths.sum()} frames "
                f"({found or 'of unknown source'}), but data.stream, held_out and color_shift "
                f"require {count} ({expected}); change these settings, or data.root"
            )


def report_sizes(config: Config, wanted: dict[str, int]) -> None:
    """Print a line if the existing shards of generated fields have other sizes than the settings
    of the generator, which then have no effect. wanted: {split: frames}."""
    root, size = Path(config.data.root), config.data.image_size
    there = [split for split in SPLITS if has_shards(root / split)]
    shards = {split: open_split(config, split) for split in there}
    found = {split: int(part.lengths.sum()) for split, part in shards.items()}
    shapes = {part.shape for part in shards.values()}
    if found != wanted or shapes != {(1, size, size)}:
        held = ", ".join(f"{split} {count:,}" for split, count in found.items())
        print(
            f"{root} holds {held or 'no'} frames of {', '.join(map(str, shapes))}; data.stream, "
            "data.held_out and data.image_size have no effect"
        )


def held_out_split(config: Config) -> str:
    """The split on which the VQVAE is validated: val, else test, else train."""
    root = Path(config.data.root)
    return next(split for split in ("val", "test", "train") if has_shards(root / split))


def overfit_windows(config: Config, shards: Shards) -> Windows:
    """Choose the windows of --overfit."""
    clip = config.data.condition + config.data.predict
    return spaced_windows(shards.lengths, clip, config.data.skip, OVERFIT_CLIPS)


# -------------------------------------------------------------------- batches
def no_state(step: int) -> None:
    """state_dict of a source without state."""


def ignore_state(state: dict | None) -> None:
    """load_state_dict of a source without state."""


class Source(NamedTuple):
    """A source of batches, as functions.

    batches(start, stop, whole=False): yields batches start..stop-1, of each this process's share,
        or the whole batch.
    measured: as `batches`, for the statistics of the latents. Does not advance a stream.
    describe(k): names the files and frames of batch k, for error messages.
    earlier(k): frames for train.own, see LatentTriples.earlier; None where it does not apply.
    later(k): frames for flow.unroll, see LatentTriples.later; None where it does not apply.
    state_dict(step), load_state_dict(state): save and restore the state after `step` updates.
    """

    batches: Callable[..., Iterator[Batch]]
    measured: Callable[..., Iterator[Batch]]
    describe: Callable[[int], str]
    earlier: Callable[[int], Earlier] | None = None
    state_dict: Callable[[int], dict | None] = no_state
    load_state_dict: Callable[[dict | None], None] = ignore_state
    later: Callable[[int], Later] | None = None


def build_source(
    config: Config,
    shards: Shards,
    autoencoder: nn.Module,
    windows: Windows | None,
    process: Process,
) -> Source:
    """Build the source of training batches: cached latents (as clips or as a stream), or frames if
    random augmentation rules out the cache."""
    describe = partial(describe_batch, config, shards, fixed=windows)
    # --overfit trains on unchanged frames, which can be cached.
    if config.data.augmented and windows is None:
        frames = FrameTriples(config, shards, process.rank, process.world)
        read = partial(frames.batches, encode=autoencoder.encode, device=process.device)
        return Source(read, read, describe)
    mirrored = []
    if config.vqvae.kind == "none":
        # Fields are their own latents, and stay float32.
        dir = shards.dir
    else:
        dir = ensure_latents(config, shards, autoencoder, process)
        if windows is None:
            for axes in MIRRORS[config.data.flips]:
                mirrored.append(ensure_latents(config, shards, autoencoder, process, axes))
    if config.data.mode != "clips":
        stream = StreamTriples(config, dir, process.device, process.rank, process.world)
        describe = partial(describe_stream_batch, config, shards)
        state = (stream.state_dict, stream.load_state_dict)
        return Source(stream.batches, stream.random_batches, describe, None, *state)
    latents = LatentTriples(
        config, dir, process.device, process.rank, process.world, windows, mirrored
    )
    read = latents.batches
    return Source(read, read, describe, latents.earlier, later=latents.later)


def ensure_latents(
    config: Config,
    shards: Shards,
    autoencoder: nn.Module,
    process: Process,
    mirror: tuple[int, ...] = (),
) -> Path:
    """Encode each frame of a split once, unless done before -> the folder of the latents.

    mirror: axes of (n, 3, H, W) along which the frames are flipped first.
    """
    key = cache_key(autoencoder, mirror)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return autoencoder.encode(x.flip(mirror) if mirror else x)

    if process.first:
        cache_latents(shards, encode, key, config.output.root, process.device)
    process.barrier()
    return latent_dir(shards, key, config.output.root)


def cache_key(autoencoder: nn.Module, mirror: tuple[int, ...] = ()) -> str:
    """Identify the encoder of cached latents: a digest of its weights, its precision, and the axes
    along which frames are flipped before."""
    bf16 = " bf16" if getattr(autoencoder, "bf16", False) else ""
    flipped = f" flipped {mirror}" if mirror else ""
    return checkpoints.digest(autoencoder) + bf16 + flipped


def frames_to_generate(config: Config) -> int:
    """Number of frames that `ensure_data` would generate."""
    if not config.data.generate or Path(config.data.root).exists():
        return 0
    return config.data.stream + 2 * config.data.held_out


def frames_to_encode(config: Config, shards: Shards | None, autoencoder: nn.Module | None) -> int:
    """Number of frames that `ensure_latents` would encode. shards: the training split, if it
    exists. autoencoder: the trained one, or None before its training."""
    if config.vqvae.kind == "none" or (config.data.augmented and not config.train.overfit):
        return 0
    copies = [()]
    if not config.train.overfit:
        copies += MIRRORS[config.data.flips]
    # Shards that are still to be generated: only the training split is encoded.
    if shards is None:
        return config.data.stream * len(copies)
    if autoencoder is None:
        return int(shards.lengths.sum()) * len(copies)
    count = 0
    for mirror in copies:
        dir = latent_dir(shards, cache_key(autoencoder, mirror), config.output.root)
        for file, path in zip(shards.files, shards.paths):
            if not (dir / path.name).exists():
                count += int(file.lengths.sum())
    return count


def example_frames(config: Config, shards: Shards | None, n: int) -> np.ndarray:
    """n random frames like those of the dataset, to measure speed on: (n, H, W, 3) uint8 or fields
    (n, C, H, W) float32. shards: the training split, or None if it is still to be generated."""
    rng = np.random.default_rng(0)
    size = config.data.image_size
    fields = generates_fields(config) if shards is None else shards.key == "fields"
    if fields:
        shape = (1, size, size) if shards is None else shards.shape
        return rng.standard_normal((n, *shape), np.float32)
    return rng.integers(0, 256, (n, size, size, 3), np.uint8)


def generates_fields(config: Config) -> bool:
    """Whether the generator of the dataset makes fields, of one channel."""
    return config.data.generate in ("navier_stokes", "heat")


def measure_encoding(
    config: Config,
    autoencoder: nn.Module,
    device: torch.device,
    shards: Shards | None = None,
) -> float:
    """Seconds per frame of encoding on this machine. shards: as for example_frames."""
    frames = example_frames(config, shards, 64)
    return seconds_per_item(
        lambda n: encode_frames(autoencoder.encode, frames[:n], device), len(frames), device
    )


def measure_generation(config: Config) -> float:
    """Seconds per frame of the generator of a synthetic dataset."""
    generator = importlib.import_module(f"prepare.{config.data.generate}")
    count = GENERATED_FIELDS if generates_fields(config) else GENERATED
    # Without its progress bar.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        generator.make(f"{folder}/data", {"train": count}, size=config.data.image_size)
        return (time.perf_counter() - began) / count


def assume_latents(
    config: Config, shards: Shards | None, autoencoder: nn.Module, device: torch.device
) -> Config:
    """Add the shape of the latents to the config, with mean 0 and standard deviation 1: enough to
    measure speed before the latents exist."""
    if config.vqvae.kind == "latents":
        shape = shards.shape
    else:
        frame = example_frames(config, shards, 1)
        shape = encode_frames(autoencoder.encode, frame, device).shape[1:]
    latent = Latent(tuple(shape), (0.0,) * shape[0], (1.0,) * shape[0])
    return dataclasses.replace(config, latent=latent)


def resolve_latents(
    config: Config, source: Source, autoencoder: nn.Module, start: dict | None, process: Process
) -> Latent:
    """Shape and statistics of the latents: from the checkpoint of a resumed run, or measured by the
    first process."""
    weights = checkpoints.digest(autoencoder)
    if start and "config" in start:
        latent = configs.from_dict(start["config"]).latent
        if latent.vqvae != weights:
            raise UserError(
                f"run {config.run_id} was trained on the latents of another VQVAE; restore its "
                "weights, or name a new run: --set output.run_id=NAME"
            )
        return latent
    return process.agree(dataclasses.replace(measure_latents(config, source), vqvae=weights))


def measure_latents(config: Config, source: Source) -> Latent:
    """Measure the shape and, in float64, the statistics of the latents, see configs.Latent."""
    items = MEASURED_ITEMS_AUGMENTED if config.data.augmented else MEASURED_ITEMS
    if config.vqvae.kind == "none":
        first = next(source.measured(0, 1, whole=True)).target
        items = limit_frames(items, first.shape[1:])
    count = -(-items // config.train.batch_size)
    pairs = [(batch.target, batch.reference) for batch in source.measured(0, count, whole=True)]
    x1, x0 = (torch.cat(part).double().cpu() for part in zip(*pairs))
    C = x1.shape[1]
    mean, std = torch.zeros(C, dtype=x1.dtype), torch.ones(C, dtype=x1.dtype)
    if config.flow.normalize:
        mean, std = x1.mean((0, 2, 3)), x1.std((0, 2, 3))
        of_fields = config.vqvae.kind == "none"
        std = field_std(mean, std) if of_fields else std.clamp(min=1e-6)
    # The root mean squares of x_1 - x_0 and of x_1, one of which scales the network's target.
    delta = ((x1 - x0) / std.view(-1, 1, 1)).square().mean().sqrt().item()
    if not 0 < delta < float("inf"):
        raise UserError(
            f"{config.data.root}: the training videos stand still (or their latents are not "
            f"finite: {delta}); there is nothing to forecast"
        )
    scale = ((x1 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).square().mean().sqrt().item()
    C, h, w = x1.shape[1:]
    if config.halves:
        # The target of the joint network is several frames, stacked along the height.
        h //= config.halves[1]
    return Latent((C, h, w), tuple(mean.tolist()), tuple(std.tolist()), delta, scale)


def random_frames(shards: Shards, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n frames, uniform over all frames of a split, in stored order: (n, H, W, 3) uint8, or
    fields (n, C, H, W) float32."""
    # One call of `read` for each video that holds drawn frames.
    flat = np.sort(rng.integers(shards.lengths.sum(), size=n))
    videos = np.searchsorted(shards.starts, flat, side="right") - 1
    parts = [shards.read(v, flat[videos == v] - shards.starts[v]) for v in np.unique(videos)]
    return np.concatenate(parts)
