"""Find the two bouncing balls in frames, follow them over time, and count their changes of
colour.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from prepare.balls import BALLS, BOX, RADIUS, RGB

LOST = -1  # the colour of a ball that is not found, or that has none of the three colours


def find(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the balls in frames (…, H, W, 3) uint8.

    -> centres (…, 2, 2) float32 in pixels (x, y), and colours (…, 2) int, indices of RGB or LOST.
    """
    *lead, H, W, _ = frames.shape
    flat = frames.reshape(-1, H, W, 3)
    parts = []
    for k in range(0, len(flat), 4096):
        parts.append(find_in(torch.from_numpy(flat[k : k + 4096]).float() / 255))
    places, colors = (torch.cat(part).numpy() for part in zip(*parts))
    return places.reshape(*lead, BALLS, 2), colors.reshape(*lead, BALLS)


def find_in(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the balls in frames (N, H, W, 3) in [0, 1] -> centres (N, 2, 2), colours (N, 2).

    The brightest disc is the first ball, the brightest disc beside it the second. Each centre is
    then refined to the centre of gravity of the pixels near it.
    """
    N, H, W, _ = frames.shape
    r = RADIUS / BOX * W
    # Without the blue channel, which all balls of a shifted stream have in common.
    bright = frames[..., :2].amax(-1)
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    reach = int(np.ceil(r))
    offset = torch.arange(-reach, reach + 1.0)
    disc = torch.exp(-(((offset[:, None] ** 2 + offset**2) / r**2) ** 4))
    left, centres, there = bright.clone(), [], []
    for _ in range(BALLS):
        score, place = F.conv2d(left[:, None], disc[None, None], padding=reach).flatten(1).max(1)
        centres.append(torch.stack([place % W, place // W], -1) + 0.5)
        # A whole ball gives disc.sum().
        there.append(score > 0.6 * disc.sum())
        left = left * (distance(x, y, centres[-1]) > 1.3 * r)
    places, there = torch.stack(centres, 1), torch.stack(there, 1)  # (N, 2, 2), (N, 2)
    for _ in range(4):
        away = torch.stack([distance(x, y, places[:, k]) for k in range(BALLS)], 1)  # (N, 2, H, W)
        weight = bright[:, None] * (away < 1.3 * r) * (away <= away.flip(1)) + 1e-9
        total = weight.sum((2, 3))
        places = torch.stack(
            [(weight * x).sum((2, 3)) / total, (weight * y).sum((2, 3)) / total], -1
        )
    inside = torch.stack([distance(x, y, places[:, k]) < 0.7 * r for k in range(BALLS)], 1).float()
    seen = (
        torch.einsum("nbhw,nhwc->nbc", inside, frames[..., :2])
        / inside.sum((2, 3)).clamp(min=1)[..., None]
    )
    error = (seen[:, :, None] - torch.tensor(RGB[:, :2])).abs().amax(-1)  # (N, 2, colours)
    return places, torch.where((error.amin(-1) < 0.35) & there, error.argmin(-1), LOST)


def distance(x: torch.Tensor, y: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Distance of each pixel to centres (N, 2) -> (N, H, W)."""
    return ((x - centre[:, :1, None]) ** 2 + (y - centre[:, 1:, None]) ** 2).sqrt()


def follow(
    places: np.ndarray, colors: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Order the two balls of each frame as in the frame before, by distance.

    places: (N, T, 2, 2), colors: (N, T, 2) -> the same, reordered. start: (N, 2, 2), the places in
    the frame before the first.
    """
    places, colors = places.copy(), colors.copy()
    before = places[:, 0] if start is None else start
    for t in range(places.shape[1]):
        kept = np.linalg.norm(places[:, t] - before, axis=-1).sum(-1)
        swapped = np.linalg.norm(places[:, t, ::-1] - before, axis=-1).sum(-1) < kept
        places[swapped, t], colors[swapped, t] = places[swapped, t, ::-1], colors[swapped, t, ::-1]
        before = places[:, t]
    return places, colors


def transitions(colors: np.ndarray) -> np.ndarray:
    """Count the changes of colour along tracks (…, T, balls) -> (…, 3, 3) [old, new], summed over T
    and balls.
    """
    old, new = colors[..., :-1, :], colors[..., 1:, :]
    change = (old != new) & (old != LOST) & (new != LOST)
    pair = np.where(change, old * len(RGB) + new, len(RGB) ** 2)
    counts = np.stack([(pair == k).sum((-2, -1)) for k in range(len(RGB) ** 2)], -1)
    return counts.reshape(*counts.shape[:-1], len(RGB), len(RGB))
