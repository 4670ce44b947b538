"""Training triples and evaluation clips, drawn from shards or from latents encoded once.

A triple is (target, reference, context, gap): frame t, frame t-1, an earlier frame, and how far that one lies before the
reference. Batch k is a function of (seed, k) alone, whatever the number of processes and loader workers; each process
takes its share of it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import augment
import runtime
from configs import Config
from console import UserError, progress
from shards import Shards, write_packed

# Limits of what is read at once to be encoded.
BLOCK_FRAMES = 2048
BLOCK_BYTES = 64 << 20

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # target, reference, context (B, C, h, w), gap (B,)


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


def draw_windows(lengths: np.ndarray, clip: int, skip: int, n: int, rng: np.random.Generator) -> Windows:
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
        raise UserError(f"{shards.dir}: the longest video has {longest} frames, {field} needs {need}; "
                        f"lower {field} or prepare longer clips")


# -------------------------------------------------------------------------------------------------------- pixels
def to_pixels(frames: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(…, H, W, 3) uint8 -> (…, 3, H, W) float32 in [-1, 1], channels last in memory."""
    frames = runtime.to_device(frames, torch.device(device))
    return frames.movedim(-1, -3).float().div_(127.5).sub_(1)


def to_frames(pixels: Tensor) -> np.ndarray:
    """(…, 3, H, W) in [-1, 1] -> (…, H, W, 3) uint8."""
    return pixels.float().add(1).mul(127.5).round_().clamp_(0, 255).byte().movedim(-3, -1).cpu().numpy()


# ---------------------------------------------------------------------------------------------- latents, encoded once
def latent_dir(shards: Shards, weights_digest: str, root: str) -> Path:
    name = hashlib.blake2b(f"{shards.fingerprint()} {weights_digest}".encode(), digest_size=8).hexdigest()
    return Path(root) / "latents" / name / shards.dir.name


def encode_batch_size(frame_values: int) -> int:
    """Frames that are encoded at once, for frames of that many values."""
    return max(1, (1 << 18) // frame_values * 8)


@torch.no_grad()
def encode_on_device(encode: Callable[[Tensor], Tensor], frames: np.ndarray,
                     device: torch.device | str) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, C, h, w) float16 on the device, without a host wait. Latents stay
    as they are, on the host."""
    if frames.dtype != np.uint8:
        return torch.from_numpy(frames.astype(np.float16))
    batch = encode_batch_size(frames[0].size)
    starts = range(0, len(frames), batch)
    return torch.cat([encode(to_pixels(frames[i:i + batch], device)).half() for i in starts])


def start_copy(values: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the host -> a function that waits for the copy and returns it."""
    # From a GPU, torch makes a non-blocking copy in pinned memory.
    host = values.to("cpu", non_blocking=True)
    copied = None
    if values.is_cuda:
        copied = torch.cuda.current_stream(values.device).record_event()

    def wait() -> np.ndarray:
        if copied is not None:
            copied.synchronize()
        return host.numpy()
    return wait


def encode_frames(encode: Callable[[Tensor], Tensor], frames: np.ndarray,
                  device: torch.device | str) -> np.ndarray:
    """(n, H, W, 3) uint8 -> (n, C, h, w) float16. Latents stay as they are."""
    return start_copy(encode_on_device(encode, frames, device))()


