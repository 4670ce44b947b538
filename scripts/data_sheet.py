"""A contact sheet of prepared data: clips from all along a split, one below the other, time to the right.

python scripts/data_sheet.py --data data/wmaze/train --out wmaze.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.console import UserError, run_command

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# noqa: E402
from shards import Shards  # noqa: E402


def clips(shards: Shards, rows: int, columns: int, every: int) -> np.ndarray:
    """Every `every`-th frame of `rows` clips, spaced evenly over all that are long enough: (rows, columns, H, W, 3)."""
    need = (columns - 1) * every + 1
    starts = np.maximum(shards.lengths - need + 1, 0)
    if not starts.sum():
        raise UserError(f"{shards.dir}: no video of {need} frames; lower --columns or --every")
    flat = np.linspace(0, starts.sum() - 1, rows + 2).round().astype(np.int64)[1:-1]
    videos = np.searchsorted(np.cumsum(starts), flat, side="right")
    first = flat - (np.cumsum(starts) - starts)[videos]
    return np.stack(
        [
            shards.read(video, start + every * np.arange(columns))
            for video, start in zip(videos, first)
        ]
    )


def sheet(pictures: np.ndarray, gap: int = 2) -> np.ndarray:
    """(rows, columns, H, W, 3) -> one picture, white between them."""
    rows, columns, H, W, _ = pictures.shape
    padded = np.pad(pictures, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    return padded.transpose(0, 2, 1, 3, 4).reshape(rows * (H + gap), columns * (W + gap), 3)[
        :-gap, :-gap
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/data_sheet.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a split, e.g. data/wmaze/train")
    add("--out", type=Path, required=True, help="picture to write, .png")
    add("--rows", type=int, default=3, help="clips")
    add("--columns", type=int, default=10, help="frames of each")
    add("--every", type=int, default=2, help="frames from one picture to the next")
    args = parser.parse_args()
    if min(args.rows, args.columns, args.every) < 1:
        raise UserError("--rows, --columns and --every must be at least 1")
    if args.out.suffix != ".png":
        raise UserError(f"--out must end in .png, got {args.out}")
    Image.fromarray(sheet(clips(Shards(args.data), args.rows, args.columns, args.every))).save(
        args.out, optimize=True
    )
    print(
        f"{args.out}: {args.rows} clips, {args.columns} frames each, {args.out.stat().st_size / 1000:.0f} kB"
    )


if __name__ == "__main__":
    run_command(main)
