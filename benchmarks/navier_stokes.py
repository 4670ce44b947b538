"""Forecasts of a world whose true law is known: stochastically forced Navier-Stokes fields.

    python -m benchmarks.navier_stokes --variants follmer linear --taus 0.5 --seeds 0
    python -m benchmarks.navier_stokes --variants follmer --samplers 0:5 sigma:5 sigma:5:exact
    python -m benchmarks.navier_stokes --report --check

A run trains one variant with one seed, within a number of floating-point operations, and scores it
against the oracle (evaluation.oracle): for each sampler it appends a line to
benchmarks/navier_stokes.jsonl with settings, commit, matrix rate and scores. What has a line is
skipped; a training that was interrupted resumes. The world `heat` has its law in closed form.

--report rebuilds the table and the figures in benchmarks/RESULTS.md from the lines. --check exits
with code 1 if a target is missed. The data are prepared first, by the commands that a run without
them prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import configs
import data
from benchmarks import measure, navier_stokes_report
from benchmarks.few_evaluations import RATE, SHARE, WARMUP
from benchmarks.quality import commit, logged_seconds
from configs import Config, Latent
from evaluation import fields, oracle, protocols
from evaluation.sources import PART, digest, source_of_checkpoint
from forecaster import Forecaster, load
from main import Clock, train_network
from runtime.console import UserError, progress, run_command
from runtime.process import Process, start
from runtime.tables import merge_tables
from shards import Shards

# The default budget of a training: an hour on two slow cores. The target allows 1e15.
FLOPS = 1.3e14
# Time between two frames of the shards.
EVERY = 0.5
# Members of a forecast of a state.
SAMPLES = 16
# States and futures of the long roll-outs, the number of last frames that are compared with the
# truth, and the number of steps.
ROLLED_STATES = 8
ROLLED_FUTURES = 2
ROLLED_END = 20
ROLLOUT = 100


class World(NamedTuple):
    """dataset: an entry of DATASETS. flops: the budget, in units of FLOPS. trajectories, frames:
    of the shards, of which a tenth of the trajectories is val, and a tenth is test."""

    dataset: str
    flops: float
    trajectories: int = 80
    frames: int = 80

    def prepare(self, root: Path) -> str:
        """The commands that make the data."""
        command = f"python -m prepare.{self.dataset} --out {root}"
        shards = f"{command} --trajectories {self.trajectories} --frames {self.frames}"
        return f"{shards}; {command} --oracle 64 --members 64"


WORLDS = {
    "navier_stokes": World("navier_stokes", 1.0, 320),
    "heat": World("heat", 0.1),
}
# On top of the defaults of the dataset.
BASE = {
    "train.optimizer": "muon",
    "train.lr": 2e-3,
    "train.batch_size": 32,
    "train.sample_every": 0,
    "train.keep": 1,
    "data.clip": 3,
    "data.condition": 2,
    "model.width": 48,
    # All variants but `v` predict the residual. The dataset's default is v.
    "flow.output": "residual",
    "sample.batch": 64,
    "wandb.mode": "disabled",
    "output.root": "outputs/navier_stokes",
}
# name: settings on top of BASE
VARIANTS = {
    "follmer": {},
    "v": {"flow.output": "v"},
    "follmer_c01": {"flow.c": 0.1},
    "follmer_linear": {"flow.interpolant": "follmer_linear"},
    "bridge": {"flow.interpolant": "bridge"},
    "trig": {"flow.interpolant": "trig"},
    "linear": {"flow.interpolant": "linear"},
    # A network for the mean of the next frame, trained by its mean squared error: a further draw
    # at s = 0 that outweighs the others, and forecasts by one evaluation there.
    "deterministic": {"flow.start": 1e4, "sample.steps": 1},
    # No network: the last frame, repeated.
    "repeat": {},
    "adamw": {"train.optimizer": "adamw", "train.lr": 1e-3},
    "start": {"flow.start": 1.0},
}
UNTRAINED = ("repeat",)
# Tuned from TUNED_FROM of the same seed and budget, by SHARE of its operations.
TUNED_FROM = "follmer"
TUNING = {
    "train.lr": RATE * BASE["train.lr"],
    "train.muon_lr": RATE * configs.Train().muon_lr,
    "train.warmup": WARMUP,
}
ENERGY = TUNING | {"flow.objective": "energy"}
TUNED = {
    "longer": TUNING,
    "energy_2": ENERGY | {"flow.evaluations": 2},
    "energy_1": ENERGY | {"flow.evaluations": 1},
    "shortcut_2": TUNING | {"flow.objective": "shortcut", "flow.evaluations": 2},
}


class Run(NamedTuple):
    """What identifies a training. flops: its budget. changes: of --set."""

    world: str
    variant: str
    tau: float
    seed: int
    flops: float
    changes: tuple[str, ...]

    def command(self, sampler: str, rollout: int | None = None) -> str:
        """The command that makes the record of this run and sampler. rollout: steps of the long
        roll-outs, None: the default."""
        words = [
            f"python -m benchmarks.navier_stokes --worlds {self.world} --variants {self.variant}",
            f"--taus {self.tau:g} --seeds {self.seed} --flops {self.flops:g} --samplers {sampler}",
        ]
        if rollout is not None:
            words.append(f"--rollout {rollout}")
        if self.changes:
            words.append("--set " + " ".join(self.changes))
        return " ".join(words)


def build_config(run: Run) -> Config:
    """The config of a run, with as many updates as its budget allows."""
    world = WORLDS[run.world]
    held_out = round(0.1 * world.trajectories)
    skip = round(run.tau / EVERY) - 1
    name = f"{run.world}-{run.variant}-{run.tau:g}-{run.seed}-{run.flops:g}"
    overrides = BASE | {
        "data.stream": (world.trajectories - 2 * held_out) * world.frames,
        "data.held_out": held_out * world.frames,
        "data.skip": skip,
        "data.predict": max(1, 4 // (skip + 1)),
        "train.seed": run.seed,
    }
    overrides |= changes_of(run)
    if run.changes:
        name += "-" + digest(" ".join(run.changes).encode())[:8]
    overrides.setdefault("output.run_id", name)
    config = configs.build(world.dataset, overrides)
    root = Path(config.data.root)
    if not (root / oracle.ORACLE).exists():
        raise UserError(f"no data and oracle in {root}; prepare them: {world.prepare(root)}")
    shape = Shards(root / "test", "fields").shape
    known = dataclasses.replace(config, latent=Latent(shape))
    flops = run.flops * (SHARE if run.variant in TUNED else 1)
    steps = max(1, int(flops / measure.flops_per_update(known)))
    return configs.update(config, {"train.steps": steps})


def changes_of(run: Run) -> dict:
    """The settings of a run on top of BASE."""
    return (VARIANTS | TUNED)[run.variant] | configs.parse_overrides(list(run.changes))


def train(run: Run, process: Process) -> tuple[Config, Path]:
    """Train a run, or find its checkpoint. -> the config with the latents, the checkpoint."""
    start = None
    if run.variant in TUNED:
        start = str(train(run._replace(variant=TUNED_FROM), process)[1])
    config, path, _ = train_network(build_config(run), process, start, Clock())
    return config, path


# -------------------------------------------------------------------- measurements
def use_sampler(forecaster: Forecaster, config: Config, sampler: str) -> None:
    """Set the sampler of a forecaster, see navier_stokes_report.Sampler."""
    changes = {}
    if sampler != "default":
        chosen = navier_stokes_report.parse_sampler(sampler)
        changes = {f"sample.{name}": value for name, value in chosen._asdict().items()}
    forecaster.config = configs.update(config, changes)


def score(forecaster: Forecaster, path: Path, leads: int, samples: int) -> dict:
    """Score forecasts of the oracle's states -> evaluation.oracle.summarize, and evaluations."""
    changes = {"samples": samples, "predict": leads or None}
    protocol = protocols.get("navier_stokes", forecaster.config, changes)
    source = source_of_checkpoint(forecaster, 0, path, protocol)
    protocol, parts, evaluations = source.protocol, [], 0
    with progress(protocol.videos, "score", "state") as bar:
        for k in range(-(-protocol.videos // PART)):
            _, forecast, count = source.part(k)
            parts.append(oracle.score_states(source.oracle, k * PART, forecast))
            evaluations += count
            bar.update(len(forecast))
    tables = merge_tables(parts)
    found = oracle.summarize(tables, source.oracle.times(protocol.predict))
    frames = protocol.videos * protocol.samples * protocol.predict
    return {**found, "evaluations": evaluations / frames}


def score_repeated(config: Config) -> dict:
    """The scores of repeating the last frame of the oracle's states."""
    shards = data.open_split(config, "test")
    opened = oracle.open_oracle(config.data.root, shards, config.data.skip)
    parts = []
    for k in range(len(opened.video)):
        state = shards.read(int(opened.video[k]), opened.frame[k : k + 1])
        forecast = np.broadcast_to(state, (1, SAMPLES, opened.leads, *state.shape[1:]))
        parts.append(oracle.score_states(opened, k, forecast))
    tables = merge_tables(parts)
    return {**oracle.summarize(tables, opened.times(opened.leads)), "evaluations": 0.0}


def roll_out(forecaster: Forecaster, steps: int) -> dict:
    """Long roll-outs from states of the test split: do enstrophy and spectrum stay?

    -> enstrophy over the truth's, per step and at the end (the last ROLLED_END steps) with its
    standard error over roll-outs; spectra at the end; the largest deviation of the spectrum.
    """
    config = forecaster.config
    shards = data.open_split(config, "test")
    opened = oracle.open_oracle(config.data.root, shards, config.data.skip)
    stride, given = opened.stride, config.data.condition
    chosen = np.linspace(0, len(opened.video) - 1, ROLLED_STATES).round().astype(int)
    offsets = stride * np.arange(1 - given, 1)
    states = []
    for k in chosen:
        states.append(shards.read(int(opened.video[k]), opened.frame[k] + offsets))
    future = forecaster.forecast(np.stack(states), steps, ROLLED_FUTURES, (0, "roll-out"), True)
    future = future.reshape(-1, *future.shape[2:])
    truth = all_frames(data.open_split(config, "train"))
    mean = fields.enstrophy(truth).mean()
    ratios = fields.enstrophy(future) / mean
    end = ratios[:, -ROLLED_END:].mean(1)
    power = fields.spectrum(future[:, -ROLLED_END:]).mean((0, 1))
    true_power = fields.spectrum(truth).mean(0)
    largest = min(oracle.LARGEST, len(power) - 1)
    return {
        "steps": steps,
        "enstrophy": {"value": end.mean(), "se": end.std(ddof=1) / np.sqrt(len(end))},
        "curve": ratios.mean(0).tolist(),
        "spectrum": power.tolist(),
        "spectrum_true": true_power.tolist(),
        "spectrum_error": fields.spectrum_error(power, true_power, largest),
    }


def all_frames(shards: Shards) -> np.ndarray:
    """Every fourth frame of a split, (N, C, H, W): neighbours are nearly equal."""
    return shards.read_rows(np.arange(0, int(shards.lengths.sum()), 4))


def shorten(value):
    """Round the numbers of a record to five significant digits."""
    if isinstance(value, dict):
        return {name: shorten(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [shorten(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}")
    return value


# -------------------------------------------------------------------- command
def list_missing(run: Run, samplers: list[str]) -> list[str]:
    """The samplers of a run that have no record; prints the others."""
    missing = []
    # Without a network there is one sampler, and some objectives train one.
    one = run.variant in UNTRAINED or "flow.objective" in changes_of(run)
    for sampler in ["default"] if one else samplers:
        if navier_stokes_report.find(run, sampler):
            print(f"{run.command(sampler)}: measured already")
        else:
            missing.append(sampler)
    return missing


def measure_run(run: Run, args: argparse.Namespace, process: Process) -> None:
    """Train a run unless it is trained, and append the records of its samplers that lack one."""
    missing = list_missing(run, args.samplers)
    if not missing:
        return
    rate = measure.matmul_rate(process.device, torch.float32)
    record = {
        **run._asdict(),
        "changes": list(run.changes),
        "commit": commit(),
        "gflops": rate / 1e9,
        "threads": torch.get_num_threads(),
    }
    if run.variant in UNTRAINED:
        record |= {"sampler": "default", "command": run.command("default")}
        record["scores"] = score_repeated(build_config(run))
        navier_stokes_report.append(shorten(record))
        return
    config, path = train(run, process)
    forecaster, _ = load(path, process.device)
    per_update = measure.flops_per_update(config)
    changed = BASE | changes_of(run)
    record |= {
        "seconds": logged_seconds(path.parent / "metrics.jsonl", config.train.batch_size),
        "parameters": sum(p.numel() for p in forecaster.net.parameters()),
        "flops_per_update": per_update,
        "updates": config.train.steps,
        "trained_flops": float(per_update * config.train.steps),
        "settings": {name: value for name, value in changed.items() if name != "data.root"},
    }
    for sampler in missing:
        began = time.perf_counter()
        use_sampler(forecaster, config, sampler)
        own = {"sampler": sampler, "command": run.command(sampler, args.rollout)}
        rollout = args.rollout
        if rollout is None:
            rollout = ROLLOUT if sampler == "default" else 0
        # The other samplers are compared at the first lead time only.
        leads = 0 if sampler == "default" else 1
        own["scores"] = score(forecaster, path, leads, args.samples)
        if rollout:
            use_sampler(forecaster, config, sampler)
            own["rollout"] = roll_out(forecaster, rollout)
        own["scoring_seconds"] = time.perf_counter() - began
        navier_stokes_report.append(shorten({**record, **own}))
        quotient = own["scores"]["crps"]["quotient"]
        print(f"{own['command']}: CRPS / oracle {quotient['value'][0]:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.navier_stokes", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--worlds", nargs="+", default=["navier_stokes"], choices=list(WORLDS), metavar="WORLD")
    names = [*VARIANTS, *TUNED]
    add("--variants", nargs="+", default=["follmer"], choices=names, metavar="VARIANT")
    add("--taus", nargs="+", type=float, default=[0.5], help="forecast step, in units of time")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    add("--flops", type=float, help=f"budget of a training (default {FLOPS:g}; heat: a tenth)")
    about = "`default`, or DIFFUSION:STEPS[:SOLVER], e.g. sigma:5 (default: default)"
    add("--samplers", nargs="+", default=["default"], metavar="SAMPLER", help=about)
    add("--samples", type=int, default=SAMPLES, help="members per state (default %(default)s)")
    about = f"steps of the long roll-outs, 0: none (default: {ROLLOUT} for `default`, else none)"
    add("--rollout", type=int, help=about)
    about = "settings on top of the variant, which become part of its name"
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=about)
    add("--report", action="store_true", help="write table and figures to benchmarks/RESULTS.md")
    add("--check", action="store_true", help="exit with code 1 if a target is missed")
    args = parser.parse_args()
    for tau in args.taus:
        if tau not in (0.5, 1, 2):
            raise UserError(f"--taus must be 0.5, 1 or 2, got {tau:g}")
    for sampler in args.samplers:
        if sampler != "default":
            navier_stokes_report.parse_sampler(sampler)
    if args.rollout and args.rollout < ROLLED_END:
        raise UserError(f"--rollout must be 0 or at least {ROLLED_END}, got {args.rollout}")
    if args.samples < 4:
        raise UserError(f"--samples must be at least 4, got {args.samples}")
    return args


def main() -> None:
    args = parse()
    if args.report or args.check:
        navier_stokes_report.report(args.report, args.check)
        return
    process = start()
    for seed in args.seeds:
        for world in args.worlds:
            flops = args.flops or FLOPS * WORLDS[world].flops
            for tau in args.taus:
                for variant in args.variants:
                    run = Run(world, variant, tau, seed, flops, tuple(args.set))
                    measure_run(run, args, process)


if __name__ == "__main__":
    run_command(main)
