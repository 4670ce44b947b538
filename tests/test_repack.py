"""prepare/repack.py: conversion between the layouts of shards."""

import h5py
import numpy as np
import pytest
from conftest import launch

from shards import RiverFile, Shards, ShardWriter


@pytest.fixture
def packed(tmp_path):
    rng = np.random.default_rng(0)
    for split, lengths in (("train", [1500, 3, 7]), ("test", [5])):
        with ShardWriter(
            tmp_path / "packed" / split, fps=12.5, source="balls", shard_bytes=1 << 14
        ) as writer:
            for length in lengths:
                frames = rng.integers(256, size=(length, 8, 6, 3), dtype=np.uint8)
                writer.add(frames, place=np.arange(length))
    return tmp_path


def test_packing_and_unpacking_restores_everything(packed):
    printed = launch(packed, "-m", "prepare.repack", "--source", "packed", "--out", "river").stdout
    lost = "not copied, because RIVER's layout cannot store them: place"
    assert f"river/train: 3 videos, 1,510 frames, river; {lost}" in printed
    assert "river/test: 1 videos, 5 frames, river" in printed
    launch(packed, "-m", "prepare.repack", "--source", "river", "--out", "again")
    for split in ("train", "test"):
        before, between, after = (
            Shards(packed / name / split) for name in ("packed", "river", "again")
        )
        assert isinstance(between.files[0], RiverFile) and not isinstance(after.files[0], RiverFile)
        for video in range(len(before)):
            frames = before.read(video, slice(None))
            assert np.array_equal(frames, between.read(video, slice(None)))
            assert np.array_equal(frames, after.read(video, slice(None)))
        assert before.lengths.tolist() == between.lengths.tolist() == after.lengths.tolist()
        assert after.files[0].file.attrs["source"] == "balls"
        assert before.fps == between.fps == after.fps == 12.5
    assert not (packed / "again/val").exists()


def test_the_frame_rate_of_each_video_is_kept(tmp_path):
    with ShardWriter(tmp_path / "packed", fps=25.0) as writer:
        for rate in (25.0, 5.0, float("nan"), 25.0):
            writer.add(np.zeros((3, 8, 6, 3), np.uint8), rate=rate)
    launch(tmp_path, "-m", "prepare.repack", "--source", "packed", "--out", "river")
    launch(tmp_path, "-m", "prepare.repack", "--source", "river", "--out", "again")
    before, between, after = (Shards(tmp_path / name) for name in ("packed", "river", "again"))
    assert isinstance(between.files[0], RiverFile) and before.fps == between.fps == after.fps == 25
    np.testing.assert_array_equal(before.rates, [25, 5, np.nan, 25])
    np.testing.assert_array_equal(before.rates, between.rates)
    np.testing.assert_array_equal(before.rates, after.rates)


def test_what_lies_beside_the_frames_is_kept(packed):
    launch(
        packed,
        "-m",
        "prepare.repack",
        "--source",
        "packed/train",
        "--out",
        "again",
        "--layout",
        "packed",
    )
    again = Shards(packed / "again")
    assert (
        again.read_extra("place", 0, np.array([3, 1400])).tolist() == [3, 1400] and len(again) == 3
    )


def test_bad_sources_are_named_and_nothing_is_left(packed):
    def fails(*flags):
        done = launch(packed, "-m", "prepare.repack", *flags, check=False)
        assert (
            done.returncode == 2
            and not (packed / "out").exists()
            and not list(packed.glob("*.partial"))
        )
        return done.stderr

    assert "nothing: no shard_*.hdf5 in it" in fails("--source", "nothing", "--out", "out")
    assert "already exists" in fails("--source", "packed", "--out", "packed")
    path = sorted((packed / "packed/train").iterdir())[0]
    path.write_bytes(path.read_bytes()[:900])
    assert f"{path.name}: not a readable HDF5 file" in fails("--source", "packed", "--out", "out")
    launch(packed, "-m", "prepare.repack", "--source", "packed", "--out", "out", "--skip_bad")
    with h5py.File(packed / "out/train/shard_0001.hdf5") as file:
        assert len(file["len"]) == len(Shards(packed / "packed/train", skip_bad=True))
