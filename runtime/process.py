"""Processes and devices, seeds, precision, signals."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import signal
import socket
import time
import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from runtime.console import Stopped, UserError

# --------------------------------------------------------------------------------------------- processes and devices
# A stage: the others wait while rank 0 prepares data, trains the VQVAE, encodes or samples, which
# may take hours.
STAGE_TIMEOUT = timedelta(days=1)
# A collective of the training loop: a process that hangs is noticed after this time.
STEP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; alone, it is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device
    # the gloo group of `agree` and `barrier`, with STAGE_TIMEOUT; gradients use the default group
    stages: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, value):
        """The first process's value, on all of them; it waits for them all."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.stages)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            # a CPU tensor, so that gloo never touches the GPU
            dist.all_reduce(torch.zeros(1), group=self.stages)

    def close(self) -> None:
        """Disconnect at the normal end of a command, once all processes have arrived there. Not
        after an error, where another process may never arrive."""
        if self.world > 1:
            self.barrier()
            dist.destroy_process_group()
            connect.cache_clear()


def start() -> Process:
    local = int(os.environ.get("LOCAL_RANK", 0))
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_index(local, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return connect(rank, world, device) if world > 1 else Process(rank, world, device)


def gpu_index(local: int, visible: int) -> int:
    """Index of this process's GPU among the visible ones. Under srun --gpus-per-task=1 each
    process sees only its own GPU, as index 0."""
    if visible == 1:
        return 0
    if local >= visible:
        raise UserError(
            f"process {local} of this machine has no GPU of its own, "
            f"there are {visible}; start fewer processes"
        )
    return local


@functools.cache
def connect(rank: int, world: int, device: torch.device) -> Process:
    """Join the other processes: once, however often start() is called."""
    store = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))[0]
    store = fresh(store, rank, world)
    on_gpu = device.type == "cuda"
    if on_gpu:
        gpu = torch.cuda.get_device_properties(device)
        refuse_shared_gpus(store, rank, world, f"{socket.gethostname()}, {gpu.uuid}")
    # NCCL exchanges its addresses through the store, whose own timeout is the rendezvous's.
    store.set_timeout(STEP_TIMEOUT)
    # With device_id NCCL connects now. It would otherwise connect at the first gradient, for which
    # the others may wait hours (pytorch issue 107177).
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=STEP_TIMEOUT,
        rank=rank,
        world_size=world,
        store=store,
        device_id=device if on_gpu else None,
    )
    stages = dist.new_group(backend="gloo", timeout=STAGE_TIMEOUT)
    return Process(rank, world, device, stages)


def refuse_shared_gpus(store: dist.Store, rank: int, world: int, gpu: str) -> None:
    """UserError on all processes where two of them have the same GPU. gpu: its host and UUID."""
    store.set(f"gpu/{rank}", gpu)
    gpus = [store.get(f"gpu/{other}").decode() for other in range(world)]
    store.set(f"gpus_read/{rank}", "")
    if rank == 0:
        # Without torchrun the store ends with rank 0, so rank 0 must leave last.
        store.wait([f"gpus_read/{other}" for other in range(world)])
    for second, name in enumerate(gpus):
        first = gpus.index(name)
        if first != second:
            raise UserError(
                f"processes {first} and {second} share one GPU ({name}); start one process per GPU"
            )


def fresh(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the store that only these processes use. The workers that torchrun --max-restarts starts again find in theirs
    what the dead ones left, addresses among it (pytorch issue 135712), and nothing that tells them how often they have been
    started, on all nodes alike. So rank 0 names the part and repeats it with the names it has heard, until each of the
    others has heard its own."""
    name = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", name)
        while True:
            part, *heard = store.get("welcome").decode().split()
            if heard[rank - 1 : rank] == [name]:
                break
            time.sleep(0.02)
        store.set(f"{part}/{rank}", "")
    else:
        part, others = name, range(1, world)
        while not store.check([f"{part}/{other}" for other in others]):
            store.set(
                "welcome",
                " ".join([part, *(store.get(f"hello/{other}").decode() for other in others)]),
            )
            time.sleep(0.02)
    return dist.PrefixStore(part, store)


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """There, without waiting: a copy from ordinary memory would wait until the GPU has done all that it was told before."""
    values = torch.as_tensor(values)
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def has_fast_bf16(device: torch.device) -> bool:
    """Does the hardware multiply matrices in bf16 faster than in float32? On a CPU that takes AMX tiles: AVX512-BF16
    alone ran at half the rate of float32 where it was measured."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def uses_bf16(precision: str, device: torch.device) -> bool:
    """For train.precision = auto, bf16 or float32."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def autocast(precision: str, device: torch.device):
    """The context to run networks in."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if uses_bf16(precision, device)
        else nullcontext()
    )


def cast_weights(net: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that autocast would cast at every call, to the same values: of linear and convolutional
    layers and of attention."""
    for module in net.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.MultiheadAttention):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(dtype)


def learning_rate(
    step: int, peak: float, steps: int, warmup: int, schedule: str = "cosine"
) -> float:
    """Of update `step` (from 0): linear warm-up to the peak, then constant, or a cosine to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------------------ seeding
def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, e.g. (seed, "noise", step, rank)."""
    return (
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    )


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_of(*key))


def numpy_generator(*key: int | str) -> np.random.Generator:
    return np.random.default_rng(seed_of(*key))


# ------------------------------------------------------------------------------------------------------------ signals
class StopSignals:
    """While it is entered, SIGTERM, SIGINT and SLURM's SIGUSR1 only ask: the loop finishes its step, saves and leaves. A
    second SIGINT stops at once."""

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self, process: Process):
        self.process, self.asked, self.before = process, 0, {}

    def __enter__(self) -> StopSignals:
        for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.asked == number:
            raise KeyboardInterrupt
        self.asked = number

    def agreed(self, step: int, last: bool = False) -> int:
        """The signal that any process has been sent, or 0; the same on all of them. Several look up every tenth step."""
        if self.process.world == 1:
            return self.asked
        if step % 10 and not last:
            return 0
        asked = torch.tensor(self.asked, device=self.process.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked)


def stopped(number: int, step: int, dir: Path) -> Stopped:
    return Stopped(
        f"stopped by {signal.Signals(number).name} after update {step}, which is saved in {dir}; run the same "
        "command again to go on",
        130 if number == signal.SIGINT else 75,
    )
