"""Find the two bouncing balls in frames, track them over time, and count their colour changes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from prepare.balls import BALLS, BOX, RADIUS, RGB

LOST = -1  # the colour index of a ball that is not found or that has none of the three colours


def find(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the balls in frames (…, H, W, 3) uint8.

    -> centres (…, 2, 2) float32 in pixels (x, y), and colours (…, 2) int, indices of RGB or LOST.
    """
    *lead, H, W, _ = frames.shape
    flat = frames.reshape(-1, H, W, 3)
    parts = []
    # The search needs several float images per frame, so it runs on a part of the frames.
    for k in range(0, len(flat), 4096):
        parts.append(find_in_batch(torch.from_numpy(flat[k : k + 4096]).float() / 255))
    places, colors = (torch.cat(part).numpy() for part in zip(*parts))
    return places.reshape(*lead, BALLS, 2), colors.reshape(*lead, BALLS)


def find_in_batch(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the balls in frames (N, H, W, 3) in [0, 1] -> centres (N, 2, 2), colours (N, 2).

    The first ball is the brightest disc. The second ball is the brightest disc after the first is
    erased. Each centre is then refined to the centre of mass of the pixels near it.
    """
    N, H, W, _ = frames.shape
    r = RADIUS / BOX * W
    # Without the blue channel: where the stream turns blue, both balls have the same blue level.
    bright = frames[..., :2].amax(-1)
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    reach = int(np.ceil(r))
    offset = torch.arange(-reach, reach + 1.0)
    disc = torch.exp(-(((offset[:, None] ** 2 + offset**2) / r**2) ** 4))
    rest, centres, found = bright.clone(), [], []
    for _ in range(BALLS):
        score, index = F.conv2d(rest[:, None], disc[None, None], padding=reach).flatten(1).max(1)
        centres.append(torch.stack([index % W, index // W], -1) + 0.5)
        # A whole ball scores disc.sum().
        found.append(score > 0.6 * disc.sum())
        rest = rest * (distance(x, y, centres[-1]) > 1.3 * r)
    places, found = torch.stack(centres, 1), torch.stack(found, 1)  # (N, 2, 2), (N, 2)
    # Mean shift to subpixel centres. A pixel counts for the nearer ball only, so that two touching
    # balls do not attract each other.
    for _ in range(4):
        away = torch.stack([distance(x, y, places[:, k]) for k in range(BALLS)], 1)  # (N, 2, H, W)
        weight = bright[:, None] * (away < 1.3 * r) * (away <= away.flip(1)) + 1e-9
        total = weight.sum((2, 3))
        places = torch.stack(
            [(weight * x).sum((2, 3)) / total, (weight * y).sum((2, 3)) / total], -1
        )
    # The mean colour of the inner part of each disc, without the smooth edge, against the palette.
    inside = torch.stack([distance(x, y, places[:, k]) < 0.7 * r for k in range(BALLS)], 1).float()
    mean = (
        torch.einsum("nbhw,nhwc->nbc", inside, frames[..., :2])
        / inside.sum((2, 3)).clamp(min=1)[..., None]
    )
    error = (mean[:, :, None] - torch.tensor(RGB[:, :2])).abs().amax(-1)  # (N, 2, colours)
    return places, torch.where((error.amin(-1) < 0.35) & found, error.argmin(-1), LOST)


def distance(x: torch.Tensor, y: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Distance of each pixel to centres (N, 2) -> (N, H, W)."""
    return ((x - centre[:, :1, None]) ** 2 + (y - centre[:, 1:, None]) ** 2).sqrt()


def follow(
    places: np.ndarray, colors: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Track the two balls: in each frame, choose the order that is nearer to the previous frame.

    places: (N, T, 2, 2), colors: (N, T, 2) -> both, reordered. start: (N, 2, 2), the positions in
    the frame before the first one; default: those in the first frame.
    """
    places, colors = places.copy(), colors.copy()
    before = places[:, 0] if start is None else start
    for t in range(places.shape[1]):
        kept = np.linalg.norm(places[:, t] - before, axis=-1).sum(-1)
        swapped = np.linalg.norm(places[:, t, ::-1] - before, axis=-1).sum(-1) < kept
        places[swapped, t], colors[swapped, t] = places[swapped, t, ::-1], colors[swapped, t, ::-1]
        before = places[:, t]
    return places, colors


def count_transitions(colors: np.ndarray) -> np.ndarray:
    """Count the colour changes of tracks (…, T, balls) -> (…, 3, 3) [old, new], summed over T and
    balls. A change from or to LOST does not count.
    """
    old, new = colors[..., :-1, :], colors[..., 1:, :]
    change = (old != new) & (old != LOST) & (new != LOST)
    # One number per pair (old, new); an extra number, counted nowhere, where nothing changes.
    pair = np.where(change, old * len(RGB) + new, len(RGB) ** 2)
    counts = np.stack([(pair == k).sum((-2, -1)) for k in range(len(RGB) ** 2)], -1)
    return counts.reshape(*counts.shape[:-1], len(RGB), len(RGB))
