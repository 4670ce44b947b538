"""A walk through brick mazes, as in an old screensaver: a stream of any length, made rather than fetched.

    python -m prepare.maze --out data/wmaze --frames 1_000_000

The walker keeps a hand on one wall, turns in smooth arcs, and so sees every cell of a maze; before the smiley that stands
in the last one, the lights go out, and on again in the next maze. Poses are stored: x and y in cells, heading in radians
(0 is east, counter-clockwise), number of the maze, light. Each split has mazes of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare.raycast import BALL, BRICK, DX, DY, EYE, GEM, RINGS, SMILEY, SUNSET, Scene, render
from runtime.console import progress, run_command
from runtime.folders import check_range, command_line, complete, write_manifest
from shards import ShardWriter

SIZE, FPS, CELLS = 64, 20.0, 10  # pixels; frames per second; of a maze, each way
SPEED = 0.07  # cells per frame
SPIN = 24  # frames of a turn on the spot, in dead ends
FADE = 8  # frames in which the lights go on, or out
BLOCK = 64  # frames drawn at a time: small enough for a processor's cache
LEFT, RIGHT = 1, -1  # hands, as turns of the heading


class Walk(NamedTuple):
    """One maze and the way through it, frame by frame."""

    scene: Scene
    poses: np.ndarray  # (F, 3) float32: x, y, heading
    light: np.ndarray  # (F,) float32


# --------------------------------------------------------------------------------------------- maze
def carve(n: int, rng: np.random.Generator) -> np.ndarray:
    """A maze of n x n cells with exactly one way between any two, by depth-first search: (4, n, n) bool, see Scene.open."""
    open, seen = np.zeros((4, n, n), bool), np.zeros((n, n), bool)
    path = [tuple(rng.integers(n, size=2).tolist())]
    seen[path[0]] = True
    while path:
        x, y = path[-1]
        ways = [
            d
            for d in range(4)
            if 0 <= x + DX[d] < n and 0 <= y + DY[d] < n and not seen[x + DX[d], y + DY[d]]
        ]
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
    """From a cell, leaving it by `direction`, with one hand on the wall, until every cell has been entered: [(cell, direction
    of entering, of leaving)], without the first cell; the last entry is that of the last new cell."""
    left, steps = int(open.shape[1] ** 2) - 1, []
    seen = {cell}
    while True:
        cell, entered = (cell[0] + DX[direction], cell[1] + DY[direction]), direction
        direction = next(
            d % 4
            for d in (entered + hand, entered, entered - hand, entered + 2)
            if open[d % 4][cell]
        )
        steps.append((cell, entered, direction))
        left -= cell not in seen
        seen.add(cell)
        if not left:
            return steps


def decorate(open: np.ndarray, goal: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Pictures on one wall in twelve, a ball or a gem in the corner of one cell in twelve, and the smiley in the goal."""
    n = open.shape[1]
    pictures = np.where(
        rng.random(open.shape) < 1 / 12, rng.choice([SUNSET, RINGS], open.shape), BRICK
    ).astype(np.uint8)
    sprites = [(goal[0] + 0.5, goal[1] + 0.5, EYE, 0.7, SMILEY)]
    for cell in rng.choice(n * n, n * n // 12, replace=False):
        if (place := divmod(int(cell), n)) != goal:
            x, y = (
                np.array(place) + 0.5 + 0.3 * rng.choice([-1, 1], 2)
            )  # off the walker's way, which keeps 0.2 from it
            kind, size = ((BALL, 0.26), (GEM, 0.36))[rng.integers(2)]
            sprites.append((x, y, size / 2 + 0.1 * (kind == GEM), size, kind))
    return Scene(open, pictures, np.array(sprites, np.float32))


# --------------------------------------------------------------------------------------------- walk
def pieces(start: tuple[int, int], steps: list) -> np.ndarray:
    """A walk from the centre of `start` to the edge of the last cell, in pieces (P, 6): x, y, direction in quarter turns,
    length of a straight part, quarter turns to the left, frames. A cell is crossed in a straight line or a quarter circle
    between the middles of its edges; in a dead end the walker goes to the centre, turns about, and goes back."""
    half, arc = 0.5 / SPEED, np.pi / 4 / SPEED
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
    """(F, 3) float32: where the walker is in each frame; headings go on counting past full turns."""
    ends = np.cumsum(rows[:, 5])
    frame = np.arange(int(ends[-1]))
    k = np.searchsorted(ends, frame, side="right")
    x, y, direction, length, turn, frames = rows[k].T
    u = (frame - ends[k] + frames) / frames
    spin = abs(turn) == 2
    u = np.where(spin, (1 - np.cos(np.pi * u)) / 2, u)
    before = np.concatenate([[rows[0, 2]], rows[0, 2] + np.cumsum(rows[:, 4])])[
        k
    ]  # quarter turns, counting on
    first, now = before * np.pi / 2, (before + turn * u) * np.pi / 2
    radius = np.where(spin, 0, np.sign(turn) / 2)
    x = x + length * u * np.cos(first) + radius * (np.sin(now) - np.sin(first))
    y = y + length * u * np.sin(first) - radius * (np.cos(now) - np.cos(first))
    return np.stack([x, y, now], -1).astype(np.float32)


def walk(rng: np.random.Generator, cells: int = CELLS) -> Walk:
    """A maze and the walk that sees all of it, from a dead end to the cell it comes to last."""
    open = carve(cells, rng)
    ends = np.argwhere(open.sum(0) == 1)
    start = tuple(ends[rng.integers(len(ends))].tolist())
    steps = follow_wall(
        open, start, int(open[:, start[0], start[1]].argmax()), (LEFT, RIGHT)[rng.integers(2)]
    )
    poses = poses_along(pieces(start, steps))
    to_end = np.minimum(np.arange(len(poses)), np.arange(len(poses))[::-1])
    light = np.minimum((to_end + 1) / FADE, 1).astype(np.float32)
    return Walk(decorate(open, steps[-1][0], rng), poses, light)


# ------------------------------------------------------------------------------------------- stream
def blocks(
    frames: int, seed: tuple[int, int], cells: int
) -> Iterator[tuple[Scene, np.ndarray, np.ndarray, int]]:
    """`frames` frames of walk upon walk, few at a time: (scene, poses, light, number of the maze). The k-th maze follows from
    (*seed, k) alone."""
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
    """-> how many mazes it takes."""
    maze = 0
    with progress(frames, f"maze {name}", "frame") as bar:
        for scene, poses, light, maze in blocks(frames, seed, cells):
            (writer.append if writer.videos else writer.add)(
                render(scene, poses, light, size),
                poses=poses,
                light=light,
                maze=np.full(len(poses), maze, np.int32),
            )
            bar.update(len(poses))
    return maze + 1


def source_name() -> str:
    """What the shards' attribute `source` says."""
    return "walk through mazes"


def make(
    out: str | Path,
    frames: dict[str, int],
    size: int = SIZE,
    seed: int = 0,
    cells: int = CELLS,
    command: str = "",
) -> dict[str, dict[str, int]]:
    """One stream per split, `frames[split]` long, in out/{split}/; the folder appears when all are complete. -> what the
    manifest says of the splits."""
    began, splits = time.monotonic(), {}
    with complete(out) as partial:
        for index, (split, count) in enumerate(frames.items()):
            with ShardWriter(
                partial / split, fps=FPS, source=source_name(), command=command
            ) as writer:
                mazes = write_stream(writer, count, (seed, index), cells, size, split)
            splits[split] = {"frames": count, "mazes": mazes, "seed": [seed, index]}
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
    add("--out", required=True, help="folder to make, e.g. data/wmaze")
    add("--frames", type=int, default=100_000, help="length of the training stream")
    add("--held_out", type=int, default=10_000, help="length of the val and of the test stream")
    add("--image_size", type=int, default=SIZE, help="pixels, both sides")
    add("--cells", type=int, default=CELLS, help="of a maze, each way")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, low, high in (
        ("frames", 1, 10**9),
        ("held_out", 1, 10**9),
        ("image_size", 8, 512),
        ("cells", 3, 100),
        ("seed", 0, 2**31),
    ):
        check_range(name, getattr(args, name), low, high)
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
