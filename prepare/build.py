"""From source videos to a folder of shards with a manifest, over several processes: what prepare's scripts of datasets share.

A shard is written by one process from a fixed share of the sources, and kept with a note of what it was made from in
OUT.partial until all are complete. So the same command goes on where it stopped, and writes the same files whatever
--workers says.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import PIL

from prepare.decode import AV_VERSION, Broken
from prepare.sources import Found, Source, Video
from runtime.console import Failure, UserError, progress
from shards import PATTERN, Shards, ShardWriter

SPLITS = ("train", "val", "test")
FORMAT = 1  # of what a shard is made of by a given command; raise it when that changes
CROPS = {
    "squeeze": "the whole frame squeezed to {0}x{0}, bicubic",
    "center": "the centre square resized to {0}x{0}, bicubic",
}
HOW = ("workers", "allow_skips")  # flags that do not change what is written
FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.EFBIG,
)  # what runtime/console.py tells in one line


class Recipe(NamedTuple):
    """What the script of a dataset hands over."""

    dataset: str
    module: str  # prepare.kth
    read: Callable[[Source, argparse.Namespace], Video]  # may raise Broken
    split_rule: str
    per_shard: int  # sources
    key: str = "frames"  # or latents
    unit: str = "source video"  # what a source is
    frame_rule: str = ""  # what becomes of a frame; empty: as --crop and --image_size say
    versions: dict[str, str] = {}  # of what the reader needs besides
    facts: dict = {}  # more for the manifest


class Job(NamedTuple):
    """A shard to be written."""

    split: str
    number: int  # from 1
    sources: tuple[Source, ...]
    before: Source | None  # the one before them, where it is of the same video
    key: str  # of all that it is made from

    @property
    def name(self) -> str:
        return f"{self.split}_{self.number:04d}"


def add_flags(
    parser: argparse.ArgumentParser, source: str, image_size: int, crop: bool = True
) -> None:
    """source: its help; empty for what is made rather than read."""
    add = parser.add_argument
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if source:
        add("--source", required=True, help=source)
    add("--out", required=True, help="folder to make")
    add("--image_size", type=int, default=image_size, help="of frames: pixels, both sides")
    if crop:
        add(
            "--crop",
            choices=tuple(CROPS),
            default="squeeze",
            help="what becomes of frames that are not square: "
            "the whole squeezed to a square, or the centre square",
        )
    add("--limit", type=int, help="only the first so many videos of each split, to try it out")
    add(
        "--workers",
        type=int,
        default=cores,
        help=f"processes (default: one per core, here {cores})",
    )
    if source:
        add(
            "--allow_skips",
            action="store_true",
            help="exit with 0, not 1, if some source was broken",
        )


def check_flags(args: argparse.Namespace) -> argparse.Namespace:
    for name, low, high in (("image_size", 8, 4096), ("limit", 1, 10**9), ("workers", 1, 1024)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} must be from {low} to {high}, got {value}")
    if Path(args.out).exists():
        raise UserError(f"{args.out} already exists; remove it or choose another --out")
    return args


def options(args: argparse.Namespace) -> dict:
    return {
        name: value for name, value in vars(args).items() if name not in HOW and value is not None
    }


def command(recipe: Recipe, args: argparse.Namespace) -> str:
    """The command with its defaults spelled out, less what does not change the outcome."""
    words = [
        [
            f"--{name}",
            *(
                []
                if value is True
                else map(str, value)
                if isinstance(value, list)
                else [str(value)]
            ),
        ]
        for name, value in options(args).items()
        if value is not False
    ]
    return shlex.join(["python", "-m", recipe.module, *sum(words, [])])


def versions(recipe: Recipe) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "av": AV_VERSION,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    } | recipe.versions


def jobs_of(recipe: Recipe, sources: list[Source], args: argparse.Namespace) -> list[Job]:
    """The shards of each split, `per_shard` sources to each, in order."""
    made_by, jobs = [FORMAT, command(recipe, args), versions(recipe)], []
    for split in SPLITS:
        part = [source for source in sources if source.split == split]
        for start in range(0, len(part), recipe.per_shard):
            share = tuple(part[start : start + recipe.per_shard])
            before = (
                part[start - 1]
                if start and part[start].video and part[start].video == part[start - 1].video
                else None
            )
            key = json.dumps(
                [*made_by, [asdict(source) for source in (*share, *filter(None, [before]))]],
                sort_keys=True,
            )
            jobs.append(
                Job(
                    split,
                    start // recipe.per_shard + 1,
                    share,
                    before,
                    hashlib.sha256(key.encode()).hexdigest(),
                )
            )
    return jobs


# ------------------------------------------------------------------------------------------------------- one shard
def entry_of(name: str, split: str | None = None, skipped: str | None = None) -> dict:
    return {
        "name": name,
        "split": split,
        "sha256": None,
        "frames": 0,
        "videos": [],
        "note": None,
        "skipped": skipped,
    }


def video_before(job: Job, recipe: Recipe, args: argparse.Namespace) -> str:
    """The video that the shard before ends with and that this one may go on with: none if the source between is broken, which
    is for each process to see by itself."""
    try:
        if job.before:
            recipe.read(job.before, args)
            return job.before.video
    except Broken:
        pass
    return ""


def write_videos(dir: Path, job: Job, recipe: Recipe, args: argparse.Namespace) -> list[dict]:
    """The shard of a job in a folder of its own -> the sources' entries in the manifest."""
    entries, writer = [], None
    try:
        last = video_before(job, recipe, args)
        for source in job.sources:
            entries.append(entry_of(source.name, source.split))
            try:
                video = recipe.read(source, args)
            except Broken as error:
                entries[-1]["skipped"], last = str(error), ""
                continue
            goes_on, last = bool(last) and source.video == last, source.video
            writer = writer or ShardWriter(
                dir,
                recipe.key,
                video.rate,
                recipe.dataset,
                command(recipe, args),
                shard_bytes=sys.maxsize,
                continues=goes_on,
            )
            for clip in video.clips:
                (writer.append if goes_on else writer.add)(clip, **video.extra)
            entries[-1].update(
                sha256=video.sha256,
                frames=video.decoded,
                note=video.note,
                videos=[len(clip) for clip in video.clips],
            )
        if writer and writer.frames:
            writer.close()
    except OSError as error:  # HDF5's name no file
        if writer:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                writer.__exit__(type(error))
        number = getattr(error, "errno", None)
        raise (
            OSError(number, os.strerror(number), str(dir.parents[1])) if number in FULL else error
        ) from None
    return entries


