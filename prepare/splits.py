"""Split sources into train, val and test, by source or by time; splits never overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np


def divide(count: int, fractions: Iterable[float]) -> list[int]:
    """Divide `count` items: return sizes near count * fractions, with the sum `count`.

    A positive fraction gets at least 1 item if count is large enough.
    """
    exact = np.array(list(fractions)) * count
    sizes = np.floor(exact + 1e-9).astype(int)
    # Largest remainder method: the splits that lost most by rounding down get one more item.
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1
    # Move one item from the largest split to each positive fraction without items.
    if count >= (exact > 0).sum():
        for k in np.flatnonzero((exact > 0) & (sizes == 0)):
            sizes[sizes.argmax()] -= 1
            sizes[k] = 1
    return sizes.tolist()


def digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the concatenated contents of files."""
    sha256 = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                sha256.update(piece)
    return sha256.hexdigest()


def group_by_digest(sources: Iterable) -> list[list]:
    """Group sources by `sha256`; groups are in the order of their first members."""
    groups: dict[str, list] = {}
    for source in sources:
        groups.setdefault(source.sha256, []).append(source)
    return list(groups.values())


def split_sources(
    count: int, fractions: dict[str, float], seed: int, digests: Sequence[str] | None = None
) -> list[str]:
    """Return the split of each of `count` sources, by a seeded shuffle.

    digests: one digest of the content per source; sources of equal content get the same split.
    """
    keys = range(count) if digests is None else digests
    unique = list(dict.fromkeys(keys))
    names = np.repeat(list(fractions), divide(len(unique), fractions.values()))
    chosen = dict(zip(unique, np.random.default_rng(seed).permutation(names).tolist()))
    return [chosen[key] for key in keys]


def time_cuts(frames: int, fractions: dict[str, float]) -> dict[str, tuple[int, int]]:
    """Return the half-open range of frames of each split; the ranges partition [0, frames)."""
    stops = np.cumsum([0, *divide(frames, fractions.values())]).tolist()
    return dict(zip(fractions, pairwise(stops)))


def split_at(index: int, cuts: dict[str, tuple[int, int]]) -> str:
    """Return the split of a frame; a frame after the last range belongs to the last split."""
    for split, (start, stop) in cuts.items():
        if start <= index < stop:
            return split
    return list(cuts)[-1]
