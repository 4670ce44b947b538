"""Whole commands, launched as a user would, at tiny sizes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, launch

from benchmarks import interpolants

av = pytest.importorskip("av")

RUN = "outputs/checkpoints/ball_stn-follmer-0"


def weights(folder, name=RUN) -> dict:
    return torch.load(folder / name / "latest.pt", weights_only=True)


def test_main_goes_from_nothing_to_forecasts(tiny_run):
    folder, printed = tiny_run
    for word in ("crps / repeat last", "video ", "contact sheet ", "checkpoint ", "time "):
        assert word in printed
    paths = dict(
        line.split(maxsplit=1)
        for line in printed.replace("contact sheet", "sheet").splitlines()
        if line.startswith(("video", "sheet", "metrics", "checkpoint"))
    )
    assert all((folder / path).is_file() for path in paths.values()) and len(paths) == 4
    results = (folder / paths["metrics"]).parent
    samples, truth = np.load(results / "samples.npy"), np.load(results / "truth.npy")
    assert (
        samples.shape == (3, 2, 4, 32, 32, 3)
        and truth.shape == (3, 8, 32, 32, 3)
        and samples.dtype == np.uint8
    )
    metrics = json.loads((folder / paths["metrics"]).read_text())
    for name in ("mse", "psnr", "crps"):
        for suffix in ("", "_repeat_last", "_mean_frame"):
            assert len(metrics["horizon"][name + suffix]) == 4
            assert np.isclose(
                metrics["summary"][name + suffix]["mean"],
                np.mean(metrics["horizon"][name + suffix]),
            )
    assert (
        metrics["protocol"]["network_evaluations_per_frame"] == 2
        and metrics["config"]["train"]["steps"] == 12
    )
    with av.open(str(folder / paths["video"])) as video:
        assert sum(1 for _ in video.decode(video=0)) == 8
    assert len(list((results / "videos").iterdir())) == 3
    state = weights(folder)
    assert {"model", "ema", "opt", "step", "config", "rng", "replay"} <= state.keys() and state[
        "step"
    ] == 12
    latent = state["config"]["latent"]
    assert tuple(latent["shape"]) == (4, 8, 8) and len(latent["mean"]) == 4 and latent["delta"] > 0
    rows = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 12]


def test_truth_is_held_out_and_given_frames_are_the_test_streams(tiny_run):
    from shards import Shards

    folder, _ = tiny_run
    truth = np.load(next((folder / "outputs/results").rglob("truth.npy")))
    test = Shards(folder / "data/ball_stn/test")
    assert (truth[0] == test.read(0, slice(0, 8))).all()


def test_running_the_same_command_again_repeats_no_work(tiny_run):
    folder, printed = tiny_run
    before = {
        path: os.stat(path).st_mtime_ns
        for part in ("data", "outputs/checkpoints", "outputs/latents")
        for path in (folder / part).rglob("*.*")
        if path.suffix in (".pt", ".hdf5")
    }
    again = launch(folder, "main.py", "--set", *TINY).stdout
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    assert (
        again.split("\ntime")[0] == printed.split("\ntime")[0]
    )  # and the forecasts are the same to the last digit


def test_a_run_killed_in_any_stage_resumes(tmp_path):
    """SIGKILL in every stage: the streams, the VQVAE, the latents, the training."""
    command = [
        sys.executable,
        str(REPO / "main.py"),
        "--set",
        *TINY,
        "train.steps=2000",
        "train.save_every=10",
        "vqvae.steps=150",
        "data.stream=20000",
    ]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    signs = [tmp_path / "data", tmp_path / "data/ball_stn", tmp_path / "outputs/latents"]
    for sign in [*signs, "training"]:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (
                (tmp_path / RUN / "step_00000020.pt").exists()
                if sign == "training"
                else sign.exists()
            ):
                break
            time.sleep(0.02)
        assert process.poll() is None, f"it ended before the sign of {sign}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    at_kill = weights(tmp_path)["step"]
    assert at_kill >= 20
    command[command.index("train.steps=2000")] = f"train.steps={at_kill + 20}"
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(tmp_path)["step"] == at_kill + 20
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()
    ]
    assert (
        steps == sorted(set(steps)) and steps[0] == 4
    )  # the rows from before the kill are there, none twice


def test_changed_settings_are_not_mixed_into_an_old_run(tiny_run):
    folder, _ = tiny_run
    done = launch(folder, "main.py", "--set", *TINY, "train.lr=0.5", check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: outputs/checkpoints/ball_stn-follmer-0"
    )
    assert "train.lr: 0.002 -> 0.5" in done.stderr and "output.run_id=NAME" in done.stderr


def test_sampling_settings_of_a_finished_run_are_taken_from_the_command(tiny_run):
    folder, _ = tiny_run
    assert (
        "2 test videos, 1 futures each"
        in launch(
            folder, "main.py", "--set", *TINY, "sample.num_videos=2", "sample.num_samples=1"
        ).stdout
    )


def test_linear_and_a_start_from_other_weights(tiny_run):
    folder, _ = tiny_run
    launch(
        folder,
        "main.py",
        "--interpolant",
        "linear",
        "--ckpt",
        f"{RUN}/latest.pt",
        "--set",
        *TINY,
        "train.lr=1e-9",
        "train.muon_lr=1e-9",
    )
    new, old = weights(folder, "outputs/checkpoints/ball_stn-linear-0"), weights(folder)
    assert new["config"]["flow"]["interpolant"] == "linear"
    assert all(
        torch.allclose(new["model"][name], old["ema"][name], atol=1e-5) for name in old["ema"]
    )


def test_overfit_is_sampled_from_its_own_clips(tiny_run):
    folder, _ = tiny_run
    printed = launch(folder, "main.py", "--overfit", "1", "--set", *TINY).stdout
    assert "4 train videos" in printed
    results = next((folder / "outputs/results/ball_stn-follmer-0-overfit").rglob("truth.npy"))
    from shards import Shards

    train = Shards(folder / "data/ball_stn/train")
    assert any(
        (np.load(results)[1] == train.read(0, slice(start, start + 8))).all()
        for start in range(0, 593, 8)
    )


def test_sample_needs_nothing_but_the_checkpoint(tiny_run):
    folder, _ = tiny_run
    vqvae = next((folder / "outputs/checkpoints").glob("vqvae-*"))
    hidden = vqvae.rename(folder / "hidden")
    try:
        printed = launch(
            folder,
            "sample.py",
            "--ckpt",
            f"{RUN}/latest.pt",
            "--num_videos",
            "2",
            "--num_samples",
            "3",
            "--num_frames",
            "5",
            "--steps",
            "1",
            "--split",
            "val",
            "--format",
            "gif",
            "--out",
            "mine",
            "--diffusion",
            "0",
        ).stdout
    finally:
        hidden.rename(vqvae)
    assert (
        "2 val videos, 3 futures each, 4 -> 5 frames, exact solver, diffusion 0, 1 network "
        "evaluations a frame" in printed
    )
    assert np.load(folder / "mine/samples.npy").shape == (2, 3, 5, 32, 32, 3)
    assert (folder / "mine/forecasts.gif").exists() and (folder / "mine/contact_sheet.png").exists()


def test_dry_run_prints_the_config_and_does_nothing(tmp_path):
    printed = launch(tmp_path, "main.py", "--dry_run", "1", "--set", "train.lr=5e-4").stdout
    config = json.loads(printed[: printed.index("\n}") + 2])
    assert config["train"]["lr"] == 5e-4 and "generate the balls stream in data/ball_stn" in printed
    assert not list(tmp_path.iterdir())


def test_real_video_from_a_file_to_forecasts(tmp_path):
    shutil.copytree(
        REPO / "tests/data",
        tmp_path / "films",
        ignore=shutil.ignore_patterns("*.json", "*.npz", "*.md"),
    )
    launch(
        tmp_path,
        "-m",
        "prepare.videos",
        "--source",
        "films",
        "--out",
        "data/walk",
        "--image_size",
        "32",
        "--tile",
        "90",
        "--clip_length",
        "8",
        "--min_motion",
        "0",
        "--val",
        "0.2",
        "--test",
        "0.2",
    )
    printed = launch(
        tmp_path,
        "main.py",
        "--dataset",
        "videos",
        "--set",
        *TINY,
        "data.root=data/walk",
        "data.image_size=32",
    ).stdout
    assert "3 test videos, 2 futures each, 4 -> 4 frames" in printed
    assert next((tmp_path / "outputs/results").rglob("contact_sheet.png")).stat().st_size > 1000


def test_augmented_data_and_the_published_network_and_target(tmp_path, tiny_run):
    shutil.copytree(tiny_run[0] / "data", tmp_path / "data")
    printed = launch(
        tmp_path,
        "main.py",
        "--dataset",
        "clevrer",
        "--set",
        *TINY,
        "data.root=data/ball_stn",
        "data.skip=1",
        "data.image_size=32",
        "data.workers=2",
        "vqvae.kind=small",
        "vqvae.ckpt=",
        "vqvae.downsample=4",
        "model.dropout=0.1",
    ).stdout
    assert "exact solver, diffusion sigma" in printed
    assert not (tmp_path / "outputs/latents").exists()
    state = weights(tmp_path, "outputs/checkpoints/clevrer-follmer-0")
    assert (
        "time_projection.0.weight" in state["model"]
        and state["config"]["flow"]["output"] == "drift"
    )
    assert tuple(state["config"]["latent"]["mean"]) == (0.0,) * 4


def test_wandb_runs_offline_without_a_key(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0] / "data", tmp_path / "data")
    launch(
        tmp_path,
        "main.py",
        "--set",
        *TINY,
        "train.sample_every=6",
        WANDB_MODE=None,
        WANDB_API_KEY=None,
        NETRC=str(tmp_path / "none"),
    )
    runs = list((tmp_path / "outputs/wandb").glob("offline-run-*"))
    assert runs and not (tmp_path / "wandb").exists()
    assert any(path.suffix == ".mp4" for run in runs for path in run.rglob("*"))
    assert (tmp_path / RUN / "forecasts_00000006.png").exists()


def test_the_benchmark_of_interpolants_writes_its_table_and_resumes(
    tiny_run, tmp_path, monkeypatch
):
    folder, _ = tiny_run
    monkeypatch.chdir(folder)
    tiny = [
        value
        for value in TINY
        if not value.startswith(("train.steps", "model.width", "sample.num"))
    ]
    small = [
        "--seeds",
        "1",
        "--steps",
        "3",
        "--width",
        "16",
        "--videos",
        "2",
        "--samples",
        "2",
        "--most",
        "2",
        "--out",
        str(tmp_path),
        "--set",
        *tiny,
    ]
    launch(folder, "-m", "benchmarks.interpolants", *small)
    table = (tmp_path / "RESULTS.md").read_text()
    for name in (
        "linear",
        "follmer",
        "follmer_linear",
        "bridge",
        "trig",
        "stochastic_heun",
        "logit-normal s",
    ):
        assert f"| {name} |" in table
    assert (tmp_path / "interpolants.png").stat().st_size > 10_000
    rows = folder / "outputs/benchmark/interpolants.jsonl"
    before = rows.read_text()
    monkeypatch.setattr(sys, "argv", [sys.argv[0], *small])
    interpolants.main()
    assert rows.read_text() == before and (tmp_path / "RESULTS.md").read_text() == table
