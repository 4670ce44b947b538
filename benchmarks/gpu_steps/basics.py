"""The machine; updates and roll-outs are correct and never make the host wait for the GPU."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch

import train
from batches.latents import LatentTriples
from batches.stream import StreamTriples
from benchmarks import measure
from benchmarks.gpu_steps.record import Steps, require
from benchmarks.gpu_steps.setup import (
    Loop,
    Trial,
    build_config,
    build_forecaster,
    no_host_waits,
    random_latents,
    relative_difference,
    start_trial,
    write_latents,
)
from forecaster import build_net

MODULES = [
    "main",
    "train",
    "sample",
    "evaluate",
    "data",
    "batches.stream",
    "evaluation.networks",
    "evaluation.measure",
    "report.summary_page",
    "benchmarks.train_step",
    "benchmarks.sample",
    "benchmarks.memory",
]
OPTIONAL = ["av", "wandb", "moviepy", "albumentations", "lpips", "xdist", "triton"]
UPDATES = {
    "uvit": {},
    "convnet": {"model.name": "convnet"},
    "uvit, recompute, accumulate": {"train.recompute": True, "train.accumulate": 2},
    "uvit, linear": {"flow.interpolant": "linear", "flow.times": "logit_normal"},
    "uvit, batch normalisation": {"model.out_norm": "bn"},
    "joint, stream": {
        "model.name": "joint",
        "data.mode": "stream",
        "data.clip": 8,
        "data.condition": 4,
    },
}
ROLL_OUTS = {
    "exact": {"sample.solver": "exact"},
    "exact, re-encoded": {"sample.solver": "exact", "sample.reencode": True},
    "exact2": {"sample.solver": "exact2"},
    "heun": {"sample.solver": "heun", "sample.diffusion": "0"},
    "em": {"sample.solver": "em", "sample.diffusion": "sigma"},
    "stochastic_heun": {"sample.solver": "stochastic_heun", "sample.diffusion": "sigma"},
    "dopri5": {"sample.solver": "dopri5", "sample.diffusion": "0", "sample.redraw": "frame"},
}
# dopri5 chooses its steps by the error, which the host must read.
WAITING = ["dopri5"]


def describe_machine(trial: Trial) -> dict:
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    found = {
        "device": torch.cuda.get_device_name() if trial.on_gpu else "cpu",
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "missing": ", ".join(missing) or "nothing",
    }
    if trial.on_gpu:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,power.limit",
            "--format=csv,noheader",
        ]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        found["driver, clock, power limit"] = done.stdout.strip().splitlines()[:1]
    return found


def import_modules() -> dict:
    failing = []
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            failing.append(f"{name}: {error}")
    require(not failing, "; ".join(failing))
    return {"modules": len(MODULES)}


def measure_matmul(trial: Trial) -> dict:
    return {
        "bf16_tflops": measure.matmul_rate(trial.device) / 1e12,
        "tf32_tflops": measure.matmul_rate(trial.device, torch.float32) / 1e12,
    }


# ------------------------------------------------------------------------------------------ updates
def update_without_waits(trial: Trial, dir: Path, options: dict) -> dict:
    config = build_config(trial, 8, **options)
    source = None
    if config.data.mode == "stream":
        source = StreamTriples(config, dir, trial.device)
    loop = Loop(trial, config, dir, source=source)
    batches = iter(loop.source.batches(0, 4))
    # The first updates allocate memory and choose algorithms.
    for _ in range(2):
        loop(next(batches))
    with no_host_waits(trial):
        for _ in range(2):
            loop(next(batches))
    return loop.result()


def skip_bad_gradient(trial: Trial, dir: Path) -> dict:
    """A gradient that is not finite must leave weights and moments as they are."""
    config = build_config(trial, 8)
    loop = Loop(trial, config, dir)
    loop()
    learner = loop.learner
    before = {name: value.clone() for name, value in learner.weights.items()}
    batch = LatentTriples(config, dir, trial.device).batch(0)
    batch[0].fill_(float("nan"))
    scalars = train.update(learner, loop.forecaster, batch, 1, trial.process)
    norm = scalars["grad_norm"]
    changed = [
        name for name, value in learner.weights.items() if not torch.equal(before[name], value)
    ]
    counts = {int(state["step"]) for state in learner.optimizer.state.values()}
    require(not torch.isfinite(norm), f"the norm is {float(norm)}")
    require(not changed, f"{len(changed)} weights changed, {changed[:3]} among them")
    require(counts == {1}, f"AdamW counts {counts} updates, not 1")
    return {"weights_unchanged": len(before)}


# ---------------------------------------------------------------------------------------- roll-outs
def roll_out_without_waits(trial: Trial, options: dict) -> dict:
    defaults = {"sample.steps": 4, "flow.interpolant": "follmer"}
    config = build_config(trial, 8, **{**defaults, **options})
    model = build_forecaster(trial, config, autoencoder=config.sample.reencode)
    given = random_latents(trial, 4, 3)
    model.roll_out(given, 1, ("warm-up",))
    if config.sample.solver in WAITING:
        future = model.roll_out(given, 2, ("key",))
    else:
        with no_host_waits(trial):
            future = model.roll_out(given, 2, ("key",))
    require(bool(future.isfinite().all()), "samples that are not finite")
    return {"std": float(future.std())}


def compare_with_cpu(trial: Trial) -> dict:
    """The network in float32: TF32 as it is set everywhere, and exact products, against the CPU."""
    config = build_config(trial, 4, **{"train.precision": "float32"})
    torch.manual_seed(0)
    net = build_net(config, torch.device("cpu")).eval()
    z, reference, context = torch.randn(3, 4, 4, 8, 8)
    inputs = (z, torch.rand(4), reference, context[:, None], torch.ones(4, 1))
    with torch.no_grad():
        expected = net(*inputs)
        net = net.to(trial.device)
        inputs = [part.to(trial.device) for part in inputs]
        tf32 = relative_difference(net(*inputs), expected)
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        exact = relative_difference(net(*inputs), expected)
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    require(tf32 < 2e-2, f"relative difference {tf32:.2g} with TF32")
    require(exact < 1e-4, f"relative difference {exact:.2g} with exact products")
    return {"relative_difference_tf32": tf32, "relative_difference_exact": exact}


def run(steps: Steps) -> None:
    trial = start_trial()
    steps.run("machine", describe_machine, trial)
    steps.run("imports", import_modules)
    if trial.on_gpu:
        steps.run("matmul rate", measure_matmul, trial)
    with tempfile.TemporaryDirectory() as folder:
        dir = write_latents(trial, Path(folder))
        for name, options in UPDATES.items():
            steps.run(f"update without waits: {name}", update_without_waits, trial, dir, options)
        steps.run("a gradient that is not finite", skip_bad_gradient, trial, dir)
    for name, options in ROLL_OUTS.items():
        steps.run(f"roll-out without waits: {name}", roll_out_without_waits, trial, options)
    steps.run("network against the CPU", compare_with_cpu, trial)
