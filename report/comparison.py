"""Pictures that compare methods: metrics over the horizon, metrics as points, forecasts side by
side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evaluation.metrics import BASELINES
from report import results, videos
from report.methods import Method, Table
from report.style import (
    ARROWS,
    COLOURS,
    GREY,
    STYLES,
    add_legend,
    add_panels,
    figure_of,
    save,
)
from report.tables import baseline, direction, label
from runtime.console import UserError

# The marker changes after each cycle through the colours.
MARKERS = "os^Dv"
# Columns of a mosaic; more would be too narrow to judge.
MAX_METHODS = 11


def escape(text: str) -> str:
    """Escape text for matplotlib: $ starts a formula, and a leading _ hides a legend entry."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def title_of(metric: str) -> str:
    return escape(label(metric)) + ARROWS[direction(metric)]


def style_of(k: int) -> tuple[str, str]:
    """(colour, marker) of method k."""
    return COLOURS[k % len(COLOURS)], MARKERS[k // len(COLOURS) % len(MARKERS)]


def panel_figure(count: int, height: float):
    """A figure of `count` panels, up to three in a row, each `height` inches high.

    Returns (context manager of the figure, number of columns).
    """
    columns = min(3, count)
    rows = -(-count // columns)
    return figure_of(max(4.8, 4.2 * columns), height * rows), columns


def legend_below(figure, axes: list) -> None:
    """One legend below all panels, in as many columns as fit."""
    labels = [text for axis in axes for text in axis.get_legend_handles_labels()[1]]
    widest = max(map(len, labels), default=1)
    add_legend(
        figure, axes, "outside lower center", int(figure.get_figwidth() * 12 // (widest + 6))
    )


# ------------------------------------------------------------------------------------------ figures
def horizon_plot(table: Table, metrics: list[str], path: Path) -> bool:
    """Draw each metric over the predicted frames: a line per method with a band of one standard
    error over seeds, and dashed baselines. Returns whether any metric has a curve.
    """
    shown = [
        metric
        for metric in metrics
        if any(method.horizon(metric) is not None for method in table.methods)
    ]
    if not shown:
        return False
    context, columns = panel_figure(len(shown), 3.3)
    with context as figure:
        axes = add_panels(figure, len(shown), columns)
        for axis, metric in zip(axes, shown):
            draw_horizon(axis, table, metric)
        legend_below(figure, axes)
        save(figure, path)
    return True


def draw_horizon(axis, table: Table, metric: str) -> None:
    """Draw the panel of one metric of `horizon_plot`."""
    for k, method in enumerate(table.methods):
        curve = method.horizon(metric)
        if curve is None:
            continue
        mean, se = curve
        frames = np.arange(1, len(mean) + 1)
        colour, marker = style_of(k)
        # Markers only where colours repeat, or where the line has a single point.
        size = 3.5 if k >= len(COLOURS) or len(mean) == 1 else 0
        axis.plot(
            frames,
            mean,
            color=colour,
            linewidth=1.8,
            label=escape(method.name),
            marker=marker,
            markersize=size,
        )
        axis.fill_between(frames, mean - se, mean + se, color=colour, alpha=0.18, linewidth=0)

    # A baseline is the same for all runs of a table, so the first run that has it is drawn.
    runs = [run for method in table.methods for run in method.runs]
    for suffix, text in BASELINES.items():
        rows = [run.horizon[metric + suffix] for run in runs if metric + suffix in run.horizon]
        if rows:
            frames = np.arange(1, len(rows[0]) + 1)
            dashes = STYLES[suffix][1]
            axis.plot(
                frames, rows[0], linestyle=dashes, color=GREY, linewidth=1.3, label=text, zorder=1
            )
    axis.set(title=title_of(metric), xlabel="predicted frame")
    axis.xaxis.get_major_locator().set_params(integer=True)


def summary_plot(table: Table, metrics: list[str], path: Path) -> None:
    """Draw a panel per metric: mean and standard error of each method, a small dot per seed, and
    dashed baselines.
    """
    count = len(table.methods)
    context, columns = panel_figure(len(metrics), 1.5 + 0.32 * count)
    with context as figure:
        axes = add_panels(figure, len(metrics), columns)
        for at, (axis, metric) in enumerate(zip(axes, metrics)):
            for k, method in enumerate(table.methods):
                draw_score(axis, method, metric, k)
            mark_baselines(axis, table, metric)
            axis.set(title=title_of(metric), ylim=(count - 0.5, -0.5), yticks=range(count))
            names = [escape(method.name) for method in table.methods]
            axis.set_yticklabels(names if at % columns == 0 else [])
            axis.grid(axis="y", visible=False)
            axis.xaxis.get_major_locator().set_params(nbins=5)
        legend_below(figure, axes)
        save(figure, path)


def draw_score(axis, method: Method, metric: str, k: int) -> None:
    """Draw method k in a panel of `summary_plot`."""
    score = method.score(metric)
    colour, marker = style_of(k)
    if not score.n:
        return
    if score.n > 1:
        seeds = [run.summary[metric][0] for run in method.runs if metric in run.summary]
        heights = [k] * len(seeds)
        axis.plot(seeds, heights, "o", color=colour, markersize=4, alpha=0.35, markeredgewidth=0)
    error = np.nan_to_num(score.se)
    axis.errorbar(score.mean, k, xerr=error, fmt=marker, color=colour, markersize=6, capsize=3)


def mark_baselines(axis, table: Table, metric: str) -> None:
    """Draw a dashed line per baseline.

    A baseline far outside the axis limits would squeeze the methods into a corner, so its value is
    written below the panel instead.
    """
    low, high = axis.get_xlim()
    width = high - low
    for suffix, text in BASELINES.items():
        score = baseline(table, metric + suffix)
        if not score.n:
            continue
        if low - width <= score.mean <= high + width:
            dashes = STYLES[suffix][1]
            axis.axvline(
                score.mean, linestyle=dashes, color=GREY, linewidth=1.3, label=text, zorder=1
            )
            continue
        value = f"{text} {score.mean:.3g}"
        note = f"← {value}" if score.mean < low else f"{value} →"
        axis.set_xlabel("    ".join([axis.get_xlabel(), note]).strip(), fontsize=8, color=GREY)


# ------------------------------------------------------------------------------------------- mosaic
def read_first_samples(method: Method) -> tuple[np.ndarray, np.ndarray] | None:
    """Truth (V, C + T, H, W, 3) and first samples (V, T, H, W, 3) of the first run with usable
    arrays, memory-mapped.
    """
    for run in method.runs:
        try:
            truth, samples, _ = results.read_pictures(run.folder)
        except UserError:
            continue
        return truth, samples[:, 0]
    return None


def select_clips(table: Table, clips: int) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]] | str:
    """Select the clips with most motion -> (truth, [(method, its first samples)]).

    If there is nothing to compare, returns the reason as a string instead.
    """
    # Methods without arrays have no column.
    found = []
    for method in table.methods:
        arrays = read_first_samples(method)
        if arrays is not None:
            found.append((method.name, *arrays))
    if not found:
        return "no result has both samples.npy and truth.npy"
    first, truth, samples = found[0]
    for name, other, _ in found:
        if not np.array_equal(other, truth):
            return f"{name} and {first} were not measured on the same clips"
    chosen = videos.rank_by_motion(truth, truth.shape[1] - samples.shape[1])[:clips]
    return truth[chosen], [(name, own[chosen]) for name, _, own in found[:MAX_METHODS]]


def draw_mosaic(
    truth: np.ndarray, columns: list[tuple[str, np.ndarray]], wanted: int = 96
) -> np.ndarray:
    """Draw a row per clip: the truth, then the forecast of each method.

    truth (V, T, H, W, 3), forecasts (V, T - condition, H, W, 3) -> (T, H', W', 3).
    """
    condition = truth.shape[1] - columns[0][1].shape[1]
    named = [("truth", truth)]
    for name, forecast in columns:
        named.append((name, np.concatenate([truth[:, :condition], forecast], 1)))
    return videos.labelled_columns(named, condition, videos.scale_of(truth.shape[2], wanted))
