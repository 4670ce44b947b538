"""Arithmetic on the timestamps of frames: frame rate, holes, joints, resampling. No decoding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

# After damage, a step over this many median steps is a hole, because a frame is known to be lost.
DAMAGED_GAP = 1.5
# For this many frames after damage; decoders return frames with a delay.
DELAY = 64
UNEVEN = 0.3  # relative difference from the median at which the rate counts as variable


@dataclass
class Steps:
    """Steps between the timestamps of neighbouring frames, in seconds."""

    median: float
    regular: float  # mean of the steps near the median: without the rounding of timestamps


def measure_steps(decoding: np.ndarray, shown: np.ndarray, tick: float) -> Steps | None:
    """Measure the steps between frames; None for fewer than two different timestamps.

    decoding: (frames,) timestamps in the order of the file, which only grow, except where joined
    recordings start over. shown: (frames,) the timestamps at which these frames are shown. tick:
    seconds per unit of both.
    """
    joints = np.flatnonzero(np.diff(decoding) < 0) + 1
    parts = [np.diff(np.sort(part)) for part in np.split(shown, joints)]
    steps = np.concatenate(parts) if parts else np.zeros(0)
    steps = steps[steps > 0]
    if not len(steps):
        return None
    median = float(np.median(steps))
    # Rounding moves a timestamp by up to one unit, except where one unit is the whole step.
    near = steps[np.abs(steps - median) <= max(0.1 * median, min(1, median / 2))]
    # No step is near the median of an even number of steps that are far apart.
    regular = float(near.mean()) if len(near) else median
    return Steps(median * tick, regular * tick)


def longest_step(median: float, max_gap: float, tick: float) -> float:
    """Return the longest step that is no hole. tick: the unit to which timestamps are rounded."""
    # A median of one unit is exact, one of many units is wrong by up to one.
    rounding = min(tick, max(0.0, (median - tick) / 2))
    return max_gap * median * (1 + 1e-6) + rounding


class Clock:
    """Divides the frames of a film, in order of presentation, into parts without holes.

    step: median seconds between frames. max_gap: a step over this
    many medians is a hole. tick: resolution of the timestamps in seconds.

    part: number of the current part, from 1. holes, longest: the number of holes and the length of
    the longest in seconds. joints: how often the timestamps went back. uneven: the steps within the
    parts, in seconds, that differ from the median: (shortest, longest), or None.
    """

    def __init__(self, step: float, max_gap: float, tick: float):
        self.step = step
        self.max_gap = max_gap
        self.tick = tick
        self.part = 1
        self.holes = 0
        self.longest = 0.0
        self.joints = 0
        self.uneven: tuple[float, float] | None = None
        self.seconds: float | None = None
        self.careful = 0

    def suspect(self) -> None:
        """Take note that a frame was lost near the current one."""
        self.careful = DELAY

    def show(self, seconds: float | None) -> tuple[int, float]:
        """Return the part and the time of the next frame. seconds: None if it has no timestamp."""
        if seconds is None:
            seconds = 0.0 if self.seconds is None else self.seconds + self.step
        gap = 0.0 if self.seconds is None else seconds - self.seconds
        max_gap = min(self.max_gap, DAMAGED_GAP) if self.careful else self.max_gap
        if gap < 0:
            self.joints += 1
            self.part += 1
        elif gap > longest_step(self.step, max_gap, self.tick):
            self.holes += 1
            self.longest = max(self.longest, gap)
            self.part += 1
        elif self.seconds is not None:
            self._note_uneven(gap)
        self.careful = max(0, self.careful - 1)
        self.seconds = seconds
        return self.part, seconds

    def _note_uneven(self, gap: float) -> None:
        """Keep the range of the steps, if one differs from the median by more than rounding."""
        low, high = self.uneven or (self.step, self.step)
        if abs(gap - self.step) > max(UNEVEN * self.step, min(1.5 * self.tick, self.step / 2)):
            self.uneven = min(low, gap), max(high, gap)


def at_ticks(
    frames: Iterable[tuple[float, object]], fps: float, step: float = math.inf
) -> Iterator:
    """Yield, for each tick 0, 1/fps, 2/fps, ..., the nearest item of (seconds, item).

    Ticks count from the first frame. An item is yielded repeatedly if it is the nearest to several
    ticks, and not at all if it is the nearest to none. A frame is nearest to the ticks from halfway
    to its predecessor up to halfway to its successor; the last one up to half a `step` after it.
    """
    start, held, half, tick = 0.0, None, 0.5 / fps, 0
    for seconds, item in frames:
        if held is None:
            start = seconds
        else:
            half = (seconds - held[0]) / 2
            after = math.ceil((held[0] + half - start) * fps - 1e-6)
            for _ in range(tick, after):
                yield held[1]
            tick = max(tick, after)
        held = seconds, item
    if held is not None:
        after = math.ceil((held[0] + min(half, step / 2) - start) * fps - 1e-6)
        for _ in range(tick, after):
            yield held[1]
