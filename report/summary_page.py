"""The page of a summary: a static index.html without scripts, for a phone too."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from report.html import document, grid, link, row
from report.methods import Table, differences
from report.style import ARROWS
from report.tables import Cell, direction, heading, label, notes, rows

FILES = ("index.html", "forecasts.mp4", "forecasts.gif", "contact_sheet.png", "metrics.json")


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
        row(
            escape(own.name),
            [own.seeds, *map(written, own.cells)],
            "baseline" if own.baseline else "",
        )
        for own in rows(table, metrics)
    ]
    parts = [
        f'<h2 id="table-{number}">{escape(heading(table.protocol))}</h2>',
        grid(head, body, heading(table.protocol)),
        *(f'<p class="soft">{escape(note)}</p>' for note in notes(table, metrics)),
    ]
    if "mosaic" in pictures:
        file = quote(pictures["mosaic"])
        video = (
            f'<video class="figure" src="{file}" controls autoplay loop muted playsinline></video>'
        )
        parts += [
            f'<img class="figure" src="{file}" alt="forecasts side by side">'
            if file.endswith(".gif")
            else video,
            '<p class="soft">Each row is a clip, in the columns the truth and one forecast of '
            "each method. Green edge: "
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
                f'<a class="scroll figure" href="{file}"><img class="{size}" src="{file}" '
                f'alt="{text}" loading="lazy"></a>'
            )
    if settings := differences(table):
        body = [
            row(escape(key), [escape(value) for value in values])
            for key, values in settings.items()
        ]
        parts.append(
            "<details open><summary>What sets the methods apart</summary>"
            + grid(
                ["setting", *(escape(method.name) for method in table.methods)], body, "Settings"
            )
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
            cells = [
                escape(str(run.seed)),
                *values,
                link(folder + "/", "folder"),
                " · ".join(there),
            ]
            body.append(row(escape(method.name), cells))
    head = ["method", "seed", *(escape(label(metric)) for metric in metrics), "", "files"]
    return f"<details><summary>Runs</summary>{grid(head, body, 'Runs')}</details>"


def page(
    name: str, sections: list[str], tables: list[Table], warnings: list[str], files: list[str]
) -> str:
    runs = sum(len(method.runs) for table in tables for method in table.methods)
    methods = sum(len(table.methods) for table in tables)
    counts = f"{runs} runs, {methods} methods" + f", {len(tables)} tables" * (len(tables) > 1)
    contents = [
        f'<li><a href="#table-{k}">{escape(heading(table.protocol))}</a></li>'
        for k, table in enumerate(tables, 1)
    ]
    listed = ", ".join(link(file, file) for file in files)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{counts}. As text: {listed}</p>',
        *(f'<p class="soft">{escape(warning)}</p>' for warning in warnings),
    ]
    if len(tables) > 1:
        parts.append(f"<ol>{''.join(contents)}</ol>")
    return document(name, "\n".join([*parts, *sections]), "folder")
