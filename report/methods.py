"""Runs that differ in nothing but their seed are one method, and methods measured in the same way
are one table.
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

# the protocol's fields that are a choice of the method and not a condition of the comparison, and
# those that are neither
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
    "updates",
)
MEASURED = ("checkpoint", "network_evaluations_per_frame", "fps", "source", "metrics")
# settings that leave the outcome as it is, are told by the protocol, or name a place
APART = re.compile(
    r"(output|wandb|latent)\.|dataset$|vqvae\.ckpt$|"
    r"data\.(root|workers|skip_bad|condition|predict|skip|image_size)$|"
    r"train\.(seed|log_every|sample_every|save_every|keep|keep_every|max_bad_steps)$|"
    r"sample\.(num_videos|num_samples|split|format|batch)$"
)


# --------------------------------------------------------------------------------- runs and methods
@dataclass
class Run:
    folder: Path
    protocol: dict[str, Any]  # what must agree in a table
    settings: dict[str, Any]  # what makes a method, the seed apart
    seed: Any
    summary: dict[
        str, tuple[float, float]
    ]  # {metric: (mean, standard error over videos, or NaN)}; only finite means
    horizon: dict[str, np.ndarray]  # {metric: (T,)}, NaN where nothing was measured
    checkpoint: str = ""
    fps: float = 10.0
    time: float = 0.0  # when it was written


class Score(NamedTuple):
    mean: float
    se: float
    n: int  # runs that have it
    over: str  # what the standard error is over: seeds, videos, or nothing


@dataclass
class Method:
    runs: list[Run]  # one per seed
    automatic: str = ""  # name, from what sets it apart
    nickname: str = ""
    named: set[str] = field(default_factory=set)  # the settings told by its name

    @property
    def name(self) -> str:
        return self.nickname or self.automatic

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def score(self, metric: str) -> Score:
        """Over the seeds that have it; of a single one with its standard error over videos."""
        got = [run.summary[metric] for run in self.runs if metric in run.summary]
        if len(got) <= 1:
            mean, se = got[0] if got else (math.nan, math.nan)
            return Score(mean, se, len(got), "videos" if math.isfinite(se) else "")
        means = np.array([mean for mean, _ in got])
        return Score(
            float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means))), len(means), "seeds"
        )

    def horizon(self, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(mean (T,), standard error over seeds (T,), NaN of one seed)."""
        rows = [run.horizon[metric] for run in self.runs if metric in run.horizon]
        rows = np.array([row for row in rows if len(row) == len(rows[0])])
        if not rows.size or np.isnan(rows).all():
            return None
        n = len(rows)
        return rows.mean(0), rows.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(
            rows.shape[1], np.nan
        )


@dataclass
class Table:
    protocol: dict[str, Any]
    methods: list[Method]


def number(value: Any) -> float:
    """NaN for what is no finite number."""
    usable = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    return float(value) if usable else math.nan


