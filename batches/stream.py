"""Lifelong learning: one stream of video, seen once and in order, with replay of its past (arXiv 2406.04814).

The videos of a split, laid end to end, are the stream. Batch k of `data.mode=stream` is window k of it, replay.n_live times,
and windows drawn from a reservoir of those before; of `data.mode=offline`, for comparison, windows drawn from all of them.
Both are functions of (seed, k), and so is the reservoir, which is part of the checkpoint all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batches.batch import Batch
from batches.latents import LatentStore
from batches.windows import Windows, draw_triples, share, span
from configs import Config
from models.joint import below
from runtime.console import UserError
from runtime.process import numpy_generator, to_device
from shards import Shards

AHEAD = 4096  # batches that may have been drawn but not consumed when the state is saved


# --------------------------------------------------------------------------------------------------- index arithmetic
def cut(lengths: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Videos of these lengths, laid end to end: the parts of them between the frames start (counted) and stop (not counted) of
    the whole -> first frame and length of each part, none empty."""
    ends = np.cumsum(lengths)
    first = np.maximum(ends - lengths, start)
    length = np.minimum(ends, stop) - first
    return first[length > 0], length[length > 0]


def places(lengths: np.ndarray, span: int, stride: str) -> np.ndarray:
    """How many windows of `span` frames there are in runs of these lengths: from every frame on, or (chunked) end to end."""
    return lengths // span if stride == "chunked" else np.maximum(lengths - span + 1, 0)


def spread(k: np.ndarray, count: int, total: int) -> np.ndarray:
    """Of `count` among `total` places, evenly spread, the k-th: the first is place 0 and the last total - 1."""
    return k * (total - 1) // max(count - 1, 1)


def frame_range(text: str, frames: int) -> tuple[int, int]:
    """ "START:STOP" of a stream of `frames`, either may be absent -> (start, stop)."""
    start, _, stop = text.partition(":")
    return int(start or 0), int(stop or frames)


