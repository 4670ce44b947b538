"""Source videos in folders and zips: found, read whole into memory and decoded to square frames. Zips are not unpacked."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from prepare.decode import Broken, Film, crop_boxes, probe, read, why
from runtime.console import UserError, first_line

ZIP_ERRORS = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    struct.error,
    zlib.error,
)
LARGEST = 1 << 31  # bytes of one source file, which is held in memory


@dataclass(frozen=True)
class Source:
    """One source video: a file, a member of a zip, a part of a file, or a folder of frames in either."""

    name: str  # in the manifest
    split: str
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0
    stamp: int = 0  # when the file was changed
    detail: tuple = ()  # what the dataset's own reader wants to know
    video: str = (
        ""  # where several sources in a row make one video: its name, the same for all of them
    )


class Video(NamedTuple):
    """What a source video holds: clips of (T, S, S, 3) uint8, or of latents (T, C, h, w) float16."""

    sha256: str  # of the source's bytes
    clips: list[np.ndarray]
    decoded: int  # frames of the source
    rate: float | None = None  # frames per second
    note: str | None = None  # what should be known of it though it is used
    extra: dict[
        str, np.ndarray
    ] = {}  # of its one clip: arrays (T, ...) to be stored beside the frames


@dataclass
class Found:
    """What lies at --source: sources to be read, and (name, reason) of what cannot be."""

    sources: list[Source] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def limited(self, limit: int | None) -> Found:
        """With the sources of the first `limit` videos of each split only."""
        splits = dict.fromkeys(source.split for source in self.sources)
        parts = {
            split: [source for source in self.sources if source.split == split] for split in splits
        }
        for split, part in parts.items():
            chosen = set(
                list(dict.fromkeys(source.video or source.name for source in part))[:limit]
            )
            parts[split] = [source for source in part if (source.video or source.name) in chosen]
        return Found([source for part in parts.values() for source in part], self.broken)


# ------------------------------------------------------------------------------------------ finding
def hidden(path: str) -> bool:
    """Of what the system keeps for itself: .DS_Store, __MACOSX/ in zips."""
    return any(part.startswith((".", "__MACOSX")) for part in path.split("/"))


def files_below(root: Path) -> Iterator[Path]:
    """Files, sorted; nothing hidden, no linked folders. A file is itself."""
    if not root.exists():
        raise UserError(f"{root}: no such file or folder")
    if root.is_file():
        yield root
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not hidden(name))
        yield from (Path(folder, name) for name in sorted(names) if not hidden(name))


@functools.lru_cache(4)
def opened_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def members(path: Path) -> list[zipfile.ZipInfo]:
    """The files in a zip; raises Broken."""
    try:
        return [
            info
            for info in opened_zip(str(path)).infolist()
            if not info.is_dir() and not hidden(info.filename)
        ]
    except ZIP_ERRORS as error:
        raise Broken(f"not a readable zip ({first_line(error)})") from None


def find(
    root: Path, pattern: re.Pattern, what: str
) -> tuple[list[tuple[re.Match, Source]], list[tuple[str, str]]]:
    """([(match, source without a split)], [(zip, why it cannot be read)]) of the files whose name matches, in folders and
    zips, sorted by name. Of two with the same name an unpacked one is taken."""
    found, broken = {}, []
    for path in files_below(root):
        name = str(path.relative_to(root)) if path != root else root.name
        if match := pattern.fullmatch(path.name):
            stat = path.stat()
            found[path.name] = (
                match,
                Source(name, "", str(path), size=stat.st_size, stamp=stat.st_mtime_ns),
            )
        elif path.suffix.lower() == ".zip":
            try:
                for info in members(path):
                    last = info.filename.rpartition("/")[2]
                    if (match := pattern.fullmatch(last)) and (
                        last not in found or found[last][1].member
                    ):
                        found[last] = (
                            match,
                            Source(
                                f"{name}/{info.filename}",
                                "",
                                str(path),
                                info.filename,
                                size=info.file_size,
                                stamp=path.stat().st_mtime_ns,
                            ),
                        )
            except Broken as error:
                broken.append((name, str(error)))
    if not found:
        also = "".join(f"; {name}: {reason}" for name, reason in broken[:1])
        raise UserError(f"{root}: no {what} in it, nor in zips in it{also}")
    return [found[name] for name in sorted(found)], broken


# ------------------------------------------------------------------------------------------ reading
def content(source: Source) -> bytes:
    """The bytes of a source, or of its part; raises Broken."""
    if source.size > LARGEST:
        raise Broken(f"{source.size:,} bytes, more than the {LARGEST:,} that one source may have")
    if source.member:
        return member_content(source.path, source.member)
    try:
        with open(source.path, "rb") as file:
            file.seek(source.offset)
            data = file.read(source.size)
    except OSError as error:
        raise Broken(why(error)) from None
    if len(data) < source.size:
        raise Broken(f"ends after {len(data):,} of {source.size:,} bytes")
    return data


def member_content(path: str, member: str) -> bytes:
    try:
        return opened_zip(path).read(member)
    except ZIP_ERRORS as error:
        raise Broken(f"cannot be read from the zip ({first_line(error)})") from None


def digest(parts: Iterable[bytes]) -> str:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()


def frames_of(film: Film, size: int, crop: str) -> np.ndarray:
    """All frames (T, size, size, 3) uint8: the whole picture squeezed, or its centre square; raises Broken."""
    probe(film)
    box = crop_boxes(*film.size, None)[0] if crop == "center" else None
    frames = [
        np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
        for _, image in read(film)
    ]
    return np.stack(frames)


def read_film(source: Source, size: int, crop: str) -> Video:
    """A video file as one clip; raises Broken."""
    data = content(source)
    film = Film(Path(source.path), source.name, data=data)
    frames = frames_of(film, size, crop)
    note = f"{film.corrupt} frames are damaged, says the decoder; kept" if film.corrupt else None
    return Video(digest([data]), [frames], len(frames), film.rate, note)
