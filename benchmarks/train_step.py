"""Measure the time per training sample of the KTH model, and the machine's matrix product rate.

    python -m benchmarks.train_step --baseline
    python -m benchmarks.train_step --sizes S B --batches 8 32 --processes 1 2

A step is that of train.py: gather a batch from cached latents, update the weights, update the
running average. --baseline also measures the straightforward way: read clips of 40 frames, one
dataset per frame; encode three frames of each clip in float32; update in float32 with PyTorch's
default optimizer; average the weights one by one; read the loss at every step. On GPUs float32
means TF32, here as everywhere. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import configs
import train
from batches.batch import Batch, to_pixels
from batches.latents import LatentTriples
from batches.windows import draw_windows
from benchmarks import measure, results
from configs import Config, Latent
from forecaster import Forecaster, build_net
from models import autoencoders
from runtime import parallel
from runtime.console import UserError, progress, run_command
from runtime.process import Process, autocast, start, uses_bf16
from shards import Shards, write_packed

# Shape of a latent, and frames per clip of the straightforward way.
SHAPE = (4, 8, 8)
CLIP_LENGTH = 40


def build_config(args: argparse.Namespace, size: str, batch: int, **more) -> Config:
    """The config of KTH's model, with latents of mean 0 and standard deviation 1."""
    options = {
        "model.size": size,
        "train.batch_size": batch,
        "train.precision": args.precision,
        "train.compile": args.compile,
        "train.shard": args.shard,
        "train.recompute": args.recompute,
        "train.accumulate": args.accumulate,
        **more,
    }
    config = configs.build("kth", options)
    return dataclasses.replace(config, latent=Latent(SHAPE, (0.0,) * 4, (1.0,) * 4))


def count_flops(config: Config) -> int:
    """FLOPs per sample of the forward and backward pass: three times those of the forward pass."""
    with torch.device("meta"):
        net = build_net(config, torch.device("meta")).eval()
        x, one = torch.empty(1, *SHAPE), torch.ones(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, one, x, x[:, None], one[:, None])
    return 3 * counter.get_total_flops()


# ------------------------------------------------------------------------------------ the two ways
def time_ours(config: Config, dir: Path, process: Process, repeats: int) -> float:
    """Seconds per step of train.py's loop."""
    # The parts of train.fit without its log, previews and checkpoints.
    source = LatentTriples(config, dir, process.device, process.rank, process.world)
    learner = train.build_learner(config, process)
    forecaster = Forecaster(config, None, None, process.device)
    losses = []
    steps = itertools.count()

    def step() -> None:
        k = next(steps)
        scalars = train.update(learner, forecaster, source.batch(k), k, process)
        # Reading the loss would wait for the GPU, so losses are checked at the end.
        losses.append(scalars["loss"])
        train.update_ema(
            parallel.local(learner.ema), parallel.local(learner.weights), k, config.train.ema
        )

    taken = measure.median_seconds(step, process.device, repeats, warmup=2)
    if not torch.stack(losses).isfinite().all():
        raise UserError("a loss is not finite, so the measured times are not those of a training")
    return taken


