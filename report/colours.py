"""Pictures of fields: each channel through a colour map."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

# With more channels, the pictures show the first ones.
MOST_CHANNELS = 8
# Share of the values of a channel below, and above, the range of its colours.
TAIL = 0.002
# A channel whose smaller tail is at least this share of the larger one is drawn as a signed field.
SIGNED = 0.2
# Least height in pixels of one of several panels, about.
PANEL = 48
# Colour of values that are not finite.
MISSING = 128
# At most this many values of a channel are sorted to find its range.
SORTED = 1 << 20


class Colours(NamedTuple):
    """The colours of one channel: values from low to high through a colour map. A signed field has
    a diverging map, whose middle is 0."""

    name: str
    low: float
    high: float
    signed: bool


def choose_colours(fields: np.ndarray, names: tuple[str, ...] = ()) -> list[Colours]:
    """Choose the colours of each channel that is drawn, from the range of fields (…, C, H, W).

    names: of the channels; by default channel 1, channel 2, …
    """
    C = fields.shape[-3]
    if len(names) != C:
        names = tuple(f"channel {c + 1}" for c in range(C))
    chosen = []
    for c in range(min(C, MOST_CHANNELS)):
        values = fields[..., c, :, :].reshape(-1)
        values = values[:: -(-len(values) // SORTED)]
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, (TAIL, 1 - TAIL)) if len(values) else (0.0, 1.0)
        largest, smaller = max(-low, high), min(-low, high)
        signed = smaller >= SIGNED * largest > 0
        if signed:
            low, high = -largest, largest
        elif low == high:
            # A constant channel.
            high = low + 1
        name = names[c] if c + 1 < MOST_CHANNELS or C <= MOST_CHANNELS else f"{names[c]}, of {C}"
        chosen.append(Colours(name, float(low), float(high), bool(signed)))
    return chosen


@functools.cache
def colour_table(signed: bool) -> np.ndarray:
    """256 colours (256, 3) uint8: blue, white and red for signed fields, else viridis."""
    # Imported late, because loading matplotlib takes a second.
    from matplotlib import colormaps

    table = colormaps["RdBu_r" if signed else "viridis"](np.linspace(0, 1, 256))
    return (table[:, :3] * 255).round().astype(np.uint8)


def paint(fields: np.ndarray, colours: list[Colours]) -> np.ndarray:
    """Draw fields (…, C, H, W) as pictures (…, H', W', 3) uint8: a panel per channel, with white
    lines between panels. Values that are not finite are grey."""
    *lead, _, H, W = fields.shape
    rows, columns = panel_grid(len(colours), H, W)
    # Pictures are enlarged later by their whole height, so low panels are enlarged here.
    factor = max(1, round(PANEL / H)) if rows > 1 else 1
    H, W = factor * H, factor * W
    shape = (*lead, rows * (H + 1) - 1, columns * (W + 1) - 1, 3)
    out = np.full(shape, 255, np.uint8)
    for c, colour in enumerate(colours):
        values = fields[..., c, :, :]
        finite = np.isfinite(values)
        levels = (np.where(finite, values, 0) - colour.low) / (colour.high - colour.low)
        panel = colour_table(colour.signed)[(levels.clip(0, 1) * 255).round().astype(np.uint8)]
        panel[~finite] = MISSING
        panel = panel.repeat(factor, -3).repeat(factor, -2)
        top, left = c // columns * (H + 1), c % columns * (W + 1)
        out[..., top : top + H, left : left + W, :] = panel
    return out


def panel_grid(count: int, H: int, W: int) -> tuple[int, int]:
    """(rows, columns) for `count` panels of H x W pixels: the full grid that is closest to a
    square."""

    def distance(columns: int) -> float:
        return abs(np.log(columns * W / (count // columns * H)))

    # Of two equally good grids, the one with more columns.
    full = [columns for columns in range(count, 0, -1) if count % columns == 0]
    columns = min(full, key=distance)
    return count // columns, columns
