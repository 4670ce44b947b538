"""Speed of updates beside the straightforward way, their parts, CUDA graphs, and exact resuming."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import train
from batches.batch import Batch
from batches.latents import LatentTriples
from benchmarks import measure, train_step
from benchmarks.gpu_steps.record import Steps, require
from benchmarks.gpu_steps.setup import (
    LATENT_SHAPE,
    Loop,
    Trial,
    build_config,
    clear,
    copy_state,
    peak_gib,
    profile_kernels,
    start_trial,
    time_calls,
    time_first,
    write_latents,
)
from forecaster import Forecaster, build_net
from runtime import parallel
from runtime.process import autocast, generator, uses_bf16

# Dense bf16 FLOP/s of data sheets, by a part of torch.cuda.get_device_name(). The first one counts.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Way(NamedTuple):
    """A way to train: the options, and the seconds that it may take on a GPU."""

    name: str
    batch: str
    options: dict
    needs: float


# In order of importance: what is at the end is left out first.
EAGER = [
    Way("eager", "large", {}, 8),
    Way("eager", "small", {}, 6),
]
COMPILED = [
    Way("compile=default", "large", {"train.compile": "default"}, 50),
    Way("compile=reduce-overhead", "small", {"train.compile": "reduce-overhead"}, 50),
]
LAST = [
    Way("recompute", "large", {"train.recompute": True}, 10),
    Way("accumulate=4", "large", {"train.accumulate": 4}, 10),
]
COMPILED_LAST = [
    Way("compile=default", "small", {"train.compile": "default"}, 50),
    Way("compile=reduce-overhead", "large", {"train.compile": "reduce-overhead"}, 50),
]


class Rates:
    """Turns times into rates, and compares them with the straightforward way and the hardware."""

    def __init__(self, trial: Trial):
        self.trial = trial
        self.batches = {"large": 8, "small": 4} if trial.tiny else {"large": 256, "small": 32}
        self.work = train_step.count_flops(build_config(trial, 1))
        # A CPU multiplies float32 here.
        dtype = torch.bfloat16 if trial.on_gpu else torch.float32
        self.matmul = measure.matmul_rate(trial.device, dtype)
        self.peak = find_peak(torch.cuda.get_device_name()) if trial.on_gpu else None
        self.straightforward: dict[int, float] = {}

    def describe(self) -> dict:
        return {
            "precision": "bf16" if uses_bf16("auto", self.trial.device) else "float32",
            "gflop_per_sample": self.work / 1e9,
            "matmul_tflops": self.matmul / 1e12,
            "peak_tflops": self.peak / 1e12 if self.peak else "unknown",
        }

    def compare(self, batch: int, times: dict, **more) -> dict:
        rate = 1e3 * batch / times["ms"]
        base = self.straightforward.get(batch)
        values = {"batch": batch, "samples_per_s": rate}
        values["ratio"] = rate / base if base else None
        if self.peak:
            values["mfu"] = rate * self.work / self.peak
        values["of_matmul"] = rate * self.work / self.matmul
        return {**values, "peak_gib": peak_gib(self.trial), **times, **more}


def find_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None if it is not in PEAKS."""
    for part, peak in PEAKS.items():
        if part in name:
            return peak
    return None


