"""The records of benchmarks.navier_stokes: read, append, make the table and the figures, check the
targets."""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import json_lines, results
from runtime.console import Failure, UserError

FILE = Path(__file__).parent / "navier_stokes.jsonl"
FIGURES = Path(__file__).parent
KEY = ("world", "variant", "tau", "seed", "flops", "changes")
# (world, field of `summarize`, lowest, highest) of the variant, the sampler and the budget below,
# at tau = 0.5, mean over seeds.
VARIANT, SAMPLER = "follmer", "default"
TARGETS = [
    ("navier_stokes", "crps", 0.0, 1.15),
    ("navier_stokes", "coverage_90", 0.85, 0.95),
    ("navier_stokes", "spectrum_error", 0.0, 0.15),
    ("navier_stokes", "rollout", 0.9, 1.1),
    ("navier_stokes", "flops", 0.0, 1e15),
    ("heat", "crps", 0.0, 1.05),
    ("heat", "mean_error", 0.0, 0.05),
    ("heat", "deviation_error", 0.0, 0.05),
    ("heat", "coverage_90", 0.87, 0.93),
]
# Columns of the table: field of `summarize` -> head.
COLUMNS = {
    "crps": "CRPS / oracle",
    "energy": "energy / oracle",
    "mean_error": "error of mean",
    "deviation_error": "error of deviation",
    "coverage_50": "50 %",
    "coverage_90": "90 %",
    "spectrum_error": "spectrum, k ≤ 16",
    "kl": "KL of enstrophy",
    "rollout": "enstrophy at step 100",
    "rollout_spectrum": "spectrum at step 100",
}


class Sampler(NamedTuple):
    """A sampler by its name DIFFUSION:STEPS[:SOLVER]. The solvers make one evaluation per step."""

    diffusion: str
    steps: int
    solver: str

    @property
    def label(self) -> str:
        return f"g = {self.diffusion}" + (", exact" if self.solver == "exact" else "")


def parse_sampler(name: str) -> Sampler:
    """Parse DIFFUSION:STEPS[:SOLVER]; UserError if `name` is none."""
    parts = name.split(":")
    if len(parts) == 2:
        parts.append("exact2")
    if not (
        len(parts) == 3
        and parts[0]
        and parts[1].isdecimal()
        and int(parts[1]) >= 1
        and parts[2] in ("exact", "exact2")
    ):
        raise UserError(
            "--samplers must be `default` or DIFFUSION:STEPS[:SOLVER], where SOLVER is exact2 "
            f"(the default) or exact, got {name}"
        )
    return Sampler(parts[0], int(parts[1]), parts[2])


# -------------------------------------------------------------------- records
def read() -> list[dict]:
    return json_lines.read(FILE)


def append(record: dict) -> None:
    json_lines.append(FILE, record)


def find(run, sampler: str) -> dict | None:
    """The record of a navier_stokes.Run and a sampler, or None."""
    wanted = (*run[:-1], list(run.changes))
    for record in read():
        if tuple(record[name] for name in KEY) == wanted and record["sampler"] == sampler:
            return record
    return None


# -------------------------------------------------------------------- summaries
def value_of(record: dict, name: str) -> tuple[float, float] | None:
    """A score at the first lead time, with its standard error over states; None if a record lacks
    it."""
    scores = record["scores"]
    if name == "flops":
        return record.get("trained_flops", 0.0), 0.0
    if name == "kl":
        return scores["divergence"]["enstrophy_histogram"][0], 0.0
    if name.startswith("rollout"):
        found = record.get("rollout")
        if found is None:
            return None
        if name == "rollout_spectrum":
            return found["spectrum_error"], 0.0
        return found["enstrophy"]["value"], found["enstrophy"]["se"]
    entry = scores[name]
    entry = entry.get("quotient", entry)
    return entry["value"][0], entry["se"][0] or 0.0


def summarize(records: list[dict], name: str) -> tuple[float, float] | None:
    """Mean over seeds of a score, and its standard error.

    The seeds share the states of the oracle: the standard error over states stays, and the error
    over seeds is added.
    """
    values = [value_of(record, name) for record in records]
    values = [value for value in values if value is not None]
    if not values:
        return None
    means, errors = np.transpose(values)
    square = np.square(errors).mean()
    if len(means) > 1:
        square += means.var(ddof=1) / len(means)
    return float(means.mean()), float(np.sqrt(square))


def group(records: list[dict]) -> dict[tuple, list[dict]]:
    """Records by (world, tau, budget, variant with the settings of --set, sampler)."""
    groups = defaultdict(list)
    for record in records:
        name = " ".join([record["variant"], *record["changes"]])
        key = (record["world"], record["tau"], record["flops"], name, record["sampler"])
        groups[key].append(record)
    return dict(groups)


def cell(found: tuple[float, float] | None) -> str:
    if found is None:
        return ""
    value, error = found
    return f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"


