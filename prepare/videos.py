"""Any folder of videos, or of folders of frames, to packed shards of square clips.

    python -m prepare.videos --source ~/street --out data/street --image_size 64 --tile 192 --clip_length 24

Train, val and test are kept apart by source video or by time, never by overlapping clips. Memory holds a frame or two
at full size and one clip of resized frames (of each tile). Rotation and pixel shape named in a file are not applied.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from prepare.decode import AV_VERSION, Broken, Film, crop_boxes, natural, probe, read
from prepare.splits import split_at, split_sources, time_cuts
from runtime.console import UserError, progress, run_command
from shards import ShardWriter

VIDEOS = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".gif")
IMAGES = (".png", ".jpg", ".jpeg")
SPLITS = ("train", "val", "test")
SPLIT_BY_SOURCE_FROM = 10  # sources; with fewer, `auto` splits by time
TILE_MOTION = 1.5  # percent; of OpenCV's vtest.avi, tiles without a person stay below 0.8, most with one exceed this
GRID, GREY_LEVELS = 16, 20  # what counts as motion: see motion()
CHUNK = 256  # frames written at a time where a clip is a whole video


@dataclass
class Source(Film):
    """One video file or frame folder, and what became of it."""

    clips: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    still: int = 0  # clips dropped
    remainder: int = 0  # frames dropped because they made no whole clip
    skipped: str | None = None  # why it was left out, or broken off

    def entry(self) -> dict:
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("path", "images", "data", "short")
        }


def motion(clip: np.ndarray) -> float:
    """Percent of a clip's cells (about 16 x 16 of them, each averaged: that hides sensor noise, compression flicker and
    fluttering tape) whose grey level at some time is over 20 of 255 from its median. clip: (T, S, S, 3) uint8."""
    T, S = clip.shape[:2]
    cell = max(1, S // GRID)
    n = S // cell
    grey = (
        clip[:, : n * cell, : n * cell]
        .reshape(T, n, cell, n, cell, 3)
        .mean((2, 4, 5), dtype=np.float32)
    )
    return 100 * float((np.abs(grey - np.median(grey, 0)) > GREY_LEVELS).any(0).mean())


def find_sources(root: Path) -> list[Source]:
    """Videos, and folders of at least two images and no video, sorted by path; nothing hidden, no linked folders."""
    found = [Source(root, root.name)] if root.is_file() and root.suffix.lower() in VIDEOS else []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        videos = [path for path in paths if path.suffix.lower() in VIDEOS]
        images = sorted((path for path in paths if path.suffix.lower() in IMAGES), key=natural)
        found += [Source(path, str(path.relative_to(root))) for path in videos]
        if len(images) > 1 and not videos:
            found.append(Source(Path(folder), str(Path(folder).relative_to(root)), images))
    if not found:
        lacks = f"no video ({' '.join(VIDEOS)}) and no folder of images ({' '.join(IMAGES)}) in it"
        raise UserError(f"{root}: {lacks if root.exists() else 'no such file or folder'}")
    return sorted(found, key=lambda source: source.name)


class Cutter:
    """Gathers a source's frames, tile by tile, and hands every full clip to the writer of its split."""

    def __init__(
        self, source: Source, boxes: list, writers: dict[str, ShardWriter], args: argparse.Namespace
    ):
        self.source, self.boxes, self.writers = source, boxes, writers
        self.whole, self.min_motion = args.clip_length is None, args.min_motion
        self.clips = np.empty(
            (len(boxes), args.clip_length or CHUNK, args.image_size, args.image_size, 3), np.uint8
        )
        self.filled, self.split = 0, ""

    def add(self, image: Image.Image, split: str) -> None:
        if split != self.split:
            self.finish()
            self.split = split
        for clip, box in zip(self.clips, self.boxes):
            clip[self.filled] = np.asarray(
                image.resize(clip.shape[1:3], Image.Resampling.BICUBIC, box=box)
            )
        self.filled += 1
        if self.filled == self.clips.shape[1]:
            self.write()

    def write(self) -> None:
        for clip in self.clips[:, : self.filled]:
            if self.whole and self.source.clips[self.split]:
                self.writers[self.split].append(clip)
            elif self.min_motion and motion(clip) < self.min_motion:
                self.source.still += 1
            else:
                self.writers[self.split].add(clip)
                self.source.clips[self.split] += 1
        self.filled = 0

    def finish(self) -> None:
        """No more frames for this split: what is left is the end of a whole video, or too short for a clip."""
        if self.filled and self.whole:
            self.write()
        self.source.remainder += self.filled
        self.filled = 0


