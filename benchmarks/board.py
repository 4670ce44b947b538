"""The records of benchmarks.quality: read, append, make the table, check the targets."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import json_lines, results
from runtime.console import Failure

FILE = Path(__file__).parent / "board.jsonl"
# Resamples of the clips for an interval of a paired ratio.
RESAMPLES = 2_000
# (world, field, lowest, highest) of the variant `default` at budget 1, mean over seeds.
TARGETS = [
    ("ball_stn", "crps", 0.0, 0.25),
    ("ball_stn", "spread_skill", 0.85, 1.15),
    ("ball_stn", "seconds", 0.0, 1.15),
    ("moving_mnist", "paired", 0.0, 0.80),
    ("wmaze", "paired", 0.0, 0.80),
    ("street", "paired", 0.0, 0.80),
    ("clevrer_like", "crps", 0.0, 1.0),
]
# The same for every world.
TARGETS_OF_ALL = [("sharpness", 0.8, 1.25), ("motion", 0.7, 1.4)]
HEAD = (
    "| variant | budget | seeds | one-step | CRPS | first | last | CRPS / before | bound | "
    "attainable | LPIPS | FVD | spread/skill | sharpness | motion | seconds / before | "
    "parameters | evaluations |"
)


# -------------------------------------------------------------------- records
def read() -> list[dict]:
    return json_lines.read(FILE)


def append(record: dict) -> None:
    json_lines.append(FILE, record)


def find(
    world: str, variant: str, seed: int, budget: float, records: list[dict] | None = None
) -> dict | None:
    """The record of a run, or None."""
    key = (world, variant, seed, budget)
    for record in read() if records is None else records:
        if (record["world"], record["variant"], record["seed"], record["budget"]) == key:
            return record
    return None


def bound_of(world: str, autoencoder: str, restore: float) -> float | None:
    """The bound that an earlier run has measured with the same autoencoder, by the name of its
    folder, and the same sample.restore."""
    for record in read():
        known = (record["world"], record["autoencoder"], record.get("restore", 0.0))
        if known == (world, autoencoder, restore):
            return record["bound"]
    return None


# -------------------------------------------------------------------- table
def paired(record: dict, before: dict) -> float:
    """The CRPS of a record over that of `before`, on the same clips."""
    return float(np.mean(record["clips"]["crps"]) / np.mean(before["clips"]["crps"]))


def paired_interval(pairs: list[tuple[dict, dict]], name: str = "crps") -> tuple[float, float]:
    """The central 95 % bootstrap interval, over clips and seeds, of the ratio of a measure."""
    own = np.concatenate([record["clips"][name] for record, _ in pairs])
    base = np.concatenate([before["clips"][name] for _, before in pairs])
    rows = np.random.default_rng(0).integers(len(own), size=(RESAMPLES, len(own)))
    found = own[rows].mean(1) / base[rows].mean(1)
    return tuple(np.quantile(found, [0.025, 0.975]).tolist())


def training_seconds(record: dict) -> float:
    """Seconds of both trainings and of encoding, times the matrix rate of the machine."""
    seconds = record["seconds"]
    return sum(seconds[name] for name in ("VQVAE", "latents", "training")) * record["gflops"]


def summarize(records: list[dict], all_records: list[dict]) -> dict[str, float | None]:
    """Means over the seeds of one variant on one world at one budget."""
    found = {}
    for name in ("one_step", "lpips", "fvd", "spread_skill", "sharpness", "motion"):
        values = [record[name] for record in records if record[name] is not None]
        found[name] = float(np.mean(values)) if values else None
    for part in ("all", "first", "last"):
        name = "crps" if part == "all" else f"crps_{part}"
        found[name] = float(np.mean([record["crps"][part] for record in records]))
    bounds = [record["bound"] for record in records if record["bound"] is not None]
    found["bound"] = float(np.mean(bounds)) if bounds else None
    # Where the autoencoder alone is worse than repeating the last frame, nothing is attainable.
    shares = []
    for record in records:
        if record["bound"] is not None and record["bound"] < 1:
            shares.append((1 - record["crps"]["all"]) / (1 - record["bound"]))
    found["attainable"] = float(np.mean(shares)) if shares else None
    pairs = []
    for record in records:
        before = find(record["world"], "before", record["seed"], record["budget"], all_records)
        if before is not None:
            pairs.append((record, before))
    found |= {"paired": None, "interval": None, "seconds": None}
    if pairs:
        found["paired"] = float(np.mean([paired(*pair) for pair in pairs]))
        found["interval"] = paired_interval(pairs)
        times = [training_seconds(own) / training_seconds(before) for own, before in pairs]
        found["seconds"] = float(np.mean(times))
    found["parameters"] = records[0]["parameters"]
    found["evaluations"] = records[0]["evaluations"]
    return found


def group(records: list[dict]) -> dict[tuple[str, float, str], list[dict]]:
    """Records by (world, budget, variant)."""
    groups = defaultdict(list)
    for record in records:
        groups[record["world"], record["budget"], record["variant"]].append(record)
    return dict(groups)


def row(variant: str, budget: float, records: list[dict], all_records: list[dict]) -> str:
    found = summarize(records, all_records)
    low_high = ""
    if found["interval"] and variant != "before":
        low_high = " ({:.2f} to {:.2f})".format(*found["interval"])
    cells = [
        variant,
        f"{budget:g}",
        str(len(records)),
        number(found["one_step"], 3),
        number(found["crps"], 3),
        number(found["crps_first"], 2),
        number(found["crps_last"], 2),
        number(found["paired"], 2) + low_high,
        number(found["bound"], 3),
        "" if found["attainable"] is None else f"{100 * found['attainable']:.0f} %",
        number(found["lpips"], 3),
        number(found["fvd"], 0),
        number(found["spread_skill"], 2),
        number(found["sharpness"], 2),
        number(found["motion"], 2),
        number(found["seconds"], 2),
        f"{found['parameters'] / 1e6:.2f} M",
        f"{found['evaluations']:g}",
    ]
    return "| " + " | ".join(cells) + " |"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(records: list[dict]) -> str:
    """Markdown: a table per world, a row per variant and budget."""
    lines = []
    groups = group(records)
    for world in dict.fromkeys(record["world"] for record in records):
        kind = "physics oracle" if world == "ball_stn" else "autoencoder alone"
        lines += [f"**{world}** (bound: {kind})", "", HEAD]
        lines.append("| --- |" + " ---: |" * (HEAD.count("|") - 2))
        for (own, budget, variant), found in sorted(groups.items()):
            if own == world:
                lines.append(row(variant, budget, found, records))
        lines.append("")
    return "\n".join(lines)


def misses(records: list[dict]) -> list[str]:
    """The targets that the default misses at budget 1, or that no run has measured."""
    groups = group(records)
    worlds = dict.fromkeys(world for world, *_ in TARGETS)
    targets = list(TARGETS)
    for world in worlds:
        targets += [(world, *target) for target in TARGETS_OF_ALL]
    found = []
    for world, name, low, high in targets:
        own = groups.get((world, 1.0, "default"))
        value = summarize(own, records)[name] if own else None
        if value is None:
            found.append(f"{world}: {name} is not measured (target {low:g} to {high:g})")
        elif not low <= value <= high:
            found.append(f"{world}: {name} is {value:.3g}, target {low:g} to {high:g}")
    return found


def report(write: bool, check: bool) -> None:
    """Write the section of RESULTS.md and print the targets that are missed.

    Failure with `check` if there are any.
    """
    records = read()
    missed = misses(records)
    lines = "\n".join(f"- {miss}" for miss in missed)
    if write:
        text = (
            "CRPS ratios: forecasts over repeating the last given frame. One-step: squared error "
            "of E[x_1|x_0] over the mean square of x_1 - x_0, held-out latents. CRPS / before: on "
            "the same clips, with the 95 % bootstrap interval. Attainable: (1 - ratio) / (1 - "
            "bound). Sharpness: power in the upper third of the wavenumbers, last frame, over the "
            "truth's. Motion: mean squared change from frame to frame, over the truth's. Seconds: "
            "both trainings, corrected for the matrix rate. Made by `python -m benchmarks.quality "
            "--report` from benchmarks/board.jsonl; one run anew: delete its line, then `python -m "
            "benchmarks.quality --worlds WORLD --variants VARIANT --seeds SEED --budget BUDGET`."
            f"\n\n{table(records)}\nTargets that are missed:\n\n{lines or '- none'}"
        )
        print(f"table          {results.write('Quality of the forecasts', text)}")
    print(f"targets missed: {len(missed)}\n{lines}")
    if check and missed:
        raise Failure(f"{len(missed)} targets of the board are missed")
