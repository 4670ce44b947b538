"""Milliseconds per training sample of the KTH model, beside the machine's matrix rate.

    python -m benchmarks.train_step --baseline
    python -m benchmarks.train_step --sizes S B --batches 8 32 --processes 1 2

A step here is what train.py does: a batch gathered from cached latents, the update, the running average. --baseline measures,
in the same run, the straightforward way: clips of 40 frames read from a dataset per frame, of which three are encoded in
float32, then the update in float32, the optimizer as it comes, averages weight by weight, the loss read at every step (on
GPUs float32 means TF32, here as everywhere). A JSON line comes last.
"""

from __future__ import annotations

import argparse
import dataclasses
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

SHAPE, CLIP_LENGTH = (4, 8, 8), 40


def setting(args: argparse.Namespace, size: str, batch: int, **more) -> Config:
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


def flops(config: Config) -> int:
    """Floating-point operations of the network for one sample, there and back (thrice the way there)."""
    with torch.device("meta"):
        net = build_net(config, torch.device("meta")).eval()
        x, one = torch.empty(1, *SHAPE), torch.ones(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, one, x, x[:, None], one[:, None])
    return 3 * counter.get_total_flops()


# --------------------------------------------------------------------------------------------------------------- two ways
def ours(config: Config, dir: Path, process: Process, repeats: int) -> float:
    """Seconds of a step of the training loop."""
    source = LatentTriples(config, dir, process.device, process.rank, process.world)
    learner = train.begin(config, process, dir, None)
    forecaster = Forecaster(config, None, None, process.device)
    losses, steps = [], iter(range(10**9))

    def step() -> None:
        k = next(steps)
        scalars = train.update(
            learner.net, learner.optimizer, forecaster, source.batch(k), k, process
        )
        losses.append(scalars["loss"])
        train.average(
            parallel.local(learner.ema), parallel.local(learner.weights), k, config.train.ema
        )

    taken = measure.seconds(step, process.device, repeats, warmup=2)
    if not torch.stack(losses).isfinite().all():
        raise UserError("a loss that is not finite: what was measured is no training")
    return taken


