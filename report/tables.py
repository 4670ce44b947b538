"""A table of methods as Markdown, LaTeX and rows of CSV."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from evaluation.metrics import ABOUT, BASELINES
from report.methods import Method, Score, Table, differences, shown, untold
from report.style import ARROWS
from runtime.console import UserError


class Cell(NamedTuple):
    mean: str  # empty: not measured
    se: str = ""
    best: bool = False
    mark: str = ""  # a dagger: the standard error is over videos
    n: int = 0  # seeds, where the metric has fewer than the method


class Row(NamedTuple):
    name: str
    seeds: str
    cells: list[Cell]
    baseline: bool = False


def label(metric: str) -> str:
    return ABOUT[metric][0] if metric in ABOUT else metric


def direction(metric: str) -> str:
    """Which values are better: lower, higher or one. An unknown metric counts as an error:
    lower.
    """
    return ABOUT[metric][2] if metric in ABOUT else "lower"


def metrics_of(tables: list[Table], wanted: list[str]) -> list[str]:
    """Those asked for, or all that there are, the well-known ones first."""
    there = {
        name
        for table in tables
        for method in table.methods
        for run in method.runs
        for name in run.summary
        if not name.endswith(tuple(BASELINES))
    }
    if missing := [name for name in wanted if name not in there]:
        raise UserError(
            f"--metrics {missing[0]}: in none of the results; those that are: "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    return list(dict.fromkeys(wanted)) or [name for name in ABOUT if name in there] + sorted(
        there - ABOUT.keys()
    )


def measured(table: Table, metrics: list[str]) -> list[str]:
    """Those that a result of this table has."""
    return [metric for metric in metrics if any(method.score(metric).n for method in table.methods)]


def baseline(table: Table, metric: str) -> Score:
    """Of the first run that has it: it is the same for all."""
    got = (
        run.summary[metric]
        for method in table.methods
        for run in method.runs
        if metric in run.summary
    )
    mean, se = next(got, (math.nan, math.nan))
    return Score(mean, se, int(math.isfinite(mean)), "videos" if math.isfinite(se) else "")


def baselines(table: Table, metrics: list[str]) -> dict[str, list[Score]]:
    """{its name: a score per metric} of those measured in any of them."""
    rows = {
        label: [baseline(table, metric + suffix) for metric in metrics]
        for suffix, label in BASELINES.items()
    }
    return {name: scores for name, scores in rows.items() if any(score.n for score in scores)}


def decimals(scores: list[Score]) -> int:
    """Two significant digits of the median standard error; without one, four of the largest
    mean.
    """
    errors = [score.se for score in scores if score.se > 0]
    size = (
        float(np.median(errors))
        if errors
        else max((abs(score.mean) for score in scores if score.n), default=0.0)
    )
    return min(10, max(0, (1 if errors else 3) - math.floor(math.log10(size)))) if size > 0 else 2


def fixed(value: float, digits: int) -> str:
    """Without a minus before a zero; empty for NaN."""
    text = "" if math.isnan(value) else f"{value:.{digits}f}"
    return text.removeprefix("-") if text and float(text) == 0 else text


def best(means: list[str], metric: str) -> list[bool]:
    """Which of these, as they are printed, are best: ties all are."""
    sign = -1 if direction(metric) == "higher" else 1
    loss = [
        math.inf
        if not text
        else round(abs(float(text) - 1), 10)
        if direction(metric) == "one"
        else sign * float(text)
        for text in means
    ]
    return [len(means) > 1 and value < math.inf and value == min(loss) for value in loss]


def column(table: Table, metric: str) -> tuple[list[Cell], int]:
    """A cell per method, and the digits behind the point."""
    scores = [method.score(metric) for method in table.methods]
    digits = decimals(scores)
    means = [fixed(score.mean, digits) for score in scores]
    return [
        Cell(
            mean,
            fixed(score.se, digits),
            top,
            "†" * (score.over == "videos"),
            score.n * (0 < score.n < len(method.runs)),
        )
        for mean, score, top, method in zip(means, scores, best(means, metric), table.methods)
    ], digits


def rows(table: Table, metrics: list[str]) -> list[Row]:
    """Methods, then the baselines: no contestants, so never best."""
    columns = [column(table, metric) for metric in metrics]
    out = [
        Row(method.name, str(len(method.runs)), [cells[k] for cells, _ in columns])
        for k, method in enumerate(table.methods)
    ]
    return out + [
        Row(
            name,
            "",
            [Cell(fixed(score.mean, digits)) for score, (_, digits) in zip(scores, columns)],
            True,
        )
        for name, scores in baselines(table, metrics).items()
    ]


def heading(protocol: dict[str, Any]) -> str:
    """What a table's numbers are of."""
    own, units = (
        dict(protocol),
        {"dataset": "", "videos": " videos", "samples_per_video": " futures each"},
    )
    parts = [f"{own.pop(key)}{unit}" for key, unit in units.items() if own.get(key) is not None]
    if own.get("condition") is not None and own.get("predict") is not None:
        parts.append(f"{own.pop('condition')} → {own.pop('predict')} frames")
    return ", ".join(
        parts
        + [f"{key} {shown(value)}" for key, value in own.items() if value not in (None, 0, "")]
    )


