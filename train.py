"""The training loop: `fit` runs after the data, autoencoder and latent stages of main.py and before
its forecasts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import configs
import data
from batches.batch import Batch
from batches.stream import loss_parts
from batches.windows import share
from configs import Config
from evaluation import metrics
from forecaster import Forecaster, build_net
from interpolants import Interpolant
from report import videos
from runtime import checkpoints, logs, parallel
from runtime.budget import seconds_per_item
from runtime.console import Failure, progress
from runtime.process import (
    Process,
    StopSignals,
    autocast,
    generator,
    learning_rate,
    seed_of,
    stopped,
)

PREVIEW_FUTURES = 2


class Learner(NamedTuple):
    """The state that an update changes. weights, ema: {name: tensor}, the weights of the network
    and their exponential moving average."""

    net: nn.Module  # data-parallel, if there are several processes
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer


# -------------------------------------------------------------------- the loop
def fit(
    config: Config,
    source: data.Source,
    autoencoder: nn.Module,
    clips: data.Clips | None,
    process: Process,
    dir: Path,
    start: dict | None,
) -> Path:
    """Train the velocity network up to update config.train.steps -> path of the checkpoint.

    clips: the clips to preview, on the first process.
    start: the checkpoint to resume from, or the weights to start from, or None.
    """
    train = config.train
    learner = build_learner(config, process)
    recent = logs.Recent(train.batch_size)
    parts = checkpoint_parts(config, learner, recent, source, process, dir)
    step = load(start, parts, process, dir)
    if step >= train.steps:
        return dir / "latest.pt"

    # All processes normalise batches with the forecaster. Only the first one makes previews, with
    # the averaged weights, in a second network.
    preview_net = build_net(config, process.device).eval() if process.first else None
    forecaster = Forecaster(config, preview_net, autoencoder, process.device)
    stop_signal = 0
    with (
        logs.Log(dir, config, step, enabled=process.first) as log,
        StopSignals(process) as signals,
        progress(train.steps, f"train {config.run_id}", "step", step) as bar,
    ):
        log.write_page(train.sample_every)
        recent.restart_clock()
        for batch in source.batches(step, train.steps):
            recent.add(update(learner.net, learner.optimizer, forecaster, batch, step, process))
            ema, weights = parallel.local(learner.ema), parallel.local(learner.weights)
            update_ema(ema, weights, step, train.ema)
            step += 1
            bar.update()

            last = step == train.steps
            # All processes must leave the loop at the same update.
            stop_signal = signals.agreed(step, last)
            to_log = step % train.log_every == 0
            to_save = step % train.save_every == 0 or last or stop_signal
            if to_log or to_save:
                values = summarize(recent, config, source, step, dir)
                bar.set_postfix_str(f"loss {values.get('loss', math.nan):.4f}")
            if to_log or last:
                log.row(step, **values, lr=learner.optimizer.param_groups[0]["lr"])
                recent.clear()
            if to_save:
                save(dir, config, parts, autoencoder, step, process)
            if stop_signal:
                break
            if train.sample_every and step % train.sample_every == 0 and not last:
                preview(forecaster, learner, clips, step, dir, log, process)
    # A launcher ends all processes when one ends: wait until the first has closed its files.
    process.barrier()
    if stop_signal:
        raise stopped(stop_signal, step, dir)
    return dir / "latest.pt"


def build_learner(config: Config, process: Process) -> Learner:
    """Build the network with new weights, its average and its optimizer."""
    train = config.train
    torch.manual_seed(seed_of(train.seed, "weights"))
    net = build_net(config, process.device)
    net.recompute = train.recompute
    distributed = parallel.distribute(net, config, process)
    # `weights` refers to the network's own tensors, `ema` to copies.
    weights = net.state_dict()
    ema = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(
        net.parameters(),
        train.lr,
        betas=(0.9, train.beta2),
        weight_decay=train.weight_decay,
        fused=True,
    )
    return Learner(distributed, weights, ema, optimizer)


# -------------------------------------------------------------------- an update
def update(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    forecaster: Forecaster,
    batch: Batch,
    step: int,
    process: Process,
) -> dict[str, Tensor]:
    """Make one update of the weights -> scalars to log, which stay on the device.

    If the gradient norm is not finite, the weights do not change, on any process: all processes
    have the same gradient.
    """
    train = forecaster.config.train
    device = process.device
    torch.manual_seed(seed_of(train.seed, "dropout", step, process.rank))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, train.lr, train.steps, train.warmup, train.schedule)
    # The forward pass changes the running statistics of batch normalisation. A skipped update
    # restores them.
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in buffers]

    own = share(train.batch_size, process.rank, process.world)
    s, eps = draw_noise(forecaster.config, batch.target, step, device, own)
    batch = batch.normalize(forecaster.mean, forecaster.std)
    # Gradient accumulation: the gradients of the parts add up to that of the whole batch.
    n = train.accumulate
    parts = list(zip(batch.chunk(n), s.chunk(n), eps.chunk(n)))
    losses = []
    for k, part in enumerate(parts, 1):
        with parallel.gradient_sync(net, k == len(parts)):
            with autocast(train.precision, device):
                loss = flow_loss(net, forecaster.interpolant, *part)
            losses.append(loss.detach())
            (loss.mean() / len(parts)).backward()

    norm = parallel.to_plain(nn.utils.clip_grad_norm_(net.parameters(), train.clip_norm))
    # The fused optimizer reads found_inf on the device, so that the host does not wait.
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(norm.isfinite(), buffer, old))

    losses = torch.cat(losses)
    scalars = {"loss": losses.mean(), "grad_norm": norm}
    for name, part in loss_parts(forecaster.config, own).items():
        scalars[name] = losses[part].mean()
    return scalars


def flow_loss(
    net: nn.Module, interpolant: Interpolant, batch: Batch, s: Tensor, eps: Tensor
) -> Tensor:
    """Squared errors (B,) of the network against the target of the interpolant, weighted
    (arXiv 2403.13724, eq. 11): w(s) |net(x_s, s, x_0) - target|^2, mean over the latent.

    batch: normalised, with x_1 the target and x_0 the reference. s: (B,). eps: as x_1. The caller
    sets the precision (autocast).
    """
    x1, x0, contexts, gaps = batch
    x, target = interpolant.interpolate(s, x0, x1, eps)
    output = net(interpolant.network_input(x, s, x0), s, x0, contexts, gaps)
    return interpolant.weight(s) * (output.float() - target).square().mean((1, 2, 3))


def measure_update(
    config: Config, autoencoder: nn.Module, device: torch.device, world: int
) -> float:
    """Seconds per update on this machine, for `world` processes, without torch.compile and without
    the exchange of gradients. config.latent must hold the shape of the latents. Changes no file."""
    C, h, w = config.latent.shape
    past, future = config.halves or (config.data.contexts, 1)
    process = Process(0, 1, device)
    settings = dataclasses.replace(config.train, compile="off", accumulate=1)
    # make_update tries batches of one item and more, and replay.n_live must not exceed that size.
    replay = dataclasses.replace(config.replay, n_live=1)
    config = dataclasses.replace(config, train=settings, replay=replay)
    learner = build_learner(config, process)
    given = torch.randn(config.train.batch_size, past, C, h, w, device=device)
    # The joint network predicts several frames, stacked along the height.
    frame = given[:, 0].repeat(1, 1, future, 1)
    batch = Batch(frame, frame, given, torch.ones(given.shape[:2], device=device))

    def make_update(n: int) -> None:
        train = dataclasses.replace(config.train, batch_size=n)
        forecaster = Forecaster(
            dataclasses.replace(config, train=train), learner.net, nn.Identity(), device
        )
        part = Batch(*(values[:n] for values in batch))
        update(learner.net, learner.optimizer, forecaster, part, 0, process)
        update_ema(learner.ema, learner.weights, 0, train.ema)

    most = max(1, config.train.batch_size // world)
    per_item = seconds_per_item(make_update, most, device)
    if config.data.augmented:
        # Augmented frames are encoded in every update.
        per_item += (2 + past) * data.measure_encoding(config, autoencoder, device)
    return per_item * most


def preview_frames(config: Config, updates: int) -> int:
    """Number of frames that the previews of the last `updates` updates forecast."""
    train = config.train
    if not train.sample_every:
        return 0
    first = train.steps - updates
    # There is no preview after the last update.
    previews = (train.steps - 1) // train.sample_every - first // train.sample_every
    return max(previews, 0) * data.PREVIEW_VIDEOS * PREVIEW_FUTURES * config.data.predict


def draw_noise(
    config: Config, x1: Tensor, step: int, device: torch.device, own: slice
) -> tuple[Tensor, Tensor]:
    """Flow times s (b,) and noise eps of the shape of x1, for this process's share of a batch."""
    # Drawn for the whole batch, so that they do not depend on the number of processes.
    B = config.train.batch_size
    noise = generator(device, config.train.seed, "noise", step, 0)
    s = flow_times(config.flow, B, noise, device)
    eps = torch.randn(B, *x1.shape[1:], generator=noise, device=device)
    return s[own], eps[own]


