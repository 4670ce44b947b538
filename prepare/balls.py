"""Generate streams of bouncing balls for lifelong video learning (arXiv 2406.04814).

    python -m prepare.balls --out data/ball_stn
    python -m prepare.balls --out data/ball_nstn --color_shift

Two balls of radius 1.2 and equal mass move in a 10 x 10 box, with elastic collisions and two
half-steps per frame. At every collision a ball changes its colour by a second-order rule: the new
colour depends on the two before, so a forecast needs more than one frame of memory. The physics is
that of Sutskever, Hinton and Taylor (2008). Positions, velocities and colours are stored.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from runtime.console import UserError, progress, run_command
from runtime.folders import command_line, complete
from shards import ShardWriter

BOX, RADIUS, BALLS, SIZE, FPS = 10.0, 1.2, 2, 32, 10.0
SPEED = 0.5  # norm of both velocities together, in box units per frame; conserved by collisions
NONE, RED, YELLOW, GREEN = -1, 0, 1, 2
NAMES = ("red", "yellow", "green")
RGB = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
# (previous colour, current colour) -> next colour.
NEXT_COLOR = {
    (GREEN, RED): YELLOW,
    (YELLOW, RED): GREEN,
    (RED, GREEN): RED,
    (RED, YELLOW): RED,
    (NONE, RED): YELLOW,
    (NONE, GREEN): RED,
    (NONE, YELLOW): RED,
}
CHUNK = 10_000  # frames per simulation, drawing and write


class World:
    """State of the two balls, as Python floats: arrays are slower for so few values."""

    def __init__(self, rng: np.random.Generator):
        while True:
            self.x = rng.uniform(RADIUS, BOX - RADIUS, (BALLS, 2)).tolist()
            if math.dist(*self.x) > 2 * RADIUS:
                break
        velocity = rng.standard_normal((BALLS, 2))
        self.v = (velocity / np.linalg.norm(velocity) * SPEED).tolist()
        self.colors = rng.integers(len(RGB), size=BALLS).tolist()
        self.previous = [NONE] * BALLS

    def change_color(self, ball: int) -> None:
        """Apply the second-order colour rule to a ball that collided."""
        after = NEXT_COLOR[self.previous[ball], self.colors[ball]]
        self.previous[ball], self.colors[ball] = self.colors[ball], after

    def half_step(self) -> None:
        """Move the balls for half a frame; reflect them at the walls and at each other."""
        (a, b), (va, vb) = self.x, self.v
        for ball, (x, v) in enumerate(((a, va), (b, vb))):
            hit = False
            for axis in (0, 1):
                x[axis] += 0.5 * v[axis]
                # A ball that overlaps the wall but moves inwards has already bounced.
                if (x[axis] < RADIUS and v[axis] < 0) or (x[axis] > BOX - RADIUS and v[axis] > 0):
                    v[axis], hit = -v[axis], True
            if hit:
                self.change_color(ball)
        dx, dy = b[0] - a[0], b[1] - a[1]
        # Negative while the balls approach: two overlapping balls that part have collided already.
        approach = (vb[0] - va[0]) * dx + (vb[1] - va[1]) * dy
        square = dx * dx + dy * dy
        if square < 4 * RADIUS * RADIUS and approach < 0:
            # Equal masses: the balls exchange the velocity components along the line of centres.
            px, py = approach / square * dx, approach / square * dy
            va[0], va[1], vb[0], vb[1] = va[0] + px, va[1] + py, vb[0] - px, vb[1] - py
            self.change_color(0)
            self.change_color(1)

    def simulate(self, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return positions, velocities and colours of the next frames.

        positions, velocities: (frames, 2, 2) float32, (x, y) in box units. colours: (frames, 2)
        int8, index into RGB.
        """
        rows = []
        for _ in range(frames):
            (a, b), (va, vb) = self.x, self.v
            rows.append((*a, *b, *va, *vb, *self.colors))
            self.half_step()
            self.half_step()
        table = np.array(rows, np.float32)
        return (
            table[:, 0:4].reshape(-1, BALLS, 2),
            table[:, 4:8].reshape(-1, BALLS, 2),
            table[:, 8:10].astype(np.int8),
        )