def notes(table: Table, metrics: list[str]) -> list[str]:
    cells = [cell for row in rows(table, metrics) for cell in row.cells]
    own = [method.score(metric).over for method in table.methods for metric in metrics]
    said = ["mean ± standard error over seeds"] if "seeds" in own else []
    said += ["† of one seed, the standard error being over videos"] if "videos" in own else []
    said += ["(n) the seeds that have it"] if any(cell.n for cell in cells) else []
    said += ["bold: best, and what rounds to it"] if any(cell.best for cell in cells) else []
    more = (
        [f"The methods differ in {', '.join(untold(table))} too, which their names do not say."]
        if untold(table)
        else []
    )
    return [f"{said[0][0].upper()}{'; '.join(said)[1:]}."] * bool(said) + more


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown(table: Table, metrics: list[str]) -> str:
    def written(cell: Cell) -> str:
        text = f"{cell.mean} ± {cell.se}" if cell.se else cell.mean or "–"
        return (
            f"**{text}**" * cell.best
            + text * (not cell.best)
            + cell.mark
            + f" ({cell.n})" * bool(cell.n)
        )

    head = [
        "method",
        "seeds",
        *(escape_markdown(label(metric)) + ARROWS[direction(metric)] for metric in metrics),
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [
        [escape_markdown(row.name), row.seeds, *map(written, row.cells)]
        for row in rows(table, metrics)
    ]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join(
        [
            escape_markdown(heading(table.protocol)),
            body,
            *map(escape_markdown, notes(table, metrics)),
        ]
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "→": r"$\to$",
    "†": r"$^\dagger$",
    "±": r"$\pm$",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
}


def escape_latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))


def latex(table: Table, metrics: list[str]) -> str:
    """A booktabs tabular, to be put into a table environment."""
    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "one": r" $\to 1$"}

    def written(cell: Cell) -> str:
        text = rf"{cell.mean} \pm {cell.se}" if cell.se else cell.mean
        text = rf"\mathbf{{{text}}}" if cell.best else text
        return (
            "$" + text + r"^{\dagger}" * bool(cell.mark) + "$" + f" ({cell.n})" * bool(cell.n)
            if text
            else "--"
        )

    own = rows(table, metrics)
    lines = [[escape_latex(row.name), row.seeds, *map(written, row.cells)] for row in own]
    body = [" & ".join(line) + r" \\" for line in lines]
    methods = sum(not row.baseline for row in own)
    body[methods:] = [r"\midrule", *body[methods:]] if methods < len(own) else []
    head = [
        "method",
        "seeds",
        *(escape_latex(label(metric)) + arrows[direction(metric)] for metric in metrics),
    ]
    said = [
        rf"\multicolumn{{{len(head)}}}{{l}}{{\footnotesize {escape_latex(note)}}} \\"
        for note in notes(table, metrics)
    ]
    return "\n".join(
        [
            f"% {' '.join(heading(table.protocol).split())}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            *said,
            r"\end{tabular}",
        ]
    )


def records(tables: list[Table], metrics: list[str]) -> tuple[list[dict], list[dict]]:
    """Rows of CSV: (one per run, one per method or baseline)."""
    of_runs, of_methods = [], []
    for k, table in enumerate(tables, 1):
        settings = differences(table)
        for j, method in enumerate(table.methods):
            who = {"table": k, "method": method.name, "automatic": method.automatic}
            for run in method.runs:
                own = {
                    key: value
                    for key, value in scored(Method([run]), metrics).items()
                    if not key.endswith(("_n", "_over"))
                }
                of_runs.append({**who, "seed": run.seed, "folder": str(run.folder), **own})
            own = {f"setting {key}": values[j] for key, values in settings.items()}
            of_methods.append({**who, "seeds": len(method.runs), **scored(method, metrics), **own})
        for name, scores in baselines(table, metrics).items():
            of_methods.append(
                {
                    "table": k,
                    "method": name,
                    "seeds": 0,
                    **{m: score.mean for m, score in zip(metrics, scores)},
                }
            )
    return of_runs, of_methods


def scored(method: Method, metrics: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for metric in metrics:
        score = method.score(metric)
        out |= {
            metric: score.mean,
            f"{metric}_se": score.se,
            f"{metric}_n": score.n,
            f"{metric}_se_over": score.over,
        }
    return out
