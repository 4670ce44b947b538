"""Convert the KTH actions (Schuldt, Laptev and Caputo, 2004), zips or AVIs, to shards.

    python -m prepare.kth --source KTH --out data/kth --sequences KTH/00sequences.txt

25 persons, six actions, four scenarios: 599 files of 160x120 at 25 frames per second (person 13 has
no handclapping in scenario 3). The published shards of Chen et al. correspond to `--split demo
--actions jogging running walking` without --sequences.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np

from prepare import build
from prepare.decode import Broken
from prepare.sources import Found, Source, Video, find, read_film
from runtime.console import UserError, run_command

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
NAME = re.compile(r"(person(\d\d)_([a-z]+)_d([1-4]))_uncomp\.avi", re.ASCII | re.IGNORECASE)
MISSING = "person13_handclapping_d3"  # not part of the dataset
# The official file ends after some 305 of the 370 frames that its header announces.
TRUNCATED = "person01_boxing_d4"
OFFICIAL = {
    "train": (11, 12, 13, 14, 15, 16, 17, 18),
    "val": (1, 4, 19, 20, 21, 23, 24, 25),
    "test": (2, 3, 5, 6, 7, 8, 9, 10, 22),
}
RULES = {
    "subjects": "persons 1-20 train, 21-25 test (SRVP, RIVER)",
    "official": "persons 11-18 train; 1, 4, 19-21, 23-25 val; 2, 3, 5-10, 22 test (Schuldt et al.)",
    "demo": "scenarios 1, 2 train, 3 val, 4 test (Chen et al.); every person is in all three",
}


def split_of(rule: str, person: int, scenario: int) -> str:
    if rule == "demo":
        return {1: "train", 2: "train", 3: "val", 4: "test"}[scenario]
    if rule == "subjects":
        return "train" if person <= 20 else "test"
    return next(split for split, persons in OFFICIAL.items() if person in persons)


def read_sequences(path: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """Read 00sequences.txt as {person01_boxing_d1: ((1, 95), (96, 185), ...)}.

    The pairs are closed ranges of frames, counted from 1.
    """
    try:
        text = Path(path).read_text(encoding="latin-1")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    # The file has text before and between its lines, so only lines with a name and ranges are read.
    runs = {}
    line = r"^\s*(person\d\d_[a-z]+_d[1-4])\s+frames\s+(.*)$"
    for name, rest in re.findall(line, text, re.M | re.ASCII | re.IGNORECASE):
        name = name.lower()
        ranges = re.findall(r"(\d+)\s*-\s*(\d+)", rest)
        if name in runs:
            raise UserError(f"{path}: {name} has two lines; remove one of them")
        runs[name] = tuple((int(first), int(last)) for first, last in ranges)
    if not runs:
        raise UserError(
            f"{path}: not one line like `person01_boxing_d1 frames 1-95, 96-185`; "
            "give KTH's 00sequences.txt"
        )
    return runs


def cut_runs(frames, runs: tuple[tuple[int, int], ...]) -> tuple[list, str | None]:
    """Return the clips of the runs, and a note if the file is shorter than the runs."""
    if not runs:
        raise Broken("no frames are labelled in --sequences")
    clips = []
    for first, last in runs:
        if 1 <= first <= min(last, len(frames)):
            clips.append(frames[first - 1 : last])
    # Runs that start after the last frame are dropped, so no clip may be left.
    if not clips:
        raise Broken(f"has {len(frames)} frames, but all its runs in --sequences start later")
    last = max(last for _, last in runs)
    if last <= len(frames):
        return clips, None
    return clips, f"has {len(frames)} frames, but --sequences goes to {last}; runs were shortened"


def read(source: Source, args: argparse.Namespace) -> Video:
    """Read a file, or its labelled runs, up to the first damage; raises Broken."""
    video = read_film(source, args.image_size, args.crop, keep_before_damage=True)
    if TRUNCATED in source.name.lower() and video.damage:
        note = f"the official file ends early ({video.damage}); the frames before are kept"
        video = video._replace(damage=None, note="; ".join(filter(None, (video.note, note))))
    if args.sequences is None:
        return video
    clips, beyond = cut_runs(np.concatenate(video.clips), source.detail)
    return video._replace(clips=clips, note="; ".join(filter(None, (video.note, beyond))) or None)


def find_sources(args: argparse.Namespace) -> Found:
    runs = read_sequences(args.sequences) if args.sequences else {}
    matches, broken = find(Path(args.source), NAME, "person01_walking_d1_uncomp.avi and the like")
    # Files of other actions match the pattern, too, and are not sources.
    sources = []
    for match, source in matches:
        person, action, scenario = int(match[2]), match[3].lower(), int(match[4])
        if action in args.actions and 1 <= person <= 25:
            sources.append(
                dataclasses.replace(
                    source,
                    split=split_of(args.split, person, scenario),
                    detail=runs.get(match[1].lower(), ()),
                )
            )
    if not sources:
        raise UserError(
            f"{args.source}: none of its {len(matches)} files shows {' or '.join(args.actions)}"
        )
    # Warn about missing files, but convert the others.
    expected = set()
    for person, action, scenario in itertools.product(range(1, 26), args.actions, range(1, 5)):
        expected.add(f"person{person:02d}_{action}_d{scenario}")
    expected -= {MISSING}
    absent = sorted(expected - {match[1].lower() for match, _ in matches})
    if absent:
        print(
            f"{args.source}: {len(absent)} of {len(expected)} files of KTH are missing, the first "
            f"is {absent[0]}"
        )
    return Found(sources, broken)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.kth", description=__doc__.splitlines()[0]
    )
    build.add_flags(parser, "folder with KTH's zips or AVIs, at any depth", 64)
    parser.add_argument(
        "--actions",
        nargs="+",
        choices=ACTIONS,
        default=list(ACTIONS),
        metavar="ACTION",
        help=f"actions to convert, of {', '.join(ACTIONS)} (default: all)",
    )
    parser.add_argument(
        "--split",
        choices=tuple(RULES),
        default="subjects",
        help="; ".join(f"{name}: {rule}" for name, rule in RULES.items()) + " (default: subjects)",
    )
    parser.add_argument(
        "--sequences",
        metavar="FILE",
        help="00sequences.txt: write one video per labelled run, without the empty frames between "
        "runs (default: one video per file)",
    )
    args = build.check_flags(parser.parse_args(argv))
    args.actions = sorted(set(args.actions))
    return args


def make(args: argparse.Namespace) -> dict:
    if args.split == "demo":
        print(
            "--split demo: every person is in train, val and test, so the test set has no new "
            "person"
        )
    return build.make(
        build.Recipe("KTH", "prepare.kth", read, RULES[args.split], 16), find_sources(args), args
    )


def main() -> int:
    args = parse()
    return build.report(make(args), args)


if __name__ == "__main__":
    run_command(main)
