"""Convert folders `train/<video>/<frame>.png`, and val and test, as RIVER's, to shards.

    python -m prepare.frames --source kth_png --out data/kth --image_size 64

The folders may also be in zips, for example `train.zip`. Frames are sorted by their numbers, with
or without zero padding. For folders without train, val and test, use prepare.videos.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from prepare import build
from prepare.decode import Broken, Film, natural, why
from prepare.sources import (
    Found,
    Source,
    Video,
    digest,
    files_below,
    frames_of,
    hidden,
    member_content,
    members,
)
from runtime.console import UserError, run_command


def in_order(names: Iterable[str]) -> list[str]:
    """Sort file names by their numbers; raises Broken for a repeated or a missing number."""
    names = sorted(names, key=lambda name: natural(PurePosixPath(name)))
    stems = [name.rpartition(".")[0] for name in names]
    # Names of different forms, or without numbers, are not checked.
    forms = {re.sub(r"\d+", "#", stem) for stem in stems}
    if len(forms) > 1 or not re.search(r"\d", stems[0]):
        return names
    numbers = [[int(digits) for digits in re.findall(r"\d+", stem)] for stem in stems]
    counting = [column for column in zip(*numbers) if len(set(column)) > 1]
    if not counting and len(names) > 1:
        raise Broken(f"frames {names[0]} and {names[1]} have the same number")
    # Names with several changing numbers, e.g. a time in hours and minutes, are not checked.
    if len(counting) == 1:
        steps = [after - before for before, after in zip(counting[0], counting[0][1:])]
        usual = sorted(steps)[len(steps) // 2] or 1
        for k, step in enumerate(steps):
            if step != usual:
                same = (
                    "have the same number" if not step else f"are {step} apart, the others {usual}"
                )
                raise Broken(f"frames {names[k]} and {names[k + 1]} {same}")
    return names


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
    at = next((k for k, part in enumerate(parts) if part in build.SPLITS), len(parts))
    return (parts[at], "/".join(parts[at:])) if at < len(parts) - 1 else None


def find_tree(root: Path, extension: str) -> Found:
    """Find the folders of frames below a folder train, val or test, in numeric order."""
    # By name; a folder has priority over the same folder in a zip.
    found, broken = {}, []
    if not root.exists():
        raise UserError(f"{root}: no such file or folder")
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not hidden(name)]
        place = split_of(Path(folder).relative_to(root).as_posix())
        if place and any(name.lower().endswith(f".{extension}") for name in names):
            found[place[1]] = Source(place[1], place[0], folder, stamp=os.stat(folder).st_mtime_ns)
    for path in files_below(root):
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
            f"{root}: no train/<video>/<frame>.{extension}, nor val/ or test/, in it, nor in zips "
            "in it; see --extension, or let prepare.videos split it"
        )
    return Found(sorted(found.values(), key=lambda source: natural_path(source.name)), broken)


def natural_path(name: str) -> tuple:
    return tuple(natural(PurePosixPath(part)) for part in name.split("/"))


def read_tree(source: Source, size: int, crop: str, extension: str) -> Video:
    """Read a folder of frames as one clip; raises Broken."""
    if source.member or source.path.lower().endswith(".zip"):
        names = in_order(folders_in_zip(source.path, extension)[source.member])
        prefix = f"{source.member}/" if source.member else ""
        contents = [member_content(source.path, prefix + name) for name in names]
    else:
        try:
            names = in_order(
                name
                for name in os.listdir(source.path)
                if name.lower().endswith(f".{extension}") and not hidden(name)
            )
            contents = [Path(source.path, name).read_bytes() for name in names]
        except OSError as error:
            raise Broken(f"{os.path.basename(error.filename or '')}: {why(error)}") from None
    images = [io.BytesIO(content) for content in contents]
    for image, name in zip(images, names):
        image.name = name  # for messages
    film = Film(Path(source.path), source.name, images)
    try:
        frames = frames_of(film, size, crop)
    except Broken as error:
        raise Broken(f"{names[max(film.decoded - 1, 0)]}: {error}") from None
    return Video(digest(contents), [frames], len(frames))


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
