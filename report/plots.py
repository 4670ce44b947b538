"""Figures of an evaluation: metrics over the horizon, and where the truth ranks among the samples."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

from evaluation import metrics

BASELINES = {"_repeat_last": "repeat the last frame", "_mean_frame": "mean of the training frames"}
# Okabe and Ito's colours, which the colour-blind can tell apart; the dashes tell them apart in grey
MODEL, STYLES = (
    "#0072B2",
    {"_repeat_last": ("#D55E00", (0, (5, 2))), "_mean_frame": ("#555555", (0, (1.5, 1.5)))},
)
TEXT = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}


def describe(metric: str) -> tuple[str, str, bool | None]:
    """-> name, unit, whether higher is better; of the best of several samples (psnr_best) what the metric itself has."""
    base, _, rest = (metric, "", "") if metric in metrics.ABOUT else metric.partition("_")
    name, unit, better = metrics.ABOUT.get(base, (base, "", ""))
    return (
        f"{name} {rest.replace('_', ' ')}".strip(),
        unit,
        {"higher": True, "lower": False}.get(better),
    )


def own(table: dict) -> list[str]:
    """The metrics of the forecasts themselves in a table that has the baselines beside them."""
    return [name for name in table if not name.endswith(tuple(BASELINES))]


def save(figure, path: Path | IO[bytes]) -> None:
    figure.savefig(path, dpi=150, format="png", facecolor="white")


def curves(horizon: dict, path: Path | IO[bytes], bands: dict | None = None) -> None:
    """One panel a metric: horizon[metric], (T,) over the predicted frames, with a band of plus and minus bands[metric],
    (T,) standard errors; the baselines beside it. A value that is no number (None) leaves a gap."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names, bands = own(horizon), bands or {}
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    with rc_context(TEXT):
        figure = Figure(figsize=(3.7 * columns, 3.0 * rows + 0.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, name in zip(panels, names):
            curve(panel, horizon, name, bands)
        for panel in panels[len(names) :]:
            panel.remove()
        lines = {
            line.get_label(): line for panel in panels[: len(names)] for line in panel.get_lines()
        }
        if bands:
            lines["± standard error"] = Patch(color=MODEL, alpha=0.2, linewidth=0)
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="outside upper center",
            frameon=False,
            ncols=min(len(lines), 2 * columns),
        )
        save(figure, path)


def curve(panel, horizon: dict, name: str, bands: dict) -> None:
    """One panel of `curves`."""
    title, unit, higher = describe(name)
    rows = []
    for suffix, label in {"": "forecast", **BASELINES}.items():
        if name + suffix not in horizon:
            continue
        y = np.array(horizon[name + suffix], float)
        color, dash = STYLES.get(suffix, (MODEL, "-"))
        x, dot = np.arange(1, len(y) + 1), {"marker": "o", "markersize": 4} if len(y) == 1 else {}
        panel.plot(
            x,
            y,
            color=color,
            linestyle=dash,
            linewidth=2.2 if not suffix else 1.5,
            label=label,
            zorder=3 if not suffix else 2,
            **dot,
        )
        if name + suffix in bands:
            error = np.array(bands[name + suffix], float)
            panel.fill_between(x, y - error, y + error, color=color, alpha=0.2, linewidth=0)
        rows.append(y)
    values = np.concatenate(rows)
    values = values[np.isfinite(values)]
    if (
        unit != "dB" and len(values) and 0 < values.min() < values.max() / 30
    ):  # decibels are logarithmic as they are
        panel.set_yscale("log")
    T = max(len(y) for y in rows)
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, T) if T / n <= 6 or n == T)
    panel.set(xlabel="predicted frame", xticks=[1, *range(max(step, 2), T + 1, step)])
    panel.set_title(title + f" ({unit})" * bool(unit), loc="left", fontweight="bold")
    better = {None: "", True: "higher is better", False: "lower is better"}[higher]
    panel.set_title(better, loc="right", fontsize=9, color="#555555")


SEGMENTS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#555555",
)  # Okabe and Ito's, again


