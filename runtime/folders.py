"""Atomic writes of files and folders, file locks, and work shared by several processes."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from runtime.console import Failure, UserError
from runtime.tables import merge_tables

LOCK_INTERVAL = 0.5  # seconds between attempts to take the lock of a stage


# ------------------------------------------------------------------------------- flags and manifest
def command_line(module: str) -> str:
    """The command line of this process, for manifests."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise UserError unless low <= value <= high. name: the flag, without its dashes."""
    if not low <= value <= high:
        raise UserError(f"--{name} must be from {low} to {high}, got {value}")


def write_manifest(dir: Path, command: str, **facts: object) -> None:
    """Write manifest.json beside the splits: the command, library versions, and `facts`."""
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }
    manifest = {"command": command, "versions": versions, **facts}
    (dir / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


# ------------------------------------------------------------------------------------ atomic writes
def add_ending(path: Path, ending: str) -> Path:
    """Append `.ending` to the name of a path."""
    return path.with_name(f"{path.name}.{ending}")


@contextmanager
def write_atomically(path: str | Path, per_process: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file, opened for writing, that replaces `path` when the block ends.

    The file is a temporary one in the same folder, `.NAME.tmp`. It is flushed to the disk before
    the atomic rename, so `path` always holds either the old content or the new one. If the block
    raises, the temporary file is removed and `path` stays as it was. Code that needs a path, such
    as h5py, can open `file.name`.

    per_process: put the process id into the temporary name, for paths that several processes may
    write at the same time. The last one to finish wins.
    """
    path = Path(path)
    owner = f".{os.getpid()}" if per_process else ""
    temporary = path.with_name(f".{path.name}{owner}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def fill_partial(out: Path) -> Iterator[Path]:
    """Yield the empty folder `out`.partial. Remove the folder, if it still exists, at the end."""
    partial = add_ending(out, "partial")
    # A process that was killed may have left one behind.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def complete(out: str | Path) -> Iterator[Path]:
    """Yield a partial folder, renamed to `out` when the block ends and removed if the block raises.

    Raises UserError if `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} already exists; remove it or choose another --out")
    with fill_partial(out) as partial:
        yield partial
        os.replace(partial, out)


@contextmanager
def replace_folder(out: str | Path) -> Iterator[Path]:
    """Yield a partial folder that replaces `out`, which may exist, when the block ends.

    If the block raises, the partial folder is removed and `out` stays as it was. A folder that is
    not empty cannot be replaced by one rename, so the swap takes two renames: `out` to `out`.old,
    then the partial folder to `out`. A process that dies between them leaves `out`.old, which
    `restore_folder` renames back. Until the swap, other processes can read `out`.
    """
    out = Path(out)
    old = add_ending(out, "old")
    restore_folder(out)
    with fill_partial(out) as partial:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        shutil.rmtree(old, ignore_errors=True)


def restore_folder(out: str | Path) -> None:
    """Undo a swap of `replace_folder` that was interrupted: rename `out`.old to `out`.

    Commands that read `out` before they replace it call this function first.
    """
    out = Path(out)
    old = add_ending(out, "old")
    if old.exists() and not out.exists():
        os.replace(old, out)


# -------------------------------------------------------------------------------------------- locks
@contextmanager
def lock(path: str | Path, wait: bool = False, owner: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which is created if missing, or on an existing folder.

    Yields True if this process holds the lock. Yields False if another process holds it, unless
    `wait` is set, or if the parent folder of `path` does not exist. The operating system releases
    the lock of a process that dies. owner: write the holder of the lock into the file.

    Where locks do not work, always yields True: on Windows, which has no fcntl, and on file systems
    that refuse locks, of which one line is printed.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    path = Path(path)
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    try:
        file = os.open(path, flags, 0o666)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    except OSError as error:
        # ENOLCK, ENOSYS or EOPNOTSUPP; for a folder on NFS, EBADF.
        report_no_locks(path if path.is_dir() else path.parent, error)
        yield True
    else:
        if owner:
            write_owner(file)
        yield True
    finally:
        os.close(file)


# Devices whose file system has been reported to have no locks.
_without_locks: set[int] = set()


def report_no_locks(folder: Path, error: OSError) -> None:
    """Print, once for each file system, that files in `folder` cannot be locked."""
    device = folder.stat().st_dev
    if device not in _without_locks:
        _without_locks.add(device)
        reason = os.strerror(error.errno) if error.errno else str(error)
        print(
            f"{folder}: its file system has no file locks ({reason}); going on without. "
            "Run one command at a time on the same folders"
        )


def write_owner(file: int) -> None:
    """Write host, process id and time into an open lock file."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    # A full disk does not affect the lock itself.
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(owner).encode(), 0)


def describe_owner(path: Path) -> str:
    """Name the holder of a lock file: "process 17 on HOST, since 2026-01-31 12:00:00"."""
    try:
        owner = json.loads(path.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        return f"process {owner['pid']} on {owner['host']}, since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


@contextmanager
def stage_lock(root: str | Path) -> Iterator[None]:
    """Let one run at a time prepare data, VQVAE and latents below `root`.

    A second run prints which process it waits for, and then finds these parts prepared.
    """
    path = Path(root) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    reported = ""
    while True:
        with lock(path, owner=True) as held:
            if held:
                yield
                return
        owner = describe_owner(path)
        if owner != reported:
            print(f"waiting for {owner}, which prepares data or latents under {root}", flush=True)
            reported = owner
        time.sleep(LOCK_INTERVAL)


# -------------------------------------------------------------------------------------- shared work
class Parts:
    """Results of `count` parts of a computation, in files part_0000.npz, … of the folder `dir`.

    Several processes share the parts through locks, so that each part is computed once. done()
    returns True after a process has merged all parts and removed the folder.
    """

    def __init__(self, dir: Path, count: int, done: Callable[[], bool]):
        self.dir = dir
        self.count = count
        self.done = done

    def file(self, k: int) -> Path:
        """The path of part k."""
        return self.dir / f"part_{k:04d}.npz"

    def written(self) -> list[int]:
        """The numbers of the parts that are written."""
        return [k for k in range(self.count) if self.file(k).exists()]

    def write(self, k: int, arrays: dict[str, np.ndarray]) -> None:
        """Write part k. Arrays have the same names in all parts."""
        with write_atomically(self.file(k), per_process=True) as file:
            np.savez(file, **arrays)

    def read(self) -> dict[str, np.ndarray]:
        """Read all parts; concatenate the arrays of each name along the first axis."""
        parts = []
        for k in range(self.count):
            with np.load(self.file(k), allow_pickle=False) as file:
                parts.append(dict(file))
        return merge_tables(parts)

    def claim(self, first: int = 0) -> Iterator[int | None]:
        """Yield the numbers of the parts that this process has to compute, from part `first` on.

        Yields None while all missing parts are locked by other processes. Ends when all parts are
        written, or when another process has merged them.
        """
        self.dir.mkdir(parents=True, exist_ok=True)
        # Processes start at different parts, so that they rarely try the same lock.
        order = [(first + k) % self.count for k in range(self.count)]
        while todo := [k for k in order if not self.file(k).exists()]:
            if self.done():
                return
            self.check()
            waiting = True
            for k in todo:
                with lock(self.dir / f"part_{k:04d}.lock") as held:
                    # Another process may have written the part before this one took the lock.
                    if held and not self.file(k).exists() and not self.done():
                        waiting = False
                        yield k
            if waiting:
                yield None

    def check(self) -> None:
        """Raise Failure if the folder of the parts was removed before the parts were merged."""
        if not self.dir.exists() and not self.done():
            raise Failure(
                f"{self.dir} was removed: another process wrote other results in its place; "
                "run this command again, or choose another --out"
            )

    def sum_up(self, folder: Path, write: Callable[[], None]) -> None:
        """Call `write` in one process, the one that locks `folder`; the others wait for done()."""
        while not self.done():
            with lock(folder) as held:
                if held and not self.done():
                    self.check()
                    write()
                    return
            time.sleep(0.2)