def read_ahead(read: Callable[..., np.ndarray], items: Iterable[tuple]) -> Iterator[np.ndarray]:
    """read(*item) of each item in order, by a thread that reads one item ahead. An error of the
    thread is raised here. The thread ends with the iterator, which the caller closes."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        ahead = None
        for item in items:
            following = pool.submit(read, *item)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def block_rows(count: int, shape: tuple[int, ...], dtype: np.dtype) -> list[np.ndarray]:
    """The rows of a file of `count` frames, in blocks of at most BLOCK_FRAMES and BLOCK_BYTES (or
    one batch)."""
    # Whole batches: the limit in bytes does not change which frames are encoded together.
    values = int(np.prod(shape))
    batch = encode_batch_size(values)
    step = max(batch, BLOCK_BYTES // (values * dtype.itemsize) // batch * batch)
    blocks = []
    for start in range(0, count, BLOCK_FRAMES):
        stop = min(start + BLOCK_FRAMES, count)
        blocks += [np.arange(a, min(a + step, stop)) for a in range(start, stop, step)]
    return blocks


def cache_latents(shards: Shards, encode: Callable[[Tensor], Tensor], weights_digest: str, root: str,
                  device: torch.device | str) -> Path:
    """Encode every frame of a split once, a latent shard per frame shard; shards that are there
    already are kept. While a block of frames is encoded, a thread reads the next one, and a GPU's
    latents of the block before are fetched."""
    out = latent_dir(shards, weights_digest, root)
    out.mkdir(parents=True, exist_ok=True)
    todo = []
    reads = []
    for k, (file, path) in enumerate(zip(shards.files, shards.paths)):
        if len(file.lengths) and not (out / path.name).exists():
            blocks = block_rows(int(file.lengths.sum()), file.shape, file.dtype)
            todo.append((file, out / path.name, blocks))
            reads += [(k, rows) for rows in blocks]
    total = sum(len(rows) for _, rows in reads)
    frames = read_ahead(shards.read_file, reads)
    with progress(total, f"encode {shards.dir.name}", "frame") as bar, closing(frames):
        for file, path, blocks in todo:
            parts = []
            wait = None
            for rows in blocks:
                following = start_copy(encode_on_device(encode, next(frames), device))
                # Wait for the block before only now that the device has work again.
                if wait is not None:
                    parts.append(np.array(wait()))
                wait = following
                bar.update(len(rows))
            parts.append(np.array(wait()))
            write_packed(path, "latents", np.concatenate(parts), file.lengths,
                         {"continues": file.continues, "fps": file.fps or 0.0})
    return out


class LatentStore:
    """All latents of a split, gathered by flat index: on the GPU where they fit in half of what is free there, else in their
    files, memory-mapped: the system keeps as many in memory as it can spare, once for all processes. UserError naming the
    file for latents that are not finite."""

    def __init__(self, shards: Shards, device: torch.device):
        maps = [shards.map_file(k) for k in range(len(shards.paths))]
        for rows, path in zip(maps, shards.paths):
            check_finite(rows, path)
        self.device, self.starts = device, shards.file_starts
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nobody writes to it
            self.parts = [torch.from_numpy(rows) for rows in maps]
        if device.type == "cuda" and sum(part.nbytes for part in self.parts) < torch.cuda.mem_get_info(device)[0] // 2:
            whole = torch.empty(int(self.starts[-1]), *shards.shape, dtype=self.parts[0].dtype, device=device)
            for part, start in zip(self.parts, self.starts):
                whole[int(start):int(start) + len(part)] = part
            self.parts, self.starts = [whole], shards.file_starts[[0, -1]]

    def gather(self, rows: np.ndarray) -> Tensor:
        """(n,) int64 flat indices -> (n, C, h, w) on the device, as stored."""
        if len(self.parts) == 1:
            found = self.parts[0][runtime.to_device(rows, self.parts[0].device)]
        else:
            at = torch.from_numpy(rows)
            owner = np.searchsorted(self.starts, rows, side="right") - 1
            found = torch.empty(len(rows), *self.parts[0].shape[1:], dtype=self.parts[0].dtype)
            for k in np.unique(owner):
                mine = torch.from_numpy(np.flatnonzero(owner == k))
                found[mine] = self.parts[k][at[mine] - int(self.starts[k])]
        return runtime.to_device(found, self.device)


def check_finite(latents: np.ndarray, path: Path) -> None:
    for start in range(0, len(latents), 4096):
        if not np.isfinite(latents[start:start + 4096]).all():
            raise UserError(f"{path}: latents that are not finite, from frame {start} on; look at the autoencoder's weights, "
                            "and delete the file to have it made again")


class LatentTriples:
    """Batches of triples gathered from latents. batch(k) -> target, reference, context (b, C, h, w) as stored (not
    normalised), gap (b,) float32."""

    def __init__(self, config: Config, dir: Path, device: torch.device, rank: int = 0, world: int = 1,
                 fixed: Windows | None = None):
        self.shards = Shards(dir, "latents")
        self.store = LatentStore(self.shards, device)
        self.config, self.device = config, device
        self.rank, self.world, self.fixed = rank, world, fixed
        check_long_enough(self.shards, config.data.clip, config.data.skip, "data.clip")

    def triples(self, k: int, whole: bool = False) -> Triples:
        rank, world = (0, 1) if whole else (self.rank, self.world)
        return draw_batch(self.config, self.shards.lengths, k, rank, world, self.fixed)

    def batch(self, k: int, whole: bool = False) -> Batch:
        at = self.triples(k, whole)
        base = self.shards.starts[at.video]
        x = self.store.gather(np.concatenate([base + at.target, base + at.reference, base + at.context]))
        return *x.float().chunk(3), runtime.to_device(at.gap.astype(np.float32), self.device)

    def batches(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        """This process's share of them, or the whole."""
        return (self.batch(k, whole) for k in range(start, stop))


