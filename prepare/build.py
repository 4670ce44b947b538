"""Convert source videos to a folder of shards with a manifest, in several processes.

The dataset scripts of prepare/ share this pipeline. Each shard is a job: one process writes it from
a fixed subset of the sources. Finished shards, each with a note of its inputs, are kept in
OUT.partial until all shards are complete. Therefore the same command resumes after an interruption,
and the output files do not depend on --workers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
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

from prepare.container import AV_VERSION
from prepare.decode import Broken
from prepare.manifest import entry_of, find_copies, find_shared, print_problem
from prepare.manifest import report as report
from prepare.sources import Found, Source, Video
from runtime.console import Failure, UserError, printable, progress
from runtime.folders import check_range
from shards import PATTERN, Shards, ShardWriter

SPLITS = ("train", "val", "test")
FORMAT = 2  # version of the shards; increase when the same command starts to write other content
CROPS = {
    "squeeze": "the whole frame squeezed to {0}x{0}, bicubic",
    "center": "the centre square resized to {0}x{0}, bicubic",
}
UNRECORDED = ("workers", "allow_skips")  # flags that do not change the output
# Errors of the disk, which runtime/console.py reports in one line.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


class Recipe(NamedTuple):
    """The parameters that a dataset script passes to this pipeline."""

    dataset: str
    module: str  # e.g. prepare.kth
    read: Callable[[Source, argparse.Namespace], Video]  # may raise Broken
    split_rule: str
    per_shard: int  # sources per shard
    key: str = "frames"  # or latents
    unit: str = "source video"  # name of one source in messages
    frame_rule: str = ""  # resize rule in the manifest; empty: by --crop and --image_size
    versions: dict[str, str] = {}  # of further packages that the reader uses
    facts: dict = {}  # further entries of the manifest
    channels: tuple[str, ...] = ()  # names of the channels of fields


class Job(NamedTuple):
    """A shard to write."""

    split: str
    number: int  # from 1
    sources: tuple[Source, ...]
    before: Source | None  # the last source of the previous shard, if the first source continues it
    key: str  # hash of all inputs: shards with the same key need not be written again

    @property
    def name(self) -> str:
        return f"{self.split}_{self.number:04d}"


def add_flags(
    parser: argparse.ArgumentParser, source: str, image_size: int, crop: bool = True
) -> None:
    """Add the shared flags. source: help text of --source; empty for generated data."""
    add = parser.add_argument
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if source:
        add("--source", required=True, help=source)
    add("--out", required=True, help="folder to create")
    add("--image_size", type=int, default=image_size, help="frame height and width in pixels")
    if crop:
        rule = (
            "how to make frames square: squeeze the whole frame, or crop the centre square "
            "(default: squeeze)"
        )
        add("--crop", choices=tuple(CROPS), default="squeeze", help=rule)
    add("--limit", type=int, help="use only the first LIMIT videos of each split, for a test")
    workers = f"number of processes (default: one per core, here {cores})"
    add("--workers", type=int, default=cores, help=workers)
    if source:
        skips = "exit with 0, not 1, if some source is broken"
        add("--allow_skips", action="store_true", help=skips)


def check_ranges(args: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """UserError if a flag that has a value is outside its closed range (low, high)."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None:
            check_range(name, value, low, high)


