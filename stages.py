"""The stages before the training: mistakes that can be known, data, autoencoder, latents, and where batches come from.

Every stage keeps what it has finished, so the same command run again goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import configs
import data
import logs
import published
import runtime
import sample
import streams
import vqvae
from branches import FETCH, PREPARE
from configs import Config, Latent
from console import UserError
from data import Batch
from runtime import Process
from shards import Shards

OVERFIT_CLIPS = 4
# what may change between two starts of a run without making it another run
FREE = {"data.workers", "data.held_out", "data.skip_bad", "train.steps", "train.log_every", "train.sample_every",
        "train.save_every", "train.keep", "train.keep_every", "train.max_bad_steps", "train.compile", "train.accumulate",
        "train.recompute", "train.shard", "model.size"}


# ------------------------------------------------------------------------------------------------------ before any work
def before_any_work(config: Config, dir: Path, process: Process, ckpt: str | None) -> dict | None:
    """Mistakes that can be known now are told now; -> the checkpoint to go on from, or to start from (--ckpt)."""
    if problems := missing(config):
        raise UserError(f"--dataset {config.dataset}, looked in {Path.cwd()}: " + "; ".join(problems))
    if process.first:
        logs.wandb_mode(config.wandb.mode)
    parts = process.world * config.train.accumulate
    if config.train.batch_size % parts:
        asked = f"{process.world} processes" + f" in {config.train.accumulate} parts each" * (config.train.accumulate > 1)
        raise UserError(f"train.batch_size = {config.train.batch_size} cannot be shared alike by {asked}; make it a multiple "
                        f"of {parts}")
    state = runtime.resume(dir)
    if state is None:
        return {**check_start(config, ckpt), "step": 0} if ckpt else None
    if ckpt and process.first:
        print(f"{dir} has begun already and goes on from its own checkpoint; --ckpt {ckpt} is left alone")
    check_same_run(configs.from_dict(state["config"]), config, dir)
    return state


def check_start(config: Config, ckpt: str) -> dict:
    """--ckpt: another run's averaged weights. -> {"ema"}; whether they fit the network is seen when they are loaded."""
    state = runtime.load_checkpoint(ckpt)
    if published.is_foreign(state):
        state = published.checkpoint(state, ckpt, config.dataset, {"flow.interpolant": config.flow.interpolant})
    if not {"ema", "config"} <= state.keys():
        raise UserError(f"{ckpt}: not a checkpoint of main.py (it lacks ema or config)")
    other = configs.differences(configs.from_dict(state["config"]), config, ("model", "flow"))
    free = {"flow.interpolant", "flow.c", "flow.s_min", "flow.weight", "flow.times", "model.dropout", "model.size"}
    clash = [d for d in other if d.partition(":")[0] not in free]
    if clash:
        raise UserError(f"{ckpt}: its network is another ({'; '.join(clash)}); set those fields as they were")
    return {"ema": state["ema"]}


def check_same_run(old: Config, config: Config, dir: Path) -> None:
    changed = [d for d in configs.differences(old, config, ("data", "replay", "vqvae", "model", "flow", "train"))
               if d.partition(":")[0] not in FREE]
    if changed:
        raise UserError(f"{dir} holds a run of other settings ({'; '.join(changed[:3])}); "
                        "go on with those, or name a new run: --set output.run_id=NAME")


def check_lengths(config: Config, shards: Shards) -> None:
    """Are there clips long enough to train and to forecast? Asked before the VQVAE is trained."""
    whole, skip = config.data.condition + config.data.predict, config.data.skip
    data.check_long_enough(shards, config.data.clip, skip, "data.clip")
    held_out = shards if config.train.overfit else sample.open_split(config, config.sample.split)
    data.check_long_enough(held_out, whole, skip, "data.condition + data.predict")


