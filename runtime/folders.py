"""Folders and files that appear when they are complete, locks, and work that several processes share."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from runtime.console import Failure, UserError


def command_line(module: str) -> str:
    """The command as it was typed, for manifests."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def check_range(name: str, value: int, low: int, high: int) -> None:
    """UserError where a flag is not from `low` to `high`."""
    if not low <= value <= high:
        raise UserError(f"--{name} must be from {low} to {high}, got {value}")


@contextmanager
def complete(out: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends, and vanishes where it ends by an error. What a killed
    command left behind is removed first."""
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} already exists; remove it or choose another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(dir: Path, command: str, **facts: object) -> None:
    """manifest.json beside the splits: the command, the versions, and what the caller knows."""
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }
    (dir / "manifest.json").write_text(
        json.dumps({"command": command, "versions": versions, **facts}, indent=1) + "\n"
    )


@contextmanager
def stage_lock(root: str | Path):
    """One run at a time prepares data, VQVAE and latents below `root`; a second one waits, then finds them done."""
    try:
        import fcntl
    except ImportError:  # Windows: without the lock
        yield
        return
    Path(root).mkdir(parents=True, exist_ok=True)
    with open(Path(root) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run is preparing data or latents under {root}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Of a file, made if need be, or of a folder: is it ours, and not another process's? A process that dies gives it back."""
    try:
        import fcntl
    except ImportError:  # Windows: one process only
        yield True
        return
    try:
        file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT)
    except FileNotFoundError:  # its folder has been tidied away
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(file)


class Parts:
    """A folder of part_0000.npz, …, `count` of them. done(): has another process summed them up, and removed the folder?"""

    def __init__(self, dir: Path, count: int, done: Callable[[], bool]):
        self.dir, self.count, self.done = dir, count, done

    def file(self, k: int) -> Path:
        return self.dir / f"part_{k:04d}.npz"

    def there(self) -> list[int]:
        return [k for k in range(self.count) if self.file(k).exists()]

    def write(self, k: int, arrays: dict[str, np.ndarray]) -> None:
        temporary = self.file(k).with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.file(k))

    def read(self) -> dict[str, np.ndarray]:
        """All of them, one after another."""
        parts = []
        for k in range(self.count):
            with np.load(self.file(k), allow_pickle=False) as file:
                parts.append(dict(file))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def ours(self, first: int = 0) -> Iterator[int | None]:
        """The parts that are this process's to do, from `first` on; None while it waits for other processes. It ends when all
        are there, or when another has summed them up."""
        self.dir.mkdir(parents=True, exist_ok=True)
        order = [(first + k) % self.count for k in range(self.count)]
        while todo := [k for k in order if not self.file(k).exists()]:
            if self.done():
                return
            self.check()
            waiting = True
            for k in todo:
                with lock(self.dir / f"part_{k:04d}.lock") as ours:
                    if ours and not self.file(k).exists() and not self.done():
                        waiting = False
                        yield k
            if waiting:
                yield None

    def check(self) -> None:
        if not self.dir.exists() and not self.done():
            raise Failure(
                f"{self.dir} has gone: another process wrote other results in its place; run this again, or choose "
                "another --out"
            )

    def sum_up(self, folder: Path, write: Callable[[], None]) -> None:
        """Let one process, which holds the lock of `folder`, write the results; the others wait for them."""
        while not self.done():
            with lock(folder) as ours:
                if ours and not self.done():
                    self.check()
                    write()
                    return
            time.sleep(0.2)
