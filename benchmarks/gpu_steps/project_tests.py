"""Run the project's tests of networks on this device."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from benchmarks.gpu_steps.record import LeftOut, Steps
from benchmarks.gpu_steps.setup import run_command, start_trial

ROOT = Path(__file__).resolve().parent.parent.parent
# (file, the package that it needs besides those of the commands, runs on a CPU too)
FILES = [
    ("tests/test_train.py", None, True),
    ("tests/test_runtime.py", None, False),
    ("tests/test_sample.py", None, False),
    ("tests/test_vqvae.py", None, False),
    ("tests/test_resume.py", None, False),
    ("tests/test_streams.py", None, False),
    ("tests/test_augment.py", "albumentations", False),
]
SECONDS_TO_START = 15


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_pytest(steps: Steps, file: str, package: str | None) -> dict:
    for needed in ("pytest", package):
        if needed and not is_installed(needed):
            raise LeftOut(f"{needed} is not installed")
    # pyproject.toml's options need pytest-xdist, so they are replaced.
    options = ["-o", "addopts=", "-q", "-m", "not cluster", "--tb=short", "-p", "no:cacheprovider"]
    if is_installed("xdist"):
        options += ["-n", "4", "--dist", "loadgroup"]
    command = [sys.executable, "-m", "pytest", *options, file]
    output = run_command(command, steps.left() - 5, ROOT)
    last = output.strip().splitlines()[-1]
    return {name: int(count) for count, name in re.findall(r"(\d+) (passed|skipped)", last)}


def run(steps: Steps) -> None:
    trial = start_trial()
    for file, package, on_cpu in FILES:
        if on_cpu or not trial.tiny:
            needs = 0 if trial.tiny else SECONDS_TO_START
            steps.run(file, run_pytest, steps, file, package, needs=needs)
