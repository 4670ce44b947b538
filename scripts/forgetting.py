"""Forgetting: forecasts of each segment of a stream, by every checkpoint that was kept along the training.

    python main.py --dataset ball_nstn --set data.mode=stream train.keep_every=20_000
    python scripts/forgetting.py --run outputs/checkpoints/ball_nstn-follmer-0-stream

writes forgetting.json and forgetting.png to outputs/results/<run id>/<model>_<sampler>/<data>-forgetting/. Stopped and run
again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

import data
from batches.stream import StreamWindows, frame_range, windows_of
from evaluation import measure, protocols
from evaluation.protocols import Protocol
from forecaster import Forecaster
from forecaster import load as load_forecaster
from report import plots, results
from runtime import logs
from runtime.console import UserError, progress, run_command
from runtime.process import Process, start

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configs  # noqa: E402
import evaluate  # noqa: E402

# noqa: E402
# noqa: E402
# noqa: E402
# noqa: E402
# noqa: E402
# noqa: E402
from configs import Config  # noqa: E402

# noqa: E402
# noqa: E402
from shards import Shards  # noqa: E402

# noqa: E402

METRICS = ("mse", "crps", "minade")  # the last of balls only
BATCH = 20  # windows forecast at a time


# ------------------------------------------------------------------------------------------------------ index arithmetic
def cut(start: int, stop: int, segments: int) -> list[tuple[int, int]]:
    """Frames start (counted) to stop (not counted) in parts of one length, give or take a frame."""
    bounds = [start + k * (stop - start) // segments for k in range(segments + 1)]
    return list(zip(bounds, bounds[1:]))


def share_seen(windows: StreamWindows, updates: int, start: int, stop: int, mode: str) -> float:
    """Of the windows of a training that begin in a segment, the share that the first `updates` updates have taken; trained
    offline, a run has seen something of all segments from its first update on."""
    begins = windows.starts(np.arange(len(windows)))
    inside = (begins >= start) & (begins < stop)
    return 1.0 if mode == "offline" else float(inside[:updates].sum() / max(inside.sum(), 1))


# ------------------------------------------------------------------------------------------------------------- measuring
def kept(run: Path) -> dict[int, Path]:
    """{updates: checkpoint} of a run's folder."""
    found = {int(path.stem.partition("_")[2]): path for path in sorted(run.glob("step_*.pt"))}
    if len(found) < 2:
        raise UserError(
            f"{run} holds {len(found)} numbered checkpoints, a curve needs two; train with "
            "--set train.keep_every=N"
        )
    return found


def asked(config: Config, frames: str, windows: int, samples: int) -> Protocol:
    return protocols.get(
        "lifelong_stream",
        config,
        {"split": "train", "videos": windows, "samples": samples, "frames": frames},
    )


def measured(forecaster: Forecaster, shards: Shards, protocol: Protocol, process: Process) -> dict:
    """{metric: {"mean", "se"}} of one checkpoint's forecasts of one segment; of each metric of pixels also that of repeating
    the last frame, and their ratio."""
    config = forecaster.config
    which = [name for name in METRICS if name != "minade" or config.dataset.startswith("ball")]
    truth = data.read_clips(shards, evaluate.clips_of(protocol, shards, config.data.skip))
    samples = np.concatenate(
        [
            forecaster.forecast(
                truth[k : k + BATCH, : protocol.condition],
                protocol.predict,
                protocol.samples,
                (protocol.seed, "forgetting", k),
                quiet=True,
            )
            for k in range(0, len(truth), BATCH)
        ]
    )
    nets = measure.Networks(None, None, process.device)
    result = measure.summarize(
        measure.measure(truth, samples, None, protocol, which, nets, None, 0), protocol, which
    )
    ratios = {
        f"{name}_ratio": {"mean": value["all"], "se": None}
        for name, value in result["ratio_to_repeat_last"].items()
    }
    return result["summary"] | ratios