def flat(nested: dict, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out.update(
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return out


def canonical(value: Any) -> str:
    return json.dumps(float(value) if type(value) is int else value, sort_keys=True)


@functools.cache
def usual_settings() -> dict[str, Any]:
    """{group.field: default}: what a result from before a setting existed was made with."""
    groups = {
        name: kind
        for name, kind in get_type_hints(configs.Config).items()
        if dataclasses.is_dataclass(kind)
    }
    return {
        f"{group}.{f.name}": f.default
        for group, kind in groups.items()
        for f in dataclasses.fields(kind)
    }


def run_of(result: Any, folder: Path, time: float = 0.0) -> Run:
    """A metrics.json as read -> the run; a ValueError says what is wrong with it."""
    if missing := missing_part(result, ("protocol", "config", "summary")):
        raise ValueError(f"holds no `{missing}`")
    protocol, config = flat(result["protocol"]), flat(result["config"])
    horizon = result.get("horizon") or {}
    settings = {
        **usual_settings(),
        **config,
        **{f"sample.{key}": protocol[key] for key in SAMPLER if key in protocol},
    }
    asked = {
        "dataset": config.get("dataset"),
        "image_size": config.get("data.image_size"),
        **{key: value for key, value in protocol.items() if key not in (*SAMPLER, *MEASURED)},
    }
    entries = {
        name: value if isinstance(value, dict) else {"mean": value}
        for name, value in result["summary"].items()
    }
    scores = {
        name: (number(entry.get("mean")), number(entry.get("se")))
        for name, entry in entries.items()
    }
    curves = {
        name: np.array([number(v) for v in values])
        for name, values in horizon.items()
        if isinstance(values, list)
    }
    return Run(
        folder,
        asked,
        {key: value for key, value in settings.items() if not APART.match(key)},
        config.get("train.seed"),
        {name: score for name, score in scores.items() if math.isfinite(score[0])},
        curves,
        str(protocol.get("checkpoint") or ""),
        number(protocol.get("fps")),
        time,
    )


def same_clips(a: Run, b: Run) -> bool:
    """Repeating the last frame scores the same on the same clips and on no others."""
    for name in ("mse_repeat_last", "psnr_repeat_last", "crps_repeat_last"):
        if name in a.horizon and name in b.horizon:
            x, y = a.horizon[name], b.horizon[name]
            return x.shape == y.shape and np.allclose(x, y, rtol=1e-4, atol=1e-9, equal_nan=True)
    return True


def tabulate(runs: list[Run]) -> tuple[list[Table], list[str]]:
    """-> a table per protocol, its methods named by what sets them apart; and what a person should
    be warned of.
    """
    groups: list[list[Run]] = []
    for run in runs:
        home = next(
            (
                group
                for group in groups
                if canonical(group[0].protocol) == canonical(run.protocol)
                and same_clips(group[0], run)
            ),
            None,
        )
        home.append(run) if home is not None else groups.append([run])
    tables, warnings = [], []
    for k, group in enumerate(groups):
        twins = [
            j
            for j, other in enumerate(groups)
            if canonical(other[0].protocol) == canonical(group[0].protocol)
        ]
        protocol = {
            **group[0].protocol,
            **({"clip_set": twins.index(k) + 1} if len(twins) > 1 else {}),
        }
        methods, told = methods_of(group)
        tables.append(Table(protocol, methods))
        warnings += told
    return tables, warnings


def differing(tables: list[Table]) -> list[str]:
    """A warning of protocols that do not agree."""
    fields = [
        f"{key} ({', '.join(values)})"
        for key, values in spread([table.protocol for table in tables]).items()
    ]
    return (
        [
            f"the results' protocols differ in {'; '.join(fields)}: {len(tables)} tables, not to "
            f"be compared with one "
            "another"
        ]
        if fields
        else []
    )


def methods_of(runs: list[Run]) -> tuple[list[Method], list[str]]:
    """Runs of one protocol -> (methods, warnings); of two results with one seed the later is
    taken.
    """
    groups: dict[str, dict[str, Run]] = {}
    warnings = []
    for run in sorted(runs, key=lambda run: run.time):
        seeds = groups.setdefault(canonical(run.settings), {})
        if (older := seeds.get(canonical(run.seed))) is not None:
            warnings.append(
                f"{older.folder} differs in no setting from {run.folder}, which is later and "
                f"taken in its place"
            )
        seeds[canonical(run.seed)] = run
    methods = [
        Method([seeds[seed] for seed in sorted(seeds, key=natural)]) for seeds in groups.values()
    ]
    name(methods)
    for method in methods:
        if len(method.runs) > len({run.checkpoint for run in method.runs}) and all(
            run.checkpoint for run in method.runs
        ):
            warnings.append(
                f"{method.automatic}: several seeds of one checkpoint "
                f"({method.runs[0].checkpoint}), so that the "
                "standard error is over samplings of it and not over trainings"
            )
    return sorted(methods, key=lambda method: natural(method.automatic)), warnings


def natural(text: str) -> list:
    """Sorts steps=5 before steps=10."""
    return [
        (float(part), "") if re.fullmatch(r"[\d.]*\d", part) else (math.inf, part)
        for part in re.split(r"(\d+(?:\.\d+)?)", text)
        if part
    ]


# -------------------------------------------------------------------------------------------- names
def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread(fields: list[dict[str, Any]]) -> dict[str, list[str]]:
    """{field: its different values} of those that are not the same in all."""
    keys = dict.fromkeys(key for own in fields for key in own)
    values = {key: list(dict.fromkeys(canonical(own.get(key)) for own in fields)) for key in keys}
    return {
        key: [shown(json.loads(value)) for value in own]
        for key, own in values.items()
        if len(own) > 1
    }


def short(key: str, keys: Iterable[str]) -> str:
    """`sample.steps` is steps; of other fields, the group is left out where that leaves no
    doubt.
    """
    last = key.split(".")[-1]
    rivals = [other for other in keys if other != key and other.split(".")[-1] == last]
    clear = key.startswith("sample.") or not rivals and f"sample.{last}" not in usual_settings()
    return last if clear else key


def name(methods: list[Method]) -> None:
    """The interpolant, and of those that share it the fewest settings that tell them apart, found
    greedily.
    """
    kinds: dict[str, list[Method]] = {}
    for method in methods:
        kinds.setdefault(str(method.settings.get("flow.interpolant")), []).append(method)
    for kind, own in kinds.items():
        differing, chosen = list(spread([method.settings for method in own])), []
        differing.sort(
            key=lambda key: (
                ("flow.", "sample.", "model.", "train.").index(prefix)
                if (prefix := key.split(".")[0] + ".") in ("flow.", "sample.", "model.", "train.")
                else 4
            )
        )

        def told(method: Method, keys: list[str]) -> tuple[str, ...]:
            return tuple(canonical(method.settings.get(key)) for key in keys)

        while len({told(method, chosen) for method in own}) < len(own):
            chosen.append(
                max(
                    differing, key=lambda key: len({told(method, [*chosen, key]) for method in own})
                )
            )
        for method in own:
            parts = [f"{short(key, differing)}={shown(method.settings.get(key))}" for key in chosen]
            method.automatic, method.named = (
                ", ".join([kind, *parts]),
                {"flow.interpolant", *chosen},
            )


def rename(tables: list[Table], pairs: list[str], only: bool = False) -> list[Table]:
    """OLD=NEW renames and puts in that order what is called OLD, or begins with it; `only` leaves
    the rest out.
    """
    order: dict[int, int] = {}
    methods = [method for table in tables for method in table.methods]
    for rank, pair in enumerate(pairs):
        cuts = [(pair[:at], pair[at + 1 :].strip()) for at in range(len(pair)) if pair[at] == "="]
        exact = [
            (old, new, [m for m in methods if m.automatic == old]) for old, new in reversed(cuts)
        ]
        begun = [
            (old, new, [m for m in methods if m.automatic.startswith(old + ",")])
            for old, new in reversed(cuts)
        ]
        hits = [hit for hit in (*exact, *begun) if hit[1] and hit[2]]
        if not hits:
            known = list(dict.fromkeys(m.automatic for m in methods))
            close = difflib.get_close_matches(pair.split("=")[0], known, 1, cutoff=0)
            raise UserError(
                f"--nicknames {pair}: no method of that name; give OLD=NEW, OLD nearest: "
                f"{close[0]} "
                f"(all: {'; '.join(known)})"
            )
        old, new, found = hits[0]
        for method in found:
            method.nickname, order[id(method)] = new + method.automatic[len(old) :], rank
    for table in tables:
        table.methods.sort(key=lambda method: order.get(id(method), len(pairs)))
        if only:
            table.methods = [method for method in table.methods if id(method) in order]
        names = [method.name for method in table.methods]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"--nicknames gives two methods of one table the name {twice[0]}; name them apart"
            )
    return [table for table in tables if table.methods]


def differences(table: Table) -> dict[str, list[str]]:
    """{setting: its value in each method} of those in which the methods differ."""
    keys = spread([method.settings for method in table.methods])
    return {
        short(key, keys): [shown(method.settings.get(key)) for method in table.methods]
        for key in keys
    }


def untold(table: Table) -> list[str]:
    """Settings in which the methods differ without their names saying so."""
    keys = spread([method.settings for method in table.methods])
    return [
        short(key, keys) for key in keys if not all(key in method.named for method in table.methods)
    ]