def row(name: str, sampler: str, records: list[dict]) -> str:
    updates = records[0].get("updates")
    evaluations = records[0]["scores"]["evaluations"]
    cells = [name, sampler, str(len(records)), f"{updates:,}" if updates else ""]
    cells += [f"{evaluations:g}", *(cell(summarize(records, column)) for column in COLUMNS)]
    return "| " + " | ".join(cells) + " |"


def table(records: list[dict]) -> str:
    """Markdown: a table per world, tau and budget, a row per variant and sampler, best first."""
    lines, groups = [], group(records)
    head = "| " + " | ".join(
        ["variant", "sampler", "seeds", "updates", "evaluations", *COLUMNS.values()]
    )
    for world, tau, flops in sorted({key[:3] for key in groups}, reverse=True):
        rows = []
        for key, own in groups.items():
            if key[:3] == (world, tau, flops):
                rows.append((summarize(own, "crps")[0], row(*key[3:], own)))
        lines += [f"**{world}**, tau = {tau:g}, {flops:g} operations per training", "", head + " |"]
        lines.append("| --- | --- |" + " ---: |" * (head.count("|") - 2))
        lines += [text for _, text in sorted(rows)]
        lines.append("")
    return "\n".join(lines)


def compare_best(records: list[dict]) -> list[str]:
    """One line per world and tau: the best trained variant, and the distance of the next."""
    lines, groups = [], group(records)
    for world, tau, flops in sorted({key[:3] for key in groups}, reverse=True):
        found = {}
        for key, own in groups.items():
            if key[:3] == (world, tau, flops) and key[3] != "repeat":
                # One entry for `default` and the same sampler by its name.
                found[key[3], summarize(own, "crps")] = f"{key[3]}, {key[4]}"
        found = sorted((*scores, name) for (_, scores), name in found.items())
        if len(found) < 2:
            continue
        (best, error, name), (second, other_error, other) = found[:2]
        joint = np.hypot(error, other_error)
        clear = "clearly" if second - best > 2 * joint else "not clearly"
        lines.append(
            f"- {world}, tau = {tau:g}, {flops:g}: lowest CRPS by {name} ({best:.3f} ± "
            f"{error:.3f}), {clear} below {other} ({second:.3f} ± {other_error:.3f})."
        )
    return lines


def judge_diffusions(records: list[dict]) -> list[str]:
    """One line per solver and number of steps: is the Föllmer process the best diffusion of
    VARIANT?"""
    by_steps = defaultdict(list)
    for (world, tau, flops, name, sampler), own in group(records).items():
        if (world, name) == ("navier_stokes", VARIANT) and sampler != "default":
            diffusion, steps, solver = parse_sampler(sampler)
            by_steps[tau, flops, solver, steps].append((*summarize(own, "crps"), diffusion))
    lines = []
    for (tau, flops, solver, steps), found in sorted(by_steps.items()):
        named = {diffusion: (value, error) for value, error, diffusion in found}
        if "follmer" not in named or len(named) < 2:
            continue
        own, own_error = named.pop("follmer")
        best, (value, error) = min(named.items(), key=lambda entry: entry[1])
        verdict = "borne out" if own < value else "not borne out"
        if abs(own - value) < 2 * np.hypot(own_error, error):
            verdict = "neither borne out nor refuted, within two standard errors"
        lines.append(
            f"- tau = {tau:g}, {flops:g}, {steps} steps of {solver}: that the Föllmer process is "
            f"the best diffusion is {verdict}: {own:.3f} ± {own_error:.3f}, against {value:.3f} ± "
            f"{error:.3f} with g = {best}."
        )
    return lines


def misses(records: list[dict]) -> list[str]:
    """The targets that the runs of VARIANT miss, of the largest budget within 1e15 operations, or
    that no run has measured."""
    found = []
    for world, name, low, high in TARGETS:
        by_budget = defaultdict(list)
        for record in records:
            known = (record["variant"], record["sampler"], record["changes"], record["tau"])
            within = record.get("trained_flops", 0) <= 1e15
            if record["world"] == world and known == (VARIANT, SAMPLER, [], 0.5) and within:
                by_budget[record["flops"]].append(record)
        value = summarize(by_budget[max(by_budget)], name) if by_budget else None
        if value is None:
            found.append(f"{world}: {name} is not measured (target {low:g} to {high:g})")
        elif not low <= value[0] <= high:
            found.append(f"{world}: {name} is {cell(value)}, target {low:g} to {high:g}")
    return found