def with_steps(config: Config, shards: Shards) -> Config:
    """train.steps = 0 becomes the number of windows in the stream, which more steps would run out of."""
    if config.data.mode == "clips":
        return config
    count = len(streams.windows_of(config, shards))
    if config.data.mode == "stream" and config.train.steps > count:
        raise UserError(f"train.steps = {config.train.steps:,}, but the stream of {shards.dir} has {count:,} windows, each "
                        "seen once; lower train.steps (0: all of them) or lengthen the stream")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=config.train.steps or count))


def plan(config: Config) -> list[str]:
    """--dry_run: what a run would do, without doing it."""
    root, dir = Path(config.data.root), Path(config.output.root) / "checkpoints" / config.run_id
    lines = [f"missing: {problem}" for problem in missing(config)]
    if not lines and not root.exists():
        lines.append(f"generate the {config.data.generate} stream in {root}")
    if not config.vqvae.ckpt and config.vqvae.kind != "latents":
        lines.append(f"train the small VQVAE for {config.vqvae.steps} updates, unless it is there")
    if not config.data.augmented:
        lines.append(f"encode every frame once, under {Path(config.output.root) / 'latents'}")
    state = runtime.resume(dir)
    done = f", of which {state['step']} are done" if state else ""
    steps = f"{config.train.steps}" if config.train.steps else "as many as the stream has windows:"
    if config.data.mode != "clips":
        done += f", data.mode={config.data.mode}, {config.data.windows} windows of {config.data.clip} frames"
    lines.append(f"train {config.model.name} ({config.flow.interpolant}) for {steps} updates{done}, in {dir}")
    lines.append(f"forecast {config.sample.num_videos} {config.sample.split} clips, {config.sample.num_samples} futures each")
    return lines


# -------------------------------------------------------------------------------------------------------- data to batches
def missing(config: Config) -> list[str]:
    """What a run needs and neither finds nor can make, each with the command that makes or fetches it."""
    found, root = [], Path(config.data.root)
    if not config.data.generate and not any((root / "train").glob("shard_*.hdf5")):
        command = PREPARE[config.dataset].format(root=root, size=config.data.image_size)
        found.append(f"no shards {root / 'train' / 'shard_*.hdf5'} (make them: {command})")
    if config.vqvae.ckpt and config.vqvae.kind != "latents" and not Path(config.vqvae.ckpt).is_file():
        command = FETCH.get(config.dataset)
        fetch = f"fetch them: {command}; or " if command else ""
        found.append(f"no VQVAE weights {config.vqvae.ckpt} ({fetch}train our own: --set vqvae.kind=small vqvae.ckpt=)")
    return found


def ensure_data(config: Config, process: Process) -> None:
    """Make the stream where it is to be generated and absent; where it is there, is it the one that is asked for?"""
    if not config.data.generate:
        return
    generator = importlib.import_module(f"prepare.{config.data.generate}")
    options = {"color_shift": config.data.color_shift} if config.data.generate == "balls" else {}
    wanted = {"train": config.data.stream, "val": config.data.held_out, "test": config.data.held_out}
    if not Path(config.data.root).exists() and process.first:
        command = f"main.py --dataset {config.dataset}"
        generator.make(config.data.root, wanted, size=config.data.image_size, command=command, **options)
    process.barrier()
    for split, count in wanted.items():
        shards = sample.open_split(config, split)
        there, source = shards.files[0].file.attrs.get("source", ""), generator.source_name(**options)
        if (shards.lengths.sum(), there) != (count, source):
            raise UserError(f"{shards.dir} holds {shards.lengths.sum()} frames ({there or 'of unknown source'}), but data."
                            f"stream, held_out and color_shift ask for {count} ({source}); set them, or another data.root")


def ensure_vqvae(config: Config, shards: Shards, process: Process) -> nn.Module:
    """The frozen autoencoder, trained first where it is our own and absent."""
    path = config.vqvae.ckpt
    if not path and config.vqvae.kind != "latents":
        if process.first:
            path = vqvae.train(config, shards, sample.open_split(config, held_out_split(config)), process.device)
        path = process.agree(path)
    return vqvae.freeze(vqvae.load(path, config.vqvae.kind), process.device, config.train.precision)


