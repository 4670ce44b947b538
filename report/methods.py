"""Group results: runs that differ only in their seed form a method, and methods that were measured
under the same protocol form a table.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np

import configs
from report.results import missing_part
from runtime.console import UserError

# Fields of the protocol that describe the sampler: they are part of the method.
SAMPLER = (
    "solver",
    "diffusion",
    "steps",
    "grid",
    "warm_start",
    "first",
    "context",
    "redraw",
    "reencode",
    "restore",
    "updates",
)
# Fields of the protocol that are ignored when results are grouped into methods and tables.
UNCOMPARED = ("checkpoint", "network_evaluations_per_frame", "fps", "source", "metrics")
# Settings that are no part of the method: they do not change the result, or the protocol states
# them, or they are paths.
IGNORED = re.compile(
    r"(output|wandb|latent)\.|dataset$|vqvae\.ckpt$|"
    r"data\.(root|workers|skip_bad|condition|predict|skip|image_size)$|"
    r"train\.(seed|log_every|sample_every|save_every|keep|keep_every|max_bad_steps)$|"
    r"sample\.(num_videos|num_samples|split|format|batch)$"
)


# --------------------------------------------------------------------------------- runs and methods
@dataclass
class Run:
    """One result: what a metrics.json holds."""

    folder: Path
    protocol: dict[str, Any]  # equal for all runs of a table
    settings: dict[str, Any]  # equal for all runs of a method; without the seed
    seed: Any
    # {metric: (mean, standard error over videos, or NaN)}; finite means only
    summary: dict[str, tuple[float, float]]
    horizon: dict[str, np.ndarray]  # {metric: (T,)}, NaN where nothing was measured
    checkpoint: str = ""
    fps: float = 10.0
    time: float = 0.0  # modification time of metrics.json


class Score(NamedTuple):
    mean: float
    se: float
    n: int  # number of runs with the metric
    over: str  # what the standard error is over: `seeds` or `videos`; empty: no standard error


@dataclass
class Method:
    runs: list[Run]  # one per seed
    automatic: str = ""  # name composed of the settings that distinguish the method
    nickname: str = ""
    named: set[str] = field(default_factory=set)  # settings that the name states

    @property
    def name(self) -> str:
        return self.nickname or self.automatic

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def score(self, metric: str) -> Score:
        """Mean and standard error over the seeds with this metric. A single seed has the standard
        error over videos instead.
        """
        scores = [run.summary[metric] for run in self.runs if metric in run.summary]
        if len(scores) <= 1:
            mean, se = scores[0] if scores else (math.nan, math.nan)
            return Score(mean, se, len(scores), "videos" if math.isfinite(se) else "")
        means = np.array([mean for mean, _ in scores])
        se = float(means.std(ddof=1) / np.sqrt(len(means)))
        return Score(float(means.mean()), se, len(means), "seeds")

    def horizon(self, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean (T,) and standard error (T,) over seeds, NaN for one seed; None if not measured."""
        rows = [run.horizon[metric] for run in self.runs if metric in run.horizon]
        rows = np.array([row for row in rows if len(row) == len(rows[0])])
        if not rows.size or np.isnan(rows).all():
            return None
        # One seed has no spread over seeds.
        if len(rows) == 1:
            return rows[0], np.full(rows.shape[1], np.nan)
        return rows.mean(0), rows.std(0, ddof=1) / np.sqrt(len(rows))


@dataclass
class Table:
    protocol: dict[str, Any]
    methods: list[Method]


