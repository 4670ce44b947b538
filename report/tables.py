"""Write a table of methods as Markdown, as LaTeX and as rows of CSV."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from evaluation.metrics import ABOUT, BASELINES
from report.methods import Method, Score, Table, format_value, list_differences, list_unnamed
from report.style import ARROWS
from runtime.console import UserError


class Cell(NamedTuple):
    mean: str  # empty: not measured
    se: str = ""
    best: bool = False
    mark: str = ""  # a dagger: the standard error is over videos, not over seeds
    n: int = 0  # number of seeds with this metric, if some seeds of the method lack it; else 0


class Row(NamedTuple):
    name: str
    seeds: str
    cells: list[Cell]
    baseline: bool = False


def label(metric: str) -> str:
    return ABOUT[metric][0] if metric in ABOUT else metric


def direction(metric: str) -> str:
    """Which values are better: lower, higher or one. For an unknown metric: lower."""
    return ABOUT[metric][2] if metric in ABOUT else "lower"


def metrics_of(tables: list[Table], wanted: list[str]) -> list[str]:
    """The wanted metrics; if none are named, all metrics of the results, those in ABOUT first.
    UserError if no result has a wanted metric.
    """
    available = set()
    for table in tables:
        for method in table.methods:
            for run in method.runs:
                available |= {name for name in run.summary if not name.endswith(tuple(BASELINES))}
    if missing := [name for name in wanted if name not in available]:
        raise UserError(
            f"--metrics {missing[0]}: in none of the results; they have "
            f"{', '.join(sorted(available)) or 'none'}"
        )
    if wanted:
        return list(dict.fromkeys(wanted))
    return [name for name in ABOUT if name in available] + sorted(available - ABOUT.keys())


def measured_metrics(table: Table, metrics: list[str]) -> list[str]:
    """The metrics that at least one result of this table has."""
    return [metric for metric in metrics if any(method.score(metric).n for method in table.methods)]


def baseline(table: Table, metric: str) -> Score:
    """The score of a baseline, which all runs of a table share: that of the first run with it."""
    mean, se = math.nan, math.nan
    for method in table.methods:
        for run in method.runs:
            if metric in run.summary and math.isnan(mean):
                mean, se = run.summary[metric]
    return Score(mean, se, int(math.isfinite(mean)), "videos" if math.isfinite(se) else "")


def baselines(table: Table, metrics: list[str]) -> dict[str, list[Score]]:
    """{label of the baseline: a score per metric}, without baselines that were not measured."""
    rows = {}
    for suffix, label in BASELINES.items():
        scores = [baseline(table, metric + suffix) for metric in metrics]
        if any(score.n for score in scores):
            rows[label] = scores
    return rows


def decimals(scores: list[Score]) -> int:
    """Number of decimals to print: two significant digits of the median standard error, or four of
    the largest mean if there is no standard error. At most 10.
    """
    errors = [score.se for score in scores if score.se > 0]
    if errors:
        size, digits = float(np.median(errors)), 2
    else:
        size, digits = max((abs(score.mean) for score in scores if score.n), default=0.0), 4
    if size <= 0:
        return 2
    return min(10, max(0, digits - 1 - math.floor(math.log10(size))))


def format_fixed(value: float, digits: int) -> str:
    """Format with a fixed number of decimals, without negative zeros; empty for NaN."""
    text = "" if math.isnan(value) else f"{value:.{digits}f}"
    return text.removeprefix("-") if text and float(text) == 0 else text


def mark_best(means: list[str], metric: str) -> list[bool]:
    """Whether each printed mean is the best one, or rounds to the same text."""
    losses = []
    # Compare the rounded numbers, so that equal printed numbers are marked alike.
    for text in means:
        if not text:
            losses.append(math.inf)
        elif direction(metric) == "one":
            losses.append(round(abs(float(text) - 1), 10))
        else:
            losses.append(-float(text) if direction(metric) == "higher" else float(text))
    return [len(means) > 1 and loss < math.inf and loss == min(losses) for loss in losses]


def column(table: Table, metric: str) -> tuple[list[Cell], int]:
    """The cell of each method in the column of a metric, and the column's number of decimals."""
    scores = [method.score(metric) for method in table.methods]
    digits = decimals(scores)
    means = [format_fixed(score.mean, digits) for score in scores]
    cells = []
    for method, score, mean, top in zip(table.methods, scores, means, mark_best(means, metric)):
        mark = "†" if score.over == "videos" else ""
        n = score.n if score.n < len(method.runs) else 0
        cells.append(Cell(mean, format_fixed(score.se, digits), top, mark, n))
    return cells, digits


def rows(table: Table, metrics: list[str]) -> list[Row]:
    """The rows of the methods, then those of the baselines, which are never marked as best."""
    # Columns first: the number of decimals, and which value is best, depend on the whole column.
    columns = [column(table, metric) for metric in metrics]
    found = []
    for k, method in enumerate(table.methods):
        cells = [cells[k] for cells, _ in columns]
        found.append(Row(method.name, str(len(method.runs)), cells))
    for name, scores in baselines(table, metrics).items():
        cells = []
        for score, (_, digits) in zip(scores, columns):
            cells.append(Cell(format_fixed(score.mean, digits)))
        found.append(Row(name, "", cells, baseline=True))
    return found


