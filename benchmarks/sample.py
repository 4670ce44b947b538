"""Frames per second of sampling, and what they are worth.

    python -m benchmarks.sample
    python -m benchmarks.sample --ckpt outputs/checkpoints/ball_stn-follmer-0/latest.pt

The first times the KTH network with weights as initialised: our roll-out against the straightforward one, both with the same
evaluations (Euler steps of the ODE, the context drawn anew at each), which is float32 and grows its history by concatenation,
all videos at once or one after the other. The second samples test videos from a checkpoint by the predecessor's sampler,
a hundred steps in float32, and by the checkpoint's own few-step one: frames per second, and CRPS. A JSON line comes last.
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
from benchmarks import measure, results
from configs import Latent
from forecaster import Forecaster, build_net
from forecaster import load as load_forecaster
from models import autoencoders
from runtime.console import progress, run_command
from runtime.process import start, uses_bf16
from solvers import integrate

GIVEN = 10


@torch.no_grad()
def plainly(model: Forecaster, given: Tensor, frames: int, batch: int) -> Tensor:
    """The next `frames`, of `batch` videos at a time; latents given (B, T, C, h, w) -> pixels (B, frames, 3, H, W)."""
    config, outputs, rng = model.config.sample, [], np.random.default_rng(0)
    for history in given.split(batch):
        for t in range(history.shape[1], history.shape[1] + frames):
            reference = history[:, -1]

            def field(
                x: Tensor,
                s: Tensor,
                t: int = t,
                history: Tensor = history,
                reference: Tensor = reference,
            ) -> Tensor:
                place = int(rng.integers(t - 1))
                gap = torch.full((len(x),), t - 1.0 - place, device=x.device)
                return model.net(
                    model.interpolant.network_input(x, s, reference),
                    s,
                    reference,
                    history[:, place : place + 1],
                    gap[:, None],
                )

            frame = integrate(
                field,
                model.interpolant,
                reference,
                config.steps,
                config.solver,
                model.config.diffusion,
            )
            history = torch.cat([history, frame[:, None]], 1)
        outputs.append(torch.stack([model.to_pixels(z) for z in history[:, -frames:].unbind(1)], 1))
    return torch.cat(outputs)


@torch.no_grad()
def ours(model: Forecaster, given: Tensor, frames: int) -> list[np.ndarray]:
    """As Forecaster.forecast does it once the given frames are encoded."""
    future = model.roll_out(given, frames, ("benchmark",))
    return [sample.data.to_frames(model.to_pixels(future[:, k])) for k in range(frames)]


def kth(
    args: argparse.Namespace, device: torch.device, precision: str, compiled: str
) -> Forecaster:
    """Weights as initialised, the same for every precision."""
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


def same_evaluations(args: argparse.Namespace, device: torch.device) -> tuple[str, dict]:
    given = torch.randn(args.videos, GIVEN, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    plain, fast = (
        kth(args, device, "float32", "off"),
        kth(args, device, args.precision, args.compile),
    )
    ways = {
        "straightforward, one by one": lambda: plainly(plain, given, args.frames, 1),
        "straightforward, all at once": lambda: plainly(plain, given, args.frames, args.videos),
        "ours": lambda: ours(fast, given, args.frames),
    }
    rates = {}
    for name, work in ways.items():
        # One roll-out per block: its frames end in main memory, so it waits for the GPU anyway.
        taken = measure.seconds(work, device, args.repeats, calls=1)
        rates[name] = args.videos * args.frames / taken
    rows = ["| way | frames/s | ours is so many times as fast |", "|---|---|---|"]
    rows += [
        f"| {name} | {rate:.3g} | {rates['ours'] / rate:.2f} |" for name, rate in rates.items()
    ]
    text = (
        f"KTH's network ({args.size}), {args.videos} videos, {args.frames} frames of {args.steps} evaluations each, all "
        "decoded.\n\n" + "\n".join(rows)
    )
    return text, {
        "frames_per_second": rates,
        "ratio": rates["ours"] / rates["straightforward, all at once"],
    }


def at_equal_crps(args: argparse.Namespace, device: torch.device) -> tuple[str, dict]:
    """The checkpoint's own sampler beside a hundred steps of Euler-Maruyama (or Euler, from noise) in float32."""
    found = {}
    usual = {"sample.num_videos": args.videos, "sample.num_samples": 4}
    hundred = {
        "sample.steps": 100,
        "sample.redraw": "frame",
        "sample.reencode": False,
        "sample.grid": "uniform",
        "train.precision": "float32",
    }
    own = {"train.precision": args.precision, "sample.compile": args.compile}
    for name, options in (
        ("one video at a time", {**hundred, "sample.batch": 4}),
        ("all at once", hundred),
        ("own", own),
    ):
        model, _ = load_forecaster(args.ckpt, device, usual)
        from_noise = not model.interpolant.from_reference
        solver = {
            "sample.solver": "euler" if from_noise else "em",
            "sample.diffusion": "0" if from_noise else "sigma",
        }
        model, _ = load_forecaster(
            args.ckpt, device, {**usual, **options, **(solver if name != "own" else {})}
        )
        began = time.perf_counter()
        truth, samples, _ = sample.forecast_split(model)
        measure.synchronize(device)
        rate = samples[..., 0, 0, 0].size / (time.perf_counter() - began)
        crps = sample.score(truth, samples)["ratio_to_repeat_last"]["crps"]["all"]
        found[name] = {
            "frames_per_second": rate,
            "crps_ratio": crps,
            "solver": model.config.sample.solver,
            "steps": model.config.sample.steps,
        }
    rates = {name: row["frames_per_second"] for name, row in found.items()}
    ratio = rates["own"] / rates["one video at a time"]
    rows = ["| sampler | frames/s | CRPS / repeating the last frame |", "|---|---|---|"]
    rows += [
        f"| {row['solver']}, {row['steps']} steps ({name}) | {row['frames_per_second']:.4g} | {row['crps_ratio']:.3f} |"
        for name, row in found.items()
    ]
    text = (
        f"{args.ckpt.name} of {args.ckpt.parent.name}, {args.videos} videos x 4 futures: **{ratio:.1f} times** the rate of "
        f"the hundred steps one video at a time, {rates['own'] / rates['all at once']:.1f} times that of all at once.\n\n"
    )
    return text + "\n".join(rows), {"samplers": found, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sample", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--ckpt", type=Path, help="a trained checkpoint of main.py; without it, speed alone")
    add("--size", default="B", help=f"of {', '.join(configs.SIZES)} (default B, the published one)")
    add("--videos", type=int, default=16, help="(default 16)")
    add("--frames", type=int, default=4, help="forecast (default 4)")
    add("--steps", type=int, default=4, help="evaluations per frame (default 4)")
    add("--precision", default="auto", help="auto, bf16 or float32")
    add("--compile", default="off", help=", ".join(configs.COMPILE))
    add("--repeats", type=int, default=2, help="timed roll-outs (default 2)")
    add("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    args = parser.parse_args()
    device = start().device
    with progress(1, "sample", "run") as bar:
        text, line = (at_equal_crps if args.ckpt else same_evaluations)(args, device)
        bar.update()
    text = (
        f"{results.machine()}, {'bf16' if uses_bf16(args.precision, device) else 'float32'}. {text}"
    )
    section = "Sampling, at equal CRPS" if args.ckpt else "Sampling, the same evaluations"
    print(text, f"\ntable          {results.write(section, text, args.out)}")
    print(json.dumps({"benchmark": "sample", "machine": results.machine(), **line}))


if __name__ == "__main__":
    run_command(main)
