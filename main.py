"""Train a video forecaster: `python main.py --dataset kth --interpolant follmer`. See README.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

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
from forecaster import measure_frame
from report import videos
from runtime import budget, checkpoints, logs, resume
from runtime.budget import Stage
from runtime.console import UserError, run_command
from runtime.folders import stage_lock
from runtime.process import Process, start

# Name of the file in a run's folder that stores the numbers of updates chosen by --minutes.
PLAN = "plan.json"


class Clock:
    """A stopwatch that measures the seconds of each stage."""

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


def run(config: Config, ckpt: str | None = None, minutes: float | None = None) -> None:
    """Run all stages: prepare, train, forecast.

    ckpt: a checkpoint to take initial weights from. minutes: shorten the trainings of the VQVAE and
    of the velocity network, so that the run takes about this long.
    """
    process = start()
    clock = Clock()
    config, path, windows = train_network(config, process, ckpt, clock, minutes)
    if process.first:
        report_forecasts(config, path, windows, process, clock)
    process.close()


def train_network(
    config: Config, process: Process, ckpt: str | None, clock: Clock, minutes: float | None = None
) -> tuple[Config, Path, Windows | None]:
    """Run every stage up to a trained velocity network.

    Returns the config with the statistics of the latents, the path of the checkpoint, and the
    windows of --overfit (None without it).
    """
    dir = checkpoint_dir(config)
    # First, because the checks below compare the config with that of the checkpoint.
    config, planned = apply_plan(config, dir, process)
    state = check_before_work(config, dir, process, ckpt)
    if minutes and not planned:
        config = make_plan(config, minutes, dir, process)
    # Only one run at a time prepares data, VQVAE and latents below output.root.
    with stage_lock(config.output.root) if process.first else nullcontext():
        data.ensure_data(config, process)
        clock.lap("data")

        shards = data.open_split(config, "train")
        data.check_lengths(config, shards)
        config = data.resolve_steps(config, shards)
        if process.first:
            expected = budget.describe_run(remaining_stages(config, process), time.time())
            print(expected, file=sys.stderr)
        autoencoder = vqvae.ensure_vqvae(config, shards, process)
        clock.lap("VQVAE")

        windows = data.overfit_windows(config, shards) if config.train.overfit else None
        source = data.build_source(config, shards, autoencoder, windows, process)
        if config.train.own and source.earlier is None and process.first:
            print("train.own has no effect: it needs clips without augmentation")
        latent = data.resolve_latents(config, source, autoencoder, state, process)
        config = dataclasses.replace(config, latent=latent)
        clock.lap("latents")

    clips = preview_clips(config, windows) if process.first else None
    path = train.fit(config, source, autoencoder, clips, process, dir, state)
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
    """Raise UserError for the user's mistakes before any work. Returns the checkpoint to resume
    from, or the weights to start from (--ckpt), or None."""
    if problems := data.missing(config):
        found = "; ".join(problems)
        raise UserError(f"--dataset {config.dataset}, looked in {Path.cwd()}: {found}")
    # Called only because it raises UserError; so is ClipTransform below.
    if process.first:
        logs.wandb_mode(config.wandb.mode)
    check_batch_size(config, process)
    if config.data.augmented and not config.train.overfit:
        check_shared_memory(config)
    if config.data.augment:
        ClipTransform(config.data.augment, config.data.image_size)
    state = checkpoints.load_latest(dir)
    if state is None:
        if not ckpt:
            return None
        # Training and its average both start from the averaged weights of the other run.
        weights = resume.check_start(config, ckpt)["ema"]
        return {"model": weights, "ema": weights, "step": 0}
    if ckpt and process.first:
        print(f"{dir} has a checkpoint and resumes from it; --ckpt {ckpt} is ignored")
    resume.check_same_run(configs.from_dict(state["config"]), config, dir)
    return state


def check_batch_size(config: Config, process: Process) -> None:
    """Raise UserError if the processes cannot take equal shares of a batch."""
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


def preview_clips(config: Config, windows: Windows | None) -> data.Clips | None:
    """Read the clips of the previews, from the split that is forecast after the training; None if
    there are no previews."""
    if not config.train.sample_every:
        return None
    return data.preview_clips(config, data.open_split(config, config.sample.split), windows)


# -------------------------------------------------------------------- time
def remaining_stages(config: Config, process: Process) -> list[Stage]:
    """List the stages that are not finished, with rates measured on this machine in a few seconds.

    Changes no file of the run and no random state.
    """
    device = process.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        shards = data.open_split(config, "train") if Path(config.data.root).exists() else None
        vqvae_updates = vqvae.updates_left(config, shards)
        autoencoder = vqvae.load_or_build(config, shards, device)
        config = data.assume_latents(config, shards, autoencoder, device)
        state = checkpoints.load_latest(checkpoint_dir(config))
        updates = max(0, config.train.steps - (state["step"] if state else 0))
        futures = config.sample.num_videos * config.sample.num_samples * config.data.predict
        futures += train.preview_frames(config, updates)
        # Cached latents belong to a trained autoencoder: before its training ends, there are none.
        finished = None if vqvae_updates else autoencoder
        # (stage, number of items that are left, function that measures the seconds per item)
        work = [
            ("data", data.frames_to_generate(config), lambda: data.measure_generation(config)),
            ("VQVAE", vqvae_updates, lambda: vqvae.measure_update(config, device, shards)),
            (
                "latents",
                data.frames_to_encode(config, shards, finished),
                lambda: data.measure_encoding(config, autoencoder, device, shards),
            ),
            (
                "training",
                updates,
                lambda: train.measure_update(config, autoencoder, device, process.world),
            ),
            ("forecasts", futures, lambda: measure_frame(config, autoencoder, device)),
            ("videos", config.sample.num_videos, lambda: videos.measure_writing(config)),
        ]
        stages = []
        for name, count, measure in work:
            if count:
                stages.append(Stage(name, count, measure(), name in ("VQVAE", "training")))
    return stages


def apply_plan(config: Config, dir: Path, process: Process) -> tuple[Config, bool]:
    """Set the numbers of updates that plan.json in the run's folder states. -> (config, True if
    there is a plan)."""
    plan = process.agree(budget.read_plan(dir / PLAN) if process.first else None)
    if plan is None:
        return config, False
    if process.first:
        print(budget.describe_plan(plan, dir / PLAN))
    return configs.update(config, plan["settings"]), True


def make_plan(config: Config, minutes: float, dir: Path, process: Process) -> Config:
    """Shorten both trainings so that the run takes `minutes`, and write plan.json."""
    if (dir / "latest.pt").exists():
        raise UserError(
            f"{dir} holds a run that was started without --minutes; "
            "name a new run: --set output.run_id=NAME"
        )
    plan = None
    # Only one process measures, because all must make the same number of updates.
    if process.first:
        plan = choose_updates(config, remaining_stages(config, process), minutes)
        budget.write_plan(dir / PLAN, plan)
        print(budget.describe_plan(plan, dir / PLAN))
    plan = process.agree(plan)
    return configs.update(config, plan["settings"])


def choose_updates(config: Config, stages: list[Stage], minutes: float) -> dict:
    """Plan a run of `minutes`: shorten both trainings by the same factor."""
    share = budget.share_that_fits(stages, minutes)
    # Warm-up and previews keep their place in the shortened training.
    settings = {
        "vqvae.steps": config.vqvae.steps,
        "train.steps": config.train.steps,
        "train.warmup": config.train.warmup,
        "train.sample_every": config.train.sample_every,
    }
    settings = {name: math.ceil(share * value) for name, value in settings.items()}
    return {"minutes": minutes, "settings": settings}


# -------------------------------------------------------------------- plan
def describe_work(config: Config) -> list[str]:
    """Describe what a run would do (--dry_run), in lines of text."""
    root, dir = Path(config.data.root), checkpoint_dir(config)
    lines = [f"missing: {problem}" for problem in data.missing(config)]
    if not lines and not root.exists():
        lines.append(f"generate the {config.data.generate} stream in {root}")
    if not config.vqvae.ckpt and not config.vqvae.stored:
        lines.append(f"train the small VQVAE for {config.vqvae.steps} updates, if not yet done")
    if not config.data.augmented and config.vqvae.kind != "none":
        lines.append(f"encode every frame once, under {Path(config.output.root) / 'latents'}")

    updates = "one update per window of the stream"
    if config.train.steps:
        updates = f"{config.train.steps} updates"
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python main.py",
        description="Train a video forecaster and sample from it. "
        "The same command run again resumes where the last one stopped.",
        epilog=configs.describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset", default="ball_stn", help=f"one of {', '.join(DATASETS)}; default: %(default)s"
    )
    parser.add_argument(
        "--interpolant",
        default="follmer",
        help=f"one of {', '.join(interpolants.TABLE)}; default: %(default)s",
    )
    parser.add_argument(
        "--overfit",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: train on four clips only, and forecast the same clips",
    )
    parser.add_argument("--ckpt", help="a checkpoint to take initial weights from")
    parser.add_argument(
        "--minutes",
        type=float,
        help="shorten both trainings so that the whole run takes about this long on this machine",
    )
    entity = "team or user on wandb; default: yours"
    parser.add_argument("--wandb_entity", default="", help=entity)
    project = "project on wandb; default: %(default)s"
    parser.add_argument("--wandb_project", default="driftcast", help=project)
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
        help="1: print the merged config, the plan and the expected time; write no file",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    flags = {
        "flow.interpolant": args.interpolant,
        "train.overfit": bool(args.overfit),
        "wandb.entity": args.wandb_entity,
        "wandb.project": args.wandb_project,
    }
    overrides = configs.parse_overrides(args.set)
    config = configs.build(args.dataset, flags | overrides)
    if args.minutes is not None:
        config = check_minutes(args.minutes, config, overrides)
    if args.dry_run:
        print_plan(config, args.minutes)
    else:
        run(config, args.ckpt, args.minutes)


def check_minutes(minutes: float, config: Config, overrides: dict) -> Config:
    """Check --minutes against the other settings, and append it to the run id."""
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes must be > 0, got {minutes:g}")
    chosen = {"train.steps", "vqvae.steps"} & overrides.keys()
    if chosen:
        raise UserError(f"--minutes chooses {min(chosen)}; leave one of the two out")
    if not config.train.steps:
        raise UserError(
            "--minutes cannot shorten a run that visits the whole stream (train.steps=0); "
            "lower data.stream instead"
        )
    if config.output.run_id:
        return config
    # Another run id, so that a shortened run never resumes the full run.
    return configs.update(config, {"output.run_id": f"{config.run_id}-{minutes:g}min"})


def print_plan(config: Config, minutes: float | None) -> None:
    """--dry_run: print the config, what a run would do, and the expected time."""
    # A world of one, so that no process of a dry run waits for another.
    process = Process(0, 1, start().device)
    dir = checkpoint_dir(config)
    config, planned = apply_plan(config, dir, process)
    print(json.dumps(configs.to_dict(config), indent=1))
    print("\n".join(describe_work(config)))
    if data.missing(config):
        return
    stages = remaining_stages(config, process)
    if minutes and not planned:
        shortened = choose_updates(config, stages, minutes)
        print(budget.describe_plan(shortened, dir / PLAN))
        stages = budget.shorten(stages, budget.share_that_fits(stages, minutes))
    print(budget.describe_run(stages, time.time()))


if __name__ == "__main__":
    run_command(main)
