"""Training clips per second out of the data path alone.

    python -m benchmarks.data

The straightforward way reads clips of 40 frames, a compressed dataset per frame, of which training uses three. Beside it: three
frames of such shards, three frames of packed shards (what training on augmented frames reads), and triples of latents
gathered from the cache. A JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import configs
from batches.frames import FrameTriples
from batches.latents import LatentTriples
from batches.windows import draw_windows
from benchmarks import measure, results
from benchmarks.train_step import CLIP_LENGTH, latents
from runtime.console import progress, run_command
from runtime.process import start
from shards import Shards, ShardWriter


def ways(config: configs.Config, folder: Path, device: torch.device) -> dict:
    """name -> what reads one batch"""
    n, river = config.train.batch_size, Shards(measure.river_shards(folder, 40, 120))
    with ShardWriter(folder / "packed" / "train") as writer:
        for v in range(len(river)):
            writer.add(river.read(v, slice(None)))
    packed, steps = Shards(folder / "packed" / "train"), iter(range(10**9))
    cached = LatentTriples(config, latents(folder), device)
    rng = np.random.default_rng(0)

    def whole_clips() -> np.ndarray:
        windows = draw_windows(river.lengths, CLIP_LENGTH, 0, n, rng)
        return np.stack(
            [
                river.read(v, start + np.arange(CLIP_LENGTH))
                for v, start in zip(windows.video, windows.start)
            ]
        )

    return {
        "40 frames, a dataset per frame": whole_clips,
        "3 frames, a dataset per frame": lambda: FrameTriples(config, river)[next(steps)],
        "3 frames, packed": lambda: FrameTriples(config, packed)[next(steps)],
        "latents, cached": lambda: cached.batch(next(steps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batch", type=int, default=32, help="clips per batch (default 32)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed batches, on a GPU blocks of ten (default 7)"
    )
    parser.add_argument("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    args = parser.parse_args()
    device, config = start().device, configs.build("kth", {"train.batch_size": args.batch})
    line, rows, first = {}, ["| what is read | clips/s | ratio |", "|---|---|---|"], 0.0
    with tempfile.TemporaryDirectory() as folder:
        found = ways(config, Path(folder), device)
        with progress(len(found), "data", "way") as bar:
            for name, read in found.items():
                rate = args.batch / measure.seconds(read, device, args.repeats)
                first = first or rate
                line[name] = {"clips_per_second": rate, "ratio": rate / first}
                rows.append(f"| {name} | {rate:,.0f} | {line[name]['ratio']:.1f} |")
                bar.update()
    text = (
        f"Batches of {args.batch} clips of KTH-like frames of 64 px, one process, files in the system's cache. "
        f"{results.machine()}.\n\n" + "\n".join(rows)
    )
    print(text, f"\ntable          {results.write('Reading batches', text, args.out)}")
    print(json.dumps({"benchmark": "data", "machine": results.machine(), "ways": line}))


if __name__ == "__main__":
    run_command(main)
