"""Measure the speed of sampling in frames per second, and the CRPS of the samples.

    python -m benchmarks.sample
    python -m benchmarks.sample --ckpt outputs/checkpoints/ball_stn-follmer-0/latest.pt

The first command times the KTH network with initial weights: our roll-out against the
straightforward one, with the same network evaluations (Euler steps of the ODE, a new context at
each). The straightforward roll-out computes in float32 and extends its history by concatenation,
with all videos in one batch or one video after the other.

The second command samples test videos from a checkpoint with two samplers: a hundred steps in
float32, as in earlier implementations, and the few steps of the checkpoint's settings. It reports
frames per second and CRPS. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import configs
import sample
import vqvae
from batches.batch import to_frames
from benchmarks import measure, results
from configs import Latent
from evaluation.measure import score
from forecaster import Forecaster, build_net
from forecaster import load as load_forecaster
from models import autoencoders
from runtime.console import progress, run_command
from runtime.process import start, uses_bf16
from solvers import integrate

# Given frames per video.
GIVEN = 10


@torch.no_grad()
def roll_out_straightforward(model: Forecaster, given: Tensor, frames: int, batch: int) -> Tensor:
    """Forecast `frames` frames in the straightforward way, `batch` videos at a time.

    given: latents (B, T, C, h, w). Returns pixels (B, frames, 3, H, W).
    """
    config = model.config.sample
    # Contexts are drawn on the host, one number per evaluation, as in simple implementations.
    rng = np.random.default_rng(0)
    outputs = []
    for history in given.split(batch):
        for t in range(history.shape[1], history.shape[1] + frames):
            reference = history[:, -1]

            # Default arguments bind the values of this iteration.
            def field(
                x: Tensor,
                s: Tensor,
                t: int = t,
                history: Tensor = history,
                reference: Tensor = reference,
            ) -> Tensor:
                place = int(rng.integers(t - 1))
                gap = torch.full((len(x),), t - 1.0 - place, device=x.device)
                x = model.interpolant.network_input(x, s, reference)
                return model.net(x, s, reference, history[:, place : place + 1], gap[:, None])

            frame = integrate(
                field,
                model.interpolant,
                reference,
                config.steps,
                config.solver,
                model.config.diffusion,
            )
            # Copies the whole history at every frame, as a straightforward implementation does.
            history = torch.cat([history, frame[:, None]], 1)
        outputs.append(torch.stack([model.to_pixels(z) for z in history[:, -frames:].unbind(1)], 1))
    return torch.cat(outputs)


@torch.no_grad()
def roll_out_ours(model: Forecaster, given: Tensor, frames: int) -> list[np.ndarray]:
    """Forecast as Forecaster.forecast does after encoding -> an array of uint8 frames per time."""
    future = model.roll_out(given, frames, ("benchmark",))
    return [to_frames(model.to_pixels(future[:, k])) for k in range(frames)]


def build_kth(
    args: argparse.Namespace, device: torch.device, precision: str, compiled: str
) -> Forecaster:
    """KTH's model with initial weights, which are the same for every precision."""
    config = configs.build(
        "kth",
        {
            "flow.interpolant": "linear",
            "model.size": args.size,
            "train.precision": precision,
            "sample.steps": args.steps,
            "sample.solver": "euler",
            "sample.compile": compiled,
        },
    )
    config = dataclasses.replace(config, latent=Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4))
    torch.manual_seed(0)
    autoencoder = vqvae.freeze(autoencoders.build("taming_f8_small"), device, precision)
    return Forecaster(config, build_net(config, device).eval(), autoencoder, device)


def compare_roll_outs(args: argparse.Namespace, device: torch.device) -> tuple[str, dict]:
    """Time the roll-outs with the same evaluations; return (Markdown, numbers)."""
    noise = torch.Generator().manual_seed(0)
    given = torch.randn(args.videos, GIVEN, 4, 8, 8, generator=noise).to(device)
    plain = build_kth(args, device, "float32", "off")
    fast = build_kth(args, device, args.precision, args.compile)

    def straightforward(batch: int) -> Tensor:
        return roll_out_straightforward(plain, given, args.frames, batch)

    ways = {
        "straightforward, one by one": lambda: straightforward(1),
        "straightforward, all at once": lambda: straightforward(args.videos),
        "ours": lambda: roll_out_ours(fast, given, args.frames),
    }
    rates = {}
    for name, work in ways.items():
        # One roll-out per block, because the copy of its frames waits for the GPU anyway.
        taken = measure.median_seconds(work, device, args.repeats, calls=1)
        rates[name] = args.videos * args.frames / taken

    lines = [
        f"KTH's network ({args.size}), {args.videos} videos, {args.frames} frames of {args.steps} "
        "evaluations each, all decoded.",
        "",
        "| way | frames/s | ours / this rate |",
        "|---|---|---|",
    ]
    for name, rate in rates.items():
        lines.append(f"| {name} | {rate:.3g} | {rates['ours'] / rate:.2f} |")
    ratio = rates["ours"] / rates["straightforward, all at once"]
    return "\n".join(lines), {"frames_per_second": rates, "ratio": ratio}