def number(value: Any) -> float:
    """The value as a float; NaN if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def flatten(nested: dict, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"a": {"b": 1}} -> {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def canonical(value: Any) -> str:
    """A text that is equal for equal values; 1 equals 1.0."""
    return json.dumps(float(value) if type(value) is int else value, sort_keys=True)


@functools.cache
def default_settings() -> dict[str, Any]:
    """{group.field: default}, for the settings that a result of an earlier version lacks."""
    defaults = {}
    for group, kind in get_type_hints(configs.Config).items():
        if dataclasses.is_dataclass(kind):
            defaults |= {f"{group}.{f.name}": f.default for f in dataclasses.fields(kind)}
    return defaults


def parse_run(result: Any, folder: Path, time: float = 0.0) -> Run:
    """Convert the content of a metrics.json to a Run. ValueError states what the file lacks."""
    if missing := missing_part(result, ("protocol", "config", "summary")):
        raise ValueError(f"holds no `{missing}`")
    protocol, config = flatten(result["protocol"]), flatten(result["config"])
    horizon = result.get("horizon") or {}
    # The sampler that was used may differ from the sample.* settings of the checkpoint's config.
    settings = default_settings() | config
    settings |= {f"sample.{key}": protocol[key] for key in SAMPLER if key in protocol}
    compared = {"dataset": config.get("dataset")}
    # Fields have no image size, but a scale.
    if "scale" not in protocol:
        compared["image_size"] = config.get("data.image_size")
    for key, value in protocol.items():
        if key not in (*SAMPLER, *UNCOMPARED):
            compared[key] = value
    # Results of earlier versions have plain numbers in place of {"mean", "se"}, or values of NaN.
    summary = {}
    for name, entry in result["summary"].items():
        entry = entry if isinstance(entry, dict) else {"mean": entry}
        mean = number(entry.get("mean"))
        if math.isfinite(mean):
            summary[name] = (mean, number(entry.get("se")))
    curves = {}
    for name, values in horizon.items():
        if isinstance(values, list):
            curves[name] = np.array([number(value) for value in values])
    return Run(
        folder,
        protocol=compared,
        settings={key: value for key, value in settings.items() if not IGNORED.match(key)},
        seed=config.get("train.seed"),
        summary=summary,
        horizon=curves,
        checkpoint=str(protocol.get("checkpoint") or ""),
        fps=number(protocol.get("fps")),
        time=time,
    )


def same_clips(a: Run, b: Run) -> bool:
    """Whether two runs were measured on the same clips: the score of repeating the last frame
    depends on the clips only.
    """
    for name in ("mse_repeat_last", "psnr_repeat_last", "crps_repeat_last"):
        if name in a.horizon and name in b.horizon:
            x, y = a.horizon[name], b.horizon[name]
            return x.shape == y.shape and np.allclose(x, y, rtol=1e-4, atol=1e-9, equal_nan=True)
    return True


def tabulate(runs: list[Run]) -> tuple[list[Table], list[str]]:
    """Group runs into one table per protocol and set of clips -> (tables, warnings)."""
    # {protocol: groups of runs on the same clips}
    by_protocol: dict[str, list[list[Run]]] = {}
    for run in runs:
        groups = by_protocol.setdefault(canonical(run.protocol), [])
        for group in groups:
            if same_clips(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    tables, warnings = [], []
    # Tables of the same protocol on different clips are numbered, so that their headings differ.
    for groups in by_protocol.values():
        for k, group in enumerate(groups, 1):
            clip_set = {"clip_set": k} if len(groups) > 1 else {}
            methods, found = group_methods(group)
            tables.append(Table(group[0].protocol | clip_set, methods))
            warnings += found
    return tables, warnings


def warn_of_different_protocols(tables: list[Table]) -> list[str]:
    """Return a warning if the protocols of the tables differ, else an empty list."""
    fields = []
    for key, values in find_differing([table.protocol for table in tables]).items():
        fields.append(f"{key} ({', '.join(values)})")
    if not fields:
        return []
    return [
        f"the protocols of the results differ in {'; '.join(fields)}: {len(tables)} tables, whose "
        "numbers cannot be compared with each other"
    ]


def group_methods(runs: list[Run]) -> tuple[list[Method], list[str]]:
    """Group runs of one protocol into methods -> (methods, warnings).

    Of several results with the same settings and seed, only the latest is kept.
    """
    # {settings: {seed: run}}; later runs overwrite earlier ones.
    groups: dict[str, dict[str, Run]] = {}
    warnings = []
    for run in sorted(runs, key=lambda run: run.time):
        seeds = groups.setdefault(canonical(run.settings), {})
        if (older := seeds.get(canonical(run.seed))) is not None:
            warnings.append(
                f"{older.folder} has the same settings as {run.folder}, which is later and "
                "replaces it"
            )
        seeds[canonical(run.seed)] = run
    methods = []
    for seeds in groups.values():
        methods.append(Method([seeds[seed] for seed in sorted(seeds, key=natural)]))
    name_methods(methods)
    for method in methods:
        # Seeds are meant to be those of trainings. If only the sampling seed differs, the error is
        # too small.
        checkpoints = [run.checkpoint for run in method.runs]
        if all(checkpoints) and len(set(checkpoints)) < len(checkpoints):
            warnings.append(
                f"{method.automatic}: several seeds of one checkpoint ({checkpoints[0]}), so the "
                "standard error is over samplings, not over trainings"
            )
    return sorted(methods, key=lambda method: natural(method.automatic)), warnings


def natural(text: str) -> list:
    """A sort key that sorts steps=5 before steps=10."""
    key = []
    for part in re.split(r"(\d+(?:\.\d+)?)", text):
        if part:
            is_number = re.fullmatch(r"[\d.]*\d", part)
            key.append((float(part), "") if is_number else (math.inf, part))
    return key


# -------------------------------------------------------------------------------------------- names
def format_value(value: Any) -> str:
    """Format a value as text; floats without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def find_differing(fields: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Find the fields whose values differ between the dicts -> {field: its distinct values}."""
    differing = {}
    for key in dict.fromkeys(key for own in fields for key in own):
        values = dict.fromkeys(canonical(own.get(key)) for own in fields)
        if len(values) > 1:
            differing[key] = [format_value(json.loads(value)) for value in values]
    return differing


def shorten(key: str, keys: Iterable[str]) -> str:
    """Drop the group from a setting's name if the rest is unambiguous: sample.steps -> steps."""
    last = key.split(".")[-1]
    rivals = [other for other in keys if other != key and other.split(".")[-1] == last]
    clear = key.startswith("sample.") or not rivals and f"sample.{last}" not in default_settings()
    return last if clear else key


def name_methods(methods: list[Method]) -> None:
    """Name each method by its interpolant. If several methods share the interpolant, add a few
    settings that distinguish them, chosen greedily.
    """
    groups = ("flow", "sample", "model", "train")
    # Methods with different interpolants have different names already, so each interpolant's
    # methods are named on their own.
    kinds: dict[str, list[Method]] = {}
    for method in methods:
        kinds.setdefault(str(method.settings.get("flow.interpolant")), []).append(method)
    for kind, own in kinds.items():
        differing = list(find_differing([method.settings for method in own]))
        # Ties are broken by the order of the groups.
        ranks = {group: rank for rank, group in enumerate(groups)}
        differing.sort(key=lambda key: ranks.get(key.split(".")[0], len(groups)))

        def distinguished(keys: list[str], own: list[Method] = own) -> int:
            """How many different names the settings `keys` give."""
            names = set()
            for method in own:
                names.add(tuple(canonical(method.settings.get(key)) for key in keys))
            return len(names)

        chosen: list[str] = []
        while distinguished(chosen) < len(own):
            chosen.append(max(differing, key=lambda key: distinguished([*chosen, key])))
        for method in own:
            parts = [
                f"{shorten(key, differing)}={format_value(method.settings.get(key))}"
                for key in chosen
            ]
            method.automatic = ", ".join([kind, *parts])
            method.named = {"flow.interpolant", *chosen}


def rename(tables: list[Table], pairs: list[str], only: bool = False) -> list[Table]:
    """Give methods nicknames by pairs OLD=NEW, and sort them in the order of the pairs.

    OLD is the automatic name of a method, or the start of automatic names up to a comma. only: drop
    the methods without a nickname. UserError if a pair names no method, or if two methods of a
    table get the same name.
    """
    order: dict[int, int] = {}
    methods = [method for table in tables for method in table.methods]
    for rank, pair in enumerate(pairs):
        old, new, found = match_pair(pair, methods)
        for method in found:
            method.nickname = new + method.automatic[len(old) :]
            order[id(method)] = rank
    # Methods without a nickname keep their order, after those with one.
    for table in tables:
        table.methods.sort(key=lambda method: order.get(id(method), len(pairs)))
        if only:
            table.methods = [method for method in table.methods if id(method) in order]
        names = [method.name for method in table.methods]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"--nicknames gives two methods of a table the name {twice[0]}; choose different "
                "names"
            )
    return [table for table in tables if table.methods]


