"""How long FVD takes: videos through I3D and the distance, and how much of it is the network.

    python -m benchmarks.fvd

Two sets of videos of smoothed noise. The plain way is float32, contiguous, batch normalisation by itself; ours is what
features.load_i3d makes. A JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import results
from evaluation import metrics, networks
from runtime import checkpoints
from runtime.console import progress, run_command
from runtime.process import has_fast_bf16, start


def videos(n: int, frames: int, size: int, seed: int) -> np.ndarray:
    """(n, frames, size, size, 3) uint8: noise that is smooth in space and in time."""
    noise = torch.from_numpy(
        np.random.default_rng(seed).random(
            (n, 3, frames // 4 + 1, size // 8, size // 8), np.float32
        )
    )
    smooth = torch.nn.functional.interpolate(noise, (frames, size, size), mode="trilinear")
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().numpy()


def plain(weights: Path, device: torch.device) -> torch.nn.Module:
    model = networks.I3D()
    checkpoints.load_weights(model, networks.read_weights(weights), weights)
    return model.to(device).eval().requires_grad_(False)


class Stopwatch:
    """Time spent inside a module's forward."""

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.seconds, self.device = 0.0, device
        model.register_forward_pre_hook(lambda *_: self.start())
        model.register_forward_hook(lambda *_: self.stop())

    def start(self) -> None:
        self.began = now(self.device)

    def stop(self) -> None:
        self.seconds += now(self.device) - self.began


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    model: torch.nn.Module, real: np.ndarray, other: np.ndarray, device: torch.device, name: str
) -> dict:
    networks.i3d_features(model, real[:2], device)  # warm-up
    watch, began = Stopwatch(model, device), now(device)
    with progress(len(real) + len(other), name, "video") as bar:
        a, b = (networks.i3d_features(model, x, device, bar=bar) for x in (real, other))
    value = metrics.fvd(a, b)
    seconds = now(device) - began
    return {
        "way": name,
        "seconds": seconds,
        "seconds_per_video": seconds / (len(real) + len(other)),
        "in_network": watch.seconds / seconds,
        "fvd": value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fvd", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--videos", type=int, default=100, help="in each of the two sets (default 100)"
    )
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--weights", type=Path, default=Path("weights/metrics"))
    parser.add_argument("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    args = parser.parse_args()
    device, weights = start().device, args.weights / "i3d.safetensors"
    real, other = (videos(args.videos, args.frames, args.size, seed) for seed in (0, 1))
    ways = {
        "plain": lambda: plain(weights, device),
        "ours": lambda: networks.load_i3d(weights, device),
    }
    if has_fast_bf16(device):
        ways["ours, bf16"] = lambda: networks.load_i3d(weights, device, "bf16")
    rows = [measure(make(), real, other, device, name) for name, make in ways.items()]
    lines = [
        "| way | seconds | per video | share in the network | times plain's speed | FVD / plain's |",
        "| --- |" + " ---: |" * 5,
    ]
    lines += [
        f"| {r['way']} | {r['seconds']:.1f} | {r['seconds_per_video']:.2f} | {r['in_network']:.0%} | "
        f"{rows[0]['seconds'] / r['seconds']:.2f} | {r['fvd'] / rows[0]['fvd']:.4f} |"
        for r in rows
    ]
    text = (
        f"FVD of {args.videos} against {args.videos} videos of {args.frames} frames at {args.size} pixels. "
        f"{results.machine()}.\n\n" + "\n".join(lines)
    )
    results.write("FVD", text, args.out)
    print(text)
    print(json.dumps(rows))


if __name__ == "__main__":
    run_command(main)
