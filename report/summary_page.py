"""The page of a summary: a static index.html without scripts, for a phone too."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from report.methods import Table, differences
from report.style import ARROWS
from report.tables import Cell, direction, heading, label, notes, rows

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --faint: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
.wide { display: block; overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
tbody tr:hover { background: var(--soft); }
.baseline td, .note, small { color: var(--faint); }
img, video { display: block; margin: 0 auto; background: #fff; border-radius: 4px; }
video { max-width: 100%; max-height: 90vh; } img { width: 100%; } img.many { min-width: 48rem; } img.few { max-width: 48rem; }
summary { cursor: pointer; margin: 1rem 0 .5rem; font-weight: 600; }
"""
FILES = ("index.html", "forecasts.mp4", "forecasts.gif", "contact_sheet.png", "metrics.json")


def link(target: str, text: str) -> str:
    return f'<a href="{escape(quote(target))}">{escape(text)}</a>'


def grid(head: list[str], body: list[str]) -> str:
    """Cells of `head` and rows of `body` are HTML already."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f'<div class="wide"><table><thead><tr>{cells}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def line(cells: list[str], kind: str = "") -> str:
    return (
        f"<tr{f' class={kind}' if kind else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def written(cell: Cell) -> str:
    text = f"{cell.mean} ± {cell.se}" if cell.se else cell.mean or "–"
    text = f"<b>{text}</b>" if cell.best else text
    return text + cell.mark + f" <small>({cell.n})</small>" * bool(cell.n)


def section(
    table: Table, metrics: list[str], pictures: dict[str, str], out: Path, number: int
) -> str:
    """One table with all that belongs to it. pictures: {kind: file name}."""
    head = [
        "method",
        "seeds",
        *(escape(label(metric)) + ARROWS[direction(metric)] for metric in metrics),
    ]
    body = [
        line(
            [escape(row.name), row.seeds, *map(written, row.cells)],
            "baseline" if row.baseline else "",
        )
        for row in rows(table, metrics)
    ]
    parts = [
        f'<h2 id="table-{number}">{escape(heading(table.protocol))}</h2>',
        grid(head, body),
        *(f'<p class="note">{escape(note)}</p>' for note in notes(table, metrics)),
    ]
    if "mosaic" in pictures:
        file = quote(pictures["mosaic"])
        video = f'<video src="{file}" controls autoplay loop muted playsinline></video>'
        parts += [
            f'<img src="{file}" alt="forecasts side by side">' if file.endswith(".gif") else video,
            '<p class="note">Each row is a clip, in the columns the truth and one forecast of each method. Green edge: '
            "given frames; orange edge: forecast.</p>",
        ]
    for kind, text in (
        ("summary", "every metric, a point per method"),
        ("horizon", "metrics over the predicted frames"),
    ):
        if kind in pictures:
            file = quote(pictures[kind])
            size = "many" if len(metrics) > 2 else "few"
            parts.append(
                f'<a class="wide" href="{file}"><img class="{size}" src="{file}" alt="{text}" loading="lazy"></a>'
            )
    if settings := differences(table):
        body = [line([escape(key), *map(escape, values)]) for key, values in settings.items()]
        parts.append(
            "<details open><summary>What sets the methods apart</summary>"
            + grid(["setting", *(escape(method.name) for method in table.methods)], body)
            + "</details>"
        )
    return "\n".join([*parts, runs_of(table, metrics, out)])


def runs_of(table: Table, metrics: list[str], out: Path) -> str:
    """Every run with links to what it wrote, relative to the summary's folder."""
    body = []
    for method in table.methods:
        for run in method.runs:
            folder = Path(os.path.relpath(run.folder.resolve(), out.resolve())).as_posix()
            there = [
                link(f"{folder}/{name}", name) for name in FILES if (run.folder / name).is_file()
            ]
            values = [
                f"{run.summary[metric][0]:.4g}" if metric in run.summary else "–"
                for metric in metrics
            ]
            body.append(
                line(
                    [
                        escape(method.name),
                        escape(str(run.seed)),
                        *values,
                        link(folder + "/", "folder"),
                        " · ".join(there),
                    ]
                )
            )
    return (
        "<details><summary>Runs</summary>"
        + grid(
            ["method", "seed", *(escape(label(metric)) for metric in metrics), "", "files"], body
        )
        + "</details>"
    )


def page(
    name: str, sections: list[str], tables: list[Table], warnings: list[str], files: list[str]
) -> str:
    runs = sum(len(method.runs) for table in tables for method in table.methods)
    methods = sum(len(table.methods) for table in tables)
    told = f"{runs} runs, {methods} methods" + f", {len(tables)} tables" * (len(tables) > 1)
    contents = [
        f'<li><a href="#table-{k}">{escape(heading(table.protocol))}</a></li>'
        for k, table in enumerate(tables, 1)
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(name)}</h1>",
            f'<p class="note">{told}. As text: {", ".join(link(file, file) for file in files)}</p>',
            *(f'<p class="note">{escape(warning)}</p>' for warning in warnings),
            f"<ol>{''.join(contents)}</ol>" if len(tables) > 1 else "",
            *sections,
            "</body>\n</html>\n",
        ]
    )