def forgetting(
    panels: list[tuple[str, list[dict], str]],
    path: Path | IO[bytes],
    losses: list[dict] | None = None,
    columns: int = 2,
) -> None:
    """Metrics of each segment of a stream against the time of training. panels: (title, rows, metric), a row having updates,
    segment, seen (the share of the segment that has been trained on) and metric: {"mean", "se"}. Panels beside one another
    that show one metric have one scale. losses: rows of metrics.jsonl, drawn in a panel of their own."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = len(panels) + bool(losses)
    rows, columns = -(-count // columns), min(columns, count)
    with rc_context(TEXT):
        figure = Figure(figsize=(3.3 * columns + 0.4, 2.6 * rows + 0.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, panels):
            segment_curves(axis, *panel)
        for first in range(0, len(panels), columns):
            one_scale(
                axes[first : first + columns],
                [metric for *_, metric in panels[first : first + columns]],
            )
        if losses:
            loss_curves(axes[len(panels)], losses)
        for axis in axes[count:]:
            axis.remove()
        lines = {
            line.get_label(): line
            for axis in axes[: len(panels)]
            for line in axis.get_lines()
            if not line.get_label().startswith("_")
        }
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="outside upper center",
            frameon=False,
            ncols=min(len(lines), 3 * columns),
            title="solid: from when most of the segment had been trained on; dashed: before",
            title_fontsize=9,
        )
        save(figure, path)


def segment_curves(panel, title: str, rows: list[dict], metric: str) -> None:
    """One panel of `forgetting`."""
    for segment in sorted({row["segment"] for row in rows}):
        own = sorted(
            (row for row in rows if row["segment"] == segment), key=lambda row: row["updates"]
        )
        x, y, error = np.array(
            [(row["updates"], row[metric]["mean"], row[metric]["se"] or 0) for row in own], float
        ).T
        known = next((k for k, row in enumerate(own) if row["seen"] > 0.5), len(own))
        look = {"color": SEGMENTS[segment % len(SEGMENTS)], "marker": "o", "markersize": 3}
        panel.plot(
            x[: known + 1], y[: known + 1], linestyle=(0, (3, 2)), linewidth=1, alpha=0.55, **look
        )
        panel.plot(x[known:], y[known:], linewidth=1.8, label=f"segment {segment + 1}", **look)
        panel.fill_between(x, y - error, y + error, color=look["color"], alpha=0.12, linewidth=0)
    name, unit, _ = describe(metric)
    panel.set(xlabel="updates", ylabel=name + f" ({unit})" * bool(unit))
    panel.set_title(title, loc="left", fontweight="bold")


def one_scale(axes, metrics_shown: list[str]) -> None:
    for metric in set(metrics_shown):
        same = [axis for axis, shown in zip(axes, metrics_shown) if shown == metric]
        limits = np.array([axis.get_ylim() for axis in same])
        for axis in same:
            axis.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def loss_curves(panel, losses: list[dict]) -> None:
    """The loss over time, on a stream of what is live and of what is replayed; each value the mean of its neighbourhood."""
    names = [
        name for name in ("loss_live", "loss_replay") if any(name in row for row in losses)
    ] or ["loss"]
    for name, color in zip(names, (MODEL, "#D55E00")):
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
    for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:.1g}" if f"{value:.0e}"[0] in "125" else "")
    panel.set(xlabel="updates", ylabel="loss")
    panel.set_title("loss over time", loc="left", fontweight="bold")
    panel.legend(loc="upper right", frameon=False)


def rank_histogram(counts: np.ndarray, path: Path | IO[bytes]) -> None:
    """counts: (S + 1,), how often the truth was larger than 0, 1, …, S of S samples. Forecasts whose spread is right give a
    flat one."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = np.array(counts, float)
    S, share = len(counts) - 1, counts / max(counts.sum(), 1)
    with rc_context({**TEXT, "axes.grid.axis": "y"}):
        figure = Figure(figsize=(5.6, 3.5), layout="constrained")
        panel = figure.subplots()
        panel.bar(np.arange(S + 1), share, width=0.86, color=MODEL)
        panel.axhline(
            1 / (S + 1),
            color="#D55E00",
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
