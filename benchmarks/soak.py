"""Training under a killer: SIGKILL or SIGTERM at random moments, started again each time, and at the end compared, bit for bit,
with a run that nobody disturbed.

    python benchmarks/soak.py --kills 20 --seed 1

Ends with "identical", or names what differs and exits with 1.
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

from runtime import checkpoints
from runtime.console import Failure, progress, run_command

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as a file, it finds its neighbours too

# noqa: E402
from benchmarks import results  # noqa: E402

# noqa: E402

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
    command = [sys.executable, str(HERE.parent / "main.py"), "--set", *SETTINGS, *settings]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def checkpoint(folder: Path) -> dict | None:
    dir = folder / "outputs/checkpoints/ball_stn-follmer-0"
    return checkpoints.load_latest(dir) if dir.exists() else None


def disturbed(
    folder: Path, settings: list[str], kills: int, rng: np.random.Generator
) -> list[dict]:
    """The run, ended `kills` times before its time; -> a row for each end."""
    rows = []
    with progress(kills, "kill", "kill") as bar:
        while len(rows) < kills:
            process = start(folder, settings)
            wait = rng.uniform(0.5, 12)
            try:
                code = process.wait(wait)
                raise Failure(
                    f"the run ended by itself (exit code {code}) after {len(rows)} of {kills} kills: "
                    f"{last_line(folder)}; it failed, or wants a larger --steps"
                )
            except subprocess.TimeoutExpired:
                number = signal.SIGTERM if rng.random() < 0.5 else signal.SIGKILL
                process.send_signal(number)
                process.wait(120)
            state = checkpoint(folder)
            rows.append({"signal": number.name, "saved": state["step"] if state else 0})
            bar.update()
            bar.set_postfix_str(f"{rows[-1]['saved']} updates saved")
    return rows


def finished(folder: Path, settings: list[str]) -> dict:
    code = start(folder, settings).wait()
    if code:
        raise Failure(f"the run ended with exit code {code}: {last_line(folder)}")
    return checkpoint(folder)


def last_line(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace").strip().splitlines()[-1]


def flat(state: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of everything in a checkpoint."""
    pairs = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, (list, tuple))
        else None
    )
    if pairs is None:
        yield name, state
        return
    for key, value in pairs:
        yield from flat(value, f"{name}.{key}")


def differences(a: dict, b: dict) -> list[str]:
    """Names of what differs in two checkpoints."""
    a, b = dict(flat(a)), dict(flat(b))
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return sorted(a.keys() ^ b.keys()) + [
        name for name in a.keys() & b.keys() if not same(a[name], b[name])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/soak.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the signals")
    parser.add_argument(
        "--steps",
        type=int,
        default=6000,
        help="updates of the run; more than the kills leave time for",
    )
    parser.add_argument("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    args = parser.parse_args()
    settings, began = [f"train.steps={args.steps}"], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        hunted, calm = Path(scratch) / "hunted", Path(scratch) / "calm"
        hunted.mkdir()
        calm.mkdir()
        rows = disturbed(hunted, settings, args.kills, np.random.default_rng(args.seed))
        found = differences(finished(hunted, settings), finished(calm, settings))
    counts = {name: sum(row["signal"] == name for row in rows) for name in ("SIGKILL", "SIGTERM")}
    early = sum(row["saved"] == 0 for row in rows)
    verdict = "identical" if not found else f"different: {', '.join(found[:5])}"
    text = (
        f"{args.steps} updates, killed {args.kills} times at random moments ({counts['SIGKILL']} SIGKILL, "
        f"{counts['SIGTERM']} SIGTERM; {early} of them before the first checkpoint), seed {args.seed}, "
        f"{time.monotonic() - began:.0f} s in all. {results.machine()}. Its last "
        f"checkpoint, against that of an undisturbed run: **{verdict}**."
    )
    results.write("Soak: training under a killer", text, args.out)
    print(text.replace("**", ""), verdict, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    run_command(main)
