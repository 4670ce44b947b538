"""What several test files share: small shards, a tiny trained run, and functions that run the real
commands."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).parent.parent
DATA = REPO / "tests/data"
os.environ.update(WANDB_MODE="disabled", NO_ALBUMENTATIONS_UPDATE="1", OMP_NUM_THREADS="1")

TINY = [
    "data.stream=600",
    "data.held_out=200",
    "data.clip=8",
    "data.condition=4",
    "data.predict=4",
    "data.flips=",
    "vqvae.channels=4",
    "vqvae.width=16",
    "vqvae.depth=1",
    "vqvae.codes=64",
    "vqvae.steps=20",
    "vqvae.batch_size=16",
    "model.width=16",
    "model.depth=1",
    "model.mid_depth=1",
    "model.heads=2",
    "train.steps=12",
    "train.batch_size=8",
    "train.warmup=2",
    "train.log_every=4",
    "train.save_every=5",
    "train.sample_every=0",
    "sample.num_videos=3",
    "sample.num_samples=2",
    "sample.steps=2",
]


def run_group(args: list, timeout: float, **options) -> subprocess.CompletedProcess:
    """Run a command and capture its output, as subprocess.run does. After `timeout` seconds the
    command and its descendants are killed, and TimeoutExpired is raised."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A session of its own makes the command and its descendants one process group.
    with subprocess.Popen(args, **pipes, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            kill_group(process)
            raise
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def kill_group(process: subprocess.Popen) -> None:
    """Kill the process group that `process` leads."""
    # torchrun starts its workers in sessions of their own, and ends them at SIGTERM.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def launch(
    folder: Path, *command: str, check: bool = True, timeout: float = 280, **env: str | None
) -> subprocess.CompletedProcess:
    """Run `python COMMAND` of this repository in `folder`, as a user would.

    An environment variable given as None is unset. check: AssertionError for an exit code other
    than 0. timeout: in seconds.
    """
    script, *rest = command
    environment = {**os.environ, "PYTHONPATH": str(REPO), **env}
    environment = {name: value for name, value in environment.items() if value is not None}
    args = [sys.executable, script if script == "-m" else str(REPO / script), *rest]
    done = run_group(args, timeout, cwd=folder, env=environment)
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} -> "
            f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done


def reference_weights(names: dict) -> dict:
    """The deterministic weights that the reference outputs were made with, see
    tests/data/README.md."""
    import torch

    weights = {}
    for name, shape in names.items():
        x = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape)
        if len(shape) >= 2:
            x = x / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("running_var"):
            x = 1 + 0.1 * np.abs(x)
        else:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        counter = name.endswith("num_batches_tracked")
        weights[name] = torch.tensor(0) if counter else torch.tensor(x, dtype=torch.float32)
    return weights


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> tuple[Path, str]:
    """A folder in which `python main.py --set TINY` has run to its end, and what it printed."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, launch(folder, "main.py", "--set", *TINY).stdout


def copy_of(run: Path, to: Path, *runs: str) -> Path:
    """Copy the data, the VQVAE and the latents of a finished run, and the checkpoints of the named
    runs, to a new folder. Returns the new folder."""
    vqvae = next((run / "outputs/checkpoints").glob("vqvae-*")).name
    checkpoints = [f"outputs/checkpoints/{name}" for name in (vqvae, *runs)]
    for part in ("data", "outputs/latents", *checkpoints):
        shutil.copytree(run / part, to / part)
    return to


@pytest.fixture
def command(monkeypatch, capsys):
    """command(folder, script, *arguments) -> (exit code, stderr) of a real command.

    The command runs in this process, which is faster than `launch`: for commands that end before
    they do any work.
    """
    from runtime.console import run_command

    def run(folder, script, *arguments) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            run_command(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main)
        return done.value.code, capsys.readouterr().err

    return run


@pytest.fixture
def make_shards(tmp_path):
    """make_shards(lengths, size=8) -> a folder of packed shards. All pixels of frame i of the split
    are i % 251."""
    from shards import ShardWriter

    def make(lengths, size=8, name="train", **options) -> Path:
        dir = tmp_path / "data" / name
        at = 0
        with ShardWriter(dir, fps=5.0, **options) as writer:
            for length in lengths:
                values = (np.arange(at, at + length) % 251).astype(np.uint8)
                writer.add(np.broadcast_to(values[:, None, None, None], (length, size, size, 3)))
                at += length
        return dir

    return make
