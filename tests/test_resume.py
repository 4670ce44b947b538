"""A resumed run equals an uninterrupted run bit for bit. Its batches do not depend on the number of
processes."""

import json
import signal

import pytest
import torch
from conftest import TINY, copy_of

import configs
import interpolants
from batches.frames import FrameTriples
from batches.latents import LatentTriples
from main import Clock, train_network
from runtime import checkpoints, parallel
from runtime.console import Stopped
from runtime.process import StopSignals, start
from shards import Shards

CPU = torch.device("cpu")


def identity(x: torch.Tensor) -> torch.Tensor:
    """Replaces an encoder."""
    return x


def trained(folder, name, monkeypatch, *settings):
    """The checkpoint of `python main.py --set TINY …`. No forecasts are made."""
    monkeypatch.chdir(folder)
    overrides = configs.parse_overrides(
        [*TINY, "train.schedule=constant", f"output.run_id={name}", *settings]
    )
    path = train_network(configs.build(overrides=overrides), start(), None, Clock())[1]
    return checkpoints.load_checkpoint(path)


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    return copy_of(tiny_run[0], tmp_path_factory.mktemp("resume") / "run")


def assert_same(a: dict, b: dict) -> None:
    assert a["step"] == b["step"]
    assert a["opt"]["param_groups"] == b["opt"]["param_groups"]
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in b[part])
    for k, slot in b["opt"]["state"].items():
        assert all(torch.equal(a["opt"]["state"][k][name], value) for name, value in slot.items())


def rows(folder, name) -> list[dict]:
    """The rows of a run's log, without the rate."""
    lines = (folder / "outputs/checkpoints" / name / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
        row.pop("samples_per_second", None)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        *[[f"flow.interpolant={name}"] for name in interpolants.TABLE],
        ["train.precision=bf16"],
        ["model.dropout=0.3"],
        ["model.name=uvit"],
        # With the two steps of TINY.
        ["flow.objective=energy", "flow.evaluations=2", "flow.unroll=2"],
        ["flow.objective=shortcut"],
        ["data.hue=0.1", "data.brightness=0.2", "data.workers=0"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, monkeypatch, settings):
    name = settings[0].replace("=", "-")

    def stop_at_6(self, step: int, last: bool) -> int:
        # Update 6 lies between two logs and between two checkpoints.
        return signal.SIGTERM if step == 6 else 0

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after update 6"):
        patch.setattr(StopSignals, "agreed", stop_at_6)
        trained(folder, f"{name}-parts", monkeypatch, *settings)
    parts = trained(folder, f"{name}-parts", monkeypatch, *settings)
    whole = trained(folder, f"{name}-whole", monkeypatch, *settings)
    assert_same(parts, whole)
    logged = rows(folder, f"{name}-whole")
    assert len(logged) == 3
    assert rows(folder, f"{name}-parts") == logged


def test_a_resumed_run_may_have_another_number_of_loader_workers(folder, monkeypatch):
    jitter = ["data.hue=0.1", "data.contrast=0.2"]
    trained(folder, "workers-parts", monkeypatch, *jitter, "train.steps=6", "data.workers=2")
    parts = trained(folder, "workers-parts", monkeypatch, *jitter, "data.workers=0")
    assert_same(parts, trained(folder, "workers-whole", monkeypatch, *jitter, "data.workers=1"))


@pytest.mark.parametrize("world", [2, 4])
def test_a_batch_does_not_depend_on_the_number_of_processes(folder, world, monkeypatch):
    monkeypatch.chdir(folder)
    config = configs.build(
        overrides=configs.parse_overrides([*TINY, "data.hue=0.3", "data.saturation=0.5"])
    )
    shards = Shards("data/ball_stn/train")
    whole = next(FrameTriples(config, shards).batches(3, 4, identity, CPU))
    parts = [
        next(FrameTriples(config, shards, rank, world).batches(3, 4, identity, CPU))
        for rank in range(world)
    ]
    for part, values in zip(zip(*parts), whole):
        assert torch.equal(torch.cat(part), values)
    latents = next(folder.glob("outputs/latents/*/train"))
    whole = LatentTriples(config, latents, CPU).batch(3)
    parts = [LatentTriples(config, latents, CPU, rank, world) for rank in range(world)]
    for k, part in enumerate(zip(*(source.batch(3) for source in parts))):
        assert torch.equal(torch.cat(part), whole[k])
    assert all(torch.equal(a, b) for a, b in zip(parts[1].batch(3, whole=True), whole))


def test_checkpoints_are_kept_by_number_and_by_interval(folder, monkeypatch):
    trained(
        folder,
        "kept",
        monkeypatch,
        "train.save_every=2",
        "train.keep=2",
        "train.keep_every=4",
        "train.steps=11",
    )
    kept = sorted(path.name for path in (folder / "outputs/checkpoints/kept").glob("step_*"))
    assert kept == [f"step_{step:08d}.pt" for step in (4, 8, 10, 11)]


@pytest.mark.parametrize(
    "settings",
    [
        ["train.accumulate=4"],
        ["train.recompute=1"],
        pytest.param(
            ["train.compile=default"],
            marks=pytest.mark.skipif(not parallel.has_compiler(), reason="needs a C compiler"),
        ),
    ],
    ids=lambda settings: settings[0],
)
def test_options_that_save_memory_or_time_do_not_change_the_gradient(folder, monkeypatch, settings):
    same = ["model.name=uvit", "model.dropout=0", "train.steps=6", "train.optimizer=adamw"]
    name = settings[0].partition("=")[0]
    plain = trained(folder, "plain", monkeypatch, *same)
    other = trained(folder, name, monkeypatch, *same, *settings)
    first = {key: slot["exp_avg"] for key, slot in plain["opt"]["state"].items()}
    size = max(moment.abs().max() for moment in first.values())
    for key, moment in first.items():
        own = other["opt"]["state"][key]["exp_avg"]
        assert torch.allclose(own, moment, rtol=0, atol=1e-3 * size.item())
    loss = rows(folder, name)[0]["loss"]
    assert rows(folder, "plain")[0]["loss"] == pytest.approx(loss, rel=1e-4)
