"""Train a video forecaster: `python main.py --dataset kth --interpolant follmer`. See README.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from contextlib import nullcontext
from pathlib import Path

import configs
import data
import interpolants
import sample
import train
import vqvae
from batches.windows import Windows
from configs import DATASETS, Config
from forecaster import load as load_forecaster
from report import results
from runtime import checkpoints, logs, resume
from runtime.console import UserError, run_command
from runtime.folders import stage_lock
from runtime.process import Process, start


# ------------------------------------------------------------------------------------------------------ before any work
def before_any_work(config: Config, dir: Path, process: Process, ckpt: str | None) -> dict | None:
    """Mistakes that can be known now are told now; -> the checkpoint to go on from, or to start from (--ckpt)."""
    if problems := data.missing(config):
        raise UserError(
            f"--dataset {config.dataset}, looked in {Path.cwd()}: " + "; ".join(problems)
        )
    if process.first:
        logs.wandb_mode(config.wandb.mode)
    parts = process.world * config.train.accumulate
    if config.train.batch_size % parts:
        asked = f"{process.world} processes" + f" in {config.train.accumulate} parts each" * (
            config.train.accumulate > 1
        )
        raise UserError(
            f"train.batch_size = {config.train.batch_size} cannot be shared alike by {asked}; make it a multiple "
            f"of {parts}"
        )
    state = checkpoints.load_latest(dir)
    if state is None:
        return {**resume.check_start(config, ckpt), "step": 0} if ckpt else None
    if ckpt and process.first:
        print(
            f"{dir} has begun already and goes on from its own checkpoint; --ckpt {ckpt} is left alone"
        )
    resume.check_same_run(configs.from_dict(state["config"]), config, dir)
    return state


def plan(config: Config) -> list[str]:
    """--dry_run: what a run would do, without doing it."""
    root, dir = Path(config.data.root), Path(config.output.root) / "checkpoints" / config.run_id
    lines = [f"missing: {problem}" for problem in data.missing(config)]
    if not lines and not root.exists():
        lines.append(f"generate the {config.data.generate} stream in {root}")
    if not config.vqvae.ckpt and config.vqvae.kind != "latents":
        lines.append(f"train the small VQVAE for {config.vqvae.steps} updates, unless it is there")
    if not config.data.augmented:
        lines.append(f"encode every frame once, under {Path(config.output.root) / 'latents'}")
    state = checkpoints.load_latest(dir)
    done = f", of which {state['step']} are done" if state else ""
    steps = f"{config.train.steps}" if config.train.steps else "as many as the stream has windows:"
    if config.data.mode != "clips":
        done += f", data.mode={config.data.mode}, {config.data.windows} windows of {config.data.clip} frames"
    lines.append(
        f"train {config.model.name} ({config.flow.interpolant}) for {steps} updates{done}, in {dir}"
    )
    lines.append(
        f"forecast {config.sample.num_videos} {config.sample.split} clips, {config.sample.num_samples} futures each"
    )
    return lines


def run(config: Config, ckpt: str | None = None) -> None:
    """All stages of `python main.py`."""
    process, clock = start(), Clock()
    config, path, windows = train_network(config, process, ckpt, clock)
    if process.first:
        forecaster, step = load_forecaster(path, process.device)
        forecaster.config = (
            config  # what the checkpoint says of sampling may be older than this command
        )
        result, out = sample.evaluate(forecaster, step, windows=windows, ckpt=path)
        clock.lap("sampling")
        print(sample.table(result))
        print(results.paths(out, config.sample.format, path))
        print(clock)
    process.close()


def train_network(
    config: Config, process: Process, ckpt: str | None, clock: Clock
) -> tuple[Config, Path, Windows | None]:
    """Every stage up to a trained velocity network; -> (config with the latents' statistics, checkpoint, the clips of
    --overfit)."""
    dir = Path(config.output.root) / "checkpoints" / config.run_id
    start = before_any_work(config, dir, process, ckpt)
    with stage_lock(config.output.root) if process.first else nullcontext():
        data.ensure_data(config, process)
        clock.lap("data")
        shards = data.open_split(config, "train")
        data.check_lengths(config, shards)
        config = data.with_steps(config, shards)
        autoencoder = vqvae.ensure_vqvae(config, shards, process)
        clock.lap("VQVAE")
        windows = data.overfit_windows(config, shards) if config.train.overfit else None
        source = data.batches_from(config, shards, autoencoder, windows, process)
        config = dataclasses.replace(
            config, latent=data.latents_of(config, source, autoencoder, start, process)
        )
        clock.lap("latents")
    path = train.fit(config, source, autoencoder, windows, process, dir, start)
    clock.lap("training")
    return config, path, windows


class Clock:
    """Seconds of each stage."""

    def __init__(self):
        self.last, self.laps = time.perf_counter(), []

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps.append((name, now - self.last))
        self.last = now

    def __str__(self) -> str:
        return "time           " + ", ".join(
            f"{name} {seconds:.0f} s" for name, seconds in self.laps
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python main.py",
        description="Train a video forecaster and sample from it. "
        "The same command run again resumes where the last one stopped.",
        epilog=configs.describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", default="ball_stn", help=", ".join(DATASETS))
    parser.add_argument("--interpolant", default="follmer", help=", ".join(interpolants.TABLE))
    parser.add_argument(
        "--overfit",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: learn one batch of clips by heart",
    )
    parser.add_argument("--ckpt", help="a checkpoint whose weights to start from")
    parser.add_argument("--wandb_entity", default="")
    parser.add_argument("--wandb_project", default="driftcast")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="any other field of configs.py, e.g. train.steps=5000 model.width=192",
    )
    parser.add_argument(
        "--dry_run",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: print the merged config and the plan",
    )
    args = parser.parse_args()
    flags = {
        "flow.interpolant": args.interpolant,
        "train.overfit": bool(args.overfit),
        "wandb.entity": args.wandb_entity,
        "wandb.project": args.wandb_project,
    }
    config = configs.build(args.dataset, flags | configs.parse_overrides(args.set))
    if args.dry_run:
        print(json.dumps(configs.to_dict(config), indent=1))
        print("\n".join(plan(config)))
        return
    run(config, args.ckpt)


if __name__ == "__main__":
    run_command(main)
