"""Index arithmetic at its edges, batches as a function of (seed, step), and what the caches hold."""

import os

import numpy as np
import pytest
import torch

import configs
import data
from console import UserError
from shards import Shards, write_packed

TINY = {"data.clip": 6, "train.batch_size": 8}


def config(**values):
    return configs.build(overrides=TINY | {name.replace("__", "."): value for name, value in values.items()})


@pytest.mark.parametrize("clip, skip, wanted", [(5, 0, 5), (16, 4, 76), (3, 1, 5)])
def test_span(clip, skip, wanted):
    assert data.span(clip, skip) == wanted


def test_windows_reach_the_first_and_the_last_start_and_no_further():
    windows = data.draw_windows(np.array([3, 9, 5]), 5, 0, 4000, np.random.default_rng(0))
    assert set(windows.video) == {1, 2}  # the first video is too short
    assert set(windows.start[windows.video == 1]) == {0, 1, 2, 3, 4}
    assert set(windows.start[windows.video == 2]) == {0}  # exact fit
    assert 0.45 < (windows.video == 1).mean() < 0.55  # videos alike, whatever their length


def test_spaced_windows_never_overlap_and_cover_all():
    lengths = np.array([10, 4, 23])
    every = data.spaced_windows(lengths, 5, 0, 99)
    assert list(zip(every.video, every.start)) == [(0, 0), (0, 5), (2, 0), (2, 5), (2, 10), (2, 15)]
    some = data.spaced_windows(lengths, 5, 0, 3)
    assert list(zip(some.video, some.start)) == [(0, 0), (2, 0), (2, 10)]
    skipping = data.spaced_windows(lengths, 5, 1, 99)
    assert list(zip(skipping.video, skipping.start)) == [(0, 0), (2, 0), (2, 9)]
    assert (skipping.start + 8 < lengths[skipping.video]).all()


@pytest.mark.parametrize("rule, wanted", [("uniform", {1, 2, 3, 4, 5, 6, 7}), ("recent:3", {1, 2, 3}), ("recent:1", {1}),
                                          ("recent:20", {1, 2, 3, 4, 5, 6, 7}), ("log", {1, 2, 3, 4, 5, 6, 7})])
def test_gaps(rule, wanted):
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    found = data.gaps(u, 7, rule).numpy()
    assert set(found) == wanted
    assert data.gaps(u[-3:], torch.ones(3, dtype=torch.int64), rule).tolist() == [1, 1, 1]
    almost = torch.tensor([1 - 2**-24])  # times 7 it is 7 in float32
    assert data.gaps(almost, 7, rule).item() == max(wanted)
    if rule == "log":  # P(gap >= g) = 1 - log g / log 8
        assert abs((found >= 4).mean() - (1 - np.log(4) / np.log(8))) < 1e-3
    if rule == "uniform":
        assert np.allclose(np.bincount(found)[1:] / 10_000, 1 / 7, atol=1e-3)


