"""The board: how good forecasts are on six worlds, by variant of the settings, at a fixed budget.

    python -m benchmarks.quality --worlds ball_stn --variants before default --seeds 0 1 2
    python -m benchmarks.quality --worlds ball_stn street --variants muon --budget 0.25
    python -m benchmarks.quality --report
    python -m benchmarks.quality --check

A run trains one variant on one world with one seed and appends a line to benchmarks/board.jsonl:
settings, commit, matrix rate and scores. A run that has a line is skipped. Variants of one world
and seed share data, autoencoder and the noise of the forecasts, so that differences are paired.
--budget shortens both trainings: levers are screened at 0.25, and compared in the end at 1.

--report rebuilds the table in benchmarks/RESULTS.md from the lines. --check exits with code 1 if a
target is missed. The shards of moving_mnist, clevrer_like and street are prepared first, by the
commands that a run without them prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import configs
import data
import vqvae
from batches.batch import to_frames, to_pixels
from batches.latents import MIRRORS, LatentTriples
from benchmarks import ball_oracle, board, measure
from configs import Config
from evaluation import metrics
from evaluation.measure import Networks, Tables, summarize
from evaluation.measure import measure as measure_forecasts
from evaluation.networks import load_i3d, load_lpips
from evaluation.protocols import PROTOCOLS
from evaluation.sources import digest, forecast_split, make_autoencode, sample_windows
from forecaster import Forecaster, load
from main import Clock, train_network
from models.autoencoders.restore import restore
from runtime.console import UserError, run_command
from runtime.process import Process, start

# Draws of the physics oracle per clip.
ORACLE_DRAWS = 64
# Items on which the one-step error is measured.
ONE_STEP_ITEMS = 2_048


class World(NamedTuple):
    """dataset: an entry of DATASETS. settings: on top of its defaults. prepare: the command that
    makes the shards, where main.py does not. codes, steps: of the autoencoder before this board."""

    dataset: str
    settings: dict
    prepare: str = ""
    codes: int = 16_384
    steps: int = 1_400


WORLDS = {
    "ball_stn": World("ball_stn", {}, codes=1_024),
    "moving_mnist": World("moving_mnist", {}, configs.DATASETS["moving_mnist"].prepare),
    "wmaze": World("wmaze", {}),
    "clevrer_like": World(
        "clevrer_like", {}, configs.DATASETS["clevrer_like"].prepare, codes=8_192, steps=2_000
    ),
    "street": World(
        "videos",
        {"data.root": "data/street"},
        "python -m prepare.videos --source FOLDER --out {root} --image_size {size} "
        "--tile 192 --clip_length 24, with the videos of docs/datasets.md",
    ),
}
# The autoencoder before this board.
OLD_LATENTS = {
    "data.flips": "",
    "vqvae.optimizer": "adamw",
    "vqvae.channels": 4,
    "vqvae.noise": 0.0,
    "vqvae.sharpness": 0.0,
    "sample.restore": 0.0,
}
# The defaults before this board: a reference that stays, whatever the defaults become.
BEFORE = OLD_LATENTS | {
    "model.name": "convnet",
    "model.depth": 2,
    "model.mid_depth": 1,
    "data.contexts": 1,
    "data.context": "recent:3",
    "sample.context": "recent:3",
    "flow.draws": 1,
    "flow.start": 0,
    "train.lr": 1e-3,
    "train.optimizer": "adamw",
    "train.own": 0,
}
# The same, where the balls and the worlds of 64 pixels differed.
BALLS_BEFORE = {"model.width": 128, "train.batch_size": 32, "sample.redraw": "step"}
SMALL_BEFORE = {"model.width": 96, "train.batch_size": 16}
# name: settings on top of configs.FORECASTS_BALLS or FORECASTS_64
LEVERS = {
    "forecasts": {},
    "one_context": {"data.contexts": 1, "data.context": "recent:3"},
    "no_start": {"flow.start": 0, "flow.draws": 3},
    "no_own": {"train.own": 0},
    "own_3": {"train.own_steps": 3},
    "adamw": {"train.optimizer": "adamw", "train.lr": 3e-3},
    "noise": {"flow.noise": 0.3, "sample.noise": 0.05},
    "far_contexts": {"data.contexts": 4, "data.context": "at:1,2,4,8"},
    # The autoencoder of `before`, and no mirror images.
    "old_latents": OLD_LATENTS,
    "far_own_3": {"data.contexts": 4, "data.context": "at:1,2,4,8", "train.own_steps": 3},
}


VARIANTS = ("default", "before", *LEVERS)


def settings_of(world: str, variant: str, seed: int, budget: float) -> dict:
    """The overrides of a run. `default`: the defaults of the dataset."""
    values = dict(WORLDS[world].settings)
    balls = world == "ball_stn"
    old = {"vqvae.codes": WORLDS[world].codes, "vqvae.steps": WORLDS[world].steps}
    if variant == "before":
        values |= BEFORE | (BALLS_BEFORE if balls else SMALL_BEFORE) | old
    elif variant in LEVERS:
        values |= configs.FORECASTS_BALLS if balls else configs.FORECASTS_64
        values |= LEVERS[variant]
        if variant == "old_latents":
            values |= old
    config = configs.build(WORLDS[world].dataset, values)
    values |= {
        "train.steps": max(1, round(budget * config.train.steps)),
        "vqvae.steps": max(1, round(budget * config.vqvae.steps)),
        "train.seed": seed,
        "train.sample_every": 0,
        "train.keep": 1,
        "wandb.mode": "disabled",
        "output.root": "outputs/board",
        "output.run_id": f"{world}-{variant}-{seed}-{budget:g}",
    }
    return values


def run(world: str, variant: str, seed: int, budget: float, args: argparse.Namespace) -> dict:
    """Train and measure one run -> its record."""
    overrides = settings_of(world, variant, seed, budget) | configs.parse_overrides(args.set)
    if args.set:
        overrides["output.run_id"] += "-" + digest(" ".join(args.set).encode())[:8]
    config = configs.build(WORLDS[world].dataset, overrides)
    root = Path(config.data.root)
    if not config.data.generate and not root.exists():
        command = WORLDS[world].prepare.format(root=root, size=config.data.image_size)
        raise UserError(f"no shards in {root}; prepare them: {command}")
    process = start()
    rate = measure.matmul_rate(process.device, torch.float32)
    config, path, _ = train_network(config, process, None, Clock())
    forecaster, _ = load(path, process.device)
    forecaster.config = config
    # The bound of the balls is that of the physics oracle, which decodes no forecast.
    restored = 0.0 if world == "ball_stn" else config.sample.restore
    parameters = sum(p.numel() for p in forecaster.net.parameters())
    autoencoder = vqvae.run_dir(config, data.open_split(config, "train")).name
    record = {
        "world": world,
        "variant": label(variant, args),
        "set": args.set,
        "seed": seed,
        "budget": budget,
        "commit": commit(),
        "gflops": round(rate / 1e9, 1),
        "threads": torch.get_num_threads(),
        "seconds": training_seconds(config, forecaster, path.parent),
        "parameters": parameters,
        "updates": config.train.steps,
        **measure_run(forecaster, process, Path(args.weights)),
        "autoencoder": autoencoder,
        "restore": restored,
        "bound": board.bound_of(world, autoencoder, restored),
        "settings": {name: value for name, value in overrides.items() if name[:4] != "data.root"},
    }
    if record["bound"] is None:
        record["bound"] = measure_bound(world, forecaster)
    return record


def training_seconds(config: Config, forecaster: Forecaster, dir: Path) -> dict[str, float]:
    """Seconds of the stages. Runs share the autoencoder and the latents, so the seconds of these
    are rates measured here, times the work of a run that shares nothing. dir: the run's folder."""
    device = forecaster.device
    shards = data.open_split(config, "train")
    encoding = data.measure_encoding(config, forecaster.autoencoder, device, shards)
    copies = 1 + len(MIRRORS[config.data.flips])
    seconds = {
        "VQVAE": vqvae.measure_update(config, device, shards) * config.vqvae.steps,
        "latents": encoding * copies * int(shards.lengths.sum()),
        "training": logged_seconds(dir / "metrics.jsonl", config.train.batch_size),
    }
    return {name: round(value, 1) for name, value in seconds.items()}