def write_shard(partial: Path, job: Job, recipe: Recipe, args: argparse.Namespace) -> list[dict]:
    """Writes one shard, complete or not at all, and then the note that says so."""
    work, final = (
        partial / "work" / job.name,
        partial / "out" / job.split / f"shard_{job.number:04d}.hdf5",
    )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        entries = write_videos(work, job, recipe, args)
        made = next(work.glob(PATTERN), None)
        if made:
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made, final)
        note = work / "note.json"
        note.write_text(json.dumps({"key": job.key, "shard": made is not None, "entries": entries}))
        os.replace(note, partial / "notes" / f"{job.name}.json")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return entries


def finished(partial: Path, job: Job) -> list[dict] | None:
    """The entries of a shard that an earlier run has completed, from the same sources with the same flags."""
    try:
        note = json.loads((partial / "notes" / f"{job.name}.json").read_text())
        whole = (
            not note["shard"]
            or (partial / "out" / job.split / f"shard_{job.number:04d}.hdf5").exists()
        )
        return note["entries"] if whole and note["key"] == job.key else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


# ---------------------------------------------------------------------------------------------------------- all of them
def become_worker() -> None:
    """Ctrl-C is for the first process alone; where that is gone, so am I."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_all(
    partial: Path, jobs: list[Job], recipe: Recipe, args: argparse.Namespace
) -> Iterator[tuple[Job, list[dict]]]:
    """Each job with its entries, as it is done."""
    if min(args.workers, len(jobs)) < 2:
        yield from ((job, write_shard(partial, job, recipe, args)) for job in jobs)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(args.workers, len(jobs)), multiprocessing.get_context("spawn"), become_worker
    )
    try:
        futures = {pool.submit(write_shard, partial, job, recipe, args): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise Failure(
            f"{args.out}: a process was killed, for want of memory perhaps; the same command goes on, "
            "with fewer --workers if it must"
        ) from None
    finally:  # where something stopped it: the others stop too, what they have begun goes
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()


def make(recipe: Recipe, found: Found, args: argparse.Namespace) -> dict:
    """Writes the shards and manifest.json to args.out, which appears when all are complete; returns the manifest."""
    began, out = time.monotonic(), Path(args.out)
    partial = out.with_name(out.name + ".partial")
    found = found.limited(args.limit)
    jobs = jobs_of(recipe, found.sources, args)
    (partial / "notes").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial / "work", ignore_errors=True)
    done = {job.name: entries for job in jobs if (entries := finished(partial, job)) is not None}
    rest = [job for job in jobs if job.name not in done]
    before = sum(map(len, done.values()))
    if done:
        print(f"{partial}: {before:,} of {len(found.sources):,} {recipe.unit}s are done already")
    try:
        with (
            progress(len(found.sources), recipe.dataset, recipe.unit.split()[-1], before) as bar,
            contextlib.closing(
                write_all(partial, rest, recipe._replace(facts={}), args)
            ) as written,
        ):
            for name, reason in found.broken:
                bar.write(f"{name}: {reason}; skipped", sys.stderr)
            for job, entries in written:
                done[job.name] = entries
                bar.update(len(entries))
                for entry in entries:
                    tell(entry, bar)
    finally:
        shutil.rmtree(partial / "work", ignore_errors=True)
    entries = [entry for job in jobs for entry in done[job.name]] + [
        entry_of(name, skipped=reason) for name, reason in found.broken
    ]
    return finish(recipe, partial, jobs, entries, args, time.monotonic() - began)


def tell(entry: dict, bar) -> None:
    if entry["skipped"]:
        bar.write(f"{entry['name']}: {entry['skipped']}; skipped", sys.stderr)
    elif entry["note"]:
        bar.write(f"{entry['name']}: {entry['note']}", sys.stderr)


def finish(
    recipe: Recipe, partial: Path, jobs: list[Job], entries: list[dict], args, seconds: float
) -> dict:
    """Writes the manifest beside the shards, and gives the whole its name."""
    wanted = {partial / "out" / job.split / f"shard_{job.number:04d}.hdf5" for job in jobs}
    for stale in set((partial / "out").glob(f"*/{PATTERN}")) - wanted:  # of a run with other flags
        stale.unlink()
    present = [split for split in SPLITS if any((partial / "out" / split).glob(PATTERN))]
    if not present:
        reasons = [entry["skipped"] for entry in entries if entry["skipped"]]
        shutil.rmtree(partial)
        raise UserError(
            f"{getattr(args, 'source', args.out)}: not one video in {len(entries)} sources"
            + f"; the first: {reasons[0]}" * bool(reasons)
        )
    shards = {split: Shards(partial / "out" / split, recipe.key) for split in present}
    manifest = {
        "dataset": recipe.dataset,
        "command": command(recipe, args),
        "options": options(args),
        "versions": versions(recipe),
        "split_rule": recipe.split_rule,
        "resize_rule": recipe.frame_rule or CROPS[args.crop].format(args.image_size),
        "fps": shards[present[0]].fps,
        "skipped": sum(bool(entry["skipped"]) for entry in entries),
        "splits": {
            split: {
                "videos": len(part),
                "frames": int(part.lengths.sum()),
                "shards": len(part.paths),
                "shortest": int(part.lengths.min()),
                "longest": int(part.lengths.max()),
                "fingerprint": part.fingerprint(),
            }
            for split, part in shards.items()
        },
        **recipe.facts,
        "shared": shared(entries),
        "sources": entries,
        "seconds": round(seconds, 2),
    }
    (partial / "out" / "manifest.json").write_text(json.dumps(manifest, indent=1))
    os.replace(partial / "out", args.out)
    shutil.rmtree(partial, ignore_errors=True)
    return manifest


def shared(entries: list[dict]) -> list[list[str]]:
    """The names of source videos that are the same, byte for byte, but lie in different splits."""
    by_content: dict[str, list[dict]] = {}
    for entry in entries:
        if entry["sha256"]:
            by_content.setdefault(entry["sha256"], []).append(entry)
    return [
        [entry["name"] for entry in same]
        for same in by_content.values()
        if len({e["split"] for e in same}) > 1
    ]


def report(manifest: dict, args: argparse.Namespace, unit: str = "source video") -> int:
    """Prints the summary -> the exit code."""
    skipped = [entry for entry in manifest["sources"] if entry["skipped"]]
    print(
        f"{args.out}: {len(manifest['sources']):,} {unit}s in {manifest['seconds']:.1f} s; "
        f"{manifest['split_rule']}; {manifest['resize_rule']}"
    )
    for split, part in manifest["splits"].items():
        print(
            f"  {split:5} {part['videos']:9,} videos {part['frames']:11,} frames, "
            f"{part['shortest']} to {part['longest']} each"
        )
    print(
        f"  skipped: {len(skipped):,} {unit}s"
        + "; the shards are complete and usable without them" * bool(skipped)
    )
    for entry in skipped[:20]:
        print(f"  {entry['name']}: {entry['skipped']}")
    if len(skipped) > 20:
        print(f"  … and {len(skipped) - 20:,} more, named in {args.out}/manifest.json")
    for names in manifest["shared"][:5]:
        more = f" and {len(names) - 4:,} more" * (len(names) > 4)
        print(f"  warning: the same video in different splits: {', '.join(names[:4])}{more}")
    return int(bool(skipped or manifest["shared"]) and not getattr(args, "allow_skips", False))
