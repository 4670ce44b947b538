"""Convert a folder of videos or of image sequences to packed shards of square clips.

    python -m prepare.videos --source ~/street --out data/street --image_size 64 --tile 192 \\
        --clip_length 24

Train, val and test are split by source video or by time, so clips of different splits never
overlap. No clip crosses a hole in the timestamps. Memory use: one or two frames at full size, and
one clip of resized frames per tile. A table with the outcome of each source is printed at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from prepare.build import SPLITS, check_ranges
from prepare.container import AV_VERSION
from prepare.decode import (
    MAX_GAP,
    Broken,
    crop_boxes,
    keeps_own_rate,
    list_findings,
    probe,
    read,
    why,
)
from prepare.naming import group_by_kind, put_in_order
from prepare.outcome import Source, report
from prepare.sources import walk
from prepare.splits import digest, group_by_digest, split_at, split_sources, time_cuts
from runtime.console import UserError, printable, progress, run_command
from runtime.folders import command_line, complete, write_manifest
from shards import ShardWriter

VIDEOS = (
    *(".avi", ".mp4", ".m4v", ".mkv", ".webm", ".mov", ".gif", ".3gp", ".flv", ".wmv", ".ogv"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".h264", ".dv"),
)
IMAGES = (".png", ".jpg", ".jpeg")
SPLIT_BY_SOURCE_FROM = 10  # sources; with fewer, `auto` splits by time
# Percentage of cells in motion. In OpenCV's vtest.avi, tiles without a person have less than 0.8,
# and most tiles with a person have more than 1.5.
TILE_MOTION = 1.5
GRID, GREY_LEVELS = 16, 20  # cells per side, and threshold, of measure_motion()
CHUNK = 256  # frames per write where a clip is a whole video


def measure_motion(clip: np.ndarray) -> float:
    """Return the percentage of cells of a clip (T, S, S, 3) uint8 that change over time.

    A frame has about 16 x 16 cells. Averaging over a cell suppresses sensor noise, compression
    flicker and fluttering tape. A cell changes if its grey level at some time differs from its
    median over time by more than 20 of 255.
    """
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
    """Return the videos and the folders of images, sorted by path; links are followed.

    The images of a folder are one video per kind (see prepare/naming.py), in the order of their
    numbers. If the order is unknown, `skipped` of the source states why. Prints a line for images
    that belong to no video. Raises UserError if nothing is found.
    """
    found = []
    if root.is_file() and root.suffix.lower() in VIDEOS:
        found.append(Source(root, root.name))
    for folder, names in walk(root):
        # Images beside videos are usually previews of these.
        videos = [name for name in names if name.lower().endswith(VIDEOS)]
        images = [name for name in names if name.lower().endswith(IMAGES)]
        for name in videos:
            found.append(Source(folder / name, str((folder / name).relative_to(root))))
        if images and videos:
            print(f"{printable(folder)}: holds videos, so its {len(images)} images are left out")
        else:
            found += image_sources(root, folder, images)
    if not found:
        lacks = f"no video ({' '.join(VIDEOS)}) and no folder of images ({' '.join(IMAGES)}) in it"
        missing = "no such file or folder"
        raise UserError(f"{printable(root)}: {lacks if root.exists() else missing}")
    return sorted(found, key=lambda source: source.name)


def image_sources(root: Path, folder: Path, names: list[str]) -> list[Source]:
    """Return one source per kind of image in a folder that has at least two of the kind."""
    kinds = group_by_kind(names)
    # A kind with one image only is no video.
    several = {kind: members for kind, members in kinds.items() if len(members) > 1}
    alone = [members[0] for members in kinds.values() if len(members) == 1]
    place = folder.relative_to(root)
    if len(alone) > 1 and not several:
        source = Source(folder, str(place))
        source.skipped = f"the names {alone[0]} and {alone[1]} do not determine an order"
        return [source]
    if alone:
        listed = ", ".join(alone[:3]) + (", …" if len(alone) > 3 else "")
        print(f"{printable(folder)}: single images of a kind are left out: {printable(listed)}")
    sources = []
    for kind, members in several.items():
        source = Source(folder, str(place if len(several) == 1 else place / kind))
        try:
            ordered = put_in_order(members)
            source.images = [folder / name for name in ordered.names]
            source.breaks = ordered.breaks
            source.notes += ordered.notes
        except Broken as error:
            source.skipped = str(error)
        sources.append(source)
    return sources


class Cutter:
    """Collects the frames of a source, one clip per tile, and writes full clips to their split."""

    def __init__(
        self, source: Source, boxes: list, writers: dict[str, ShardWriter], args: argparse.Namespace
    ):
        self.source, self.boxes, self.writers = source, boxes, writers
        self.whole, self.min_motion = args.clip_length is None, args.min_motion
        length, size = args.clip_length or CHUNK, args.image_size
        self.clips = np.empty((len(boxes), length, size, size, 3), np.uint8)
        self.filled, self.split, self.part = 0, "", 0
        self.open = False  # whether the next clip continues the last video in the shard

    def add(self, image: Image.Image, split: str) -> None:
        # A clip never spans two splits, nor two parts of its source.
        if (split, self.source.part) != (self.split, self.part):
            self.finish()
            self.split, self.part = split, self.source.part
        for clip, box in zip(self.clips, self.boxes):
            clip[self.filled] = np.asarray(
                image.resize(clip.shape[1:3], Image.Resampling.BICUBIC, box=box)
            )
        self.filled += 1
        if self.filled == self.clips.shape[1]:
            self.write()

    def write(self) -> None:
        """Write the collected clips; count those with too little motion instead."""
        for clip in self.clips[:, : self.filled]:
            if self.open:
                self.writers[self.split].append(clip)
            elif self.min_motion and measure_motion(clip) < self.min_motion:
                self.source.still += 1
            else:
                self.writers[self.split].add(clip, rate=self.source.stored_rate or 0.0)
                self.source.clips[self.split] += 1
                self.open = self.whole
        self.filled = 0

    def finish(self) -> None:
        """End the current part: write the rest of a whole video, or drop an incomplete clip."""
        # A single frame between two holes is no video.
        alone = self.filled == 1 and not self.open and self.source.part > 1
        if self.filled and self.whole and not alone:
            self.write()
        self.source.remainder += self.filled
        self.filled, self.open = 0, False


def cut_clips(
    source: Source, cuts: dict[str, tuple[int, int]], writers: dict[str, ShardWriter], args, bar
) -> None:
    """Write the clips of one source; record problems in the source and print them to stderr."""
    if args.fps and source.rate and keeps_own_rate(source, args.fps):
        source.notes.append(
            f"--fps {args.fps:g} is above its rate of {source.rate:g}; every frame is kept, and "
            f"its clips keep the rate {source.rate:g}"
        )
    # The tiles follow from the size of the first frame, so the cutter is made with that frame.
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
            f"{source.path}: {source.skipped}; skipped after {source.decoded} frames; its first "
            f"{sum(source.clips.values())} clips are kept",
            sys.stderr,
        )
    source.notes = list_findings(source)
    for note in source.notes:
        bar.write(f"{source.path}: {note}", sys.stderr)
    # The total was an estimate, the number of frames that probing counted.
    bar.total += source.decoded - source.frames


def probe_sources(sources: list[Source], args: argparse.Namespace) -> list[Source]:
    """Probe all sources and return the usable sources."""
    with progress(len(sources), "counting frames", "file") as bar:
        for source in sources:
            source.max_gap = args.max_gap
            try:
                if source.skipped:
                    raise Broken(source.skipped)
                probe(source)
                # A source that cannot give a single tile is reported now, not after hours of
                # decoding.
                if min(source.size) < (args.tile or 1):
                    raise Broken(
                        "frames of {}x{} are smaller than --tile {}".format(
                            *source.size, args.tile or 1
                        )
                    )
                source.sha256 = digest(source.images or [source.path])
                source.stored_rate = source.rate if keeps_own_rate(source, args.fps) else args.fps
            except (Broken, OSError) as error:
                source.skipped = str(error) if isinstance(error, Broken) else why(error)
                bar.write(f"{source.path}: {source.skipped}; skipped", sys.stderr)
            bar.update()
    return [source for source in sources if source.skipped is None]


def plan_splits(
    sources: list[Source], args: argparse.Namespace
) -> tuple[str, list[dict[str, tuple[int, int]]]]:
    """Return the rule (source or time) and, per source, the range of frames of each split.

    Sources of the same content get the same split, and a note that says so.
    """
    fractions = {"train": 1 - args.val - args.test, "val": args.val, "test": args.test}
    fractions = {split: fraction for split, fraction in fractions.items() if fraction}
    groups = group_by_digest(sources)
    for first, *copies in groups:
        for copy in copies:
            copy.notes.append(f"the same content as {first.name}; both are in the same split")
    auto = "source" if len(groups) >= SPLIT_BY_SOURCE_FROM else "time"
    rule = auto if args.split_by == "auto" else args.split_by
    if rule == "time":
        return rule, [time_cuts(source.frames, fractions) for source in sources]
    digests = [source.sha256 for source in sources]
    splits = split_sources(len(sources), fractions, args.seed, digests)
    return rule, [{split: (0, source.frames)} for split, source in zip(splits, sources)]


def make(args: argparse.Namespace, command: str = "") -> dict:
    """Write the shards and manifest.json to args.out by atomic rename; return the manifest."""
    began = time.monotonic()
    root = Path(args.source)
    with complete(args.out) as partial:
        sources = find_sources(root)
        usable = probe_sources(sources, args)
        rule, cuts = plan_splits(usable, args)
        # The shards have one rate, that of the first source; other rates are stored per video.
        fps = next((source.stored_rate for source in usable if source.stored_rate), None)
        # A split of share 0 has no folder; train always exists.
        writers = {
            split: ShardWriter(partial / split, fps=fps, source=root.name, command=command)
            for split, share in zip(SPLITS, (1, args.val, args.test))
            if share
        }
        write_clips(usable, cuts, writers, args)
        dropped = {
            "still": sum(source.still for source in sources),
            "skipped": len([source for source in sources if source.skipped]),
            "remainder": sum(source.remainder for source in sources),
        }
        if not any(writer.videos for writer in writers.values()):
            raise UserError(
                f"{root}: no clip in {len(sources)} sources; dropped {dropped['still']} still "
                f"clips, {dropped['remainder']} frames left over, skipped {dropped['skipped']} "
                "sources"
            )
        manifest = {
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
        write_manifest(partial, command, **manifest)
    return {"command": command, **manifest}


def write_clips(
    usable: list[Source], cuts: list[dict], writers: dict[str, ShardWriter], args
) -> None:
    """Write the clips of all sources, and remove the folders of empty splits."""
    total = sum(source.frames for source in usable)
    with ExitStack() as stack, progress(total, "frames", "frame") as bar:
        for writer in writers.values():
            stack.enter_context(writer)
        for source, part in zip(usable, cuts):
            cut_clips(source, part, writers, args, bar)
    for writer in writers.values():
        if not writer.videos:
            writer.dir.rmdir()


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help=f"a video ({' '.join(VIDEOS)}), or a folder that is searched for videos and for "
        "folders of images; each folder of images is a video in numeric order",
    )
    add("--out", required=True, help="folder to create, e.g. data/street")
    add("--image_size", type=int, default=64, help="pixels, both sides")
    add(
        "--fps",
        type=float,
        help="frame rate to resample to, by the frames' timestamps: frames are dropped or repeated "
        "(default: keep all frames; slower videos and folders of images keep all in any case)",
    )
    add(
        "--max_gap",
        type=float,
        default=MAX_GAP,
        help="a step of over this many median steps between the timestamps of two frames is a "
        f"hole, which no clip crosses (default: {MAX_GAP:g})",
    )
    clip_length = "frames per clip (default: each source is one video per split)"
    add("--clip_length", type=int, help=clip_length)
    tile = "cut frames into squares of this many pixels (default: the centre square)"
    add("--tile", type=int, help=tile)
    add(
        "--min_motion",
        type=float,
        help="drop clips in which less than this percentage of the picture changes by "
        f"{GREY_LEVELS} grey levels at some time (default: {TILE_MOTION} with --tile, else 0)",
    )
    add("--val", type=float, default=0.1, help="share of val")
    add("--test", type=float, default=0.1, help="share of test")
    add(
        "--split_by",
        choices=("auto", "source", "time"),
        default="auto",
        help="source: each source belongs to one split. time: the first part of each source is "
        "train, then val, then test. auto: source if there are at least "
        f"{SPLIT_BY_SOURCE_FROM} sources, else time",
    )
    add("--seed", type=int, default=0, help="seed of the choice of sources for val and test")
    skips = "exit with 0, not 1, if some source is broken or too small"
    add("--allow_skips", action="store_true", help=skips)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.videos", description=__doc__.splitlines()[0]
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    check_ranges(
        args,
        image_size=(8, 4096),
        tile=(8, 65536),
        clip_length=(2, 10**6),
        fps=(0.001, 1000),
        max_gap=(1, 10**9),
        min_motion=(0, 100),
        val=(0, 1),
        test=(0, 1),
        seed=(0, 2**31),
    )
    if args.val + args.test >= 1:
        raise UserError(
            f"--val {args.val} and --test {args.test} leave nothing to train; "
            "make their sum less than 1"
        )
    if args.clip_length is None and (args.tile or args.min_motion):
        raise UserError(f"--{'tile' if args.tile else 'min_motion'} needs --clip_length")
    if args.min_motion is None:
        args.min_motion = TILE_MOTION if args.tile else 0.0
    return args


def main() -> int:
    args = parse()
    manifest = make(args, printable(command_line("prepare.videos")))
    report(manifest)
    return int(not args.allow_skips and any(source["skipped"] for source in manifest["sources"]))


if __name__ == "__main__":
    run_command(main)