def logged_seconds(log: Path, batch_size: int) -> float:
    """Seconds of all updates of a log, also of updates before the run was resumed."""
    seconds, last = 0.0, 0
    for line in log.read_text().splitlines():
        row = json.loads(line)
        if "samples_per_second" in row:
            seconds += (row["step"] - last) * batch_size / row["samples_per_second"]
            last = row["step"]
    return seconds


def label(variant: str, args: argparse.Namespace) -> str:
    """The name of a variant on the board: with the settings of --set, if there are any."""
    return " ".join([variant, *args.set])


def commit() -> str:
    """The commit of the working tree, with a + if it has changes; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


# -------------------------------------------------------------------- measurements
def measure_run(forecaster: Forecaster, process: Process, weights: Path) -> dict:
    """Forecast the clips of sample.py and measure the forecasts -> entries of the record."""
    config = forecaster.config
    truth, samples, _ = forecast_split(forecaster)
    V, S, T = samples.shape[:3]
    which = ["mse", "crps", "spread_skill"]
    i3d = lpips = None
    if (weights / "lpips_alex.safetensors").exists():
        lpips = load_lpips(weights, device=process.device)
        which.append("lpips")
    # I3D needs at least nine frames.
    if (weights / "i3d.safetensors").exists() and T >= 9:
        i3d = load_i3d(weights / "i3d.safetensors", process.device)
        which.append("fvd")
    nets = Networks(i3d, lpips, process.device)
    tables = measure_forecasts(truth, samples, None, PROTOCOLS["own"], which, nets, None, seed=0)
    found = summarize(tables, PROTOCOLS["own"], which)
    true_end = truth[:, -T:].astype(np.float32) / 255
    drawn = samples.astype(np.float32) / 255
    return {
        "one_step": one_step_error(forecaster),
        "crps": ratios(tables, "crps"),
        "mse": ratios(tables, "mse"),
        "lpips": mean_of(found, "lpips"),
        "fvd": mean_of(found, "fvd"),
        "spread_skill": mean_of(found, "spread_skill"),
        "sharpness": metrics.sharpness(drawn[:, :, -1:], true_end[:, -1:]),
        "motion": metrics.motion_energy(drawn, true_end),
        "evaluations": forecaster.evaluations / (V * S * T),
        "predict": config.data.predict,
        # Per clip, to pair the runs.
        "clips": {name: clip_means(tables, name) for name in ("crps", "crps_repeat_last")},
    }


def mean_of(found: dict, name: str) -> float | None:
    return found["summary"][name]["mean"] if name in found["summary"] else None


def clip_means(tables: Tables, name: str) -> list[float]:
    """The mean of a metric over the frames of each clip."""
    values = tables[name]
    return [float(f"{value:.6g}") for value in values.reshape(len(values), -1).mean(1)]


def ratios(tables: Tables, name: str) -> dict[str, float]:
    """A metric over that of repeating the last given frame: over all frames, first, last frame."""
    own = tables[name].reshape(-1, tables[name].shape[-1]).mean(0)
    repeated = tables[f"{name}_repeat_last"]
    repeated = repeated.reshape(-1, repeated.shape[-1]).mean(0)
    parts = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}
    return {part: float(own[k].mean() / repeated[k].mean()) for part, k in parts.items()}


@torch.no_grad()
def one_step_error(forecaster: Forecaster) -> float:
    """Squared error of E[x_1 | x_0] on held-out latents, over the mean square of x_1 - x_0.

    E[x_1 | x_0] is the network's estimate at s = 0, in one evaluation.
    """
    config, device = forecaster.config, forecaster.device
    process = Process(0, 1, device)
    shards = data.open_split(config, config.sample.split)
    dir = data.ensure_latents(config, shards, forecaster.autoencoder, process)
    size = min(ONE_STEP_ITEMS, 256)
    train = dataclasses.replace(config.train, batch_size=size, seed=0)
    source = LatentTriples(dataclasses.replace(config, train=train), dir, device)
    error = change = 0.0
    for batch in source.batches(0, ONE_STEP_ITEMS // size):
        x1, x0, contexts, gaps = batch.normalize(forecaster.mean, forecaster.std)
        start = x0
        if not forecaster.interpolant.from_reference:
            start = torch.randn_like(x0)
        field = forecaster.field(x0, lambda given=(contexts, gaps): given)
        mean = forecaster.interpolant.denoise(field(start, 0.0), start, 0.0, x0)
        error += (mean - x1).square().sum().item()
        change += (x1 - x0).square().sum().item()
    return error / change


def measure_bound(world: str, forecaster: Forecaster) -> float:
    """The attainable CRPS ratio: that of the physics oracle on balls, else of the autoencoder, with
    sample.restore."""
    config = forecaster.config
    shards = data.open_split(config, config.sample.split)
    windows = sample_windows(config, shards)
    truth = data.read_clips(shards, windows)
    given = config.data.condition
    autoencode = make_autoencode(forecaster)
    rng = np.random.default_rng(0)
    own = repeated = 0.0
    for k in range(len(truth)):
        clip = windows._replace(video=windows.video[k : k + 1], start=windows.start[k : k + 1])
        future = truth[k : k + 1, given:].astype(np.float32) / 255
        if world == "ball_stn":
            best = ball_oracle.forecast(shards, clip, given, ORACLE_DRAWS, autoencode, rng)
        else:
            best = restore_frames(autoencode(truth[k, given - 1 :]), truth[k, given - 1], config)
            best = best[None, None]
        own += metrics.crps(best.astype(np.float32) / 255, future).mean()
        last = truth[k : k + 1, None, given - 1 : given].astype(np.float32) / 255
        repeated += metrics.crps(last.repeat(future.shape[1], 2), future).mean()
    return float(own / repeated)


def restore_frames(decoded: np.ndarray, last: np.ndarray, config: Config) -> np.ndarray:
    """The frames after the first of decoded (1 + T, H, W, 3) uint8, with sample.restore. last: the
    first frame, (H, W, 3) uint8, as given."""
    pixels = to_pixels(decoded)
    first, future = pixels[:1], pixels[1:]
    if config.sample.restore:
        future = restore(future, first, to_pixels(last[None]), config.sample.restore)
    return to_frames(future)


# -------------------------------------------------------------------- command
def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS), metavar="WORLD")
    add("--variants", nargs="+", default=["before", "default"], metavar="VARIANT")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    add("--budget", type=float, default=1.0, help="share of the default updates")
    add("--weights", default="weights/metrics", help="networks of LPIPS and FVD, if they are there")
    about_set = "settings on top of the variant, which become part of its name"
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=about_set)
    add("--report", action="store_true", help="write the table to benchmarks/RESULTS.md")
    add("--check", action="store_true", help="exit with code 1 if a target is missed")
    args = parser.parse_args()
    for variant in args.variants:
        if variant not in VARIANTS:
            raise UserError(f"no variant `{variant}`; there are {', '.join(VARIANTS)}")
    if not 0 < args.budget <= 10:
        raise UserError(f"--budget must be in (0, 10], got {args.budget:g}")
    return args


def main() -> None:
    args = parse()
    if args.report or args.check:
        board.report(args.report, args.check)
        return
    for seed in args.seeds:
        for world in args.worlds:
            for variant in args.variants:
                if board.find(world, label(variant, args), seed, args.budget):
                    print(f"{world}, {variant}, seed {seed}: on the board already")
                    continue
                record = run(world, variant, seed, args.budget, args)
                board.append(record)
                print(json.dumps({k: v for k, v in record.items() if k != "clips"}))


if __name__ == "__main__":
    run_command(main)
