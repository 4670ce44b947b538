"""Fields (N, C, H, W) float32 as data, from shards to forecasts."""

import pickle

import numpy as np
import pytest

from runtime.console import UserError
from shards import Shards, ShardWriter, write_packed


def waves(frames: int, channels: int = 3, height: int = 6, width: int = 10, seed: int = 0):
    """A video of travelling waves with noise, (frames, C, H, W) float32, of both signs."""
    rng = np.random.default_rng(seed)
    t = np.arange(frames)[:, None, None, None]
    c = np.arange(channels)[None, :, None, None]
    y = np.arange(height)[None, None, :, None]
    x = np.arange(width)[None, None, None, :]
    phase = 2 * np.pi * (x / width + (c + 1) * y / height - t / 12) + rng.uniform(0, 2 * np.pi)
    video = (c + 1) * np.sin(phase) + 0.1 * rng.standard_normal(phase.shape)
    return video.astype(np.float32)


# ------------------------------------------------------------------------------------------- shards
def test_fields_come_back_from_their_shards(tmp_path):
    videos = [waves(5, seed=0), waves(9, seed=1), waves(4, seed=2)]
    size = videos[0][0].nbytes
    # The second video extends over two shards.
    with ShardWriter(
        tmp_path, "fields", fps=2.0, shard_bytes=10 * size, channels=("u", "v", "t")
    ) as writer:
        writer.add(videos[0])
        writer.add(videos[1][:6])
        writer.append(videos[1][6:])
        writer.add(videos[2])
    shards = Shards(tmp_path)
    assert (shards.key, shards.shape, shards.dtype) == ("fields", (3, 6, 10), np.float32)
    assert (len(shards.paths), shards.lengths.tolist(), shards.fps) == (2, [5, 9, 4], 2.0)
    assert shards.channels == ("u", "v", "t")
    for v, video in enumerate(videos):
        assert (shards.read(v, slice(None)) == video).all()
    order = np.array([8, 0, 0, 6, 3])
    assert (shards.read(1, order) == videos[1][order]).all()
    # Another process opens the files again.
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.key == "fields" and (copy.read(2, slice(None)) == videos[2]).all()


def test_a_split_knows_what_it_holds(tmp_path):
    rows = np.zeros((4, 2, 3, 5), np.float32)
    for key in ("latents", "fields"):
        (tmp_path / key).mkdir()
        write_packed(tmp_path / key / "shard_0001.hdf5", key, rows, np.array([4]), {})
        assert Shards(tmp_path / key).key == key
        assert Shards(tmp_path / key, key).shape == (2, 3, 5)
        with pytest.raises(UserError, match="holds neither `frames`"):
            Shards(tmp_path / key, "frames")
    with ShardWriter(tmp_path / "frames") as writer:
        writer.add(np.zeros((3, 8, 8, 3), np.uint8))
    assert Shards(tmp_path / "frames").key == "frames"
    with pytest.raises(UserError, match="holds neither `fields`"):
        Shards(tmp_path / "frames", "fields")


def test_fields_of_another_type_are_refused(tmp_path):
    with ShardWriter(tmp_path / "a", "fields") as writer:
        with pytest.raises(ValueError, match=r"float32, got \(3, 2, 4, 4\) float64"):
            writer.add(np.zeros((3, 2, 4, 4)))
        with pytest.raises(ValueError, match=r"got \(3, 4, 4\) float32"):
            writer.add(np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="key must be one of frames, latents, fields"):
        ShardWriter(tmp_path / "b", "field")
    # Shards that another program wrote.
    (tmp_path / "c").mkdir()
    rows = np.zeros((4, 2, 3, 5), np.float64)
    write_packed(tmp_path / "c/shard_0001.hdf5", "fields", rows, np.array([4]), {})
    message = r"fields of \(2, 3, 5\) float64, not \(channels, height, width\) float32"
    with pytest.raises(UserError, match=message):
        Shards(tmp_path / "c")
