"""The training loop: `fit` runs after the data, autoencoder and latent stages of main.py and before
its forecasts."""

from __future__ import annotations

import copy
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
from batches.batch import Batch, Earlier, Later
from batches.stream import loss_parts
from batches.windows import share
from configs import Config
from evaluation import metrics
from forecaster import Draws, Forecaster, build_net
from interpolants import Interpolant
from models.shared import repeat_given
from objectives.energy import draw_members, member_losses
from objectives.shortcut import consistency_errors, draw_steps
from report import videos
from runtime import checkpoints, logs, parallel
from runtime.budget import seconds_per_item
from runtime.console import Failure, progress
from runtime.muon import Muon
from runtime.process import (
    Process,
    StopSignals,
    autocast,
    generator,
    learning_rate,
    numpy_generator,
    seed_of,
    stopped,
)
from runtime.tables import merge_tables

PREVIEW_FUTURES = 2
# Solver steps for each frame of the forecasts that train.own trains on.
OWN_EVALUATIONS = 2
# The share of the updates after which they begin: an untrained network forecasts nothing useful.
OWN_BEGINS = 0.25


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
            earlier = read_earlier(source, train, step)
            later = source.later(step) if train_unrolled(config) else None
            recent.add(update(learner, forecaster, batch, step, process, earlier, later))
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


def read_earlier(source: data.Source, train: configs.Train, step: int) -> Earlier | None:
    """Read the frames for train.own; None where it does not apply."""
    if train.own and source.earlier and step >= OWN_BEGINS * train.steps:
        return source.earlier(step)
    return None


def train_unrolled(config: Config) -> bool:
    """True if an update needs the frames after the targets, see flow.unroll."""
    return config.flow.objective == "energy" and config.flow.unroll > 1


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
    options = {"betas": (0.9, train.beta2), "weight_decay": train.weight_decay, "fused": True}
    if train.optimizer == "muon":
        optimizer = Muon(net, train.lr, train.muon_lr, **options)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), train.lr, **options)
    return Learner(distributed, weights, ema, optimizer)


# -------------------------------------------------------------------- an update
def update(
    learner: Learner,
    forecaster: Forecaster,
    batch: Batch,
    step: int,
    process: Process,
    earlier: Earlier | None = None,
    later: Later | None = None,
) -> dict[str, Tensor]:
    """Make one update of the weights -> scalars to log, which stay on the device.

    earlier: frames of the items whose given frames the network forecasts, see train.own. later: the
    frames after the targets, see flow.unroll.

    If the gradient norm is not finite, the weights do not change, on any process: all processes
    have the same gradient.
    """
    net, optimizer = learner.net, learner.optimizer
    train = forecaster.config.train
    device = process.device
    torch.manual_seed(seed_of(train.seed, "dropout", step, process.rank))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, train.lr, train.steps, train.warmup, train.schedule)
    # The forward pass changes the running statistics of batch normalisation. A skipped update
    # restores them.
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in buffers]

    flow = forecaster.config.flow
    own = share(train.batch_size, process.rank, process.world)
    draws = draw_all(forecaster.config, batch.target, step, device, own)
    batch = batch.normalize(forecaster.mean, forecaster.std)
    if earlier is not None:
        batch = replace_given(net, forecaster, batch, earlier, step, own)
    level = None
    if flow.noise:
        batch, level = add_noise(forecaster.config, batch, step, device, own)
    if later is not None:
        later = later._replace(frames=forecaster.normalize(later.frames))
    values = compute_gradient(net, forecaster, batch, draws, level, later, own.start)

    norm = parallel.to_plain(nn.utils.clip_grad_norm_(net.parameters(), train.clip_norm))
    # The fused optimizer reads found_inf on the device, so that the host does not wait.
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(norm.isfinite(), buffer, old))

    losses = values.pop("loss")
    scalars = {"loss": losses.mean(), "grad_norm": norm}
    for name, value in values.items():
        scalars[name] = value.mean()
    for name, part in loss_parts(forecaster.config, own).items():
        scalars[name] = losses[part].mean()
    return scalars


def compute_gradient(
    net: nn.Module,
    forecaster: Forecaster,
    batch: Batch,
    draws: tuple[Tensor, ...],
    level: Tensor | None,
    later: Later | None,
    first: int,
) -> dict[str, Tensor]:
    """Add the gradient of the loss of a normalised batch to the weights -> values per item, see
    objective_values.

    The batch is split into train.accumulate parts, whose gradients add up to that of the whole.
    """
    config = forecaster.config
    n = config.train.accumulate
    levels = [None] * n if level is None else level.chunk(n)
    laters = [None] * n if later is None else later.chunk(n)
    by_part = zip(*(draw.chunk(n) for draw in draws))
    parts = list(zip(batch.chunk(n), by_part, levels, laters))
    found = []
    for k, (part, *others) in enumerate(parts, 1):
        with parallel.gradient_sync(net, k == len(parts)):
            with autocast(config.train.precision, batch.target.device):
                values = objective_values(net, forecaster, part, *others, first)
            (values["loss"].mean() / len(parts)).backward()
        found.append({name: value.detach() for name, value in values.items()})
        first += len(part.target)
    return merge_tables(found, torch.cat)


