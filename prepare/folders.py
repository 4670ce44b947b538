"""Folders that appear when they are complete, and the manifest that says how they were made."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from console import UserError


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
    versions = {"python": platform.python_version(), "numpy": np.__version__, "h5py": h5py.__version__}
    (dir / "manifest.json").write_text(json.dumps({"command": command, "versions": versions, **facts}, indent=1) + "\n")
