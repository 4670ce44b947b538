"""Convert CLEVRER (Yi et al., 2020), zips or MP4s, to shards.

    python -m prepare.clevrer --source CLEVRER --out data/clevrer

20,000 videos of 480x320 and 128 frames, split by number: 0-9999 train, 10000-14999 val,
15000-19999 test.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

from prepare import build
from prepare.sources import Found, Source, Video, find, read_film
from runtime.console import run_command

NAME = re.compile(r"video_(\d{5})\.mp4", re.ASCII | re.IGNORECASE)
LENGTH = 128  # frames of every video
SIZES = {"train": 10_000, "val": 5_000, "test": 5_000}


def split_of(number: int) -> str:
    return "train" if number < 10_000 else "val" if number < 15_000 else "test"


def read(source: Source, args: argparse.Namespace) -> Video:
    video = read_film(source, args.image_size, args.crop)
    if video.decoded == LENGTH or video.note:
        return video
    return video._replace(note=f"has {video.decoded} frames, the others {LENGTH}; kept")


def find_sources(args: argparse.Namespace) -> Found:
    matches, broken = find(Path(args.source), NAME, "video_00000.mp4 and the like")
    found = Found([], broken)
    for match, source in matches:
        number = int(match[1])
        if number < sum(SIZES.values()):
            found.sources.append(dataclasses.replace(source, split=split_of(number)))
    for split, size in SIZES.items():
        there = sum(source.split == split for source in found.sources)
        if there < size:
            print(f"{args.source}: has {there:,} of the {size:,} {split} videos of CLEVRER")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.clevrer", description=__doc__.splitlines()[0]
    )
    build.add_flags(parser, "folder with CLEVRER's zips or MP4s, at any depth", 128)
    return build.check_flags(parser.parse_args(argv))


def make(args: argparse.Namespace) -> dict:
    rule = "numbers 0-9999 train, 10000-14999 val, 15000-19999 test"
    return build.make(
        build.Recipe("CLEVRER", "prepare.clevrer", read, rule, 64), find_sources(args), args
    )


def main() -> int:
    args = parse()
    return build.report(make(args), args)


if __name__ == "__main__":
    run_command(main)
