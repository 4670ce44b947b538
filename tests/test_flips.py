"""data.flips: the latents of mirror images as further data."""

import numpy as np
import pytest
import torch
from torch import nn

import configs
import data
import vqvae
from batches.frames import FrameTriples
from batches.latents import MIRRORS, LatentTriples, draw_copies
from batches.windows import draw_batch
from runtime.console import UserError
from runtime.process import Process
from shards import Shards, ShardWriter

CPU = torch.device("cpu")
PROCESS = Process(0, 1, CPU)


class Corners(nn.Module):
    """A stand-in autoencoder: an average over patches, so that flips of frames are flips of
    latents."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 4)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    writer = ShardWriter(tmp_path / "shards")
    for count in (30, 20):
        writer.add(rng.integers(0, 256, (count, 16, 16, 3), np.uint8))
    writer.close()
    return Shards(tmp_path / "shards")


def small_config(tmp_path, **values):
    base = {
        "data.image_size": 16,
        "data.clip": 10,
        "data.condition": 4,
        "data.predict": 4,
        "train.batch_size": 16,
        "output.root": str(tmp_path / "outputs"),
    }
    return configs.build(overrides=base | values)


@pytest.mark.parametrize("flips", ["h", "v", "hv"])
def test_each_item_is_a_clip_of_one_copy(shards, tmp_path, flips):
    config = small_config(tmp_path, **{"data.flips": flips, "train.own": 2})
    source = data.build_source(config, shards, Corners(), None, PROCESS)
    plain = small_config(tmp_path, **{"data.flips": "", "train.own": 2})
    plain = data.build_source(plain, shards, Corners(), None, PROCESS)
    seen = set()
    for k in range(4):
        batch, straight = next(source.batches(k, k + 1)), next(plain.batches(k, k + 1))
        earlier = source.earlier(k)
        for n in range(16):
            found = []
            for axes in ((), *MIRRORS[flips]):
                same = [
                    torch.equal(mine, theirs.flip(axes) if axes else theirs)
                    for mine, theirs in (
                        (batch.target[n], straight.target[n]),
                        (batch.reference[n], straight.reference[n]),
                        (batch.contexts[n], straight.contexts[n]),
                    )
                ]
                found += [axes] * all(same)
            assert len(found) == 1
            seen.add(found[0])
        # The frames for own forecasts come from the same copy.
        for row, frames in zip(earlier.rows, earlier.frames):
            assert torch.equal(frames[-1], batch.reference[row])
    assert seen == {(), *MIRRORS[flips]}


def test_processes_draw_the_copies_of_the_whole_batch(shards, tmp_path):
    config = small_config(tmp_path, **{"data.flips": "hv"})
    autoencoder = Corners()
    dirs = [
        data.ensure_latents(config, shards, autoencoder, PROCESS, axes)
        for axes in ((), *MIRRORS["hv"])
    ]
    assert len(set(dirs)) == 4
    whole = LatentTriples(config, dirs[0], CPU, mirrored=dirs[1:]).batch(3)
    parts = []
    for rank in range(2):
        half = LatentTriples(config, dirs[0], CPU, rank, 2, mirrored=dirs[1:])
        parts.append(half.batch(3).target)
    assert torch.equal(torch.cat(parts), whole.target)
    # Which frames are drawn does not depend on the flips.
    at = draw_batch(config, shards.lengths, 3, 0, 1, None)
    plain = draw_batch(small_config(tmp_path, **{"data.flips": ""}), shards.lengths, 3, 0, 1, None)
    assert all((a == b).all() for a, b in zip(at, plain))


def test_augmented_clips_are_flipped_too(shards, tmp_path):
    augmented = {"data.brightness": 0.2, "data.workers": 0}
    straight = small_config(tmp_path, **augmented, **{"data.flips": ""})
    config = small_config(tmp_path, **augmented, **{"data.flips": "hv"})
    frames, _ = FrameTriples(config, shards)[3]
    straight, _ = FrameTriples(straight, shards)[3]
    copies = draw_copies(config, 3)
    assert set(copies) == {0, 1, 2, 3}
    for clip, theirs, copy in zip(frames, straight, copies):
        turned = [theirs, theirs[:, :, ::-1], theirs[:, ::-1], theirs[:, ::-1, ::-1]]
        assert (clip == turned[copy]).all()
    halves = [FrameTriples(config, shards, rank, 2)[3][0] for rank in range(2)]
    assert (np.concatenate(halves) == frames).all()


def test_the_frames_to_encode_count_the_copies(shards, tmp_path):
    config = small_config(tmp_path, **{"data.flips": "hv"})
    autoencoder = Corners()
    assert data.frames_to_encode(config, shards, None) == 4 * 50
    data.ensure_latents(config, shards, autoencoder, PROCESS, (-1,))
    assert data.frames_to_encode(config, shards, autoencoder) == 3 * 50


def test_the_vqvae_sees_flipped_frames():
    frames = np.arange(40 * 2 * 2 * 3, dtype=np.uint8).reshape(40, 2, 2, 3)
    flipped = frames.copy()
    vqvae.flip_randomly(flipped, "hv", np.random.default_rng(0))
    seen = set()
    for mine, theirs in zip(flipped, frames):
        copies = {"": theirs, "h": theirs[:, ::-1], "v": theirs[::-1], "hv": theirs[::-1, ::-1]}
        seen |= {name for name, copy in copies.items() if (mine == copy).all()}
    assert seen == {"", "h", "v", "hv"}


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"data.mode": "offline"}, "data.mode=clips"),
        ({"vqvae.kind": "latents"}, "stores no frames"),
    ],
)
def test_flips_are_refused_where_there_are_no_clips_of_frames(tmp_path, values, reason):
    with pytest.raises(UserError, match=reason):
        small_config(tmp_path, **{"data.flips": "h"}, **values)