def plainly(config: Config, dir: Path, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each part of a step of the straightforward way."""
    shards, rng, n = Shards(dir), np.random.default_rng(0), config.train.batch_size
    encode = autoencoders.build("taming_f8_small").to(device).eval().requires_grad_(False).encode
    forecaster = Forecaster(config, None, None, device)
    net = build_net(config, device)
    averaged = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), config.train.lr)

    def read() -> torch.Tensor:
        windows = draw_windows(shards.lengths, CLIP_LENGTH, 0, n, rng)
        clips = [
            shards.read(v, start + np.arange(CLIP_LENGTH))
            for v, start in zip(windows.video, windows.start)
        ]
        return to_pixels(np.stack(clips), device)

    def encoded(clips: torch.Tensor) -> torch.Tensor:
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

    clips = read()
    z = encoded(clips)
    return {
        "read": measure.seconds(read, device, repeats),
        "encode": measure.seconds(lambda: encoded(clips), device, repeats),
        "update": measure.seconds(lambda: update(z), device, repeats),
    }


# ----------------------------------------------------------------------------------------------------------------- the runs
def latents(dir: Path) -> Path:
    """A latent shard of 20,000 frames in videos of 100."""
    rows = np.random.default_rng(0).standard_normal((20_000, *SHAPE)).astype(np.float16)
    write_packed(
        dir / "shard_0001.hdf5",
        "latents",
        rows,
        np.full(200, 100),
        {"continues": False, "fps": 25.0},
    )
    return dir


def machine(args: argparse.Namespace, device: torch.device) -> dict:
    """The machine's name, the precision, and the rates of matrix products."""
    return {
        "machine": results.machine(),
        "precision": "bf16" if uses_bf16(args.precision, device) else "float32",
        "matmul_bf16": measure.matmul_rate(device),
        "matmul_float32": measure.matmul_rate(device, torch.float32),
    }


def baseline(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of each part of a step of the straightforward way, of the first size."""
    options = {"train.precision": "float32", "train.compile": "off"}
    config = setting(args, args.sizes[0], args.baseline_batch, **options)
    with tempfile.TemporaryDirectory() as folder:
        return plainly(config, measure.river_shards(Path(folder), 20, 60), device, args.repeats)


def worker(args: argparse.Namespace, process: Process) -> dict:
    """One size and batch, as all processes that torchrun has started do it together."""
    with tempfile.TemporaryDirectory() as folder:
        config = setting(args, args.sizes[0], args.batches[0] * process.world)
        taken = ours(config, latents(Path(folder)), process, args.repeats)
    rate = args.batches[0] * process.world / taken
    return {
        "size": args.sizes[0],
        "batch": args.batches[0],
        "processes": process.world,
        "samples_per_second": rate,
        "flop_per_second": rate * flops(config),
        "peak_gib": measure.peak_memory(process.device) / 2**30,
    }


def launched(args: argparse.Namespace, size: str, batch: int, processes: int) -> dict:
    """`worker` in new processes, so that each begins with an empty memory."""
    flags = [
        f"--{name}={getattr(args, name)}"
        for name in ("precision", "compile", "repeats", "accumulate")
    ]
    flags += [f"--{name}" for name in ("shard", "recompute") if getattr(args, name)]
    threads = str(max(1, torch.get_num_threads() // processes))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "-m",
            "benchmarks.train_step",
            "--worker",
            "--sizes",
            size,
            "--batches",
            str(batch),
            *flags,
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    if done.returncode:
        raise UserError(
            f"size {size}, batch {batch}, {processes} processes: ended with {done.returncode}, see above"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def alone(args: argparse.Namespace, part: str) -> dict:
    """`machine` or `baseline` in a new process: a CUDA context in this one would occupy the GPU
    while the runs are measured."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--part", part]
    command += ["--sizes", args.sizes[0], "--precision", args.precision]
    command += [f"--repeats={args.repeats}", f"--baseline_batch={args.baseline_batch}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"measuring the {part} ended with {done.returncode}, see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compared(args: argparse.Namespace, line: dict, parts: dict[str, float]) -> list[str]:
    """The baseline's rows of the table; notes the ratio in `line`."""
    each = {name: 1e3 * value / args.baseline_batch for name, value in parts.items()}
    own = 1e3 / line["runs"][0]["samples_per_second"]
    line.update(
        baseline_ms_per_sample={**each, "all": sum(each.values())},
        ms_per_sample=own,
        ratio=sum(each.values()) / own,
        ratio_of_updates=each["update"] / own,
    )
    named = ", ".join(f"{name} {value:.3g}" for name, value in each.items())
    return [
        "",
        f"The straightforward way, {args.sizes[0]}, batch {args.baseline_batch}, float32: {sum(each.values()):.4g} ms "
        f"per sample ({named}); ours {own:.4g} ms: **{line['ratio']:.2f} times as fast**, the update alone "
        f"{line['ratio_of_updates']:.2f} times.",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--sizes",
        nargs="+",
        default=["B"],
        help=f"of {', '.join(configs.SIZES)} (default B, the published one)",
    )
    add(
        "--batches",
        nargs="+",
        type=int,
        default=[32],
        help="samples per update and process (default 32)",
    )
    add("--processes", nargs="+", type=int, default=[1], help="how many train together (default 1)")
    add("--repeats", type=int, default=5, help="timed steps, on a GPU blocks of ten (default 5)")
    add("--precision", default="auto", help="auto, bf16 or float32")
    add("--compile", default="auto", help=", ".join(configs.COMPILE))
    add("--accumulate", type=int, default=1, help="parts of a batch")
    add("--shard", action="store_true", help="split the weights over the processes (FSDP2)")
    add("--recompute", action="store_true", help="activation checkpointing")
    add(
        "--baseline",
        action="store_true",
        help="measure the straightforward way, too (of the first size)",
    )
    add("--baseline_batch", type=int, default=8)
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--part", choices=("machine", "baseline"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        process = start()
        found = worker(args, process)
        if process.first:
            print(json.dumps(found))
        process.close()
        return
    if args.part:
        measured = machine if args.part == "machine" else baseline
        print(json.dumps(measured(args, start().device)))
        return
    line = {"benchmark": "train_step", **alone(args, "machine"), "runs": []}
    rows = [
        "| size | batch | processes | samples/s | TFLOP/s | of the bf16 matmul | peak memory, GiB |",
        "|" + "---|" * 7,
    ]
    asked = [
        (size, batch, n) for size in args.sizes for batch in args.batches for n in args.processes
    ]
    with progress(len(asked), "train_step", "run") as bar:
        for size, batch, n in asked:
            run = launched(args, size, batch, n)
            run["fraction_of_matmul"] = run["flop_per_second"] / line["matmul_bf16"]
            line["runs"].append(run)
            rows.append(
                f"| {size} | {batch} | {n} | {run['samples_per_second']:.4g} | {run['flop_per_second'] / 1e12:.3g} | "
                f"{run['fraction_of_matmul']:.0%} | {run['peak_gib']:.2f} |"
            )
            bar.update()
    line["fraction_of_matmul"] = line["runs"][0]["fraction_of_matmul"]
    if args.baseline:
        rows += compared(args, line, alone(args, "baseline"))
    text = (
        f"{line['machine']}, {line['precision']}. A large matrix product runs at "
        f"{line['matmul_bf16'] / 1e12:.3g} TFLOP/s in bf16, "
        f"{line['matmul_float32'] / 1e12:.3g} in float32; latents 4x8x8.\n\n" + "\n".join(rows)
    )
    print(text, f"\ntable          {results.write('Training step', text, args.out)}")
    print(json.dumps(line))


if __name__ == "__main__":
    run_command(main)
