"""Shards and oracles of worlds that are simulated from an equation with noise.

Each trajectory is a video of float fields, a function of (seed, split, number) only. The oracle of
a world continues states of the test split, each many times with fresh noise: draws from the true
conditional law at every lead time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import h5py
import numpy as np
import scipy

from prepare import build
from prepare.sources import Found, Source, Video
from runtime.console import UserError, progress
from runtime.folders import Parts, command_line, write_atomically
from shards import Shards, check_space

# Trajectories or members that are simulated at once: few enough for their arrays to stay in the
# cache of a core.
GROUP = 4
# Groups per shard.
PER_SHARD = 2
# Frames of a trajectory where only the frames of a split are given.
FRAMES = 100
# Share of the trajectories in val, and in test.
HELD_OUT = 0.1
# Frames of a trajectory before the first state of the oracle, which is the last of them.
GIVEN = 10
ORACLE = "oracle.hdf5"
FORMAT_VERSION = 1


class World(Protocol):
    """Fields that evolve by an equation with noise, several at once.

    A state is an array (B, …); noise holds a generator for each of the B items. An item must not
    depend on the others.
    """

    every: float

    def start(self, noise: list[np.random.Generator]) -> np.ndarray:
        """Draw stationary states."""

    def advance(self, state: np.ndarray, noise: list[np.random.Generator]) -> np.ndarray:
        """Simulate the states for `every` units of time."""

    def to_field(self, state: np.ndarray) -> np.ndarray:
        """The fields (B, C, H, W) of the states."""

    def from_field(self, field: np.ndarray) -> np.ndarray:
        """The states of the fields (B, C, H, W)."""


class Kind(NamedTuple):
    """What the command of a world needs.

    module: e.g. prepare.heat. source: what the shards name as their source. build(size, every) ->
    World. facts: further entries of the manifest. size: the default of --size.
    """

    module: str
    source: str
    build: Callable[[int, float], World]
    channels: tuple[str, ...]
    facts: dict
    size: int


# ------------------------------------------------------------------------------------------- shards
def simulate(world: World, frames: int, noise: list[np.random.Generator]) -> np.ndarray:
    """Trajectories from stationary states -> (B, frames, C, H, W) float32."""
    state = world.start(noise)
    fields = [world.to_field(state)]
    for _ in range(frames - 1):
        state = world.advance(state, noise)
        fields.append(world.to_field(state))
    return np.stack(fields, 1).astype(np.float32)


def read(kind: Kind, source: Source, args: argparse.Namespace) -> Video:
    """Simulate a group of trajectories of one split. source.detail: the split's index, the number
    of the first trajectory, and the frames of each."""
    split, first, *lengths = source.detail
    numbers = range(first, first + len(lengths))
    noise = [np.random.default_rng([args.seed, split, number]) for number in numbers]
    fields = simulate(kind.build(args.size, args.every), max(lengths), noise)
    clips = [field[:length] for field, length in zip(fields, lengths)]
    digest = hashlib.sha256(fields.tobytes()).hexdigest()
    return Video(digest, clips, sum(lengths), 1 / args.every)


def divide(frames: int, length: int = FRAMES) -> list[int]:
    """Divide the frames of a split into trajectories of about `length` frames."""
    count = max(1, round(frames / length))
    return [frames // count + (k < frames % count) for k in range(count)]


def write_shards(kind: Kind, lengths: dict[str, list[int]], args: argparse.Namespace) -> dict:
    """Write the shards of all splits; return the manifest. lengths: frames of each trajectory."""
    if Path(args.out).exists():
        raise UserError(f"{args.out} already exists; remove it or choose another --out")
    # A size that the equation does not allow is an error before any process starts.
    kind.build(args.size, args.every)
    sources = []
    for index, split in enumerate(build.SPLITS):
        of_split = lengths.get(split, [])
        for first in range(0, len(of_split), GROUP):
            group = tuple(of_split[first : first + GROUP])
            name = f"{split}/{first:05d}-{first + len(group) - 1:05d}"
            sources.append(Source(name, split, "", detail=(index, first, *group)))
    recipe = build.Recipe(
        dataset=kind.source,
        module=kind.module,
        read=partial(read, kind),
        split_rule="each trajectory by its own seed: (--seed, split, number)",
        per_shard=PER_SHARD,
        key="fields",
        unit="group",
        versions={"scipy": scipy.__version__},
        frame_rule=f"{args.size}x{args.size}, every {args.every:g} units of time",
        facts=kind.facts,
        channels=kind.channels,
    )
    return build.make(recipe, Found(sources), args)


def make(
    kind: Kind,
    out: str | Path,
    frames: dict[str, int],
    size: int | None = None,
    every: float = 0.5,
    seed: int = 0,
    command: str = "",
) -> dict:
    """Write frames[split] frames per split to out/{split}/, in trajectories of about 100; return
    the manifest. command: ignored, the shards name the command that repeats them."""
    args = argparse.Namespace(
        out=str(out), size=size or kind.size, every=every, seed=seed, workers=1, limit=None
    )
    return write_shards(kind, {split: divide(count) for split, count in frames.items()}, args)


# ------------------------------------------------------------------------------------------- oracle
class Plan(NamedTuple):
    """An oracle to simulate: `members` continuations, over `leads` frames, of each state.

    video, frame: (states,), where the states are in the test split.
    """

    root: Path
    kind: Kind
    size: int
    every: float
    seed: int
    members: int
    leads: int
    video: np.ndarray
    frame: np.ndarray


def choose_states(lengths: np.ndarray, states: int, leads: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced states with GIVEN - 1 frames before and `leads` frames after them.

    lengths: frames of the videos. -> video (states,), frame (states,). UserError if there are
    fewer.
    """
    counts = np.maximum(lengths - (GIVEN - 1) - leads, 0)
    total = int(counts.sum())
    if total < states:
        raise UserError(
            f"the test split has {total:,} states with {GIVEN - 1} frames before and {leads} "
            f"after them, --oracle needs {states:,}; lower --oracle or --leads, or simulate more"
        )
    chosen = np.floor((np.arange(states) + 0.5) * total / states).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    video = np.searchsorted(starts, chosen, side="right") - 1
    return video, chosen - starts[video] + GIVEN - 1


