"""The records of benchmarks.few_evaluations: read, append, make the table, check the targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import board, json_lines, results
from runtime.console import Failure

FILE = Path(__file__).parent / "few_evaluations.jsonl"
# Worlds that the targets are for.
WORLDS = ("ball_stn",)
# Seeds, clips and members that a comparison needs.
SEEDS = 3
CLIPS = 256
MEMBERS = 16
# Largest upper 95 % bound of the CRPS over that of `default`, and of `longer`.
CRPS = 1.02
# Spread/skill at every frame.
SPREAD_SKILL = (0.9, 1.1)
# variant: least frames per second, over the default's
FASTER = {"energy_2": 1.7, "energy_1": 2.5}
HEAD = (
    "| variant | seeds | evaluations | CRPS | CRPS / default | CRPS / longer | patches / default | "
    "spread/skill | coverage | outer ranks | sharpness | spectrum | motion | frames/s / default | "
    "updates | seconds |"
)
ABOUT = (
    "Held-out clips, {members} members. CRPS: over that of repeating the last given frame. Ratios "
    "to `default` (its checkpoint, all evaluations) and to `longer` are on the same clips, with "
    "the 95 % bootstrap interval over clips and seeds. Patches: energy score of squares of 8 "
    "pixels, which depends on joint structure, unlike CRPS. Spread/skill, corrected for the number "
    "of members, and coverage of the range without the lowest and highest rank (nominal "
    "{nominal:.3f}): least and greatest over the frames. Outer ranks: frequency of the lowest and "
    "the highest rank, over that of a flat histogram. Sharpness, spectrum: power in the upper "
    "third of the wavenumbers, and least and greatest ratio over all wavenumbers, last frame, over "
    "the truth's. Made by `python -m benchmarks.few_evaluations --report` from "
    "benchmarks/few_evaluations.jsonl."
)


# -------------------------------------------------------------------- records
def read() -> list[dict]:
    return json_lines.read(FILE)


def append(record: dict) -> None:
    json_lines.append(FILE, record)


def label(variant: str, changes: list[str]) -> str:
    """The name of a variant in the table: with the settings of --set, if there are any."""
    return " ".join([variant, *changes])


def find(world: str, variant: str, seed: int, budget: float) -> dict | None:
    """The record of a run, or None."""
    return board.find(world, variant, seed, budget, read())


# -------------------------------------------------------------------- table
def pairs_with(records: list[dict], own: list[dict], other: str) -> list[tuple[dict, dict]]:
    """Pair each record of `own` with that of the variant `other` with the same --set, seed and
    clips."""
    found = []
    for record in own:
        name, _, changes = record["variant"].partition(" ")
        variant = label(other, [changes] if changes else [])
        base = board.find(record["world"], variant, record["seed"], record["budget"], records)
        if base is not None and len(base["clips"]["crps"]) == len(record["clips"]["crps"]):
            found.append((record, base))
    return found


def ratio(pairs: list[tuple[dict, dict]], name: str) -> tuple[float, float, float] | None:
    """Ratio of a measure of all clips and seeds -> (ratio, low, high), the 95 % bootstrap interval;
    None without pairs."""
    if not pairs:
        return None
    own = np.concatenate([record["clips"][name] for record, _ in pairs])
    base = np.concatenate([other["clips"][name] for _, other in pairs])
    return float(own.mean() / base.mean()), *board.paired_interval(pairs, name)


def summarize(own: list[dict], records: list[dict]) -> dict:
    """Means over the seeds of one variant on one world at one budget."""
    default = pairs_with(records, own, "default")
    crps = [np.mean(record["clips"]["crps"]) for record in own]
    repeated = [np.mean(record["clips"]["repeat_last"]) for record in own]
    ranks = np.sum([record["ranks"] for record in own], 0)
    faster = None
    if default:
        rates = [a["frames_per_second"] / b["frames_per_second"] for a, b in default]
        faster = float(np.mean(rates))
    found = {
        "crps": float(np.mean(crps) / np.mean(repeated)),
        "default": ratio(default, "crps"),
        "longer": ratio(pairs_with(records, own, "longer"), "crps"),
        "patches": ratio(default, "patches"),
        "ranks": (ranks[[0, -1]] / ranks.mean()).tolist(),
        "faster": faster,
    }
    for name in ("spread_skill", "coverage", "spectrum"):
        values = np.mean([record[name] for record in own], 0)
        found[name] = (float(values.min()), float(values.max()))
    for name in ("evaluations", "sharpness", "motion", "updates", "seconds"):
        found[name] = float(np.mean([record[name] for record in own]))
    return found


def interval(value: tuple[float, float, float] | None) -> str:
    return "" if value is None else "{:.3f} ({:.3f} to {:.3f})".format(*value)


def row(variant: str, own: list[dict], records: list[dict]) -> str:
    found = summarize(own, records)
    cells = [
        variant,
        str(len(own)),
        f"{found['evaluations']:g}",
        f"{found['crps']:.3f}",
        interval(found["default"]),
        interval(found["longer"]),
        interval(found["patches"]),
        "{:.2f} to {:.2f}".format(*found["spread_skill"]),
        "{:.2f} to {:.2f}".format(*found["coverage"]),
        "{:.2f}, {:.2f}".format(*found["ranks"]),
        f"{found['sharpness']:.2f}",
        "{:.2f} to {:.2f}".format(*found["spectrum"]),
        f"{found['motion']:.2f}",
        board.number(found["faster"], 2),
        f"{found['updates']:.0f}",
        f"{found['seconds']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def make_table(records: list[dict]) -> str:
    """Markdown: a table per world and budget, a row per variant."""
    lines = []
    groups = board.group(records)
    for world, budget in dict.fromkeys((r["world"], r["budget"]) for r in records):
        lines += [f"**{world}**, budget {budget:g}", "", HEAD]
        lines.append("| --- |" + " ---: |" * (HEAD.count("|") - 2))
        for (own_world, own_budget, variant), own in groups.items():
            if (own_world, own_budget) == (world, budget):
                lines.append(row(variant, own, records))
        lines.append("")
    return "\n".join(lines)


def misses(records: list[dict]) -> list[str]:
    """The targets that energy_2 and energy_1 miss at budget 1, or that no run has measured."""
    groups = board.group(records)
    found = []
    for world in WORLDS:
        for variant, least in FASTER.items():
            own = groups.get((world, 1.0, variant), [])
            seeds = [r for r in own if len(r["clips"]["crps"]) >= CLIPS and r["members"] >= MEMBERS]
            if len(seeds) < SEEDS:
                found.append(
                    f"{world}, {variant}: {len(seeds)} of {SEEDS} seeds are measured on {CLIPS} "
                    f"clips with {MEMBERS} members"
                )
            if own:
                found += [
                    f"{world}, {variant}: {miss}"
                    for miss in compare(summarize(own, records), least)
                ]
    return found


def compare(found: dict, least: float) -> list[str]:
    """The targets that a summary misses. least: frames per second over the default's."""
    missed = []
    for other in ("default", "longer"):
        value = found[other]
        if value is None:
            missed.append(f"the CRPS over that of `{other}` is not measured")
        elif value[2] > CRPS:
            missed.append(
                f"the upper bound of the CRPS over that of `{other}` is {value[2]:.3f}, at most "
                f"{CRPS}"
            )
    low, high = found["spread_skill"]
    if low < SPREAD_SKILL[0] or high > SPREAD_SKILL[1]:
        missed.append(
            f"spread/skill is {low:.2f} to {high:.2f}, target {SPREAD_SKILL[0]} to "
            f"{SPREAD_SKILL[1]} at every frame"
        )
    if found["faster"] is not None and found["faster"] < least:
        missed.append(f"frames/s are {found['faster']:.2f} times the default's, target {least}")
    return missed


def report(write: bool, check: bool) -> None:
    """Write the section of RESULTS.md and print the targets that are missed.

    Failure with `check` if there are any.
    """
    records = read()
    missed = misses(records)
    lines = "\n".join(f"- {miss}" for miss in missed)
    if write:
        members = records[-1]["members"] if records else MEMBERS
        about = ABOUT.format(members=members, nominal=(members - 1) / (members + 1))
        text = f"{about}\n\n{make_table(records)}\nTargets that are missed:\n\n{lines or '- none'}"
        print(f"table          {results.write('One or two evaluations a frame', text)}")
    print(f"targets missed: {len(missed)}\n{lines}")
    if check and missed:
        raise Failure(f"{len(missed)} targets of one or two evaluations are missed")
