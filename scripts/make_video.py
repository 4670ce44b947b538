"""One video from the samples in a results folder: the clips, samples, size and speed of your choice.

python scripts/make_video.py --results outputs/results/RUN/MODEL/DATA --out forecasts.mp4 --videos 0 3 5 --samples 2
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from report import results, videos
from runtime.console import UserError, progress, run_command

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a file, it finds its neighbours too

# noqa: E402
# noqa: E402
# noqa: E402

LARGEST = 16_000  # pixels of an edge; H.264 ends there


def chosen(args: argparse.Namespace, truth: np.ndarray, condition: int) -> list[int]:
    """The clips asked for, checked against those there are."""
    V = len(truth)
    if args.videos is None:
        count = min(6, V) if args.liveliest is None else args.liveliest
        if not 1 <= count <= V:
            raise UserError(f"--liveliest {count}: {args.results} holds {V} clips; take 1 to {V}")
        return videos.liveliest(truth, condition)[:count].tolist()
    if wrong := [v for v in args.videos if not 0 <= v < V]:
        raise UserError(f"--videos {wrong[0]}: {args.results} holds {V} clips; take 0 to {V - 1}")
    return args.videos


def check(args: argparse.Namespace) -> None:
    if args.out.suffix not in videos.ENDINGS:
        raise UserError(
            f"--out {args.out}: ending {args.out.suffix or 'missing'}; take one of {', '.join(videos.ENDINGS)}"
        )
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}; make it")
    for flag, least in (("size", 1), ("samples", 1 - args.truth)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise UserError(f"--{flag} must be at least {least}, got {value}")
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise UserError(f"--fps must be greater than 0, got {args.fps}")


def check_size(clips: int, tracks: int, frame: tuple[int, int], wanted: int) -> None:
    H, W = (edge * videos.scale_of(frame[0], wanted) + 3 * videos.GAP for edge in frame)
    width, height = tracks * W, clips * (H + videos.HEADER)
    if max(width, height) > LARGEST:
        raise UserError(
            f"a video of {width}x{height} pixels, and {LARGEST} is the most; lower --size or take fewer clips"
        )


def make(args: argparse.Namespace) -> str:
    """Write the video; -> what it shows, in words."""
    check(args)
    args.out = args.out.with_suffix(f".{videos.usable_format(args.out.suffix[1:])}")
    truth, samples = results.read_arrays(args.results)
    if args.samples is not None and args.samples > samples.shape[1]:
        raise UserError(
            f"--samples {args.samples}: {args.results} holds {samples.shape[1]} of each clip; take no more"
        )
    count = min(4, samples.shape[1]) if args.samples is None else args.samples
    clips = chosen(args, truth, truth.shape[1] - samples.shape[2])
    check_size(len(clips), args.truth + count, truth.shape[2:4], args.size)
    protocol = (
        results.read_metrics(args.results)["protocol"]
        if (args.results / "metrics.json").is_file()
        else {}
    )
    fps, rows = args.fps or results.frame_rate_of(protocol), []
    with progress(len(clips), "draw", "clip") as bar:
        for v in clips:
            rows.append(
                videos.side_by_side(truth[v], samples[v, :count], args.size, bool(args.truth))
            )
            bar.update()
    args.out.touch()  # a name that cannot be written is told here, in one line
    videos.write_video(args.out, np.concatenate(rows, 1), fps)
    return f"clips {', '.join(map(str, clips))}: {'truth and ' * args.truth}{count} samples, {fps:g} frames a second"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/make_video.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--results", type=Path, required=True, metavar="DIR", help="a folder that sample.py wrote"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="ends in .mp4, .avi (Motion JPEG) or .gif",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--videos",
        type=int,
        nargs="+",
        metavar="V",
        help="these clips, in this order, counted from 0",
    )
    which.add_argument(
        "--liveliest",
        type=int,
        metavar="N",
        help="or the N clips that move most in their given frames (default 6, or all)",
    )
    parser.add_argument(
        "--samples", type=int, metavar="K", help="the first K samples of each (default 4, or all)"
    )
    parser.add_argument(
        "--truth",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: the truth at the left (default); 0: not",
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames a second (default: what the results say, or 10)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        metavar="PIXELS",
        help="height of a frame, rounded to a whole multiple of its own (default 128)",
    )
    args = parser.parse_args()
    print(f"{make(args)}\nvideo          {args.out}")


if __name__ == "__main__":
    run_command(main)
