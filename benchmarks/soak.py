"""Training that is killed and resumed many times equals an undisturbed run bit for bit.

    python benchmarks/soak.py --kills 20 --seed 1

The command ends a run at random moments by SIGKILL or SIGTERM, starts it again each time, and
compares its last checkpoint with that of an undisturbed run. It prints "identical", or names what
differs and exits with 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
# Run by path, Python puts benchmarks/ on sys.path; the imports below need the repository's root.
sys.path.insert(0, str(ROOT))

from benchmarks import results
from runtime import checkpoints
from runtime.console import Failure, progress, run_command

SETTINGS = [
    "data.stream=4000",
    "data.held_out=300",
    "vqvae.steps=60",
    "vqvae.width=16",
    "model.width=32",
    "train.batch_size=16",
    "train.warmup=10",
    "train.schedule=constant",
    "train.save_every=25",
    "train.keep=3",
    "train.sample_every=0",
    "sample.num_videos=1",
    "sample.num_samples=1",
    "wandb.mode=disabled",
]


def start(folder: Path, settings: list[str]) -> subprocess.Popen:
    """Start main.py in `folder`; its output is appended to folder/log."""
    command = [sys.executable, str(ROOT / "main.py"), "--set", *SETTINGS, *settings]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "a") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env)


def load_last(folder: Path) -> dict | None:
    """The latest checkpoint of the run in `folder`, if it has one."""
    dir = folder / "outputs/checkpoints/ball_stn-follmer-0"
    return checkpoints.load_latest(dir) if dir.exists() else None


def kill_at_random(process: subprocess.Popen, rng: np.random.Generator) -> signal.Signals | None:
    """Kill the process after 0.5 to 12 seconds; return the signal, or None if it ended before."""
    wait = rng.uniform(0.5, 12)
    try:
        process.wait(wait)
        return None
    except subprocess.TimeoutExpired:
        number = signal.SIGTERM if rng.random() < 0.5 else signal.SIGKILL
        process.send_signal(number)
        process.wait(120)
        return number


def run_disturbed(
    folder: Path, settings: list[str], kills: int, rng: np.random.Generator
) -> list[dict]:
    """Start the run and kill it, `kills` times; return {"signal", "saved": updates} per kill."""
    rows = []
    with progress(kills, "kill", "kill") as bar:
        while len(rows) < kills:
            process = start(folder, settings)
            number = kill_at_random(process, rng)
            if number is None:
                raise Failure(
                    f"the run ended by itself (exit code {process.returncode}) after {len(rows)} "
                    f"of {kills} kills: {last_line(folder)}; it failed, or needs a larger --steps"
                )
            state = load_last(folder)
            rows.append({"signal": number.name, "saved": state["step"] if state else 0})
            bar.update()
            bar.set_postfix_str(f"{rows[-1]['saved']} updates saved")
    return rows


def run_to_end(folder: Path, settings: list[str]) -> dict:
    """Run, or resume, until the training is complete; return the last checkpoint."""
    code = start(folder, settings).wait()
    if code:
        raise Failure(f"the run ended with exit code {code}: {last_line(folder)}")
    return load_last(folder)


def last_line(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace").strip().splitlines()[-1]


def flatten(state: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of every leaf of nested dictionaries, lists and tuples."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, (list, tuple)):
        pairs = enumerate(state)
    else:
        yield name, state
        return
    for key, value in pairs:
        yield from flatten(value, f"{name}.{key}")


def equal(x: object, y: object) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def differences(a: dict, b: dict) -> list[str]:
    """Names of the leaves that differ in two checkpoints, or that only one of them has."""
    a = dict(flatten(a))
    b = dict(flatten(b))
    changed = [name for name in a.keys() & b.keys() if not equal(a[name], b[name])]
    return sorted(a.keys() ^ b.keys()) + changed


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/soak.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--kills", type=int, default=20, help="number of kills (default 20)")
    add("--seed", type=int, default=1, help="seed of the moments and the signals (default 1)")
    add(
        "--steps",
        type=int,
        default=6000,
        help="updates of the run, more than it reaches between the kills (default 6000)",
    )
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    return parser.parse_args()


def main() -> int:
    args = parse()
    settings = [f"train.steps={args.steps}"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        hunted = Path(scratch) / "hunted"
        calm = Path(scratch) / "calm"
        hunted.mkdir()
        calm.mkdir()
        rows = run_disturbed(hunted, settings, args.kills, np.random.default_rng(args.seed))
        found = differences(run_to_end(hunted, settings), run_to_end(calm, settings))

    counts = {name: sum(row["signal"] == name for row in rows) for name in ("SIGKILL", "SIGTERM")}
    early = sum(row["saved"] == 0 for row in rows)
    verdict = f"different: {', '.join(found[:5])}" if found else "identical"
    text = (
        f"{args.steps} updates, killed {args.kills} times at random moments "
        f"({counts['SIGKILL']} SIGKILL, {counts['SIGTERM']} SIGTERM; {early} of them before the "
        f"first checkpoint), seed {args.seed}, {time.monotonic() - began:.0f} s in all. "
        f"{results.machine()}. Its last checkpoint, against that of an undisturbed run: "
        f"**{verdict}**."
    )
    results.write("Soak: training under a killer", text, args.out)
    print(text.replace("**", ""), verdict, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    run_command(main)
