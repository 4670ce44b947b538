"""Forecasts with one or two evaluations a frame, at equal seconds of training.

    python -m benchmarks.few_evaluations --worlds ball_stn --seeds 0 1 2
    python -m benchmarks.few_evaluations --variants energy_1 longer --clips 64
    python -m benchmarks.few_evaluations --report
    python -m benchmarks.few_evaluations --check

All variants of a world and seed start from the board's run `default` (benchmarks.quality), which is
trained first if its checkpoint is absent:
- default, evaluations_2, evaluations_1: its checkpoint, sampled with all, two and one evaluations;
- longer, energy_2, energy_1, shortcut: tuned from it, for the seconds that 15 % of its updates take
  (train.measure_update on this machine, kept in plan.json of the run);
- energy_scratch_1: from new weights, for the seconds of the default and of that tuning.

A run appends a line to benchmarks/few_evaluations.jsonl; a run that has a line is skipped.
--report rebuilds the table in benchmarks/RESULTS.md. --check exits with code 1 if a target is
missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import configs
import train
from benchmarks import few_evaluations_table as table
from benchmarks import measure, quality
from configs import Config
from evaluation import metrics
from evaluation.sources import forecast_split
from forecaster import Forecaster, load
from main import PLAN, Clock, train_network
from runtime import budget, checkpoints
from runtime.console import run_command
from runtime.process import Process, start
from runtime.tables import merge_tables

# Updates of the tuning, as a share of the default's.
SHARE = 0.15
# The tuning's learning rates, as a share of the default's, and its updates of warm-up.
RATE = 0.1
WARMUP = 20
# Height and width of the patches of the energy score, in pixels.
PATCH = 8
# Clips and repeats of the measurement of frames per second.
TIMED_CLIPS = 8
TIMED_REPEATS = 3


class Variant(NamedTuple):
    """training: the name of the run that is sampled, `default` for the default's own checkpoint.
    settings: of its training, on top of the default's. sample: sampling settings on top of these.
    """

    training: str
    settings: dict
    sample: dict


ENERGY = {"flow.objective": "energy", "flow.members": 4}
SHORTCUT = {"flow.objective": "shortcut", "flow.evaluations": 1}
# One evaluation of a path from a point mass needs noise: the start of objectives/energy.py.
ONE = {"sample.steps": 1, "sample.solver": "exact", "sample.diffusion": "0"}
VARIANTS = {
    "default": Variant("default", {}, {}),
    "evaluations_2": Variant("default", {}, {"sample.steps": 2}),
    "evaluations_1": Variant("default", {}, ONE),
    "longer": Variant("longer", {}, {}),
    "energy_2": Variant("energy_2", {**ENERGY, "flow.evaluations": 2}, {}),
    "energy_1": Variant("energy_1", {**ENERGY, "flow.evaluations": 1}, {}),
    "energy_scratch_1": Variant("energy_scratch_1", {**ENERGY, "flow.evaluations": 1}, {}),
    "shortcut_2": Variant("shortcut", SHORTCUT, {"sample.steps": 2}),
    "shortcut_1": Variant("shortcut", SHORTCUT, {"sample.steps": 1}),
}


# -------------------------------------------------------------------- training
def base_settings(world: str, seed: int, args: argparse.Namespace) -> dict:
    """The overrides of the board's run `default`, with those of --set."""
    values = quality.settings_of(world, "default", seed, args.budget)
    return values | configs.parse_overrides(args.set)


def settings_of(world: str, variant: str, seed: int, args: argparse.Namespace) -> dict:
    """The overrides of a variant's training."""
    values = base_settings(world, seed, args)
    training, changes, _ = VARIANTS[variant]
    if training == "default":
        return values
    config = configs.build(quality.WORLDS[world].dataset, values)
    values |= {**changes, "output.run_id": f"{config.run_id}-{training}"}
    if not training.endswith("scratch_1"):
        values |= {
            "train.lr": RATE * config.train.lr,
            "train.muon_lr": RATE * config.train.muon_lr,
            "train.warmup": min(WARMUP, config.train.warmup),
        }
    return values


