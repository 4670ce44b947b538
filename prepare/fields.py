"""Convert fields of any number of channels, from .npy, .npz, HDF5 or NetCDF files, to shards.

    python -m prepare.fields --source runs/*.npy --out data/waves
    python -m prepare.fields --source era5.nc --variables t2m u10 v10 --out data/era5

Each file is a video, or several, if it has an axis of videos. Values stay float32, in their own
units: training normalises each channel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare import build
from prepare.arrays import ENDINGS, UNREADABLE, Stored, open_arrays
from prepare.axes import ROLES, find_roles
from prepare.decode import Broken, why
from prepare.sources import Found, Source, Video, files_below
from prepare.splits import split_sources, time_cuts
from runtime.console import UserError, printable, progress, run_command

# Bytes of the piece of a video that is read and written at once, and pieces per shard.
PIECE_BYTES = 32 << 20
PER_SHARD = 8
SPLIT_BY_SOURCE_FROM = 10
PADDING = {"edge": "repeat the edge", "wrap": "continue periodically"}


class Variable(NamedTuple):
    """An array of fields and the role of each of its axes; "" for an axis of one element."""

    stored: Stored
    roles: tuple[str, ...]

    def length(self, role: str) -> int:
        return self.stored.shape[self.roles.index(role)] if role in self.roles else 1

    def read(self, video: int, start: int, stop: int) -> np.ndarray:
        """Read frames start..stop-1 of a video -> (frames, channels, height, width) float32."""
        chosen = {"video": video, "time": slice(start, stop), "": 0}
        index = tuple(chosen.get(role, slice(None)) for role in self.roles)
        values = self.stored.read(index)
        left = [role for role in self.roles if role not in ("video", "")]
        order = [left.index(role) for role in ("time", "channel", "y", "x") if role in left]
        values = values.transpose(order)
        return values if "channel" in left else values[:, None]


class File(NamedTuple):
    """A file of fields: the variables that are its channels."""

    name: str
    variables: tuple[Variable, ...]

    @property
    def videos(self) -> int:
        return self.variables[0].length("video")

    @property
    def frames(self) -> int:
        return self.variables[0].length("time")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.variables[0].length("y"), self.variables[0].length("x")

    @property
    def channels(self) -> tuple[str, ...]:
        """A name for each channel: that of its variable, with a number if it has several."""
        paths = [variable.stored.name for variable in self.variables]
        last = [path.rpartition("/")[2] for path in paths]
        names = []
        # Variables of the same name in several groups are named by their paths.
        for variable, name in zip(self.variables, last if len(set(last)) == len(last) else paths):
            count = variable.length("channel")
            names += [name] if count == 1 else [f"{name} {k + 1}" for k in range(count)]
        return tuple(names)

    def read(self, video: int, start: int, stop: int) -> np.ndarray:
        """Read frames start..stop-1 of a video -> (frames, channels, height, width) float32."""
        parts = [variable.read(video, start, stop) for variable in self.variables]
        return np.concatenate(parts, 1)


# ----------------------------------------------------------------------------------------- opening
def open_file(path: str, variables: list[str] | None, axes: str | None) -> File:
    """Open a file of fields. UserError if its variables or axes are not clear.

    variables: names of arrays; None: the only array that can hold fields. axes: see --axes.
    """
    stored = open_arrays(path)
    chosen = [find_variable(path, stored, name) for name in variables or [None]]
    # The name of an .npy file is not that of a variable.
    if Path(path).suffix.lower() == ".npy" and len(chosen) == 1:
        chosen[0] = chosen[0]._replace(name="field")
    found = tuple(Variable(array, find_roles(path, array, axes)) for array in chosen)
    for variable in found[1:]:
        for role in ("video", "time", "y", "x"):
            if variable.length(role) != found[0].length(role):
                raise UserError(
                    f"{path}: {variable.stored.name} has {role} of {variable.length(role)}, but "
                    f"{found[0].stored.name} has {found[0].length(role)}; prepare them apart"
                )
    file = File(Path(path).name, found)
    if file.frames < 2:
        raise UserError(
            f"{path}: a video needs two frames, {found[0].stored.name} has {file.frames}; "
            "join files of one frame along time"
        )
    return file


def find_variable(path: str, stored: dict[str, Stored], name: str | None) -> Stored:
    """Find an array by its name; without a name, the only array of at least three axes."""
    if name is not None:
        if name.strip("/") in stored:
            return stored[name.strip("/")]
    else:
        large = [array for array in stored.values() if sum(n > 1 for n in array.shape) > 2]
        # The only array of a file is meant, whatever its shape.
        large = large or list(stored.values())
        if len(large) == 1:
            return large[0]
    known = ", ".join(f"{array.name} {array.shape}" for array in list(stored.values())[:20])
    what = f"no variable {name}" if name is not None else "which variables hold the fields?"
    raise UserError(
        f"{path}: {what}; it holds {known or 'no arrays of real numbers'}; choose by --variables"
    )


def find_files(sources: list[str]) -> list[Path]:
    """The files of --source: files, and those of known endings below folders, sorted by name."""
    found = []
    for source in sources:
        root = Path(source)
        if root.is_file():
            if root.suffix.lower() not in ENDINGS:
                raise UserError(f"{source}: not one of {', '.join(ENDINGS)}")
            found.append(root)
            continue
        found += [path for path in files_below(root) if path.suffix.lower() in ENDINGS]
    if not found:
        raise UserError(f"{', '.join(sources)}: no file ending in {', '.join(ENDINGS)}")
    return found


def open_files(paths: list[Path], args: argparse.Namespace) -> dict[str, File]:
    """Open all files: {path: file}. UserError if they differ in channels or in size."""
    files = {str(path): open_file(str(path), args.variables, args.axes) for path in paths}
    first, *others = files.items()
    for path, file in others:
        for what in ("channels", "size"):
            one, other = getattr(first[1], what), getattr(file, what)
            if one != other:
                raise UserError(
                    f"{path}: {what} {other}, but {first[0]} has {one}; prepare them apart"
                )
    return files


# ------------------------------------------------------------------------------- values not finite
def find_gaps(path: str, file: File, video: int, drop: bool) -> list[int]:
    """The frames of a video that hold NaN or infinity, in order.

    UserError that names the first one, unless `drop`.
    """
    gaps = []
    step = frames_per_piece(file)
    for start in range(0, file.frames, step):
        stop = min(start + step, file.frames)
        try:
            values = file.read(video, start, stop)
        except UNREADABLE as error:
            raise UserError(
                f"{path}: frames {start} to {stop - 1} cannot be read ({why(error)}); fetch the "
                "file again, or leave these frames out by --nan 0 --allow_skips"
            ) from None
        finite = np.isfinite(values).all((2, 3))
        for t in np.flatnonzero(~finite.all(1)):
            if not drop:
                c = int(np.flatnonzero(~finite[t])[0])
                count = int((~np.isfinite(values[t, c])).sum())
                of_videos = f"video {video}, " if file.videos > 1 else ""
                raise UserError(
                    f"{path}: {file.channels[c]}, {of_videos}frame {start + t}: {count:,} of "
                    f"{values[t, c].size:,} values are NaN or infinite; --nan drop leaves such "
                    "frames out, --nan 0 (or another number) fills them"
                )
            gaps.append(start + int(t))
    return gaps


def cut_out(start: int, stop: int, gaps: list[int]) -> list[tuple[int, int]]:
    """The half-open ranges of frames that are left of [start, stop) without `gaps`. A single frame
    is no video."""
    ends = [start - 1, *(gap for gap in gaps if start <= gap < stop), stop]
    ranges = [(a + 1, b) for a, b in zip(ends, ends[1:])]
    return [(a, b) for a, b in ranges if b - a > 1]


# ------------------------------------------------------------------------------------------ sources
def frames_per_piece(file: File) -> int:
    H, W = file.size
    return max(1, PIECE_BYTES // (4 * len(file.channels) * H * W))


def plan_splits(
    videos: list[tuple[str, int, int]], args: argparse.Namespace
) -> tuple[str, list[dict[str, tuple[int, int]]]]:
    """The rule (video or time), and for each video the range of frames of each split.

    videos: (path, number in the file, number of frames).
    """
    fractions = {"train": 1 - args.val - args.test, "val": args.val, "test": args.test}
    fractions = {split: fraction for split, fraction in fractions.items() if fraction}
    auto = "video" if len(videos) >= SPLIT_BY_SOURCE_FROM else "time"
    rule = auto if args.split_by == "auto" else args.split_by
    if rule == "time":
        return rule, [time_cuts(frames, fractions) for _, _, frames in videos]
    splits = split_sources(len(videos), fractions, args.seed)
    return rule, [{split: (0, frames)} for split, (_, _, frames) in zip(splits, videos)]


def plan_sources(
    files: dict[str, File], args: argparse.Namespace
) -> tuple[str, list[Source], dict[str, list[int]]]:
    """Cut all videos into pieces -> (rule of the split, sources, {video: frames left out})."""
    videos = []
    for path, file in files.items():
        videos += [(path, k, file.frames) for k in range(file.videos)]
    rule, cuts = plan_splits(videos, args)
    names = Counter(file.name for file in files.values())
    sources, left_out = [], {}
    with progress(len(videos), "read", "video") as bar:
        for (path, k, _), ranges in zip(videos, cuts):
            file, stat = files[path], os.stat(path)
            # Files in several folders may have the same name.
            name = printable(file.name if names[file.name] == 1 else path)
            name += f"[{k}]" if file.videos > 1 else ""
            gaps = []
            if args.nan in ("error", "drop"):
                gaps = find_gaps(path, file, k, args.nan == "drop")
            if gaps:
                left_out[name] = gaps
            step = frames_per_piece(file)
            for split, (first, last) in ranges.items():
                for begin, end in cut_out(first, last, gaps):
                    for start in range(begin, end, step):
                        stop = min(start + step, end)
                        sources.append(
                            Source(
                                f"{name}, frames {start} to {stop - 1}",
                                split,
                                path,
                                size=stat.st_size,
                                stamp=stat.st_mtime_ns,
                                detail=(k, start, stop),
                                video=f"{path} {k} {begin}",
                            )
                        )
            bar.update()
    return rule, sources, left_out


def padding_of(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The rows and columns to add, so that height and width are multiples of a number."""
    return -size[0] % multiple, -size[1] % multiple


