"""The HDF5 shards that every other file reads video from, and the writer that makes them. h5py and numpy only.

A split is a directory of `shard_0001.hdf5`, `shard_0002.hdf5`, … in one of two layouts:

* packed (what we write): `frames` (N, H, W, 3) uint8 with `lengths` (videos,) int64, the videos lying one after
  another. A video may run on into the next shard, which then carries the attribute `continues`; that is how a stream
  of any length is stored. Latent shards hold `latents` (N, C, h, w) instead of `frames`. Further per-frame arrays
  (ball positions, say) lie beside them under `extra/`.
* RIVER's (written by `python -m prepare.repack` only): `len/<i>` holds the length of video i, the group `<i>` one HxWx3
  dataset per frame.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np

from runtime.console import UserError, first_line
from runtime.folders import write_atomically

FORMAT_VERSION = 1
RESERVE = 4 << 20  # bytes that stay free on the disk, so that HDF5 can close a file
PATTERN = "shard_*.hdf5"
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


class PackedFile:
    """One shard of the packed layout, addressed by flat frame index."""

    def __init__(self, file: h5py.File, path: Path, key: str):
        if key not in file or "lengths" not in file:
            raise UserError(
                f"{path}: holds neither `{key}` with `lengths` (packed) nor `len` (RIVER); prepare it again"
            )
        self.file, self.data, self.path, self.rows = file, own(file[key], file), path, {}
        self.lengths = own(file["lengths"], file)[:].astype(np.int64)
        self.continues = bool(file.attrs.get("continues", False))
        self.fps, self.shape, self.dtype = (
            float(file.attrs.get("fps", 0)) or None,
            self.data.shape[1:],
            self.data.dtype,
        )
        if self.lengths.sum() != len(self.data):
            raise UserError(
                f"{path}: `lengths` add up to {self.lengths.sum()} frames but `{key}` holds "
                f"{len(self.data)}; prepare it again"
            )

    def read(self, flat: np.ndarray) -> np.ndarray:
        return self._rows(self.data).read(flat)

    def read_extra(self, name: str, flat: np.ndarray) -> np.ndarray:
        return self._rows(own(self.file["extra"][name], self.file)).read(flat)

    def _rows(self, data: h5py.Dataset) -> Rows:
        if data.name not in self.rows:
            self.rows[data.name] = Rows(data, self.path)
        return self.rows[data.name]


class RiverFile:
    """One shard of RIVER's layout (one dataset per frame), addressed by flat frame index."""

    continues = False

    def __init__(self, file: h5py.File, path: Path):
        self.file, self.fps = file, float(file.attrs.get("fps", 0)) or None
        lengths = {
            name: int(own(file["len"][name], file)[()]) for name in sorted(file["len"], key=int)
        }
        self.names = [
            name for name, length in lengths.items() if length
        ]  # RIVER's converter writes empty ones too, and
        self.lengths = np.array(
            [lengths[name] for name in self.names], np.int64
        )  # shards without a video
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        for name, length in zip(self.names, self.lengths):
            file[name][str(length - 1)]  # a KeyError where a video ends too early
        first = own(file[self.names[0]]["0"], file) if self.names else None
        self.shape, self.dtype = (first.shape, first.dtype) if self.names else (None, None)

    def read(self, flat: np.ndarray) -> np.ndarray:
        videos = np.searchsorted(self.starts, flat, side="right") - 1
        frames = [
            own(self.file[self.names[v]][str(i - self.starts[v])], self.file)
            for v, i in zip(videos, flat)
        ]
        return np.stack([frame[()] for frame in frames])


def own(data: h5py.Dataset, file: h5py.File) -> h5py.Dataset:
    """`data`, if it lies in `file` itself, and is as large as it says: a shard from elsewhere is no way to read other files,
    or to fill the memory. ValueError otherwise."""
    if data.file.filename != file.filename or data.external or data.is_virtual:
        raise ValueError(f"{data.name} links to another file")
    if data.nbytes > 1100 * data.id.get_storage_size() + (
        1 << 20
    ):  # deflate makes at most a thousandth of it
        raise ValueError(
            f"{data.name} declares {data.nbytes:,} bytes, of which the file cannot hold a thousandth"
        )
    return data