def time_straightforward(
    config: Config, dir: Path, device: torch.device, repeats: int
) -> dict[str, float]:
    """Seconds per part of a step of the straightforward way."""
    shards = Shards(dir)
    rng = np.random.default_rng(0)
    n = config.train.batch_size
    encode = autoencoders.build("taming_f8_small").to(device).eval().requires_grad_(False).encode
    forecaster = Forecaster(config, None, None, device)
    net = build_net(config, device)
    averaged = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), config.train.lr)

    def read() -> torch.Tensor:
        windows = draw_windows(shards.lengths, CLIP_LENGTH, 0, n, rng)
        clips = []
        for video, first in zip(windows.video, windows.start):
            clips.append(shards.read(video, first + np.arange(CLIP_LENGTH)))
        return to_pixels(np.stack(clips), device)

    # Three frames of each clip suffice for one sample: target, reference and context.
    def encode_triples(clips: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return encode(clips[:, :3].flatten(0, 1).contiguous()).unflatten(0, (-1, 3))

    def update(z: torch.Tensor) -> None:
        batch = Batch(z[:, 0], z[:, 1], z[:, 2:], torch.ones(n, 1, device=device))
        batch = batch.normalize(forecaster.mean, forecaster.std)
        s, eps = train.draw_noise(config, batch.target, 0, device, slice(n))
        with autocast(config.train.precision, device):
            loss = train.flow_loss(net, forecaster.interpolant, batch, s, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in net.named_parameters():
                averaged[name].mul_(0.9999).add_(value, alpha=1e-4)
        loss.item()

    # The parts of a step run one after the other, so the times of the parts add up.
    clips = read()
    z = encode_triples(clips)
    return {
        "read": measure.median_seconds(read, device, repeats),
        "encode": measure.median_seconds(lambda: encode_triples(clips), device, repeats),
        "update": measure.median_seconds(lambda: update(z), device, repeats),
    }


# ---------------------------------------------------------------------------------------- the runs
def write_latents(dir: Path) -> Path:
    """Write a shard of random latents: 200 videos of 100 frames; return its folder."""
    rows = np.random.default_rng(0).standard_normal((20_000, *SHAPE)).astype(np.float16)
    lengths = np.full(200, 100)
    attributes = {"continues": False, "fps": 25.0}
    write_packed(dir / "shard_0001.hdf5", "latents", rows, lengths, attributes)
    return dir


def describe_machine(args: argparse.Namespace, device: torch.device) -> dict:
    """The machine, the precision, and the matrix rates in FLOP/s."""
    return {
        "machine": results.describe_machine(),
        "precision": "bf16" if uses_bf16(args.precision, device) else "float32",
        "matmul_bf16": measure.matmul_rate(device),
        "matmul_float32": measure.matmul_rate(device, torch.float32),
    }


def measure_baseline(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds per part of a step of the straightforward way, with the first size."""
    options = {"train.precision": "float32", "train.compile": "off"}
    config = build_config(args, args.sizes[0], args.baseline_batch, **options)
    with tempfile.TemporaryDirectory() as folder:
        return time_straightforward(
            config, measure.write_river_shards(Path(folder), 20, 60), device, args.repeats
        )


def measure_run(args: argparse.Namespace, process: Process) -> dict:
    """Measure one size and batch size. Every process that torchrun started calls this."""
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(args, args.sizes[0], args.batches[0] * process.world)
        taken = time_ours(config, write_latents(Path(folder)), process, args.repeats)
    rate = args.batches[0] * process.world / taken
    return {
        "size": args.sizes[0],
        "batch": args.batches[0],
        "processes": process.world,
        "samples_per_second": rate,
        "flop_per_second": rate * count_flops(config),
        "peak_gib": measure.peak_memory(process.device) / 2**30,
    }


def last_json(stdout: str) -> dict:
    """Parse the last line that a process printed."""
    return json.loads(stdout.strip().splitlines()[-1])


def launch_worker(args: argparse.Namespace, size: str, batch: int, processes: int) -> dict:
    """Run `measure_run` in new processes, so that each starts with empty memory."""
    torchrun = "torch.distributed.run --standalone"
    command = [sys.executable, "-m", *torchrun.split(), f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.train_step", "--worker", "--sizes", size, "--batches", str(batch)]
    for name in ("precision", "compile", "repeats", "accumulate"):
        command.append(f"--{name}={getattr(args, name)}")
    for name in ("shard", "recompute"):
        if getattr(args, name):
            command.append(f"--{name}")
    # Several processes on one machine share its cores.
    threads = str(max(1, torch.get_num_threads() // processes))
    env = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise UserError(
            f"size {size}, batch {batch}, {processes} processes: "
            f"ended with {done.returncode}, see above"
        )
    return last_json(done.stdout)


def run_alone(args: argparse.Namespace, part: str) -> dict:
    """Run describe_machine() or measure_baseline() in a new process: part machine or baseline.

    A CUDA context in this process would occupy the GPU while the runs are measured.
    """
    command = [sys.executable, "-m", "benchmarks.train_step", "--part", part]
    command += ["--sizes", args.sizes[0], "--precision", args.precision]
    command += [f"--repeats={args.repeats}", f"--baseline_batch={args.baseline_batch}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"measuring the {part} ended with {done.returncode}, see above")
    return last_json(done.stdout)


def compare_with_baseline(
    args: argparse.Namespace, line: dict, parts: dict[str, float]
) -> list[str]:
    """Return the paragraph about the baseline; add the baseline's numbers to `line`."""
    # Per sample, because both ways have different batch sizes.
    each = {name: 1e3 * value / args.baseline_batch for name, value in parts.items()}
    total = sum(each.values())
    own = 1e3 / line["runs"][0]["samples_per_second"]
    line.update(
        baseline_ms_per_sample={**each, "all": total},
        ms_per_sample=own,
        ratio=total / own,
        ratio_of_updates=each["update"] / own,
    )
    named = ", ".join(f"{name} {value:.3g}" for name, value in each.items())
    return [
        "",
        f"The straightforward way, {args.sizes[0]}, batch {args.baseline_batch}, float32: "
        f"{total:.4g} ms per sample ({named}); ours {own:.4g} ms: "
        f"**{line['ratio']:.2f} times as fast**, the update alone "
        f"{line['ratio_of_updates']:.2f} times.",
    ]


def measure_runs(args: argparse.Namespace, line: dict) -> list[str]:
    """Measure every size, batch and number of processes; return the table, add runs to `line`."""
    columns = ["size", "batch", "processes", "samples/s", "TFLOP/s"]
    columns += ["of the bf16 matmul", "peak memory, GiB"]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    combinations = list(itertools.product(args.sizes, args.batches, args.processes))
    with progress(len(combinations), "train_step", "run") as bar:
        for size, batch, n in combinations:
            run = launch_worker(args, size, batch, n)
            run["fraction_of_matmul"] = run["flop_per_second"] / line["matmul_bf16"]
            line["runs"].append(run)
            rows.append(
                f"| {size} | {batch} | {n} | {run['samples_per_second']:.4g} "
                f"| {run['flop_per_second'] / 1e12:.3g} | {run['fraction_of_matmul']:.0%} "
                f"| {run['peak_gib']:.2f} |"
            )
            bar.update()
    return rows


# ------------------------------------------------------------------------------------- the command
def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    sizes = ", ".join(configs.SIZES)
    add("--sizes", nargs="+", default=["B"], help=f"{sizes} (default B, as published)")
    add(
        "--batches",
        nargs="+",
        type=int,
        default=[32],
        help="samples per update and process (default 32)",
    )
    add("--processes", nargs="+", type=int, default=[1], help="data-parallel processes (default 1)")
    add("--repeats", type=int, default=5, help="timed steps, on a GPU blocks of ten (default 5)")
    add("--precision", default="auto", help="auto, bf16 or float32")
    add("--compile", default="auto", help=", ".join(configs.COMPILE))
    add("--accumulate", type=int, default=1, help="parts of a batch")
    add("--shard", action="store_true", help="split the weights over the processes (FSDP2)")
    add("--recompute", action="store_true", help="activation checkpointing")
    add("--baseline", action="store_true", help="also measure the straightforward way (first size)")
    add("--baseline_batch", type=int, default=8, help="batch size of the straightforward way")
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--part", choices=("machine", "baseline"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(args: argparse.Namespace) -> None:
    """Run `measure_run`; the first process prints the result."""
    process = start()
    found = measure_run(args, process)
    if process.first:
        print(json.dumps(found))
    process.close()


def main() -> None:
    args = parse()
    if args.worker:
        run_worker(args)
        return
    if args.part:
        measured = describe_machine if args.part == "machine" else measure_baseline
        print(json.dumps(measured(args, start().device)))
        return
    line = {"benchmark": "train_step", **run_alone(args, "machine"), "runs": []}
    rows = measure_runs(args, line)
    line["fraction_of_matmul"] = line["runs"][0]["fraction_of_matmul"]
    if args.baseline:
        rows += compare_with_baseline(args, line, run_alone(args, "baseline"))
    text = (
        f"{line['machine']}, {line['precision']}. A large matrix product runs at "
        f"{line['matmul_bf16'] / 1e12:.3g} TFLOP/s in bf16, "
        f"{line['matmul_float32'] / 1e12:.3g} in float32; latents 4x8x8.\n\n" + "\n".join(rows)
    )
    print(text, f"\ntable          {results.write('Training step', text, args.out)}")
    print(json.dumps(line))


if __name__ == "__main__":
    run_command(main)