def heading(protocol: dict[str, Any]) -> str:
    """Describe the protocol that all numbers of a table share."""
    rest = dict(protocol)
    parts = []
    units = {"dataset": "", "videos": " videos", "samples_per_video": " futures each"}
    for key, unit in units.items():
        if rest.get(key) is not None:
            parts.append(f"{rest.pop(key)}{unit}")
    if rest.get("condition") is not None and rest.get("predict") is not None:
        parts.append(f"{rest.pop('condition')} → {rest.pop('predict')} frames")
    for key, value in rest.items():
        if value not in (None, 0, ""):
            parts.append(f"{key} {format_value(value)}")
    return ", ".join(parts)


def notes(table: Table, metrics: list[str]) -> list[str]:
    """The notes below a table: the meaning of its marks, and settings that the names omit."""
    own_rows = rows(table, metrics)
    over = {method.score(metric).over for method in table.methods for metric in metrics}
    legend = []
    if "seeds" in over:
        legend.append("mean ± standard error over seeds")
    if "videos" in over:
        legend.append("† one seed, standard error over videos")
    if any(cell.n for row in own_rows for cell in row.cells):
        legend.append("(n) number of seeds with this metric")
    if any(cell.best for row in own_rows for cell in row.cells):
        legend.append("bold: best value, and values that round to the same")
    found = []
    if legend:
        text = "; ".join(legend)
        found.append(f"{text[0].upper()}{text[1:]}.")
    # A difference that no name states could be mistaken for one of the methods.
    hidden = list_unnamed(table)
    if hidden:
        found.append(f"The methods also differ in {', '.join(hidden)}, which their names omit.")
    return found


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown(table: Table, metrics: list[str]) -> str:
    """The table in Markdown: heading, table, notes."""

    def write_cell(cell: Cell) -> str:
        text = f"{cell.mean} ± {cell.se}" if cell.se else cell.mean or "–"
        text = f"**{text}**" if cell.best else text
        count = f" ({cell.n})" if cell.n else ""
        return text + cell.mark + count

    head = ["method", "seeds"]
    for metric in metrics:
        head.append(escape_markdown(label(metric)) + ARROWS[direction(metric)])
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows(table, metrics):
        lines.append([escape_markdown(row.name), row.seeds, *map(write_cell, row.cells)])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    below = [escape_markdown(note) for note in notes(table, metrics)]
    return "\n\n".join([escape_markdown(heading(table.protocol)), body, *below])


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
    """The table as a booktabs tabular, for a table environment."""
    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "one": r" $\to 1$"}

    def write_cell(cell: Cell) -> str:
        if not cell.mean:
            return "--"
        text = rf"{cell.mean} \pm {cell.se}" if cell.se else cell.mean
        text = rf"\mathbf{{{text}}}" if cell.best else text
        mark = r"^{\dagger}" if cell.mark else ""
        count = f" ({cell.n})" if cell.n else ""
        return f"${text}{mark}${count}"

    head = ["method", "seeds"]
    for metric in metrics:
        head.append(escape_latex(label(metric)) + arrows[direction(metric)])
    body = []
    for row in rows(table, metrics):
        # A rule separates the methods from the baselines.
        if row.baseline and r"\midrule" not in body:
            body.append(r"\midrule")
        line = [escape_latex(row.name), row.seeds, *map(write_cell, row.cells)]
        body.append(" & ".join(line) + r" \\")
    below = []
    for note in notes(table, metrics):
        text = rf"\footnotesize {escape_latex(note)}"
        below.append(rf"\multicolumn{{{len(head)}}}{{l}}{{{text}}} \\")
    return "\n".join(
        [
            f"% {' '.join(heading(table.protocol).split())}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            *below,
            r"\end{tabular}",
        ]
    )


def records(tables: list[Table], metrics: list[str]) -> tuple[list[dict], list[dict]]:
    """The rows of the CSV files: (one per run, one per method or baseline)."""
    of_runs, of_methods = [], []
    for k, table in enumerate(tables, 1):
        settings = list_differences(table)
        for j, method in enumerate(table.methods):
            # A single run has no error over seeds, so the columns about it are dropped from its
            # row.
            who = {"table": k, "method": method.name, "automatic": method.automatic}
            for run in method.runs:
                own = {}
                for key, value in columns_of(Method([run]), metrics).items():
                    if not key.endswith(("_n", "_over")):
                        own[key] = value
                of_runs.append({**who, "seed": run.seed, "folder": str(run.folder), **own})
            own = columns_of(method, metrics)
            own |= {f"setting {key}": values[j] for key, values in settings.items()}
            of_methods.append({**who, "seeds": len(method.runs), **own})
        for name, scores in baselines(table, metrics).items():
            means = {metric: score.mean for metric, score in zip(metrics, scores)}
            of_methods.append({"table": k, "method": name, "seeds": 0, **means})
    return of_runs, of_methods


def columns_of(method: Method, metrics: list[str]) -> dict[str, Any]:
    """{column: value} of a CSV row: the scores of a method."""
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
