"""The shard format: both layouts, videos across files, incomplete and damaged files."""

import errno
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from batches.latents import cache_latents
from prepare.repack import RiverWriter
from runtime import folders
from runtime.console import UserError, print_once
from shards import Rows, Shards, ShardWriter, write_packed


def values(frames: np.ndarray) -> list[int]:
    return frames[:, 0, 0, 0].tolist()


def test_videos_come_back_in_any_order(make_shards):
    shards = Shards(make_shards([5, 3, 9], shard_bytes=1000))
    assert len(shards.paths) > 1 and len(shards) == 3 and shards.lengths.tolist() == [5, 3, 9]
    assert (shards.shape, shards.fps) == ((8, 8, 3), 5.0)
    assert values(shards.read(1, slice(None))) == [5, 6, 7]
    assert values(shards.read(2, np.array([8, 0, 0, 3]))) == [16, 8, 8, 11]
    with pytest.raises(IndexError):
        shards.read(1, np.array([3]))


@pytest.mark.parametrize(
    "layout, plain",
    [
        ({}, True),
        ({"chunks": (3, 2, 2)}, True),
        ({"chunks": (3, 1, 2)}, False),
        ({"chunks": (3, 2, 2), "compression": "gzip"}, False),
        ({"dtype": ">i4"}, False),
    ],
)
def test_scattered_rows_are_the_same_with_and_without_hdf5(tmp_path, layout, plain):
    rows = np.arange(40).reshape(10, 2, 2).astype(layout.get("dtype", "<i4"))
    with h5py.File(tmp_path / "file.hdf5", "w") as file:
        file["before"] = np.ones(7)
        file.create_dataset("rows", data=rows, **layout)
    with h5py.File(tmp_path / "file.hdf5", "r") as file:
        got = Rows(file["rows"], tmp_path / "file.hdf5")
        assert (got.raw is not None) == plain
        for wanted in ([9, 0, 4, 4, 3], [7], [2, 3, 4], []):
            assert (got.read(np.array(wanted, int)) == rows[np.array(wanted, int)]).all()


def test_a_file_truncated_while_open_is_reported(make_shards):
    shards = Shards(make_shards([40]))
    assert values(shards.read(0, np.array([39, 0]))) == [39, 0]
    os.truncate(shards.paths[0], shards.files[0]._rows(shards.files[0].data).offsets[30])
    message = "shard_0001.hdf5: damaged, frames cannot be read .the file ends before byte"
    with pytest.raises(UserError, match=message):
        shards.read(0, np.array([39, 0]))


def test_a_stream_runs_over_many_files_as_one_video(tmp_path):
    levels = np.arange(100, dtype=np.uint8)[:, None, None, None]
    stream = levels + np.zeros((100, 4, 4, 3), np.uint8)
    with ShardWriter(tmp_path / "s", shard_bytes=500) as writer:
        writer.add(stream[:10], place=np.arange(10.0))
        for start in range(10, 100, 10):
            writer.append(stream[start : start + 10], place=np.arange(start, start + 10.0))
    shards = Shards(tmp_path / "s")
    assert len(shards.paths) > 3 and shards.lengths.tolist() == [100]
    assert values(shards.read(0, slice(7, 33))) == list(range(7, 33))
    assert shards.read_extra("place", 0, np.array([99, 5, 41])).tolist() == [99.0, 5.0, 41.0]


def test_a_stream_followed_by_other_videos(tmp_path):
    frame = np.zeros((6, 4, 4, 3), np.uint8)
    with ShardWriter(tmp_path / "s", shard_bytes=300) as writer:
        writer.add(frame)
        writer.append(frame + 1)
        writer.add(frame[:2] + 2)
        writer.append(frame + 3)
    shards = Shards(tmp_path / "s")
    assert shards.lengths.tolist() == [12, 8]
    assert values(shards.read(1, slice(None))) == [2, 2, 3, 3, 3, 3, 3, 3]


def test_river_layout(tmp_path):
    with h5py.File(tmp_path / "shard_0001.hdf5", "w") as file:
        for i, length in enumerate([3, 11]):
            file[f"len/{i}"] = length
            for t in range(length):
                frame = np.full((6, 5, 3), 20 * i + t, np.uint8)
                file.create_dataset(f"{i}/{t}", data=frame, compression="lzf")
    shards = Shards(tmp_path)
    assert shards.lengths.tolist() == [3, 11] and shards.shape == (6, 5, 3)
    # The dataset `10` is one frame, not frames 1 and 0.
    assert values(shards.read(1, np.array([10, 2]))) == [30, 22]


