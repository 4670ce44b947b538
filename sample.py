"""The autoregressive roll-out, and the command that turns a checkpoint into forecasts.

    python sample.py --ckpt outputs/checkpoints/ball_stn-follmer-0/latest.pt

writes samples as arrays, a video per forecast with the truth beside it, a contact sheet and metrics.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import configs
import data
import figures
import interpolants
import metrics
import models
import pages
import parallel
import pictures
import protocols
import published
import runtime
import vqvae
from configs import Config
from console import UserError, progress, run_command
from interpolants import Interpolant
from models.joint import apart, below
from shards import Shards
from solvers import integrate


# ------------------------------------------------------------------------------------------------------------- roll-out
class Forecaster:
    """A trained network with all that it takes to forecast pixels: config, interpolant, autoencoder, normalisation."""

    def __init__(self, config: Config, net: nn.Module, autoencoder: nn.Module, device: torch.device):
        self.config, self.net, self.autoencoder, self.device = config, net, autoencoder, device
        self.interpolant = make_interpolant(config)
        self.latents: list[np.ndarray] = []  # of the last forecast, where the data are latents
        self.evaluations = 0  # of the network, over the forecasts made so far
        self.ready = False  # has `prepare` been called
        self.compiled, self.graphs = False, False  # is the network compiled; is it replayed as CUDA graphs
        self.rows = 0  # of the batch that a compiled network takes
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (config.latent.mean, config.latent.std))

    def prepare(self, rows: int) -> None:
        """Before a roll-out of `rows` videos: cast and compile the network at the first call."""
        self.rows = max(self.rows, rows)
        if self.ready:
            return
        if runtime.uses_bf16(self.config.train.precision, self.device):
            runtime.cast_weights(self.net, torch.bfloat16)
        mode = parallel.compiled([self.net], self.config.sample.compile, self.config.model.name, self.device)
        self.ready, self.compiled, self.graphs = True, mode != "off", mode in configs.GRAPHS

    def normalize(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def to_pixels(self, z: Tensor) -> Tensor:
        parts = (z * self.std + self.mean).split(max(1, (1 << 21) // self.config.data.image_size ** 2))  # as memory allows
        return torch.cat([self.autoencoder.decode(part) for part in parts])

    def field(self, x0: Tensor, context: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[Tensor, float], Tensor]:
        """field(x, s) for one frame; context() -> (context latents, gap), drawn anew at each call or not."""
        B = len(x0)

        def evaluate(x: Tensor, s: float) -> Tensor:
            self.evaluations += B
            z = self.interpolant.network_input(x, s, x0)
            frame, gap = context()
            inputs = (z, torch.full((B,), s, device=self.device), x0, frame, gap)
            if self.compiled:
                # A graph is compiled for one batch size, for one layout in memory, and for inputs that share no
                # memory. So a smaller batch repeats its last row, and every input is a copy.
                rows = torch.arange(self.rows, device=self.device).clamp(max=B - 1)
                inputs = [part[rows] for part in inputs]
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with runtime.autocast(self.config.train.precision, self.device):
                output = self.net(*inputs)
            # A CUDA graph writes its next output into the same memory.
            output = output.clone() if self.graphs else output
            return output[:B].float()
        return evaluate

    def sample_frame(self, x0: Tensor, context: Callable[[], tuple[Tensor, Tensor]],
                     noise: torch.Generator) -> Tensor:
        """x_1 given the reference x0, (B, C, h, w), by the config's sampler."""
        sample = self.config.sample
        return integrate(self.field(x0, context), self.interpolant, x0, sample.steps, sample.solver,
                         self.config.diffusion, noise, grid=sample.grid, warm_start=sample.warm_start,
                         first=sample.first, tolerance=sample.tolerance, float_times=True)

    @torch.no_grad()
    def roll_out(self, given: Tensor, frames: int, key: tuple, bar=None) -> Tensor:
        """given: (B, T, C, h, w) normalised latents -> the next `frames`, (B, frames, C, h, w). key seeds the noise."""
        B, T, *shape = given.shape
        sample = self.config.sample
        self.prepare(B)
        if self.config.halves:
            return self.roll_out_halves(given, frames, key, bar)
        history = torch.empty(B, T + frames, *shape, device=self.device)
        history[:, :T] = given
        noise, places = runtime.generator(self.device, *key), runtime.generator(self.device, *key, "context")
        rows = torch.arange(B, device=self.device)
        for t in range(T, T + frames):
            def draw(t: int = t) -> tuple[Tensor, Tensor]:
                # after a single frame the reference is its own context
                gap = data.gaps(torch.rand(B, generator=places, device=self.device), max(t - 1, 1), sample.context)
                return history[rows, (t - 1 - gap).clamp(min=0)], gap.float()
            once = draw() if sample.redraw == "frame" else None
            x0 = history[:, t - 1]
            x1 = self.sample_frame(x0, draw if once is None else lambda once=once: once, noise)
            # what follows is forecast from a frame that the autoencoder knows, as in training
            history[:, t] = self.normalize(self.autoencoder.encode(self.to_pixels(x1))) if sample.reencode else x1
            if bar is not None:
                bar.update(B)
        return history[:, T:]

    def roll_out_halves(self, given: Tensor, frames: int, key: tuple, bar=None) -> Tensor:
        """roll_out of a network that forecasts several frames at once, given several: what is too many at the end is cut."""
        B, T, _, h, _ = given.shape
        sample, (past, future) = self.config.sample, self.config.halves
        noise, gap = runtime.generator(self.device, *key), torch.ones(B, device=self.device)
        history = given
        while history.shape[1] < T + frames:
            context, x0 = below(history[:, -past:]), below(history[:, -1:].expand(-1, future, -1, -1, -1))
            x1 = self.sample_frame(x0, lambda context=context: (context, gap), noise)
            x1 = apart(x1, h)[:, :T + frames - history.shape[1]]
            if sample.reencode:
                x1 = self.normalize(self.autoencoder.encode(self.to_pixels(x1.flatten(0, 1)))).unflatten(0, (B, -1))
            history = torch.cat([history, x1], 1)
            if bar is not None:
                bar.update(B * x1.shape[1])
        return history[:, T:]

    @torch.no_grad()
    def shown(self, frames: np.ndarray) -> np.ndarray:
        """What a shard holds, (V, T, H, W, 3) uint8 or latents (V, T, C, h, w), as frames to look at, (V, T, H, W, 3) uint8."""
        if frames.dtype == np.uint8:
            return frames
        parts = [data.to_frames(self.autoencoder.decode(torch.from_numpy(z).to(self.device, torch.float32))) for z in frames]
        return np.stack(parts)

    @torch.no_grad()
    def forecast(self, frames: np.ndarray, predict: int, futures: int, key: tuple, quiet: bool = False) -> np.ndarray:
        """(V, T, H, W, 3) uint8 given frames, or latents as stored, -> (V, futures, predict, H, W, 3) uint8. Where the data are
        latents, self.latents has the forecast ones after it."""
        V, T = frames.shape[:2]
        z = torch.from_numpy(data.encode_frames(self.autoencoder.encode, frames.reshape(-1, *frames.shape[2:]), self.device))
        z = self.normalize(z.to(self.device, torch.float32)).unflatten(0, (V, T)).repeat_interleave(futures, 0)
        out = np.empty((V * futures, predict, *self.shown(frames[:1, :1]).shape[2:]), np.uint8)
        self.latents = []
        size = self.config.sample.batch
        bar = progress(len(z) * predict, "sample", "frame") if not quiet else None
        for start in range(0, len(z), size):
            part = z[start:start + size]
            future = self.roll_out(part, predict, (*key, start), bar)
            for k in range(predict):
                out[start:start + size, k] = data.to_frames(self.to_pixels(future[:, k]))
            if self.config.vqvae.kind == "latents":
                self.latents.append((future * self.std + self.mean).half().cpu().numpy())
        if bar is not None:
            bar.close()
        return out.reshape(V, futures, *out.shape[1:])