def draw(
    positions: np.ndarray, colors: np.ndarray, blue: np.ndarray, size: int = SIZE
) -> np.ndarray:
    """Draw frames (N, size, size, 3) uint8.

    positions: (N, balls, 2); colors: (N, balls); blue: (N,), level in [0, 1]. A pixel is the sum
    over balls of colour * exp(-((dx^2 + dy^2) / r^2)^4), clipped at 1. Rows are y, columns are x.
    """
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (BOX / size)
    square = (grid - positions[..., None]) ** 2  # (N, balls, 2, size)
    d = (square[:, :, 1, :, None] + square[:, :, 0, None, :]) / RADIUS**2  # (N, balls, size, size)
    d *= d
    d *= d
    # d was squared twice: ((dx^2 + dy^2) / r^2)^4. The limit keeps exp(-d) above the subnormal
    # floats, which are slow; exp(-80) is drawn as 0.
    bumps = np.exp(-np.minimum(d, 80.0, out=d), out=d)
    rgb = RGB[colors]
    rgb[..., 2] = blue[:, None]
    frames = np.einsum("nbyx,nbc->nyxc", bumps, rgb, optimize=True)
    return (np.minimum(frames, 1.0, out=frames) * 255 + 0.5).astype(np.uint8)


def write_stream(
    writer: ShardWriter,
    frames: int,
    color_shift: bool,
    size: int,
    rng: np.random.Generator,
    name: str,
) -> None:
    """Simulate, draw and write one stream of `frames` frames, CHUNK frames at a time."""
    world = World(rng)
    with progress(frames, f"balls {name}", "frame") as bar:
        for start in range(0, frames, CHUNK):
            positions, velocities, colors = world.simulate(min(CHUNK, frames - start))
            time = np.arange(start, start + len(colors), dtype=np.float32)
            blue = time / max(frames - 1, 1) if color_shift else np.zeros_like(time)
            (writer.append if writer.videos else writer.add)(
                draw(positions, colors, blue, size),
                positions=positions,
                velocities=velocities,
                colors=colors,
                blue=blue,
            )
            bar.update(len(colors))


def source_name(color_shift: bool) -> str:
    """Return the value of the shards' attribute `source`."""
    return "bouncing balls, turning blue" if color_shift else "bouncing balls"


def make(
    out: str | Path,
    frames: dict[str, int],
    color_shift: bool = False,
    size: int = SIZE,
    seed: int = 0,
    command: str = "",
) -> None:
    """Write one stream of `frames[split]` frames per split to out/{split}/, by atomic rename."""
    source = source_name(color_shift)
    with complete(out) as partial:
        for index, (split, count) in enumerate(frames.items()):
            rng = np.random.default_rng([seed, index])
            with ShardWriter(partial / split, fps=FPS, source=source, command=command) as writer:
                write_stream(writer, count, color_shift, size, rng, split)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.balls", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--out", required=True, help="folder to create, e.g. data/ball_stn")
    frames = "frames of the training stream (published: 1,000,000)"
    add("--frames", type=int, default=100_000, help=frames)
    held_out = "frames of the val stream, and of the test stream"
    add("--held_out", type=int, default=10_000, help=held_out)
    color_shift = "blue rises from 0 to 1 along each stream (ball_nstn)"
    add("--color_shift", action="store_true", help=color_shift)
    size = "frame height and width in pixels (published: 32)"
    add("--image_size", type=int, default=SIZE, help=size)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.frames, args.held_out) < 1 or args.image_size < 8 or args.seed < 0:
        raise UserError("--frames and --held_out must be at least 1, --image_size 8, --seed 0")
    make(
        args.out,
        {"train": args.frames, "val": args.held_out, "test": args.held_out},
        args.color_shift,
        args.image_size,
        args.seed,
        command_line("prepare.balls"),
    )
    print(f"{args.out}: train {args.frames:,}, val and test {args.held_out:,} frames each")


if __name__ == "__main__":
    run_command(main)
