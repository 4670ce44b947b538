"""Find source videos in folders and zips, read them into memory, and decode them to square frames.

Members of zips are read into memory, too, and never unpacked to disk.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from prepare.decode import (
    Broken,
    Film,
    count,
    crop_boxes,
    list_findings,
    lost_frames,
    probe,
    read,
    why,
)
from runtime.console import UserError, first_line, printable

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
LARGEST = 1 << 31  # largest size of one source file in bytes; the file is held in memory


@dataclass(frozen=True)
class Source:
    """One source video: a file, a part of a file, a member of a zip, or a folder of frames."""

    name: str  # in the manifest
    split: str
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0
    stamp: int = 0  # modification time of the file in nanoseconds
    detail: tuple = ()  # parameters for the reader of the dataset
    video: str = ""  # common name of consecutive sources that are parts of one video
    copy_of: str = ""  # if this source is left out: name of its copy, which is in another split


class Video(NamedTuple):
    """Content of a source, as clips: frames (T, S, S, 3) uint8, or latents (T, C, h, w) float16."""

    sha256: str  # of the source's bytes
    clips: list[np.ndarray]
    decoded: int  # frames of the source
    rate: float | None = None  # frames per second
    note: str | None = None  # a warning about a source that is used
    damage: str | None = None  # reason why frames are missing from a source that is used
    extra: dict[str, np.ndarray] = {}  # arrays (T, ...) to store beside the frames of the one clip


@dataclass
class Found:
    """The sources to read, and (name, reason) of those that cannot be read."""

    sources: list[Source] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def limit_videos(self, limit: int | None) -> Found:
        """Keep only the sources of the first `limit` videos of each split."""
        kept = []
        for split in dict.fromkeys(source.split for source in self.sources):
            part = [source for source in self.sources if source.split == split]
            videos = list(dict.fromkeys(source.video or source.name for source in part))
            chosen = set(videos[:limit])
            kept += [source for source in part if (source.video or source.name) in chosen]
        return Found(kept, self.broken)


# ------------------------------------------------------------------------------------------ finding
def is_hidden(path: str) -> bool:
    """Return whether a path has a hidden part or a system part, e.g. .DS_Store or __MACOSX/."""
    return any(part.startswith((".", "__MACOSX")) for part in path.split("/"))


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder below a root with the names of its files, both sorted.

    Follows links. Hidden files and folders are left out. Prints a line for each broken link, link
    to a folder that was read before, and unreadable folder.
    """
    seen = {os.path.realpath(root)}

    def report(error: OSError) -> None:
        print(f"{printable(error.filename)}: {error.strerror}; left out", file=sys.stderr)

    for folder, folders, names in os.walk(root, onerror=report, followlinks=True):
        entered = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if is_hidden(name):
                continue
            real = os.path.realpath(path)
            # Only a link can lead to a folder a second time.
            if os.path.islink(path) and real in seen:
                note = "a link to a folder that was read already; left out"
                print(f"{printable(path)}: {note}", file=sys.stderr)
                continue
            seen.add(real)
            entered.append(name)
        folders[:] = entered
        files = []
        for name in sorted(names):
            if is_hidden(name):
                continue
            if os.path.exists(os.path.join(folder, name)):
                files.append(name)
            else:
                path = printable(os.path.join(folder, name))
                print(f"{path}: a broken link; left out", file=sys.stderr)
        yield Path(folder), files


def files_below(root: Path) -> Iterator[Path]:
    """Yield the files below a folder, or the file itself, as `walk` does."""
    if not root.exists():
        raise UserError(f"{printable(root)}: no such file or folder")
    if root.is_file():
        yield root
    for folder, names in walk(root):
        yield from (folder / name for name in names)


@functools.lru_cache(4)
def open_zip(path: str) -> zipfile.ZipFile:
    """Open a zip; its directory is read once for all members."""
    return zipfile.ZipFile(path)