def make_interpolant(config: Config) -> Interpolant:
    """The config's interpolant; its k is measured: the standard deviation of x_1 - x_0, or of x_1."""
    flow = config.flow
    k = config.latent.delta if interpolants.TABLE[flow.interpolant].from_reference else config.latent.scale
    return interpolants.get(flow.interpolant, flow.c, flow.output, k, flow.weight)


def build_net(config: Config, device: torch.device) -> nn.Module:
    sizes = dataclasses.asdict(config.model)
    del sizes["size"]
    if sizes["name"] != "uvit":
        del sizes["out_norm"]
    if config.halves:
        sizes |= dict(zip(("given", "future"), config.halves))
    net = models.build(sizes.pop("name"), latent_shape=config.latent.shape, **sizes)
    return net.to(device, memory_format=torch.channels_last)


def load(path: str | Path, device: torch.device, overrides: dict | None = None, dataset: str = "",
         interpolant: str = "") -> tuple[Forecaster, int]:
    """-> the forecaster of a checkpoint, with its averaged weights, and the number of updates behind them. What a file that
    others published does not say of itself, `dataset`, `interpolant` and `overrides` say."""
    state, overrides = runtime.load_checkpoint(path), overrides or {}
    free = ("data.", "sample.", "output.", "vqvae.ckpt", "train.precision", "train.seed")
    if published.is_foreign(state):
        state = published.checkpoint(state, path, dataset, {"flow.interpolant": interpolant, **overrides})
        free += ("vqvae.", "flow.interpolant", "model.")
    if missing := {"ema", "config", "step"} - state.keys():
        raise UserError(f"{path}: not a checkpoint of main.py (it lacks {', '.join(sorted(missing))})")
    if fixed := [name for name in overrides if not name.startswith(free)]:
        raise UserError(f"{fixed[0]} belongs to the training of {path} and cannot be changed when sampling from it")
    config = configs.update(configs.from_dict(state["config"]), overrides)
    for flag, asked, own in (("dataset", dataset, config.dataset), ("interpolant", interpolant, config.flow.interpolant)):
        if asked and asked != own:
            raise UserError(f"{path} was trained with --{flag} {own}, so {asked} does not go with it")
    if not config.latent.shape:
        raise UserError(f"{path}: a VQVAE's checkpoint, not a velocity network's")
    net = build_net(config, device)
    runtime.load_weights(net, state["ema"], path)
    if "vqvae" in state:
        autoencoder = vqvae.build(config.vqvae)
        runtime.load_weights(autoencoder, state["vqvae"], path)
    elif config.vqvae.ckpt or config.vqvae.kind == "latents":
        autoencoder = vqvae.load(config.vqvae.ckpt, config.vqvae.kind)
    else:
        raise UserError(f"{path} does not hold its autoencoder; name it: --set vqvae.kind=KIND vqvae.ckpt=FILE")
    autoencoder = vqvae.freeze(autoencoder, device, config.train.precision)
    return Forecaster(config, net.eval(), autoencoder, device), state["step"]


