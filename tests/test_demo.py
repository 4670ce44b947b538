"""The small checkpoint of `python sample.py`, and scripts/export_demo.py, which makes it."""

import json

import numpy as np
import pytest
import torch
from conftest import launch

from sample import DEMO
from scripts import export_demo


def test_without_a_checkpoint_sample_uses_the_one_in_the_repository(tmp_path):
    few = ["--num_videos", "2", "--num_frames", "4"]
    printed = launch(tmp_path, "sample.py", *few).stdout
    assert "sampling from ball_stn.pt" in printed
    (dir,) = (tmp_path / "outputs/results/demo").glob("*/ball_stn-test")
    assert np.load(dir / "samples.npy").shape == (2, 2, 4, 32, 32, 3)
    assert (dir / "index.html").is_file() and (dir / "forecasts.mp4").is_file()
    # The network has learnt: it is much better than repeating the last frame.
    result = json.loads((dir / "metrics.json").read_text())
    assert result["ratio_to_repeat_last"]["crps"]["all"] < 0.4


def test_the_demo_is_small_and_holds_nothing_but_weights():
    assert DEMO.stat().st_size < export_demo.MAX_BYTES
    state = torch.load(DEMO, weights_only=True)
    assert set(state) == {"ema", "vqvae", "step", "config"}
    floats = [
        v for v in [*state["ema"].values(), *state["vqvae"].values()] if v.is_floating_point()
    ]
    assert all(value.dtype == torch.float16 for value in floats)


def test_a_finished_run_becomes_a_demo(tiny_run, tmp_path):
    folder, _ = tiny_run
    ckpt = str(folder / "outputs/checkpoints/ball_stn-follmer-0/latest.pt")
    launch(tmp_path, "-m", "scripts.export_demo", "--ckpt", ckpt, "--out", "small.pt")
    state, full = (torch.load(p, weights_only=True) for p in (tmp_path / "small.pt", ckpt))
    for name, value in full["ema"].items():
        assert torch.equal(state["ema"][name], value.half() if value.is_floating_point() else value)
    assert state["config"]["output"] == {"root": "outputs", "run_id": "demo"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": 3}, "3 of 12 updates are done; finish the run"),
        ({"vqvae": None}, "not a checkpoint with its autoencoder"),
        ({"ema": {"x": torch.zeros(2_000_000)}}, "in float16, at most 3 MB"),
    ],
)
def test_an_unsuitable_checkpoint_makes_no_demo(tiny_run, tmp_path, command, change, message):
    folder, _ = tiny_run
    path = folder / "outputs/checkpoints/ball_stn-follmer-0/latest.pt"
    state = torch.load(path, weights_only=True) | change
    state = {name: value for name, value in state.items() if value is not None}
    torch.save(state, tmp_path / "other.pt")
    arguments = ("--ckpt", tmp_path / "other.pt", "--out", tmp_path / "small.pt")
    code, error = command(tmp_path, "scripts/export_demo", *arguments)
    assert code == 2 and message in error
    assert not (tmp_path / "small.pt").exists()
