"""Methods compared as pictures: their metrics over the horizon and as points, and their forecasts side by side."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from report import videos
from report.methods import Method, Table
from report.tables import BASELINES, baseline, direction, label

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5230",
    "#6A3D9A",
)  # for the colour-blind too
MARKERS, GREYS = (
    "os^Dv",
    ("#555555", "#A0A0A0"),
)  # a marker for each round of the colours; a grey for each baseline
MOST = 11  # methods in a mosaic


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.axisbelow": True,
            "axes.titlesize": 11,
            "font.size": 10,
        }
    )
    from matplotlib import pyplot

    return pyplot


def plain(text: str) -> str:
    """For matplotlib, to which $ begins a formula and a leading _ says that there is no legend."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def titled(metric: str) -> str:
    return plain(label(metric)) + {"up": " ↑", "down": " ↓", "one": " → 1"}[direction(metric)]


def panels(count: int, height: float):
    """-> (figure, axes) in rows of at most three."""
    columns = min(3, count)
    lines = -(-count // columns)
    size = (max(4.8, 4.2 * columns), height * lines)
    figure, axes = pyplot().subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def legend(figure, axes: list) -> None:
    """One for all panels, below them."""
    own = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    if not own:
        return
    widest = max(map(len, own), default=1)
    columns = max(1, min(len(own), int(figure.get_figwidth() * 12 // (widest + 6))))
    figure.legend(
        own.values(), own.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


def horizon_plot(table: Table, metrics: list[str], path: Path) -> bool:
    """Each metric over the predicted frames, a line per method with a band of one standard error over seeds, baselines dashed;
    -> whether there was anything to draw."""
    curves = {metric: [method.horizon(metric) for method in table.methods] for metric in metrics}
    curves = {
        metric: own for metric, own in curves.items() if any(curve is not None for curve in own)
    }
    if not curves:
        return False
    figure, axes = panels(len(curves), 3.3)
    for axis, (metric, own) in zip(axes, curves.items()):
        for k, (method, curve) in enumerate(zip(table.methods, own)):
            if curve is None:
                continue
            (mean, se), frames = curve, np.arange(1, len(curve[0]) + 1)
            axis.plot(
                frames,
                mean,
                color=COLOURS[k % len(COLOURS)],
                linewidth=1.8,
                label=plain(method.name),
                marker=MARKERS[k // len(COLOURS) % 5],
                markersize=3.5 if k >= len(COLOURS) or len(mean) == 1 else 0,
            )
            axis.fill_between(
                frames,
                mean - se,
                mean + se,
                color=COLOURS[k % len(COLOURS)],
                alpha=0.18,
                linewidth=0,
            )
        for grey, (suffix, text) in zip(GREYS, BASELINES.items()):
            rows = [
                run.horizon.get(metric + suffix) for method in table.methods for run in method.runs
            ]
            row = next((row for row in rows if row is not None), None)
            if row is not None:
                axis.plot(
                    np.arange(1, len(row) + 1),
                    row,
                    "--",
                    color=grey,
                    linewidth=1.3,
                    label=text,
                    zorder=1,
                )
        axis.set(title=titled(metric), xlabel="predicted frame")
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)
    save(figure, path)
    return True


def summary_plot(table: Table, metrics: list[str], path: Path) -> None:
    """A panel per metric: mean and standard error of each method, a small dot per seed, baselines dashed."""
    count = len(table.methods)
    figure, axes = panels(len(metrics), 1.5 + 0.32 * count)
    for at, (axis, metric) in enumerate(zip(axes, metrics)):
        for k, method in enumerate(table.methods):
            score, colour = method.score(metric), COLOURS[k % len(COLOURS)]
            if not score.n:
                continue
            if score.n > 1:
                seeds = [run.summary[metric][0] for run in method.runs if metric in run.summary]
                axis.plot(
                    seeds,
                    [k] * len(seeds),
                    "o",
                    color=colour,
                    markersize=4,
                    alpha=0.35,
                    markeredgewidth=0,
                )
            axis.errorbar(
                score.mean,
                k,
                xerr=np.nan_to_num(score.se),
                fmt=MARKERS[k // len(COLOURS) % 5],
                color=colour,
                markersize=6,
                capsize=3,
            )
        mark_baselines(axis, table, metric)
        axis.set(title=titled(metric), ylim=(count - 0.5, -0.5), yticks=range(count))
        axis.set_yticklabels(
            [plain(method.name) for method in table.methods] if at % 3 == 0 else []
        )
        axis.grid(axis="y", visible=False)
        axis.xaxis.get_major_locator().set_params(nbins=5)
    legend(figure, axes)
    save(figure, path)


def mark_baselines(axis, table: Table, metric: str) -> None:
    """A dashed line each; of those far away, which would crowd the methods into a corner, the number below the panel."""
    low, high = axis.get_xlim()
    for grey, (suffix, text) in zip(GREYS, BASELINES.items()):
        score = baseline(table, metric + suffix)
        if score.n and low - (high - low) <= score.mean <= high + (high - low):
            axis.axvline(
                score.mean, linestyle="--", color=grey, linewidth=1.3, label=text, zorder=1
            )
        elif score.n:
            said = (
                f"← {text} {score.mean:.3g}" if score.mean < low else f"{text} {score.mean:.3g} →"
            )
            axis.set_xlabel(
                "    ".join([axis.get_xlabel(), said]).strip(), fontsize=8, color=GREYS[0]
            )


# ----------------------------------------------------------------------------------------------------------------- mosaic
def arrays(method: Method) -> tuple[np.ndarray, np.ndarray] | None:
    """(truth (V, C + T, H, W, 3), first samples (V, T, H, W, 3)) of the first run that has both, read as they are used."""
    for run in method.runs:
        try:
            truth, samples = (
                np.load(run.folder / f"{name}.npy", mmap_mode="r") for name in ("truth", "samples")
            )
        except (OSError, ValueError, EOFError):
            continue
        if (
            truth.ndim == 5
            and samples.ndim == 6
            and truth.dtype == samples.dtype == np.uint8
            and len(truth) == len(samples)
            and samples.shape[2] < truth.shape[1]
            and truth.shape[2:] == samples.shape[3:]
        ):
            return truth, samples[:, 0]
    return None


def comparison(table: Table, clips: int) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]] | str:
    """-> (truth, [(method, its first samples)]) of the liveliest clips, truth beside samples that are of the same clips; or why
    there is none."""
    found = [(method, own) for method in table.methods if (own := arrays(method)) is not None]
    if not found:
        return "no result has both samples.npy and truth.npy"
    truth = found[0][1][0]
    if other := [method.name for method, own in found if not np.array_equal(own[0], truth)]:
        return f"{other[0]} and {found[0][0].name} were not tried on the same clips"
    shown = videos.liveliest(truth, truth.shape[1] - found[0][1][1].shape[1])[:clips]
    return truth[shown], [(method.name, own[1][shown]) for method, own in found[:MOST]]


@functools.cache
def font():
    """matplotlib's: Pillow's own lacks letters such as ö."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 10)


def broken(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, words that are longer cut."""
    length, lines = font().getlength, [""]
    for word in text.split():
        pieces = list(word) if length(word) > width else [word]
        for k, piece in enumerate(pieces):
            glue = " " if k == 0 and lines[-1] else ""
            if lines[-1] and length(lines[-1] + glue + piece) > width:
                lines.append(piece)
            else:
                lines[-1] += glue + piece
    return lines


def header(lines: list[str], height: int, width: int) -> np.ndarray:
    """(height, width, 3), the lines at its foot."""
    image, face = Image.new("RGB", (width, height), videos.PAPER), font()
    for k, line in enumerate(reversed(lines)):
        ImageDraw.Draw(image).text(
            (videos.GAP, height - 12 * (k + 1) - 3), line, videos.INK, font=face
        )
    return np.asarray(image)


def mosaic(
    truth: np.ndarray, columns: list[tuple[str, np.ndarray]], wanted: int = 96
) -> np.ndarray:
    """A row per clip, the truth and each method's forecast of it: truth (V, T, H, W, 3), forecasts (V, T - condition, H, W, 3)
    -> (T, H', W', 3)."""
    condition, factor = (
        truth.shape[1] - columns[0][1].shape[1],
        videos.scale_of(truth.shape[2], wanted),
    )
    named = [
        ("truth", truth),
        *((name, np.concatenate([truth[:, :condition], own], 1)) for name, own in columns),
    ]
    stacks = [
        np.concatenate([videos.framed(clip, condition, factor) for clip in own], 1)
        for _, own in named
    ]
    T, height, width, _ = stacks[0].shape
    labels = [broken(name, width - 2 * videos.GAP)[:5] for name, _ in named]
    head = 12 * max(map(len, labels)) + 4
    paper, parts = np.full((T, head + height, videos.GAP, 3), 255, np.uint8), []
    for lines, stack in zip(labels, stacks):
        parts += [
            np.concatenate(
                [np.broadcast_to(header(lines, head, width), (T, head, width, 3)), stack], 1
            ),
            paper,
        ]
    return np.concatenate(parts[:-1], 2)