def held_out_split(config: Config) -> str:
    return next(s for s in ("val", "test", "train") if any((Path(config.data.root) / s).glob("shard_*.hdf5")))


def overfit_windows(config: Config, shards: Shards) -> data.Windows:
    return data.spaced_windows(shards.lengths, config.data.condition + config.data.predict, config.data.skip, OVERFIT_CLIPS)


class Source(NamedTuple):
    """Where batches come from: batches(start, stop, whole=False) are this process's share of those, or the whole. `measured`,
    called alike, gives those that the latents' statistics are of; the rest is what a stream has to remember."""
    batches: Callable[..., Iterator[Batch]]
    measured: Callable[..., Iterator[Batch]]
    state_dict: Callable[[int], dict | None] = lambda step: None  # after `step` updates
    load_state_dict: Callable[[dict | None], None] = lambda state: None


def batches_from(config: Config, shards: Shards, autoencoder: nn.Module, windows: data.Windows | None,
                 process: Process) -> Source:
    """From the latent cache, as a stream or not, or from frames where augmentation forbids the cache."""
    if config.data.augmented and windows is None:
        frames = data.FrameTriples(config, shards, process.rank, process.world)
        read = lambda start, stop, whole=False: frames.batches(start, stop, autoencoder.encode, process.device, whole)  # noqa: E731
        return Source(read, read)
    dir = ensure_latents(config, shards, autoencoder, process)
    if config.data.mode != "clips":
        stream = streams.StreamTriples(config, dir, process.device, process.rank, process.world)
        return Source(stream.batches, stream.anywhere, stream.state_dict, stream.load_state_dict)
    latents = data.LatentTriples(config, dir, process.device, process.rank, process.world, windows)
    return Source(latents.batches, latents.batches)


def ensure_latents(config: Config, shards: Shards, autoencoder: nn.Module, process: Process) -> Path:
    """The folder with the latents of a split, each frame encoded once."""
    weights = runtime.digest(autoencoder) + " bf16" * getattr(autoencoder, "bf16", False)
    if process.first:
        data.cache_latents(shards, autoencoder.encode, weights, config.output.root, process.device)
    process.barrier()
    return data.latent_dir(shards, weights, config.output.root)


def latents_of(config: Config, source: Source, autoencoder: nn.Module, start: dict | None,
               process: Process) -> Latent:
    """The latents' statistics: of the run that goes on, or measured by the first process."""
    weights = runtime.digest(autoencoder)
    if start and "config" in start:
        latent = configs.from_dict(start["config"]).latent
        if latent.vqvae != weights:
            raise UserError(f"run {config.run_id} was trained on the latents of another VQVAE; restore its weights, or name "
                            "a new run: --set output.run_id=NAME")
        return latent
    return process.agree(dataclasses.replace(measure(config, source), vqvae=weights))


def measure(config: Config, source: Source) -> Latent:
    """Shape and statistics of the latents, from some 2,000 triples (300 where each must be encoded first)."""
    count = -(-(300 if config.data.augmented else 2_000) // config.train.batch_size)
    pairs = [(target, reference) for target, reference, _, _ in source.measured(0, count, whole=True)]
    x1, x0 = (torch.cat(part).double().cpu() for part in zip(*pairs))
    C = x1.shape[1]
    mean, std = torch.zeros(C, dtype=x1.dtype), torch.ones(C, dtype=x1.dtype)
    if config.flow.normalize:
        mean, std = x1.mean((0, 2, 3)), x1.std((0, 2, 3)).clamp(min=1e-6)
    delta = ((x1 - x0) / std.view(-1, 1, 1)).square().mean().sqrt().item()
    if not 0 < delta < float("inf"):
        raise UserError(f"{config.data.root}: the training videos stand still (or their latents are not finite: {delta}); "
                        "there is nothing to forecast")
    scale = ((x1 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).square().mean().sqrt().item()
    C, h, w = x1.shape[1:]
    h //= config.halves[1] if config.halves else 1  # of frames that lie below one another
    return Latent((C, h, w), tuple(mean.tolist()), tuple(std.tolist()), delta, scale)