def draw_batch(config: Config, lengths: np.ndarray, k: int, rank: int, world: int, fixed: Windows | None) -> Triples:
    """This process's share of batch k. `fixed` windows (overfitting) are drawn from in place of all."""
    rng, n, data = runtime.rng(config.train.seed, "batch", k), config.train.batch_size, config.data
    if fixed is None:
        windows = draw_windows(lengths, data.clip, data.skip, n, rng)
    else:
        pick = rng.integers(len(fixed.video), size=n)
        windows = fixed._replace(video=fixed.video[pick], start=fixed.start[pick])
    return Triples(*(part[share(n, rank, world)] for part in draw_triples(windows, data.context, rng)))


def share(n: int, rank: int, world: int) -> slice:
    """The items of a batch of n that a process takes."""
    return slice(rank * n // world, (rank + 1) * n // world)


def describe_batch(config: Config, shards: Shards, k: int, fixed: Windows | None) -> str:
    """Where batch k comes from, for a person."""
    at = draw_batch(config, shards.lengths, k, 0, 1, fixed)
    named = [f"{shards.path_of(v, t).name}, video {v}, frames {c}, {r}, {t}"
             for v, t, r, c in zip(at.video[:4], at.target, at.reference, at.context)]
    return f"{shards.dir}: " + "; ".join(named) + f"; and {len(at.video) - 4} more" * (len(at.video) > 4)


# ----------------------------------------------------------------- frames, where augmentation forbids the cache
class FrameTriples(torch.utils.data.Dataset):
    """Item k is batch k as it is stored: (b, 3, H, W, 3) uint8 (target, reference, context), and gap (b,). `batches` jitters
    and encodes them on the device."""

    def __init__(self, config: Config, shards: Shards, rank: int = 0, world: int = 1, fixed: Windows | None = None):
        check_long_enough(shards, config.data.clip, config.data.skip, "data.clip")
        self.config, self.shards, self.rank, self.world, self.fixed = config, shards, rank, world, fixed

    def __len__(self) -> int:
        return self.config.train.steps

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        at = draw_batch(self.config, self.shards.lengths, k, self.rank, self.world, self.fixed)
        clips = [self.shards.read(video, np.array(frames))
                 for video, *frames in zip(at.video, at.target, at.reference, at.context)]
        return np.stack(clips), at.gap.astype(np.float32)

    def jittered(self, frames: Tensor, k: int) -> Tensor:
        """This process's share of batch k, (b, 3, H, W, 3) uint8 -> (b, 3, 3, H, W) float32 in [-1, 1]."""
        n = self.config.train.batch_size
        jitter = augment.draw(self.config.data, n, runtime.rng(self.config.train.seed, "augment", k))
        pixels = frames.movedim(-1, -3).float().div_(255)
        return augment.apply(pixels, jitter.share(share(n, self.rank, self.world))).mul_(2).sub_(1)

    def batches(self, start: int, stop: int, encode: Callable[[Tensor], Tensor], device: torch.device,
                whole: bool = False) -> Iterator[Batch]:
        """Batches start..stop-1, this process's share of them or the whole, read by workers and encoded on the device."""
        dataset = FrameTriples(self.config, self.shards, fixed=self.fixed) if whole else self
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(start, stop), worker_init_fn=own_group,
                                             num_workers=min(self.config.data.workers, os.cpu_count() or 1),
                                             pin_memory=device.type == "cuda")
        for k, (frames, gap) in enumerate(one_line(loader), start):
            with torch.no_grad():
                pixels = dataset.jittered(frames.to(device, non_blocking=True), k).flatten(0, 1)
                z = encode(pixels.contiguous(memory_format=torch.channels_last))
            yield *z.float().unflatten(0, (-1, 3)).unbind(1), gap.to(device, non_blocking=True)


def own_group(_worker: int) -> None:
    """Out of reach of a SIGTERM to the training's group of processes: that is the training's to heed, and it needs its
    workers for one more batch."""
    os.setpgid(0, 0)


def one_line(loader: torch.utils.data.DataLoader) -> Iterator:
    """A worker's UserError without the traceback that torch puts around it."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("console.UserError: ")) from None