class Rows:
    """Rows of a dataset in any order, repeats allowed. Single ones are read past HDF5, whose selections cost milliseconds,
    from where it says they lie; a run of neighbours, and rows that do not lie there plainly, by HDF5."""

    def __init__(self, data: h5py.Dataset, path: Path):
        self.data, self.offsets = data, offsets(data)
        self.raw = open(path, "rb", buffering=0) if self.offsets is not None else None

    def read(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) and (np.diff(rows) == 1).all():
            return self.data[rows[0] : rows[-1] + 1]
        if self.raw is None or not len(rows):
            unique, inverse = np.unique(rows, return_inverse=True)
            return self.data[unique][inverse]
        out = np.empty((len(rows), *self.data.shape[1:]), self.data.dtype)
        for row, offset in zip(
            out.reshape(len(rows), out[0].size).view(np.uint8), self.offsets[rows]
        ):
            self.raw.seek(offset)
            if self.raw.readinto(row) != row.nbytes:
                raise OSError(f"the file ends before byte {offset + row.nbytes}")
        return out


def offsets(data: h5py.Dataset) -> np.ndarray | None:
    """Where in its file each row of a dataset lies, in bytes; None where they lie there in another form."""
    if (
        data.id.get_create_plist().get_nfilters()
        or not data.dtype.isnative
        or data.file.userblock_size
    ):
        return None
    size = data.dtype.itemsize * int(np.prod(data.shape[1:]))
    if data.chunks is None:
        start = data.id.get_offset()
        return None if start is None else start + size * np.arange(len(data))
    starts = np.full(-(-len(data) // data.chunks[0]), -1)
    data.id.chunk_iter(
        lambda chunk: starts.__setitem__(chunk.chunk_offset[0] // data.chunks[0], chunk.byte_offset)
    )
    if data.chunks[1:] != data.shape[1:] or (starts < 0).any():
        return None
    rows = np.arange(len(data))
    return starts[rows // data.chunks[0]] + size * (rows % data.chunks[0])


class Shards:
    """The videos of one split directory.

    lengths: (videos,) int64 frames per video; shape: of one frame, (H, W, 3) or (C, h, w) for `key="latents"`;
    fps: frames per second or None. Raises UserError naming the file for anything that cannot be read; with skip_bad, a
    file that cannot be opened is warned of and left out, and a video that goes on behind it is one of its own.
    """

    def __init__(self, dir: str | Path, key: str = "frames", skip_bad: bool = False):
        self.dir, self.key = Path(dir), key
        self.paths = sorted(self.dir.glob(PATTERN))
        if not self.paths:
            raise UserError(f"no shards: {self.dir / PATTERN} matches no file")
        if skip_bad:
            self.paths = [path for path in self.paths if self._can_open(path)]
            if not self.paths:
                raise UserError(f"no shards: none of {self.dir / PATTERN} can be read")
        self._files: list[PackedFile | RiverFile] | None = None
        self._pid = -1
        full = [k for k, file in enumerate(self.files) if len(file.lengths)]
        if not full:
            raise UserError(f"{self.dir}: not one video in its shards; prepare it again")
        first, lengths = self.files[full[0]], []
        for k in full:
            file, head = self.files[k], self.files[k].lengths
            if file.shape != first.shape:
                raise UserError(
                    f"{self.paths[k]}: frames of {file.shape}, but {self.paths[full[0]].name} has {first.shape}; "
                    "a split has one resolution"
                )
            if self.continues(k) and lengths:
                lengths[-1] += int(head[0])
                head = head[1:]
            lengths.extend(head.tolist())
        if min(lengths) < 1:
            raise UserError(f"{self.dir}: an empty video in its shards; prepare it again")
        self.lengths = np.array(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.file_starts = np.concatenate([[0], np.cumsum([f.lengths.sum() for f in self.files])])
        self.shape, self.fps = tuple(first.shape), first.fps

    def continues(self, k: int) -> bool:
        """Does file k begin with more frames of the last video of the file before it, which is there?"""
        number = lambda path: int("".join(filter(str.isdigit, path.stem)) or 0)  # noqa: E731
        return (
            self.files[k].continues
            and k > 0
            and number(self.paths[k]) == number(self.paths[k - 1]) + 1
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def files(self) -> list[PackedFile | RiverFile]:
        """The open files; opened anew in a worker process, since HDF5 handles do not survive a fork."""
        if self._files is None or self._pid != os.getpid():
            self._files, self._pid = [self._open(path) for path in self.paths], os.getpid()
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
            file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(
                f"{path}: not a readable HDF5 file ({first_line(error)}); prepare it again"
            ) from None
        try:
            opened = RiverFile(file, path) if "len" in file else PackedFile(file, path, self.key)
        except DAMAGED as error:
            raise UserError(
                f"{path}: not a whole shard ({first_line(error)}); prepare it again"
            ) from None
        if (
            self.key == "frames"
            and len(opened.lengths)
            and (opened.dtype, *opened.shape[2:]) != (np.uint8, 3)
        ):
            raise UserError(
                f"{path}: frames of {opened.shape} {opened.dtype}, not (height, width, 3) uint8; prepare it again"
            )
        return opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": None, "_pid": -1}

    def _flat(self, video: int, frames: np.ndarray | slice) -> np.ndarray:
        length = self.lengths[video]
        local = (
            np.arange(length)[frames] if isinstance(frames, slice) else np.asarray(frames, np.int64)
        )
        if len(local) and (local.min() < 0 or local.max() >= length):
            raise IndexError(
                f"{self.dir}[{video}]: frames {local.min()}..{local.max()} of a video of {length}"
            )
        return self.starts[video] + local

    def read(self, video: int, frames: np.ndarray | slice) -> np.ndarray:
        """Frames of one video, in the order given: (n, H, W, 3) uint8, or (n, C, h, w) for latents."""
        return self._gather(self._flat(video, frames))

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Frames by their place among those of all videos laid end to end."""
        if len(rows) and (rows.min() < 0 or rows.max() >= self.starts[-1]):
            raise IndexError(f"{self.dir}: frames {rows.min()}..{rows.max()} of {self.starts[-1]}")
        return self._gather(np.asarray(rows, np.int64))

    def read_extra(self, name: str, video: int, frames: np.ndarray | slice) -> np.ndarray:
        """A per-frame array stored beside the frames, e.g. `positions` (n, balls, 2)."""
        return self._gather(self._flat(video, frames), name)

    def _gather(self, flat: np.ndarray, extra: str = "") -> np.ndarray:
        owner = np.searchsorted(self.file_starts, flat, side="right") - 1
        parts = [(owner == k, k) for k in np.unique(owner)]
        if len(parts) == 1:
            return self.read_file(parts[0][1], flat - self.file_starts[parts[0][1]], extra)
        pieces = [
            (mask, self.read_file(k, flat[mask] - self.file_starts[k], extra)) for mask, k in parts
        ]
        out = np.empty((len(flat), *pieces[0][1].shape[1:]), pieces[0][1].dtype)
        for mask, piece in pieces:
            out[mask] = piece
        return out

    def read_file(self, k: int, rows: np.ndarray, extra: str = "") -> np.ndarray:
        """Frames `rows` of file k, counted from its first, or what lies beside them under that name."""
        try:
            return self.files[k].read_extra(extra, rows) if extra else self.files[k].read(rows)
        except DAMAGED as error:
            what = f"{extra or 'frames'} cannot be read ({first_line(error)})"
            raise UserError(f"{self.paths[k]}: damaged, {what}; prepare it again") from None

    def map_file(self, k: int) -> np.ndarray:
        """All frames of file k as an array that lies on the disk (read-only; in memory where the file is chunked, and cannot
        be mapped)."""
        file = self.files[k]
        start = (
            file.data.id.get_offset()
            if isinstance(file, PackedFile) and offsets(file.data) is not None
            else None
        )
        if start is None:  # chunked, compressed, empty, or RIVER's
            return self.read_file(k, np.arange(int(file.lengths.sum())))
        return np.memmap(self.paths[k], file.dtype, "r", start, file.data.shape)

    def path_of(self, video: int, frame: int) -> Path:
        """The file that holds a frame."""
        return self.paths[
            np.searchsorted(self.file_starts, self.starts[video] + frame, side="right") - 1
        ]

    def fingerprint(self) -> str:
        """A name for the contents: the files' names with the digests stored by ShardWriter, or size and date where foreign."""
        digest = hashlib.blake2b(digest_size=16)
        for path, file in zip(self.paths, self.files):
            stored = file.file.attrs.get("digest")
            stat = path.stat()
            digest.update(f"{path.name} {stored or (stat.st_size, stat.st_mtime_ns)}".encode())
        return digest.hexdigest()


def need_space(path: Path, size: int) -> None:
    """OSError (ENOSPC) where the disk has no room for `size` more bytes. Asked before HDF5 writes: where it finds the disk full
    itself, it crashes."""
    if shutil.disk_usage(path.parent).free < size + RESERVE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class ShardWriter:
    """Writes packed shards. `add` stores a video; `append` goes on with the last one, over as many shards as it takes.

    frames: (n, H, W, 3) uint8, or (n, C, h, w) float16 or float32 for `key="latents"`. Keyword arrays of the same n are
    stored beside them. Each file is written under a temporary name and renamed when it is complete; leaving the `with`
    block by an error removes the incomplete one. continues: `append` may come first, to go on with the last video of a shard
    that another writer makes. Raises UserError where the directory already holds shards.
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
    ):
        self.dir, self.key, self.shard_bytes = Path(dir), key, shard_bytes
        self.attrs = {
            "format_version": FORMAT_VERSION,
            "fps": fps or 0.0,
            "source": source,
            "command": command,
        }
        self.dir.mkdir(parents=True, exist_ok=True)
        if any(self.dir.glob(PATTERN)):
            raise UserError(f"{self.dir} already holds shards; remove it or choose another folder")
        for stale in self.dir.glob(".*.tmp"):
            stale.unlink()
        self.index, self.videos, self.frames, self.continues = 0, 0, 0, continues
        self._file: h5py.File | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._temporary().unlink()

    def add(self, video: np.ndarray, **extra: np.ndarray) -> None:
        """A whole video, or the first frames of one that `append` goes on with."""
        self._write(video, extra, new=True)
        self.videos += 1

    def append(self, frames: np.ndarray, **extra: np.ndarray) -> None:
        """More frames of the video that was added last."""
        if not (self.videos or self.continues):
            raise ValueError("append needs a video to go on with: call add first")
        self._write(frames, extra, new=False)

    def _write(self, frames: np.ndarray, extra: dict, new: bool) -> None:
        if len(frames) == 0:
            raise ValueError("an empty video")
        arrays = {self.key: frames, **{f"extra/{name}": value for name, value in extra.items()}}
        if self._file is not None and self._bytes >= self.shard_bytes:
            self._finish()
        for name, array in arrays.items():  # all checked before any is written
            if len(array) != len(frames):
                raise ValueError(f"{name}: {len(array)} rows beside {len(frames)} frames")
            if self._file is not None and (
                name not in self._file or array.shape[1:] != self._file[name].shape[1:]
            ):
                raise ValueError(f"{name}: rows of {array.shape[1:]} are not what this shard holds")
        if self._file is None:
            self._start(arrays, continues=not new)
        elif new:
            self._lengths.append(0)
        self._reserve(sum(array.nbytes for array in arrays.values()))
        for name, array in arrays.items():
            data, array = self._file[name], np.ascontiguousarray(array)
            data.resize(len(data) + len(array), axis=0)
            data[-len(array) :] = array
            self._digest.update(array)
        self._lengths[-1] += len(frames)
        self._bytes += frames.nbytes
        self.frames += len(frames)

    def _temporary(self) -> Path:
        return self.dir / f".shard_{self.index:04d}.tmp"

    def _start(self, arrays: dict[str, np.ndarray], continues: bool) -> None:
        self.index += 1
        self._file = h5py.File(self._temporary(), "w")
        for name, array in arrays.items():
            row = array.dtype.itemsize * int(np.prod(array.shape[1:]))
            self._file.create_dataset(
                name,
                (0, *array.shape[1:]),
                array.dtype,
                maxshape=(None, *array.shape[1:]),
                chunks=(max(1, (1 << 16) // row), *array.shape[1:]),
            )
        self._file.attrs.update(self.attrs, continues=continues)
        self._lengths, self._bytes, self._digest = [0], 0, hashlib.blake2b(digest_size=16)
        self._claimed, self._reserved = 0, 0

    def _reserve(self, size: int) -> None:
        """Room on the disk for `size` bytes more, and for what HDF5 adds, before HDF5 is asked for it: a disk that is full
        then would end or halt the process."""
        self._claimed += size
        short = self._claimed + self._claimed // 16 + (1 << 20) - self._reserved
        if short <= 0:
            return
        step = max(short, 1 << 22)
        need_space(self._temporary(), step)
        if hasattr(os, "posix_fallocate"):
            with open(self._temporary(), "r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), self._reserved, step)
                except OSError as error:
                    if error.errno not in (
                        errno.EINVAL,
                        errno.EOPNOTSUPP,
                        errno.ENOSYS,
                    ):  # of file systems that cannot
                        raise OSError(error.errno, error.strerror, str(self.dir)) from None
        self._reserved += step

    def _finish(self) -> None:
        self._digest.update(np.array(self._lengths, np.int64))
        self._file["lengths"] = np.array(self._lengths, np.int64)
        self._file.attrs["digest"] = self._digest.hexdigest()
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        if self._temporary().stat().st_size > size:  # of what was reserved
            os.truncate(self._temporary(), size)
        os.replace(self._temporary(), self.dir / f"shard_{self.index:04d}.hdf5")
        self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._finish()


def write_packed(
    path: str | Path, key: str, rows: np.ndarray, lengths: np.ndarray, attrs: dict
) -> None:
    """One packed shard from an array at hand, stored contiguously so that it can be memory-mapped."""
    need_space(Path(path), rows.nbytes)
    digest = hashlib.blake2b(np.ascontiguousarray(rows), digest_size=16).hexdigest()
    # Several processes may encode the same file of a latent cache.
    with (
        write_atomically(path, per_process=True) as temporary,
        h5py.File(temporary.name, "w") as file,
    ):
        file[key] = rows
        file["lengths"] = np.asarray(lengths, np.int64)
        file.attrs.update(attrs, format_version=FORMAT_VERSION, digest=digest)