def test_an_error_leaves_only_complete_files(tmp_path):
    frames = np.zeros((5, 8, 8, 3), np.uint8)
    with (
        pytest.raises(RuntimeError),
        ShardWriter(tmp_path / "s", shard_bytes=frames.nbytes) as writer,
    ):
        writer.add(frames)
        writer.add(frames)
        raise RuntimeError("the source broke")
    assert [p.name for p in sorted((tmp_path / "s").iterdir())] == ["shard_0001.hdf5"]
    with pytest.raises(UserError, match="already holds shards"):
        ShardWriter(tmp_path / "s")


def test_broken_files_are_named(tmp_path, make_shards):
    with pytest.raises(UserError, match="no shards"):
        Shards(tmp_path / "nothing")
    dir = make_shards([4])
    (dir / "shard_0002.hdf5").write_bytes(b"not an HDF5 file")
    with pytest.raises(UserError, match="shard_0002.hdf5: not a readable HDF5 file"):
        Shards(dir)
    write_packed(dir / "shard_0002.hdf5", "frames", np.zeros((4, 8, 8, 3), np.uint8), [5], {})
    with pytest.raises(
        UserError, match="shard_0002.hdf5: `lengths` add up to 5 frames but `frames` holds 4"
    ):
        Shards(dir)
    write_packed(dir / "shard_0002.hdf5", "frames", np.zeros((4, 9, 8, 3), np.uint8), [4], {})
    with pytest.raises(UserError, match="shard_0002.hdf5: frames of"):
        Shards(dir)


def test_shards_without_videos_are_named(tmp_path):
    write_packed(tmp_path / "shard_0001.hdf5", "frames", np.zeros((0, 8, 8, 3), np.uint8), [], {})
    with pytest.raises(UserError, match="not one video"):
        Shards(tmp_path)
    with h5py.File(tmp_path / "shard_0001.hdf5", "w") as file:
        file["len/0"] = 3
    with pytest.raises(UserError, match="not a whole shard .*doesn't exist"):
        Shards(tmp_path)


def test_rows_of_unequal_count_or_shape_are_refused(tmp_path):
    with ShardWriter(tmp_path / "s") as writer:
        writer.add(np.zeros((5, 8, 8, 3), np.uint8), place=np.zeros(5))
        with pytest.raises(ValueError, match="4 rows beside 5"):
            writer.add(np.zeros((5, 8, 8, 3), np.uint8), place=np.zeros(4))


def test_fingerprint_follows_contents_not_dates(make_shards):
    dir = make_shards([5, 4])
    before = Shards(dir).fingerprint()
    os.utime(dir / "shard_0001.hdf5", (1, 1))
    assert Shards(dir).fingerprint() == before
    assert Shards(make_shards([5, 5], name="other")).fingerprint() != before
    # The same frames, divided differently into videos.
    assert Shards(make_shards([4, 5], name="third")).fingerprint() != before


def test_a_shard_that_cannot_be_opened_may_be_left_out(make_shards):
    dir = make_shards([4, 3, 5], shard_bytes=1)
    truncated = (dir / "shard_0002.hdf5").read_bytes()[:1500]
    (dir / "shard_0002.hdf5").write_bytes(truncated)
    with pytest.raises(UserError, match="shard_0002.hdf5: not a readable HDF5 file"):
        Shards(dir)
    with pytest.warns(UserWarning, match="shard_0002.hdf5: .*; left out"):
        shards = Shards(dir, skip_bad=True)
    assert shards.lengths.tolist() == [4, 5]
    assert values(shards.read(1, slice(None))) == list(range(7, 12))
    for path in dir.iterdir():
        path.write_bytes(truncated)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of .* can be read"):
        Shards(dir, skip_bad=True)


def test_a_stream_with_a_shard_left_out_falls_into_two(tmp_path):
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] + np.zeros((9, 4, 4, 3), np.uint8)
    with ShardWriter(tmp_path / "s", shard_bytes=1) as writer:
        writer.add(frames[:2])
        for k in (2, 4, 6):
            writer.append(frames[k : k + 2])
    (tmp_path / "s/shard_0002.hdf5").write_bytes(b"")
    with pytest.warns(UserWarning, match="shard_0002"):
        shards = Shards(tmp_path / "s", skip_bad=True)
    assert shards.lengths.tolist() == [2, 4] and values(shards.read(1, slice(None))) == [4, 5, 6, 7]
    cache = cache_latents(shards, lambda x: x[:, :1], "w", tmp_path, "cpu")
    assert Shards(cache, "latents").lengths.tolist() == [2, 4]
    (tmp_path / "s/shard_0002.hdf5").unlink()
    assert Shards(tmp_path / "s").lengths.tolist() == [2, 4]


