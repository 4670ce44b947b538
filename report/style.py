"""The style of every figure: fonts, grid, colours, labels of metrics, saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from evaluation.metrics import ABOUT

RC = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}
# The colour-blind safe palette of Okabe and Ito, extended by a brown and a violet.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5230",
    "#6A3D9A",
)
GREY = "#555555"
MODEL = COLOURS[0]
# (colour, dashes) of each baseline; the dashes distinguish baselines in black-and-white print.
STYLES = {
    "_repeat_last": (COLOURS[1], (0, (5, 2))),
    "_mean_frame": (GREY, (0, (1.5, 1.5))),
    "_autoencoder": (COLOURS[2], (0, (4, 1.5, 1, 1.5))),
}
ARROWS = {"higher": " ↑", "lower": " ↓", "one": " → 1", "": ""}
HINTS = {"higher": "higher is better", "lower": "lower is better"}


def split_metric(metric: str) -> tuple[str, str, str]:
    """(label, unit, direction: lower, higher, one or empty). psnr_best has the unit and direction
    of psnr.
    """
    base, rest = metric, ""
    if metric not in ABOUT:
        base, _, rest = metric.partition("_")
    label, unit, direction = ABOUT.get(base, (base, "", ""))
    return f"{label} {rest.replace('_', ' ')}".strip(), unit, direction


def with_unit(metric: str) -> str:
    label, unit, _ = split_metric(metric)
    return f"{label} ({unit})" if unit else label


@contextmanager
def figure_of(width: float, height: float) -> Iterator:
    """Open a matplotlib figure in this style; width and height in inches. Does not use pyplot's
    global state.
    """
    # Imported late, because loading matplotlib takes a second and most commands draw no figure.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        yield figure


def add_panels(figure, count: int, columns: int) -> list:
    """Add `count` axes in rows of `columns`."""
    rows = -(-count // columns)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return list(axes[:count])


def add_legend(figure, axes: list, place: str, columns: int, more: dict | None = None, **options):
    """Add one legend for all axes, each label once. more: {label: handle} to append."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles[label] = handle
    handles |= more or {}
    if handles:
        columns = max(1, min(len(handles), columns))
        figure.legend(
            handles.values(), handles.keys(), loc=place, ncols=columns, frameon=False, **options
        )


def save(figure, path: Path | IO[bytes]) -> None:
    figure.savefig(path, dpi=150, format="png", facecolor="white")
