"""The one training loop, with the stages before it (data, autoencoder, latents) and after it (forecasts, a table).

Every stage keeps what it has finished, so the same command run again goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import configs
import data
import pictures
import runtime
import sample
import vqvae
from configs import Config, Latent
from console import UserError, progress
from runtime import Process
from shards import Shards

OVERFIT_CLIPS = 4
# what may change between two starts of a run without making it another run
FREE = {"data.workers", "train.steps", "train.log_every", "train.sample_every", "train.save_every", "train.keep"}


def run(config: Config, ckpt: str | None = None) -> None:
    """All stages of `python main.py`."""
    process, clock = runtime.start(), Clock()
    ensure_data(config, process)
    clock.lap("data")
    shards = sample.open_split(config, "train")
    # found out now rather than after the training
    held_out = sample.open_split(config, "train" if config.train.overfit else config.sample.split)
    data.check_long_enough(held_out, config.data.condition + config.data.predict, config.data.skip,
                           "data.condition + data.predict")
    autoencoder = ensure_vqvae(config, shards, process)
    clock.lap("VQVAE")
    windows = overfit_windows(config, shards) if config.train.overfit else None
    source = batches_from(config, shards, autoencoder, windows, process)
    config = dataclasses.replace(config, latent=process.agree(measure(config, source)))
    clock.lap("latents")
    path = fit(config, source, autoencoder, windows, process, ckpt)
    clock.lap("training")
    if process.first:
        forecaster, step = sample.load(path, process.device)
        if windows is not None:
            forecaster.config = configs.update(forecaster.config, {"sample.split": "train"})
        result, out = sample.evaluate(forecaster, step, windows=windows, ckpt=path)
        clock.lap("sampling")
        print(sample.table(result))
        print(sample.paths(out, config.sample.format, path))
        print(clock)
    process.barrier()


class Clock:
    """Seconds of each stage."""

    def __init__(self):
        self.last, self.laps = time.perf_counter(), []

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps.append((name, now - self.last))
        self.last = now

    def __str__(self) -> str:
        return "time           " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.laps)


# -------------------------------------------------------------------------------------------------- before the training
def missing(config: Config) -> list[str]:
    """What a run needs and neither finds nor can make, each with the command that makes or fetches it."""
    found, root = [], Path(config.data.root)
    if not config.data.generate and not any((root / "train").glob("shard_*.hdf5")):
        command = configs.PREPARE[config.dataset].format(root=root, size=config.data.image_size)
        found.append(f"no shards {root / 'train' / 'shard_*.hdf5'} (make them: {command})")
    if config.vqvae.ckpt and not Path(config.vqvae.ckpt).is_file():
        command = configs.FETCH.get(config.dataset)
        fetch = f"fetch them: {command}, then --set vqvae.ckpt=FILE; " if command else ""
        found.append(f"no VQVAE weights {config.vqvae.ckpt} ({fetch}or train our own: "
                     "--set vqvae.kind=small vqvae.ckpt=)")
    return found


def ensure_data(config: Config, process: Process) -> None:
    if problems := missing(config):
        raise UserError(f"--dataset {config.dataset}, looked in {Path.cwd()}: " + "; ".join(problems))
    if config.data.generate == "balls" and not Path(config.data.root).exists() and process.first:
        from prepare import balls
        counts = {"train": config.data.stream, "val": config.data.held_out, "test": config.data.held_out}
        balls.make(config.data.root, counts, config.data.color_shift, config.train.seed, f"main.py --dataset {config.dataset}")
    process.barrier()


def ensure_vqvae(config: Config, shards: Shards, process: Process) -> nn.Module:
    """The frozen autoencoder, trained first where it is our own and absent."""
    path = config.vqvae.ckpt
    if not path:
        if process.first:
            path = vqvae.train(config, shards, sample.open_split(config, held_out_split(config)), process.device)
        path = process.agree(path)
    return vqvae.freeze(vqvae.load(path, config.vqvae.kind), process.device)


def held_out_split(config: Config) -> str:
    return next(s for s in ("val", "test", "train") if any((Path(config.data.root) / s).glob("shard_*.hdf5")))


def overfit_windows(config: Config, shards: Shards) -> data.Windows:
    return data.spaced_windows(shards.lengths, config.data.condition + config.data.predict, config.data.skip, OVERFIT_CLIPS)


Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # target, reference, context (B, C, h, w), gap (B,)


def batches_from(config: Config, shards: Shards, autoencoder: nn.Module, windows: data.Windows | None,
                 process: Process) -> Callable[[int, int], Iterator[Batch]]:
    """batches(start, stop), from the latent cache, or from frames where augmentation forbids one."""
    if config.data.augmented and windows is None:
        frames = data.FrameTriples(config, shards, process.rank, process.world)
        return lambda start, stop: frames.batches(start, stop, autoencoder.encode, process.device)
    weights = runtime.digest(autoencoder)
    if process.first:
        data.cache_latents(shards, autoencoder.encode, weights, config.output.root, process.device)
    process.barrier()
    dir = data.latent_dir(shards, weights, config.output.root)
    return data.LatentTriples(config, dir, process.device, process.rank, process.world, windows).batches


def measure(config: Config, batches: Callable[[int, int], Iterator[Batch]]) -> Latent:
    """Shape and statistics of the latents, from the first batches: some 4,000 triples or 8 batches."""
    count = max(1, min(64, 4096 // config.train.batch_size)) if not config.data.augmented else 1
    pairs = [(target, reference) for target, reference, _, _ in batches(0, count)]
    x1, x0 = (torch.cat(part).double() for part in zip(*pairs))
    C = x1.shape[1]
    mean, std = torch.zeros(C, dtype=x1.dtype), torch.ones(C, dtype=x1.dtype)
    if config.flow.normalize:
        mean, std = (v.cpu() for v in (x1.mean((0, 2, 3)), x1.std((0, 2, 3))))
    delta = ((x1 - x0) / std.to(x1).view(-1, 1, 1)).square().mean().sqrt().item()
    return Latent(tuple(x1.shape[1:]), tuple(mean.tolist()), tuple(std.tolist()), delta)


# ----------------------------------------------------------------------------------------------------------- the training
def fit(config: Config, batches: Callable[[int, int], Iterator[Batch]], autoencoder: nn.Module,
        windows: data.Windows | None, process: Process, ckpt: str | None) -> Path:
    """Train the velocity network to config.train.steps; -> its checkpoint."""
    train, device, dir = config.train, process.device, Path(config.output.root) / "checkpoints" / config.run_id
    torch.manual_seed(runtime.seed_of(train.seed, "weights"))
    net = sample.build_net(config, device)
    ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), train.lr, betas=(0.9, 0.99), weight_decay=train.weight_decay, fused=True)
    state = runtime.resume(dir, device)
    step = restore(state, config, net, ema, optimizer, dir) if state else 0
    if not state and ckpt:
        start_from(ckpt, net, ema)
    if step >= train.steps:
        return dir / "latest.pt"
    forecaster = sample.Forecaster(config, sample.build_net(config, device).eval(), autoencoder, device)
    ddp = nn.parallel.DistributedDataParallel(net) if process.world > 1 else net
    log = runtime.Log(dir, config, step, enabled=process.first)
    losses, norms, began, first = [], [], time.perf_counter(), step
    with progress(train.steps, f"train {config.run_id}", "step", step) as bar:
        for batch in batches(step, train.steps):
            torch.manual_seed(runtime.seed_of(train.seed, "dropout", step, process.rank))
            for group in optimizer.param_groups:
                group["lr"] = runtime.learning_rate(step, train.lr, train.steps, train.warmup, train.schedule)
            loss = flow_loss(ddp, forecaster, batch, runtime.generator(device, train.seed, "noise", step, process.rank))
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), train.clip_norm))
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average(ema, net, step, train.ema)
            step += 1
            bar.update()
            if step % train.log_every == 0 or step == train.steps:
                values = torch.stack([torch.stack(losses).mean(), torch.stack(norms).mean()]).tolist()
                rate = (step - first) * train.batch_size / (time.perf_counter() - began)
                log.row(step, loss=values[0], grad_norm=values[1], lr=group["lr"], samples_per_second=rate)
                bar.set_postfix_str(f"loss {values[0]:.4f}")
                losses, norms = [], []
            last = step == train.steps
            if process.first and (step % train.save_every == 0 or last):
                save(dir, config, net, ema, optimizer, autoencoder, step)
            if process.first and train.sample_every and step % train.sample_every == 0 and not last:
                preview(forecaster, ema, config, windows, step, dir, log)
    process.barrier()
    log.close()
    return dir / "latest.pt"


def flow_loss(net: nn.Module, forecaster: sample.Forecaster, batch: Batch, generator: torch.Generator) -> Tensor:
    """Weighted squared error of the network's output against the interpolant's target (arXiv 2403.13724, eq. 11)."""
    config, interpolant = forecaster.config, forecaster.interpolant
    x1, x0, context = (forecaster.normalize(z) for z in batch[:3])
    s = torch.rand(len(x1), generator=generator, device=x1.device) * (1 - 2 * config.flow.s_min) + config.flow.s_min
    x, target = interpolant.interpolate(s, x0, x1, sample.normal(x1, generator))
    with runtime.autocast(config.train.precision, x1.device):
        output = net(interpolant.network_input(x, s, x0), s, x0, context, batch[3])
    return (interpolant.weight(s) * (output.float() - target).square().mean((1, 2, 3))).mean()


@torch.no_grad()
def average(ema: dict[str, Tensor], net: nn.Module, step: int, decay: float) -> None:
    """Averaged weights, from the first update on: the decay rises as (1 + n) / (10 + n), so that the initial weights
    are soon forgotten. Integer buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    own = net.state_dict()
    floats = [name for name, value in ema.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[name] for name in floats], [own[name] for name in floats], 1 - decay)
    for name in ema.keys() - set(floats):
        ema[name].copy_(own[name])