def ensure_default(world: str, seed: int, args: argparse.Namespace, process: Process) -> Path:
    """The checkpoint of the board's run `default`, which is trained if it is absent or not
    finished."""
    config = configs.build(quality.WORLDS[world].dataset, base_settings(world, seed, args))
    path = Path(config.output.root) / "checkpoints" / config.run_id / "latest.pt"
    if path.exists() and checkpoints.load_checkpoint(path)["step"] >= config.train.steps:
        return path
    return train_network(config, process, None, Clock())[1]


def ensure_training(
    world: str, variant: str, seed: int, args: argparse.Namespace, process: Process
) -> Path:
    """The checkpoint of a variant's training, which is made if it is absent or not finished."""
    default = ensure_default(world, seed, args, process)
    if VARIANTS[variant].training == "default":
        return default
    dataset = quality.WORLDS[world].dataset
    values = settings_of(world, variant, seed, args)
    config = configs.build(dataset, values)
    dir = Path(config.output.root) / "checkpoints" / config.run_id
    scratch = variant.endswith("scratch_1")
    if not (dir / PLAN).exists():
        base = configs.build(dataset, base_settings(world, seed, args))
        share = 1 + SHARE if scratch else SHARE
        budget.write_plan(dir / PLAN, plan_updates(default, base, config, share, process.device))
    return train_network(config, process, None if scratch else str(default), Clock())[1]


def plan_updates(
    default: Path, base: Config, config: Config, share: float, device: torch.device
) -> dict:
    """The plan of a training by `config` for the seconds of a share of the updates of `base`."""
    forecaster, _ = load(default, device)
    seconds = []
    for one in (base, config):
        one = dataclasses.replace(one, latent=forecaster.config.latent)
        seconds.append(train.measure_update(one, forecaster.autoencoder, device, 1))
    total = share * base.train.steps * seconds[0]
    updates = max(1, round(total / seconds[1]))
    return {"minutes": round(total / 60, 2), "settings": {"train.steps": updates}}


# -------------------------------------------------------------------- a run
def run(world: str, variant: str, seed: int, args: argparse.Namespace) -> dict:
    """Train, if need be, and measure one variant -> its record."""
    process = start()
    rate = measure.matmul_rate(process.device, torch.float32)
    path = ensure_training(world, variant, seed, args, process)
    sample = dict(VARIANTS[variant].sample)
    stored = configs.from_dict(checkpoints.load_checkpoint(path)["config"])
    if variant == "evaluations_1":
        of_energy = configs.Flow(interpolant=stored.flow.interpolant, objective="energy")
        sample["sample.warm_start"] = configs.trained_sampler(of_energy)["sample.warm_start"]
    sample |= {"sample.num_videos": args.clips, "sample.num_samples": args.members}
    forecaster, step = load(path, process.device, {"data.root": stored.data.root, **sample})
    return {
        "world": world,
        "variant": table.label(variant, args.set),
        "seed": seed,
        "budget": args.budget,
        "commit": quality.commit(),
        "gflops": round(rate / 1e9, 1),
        "threads": torch.get_num_threads(),
        "updates": step,
        "seconds": quality.logged_seconds(path.with_name("metrics.jsonl"), stored.train.batch_size),
        "members": args.members,
        **measure_run(forecaster),
        "settings": settings_of(world, variant, seed, args) | sample,
    }


def measure_run(forecaster: Forecaster) -> dict:
    """Forecast the clips of sample.py and measure the forecasts -> entries of the record."""
    truth, samples, _ = forecast_split(forecaster, quiet=True)
    V, S, T = samples.shape[:3]
    evaluations = forecaster.evaluations / (V * S * T)
    clips = []
    for k in range(V):
        clips.append(measure_clip(samples[k : k + 1], truth[k : k + 1], k))
    columns = merge_tables(clips, np.stack)
    last = slice(-1, None)
    drawn, true = to_float(samples[:, :, last]), to_float(truth[:, last])
    power = metrics.radial_spectrum(drawn).mean((0, 1, 2))
    truth_power = metrics.radial_spectrum(true).mean((0, 1))
    ranks = columns["ranks"].sum(0)
    inner = ranks[:, 1:-1].sum(1) / ranks.sum(1)
    return {
        "evaluations": evaluations,
        "frames_per_second": frames_per_second(forecaster),
        # Per clip, to pair the runs: the mean over its frames.
        "clips": {name: per_clip(columns[name]) for name in ("crps", "repeat_last", "patches")},
        # Per frame.
        "spread_skill": rounded(np.sqrt(columns["spread"].mean(0) / columns["skill"].mean(0))),
        "coverage": rounded(inner),
        "ranks": ranks.sum(0).tolist(),
        # Of the last frame, over the truth's, per wavenumber.
        "spectrum": rounded(power / np.maximum(truth_power, 1e-12)),
        "sharpness": metrics.sharpness(drawn, true),
        "motion": metrics.motion_energy(to_float(samples), to_float(truth[:, -T:])),
    }


