"""Write one video from the samples in a results folder: selected clips, samples, size and rate.

python scripts/make_video.py --results outputs/results/RUN/MODEL/DATA --out forecasts.mp4 \\
    --videos 0 3 5 --samples 2
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

# Run by path, Python puts scripts/ on sys.path; the imports below need the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import results, videos
from runtime.console import UserError, progress, run_command

# Longest edge in pixels that H.264 encodes.
LARGEST = 16_000


def select_clips(args: argparse.Namespace, truth: np.ndarray, condition: int) -> list[int]:
    """Return the indices of the clips to show; raise UserError if one is out of range.

    `condition` is the number of given frames, by whose motion --liveliest ranks the clips.
    """
    V = len(truth)
    if args.videos is None:
        count = min(6, V) if args.liveliest is None else args.liveliest
        if not 1 <= count <= V:
            raise UserError(f"--liveliest {count}: {args.results} holds {V} clips; take 1 to {V}")
        return videos.rank_by_motion(truth, condition)[:count].tolist()
    if wrong := [v for v in args.videos if not 0 <= v < V]:
        raise UserError(f"--videos {wrong[0]}: {args.results} holds {V} clips; take 0 to {V - 1}")
    return args.videos


def check(args: argparse.Namespace) -> None:
    """Raise UserError if a flag has a value that is wrong for every results folder."""
    if args.out.suffix not in videos.ENDINGS:
        raise UserError(
            f"--out {args.out}: ending {args.out.suffix or 'missing'}; "
            f"use one of {', '.join(videos.ENDINGS)}"
        )
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}; create it first")
    # Without the truth, at least one sample must be shown.
    for flag, least in (("size", 1), ("samples", 1 - args.truth)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} must be at least {least}, got {value}")
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise UserError(f"--fps must be greater than 0, got {args.fps}")


def check_size(clips: int, tracks: int, frame: tuple[int, int], height: int) -> None:
    """Raise UserError if the video is larger than H.264 allows.

    `clips` and `tracks` are the rows and columns of the video, `frame` is the (height, width) of a
    stored frame and `height` the requested height of a frame, all sizes in pixels.
    """
    scale = videos.scale_of(frame[0], height)
    cell_height = frame[0] * scale + 3 * videos.GAP
    cell_width = frame[1] * scale + 3 * videos.GAP
    video_width = tracks * cell_width
    video_height = clips * (cell_height + videos.HEADER)
    if max(video_width, video_height) > LARGEST:
        raise UserError(
            f"a video of {video_width}x{video_height} pixels, at most {LARGEST} are possible; "
            "lower --size or choose fewer clips"
        )


def make(args: argparse.Namespace) -> str:
    """Write the video; return a line that describes its content."""
    check(args)
    args.out = args.out.with_suffix(f".{videos.usable_format(args.out.suffix[1:])}")
    truth, samples, colours = results.read_pictures(args.results)
    if args.samples is not None and args.samples > samples.shape[1]:
        raise UserError(
            f"--samples {args.samples}: {args.results} holds {samples.shape[1]} of each clip; "
            "lower --samples"
        )
    count = min(4, samples.shape[1]) if args.samples is None else args.samples
    clips = select_clips(args, truth, truth.shape[1] - samples.shape[2])
    check_size(len(clips), args.truth + count, truth.shape[2:4], args.size)

    # metrics.json states the frame rate, but the arrays alone are enough.
    protocol = {}
    if (args.results / "metrics.json").is_file():
        protocol = results.read_metrics(args.results)["protocol"]
    fps = args.fps or results.frame_rate_of(protocol, clips[0])

    rows = []
    with progress(len(clips), "draw", "clip") as bar:
        for v in clips:
            row = videos.side_by_side(truth[v], samples[v, :count], args.size, bool(args.truth))
            rows.append(row)
            bar.update()

    # A path that is not writable is a one-line error here; the encoder would print its own.
    args.out.touch()
    videos.write_video(args.out, videos.add_bars(np.concatenate(rows, 1), colours), fps)
    shown = f"truth and {count} samples" if args.truth else f"{count} samples"
    return f"clips {', '.join(map(str, clips))}: {shown}, {fps:g} frames a second"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python scripts/make_video.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--results", type=Path, required=True, metavar="DIR", help="a folder that sample.py wrote")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="video to write: .mp4, .avi (Motion JPEG) or .gif",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--videos",
        type=int,
        nargs="+",
        metavar="V",
        help="indices of the clips to show, counted from 0, in this order",
    )
    which.add_argument(
        "--liveliest",
        type=int,
        metavar="N",
        help="show the N clips with most motion in their given frames (default 6, or all)",
    )
    add("--samples", type=int, metavar="K", help="first K samples per clip (default 4, or all)")
    add("--truth", type=int, choices=(0, 1), default=1, help="1: truth at the left (default)")
    add(
        "--fps",
        type=float,
        metavar="F",
        help="frames per second (default: the rate in the results, or 10)",
    )
    add(
        "--size",
        type=int,
        default=128,
        metavar="PIXELS",
        help="frame height, rounded to an integer multiple of the stored height (default 128)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    print(f"{make(args)}\nvideo          {args.out}")


if __name__ == "__main__":
    run_command(main)