# ------------------------------------------------------------------------------------------------------- checkpoints
def save(dir: Path, config: Config, net: nn.Module, ema: dict, optimizer, autoencoder: nn.Module, step: int) -> None:
    state = {"model": net.state_dict(), "ema": ema, "opt": optimizer.state_dict(), "step": step,
             "config": configs.to_dict(config), "rng": {"seed": config.train.seed}, "replay": None}
    if config.vqvae.kind == "small":  # ours is small: the checkpoint is then all that sampling needs
        state["vqvae"] = autoencoder.state_dict()
    runtime.save_checkpoint(dir, state, config.train.keep)


def restore(state: dict, config: Config, net: nn.Module, ema: dict, optimizer, dir: Path) -> int:
    """Put a checkpoint back into place; -> updates done. A run of other settings is an error, not a mixture."""
    old = configs.from_dict(state["config"])
    changed = [d for d in configs.differences(old, config, ("data", "vqvae", "model", "flow", "train", "latent"))
               if d.partition(":")[0] not in FREE]
    if changed:
        raise UserError(f"{dir} holds a run of other settings ({'; '.join(changed[:3])}); "
                        "go on with those, or name a new run: --set output.run_id=NAME")
    runtime.load_weights(net, state["model"], dir)
    for name in ema:
        ema[name].copy_(state["ema"][name])
    optimizer.load_state_dict(state["opt"])
    return state["step"]


