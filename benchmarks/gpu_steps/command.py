"""main.py and sample.py as users run them: from nothing to a table, resumed, with jitter."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu_steps.record import Steps, require
from benchmarks.gpu_steps.setup import Trial, run_command, start_trial
from runtime import parallel

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = [
    "data.stream=2000",
    "data.held_out=400",
    "data.clip=12",
    "data.condition=4",
    "data.predict=4",
    "vqvae.steps=60",
    "model.name=uvit",
    "model.width=64",
    "model.depth=1",
    "model.mid_depth=1",
    "model.heads=2",
    "train.batch_size=32",
    "train.warmup=5",
    "train.schedule=constant",
    # Own forecasts begin after a quarter of train.steps, which `resume` changes.
    "train.own=0",
    "train.compile=off",
    "train.log_every=20",
    "train.save_every=20",
    "train.sample_every=0",
    "sample.num_videos=4",
    "sample.num_samples=2",
    "sample.steps=2",
    "sample.format=gif",
    "wandb.mode=disabled",
]
TINY_SETTINGS = ["vqvae.steps=20", "vqvae.width=16", "vqvae.depth=1", "vqvae.codes=64"]


class Commands:
    """Commands of the project, run one after the other in one folder."""

    def __init__(self, steps: Steps, trial: Trial, folder: Path):
        self.steps = steps
        self.folder = folder
        self.settings = SETTINGS + (TINY_SETTINGS if trial.tiny else [])
        self.count = 20 if trial.tiny else 60
        self.on_gpu = trial.on_gpu

    def run(self, script: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / script), *arguments]
        return run_command(command, self.steps.left() - 5, self.folder)

    def train(self, run_id: str, steps: int, *settings: str) -> str:
        return self.run(
            "main.py",
            "--set",
            *self.settings,
            f"output.run_id={run_id}",
            f"train.steps={steps}",
            *settings,
        )

    def checkpoint(self, run_id: str) -> Path:
        return self.folder / "outputs/checkpoints" / run_id / "latest.pt"

    # ------------------------------------------------------------------------------------ the steps
    def run_from_nothing(self) -> dict:
        """Data, VQVAE, latents, training, forecasts and the table."""
        output = self.train("whole", self.count)
        require("crps" in output.lower(), "the output has no table of metrics")
        times = [line for line in output.splitlines() if line.startswith("time")]
        return {"stages": times[-1].removeprefix("time").strip()}

    def resume(self) -> dict:
        """Stopped after half the updates and run again: is the network that of `whole`?"""
        self.train("parts", self.count // 2)
        self.train("parts", self.count)
        whole, parts = (self.read_weights(name) for name in ("whole", "parts"))
        differences = [float((whole[name] - value).abs().max()) for name, value in parts.items()]
        largest = max(differences)
        require(self.on_gpu or largest == 0, f"weights differ by {largest:.2g}")
        return {"resuming_is_exact": largest == 0, "largest_difference": largest}

    def read_weights(self, run_id: str) -> dict[str, torch.Tensor]:
        state = torch.load(self.checkpoint(run_id), map_location="cpu", weights_only=True)
        return {name: value.double() for name, value in state["ema"].items()}

    def train_on_jittered_frames(self) -> dict:
        """Frames read by loader processes, jittered and encoded on the device."""
        self.train("jitter", self.count // 2, "data.hue=0.1", "data.contrast=0.2", "data.workers=2")
        return {}

    def sample_compiled(self) -> dict:
        """sample.py on the checkpoint, the network compiled."""
        checkpoint = str(self.checkpoint("whole"))
        output = self.run(
            "sample.py", "--ckpt", checkpoint, "--out", "samples", "--set", "sample.compile=default"
        )
        require("crps" in output.lower(), "the output has no table of metrics")
        return {}


def run(steps: Steps) -> None:
    trial = start_trial()
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(steps, trial, Path(folder))
        steps.run("main.py from nothing to a table", commands.run_from_nothing)
        steps.run("main.py stopped and resumed", commands.resume)
        steps.run("main.py on jittered frames", commands.train_on_jittered_frames)
        if trial.on_gpu and parallel.has_compiler():
            steps.run("sample.py, compiled", commands.sample_compiled)
