"""Lifelong learning from one stream: compare replay with offline training, or measure its memory.

    python -m benchmarks.lifelong
    python -m benchmarks.lifelong --memory

The first command trains a small network on the stationary and the non-stationary ball stream:
offline, and in order with and without replay. It evaluates the last checkpoint of each training,
and forecasts every segment of the stream with the checkpoints kept along the stream. The table goes
to benchmarks/RESULTS.md, the curves to benchmarks/lifelong.png; the last line printed is the table
in JSON. A second start resumes.

The second command trains along a stream of 1,000,000 frames, on 20,000 evenly spaced windows with
full replay. It writes to benchmarks/RESULTS.md the peak memory, from drawing the first ball to the
last update, and the rates at which windows are read.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import configs
import data
import evaluate
import vqvae
from batches.stream import StreamTriples, StreamWindows
from benchmarks import measure, results
from configs import Config
from evaluation.networks import COMMAND
from main import Clock, train_network
from report import plots
from report.results import read_metrics
from runtime.console import UserError, run_command
from runtime.process import start
from scripts import forgetting

DATASETS = ("ball_stn", "ball_nstn")
WAYS = {
    "offline": {"data.mode": "offline"},
    "no replay": {"replay.size": "0"},
    "replay 5 %": {"replay.size": "0.05"},
    "full replay": {"replay.size": "full"},
}
# Number of parts of a stream; a checkpoint is kept at the end of each part.
SEGMENTS = 5
# The sizes of the networks that are trained along the long stream.
SMALL = {
    "vqvae.width": 16,
    "vqvae.depth": 1,
    "vqvae.steps": 200,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
}


def train(dataset: str, way: str, args: argparse.Namespace) -> list[Path]:
    """Train one network, unless it is trained already; return the checkpoint of each segment."""
    # A window has 10 frames, so a stream has `stream - 9` windows, and one update per window.
    kept = (args.stream - 9) // SEGMENTS
    name = way.replace(" ", "_").replace("_%", "")
    overrides = {
        "data.mode": "stream",
        "data.stream": args.stream,
        "data.held_out": args.stream // 5,
        "train.steps": kept * SEGMENTS,
        "data.root": f"data/{dataset}_{args.stream}",
        "model.width": 64,
        "train.seed": args.seed,
        # The checkpoint at the end of each segment is kept for good, and of the others only the
        # last.
        "train.keep": 1,
        "train.keep_every": kept,
        "train.save_every": kept,
        "wandb.mode": "disabled",
        "output.run_id": f"bench-lifelong-{dataset}-{name}-{args.stream}-{args.seed}",
        **WAYS[way],
        **configs.parse_overrides(args.set),
    }
    _, ckpt, _ = train_network(configs.build(dataset, overrides), start(), None, Clock())
    return [ckpt.with_name(f"step_{kept * (k + 1):08d}.pt") for k in range(SEGMENTS)]


# ------------------------------------------------------------------------- quality of the forecasts
METRICS = ("fvd", "kvd", "minade", "colorkl", "mse", "crps")
SPLITS = ("train", "test")


def evaluate_checkpoint(
    ckpt: Path, split: str, args: argparse.Namespace, known: dict
) -> dict[str, dict]:
    """{metric: {"mean", "se"}} of a checkpoint's forecasts under the protocol lifelong_stream.

    `mse_ratio` is the MSE divided by that of repeating the last frame. `known` caches the I3D
    features of real videos.
    """
    flags = ["--ckpt", str(ckpt), "--protocol", "lifelong_stream", "--split", split]
    flags += ["--videos", str(args.windows), "--weights", str(args.weights)]
    flags += ["--metrics", *METRICS, "--keep", "3"]
    result = read_metrics(evaluate.ensure_results(evaluate.parse(flags), start(), known))
    mse_ratio = result["ratio_to_repeat_last"]["mse"]["all"]
    return result["summary"] | {"mse_ratio": {"mean": mse_ratio, "se": None}}


def evaluate_all(args: argparse.Namespace) -> tuple[dict, dict]:
    """Train and evaluate every dataset in every way.

    Returns {(dataset, way): {split: metrics}} and {(dataset, way): rows of scripts/forgetting.py}.
    """
    summaries = {}
    curves = {}
    for dataset in args.datasets:
        # The real videos are the same for all ways of training, so their features are shared.
        known: dict[bytes, np.ndarray] = {}
        for way in args.ways:
            ckpts = train(dataset, way, args)
            summaries[dataset, way] = {
                split: evaluate_checkpoint(ckpts[-1], split, args, known) for split in SPLITS
            }
            curves[dataset, way], _ = forgetting.measure_curves(
                ckpts[-1].parent, SEGMENTS, args.segment_windows, 3, {}
            )
    return summaries, curves


COLUMNS = {
    "fvd": "FVD",
    "kvd": "KVD",
    "minade": "minADE (pixels)",
    "colorkl": "ColorKL (nats)",
    "mse_ratio": "MSE / repeat last",
}


def quality_table(dataset: str, summaries: dict) -> list[str]:
    """Markdown: a row per way of training, a column per metric and split."""
    ways = [way for own, way in summaries if own == dataset]
    columns = [(name, split) for name in COLUMNS for split in SPLITS]
    head = [f"{COLUMNS[name]}, {split}" for name, split in columns]
    lines = [f"| {dataset} | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(columns)]
    for way in ways:
        cells = [format_cell(summaries[dataset, way][split][name]) for name, split in columns]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")

    # The autoencoded truth: about the best values that forecasts of this autoencoder can reach.
    bounds = []
    for name, split in columns:
        value = summaries[dataset, ways[0]][split].get(f"{name}_autoencoder")
        bounds.append(format_cell(value) if value else "")
    lines.append("| autoencoder alone | " + " | ".join(bounds) + " |")
    return lines


def format_cell(value: dict) -> str:
    """Format "mean ± standard error", or the mean alone where there is no error."""
    mean = evaluate.format_number(value["mean"])
    return mean if value["se"] is None else f"{mean} ± {value['se']:.2g}"


def forgetting_table(dataset: str, curves: dict, metric: str = "mse_ratio") -> list[str]:
    """Markdown: the first segment's metric, per way of training, once it is seen and at the end."""
    lines = [
        f"| {dataset}, segment 1, MSE / repeat last | just seen | at the end |",
        "| --- | ---: | ---: |",
    ]
    for (own, way), rows in curves.items():
        if own == dataset:
            first = [row[metric] for row in rows if row["segment"] == 0]
            lines.append(f"| {way} | {format_cell(first[0])} | {format_cell(first[-1])} |")
    return lines


