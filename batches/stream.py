"""Lifelong learning: one stream of video, visited once in order, with replay of its past
(arXiv 2406.04814).

The stream is the concatenation of all videos of a split. With `data.mode=stream`, batch k holds
window k of the stream, replay.n_live times, and windows drawn from a reservoir of earlier windows.
With `data.mode=offline`, for comparison, batch k holds windows drawn from the whole stream. Both
are functions of (seed, k), and so is the reservoir. Checkpoints store the reservoir, so that a
resumed run need not pass through the stream again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batches.batch import Batch
from batches.latents import LatentStore, gather_batch, open_latents
from batches.windows import Windows, draw_frames, share, span
from configs import Config
from models.joint import stack_frames
from runtime.console import UserError
from runtime.process import numpy_generator
from shards import Shards

# At most this many batches may be drawn, but not yet consumed, when the state is saved.
AHEAD = 4096


# -------------------------------------------------------------------- index arithmetic
def cut_range(lengths: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the half-open range [start, stop) of frames out of the concatenation of videos.

    Returns the first frame and the length of the part within each video, without empty parts.
    """
    ends = np.cumsum(lengths)
    first = np.maximum(ends - lengths, start)
    length = np.minimum(ends, stop) - first
    return first[length > 0], length[length > 0]


def count_windows(lengths: np.ndarray, span: int, stride: str) -> np.ndarray:
    """Count the windows of `span` frames that fit into each run of consecutive frames. chunked:
    windows do not overlap. Otherwise a window starts at every frame."""
    if stride == "chunked":
        return lengths // span
    return np.maximum(lengths - span + 1, 0)


def evenly_spaced(k: np.ndarray, count: int, total: int) -> np.ndarray:
    """The k-th of `count` evenly spaced places in [0, total - 1], both ends included."""
    return k * (total - 1) // max(count - 1, 1)


def frame_range(text: str, frames: int) -> tuple[int, int]:
    """Parse "START:STOP" for a stream of `frames` frames. An absent START is 0, an absent STOP is
    `frames`."""
    start, _, stop = text.partition(":")
    return int(start or 0), int(stop or frames)


class StreamWindows:
    """Windows of `length` frames, with `skip` frames left out between neighbours, of a stream.

    stride: `continuous`: a window starts at every frame. `chunked`: each window starts where the
    previous window ends. `spaced`: `count` windows, evenly spaced from the first to the last
    possible window; they may overlap. No window crosses from one video into the next; frames at the
    end of a video that do not fill a window are left out. frames: "START:STOP", the part of the
    stream that is used. settings: the names of `frames` and `length` in error messages.

    windows[k] reads window k from the disk. -> (frames or latents as stored, (length, …), and their
    places in the stream, (length,) int64). Too few frames raise a UserError.
    """

    def __init__(
        self,
        shards: Shards,
        length: int,
        stride: str = "continuous",
        count: int = 0,
        frames: str = "",
        skip: int = 0,
        settings: tuple[str, str] = ("data.frames", "data.clip"),
    ):
        self.shards, self.stride, self.skip = shards, stride, skip
        self.offsets = np.arange(length) * (skip + 1)
        self.span = span(length, skip)
        start, stop = frame_range(frames, int(shards.lengths.sum()))
        if stop > shards.lengths.sum() or start >= stop:
            raise UserError(
                f"{shards.dir}: a stream of {shards.lengths.sum():,} frames, "
                f"{settings[0]}={frames} is not a part of it"
            )
        # No window crosses the end of a video: each video is a run of frames with its own windows.
        self.first, lengths = cut_range(shards.lengths, start, stop)
        self.ends = np.cumsum(count_windows(lengths, self.span, stride))
        self.total = int(self.ends[-1])
        self.count = count if stride == "spaced" else self.total
        if not self.total:
            raise UserError(
                f"{shards.dir}: its longest video has {lengths.max()} frames within "
                f"{settings[0]}={frames or ':'}, a window needs {self.span}; lower {settings[1]}"
            )
        if self.count > self.total:
            raise UserError(
                f"{shards.dir}: {count:,} windows of {self.span} frames requested, but only "
                f"{self.total:,} different ones exist; lower data.num_windows"
            )

    def __len__(self) -> int:
        return self.count

    def starts(self, k: np.ndarray) -> np.ndarray:
        """Window numbers (n,) -> places in the stream of their first frames (n,)."""
        # `place` counts the possible windows of all runs of frames; `within` those of one run.
        place = evenly_spaced(k, self.count, self.total) if self.stride == "spaced" else k
        run = np.searchsorted(self.ends, place, side="right")
        within = place - np.where(run > 0, self.ends[run - 1], 0)
        return self.first[run] + within * (self.span if self.stride == "chunked" else 1)

    def rows(self, k: np.ndarray) -> np.ndarray:
        """Window numbers (n,) -> places in the stream of their frames (n, length)."""
        return self.starts(k)[:, None] + self.offsets

    def clips(self, k: np.ndarray) -> Windows:
        """Window numbers (n,) -> videos and first frames within these videos."""
        start = self.starts(k)
        video = np.searchsorted(self.shards.starts, start, side="right") - 1
        first = start - self.shards.starts[video]
        return Windows(video, first, len(self.offsets), self.skip + 1)

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= k < len(self):
            raise IndexError(f"window {k} of {len(self)}")
        rows = self.rows(np.array([k]))[0]
        return self.shards.read_rows(rows), rows


