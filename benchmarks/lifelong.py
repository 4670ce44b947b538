"""Lifelong learning from one stream: is replay as good as training offline, and what does a long stream take?

    python -m benchmarks.lifelong
    python -m benchmarks.lifelong --memory

The first trains a small network on the balls' streams, stationary and not: offline and in order, without replay and with. Of
each it evaluates the last checkpoint, and measures how well the checkpoints along the stream forecast each segment of it; the
table goes to benchmarks/RESULTS.md, the curves to benchmarks/lifelong.png, the last line printed is the table in JSON. Stopped,
it goes on where it was. The second trains along a stream of 1,000,000 frames, on 20,000 windows from its first frame
to its last with all of the past replayed, and writes to benchmarks/RESULTS.md the memory that this took, from drawing the first
ball to the last update, and how fast windows are read.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import configs
import data
import evaluate
import vqvae
from batches.stream import StreamTriples, StreamWindows
from benchmarks import results
from configs import Config
from evaluation.networks import COMMAND
from main import Clock, train_network
from report import plots
from report.results import read_metrics
from runtime.console import UserError, run_command
from runtime.process import start
from scripts import forgetting

WAYS = {
    "offline": {"data.mode": "offline"},
    "no replay": {"replay.size": "0"},
    "replay 5 %": {"replay.size": "0.05"},
    "full replay": {"replay.size": "full"},
}
SEGMENTS = 5  # of a stream; a checkpoint is kept at the end of each
SMALL = {
    "vqvae.width": 16,
    "vqvae.depth": 1,
    "vqvae.steps": 200,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
}


def trained_on(dataset: str, way: str, args: argparse.Namespace) -> tuple[Config, list[Path]]:
    """-> (config, checkpoints at the end of each segment) of one training, done now unless it is there."""
    kept = (args.stream - 9) // SEGMENTS
    config = configs.build(
        dataset,
        {
            "data.mode": "stream",
            "data.stream": args.stream,
            "data.held_out": args.stream // 5,
            "train.steps": kept * SEGMENTS,
            "data.root": f"data/{dataset}_{args.stream}",
            "model.width": 64,
            "train.seed": args.seed,
            "train.keep": 1,
            "train.keep_every": kept,
            "train.save_every": kept,
            "wandb.mode": "disabled",
            "output.run_id": f"bench-lifelong-{dataset}-{way.replace(' ', '_').replace('_%', '')}-{args.stream}-{args.seed}",
            **WAYS[way],
            **configs.parse_overrides(args.set),
        },
    )
    config, ckpt, _ = train_network(config, start(), None, Clock())
    return config, [ckpt.with_name(f"step_{kept * (k + 1):08d}.pt") for k in range(SEGMENTS)]


# ------------------------------------------------------------------------------------------------- how good the forecasts are
METRICS = ("fvd", "kvd", "minade", "colorkl", "mse", "crps")
SPLITS = ("train", "test")


def evaluated(ckpt: Path, split: str, args: argparse.Namespace, known: dict) -> dict[str, dict]:
    """{metric: {"mean", "se"}} of a checkpoint's forecasts, with `mse_ratio`, to the error of repeating the last frame."""
    asked = evaluate.parse(
        [
            "--ckpt",
            str(ckpt),
            "--protocol",
            "lifelong_stream",
            "--split",
            split,
            "--videos",
            str(args.windows),
            "--weights",
            str(args.weights),
            "--metrics",
            *METRICS,
            "--keep",
            "3",
        ]
    )
    result = read_metrics(evaluate.evaluated(asked, start(), known))
    return result["summary"] | {
        "mse_ratio": {"mean": result["ratio_to_repeat_last"]["mse"]["all"], "se": None}
    }