# ------------------------------------------------------------------------------------------------------------- results
def read_clips(shards: Shards, windows: data.Windows) -> np.ndarray:
    """(V, clip, H, W, 3) uint8"""
    offsets = np.arange(windows.clip) * windows.stride
    return np.stack([shards.read(v, start + offsets) for v, start in zip(windows.video, windows.start)])


def mean_frame(shards: Shards, shown: Callable[[np.ndarray], np.ndarray] = lambda frames: frames) -> np.ndarray:
    """The mean over (at most 2,000 of) a split's frames, (H, W, 3) uint8. shown: Forecaster's, where shards hold latents."""
    frames = vqvae.random_frames(shards, min(2_000, int(shards.lengths.sum())), np.random.default_rng(0))
    return shown(frames[None])[0].mean(0).round().astype(np.uint8)


SCORES = {"mse": lambda x, y: metrics.mse(x, y).mean(1), "psnr": lambda x, y: metrics.psnr(x, y).mean(1), "crps": metrics.crps}


def score(truth: np.ndarray, samples: np.ndarray, mean: np.ndarray | None = None) -> dict:
    """Metrics per horizon of samples (V, S, T, H, W, 3) against the last T frames of truth, and of the baselines: repeat
    the last given frame, and `mean` (H, W, 3) if there is one."""
    T = samples.shape[2]
    rows: dict[str, list] = {}
    for clip, futures in zip(truth, samples):  # video by video: float copies of all at once could fill the memory
        y = clip[None, -T:].astype(np.float32) / 255
        forecasts = {"": futures[None], "_repeat_last": clip[-T - 1][None, None, None].repeat(T, 2)}
        if mean is not None:
            forecasts["_mean_frame"] = mean[None, None, None].repeat(T, 2)
        for suffix, frames in forecasts.items():
            x = frames.astype(np.float32) / 255
            for name, metric in SCORES.items():
                rows.setdefault(name + suffix, []).append(metric(x, y)[0])
    table = {name: np.stack(values) for name, values in rows.items()}
    ratio = {name: {"all": float(table[name].mean() / max(table[f"{name}_repeat_last"].mean(), 1e-12)),
                    "horizon": (table[name].mean(0) / table[f"{name}_repeat_last"].mean(0).clip(1e-12)).tolist()}
             for name in ("mse", "crps")}
    return {"summary": {name: metrics.summarize(values) for name, values in table.items()},
            "ratio_to_repeat_last": ratio, "horizon": {name: values.mean(0).tolist() for name, values in table.items()}}


