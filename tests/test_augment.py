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


def pictures(n: int, frames: int = 3, size: int = 24) -> np.ndarray:
    """(n, frames, size, size, 3) uint8: smooth colours, black, white and greys among them."""
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
def test_it_is_what_albumentations_computes(alone):
    """albumentations computes integer levels, and hues in steps of two degrees: close results."""
    frames = pictures(40)
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
    wanted = [
        [theirs.apply(frame, *factors.tolist(), order=order.tolist()) for frame in clip]
        for clip, factors, order in zip(frames, jitter.factors, jitter.order)
    ]
    difference = np.abs(jittered(frames, jitter) - np.array(wanted, np.float64))
    assert difference.mean() < 1.5 and np.quantile(difference, 0.99) < 6
    assert np.abs(jittered(frames, jitter) - frames).mean() > 3  # it does something


def test_factors_are_within_their_strengths_and_orders_are_random():
    jitter = draw_jitter(DATA, 5000, np.random.default_rng(0))
    low, high = jitter.factors.min(0), jitter.factors.max(0)
    assert np.allclose(low, [0.9, 0.9, 0.9, -0.25], atol=0.01) and np.allclose(
        high, [1.1, 1.1, 1.1, 0.25], atol=0.01
    )
    assert (
        len(np.unique(jitter.order, axis=0)) == 24
        and (np.sort(jitter.order, 1) == np.arange(4)).all()
    )


def test_nothing_drawn_is_nothing_done_and_a_whole_turn_comes_back():
    frames = pictures(6)
    same = Jitter(
        np.tile(np.array([1, 1, 1, 0], np.float32), (6, 1)), np.tile(np.arange(4), (6, 1))
    )
    assert np.abs(jittered(frames, same) - frames).max() < 1e-2
    turn = same._replace(factors=np.tile(np.array([1, 1, 1, 1], np.float32), (6, 1)))
    assert np.abs(jittered(frames, turn) - frames).max() < 1e-2
    third = jittered(
        frames, same._replace(factors=np.tile(np.array([1, 1, 1, 1 / 3], np.float32), (6, 1)))
    )
    assert np.abs(third - frames[..., [2, 0, 1]]).max() < 1e-2  # red becomes green


def test_a_share_of_a_batch_is_jittered_as_in_the_whole():
    frames, jitter = pictures(8), draw_jitter(DATA, 8, np.random.default_rng(2))
    whole = jittered(frames, jitter)
    assert np.array_equal(jittered(frames[2:5], jitter.share(slice(2, 5))), whole[2:5])