def cut(
    source: Source, cuts: dict[str, tuple[int, int]], writers: dict[str, ShardWriter], args, bar
) -> None:
    """Writes the clips of one source; notes in it, and on stderr, what was wrong with it."""
    if args.fps and source.rate and args.fps > 1.01 * source.rate:
        bar.write(
            f"{source.path}: --fps {args.fps:g} is above its {source.rate:g}; every frame is kept",
            sys.stderr,
        )
    cutter = None
    try:
        for index, image in read(source, args.fps, bar.update):
            cutter = cutter or Cutter(source, crop_boxes(*image.size, args.tile), writers, args)
            cutter.add(image, split_at(index, cuts))
    except Broken as error:
        source.skipped = str(error)
    if cutter:
        cutter.finish()
    if source.skipped:
        bar.write(
            f"{source.path}: {source.skipped}; skipped after {source.decoded} frames, the "
            f"{sum(source.clips.values())} clips from before are kept",
            sys.stderr,
        )
    if source.corrupt:
        bar.write(
            f"{source.path}: warning: {source.corrupt} frames are damaged, says the decoder; kept",
            sys.stderr,
        )
    bar.total += source.decoded - source.frames


def survey(sources: list[Source], tile: int | None) -> list[Source]:
    """Probes all sources and returns those that can be used."""
    with progress(len(sources), "counting frames", "file") as bar:
        for source in sources:
            try:
                probe(source)
                if min(source.size) < (tile or 1):
                    raise Broken(
                        "frames of {}x{} are smaller than --tile {}".format(*source.size, tile or 1)
                    )
            except Broken as error:
                source.skipped = str(error)
                bar.write(f"{source.path}: {source.skipped}; skipped", sys.stderr)
            bar.update()
    return [source for source in sources if source.skipped is None]


def plan(
    sources: list[Source], args: argparse.Namespace
) -> tuple[str, list[dict[str, tuple[int, int]]]]:
    """The rule, source or time, and for each source which of its frames go to which split."""
    fractions = {
        split: f for split, f in zip(SPLITS, (1 - args.val - args.test, args.val, args.test)) if f
    }
    auto = "source" if len(sources) >= SPLIT_BY_SOURCE_FROM else "time"
    rule = auto if args.split_by == "auto" else args.split_by
    if rule == "time":
        return rule, [time_cuts(source.frames, fractions) for source in sources]
    splits = split_sources(len(sources), fractions, args.seed)
    return rule, [{split: (0, source.frames)} for split, source in zip(splits, sources)]


