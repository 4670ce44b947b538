"""Processes and devices, precision, the learning-rate schedule, seeds, signals."""

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

# ---------------------------------------------------------------------------- processes and devices
# For stages that rank 0 runs alone, which may take hours: preparing data, training the VQVAE,
# encoding, sampling.
STAGE_TIMEOUT = timedelta(days=1)
# For collectives of the training loop: after this time, a process that hangs ends the run.
STEP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started. Without torchrun: rank 0 of 1."""

    rank: int
    world: int
    device: torch.device
    # The gloo group of `agree` and `barrier`, with STAGE_TIMEOUT. Gradients use the default group.
    stages: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, value):
        """Broadcast the value of rank 0 to all processes. Blocks until all of them have called."""
        if self.world == 1:
            return value
        # torch broadcasts the items of a list in place.
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.stages)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            # A CPU tensor, so that gloo never uses the GPU.
            dist.all_reduce(torch.zeros(1), group=self.stages)

    def close(self) -> None:
        """Disconnect at the normal end of a command, after all processes have arrived there. Not to
        be called after an error, when another process may never arrive."""
        if self.world > 1:
            self.barrier()
            dist.destroy_process_group()
            connect.cache_clear()


def start() -> Process:
    """Set up this process from torchrun's environment variables: its device and its group."""
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
    """Join the other processes. Cached, so that several calls of start() connect once."""
    store = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))[0]
    store = use_new_prefix(store, rank, world)
    on_gpu = device.type == "cuda"
    if on_gpu:
        gpu = torch.cuda.get_device_properties(device)
        refuse_shared_gpus(store, rank, world, f"{socket.gethostname()}, {gpu.uuid}")
    # NCCL exchanges its addresses through the store, which still has the timeout of the rendezvous.
    store.set_timeout(STEP_TIMEOUT)
    # With device_id NCCL connects now. Otherwise it would connect at the first gradient, which may
    # be hours later on one process than on another (pytorch issue 107177).
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
    """Raise UserError, on all processes, if two of them use the same GPU.

    gpu: host and UUID of this process's GPU.
    """
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


def use_new_prefix(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Agree on a prefix of the store that no earlier processes have used. -> the store under it.

    After a restart by torchrun --max-restarts, the store still holds entries of the dead workers,
    such as their addresses (pytorch issue 135712), and no restart count that all nodes share. So
    each process draws a random name. Rank 0 takes its own name as the prefix. It publishes the
    prefix together with the names that it has read from the other ranks. Each other rank waits
    until the published list contains its own name, and then confirms under the prefix.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", name)
        while True:
            prefix, *read = store.get("welcome").decode().split()
            if read[rank - 1 : rank] == [name]:
                break
            time.sleep(0.02)
        store.set(f"{prefix}/{rank}", "")
    else:
        prefix = name
        others = range(1, world)
        # The names that rank 0 reads may be those of dead workers, so it reads and publishes again
        # until all ranks have confirmed.
        while not store.check([f"{prefix}/{other}" for other in others]):
            names = [store.get(f"hello/{other}").decode() for other in others]
            store.set("welcome", " ".join([prefix, *names]))
            time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device asynchronously, through pinned memory.

    A copy from pageable memory would wait for all work queued on the GPU.
    """
    values = torch.as_tensor(values)
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def has_fast_bf16(device: torch.device) -> bool:
    """True if the hardware multiplies matrices faster in bf16 than in float32.

    On a CPU this requires AMX tiles: with AVX512-BF16 alone, bf16 measured half the rate of
    float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def uses_bf16(precision: str, device: torch.device) -> bool:
    """True if networks run in bf16. precision: train.precision, one of auto, bf16, float32."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def autocast(precision: str, device: torch.device):
    """The autocast context of networks. precision: see `uses_bf16`."""
    if uses_bf16(precision, device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def cast_weights(net: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear, convolution and attention layers in place.

    Saves time: autocast would cast these weights, to the same values, at every call.
    """
    for module in net.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.MultiheadAttention):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(dtype)


def learning_rate(
    step: int, peak: float, steps: int, warmup: int, schedule: str = "cosine"
) -> float:
    """Learning rate of update `step`, counted from 0.

    A linear warm-up to the peak, then constant, or a cosine that reaches 0 at `steps`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------ seeding
def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, e.g. (seed, "noise", step, rank)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A torch generator on the device, seeded by the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator seeded by the key."""
    return np.random.default_rng(seed_of(*key))


# ------------------------------------------------------------------------------------------ signals
class StopSignals:
    """Records SIGTERM, SIGINT and SLURM's SIGUSR1 inside a `with` block, for a clean stop.

    The training loop reads the signal with `agreed`, finishes its update, saves and returns. A
    second SIGINT raises KeyboardInterrupt at once. A signal that arrives after the last call of
    `agreed` is sent again when the block ends, for the handler that was set before the block.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self, process: Process):
        self.process = process
        self.received = 0  # number of the signal received, 0 before
        self.read = False  # whether `agreed` has returned a signal
        self.before = {}  # the handlers to restore

    def __enter__(self) -> StopSignals:
        for name in self.NAMES:
            # Windows has no SIGUSR1.
            if hasattr(signal, name):
                number = getattr(signal, name)
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None and self.received and not self.read:
            os.kill(os.getpid(), self.received)

    def receive(self, number: int, _frame) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self.received == number:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self, step: int, last: bool = False) -> int:
        """The number of a signal that any process received, or 0; the same on all processes.

        Several processes exchange the number by an all-reduce, at every tenth step and at the
        `last` one; at other steps the result is 0.
        """
        number = self.received
        if self.process.world > 1:
            if step % 10 and not last:
                return 0
            highest = torch.tensor(number, device=self.process.device)
            dist.all_reduce(highest, dist.ReduceOp.MAX)
            number = int(highest)
        self.read = self.read or bool(number)
        return number


def stopped(number: int, step: int, dir: Path) -> Stopped:
    """The exception that ends a run which received signal `number` and has saved `step`."""
    return Stopped(
        f"stopped by {signal.Signals(number).name} after update {step}, which is saved in {dir}; "
        "run the same command again to resume",
        130 if number == signal.SIGINT else 75,
    )
