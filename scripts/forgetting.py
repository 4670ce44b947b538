"""Measure forgetting: every checkpoint of a training forecasts every segment of its stream.

    python main.py --dataset ball_nstn --set data.mode=stream train.keep_every=20_000
    python scripts/forgetting.py --run outputs/checkpoints/ball_nstn-follmer-0-stream

The command writes forgetting.json and forgetting.png to
outputs/results/<run id>/<model>_<sampler>/<data>-forgetting/. A second start resumes: rows that
forgetting.json already holds are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

# Run by path, Python puts scripts/ on sys.path; the imports below need the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configs
import data
import evaluate
from batches.stream import StreamWindows, frame_range, windows_of
from configs import Config
from evaluation import measure, protocols
from evaluation.protocols import Protocol
from forecaster import Forecaster
from forecaster import load as load_forecaster
from report import plots, results
from runtime import logs
from runtime.console import UserError, progress, run_command
from runtime.folders import write_atomically
from runtime.process import Process, start
from shards import Shards

# minade is defined for the ball datasets only.
METRICS = ("mse", "crps", "minade")
# Windows per forecast call.
BATCH = 20


# ------------------------------------------------------------------------------- index arithmetic
def split_range(start: int, stop: int, segments: int) -> list[tuple[int, int]]:
    """Split the half-open range [start, stop) into parts whose lengths differ by at most one."""
    bounds = [start + k * (stop - start) // segments for k in range(segments + 1)]
    return list(zip(bounds, bounds[1:]))


def share_seen(windows: StreamWindows, updates: int, start: int, stop: int, mode: str) -> float:
    """Share of the training windows starting in [start, stop) that the first `updates` used.

    The share is 1 for an offline run, which draws windows from all segments from the start.
    """
    if mode == "offline":
        return 1.0
    begins = windows.starts(np.arange(len(windows)))
    inside = (begins >= start) & (begins < stop)
    return float(inside[:updates].sum() / max(inside.sum(), 1))


# ------------------------------------------------------------------------------------- measurement
def find_checkpoints(run: Path) -> dict[int, Path]:
    """Find the numbered checkpoints in a run's folder -> {updates: path}."""
    found = {int(path.stem.partition("_")[2]): path for path in sorted(run.glob("step_*.pt"))}
    if len(found) < 2:
        raise UserError(
            f"{run} holds {len(found)} numbered checkpoints, but a curve needs two; train with "
            "--set train.keep_every=N"
        )
    return found


def build_protocol(config: Config, frames: str, windows: int, samples: int) -> Protocol:
    """The lifelong_stream protocol on the training split, restricted to `frames` ("start:stop")."""
    changes = {"split": "train", "videos": windows, "samples": samples, "frames": frames}
    return protocols.get("lifelong_stream", config, changes)


def measure_segment(
    forecaster: Forecaster, shards: Shards, protocol: Protocol, process: Process
) -> dict:
    """Measure one checkpoint's forecasts of one segment -> {metric: {"mean", "se"}}.

    A pixel metric also has `<metric>_repeat_last`, the score of repeating the last frame, and
    `<metric>_ratio`, the ratio of both scores.
    """
    config = forecaster.config
    is_ball = config.dataset.startswith("ball")
    which = [name for name in METRICS if name != "minade" or is_ball]
    truth = data.read_clips(shards, evaluate.clips_of(protocol, shards, config.data.skip))
    parts = []
    for k in range(0, len(truth), BATCH):
        given = truth[k : k + BATCH, : protocol.condition]
        key = (protocol.seed, "forgetting", k)
        parts.append(
            forecaster.forecast(given, protocol.predict, protocol.samples, key, quiet=True)
        )
    samples = np.concatenate(parts)

    # These metrics need neither I3D nor LPIPS.
    nets = measure.Networks(None, None, process.device)
    tables = measure.measure(truth, samples, None, protocol, which, nets, None, 0)
    result = measure.summarize(tables, protocol, which)
    ratios = {}
    for name, value in result["ratio_to_repeat_last"].items():
        ratios[f"{name}_ratio"] = {"mean": value["all"], "se": None}
    return result["summary"] | ratios