def make(args: argparse.Namespace, command: str = "") -> dict:
    """Writes the shards and manifest.json to args.out, which appears when all are complete; returns the manifest."""
    began, root, out = time.monotonic(), Path(args.source), Path(args.out)
    if out.exists():
        raise UserError(f"{out} already exists; remove it or choose another --out")
    sources = find_sources(root)
    usable = survey(sources, args.tile)
    rule, cuts = plan(usable, args)
    fps = args.fps or next((source.rate for source in usable if source.rate), None)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with (
            ExitStack() as stack,
            progress(sum(source.frames for source in usable), "frames", "frame") as bar,
        ):
            writers = {
                split: ShardWriter(partial / split, fps=fps, source=root.name, command=command)
                for split, share in zip(SPLITS, (1, args.val, args.test))
                if share
            }
            for writer in writers.values():
                stack.enter_context(writer)
            for source, part in zip(usable, cuts):
                cut(source, part, writers, args, bar)
        dropped = {
            "still": sum(source.still for source in sources),
            "skipped": len([s for s in sources if s.skipped]),
            "remainder": sum(source.remainder for source in sources),
        }
        for writer in writers.values():
            if not writer.videos:
                writer.dir.rmdir()
        if not any(partial.iterdir()):
            raise UserError(
                f"{root}: not one clip in {len(sources)} sources; dropped {dropped['still']} still clips, "
                f"{dropped['remainder']} frames left over, skipped {dropped['skipped']} sources"
            )
        manifest = {
            "command": command,
            "options": vars(args),
            "split_rule": rule,
            "fps": fps,
            "dropped": dropped,
            "splits": {
                split: {"clips": writer.videos, "frames": writer.frames}
                for split, writer in writers.items()
            },
            "sources": [source.entry() for source in sources],
            "seconds": round(time.monotonic() - began, 2),
            "versions": {"av": AV_VERSION, "pillow": PIL.__version__},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def report(manifest: dict) -> None:
    sources, args, fps = manifest["sources"], manifest["options"], manifest["fps"]
    print(
        f"{args['out']}: {len(sources):,} sources, split by {manifest['split_rule']}, {manifest['seconds']:.1f} s"
    )
    for split, size in manifest["splits"].items():
        empty = (
            ""
            if size["clips"]
            else f"; warning: empty, its part is too short or still; see --{split}, --split_by"
        )
        print(f"  {split:5} {size['clips']:9,} clips {size['frames']:11,} frames{empty}")
    print(
        "  dropped: {still:,} still clips, {remainder:,} frames left over; skipped: {skipped:,} sources".format(
            **manifest["dropped"]
        )
    )
    rates = [source["rate"] for source in sources if source["rate"]]
    if rates and max(rates) > 1.01 * min(rates) and not args["fps"]:
        print(
            f"  sources have {min(rates):g} to {max(rates):g} frames per second, the shards say {fps:g}, the first's;"
            " --fps makes them alike"
        )
    broken = [source for source in sources if source["skipped"]]
    for source in broken:
        print(
            f"  {source['name']}: {source['skipped']}; {sum(source['clips'].values())} clips kept"
        )
    if broken:
        print("  the shards are complete and usable, without what was skipped")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.videos", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help=f"a video ({' '.join(VIDEOS)}), or a folder searched for videos and for "
        "folders of images, each of them a video in numeric order",
    )
    add("--out", required=True, help="folder to make, e.g. data/street")
    add("--image_size", type=int, default=64, help="pixels, both sides")
    add(
        "--fps",
        type=float,
        help="keep the frames nearest to this rate, by their timestamps (default: all; folders "
        "of images have no timestamps and keep all)",
    )
    add(
        "--clip_length",
        type=int,
        help="frames per clip (default: each source is one video per split)",
    )
    add(
        "--tile",
        type=int,
        help="cut frames into squares of this many pixels (default: the centre square)",
    )
    add(
        "--min_motion",
        type=float,
        help="drop clips in which less than this percent of the picture changes by "
        f"{GREY_LEVELS} grey levels at some time (default: {TILE_MOTION} with --tile, otherwise 0)",
    )
    add("--val", type=float, default=0.1, help="share of val")
    add("--test", type=float, default=0.1, help="share of test")
    add(
        "--split_by",
        choices=("auto", "source", "time"),
        default="auto",
        help="whole sources to each split, or "
        f"the first part of each to train, then val, then test (auto: source from {SPLIT_BY_SOURCE_FROM} of them on)",
    )
    add("--seed", type=int, default=0, help="of the choice of sources for val and test")
    add(
        "--allow_skips",
        action="store_true",
        help="exit with 0, not 1, if some source was broken or too small",
    )
    args = parser.parse_args(argv)
    for name, low, high in (
        ("image_size", 8, 4096),
        ("tile", 8, 65536),
        ("clip_length", 2, 10**6),
        ("fps", 0.001, 1000),
        ("min_motion", 0, 100),
        ("val", 0, 1),
        ("test", 0, 1),
        ("seed", 0, 2**31),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} must be from {low} to {high}, got {value}")
    if args.val + args.test >= 1:
        raise UserError(
            f"--val {args.val} and --test {args.test} leave nothing to train; make their sum less than 1"
        )
    if args.clip_length is None and (args.tile or args.min_motion):
        raise UserError(f"--{'tile' if args.tile else 'min_motion'} needs --clip_length")
    if args.min_motion is None:
        args.min_motion = TILE_MOTION if args.tile else 0.0
    return args


def main() -> int:
    args = parse()
    manifest = make(args, shlex.join(["python", "-m", "prepare.videos", *sys.argv[1:]]))
    report(manifest)
    return int(not args.allow_skips and any(source["skipped"] for source in manifest["sources"]))


if __name__ == "__main__":
    run_command(main)