def report_quality(args: argparse.Namespace) -> str:
    """Write the section of RESULTS.md and the figure; return the table in JSON."""
    summaries, curves = evaluate_all(args)
    # A row of panels per dataset, a column per way of training.
    panels = [(f"{dataset}, {way}", rows, "mse_ratio") for (dataset, way), rows in curves.items()]
    plots.forgetting(panels, args.out / "lifelong.png", columns=len(args.ways))

    # All trainings have the same number of updates.
    steps = curves[args.datasets[0], args.ways[0]][-1]["updates"]
    lines = [
        f"Streams of {args.stream:,} frames of 32x32, {steps:,} updates of batch 2 with a conv net "
        "of width 64, one seed, averaged weights of the last checkpoint. Protocol lifelong_stream: "
        f"{args.windows} windows from the first frame of a stream to its last, 5 -> 5, 3 samples; "
        "FVD and KVD of all 10 frames and the first sample; ± is a standard error over windows. "
        f"{results.describe_machine()}. Made by `{command()}`.",
        "",
    ]
    for dataset in args.datasets:
        lines += [*quality_table(dataset, summaries), "", *forgetting_table(dataset, curves), ""]
    lines += [
        f"Each segment, a {SEGMENTS}th of the stream, forecast by the checkpoints at the ends of "
        f"all segments ({args.segment_windows} windows of each):",
        "",
        "![Forgetting curves](lifelong.png)",
    ]
    text = "\n".join(lines)
    print(text)
    print(f"table          {results.write('Lifelong learning', text, args.out)}")
    print(f"figure         {args.out / 'lifelong.png'}")

    means = {}
    for (dataset, way), own in summaries.items():
        means[f"{dataset}, {way}"] = {
            split: {name: own[split][name]["mean"] for name in COLUMNS} for split in SPLITS
        }
    return json.dumps(means)


# ----------------------------------------------------------------------------------- a long stream
class Peaks(Clock):
    """A clock that also records the peak memory so far at the end of each stage.

    peaks: [(stage, GB)]. Resident pages of memory-mapped files count.
    """

    def __init__(self):
        super().__init__()
        self.peaks: list[tuple[str, float]] = []

    def lap(self, name: str) -> None:
        super().lap(name)
        self.peaks.append((name, measure.peak_memory(torch.device("cpu")) / 1e9))


def measure_rate(
    read: Callable[[int], object], count: int, seconds: float = 5.0
) -> tuple[float, float]:
    """Calls of read(0), ..., read(count - 1) per second: (of wall time, of CPU time).

    The CPU time of this process excludes other processes on the same core. Stops after `seconds` of
    CPU time, or after `count` calls.
    """
    wall_began = time.perf_counter()
    cpu_began = time.process_time()
    k = 0
    while k < count and time.process_time() - cpu_began < seconds:
        read(k)
        k += 1
    return k / (time.perf_counter() - wall_began), k / (time.process_time() - cpu_began)


