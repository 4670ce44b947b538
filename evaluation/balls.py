"""What is seen in frames of bouncing balls: where two balls are, of which colour, and how colours
follow on one another.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from prepare.balls import BALLS, BOX, RADIUS, RGB

LOST = -1  # the colour of a ball that is not there, or of no colour of theirs


def find(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(…, H, W, 3) uint8 -> centres (…, 2, 2) float32 in pixels (x, y), colours (…, 2) int: indices
    of RGB, or LOST.
    """
    *lead, H, W, _ = frames.shape
    flat = frames.reshape(-1, H, W, 3)
    parts = [
        find_in(torch.from_numpy(flat[k : k + 4096]).float() / 255)
        for k in range(0, len(flat), 4096)
    ]
    places, colors = (torch.cat(part).numpy() for part in zip(*parts))
    return places.reshape(*lead, BALLS, 2), colors.reshape(*lead, BALLS)


def find_in(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The brightest disc, then the brightest beside it; each centre is then the centre of gravity
    of what is near it.
    """
    N, H, W, _ = frames.shape
    r = RADIUS / BOX * W
    bright = frames[..., :2].amax(-1)  # not blue, which all balls of a shifted stream have
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    reach = int(np.ceil(r))
    offset = torch.arange(-reach, reach + 1.0)
    disc = torch.exp(-(((offset[:, None] ** 2 + offset**2) / r**2) ** 4))
    left, centres, there = bright.clone(), [], []
    for _ in range(BALLS):
        score, place = F.conv2d(left[:, None], disc[None, None], padding=reach).flatten(1).max(1)
        centres.append(torch.stack([place % W, place // W], -1) + 0.5)
        there.append(score > 0.6 * disc.sum())  # of what a whole ball would give
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
    """Of each pixel to centres (N, 2): (N, H, W)."""
    return ((x - centre[:, :1, None]) ** 2 + (y - centre[:, 1:, None]) ** 2).sqrt()


def follow(
    places: np.ndarray, colors: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same, with the two balls of each frame in the order of the frame before: (N, T, 2, 2),
    (N, T, 2). start (N, 2, 2): where they were before the first.
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
    """Changes of colour along tracks (…, T, balls) -> counts (…, 3, 3) [old, new], over T and
    balls.
    """
    old, new = colors[..., :-1, :], colors[..., 1:, :]
    change = (old != new) & (old != LOST) & (new != LOST)
    pair = np.where(change, old * len(RGB) + new, len(RGB) ** 2)
    counts = np.stack([(pair == k).sum((-2, -1)) for k in range(len(RGB) ** 2)], -1)
    return counts.reshape(*counts.shape[:-1], len(RGB), len(RGB))