def objective_values(
    net: nn.Module,
    forecaster: Forecaster,
    batch: Batch,
    draws: tuple[Tensor, ...],
    level: Tensor | None,
    later: Later | None,
    first: int,
) -> dict[str, Tensor]:
    """The loss of flow.objective per item of a normalised batch, and values to log, (B,) each.

    draws: see draw_all. first: the number of the first item in the batch of all processes.
    """
    flow = forecaster.config.flow
    if flow.objective == "energy":
        return member_losses(net, forecaster, batch, *draws, level, later)
    s, eps, *steps = draws
    s, eps = s.flatten(0, 1), eps.flatten(0, 1)
    errors = flow_loss(net, forecaster.interpolant, batch, s, eps, level)
    values = {"loss": item_losses(errors, flow)}
    if flow.start:
        # The squared error of E[x_1 | x_0], for flow.output=residual in units of the variance of
        # x_1 - x_0.
        values["one_step"] = errors.view(-1, flow.draws + 1)[:, -1]
    if flow.objective == "shortcut":
        values["consistency"] = consistency_errors(net, forecaster, batch, steps, level, first)
        values["loss"] = values["loss"] + values["consistency"]
    return values


def flow_loss(
    net: nn.Module,
    interpolant: Interpolant,
    batch: Batch,
    s: Tensor,
    eps: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Squared errors (m B,) of the network against the target of the interpolant, weighted
    (arXiv 2403.13724, eq. 11): w(s) |net(x_s, s, x_0) - target|^2, mean over the latent.

    batch: B items, normalised, with x_1 the target and x_0 the reference. s: (m B,) and
    eps: (m B, C, h, w), the m draws of an item one after the other. noise: (B,), level of the noise
    on the given frames, or None. The caller sets the precision (autocast).
    """
    given = [batch.reference, batch.contexts, batch.gaps]
    if noise is not None:
        given.append(noise)
    x1, x0 = repeat_given(len(s), batch.target, batch.reference)
    x, target = interpolant.interpolate(s, x0, x1, eps)
    output = net(interpolant.network_input(x, s, x0), s, *given)
    return interpolant.weight(s) * (output.float() - target).square().mean((1, 2, 3))


def item_losses(errors: Tensor, flow: configs.Flow) -> Tensor:
    """Squared errors (draws x B,) -> losses (B,): the mean over the draws of the flow time, and the
    draw at s = 0 times flow.start."""
    errors = errors.view(-1, flow.draws + (flow.start > 0))
    losses = errors[:, : flow.draws].mean(1)
    return losses + flow.start * errors[:, -1] if flow.start else losses


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
            dataclasses.replace(config, train=train), learner.net, autoencoder, device
        )
        part = Batch(*(values[:n] for values in batch))
        later = None
        if train_unrolled(config):
            frames = part.target[:, None].expand(-1, config.flow.unroll - 1, -1, -1, -1)
            later = Later(frames, torch.ones(frames.shape[:2], device=device))
        update(learner, forecaster, part, 0, process, later=later)
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


def draw_all(
    config: Config, x1: Tensor, step: int, device: torch.device, own: slice
) -> tuple[Tensor, ...]:
    """The random numbers of flow.objective for this process's b items of a batch, (b, …) each."""
    shape = x1.shape[1:]
    if config.flow.objective == "energy":
        return (draw_members(config, shape, step, device, own),)
    draws = draw_noise(config, x1, step, device, own)
    draws = tuple(part.unflatten(0, (len(x1), -1)) for part in draws)
    if config.flow.objective == "shortcut":
        draws += draw_steps(config, shape, step, device, own)
    return draws


def draw_noise(
    config: Config, x1: Tensor, step: int, device: torch.device, own: slice
) -> tuple[Tensor, Tensor]:
    """Flow times s (m b,) and noise eps (m b, C, h, w) for this process's b items of a batch.

    m = flow.draws, and one more at s = 0, the last one of each item, if flow.start > 0.
    """
    # Drawn for the whole batch, so that they do not depend on the number of processes.
    flow = config.flow
    B, m = config.train.batch_size, flow.draws + (flow.start > 0)
    noise = generator(device, config.train.seed, "noise", step, 0)
    s = flow_times(flow, B * m, noise, device).view(B, m)
    if flow.start:
        s[:, -1] = 0
    eps = torch.randn(B * m, *x1.shape[1:], generator=noise, device=device).unflatten(0, (B, m))
    return s[own].flatten(), eps[own].flatten(0, 1)


def add_noise(
    config: Config, batch: Batch, step: int, device: torch.device, own: slice
) -> tuple[Batch, Tensor]:
    """Add noise to the given frames of a normalised batch -> (batch, levels (b,)).

    The level of an item is uniform in [0, flow.noise]. The flow starts at the noisy reference, so
    the network learns to remove the noise, and with it errors of its own earlier forecasts.
    """
    B, K = config.train.batch_size, config.data.contexts
    noise = generator(device, config.train.seed, "given", step)
    level = (torch.rand(B, generator=noise, device=device) * config.flow.noise)[own]
    shape = (B, 1 + K, *batch.reference.shape[1:])
    eps = torch.randn(shape, generator=noise, device=device)[own] * level.view(-1, 1, 1, 1, 1)
    batch = batch._replace(
        reference=batch.reference + eps[:, 0], contexts=batch.contexts + eps[:, 1:]
    )
    return batch, level


class BatchDraws(Draws):
    """Draws for some rows of a batch, which do not depend on the number of processes."""

    def __init__(self, device: torch.device, size: int, rows: Tensor, *key: int | str):
        super().__init__(device, *key)
        self.size, self.rows = size, rows

    def normal(self, like: Tensor) -> Tensor:
        whole = torch.empty(self.size, *like.shape[1:], device=self.device)
        return super().normal(whole)[self.rows]

    def uniform(self, B: int, K: int) -> Tensor:
        return super().uniform(self.size, K)[self.rows]

    def perturb(self, z: Tensor, level: float) -> Tensor:
        whole = torch.zeros(self.size, *z.shape[1:], device=self.device)
        return z + super().perturb(whole, level)[self.rows]


def replace_given(
    net: nn.Module, forecaster: Forecaster, batch: Batch, earlier: Earlier, step: int, own: slice
) -> Batch:
    """Replace given frames of some items of a normalised batch by forecasts of the network.

    The network rolls out 1 to train.own_steps frames, up to the reference, with OWN_EVALUATIONS
    solver steps each. No gradient passes through these frames.
    """
    config, device = forecaster.config, forecaster.device
    train, rows = config.train, earlier.rows
    if not len(rows):
        return batch
    n = 1 + int(numpy_generator(train.seed, "own", step).integers(train.own_steps))
    # A trained sampler has its own number of evaluations.
    steps = config.sample.steps if config.flow.objective == "energy" else OWN_EVALUATIONS
    sample = dataclasses.replace(config.sample, steps=steps, redraw="frame")
    # The network is being trained: it is neither cast nor compiled here.
    roller = copy.copy(forecaster)
    roller.config, roller.net = dataclasses.replace(config, sample=sample), net
    roller.ready, roller.compiled = True, False
    frames = forecaster.normalize(earlier.frames)
    H = frames.shape[1]
    draws = BatchDraws(device, train.batch_size, rows + own.start, train.seed, "own", step)
    future = roller.roll_out(frames[:, : H - n], n, draws)
    frames = torch.cat([frames[:, : H - n], future], 1)

    gaps = batch.gaps[rows].long()
    place = (H - 1 - gaps).clamp(min=0)
    items = torch.arange(len(rows), device=device)[:, None]
    # Contexts further back than `frames` stay.
    inside = (gaps < H).view(*gaps.shape, 1, 1, 1)
    contexts = torch.where(inside, frames[items, place], batch.contexts[rows])
    return batch._replace(
        reference=batch.reference.index_copy(0, rows, frames[:, -1]),
        contexts=batch.contexts.index_copy(0, rows, contexts),
    )


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
        log.row(step, **score_preview(truth, futures, clips.scale))
        truth, futures, colours = videos.as_pictures(truth, futures, clips.channels)
        sheet = videos.contact_sheet(truth, futures)
        log.picture(step, videos.add_bars_to_sheet(sheet, colours))
        mosaic = videos.draw_mosaic(truth, futures, rows=4)
        log.video(step, "forecasts", videos.add_bars(mosaic, colours), clips.fps)
    process.barrier()


def score_preview(
    truth: np.ndarray, futures: np.ndarray, scale: np.ndarray | None = None
) -> dict[str, float]:
    """Scores of futures (V, S, T, H, W, 3) against the last T frames of truth. The ratio compares
    the CRPS with that of repeating the last given frame. Fields (V, S, T, C, H, W) are scored in
    units of `scale` (C,) and have no PSNR, which needs a peak."""
    T = futures.shape[2]
    y = metrics.to_values(truth[:, -T:], scale)
    x = metrics.to_values(futures, scale)
    repeated = metrics.to_values(truth[:, -T - 1, None, None].repeat(T, 2), scale)
    crps = metrics.crps(x, y)
    baseline = metrics.crps(repeated, y)
    scores = {"sample_crps": metrics.summarize(crps)["mean"]}
    if scale is None:
        scores["sample_psnr"] = metrics.summarize(metrics.psnr(x, y).mean(1))["mean"]
    else:
        scores["sample_rmse"] = metrics.summarize(metrics.rmse(x, y))["mean"]
    scores["sample_crps_ratio"] = float(crps.mean() / max(baseline.mean(), 1e-12))
    return scores


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
