"""Peak memory of long roll-outs and of training, each measured in its own process.

    python -m benchmarks.memory

Apart from the output, a roll-out of 1,000 frames should need as much memory as a roll-out of 100.
The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import configs
from benchmarks import measure, results
from benchmarks.train_step import launch_worker
from configs import Latent
from forecaster import Forecaster, build_net
from models import autoencoders
from runtime.console import UserError, progress, run_command
from runtime.process import start

# Videos per roll-out and given frames per video.
VIDEOS = 8
GIVEN = 10


def roll_out(frames: int) -> dict:
    """Roll out VIDEOS videos of 64x64 pixels; return peak memory and output in bytes, and time."""
    device = start().device
    config = configs.build(
        "kth",
        {
            "model.size": "",
            "model.name": "convnet",
            "model.width": 64,
            "vqvae.kind": "small",
            "vqvae.ckpt": "",
            "vqvae.width": 32,
            "sample.steps": 1,
            "sample.solver": "exact",
            "sample.context": "uniform",
            "sample.batch": VIDEOS,
        },
    )
    # Memory and time do not depend on the weights, so the networks stay as they were initialised.
    config = dataclasses.replace(config, latent=Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4))
    autoencoder = autoencoders.build("small", downsample=8, channels=4, codes=64, width=32, depth=1)
    model = Forecaster(
        config, build_net(config, device).eval(), autoencoder.to(device).eval(), device
    )
    given = np.random.default_rng(0).integers(0, 256, (VIDEOS, GIVEN, 64, 64, 3), dtype=np.uint8)
    model.forecast(given, 4, 1, ("warm",), quiet=True)
    # The short roll-out before was the warm-up: it allocates buffers and chooses kernels.
    began = time.perf_counter()
    out = model.forecast(given, frames, 1, ("memory",), quiet=True)
    taken = time.perf_counter() - began
    return {
        "frames": frames,
        "peak": measure.peak_memory(device),
        "output": out.nbytes,
        "ms_per_frame": 1e3 * taken / frames,
        "device": device.type,
        "machine": results.describe_machine(),
    }


def peak_ratio(short: dict, long: dict) -> float:
    """Peak of the long roll-out / peak of the short one: 1 if memory does not grow with length.

    The output is in main memory. On a CPU the peak contains the output, so the difference between
    the outputs is subtracted. A GPU's peak does not contain the output.
    """
    growth = long["output"] - short["output"] if long["device"] == "cpu" else 0
    return (long["peak"] - growth) / short["peak"]


def roll_out_in_process(frames: int) -> dict:
    """Run roll_out() in a new process, so that the peak memory is that of this roll-out alone."""
    command = [sys.executable, "-m", "benchmarks.memory", "--roll_out", str(frames)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"a roll-out of {frames} frames ended with {done.returncode}, see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_trainings(args: argparse.Namespace) -> list[dict]:
    """Peak memory and rate of updates: plain, accumulated, and with activation checkpointing."""
    ways = (
        {"way": "as it is"},
        {"way": "accumulate=4", "accumulate": 4},
        {"way": "recompute", "recompute": True},
    )
    # The flags of benchmarks/train_step.py, which measures each training in a process of its own.
    usual = {
        "precision": "auto",
        "compile": "off",
        "repeats": 1,
        "accumulate": 1,
        "shard": False,
        "recompute": False,
    }
    found = []
    for way in ways:
        options = argparse.Namespace(**{**usual, **way})
        found.append({**way, **launch_worker(options, args.size, args.batch, 1)})
    return found


def write_markdown(args: argparse.Namespace, roll_outs: list[dict], trainings: list[dict]) -> str:
    """The section of RESULTS.md."""
    on_cpu = roll_outs[0]["device"] == "cpu"
    without = "Without the memory of its longer output, the" if on_cpu else "The"
    lines = [
        f"{VIDEOS} videos of 64 px, {roll_outs[0]['machine']}. {without} long roll-out's peak is "
        f"**{peak_ratio(*roll_outs):.3f}** times that of the short roll-out.",
        "",
        "| roll-out, frames | peak memory, MiB | of it the output | ms per frame |",
        "|---|---|---|---|",
    ]
    for run in roll_outs:
        lines.append(
            f"| {run['frames']} | {run['peak'] / 2**20:.0f} "
            f"| {run['output'] / 2**20:.0f} | {run['ms_per_frame']:.1f} |"
        )
    lines += [
        "",
        f"| training {args.size}, batch {args.batch} | peak memory, GiB | samples/s |",
        "|---|---|---|",
    ]
    for run in trainings:
        lines.append(f"| {run['way']} | {run['peak_gib']:.2f} | {run['samples_per_second']:.3g} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--size", default="B", help="size of the network that is trained (default B)")
    add("--batch", type=int, default=32, help="batch size of the training (default 32)")
    add(
        "--frames",
        type=int,
        nargs=2,
        default=[100, 1000],
        help="frames of the two roll-outs (default 100 1000)",
    )
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    add("--roll_out", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.roll_out:
        print(json.dumps(roll_out(args.roll_out)))
        return
    with progress(5, "memory", "run") as bar:
        roll_outs = []
        for frames in args.frames:
            roll_outs.append(roll_out_in_process(frames))
            bar.update()
        trainings = measure_trainings(args)
        bar.update(3)
    text = write_markdown(args, roll_outs, trainings)
    print(text, f"\ntable          {results.write('Memory', text, args.out)}")
    line = {
        "benchmark": "memory",
        # From a worker, because this process must not occupy the GPU while others are measured.
        "machine": roll_outs[0]["machine"],
        "roll_outs": roll_outs,
        "ratio": peak_ratio(*roll_outs),
        "training": trainings,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    run_command(main)
