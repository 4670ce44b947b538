"""The best forecast of bouncing balls that is possible from the given frames: simulate the true
rules from a state that is read off these frames.

The positions of the last given frame are known up to the error with which they can be read off
frames that the autoencoder has reconstructed, and the velocities up to that error of the first and
of the last given frame, divided by the time between them. A colour before the current one that the
given frames do not show is drawn from those that the rules allow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from batches.windows import Windows
from evaluation import balls
from prepare.balls import BALLS, BOX, NEXT_COLOR, NONE, World, draw
from shards import Shards


def forecast(
    shards: Shards,
    windows: Windows,
    given: int,
    draws: int,
    autoencode: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """Simulate the futures of clips of a shard folder with `positions`, `velocities`, `colors`.

    windows: clips of given and future frames, without skipped frames. autoencode: frames
    (n, H, W, 3) uint8 through encoder and decoder. -> (V, draws, T, H, W, 3) uint8.
    """
    size = shards.shape[0]
    states = [read_state(shards, v, a, windows.clip) for v, a in zip(windows.video, windows.start)]
    error = reading_error(shards, windows, given, states, autoencode)
    futures = []
    for positions, velocities, colors in states:
        T = len(positions) - given
        frames = []
        for _ in range(draws):
            world = start_world(positions, velocities, colors, given, error, rng)
            # The first simulated frame is the last given one.
            x, _, drawn = world.simulate(T + 1)
            frames.append(draw(x[1:], drawn[1:], np.zeros(T, np.float32), size))
        # All draws of a clip in one call, which is much faster.
        decoded = autoencode(np.concatenate(frames))
        futures.append(decoded.reshape(draws, T, *decoded.shape[1:]))
    return np.stack(futures)


def read_state(shards: Shards, video: int, start: int, clip: int) -> tuple[np.ndarray, ...]:
    """True positions, velocities (clip, balls, 2) and colours (clip, balls) of a clip."""
    rows = shards.starts[video] + start + np.arange(clip)
    k = int(np.searchsorted(shards.file_starts, rows[0], side="right")) - 1
    rows = rows - shards.file_starts[k]
    extra = shards.files[k].file["extra"]
    names = ("positions", "velocities", "colors")
    return tuple(extra[name][rows[0] : rows[-1] + 1] for name in names)


def reading_error(
    shards: Shards,
    windows: Windows,
    given: int,
    states: list[tuple[np.ndarray, ...]],
    autoencode: Callable[[np.ndarray], np.ndarray],
) -> float:
    """Standard deviation, in box units, of positions that are read off reconstructed frames."""
    size = shards.shape[0]
    errors = []
    for (positions, _, _), v, a in zip(states, windows.video, windows.start):
        frames = autoencode(shards.read(v, a + np.arange(given)))
        true = positions[:given] * (size / BOX)
        found, _ = balls.follow(*balls.find(frames[None]), true[None, 0])
        errors.append(found[0] - true)
    errors = np.concatenate(errors)
    # The median: two balls that touch cannot be told apart well.
    return float(np.median(np.abs(errors)) / 0.6745 * (BOX / size))


def start_world(
    positions: np.ndarray,
    velocities: np.ndarray,
    colors: np.ndarray,
    given: int,
    error: float,
    rng: np.random.Generator,
) -> World:
    """A world in the state of the last given frame, with errors of reading."""
    last = given - 1
    world = World(rng)
    noise = rng.normal(0, error, (2, BALLS, 2))
    world.x = (positions[last] + noise[0]).tolist()
    # Error of the difference of two positions that are `last` frames apart.
    world.v = (velocities[last] + (noise[0] - noise[1]) / last).tolist()
    world.colors = colors[last].tolist()
    world.previous = [previous_color(colors[:given, k], rng) for k in range(BALLS)]
    return world


def previous_color(colors: np.ndarray, rng: np.random.Generator) -> int:
    """The colour before the last of `colors` (given,), or a random one that the rules allow."""
    allowed = [before for before, now in NEXT_COLOR if now == colors[-1] and before != NONE]
    others = colors[colors != colors[-1]]
    # Two bounces within a frame hide the colour between them.
    if len(others) and others[-1] in allowed:
        return int(others[-1])
    return int(rng.choice(allowed))
