"""Latents: encode each frame once, cache the latents, gather batches from them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batches.batch import Batch, Earlier, Later, to_pixels
from batches.windows import FrameIndices, Windows, check_long_enough, draw_batch, lookback, share
from configs import Config
from runtime.console import UserError, progress
from runtime.process import to_device
from shards import Shards, write_packed

# Limits of the block of frames that is read at once for encoding.
BLOCK_FRAMES = 2048
BLOCK_BYTES = 64 << 20


# -------------------------------------------------------------------- the cache
def latent_dir(shards: Shards, weights_digest: str, root: str) -> Path:
    """Folder of the latents of a split, named after the frames and the weights of the encoder."""
    name = hashlib.blake2b(
        f"{shards.fingerprint()} {weights_digest}".encode(), digest_size=8
    ).hexdigest()
    return Path(root) / "latents" / name / shards.dir.name


def encode_batch_size(frame_values: int) -> int:
    """Number of frames per call of the encoder, for frames of `frame_values` values each.

    About 2^21 values in total, but at least one frame.
    """
    return max(1, (1 << 18) // frame_values * 8)


@torch.no_grad()
def encode_on_device(
    encode: Callable[[Tensor], Tensor], frames: np.ndarray, device: torch.device | str
) -> Tensor:
    """Encode frames (n, H, W, 3) uint8 -> (n, C, h, w) float16 on the device, asynchronously.

    Stored latents are only cast to float16, and stay on the host.
    """
    if frames.dtype != np.uint8:
        return torch.from_numpy(frames.astype(np.float16))
    batch = encode_batch_size(frames[0].size)
    starts = range(0, len(frames), batch)
    return torch.cat([encode(to_pixels(frames[i : i + batch], device)).half() for i in starts])


def start_copy(values: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the host. -> a function that waits for the copy and returns the
    array."""
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


def encode_frames(
    encode: Callable[[Tensor], Tensor], frames: np.ndarray, device: torch.device | str
) -> np.ndarray:
    """Encode frames (n, H, W, 3) uint8 -> (n, C, h, w) float16. Stored latents are only cast."""
    return start_copy(encode_on_device(encode, frames, device))()


def read_ahead(read: Callable[..., np.ndarray], items: Iterable[tuple]) -> Iterator[np.ndarray]:
    """Yield read(*item) for each item in order. A thread reads one item ahead; its errors are
    raised here. The caller closes the iterator, which ends the thread."""
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
    """Split the rows of a file of `count` frames into blocks of at most BLOCK_FRAMES frames and
    BLOCK_BYTES bytes, but of at least one encoder batch."""
    # A block holds whole encoder batches. Which frames share a batch, and so the rounding of their
    # latents, does not depend on BLOCK_BYTES.
    values = int(np.prod(shape))
    batch = encode_batch_size(values)
    step = max(batch, BLOCK_BYTES // (values * dtype.itemsize) // batch * batch)
    blocks = []
    for start in range(0, count, BLOCK_FRAMES):
        stop = min(start + BLOCK_FRAMES, count)
        blocks += [np.arange(a, min(a + step, stop)) for a in range(start, stop, step)]
    return blocks


def cache_latents(
    shards: Shards,
    encode: Callable[[Tensor], Tensor],
    weights_digest: str,
    root: str,
    device: torch.device | str,
) -> Path:
    """Encode every frame of a split once and write one latent shard per frame shard. Existing
    latent shards are kept. While the device encodes a block of frames, a thread reads the next
    block, and the latents of the previous block are copied to the host."""
    out = latent_dir(shards, weights_digest, root)
    out.mkdir(parents=True, exist_ok=True)
    # todo: one entry per latent shard to write. reads: the blocks of all of them in one list, so
    # that the thread also reads ahead at the end of a file.
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
                # Wait for the previous block only after the device has work again.
                if wait is not None:
                    parts.append(np.array(wait()))
                wait = following
                bar.update(len(rows))
            parts.append(np.array(wait()))
            write_packed(
                path,
                "latents",
                np.concatenate(parts),
                file.lengths,
                {"continues": file.continues, "fps": file.fps or 0.0},
            )
    return out


class LatentStore:
    """All latents of a split, gathered by flat index.

    The latents are stored on the GPU if they fit into half of its free memory. Otherwise the files
    are memory-mapped, and all processes share the operating system's cache of them. Latents that
    are not finite raise a UserError that names the file."""

    def __init__(self, shards: Shards, device: torch.device):
        maps = [shards.map_file(k) for k in range(len(shards.paths))]
        for rows, path in zip(maps, shards.paths):
            check_finite(rows, path)
        self.device, self.starts = device, shards.file_starts
        with warnings.catch_warnings():
            # torch warns, because it cannot make a read-only tensor. Nothing writes to these.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.parts = [torch.from_numpy(rows) for rows in maps]
        size = sum(part.nbytes for part in self.parts)
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] // 2:
            count, dtype = int(self.starts[-1]), self.parts[0].dtype
            whole = torch.empty(count, *shards.shape, dtype=dtype, device=device)
            for part, start in zip(self.parts, self.starts):
                whole[int(start) : int(start) + len(part)] = part
            self.parts, self.starts = [whole], shards.file_starts[[0, -1]]

    def gather(self, rows: np.ndarray) -> Tensor:
        """(n,) int64 flat indices -> (n, C, h, w) on the device, as stored."""
        if len(self.parts) == 1:
            found = self.parts[0][to_device(rows, self.parts[0].device)]
        else:
            at = torch.from_numpy(rows)
            owner = np.searchsorted(self.starts, rows, side="right") - 1
            found = torch.empty(len(rows), *self.parts[0].shape[1:], dtype=self.parts[0].dtype)
            for k in np.unique(owner):
                mine = torch.from_numpy(np.flatnonzero(owner == k))
                found[mine] = self.parts[k][at[mine] - int(self.starts[k])]
        return to_device(found, self.device)


