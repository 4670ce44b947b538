"""NCCL: DDP and FSDP2 with one process on this GPU, and with one process per GPU of several."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import train_step
from benchmarks.gpu_steps.record import Steps, require
from benchmarks.gpu_steps.setup import (
    TINY_NET,
    Loop,
    Trial,
    build_config,
    clear,
    copy_state,
    relative_difference,
    start_trial,
    write_latents,
)
from runtime import parallel
from runtime.process import Process, StopSignals

WAYS = {
    "DDP": {},
    "DDP, accumulate": {"train.accumulate": 2},
    "FSDP2": {"train.shard": True},
    "FSDP2, accumulate, recompute": {
        "train.shard": True,
        "train.accumulate": 2,
        "train.recompute": True,
    },
}
COMPILED = {
    "FSDP2, compiled": {"train.shard": True, "train.compile": "default"},
    "DDP, compiled, recompute": {"train.compile": "default", "train.recompute": True},
}
SECONDS_TO_COMPILE = 15


class Several(int):
    """A number of processes, 1, that compares as more than 1.

    parallel.distribute and Process leave DDP, FSDP2 and collectives out where the world is 1.
    With this number they run on one GPU, through NCCL.
    """

    def __gt__(self, other: int) -> bool:
        return other == 1 or int(self) > other

    def __eq__(self, other: object) -> bool:
        return other != 1 and int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def connect(trial: Trial) -> Process:
    """Start a process group of one, as runtime.start does it for several."""
    options = {"device_id": trial.device} if trial.on_gpu else {}
    backend = "nccl" if trial.on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    groups = {}
    if "stages" in {field.name for field in dataclasses.fields(Process)}:
        groups["stages"] = dist.new_group(backend="gloo")
    return Process(0, Several(1), trial.device, **groups)


def check_collectives(process: Process) -> dict:
    process.barrier()
    value = {"path": Path("x"), "numbers": [1, 2.5]}
    require(process.agree(value) == value, "agree changed the value")
    signal = StopSignals(process).agreed(0)
    require(signal == 0, f"signal {signal} was agreed on, none was sent")
    return {"backend": dist.get_backend()}


def update_among_several(trial: Trial, process: Process, dir: Path, options: dict) -> dict:
    """Three updates, moments reloaded before the last; the weights change as without NCCL."""
    clear(trial)
    network = {**TINY_NET, "model.depth": 2, "model.dropout": 0.0, "train.precision": "float32"}
    config = build_config(trial, 8, **{**network, **options})
    loop = Loop(trial, config, dir, process)
    initial = flatten(copy_state(loop.learner)["ema"])
    loop()
    loop()
    state = copy_state(loop.learner)
    parallel.load_optimizer(loop.learner.optimizer, state["opt"])
    loop()
    alone = Loop(trial, build_config(trial, 8, **network), dir)
    for _ in range(3):
        alone()
    change = flatten(copy_state(loop.learner)["ema"]) - initial
    expected = flatten(copy_state(alone.learner)["ema"]) - initial
    difference = relative_difference(change, expected)
    require(difference < 0.1, f"relative difference {difference:.2g} to the change of one process")
    return {**loop.result(), "relative_difference": difference}


def flatten(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def disconnect(process: Process) -> dict:
    if hasattr(process, "close"):
        process.close()
    else:
        dist.destroy_process_group()
    require(not dist.is_initialized(), "the process group is still there")
    return {}


def train_with_torchrun(count: int, size: str, batch: int, shard: bool) -> dict:
    """Samples/s of one and of `count` processes, which torchrun starts."""
    args = argparse.Namespace(
        precision="auto", compile="auto", repeats=5, accumulate=1, shard=shard, recompute=False
    )
    found = {}
    for processes in (1, count):
        run = train_step.launch_worker(args, size, batch, processes)
        found[f"samples_per_s, {processes}"] = run["samples_per_second"]
        found[f"peak_gib, {processes}"] = run["peak_gib"]
    found["ratio"] = found[f"samples_per_s, {count}"] / found["samples_per_s, 1"]
    return found


def run(steps: Steps) -> None:
    trial = start_trial()
    process = connect(trial)
    steps.run("collectives", check_collectives, process)
    with tempfile.TemporaryDirectory() as folder:
        dir = write_latents(trial, Path(folder))
        for name, options in WAYS.items():
            steps.run(name, update_among_several, trial, process, dir, options)
        for name, options in COMPILED.items() if trial.on_gpu else ():
            needs = SECONDS_TO_COMPILE
            steps.run(name, update_among_several, trial, process, dir, options, needs=needs)
    steps.run("end of the process group", disconnect, process)
    count = torch.cuda.device_count()
    if trial.on_gpu and count > 1:
        steps.run(f"torchrun, DDP, {count} GPUs", train_with_torchrun, count, "B", 32, False)
        steps.run(f"torchrun, FSDP2, {count} GPUs", train_with_torchrun, count, "B", 32, True)