def check_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Check the shared flags and return them. UserError if --out exists."""
    check_ranges(args, image_size=(8, 4096), limit=(1, 10**9), workers=(1, 1024))
    if Path(args.out).exists():
        raise UserError(f"{args.out} already exists; remove it or choose another --out")
    return args


def list_options(args: argparse.Namespace) -> dict:
    """Return {flag: value} of the flags that change the output and have a value."""
    recorded = {}
    for name, value in vars(args).items():
        if name not in UNRECORDED and value is not None:
            recorded[name] = value
    return recorded


def full_command(recipe: Recipe, args: argparse.Namespace) -> str:
    """Return the command with all defaults, without the flags that do not change the output."""
    words = ["python", "-m", recipe.module]
    for name, value in list_options(args).items():
        if value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def list_versions(recipe: Recipe) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "av": AV_VERSION,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    } | recipe.versions


def plan_jobs(recipe: Recipe, sources: list[Source], args: argparse.Namespace) -> list[Job]:
    """Return the jobs of each split, with `per_shard` sources per shard, in order."""
    made_by = [FORMAT, full_command(recipe, args), list_versions(recipe)]
    jobs = []
    for split in SPLITS:
        part = [source for source in sources if source.split == split]
        for start in range(0, len(part), recipe.per_shard):
            number = start // recipe.per_shard + 1
            share = tuple(part[start : start + recipe.per_shard])
            # A video may continue from one shard to the next. Then the last source of the previous
            # shard is an input of this one.
            before = None
            if start and part[start].video and part[start].video == part[start - 1].video:
                before = part[start - 1]
            inputs = [asdict(source) for source in (*share, *filter(None, [before]))]
            text = json.dumps([*made_by, inputs], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()
            jobs.append(Job(split, number, share, before, key))
    return jobs


# ---------------------------------------------------------------------------------------- one shard
def video_before(job: Job, recipe: Recipe, args: argparse.Namespace) -> str:
    """Return the name of the video that ends the previous shard, if this shard may continue it.

    Empty if the last source of the previous shard is broken. The source is read again to find out,
    because the processes do not communicate.
    """
    try:
        if job.before:
            recipe.read(job.before, args)
            return job.before.video
    except Broken:
        pass
    return ""


def write_videos(dir: Path, job: Job, recipe: Recipe, args: argparse.Namespace) -> list[dict]:
    """Write the shard of a job to `dir`; return the manifest entries of its sources."""
    entries, writer, rate = [], None, None
    # `last` is the video that the next source may continue; a skipped source ends it.
    try:
        last = video_before(job, recipe, args)
        for source in job.sources:
            entries.append(entry_of(source.name, source.split))
            if source.copy_of:
                entries[-1]["copy_of"], last = source.copy_of, ""
                continue
            try:
                video = recipe.read(source, args)
            except Broken as error:
                entries[-1]["skipped"], last = str(error), ""
                continue
            # Append to the previous video if the source continues it.
            goes_on, last = bool(last) and source.video == last, source.video
            rate = rate if writer else video.rate
            writer = writer or ShardWriter(
                dir,
                recipe.key,
                rate,
                recipe.dataset,
                full_command(recipe, args),
                shard_bytes=sys.maxsize,
                continues=goes_on,
                channels=recipe.channels,
            )
            # The shard's fps is the rate of its first video; only other rates are stored per video.
            other = {} if video.rate == rate else {"rate": video.rate or 0.0}
            for clip in video.clips:
                if goes_on:
                    writer.append(clip, **video.extra)
                else:
                    writer.add(clip, **other, **video.extra)
            entries[-1].update(
                sha256=video.sha256,
                frames=video.decoded,
                note=video.note,
                damage=video.damage,
                videos=[len(clip) for clip in video.clips],
            )
        if writer and writer.frames:
            writer.close()
    except OSError as error:
        if writer:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                writer.__exit__(type(error))
        number = getattr(error, "errno", None)
        # HDF5's errors do not name a file, so name the output folder.
        if number in DISK_ERRORS:
            error = OSError(number, os.strerror(number), str(dir.parents[1]))
        raise error from None
    return entries


def write_shard(partial: Path, job: Job, recipe: Recipe, args: argparse.Namespace) -> list[dict]:
    """Write one shard by atomic rename, then the note that marks the shard as finished."""
    work = partial / "work" / job.name
    final = partial / "out" / job.split / f"shard_{job.number:04d}.hdf5"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        entries = write_videos(work, job, recipe, args)
        made = next(work.glob(PATTERN), None)
        if made:
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made, final)
        else:
            # An earlier run, or an earlier pass of this run, may have written this shard.
            final.unlink(missing_ok=True)
        note = work / "note.json"
        note.write_text(json.dumps({"key": job.key, "shard": made is not None, "entries": entries}))
        os.replace(note, partial / "notes" / f"{job.name}.json")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return entries


def finished(partial: Path, job: Job) -> list[dict] | None:
    """Return the entries of a shard that an earlier run wrote from the same inputs, else None."""
    shard = partial / "out" / job.split / f"shard_{job.number:04d}.hdf5"
    try:
        note = json.loads((partial / "notes" / f"{job.name}.json").read_text())
        whole = not note["shard"] or shard.exists()
        return note["entries"] if whole and note["key"] == job.key else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


# -------------------------------------------------------------------------------------- all of them
def become_worker() -> None:
    """Ignore Ctrl-C, which the main process handles, and exit when the main process exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_all(
    partial: Path, jobs: list[Job], recipe: Recipe, args: argparse.Namespace
) -> Iterator[tuple[Job, list[dict]]]:
    """Write all jobs; yield each finished job with its entries, in order of completion."""
    if min(args.workers, len(jobs)) < 2:
        yield from ((job, write_shard(partial, job, recipe, args)) for job in jobs)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(args.workers, len(jobs)), multiprocessing.get_context("spawn"), become_worker
    )
    try:
        # In order of completion, so that messages do not wait for the slowest shard.
        futures = {pool.submit(write_shard, partial, job, recipe, args): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise Failure(
            f"{args.out}: a process was killed, perhaps because memory ran out; run the same "
            "command again to resume, if necessary with fewer --workers"
        ) from None
    finally:
        # After an error or Ctrl-C, stop the other processes; their unfinished shards are removed.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()


def make(recipe: Recipe, found: Found, args: argparse.Namespace) -> dict:
    """Write the shards and manifest.json to args.out by atomic rename; return the manifest.

    Of source videos with the same content in different splits, those of one split are kept.
    """
    began, out = time.monotonic(), Path(args.out)
    partial = out.with_name(out.name + ".partial")
    found = found.limit_videos(args.limit)
    # The notes of an earlier run state which shards are complete, so they are kept.
    (partial / "notes").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial / "work", ignore_errors=True)
    for name, reason in found.broken:
        print(f"{printable(name)}: {reason}; skipped", file=sys.stderr)
    sources = found.sources
    # Copies are known only once all sources are read, so a second pass rewrites the shards that
    # contain copies, without them.
    try:
        while True:
            jobs = plan_jobs(recipe, sources, args)
            done = write_unfinished(recipe, partial, jobs, args)
            kept = leave_out_copies(jobs, done)
            if kept == sources:
                break
            sources = kept
    finally:
        shutil.rmtree(partial / "work", ignore_errors=True)
    entries = [entry for job in jobs for entry in done[job.name]]
    entries += [entry_of(name, skipped=reason) for name, reason in found.broken]
    return finish(recipe, partial, jobs, entries, args, time.monotonic() - began)


