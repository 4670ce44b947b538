"""Peak memory of long roll-outs and of training, each measured in a process of its own.

    python -m benchmarks.memory

A roll-out of 1,000 frames shall need what one of 100 needs, and its output. A JSON line comes last.
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
from benchmarks.train_step import launched
from configs import Latent
from forecaster import Forecaster, build_net
from models import autoencoders
from runtime.console import UserError, progress, run_command
from runtime.process import start

VIDEOS, GIVEN = 8, 10


def roll_out(frames: int) -> dict:
    """Peak memory, time and size of output of one roll-out of VIDEOS videos of 64 pixels."""
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
    config = dataclasses.replace(config, latent=Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4))
    autoencoder = autoencoders.build("small", downsample=8, channels=4, codes=64, width=32, depth=1)
    model = Forecaster(
        config, build_net(config, device).eval(), autoencoder.to(device).eval(), device
    )
    given = np.random.default_rng(0).integers(0, 256, (VIDEOS, GIVEN, 64, 64, 3), dtype=np.uint8)
    model.forecast(given, 4, 1, ("warm",), quiet=True)
    began = time.perf_counter()
    out = model.forecast(given, frames, 1, ("memory",), quiet=True)
    taken = time.perf_counter() - began
    return {
        "frames": frames,
        "peak": measure.peak_memory(device),
        "output": out.nbytes,
        "ms_per_frame": 1e3 * taken / frames,
        "device": device.type,
        "machine": results.machine(),
    }


def peak_ratio(short: dict, long: dict) -> float:
    """The long roll-out's peak over the short one's, 1 where memory does not grow with length. The
    output lies in main memory: it is part of a CPU's peak and subtracted there; a GPU's peak does
    not contain it."""
    growth = long["output"] - short["output"] if long["device"] == "cpu" else 0
    return (long["peak"] - growth) / short["peak"]


def alone(frames: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", "--roll_out", str(frames)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"a roll-out of {frames} frames ended with {done.returncode}, see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def training(args: argparse.Namespace) -> list[dict]:
    """Peak memory of updates, as they are and by the ways that save some."""
    ways = (
        {"way": "as it is"},
        {"way": "accumulate=4", "accumulate": 4},
        {"way": "recompute", "recompute": True},
    )
    usual = {
        "precision": "auto",
        "compile": "off",
        "repeats": 1,
        "accumulate": 1,
        "shard": False,
        "recompute": False,
    }
    return [
        {**way, **launched(argparse.Namespace(**{**usual, **way}), args.size, args.batch, 1)}
        for way in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", default="B", help="of the network that is trained (default B)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--frames",
        type=int,
        nargs=2,
        default=[100, 1000],
        help="of the two roll-outs (default 100 1000)",
    )
    parser.add_argument("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    parser.add_argument("--roll_out", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.roll_out:
        print(json.dumps(roll_out(args.roll_out)))
        return
    with progress(5, "memory", "run") as bar:
        found = []
        for frames in args.frames:
            found.append(alone(frames))
            bar.update()
        trained = training(args)
        bar.update(3)
    ratio = peak_ratio(*found)
    # Named by a worker: this process must not occupy the GPU while others are measured.
    machine = found[0]["machine"]
    without = "Without what the longer output adds, the" if found[0]["device"] == "cpu" else "The"
    rows = [
        "| roll-out, frames | peak memory, MiB | of it the output | ms per frame |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| {run['frames']} | {run['peak'] / 2**20:.0f} | {run['output'] / 2**20:.0f} | {run['ms_per_frame']:.1f} |"
        for run in found
    ]
    rows += [
        "",
        f"| training {args.size}, batch {args.batch} | peak memory, GiB | samples/s |",
        "|---|---|---|",
    ]
    rows += [
        f"| {run['way']} | {run['peak_gib']:.2f} | {run['samples_per_second']:.3g} |"
        for run in trained
    ]
    text = (
        f"{VIDEOS} videos of 64 px, {machine}. {without} long roll-out's peak is "
        f"**{ratio:.3f}** of the short one's.\n\n" + "\n".join(rows)
    )
    print(text, f"\ntable          {results.write('Memory', text, args.out)}")
    print(
        json.dumps(
            {
                "benchmark": "memory",
                "machine": machine,
                "roll_outs": found,
                "ratio": ratio,
                "training": trained,
            }
        )
    )


if __name__ == "__main__":
    run_command(main)
