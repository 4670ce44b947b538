"""The benchmarks of speed at tiny sizes: they run, measure what they state, write their tables."""

import argparse
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import configs
from batches.windows import Shards
from benchmarks import measure, memory, soak, train_step
from benchmarks import sample as sampling
from runtime.console import Failure
from runtime.process import Process, generator
from solvers import integrate

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """Arguments of a benchmark; size S is replaced by a network of a few thousand weights."""
    monkeypatch.setitem(
        configs.SIZES, "S", {"name": "uvit", "width": 16, "depth": 1, "mid_depth": 1, "heads": 2}
    )
    return argparse.Namespace(
        sizes=["S"],
        size="S",
        batches=[3],
        baseline_batch=2,
        precision="float32",
        compile="off",
        accumulate=1,
        shard=False,
        recompute=False,
        repeats=1,
        videos=2,
        frames=2,
        steps=2,
    )


def test_a_block_of_calls_is_timed_between_two_waits(monkeypatch):
    events = []
    monkeypatch.setattr(measure, "synchronize", lambda _: events.append("wait"))
    measure.median_seconds(
        lambda: events.append("call"), torch.device("cuda"), 2, warmup=3, calls=4
    )
    block = ["wait", *["call"] * 4, "wait"]
    assert events == [*["call"] * 3, *block, *block]


def test_the_median_is_per_call_and_leaves_the_warm_up_out(monkeypatch):
    clock = iter([0.0, 8.0, 10.0, 30.0, 30.0, 34.0])
    monkeypatch.setattr(measure, "synchronize", lambda _: None)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.median_seconds(lambda: None, torch.device("cuda"), 3, calls=4) == 2.0


def test_on_a_cpu_a_block_is_one_call():
    calls = []
    measure.median_seconds(lambda: calls.append(0), CPU, 3, 2, calls=10)
    assert len(calls) == 5


def test_flops_are_those_of_the_layers(tiny):
    """Three times 2 per weight and token of the linear layers, plus a little for attention."""
    config = train_step.build_config(argparse.Namespace(**{**vars(tiny), "size": "B"}), "B", 1)
    tokens, weights = 65, 13 * 12 * 768**2 + 4 * 2 * 768**2
    assert 1.0 < train_step.count_flops(config) / (6 * tokens * weights) < 1.05


def test_a_training_step_is_timed_beside_the_straightforward_one(tiny):
    run = train_step.measure_run(tiny, Process(0, 1, CPU))
    assert run["samples_per_second"] > 0 and run["batch"] == 3 and run["peak_gib"] > 0.05
    line = {"runs": [run]}
    text = "\n".join(
        train_step.compare_with_baseline(tiny, line, train_step.measure_baseline(tiny, CPU))
    )
    each = line["baseline_ms_per_sample"]
    assert each["all"] == pytest.approx(each["read"] + each["encode"] + each["update"])
    assert min(each.values()) > 0
    assert line["ratio"] == pytest.approx(each["all"] * run["samples_per_second"] / 1e3)
    assert f"{line['ratio']:.2f}" in text


def test_sampling_is_timed_beside_the_straightforward_one(tiny):
    text, line = sampling.compare_roll_outs(tiny, CPU)
    assert set(line["frames_per_second"]) == {
        "straightforward, one by one",
        "straightforward, all at once",
        "ours",
    }
    assert line["ratio"] > 0 and "| ours |" in text


def test_the_roll_out_is_the_plain_loop(tiny):
    """A loop that grows its history by concatenation gives the same samples, up to 1e-4."""
    model = sampling.build_kth(tiny, CPU, "float32", "off")
    object.__setattr__(
        model, "config", configs.update(model.config, {"sample.context": "recent:1"})
    )
    given = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fast = model.roll_out(given, 5, ("key",))
    history, noise = given, generator(CPU, "key")
    with torch.no_grad():
        for _ in range(5):
            last, before = history[:, -1], history[:, -2]

            def field(x, s, last=last, before=before):
                return model.net(x, s, last, before[:, None], torch.ones(3, 1))

            frame = integrate(field, model.interpolant, last, tiny.steps, "euler", "0", noise)
            history = torch.cat([history, frame[:, None]], 1)
    assert fast.std() > 0.1 and torch.allclose(fast, history[:, 4:], atol=1e-4)


def test_memory_of_a_roll_out_counts_what_comes_out():
    found = memory.roll_out(6)
    assert found["output"] == memory.VIDEOS * 6 * 64 * 64 * 3
    assert found["peak"] > found["output"]
    assert found["ms_per_frame"] > 0


