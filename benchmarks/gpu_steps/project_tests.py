"""Those of the project's tests that run networks, on this device."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from benchmarks.gpu_steps.record import LeftOut, Steps
from benchmarks.gpu_steps.setup import run_command, start

ROOT = Path(__file__).resolve().parent.parent.parent
# file: the package that it needs besides those of the commands
FILES = {
    "tests/test_train.py": None,
    "tests/test_runtime.py": None,
    "tests/test_sample.py": None,
    "tests/test_resume.py": None,
    "tests/test_vqvae.py": None,
    "tests/test_streams.py": None,
    "tests/test_augment.py": "albumentations",
}
TINY_FILES = ["tests/test_train.py", "tests/test_runtime.py"]


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_pytest(steps: Steps, files: list[str]) -> dict:
    """pyproject's options need pytest-xdist, so they are replaced."""
    if not is_installed("pytest"):
        raise LeftOut("pytest is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "-m",
        "not cluster",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    if is_installed("xdist"):
        command += ["-n", "4", "--dist", "loadgroup"]
    output = run_command([*command, *files], steps.left() - 5, ROOT)
    last = output.strip().splitlines()[-1]
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|skipped)", last)}
    return {"files": len(files), **counts}


def run(steps: Steps) -> None:
    trial = start()
    files = []
    for file, package in FILES.items():
        if trial.tiny and file not in TINY_FILES:
            continue
        if package and not is_installed(package):
            steps.record(file, "left out", reason=f"{package} is not installed")
            continue
        files.append(file)
    steps.run("pytest", run_pytest, steps, files)