def windows_of(config: Config, shards: Shards) -> StreamWindows:
    """The windows that a run trains on."""
    own = config.data
    return StreamWindows(shards, own.clip, own.windows, own.num_windows, own.frames, own.skip)


# -------------------------------------------------------------------- the reservoir
def capacity(size: str, windows: int) -> int:
    """Capacity of the reservoir by replay.size: `full`, a share of the stream, or a count."""
    if size == "full":
        return windows
    if "." in size:
        return max(1, round(float(size) * windows))
    return min(int(size), windows)


class Reservoir:
    """A uniform sample of at most `capacity` window numbers out of those seen so far.

    Each of n seen windows is kept with probability capacity / n (Vitter 1985, algorithm R). Windows
    are seen in the order 0, 1, …. The decision about window k depends on (seed, k) only, so all
    processes hold the same reservoir without communication.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity, self.seed, self.seen = capacity, seed, 0
        # The first `capacity` windows fill the slots: slot k holds window k until another window
        # replaces it.
        self.slots = np.arange(capacity)
        # The latest replacements, (new window, slot, old window), which `state_dict` may undo.
        self.replaced: deque[tuple[int, int, int]] = deque(maxlen=AHEAD)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self) -> None:
        """Count the next window of the stream as seen, and keep it or not."""
        if self.seen >= self.capacity > 0:
            slot = int(numpy_generator(self.seed, "reservoir", self.seen).integers(self.seen + 1))
            if slot < self.capacity:
                self.replaced.append((self.seen, slot, int(self.slots[slot])))
                self.slots[slot] = self.seen
        self.seen += 1

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw n of the windows held, independently and with replacement."""
        return self.slots[rng.integers(len(self), size=n)]

    def state_dict(self, seen: int) -> dict:
        """State after `seen` windows, without those that were read ahead of the training."""
        if not 0 <= self.seen - seen <= AHEAD:
            raise ValueError(
                f"the reservoir has seen {self.seen} windows, and cannot go back to {seen}"
            )
        slots = self.slots.copy()
        for window, slot, old in reversed(self.replaced):
            if window >= seen:
                slots[slot] = old
        return {"seen": seen, "slots": torch.from_numpy(slots)}

    def load_state_dict(self, state: dict) -> None:
        if len(state["slots"]) != self.capacity:
            raise UserError(
                f"the checkpoint's reservoir holds {len(state['slots'])} windows, this stream's "
                f"{self.capacity}: is it the same stream? restore it, or name a new run: "
                "--set output.run_id=NAME"
            )
        self.seen, self.slots = state["seen"], state["slots"].numpy().copy()
        self.replaced.clear()


