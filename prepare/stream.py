"""Convert streams for lifelong learning (.npy chunks) to packed shards, one video per split.

    python -m prepare.stream --source FOLDER --out data/wmaze_published

The source folder contains config.json ({"T_total": …, "chunk_size": …}) and the folders train, test
and optionally val. Each of them has numbered chunks <chunk>.npy, or one folder of chunks per seed:
train/<seed>/<chunk>.npy. A chunk is (frames, height, width, 3), uint8 or floats in [0, 1].
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare.sources import is_hidden
from runtime.console import UserError, first_line, progress, run_command
from runtime.folders import command_line, complete, write_manifest
from shards import ShardWriter

SPLITS = ("train", "val", "test")
PIECE = 1 << 24  # array values per read, conversion and write
UNREADABLE = (OSError, ValueError, EOFError, TypeError, SyntaxError, MemoryError, OverflowError)


class Stream(NamedTuple):
    """The memory-mapped chunks of one split, in order."""

    chunks: list[tuple[Path, np.ndarray]]
    seed: str  # name of the seed's folder; empty if the chunks are in the folder of the split

    @property
    def frames(self) -> int:
        return sum(len(chunk) for _, chunk in self.chunks)


def by_number(path: Path) -> tuple[int, str]:
    """Sort key: the last number in the name, so that chunk_9.npy precedes chunk_10.npy."""
    digits = "".join(c if c.isdecimal() and c.isascii() else " " for c in path.stem).split()
    return (int(digits[-1]) if digits else -1), path.name


def read_config(source: Path) -> dict:
    path = source / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{source}: holds no config.json; --source is the folder of config.json, train/ and "
            "test/"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    # bool is a subclass of int, and true is no number of frames.
    for name in ("T_total", "chunk_size"):
        if name in config and (
            not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1
        ):
            raise UserError(f"{path}: {name} must be a positive integer, got {config[name]!r}")
    return config


def open_chunk(path: Path) -> np.ndarray:
    try:
        chunk = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(
            f"{path}: not a whole .npy file ({first_line(error)[:120]}); fetch it again"
        ) from None
    if (
        getattr(chunk, "ndim", 0) != 4
        or chunk.shape[3] != 3
        or not chunk.size
        or (chunk.dtype != np.uint8 and chunk.dtype.kind != "f")
    ):
        about = f"{chunk.shape} {chunk.dtype}" if isinstance(chunk, np.ndarray) else "no array"
        raise UserError(
            f"{path}: {about}; need (frames, height, width, 3), uint8 or floats in [0, 1]"
        )
    return chunk


def list_chunks(folder: Path) -> list[Path]:
    """Return the .npy files of a folder, sorted by number."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() == ".npy"]
    return sorted((path for path in paths if not is_hidden(path.name)), key=by_number)


def open_split(folder: Path, seed: str | None) -> Stream:
    """Open the chunks of train/<seed>, or of train itself."""
    seeds = sorted(
        (path for path in folder.iterdir() if path.is_dir() and list_chunks(path)), key=by_number
    )
    paths = list_chunks(folder)
    # A folder of several seeds holds several streams; which one is meant must be stated.
    name = ""
    if not paths and seeds:
        name = seeds[0].name if seed is None else seed
        if name not in (path.name for path in seeds) or (seed is None and len(seeds) > 1):
            known = ", ".join(path.name for path in seeds)
            raise UserError(f"{folder}: holds streams of the seeds {known}; choose one by --seed")
        paths = list_chunks(folder / name)
    if not paths:
        raise UserError(f"{folder}: no .npy chunks in it, nor in a folder per seed")
    chunks = [(path, open_chunk(path)) for path in paths]
    for path, chunk in chunks:
        if chunk.shape[1:] != chunks[0][1].shape[1:]:
            raise UserError(
                f"{path}: frames of {chunk.shape[1:]}, but {chunks[0][0].name} has "
                f"{chunks[0][1].shape[1:]}"
            )
    return Stream(chunks, name)


