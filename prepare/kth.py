"""The KTH actions (Schuldt, Laptev and Caputo, 2004) to shards, from its six zips or its AVIs.

    python -m prepare.kth --source KTH --out data/kth --sequences KTH/00sequences.txt

25 persons, six actions, four scenarios: 599 files of 160x120 at 25 frames per second (person 13 has no third handclapping).
The published shards of Chen et al. are `--split demo --actions jogging running walking`, without --sequences.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

from prepare import build
from prepare.decode import Broken
from prepare.sources import Found, Source, Video, find, read_film
from runtime.console import UserError, run_command

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
NAME = re.compile(r"(person(\d\d)_([a-z]+)_d([1-4]))_uncomp\.avi", re.ASCII)
MISSING = "person13_handclapping_d3"  # by nature
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
    """{person01_boxing_d1: ((1, 95), (96, 185), ...)} as 00sequences.txt has it: frames from 1, both ends included."""
    try:
        text = Path(path).read_text(encoding="latin-1")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    runs = {}
    for name, rest in re.findall(
        r"^\s*(person\d\d_[a-z]+_d[1-4])\s+frames\s+(.*)$", text, re.M | re.ASCII
    ):
        runs[name] = tuple(
            (int(first), int(last)) for first, last in re.findall(r"(\d+)\s*-\s*(\d+)", rest)
        )
    if not runs:
        raise UserError(
            f"{path}: not one line like `person01_boxing_d1 frames 1-95, 96-185`; give KTH's 00sequences.txt"
        )
    return runs


def cut(frames, runs: tuple[tuple[int, int], ...]) -> tuple[list, str | None]:
    """The clips of the runs, and a note where the file is shorter than they say."""
    if not runs:
        raise Broken("no frames are labelled in --sequences")
    clips = [
        frames[first - 1 : last] for first, last in runs if 1 <= first <= min(last, len(frames))
    ]
    if not clips:
        raise Broken(f"has {len(frames)} frames, all of its runs in --sequences lie behind them")
    last = max(last for _, last in runs)
    beyond = (
        f"has {len(frames)} frames, --sequences goes to {last}; cut to what is there"
        if last > len(frames)
        else None
    )
    return clips, beyond


def read(source: Source, args: argparse.Namespace) -> Video:
    video = read_film(source, args.image_size, args.crop)
    if args.sequences is None:
        return video
    clips, beyond = cut(video.clips[0], source.detail)
    return video._replace(clips=clips, note="; ".join(filter(None, (video.note, beyond))) or None)


def find_sources(args: argparse.Namespace) -> Found:
    runs = read_sequences(args.sequences) if args.sequences else {}
    matches, broken = find(Path(args.source), NAME, "person01_walking_d1_uncomp.avi and the like")
    sources = []
    for match, source in matches:
        person, action, scenario = int(match[2]), match[3], int(match[4])
        if action in args.actions and 1 <= person <= 25:
            sources.append(
                dataclasses.replace(
                    source,
                    split=split_of(args.split, person, scenario),
                    detail=runs.get(match[1], ()),
                )
            )
    if not sources:
        raise UserError(
            f"{args.source}: none of its {len(matches)} files shows {' or '.join(args.actions)}"
        )
    expected = {
        f"person{p:02d}_{a}_d{d}" for p in range(1, 26) for a in args.actions for d in range(1, 5)
    } - {MISSING}
    absent = sorted(expected - {match[1] for match, _ in matches})
    if absent:
        print(
            f"{args.source}: {len(absent)} of {len(expected)} files of KTH are not there, {absent[0]} the first"
        )
    return Found(sources, broken)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.kth", description=__doc__.splitlines()[0]
    )
    build.add_flags(parser, "folder with KTH's zips or AVIs, in whatever folders", 64)
    parser.add_argument(
        "--actions",
        nargs="+",
        choices=ACTIONS,
        default=list(ACTIONS),
        metavar="ACTION",
        help=f"which of {', '.join(ACTIONS)} (default: all)",
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
        help="00sequences.txt: a video of each labelled run, so that the "
        "empty frames between them go (default: a video of each file)",
    )
    args = build.check_flags(parser.parse_args(argv))
    args.actions = sorted(set(args.actions))
    return args


def make(args: argparse.Namespace) -> dict:
    if args.split == "demo":
        print(
            "--split demo: every person is in train, val and test; what it tests is not a new person"
        )
    return build.make(
        build.Recipe("KTH", "prepare.kth", read, RULES[args.split], 16), find_sources(args), args
    )


def main() -> int:
    args = parse()
    return build.report(make(args), args)


if __name__ == "__main__":
    run_command(main)
