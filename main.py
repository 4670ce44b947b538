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
import train
import vqvae
from batches.transforms import ClipTransform
from batches.windows import Windows
from batches.workers import check_shared_memory
from configs import DATASETS, Config
from forecaster import load as load_forecaster
from runtime import checkpoints, logs, resume
from runtime.console import UserError, run_command
from runtime.folders import stage_lock
from runtime.process import Process, start


class Clock:
    """Seconds of each stage."""

    def __init__(self):
        self.last = time.perf_counter()
        self.laps = []

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps.append((name, now - self.last))
        self.last = now

    def __str__(self) -> str:
        laps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.laps)
        return f"time           {laps}"


def run(config: Config, ckpt: str | None = None) -> None:
    """Run all stages: prepare, train, forecast. ckpt: a checkpoint whose weights to start from."""
    process = start()
    clock = Clock()
    config, path, windows = train_network(config, process, ckpt, clock)
    if process.first:
        report_forecasts(config, path, windows, process, clock)
    process.close()


def train_network(
    config: Config, process: Process, ckpt: str | None, clock: Clock
) -> tuple[Config, Path, Windows | None]:
    """Run every stage up to a trained velocity network.

    Returns the config with the statistics of the latents, the checkpoint, and the clips of
    --overfit (or None).
    """
    dir = checkpoint_dir(config)
    state = check_before_work(config, dir, process, ckpt)
    # Only one run at a time prepares data, VQVAE and latents below output.root.
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
        latent = data.latents_of(config, source, autoencoder, state, process)
        config = dataclasses.replace(config, latent=latent)
        clock.lap("latents")

    path = train.fit(config, source, autoencoder, windows, process, dir, state)
    clock.lap("training")
    return config, path, windows


def report_forecasts(
    config: Config, path: Path, windows: Windows | None, process: Process, clock: Clock
) -> None:
    """Forecast held-out clips, write the results and print the table."""
    # Imported late: training needs no pages and no plots.
    import sample
    from report import results

    forecaster, step = load_forecaster(path, process.device)
    # The sampling settings of this command replace those of the checkpoint.
    forecaster.config = config
    result, out = sample.evaluate(forecaster, step, windows=windows, ckpt=path)
    clock.lap("sampling")
    print(sample.table(result))
    print(results.paths(out, config.sample.format, path))
    print(clock)


def checkpoint_dir(config: Config) -> Path:
    return Path(config.output.root) / "checkpoints" / config.run_id


def check_before_work(config: Config, dir: Path, process: Process, ckpt: str | None) -> dict | None:
    """Find the user's mistakes before any work. Returns the checkpoint to resume from, or the
    weights to start from (--ckpt), or None."""
    if problems := data.missing(config):
        found = "; ".join(problems)
        raise UserError(f"--dataset {config.dataset}, looked in {Path.cwd()}: {found}")
    if process.first:
        logs.wandb_mode(config.wandb.mode)
    check_batch_size(config, process)
    if config.data.augmented and not config.train.overfit:
        check_shared_memory(config)
    if config.data.augment:
        ClipTransform(config.data.augment, config.data.image_size)
    state = checkpoints.load_latest(dir)
    if state is None:
        return {**resume.check_start(config, ckpt), "step": 0} if ckpt else None
    if ckpt and process.first:
        print(f"{dir} has a checkpoint and resumes from it; --ckpt {ckpt} is ignored")
    resume.check_same_run(configs.from_dict(state["config"]), config, dir)
    return state


def check_batch_size(config: Config, process: Process) -> None:
    parts = process.world * config.train.accumulate
    if config.train.batch_size % parts == 0:
        return
    shared_by = f"{process.world} processes"
    if config.train.accumulate > 1:
        shared_by += f" in {config.train.accumulate} parts each"
    raise UserError(
        f"train.batch_size = {config.train.batch_size} cannot be divided evenly among "
        f"{shared_by}; make it a multiple of {parts}"
    )


def plan(config: Config) -> list[str]:
    """What a run would do (--dry_run), as lines of text."""
    root, dir = Path(config.data.root), checkpoint_dir(config)
    lines = [f"missing: {problem}" for problem in data.missing(config)]
    if not lines and not root.exists():
        lines.append(f"generate the {config.data.generate} stream in {root}")
    if not config.vqvae.ckpt and config.vqvae.kind != "latents":
        lines.append(f"train the small VQVAE for {config.vqvae.steps} updates, unless it is there")
    if not config.data.augmented:
        lines.append(f"encode every frame once, under {Path(config.output.root) / 'latents'}")

    steps = f"{config.train.steps}" if config.train.steps else "as many as the stream has windows:"
    updates = f"{steps} updates"
    if state := checkpoints.load_latest(dir):
        updates += f", of which {state['step']} are done"
    if config.data.mode != "clips":
        updates += f", data.mode={config.data.mode}, {config.data.windows} windows"
        updates += f" of {config.data.clip} frames"
    lines.append(f"train {config.model.name} ({config.flow.interpolant}) for {updates}, in {dir}")

    sample = config.sample
    lines.append(
        f"forecast {sample.num_videos} {sample.split} clips, {sample.num_samples} futures each"
    )
    return lines


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
