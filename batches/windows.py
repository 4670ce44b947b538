"""Index arithmetic: which frames form batch items and evaluation clips."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import Config
from runtime.console import UserError
from runtime.process import numpy_generator
from shards import Shards


class FrameIndices(NamedTuple):
    """Frame numbers of B batch items within their videos, all int64.

    video, target, reference: (B,). contexts, gaps: (B, K), with
    gaps = (reference - contexts) / stride, >= 1.
    """

    video: np.ndarray
    target: np.ndarray
    reference: np.ndarray
    contexts: np.ndarray
    gaps: np.ndarray

    def share(self, part: slice) -> FrameIndices:
        return FrameIndices(*(values[part] for values in self))


class Windows(NamedTuple):
    """W windows of `clip` frames, `stride` apart. video, start: (W,) int64."""

    video: np.ndarray
    start: np.ndarray
    clip: int
    stride: int


# -------------------------------------------------------------------- index arithmetic
def span(clip: int, skip: int) -> int:
    """Number of frames from the first to the last frame of a window, both included."""
    return (clip - 1) * (skip + 1) + 1


def draw_gaps(u: Tensor, available: Tensor | int, rule: str) -> Tensor:
    """Map u (B, K), uniform in [0, 1), to gaps (B, K), int64 in [1, available].

    available: (B,), or one number for all, the count of frames before the reference. rule:
    `uniform`: uniform over these frames; `recent:N`: uniform over the last N of these frames;
    `log`: log-uniform, so that each doubling of the gap is equally likely; `last`: 1 to K;
    `at:G,G,…`: these K gaps. Gaps are at most `available`.
    """
    if isinstance(available, Tensor):
        top = available[:, None]
    else:
        top = torch.full((), available, device=u.device)
    if rule.startswith(("at", "last")):
        column = top.expand(len(u), 1)
        gaps = fixed_gaps(rule, u.shape[1])
        return torch.cat([column.clamp(max=gap) for gap in gaps], 1)
    if rule == "log":
        # (top + 1)^u is log-uniform in [1, top + 1).
        return torch.minimum(((top + 1.0) ** u).long(), top)
    if rule.startswith("recent"):
        top = top.clamp(max=int(rule.partition(":")[2]))
    return torch.minimum(1 + (u * top).long(), top)


def draw_windows(
    lengths: np.ndarray, clip: int, skip: int, n: int, rng: np.random.Generator
) -> Windows:
    """Draw n windows: a video, uniform over the videos that are long enough, then a start, uniform
    over all starts at which the window fits."""
    fits = np.flatnonzero(lengths >= span(clip, skip))
    video = fits[rng.integers(len(fits), size=n)]
    start = rng.integers(lengths[video] - span(clip, skip) + 1)
    return Windows(video, start, clip, skip + 1)


def spaced_windows(lengths: np.ndarray, clip: int, skip: int, n: int) -> Windows:
    """Choose at most n windows that do not overlap, evenly spaced over the split. Deterministic."""
    size = span(clip, skip)
    counts = lengths // size
    chosen = np.arange(counts.sum())
    if n < len(chosen):
        chosen = (np.arange(n) * len(chosen)) // n
    ends = np.cumsum(counts)
    video = np.searchsorted(ends, chosen, side="right")
    # From the number of a window in the split to its number in the video, then to its first frame.
    return Windows(video, (chosen - (ends - counts)[video]) * size, clip, skip + 1)


def draw_frames(
    windows: Windows, rule: str, contexts: int, rng: np.random.Generator
) -> FrameIndices:
    """Draw one batch item in each window: the target is uniform over the frames from the third
    on, the reference is the frame before the target, and `rule` draws the contexts."""
    n = len(windows.video)
    # Places within the window: 0 or later for the context, then the reference, then the target.
    target = rng.integers(2, windows.clip, size=n)
    u = torch.from_numpy(rng.random((n, contexts)))
    gaps = draw_gaps(u, torch.from_numpy(target - 1), rule).numpy()
    reference = target - 1
    earlier = reference[:, None] - gaps
    start, stride = windows.start, windows.stride
    return FrameIndices(
        video=windows.video,
        target=start + target * stride,
        reference=start + reference * stride,
        contexts=start[:, None] + earlier * stride,
        gaps=gaps,
    )


def fixed_gaps(rule: str, K: int) -> list[int]:
    """The K gaps of the rules `last` and `at:G,G,…`."""
    if rule == "last":
        return list(range(1, K + 1))
    return [int(gap) for gap in rule.partition(":")[2].split(",")]


def lookback(rule: str, K: int) -> int:
    """The largest gap of a rule of `draw_gaps`; 8 for rules without a largest gap."""
    kind, _, numbers = rule.partition(":")
    if kind == "recent":
        return int(numbers)
    return max(fixed_gaps(rule, K)) if kind in ("at", "last") else 8


def check_long_enough(shards: Shards, clip: int, skip: int, field: str) -> None:
    """Raise UserError if no video of a split has room for a window."""
    need, longest = span(clip, skip), int(shards.lengths.max())
    if longest < need:
        raise UserError(
            f"{shards.dir}: the longest video has {longest} frames, {field} needs {need}; "
            f"lower {field} or prepare longer clips"
        )


def draw_batch(
    config: Config, lengths: np.ndarray, k: int, rank: int, world: int, fixed: Windows | None
) -> FrameIndices:
    """Draw this process's share of batch k. `fixed` (overfitting): draw from these windows only."""
    rng = numpy_generator(config.train.seed, "batch", k)
    n, data = config.train.batch_size, config.data
    if fixed is None:
        windows = draw_windows(lengths, data.clip, data.skip, n, rng)
    else:
        pick = rng.integers(len(fixed.video), size=n)
        windows = fixed._replace(video=fixed.video[pick], start=fixed.start[pick])
    # Every process draws the whole batch, so that the batch does not depend on their number.
    at = draw_frames(windows, data.context, data.contexts, rng)
    return at.share(share(n, rank, world))


def share(n: int, rank: int, world: int) -> slice:
    """The items of a batch of n that process `rank` of `world` takes."""
    return slice(rank * n // world, (rank + 1) * n // world)


def describe_batch(config: Config, shards: Shards, k: int, fixed: Windows | None) -> str:
    """Describe for an error message where the frames of batch k are stored."""
    at = draw_batch(config, shards.lengths, k, 0, 1, fixed)
    found = []
    for video, target, reference, contexts in zip(
        at.video[:4], at.target, at.reference, at.contexts
    ):
        frames = ", ".join(str(frame) for frame in (*contexts, reference, target))
        found.append(f"{shards.path_of(video, target).name}, video {video}, frames {frames}")
    if len(at.video) > 4:
        found.append(f"and {len(at.video) - 4} more")
    return f"{shards.dir}: " + "; ".join(found)