def build_long_stream(args: argparse.Namespace) -> Config:
    return configs.build(
        "ball_stn",
        {
            "data.mode": "stream",
            "data.stream": args.frames,
            "data.held_out": 1_000,
            "data.root": f"data/ball_stn_{args.frames}",
            "data.windows": "spaced",
            "data.num_windows": min(20_000, args.frames // 10),
            "replay.size": "full",
            "train.log_every": 1_000,
            "train.save_every": 10_000,
            "output.run_id": f"bench-memory-{args.frames}",
            "wandb.mode": "disabled",
            **SMALL,
            **configs.parse_overrides(args.set),
        },
    )


def read_rates(config: Config) -> dict[str, tuple[float, float]]:
    """{what is read: windows per second (of wall time, of CPU time)}.

    Reads windows of frames and of latents, in order and at random, and the training's batches.
    """
    process = start()
    frames = data.open_split(config, "train")
    autoencoder = vqvae.ensure_vqvae(config, frames, process)
    latents = data.ensure_latents(config, frames, autoencoder, process)
    # The same source as in training: its batches are live and replayed triples.
    source = StreamTriples(config, latents, process.device)
    found = {}
    for name, shards in (("frames", frames), ("latents", source.shards)):
        windows = StreamWindows(shards, config.data.clip)
        count = len(windows)
        places = np.random.default_rng(0).integers(count, size=count)
        found[f"{name}, in order"] = measure_rate(windows.__getitem__, count)
        found[f"{name}, at random"] = measure_rate(
            lambda k, windows=windows, places=places: windows[int(places[k])], count
        )
    batches = source.batches(0, len(source.windows))
    by_wall, by_cpu = measure_rate(lambda _: next(batches), len(source.windows))
    B = config.train.batch_size
    found[f"batches of {B} triples, live and replayed"] = (B * by_wall, B * by_cpu)
    return found


def report_memory(args: argparse.Namespace) -> str:
    """Train along the long stream; return the section of RESULTS.md."""
    clock = Peaks()
    config, _, _ = train_network(build_long_stream(args), start(), None, clock)
    peaks = ", ".join(f"{value:.2f} GB after {name}" for name, value in clock.peaks)
    laps = "; ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.laps)
    files = (Path(config.data.root) / "train").glob("*.hdf5")
    size = sum(path.stat().st_size for path in files) / 1e9
    lines = [
        f"ball_stn, {args.frames:,} frames of 32x32 ({size:.1f} GB), {config.train.steps:,} "
        f"updates of batch {config.train.batch_size} over its {config.data.windows} windows of "
        f"{config.data.clip} frames, replay.size={config.replay.size}. "
        f"{results.describe_machine()}. Made by `{command()}` ({laps}).",
        "",
        f"**Peak resident memory: {clock.peaks[-1][1]:.2f} GB** (up to each stage: {peaks}; mapped "
        f"files count). Windows of {config.data.clip} frames that one process reads from the disk "
        "or from the system's page cache:",
        "",
        "| what | windows per second | per second of CPU time |",
        "| --- | --- | --- |",
    ]
    for name, (by_wall, by_cpu) in read_rates(config).items():
        lines.append(f"| {name} | {by_wall:,.0f} | {by_cpu:,.0f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the command
def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lifelong", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--memory",
        action="store_true",
        help="measure peak memory and read rates along a long stream",
    )
    add("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    add("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="ways of training")
    add(
        "--stream",
        type=int,
        default=20_000,
        help="frames of the balls' training streams (default 20000)",
    )
    add("--seed", type=int, default=0)
    add("--windows", type=int, default=100, help="windows evaluated per stream (default 100)")
    add(
        "--segment_windows",
        type=int,
        default=20,
        help="windows evaluated per segment, for the curves (default 20)",
    )
    weights = Path("weights/metrics")
    add("--weights", type=Path, default=weights, help="folder of the metric networks")
    add(
        "--frames",
        type=int,
        default=1_000_000,
        help="frames of the long stream of --memory (default 1000000)",
    )
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="any other field of the trainings",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    if start().world > 1:
        raise UserError("the benchmark runs as one process; start it without torchrun")
    if args.memory:
        text = report_memory(args)
        print(text)
        print(f"table          {results.write('A long stream', text, args.out)}")
        return
    # Check now, because the trainings before the first use of I3D take hours.
    i3d = args.weights / "i3d.safetensors"
    if not i3d.is_file():
        raise UserError(f"{i3d}: no such file; fetch it by `{COMMAND}`")
    print(report_quality(args))


def command() -> str:
    """The command line, for RESULTS.md."""
    return shlex.join(["python", "-m", "benchmarks.lifelong", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(main)