def test_output_in_main_memory_counts_against_a_cpu_alone():
    short, long = {"peak": 1000, "output": 30}, {"peak": 1000, "output": 240}
    gpu, cpu = {"device": "cuda"}, {"device": "cpu"}
    assert memory.peak_ratio({**short, **gpu}, {**long, **gpu}) == 1.0
    grown = {**long, **cpu, "peak": 1210}
    assert memory.peak_ratio({**short, **cpu}, grown) == 1.0


class NoGpu:
    """A stand-in for torch.cuda that must not be used."""

    def __getattr__(self, name):
        raise AssertionError(f"torch.cuda.{name} is used in the parent")


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Run a benchmark's main() with workers that answer at once and no GPU in the parent."""
    answers = {
        "--worker": {"samples_per_second": 8.0, "flop_per_second": 1e9, "peak_gib": 1.0},
        "machine": {
            "machine": "a GPU",
            "precision": "bf16",
            "matmul_bf16": 1e10,
            "matmul_float32": 1e9,
        },
        "baseline": {"read": 1.0, "encode": 1.0, "update": 2.0},
        "--roll_out": {
            "frames": 100,
            "peak": 100,
            "output": 1,
            "ms_per_frame": 1.0,
            "device": "cuda",
            "machine": "a GPU",
        },
    }
    started = []

    def run(command, **_):
        name = next(name for name in answers if name in command)
        started.append(name)
        return subprocess.CompletedProcess(command, 0, json.dumps(answers[name]))

    def begin(module, *flags):
        monkeypatch.setattr(torch, "cuda", NoGpu())
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sys, "argv", ["benchmark", *flags, "--out", str(tmp_path)])
        module.main()
        return started

    return begin


def test_the_parent_of_timed_trainings_leaves_the_gpu_alone(workers, capsys):
    assert workers(train_step, "--baseline") == ["machine", "--worker", "baseline"]
    text = capsys.readouterr().out
    line = json.loads(text.splitlines()[-1])
    assert text.startswith("a GPU, bf16. A large matrix product runs at 0.01 TFLOP/s in bf16")
    assert line["fraction_of_matmul"] == 0.1
    assert line["ratio"] == pytest.approx(4.0)


def test_the_parent_of_measured_memory_leaves_the_gpu_alone(workers, capsys):
    assert workers(memory) == ["--roll_out"] * 2 + ["--worker"] * 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["machine"] == "a GPU"


def test_kth_like_shards_hold_the_walk(tmp_path):
    shards = Shards(measure.write_river_shards(tmp_path, 3, 45))
    assert shards.lengths.tolist() == [45] * 3 and shards.shape == (64, 64, 3)
    assert np.array_equal(shards.read(0, np.array([7])), measure.read_walk(64)[7:8])


# -------------------------------------------------------------------- soak
def kill_at(made: int, saved: int) -> dict:
    return {"signal": "SIGTERM", "made": made, "saved": saved}


def test_a_soak_with_most_kills_before_a_checkpoint_fails():
    early, late = kill_at(3, 0), kill_at(80, 75)
    assert soak.judge([early, late], []) == ("identical", 0)
    verdict, code = soak.judge([early, early, late], [])
    assert code == 1 and "only 1 of 3 kills came after a checkpoint" in verdict
    assert soak.judge([late], ["model.w"]) == ("different: model.w", 1)
    assert soak.describe([early, late]) == "TERM at 3 (0), TERM at 80 (75)"


def test_most_kills_of_a_soak_wait_for_updates():
    for kills in (1, 4, 20):
        moments = soak.draw_moments(kills, np.random.default_rng(0))
        updates = [moment for moment in moments if isinstance(moment, int)]
        assert len(moments) == kills and len(updates) >= kills * 3 / 4
        assert all(1 <= moment < soak.SPAN for moment in updates)


@pytest.mark.parametrize("speed", [0.002, 0.05])
def test_a_kill_of_a_soak_comes_after_its_updates_on_fast_and_slow_machines(tmp_path, speed):
    """The run is a process that logs an update every `speed` seconds."""
    (tmp_path / soak.RUN).mkdir(parents=True)
    code = (
        "import json, time\n"
        f"with open({str(tmp_path / soak.RUN / 'metrics.jsonl')!r}, 'w', buffering=1) as file:\n"
        "    for step in range(1, 10_000):\n"
        f"        time.sleep({speed})\n"
        "        file.write(json.dumps({'step': step}) + chr(10))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        assert soak.wait_for(process, tmp_path, 5, saved=10)
        assert soak.updates_made(tmp_path) >= 15
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not soak.wait_for(process, tmp_path, 5, saved=10**6)


def test_a_soak_gives_up_on_a_run_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "STALL", 0.3)
    (tmp_path / "log").write_text("waiting\n")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(Failure, match="no progress in 0.3 seconds: waiting"):
            soak.wait_for(process, tmp_path, 5, saved=0)
    finally:
        process.kill()
        process.wait()