def results_dir(forecaster: Forecaster, step: int) -> Path:
    config, sample = forecaster.config, forecaster.config.sample
    sampler = f"{config.model.name}-{step}_{sample.solver}-{config.diffusion}-{sample.steps}"
    usual = configs.Sample()
    sampler += "".join(f"_{name}-{getattr(sample, name)}" for name in ("grid", "warm_start", "redraw", "reencode", "first")
                       if getattr(sample, name) != getattr(usual, name))
    return Path(config.output.root) / "results" / config.run_id / sampler / f"{config.dataset}-{sample.split}"


def forecast_split(forecaster: Forecaster, windows: data.Windows | None = None,
                   quiet: bool = False) -> tuple[np.ndarray, np.ndarray, Shards]:
    """(truth (V, condition + predict, H, W, 3), samples (V, S, predict, H, W, 3), the shards of sample.split); without
    `windows`, sample.num_videos clips spread evenly over the split. Counts the network's evaluations anew."""
    config, sample = forecaster.config, forecaster.config.sample
    shards, clip = open_split(config, sample.split), config.data.condition + config.data.predict
    if windows is None:
        data.check_long_enough(shards, clip, config.data.skip, "data.condition + data.predict")
        windows = data.spaced_windows(shards.lengths, clip, config.data.skip, sample.num_videos)
    truth = read_clips(shards, windows)
    forecaster.evaluations = 0
    samples = forecaster.forecast(truth[:, :config.data.condition], config.data.predict, sample.num_samples,
                                  (config.train.seed, "sample"), quiet)
    return forecaster.shown(truth), samples, shards


def about(forecaster: Forecaster, step: int, ckpt: str | Path) -> dict:
    """How a checkpoint is sampled from, for metrics.json."""
    sample = forecaster.config.sample
    return {"solver": sample.solver, "diffusion": forecaster.config.diffusion, "steps": sample.steps, "grid": sample.grid,
            "warm_start": sample.warm_start, "context": sample.context, "redraw": sample.redraw, "reencode": sample.reencode,
            "checkpoint": str(ckpt), "updates": step}


def frame_rate(shards: Shards, config: Config) -> float:
    return (shards.fps or 10) / (config.data.skip + 1)