class Rows:
    """forgetting.json, written anew with each row; rows of another plan are left out."""

    def __init__(self, dir: Path, plan: dict):
        self.path, self.plan, self.rows = dir / "forgetting.json", plan, []
        if self.path.exists():
            old = json.loads(self.path.read_text())
            self.rows = old["rows"] if old["plan"] == plan else []

    def lacks(self, updates: int, segment: int) -> bool:
        return not any((row["updates"], row["segment"]) == (updates, segment) for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows = sorted([*self.rows, row], key=lambda row: (row["updates"], row["segment"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name("forgetting.json.partial")
        partial.write_text(
            json.dumps({"plan": self.plan, "rows": self.rows}, indent=1, allow_nan=False)
        )
        os.replace(partial, self.path)


def curves(
    run: Path, segments: int, windows: int, samples: int, overrides: dict
) -> tuple[list[dict], Path]:
    """-> (rows, folder) of all checkpoints and segments, measured now unless they are on the disk."""
    process, found = start(), kept(run)
    forecaster, step = load_forecaster(found[max(found)], process.device, overrides)
    config = forecaster.config
    if config.data.mode == "clips":
        raise UserError(
            f"{run} was trained on clips, not along a stream; see data.mode in the README"
        )
    shards = data.open_split(config, "train")
    trained_on, total = windows_of(config, shards), int(shards.lengths.sum())
    parts = cut(*frame_range(config.data.frames, total), segments)
    wanted = [asked(config, f"{start}:{stop}", windows, samples) for start, stop in parts]
    out = results.results_dir(forecaster, step)
    out = (
        out.parent.with_name(out.parent.name.replace(f"-{step}_", "_", 1))
        / f"{config.dataset}-train-forgetting"
    )
    rows = Rows(out, plan_of(config, shards, wanted))
    with progress(len(found) * segments, f"forgetting {config.run_id}", "segment") as bar:
        for updates, path in found.items():
            todo = [j for j in range(segments) if rows.lacks(updates, j)]
            bar.update(segments - len(todo))
            if todo:
                forecaster, _ = load_forecaster(path, process.device, overrides)
            for j in todo:
                seen = share_seen(trained_on, updates, *parts[j], config.data.mode)
                rows.add(
                    {
                        "updates": updates,
                        "segment": j,
                        "frames": wanted[j].frames,
                        "seen": seen,
                        **measured(forecaster, shards, wanted[j], process),
                    }
                )
                bar.update()
    return [row for row in rows.rows if row["updates"] in found], out


def plan_of(config: Config, shards: Shards, wanted: list[Protocol]) -> dict:
    """What must be the same for rows to stand beside one another, as JSON has it."""
    settings = {
        name: group
        for name, group in configs.to_dict(config).items()
        if name not in ("output", "wandb")
    }
    digest = hashlib.blake2b(
        json.dumps(settings, sort_keys=True).encode(), digest_size=8
    ).hexdigest()
    told = [
        {key: value for key, value in dataclasses.asdict(protocol).items() if key != "datasets"}
        for protocol in wanted
    ]
    return {
        "run": config.run_id,
        "data": shards.fingerprint(),
        "settings": digest,
        "segments": told,
    }


def losses(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that have a loss."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for row in map(json.loads, filter(logs.is_row, lines)) if "loss" in row]


# ---------------------------------------------------------------------------------------------------------------- command
def table(rows: list[dict], metric: str) -> str:
    """What a person reads: a line for each checkpoint, a column for each segment, in brackets what was not yet seen."""
    segments = sorted({row["segment"] for row in rows})
    lines = [f"{metric + ', after':<22}" + "".join(f"{f'segment {j + 1}':>12}" for j in segments)]
    for updates in sorted({row["updates"] for row in rows}):
        cells = [row for row in rows if row["updates"] == updates]
        cells = [
            evaluate.number(row[metric]["mean"])
            if row["seen"] > 0.5
            else f"({evaluate.number(row[metric]['mean'])})"
            for row in cells
        ]
        lines.append(f"{f'{updates:,} updates':<22}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
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
        help="forecast of each segment, evenly spread over it (default 20)",
    )
    add("--samples", type=int, default=3, help="futures of each (default 3)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="how is sampled, and where the data lie: sample.*, data.root",
    )
    args = parser.parse_args()
    if min(args.segments, args.windows, args.samples) < 1:
        raise UserError("--segments, --windows and --samples must be at least 1")
    if start().world > 1:
        raise UserError("scripts/forgetting.py runs as one process; start it without torchrun")
    rows, out = curves(
        args.run, args.segments, args.windows, args.samples, configs.parse_overrides(args.set)
    )
    shown = [name for name in METRICS if name in rows[0]]
    plots.forgetting(
        [(plots.describe(name)[0], rows, name) for name in shown],
        out / "forgetting.png",
        losses(args.run),
    )
    print("\n\n".join(table(rows, name) for name in shown))
    print(f"rows           {out / 'forgetting.json'}\nfigure         {out / 'forgetting.png'}")


if __name__ == "__main__":
    run_command(main)
