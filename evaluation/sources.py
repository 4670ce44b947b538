"""The forecasts to measure: sampled now from a checkpoint, or read from arrays stored before."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import configs
import data
from batches.batch import to_frames, to_pixels
from batches.fields import channel_scale
from batches.stream import StreamWindows, evenly_spaced
from batches.windows import Windows, check_long_enough, draw_windows, spaced_windows
from configs import Config
from evaluation.oracle import Oracle, open_oracle
from evaluation.protocols import Protocol
from forecaster import Forecaster, describe_sampler
from runtime import checkpoints
from runtime.console import UserError
from shards import Shards

# Videos per part, the unit of work that processes share. The noise of a sample depends on it.
PART = 8


@dataclasses.dataclass
class Source:
    """The forecasts to measure.

    part(k) -> (truth, samples, number of network evaluations) of videos k * PART to (k + 1) * PART,
    a half-open range.
    """

    config: Config
    protocol: Protocol
    part: Callable[[int], tuple[np.ndarray, np.ndarray, int]]
    # frames (n, H, W, 3) uint8 through encoder and decoder; None without an autoencoder
    autoencode: Callable[[np.ndarray], np.ndarray] | None
    # entries of metrics.json about the sampler and the checkpoint
    about: dict
    # digests of all that is measured: network, autoencoder, data
    key: tuple
    fps: float
    # standard deviation (C,) of the channels of fields, in whose units they are measured; None for
    # frames
    scale: np.ndarray | None = None
    # truth and samples, if they are stored on disk already
    arrays: tuple[np.ndarray, np.ndarray] | None = None
    # the draws to score against, for a protocol with an oracle
    oracle: Oracle | None = None


def sample_windows(config: Config, shards: Shards) -> Windows:
    """Choose the clips of sample.py: sample.num_videos clips, evenly spaced over the split."""
    clip = config.data.condition + config.data.predict
    check_long_enough(shards, clip, config.data.skip, "data.condition + data.predict")
    return spaced_windows(shards.lengths, clip, config.data.skip, config.sample.num_videos)


def forecast_split(
    forecaster: Forecaster, windows: Windows | None = None, quiet: bool = False
) -> tuple[np.ndarray, np.ndarray, Shards]:
    """Forecast the clips of sample.split.

    windows: the clips; by default sample.num_videos clips, evenly spaced over the split.
    Returns truth (V, condition + predict, H, W, 3), samples (V, S, predict, H, W, 3), or those of
    fields as in results.read_arrays, and the shards. Resets the forecaster's count of network
    evaluations.
    """
    config, sample = forecaster.config, forecaster.config.sample
    shards = data.open_split(config, sample.split)
    windows = windows or sample_windows(config, shards)
    truth = data.read_clips(shards, windows)
    forecaster.evaluations = 0
    samples = forecaster.forecast(
        truth[:, : config.data.condition],
        config.data.predict,
        sample.num_samples,
        (config.train.seed, "sample"),
        quiet,
    )
    return forecaster.to_display(truth), samples, shards


def describe_fields(shards: Shards, scale: np.ndarray | None) -> dict:
    """Entries of metrics.json about fields: the names of the channels, where they are known, and
    `scale`, the units of the metrics (batches.fields.channel_scale). {} for frames."""
    if scale is None:
        return {}
    found = {"scale": scale.tolist()}
    if shards.channels:
        found["channels"] = list(shards.channels)
    return found


def source_of_checkpoint(
    forecaster: Forecaster, step: int, ckpt: str | Path, protocol: Protocol
) -> Source:
    """A source that samples each part from a checkpoint when the part is read.

    Sets the protocol's fields in forecaster.config. If the split has too few clips, the number of
    videos is reduced and a line is printed.
    """
    oracle = None
    if protocol.oracle:
        protocol, oracle = resolve_oracle(protocol, forecaster.config)
    changes = {
        "data.condition": protocol.condition,
        "data.predict": protocol.predict,
        "sample.split": protocol.split,
        "sample.num_samples": protocol.samples,
    }
    config = configs.update(forecaster.config, changes)
    shards = data.open_split(config, protocol.split)
    windows = choose_windows(protocol, shards, config.data.skip, oracle)
    protocol = dataclasses.replace(protocol, videos=len(windows.video))
    # Now that the number of videos is known: it is stored in metrics.json, too.
    config = configs.update(config, {"sample.num_videos": protocol.videos})
    forecaster.config = config

    def part(k: int) -> tuple[np.ndarray, np.ndarray, int]:
        rows = slice(k * PART, (k + 1) * PART)
        chosen = windows._replace(video=windows.video[rows], start=windows.start[rows])
        truth = data.read_clips(shards, chosen)
        forecaster.evaluations = 0
        samples = forecaster.forecast(
            truth[:, : protocol.condition],
            protocol.predict,
            protocol.samples,
            (protocol.seed, "evaluate", k),
            quiet=True,
        )
        return truth, samples, forecaster.evaluations

    scale = channel_scale(shards)
    return Source(
        config,
        protocol,
        part,
        None if forecaster.fields else make_autoencode(forecaster),
        {
            **describe_sampler(forecaster, step, ckpt),
            **data.clip_rates(shards, windows, config),
            **describe_fields(shards, scale),
        },
        identify(forecaster, shards, oracle),
        data.frame_rate(shards, config),
        scale,
        oracle=oracle,
    )


def identify(forecaster: Forecaster, shards: Shards, oracle: Oracle | None) -> tuple:
    """Digests of weights and data, so that an evaluation does not reuse parts of others."""
    net, autoencoder = forecaster.net, forecaster.autoencoder
    key = (checkpoints.digest(net), checkpoints.digest(autoencoder), shards.fingerprint())
    if oracle:
        stat = oracle.path.stat()
        key += (stat.st_size, stat.st_mtime_ns)
    return key


def choose_windows(protocol: Protocol, shards: Shards, skip: int, oracle: Oracle | None) -> Windows:
    """The protocol's clips, or the states of its oracle. Prints a line if there are too few."""
    if oracle:
        return windows_of_states(protocol, oracle)
    windows = clips_of(protocol, shards, skip)
    found = len(windows.video)
    if found < protocol.videos:
        kind = "such clips" if protocol.stream else "clips that do not overlap"
        print(f"{shards.dir} has {found} {kind} of {windows.clip} frames, not {protocol.videos}")
    return windows