def evaluate(forecaster: Forecaster, step: int, out: Path | None = None, windows: data.Windows | None = None,
             ckpt: str | Path = "") -> tuple[dict, Path]:
    """Forecast held-out clips and write everything there is to look at; -> (metrics, folder). The folder appears when
    it is complete, in place of an earlier one of the same name."""
    config, sample = forecaster.config, forecaster.config.sample
    train = open_split(config, "train")
    truth, samples, shards = forecast_split(forecaster, windows)
    asked = protocols.Protocol("own", "the clips that sample.py takes", (), config.data.condition, config.data.predict,
                               sample.split, len(truth), sample.num_samples)
    protocol = {**about(forecaster, step, ckpt), **asked.told(list(SCORES)), "skip": config.data.skip,
                "fps": frame_rate(shards, config),
                "network_evaluations_per_frame": forecaster.evaluations / samples[..., 0, 0, 0].size}
    scores = score(truth, samples, mean_frame(train, forecaster.shown))
    result = {"protocol": protocol, "config": configs.to_dict(config), **scores}
    out = out or results_dir(forecaster, step)
    write_results(out, truth, samples, result, protocol["fps"], sample.format, forecaster.latents)
    return result, out


RESULTS = {"videos", "samples.npy", "latents.npy", "truth.npy", "contact_sheet.png", "forecasts.mp4", "forecasts.gif",
           "metrics.json", "curves.png", "rank_histogram.png", "index.html"}


def folder(name: str) -> Path:
    """That of a flag: one that can be renamed, no link and no dot."""
    path = Path(name)
    return path.resolve() if path.is_symlink() or not path.name or path.name == ".." else path


def check_out(out: Path) -> None:
    """That nothing else is overwritten; and what an interrupted swap set aside comes back."""
    if not out.exists() and beside(out, "old").exists():
        os.replace(beside(out, "old"), out)
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= RESULTS):
        raise UserError(f"{out} exists and holds other things than results; choose another folder by --out")


def beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{ending}")


def write_results(out: Path, truth: np.ndarray, samples: np.ndarray, result: dict, fps: float, format: str,
                  latents: Sequence[np.ndarray] = ()) -> None:
    """latents: those of the samples, in parts, where the data are latents."""
    format = pictures.usable_format(format)
    partial, old = beside(out, "partial"), beside(out, "old")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "videos").mkdir(parents=True)
    np.save(partial / "samples.npy", samples)
    np.save(partial / "truth.npy", truth)
    if latents:
        np.save(partial / "latents.npy", np.concatenate(latents).reshape(*samples.shape[:3], *latents[0].shape[2:]))
    elif (out / "latents.npy").exists():  # measured anew, the samples are the same
        shutil.copyfile(out / "latents.npy", partial / "latents.npy")
    shown = pictures.liveliest(truth, truth.shape[1] - samples.shape[2])[:6]
    pictures.contact_sheet(truth[shown], samples[shown]).save(partial / "contact_sheet.png")
    pictures.write_video(partial / f"forecasts.{format}", pictures.mosaic(truth[shown], samples[shown]), fps)
    with progress(len(truth), "write videos", "video") as bar:
        for k, (t, s) in enumerate(zip(truth, samples)):
            pictures.write_video(partial / "videos" / f"{k:03d}.{format}", pictures.side_by_side(t, s), fps)
            bar.update()
    (partial / "metrics.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    if figures.own(result["horizon"]):
        figures.curves(result["horizon"], partial / "curves.png", result.get("horizon_se"))
    if "rank_histogram" in result:
        figures.rank_histogram(np.array(result["rank_histogram"]), partial / "rank_histogram.png")
    pages.result_page(partial)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)  # killed here, check_out puts it back
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def open_split(config: Config, split: str) -> Shards:
    root = Path(config.data.root)
    if not any((root / split).glob("shard_*.hdf5")):
        there = [name for name in ("train", "val", "test") if any((root / name).glob("shard_*.hdf5"))]
        instead = f"; for {there[0]}: --set sample.split={there[0]}" if there else ""
        raise UserError(f"no shards in {root / split}; splits that are there: {', '.join(there) or 'none'}{instead}")
    if config.vqvae.kind == "latents":
        return Shards(root / split, "latents", config.data.skip_bad)
    shards = Shards(root / split, skip_bad=config.data.skip_bad)
    if shards.shape[:2] != (config.data.image_size,) * 2:
        raise UserError(f"{shards.dir}: frames of {shards.shape[1]}x{shards.shape[0]} pixels, but data.image_size is "
                        f"{config.data.image_size}; set it, or prepare the shards again")
    return shards