def evaluate_all(args: argparse.Namespace) -> tuple[dict, dict]:
    """-> {(dataset, way): {split: metrics}} and {(dataset, way): rows of scripts/forgetting.py}, trained where need be."""
    summaries, curves = {}, {}
    for dataset in args.datasets:
        known: dict[bytes, np.ndarray] = {}  # the real videos are the same for all ways of training
        for way in args.ways:
            _, ckpts = trained_on(dataset, way, args)
            summaries[dataset, way] = {
                split: evaluated(ckpts[-1], split, args, known) for split in SPLITS
            }
            curves[dataset, way], _ = forgetting.curves(
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


def table(dataset: str, summaries: dict) -> list[str]:
    """Markdown: a row for each way of training, metrics on the train and on the test stream in columns."""
    ways = [way for own, way in summaries if own == dataset]
    lines = [
        f"| {dataset} | "
        + " | ".join(f"{name}, {split}" for name in COLUMNS.values() for split in SPLITS)
        + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) * len(SPLITS)),
    ]
    for way in ways:
        cells = [cell(summaries[dataset, way][split][name]) for name in COLUMNS for split in SPLITS]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    floor = [
        summaries[dataset, ways[0]][split].get(f"{name}_autoencoder")
        for name in COLUMNS
        for split in SPLITS
    ]
    return [
        *lines,
        "| autoencoder alone | "
        + " | ".join(cell(value) if value else "" for value in floor)
        + " |",
    ]


def cell(value: dict) -> str:
    return evaluate.number(value["mean"]) + (
        f" ± {value['se']:.2g}" if value["se"] is not None else ""
    )


def forgotten(dataset: str, curves: dict, metric: str = "mse_ratio") -> list[str]:
    """Markdown: of each way of training the first segment's metric when it had just been seen, and at the end."""
    lines = [
        f"| {dataset}, segment 1, MSE / repeat last | just seen | at the end |",
        "| --- | ---: | ---: |",
    ]
    for (own, way), rows in curves.items():
        if own == dataset:
            first = [row[metric] for row in rows if row["segment"] == 0]
            lines.append(f"| {way} | {cell(first[0])} | {cell(first[-1])} |")
    return lines


def report(args: argparse.Namespace) -> str:
    """Writes the section of RESULTS.md and the figure beside it; -> the numbers in JSON."""
    summaries, curves = evaluate_all(args)
    panels = [(f"{dataset}, {way}", rows, "mse_ratio") for (dataset, way), rows in curves.items()]
    plots.forgetting(panels, args.out / "lifelong.png", columns=len(args.ways))
    steps = curves[args.datasets[0], args.ways[0]][-1]["updates"]
    lines = [
        f"Streams of {args.stream:,} frames of 32x32, {steps:,} updates of batch 2 with a conv net of width 64, one seed, "
        f"averaged weights of the last checkpoint. Protocol lifelong_stream: {args.windows} windows from the first frame "
        "of a stream to its last, 5 -> 5, 3 samples; FVD and KVD of all 10 frames and the first sample; ± is a standard "
        f"error over windows. {results.machine()}. Made by `{command()}`.",
        "",
    ]
    for dataset in args.datasets:
        lines += [*table(dataset, summaries), "", *forgotten(dataset, curves), ""]
    lines += [
        f"Each segment, a {SEGMENTS}th of the stream, forecast by the checkpoints at the ends of all segments "
        f"({args.segment_windows} windows of each):",
        "",
        "![Forgetting curves](lifelong.png)",
    ]
    found = {
        f"{dataset}, {way}": {
            split: {name: own[split][name]["mean"] for name in COLUMNS} for split in SPLITS
        }
        for (dataset, way), own in summaries.items()
    }
    print("\n".join(lines))
    print(f"table          {results.write('Lifelong learning', chr(10).join(lines), args.out)}")
    print(f"figure         {args.out / 'lifelong.png'}")
    return json.dumps(found)