def write_unfinished(
    recipe: Recipe, partial: Path, jobs: list[Job], args: argparse.Namespace
) -> dict[str, list[dict]]:
    """Write the shards that are not finished; return the entries of all jobs by name."""
    done = {job.name: entries for job in jobs if (entries := finished(partial, job)) is not None}
    rest = [job for job in jobs if job.name not in done]
    total, before = sum(len(job.sources) for job in jobs), sum(map(len, done.values()))
    if done:
        print(f"{partial}: {before:,} of {total:,} {recipe.unit}s are done already")
    written = write_all(partial, rest, recipe._replace(facts={}), args)
    with (
        progress(total, recipe.dataset, recipe.unit.split()[-1], before) as bar,
        contextlib.closing(written),
    ):
        for job, entries in written:
            done[job.name] = entries
            bar.update(len(entries))
            for entry in entries:
                print_problem(entry, bar)
    return done


def leave_out_copies(jobs: list[Job], done: dict[str, list[dict]]) -> list[Source]:
    """Return the sources of all jobs; set `copy_of` for copies that must be left out.

    If sources in different splits have the same content, those in test are kept, or those in val if
    none is in test. So the splits for evaluation stay complete, and contain no training frame.
    Sources that are parts of longer videos are kept.
    """
    pairs = [pair for job in jobs for pair in zip(job.sources, done[job.name], strict=True)]
    first: dict[str, Source] = {}
    for source, entry in pairs:
        content = entry["sha256"]
        other = first.get(content)
        if content and (not other or SPLITS.index(source.split) > SPLITS.index(other.split)):
            first[content] = source
    kept = []
    for source, entry in pairs:
        original = first.get(entry["sha256"], source)
        if original.split != source.split and not source.video:
            source = dataclasses.replace(source, copy_of=original.name)
        kept.append(source)
    return kept


def finish(
    recipe: Recipe, partial: Path, jobs: list[Job], entries: list[dict], args, seconds: float
) -> dict:
    """Write the manifest beside the shards, and rename the folder to its final name."""
    wanted = {partial / "out" / job.split / f"shard_{job.number:04d}.hdf5" for job in jobs}
    # Remove shards of an earlier run with other flags.
    for stale in set((partial / "out").glob(f"*/{PATTERN}")) - wanted:
        stale.unlink()
    # A split without shards, for example because all its sources are broken, gets no folder.
    present = [split for split in SPLITS if any((partial / "out" / split).glob(PATTERN))]
    for split in set(SPLITS) - set(present):
        shutil.rmtree(partial / "out" / split, ignore_errors=True)
    if not present:
        reasons = [entry["skipped"] for entry in entries if entry["skipped"]]
        shutil.rmtree(partial)
        first = f"; the first: {reasons[0]}" if reasons else ""
        place = getattr(args, "source", args.out)
        place = ", ".join(place) if isinstance(place, list) else place
        raise UserError(f"{place}: not one video in {len(entries)} sources{first}")
    shards = {split: Shards(partial / "out" / split, recipe.key) for split in present}
    manifest = {
        "dataset": recipe.dataset,
        "command": full_command(recipe, args),
        "options": list_options(args),
        "versions": list_versions(recipe),
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
        "copies": find_copies(entries),
        "shared": find_shared(entries),
        "sources": entries,
        "seconds": round(seconds, 2),
    }
    (partial / "out" / "manifest.json").write_text(json.dumps(manifest, indent=1))
    os.replace(partial / "out", args.out)
    shutil.rmtree(partial, ignore_errors=True)
    return manifest
