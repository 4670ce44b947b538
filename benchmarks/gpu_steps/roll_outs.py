"""Speed of roll-outs beside the straightforward way; torch.compile: one graph, the same samples."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import sample as benchmark
from benchmarks.gpu_steps.record import Failed, Steps, require
from benchmarks.gpu_steps.setup import (
    Trial,
    build_config,
    build_forecaster,
    clear,
    count_graphs,
    no_host_waits,
    peak_gib,
    profile_kernels,
    random_latents,
    relative_difference,
    start_trial,
    time_calls,
    time_first,
)
from configs import GRAPHS
from forecaster import Forecaster
from runtime import parallel

GIVEN = 10
# Compiled bf16 rounds less often than eager bf16; float32 on a CPU only changes the order of sums.
TOLERANCE = {"bf16": 0.1, "float32": 1e-4}
# (sample.compile, key of Sizes.videos, seconds that it needs on a GPU)
COMPILED = [
    ("default", "many", 40),
    ("reduce-overhead", "few", 40),
    ("default", "few", 40),
    ("reduce-overhead", "many", 40),
]


class Sizes:
    """Batch sizes, forecast frames and solver steps; the rates of the straightforward way."""

    def __init__(self, trial: Trial):
        self.trial = trial
        self.videos = {"few": 4} if trial.tiny else {"few": 16, "many": 256}
        self.frames = 2 if trial.tiny else 4
        self.steps = 2 if trial.tiny else 20
        self.straightforward: dict[int, float] = {}

    def build(self, precision: str, mode: str = "off") -> Forecaster:
        options = {
            "flow.interpolant": "linear",
            "sample.solver": "euler",
            "sample.steps": self.steps,
            "train.precision": precision,
            "sample.compile": mode,
        }
        return build_forecaster(self.trial, build_config(self.trial, 1, **options))

    @property
    def precision(self) -> str:
        return "float32" if self.trial.tiny else "bf16"

    def compare(self, videos: int, times: dict, **more) -> dict:
        rate = videos * self.frames / (times["ms"] / 1e3)
        base = self.straightforward.get(videos)
        return {
            "videos": videos,
            "frames_per_s": rate,
            "evaluations_per_s": rate * self.steps,
            "ratio": rate / base if base else None,
            "peak_gib": peak_gib(self.trial),
            **times,
            **more,
        }


def time_straightforward(sizes: Sizes, videos: int) -> dict:
    """Float32, without prepared weights; the history grows by concatenation."""
    trial = sizes.trial
    clear(trial)
    model = sizes.build("float32")
    given = random_latents(trial, videos, GIVEN)
    work = partial(benchmark.roll_out_straightforward, model, given, sizes.frames, videos)
    times = time_calls(trial, work, 3, 1)
    sizes.straightforward[videos] = videos * sizes.frames / (times["ms"] / 1e3)
    return sizes.compare(videos, times)


def time_eager(sizes: Sizes, videos: int) -> dict:
    trial = sizes.trial
    clear(trial)
    model = sizes.build(sizes.precision)
    given = random_latents(trial, videos, GIVEN)
    times = time_calls(trial, partial(benchmark.roll_out_ours, model, given, sizes.frames), 3, 1)
    kernels = profile_kernels(trial, partial(model.roll_out, given, 1, ("key",)))
    return sizes.compare(videos, times, **kernels)


def roll_out_three_times(model: Forecaster, given: Tensor, frames: int) -> list[Tensor]:
    """Two lengths of history and of forecast, then a smaller last batch."""
    return [
        model.roll_out(given[:, :3], 1, ("short",)),
        model.roll_out(given, frames, ("long",)),
        model.roll_out(given[:-1], frames, ("last batch",)),
    ]


def check_and_time_compiled(sizes: Sizes, videos: int, mode: str) -> dict:
    """One graph over two lengths and a smaller last batch, the eager samples, no waits."""
    trial = sizes.trial
    clear(trial)
    given = random_latents(trial, videos, GIVEN)
    expected = roll_out_three_times(sizes.build(sizes.precision), given, sizes.frames)
    clear(trial)
    model = sizes.build(sizes.precision, mode)
    first = time_first(trial, partial(model.roll_out, given[:, :3], 1, ("first",)))
    found = roll_out_three_times(model, given, sizes.frames)
    graphs = count_graphs()
    differences = [relative_difference(a, b) for a, b in zip(found, expected)]
    worst, allowed = max(differences), TOLERANCE[sizes.precision]
    times = time_calls(trial, partial(benchmark.roll_out_ours, model, given, sizes.frames), 3, 1)
    kernels = profile_kernels(trial, partial(model.roll_out, given, 1, ("key",)))
    more = {
        "first_s": first,
        "graphs": graphs,
        "relative_difference": worst,
        "cuda_graphs": mode in GRAPHS,
    }
    values = sizes.compare(videos, times, **more, **kernels)
    require(graphs == 1, f"torch.compile made {graphs} graphs, not 1", values)
    message = f"relative difference to eager {worst:.2g}, allowed {allowed:.2g}"
    require(worst < allowed, message, values)
    try:
        with no_host_waits(trial):
            model.roll_out(given, 2, ("no waits",))
    except RuntimeError as error:
        raise Failed(f"the host waits: {error}", values) from error
    return values


def check_weights(sizes: Sizes) -> dict:
    """Forecaster.prepare casts the weights to bf16 once; autocast then casts nothing but inputs."""
    model = sizes.build("bf16")
    given = random_latents(sizes.trial, 2, 3)
    model.roll_out(given, 1, ("key",))
    layers = [module for module in model.net.modules() if isinstance(module, torch.nn.Linear)]
    dtypes = {layer.weight.dtype for layer in layers}
    require(
        dtypes == {torch.bfloat16},
        f"weights of linear layers are {dtypes} after a roll-out in bf16",
    )
    return {"linear_layers_in_bf16": len(layers)}


def run(steps: Steps) -> None:
    trial = start_trial()
    sizes = Sizes(trial)
    for videos in sizes.videos.values():
        steps.run(f"straightforward float32, {videos} videos", time_straightforward, sizes, videos)
        steps.run(f"{sizes.precision}, eager, {videos} videos", time_eager, sizes, videos)
    steps.run("weights are cast once", check_weights, sizes)
    if trial.tiny:
        if parallel.has_compiler():
            steps.run(
                "sample.compile=default, 4 videos", check_and_time_compiled, sizes, 4, "default"
            )
        return
    for mode, count, needs in COMPILED:
        videos = sizes.videos[count]
        name = f"sample.compile={mode}, {videos} videos"
        steps.run(name, check_and_time_compiled, sizes, videos, mode, needs=needs)