def read(source: Source, args: argparse.Namespace) -> Video:
    """Read a piece of a video, padded, with NaN filled; raises Broken."""
    file = open_file(source.path, args.variables, args.axes)
    try:
        values = file.read(*source.detail)
    except UNREADABLE as error:
        raise Broken(why(error)) from None
    if args.nan not in ("error", "drop"):
        values[~np.isfinite(values)] = float(args.nan)
    if not np.isfinite(values).all():
        raise Broken("values that are not finite: the file has changed")
    sha256 = hashlib.sha256(np.ascontiguousarray(values)).hexdigest()
    bottom, right = padding_of(file.size, args.multiple)
    if bottom or right:
        values = np.pad(values, ((0, 0), (0, 0), (0, bottom), (0, right)), args.pad)
    return Video(sha256, [values], len(values), args.fps)


# ------------------------------------------------------------------------------------------ command
def make(args: argparse.Namespace) -> dict:
    """Write the shards and manifest.json to args.out by atomic rename; return the manifest."""
    files = open_files(find_files(args.source), args)
    rule, sources, left_out = plan_sources(files, args)
    first = next(iter(files.values()))
    (H, W), (bottom, right) = first.size, padding_of(first.size, args.multiple)
    size_rule = f"fields of {len(first.channels)} x {H} x {W} (channels, height, width)"
    if bottom or right:
        size_rule += (
            f", padded to {H + bottom} x {W + right}: the last {bottom} rows and {right} columns "
            f"{PADDING[args.pad]}"
        )
    names = sorted(files)
    recipe = build.Recipe(
        Path(args.out).name,
        "prepare.fields",
        read,
        f"split by {rule}",
        PER_SHARD,
        key="fields",
        unit="piece",
        frame_rule=size_rule,
        facts={
            "channels": first.channels,
            "height": H,
            "width": W,
            "padding": {"rows": bottom, "columns": right, "rule": args.pad},
            "axes": {name: [list(v.roles) for v in files[name].variables] for name in names},
            "not_finite": left_out,
        },
        channels=first.channels,
    )
    for name, gaps in left_out.items():
        shown = ", ".join(map(str, gaps[:5])) + (", …" if len(gaps) > 5 else "")
        print(f"{name}: {len(gaps):,} frames with NaN left out: {shown}")
    for split in build.SPLITS:
        if not any(source.split == split for source in sources):
            print(f"{split} has no video of two frames; see --val, --test, --split_by")
    return build.make(recipe, Found(sources), args)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    endings = " ".join(ENDINGS)
    about = f"files ({endings}), or folders that are searched for such files"
    add("--source", nargs="+", required=True, help=about)
    add("--out", required=True, help="folder to create, e.g. data/era5")
    about = "arrays to stack as channels: names in an .npz or NetCDF file, paths in an HDF5 file "
    add("--variables", nargs="+", help=about + "(default: the only array of three or more axes)")
    about = "the axes of the arrays in order, of time, channel, y, x and video, e.g. "
    about += (
        "time,y,x,channel (default: by the names of dimensions, such as time, level, lat, lon; "
    )
    add("--axes", help=about + "without names time,y,x or time,channel,y,x or video,…)")
    about = "pad height and width to multiples of this number (default 8; 1: no padding)"
    add("--multiple", type=int, default=8, help=about)
    about = "how to pad, at the bottom and on the right: repeat the edge, or wrap around (periodic)"
    add("--pad", choices=tuple(PADDING), default="edge", help=about)
    about = (
        "what to do with NaN and infinity: error, drop (leave these frames out, and begin a new "
    )
    add("--nan", default="error", help=about + "video), or a number to fill in (default: error)")
    add("--fps", type=float, help="frames per second at which videos show the fields (default: 10)")
    add("--val", type=float, default=0.1, help="share of val")
    add("--test", type=float, default=0.1, help="share of test")
    about = "video: each video belongs to one split. time: the first part of each video is train, "
    about += "then val, then test. auto: video if there are at least "
    choices = ("auto", "video", "time")
    about += f"{SPLIT_BY_SOURCE_FROM}, else time"
    add("--split_by", choices=choices, default="auto", help=about)
    add("--seed", type=int, default=0, help="seed of the choice of videos for val and test")
    add("--limit", type=int, help="use only the first LIMIT videos of each split, for a test")
    cores = os.cpu_count() or 1
    about = f"number of processes (default: one per core, here {cores})"
    add("--workers", type=int, default=cores, help=about)
    add("--allow_skips", action="store_true", help="exit with 0, not 1, if some piece is broken")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.fields", description=__doc__.splitlines()[0]
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    build.check_ranges(
        args,
        multiple=(1, 1024),
        val=(0, 1),
        test=(0, 1),
        seed=(0, 2**31),
        fps=(0.001, 1000),
        limit=(1, 10**9),
        workers=(1, 1024),
    )
    if args.val + args.test >= 1:
        raise UserError(
            f"--val {args.val} and --test {args.test} leave nothing to train; "
            "make their sum less than 1"
        )
    if args.axes and (unknown := set(args.axes.split(",")) - set(ROLES)):
        raise UserError(f"--axes {args.axes}: no axis {min(unknown)}; use {', '.join(ROLES)}")
    if args.nan not in ("error", "drop"):
        try:
            finite = np.isfinite(np.float32(args.nan))
        except ValueError:
            finite = False
        if not finite:
            raise UserError(f"--nan must be error, drop or a number, got {args.nan}")
    if Path(args.out).exists():
        raise UserError(f"{args.out} already exists; remove it or choose another --out")
    return args


def main() -> int:
    args = parse()
    return build.report(make(args), args, "piece")


if __name__ == "__main__":
    run_command(main)
