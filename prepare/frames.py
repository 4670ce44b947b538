"""Convert folders of frames, train/<video>/<frame>.png and the same for val and test, to shards.

    python -m prepare.frames --source kth_png --out data/kth --image_size 64

This is RIVER's layout. The folders may also be in zips, for example `train.zip`. Frames are sorted
by their numbers, with or without zero padding; a new video begins where numbers are missing. For
folders without train, val and test, use prepare.videos.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
from pathlib import Path, PurePosixPath

from prepare import build
from prepare.decode import Broken, Film, count, why
from prepare.naming import natural, put_in_order, select_kind
from prepare.sources import (
    Found,
    Source,
    Video,
    decode_clips,
    digest,
    files_below,
    is_hidden,
    members,
    read_member,
)
from runtime.console import UserError, run_command


@functools.lru_cache(4)
def folders_in_zip(path: str, extension: str) -> dict[str, list[str]]:
    """Return {folder: names of its frames} of a zip."""
    folders: dict[str, list[str]] = {}
    for info in members(Path(path)):
        folder, _, name = info.filename.rpartition("/")
        if name.lower().endswith(f".{extension}"):
            folders.setdefault(folder, []).append(name)
    return folders


def split_of(path: str) -> tuple[str, str] | None:
    """Return (split, video) of a folder's path: `a/train/b/c` -> train, train/b/c."""
    parts = path.split("/")
    at = next((k for k, part in enumerate(parts) if part.lower() in build.SPLITS), len(parts))
    return (parts[at].lower(), "/".join(parts[at:])) if at < len(parts) - 1 else None


def find_tree(root: Path, extension: str) -> Found:
    """Find the folders of frames below a folder train, val or test, in numeric order."""
    # {name: source}; a folder has priority over the same folder in a zip.
    found, broken = {}, []
    # `walk` prints a line for each file that it leaves out, so walk the folder only once.
    files = list(files_below(root))
    folders = {path.parent for path in files if path.name.lower().endswith(f".{extension}")}
    for folder in folders - {root.parent}:
        place = split_of(folder.relative_to(root).as_posix())
        if place:
            stamp = folder.stat().st_mtime_ns
            found[place[1]] = Source(place[1], place[0], str(folder), stamp=stamp)
    # A zip may contain train/ itself, or be the split: train.zip with <video>/<frame>.png.
    for path in files:
        if path.suffix.lower() != ".zip":
            continue
        try:
            for folder, names in folders_in_zip(str(path), extension).items():
                place = split_of(folder) or split_of(f"{path.stem}/{folder}")
                if place:
                    found.setdefault(
                        place[1],
                        Source(
                            place[1],
                            place[0],
                            str(path),
                            folder,
                            size=len(names),
                            stamp=path.stat().st_mtime_ns,
                        ),
                    )
        except Broken as error:
            broken.append((str(path.relative_to(root)) if path != root else root.name, str(error)))
    if not found:
        raise UserError(
            f"{root}: no train/<video>/<frame>.{extension}, nor the same in val/ or test/, in the "
            "folder or in its zips; see --extension, or split the videos with prepare.videos"
        )
    return Found(sorted(found.values(), key=lambda source: natural_path(source.name)), broken)


def natural_path(name: str) -> tuple:
    return tuple(natural(PurePosixPath(part)) for part in name.split("/"))


def read_tree(source: Source, size: int, crop: str, extension: str) -> Video:
    """Read a folder of frames as one clip per part without missing numbers; raises Broken."""
    in_zip = source.member or source.path.lower().endswith(".zip")
    try:
        if in_zip:
            names = folders_in_zip(source.path, extension)[source.member]
        else:
            there = os.listdir(source.path)
            names = [name for name in there if name.lower().endswith(f".{extension}")]
        # A folder may hold a preview beside the frames. It is left out if its name is of another
        # kind.
        names, note = select_kind(name for name in names if not is_hidden(name))
        ordered = put_in_order(names)
        if in_zip:
            prefix = f"{source.member}/" if source.member else ""
            contents = [read_member(source.path, prefix + name) for name in ordered.names]
        else:
            contents = [Path(source.path, name).read_bytes() for name in ordered.names]
    except OSError as error:
        raise Broken(f"{os.path.basename(error.filename or '')}: {why(error)}") from None
    images = [io.BytesIO(content) for content in contents]
    for image, name in zip(images, ordered.names):
        # Error messages name the file.
        image.name = name
    film = Film(Path(source.path), source.name, images, ordered.breaks)
    film.notes += [*filter(None, [note]), *ordered.notes]
    try:
        clips = decode_clips(film, size, crop)
    except Broken as error:
        raise Broken(f"{ordered.names[max(film.decoded - 1, 0)]}: {error}") from None
    # A single frame between missing numbers is no video.
    kept = [clip for clip in clips if len(clip) > 1 or len(clips) == 1]
    alone = len(clips) - len(kept)
    if alone:
        film.notes.append(f"{count(alone, 'frame')} alone between missing numbers; left out")
    if not kept:
        raise Broken("every second number is missing")
    return Video(digest(contents), kept, film.decoded, note="; ".join(film.notes) or None)


def read(source: Source, args: argparse.Namespace) -> Video:
    return read_tree(source, args.image_size, args.crop, args.extension)._replace(rate=args.fps)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.frames", description=__doc__.splitlines()[0]
    )
    build.add_flags(
        parser,
        "folder with one or more of train/, val/ and test/, or with zips of them",
        64,
    )
    extension = "file extension of the frames (default: png)"
    parser.add_argument("--extension", default="png", help=extension)
    fps = "frames per second, stored in the shards"
    parser.add_argument("--fps", type=float, help=fps)
    args = build.check_flags(parser.parse_args(argv))
    args.extension = args.extension.lower().removeprefix(".")
    if args.fps is not None and not 0 < args.fps < 1000:
        raise UserError(f"--fps must be above 0 and below 1000, got {args.fps}")
    return args


def make(args: argparse.Namespace) -> dict:
    recipe = build.Recipe(
        Path(args.source).resolve().name, "prepare.frames", read, "as the folders are", 16
    )
    return build.make(recipe, find_tree(Path(args.source), args.extension), args)


def main() -> int:
    args = parse()
    return build.report(make(args), args)


if __name__ == "__main__":
    run_command(main)