# -------------------------------------------------------------------------------------- whole steps
def build_straightforward(trial: Trial, batch: int, dir: Path) -> Callable[[], None]:
    """An update in float32: default AdamW, weights averaged one by one, the loss read each time."""
    config = build_config(trial, batch, **{"train.precision": "float32"})
    source = LatentTriples(config, dir, trial.device)
    net = build_net(config, trial.device)
    forecaster = Forecaster(config, None, None, trial.device)
    averages = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), config.train.lr)
    counter = itertools.count()

    def step() -> None:
        item = source.batch(next(counter)).normalize(forecaster.mean, forecaster.std)
        s, eps = train.draw_noise(config, item.target, 0, trial.device, slice(batch))
        with autocast(config.train.precision, trial.device):
            loss = train.flow_loss(net, forecaster.interpolant, item, s, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in net.named_parameters():
                averages[name].mul_(0.9999).add_(value, alpha=1e-4)
        loss.item()

    return step


def time_straightforward(trial: Trial, rates: Rates, batch: int, dir: Path) -> dict:
    clear(trial)
    step = build_straightforward(trial, batch, dir)
    times = time_calls(trial, step, 10)
    rates.straightforward[batch] = 1e3 * batch / times["ms"]
    return rates.compare(batch, times)


def time_way(trial: Trial, rates: Rates, way: Way, dir: Path) -> dict:
    clear(trial)
    batch = rates.batches[way.batch]
    loop = Loop(trial, build_config(trial, batch, **way.options), dir)
    first = time_first(trial, loop)
    times = time_calls(trial, loop, 20)
    values = rates.compare(batch, times, first_s=first, **profile_kernels(trial, loop))
    return {**values, **loop.result()}


def time_graph(trial: Trial, rates: Rates) -> dict:
    """The eager update as one CUDA graph: a lower bound of its time, without single launches."""
    clear(trial)
    batch = rates.batches["small"]
    return rates.compare(batch, time_calls(trial, record_graph(trial, batch), 30))


def record_graph(trial: Trial, batch: int) -> Callable[[], None]:
    """Forward, backward, clipping, AdamW and averaging, recorded once; return the replay."""
    config = build_config(trial, batch)
    device = trial.device
    net = build_net(config, device)
    forecaster = Forecaster(config, None, None, device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True, capturable=True)
    x1, x0, context, eps = torch.randn(4, batch, *LATENT_SHAPE, device=device)
    item = Batch(x1, x0, context[:, None], torch.ones(batch, 1, device=device))
    s = torch.rand(batch, device=device)
    weights = net.state_dict()
    averages = {name: value.clone() for name, value in weights.items()}

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with autocast(config.train.precision, device):
            loss = train.flow_loss(net, forecaster.interpolant, item, s, eps)
        loss.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        train.update_ema(averages, weights, 1000, 0.999)

    # Warm-up happens on another stream, as torch.cuda.graph requires.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_parts(trial: Trial, rates: Rates, dir: Path) -> dict:
    """Milliseconds of the parts of an update that are not the network."""
    clear(trial)
    batch = rates.batches["large"]
    device = trial.device
    loop = Loop(trial, build_config(trial, batch), dir)
    loop()
    learner = loop.learner
    for weight in learner.net.parameters():
        weight.grad = torch.randn_like(weight) * 1e-3
    learner.optimizer.found_inf = torch.zeros((), device=device)
    ema, weights = parallel.local(learner.ema), parallel.local(learner.weights)
    shape = (batch, *LATENT_SHAPE)

    def draw_noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator(device, "noise"), device=device)

    parts = {
        "batch": lambda: loop.source.batch(3),
        "noise": draw_noise,
        "seed": lambda: torch.manual_seed(3),
        "clip": lambda: nn.utils.clip_grad_norm_(learner.net.parameters(), 1e9),
        "AdamW": learner.optimizer.step,
        "average": lambda: train.update_ema(ema, weights, 3, 0.999),
    }
    return {f"{name} ms": time_calls(trial, part, 20)["ms"] for name, part in parts.items()}


# ----------------------------------------------------------------------------------------- resuming
def resume_exactly(trial: Trial, dir: Path) -> dict:
    """Six updates, the same six again, and the last three after a checkpoint: the same weights?"""
    config = build_config(trial, 8)
    first = Loop(trial, config, dir)
    for _ in range(3):
        first()
    checkpoint = copy_state(first.learner)
    for _ in range(3):
        first()
    again = Loop(trial, config, dir)
    for _ in range(6):
        again()
    after = Loop(trial, config, dir, start=checkpoint)
    after.step = 3
    for _ in range(3):
        after()
    expected = copy_state(first.learner)
    repeated = compare_states(copy_state(again.learner), expected)
    resumed = compare_states(copy_state(after.learner), expected)
    # Kernels of a GPU may add in any order; on a CPU, and where repeating is exact, nothing may
    # differ.
    require(trial.on_gpu or repeated == 0, f"repeated, weights differ by {repeated:.2g}")
    require(repeated > 0 or resumed == 0, f"resumed, weights differ by {resumed:.2g}")
    return {
        "repeating_is_exact": repeated == 0,
        "resuming_is_exact": resumed == 0,
        "largest_difference": max(repeated, resumed),
    }


def compare_states(a: dict, b: dict) -> float:
    """The largest difference of weights and averages."""
    differences = []
    for part in ("model", "ema"):
        for name, value in b[part].items():
            differences.append(float((a[part][name].double() - value.double()).abs().max()))
    return max(differences)


def run(steps: Steps) -> None:
    trial = start_trial()
    rates = Rates(trial)
    steps.run("work and rates", rates.describe)

    def time_ways(ways: list[Way], dir: Path) -> None:
        for way in ways:
            name = f"{way.name}, batch {rates.batches[way.batch]}"
            steps.run(name, time_way, trial, rates, way, dir, needs=0 if trial.tiny else way.needs)

    with tempfile.TemporaryDirectory() as folder:
        dir = write_latents(trial, Path(folder))
        for batch in rates.batches.values():
            name = f"straightforward float32, batch {batch}"
            steps.run(name, time_straightforward, trial, rates, batch, dir)
        time_ways(EAGER, dir)
        steps.run("repeat and resume", resume_exactly, trial, dir)
        if not trial.tiny:
            time_ways(COMPILED, dir)
            steps.run(
                f"bound: one CUDA graph, batch {rates.batches['small']}", time_graph, trial, rates
            )
        steps.run("parts of an update", time_parts, trial, rates, dir)
        time_ways(LAST, dir)
        if not trial.tiny:
            time_ways(COMPILED_LAST, dir)
