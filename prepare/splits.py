"""Split sources into train, val and test, by source or by time; splits never overlap."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np


def shares(count: int, fractions: Iterable[float]) -> list[int]:
    """Return sizes near count * fractions whose sum is count.

    A positive fraction gets at least 1 if count is large enough.
    """
    exact = np.array(list(fractions)) * count
    sizes = np.floor(exact + 1e-9).astype(int)
    # Largest remainders: the splits that lost most by rounding down get one more.
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1
    # Move one item from the largest split to each positive fraction without items.
    for k in np.flatnonzero((exact > 0) & (sizes == 0)) if count >= (exact > 0).sum() else ():
        sizes[sizes.argmax()] -= 1
        sizes[k] = 1
    return sizes.tolist()


def split_sources(count: int, fractions: dict[str, float], seed: int) -> list[str]:
    """Return the split of each of `count` sources, by a seeded shuffle."""
    names = np.repeat(list(fractions), shares(count, fractions.values()))
    return np.random.default_rng(seed).permutation(names).tolist()


def time_cuts(frames: int, fractions: dict[str, float]) -> dict[str, tuple[int, int]]:
    """Return the half-open range of frames of each split; the ranges partition [0, frames)."""
    stops = np.cumsum([0, *shares(frames, fractions.values())]).tolist()
    return dict(zip(fractions, pairwise(stops)))


def split_at(index: int, cuts: dict[str, tuple[int, int]]) -> str:
    """Return the split of a frame; a frame after the last range belongs to the last split."""
    for split, (start, stop) in cuts.items():
        if start <= index < stop:
            return split
    return list(cuts)[-1]
