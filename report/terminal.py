"""Format the tables of one result for the terminal."""

from __future__ import annotations

import numpy as np

from evaluation import protocols
from evaluation.metrics import ABOUT, BASELINES, own_metrics


def format_number(value: float | None) -> str:
    """Four significant digits; empty for None."""
    return "" if value is None else f"{value:.4g}"


def horizon_table(result: dict) -> str:
    """The table of sample.py and main.py: each metric, then its baselines, at some predicted frames
    and over all of them.
    """
    horizon, protocol = result["horizon"], result["protocol"]
    T = protocol["predict"]
    # A few frames fit into a terminal: denser at the start, where errors grow fastest.
    frames = sorted({t for t in (1, 2, 5, 10, 20, 30, T) if t <= T})
    head = f"{'frame':<24}" + "".join(f"{t:>9}" for t in frames) + f"{'all':>9}"
    title = (
        f"{protocol['videos']} {protocol['split']} videos, {protocol['samples_per_video']} "
        f"futures each, "
        f"{protocol['condition']} -> {T} frames, {protocol['solver']} solver, "
        f"diffusion {protocol['diffusion']}, "
        f"{protocol['network_evaluations_per_frame']:.4g} network evaluations a frame"
    )
    lines = [title, head, "-" * len(head)]

    def add_line(label: str, values: list[float], mean: float, digits: int) -> None:
        cells = [*(values[t - 1] for t in frames), mean]
        lines.append(f"{label:<24}" + "".join(f"{value:>9.{digits}f}" for value in cells))

    # The baselines stand directly below the metric, and the ratio to the first of them last.
    for name in [name for name in ABOUT if name in horizon]:
        digits = 2 if ABOUT[name][1] == "dB" else 4
        for suffix, label in {"": "", **BASELINES}.items():
            if name + suffix in horizon:
                values = horizon[name + suffix]
                add_line(f"{name} {label}".strip(), values, float(np.mean(values)), digits)
        if name in result["ratio_to_repeat_last"]:
            ratio = result["ratio_to_repeat_last"][name]
            add_line(f"{name} / repeat last", ratio["horizon"], ratio["all"], 2)
    return "\n".join(lines)


def summary_table(result: dict) -> str:
    """The table of evaluate.py: the protocol in words, then each metric beside its baselines."""
    summary = result["summary"]
    width = 2 + max(map(len, BASELINES.values()))
    head = f"{'metric':<26}{'forecast':>20}"
    head += "".join(f"{label:>{width}}" for label in BASELINES.values())
    lines = [*protocols.describe(result["protocol"]), "", head, "-" * len(head)]
    for name in own_metrics(summary):
        unit = ABOUT[name][1]
        label = f"{name} ({unit})" if unit else name
        value = summary[name]
        text = format_number(value["mean"])
        if value["se"] is not None:
            text += f" ± {format_number(value['se'])}"
        cells = [format_number(summary.get(name + suffix, {}).get("mean")) for suffix in BASELINES]
        lines.append(f"{label:<26}{text:>20}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
