"""Shared by the groups: device, sizes, random data, a step of the training loop, timing."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import configs
import train
import vqvae
from batches.batch import Batch
from batches.latents import LatentTriples
from benchmarks import measure
from benchmarks.gpu_steps.record import Failed, require
from forecaster import Forecaster, build_net
from models import autoencoders
from runtime import parallel
from runtime.process import Process, start
from shards import write_packed

LATENT_SHAPE = (4, 8, 8)
LATENT = configs.Latent(LATENT_SHAPE, (0.0,) * 4, (1.0,) * 4)
# Sizes that a CPU computes in milliseconds.
TINY_NET = {
    "model.size": "",
    "model.width": 64,
    "model.depth": 1,
    "model.mid_depth": 1,
    "model.heads": 2,
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """The process, and whether sizes are tiny, as on a CPU."""

    process: Process
    tiny: bool

    @property
    def device(self) -> torch.device:
        return self.process.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def start_trial() -> Trial:
    tiny = os.environ.get("DEVICE") == "cpu"
    process = start()
    require(
        tiny or process.device.type == "cuda", "no GPU is visible; set DEVICE=cpu for tiny sizes"
    )
    return Trial(process, tiny)


def clear(trial: Trial) -> None:
    """Free memory, and forget compiled graphs and the peak of memory."""
    gc.collect()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if trial.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(trial.device)


def peak_gib(trial: Trial) -> float | None:
    """Peak memory of the GPU since `clear`."""
    return measure.peak_memory(trial.device) / 2**30 if trial.on_gpu else None


@contextmanager
def no_host_waits(trial: Trial) -> Iterator[None]:
    """On a GPU, raise an error where the host waits for it (synchronises)."""
    if not trial.on_gpu:
        yield
        return
    torch.cuda.synchronize(trial.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative_difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


# -------------------------------------------------------------------------------- networks and data
def build_config(trial: Trial, batch: int, **options) -> configs.Config:
    """KTH's config, with the published network on a GPU; `options` maps "group.field" to value."""
    values = {
        "train.batch_size": batch,
        "train.compile": "off",
        "train.warmup": 10,
        "wandb.mode": "disabled",
    }
    network = TINY_NET if trial.tiny else {"model.size": "B"}
    if options.get("model.name", "uvit") != "uvit":
        network = {"model.size": "", "model.width": 64 if trial.tiny else 128, "model.heads": 2}
    config = configs.build("kth", {**values, **network, **options})
    return dataclasses.replace(config, latent=LATENT)


def build_autoencoder(trial: Trial, precision: str) -> nn.Module:
    """KTH's autoencoder, or a small one with latents of that shape, with initial weights."""
    if trial.tiny:
        module = autoencoders.build("small", downsample=8, channels=4, codes=64, width=32, depth=1)
    else:
        module = autoencoders.build("taming_f8_small")
    return vqvae.freeze(module, trial.device, precision)


def build_forecaster(trial: Trial, config: configs.Config, autoencoder: bool = True) -> Forecaster:
    """A Forecaster with initial weights, which are the same for every config of one network."""
    torch.manual_seed(0)
    net = build_net(config, trial.device).eval()
    module = build_autoencoder(trial, config.train.precision) if autoencoder else None
    return Forecaster(config, net, module, trial.device)


