"""Loader workers, processes that read batches ahead of the training loop: reading, and errors."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from configs import Config, Data
from runtime.checkpoints import last_checkpoint
from runtime.console import Failure, UserError, first_line

# Batches that each worker reads ahead.
PREFETCH = 2
# Seconds to wait for a batch of the workers, before the run ends with an error.
TIMEOUT = 600
SHARED_MEMORY = Path("/dev/shm")
PAGE = 4096


def worker_count(data: Data) -> int:
    """Number of loader processes."""
    return min(data.workers, os.cpu_count() or 1)


# -------------------------------------------------------------------- shared memory
def shared_memory_bytes(config: Config) -> int:
    """The most shared memory that the workers of one process use, in bytes.

    Workers pass batches to the process in shared memory. At most PREFETCH batches per worker are
    being read or are waiting, and the process holds two: that of the update, and the next one.
    """
    B, size = config.train.batch_size, config.data.image_size
    # A process reads whole batches when it measures the latents.
    frames = B * (2 + config.data.contexts) * size * size * 3
    gaps = B * config.data.contexts * 4
    # torch rounds each array up to pages, and adds a header.
    batch = sum(-(-n // PAGE) * PAGE + PAGE for n in (frames, gaps))
    return (PREFETCH * worker_count(config.data) + 2) * batch


def check_shared_memory(config: Config) -> None:
    """Raise UserError if the batches of the workers do not fit in the shared memory.

    Without this check, a worker would lose its batch, and the run would wait for it.
    """
    if not worker_count(config.data) or not SHARED_MEMORY.is_dir():
        return
    # All processes of a machine share this memory.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = processes * shared_memory_bytes(config)
    disk = os.statvfs(SHARED_MEMORY)
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB of free space, but the batches of "
            f"data.workers={config.data.workers} loader processes need {need / 1e6:,.1f} MB; "
            f"enlarge it (docker run --shm-size={-(-need // 10**9)}g), or set data.workers lower "
            "(0: no loader processes) or train.batch_size lower"
        )


# -------------------------------------------------------------------- batches
def read_batches(
    dataset: torch.utils.data.Dataset,
    config: Config,
    start: int,
    stop: int,
    device: torch.device,
) -> Iterator:
    """Items start..stop-1 of a dataset, in order, as tensors; in pinned memory if they go to a GPU.

    If a worker dies, or no batch arrives within TIMEOUT seconds, raises a Failure of one line that
    names the last checkpoint. An exception in a worker becomes a Failure, too, but a UserError
    remains a UserError.
    """
    workers = worker_count(config.data)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        worker_init_fn=set_own_group,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        timeout=TIMEOUT if workers else 0,
        pin_memory=device.type == "cuda",
    )
    if not workers:
        yield from loader
        return
    failure = None
    items = None
    with WorkerWatch() as watch:
        try:
            # Up to `begin`, torch's handler raises here if a worker dies.
            items = iter(loader)
            watch.begin(items._workers)
            # Not until StopIteration: there torch ends the workers, as if they had died.
            for _ in range(start, stop):
                yield watch.next_of(items)
        except Exception as error:
            failure = explain(error, watch, config)
            # The stack frames of torch in the traceback would keep `items` alive.
            traceback.clear_frames(error.__traceback__)
        # Ends the workers. While `items` exists, torch's handler of SIGCHLD reports a dead worker
        # again and again.
        del items
    if failure is not None:
        raise failure


def set_own_group(_worker: int) -> None:
    """Move a worker into its own process group. A SIGTERM to the group of the training process then
    spares the worker, whose batch the training needs to finish its update."""
    os.setpgid(0, 0)


class WorkerDied(Exception):
    """A worker ended before its last batch."""


class WorkerWatch:
    """From `begin` to the end of the block, a worker that ends is reported in `next_of` only.

    `begin` replaces torch's own handler of SIGCHLD, which raises at any line of the main thread,
    for example while a checkpoint is written.
    """

    def __init__(self):
        self.workers: list[BaseProcess] = []
        self.waiting = False
        self.before = None

    def __enter__(self) -> WorkerWatch:
        return self

    def begin(self, workers: list[BaseProcess]) -> None:
        """Watch these workers."""
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGCHLD, self.handle_signal)
        self.workers = workers

    def __exit__(self, *_) -> None:
        if self.before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self.before)

    def handle_signal(self, *_) -> None:
        """The handler of SIGCHLD."""
        if self.waiting:
            self.report()

    def report(self) -> None:
        """Raise WorkerDied if a worker has ended."""
        for worker in self.workers:
            code = worker.exitcode
            if code is not None:
                end = f"ended with exit code {code}"
                if code < 0:
                    end = f"was killed by {signal.Signals(-code).name}"
                raise WorkerDied(f"loader worker (pid {worker.pid}) {end}")

    def next_of(self, items: Iterator):
        """next(items). Raises WorkerDied if a worker has ended."""
        try:
            self.waiting = True
            self.report()
            return next(items)
        finally:
            self.waiting = False


def describe_death(watch: WorkerWatch) -> str:
    """How a worker ended, and the usual reason; "" if all workers run."""
    # A worker that dies while it sends a batch first breaks a socket, and ends a little later.
    sentinels = [worker.sentinel for worker in watch.workers]
    ending = wait(sentinels, timeout=5) if sentinels else []
    for worker in watch.workers:
        if worker.sentinel in ending:
            # Its end of the pipe is closed, but it may not have an exit code yet.
            worker.join(5)
    try:
        watch.report()
    except WorkerDied as died:
        reason = "usually for lack of memory (see `dmesg`)"
        if "SIGBUS" in str(died):
            reason = f"usually because {SHARED_MEMORY} is full"
        return f"{died}, {reason}"
    return ""


def explain(error: Exception, watch: WorkerWatch, config: Config) -> Exception:
    """Convert an exception of `next_of` to an error of one line. An exception that no worker caused
    is returned unchanged."""
    # Only the text of torch's exception tells what happened in the worker.
    if "in DataLoader worker process" in str(error):
        # torch appends the traceback of the worker, which ends with "TYPE: MESSAGE".
        line = str(error).strip().splitlines()[-1]
        if isinstance(error, UserError):
            return UserError(line.removeprefix("runtime.console.UserError: "))
        return Failure(f"a loader worker failed: {line}; data.workers=0 shows the full traceback")
    if isinstance(error, RuntimeError) and "timed out" in str(error):
        cause = f"no loader worker gave a batch in {TIMEOUT} seconds: is the disk reachable?"
    else:
        cause = describe_death(watch)
    if not cause and str(error).startswith("DataLoader worker"):
        cause = first_line(error)
    if not cause and isinstance(error, (ConnectionError, EOFError)):
        cause = f"a loader worker closed its connection ({error})"
    if not cause:
        return error
    last = last_checkpoint(Path(config.output.root) / "checkpoints" / config.run_id)
    return Failure(
        f"{cause}; {last}set data.workers lower (0: no loader processes), then run the "
        "same command again"
    )
