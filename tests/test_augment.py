"""Colour jitter on the device: against albumentations, and the same for all frames of a clip."""

import dataclasses

import numpy as np
import pytest
import torch

import configs
from batches.frames import Jitter, apply_jitter, draw_jitter

# conftest.py prevents network access at the import.
albumentations = pytest.importorskip("albumentations")

DATA = configs.build("clevrer").data


def clips_of(n: int, frames: int = 3, size: int = 24) -> np.ndarray:
    """(n, frames, size, size, 3) uint8: smooth colours, with a black, a white and a grey row."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 255, (n, frames, 2, 2, 3))
    w = np.linspace(0, 1, size)
    rows = corners[:, :, :1] * (1 - w)[:, None, None] + corners[:, :, 1:] * w[:, None, None]
    out = rows[..., :1, :] * (1 - w)[:, None] + rows[..., 1:, :] * w[:, None]
    out[:, :, 0], out[:, :, 1], out[:, :, 2] = 0, 255, 127
    return out.round().astype(np.uint8)


def jittered(frames: np.ndarray, jitter: Jitter) -> np.ndarray:
    x = torch.from_numpy(frames).movedim(-1, -3).float() / 255
    return (apply_jitter(x, jitter) * 255).movedim(-3, -1).numpy()


@pytest.mark.parametrize("alone", [None, 0, 1, 2, 3])
def test_jitter_agrees_with_albumentations(alone):
    """albumentations rounds levels to integers and hues to two degrees."""
    frames = clips_of(40)
    jitter = draw_jitter(
        dataclasses.replace(DATA, brightness=0.4, contrast=0.4, saturation=0.8),
        40,
        np.random.default_rng(1),
    )
    if alone is not None:
        neutral = np.array([1, 1, 1, 0], np.float32)
        neutral = np.where(np.arange(4) == alone, jitter.factors, neutral)
        jitter = jitter._replace(factors=neutral.astype(np.float32))
    theirs = albumentations.ColorJitter(p=1.0)
    expected = [
        [theirs.apply(frame, *factors.tolist(), order=order.tolist()) for frame in clip]
        for clip, factors, order in zip(frames, jitter.factors, jitter.order)
    ]
    difference = np.abs(jittered(frames, jitter) - np.array(expected, np.float64))
    assert difference.mean() < 1.5 and np.quantile(difference, 0.99) < 6
    # The jitter changes the frames.
    assert np.abs(jittered(frames, jitter) - frames).mean() > 3


def test_factors_cover_their_ranges_and_orders_are_random():
    jitter = draw_jitter(DATA, 5000, np.random.default_rng(0))
    low, high = jitter.factors.min(0), jitter.factors.max(0)
    assert np.allclose(low, [0.9, 0.9, 0.9, -0.25], atol=0.01)
    assert np.allclose(high, [1.1, 1.1, 1.1, 0.25], atol=0.01)
    assert len(np.unique(jitter.order, axis=0)) == 24
    assert (np.sort(jitter.order, 1) == np.arange(4)).all()


def same_for_all(*factors: float) -> Jitter:
    """Factors of brightness, contrast, saturation and hue, the same for 6 clips."""
    return Jitter(np.tile(np.array(factors, np.float32), (6, 1)), np.tile(np.arange(4), (6, 1)))


def test_neutral_factors_and_a_full_turn_of_hue_change_nothing():
    frames = clips_of(6)
    assert np.abs(jittered(frames, same_for_all(1, 1, 1, 0)) - frames).max() < 1e-2
    assert np.abs(jittered(frames, same_for_all(1, 1, 1, 1)) - frames).max() < 1e-2
    # A third of a turn makes red green.
    third = jittered(frames, same_for_all(1, 1, 1, 1 / 3))
    assert np.abs(third - frames[..., [2, 0, 1]]).max() < 1e-2


def test_a_share_of_a_batch_is_jittered_as_the_whole_batch():
    frames = clips_of(8)
    jitter = draw_jitter(DATA, 8, np.random.default_rng(2))
    whole = jittered(frames, jitter)
    assert np.array_equal(jittered(frames[2:5], jitter.share(slice(2, 5))), whole[2:5])
