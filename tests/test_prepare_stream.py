"""Streams of .npy chunks to shards: order, types, and errors."""

import json

import numpy as np
import pytest

from prepare import stream
from prepare.stream import by_number
from shards import Shards

EVERY = slice(None)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """source(frames, chunk, dtype) writes a published stream; frame i has the value i % 251."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRIFTCAST_QUIET", "1")

    def make(frames=25, chunk=2, dtype=np.uint8, name="source", total=None):
        folder = tmp_path / name
        for split, count in (("train", frames), ("test", 3)):
            (folder / split / "7").mkdir(parents=True)
            values = (np.arange(count) % 251).astype(np.uint8)
            values = values if dtype == np.uint8 else (values / 255).astype(dtype)
            video = np.broadcast_to(values[:, None, None, None], (count, 4, 6, 3))
            for k in range(0, count, chunk):
                np.save(folder / split / "7" / f"{k // chunk}.npy", video[k : k + chunk])
        (folder / "config.json").write_text(
            json.dumps({"T_total": total or frames, "chunk_size": chunk})
        )
        return folder

    return make


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--source", "source", "--out", "d", *flags])
    stream.main()


def test_chunks_are_in_the_order_of_their_numbers():
    from pathlib import Path

    names = ["10.npy", "9.npy", "chunk_2.npy", "seed3_chunk_11.npy", "0.npy", "000001.npy"]
    assert [path.name for path in sorted(map(Path, names), key=by_number)] == [
        "0.npy",
        "000001.npy",
        "chunk_2.npy",
        "9.npy",
        "10.npy",
        "seed3_chunk_11.npy",
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_every_frame_is_there_in_order(dtype, source, tmp_path, monkeypatch, capsys):
    source(dtype=dtype)
    monkeypatch.setattr(stream, "PIECE", 4 * 6 * 3)  # a frame at a time
    run(monkeypatch, "--fps", "10")
    made = Shards(tmp_path / "d/train")
    wanted = np.broadcast_to(np.arange(25, dtype=np.uint8)[:, None, None, None], (25, 4, 6, 3))
    assert (
        made.lengths.tolist() == [25]
        and made.fps == 10
        and np.array_equal(made.read(0, EVERY), wanted)
    )
    assert Shards(tmp_path / "d/test").lengths.tolist() == [3]
    manifest = json.loads((tmp_path / "d/manifest.json").read_text())
    assert manifest["splits"] == {
        "train": {"frames": 25, "chunks": 13, "seed": "7"},
        "test": {"frames": 3, "chunks": 2, "seed": "7"},
    }
    assert (
        manifest["source_config"] == {"T_total": 25, "chunk_size": 2}
        and "25 frames of 13 chunks" in capsys.readouterr().out
    )


def test_a_limit_ends_the_stream_within_a_chunk(source, tmp_path, monkeypatch):
    source(frames=25, chunk=10)
    run(monkeypatch, "--limit", "13")
    assert Shards(tmp_path / "d/train").read(0, EVERY)[:, 0, 0, 0].tolist() == list(range(13))
    assert Shards(tmp_path / "d/test").lengths.tolist() == [3]


def test_chunks_in_the_split_itself_and_of_one_seed_of_several(source, tmp_path, monkeypatch):
    folder = source(chunk=10)
    for path in (folder / "test/7").iterdir():
        path.rename(folder / "test" / path.name)
    for path in (folder / "train/7").iterdir():
        path.rename(path.with_stem(str(10 * int(path.stem))))  # numbered by their first frames
    (folder / "train/8").mkdir()
    np.save(folder / "train/8/0.npy", np.full((25, 4, 6, 3), 99, np.uint8))
    (folder / "config.json").write_text(json.dumps({"chunk_size": 10}))
    run(monkeypatch, "--seed", "7")
    assert Shards(tmp_path / "d/train").lengths.tolist() == [25]
    run(monkeypatch, "--seed", "8", "--out", "e")
    assert (Shards(tmp_path / "e/train").read(0, EVERY) == 99).all() and Shards(
        tmp_path / "d/test"
    ).lengths.tolist() == [3]


def test_missing_or_damaged_parts_are_named_and_nothing_is_left(source, command, tmp_path):
    def refused(message, *flags):
        code, said = command(tmp_path, "prepare/stream", "--source", folder, "--out", "d", *flags)
        assert code == 2 and message in said and len(said.splitlines()) == 1, said
        assert not list(tmp_path.glob("d*"))

    folder = tmp_path / "none"
    refused("holds no config.json")
    folder = source(name="gap")
    (folder / "train/7/4.npy").unlink()
    refused("chunks between 3 and 5 are missing")
    folder = source(name="short", total=26)
    refused("25 frames, but config.json's T_total is 26")
    folder = source(name="odd")
    refused("seeds 7; choose one by --seed", "--seed", "3")
    chunk = folder / "train/7/3.npy"
    whole = chunk.read_bytes()
    for content in (b"", whole[:50], whole[:-1]):
        chunk.write_bytes(content)
        refused("3.npy: not a whole .npy file")
    for array, message in (
        (np.zeros((2, 4, 6), np.uint8), "need (frames"),
        (np.zeros((2, 4, 6, 3), np.int64), "need (frames"),
        (np.zeros((2, 5, 6, 3), np.uint8), "frames of (5, 6, 3), but 0.npy has"),
        (np.zeros((1, 4, 6, 3), np.uint8), "chunk_size is 2"),
        (np.full((2, 4, 6, 3), 1.5), "must lie in [0, 1]"),
        (np.full((2, 4, 6, 3), np.nan), "must lie in [0, 1]"),
    ):
        np.save(chunk, array)
        refused(message)
    np.save(chunk, np.array([print], object), allow_pickle=True)
    refused("3.npy: not a whole .npy file")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"chunk_size": "2"}', "chunk_size must be"),
    ):
        (folder / "config.json").write_text(text)
        refused(message)
    refused("--limit must be", "--limit", "0")


def test_endings_in_upper_case_and_linked_folders_are_read(source, tmp_path, monkeypatch):
    folder = source()
    for path in (folder / "train/7").iterdir():
        path.rename(path.with_suffix(".NPY"))
    (folder / "train/7").rename(tmp_path / "elsewhere")
    (folder / "train/7").symlink_to(tmp_path / "elsewhere")
    run(monkeypatch)
    assert Shards(tmp_path / "d/train").lengths.tolist() == [25]
