"""Check that a training which is killed and resumed many times equals an undisturbed run exactly.

    python benchmarks/soak.py --kills 20 --seed 1

The command kills a run with SIGKILL or SIGTERM, starts it again each time, and compares its last
checkpoint with that of an undisturbed run. When to kill depends on the progress of the run and not
on the clock, so that slow and fast machines run the same test: the first kills come in the stages
before the training, one in each, the others after a random number of further updates. The command
prints the updates made and saved at each kill. It exits with 1 if the checkpoints differ, or if
fewer than half of the kills came after a checkpoint, because then equality would prove little.
"""

from __future__ import annotations

import argparse
import json
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
from runtime import checkpoints, logs
from runtime.console import Failure, UserError, progress, run_command

RUN = "outputs/checkpoints/ball_stn-follmer-0"
# Paths that appear in the stages before the training: data, VQVAE, latents.
EARLY = ["data/*", "outputs/checkpoints/vqvae-*/metrics.jsonl", "outputs/latents/*/train"]
# Largest number of updates between a checkpoint and the next kill: three times train.save_every.
SPAN = 75
# Seconds without any progress after which the benchmark gives up.
STALL = 900

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
    "train.log_every=1",
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
    dir = folder / RUN
    return checkpoints.load_latest(dir) if dir.exists() else None


def updates_made(folder: Path) -> int:
    """The number of the last update in the log of the run; the log has a row per update."""
    path = folder / RUN / "metrics.jsonl"
    if not path.exists():
        return 0
    rows = [line for line in path.read_text().splitlines() if logs.is_row(line)]
    return json.loads(rows[-1])["step"] if rows else 0


def draw_moments(kills: int, rng: np.random.Generator) -> list[str | int]:
    """Draw when each kill comes: when a path of an early stage appears, or a number of updates
    after the last checkpoint."""
    early = EARLY[: kills // 4]
    return [*early, *rng.integers(1, SPAN, size=kills - len(early)).tolist()]


def wait_for(process: subprocess.Popen, folder: Path, moment: str | int, saved: int) -> bool:
    """Wait for a moment of draw_moments() -> False if the process ended before.

    Raises Failure if the run makes no progress for STALL seconds.
    """
    changed = time.monotonic()
    before = None
    while process.poll() is None:
        # A new file is progress in the early stages, an update in the training.
        if isinstance(moment, str):
            now = sum(1 for _ in folder.rglob("*"))
            come = any(folder.glob(moment))
        else:
            now = updates_made(folder)
            come = now >= saved + moment
        if come:
            return True
        if now != before:
            changed = time.monotonic()
            before = now
        if time.monotonic() - changed > STALL:
            raise Failure(f"no progress in {STALL} seconds: {last_line(folder)}")
        time.sleep(0.01)
    return False


def run_disturbed(
    folder: Path, settings: list[str], kills: int, rng: np.random.Generator
) -> list[dict]:
    """Start and kill the run `kills` times -> {"signal", "made", "saved"} per kill.

    made, saved: updates in the log, and updates in the last checkpoint, when the signal was sent.
    """
    rows = []
    saved = 0
    with progress(kills, "kill", "kill") as bar:
        for moment in draw_moments(kills, rng):
            # The same command each time: the run itself must find where to go on.
            process = start(folder, settings)
            try:
                come = wait_for(process, folder, moment, saved)
                # A random delay, so that a kill can come anywhere in an update or a checkpoint.
                time.sleep(rng.uniform(0, 0.05))
                number = signal.SIGTERM if rng.random() < 0.5 else signal.SIGKILL
                row = {"signal": number.name, "made": updates_made(folder)}
                row["saved"] = updates_saved(folder)
                process.send_signal(number)
                process.wait(STALL)
            finally:
                process.kill()
            if not come:
                raise Failure(
                    f"the run ended by itself (exit code {process.returncode}) after {len(rows)} "
                    f"of {kills} kills: {last_line(folder)}; it failed, or needs a larger --steps"
                )
            rows.append(row)
            saved = updates_saved(folder)
            bar.update()
            bar.set_postfix_str(f"{saved} updates saved")
    return rows


def updates_saved(folder: Path) -> int:
    """The number of updates in the last checkpoint of the run."""
    return max((int(path.stem[5:]) for path in (folder / RUN).glob("step_*.pt")), default=0)


def describe(rows: list[dict]) -> str:
    """Per kill: the signal, and the updates made and saved when it came."""
    return ", ".join(f"{row['signal'][3:]} at {row['made']} ({row['saved']})" for row in rows)


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


def are_equal(x: object, y: object) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def find_differences(a: dict, b: dict) -> list[str]:
    """Names of the leaves that differ in two checkpoints, or that only one of them has."""
    a = dict(flatten(a))
    b = dict(flatten(b))
    changed = [name for name in a.keys() & b.keys() if not are_equal(a[name], b[name])]
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
        default=0,
        help=f"updates of the run; more than {SPAN} per kill (default: {SPAN} per kill and 100)",
    )
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    return parser.parse_args()


def main() -> int:
    args = parse()
    steps = args.steps or SPAN * args.kills + 100
    if args.kills < 1 or steps <= SPAN * args.kills:
        raise UserError(
            f"--kills must be >= 1 and --steps > {SPAN * args.kills} ({SPAN} per kill), got "
            f"--kills {args.kills} --steps {steps}"
        )
    settings = [f"train.steps={steps}"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        disturbed = Path(scratch) / "hunted"
        undisturbed = Path(scratch) / "calm"
        disturbed.mkdir()
        undisturbed.mkdir()
        rows = run_disturbed(disturbed, settings, args.kills, np.random.default_rng(args.seed))
        found = find_differences(run_to_end(disturbed, settings), run_to_end(undisturbed, settings))

    verdict, code = judge(rows, found)
    counts = {name: sum(row["signal"] == name for row in rows) for name in ("SIGKILL", "SIGTERM")}
    text = (
        f"{steps} updates, killed {args.kills} times by progress ({counts['SIGKILL']} SIGKILL, "
        f"{counts['SIGTERM']} SIGTERM; {sum(row['saved'] > 0 for row in rows)} of them after a "
        f"checkpoint), seed {args.seed}, {time.monotonic() - began:.0f} s in all. "
        f"{results.describe_machine()}. Updates made (saved) at each kill: {describe(rows)}. Its "
        f"last checkpoint, against that of an undisturbed run: **{verdict}**."
    )
    results.write("Soak: training under a killer", text, args.out)
    print(text.replace("**", ""), verdict, sep="\n")
    return code


def judge(rows: list[dict], found: list[str]) -> tuple[str, int]:
    """The verdict and the exit code. found: names of what differs."""
    if found:
        return f"different: {', '.join(found[:5])}", 1
    late = sum(row["saved"] > 0 for row in rows)
    if 2 * late < len(rows):
        return f"identical, but only {late} of {len(rows)} kills came after a checkpoint", 1
    return "identical", 0


if __name__ == "__main__":
    run_command(main)
