"""Every CUDA path of driftcast, in order of importance, in at most eight minutes on one GPU.

    OUT=DIR python -m benchmarks.gpu_trial
    DEVICE=cpu OUT=DIR python -m benchmarks.gpu_trial           tiny sizes, without a GPU
    OUT=DIR python -m benchmarks.gpu_trial --only train sample

Each group of steps is a process of its own with a time limit. A step that fails is recorded and the
next one runs. After each group these files are written:

    OUT/gpu_trial.md     tables; failures come first
    OUT/gpu_trial.json   all numbers
    OUT/log.txt          what the groups print
    OUT/steps.jsonl      a line for each step as it begins and ends

The exit code is 1 if a step failed, or if a group crashed or was stopped at its limit; else 0.
Steps that are left out, because time ran short or the machine lacks something, are listed but do
not count as failures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_steps import record, report

ROOT = Path(__file__).resolve().parent.parent
# A group with less time than this is not started: imports and the first kernel take as long.
LEAST_SECONDS = 15


class Group(NamedTuple):
    """A name, its module in gpu_steps, and the seconds that it may take on a GPU and on a CPU."""

    name: str
    module: str
    gpu_limit: float
    cpu_limit: float


# The most important groups come first. The limits add up to more than the total, because most
# groups end early.
GROUPS = [
    Group("basics", "basics", 70, 240),
    Group("train", "updates", 230, 300),
    Group("sample", "roll_outs", 150, 400),
    Group("networks", "networks", 60, 240),
    Group("nccl", "processes", 60, 120),
    Group("command", "command", 90, 400),
    Group("tests", "project_tests", 90, 200),
]
GPU_SECONDS = 470
CPU_SECONDS = 1800


# --------------------------------------------------------------------------------------- the groups
def child_command(name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_trial", "--child", name]


def child_environment(out: Path, on_cpu: bool, deadline: float) -> dict[str, str]:
    environment = {
        **os.environ,
        "OUT": str(out),
        "TRIAL_DEADLINE": str(deadline),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        "DRIFTCAST_QUIET": "1",
        "WANDB_MODE": "disabled",
    }
    if on_cpu:
        environment |= {"DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def stop(child: subprocess.Popen) -> None:
    """Kill the child and its descendants, which are in its process group."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_group(
    name: str, limit: float, out: Path, on_cpu: bool, command: Callable[[str], list[str]]
) -> dict:
    """Run a group in its own process; return its name, limit, seconds and how it ended."""
    began = time.time()
    environment = child_environment(out, on_cpu, began + limit)
    with open(out / "log.txt", "a") as log:
        # A session of its own, so that a time-out kills the group's descendants, too.
        child = subprocess.Popen(
            command(name),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=limit)
            ended = "completed" if code == 0 else f"crashed with exit code {code}, see log.txt"
        except subprocess.TimeoutExpired:
            ended = f"stopped at its limit of {limit:.0f} s"
        finally:
            stop(child)
    return {"group": name, "limit": limit, "seconds": time.time() - began, "ended": ended}


def record_end(file: Path, group: dict) -> None:
    """If the group was stopped or crashed, record the step in which that happened as failed; the
    group itself if no step was running."""
    if group["ended"] == "completed":
        return
    steps = record.Steps(group["group"], file)
    rows = record.read(file)
    open_steps = []
    for row in rows:
        if row["group"] == group["group"] and row["state"] == "began":
            open_steps.append(row["step"])
    for name in open_steps or ["the group"]:
        steps.record(name, "failed", reason=f"the group {group['ended']}")


def run_groups(
    groups: list[tuple[str, float]],
    out: Path,
    total: float,
    on_cpu: bool,
    command: Callable[[str], list[str]] = child_command,
) -> list[dict]:
    """Run (name, limit) one by one within `total` seconds; return the last row of every step."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "steps.jsonl"
    for old in (file, out / "log.txt"):
        old.unlink(missing_ok=True)
    end = time.time() + total
    ended = []
    for name, limit in groups:
        # A group may take its own limit, or the rest of the total if that is less.
        left = end - time.time()
        if left < min(limit, LEAST_SECONDS):
            reason = f"{left:.0f} s left of {total:.0f} s"
            record.Steps(name, file).record("the group", "left out", reason=reason)
        else:
            group = run_group(name, min(limit, left), out, on_cpu, command)
            ended.append(group)
            record_end(file, group)
            print(f"== {name}: {group['ended']} after {group['seconds']:.0f} s", flush=True)
        write_report(out, ended, record.read(file))
    return record.read(file)


def write_report(out: Path, groups: list[dict], rows: list[dict]) -> None:
    (out / "gpu_trial.md").write_text(report.write_markdown(groups, rows))
    (out / "gpu_trial.json").write_text(
        json.dumps({"groups": groups, "steps": rows}, indent=1) + "\n"
    )


def exit_code(rows: list[dict]) -> int:
    return int(any(row["state"] == "failed" for row in rows))


# -------------------------------------------------------------------------------------- the command
def run_child(name: str) -> None:
    """The steps of one group, in the process that run_group started."""
    deadline = float(os.environ.get("TRIAL_DEADLINE", "inf"))
    steps = record.Steps(name, Path(os.environ["OUT"]) / "steps.jsonl", deadline)
    module = next(group.module for group in GROUPS if group.name == name)
    try:
        importlib.import_module(f"benchmarks.gpu_steps.{module}").run(steps)
    except Exception as error:
        traceback.print_exc()
        reason = record.describe_error(error)
        steps.record("outside of its steps", "failed", reason=reason)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_trial", description=__doc__.splitlines()[0]
    )
    names = [group.name for group in GROUPS]
    out = Path(os.environ.get("OUT") or "gpu_trial_out")
    parser.add_argument("--out", type=Path, default=out, help="folder to write (default: $OUT)")
    parser.add_argument(
        "--device",
        default=os.environ.get("DEVICE") or "cuda",
        choices=["cuda", "cpu"],
        help="cpu: tiny sizes (default: $DEVICE, or cuda)",
    )
    limit = os.environ.get("LIMIT")
    parser.add_argument(
        "--limit",
        type=float,
        default=float(limit) if limit else None,
        help=f"seconds in all (default: $LIMIT, or {GPU_SECONDS}; {CPU_SECONDS} on a CPU)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="GROUP", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.child:
        run_child(args.child)
        return 0
    on_cpu = args.device == "cpu"
    limits = []
    for group in GROUPS:
        if not args.only or group.name in args.only:
            limits.append((group.name, group.cpu_limit if on_cpu else group.gpu_limit))
    total = args.limit or (CPU_SECONDS if on_cpu else GPU_SECONDS)
    out = args.out.absolute()
    rows = run_groups(limits, out, total, on_cpu)
    print((out / "gpu_trial.md").read_text())
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
