"""Figures of an evaluation: metrics over the horizon, and the rank of the truth among the
samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

from evaluation.metrics import BASELINES, own_metrics
from report.style import (
    COLOURS,
    GREY,
    HINTS,
    MODEL,
    STYLES,
    add_legend,
    add_panels,
    figure_of,
    save,
    split_metric,
    with_unit,
)

# Colours of segments, ordered so that neighbouring segments differ clearly.
SEGMENTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#555555")


def describe(metric: str) -> tuple[str, str, bool | None]:
    """(label, unit, whether higher is better). psnr_best has the unit and direction of psnr."""
    label, unit, direction = split_metric(metric)
    return label, unit, {"higher": True, "lower": False}.get(direction)


def curves(horizon: dict, path: Path | IO[bytes], bands: dict | None = None) -> None:
    """Draw a panel per metric: horizon[metric], (T,) over the predicted frames, and its baselines.

    bands: {metric: standard errors (T,)}, drawn as a band of plus and minus one standard error.
    None in a curve leaves a gap.
    """
    from matplotlib.patches import Patch

    names, bands = own_metrics(horizon), bands or {}
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    with figure_of(3.7 * columns, 3.0 * rows + 0.5) as figure:
        panels = add_panels(figure, len(names), columns)
        for panel, name in zip(panels, names):
            draw_curves(panel, horizon, name, bands)
        more = {}
        if bands:
            more["± standard error"] = Patch(color=MODEL, alpha=0.2, linewidth=0)
        add_legend(figure, panels, "outside upper center", 2 * columns, more)
        save(figure, path)


def draw_curves(panel, horizon: dict, name: str, bands: dict) -> None:
    """Draw one panel of `curves`."""
    rows = []
    for suffix, label in {"": "forecast", **BASELINES}.items():
        if name + suffix not in horizon:
            continue
        y = np.array(horizon[name + suffix], float)
        x = np.arange(1, len(y) + 1)
        color, dash = STYLES.get(suffix, (MODEL, "-"))
        panel.plot(
            x,
            y,
            color=color,
            linestyle=dash,
            linewidth=1.5 if suffix else 2.2,
            label=label,
            zorder=2 if suffix else 3,
            marker="o" if len(y) == 1 else None,
            markersize=4,
        )
        if name + suffix in bands:
            error = np.array(bands[name + suffix], float)
            panel.fill_between(x, y - error, y + error, color=color, alpha=0.2, linewidth=0)
        rows.append(y)

    # A logarithmic axis where values differ by a factor of 30, but not for decibels, which are
    # logarithmic already.
    _, unit, direction = split_metric(name)
    values = np.concatenate(rows)
    values = values[np.isfinite(values)]
    if unit != "dB" and len(values) and 0 < values.min() < values.max() / 30:
        panel.set_yscale("log")

    # At most seven ticks: frame 1 and round numbers.
    T = max(len(y) for y in rows)
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, T) if T / n <= 6 or n == T)
    panel.set(xlabel="predicted frame", xticks=[1, *range(max(step, 2), T + 1, step)])
    panel.set_title(with_unit(name), loc="left", fontweight="bold")
    panel.set_title(HINTS.get(direction, ""), loc="right", fontsize=9, color=GREY)


def forgetting(
    panels: list[tuple[str, list[dict], str]],
    path: Path | IO[bytes],
    losses: list[dict] | None = None,
    columns: int = 2,
) -> None:
    """Draw the metrics of each segment of a stream against training time.

    panels: (title, rows, metric). A row has updates, segment, seen (the share of the segment that
    has been trained on) and metric: {"mean", "se"}. Panels of the same metric in one row of the
    figure share their y axis. losses: rows of metrics.jsonl, drawn in an extra panel.
    """
    count = len(panels) + bool(losses)
    rows, columns = -(-count // columns), min(columns, count)
    with figure_of(3.3 * columns + 0.4, 2.6 * rows + 0.6) as figure:
        axes = add_panels(figure, count, columns)
        for axis, panel in zip(axes, panels):
            segment_curves(axis, *panel)
        for first in range(0, len(panels), columns):
            shown = [metric for *_, metric in panels[first : first + columns]]
            share_scale(axes[first : first + columns], shown)
        if losses:
            loss_curves(axes[len(panels)], losses)
        add_legend(
            figure,
            axes[: len(panels)],
            "outside upper center",
            3 * columns,
            title="solid: from when most of the segment had been trained on; dashed: before",
            title_fontsize=9,
        )
        save(figure, path)


def segment_curves(panel, title: str, rows: list[dict], metric: str) -> None:
    """Draw one panel of `forgetting`: a curve per segment, dashed until most of it was seen."""
    for segment in sorted({row["segment"] for row in rows}):
        own = sorted(
            (row for row in rows if row["segment"] == segment), key=lambda row: row["updates"]
        )
        x, y, error = np.array(
            [(row["updates"], row[metric]["mean"], row[metric]["se"] or 0) for row in own], float
        ).T
        # Index of the first checkpoint that was trained on most of the segment.
        known = next((k for k, row in enumerate(own) if row["seen"] > 0.5), len(own))
        look = {"color": SEGMENTS[segment % len(SEGMENTS)], "marker": "o", "markersize": 3}
        panel.plot(
            x[: known + 1], y[: known + 1], linestyle=(0, (3, 2)), linewidth=1, alpha=0.55, **look
        )
        panel.plot(x[known:], y[known:], linewidth=1.8, label=f"segment {segment + 1}", **look)
        panel.fill_between(x, y - error, y + error, color=look["color"], alpha=0.12, linewidth=0)
    panel.set(xlabel="updates", ylabel=with_unit(metric))
    panel.set_title(title, loc="left", fontweight="bold")


def share_scale(axes, metrics_shown: list[str]) -> None:
    """Give axes that show the same metric the same y limits."""
    for metric in set(metrics_shown):
        same = [axis for axis, shown in zip(axes, metrics_shown) if shown == metric]
        limits = np.array([axis.get_ylim() for axis in same])
        for axis in same:
            axis.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def loss_curves(panel, losses: list[dict]) -> None:
    """Draw the loss over updates and its moving average; on a stream, live and replayed data have
    separate curves.
    """
    # On a stream the log has both losses; otherwise it has one.
    names = [
        name for name in ("loss_live", "loss_replay") if any(name in row for row in losses)
    ] or ["loss"]
    for name, color in zip(names, COLOURS):
        x, y = np.array([(row["step"], row[name]) for row in losses if name in row]).T
        size = max(1, len(y) // 40)
        smooth = np.convolve(y, np.ones(size) / size, "valid")
        panel.plot(x, y, color=color, linewidth=0.6, alpha=0.35)
        panel.plot(
            x[size // 2 : size // 2 + len(smooth)],
            smooth,
            color=color,
            linewidth=1.6,
            label=name.replace("_", ", "),
        )
    panel.set_yscale("log")
    # Labels at 1, 2 and 5 of each decade only: the others would overlap.
    for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:.1g}" if f"{value:.0e}"[0] in "125" else "")
    panel.set(xlabel="updates", ylabel="loss")
    panel.set_title("loss over time", loc="left", fontweight="bold")
    panel.legend(loc="upper right", frameon=False)


def rank_histogram(counts: np.ndarray, path: Path | IO[bytes]) -> None:
    """Draw a rank histogram, which is flat if the forecasts have the right spread.

    counts: (S + 1,); counts[k] is how often the truth was larger than k of the S samples.
    """
    from matplotlib.ticker import MaxNLocator

    counts = np.array(counts, float)
    S, share = len(counts) - 1, counts / max(counts.sum(), 1)
    with figure_of(5.6, 3.5) as figure:
        panel = figure.subplots()
        panel.grid(axis="x", visible=False)
        panel.bar(np.arange(S + 1), share, width=0.86, color=MODEL)
        # A calibrated ensemble gives each rank the same probability.
        panel.axhline(
            1 / (S + 1),
            color=COLOURS[1],
            linestyle=STYLES["_repeat_last"][1],
            linewidth=1.8,
            label=f"flat, as it should be: 1/{S + 1}",
        )
        panel.set(
            xlabel=f"samples below the truth, of {S}",
            ylabel="share",
            xlim=(-0.6, S + 0.6),
            ylim=(0, 1.25 * max(share.max(), 1 / (S + 1))),
        )
        panel.set_title(
            "U-shaped: samples too narrow · dome: too wide · slope: off to one side",
            loc="left",
            fontsize=9.5,
        )
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
        panel.legend(loc="upper right", frameon=False)
        save(figure, path)
