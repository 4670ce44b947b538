"""Latents: encode each frame once, cache the latents, gather batches from them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from runtime.process import numpy_generator, to_device
from shards import Shards, write_packed

# Limits of the block of frames that is read at once for encoding.
BLOCK_FRAMES = 2048
BLOCK_BYTES = 64 << 20
# data.flips: further copies of the frames (n, C, H, W), as the axes along which each is flipped.
MIRRORS = {"": [], "h": [(-1,)], "v": [(-2,)], "hv": [(-1,), (-2,), (-2, -1)]}
# What to say of values that are not finite.
LATENT_ADVICE = (
    "latents that are not finite, from frame {start} on; check the weights of the autoencoder, and "
    "delete the file to encode its frames again"
)
FIELD_ADVICE = (
    "fields that are not finite, from frame {start} on; prepare them again without NaN and infinity"
)


# -------------------------------------------------------------------- mirror images
def draw_copies(config: Config, k: int) -> np.ndarray:
    """Draw for the items of batch k, of all processes, which copy of the split each is from, (B,):
    0 is the split itself, the others are those of MIRRORS."""
    count = 1 + len(MIRRORS[config.data.flips])
    rng = numpy_generator(config.train.seed, "copy", k)
    return rng.integers(count, size=config.train.batch_size)


def flip_frames(frames: np.ndarray, flips: str, copy: int) -> np.ndarray:
    """Copy number `copy`, see draw_copies, of frames (…, H, W, 3)."""
    if copy == 0:
        return frames
    # The axes are those of (n, 3, H, W).
    return np.flip(frames, [axis - 1 for axis in MIRRORS[flips][copy - 1]])


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
    """Encode frames (n, H, W, 3) uint8, or fields (n, C, H, W), -> (n, C, h, w) float16 on the
    device, asynchronously.

    Stored latents are only cast to float16: their `encode` is the identity.
    """
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
    """Encode frames (n, H, W, 3) uint8, or fields (n, C, H, W), -> (n, C, h, w) float16. Stored
    latents are only cast."""
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


class StoredRows:
    """The fields of one shard, read from the file when they are gathered.

    ShardWriter stores them in chunks, which cannot be memory-mapped as one array.
    """

    device = torch.device("cpu")

    def __init__(self, shards: Shards, k: int):
        self.shards, self.k = shards, k
        self.shape = (int(shards.files[k].lengths.sum()), *shards.shape)
        self.dtype = torch.float32
        self.nbytes = int(np.prod(self.shape)) * 4

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.shards.read_file(self.k, rows)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows, a few at a time: (first row, rows)."""
        for rows in block_rows(len(self), self.shape[1:], np.dtype(np.float32)):
            yield int(rows[0]), self.read(rows)


def take(part: Tensor | StoredRows, rows: np.ndarray) -> Tensor:
    """Rows of a tensor, on its device, or of a file."""
    if isinstance(part, StoredRows):
        return torch.from_numpy(part.read(rows))
    return part[to_device(rows, part.device)]


class LatentStore:
    """All latents of a split, gathered by flat index; or all fields, which are their own latents.

    They are stored on the GPU if they fit into half of its free memory. Otherwise the files of
    latents are memory-mapped, and all processes share the operating system's cache of them, and
    rows of fields are read from their files. Values that are not finite raise a UserError that
    names the file.

    mirrored: further copies of the split, see data.flips. Their flat indices follow those of the
    split.
    """

    def __init__(self, shards: Shards, device: torch.device, mirrored: Sequence[Shards] = ()):
        self.device, self.starts = device, shards.file_starts
        for copy in mirrored:
            self.starts = np.append(self.starts, self.starts[-1] + copy.file_starts[1:])
        if shards.key == "fields":
            self.parts = [StoredRows(shards, k) for k in range(len(shards.paths))]
            for part, path in zip(self.parts, shards.paths):
                for start, rows in part.blocks():
                    check_finite(rows, path, start, FIELD_ADVICE)
        else:
            self.parts = []
            for copy in (shards, *mirrored):
                self.parts += map_latents(copy)
        size = sum(part.nbytes for part in self.parts)
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] // 2:
            count, dtype = int(self.starts[-1]), self.parts[0].dtype
            whole = torch.empty(count, *shards.shape, dtype=dtype, device=device)
            for part, start in zip(self.parts, self.starts):
                first = int(start)
                if isinstance(part, StoredRows):
                    for row, rows in part.blocks():
                        whole[first + row : first + row + len(rows)] = torch.from_numpy(rows)
                else:
                    whole[first : first + len(part)] = part
            self.parts, self.starts = [whole], self.starts[[0, -1]]

    def gather(self, rows: np.ndarray) -> Tensor:
        """(n,) int64 flat indices -> (n, C, h, w) on the device, as stored."""
        if len(self.parts) == 1:
            found = take(self.parts[0], rows)
        else:
            owner = np.searchsorted(self.starts, rows, side="right") - 1
            found = torch.empty(len(rows), *self.parts[0].shape[1:], dtype=self.parts[0].dtype)
            for k in np.unique(owner):
                mine = np.flatnonzero(owner == k)
                found[torch.from_numpy(mine)] = take(self.parts[k], rows[mine] - self.starts[k])
        return to_device(found, self.device)