def resolve_oracle(protocol: Protocol, config: Config) -> tuple[Protocol, Oracle]:
    """Open the oracle of the config's data -> the protocol with the oracle's lead times and number
    of states, the oracle. UserError if it does not reach that far."""
    shards = data.open_split(config, protocol.split)
    if shards.key != "fields" or config.vqvae.kind != "none":
        raise UserError(f"protocol {protocol.name} is for forecasts of fields with vqvae.kind=none")
    oracle = open_oracle(config.data.root, shards, config.data.skip)
    predict = protocol.predict or oracle.leads
    if predict > oracle.leads:
        raise UserError(
            f"{oracle.path} reaches {oracle.leads} forecast frames ahead, not {predict}; lower "
            "--predict, or simulate it again with --leads"
        )
    if (protocol.condition - 1) * oracle.stride > oracle.frame.min():
        raise UserError(
            f"{oracle.path} has states with {oracle.frame.min()} frames before them, too few for "
            f"{protocol.condition} given frames; lower --condition"
        )
    videos = min(protocol.videos, len(oracle.video))
    if videos < protocol.videos:
        print(f"{oracle.path} has {videos} states, not {protocol.videos}")
    return dataclasses.replace(protocol, predict=predict, videos=videos), oracle


def windows_of_states(protocol: Protocol, oracle: Oracle) -> Windows:
    """The windows whose last given frame is a state of the oracle."""
    chosen = slice(protocol.videos)
    start = oracle.frame[chosen] - (protocol.condition - 1) * oracle.stride
    clip = protocol.condition + protocol.predict
    return Windows(oracle.video[chosen], start, clip, oracle.stride)


def source_of_arrays(
    config: Config,
    protocol: Protocol,
    arrays: tuple[np.ndarray, np.ndarray],
    about: dict,
    fps: float,
    forecaster: Forecaster | None,
) -> Source:
    """A source of stored (truth, samples).

    forecaster: provides the autoencoder; None if its checkpoint is missing or not needed.
    """
    truth, samples = arrays

    def part(k: int) -> tuple[np.ndarray, np.ndarray, int]:
        rows = slice(k * PART, (k + 1) * PART)
        return np.array(truth[rows]), np.array(samples[rows]), 0

    autoencode = None
    weights = ""
    if forecaster is not None and not forecaster.fields:
        autoencode = make_autoencode(forecaster)
        weights = checkpoints.digest(forecaster.autoencoder)
    key = (digest(truth), digest(samples), weights)
    scale = None
    if truth.dtype != np.uint8:
        # Without its scale, a channel is measured in its own unit.
        scale = np.array(about.get("scale") or [1.0] * truth.shape[2])
        about = {**about, "scale": scale.tolist()}
    return Source(config, protocol, part, autoencode, about, key, fps, scale, arrays)


def clips_of(protocol: Protocol, shards: Shards, skip: int) -> Windows:
    """Choose the protocol's clips, or all clips of the split if there are fewer."""
    clip = protocol.condition + protocol.predict
    n = protocol.videos
    rng = np.random.default_rng(protocol.seed)
    if protocol.stream:
        # A stream has a window at every frame; the protocol's clips are a selection of these.
        every = StreamWindows(
            shards,
            clip,
            "chunked" if protocol.clips == "chunked" else "continuous",
            frames=protocol.frames,
            skip=skip,
            settings=("--frames", "--predict"),
        )
        if protocol.clips == "random":
            return every.clips(rng.integers(len(every), size=n))
        k = np.arange(min(n, len(every)))
        return every.clips(
            evenly_spaced(k, len(k), len(every)) if protocol.clips == "spaced" else k
        )
    check_long_enough(shards, clip, skip, "the protocol")
    if protocol.clips == "random":
        return draw_windows(shards.lengths, clip, skip, n, rng)
    return spaced_windows(shards.lengths, clip, skip, n)


def make_autoencode(forecaster: Forecaster) -> Callable[[np.ndarray], np.ndarray]:
    """A function that passes frames (n, H, W, 3) uint8 through the encoder and the decoder."""
    autoencoder = forecaster.autoencoder

    @torch.no_grad()
    def autoencode(frames: np.ndarray) -> np.ndarray:
        # About two million values at a time, to limit the memory.
        size = max(1, (1 << 21) // frames[0].size)
        decoded = []
        for k in range(0, len(frames), size):
            pixels = to_pixels(frames[k : k + size], forecaster.device)
            decoded.append(to_frames(autoencoder.decode(autoencoder.encode(pixels))))
        return np.concatenate(decoded)

    return autoencode


def digest(content) -> str:
    """A hexadecimal digest of bytes or of an array."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