# -------------------------------------------------------------------- figures
def draw_evaluations(records: list[dict], path: Path) -> None:
    """CRPS over the oracle's by evaluations, a curve per diffusion and solver, of the largest
    budget; Navier-Stokes, tau = 0.5."""
    from report.style import COLOURS, add_panels, figure_of, save

    curves, groups = defaultdict(list), group(records)
    largest = max((flops for _, _, flops, name, _ in groups if name == VARIANT), default=0)
    for (world, tau, flops, name, sampler), own in groups.items():
        known = (world, tau, flops, name) == ("navier_stokes", 0.5, largest, VARIANT)
        if known and sampler != "default":
            chosen = parse_sampler(sampler)
            curves[chosen.label].append((chosen.steps, *summarize(own, "crps")))
    with figure_of(5.0, 3.6) as figure:
        panel, counts = add_panels(figure, 1, 1)[0], set()
        for colour, (label, points) in zip(cycle(COLOURS), sorted(curves.items())):
            steps, means, errors = np.transpose(sorted(points))
            counts.update(steps.astype(int).tolist())
            panel.errorbar(steps, means, errors, marker="o", color=colour, label=label)
        panel.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", xlabel="evaluations per frame", ylabel="CRPS / oracle")
        panel.set_xticks(sorted(counts), [str(count) for count in sorted(counts)])
        panel.set_xticks([], minor=True)
        if curves:
            panel.legend()
        save(figure, path)


def draw_spectra(records: list[dict], path: Path) -> None:
    """Spectra of the roll-outs' ends and of the forecasts at tau, over the truth's."""
    from report.style import COLOURS, add_panels, figure_of, save

    chosen = {}
    for record in sorted(records, key=lambda record: record["flops"]):
        known = (record["world"], record["tau"], record["seed"], record["changes"])
        rolled = record["sampler"] == "default" and "rollout" in record
        if known == ("navier_stokes", 0.5, 0, []) and rolled:
            # The record of the largest budget of each variant remains.
            chosen[record["variant"]] = record
    with figure_of(9.0, 3.6) as figure:
        panels = add_panels(figure, 2, 2)
        for colour, (variant, record) in zip(cycle(COLOURS), chosen.items()):
            label = f"{variant}, {record['flops']:.2g} operations"
            spectrum, rolled = record["scores"]["spectrum"], record["rollout"]
            pairs = (
                (spectrum["forecast"][0], spectrum["oracle"][0]),
                (rolled["spectrum"], rolled["spectrum_true"]),
            )
            for panel, (own, true) in zip(panels, pairs):
                ratio = np.divide(own[1:23], true[1:23])
                panel.plot(np.arange(1, len(ratio) + 1), ratio, color=colour, label=label)
        for panel, title in zip(panels, ("one step", "step 100 of roll-outs")):
            panel.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
            panel.set(xlabel="wavenumber", ylabel="spectrum / truth", title=title)
        if chosen:
            panels[0].legend()
        save(figure, path)


# -------------------------------------------------------------------- report
ABOUT = (
    "Forecasts w(t) -> w(t + tau) of the forced Navier-Stokes equation, 64 states of held-out "
    "trajectories, against the oracle: 64 simulated continuations of each state, each the truth "
    "in turn. CRPS / oracle: 1 is perfect. ±: standard error over states and seeds. Error of mean "
    "and of deviation: relative L2 errors of the conditional moments, without the sampling error. "
    "50 %, 90 %: coverage of central intervals. Spectrum: largest relative deviation of the radial "
    "enstrophy spectrum. Step 100: of roll-outs, enstrophy over the truth's. Sampler: "
    "diffusion:steps, of the solver exact2 unless it says exact. `default`: "
    "0:5, and for tuned variants the trained sampler. `longer`, `energy`, `shortcut`: tuned from "
    "`follmer`, with 15 % more operations. `deterministic`: "
    "trained by the squared error, one evaluation. `repeat`: the last frame. Made by `python -m "
    "benchmarks.navier_stokes --report` from benchmarks/navier_stokes.jsonl, where each line "
    "holds the command that repeats it."
)


def report(write: bool, check: bool) -> None:
    """Write the section of RESULTS.md with its figures, and print the targets that are missed.

    Failure with `check` if there are any.
    """
    records = read()
    missed = misses(records)
    lines = "\n".join(f"- {miss}" for miss in missed)
    if write:
        draw_evaluations(records, FIGURES / "navier_stokes_evaluations.png")
        draw_spectra(records, FIGURES / "navier_stokes_spectra.png")
        best = "\n".join(compare_best(records) + judge_diffusions(records))
        text = (
            f"{ABOUT}\n\n{table(records)}\n{best}\n\n"
            "![CRPS against evaluations](navier_stokes_evaluations.png)\n\n"
            "![Spectra](navier_stokes_spectra.png)\n\n"
            f"Targets that are missed:\n\n{lines or '- none'}"
        )
        print(f"table          {results.write('A world whose true law is known', text)}")
    print(f"targets missed: {len(missed)}\n{lines}")
    if check and missed:
        raise Failure(f"{len(missed)} targets of the benchmark are missed")