def map_latents(shards: Shards) -> list[Tensor]:
    """The latents of each file of a split, memory-mapped."""
    maps = [shards.map_file(k) for k in range(len(shards.paths))]
    for rows, path in zip(maps, shards.paths):
        check_finite(rows, path)
    with warnings.catch_warnings():
        # torch warns, because it cannot make a read-only tensor. Nothing writes to these.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return [torch.from_numpy(rows) for rows in maps]


def check_finite(
    latents: np.ndarray, path: Path, first: int = 0, advice: str = LATENT_ADVICE
) -> None:
    """Raise UserError if a value is infinite or NaN. first: number of the first row in its file.
    advice: the end of the message, see LATENT_ADVICE."""
    for start in range(0, len(latents), 4096):
        if not np.isfinite(latents[start : start + 4096]).all():
            raise UserError(f"{path}: {advice.format(start=first + start)}")


def gather_batch(store: LatentStore, at: FrameIndices) -> Batch:
    """Gather the latents of a batch, not normalised, in one call. at: flat indices."""
    b = len(at.target)
    x = store.gather(np.concatenate([at.target, at.reference, at.contexts.ravel()])).float()
    contexts = x[2 * b :].unflatten(0, at.contexts.shape)
    gaps = to_device(at.gaps.astype(np.float32), store.device)
    return Batch(x[:b], x[b : 2 * b], contexts, gaps)


def open_latents(config: Config, dir: Path) -> Shards:
    """Open the shards that batches are gathered from: cached latents, or fields as stored."""
    if config.vqvae.kind == "none":
        return Shards(dir, "fields", config.data.skip_bad)
    return Shards(dir, "latents")


class LatentTriples:
    """Batches gathered from cached latents, not normalised.

    mirrored: folders of the latents of mirror images. Each item is drawn from a random copy.
    """

    def __init__(
        self,
        config: Config,
        dir: Path,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        fixed: Windows | None = None,
        mirrored: Sequence[Path] = (),
    ):
        self.shards = open_latents(config, dir)
        self.copies = 1 + len(mirrored)
        copies = [open_latents(config, copy) for copy in mirrored]
        self.store = LatentStore(self.shards, device, copies)
        self.config, self.device = config, device
        self.rank, self.world, self.fixed = rank, world, fixed
        check_long_enough(self.shards, config.data.clip, config.data.skip, "data.clip")

    def frames(self, k: int, whole: bool = False) -> FrameIndices:
        """Frame numbers of batch k: this process's share, or the whole batch."""
        rank, world = (0, 1) if whole else (self.rank, self.world)
        return draw_batch(self.config, self.shards.lengths, k, rank, world, self.fixed)

    def first_rows(self, k: int, at: FrameIndices, whole: bool = False) -> np.ndarray:
        """Flat index of the first frame of the video of each item, in a random copy, (B,)."""
        first = self.shards.starts[at.video]
        if self.copies > 1:
            copy = draw_copies(self.config, k)
            if not whole:
                copy = copy[share(self.config.train.batch_size, self.rank, self.world)]
            first = first + copy * self.shards.lengths.sum()
        return first

    def batch(self, k: int, whole: bool = False) -> Batch:
        at = self.frames(k, whole)
        # From frame numbers within videos to flat indices within the store.
        first = self.first_rows(k, at, whole)
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
        flat = (self.first_rows(k, at) + at.reference)[rows, None] - back
        frames = self.store.gather(flat.ravel()).float().unflatten(0, flat.shape)
        return Earlier(to_device(rows, self.device), frames)

    def later(self, k: int) -> Later:
        """The flow.unroll - 1 frames after the targets of batch k, not normalised."""
        config, at = self.config, self.frames(k)
        ahead = (1 + np.arange(config.flow.unroll - 1)) * (config.data.skip + 1)
        frames = at.target[:, None] + ahead
        last = self.shards.lengths[at.video][:, None] - 1
        flat = self.first_rows(k, at)[:, None] + np.minimum(frames, last)
        found = self.store.gather(flat.ravel()).float().unflatten(0, flat.shape)
        return Later(found, to_device((frames <= last).astype(np.float32), self.device))

    def batches(self, start: int, stop: int, whole: bool = False) -> Iterator[Batch]:
        """Batches start..stop-1: this process's share of each, or the whole batch."""
        return (self.batch(k, whole) for k in range(start, stop))