def start_from(ckpt: str, net: nn.Module, ema: dict) -> None:
    """--ckpt: begin a new run from another's averaged weights."""
    state = runtime.load_checkpoint(ckpt)
    if "ema" not in state:
        raise UserError(f"{ckpt}: not a checkpoint of main.py (it lacks ema)")
    runtime.load_weights(net, state["ema"], ckpt)
    for name in ema:
        ema[name].copy_(state["ema"][name])


def preview(forecaster: sample.Forecaster, ema: dict, config: Config, windows: data.Windows | None, step: int, dir: Path,
            log: runtime.Log) -> None:
    """A few forecasts by the averaged weights, as a picture beside the checkpoints and a video in wandb."""
    forecaster.net.load_state_dict(ema)
    shards = sample.open_split(config, "train" if windows is not None else config.sample.split)
    clips = windows or data.spaced_windows(shards.lengths, config.data.condition + config.data.predict, config.data.skip, 4)
    truth = sample.read_clips(shards, clips)[:4]
    futures = forecaster.forecast(truth[:, :config.data.condition], config.data.predict, 2, (config.train.seed, "preview"),
                                  quiet=True)
    pictures.contact_sheet(truth, futures).save(dir / f"forecasts_{step:08d}.png")
    log.row(step, **{f"sample_{k}": float(v) for k, v in preview_metrics(truth, futures).items()})
    log.video(step, "forecasts", pictures.mosaic(truth, futures, rows=4), shards.fps or 10)


def preview_metrics(truth: np.ndarray, futures: np.ndarray) -> dict[str, float]:
    result = sample.score(truth, futures, truth.mean((0, 1)).astype(np.uint8))
    return {"crps": result["summary"]["crps"]["mean"], "psnr": result["summary"]["psnr"]["mean"],
            "crps_ratio": result["ratio_to_repeat_last"]["crps"]["all"]}


def plan(config: Config) -> list[str]:
    """--dry_run: what a run would do, without doing it."""
    root, dir = Path(config.data.root), Path(config.output.root) / "checkpoints" / config.run_id
    lines = [f"missing: {problem}" for problem in missing(config)]
    if not lines and not root.exists():
        lines.append(f"generate the {config.data.generate} stream in {root}")
    if not config.vqvae.ckpt:
        lines.append(f"train the small VQVAE for {config.vqvae.steps} updates, unless it is there")
    if not config.data.augmented:
        lines.append(f"encode every frame once, under {Path(config.output.root) / 'latents'}")
    state = runtime.resume(dir)
    done = f", of which {state['step']} are done" if state else ""
    lines.append(f"train {config.model.name} ({config.flow.interpolant}) for {config.train.steps} updates{done}, in {dir}")
    lines.append(f"forecast {config.sample.num_videos} {config.sample.split} clips, {config.sample.num_samples} futures each")
    return lines
