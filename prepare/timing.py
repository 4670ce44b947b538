"""Arithmetic on the timestamps of frames: frame rate, holes, joints, resampling. No decoding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

# After damage, a step over this many median steps is a hole, because a frame is known to be lost.
DAMAGED_GAP = 1.5
# DAMAGED_GAP applies to this many frames after damage, because decoders return frames with a delay.
DELAY = 64
UNEVEN = 0.3  # relative difference from the median at which the rate counts as variable


@dataclass
class Steps:
    """Steps between the timestamps of neighbouring frames, in seconds."""

    median: float
    regular: float  # mean of the steps near the median, which averages out rounding


def measure_steps(decoding: np.ndarray, shown: np.ndarray, tick: float) -> Steps | None:
    """Measure the steps between frames; None for fewer than two different timestamps.

    decoding: (frames,) decoding timestamps in the order of the file; they only go back where
    recordings are joined. shown: (frames,) presentation timestamps of the same frames. tick:
    seconds per unit of both.
    """
    joints = np.flatnonzero(np.diff(decoding) < 0) + 1
    parts = [np.diff(np.sort(part)) for part in np.split(shown, joints)]
    steps = np.concatenate(parts) if parts else np.zeros(0)
    steps = steps[steps > 0]
    if not len(steps):
        return None
    median = float(np.median(steps))
    # Steps that differ from the median by rounding only: up to one unit, unless that is a step.
    near = steps[np.abs(steps - median) <= max(0.1 * median, min(1, median / 2))]
    # The median of an even number of steps lies between two steps, and may be near to none.
    regular = float(near.mean()) if len(near) else median
    return Steps(median * tick, regular * tick)


def longest_step(median: float, max_gap: float, tick: float) -> float:
    """Return the longest step that is no hole. tick: the unit to which timestamps are rounded."""
    # A median of one unit is exact. A median of many units has an error of up to one unit.
    rounding = min(tick, max(0.0, (median - tick) / 2))
    return max_gap * median * (1 + 1e-6) + rounding


class Clock:
    """Divides the frames of a film, in order of presentation, into parts without holes.

    step: median seconds between frames. max_gap: a step of more than this many medians is a hole.
    tick: resolution of the timestamps in seconds.

    Attributes: part: number of the current part, from 1. holes: number of holes. longest: length of
    the longest hole in seconds. joints: number of times that the timestamps went back. uneven:
    (shortest, longest) step within the parts in seconds, if a step differs from the median; else
    None.
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
        # Number of next frames for which the stricter DAMAGED_GAP applies.
        self.strict = 0

    def suspect(self) -> None:
        """Record that a frame was lost near the current one."""
        self.strict = DELAY

    def show(self, seconds: float | None) -> tuple[int, float]:
        """Return the part and the time of the next frame. seconds: its timestamp, or None."""
        if seconds is None:
            seconds = 0.0 if self.seconds is None else self.seconds + self.step
        gap = 0.0 if self.seconds is None else seconds - self.seconds
        # Time that goes back is a joint; a step that is too long is a hole. Both begin a new part.
        max_gap = min(self.max_gap, DAMAGED_GAP) if self.strict else self.max_gap
        if gap < 0:
            self.joints += 1
            self.part += 1
        elif gap > longest_step(self.step, max_gap, self.tick):
            self.holes += 1
            self.longest = max(self.longest, gap)
            self.part += 1
        elif self.seconds is not None:
            self._note_uneven(gap)
        self.strict = max(0, self.strict - 1)
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
    """Resample frames: yield, for each tick 0, 1/fps, 2/fps, ..., the nearest item of (seconds,
    item).

    Ticks count from the first frame. An item is yielded several times if it is the nearest to
    several ticks, and not at all if it is the nearest to none. The last item is yielded for ticks
    up to half a `step` after it.
    """
    start, held, half, tick = 0.0, None, 0.5 / fps, 0
    # `held` is nearest to all ticks up to halfway to its successor, which must be known first.
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