def test_frames_that_cannot_be_read_name_their_file(tmp_path):
    with h5py.File(tmp_path / "shard_0001.hdf5", "w") as file:
        noise = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
        file["len/0"] = 2
        for t in range(2):
            file.create_dataset(f"0/{t}", data=noise // 64, compression="gzip")
        chunk = file["0/1"].id.get_chunk_info(0)
    with open(tmp_path / "shard_0001.hdf5", "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    shards = Shards(tmp_path)
    assert shards.read(0, np.array([0])).max() > 0
    with pytest.raises(UserError, match="shard_0001.hdf5: damaged, frames cannot be read"):
        shards.read(0, np.array([1]))


@pytest.mark.parametrize("shard_bytes", [1, 1000, 1 << 20])
def test_each_video_has_its_frame_rate(tmp_path, shard_bytes):
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    with ShardWriter(tmp_path / "s", fps=25.0, shard_bytes=shard_bytes) as writer:
        writer.add(frames, rate=5.0)
        writer.append(frames)
        writer.add(frames)
        writer.append(frames)
        writer.append(frames)
        writer.add(frames, rate=float("nan"))
        writer.add(frames, rate=12.5)
    shards = Shards(tmp_path / "s")
    assert shards.lengths.tolist() == [6, 9, 3, 3]
    np.testing.assert_array_equal(shards.rates, [5, 25, np.nan, 12.5])
    assert shards.fps == 5


def test_rates_are_stored_only_where_they_differ(tmp_path):
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    for name, rate in (("one", None), ("same", 10.0), ("other", 20.0)):
        with ShardWriter(tmp_path / name, fps=10.0) as writer:
            writer.add(frames)
            writer.add(frames, rate=rate)
    one, same, other = (Shards(tmp_path / name) for name in ("one", "same", "other"))
    assert one.paths[0].read_bytes() == same.paths[0].read_bytes()
    assert "rates" not in one.files[0].file and "rates" in other.files[0].file
    assert one.rates.tolist() == [10, 10] and other.rates.tolist() == [10, 20]
    assert one.fingerprint() != other.fingerprint()


def test_shards_without_frame_rates(tmp_path, make_shards):
    write_packed(tmp_path / "shard_0001.hdf5", "frames", np.zeros((4, 8, 8, 3), np.uint8), [4], {})
    assert np.isnan(Shards(tmp_path).rates).all() and Shards(tmp_path).fps is None
    assert Shards(make_shards([4, 3])).rates.tolist() == [5, 5]
    with h5py.File(tmp_path / "shard_0001.hdf5", "a") as file:
        file["rates"] = [25.0, 24.0]
    with pytest.raises(UserError, match="shard_0001.hdf5: `rates` .* beside `lengths`"):
        Shards(tmp_path)


@pytest.mark.parametrize("per_shard, files", [(1000, 1), (2, 2), (1, 3)])
def test_river_writer(per_shard, files, tmp_path):
    frames = np.arange(60, dtype=np.uint8)[:, None, None, None] + np.zeros((60, 6, 5, 3), np.uint8)
    with RiverWriter(tmp_path / "r", fps=25.0, videos_per_shard=per_shard) as writer:
        writer.add(frames[:3])
        writer.append(frames[3:14])
        writer.add(frames[14:15])
        writer.add(frames[20:60])
    shards = Shards(tmp_path / "r")
    assert shards.lengths.tolist() == [14, 1, 40] and shards.fps == 25.0
    assert (writer.videos, writer.frames) == (3, 55)
    assert values(shards.read(0, slice(None))) == list(range(14))
    assert values(shards.read(2, np.array([10, 39]))) == [30, 59]
    assert len(list((tmp_path / "r").iterdir())) == files
    with pytest.raises(RuntimeError), RiverWriter(tmp_path / "broken") as writer:
        writer.add(frames)
        raise RuntimeError("the source broke")
    assert not list((tmp_path / "broken").iterdir())


def test_river_shards_and_videos_without_frames_count_for_nothing(tmp_path):
    for k, lengths in ((1, [2, 0, 3]), (2, [])):
        with h5py.File(tmp_path / f"shard_000{k}.hdf5", "w") as file:
            file.create_group("len")
            for i, length in enumerate(lengths):
                file[f"len/{i}"] = length
                for t in range(length):
                    file[f"{i}/{t}"] = np.full((4, 4, 3), 10 * i + t, np.uint8)
    shards = Shards(tmp_path)
    assert shards.lengths.tolist() == [2, 3] and values(shards.read(1, slice(None))) == [20, 21, 22]


@pytest.mark.parametrize(
    "fill",
    [
        lambda file: file.update({"len/0": [1, 2]}),
        lambda file: file.update({"frames/a": 1, "lengths": [1]}),
        lambda file: file.update({"frames": np.zeros((2, 4, 4, 3), np.uint8), "lengths": "two"}),
    ],
)
def test_files_of_another_format_are_named_and_can_be_left_out(fill, tmp_path):
    entries = {}
    fill(entries)
    with h5py.File(tmp_path / "shard_0002.hdf5", "w") as file:
        for name, value in entries.items():
            file[name] = value
    with pytest.raises(UserError, match="shard_0002.hdf5: .*prepare it again"):
        Shards(tmp_path)
    write_packed(tmp_path / "shard_0001.hdf5", "frames", np.zeros((4, 8, 8, 3), np.uint8), [4], {})
    with pytest.warns(UserWarning, match="shard_0002.hdf5: .*left out"):
        assert Shards(tmp_path, skip_bad=True).lengths.tolist() == [4]


def test_reserving_space_does_not_change_the_file(tmp_path, monkeypatch):
    video = np.random.default_rng(0).integers(256, size=(300, 32, 32, 3), dtype=np.uint8)

    def written(name):
        with ShardWriter(tmp_path / name, shard_bytes=1 << 19) as writer:
            for start in range(0, 300, 50):
                writer.add(video[start : start + 50], where=np.arange(50))
        return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

    reserved = written("a")
    monkeypatch.delattr(os, "posix_fallocate")
    assert reserved == written("b") and len(reserved) == 2


def test_a_full_disk_is_reported_before_hdf5_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    frames = np.zeros((4, 8, 8, 3), np.uint8)
    with (
        pytest.raises(OSError, match="No space left on device: .*half"),
        ShardWriter(tmp_path / "half") as writer,
    ):
        writer.add(frames)
        monkeypatch.setattr(os, "posix_fallocate", full)
        writer.add(np.zeros((1 << 15, 8, 8, 3), np.uint8))
    assert not list((tmp_path / "half").iterdir())


# -------------------------------------------------------------------- locks of HDF5
HOLD = """
import sys
import h5py
with h5py.File(sys.argv[1], sys.argv[2]) as file:
    file.flush()
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["r+", "r"])
def test_a_shard_that_another_process_has_locked_is_read(make_shards, capsys, mode):
    dir = make_shards([5, 3])
    path = str(dir / "shard_0001.hdf5")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"open\n"
        print_once.cache_clear()
        # The second reader is in the same process, as with the splits of one run.
        for shards in (Shards(dir), Shards(dir)):
            assert values(shards.read(1, slice(None))) == [5, 6, 7]
        printed = capsys.readouterr().out
        assert printed.count("another process has locked the file") == (mode == "r+")
    finally:
        holder.communicate(timeout=30)


def refuse_locks(monkeypatch, number: int) -> None:
    """HDF5 as on a file system without locks."""
    real = h5py.File

    def opened(path, mode="r", locking=None, **options):
        if locking is not False:
            reason = f"unable to lock file, errno = {number}"
            raise OSError(number, f"Unable to synchronously open file ({reason})")
        return real(path, mode, locking=locking, **options)

    monkeypatch.setattr(h5py, "File", opened)
    monkeypatch.setattr(folders, "_without_locks", set())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_shards_on_a_file_system_without_locks_are_written_and_read(
    make_shards, tmp_path, monkeypatch, capsys, number
):
    refuse_locks(monkeypatch, number)
    dir = make_shards([5, 3])
    write_packed(dir / "shard_0002.hdf5", "frames", np.zeros((4, 8, 8, 3), np.uint8), [4], {})
    with RiverWriter(tmp_path / "river") as writer:
        writer.add(np.zeros((4, 8, 8, 3), np.uint8))
    assert Shards(dir).lengths.tolist() == [5, 3, 4]
    assert Shards(tmp_path / "river").lengths.tolist() == [4]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and os.strerror(number) in printed


def test_a_lock_that_is_enforced_is_not_damage(make_shards, monkeypatch):
    """HDF5_USE_FILE_LOCKING=TRUE overrides what h5py is asked for."""
    dir = make_shards([5])

    def locked(*_, **__):
        raise BlockingIOError(11, "Unable to synchronously open file (unable to lock file)")

    monkeypatch.setattr(h5py, "File", locked)
    with pytest.raises(UserError, match="locked by another process.*HDF5_USE_FILE_LOCKING") as told:
        Shards(dir)
    assert "prepare it again" not in str(told.value)


def test_a_shard_that_is_being_written_is_not_damage(make_shards):
    path = make_shards([5]) / "shard_0002.hdf5"
    code = HOLD.replace("sys.argv[2])", "sys.argv[2], libver='latest')")
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(path), "w"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="another process is writing the file"):
            Shards(path.parent)
    finally:
        writer.communicate(timeout=30)