def check_finite(latents: np.ndarray, path: Path) -> None:
    """Raise UserError if a value is infinite or NaN."""
    for start in range(0, len(latents), 4096):
        if not np.isfinite(latents[start : start + 4096]).all():
            raise UserError(
                f"{path}: latents that are not finite, from frame {start} on; check the weights of "
                "the autoencoder, and delete the file to encode its frames again"
            )


def gather_batch(store: LatentStore, at: FrameIndices) -> Batch:
    """Gather the latents of a batch, not normalised, in one call. at: flat indices."""
    b = len(at.target)
    x = store.gather(np.concatenate([at.target, at.reference, at.contexts.ravel()])).float()
    contexts = x[2 * b :].unflatten(0, at.contexts.shape)
    gaps = to_device(at.gaps.astype(np.float32), store.device)
    return Batch(x[:b], x[b : 2 * b], contexts, gaps)


class LatentTriples:
    """Batches gathered from cached latents, not normalised."""

    def __init__(
        self,
        config: Config,
        dir: Path,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        fixed: Windows | None = None,
    ):
        self.shards = Shards(dir, "latents")
        self.store = LatentStore(self.shards, device)
        self.config, self.device = config, device
        self.rank, self.world, self.fixed = rank, world, fixed
        check_long_enough(self.shards, config.data.clip, config.data.skip, "data.clip")

    def frames(self, k: int, whole: bool = False) -> FrameIndices:
        """Frame numbers of batch k: this process's share, or the whole batch."""
        rank, world = (0, 1) if whole else (self.rank, self.world)
        return draw_batch(self.config, self.shards.lengths, k, rank, world, self.fixed)

    def batch(self, k: int, whole: bool = False) -> Batch:
        at = self.frames(k, whole)
        # From frame numbers within videos to flat indices within the split.
        first = self.shards.starts[at.video]
        flat = at._replace(
            target=first + at.target,
            reference=first + at.reference,
            contexts=first[:, None] + at.contexts,
        )
        return gather_batch(self.store, flat)

    def earlier(self, k: int) -> Earlier:
        """The frames up to the references of every n-th item of batch k, n = train.own. Items with
        too few frames before them are left out."""
        config, at = self.config, self.frames(k)
        stride = config.data.skip + 1
        # Enough frames to forecast train.own_steps of them with all contexts.
        depth = lookback(config.data.context, config.data.contexts) + config.train.own_steps
        back = np.arange(depth, -1, -1) * stride
        # Counted over the whole batch, so that the number of processes changes nothing.
        first = share(config.train.batch_size, self.rank, self.world).start
        chosen = (np.arange(len(at.video)) + first) % config.train.own == 0
        rows = np.flatnonzero(chosen & (at.reference >= back[0]))
        flat = (self.shards.starts[at.video] + at.reference)[rows, None] - back
        frames = self.store.gather(flat.ravel()).float().unflatten(0, flat.shape)
        return Earlier(to_device(rows, self.device), frames)

    def later(self, k: int) -> Later:
        """The flow.unroll - 1 frames after the targets of batch k, not normalised."""
        config, at = self.config, self.frames(k)
        ahead = (1 + np.arange(config.flow.unroll - 1)) * (config.data.skip + 1)
        frames = at.target[:, None] + ahead
        last = self.shards.lengths[at.video][:, None] - 1
        flat = self.shards.starts[at.video][:, None] + np.minimum(frames, last)
        found = self.store.gather(flat.ravel()).float().unflatten(0, flat.shape)
        return Later(found, to_device((frames <= last).astype(np.float32), self.device))

    def batches(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        """Batches start..stop-1: this process's share of each, or the whole batch."""
        return (self.batch(k, whole) for k in range(start, stop))