# -------------------------------------------------------------------- batches
class StreamTriples:
    """Batches from the latents of a stream, not normalised: in order with replay, or offline."""

    def __init__(
        self, config: Config, dir: Path, device: torch.device, rank: int = 0, world: int = 1
    ):
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.shards = open_latents(config, dir)
        self.store = LatentStore(self.shards, device)
        self.windows = windows_of(config, self.shards)
        self.reservoir = Reservoir(
            capacity(config.replay.size, len(self.windows)), config.train.seed
        )

    def batches(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        """Batches start..stop-1: this process's share of each, or the whole batch. With
        data.mode=stream, `start` must be the next window of the stream."""
        if self.config.data.mode == "offline":
            return self.random_batches(start, stop, whole)
        return self.ordered_batches(start, stop, whole)

    def ordered_batches(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        if start != self.reservoir.seen:
            raise ValueError(f"the stream is at window {self.reservoir.seen}, not at {start}")
        for k in range(start, stop):
            rng = numpy_generator(self.config.train.seed, "batch", k)
            chosen = self.live_and_past(k, rng)
            self.reservoir.add()
            yield self.batch(chosen, rng, whole)

    def random_batches(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        """Batches of windows drawn from the whole stream. The reservoir does not change."""
        for k in range(start, stop):
            rng = numpy_generator(self.config.train.seed, "batch", k)
            chosen = rng.integers(len(self.windows), size=self.config.train.batch_size)
            yield self.batch(chosen, rng, whole)

    def live_and_past(self, k: int, rng: np.random.Generator) -> np.ndarray:
        """Window numbers (B,): k, n_live times, then windows of the past. While the reservoir is
        empty, all are k."""
        B, live = self.config.train.batch_size, self.config.replay.n_live
        chosen = np.full(B, k)
        if len(self.reservoir):
            chosen[live:] = self.reservoir.draw(B - live, rng)
        return chosen

    def batch(self, chosen: np.ndarray, rng: np.random.Generator, whole: bool) -> Batch:
        """Draw one item from each chosen window, or split the windows into given and future frames
        for the joint network."""
        B, clip = len(chosen), self.config.data.clip
        own = slice(0, B) if whole else share(B, self.rank, self.world)
        if self.config.halves:
            rows = self.windows.rows(chosen[own])
            frames = self.store.gather(rows.ravel()).float().unflatten(0, rows.shape)
            return split_windows(frames, self.config.halves[0])
        # Places in the stream are flat indices, as of one long video.
        start = self.windows.starts(chosen)
        windows = Windows(np.zeros_like(start), start, clip, self.config.data.skip + 1)
        at = draw_frames(windows, self.config.data.context, self.config.data.contexts, rng)
        return gather_batch(self.store, at.share(own))

    def state_dict(self, step: int) -> dict | None:
        """The reservoir and the place in the stream after `step` updates; None if offline."""
        return self.reservoir.state_dict(step) if self.config.data.mode == "stream" else None

    def load_state_dict(self, state: dict | None) -> None:
        if state is not None:
            self.reservoir.load_state_dict(state)


def split_windows(x: Tensor, given: int) -> Batch:
    """Split windows (B, T, C, h, w) into a batch for models/joint.py.

    target: the future frames, stacked along the height, (B, C, (T - given) h, w). reference: the
    last given frame, repeated as often. contexts: the given frames. gaps: 1, (B, given).
    """
    B, T = x.shape[:2]
    last = x[:, given - 1 : given].expand(-1, T - given, -1, -1, -1)
    gaps = torch.ones(B, given, device=x.device)
    return Batch(stack_frames(x[:, given:]), stack_frames(last), x[:, :given], gaps)


def loss_parts(config: Config, share: slice) -> dict[str, slice]:
    """Parts of the loss that are logged separately, as slices of this process's share of the batch.

    loss_live: the live window, on which the network has not been trained before. loss_replay: the
    windows from the reservoir. Empty parts are left out.
    """
    if config.data.mode != "stream":
        return {}
    B = config.train.batch_size
    # Without a reservoir, every item of a batch is live.
    live = config.replay.n_live if capacity(config.replay.size, 1) else B
    n = share.stop - share.start
    mine = min(max(live - share.start, 0), n)
    parts = {"loss_live": slice(0, mine), "loss_replay": slice(mine, n)}
    return {name: part for name, part in parts.items() if part.start < part.stop}


def describe_stream_batch(config: Config, shards: Shards, k: int) -> str:
    """Describe for an error message where the frames of batch k are stored."""
    if config.data.mode == "offline":
        return f"{shards.dir}: windows from all over the stream"
    start = int(windows_of(config, shards).starts(np.array([k]))[0])
    path = shards.paths[np.searchsorted(shards.file_starts, start, side="right") - 1]
    return (
        f"{shards.dir}: window {k} of the stream, from frame {start} on ({path.name}), "
        "and windows from the reservoir"
    )