def continue_state(plan: Plan, world: World, field: np.ndarray, number: int) -> np.ndarray:
    """Continuations of a field (C, H, W) with fresh noise -> (members, leads, C, H, W) float32."""
    members = []
    for first in range(0, plan.members, GROUP):
        numbers = range(first, min(first + GROUP, plan.members))
        # Apart from the noise of the test split. NumPy takes k = 0 as no fourth number: member 0
        # has the noise of a training trajectory, on which no state of the test split depends.
        noise = [np.random.default_rng([plan.seed, 0, number, k]) for k in numbers]
        state = world.from_field(np.repeat(field[None], len(noise), 0))
        fields = []
        for _ in range(plan.leads):
            state = world.advance(state, noise)
            fields.append(world.to_field(state))
        members.append(np.stack(fields, 1))
    return np.concatenate(members).astype(np.float32)


def simulate_states(plan: Plan, parts: Parts, first: int, show: bool) -> None:
    """Simulate the continuations of all states that no other process simulates, from `first` on."""
    shards = Shards(plan.root / "test", "fields")
    world = plan.kind.build(plan.size, plan.every)
    total = len(plan.video)
    with progress(total if show else 0, "oracle", "state", len(parts.written())) as bar:
        for k in parts.claim(first):
            if k is None:
                time.sleep(0.2)
            else:
                field = shards.read(int(plan.video[k]), np.array([plan.frame[k]]))[0]
                parts.write(k, {"members": continue_state(plan, world, field, k)})
            bar.update(len(parts.written()) - bar.n)


