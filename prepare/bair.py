"""Convert BAIR robot pushing (Ebert et al., 2017), TFRecords or folders of frames, to shards.

    python -m prepare.bair --source softmotion30_44k --out data/bair_64
    python -m prepare.bair --source bair_png --out data/bair_256 --image_size 256

The TFRecords are those of softmotion30_44k: 43,264 training videos and 256 test videos of 30 frames
of 64x64. The default camera is `image_aux1`, as in other work. The dataset has no val split:
`--val N` uses the last N training videos.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import numpy as np
from PIL import Image

from prepare import build, tfrecord
from prepare.decode import Broken
from prepare.frames import find_tree, read_tree, split_of
from prepare.naming import natural
from prepare.sources import Found, Source, Video, digest, files_below, read_content
from runtime.console import UserError, run_command

SIDE = 64  # pixels of the frames in the TFRecords
CAMERAS = ("image_aux1", "image_main")


def read_record(source: Source, size: int, camera: str) -> Video:
    """Read one record: raw frames (64, 64, 3) sorted by their numbers; raises Broken."""
    record = read_content(source)
    features = tfrecord.bytes_features(tfrecord.read_payload(record))
    pattern = re.compile(rf"(\d+)/{camera}/encoded", re.ASCII)
    frames = {}
    for name, value in features.items():
        if match := pattern.fullmatch(name):
            frames[int(match[1])] = value
    # Check the frame numbers before any pixel is decoded, so that the reason is the real one.
    if 0 not in frames:
        raise Broken(f"contains no frames 0, 1, … of {camera}")
    if sorted(frames) != list(range(len(frames))):
        raise Broken(f"frames of {camera} are missing")
    wrong = [k for k in sorted(frames) if len(frames[k]) != SIDE * SIDE * 3]
    if wrong:
        raise Broken(f"frame {wrong[0]} has {len(frames[wrong[0]]):,} bytes, not {SIDE}x{SIDE}x3")
    pictures = []
    for k in range(len(frames)):
        frame = np.frombuffer(frames[k], np.uint8).reshape(SIDE, SIDE, 3)
        if size != SIDE:
            resized = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
            frame = np.asarray(resized)
        pictures.append(frame)
    clip = np.stack(pictures)
    return Video(digest([record]), [clip], len(clip))


def read(source: Source, args: argparse.Namespace) -> Video:
    if source.path.lower().endswith(".tfrecords"):
        return read_record(source, args.image_size, args.camera)
    return read_tree(source, args.image_size, args.crop, args.extension)


def find_records(root: Path) -> Found:
    """Find the records of train/*.tfrecords and test/*.tfrecords."""
    found = Found()
    paths = [path for path in files_below(root) if path.suffix.lower() == ".tfrecords"]
    for path in sorted(paths, key=lambda path: (path.parent, natural(path))):
        name = path.relative_to(root).as_posix() if path != root else path.name
        place = split_of(name)
        if place is None:
            raise UserError(
                f"{path}: is not below a folder train, val or test of {root}; "
                "pass the folder that contains train/ and test/"
            )
        # A record is a source of its own: damage to one record does not lose the others of the
        # file.
        stamp = path.stat().st_mtime_ns
        try:
            for k, (offset, size) in enumerate(tfrecord.find_records(path)):
                found.sources.append(
                    Source(f"{place[1]}#{k}", place[0], str(path), "", offset, size, stamp)
                )
        except Broken as error:
            found.broken.append((name, f"{error}; the records before the damage are used"))
    return found


def hold_out(found: Found, count: int) -> Found:
    """Move the last `count` sources of train to val."""
    train = [k for k, source in enumerate(found.sources) if source.split == "train"]
    if count and count >= len(train):
        raise UserError(f"--val {count} leaves no training video: train has {len(train)} videos")
    chosen = set(train[len(train) - count :])
    sources = []
    for k, source in enumerate(found.sources):
        sources.append(dataclasses.replace(source, split="val") if k in chosen else source)
    return Found(sources, found.broken)


def find_sources(args: argparse.Namespace) -> Found:
    root = Path(args.source)
    found = find_records(root)
    if found.sources and args.image_size > SIDE:
        raise UserError(
            f"--image_size {args.image_size}: frames of TFRecords are {SIDE}x{SIDE}; "
            "pass folders of larger frames"
        )
    # Without TFRecords, search for folders of frames.
    if not found.sources and not found.broken:
        try:
            found = find_tree(root, args.extension)
        except UserError as error:
            raise UserError(f"no train/*.tfrecords, and no folders of frames: {error}") from None
    return hold_out(found, args.val)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.bair", description=__doc__.splitlines()[0]
    )
    build.add_flags(
        parser,
        "softmotion30_44k, the folder with the .tfrecords in train/ and test/; or a folder with "
        "train/<video>/<frame>.png and test/<video>/<frame>.png",
        64,
    )
    parser.add_argument(
        "--camera", choices=CAMERAS, default=CAMERAS[0], help="for TFRecords (default: image_aux1)"
    )
    parser.add_argument(
        "--val", type=int, default=0, help="videos at the end of train that become val (default: 0)"
    )
    parser.add_argument(
        "--extension",
        default="png",
        help="file extension of the frames in folders (default: png)",
    )
    args = build.check_flags(parser.parse_args(argv))
    if args.val < 0:
        raise UserError(f"--val must be at least 0, got {args.val}")
    args.extension = args.extension.lower().removeprefix(".")
    return args


def make(args: argparse.Namespace) -> dict:
    rule = "as the folders are"
    if args.val:
        rule += f", the last {args.val} of train to val"
    return build.make(
        build.Recipe("BAIR", "prepare.bair", read, rule, 256), find_sources(args), args
    )


def main() -> int:
    args = parse()
    return build.report(make(args), args)


if __name__ == "__main__":
    run_command(main)
