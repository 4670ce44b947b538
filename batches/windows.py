"""Index arithmetic: which frames make the training triples and the evaluation clips."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import Config
from runtime.console import UserError
from runtime.process import numpy_generator
from shards import Shards


class Triples(NamedTuple):
    """Where the three frames of each item lie; all (B,) int64. gap = (reference - context) / stride, >= 1."""

    video: np.ndarray
    target: np.ndarray
    reference: np.ndarray
    context: np.ndarray
    gap: np.ndarray


class Windows(NamedTuple):
    """Runs of `clip` frames, `stride` apart, all (W,) int64."""

    video: np.ndarray
    start: np.ndarray
    clip: int
    stride: int


# --------------------------------------------------------------------------------------------------- index arithmetic
def span(clip: int, skip: int) -> int:
    """Frames from the first to the last of a window, both counted."""
    return (clip - 1) * (skip + 1) + 1


def gaps(u: Tensor, available: Tensor | int, rule: str) -> Tensor:
    """u uniform in [0, 1) -> a gap in 1..available, int64. `uniform`: every earlier frame alike; `recent:K`: the last K of
    them; `log`: log-uniform, each doubling of the gap alike."""
    top = available if isinstance(available, Tensor) else torch.full((), available, device=u.device)
    if rule == "log":
        return torch.minimum(((top + 1.0) ** u).long(), top)
    if rule.startswith("recent"):
        top = top.clamp(max=int(rule.partition(":")[2]))
    return torch.minimum(1 + (u * top).long(), top)


def draw_windows(
    lengths: np.ndarray, clip: int, skip: int, n: int, rng: np.random.Generator
) -> Windows:
    """n random windows: a video, uniformly among those long enough, then a start, uniformly up to the last that fits."""
    fits = np.flatnonzero(lengths >= span(clip, skip))
    video = fits[rng.integers(len(fits), size=n)]
    start = rng.integers(lengths[video] - span(clip, skip) + 1)
    return Windows(video, start, clip, skip + 1)


def spaced_windows(lengths: np.ndarray, clip: int, skip: int, n: int) -> Windows:
    """Up to n windows that do not overlap, evenly spread over all that there are: the same ones every time."""
    size = span(clip, skip)
    counts = lengths // size
    chosen = np.arange(counts.sum())
    if n < len(chosen):
        chosen = (np.arange(n) * len(chosen)) // n
    ends = np.cumsum(counts)
    video = np.searchsorted(ends, chosen, side="right")
    return Windows(video, (chosen - (ends - counts)[video]) * size, clip, skip + 1)


def draw_triples(windows: Windows, rule: str, rng: np.random.Generator) -> Triples:
    """One triple in each window: the target uniform over its frames from the third on, the context by `rule`."""
    n = len(windows.video)
    target = rng.integers(2, windows.clip, size=n)
    gap = gaps(torch.from_numpy(rng.random(n)), torch.from_numpy(target - 1), rule).numpy()
    place = lambda index: windows.start + index * windows.stride  # noqa: E731
    return Triples(windows.video, place(target), place(target - 1), place(target - 1 - gap), gap)


def check_long_enough(shards: Shards, clip: int, skip: int, field: str) -> None:
    need, longest = span(clip, skip), int(shards.lengths.max())
    if longest < need:
        raise UserError(
            f"{shards.dir}: the longest video has {longest} frames, {field} needs {need}; "
            f"lower {field} or prepare longer clips"
        )


def draw_batch(
    config: Config, lengths: np.ndarray, k: int, rank: int, world: int, fixed: Windows | None
) -> Triples:
    """This process's share of batch k. `fixed` windows (overfitting) are drawn from in place of all."""
    rng, n, data = (
        numpy_generator(config.train.seed, "batch", k),
        config.train.batch_size,
        config.data,
    )
    if fixed is None:
        windows = draw_windows(lengths, data.clip, data.skip, n, rng)
    else:
        pick = rng.integers(len(fixed.video), size=n)
        windows = fixed._replace(video=fixed.video[pick], start=fixed.start[pick])
    return Triples(
        *(part[share(n, rank, world)] for part in draw_triples(windows, data.context, rng))
    )


def share(n: int, rank: int, world: int) -> slice:
    """The items of a batch of n that a process takes."""
    return slice(rank * n // world, (rank + 1) * n // world)


def describe_batch(config: Config, shards: Shards, k: int, fixed: Windows | None) -> str:
    """Where batch k comes from, for a person."""
    at = draw_batch(config, shards.lengths, k, 0, 1, fixed)
    named = [
        f"{shards.path_of(v, t).name}, video {v}, frames {c}, {r}, {t}"
        for v, t, r, c in zip(at.video[:4], at.target, at.reference, at.context)
    ]
    return (
        f"{shards.dir}: "
        + "; ".join(named)
        + f"; and {len(at.video) - 4} more" * (len(at.video) > 4)
    )