class StreamWindows:
    """Windows of `length` frames, `skip` left out between any two, of the videos of a split laid end to end.

    stride: `continuous`, a window from every frame on; `chunked`, each begins where the one before has ended; `spaced`, `count`
    of them, evenly from the first that there is to the last, overlapping where they must. None crosses from one video into
    the next, and frames at a video's end that fill no window are left out. frames: "START:STOP", a part of the stream.
    settings: what a person would set `frames` and `length` by.
    windows[k] is (frames or latents (length, ...) as stored, their places in the stream (length,) int64), read from the disk;
    UserError where there are too few frames.
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
                f"{shards.dir}: a stream of {shards.lengths.sum():,} frames, {settings[0]}={frames} is no part of "
                "it"
            )
        self.first, lengths = cut(shards.lengths, start, stop)
        self.ends = np.cumsum(places(lengths, self.span, stride))
        self.total = int(self.ends[-1])
        self.count = count if stride == "spaced" else self.total
        if not self.total:
            raise UserError(
                f"{shards.dir}: its longest video has {lengths.max()} frames within {settings[0]}={frames or ':'}, "
                f"a window needs {self.span}; lower {settings[1]}"
            )
        if self.count > self.total:
            raise UserError(
                f"{shards.dir}: {count:,} windows asked for, but only {self.total:,} of {self.span} frames begin "
                "at different ones; lower data.num_windows"
            )

    def __len__(self) -> int:
        return self.count

    def starts(self, k: np.ndarray) -> np.ndarray:
        """(n,) numbers of windows -> (n,) places in the stream of their first frames."""
        place = spread(k, self.count, self.total) if self.stride == "spaced" else k
        run = np.searchsorted(self.ends, place, side="right")
        within = place - np.where(run > 0, self.ends[run - 1], 0)
        return self.first[run] + within * (self.span if self.stride == "chunked" else 1)

    def rows(self, k: np.ndarray) -> np.ndarray:
        """(n,) numbers of windows -> (n, length) places in the stream of their frames."""
        return self.starts(k)[:, None] + self.offsets

    def clips(self, k: np.ndarray) -> Windows:
        """(n,) numbers of windows -> where they lie in their videos."""
        start = self.starts(k)
        video = np.searchsorted(self.shards.starts, start, side="right") - 1
        return Windows(video, start - self.shards.starts[video], len(self.offsets), self.skip + 1)

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= k < len(self):
            raise IndexError(f"window {k} of {len(self)}")
        rows = self.rows(np.array([k]))[0]
        return self.shards.read_rows(rows), rows


def windows_of(config: Config, shards: Shards) -> StreamWindows:
    """The windows that a run trains on."""
    own = config.data
    return StreamWindows(shards, own.clip, own.windows, own.num_windows, own.frames, own.skip)


# ----------------------------------------------------------------------------------------------------------- the reservoir
def capacity(size: str, windows: int) -> int:
    """replay.size, of a stream of so many windows -> how many the reservoir holds at the most."""
    if size == "full":
        return windows
    return max(1, round(float(size) * windows)) if "." in size else min(int(size), windows)


class Reservoir:
    """At most `capacity` numbers of windows, a uniform sample of those seen so far: each of n seen is kept with probability
    capacity / n (Vitter 1985, algorithm R). Windows are seen in order, 0, 1, …; what happens to window k follows from
    (seed, k) alone, so that every process has the same reservoir without a word to the others."""

    def __init__(self, capacity: int, seed: int):
        self.capacity, self.seed, self.seen = capacity, seed, 0
        self.slots = np.arange(capacity)  # slot k is window k until another takes its place
        self.replaced: deque[tuple[int, int, int]] = deque(
            maxlen=AHEAD
        )  # (by window, slot, window that was there)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self) -> None:
        """The next window of the stream has been seen."""
        if self.seen >= self.capacity > 0:
            slot = int(numpy_generator(self.seed, "reservoir", self.seen).integers(self.seen + 1))
            if slot < self.capacity:
                self.replaced.append((self.seen, slot, int(self.slots[slot])))
                self.slots[slot] = self.seen
        self.seen += 1

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """n of the windows that it holds, independently."""
        return self.slots[rng.integers(len(self), size=n)]

    def state_dict(self, seen: int) -> dict:
        """What it was when `seen` windows had been seen: others may have been read ahead of the training since."""
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
                f"the checkpoint's reservoir holds {len(state['slots'])} windows, this stream's {self.capacity}: "
                "is it the same stream? restore it, or name a new run: --set output.run_id=NAME"
            )
        self.seen, self.slots = state["seen"], state["slots"].numpy().copy()
        self.replaced.clear()


# ---------------------------------------------------------------------------------------------------------- batches
class StreamTriples:
    """Batches from the latents of a stream, in order with replay, or offline; as data.LatentTriples has them."""

    def __init__(
        self, config: Config, dir: Path, device: torch.device, rank: int = 0, world: int = 1
    ):
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.shards = Shards(dir, "latents")
        self.store = LatentStore(self.shards, device)
        self.windows = windows_of(config, self.shards)
        self.reservoir = Reservoir(
            capacity(config.replay.size, len(self.windows)), config.train.seed
        )

    def batches(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        """This process's share of them, or the whole. In order, they go on where the last ones ended."""
        return (
            self.anywhere(start, stop, whole)
            if self.config.data.mode == "offline"
            else self.in_order(start, stop, whole)
        )

    def in_order(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        if start != self.reservoir.seen:
            raise ValueError(f"the stream is at window {self.reservoir.seen}, not at {start}")
        for k in range(start, stop):
            rng = numpy_generator(self.config.train.seed, "batch", k)
            chosen = self.live_and_past(k, rng)
            self.reservoir.add()
            yield self.batch(chosen, rng, whole)

    def anywhere(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        """Of windows drawn from the whole stream: nothing here has an order, and the reservoir stays as it is."""
        for k in range(start, stop):
            rng = numpy_generator(self.config.train.seed, "batch", k)
            yield self.batch(
                rng.integers(len(self.windows), size=self.config.train.batch_size), rng, whole
            )

    def live_and_past(self, k: int, rng: np.random.Generator) -> np.ndarray:
        """(B,) numbers of windows: n_live times k, then of the past. Where there is none, k throughout."""
        B, live = self.config.train.batch_size, self.config.replay.n_live
        chosen = np.full(B, k)
        if len(self.reservoir):
            chosen[live:] = self.reservoir.draw(B - live, rng)
        return chosen

    def batch(self, chosen: np.ndarray, rng: np.random.Generator, whole: bool) -> Batch:
        """Each window gets a triple of its own, or is cut into given and future frames for a network that wants halves."""
        B, clip = len(chosen), self.config.data.clip
        own = slice(0, B) if whole else share(B, self.rank, self.world)
        if self.config.halves:
            rows = self.windows.rows(chosen[own])
            return halves(
                self.store.gather(rows.ravel()).float().unflatten(0, rows.shape),
                self.config.halves[0],
            )
        start = self.windows.starts(chosen)
        at = draw_triples(
            Windows(np.zeros_like(start), start, clip, self.config.data.skip + 1),
            self.config.data.context,
            rng,
        )
        x = self.store.gather(np.concatenate([at.target[own], at.reference[own], at.context[own]]))
        return *x.float().chunk(3), to_device(at.gap[own].astype(np.float32), self.device)

    def state_dict(self, step: int) -> dict | None:
        """The reservoir and the place in the stream after `step` updates."""
        return self.reservoir.state_dict(step) if self.config.data.mode == "stream" else None

    def load_state_dict(self, state: dict | None) -> None:
        if state is not None:
            self.reservoir.load_state_dict(state)


def halves(x: Tensor, given: int) -> Batch:
    """Windows (B, T, C, h, w) as a batch for models/joint.py: target (B, C, (T - given) h, w), the last given frame as often,
    and context (B, C, given h, w), frames below one another; gap is 1."""
    B, T = x.shape[:2]
    last = x[:, given - 1 : given].expand(-1, T - given, -1, -1, -1)
    return below(x[:, given:]), below(last), below(x[:, :given]), torch.ones(B, device=x.device)


def loss_parts(config: Config, share: slice) -> dict[str, slice]:
    """What of the loss is logged apart, as slices of this process's share of the batch: the live window's, which the network
    has not been trained on before, and replay's."""
    if config.data.mode != "stream":
        return {}
    B = config.train.batch_size
    live = config.replay.n_live if capacity(config.replay.size, 1) else B
    n, mine = share.stop - share.start, min(max(live - share.start, 0), share.stop - share.start)
    parts = {"loss_live": slice(0, mine), "loss_replay": slice(mine, n)}
    return {name: part for name, part in parts.items() if part.start < part.stop}


def describe_stream_batch(config: Config, shards: Shards, k: int) -> str:
    """Where batch k comes from, for a person."""
    if config.data.mode == "offline":
        return f"{shards.dir}: windows from all over the stream"
    start = int(windows_of(config, shards).starts(np.array([k]))[0])
    path = shards.paths[np.searchsorted(shards.file_starts, start, side="right") - 1]
    return f"{shards.dir}: window {k} of the stream, from frame {start} on ({path.name}), and what was replayed"
