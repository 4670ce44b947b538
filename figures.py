"""Figures of an evaluation: metrics over the horizon, and where the truth ranks among the samples."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

import metrics

BASELINES = {"_repeat_last": "repeat the last frame", "_mean_frame": "mean of the training frames"}
# Okabe and Ito's colours, which the colour-blind can tell apart; the dashes tell them apart in grey
MODEL, STYLES = "#0072B2", {"_repeat_last": ("#D55E00", (0, (5, 2))), "_mean_frame": ("#555555", (0, (1.5, 1.5)))}
TEXT = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#e4e4e4", "axes.axisbelow": True}


def describe(metric: str) -> tuple[str, str, bool | None]:
    """-> name, unit, whether higher is better; of the best of several samples (psnr_best) what the metric itself has."""
    base, _, rest = (metric, "", "") if metric in metrics.ABOUT else metric.partition("_")
    name, unit, better = metrics.ABOUT.get(base, (base, "", ""))
    return f"{name} {rest.replace('_', ' ')}".strip(), unit, {"higher": True, "lower": False}.get(better)


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
        for panel in panels[len(names):]:
            panel.remove()
        lines = {line.get_label(): line for panel in panels[:len(names)] for line in panel.get_lines()}
        if bands:
            lines["± standard error"] = Patch(color=MODEL, alpha=0.2, linewidth=0)
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", frameon=False,
                      ncols=min(len(lines), 2 * columns))
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
        panel.plot(x, y, color=color, linestyle=dash, linewidth=2.2 if not suffix else 1.5, label=label,
                   zorder=3 if not suffix else 2, **dot)
        if name + suffix in bands:
            error = np.array(bands[name + suffix], float)
            panel.fill_between(x, y - error, y + error, color=color, alpha=0.2, linewidth=0)
        rows.append(y)
    values = np.concatenate(rows)
    values = values[np.isfinite(values)]
    if unit != "dB" and len(values) and 0 < values.min() < values.max() / 30:  # decibels are logarithmic as they are
        panel.set_yscale("log")
    T = max(len(y) for y in rows)
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, T) if T / n <= 6 or n == T)
    panel.set(xlabel="predicted frame", xticks=[1, *range(max(step, 2), T + 1, step)])
    panel.set_title(title + f" ({unit})" * bool(unit), loc="left", fontweight="bold")
    better = {None: "", True: "higher is better", False: "lower is better"}[higher]
    panel.set_title(better, loc="right", fontsize=9, color="#555555")


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
        panel.axhline(1 / (S + 1), color="#D55E00", linestyle=STYLES["_repeat_last"][1], linewidth=1.8,
                      label=f"flat, as it should be: 1/{S + 1}")
        panel.set(xlabel=f"samples below the truth, of {S}", ylabel="share", xlim=(-0.6, S + 0.6),
                  ylim=(0, 1.25 * max(share.max(), 1 / (S + 1))))
        panel.set_title("U-shaped: samples too narrow · dome: too wide · slope: off to one side", loc="left", fontsize=9.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
        panel.legend(loc="upper right", frameon=False)
        save(figure, path)