def check_whole(stream: Stream, folder: Path, config: dict, total: int | None) -> None:
    """UserError if a chunk is missing or too short: the video would jump there."""
    numbers = [by_number(path)[0] for path, _ in stream.chunks]
    # Chunks are numbered consecutively, or by the index of their first frame.
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step != config.get("chunk_size"):
        step = 1
    for before, after in zip(numbers, numbers[1:]):
        if after - before != step:
            raise UserError(f"{folder}: chunks between {before} and {after} are missing")
    for path, chunk in stream.chunks[:-1]:
        if len(chunk) != config.get("chunk_size", len(chunk)):
            raise UserError(
                f"{path}: {len(chunk):,} frames, but config.json's chunk_size is "
                f"{config['chunk_size']:,}; fetch it again"
            )
    if total and stream.frames < total:
        raise UserError(
            f"{folder}: {stream.frames:,} frames, but config.json's T_total is {total:,}; "
            "fetch the rest"
        )


def to_uint8(frames: np.ndarray, path: Path) -> np.ndarray:
    """Convert floats in [0, 1] to uint8 by rounding; return uint8 unchanged."""
    if frames.dtype == np.uint8:
        return np.asarray(frames)
    low, high = frames.min(), frames.max()
    # Written as `not (…)`, so that NaN is an error, too.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise UserError(f"{path}: values from {low:g} to {high:g}; floats must lie in [0, 1]")
    return np.clip(np.rint(frames.astype(np.float32) * 255), 0, 255).astype(np.uint8)


def write_stream(writer: ShardWriter, stream: Stream, limit: int, bar) -> None:
    """Write the first `limit` frames of a stream as one video."""
    # Convert a few frames at a time, to limit the memory.
    rows = max(1, PIECE // int(np.prod(stream.chunks[0][1].shape[1:])))
    for path, chunk in stream.chunks:
        for start in range(0, len(chunk), rows):
            frames = to_uint8(chunk[start : start + rows][: limit - writer.frames], path)
            if not len(frames):
                return
            (writer.append if writer.videos else writer.add)(frames)
            bar.update(len(frames))


def make(args: argparse.Namespace, command: str = "") -> dict[str, dict]:
    """Write shards and manifest.json to args.out by atomic rename; return the entries of splits."""
    began = time.monotonic()
    config = read_config(args.source)
    facts = {}
    folders = [args.source / split for split in SPLITS if (args.source / split).is_dir()]
    if not folders:
        raise UserError(f"{args.source}: holds no folder train, val or test")
    # Open and check all splits before anything is written.
    streams = {folder.name: open_split(folder, args.seed) for folder in folders}
    for folder in folders:
        # T_total is the length of the training stream only.
        total = config.get("T_total") if folder.name == "train" else None
        check_whole(streams[folder.name], folder, config, total)
    lengths = {}
    for split, stream in streams.items():
        lengths[split] = min(args.limit or stream.frames, stream.frames)
    with complete(args.out) as partial, progress(sum(lengths.values()), "frames", "frame") as bar:
        for split, stream in streams.items():
            with ShardWriter(
                partial / split, fps=args.fps, source=args.source.name, command=command
            ) as writer:
                write_stream(writer, stream, lengths[split], bar)
            facts[split] = {
                "frames": writer.frames,
                "chunks": len(stream.chunks),
                "seed": stream.seed,
            }
        write_manifest(
            partial,
            command,
            source_config=config,
            fps=args.fps,
            splits=facts,
            seconds=round(time.monotonic() - began, 2),
        )
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.stream", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder with config.json, train/ and test/")
    add("--out", required=True, help="folder to create, e.g. data/wmaze_published")
    add("--seed", help="name of the folder train/<seed> (required if there are several)")
    add("--fps", type=float, default=20.0, help="frames per second (balls: 10, maze: 20)")
    add("--limit", type=int, help="use only the first LIMIT frames of each split")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1 or not 0 < args.fps <= 1000:
        raise UserError("--limit must be at least 1, --fps above 0 and at most 1000")
    began = time.monotonic()
    splits = make(args, command_line("prepare.stream"))
    print(f"{args.out}: {time.monotonic() - began:.1f} s")
    for split, facts in splits.items():
        seed = f", seed {facts['seed']}" if facts["seed"] else ""
        print(f"  {split:5} {facts['frames']:11,} frames of {facts['chunks']:,} chunks{seed}")


if __name__ == "__main__":
    run_command(main)
