"""The one training loop, after the stages of main.py (data, autoencoder, latents) and before its forecasts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import configs
import data
import sample
from batches.batch import Batch
from batches.stream import describe_stream_batch, loss_parts
from batches.windows import Windows, describe_batch, share, spaced_windows
from configs import Config
from forecaster import Forecaster, build_net
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


# ----------------------------------------------------------------------------------------------------------- the training
class Learner(NamedTuple):
    """All that an update changes. weights, ema: {name: tensor}, the network's own and their running average."""

    net: nn.Module  # spread over the processes
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer


def begin(config: Config, process: Process, dir: Path, start: dict | None) -> Learner:
    """From new weights, from a checkpoint of this run, or from another run's weights (--ckpt)."""
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


def fit(
    config: Config,
    source: data.Source,
    autoencoder: nn.Module,
    windows: Windows | None,
    process: Process,
    dir: Path,
    start: dict | None,
) -> Path:
    """Train the velocity network to config.train.steps; -> its checkpoint."""
    train, device = config.train, process.device
    learner = begin(config, process, dir, start)
    step = first_step(start, process, dir)
    source.load_state_dict(start.get("replay") if start else None)
    if step >= train.steps:
        return dir / "latest.pt"
    shown = (
        build_net(config, device).eval() if process.first else None
    )  # with the averages, for previews
    forecaster = Forecaster(config, shown, autoencoder, device)
    parts, asked = loss_parts(config, share(train.batch_size, process.rank, process.world)), 0
    with (
        logs.Log(dir, config, step, enabled=process.first) as log,
        StopSignals(process) as signals,
        progress(train.steps, f"train {config.run_id}", "step", step) as bar,
    ):
        since = logs.Recent(train.batch_size, parts)
        if start and "recent" in start:
            since.load_state_dict(start["recent"], device)
        for batch in source.batches(step, train.steps):
            losses, norm = update(learner.net, learner.optimizer, forecaster, batch, step, process)
            since.add(losses.mean(), norm, *(losses[part].mean() for part in parts.values()))
            average(parallel.local(learner.ema), parallel.local(learner.weights), step, train.ema)
            step += 1
            bar.update()
            last = step == train.steps
            asked = signals.agreed(step, last)
            to_save = step % train.save_every == 0 or last or asked
            if step % train.log_every == 0 or to_save:
                values = summary(since, config, step, windows, dir)
                if step % train.log_every == 0 or last:
                    log.row(step, **values, lr=learner.optimizer.param_groups[0]["lr"])
                    since.clear()
                bar.set_postfix_str(f"loss {values.get('loss', math.nan):.4f}")
            if to_save:
                save(
                    dir, config, learner, autoencoder, step, since, process, source.state_dict(step)
                )
                # The others wait for the disk here, not in the next gradient: its timeout is short.
                process.barrier()
            if asked:
                break
            if train.sample_every and step % train.sample_every == 0 and not last:
                averages = parallel.whole(learner.ema, process.first)
                if process.first:
                    preview(forecaster, averages, config, windows, step, dir, log)
                process.barrier()
    process.barrier()  # until the first has saved and closed its log: a launcher ends all where one has ended
    if asked:
        raise stopped(asked, step, dir)
    return dir / "latest.pt"


def update(
    net: nn.Module, optimizer, forecaster: Forecaster, batch: Batch, step: int, process: Process
) -> tuple[Tensor, Tensor]:
    """One update of the weights; -> (losses (b,), norm of the gradient), which stay on the device. Where the norm is not finite
    the weights stay as they are: on all processes alike, since the gradient is the same on all."""
    train = forecaster.config.train
    torch.manual_seed(seed_of(train.seed, "dropout", step, process.rank))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, train.lr, train.steps, train.warmup, train.schedule)
    buffers = [
        buffer for buffer in net.buffers() if buffer.is_floating_point()
    ]  # of batch normalisation
    before = [buffer.clone() for buffer in buffers]
    noise = generator(process.device, train.seed, "noise", step, 0)
    parts, losses = (
        flow_batch(forecaster, batch, noise, share(train.batch_size, process.rank, process.world)),
        [],
    )
    for k, part in enumerate(parts, 1):
        with parallel.last_of_step(net, k == len(parts)):
            losses.append(flow_loss(net, forecaster, *part))
            (losses[-1].mean() / len(parts)).backward()
    norm = parallel.plain(nn.utils.clip_grad_norm_(net.parameters(), train.clip_norm))
    optimizer.found_inf = (
        ~norm.isfinite()
    ).float()  # heeded by the fused step, so that nobody waits for it
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(norm.isfinite(), buffer, old))
    return torch.cat(losses).detach(), norm


def first_step(start: dict | None, process: Process, dir: Path) -> int:
    """Updates done, the same on all processes."""
    step = start["step"] if start else 0
    if process.agree(step) != step:
        raise Failure(
            f"process {process.rank} read update {step} from {dir}, the first another: is it the same folder on all "
            "machines?"
        )
    return step


def summary(
    since: logs.Recent, config: Config, step: int, windows: Windows | None, dir: Path
) -> dict[str, float]:
    """What there is to log; Failure where no gradient has been finite for too long."""
    values = since.summary()
    if since.longest[0] >= config.train.max_bad_steps:
        raise not_finite(config, since.longest[0], step - since.longest[1], windows, dir)
    return values