def write_oracle(plan: Plan, command: str, workers: int) -> Path:
    """Simulate the oracle into plan.root / ORACLE, by atomic rename; return its path.

    Finished states are kept in a folder beside it, so that the same command resumes.
    """
    out = plan.root / ORACLE
    if out.exists():
        raise UserError(f"{out} already exists; remove it to simulate another")
    total = len(plan.video)
    shards = Shards(plan.root / "test", "fields")
    shape = (total, plan.members, plan.leads, *shards.shape)
    size = 4 * math.prod(shape)
    # The states, and the file that they are copied to.
    check_space(out, 2 * size)
    facts = (plan.size, plan.every, plan.seed, *shape, FORMAT_VERSION, shards.fingerprint())
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    parts = Parts(plan.root / f".oracle.{key}", total, out.exists)
    spawn = multiprocessing.get_context("spawn")
    firsts = [total * k // workers for k in range(workers)]
    others = []
    for first in firsts[1:]:
        other = spawn.Process(target=simulate_in_worker, args=(plan, parts.dir, total, first))
        other.start()
        others.append(other)
    try:
        simulate_states(plan, parts, 0, show=True)
    finally:
        for other in others:
            other.terminate()
            other.join()
    with write_atomically(out) as temporary, h5py.File(temporary.name, "w", locking=False) as file:
        members = file.create_dataset("members", shape, np.float32)
        for k in range(total):
            with np.load(parts.file(k), allow_pickle=False) as part:
                members[k] = part["members"]
        file["video"] = plan.video
        file["frame"] = plan.frame
        file.attrs.update(
            format_version=FORMAT_VERSION,
            source=plan.kind.source,
            command=command,
            every=plan.every,
            seed=plan.seed,
            split="test",
            fingerprint=shards.fingerprint(),
        )
    shutil.rmtree(parts.dir)
    return out


def simulate_in_worker(plan: Plan, dir: Path, total: int, first: int) -> None:
    build.become_worker()
    simulate_states(plan, Parts(dir, total, (plan.root / ORACLE).exists), first, show=False)


def plan_oracle(kind: Kind, args: argparse.Namespace) -> Plan:
    """The oracle for the shards in args.out, simulated as their manifest states."""
    root = Path(args.out)
    path = root / "manifest.json"
    if not path.exists():
        raise UserError(f"no {path}; simulate the trajectories first, without --oracle")
    options = json.loads(path.read_text())["options"]
    shards = Shards(root / "test", "fields")
    video, frame = choose_states(shards.lengths, args.oracle, args.leads)
    every, size = options["every"], options["size"]
    return Plan(root, kind, size, every, args.seed, args.members, args.leads, video, frame)


# ------------------------------------------------------------------------------------------ command
def parse(kind: Kind, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {kind.module}", description=description)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--out", required=True, help="folder to create; with --oracle: folder of the shards")
    add("--size", type=int, default=kind.size, help=f"height and width (default {kind.size})")
    about = "number of trajectories, of which a tenth is val and a tenth is test (default 200)"
    add("--trajectories", type=int, default=200, help=about)
    add("--frames", type=int, default=FRAMES, help=f"frames per trajectory (default {FRAMES})")
    add("--every", type=float, default=0.5, help="units of time between two frames (default 0.5)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=cores, help=f"number of processes (default {cores})")
    about = "continue this number of states of the test split, in place of simulating shards"
    add("--oracle", type=int, default=0, help=about)
    add("--members", type=int, default=64, help="continuations of each state (default 64)")
    add("--leads", type=int, default=4, help="frames of each continuation (default 4)")
    args = parser.parse_args(argv)
    build.check_ranges(
        args,
        size=(8, 2048),
        trajectories=(3, 10**6),
        frames=(2, 10**6),
        every=(1e-3, 1e3),
        seed=(0, 2**31),
        workers=(1, 1024),
        oracle=(0, 10**6),
        members=(2, 10**5),
        leads=(1, 1000),
    )
    return args


def run(kind: Kind, description: str) -> int:
    """Run the command of a world; return the exit code."""
    args = parse(kind, description)
    if args.oracle:
        began = time.monotonic()
        path = write_oracle(plan_oracle(kind, args), command_line(kind.module), args.workers)
        print(
            f"{path}: {args.oracle} states, {args.members} continuations each over {args.leads} "
            f"frames, in {time.monotonic() - began:.1f} s"
        )
        return 0
    held_out = max(1, round(HELD_OUT * args.trajectories))
    counts = {"train": args.trajectories - 2 * held_out, "val": held_out, "test": held_out}
    lengths = {split: [args.frames] * count for split, count in counts.items()}
    args.limit = None
    # The flags of the oracle do not affect the shards.
    for name in ("oracle", "members", "leads"):
        delattr(args, name)
    return build.report(write_shards(kind, lengths, args), args, "group")