def match_pair(pair: str, methods: list[Method]) -> tuple[str, str, list[Method]]:
    """Split OLD=NEW, where OLD may contain `=` -> (old, new, the methods called OLD)."""
    cuts = [(pair[:k], pair[k + 1 :].strip()) for k, sign in enumerate(pair) if sign == "="]
    # Prefer whole names to starts of names, and among these the longest OLD.
    for whole in (True, False):
        for old, new in reversed(cuts):
            found = []
            for method in methods:
                name = method.automatic
                if name == old if whole else name.startswith(old + ","):
                    found.append(method)
            if new and found:
                return old, new, found
    known = list(dict.fromkeys(method.automatic for method in methods))
    close = difflib.get_close_matches(pair.split("=")[0], known, 1, cutoff=0)
    raise UserError(
        f"--nicknames {pair}: no method has that name; write OLD=NEW; nearest OLD: {close[0]} "
        f"(all: {'; '.join(known)})"
    )


def list_differences(table: Table) -> dict[str, list[str]]:
    """List the settings in which the methods differ -> {setting: its value in each method}."""
    keys = find_differing([method.settings for method in table.methods])
    values = {}
    for key in keys:
        values[shorten(key, keys)] = [
            format_value(method.settings.get(key)) for method in table.methods
        ]
    return values


def list_unnamed(table: Table) -> list[str]:
    """List the settings in which the methods differ but that their names do not state."""
    keys = find_differing([method.settings for method in table.methods])
    found = []
    for key in keys:
        if not all(key in method.named for method in table.methods):
            found.append(shorten(key, keys))
    return found