def not_finite(config: Config, count: int, k: int, windows: Windows | None, dir: Path) -> Failure:
    """What to tell of batch k, the first of `count` in a row."""
    found = max(dir.glob("step_*.pt"), default="none yet")
    shards = data.open_split(config, "train")
    clips = config.data.mode == "clips"
    source = (
        describe_batch(config, shards, k, windows)
        if clips
        else describe_stream_batch(config, shards, k)
    )
    return Failure(
        f"no finite gradient in {count} updates in a row, from update {k + 1} on, whose batch "
        f"is of {source}; last good checkpoint: {found}; lower train.lr, or look at the data"
    )


def flow_batch(
    forecaster: Forecaster, batch: Batch, generator: torch.Generator, share: slice
) -> list[tuple[Tensor, ...]]:
    """What flow_loss takes, in train.accumulate parts. Flow times and noise are drawn for the whole batch, of which this
    process has `share`: they do not depend on how many there are."""
    config = forecaster.config
    x1, x0, context = (forecaster.normalize(z) for z in batch[:3])
    s = flow_times(config.flow, config.train.batch_size, generator, x1.device)[share]
    eps = torch.randn(
        config.train.batch_size, *x1.shape[1:], generator=generator, device=x1.device
    )[share]
    x, target = forecaster.interpolant.interpolate(s, x0, x1, eps)
    return list(
        zip(
            *(
                values.chunk(config.train.accumulate)
                for values in (x, target, s, x0, context, batch[3])
            )
        )
    )


def flow_loss(
    net: nn.Module,
    forecaster: Forecaster,
    x: Tensor,
    target: Tensor,
    s: Tensor,
    x0: Tensor,
    context: Tensor,
    gap: Tensor,
) -> Tensor:
    """Weighted squared errors (b,) of the network's output against the interpolant's target (arXiv 2403.13724, eq. 11)."""
    interpolant = forecaster.interpolant
    with autocast(forecaster.config.train.precision, x.device):
        output = net(interpolant.network_input(x, s, x0), s, x0, context, gap)
    return interpolant.weight(s) * (output.float() - target).square().mean((1, 2, 3))


def flow_times(
    flow: configs.Flow, B: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """(B,) in [s_min, 1 - s_min]"""
    if flow.times == "logit_normal":
        return (
            torch.randn(B, generator=generator, device=device)
            .sigmoid()
            .clamp(flow.s_min, 1 - flow.s_min)
        )
    return torch.rand(B, generator=generator, device=device) * (1 - 2 * flow.s_min) + flow.s_min


@torch.no_grad()
def average(ema: dict[str, Tensor], own: dict[str, Tensor], step: int, decay: float) -> None:
    """Averaged weights, from the first update on: the decay rises as (1 + n) / (10 + n), so that the initial weights
    are soon forgotten. Integer buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    floats = [name for name, value in ema.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[name] for name in floats], [own[name] for name in floats], 1 - decay)
    for name in ema.keys() - set(floats):
        ema[name].copy_(own[name])


# ------------------------------------------------------------------------------------------------------- checkpoints
def save(
    dir: Path,
    config: Config,
    learner: Learner,
    autoencoder: nn.Module,
    step: int,
    since: logs.Recent,
    process: Process,
    replay: dict | None,
) -> None:
    """All processes call it, since each may hold a part; the first writes."""
    trained = {"model": learner.weights, "ema": learner.ema, "opt": learner.optimizer.state_dict()}
    trained = parallel.whole(trained, process.first)
    if not process.first:
        return
    state = {
        **trained,
        "step": step,
        "recent": since.state_dict(),
        "config": configs.to_dict(config),
        "rng": {"seed": config.train.seed},
        "replay": replay,
    }
    if (
        config.vqvae.kind == "small"
    ):  # ours is small: the checkpoint is then all that sampling needs
        state["vqvae"] = autoencoder.state_dict()
    checkpoints.save_checkpoint(dir, state, config.train.keep, config.train.keep_every)


def preview(
    forecaster: Forecaster,
    ema: dict,
    config: Config,
    windows: Windows | None,
    step: int,
    dir: Path,
    log: logs.Log,
) -> None:
    """A few forecasts by the averaged weights, as a picture beside the checkpoints and a video in wandb."""
    forecaster.net.load_state_dict(ema)
    shards = data.open_split(config, config.sample.split)
    given = config.data.condition
    clips = windows or spaced_windows(
        shards.lengths, given + config.data.predict, config.data.skip, 4
    )
    truth = data.read_clips(shards, clips)[:4]
    futures = forecaster.forecast(
        truth[:, :given], config.data.predict, 2, (config.train.seed, "preview"), quiet=True
    )
    truth = forecaster.shown(truth)
    videos.contact_sheet(truth, futures).save(dir / f"forecasts_{step:08d}.png")
    result = sample.score(truth, futures)
    log.row(
        step,
        sample_crps=result["summary"]["crps"]["mean"],
        sample_psnr=result["summary"]["psnr"]["mean"],
        sample_crps_ratio=result["ratio_to_repeat_last"]["crps"]["all"],
    )
    log.video(step, "forecasts", videos.mosaic(truth, futures, rows=4), shards.fps or 10)