def members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the files in a zip; raises Broken."""
    try:
        return [
            info
            for info in open_zip(str(path)).infolist()
            if not info.is_dir() and not is_hidden(info.filename)
        ]
    except ZIP_ERRORS as error:
        raise Broken(f"not a readable zip ({first_line(error)})") from None


def find(
    root: Path, pattern: re.Pattern, what: str
) -> tuple[list[tuple[re.Match, Source]], list[tuple[str, str]]]:
    """Find the files in folders and zips whose names match the pattern, sorted by name.

    Returns [(match, source without a split)] and [(zip, reason why it cannot be read)]. The case of
    names is ignored. A file outside zips has priority over a file of the same name in a zip. Any
    other two files of the same name are a UserError.
    """
    # {name in lower case: (match, source)}, because file systems differ in the case of names.
    found, broken = {}, []

    def add(last: str, match: re.Match, source: Source) -> None:
        other = found.get(last.lower())
        if other is not None and bool(other[1].member) == bool(source.member):
            raise UserError(
                f"{printable(root)}: {other[1].name} and {source.name} have the same name; "
                "move one of them away"
            )
        if other is None or other[1].member:
            found[last.lower()] = (match, source)

    for path in files_below(root):
        name = str(path.relative_to(root)) if path != root else root.name
        if match := pattern.fullmatch(path.name):
            stat = path.stat()
            source = Source(name, "", str(path), size=stat.st_size, stamp=stat.st_mtime_ns)
            add(path.name, match, source)
        elif path.suffix.lower() == ".zip":
            try:
                for info in members(path):
                    # The pattern matches names without folders.
                    last = info.filename.rpartition("/")[2]
                    if match := pattern.fullmatch(last):
                        source = Source(
                            f"{name}/{info.filename}",
                            "",
                            str(path),
                            info.filename,
                            size=info.file_size,
                            stamp=path.stat().st_mtime_ns,
                        )
                        add(last, match, source)
            except Broken as error:
                broken.append((name, str(error)))
    if not found:
        also = "".join(f"; {name}: {reason}" for name, reason in broken[:1])
        raise UserError(f"{root}: no {what} in the folder or in its zips{also}")
    return [found[name] for name in sorted(found)], broken


# ------------------------------------------------------------------------------------------ reading
def read_content(source: Source) -> bytes:
    """Read the bytes of a source, which may be a part of a file; raises Broken."""
    if source.size > LARGEST:
        raise Broken(f"{source.size:,} bytes, more than the {LARGEST:,} that one source may have")
    if source.member:
        return read_member(source.path, source.member)
    try:
        with open(source.path, "rb") as file:
            file.seek(source.offset)
            data = file.read(source.size)
    except OSError as error:
        raise Broken(why(error)) from None
    if len(data) < source.size:
        raise Broken(f"ends after {len(data):,} of {source.size:,} bytes")
    return data


def read_member(path: str, member: str) -> bytes:
    try:
        return open_zip(path).read(member)
    except ZIP_ERRORS as error:
        raise Broken(f"cannot be read from the zip ({first_line(error)})") from None


def digest(parts: Iterable[bytes]) -> str:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()


def decode_clips(
    film: Film, size: int, crop: str, keep_before_damage: bool = False
) -> list[np.ndarray]:
    """Decode all frames to one clip (T, size, size, 3) uint8 per part; raises Broken.

    crop: squeeze (the whole frame) or center (the centre square). keep_before_damage: if the file
    breaks after its first frame, return the clips before the break; film.broken is then True.
    """
    probe(film)
    box = crop_boxes(*film.size, None)[0] if crop == "center" else None
    clips, part = [], 0
    try:
        for _, image in read(film):
            if film.part != part:
                clips.append([])
                part = film.part
            resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
            clips[-1].append(np.asarray(resized))
    except Broken as error:
        if not clips or not keep_before_damage:
            raise
        film.notes.append(str(error))
    return [np.stack(clip) for clip in clips]


def read_film(source: Source, size: int, crop: str, keep_before_damage: bool = False) -> Video:
    """Read a video file as one clip per part; raises Broken, also if frames are lost to damage.

    keep_before_damage: instead, return the frames before the first lost frame, with the reason in
    `damage`.
    """
    data = read_content(source)
    film = Film(Path(source.path), source.name, data=data)
    clips = decode_clips(film, size, crop, keep_before_damage)
    lost = lost_frames(film)
    note = "; ".join(list_findings(film)) or None
    damage = None
    if film.broken or lost:
        damage = note or "damaged"
        if not keep_before_damage:
            raise Broken(f"{count(lost, 'frame')} lost to damage")
        # After lost frames, indices no longer match the frame numbers of annotations.
        clips, note = clips[:1], None
    return Video(digest([data]), clips, sum(map(len, clips)), film.rate, note, damage)