# The sampler of earlier implementations, apart from solver and diffusion.
HUNDRED_STEPS = {
    "sample.steps": 100,
    "sample.redraw": "frame",
    "sample.reencode": False,
    "sample.grid": "uniform",
    "train.precision": "float32",
}


def predecessor_solver(args: argparse.Namespace, device: torch.device, usual: dict) -> dict:
    """Euler for an interpolant that starts from noise, else Euler-Maruyama with g = sigma."""
    model, _ = load_forecaster(args.ckpt, device, usual)
    if model.interpolant.from_reference:
        return {"sample.solver": "em", "sample.diffusion": "sigma"}
    return {"sample.solver": "euler", "sample.diffusion": "0"}


def time_sampler(args: argparse.Namespace, device: torch.device, overrides: dict) -> dict:
    """Sample the test videos; measure frames per second and CRPS / CRPS of repeating the last
    frame."""
    model, _ = load_forecaster(args.ckpt, device, overrides)
    began = time.perf_counter()
    truth, samples, _ = sample.forecast_split(model)
    measure.synchronize(device)
    rate = samples[..., 0, 0, 0].size / (time.perf_counter() - began)
    return {
        "frames_per_second": rate,
        "crps_ratio": score(truth, samples)["ratio_to_repeat_last"]["crps"]["all"],
        "solver": model.config.sample.solver,
        "steps": model.config.sample.steps,
    }


def compare_at_equal_crps(args: argparse.Namespace, device: torch.device) -> tuple[str, dict]:
    """Time the checkpoint's own sampler against a hundred steps; return (Markdown, numbers)."""
    usual = {"sample.num_videos": args.videos, "sample.num_samples": 4}
    hundred = {**usual, **HUNDRED_STEPS, **predecessor_solver(args, device, usual)}
    own = {**usual, "train.precision": args.precision, "sample.compile": args.compile}
    found = {
        # A batch of 4 is the 4 futures of one video.
        "one video at a time": time_sampler(args, device, {**hundred, "sample.batch": 4}),
        "all at once": time_sampler(args, device, hundred),
        "own": time_sampler(args, device, own),
    }

    # The ratio to the slower of both ways with a hundred steps is the headline.
    rates = {name: row["frames_per_second"] for name, row in found.items()}
    ratio = rates["own"] / rates["one video at a time"]
    lines = [
        f"{args.ckpt.name} of {args.ckpt.parent.name}, {args.videos} videos x 4 futures: "
        f"**{ratio:.1f} times** the rate of the hundred steps one video at a time, "
        f"{rates['own'] / rates['all at once']:.1f} times that of all at once.",
        "",
        "| sampler | frames/s | CRPS / repeating the last frame |",
        "|---|---|---|",
    ]
    for name, row in found.items():
        lines.append(
            f"| {row['solver']}, {row['steps']} steps ({name}) "
            f"| {row['frames_per_second']:.4g} | {row['crps_ratio']:.3f} |"
        )
    return "\n".join(lines), {"samplers": found, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sample", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint of main.py; without it only speed is measured")
    add("--size", default="B", help=f"{', '.join(configs.SIZES)} (default B, as published)")
    add("--videos", type=int, default=16, help="videos (default 16)")
    add("--frames", type=int, default=4, help="frames to forecast (default 4)")
    add("--steps", type=int, default=4, help="evaluations per frame (default 4)")
    add("--precision", default="auto", help="auto, bf16 or float32")
    add("--compile", default="off", help=", ".join(configs.COMPILE))
    add("--repeats", type=int, default=2, help="timed roll-outs (default 2)")
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    args = parser.parse_args()
    device = start().device
    with progress(1, "sample", "run") as bar:
        benchmark = compare_at_equal_crps if args.ckpt else compare_roll_outs
        text, line = benchmark(args, device)
        bar.update()
    precision = "bf16" if uses_bf16(args.precision, device) else "float32"
    text = f"{results.describe_machine()}, {precision}. {text}"
    section = "Sampling, at equal CRPS" if args.ckpt else "Sampling, the same evaluations"
    print(text, f"\ntable          {results.write(section, text, args.out)}")
    print(json.dumps({"benchmark": "sample", "machine": results.describe_machine(), **line}))


if __name__ == "__main__":
    run_command(main)
