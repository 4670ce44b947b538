"""Training on latents of a foreign autoencoder: none of our own is trained, samples stay latents,
and pictures are previews.
"""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, launch

import configs
import vqvae
from batches.batch import to_frames
from runtime import checkpoints
from shards import Shards, ShardWriter

RUN = [*(value for value in TINY if not value.startswith("vqvae")), "data.root=data/plaicraft"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sessions in train, one in test: waves that move to the right."""
    folder = tmp_path_factory.mktemp("plaicraft")
    for split, lengths in (("train", (30, 25, 40)), ("test", (40,))):
        with ShardWriter(folder / "data/plaicraft" / split, key="latents", fps=10.0) as writer:
            for k, length in enumerate(lengths):
                phase = np.arange(length)[:, None, None, None] * 0.3 + k
                x = np.arange(12) + 2 * np.arange(8)[:, None] + np.arange(4)[:, None, None]
                writer.add((3 * np.sin(0.5 * x - phase)).astype(np.float16))
    return folder


@pytest.mark.parametrize("mode", ["clips", "stream"])
def test_latents_train_and_samples_stay_latents(folder, mode):
    steps = (
        ["train.steps=6"]
        if mode == "clips"
        else ["data.clip=8", "train.steps=0", "replay.size=0.2"]
    )
    steps = [
        *[
            value
            for value in RUN
            if not value.startswith(("train.steps", "data.stream", "data.held_out"))
        ],
        *steps,
    ]
    out = launch(
        folder,
        "main.py",
        "--dataset",
        "plaicraft",
        "--set",
        *steps,
        f"data.mode={mode}",
        f"output.run_id={mode}",
        "train.sample_every=3",
    ).stdout
    assert "latents.npy" in out and "linear preview" in out
    result = next((folder / "outputs/results" / mode).glob("*/plaicraft-test"))
    latents, samples = np.load(result / "latents.npy"), np.load(result / "samples.npy")
    assert (
        latents.dtype == np.float16
        and latents.shape == (*samples.shape[:3], 4, 8, 12)
        and samples.shape[3:] == (8, 12, 3)
    )
    shown = vqvae.load("", "latents").decode(torch.from_numpy(latents[0, 0]).float())
    assert np.abs(to_frames(shown).astype(int) - samples[0, 0]).max() <= 1
    clips, truth = Shards(folder / "data/plaicraft/test", "latents"), np.load(result / "truth.npy")
    assert (
        np.abs(
            truth[0, 0].astype(int)
            - to_frames(
                vqvae.load("", "latents").decode(
                    torch.from_numpy(clips.read(0, np.array([0]))).float()
                )
            )[0]
        ).max()
        <= 1
    )
    state = checkpoints.load_checkpoint(folder / "outputs/checkpoints" / mode / "latest.pt")
    assert "vqvae" not in state and state["config"]["latent"]["shape"] == (4, 8, 12)
    assert state["step"] == (
        6 if mode == "clips" else 23 + 18 + 33
    )  # windows of 8 frames, none across two sessions
    refused = launch(
        folder, "evaluate.py", "--ckpt", f"outputs/checkpoints/{mode}/latest.pt", check=False
    )
    assert refused.returncode == 2 and "--results DIR" in refused.stderr
    metrics = ["--metrics", "mse", "crps"]
    launch(folder, "evaluate.py", "--results", str(result), *metrics)
    assert np.array_equal(np.load(result / "latents.npy"), latents)
    assert json.loads((result / "metrics.json").read_text())["horizon"]["crps"]


def test_the_streaming_settings_are_the_published_ones():
    config = configs.build("plaicraft", {"data.mode": "stream"})
    assert (
        config.data.clip,
        config.train.batch_size,
        config.replay.n_live,
        config.replay.size,
    ) == (20, 8, 2, "0.2")


def test_missing_parts_are_reported_in_one_line(folder, tmp_path):
    done = launch(tmp_path, "main.py", "--dataset", "plaicraft", check=False)
    assert done.returncode == 2 and "python -m prepare.plaicraft --source" in done.stderr
    done = launch(
        folder,
        "main.py",
        "--dataset",
        "plaicraft",
        "--set",
        *RUN,
        "vqvae.ckpt=nowhere",
        check=False,
    )
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