def to_float(frames: np.ndarray) -> np.ndarray:
    return frames.astype(np.float32) / 255


def per_clip(values: np.ndarray) -> list[float]:
    return rounded(values.mean(1))


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def measure_clip(samples: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Measures of one clip (1, S, T, H, W, C) per frame: (T,) each, ranks (T, S + 1).

    patches: energy score of squares of PATCH pixels, the mean over the frame. seed: of the ranks of
    ties.
    """
    T = samples.shape[2]
    x, y = to_float(samples), to_float(truth[:, -T:])
    repeated = np.repeat(to_float(truth[:, None, -T - 1 : -T]), T, 2)
    rng = np.random.default_rng([0, seed])
    ranks = []
    for t in range(T):
        frame = (samples[:, :, t : t + 1], truth[:, truth.shape[1] - T + t][:, None])
        ranks.append(metrics.rank_histogram(*frame, rng))
    return {
        "crps": metrics.crps(x, y)[0],
        "repeat_last": metrics.crps(repeated, y)[0],
        "patches": metrics.energy(cut(x), cut(y)).mean(0),
        "spread": metrics.spread(x)[0],
        "skill": metrics.skill(x, y)[0],
        "ranks": np.stack(ranks),
    }


def cut(frames: np.ndarray) -> np.ndarray:
    """Cut frames (1, …, H, W, C) into squares, which become videos: (P, …, PATCH, PATCH, C). Rows
    and columns that fill no square are left out."""
    H, W, C = frames.shape[-3:]
    rows, columns = H // PATCH, W // PATCH
    frames = frames[0, ..., : rows * PATCH, : columns * PATCH, :]
    lead = frames.shape[:-3]
    squares = frames.reshape(*lead, rows, PATCH, columns, PATCH, C)
    # The places of the squares come first.
    n = len(lead)
    squares = squares.transpose(n, n + 2, *range(n), n + 1, n + 3, n + 4)
    return squares.reshape(rows * columns, *lead, PATCH, PATCH, C)


def frames_per_second(forecaster: Forecaster) -> float:
    """Forecast frames per second end to end, decoding and encoding included: the median of a few
    forecasts of a few clips."""
    whole = forecaster.config
    changes = {"sample.num_videos": min(TIMED_CLIPS, whole.sample.num_videos)}
    forecaster.config = configs.update(whole, changes)
    rates = []
    for _ in range(TIMED_REPEATS):
        began = time.perf_counter()
        _, samples, _ = forecast_split(forecaster, quiet=True)
        rates.append(np.prod(samples.shape[:3]) / (time.perf_counter() - began))
    forecaster.config = whole
    return round(statistics.median(rates), 1)


# -------------------------------------------------------------------- command
def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_evaluations", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    worlds = list(quality.WORLDS)
    add("--worlds", nargs="+", default=["ball_stn"], choices=worlds, metavar="WORLD")
    names = list(VARIANTS)
    add("--variants", nargs="+", default=names, choices=names, metavar="VARIANT")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    add("--budget", type=float, default=1.0, help="of the default's run, see benchmarks.quality")
    add("--clips", type=int, default=256, help="held-out clips (default 256)")
    add("--members", type=int, default=16, help="samples per clip, at least 2 (default 16)")
    about_set = "settings on top of every variant, which become part of its name"
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=about_set)
    add("--report", action="store_true", help="write the table to benchmarks/RESULTS.md")
    add("--check", action="store_true", help="exit with code 1 if a target is missed")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.report or args.check:
        table.report(args.report, args.check)
        return
    for seed in args.seeds:
        for world in args.worlds:
            for variant in args.variants:
                if table.find(world, table.label(variant, args.set), seed, args.budget):
                    print(f"{world}, {variant}, seed {seed}: measured already")
                    continue
                record = run(world, variant, seed, args)
                table.append(record)
                print(json.dumps({k: v for k, v in record.items() if k != "clips"}))


if __name__ == "__main__":
    run_command(main)