def random_latents(trial: Trial, videos: int, frames: int) -> Tensor:
    """(videos, frames, C, h, w), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(videos, frames, *LATENT_SHAPE, generator=generator).to(trial.device)


def write_latents(trial: Trial, dir: Path) -> Path:
    """Write a shard of random latents, in videos of 100 frames; return its folder."""
    frames = 400 if trial.tiny else 20_000
    rows = np.random.default_rng(0).standard_normal((frames, *LATENT_SHAPE)).astype(np.float16)
    dir.mkdir(parents=True, exist_ok=True)
    lengths = np.full(frames // 100, 100)
    attrs = {"continues": False, "fps": 25.0}
    write_packed(dir / "shard_0001.hdf5", "latents", rows, lengths, attrs)
    return dir


# ------------------------------------------------------------------------------------- the training
class Loop:
    """The training loop's step, as train.fit does it: a batch, the update, the running average."""

    def __init__(
        self,
        trial: Trial,
        config: configs.Config,
        dir: Path,
        process: Process | None = None,
        source=None,
        start: dict | None = None,
    ):
        self.process = process or trial.process
        self.config = config
        self.source = source or LatentTriples(config, dir, trial.device)
        self.learner = train.build_learner(config, self.process)
        if start:
            for name, part in train.learner_parts(self.learner, dir).items():
                part.load(start[name])
        self.forecaster = Forecaster(config, None, None, trial.device)
        self.step = 0
        self.scalars = {}

    def __call__(self, batch: Batch | None = None) -> None:
        """One update, on `batch` or else on the next batch of the latents."""
        learner, step = self.learner, self.step
        if batch is None:
            batch = self.source.batch(step)
        self.scalars = train.update(learner, self.forecaster, batch, step, self.process)
        train.update_ema(
            parallel.local(learner.ema),
            parallel.local(learner.weights),
            step,
            self.config.train.ema,
        )
        self.step += 1

    def result(self) -> dict[str, float]:
        """The last loss and norm of the gradient, which must be finite."""
        loss, norm = float(self.scalars["loss"]), float(self.scalars["grad_norm"])
        require(np.isfinite([loss, norm]).all(), f"loss {loss}, norm of the gradient {norm}")
        return {"loss": loss, "norm": norm}


def copy_state(learner: train.Learner) -> dict:
    """The learner's part of a checkpoint, in main memory."""
    state = {"model": learner.weights, "ema": learner.ema, "opt": learner.optimizer.state_dict()}
    return copy_tensors(parallel.gather(state, True))


def copy_tensors(value):
    """A nested state with its tensors copied to main memory."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: copy_tensors(part) for key, part in value.items()}
    return [copy_tensors(part) for part in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------- timing
def time_calls(
    trial: Trial, work: Callable[[], object], repeats: int, warmup: int = 3
) -> dict[str, float]:
    """Milliseconds per call.

    ms: calls in a row, as in a loop. ms_waited: synchronised after each call. ms_host: until the
    calls have been launched.
    """
    if trial.tiny:
        repeats, warmup = 2, 1
    for _ in range(warmup):
        work()
    measure.synchronize(trial.device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    launched = time.perf_counter() - began
    measure.synchronize(trial.device)
    row = time.perf_counter() - began
    waited = measure.median_seconds(work, trial.device, min(repeats, 10), warmup=0, calls=1)
    return {
        "ms": 1e3 * row / repeats,
        "ms_waited": 1e3 * waited,
        "ms_host": 1e3 * launched / repeats,
    }


def time_first(trial: Trial, work: Callable[[], object]) -> float:
    """Seconds of the first call, which may compile."""
    began = time.perf_counter()
    work()
    measure.synchronize(trial.device)
    return time.perf_counter() - began


def profile_kernels(trial: Trial, work: Callable[[], object]) -> dict:
    """Number of GPU kernels of one call, their milliseconds, and the longest of them."""
    if not trial.on_gpu:
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
        torch.cuda.synchronize(trial.device)
    times = defaultdict(list)
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name[:70]].append(event.device_time / 1e3)
    by_time = sorted(times.items(), key=lambda item: -sum(item[1]))
    longest = [f"{name} x{len(each)} {sum(each):.2f} ms" for name, each in by_time[:8]]
    return {
        "kernels": sum(len(each) for each in times.values()),
        "kernel_ms": sum(sum(each) for each in times.values()),
        "longest_kernels": "; ".join(longest),
    }


def count_graphs() -> int:
    """Graphs that torch.compile has made since `clear`."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ----------------------------------------------------------------------------------------- commands
def run_command(command: list[str], seconds: float, cwd: Path | None = None) -> str:
    """Run a command, log and return its output; fail the step if it takes over `seconds`."""
    name = " ".join(command[1:4])
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(seconds, 1),
        )
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
        print(output.decode(errors="replace") if isinstance(output, bytes) else output)
        raise Failed(f"{name} took longer than {seconds:.0f} s") from None
    print(done.stdout, flush=True)
    last = " / ".join(done.stdout.strip().splitlines()[-3:])
    require(done.returncode == 0, f"{name} ended with exit code {done.returncode}: {last}")
    return done.stdout
