"""The benchmarks of speed, tiny: they run, measure what they say, and write their tables."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import launch

import configs
import data
import runtime
from benchmarks import measure, memory, train_step
from benchmarks import sample as sampling
from solvers import integrate

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """Size S is a network of a few thousand weights."""
    monkeypatch.setitem(configs.SIZES, "S", {"name": "uvit", "width": 16, "depth": 1, "mid_depth": 1, "heads": 2})
    return argparse.Namespace(sizes=["S"], size="S", batches=[3], baseline_batch=2, precision="float32", compile="off",
                              accumulate=1, shard=False, recompute=False, repeats=1, videos=2, frames=2, steps=2)


def test_medians_leave_the_warm_up_out():
    calls = []
    assert measure.seconds(lambda: calls.append(0), CPU, 3, 2) < 0.1 and len(calls) == 5


def test_flops_are_those_of_the_layers(tiny):
    """Thrice 2 per weight and token of the linear layers, plus attention, which is small."""
    config = train_step.setting(argparse.Namespace(**{**vars(tiny), "size": "B"}), "B", 1)
    tokens, weights = 65, 13 * 12 * 768**2 + 4 * 2 * 768**2
    assert 1.0 < train_step.flops(config) / (6 * tokens * weights) < 1.05


def test_a_training_step_is_timed_beside_the_straightforward_one(tiny):
    run = train_step.worker(tiny, runtime.Process(0, 1, CPU))
    assert run["samples_per_second"] > 0 and run["batch"] == 3 and run["peak_gib"] > 0.05
    line = {"runs": [run]}
    text = "\n".join(train_step.compared(tiny, line, runtime.Process(0, 1, CPU)))
    each = line["baseline_ms_per_sample"]
    assert each["all"] == pytest.approx(each["read"] + each["encode"] + each["update"]) and min(each.values()) > 0
    assert line["ratio"] == pytest.approx(each["all"] * run["samples_per_second"] / 1e3) and f"{line['ratio']:.2f}" in text


def test_sampling_is_timed_beside_the_straightforward_one(tiny):
    text, line = sampling.same_evaluations(tiny, CPU)
    assert set(line["frames_per_second"]) == {"straightforward, one by one", "straightforward, all at once", "ours"}
    assert line["ratio"] > 0 and "| ours |" in text


def test_the_roll_out_is_the_plain_loop(tiny):
    """One evaluation after another, a history by concatenation: the same samples to 1e-4."""
    model = sampling.kth(tiny, CPU, "float32", "off")
    object.__setattr__(model, "config", configs.update(model.config, {"sample.context": "recent:1"}))
    given = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fast = model.roll_out(given, 5, ("key",))
    history, noise = given, runtime.generator(CPU, "key")
    with torch.no_grad():
        for _ in range(5):
            last, before = history[:, -1], history[:, -2]
            field = lambda x, s, last=last, before=before: model.net(x, s, last, before, torch.ones(3))  # noqa: E731
            frame = integrate(field, model.interpolant, last, tiny.steps, "euler", "0", noise)
            history = torch.cat([history, frame[:, None]], 1)
    assert fast.std() > 0.1 and torch.allclose(fast, history[:, 4:], atol=1e-4)


def test_memory_of_a_roll_out_counts_what_comes_out():
    found = memory.roll_out(6)
    assert found["output"] == memory.VIDEOS * 6 * 64 * 64 * 3 and found["peak"] > found["output"] and found["ms_per_frame"] > 0


def test_reading_is_timed_and_written_down(tmp_path):
    out = launch(tmp_path, "-m", "benchmarks.data", "--batch", "4", "--repeats", "1", "--out", str(tmp_path)).stdout
    ways = json.loads(out.splitlines()[-1])["ways"]
    assert len(ways) == 4 and ways["latents, cached"]["ratio"] > 10
    assert "## Reading batches" in (tmp_path / "RESULTS.md").read_text()


def test_kth_like_shards_hold_the_walk(tmp_path):
    shards = data.Shards(measure.river_shards(tmp_path, 3, 45))
    assert shards.lengths.tolist() == [45] * 3 and shards.shape == (64, 64, 3)
    assert np.array_equal(shards.read(0, np.array([7])), measure.frames_of_a_walk(64)[7:8])