def table(result: dict) -> str:
    """What a person reads at the end of a run."""
    horizon, protocol = result["horizon"], result["protocol"]
    T = protocol["predict"]
    shown = sorted({t for t in (1, 2, 5, 10, 20, 30, T) if t <= T})
    head = f"{'frame':<24}" + "".join(f"{t:>9}" for t in shown) + f"{'all':>9}"
    lines = [f"{protocol['videos']} {protocol['split']} videos, {protocol['samples_per_video']} futures each, "
             f"{protocol['condition']} -> {T} frames, {protocol['solver']} solver, diffusion {protocol['diffusion']}, "
             f"{protocol['network_evaluations_per_frame']:.4g} network evaluations a frame", head, "-" * len(head)]
    for name, digits in (("crps", 4), ("mse", 4), ("psnr", 2)):
        for suffix, label in (("", ""), ("_repeat_last", " repeat last frame"), ("_mean_frame", " mean frame")):
            values = horizon[name + suffix]
            cells = [values[t - 1] for t in shown] + [float(np.mean(values))]
            lines.append(f"{name + label:<24}" + "".join(f"{v:>9.{digits}f}" for v in cells))
        if name in result["ratio_to_repeat_last"]:
            ratio = result["ratio_to_repeat_last"][name]
            cells = [ratio["horizon"][t - 1] for t in shown] + [ratio["all"]]
            lines.append(f"{name + ' / repeat last':<24}" + "".join(f"{v:>9.2f}" for v in cells))
    return "\n".join(lines)


def paths(out: Path, format: str, ckpt: str | Path) -> str:
    latents = [f"latents        {out / 'latents.npy'} (samples; pictures and metrics are of what they look like: through an "
               "AutoencoderKL, if vqvae.ckpt names the folder of one, else a linear preview)"]
    return "\n".join([*latents * (out / "latents.npy").exists(), f"page           {out / 'index.html'}",
                      f"video          {out / f'forecasts.{pictures.usable_format(format)}'}",
                      f"contact sheet  {out / 'contact_sheet.png'}",
                      f"metrics        {out / 'metrics.json'}", f"checkpoint     {ckpt}"])


FLAGS = {"num_videos": "sample.num_videos", "num_samples": "sample.num_samples", "num_frames": "data.predict",
         "steps": "sample.steps", "solver": "sample.solver", "diffusion": "sample.diffusion", "grid": "sample.grid",
         "warm_start": "sample.warm_start", "redraw": "sample.redraw", "split": "sample.split", "format": "sample.format"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python sample.py", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint of main.py, or one that others published (see README)")
    parser.add_argument("--dataset", default="", help="of a published checkpoint, which does not say it")
    parser.add_argument("--interpolant", default="", help="likewise")
    for flag, name in FLAGS.items():
        parser.add_argument(f"--{flag}", help=f"{name}; default: the checkpoint's")
    parser.add_argument("--out", help="folder to write; default: outputs/results/<run id>/<model>_<sampler>/<data>")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="GROUP.FIELD=VALUE",
                        help="any other field, e.g. data.root=DIR where the data has moved")
    args = parser.parse_args()
    given = [f"{name}={getattr(args, flag)}" for flag, name in FLAGS.items() if getattr(args, flag) is not None]
    process = runtime.start()
    forecaster, step = load(args.ckpt, process.device, configs.parse_overrides([*given, *args.set]),
                            args.dataset, args.interpolant)
    out = folder(args.out) if args.out else None
    if out is not None:
        check_out(out)
    if process.world > 1:
        raise UserError("sample.py runs as one process; start it without torchrun")
    result, out = evaluate(forecaster, step, out, ckpt=args.ckpt)
    print(table(result))
    print(paths(out, forecaster.config.sample.format, args.ckpt))


if __name__ == "__main__":
    run_command(main)