class Rows:
    """The rows of forgetting.json. Each added row is saved at once, by an atomic rename.

    plan: what all rows must have in common to be comparable. If an existing file has another plan,
    its rows are dropped.
    """

    def __init__(self, dir: Path, plan: dict):
        self.path = dir / "forgetting.json"
        self.plan = plan
        self.rows = []
        if self.path.exists():
            old = json.loads(self.path.read_text())
            if old["plan"] == plan:
                self.rows = old["rows"]

    def lacks(self, updates: int, segment: int) -> bool:
        """Whether the file has no row for this checkpoint and segment."""
        return not any((row["updates"], row["segment"]) == (updates, segment) for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows = sorted([*self.rows, row], key=lambda row: (row["updates"], row["segment"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"plan": self.plan, "rows": self.rows}
        with write_atomically(self.path) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())


def output_folder(forecaster: Forecaster, step: int) -> Path:
    """The results folder of a run, without the step in the model's name."""
    dir = results.results_dir(forecaster, step)
    model = dir.parent.name.replace(f"-{step}_", "_", 1)
    return dir.parent.with_name(model) / f"{forecaster.config.dataset}-train-forgetting"


def measure_curves(
    run: Path, segments: int, windows: int, samples: int, overrides: dict
) -> tuple[list[dict], Path]:
    """Measure every checkpoint on every segment; skip saved rows. Returns (rows, folder)."""
    process = start()
    found = find_checkpoints(run)
    last = found[max(found)]
    forecaster, step = load_forecaster(last, process.device, overrides)
    config = forecaster.config
    if config.data.mode == "clips":
        raise UserError(f"{run} was trained on clips, not along a stream; see docs/lifelong.md")
    shards = data.open_split(config, "train")
    trained_on = windows_of(config, shards)
    total = int(shards.lengths.sum())
    parts = split_range(*frame_range(config.data.frames, total), segments)
    # One protocol per segment, the same for all checkpoints: the rows differ in the weights only.
    segment_protocols = []
    for begin, end in parts:
        segment_protocols.append(build_protocol(config, f"{begin}:{end}", windows, samples))
    out = output_folder(forecaster, step)
    rows = Rows(out, build_plan(config, shards, segment_protocols))

    with progress(len(found) * segments, f"forgetting {config.run_id}", "segment") as bar:
        for updates, path in found.items():
            todo = [j for j in range(segments) if rows.lacks(updates, j)]
            # Rows of an earlier start count as progress.
            bar.update(segments - len(todo))
            if todo:
                forecaster, _ = load_forecaster(path, process.device, overrides)
            for j in todo:
                protocol = segment_protocols[j]
                row = {
                    "updates": updates,
                    "segment": j,
                    "frames": protocol.frames,
                    "seen": share_seen(trained_on, updates, *parts[j], config.data.mode),
                }
                rows.add(row | measure_segment(forecaster, shards, protocol, process))
                bar.update()
    return [row for row in rows.rows if row["updates"] in found], out


def build_plan(config: Config, shards: Shards, segment_protocols: list[Protocol]) -> dict:
    """State what rows must have in common to be comparable, as plain JSON values."""
    settings = {}
    for name, group in configs.to_dict(config).items():
        if name not in ("output", "wandb"):
            settings[name] = group
    text = json.dumps(settings, sort_keys=True)
    segments = []
    for protocol in segment_protocols:
        fields = dataclasses.asdict(protocol)
        segments.append({key: value for key, value in fields.items() if key != "datasets"})
    return {
        "run": config.run_id,
        "data": shards.fingerprint(),
        "settings": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        "segments": segments,
    }


def read_losses(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that have a loss."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for row in map(json.loads, filter(logs.is_row, lines)) if "loss" in row]


# ------------------------------------------------------------------------------------- the command
def format_table(rows: list[dict], metric: str) -> str:
    """Format a text table: a line per checkpoint, a column per segment.

    A value is in brackets if the checkpoint was trained on at most half of the segment.
    """
    segments = sorted({row["segment"] for row in rows})
    lines = [f"{metric + ', after':<22}" + "".join(f"{f'segment {j + 1}':>12}" for j in segments)]
    for updates in sorted({row["updates"] for row in rows}):
        cells = []
        for row in rows:
            if row["updates"] == updates:
                value = evaluate.format_number(row[metric]["mean"])
                cells.append(value if row["seen"] > 0.5 else f"({value})")
        lines.append(f"{f'{updates:,} updates':<22}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python scripts/forgetting.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        required=True,
        help="a run's folder of checkpoints, trained with train.keep_every=N",
    )
    add("--segments", type=int, default=5, help="parts of the stream (default 5)")
    add(
        "--windows",
        type=int,
        default=20,
        help="evenly spaced windows forecast per segment (default 20)",
    )
    add("--samples", type=int, default=3, help="futures per window (default 3)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="settings of the sampler and the location of the data: sample.*, data.root",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    if min(args.segments, args.windows, args.samples) < 1:
        raise UserError("--segments, --windows and --samples must be at least 1")
    if start().world > 1:
        raise UserError("scripts/forgetting.py runs as one process; start it without torchrun")
    overrides = configs.parse_overrides(args.set)
    rows, out = measure_curves(args.run, args.segments, args.windows, args.samples, overrides)
    shown = [name for name in METRICS if name in rows[0]]
    panels = [(plots.describe(name)[0], rows, name) for name in shown]
    plots.forgetting(panels, out / "forgetting.png", read_losses(args.run))
    print("\n\n".join(format_table(rows, name) for name in shown))
    print(f"rows           {out / 'forgetting.json'}")
    print(f"figure         {out / 'forgetting.png'}")


if __name__ == "__main__":
    run_command(main)
