"""The HDF5 shard format: a reader, `Shards`, and writers, `ShardWriter` and `write_packed`.

A split is a directory of `shard_0001.hdf5`, `shard_0002.hdf5`, … in one of two layouts:

* packed, the layout that we write: `frames` (N, H, W, 3) uint8, all videos concatenated, and
  `lengths` (videos,) int64. A video may continue in the next shard, which then has the attribute
  `continues`; a stream of any length is stored in this way. Latent shards hold `latents`
  (N, C, h, w) in place of `frames`, and field shards `fields` (N, C, H, W) float32, with any
  number of channels, whose names the attribute `channels` lists. Other per-frame arrays, such as
  ball positions, are stored in the group `extra`. The attribute `fps` is the frame rate of the
  first video, 0 if unknown. A shard whose videos have several rates also holds `rates` (videos,)
  float64, frames per second.
* RIVER's, written only by `python -m prepare.repack`: `len/<i>` holds the length of video i, and
  the group `<i>` holds one HxWx3 dataset per frame. The attribute `fps` of a group is the rate of
  this video, where it differs from the attribute `fps` of the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np

from runtime.console import UserError, first_line, print_once, printable
from runtime.folders import report_no_locks, write_atomically

FORMAT_VERSION = 1
RESERVE = 4 << 20  # bytes of disk space kept free, so that HDF5 can close a file
PATTERN = "shard_*.hdf5"
# What a shard may hold: RGB frames, latents of an autoencoder, or fields of any channels.
KEYS = ("frames", "latents", "fields")
# Exceptions that h5py raises for damaged files.
DAMAGED = (
    OSError,
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


# ----------------------------------------------------------------------------------------- one file
class PackedFile:
    """One shard of the packed layout, addressed by flat frame index."""

    def __init__(self, file: h5py.File, path: Path, key: str):
        if key not in file or "lengths" not in file:
            raise UserError(
                f"{path}: holds neither `{key}` with `lengths` (packed) nor `len` (RIVER); "
                "prepare it again"
            )
        self.file = file
        self.path = path
        self.data = check_dataset(file[key], file)
        self.rows: dict[str, Rows] = {}
        self.lengths = check_dataset(file["lengths"], file)[:].astype(np.int64)
        self.continues = bool(file.attrs.get("continues", False))
        self.fps = float(file.attrs.get("fps", 0)) or None
        # In `rates`, 0 is an unknown rate.
        self.rates = np.full(len(self.lengths), self.fps or 0.0)
        if "rates" in file:
            self.rates = check_dataset(file["rates"], file)[:].astype(np.float64)
        self.shape = self.data.shape[1:]
        self.dtype = self.data.dtype
        if self.lengths.sum() != len(self.data):
            raise UserError(
                f"{path}: `lengths` add up to {self.lengths.sum()} frames but `{key}` holds "
                f"{len(self.data)}; prepare it again"
            )
        if self.rates.shape != self.lengths.shape:
            raise UserError(
                f"{path}: `rates` {self.rates.shape} beside `lengths` {self.lengths.shape}; "
                "prepare it again"
            )

    def read(self, flat: np.ndarray) -> np.ndarray:
        return self._rows(self.data).read(flat)

    def read_extra(self, name: str, flat: np.ndarray) -> np.ndarray:
        return self._rows(check_dataset(self.file["extra"][name], self.file)).read(flat)

    def _rows(self, data: h5py.Dataset) -> Rows:
        if data.name not in self.rows:
            self.rows[data.name] = Rows(data, self.path)
        return self.rows[data.name]


def find_key(file: h5py.File) -> str:
    """Which of KEYS a shard of either layout holds; "" if none."""
    if "len" in file:
        return "frames"
    return next((key for key in KEYS if key in file), "")


class RiverFile:
    """One shard of RIVER's layout (one dataset per frame), addressed by flat frame index."""

    continues = False

    def __init__(self, file: h5py.File, path: Path):
        self.file = file
        self.fps = float(file.attrs.get("fps", 0)) or None
        lengths = {}
        for name in sorted(file["len"], key=int):
            lengths[name] = int(check_dataset(file["len"][name], file)[()])
        # RIVER's converter also writes empty videos, and shards without any video.
        self.names = [name for name, length in lengths.items() if length]
        self.lengths = np.array([lengths[name] for name in self.names], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.rates = np.full(len(self.names), self.fps or 0.0)
        for k, (name, length) in enumerate(zip(self.names, self.lengths)):
            # Raises KeyError if the last frame of the video is missing.
            file[name][str(length - 1)]
            self.rates[k] = file[name].attrs.get("fps", self.rates[k])
        self.shape = None
        self.dtype = None
        if self.names:
            first = check_dataset(file[self.names[0]]["0"], file)
            self.shape = first.shape
            self.dtype = first.dtype

    def read(self, flat: np.ndarray) -> np.ndarray:
        videos = np.searchsorted(self.starts, flat, side="right") - 1
        frames = []
        for v, i in zip(videos, flat):
            frame = self.file[self.names[v]][str(i - self.starts[v])]
            frames.append(check_dataset(frame, self.file)[()])
        return np.stack(frames)


def check_dataset(data: h5py.Dataset, file: h5py.File) -> h5py.Dataset:
    """Check a dataset of an untrusted file and return it.

    Raises ValueError if the data are stored outside `file`, so that no shard gives access to other
    files, or if the declared size exceeds what the file can hold, so that none fills the memory.
    """
    if data.file.filename != file.filename or data.external or data.is_virtual:
        raise ValueError(f"{data.name} links to another file")
    # Deflate compresses by a factor of about 1,000 at most.
    if data.nbytes > 1100 * data.id.get_storage_size() + (1 << 20):
        raise ValueError(
            f"{data.name} declares {data.nbytes:,} bytes, "
            "of which the file cannot hold a thousandth"
        )
    return data


class Rows:
    """Reads rows of a dataset in any order, with repeats.

    Scattered rows are read directly from the file at their byte offsets, because a selection in
    HDF5 takes milliseconds. HDF5 reads contiguous ranges, and rows without byte offsets.
    """

    def __init__(self, data: h5py.Dataset, path: Path):
        self.data = data
        self.offsets = offsets(data)
        self.raw = open(path, "rb", buffering=0) if self.offsets is not None else None

    def read(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) and (np.diff(rows) == 1).all():
            return self.data[rows[0] : rows[-1] + 1]
        if self.raw is None or not len(rows):
            # HDF5 takes increasing indices without repeats only.
            unique, inverse = np.unique(rows, return_inverse=True)
            return self.data[unique][inverse]
        out = np.empty((len(rows), *self.data.shape[1:]), self.data.dtype)
        as_bytes = out.reshape(len(rows), out[0].size).view(np.uint8)
        for row, offset in zip(as_bytes, self.offsets[rows]):
            self.raw.seek(offset)
            if self.raw.readinto(row) != row.nbytes:
                raise OSError(f"the file ends before byte {offset + row.nbytes}")
        return out


def offsets(data: h5py.Dataset) -> np.ndarray | None:
    """Byte offset of each row of a dataset in its file, (rows,).

    None if the bytes in the file differ from the array's (compression, byte order, a user block),
    if rows are split over chunks, or if nothing is stored.
    """
    filters = data.id.get_create_plist().get_nfilters()
    if filters or not data.dtype.isnative or data.file.userblock_size:
        return None
    size = data.dtype.itemsize * int(np.prod(data.shape[1:]))
    if data.chunks is None:
        start = data.id.get_offset()
        return None if start is None else start + size * np.arange(len(data))
    # A chunk holds `chunk_rows` rows. Its offset stays -1 if it is not stored.
    chunk_rows = data.chunks[0]
    starts = np.full(-(-len(data) // chunk_rows), -1)

    def record(chunk) -> None:
        starts[chunk.chunk_offset[0] // chunk_rows] = chunk.byte_offset

    data.id.chunk_iter(record)
    if data.chunks[1:] != data.shape[1:] or (starts < 0).any():
        return None
    rows = np.arange(len(data))
    return starts[rows // chunk_rows] + size * (rows % chunk_rows)


# ---------------------------------------------------------------------------------------- one split
class Shards:
    """The videos of one split directory.

    lengths: (videos,) int64, frames per video. rates: (videos,) float64, frames per second of each
    video, NaN where unknown. fps: frames per second of the first video, or None. shape, dtype: of
    one frame, (H, W, 3) uint8, or (C, h, w) for `key="latents"`, or (C, H, W) float32 for
    `key="fields"`. channels: names of the channels of fields; () if unknown.

    key: what the shards must hold, one of KEYS; "": what the first one holds, which `key` then
    names.

    A file that cannot be read raises a UserError that names it. skip_bad: warn and skip a file that
    cannot be opened; a video that continues after the skipped file becomes a new video.
    """

    def __init__(self, dir: str | Path, key: str = "", skip_bad: bool = False):
        self.dir = Path(dir)
        self.key = key
        self.paths = sorted(self.dir.glob(PATTERN))
        if not self.paths:
            raise UserError(f"no shards: {self.dir / PATTERN} matches no file")
        if skip_bad:
            self.paths = [path for path in self.paths if self._can_open(path)]
            if not self.paths:
                raise UserError(f"no shards: none of {self.dir / PATTERN} can be read")
        self._files: list[PackedFile | RiverFile] | None = None
        self._pid = -1
        self.lengths, self.rates = self._join_videos()
        # The flat index of the first frame of each video, and of each file.
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.file_starts = np.concatenate([[0], np.cumsum([f.lengths.sum() for f in self.files])])
        first = next(file for file in self.files if len(file.lengths))
        self.shape = tuple(first.shape)
        self.dtype = first.dtype
        self.fps = first.fps
        self.channels = tuple(map(str, first.file.attrs.get("channels", ())))

    def _join_videos(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths and rates of all videos. A video that spans several files counts as one."""
        full = [k for k, file in enumerate(self.files) if len(file.lengths)]
        if not full:
            raise UserError(f"{self.dir}: not one video in its shards; prepare it again")
        shape = self.files[full[0]].shape
        lengths: list[int] = []
        rates: list[float] = []
        for k in full:
            file = self.files[k]
            if file.shape != shape:
                raise UserError(
                    f"{self.paths[k]}: frames of {file.shape}, but {self.paths[full[0]].name} "
                    f"has {shape}; a split has one resolution"
                )
            # The file's first video may be the rest of the last video so far.
            first = int(self.continues(k) and bool(lengths))
            if first:
                lengths[-1] += int(file.lengths[0])
            lengths.extend(file.lengths[first:].tolist())
            rates.extend(file.rates[first:].tolist())
        if min(lengths) < 1:
            raise UserError(f"{self.dir}: an empty video in its shards; prepare it again")
        known = np.array(rates, np.float64)
        known[~(np.isfinite(known) & (known > 0))] = np.nan
        return np.array(lengths, np.int64), known

    def continues(self, k: int) -> bool:
        """True if file k starts inside a video whose preceding frames are in file k - 1.

        False if the file with the preceding number is missing.
        """
        if k == 0 or not self.files[k].continues:
            return False
        return shard_number(self.paths[k]) == shard_number(self.paths[k - 1]) + 1

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def files(self) -> list[PackedFile | RiverFile]:
        """The open files. A worker process opens them again: HDF5 handles do not survive a fork."""
        if self._files is None or self._pid != os.getpid():
            self._files = [self._open(path) for path in self.paths]
            self._pid = os.getpid()
        return self._files

    def _can_open(self, path: Path) -> bool:
        try:
            self._open(path)
        except UserError as error:
            warnings.warn(f"{error}; left out", stacklevel=3)
            return False
        return True

    def _open(self, path: Path) -> PackedFile | RiverFile:
        try:
            file = open_to_read(path)
        except OSError as error:
            raise UserError(f"{path}: {explain_open_error(error)}") from None
        try:
            self.key = self.key or find_key(file)
            if "len" in file:
                opened = RiverFile(file, path)
            else:
                opened = PackedFile(file, path, self.key or "frames")
        except DAMAGED as error:
            raise UserError(
                f"{path}: not a whole shard ({first_line(error)}); prepare it again"
            ) from None
        if self.key == "frames" and len(opened.lengths):
            if (opened.dtype, *opened.shape[2:]) != (np.uint8, 3):
                raise UserError(
                    f"{path}: frames of {opened.shape} {opened.dtype}, "
                    "not (height, width, 3) uint8; prepare it again"
                )
        if self.key == "fields" and (opened.dtype != np.float32 or len(opened.shape) != 3):
            raise UserError(
                f"{path}: fields of {opened.shape} {opened.dtype}, "
                "not (channels, height, width) float32; prepare it again"
            )
        return opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": None, "_pid": -1}

    def _flat(self, video: int, frames: np.ndarray | slice) -> np.ndarray:
        """Flat indices, among the frames of all videos, of frames of one video."""
        length = self.lengths[video]
        if isinstance(frames, slice):
            local = np.arange(length)[frames]
        else:
            local = np.asarray(frames, np.int64)
        if len(local) and (local.min() < 0 or local.max() >= length):
            raise IndexError(
                f"{self.dir}[{video}]: frames {local.min()}..{local.max()} of a video of {length}"
            )
        return self.starts[video] + local

    def read(self, video: int, frames: np.ndarray | slice) -> np.ndarray:
        """Read frames of one video, in the given order: (n, H, W, 3) uint8, latents (n, C, h, w),
        or fields (n, C, H, W) float32."""
        return self._gather(self._flat(video, frames))

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Read frames by their index in the concatenation of all videos."""
        if len(rows) and (rows.min() < 0 or rows.max() >= self.starts[-1]):
            raise IndexError(f"{self.dir}: frames {rows.min()}..{rows.max()} of {self.starts[-1]}")
        return self._gather(np.asarray(rows, np.int64))

    def read_extra(self, name: str, video: int, frames: np.ndarray | slice) -> np.ndarray:
        """Read rows of a per-frame array of the group `extra`, e.g. `positions` (n, balls, 2)."""
        return self._gather(self._flat(video, frames), name)

    def _gather(self, flat: np.ndarray, extra: str = "") -> np.ndarray:
        owner = np.searchsorted(self.file_starts, flat, side="right") - 1
        files = np.unique(owner)
        if len(files) == 1:
            return self.read_file(files[0], flat - self.file_starts[files[0]], extra)
        # Read each file once, then put its frames at their places in the requested order.
        masks = [owner == k for k in files]
        pieces = []
        for k, mask in zip(files, masks):
            pieces.append(self.read_file(k, flat[mask] - self.file_starts[k], extra))
        out = np.empty((len(flat), *pieces[0].shape[1:]), pieces[0].dtype)
        for mask, piece in zip(masks, pieces):
            out[mask] = piece
        return out

    def read_file(self, k: int, rows: np.ndarray, extra: str = "") -> np.ndarray:
        """Read frames `rows` of file k, counted from its first, or those rows of an extra array."""
        try:
            return self.files[k].read_extra(extra, rows) if extra else self.files[k].read(rows)
        except DAMAGED as error:
            what = f"{extra or 'frames'} cannot be read ({first_line(error)})"
            raise UserError(f"{self.paths[k]}: damaged, {what}; prepare it again") from None

    def map_file(self, k: int) -> np.ndarray:
        """All frames of file k as a read-only memory map.

        An array in memory if the file cannot be mapped: chunked, compressed, empty, or RIVER's.
        """
        file = self.files[k]
        start = None
        if isinstance(file, PackedFile) and offsets(file.data) is not None:
            start = file.data.id.get_offset()
        if start is None:
            return self.read_file(k, np.arange(int(file.lengths.sum())))
        return np.memmap(self.paths[k], file.dtype, "r", start, file.data.shape)

    def path_of(self, video: int, frame: int) -> Path:
        """The path of the file that holds a frame."""
        flat = self.starts[video] + frame
        return self.paths[np.searchsorted(self.file_starts, flat, side="right") - 1]

    def fingerprint(self) -> str:
        """A hash of the file names and contents, 32 hexadecimal digits.

        The contents enter as the digest that ShardWriter stored, or as size and modification time
        of files without one.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path, file in zip(self.paths, self.files):
            stored = file.file.attrs.get("digest")
            stat = path.stat()
            digest.update(f"{path.name} {stored or (stat.st_size, stat.st_mtime_ns)}".encode())
        return digest.hexdigest()


def open_to_read(path: Path) -> h5py.File:
    """Open an HDF5 file; without a lock if another process holds one or the file system has none.

    HDF5's default comes first, because one process cannot open a file both with and without.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "lock" not in str(error):
            raise
        file = h5py.File(path, "r", locking=False)
        if isinstance(error, BlockingIOError):
            print_once(f"{path}: another process has locked the file; reading it without a lock")
        elif "unable to lock" in str(error):
            report_no_locks(path.parent, error)
        return file


def explain_open_error(error: OSError) -> str:
    """Why HDF5 cannot open a file, and what to do."""
    line = first_line(error)
    if "unable to lock" in line:
        # The environment variable overrides the argument `locking` of h5py.
        return f"locked by another process ({line}); unset HDF5_USE_FILE_LOCKING to read it"
    if "already open for" in line:
        return (
            f"another process is writing the file, or was killed while writing it ({line}); wait "
            "for that process, or prepare the file again"
        )
    return f"not a readable HDF5 file ({line}); prepare it again"


def shard_number(path: Path) -> int:
    """The number in the name of a shard, 0 if there is none."""
    return int("".join(filter(str.isdigit, path.stem)) or 0)


# ------------------------------------------------------------------------------------------ writing
def check_space(path: Path, size: int) -> None:
    """Raise OSError (ENOSPC) if the disk has no room for `size` more bytes.

    Called before HDF5 writes, because HDF5 crashes when the disk is full.
    """
    if shutil.disk_usage(path.parent).free < size + RESERVE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class ShardWriter:
    """Writes packed shards. `add` stores a video; `append` adds frames to the last video.

    frames: (n, H, W, 3) uint8, or (n, C, h, w) float16 or float32 for `key="latents"`, or
    (n, C, H, W) float32 for `key="fields"`. Keyword arrays with the same n are stored in the group
    `extra`. A video may extend over several shards. Each file is written atomically; an error
    inside the `with` block removes the incomplete file.

    fps: frame rate of videos whose rate `add` does not state; None if unknown. shard_bytes: size of
    frames at which the next shard starts. continues: the first call may be `append`, to continue
    the last video of a shard from another writer. channels: names of the channels of fields.
    Raises UserError if the directory already holds shards.
    """

    def __init__(
        self,
        dir: str | Path,
        key: str = "frames",
        fps: float | None = None,
        source: str = "",
        command: str = "",
        shard_bytes: int = 1 << 28,
        continues: bool = False,
        channels: Sequence[str] = (),
    ):
        if key not in KEYS:
            raise ValueError(f"key must be one of {', '.join(KEYS)}, got {key!r}")
        self.dir = Path(dir)
        self.key = key
        self.shard_bytes = shard_bytes
        self.continues = continues
        self.attrs = {
            "format_version": FORMAT_VERSION,
            "fps": fps or 0.0,
            "source": printable(source),
            "command": printable(command),
        }
        if channels:
            self.attrs["channels"] = [printable(name) for name in channels]
        # The rate of the last video; 0 if unknown.
        self._rate = fps or 0.0
        self.dir.mkdir(parents=True, exist_ok=True)
        if any(self.dir.glob(PATTERN)):
            raise UserError(f"{self.dir} already holds shards; remove it or choose another folder")
        for stale in self.dir.glob(".*.tmp"):
            stale.unlink()
        self.index = 0
        self.videos = 0
        self.frames = 0
        # The open shard, and the atomic write of its file.
        self._file: h5py.File | None = None
        self._writing = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error=None, trace=None) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._writing.__exit__(kind, error or kind(), trace)

    def add(self, video: np.ndarray, rate: float | None = None, **extra: np.ndarray) -> None:
        """Store a video, or the first frames of a video that `append` continues.

        rate: frames per second of this video, 0 or NaN if unknown; by default the writer's fps.
        """
        rate = self.attrs["fps"] if rate is None else rate
        self._rate = rate if rate > 0 else 0.0
        self._write(video, extra, new=True)
        self.videos += 1

    def append(self, frames: np.ndarray, **extra: np.ndarray) -> None:
        """Store more frames of the last video."""
        if not (self.videos or self.continues):
            raise ValueError("append needs a video to continue: call add first")
        self._write(frames, extra, new=False)

    def _write(self, frames: np.ndarray, extra: dict, new: bool) -> None:
        if len(frames) == 0:
            raise ValueError("an empty video")
        arrays = {self.key: frames, **{f"extra/{name}": value for name, value in extra.items()}}
        if self._file is not None and self._bytes >= self.shard_bytes:
            self._finish()
        # All arrays are checked before any is written.
        for name, array in arrays.items():
            self._check(name, array, len(frames))
        if self._file is None:
            self._start(arrays, continues=not new)
        elif new:
            self._lengths.append(0)
            self._rates.append(self._rate)
        self._reserve(sum(array.nbytes for array in arrays.values()))
        for name, array in arrays.items():
            data = self._file[name]
            array = np.ascontiguousarray(array)
            data.resize(len(data) + len(array), axis=0)
            data[-len(array) :] = array
            self._digest.update(array)
        self._lengths[-1] += len(frames)
        self._bytes += frames.nbytes
        self.frames += len(frames)

    def _check(self, name: str, array: np.ndarray, count: int) -> None:
        if len(array) != count:
            raise ValueError(f"{name}: {len(array)} rows beside {count} frames")
        if name == "fields" and (array.dtype != np.float32 or array.ndim != 4):
            raise ValueError(
                f"fields must be (n, channels, height, width) float32, got {array.shape} "
                f"{array.dtype}"
            )
        if self._file is None:
            return
        if name not in self._file or array.shape[1:] != self._file[name].shape[1:]:
            raise ValueError(f"{name}: rows of {array.shape[1:]} are not what this shard holds")

    def _start(self, arrays: dict[str, np.ndarray], continues: bool) -> None:
        self.index += 1
        path = self.dir / f"shard_{self.index:04d}.hdf5"
        self._temporary = Path(self._writing.enter_context(write_atomically(path)).name)
        self._file = h5py.File(self._temporary, "w", locking=False)
        for name, array in arrays.items():
            row = array.dtype.itemsize * int(np.prod(array.shape[1:]))
            # HDF5 can extend a dataset only if it is chunked.
            self._file.create_dataset(
                name,
                (0, *array.shape[1:]),
                array.dtype,
                maxshape=(None, *array.shape[1:]),
                chunks=(max(1, (1 << 16) // row), *array.shape[1:]),
            )
        self._file.attrs.update({**self.attrs, "fps": self._rate}, continues=continues)
        self._lengths = [0]
        self._rates = [self._rate]
        self._bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._claimed = 0
        self._reserved = 0

    def _reserve(self, size: int) -> None:
        """Reserve disk space for `size` more bytes and the overhead of HDF5.

        HDF5 crashes or hangs if the disk is full when it writes.
        """
        self._claimed += size
        # A sixteenth and 1 MiB more, for the overhead of HDF5.
        short = self._claimed + self._claimed // 16 + (1 << 20) - self._reserved
        if short <= 0:
            return
        # At least 4 MiB at a time, so that not every short video needs a reservation.
        step = max(short, 1 << 22)
        check_space(self._temporary, step)
        if hasattr(os, "posix_fallocate"):
            with open(self._temporary, "r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), self._reserved, step)
                except OSError as error:
                    # Some file systems cannot reserve space.
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise OSError(error.errno, error.strerror, str(self.dir)) from None
        self._reserved += step

    def _finish(self) -> None:
        self._digest.update(np.array(self._lengths, np.int64))
        self._file["lengths"] = np.array(self._lengths, np.int64)
        if len(set(self._rates)) > 1:
            self._digest.update(np.array(self._rates))
            self._file["rates"] = np.array(self._rates)
        self._file.attrs["digest"] = self._digest.hexdigest()
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        # Reserved space that HDF5 did not use.
        if self._temporary.stat().st_size > size:
            os.truncate(self._temporary, size)
        self._file = None
        self._writing.close()

    def close(self) -> None:
        if self._file is not None:
            self._finish()


def write_packed(
    path: str | Path, key: str, rows: np.ndarray, lengths: np.ndarray, attrs: dict
) -> None:
    """Write an array as one packed shard, stored contiguously so that it can be memory-mapped."""
    check_space(Path(path), rows.nbytes)
    digest = hashlib.blake2b(np.ascontiguousarray(rows), digest_size=16).hexdigest()
    # Several processes may encode the same file of a latent cache.
    with (
        write_atomically(path, per_process=True) as temporary,
        h5py.File(temporary.name, "w", locking=False) as file,
    ):
        file[key] = rows
        file["lengths"] = np.asarray(lengths, np.int64)
        file.attrs.update(attrs, format_version=FORMAT_VERSION, digest=digest)