@pytest.mark.parametrize("rule", ["uniform", "recent:3", "log"])
def test_triples_lie_in_their_windows_in_order(rule):
    windows = data.draw_windows(np.array([40, 60]), 6, 2, 5000, np.random.default_rng(1))
    at = data.draw_triples(windows, rule, np.random.default_rng(2))
    assert (at.target - at.reference == 3).all() and (at.reference - at.context == 3 * at.gap).all() and (at.gap >= 1).all()
    assert (at.context >= windows.start).all() and (at.target <= windows.start + 15).all()
    assert ((at.target - windows.start) // 3).min() == 2 and ((at.target - windows.start) // 3).max() == 5
    assert (at.context == windows.start).any()


def test_batches_depend_on_seed_and_step_alone_and_processes_share_them():
    lengths, cfg = np.array([50, 70]), config()
    same, other, seed = (data.draw_batch(c, lengths, k, 0, 1, None) for c, k in
                         ((cfg, 3), (cfg, 4), (config(train__seed=1), 3)))
    again = data.draw_batch(cfg, lengths, 3, 0, 1, None)
    assert all((a == b).all() for a, b in zip(same, again))
    assert (same.target != other.target).any() and (same.target != seed.target).any()
    halves = [data.draw_batch(cfg, lengths, 3, rank, 2, None) for rank in range(2)]
    assert all((np.concatenate(parts) == whole).all() for *parts, whole in zip(*halves, same))


def encode(x: torch.Tensor) -> torch.Tensor:
    """A stand-in autoencoder that keeps the grey level: (B, 3, H, W) -> (B, 2, H/4, W/4)."""
    return torch.nn.functional.avg_pool2d(x[:, :2], 4)


def test_latent_cache_holds_each_frame_once_and_goes_on_where_it_stopped(make_shards, tmp_path):
    shards = Shards(make_shards([30, 20], shard_bytes=3000))
    assert len(shards.paths) == 2
    out = data.cache_latents(shards, encode, "weights", tmp_path, torch.device("cpu"))
    latents = Shards(out, "latents")
    assert latents.lengths.tolist() == [30, 20] and latents.shape == (2, 2, 2)
    levels = latents.read(1, slice(None))[:, 0, 0, 0]
    assert np.allclose((levels.astype(float) + 1) * 127.5, np.arange(30, 50), atol=0.1)
    first, second = sorted(out.glob("*.hdf5"))
    kept = os.stat(first).st_mtime_ns
    second.unlink()
    assert data.cache_latents(shards, encode, "weights", tmp_path, torch.device("cpu")) == out
    assert second.exists() and os.stat(first).st_mtime_ns == kept
    assert data.latent_dir(shards, "other weights", tmp_path) != out


def test_latent_batches_hold_the_frames_they_name(make_shards, tmp_path):
    shards, cfg = Shards(make_shards([30, 20])), config()
    out = data.cache_latents(shards, encode, "w", tmp_path, torch.device("cpu"))
    source = data.LatentTriples(cfg, out, torch.device("cpu"))
    at = source.triples(5)
    target, reference, context, gap = source.batch(5)
    for latents, frames in ((target, at.target), (reference, at.reference), (context, at.context)):
        level = (latents[:, 0, 0, 0].numpy() + 1) * 127.5
        assert np.allclose(level, np.array([0, 30])[at.video] + frames, atol=0.1)
    assert torch.equal(gap, torch.from_numpy(at.gap).float())


def test_augmented_batches_match_whatever_the_workers_and_jitter_frames_alike(make_shards):
    dir = make_shards([30, 20], size=8)
    batches = {}
    for workers in (0, 2):
        cfg = config(data__brightness=0.3, data__hue=0.1, data__workers=workers, train__steps=5)
        source = data.FrameTriples(cfg, Shards(dir))
        batches[workers] = list(source.batches(2, 4, lambda x: x, torch.device("cpu")))
    assert len(batches[0]) == 2
    for a, b in zip(batches[0], batches[2]):
        assert all(torch.equal(p, q) for p, q in zip(a, b))
    plain = data.FrameTriples(config(data__brightness=0.3), Shards(dir))
    clips = (plain.jittered(torch.from_numpy(plain[2][0]), 2).movedim(2, -1).numpy() + 1) * 127.5
    at = data.draw_batch(plain.config, plain.shards.lengths, 2, 0, 1, None)
    truth = np.array([0, 30])[at.video][:, None] + np.stack([at.target, at.reference, at.context], 1)
    factor = clips[:, :, 0, 0, 0].astype(float) / np.maximum(truth, 1)
    bright = truth.min(1) > 10
    assert np.ptp(factor[bright], axis=1).max() < 0.1  # the same within a clip
    assert np.ptp(factor[bright][:, 0]) > 0.05  # another from clip to clip
    assert 0.65 < factor[bright].min() and factor[bright].max() < 1.35


def test_too_short_videos_are_named_with_what_to_do(make_shards, tmp_path):
    with pytest.raises(UserError, match=r"the longest video has 5 frames, data.clip needs 6; lower data.clip"):
        data.check_long_enough(Shards(make_shards([5, 4])), 6, 0, "data.clip")


def test_pixels_and_back():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert (data.to_frames(data.to_pixels(frames)) == frames).all()
    assert data.to_pixels(frames).min() == -1 and data.to_pixels(frames).max() == 1


def test_latents_are_gathered_from_their_files_across_shards(tmp_path):
    latents = np.random.default_rng(0).standard_normal((70, 2, 3, 3)).astype(np.float16)
    for k, (start, stop) in enumerate(((0, 30), (30, 31), (31, 70)), 1):
        write_packed(tmp_path / f"shard_{k:04d}.hdf5", "latents", latents[start:stop], np.array([stop - start]),
                     {"continues": k > 1, "fps": 1.0})
    shards = Shards(tmp_path, "latents")
    assert isinstance(shards.map_file(0), np.memmap)
    rows = np.array([69, 0, 29, 30, 31, 31, 5])
    found = data.LatentStore(shards, torch.device("cpu")).gather(rows)
    assert found.dtype == torch.float16 and np.array_equal(found.numpy(), latents[rows])


def test_chunked_shards_cannot_be_mapped_and_are_read(make_shards):
    shards = Shards(make_shards([30]))
    assert np.array_equal(shards.map_file(0), shards.read(0, slice(None))) and not isinstance(shards.map_file(0), np.memmap)