# ------------------------------------------------------------------------------------------------------------ a long stream
def peak_memory() -> float:
    """The most that this process has had in memory so far, mapped files included, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Peaks(Clock):
    """A clock that also notes the peak of the memory, so far, at the end of each stage."""

    def __init__(self):
        super().__init__()
        self.peaks: list[tuple[str, float]] = []

    def lap(self, name: str) -> None:
        super().lap(name)
        self.peaks.append((name, peak_memory()))


def rate(read: Callable[[int], object], count: int, seconds: float = 5.0) -> tuple[float, float]:
    """How many of read(0), read(1), …, read(count - 1) are done a second of the clock, and of this process's time on a core,
    which others may share; measured over so many seconds of the latter, or until they are all done."""
    clock, own, k = time.perf_counter(), time.process_time(), 0
    while k < count and time.process_time() - own < seconds:
        read(k)
        k += 1
    return k / (time.perf_counter() - clock), k / (time.process_time() - own)


def long_stream(args: argparse.Namespace) -> Config:
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
    """Windows a second, by the clock and by the core: of frames and of latents, in order and at random places, and as the
    batches of the training."""
    clip, found = config.data.clip, {}
    frames = data.open_split(config, "train")
    process = start()
    autoencoder = vqvae.ensure_vqvae(config, frames, process)
    source = StreamTriples(
        config, data.ensure_latents(config, frames, autoencoder, process), process.device
    )
    for name, shards in (("frames", frames), ("latents", source.shards)):
        windows = StreamWindows(shards, clip)
        places = np.random.default_rng(0).integers(len(windows), size=len(windows))
        found[f"{name}, in order"] = rate(windows.__getitem__, len(windows))
        found[f"{name}, at random"] = rate(
            lambda k, w=windows, p=places: w[int(p[k])], len(windows)
        )
    batches = source.batches(0, len(source.windows))
    by_clock, by_core = rate(lambda _: next(batches), len(source.windows))
    B = config.train.batch_size
    return {**found, f"batches of {B} triples, live and replayed": (B * by_clock, B * by_core)}


def memory(args: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    config, clock = long_stream(args), Peaks()
    config, ckpt, _ = train_network(config, start(), None, clock)
    peaks = ", ".join(f"{value:.2f} GB after {name}" for name, value in clock.peaks)
    size = (
        sum(path.stat().st_size for path in (Path(config.data.root) / "train").glob("*.hdf5")) / 1e9
    )
    rates = read_rates(config)
    lines = [
        f"ball_stn, {args.frames:,} frames of 32x32 ({size:.1f} GB), {config.train.steps:,} updates of batch "
        f"{config.train.batch_size} over its {config.data.windows} windows of {config.data.clip} frames, "
        f"replay.size={config.replay.size}. {results.machine()}. Made by `{command()}` "
        f"({'; '.join(f'{name} {seconds:.0f} s' for name, seconds in clock.laps)}).",
        "",
        f"**Resident memory at its peak: {clock.peaks[-1][1]:.2f} GB** (so far: {peaks}; files that are mapped count). "
        f"Windows of {config.data.clip} frames, read by one process from the disk, or what the system keeps of it:",
        "",
        "| what | windows a second | a second on a core |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {by_clock:,.0f} | {by_core:,.0f} |"
            for name, (by_clock, by_core) in rates.items()
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lifelong", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--memory", action="store_true", help="the memory of a long stream, and how fast it is read"
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        choices=("ball_stn", "ball_nstn"),
        default=["ball_stn", "ball_nstn"],
    )
    parser.add_argument(
        "--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="of training"
    )
    parser.add_argument(
        "--stream",
        type=int,
        default=20_000,
        help="frames of the balls' training streams (default 20000)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--windows", type=int, default=100, help="evaluated of each stream (default 100)"
    )
    parser.add_argument(
        "--segment_windows",
        type=int,
        default=20,
        help="and of each segment in the curves (default 20)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("weights/metrics"),
        help="folder of the metric networks",
    )
    parser.add_argument(
        "--frames", type=int, default=1_000_000, help="of that stream (default 1000000)"
    )
    parser.add_argument("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="any other field of the trainings",
    )
    args = parser.parse_args()
    if start().world > 1:
        raise UserError("the benchmark runs as one process; start it without torchrun")
    if not args.memory:
        if not (args.weights / "i3d.safetensors").is_file():
            raise UserError(
                f"{args.weights / 'i3d.safetensors'}: no such file; fetch it by `{COMMAND}`"
            )
        print(report(args))
        return
    text = memory(args)
    print(text)
    print(f"table          {results.write('A long stream', text, args.out)}")


def command() -> str:
    return shlex.join(["python", "-m", "benchmarks.lifelong", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(main)
