"""Generate a stream of any length: a walk through brick mazes, as in an old screensaver.

    python -m prepare.maze --out data/wmaze --frames 1_000_000

The walker follows one wall, turns in smooth arcs, and visits every cell of a maze. The last cell
contains a smiley. There the light fades out; the next maze begins with a fade-in. Stored per frame:
pose (x and y in cells, heading in radians, 0 is east, counter-clockwise), number of the maze,
light. The splits have different mazes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare.build import check_ranges
from prepare.raycast import BALL, BRICK, DX, DY, EYE, GEM, RINGS, SMILEY, SUNSET, Scene, render
from runtime.console import progress, run_command
from runtime.folders import command_line, complete, write_manifest
from shards import ShardWriter

SIZE, FPS, CELLS = 64, 20.0, 10  # pixels; frames per second; cells per side of a maze
SPEED = 0.07  # cells per frame
SPIN = 24  # frames of a turn on the spot, in dead ends
FADE = 8  # frames in which the light fades in or out
BLOCK = 64  # frames rendered at a time, few enough for the CPU cache
LEFT, RIGHT = 1, -1  # the followed wall, as quarter turns of the heading


class Walk(NamedTuple):
    """One maze and the walk through it."""

    scene: Scene
    poses: np.ndarray  # (F, 3) float32: x, y, heading
    light: np.ndarray  # (F,) float32


# --------------------------------------------------------------------------------------------- maze
def carve(n: int, rng: np.random.Generator) -> np.ndarray:
    """Make a maze of n x n cells as a spanning tree, by depth-first search.

    Returns (4, n, n) bool, see Scene.open.
    """
    open, seen = np.zeros((4, n, n), bool), np.zeros((n, n), bool)
    path = [tuple(rng.integers(n, size=2).tolist())]
    seen[path[0]] = True
    # The end of `path` moves to a random unseen neighbour; in a dead end it goes back one cell.
    while path:
        x, y = path[-1]
        ways = []
        for d in range(4):
            east, north = x + DX[d], y + DY[d]
            if 0 <= east < n and 0 <= north < n and not seen[east, north]:
                ways.append(d)
        if not ways:
            path.pop()
            continue
        d = ways[rng.integers(len(ways))]
        path.append((x + DX[d], y + DY[d]))
        open[d][x, y] = open[(d + 2) % 4][path[-1]] = seen[path[-1]] = True
    return open


def follow_wall(
    open: np.ndarray, cell: tuple[int, int], direction: int, hand: int
) -> list[tuple[tuple[int, int], int, int]]:
    """Follow one wall from `cell`, leaving by `direction`, until every cell is visited.

    Returns [(cell, direction of entering, direction of leaving)] without the first cell. The last
    entry is the last new cell.
    """
    unseen, steps = int(open.shape[1] ** 2) - 1, []
    seen = {cell}
    while True:
        cell, entered = (cell[0] + DX[direction], cell[1] + DY[direction]), direction
        # Prefer the turn towards the followed wall, then straight on, the other turn, back.
        direction = next(
            d % 4
            for d in (entered + hand, entered, entered - hand, entered + 2)
            if open[d % 4][cell]
        )
        steps.append((cell, entered, direction))
        unseen -= cell not in seen
        seen.add(cell)
        if not unseen:
            return steps


def decorate(open: np.ndarray, goal: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Add a picture to 1/12 of the walls, a ball or gem to 1/12 of the cells, and the smiley."""
    n = open.shape[1]
    pictures = np.where(
        rng.random(open.shape) < 1 / 12, rng.choice([SUNSET, RINGS], open.shape), BRICK
    ).astype(np.uint8)
    sprites = [(goal[0] + 0.5, goal[1] + 0.5, EYE, 0.7, SMILEY)]
    for cell in rng.choice(n * n, n * n // 12, replace=False):
        if (place := divmod(int(cell), n)) != goal:
            # In a corner of the cell, at a distance of at least 0.2 from the walker's path.
            x, y = np.array(place) + 0.5 + 0.3 * rng.choice([-1, 1], 2)
            kind, size = ((BALL, 0.26), (GEM, 0.36))[rng.integers(2)]
            sprites.append((x, y, size / 2 + 0.1 * (kind == GEM), size, kind))
    return Scene(open, pictures, np.array(sprites, np.float32))


# --------------------------------------------------------------------------------------------- walk
def divide_walk(start: tuple[int, int], steps: list) -> np.ndarray:
    """Divide a walk, from the centre of `start` to the edge of the last cell, into pieces (P, 6).

    Columns: x, y, direction in quarter turns, length of the straight line, quarter turns to the
    left, frames. The walker crosses a cell in a straight line or a quarter circle between the
    midpoints of two edges. In a dead end the walker goes to the centre, turns by 180 degrees, and
    goes back.
    """
    half, arc = 0.5 / SPEED, np.pi / 4 / SPEED
    # The first piece leads from the centre of the start cell to its edge.
    rows = [(start[0] + 0.5, start[1] + 0.5, steps[0][1], 0.5, 0, half)]
    for (x, y), entered, leaving in steps[:-1]:
        edge = (x + 0.5 - DX[entered] / 2, y + 0.5 - DY[entered] / 2)
        turn = (leaving - entered + 1) % 4 - 1  # -1 right, 0 straight, 1 left, 2 back
        if turn == 2:
            rows += [
                (*edge, entered, 0.5, 0, half),
                (x + 0.5, y + 0.5, entered, 0, 2, SPIN),
                (x + 0.5, y + 0.5, leaving, 0.5, 0, half),
            ]
        else:
            rows.append((*edge, entered, 1 - abs(turn), turn, arc if turn else 2 * half))
    return np.array(rows)


def poses_along(rows: np.ndarray) -> np.ndarray:
    """Return the pose of each frame, (F, 3) float32; headings are not wrapped at full turns."""
    ends = np.cumsum(rows[:, 5])
    frame = np.arange(int(ends[-1]))
    k = np.searchsorted(ends, frame, side="right")
    x, y, direction, length, turn, frames = rows[k].T
    # Progress within the piece, in [0, 1); a turn on the spot starts and ends slowly.
    u = (frame - ends[k] + frames) / frames
    spin = abs(turn) == 2
    u = np.where(spin, (1 - np.cos(np.pi * u)) / 2, u)
    # The heading at the start of each piece, in quarter turns and not wrapped.
    before = np.concatenate([[rows[0, 2]], rows[0, 2] + np.cumsum(rows[:, 4])])[k]
    first, now = before * np.pi / 2, (before + turn * u) * np.pi / 2
    # Signed radius of the turn: 1/2 for a quarter circle to the left, 0 for a straight piece.
    radius = np.where(spin, 0, np.sign(turn) / 2)
    x = x + length * u * np.cos(first) + radius * (np.sin(now) - np.sin(first))
    y = y + length * u * np.sin(first) - radius * (np.cos(now) - np.cos(first))
    return np.stack([x, y, now], -1).astype(np.float32)


def walk(rng: np.random.Generator, cells: int = CELLS) -> Walk:
    """Make a maze and a walk that visits all cells, from a dead end to the last new cell."""
    open = carve(cells, rng)
    # A dead end has one open side.
    ends = np.argwhere(open.sum(0) == 1)
    start = tuple(ends[rng.integers(len(ends))].tolist())
    direction = int(open[:, start[0], start[1]].argmax())
    hand = (LEFT, RIGHT)[rng.integers(2)]
    steps = follow_wall(open, start, direction, hand)
    poses = poses_along(divide_walk(start, steps))
    # Frames to the nearer end of the walk: the light fades in and out.
    to_end = np.minimum(np.arange(len(poses)), np.arange(len(poses))[::-1])
    light = np.minimum((to_end + 1) / FADE, 1).astype(np.float32)
    return Walk(decorate(open, steps[-1][0], rng), poses, light)


# ------------------------------------------------------------------------------------------- stream
def iterate_blocks(
    frames: int, seed: tuple[int, int], cells: int
) -> Iterator[tuple[Scene, np.ndarray, np.ndarray, int]]:
    """Yield `frames` frames of consecutive walks in blocks: (scene, poses, light, maze number).

    Maze k is a function of (*seed, k) only.
    """
    maze = 0
    while frames:
        scene, poses, light = walk(np.random.default_rng([*seed, maze]), cells)
        for start in range(0, min(len(poses), frames), BLOCK):
            part = slice(start, min(start + BLOCK, frames))
            yield scene, poses[part], light[part], maze
        frames -= min(len(poses), frames)
        maze += 1


def write_stream(
    writer: ShardWriter, frames: int, seed: tuple[int, int], cells: int, size: int, name: str
) -> int:
    """Write a stream of `frames` frames; return the number of mazes."""
    maze = 0
    with progress(frames, f"maze {name}", "frame") as bar:
        for scene, poses, light, maze in iterate_blocks(frames, seed, cells):
            (writer.append if writer.videos else writer.add)(
                render(scene, poses, light, size),
                poses=poses,
                light=light,
                maze=np.full(len(poses), maze, np.int32),
            )
            bar.update(len(poses))
    return maze + 1


def source_name() -> str:
    """Return the value of the shards' attribute `source`."""
    return "walk through mazes"


def make(
    out: str | Path,
    frames: dict[str, int],
    size: int = SIZE,
    seed: int = 0,
    cells: int = CELLS,
    command: str = "",
) -> dict[str, dict[str, int]]:
    """Write one stream of `frames[split]` frames per split to out/{split}/, by atomic rename.

    Returns the manifest's entry of each split.
    """
    began, splits = time.monotonic(), {}
    with complete(out) as partial:
        for index, (split, count) in enumerate(frames.items()):
            with ShardWriter(
                partial / split, fps=FPS, source=source_name(), command=command
            ) as writer:
                mazes = write_stream(writer, count, (seed, index), cells, size, split)
            splits[split] = {"frames": count, "mazes": mazes, "seed": [seed, index]}
        # With the seeds, a maze can be generated again and compared.
        write_manifest(
            partial,
            command,
            source=source_name(),
            image_size=size,
            fps=FPS,
            cells=cells,
            splits=splits,
            seconds=round(time.monotonic() - began, 2),
        )
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.maze", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--out", required=True, help="folder to create, e.g. data/wmaze")
    add("--frames", type=int, default=100_000, help="frames of the training stream")
    held_out = "frames of the val stream, and of the test stream"
    add("--held_out", type=int, default=10_000, help=held_out)
    add("--image_size", type=int, default=SIZE, help="frame height and width in pixels")
    add("--cells", type=int, default=CELLS, help="cells per side of a maze")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    check_ranges(
        args,
        frames=(1, 10**9),
        held_out=(1, 10**9),
        image_size=(8, 512),
        cells=(3, 100),
        seed=(0, 2**31),
    )
    began = time.monotonic()
    splits = make(
        args.out,
        {"train": args.frames, "val": args.held_out, "test": args.held_out},
        args.image_size,
        args.seed,
        args.cells,
        command_line("prepare.maze"),
    )
    print(f"{args.out}: {time.monotonic() - began:.1f} s")
    for split, facts in splits.items():
        print(f"  {split:5} {facts['frames']:11,} frames in {facts['mazes']:,} mazes")


if __name__ == "__main__":
    run_command(main)