def flow_times(
    flow: configs.Flow, B: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw flow times (B,) in [s_min, 1 - s_min]."""
    if flow.times == "logit_normal":
        s = torch.randn(B, generator=generator, device=device).sigmoid()
        return s.clamp(flow.s_min, 1 - flow.s_min)
    u = torch.rand(B, generator=generator, device=device)
    return u * (1 - 2 * flow.s_min) + flow.s_min


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], weights: dict[str, Tensor], step: int, decay: float) -> None:
    """Update the exponential moving average of the weights. Integer buffers are copied.

    After n updates the decay is at most (1 + n) / (10 + n), so that the initial weights soon lose
    their influence.
    """
    decay = min(decay, (1 + step) / (10 + step))
    floats = [name for name, value in ema.items() if value.is_floating_point()]
    averages = [ema[name] for name in floats]
    torch._foreach_lerp_(averages, [weights[name] for name in floats], 1 - decay)
    for name in ema.keys() - set(floats):
        ema[name].copy_(weights[name])


# -------------------------------------------------------------------- logs
def summarize(
    recent: logs.Recent, config: Config, source: data.Source, step: int, dir: Path
) -> dict[str, float]:
    """Average the values to log. Failure if too many gradients in a row were not finite."""
    values = recent.summary()
    count, ago = recent.longest
    if count >= config.train.max_bad_steps:
        first = step - ago
        found = max(dir.glob("step_*.pt"), default="none yet")
        raise Failure(
            f"no finite gradient in {count} updates in a row, from update {first + 1} on, whose "
            f"batch holds {source.describe(first)}; last good checkpoint: {found}; lower train.lr, "
            "or check the data"
        )
    return values


def preview(
    forecaster: Forecaster,
    learner: Learner,
    clips: data.Clips | None,
    step: int,
    dir: Path,
    log: logs.Log,
    process: Process,
) -> None:
    """Forecast a few clips with the averaged weights. Writes a picture beside the checkpoints, a
    video to wandb, and scores to the log. All processes call this function; the first one
    forecasts."""
    ema = parallel.gather(learner.ema, process.first)
    if process.first:
        forecaster.net.load_state_dict(ema)
        data = forecaster.config.data
        given = clips.frames[:, : data.condition]
        key = (forecaster.config.train.seed, "preview")
        futures = forecaster.forecast(given, data.predict, PREVIEW_FUTURES, key, quiet=True)
        truth = forecaster.to_display(clips.frames)
        log.picture(step, videos.contact_sheet(truth, futures))
        log.row(step, **score_preview(truth, futures))
        log.video(step, "forecasts", videos.mosaic(truth, futures, rows=4), clips.fps)
    process.barrier()


def score_preview(truth: np.ndarray, futures: np.ndarray) -> dict[str, float]:
    """Scores of futures (V, S, T, H, W, 3) against the last T frames of truth. The ratio compares
    the CRPS with that of repeating the last given frame."""
    T = futures.shape[2]
    y = truth[:, -T:].astype(np.float32) / 255
    x = futures.astype(np.float32) / 255
    repeated = truth[:, -T - 1, None, None].repeat(T, 2).astype(np.float32) / 255
    crps = metrics.crps(x, y)
    baseline = metrics.crps(repeated, y)
    return {
        "sample_crps": metrics.summarize(crps)["mean"],
        "sample_psnr": metrics.summarize(metrics.psnr(x, y).mean(1))["mean"],
        "sample_crps_ratio": float(crps.mean() / max(baseline.mean(), 1e-12)),
    }


# -------------------------------------------------------------------- checkpoints
class Part(NamedTuple):
    """A part of a checkpoint: save(step) gives its value, load(value) restores it."""

    save: Callable[[int], object]
    load: Callable[[Any], None]


def learner_parts(learner: Learner, dir: Path) -> dict[str, Part]:
    """The parts of a checkpoint that hold the learner. dir: for error messages."""
    weights, ema, optimizer = learner.weights, learner.ema, learner.optimizer
    return {
        "model": Part(lambda _: weights, partial(parallel.load_tensors, weights, where=dir)),
        "ema": Part(lambda _: ema, partial(parallel.load_tensors, ema, where=dir)),
        "opt": Part(lambda _: optimizer.state_dict(), partial(parallel.load_optimizer, optimizer)),
    }


def checkpoint_parts(
    config: Config,
    learner: Learner,
    recent: logs.Recent,
    source: data.Source,
    process: Process,
    dir: Path,
) -> dict[str, Part]:
    """All parts of a checkpoint that training changes, by name."""
    # Checkpoints of earlier versions hold the logged values in this order, without names.
    names = ["loss", "grad_norm", *loss_parts(config, slice(0, config.train.batch_size))]
    load_recent = partial(recent.load_state_dict, device=process.device, names=names)
    return {
        **learner_parts(learner, dir),
        "recent": Part(lambda _: recent.state_dict(), load_recent),
        "replay": Part(source.state_dict, source.load_state_dict),
    }


def load(start: dict | None, parts: dict[str, Part], process: Process, dir: Path) -> int:
    """Load the parts that a checkpoint holds -> the number of its updates, 0 without a checkpoint.

    Failure if the processes read checkpoints of different updates."""
    step = start["step"] if start else 0
    if process.agree(step) != step:
        raise Failure(
            f"process {process.rank} read update {step} from {dir}, process 0 another one: is it "
            "the same folder on all machines?"
        )
    for name, part in parts.items():
        if start and name in start:
            part.load(start[name])
    return step


def save(
    dir: Path,
    config: Config,
    parts: dict[str, Part],
    autoencoder: nn.Module,
    step: int,
    process: Process,
) -> None:
    """Write a checkpoint. All processes call this function, since each may hold a shard of the
    learner; the first one writes, and the others wait for it."""
    state = {}
    for name, part in parts.items():
        state[name] = parallel.gather(part.save(step), process.first)
    state |= {"step": step, "config": configs.to_dict(config), "rng": {"seed": config.train.seed}}
    # Our own autoencoder is small. A checkpoint that holds it is all that sampling needs.
    if config.vqvae.kind == "small":
        state["vqvae"] = autoencoder.state_dict()
    if process.first:
        checkpoints.save_checkpoint(dir, state, config.train.keep, config.train.keep_every)
    # The others wait for the disk here, not in the next all-reduce, which has a short timeout.
    process.barrier()
