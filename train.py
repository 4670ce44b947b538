"""The training loop: `fit` runs after the data, autoencoder and latent stages of main.py and before
its forecasts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import configs
import data
from batches.batch import Batch
from batches.stream import loss_parts
from batches.windows import Windows, share, spaced_windows
from configs import Config
from evaluation import metrics
from forecaster import Forecaster, build_net
from interpolants import Interpolant
from report import videos
from runtime import checkpoints, logs, parallel
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

PREVIEW_VIDEOS = 4
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
    windows: Windows | None,
    process: Process,
    dir: Path,
    start: dict | None,
) -> Path:
    """Train the velocity network up to update config.train.steps -> path of the checkpoint.

    windows: the clips of the previews (overfitting), or None for held-out clips.
    start: the checkpoint to resume from, or the weights to start from, or None.
    """
    train = config.train
    learner = begin(config, process, dir, start)
    step = first_step(start, process, dir)
    recent = logs.Recent(train.batch_size)
    load_parts(start, config, recent, source, process)
    if step >= train.steps:
        return dir / "latest.pt"

    # The first process previews the averaged weights in a network of their own.
    preview_net = build_net(config, process.device).eval() if process.first else None
    forecaster = Forecaster(config, preview_net, autoencoder, process.device)
    stop_signal = 0
    with (
        logs.Log(dir, config, step, enabled=process.first) as log,
        StopSignals(process) as signals,
        progress(train.steps, f"train {config.run_id}", "step", step) as bar,
    ):
        recent.restart_clock()
        for batch in source.batches(step, train.steps):
            recent.add(update(learner.net, learner.optimizer, forecaster, batch, step, process))
            average(parallel.local(learner.ema), parallel.local(learner.weights), step, train.ema)
            step += 1
            bar.update()

            last = step == train.steps
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
                save(dir, config, learner, autoencoder, recent, source, step, process)
                # The other processes wait for the disk here, not in the next all-reduce, which
                # has a short timeout.
                process.barrier()
            if stop_signal:
                break
            if train.sample_every and step % train.sample_every == 0 and not last:
                ema = parallel.whole(learner.ema, process.first)
                if process.first:
                    preview(forecaster, ema, config, windows, step, dir, log)
                process.barrier()
    # A launcher ends all processes when one ends: wait until the first has closed its files.
    process.barrier()
    if stop_signal:
        raise stopped(stop_signal, step, dir)
    return dir / "latest.pt"


def begin(config: Config, process: Process, dir: Path, start: dict | None) -> Learner:
    """Build the learner: with new weights, from a checkpoint of this run, or from the weights of
    another run (--ckpt)."""
    train = config.train
    torch.manual_seed(seed_of(train.seed, "weights"))
    net = build_net(config, process.device)
    if start:
        checkpoints.load_weights(net, start.get("model", start["ema"]), dir)
    net.recompute = train.recompute
    averages = start["ema"] if start else net.state_dict()
    spread = parallel.spread(net, config, process)
    weights = net.state_dict()
    ema = {name: parallel.alike(averages[name], value) for name, value in weights.items()}
    optimizer = torch.optim.AdamW(
        net.parameters(),
        train.lr,
        betas=(0.9, train.beta2),
        weight_decay=train.weight_decay,
        fused=True,
    )
    if start and "opt" in start:
        parallel.load_optimizer(optimizer, start["opt"])
    return Learner(spread, weights, ema, optimizer)


def first_step(start: dict | None, process: Process, dir: Path) -> int:
    """Number of updates done before. Failure if the processes read different numbers."""
    step = start["step"] if start else 0
    if process.agree(step) != step:
        raise Failure(
            f"process {process.rank} read update {step} from {dir}, the first another: is it the "
            "same folder on all machines?"
        )
    return step


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

    If the gradient norm is not finite, the weights do not change. All processes decide alike, since
    all have the same gradient.
    """
    train = forecaster.config.train
    device = process.device
    torch.manual_seed(seed_of(train.seed, "dropout", step, process.rank))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, train.lr, train.steps, train.warmup, train.schedule)
    # Running statistics of batch normalisation, which the forward pass changes.
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in buffers]

    own = share(train.batch_size, process.rank, process.world)
    s, eps = draw_noise(forecaster.config, batch.target, step, device, own)
    batch = batch.normalize(forecaster.mean, forecaster.std)
    n = train.accumulate
    parts = list(zip(batch.chunk(n), s.chunk(n), eps.chunk(n)))
    losses = []
    for k, part in enumerate(parts, 1):
        with parallel.last_of_step(net, k == len(parts)):
            with autocast(train.precision, device):
                loss = flow_loss(net, forecaster.interpolant, *part)
            losses.append(loss.detach())
            (loss.mean() / len(parts)).backward()

    norm = parallel.plain(nn.utils.clip_grad_norm_(net.parameters(), train.clip_norm))
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
def average(ema: dict[str, Tensor], own: dict[str, Tensor], step: int, decay: float) -> None:
    """Update the exponential moving average of the weights. Integer buffers are copied.

    The decay rises as (1 + n) / (10 + n) over the updates n, so that the initial weights are soon
    forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    floats = [name for name, value in ema.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[name] for name in floats], [own[name] for name in floats], 1 - decay)
    for name in ema.keys() - set(floats):
        ema[name].copy_(own[name])


# -------------------------------------------------------------------- logs
def summarize(
    recent: logs.Recent, config: Config, source: data.Source, step: int, dir: Path
) -> dict[str, float]:
    """The values to log. Failure if too many gradients in a row were not finite."""
    values = recent.summary()
    count, ago = recent.longest
    if count >= config.train.max_bad_steps:
        first = step - ago
        found = max(dir.glob("step_*.pt"), default="none yet")
        raise Failure(
            f"no finite gradient in {count} updates in a row, from update {first + 1} on, whose "
            f"batch is of {source.describe(first)}; last good checkpoint: {found}; lower train.lr, "
            "or look at the data"
        )
    return values


def preview(
    forecaster: Forecaster,
    ema: dict,
    config: Config,
    windows: Windows | None,
    step: int,
    dir: Path,
    log: logs.Log,
) -> None:
    """Make a few forecasts with the averaged weights: a picture beside the checkpoints, a video in
    wandb, and their scores in the log."""
    forecaster.net.load_state_dict(ema)
    shards = data.open_split(config, config.sample.split)
    given, predict = config.data.condition, config.data.predict
    if windows is None:
        windows = spaced_windows(shards.lengths, given + predict, config.data.skip, PREVIEW_VIDEOS)
    truth = data.read_clips(shards, windows)[:PREVIEW_VIDEOS]
    key = (config.train.seed, "preview")
    futures = forecaster.forecast(truth[:, :given], predict, PREVIEW_FUTURES, key, quiet=True)
    truth = forecaster.shown(truth)
    videos.contact_sheet(truth, futures).save(dir / f"forecasts_{step:08d}.png")
    log.row(step, **score_preview(truth, futures))
    log.video(step, "forecasts", videos.mosaic(truth, futures, rows=4), shards.fps or 10)


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
def parts_of(
    config: Config, recent: logs.Recent, source: data.Source, step: int, device: torch.device
) -> dict[str, tuple[Callable, Callable]]:
    """The parts of a checkpoint besides the learner: {name: (function that saves, that loads)}."""
    # Checkpoints of earlier versions hold the logged values in this order, without names.
    names = ["loss", "grad_norm", *loss_parts(config, slice(0, config.train.batch_size))]
    load_recent = partial(recent.load_state_dict, device=device, names=names)
    return {
        "recent": (recent.state_dict, load_recent),
        "replay": (partial(source.state_dict, step), source.load_state_dict),
    }


def load_parts(
    start: dict | None, config: Config, recent: logs.Recent, source: data.Source, process: Process
) -> None:
    """Load the parts of a checkpoint besides the learner, as far as the checkpoint holds them."""
    for name, (_, load) in parts_of(config, recent, source, 0, process.device).items():
        if start and name in start:
            load(start[name])


def save(
    dir: Path,
    config: Config,
    learner: Learner,
    autoencoder: nn.Module,
    recent: logs.Recent,
    source: data.Source,
    step: int,
    process: Process,
) -> None:
    """Write a checkpoint. All processes call this, since each may hold a shard of the learner; the
    first process writes."""
    trained = {"model": learner.weights, "ema": learner.ema, "opt": learner.optimizer.state_dict()}
    trained = parallel.whole(trained, process.first)
    if not process.first:
        return
    parts = parts_of(config, recent, source, step, process.device)
    state = {
        **trained,
        **{name: save_part() for name, (save_part, _) in parts.items()},
        "step": step,
        "config": configs.to_dict(config),
        "rng": {"seed": config.train.seed},
    }
    # Our own autoencoder is small: with it, the checkpoint is all that sampling needs.
    if config.vqvae.kind == "small":
        state["vqvae"] = autoencoder.state_dict()
    checkpoints.save_checkpoint(dir, state, config.train.keep, config.train.keep_every)
