"""Draw a contact sheet of prepared data: evenly spaced clips of a split, one per row.

python scripts/data_sheet.py --data data/wmaze/train --out wmaze.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# Run by path, Python puts scripts/ on sys.path; the imports below need the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.console import UserError, run_command
from shards import Shards


def read_clips(shards: Shards, rows: int, columns: int, every: int) -> np.ndarray:
    """Read `rows` clips of `columns` frames, `every` frames apart: (rows, columns, H, W, 3).

    The clips start at evenly spaced positions over all windows that fit into one video.
    """
    need = (columns - 1) * every + 1
    starts = np.maximum(shards.lengths - need + 1, 0)
    if not starts.sum():
        raise UserError(f"{shards.dir}: no video of {need} frames; lower --columns or --every")
    # Number the possible starts of all videos consecutively, space them evenly, without the ends,
    # and convert the numbers to (video, first frame).
    flat = np.linspace(0, starts.sum() - 1, rows + 2).round().astype(np.int64)[1:-1]
    ends = np.cumsum(starts)
    videos = np.searchsorted(ends, flat, side="right")
    first_frames = flat - (ends - starts)[videos]
    clips = []
    for video, first in zip(videos, first_frames):
        clips.append(shards.read(video, first + every * np.arange(columns)))
    return np.stack(clips)


def draw_sheet(clips: np.ndarray, gap: int = 2) -> np.ndarray:
    """Tile clips (rows, columns, H, W, 3) into one image, with white gaps of `gap` pixels."""
    rows, columns, H, W, _ = clips.shape
    padded = np.pad(clips, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    image = padded.transpose(0, 2, 1, 3, 4).reshape(rows * (H + gap), columns * (W + gap), 3)
    return image[:-gap, :-gap]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/data_sheet.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of a split, e.g. data/wmaze/train")
    add("--out", type=Path, required=True, help="image to write, .png")
    add("--rows", type=int, default=3, help="number of clips (default 3)")
    add("--columns", type=int, default=10, help="frames per clip (default 10)")
    add("--every", type=int, default=2, help="frames between neighbouring images (default 2)")
    args = parser.parse_args()
    if min(args.rows, args.columns, args.every) < 1:
        raise UserError("--rows, --columns and --every must be at least 1")
    if args.out.suffix != ".png":
        raise UserError(f"--out must end in .png, got {args.out}")
    clips = read_clips(Shards(args.data, "frames"), args.rows, args.columns, args.every)
    Image.fromarray(draw_sheet(clips)).save(args.out, optimize=True)
    size = args.out.stat().st_size / 1000
    print(f"{args.out}: {args.rows} clips, {args.columns} frames each, {size:.0f} kB")


if __name__ == "__main__":
    run_command(main)
