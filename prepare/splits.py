"""Which part of the sources is train, val and test: by source or by time, never by overlapping clips."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np


def shares(count: int, fractions: Iterable[float]) -> list[int]:
    """Sizes near count * fractions, summing to count; at least 1 for each fraction > 0 if count allows it."""
    exact = np.array(list(fractions)) * count
    sizes = np.floor(exact + 1e-9).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1
    for k in np.flatnonzero((exact > 0) & (sizes == 0)) if count >= (exact > 0).sum() else ():
        sizes[sizes.argmax()] -= 1
        sizes[k] = 1
    return sizes.tolist()


def split_sources(count: int, fractions: dict[str, float], seed: int) -> list[str]:
    """The split of each of `count` sources, chosen by a seeded shuffle."""
    names = np.repeat(list(fractions), shares(count, fractions.values()))
    return np.random.default_rng(seed).permutation(names).tolist()


def time_cuts(frames: int, fractions: dict[str, float]) -> dict[str, tuple[int, int]]:
    """First frame and one past the last of each split, in order, covering 0..frames without overlap."""
    stops = np.cumsum([0, *shares(frames, fractions.values())]).tolist()
    return dict(zip(fractions, pairwise(stops)))


def split_at(index: int, cuts: dict[str, tuple[int, int]]) -> str:
    """The split of a frame; a frame past the count belongs to the last split."""
    return next(
        (split for split, (start, stop) in cuts.items() if start <= index < stop), list(cuts)[-1]
    )
