"""The page that summarizes many runs: a static index.html without scripts."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from report.html import document, grid, link, row
from report.methods import Table, list_differences
from report.style import ARROWS
from report.tables import Cell, direction, heading, label, notes, rows

FILES = ("index.html", "forecasts.mp4", "forecasts.gif", "contact_sheet.png", "metrics.json")


def write_cell(cell: Cell) -> str:
    """A cell of the table, as HTML."""
    text = f"{cell.mean} ± {cell.se}" if cell.se else cell.mean or "–"
    text = f"<b>{text}</b>" if cell.best else text
    count = f" <small>({cell.n})</small>" if cell.n else ""
    return text + cell.mark + count


def section(
    table: Table, metrics: list[str], pictures: dict[str, str], out: Path, number: int
) -> str:
    """The part of the page about one table: the table, its notes, pictures, settings and runs.

    pictures: {kind: file name}. out: the folder of the page. number: number of the table, from 1.
    """
    head = ["method", "seeds"]
    head += [escape(label(metric)) + ARROWS[direction(metric)] for metric in metrics]
    body = []
    for own in rows(table, metrics):
        kind = "baseline" if own.baseline else ""
        body.append(row(escape(own.name), [own.seeds, *map(write_cell, own.cells)], kind))
    parts = [
        f'<h2 id="table-{number}">{escape(heading(table.protocol))}</h2>',
        grid(head, body, heading(table.protocol)),
    ]
    parts += [f'<p class="soft">{escape(note)}</p>' for note in notes(table, metrics)]
    parts += figures(pictures, "many" if len(metrics) > 2 else "few")
    # The names state some of the differing settings only, so the page lists all of them.
    settings = list_differences(table)
    if settings:
        head = ["setting", *(escape(method.name) for method in table.methods)]
        body = []
        for key, values in settings.items():
            body.append(row(escape(key), [escape(value) for value in values]))
        text = grid(head, body, "Settings")
        parts.append(f"<details open><summary>Settings that differ</summary>{text}</details>")
    return "\n".join([*parts, runs_of(table, metrics, out)])


def figures(pictures: dict[str, str], size: str) -> list[str]:
    """The mosaic and the plots of a table, as HTML. size: a class of page.css."""
    parts = []
    # A GIF is an image, which plays by itself; an MP4 needs a player.
    if "mosaic" in pictures:
        file = quote(pictures["mosaic"])
        if file.endswith(".gif"):
            parts.append(f'<img class="figure" src="{file}" alt="forecasts side by side">')
        else:
            controls = "controls autoplay loop muted playsinline"
            parts.append(f'<video class="figure" src="{file}" {controls}></video>')
        parts.append(
            '<p class="soft">A row per clip; the columns are the truth and one forecast of each '
            "method. Green edge: given frames; orange edge: forecast.</p>"
        )
    for kind, text in (
        ("summary", "every metric, a point per method"),
        ("horizon", "metrics over the predicted frames"),
    ):
        if kind in pictures:
            file = quote(pictures[kind])
            parts.append(
                f'<a class="scroll figure" href="{file}"><img class="{size}" src="{file}" '
                f'alt="{text}" loading="lazy"></a>'
            )
    return parts


def runs_of(table: Table, metrics: list[str], out: Path) -> str:
    """A table of all runs with links to their files, relative to the folder of the page."""
    body = []
    for method in table.methods:
        for run in method.runs:
            folder = Path(os.path.relpath(run.folder.resolve(), out.resolve())).as_posix()
            cells = [escape(str(run.seed))]
            for metric in metrics:
                known = metric in run.summary
                cells.append(f"{run.summary[metric][0]:.4g}" if known else "–")
            cells.append(link(folder + "/", "folder"))
            files = [name for name in FILES if (run.folder / name).is_file()]
            cells.append(" · ".join(link(f"{folder}/{name}", name) for name in files))
            body.append(row(escape(method.name), cells))
    head = ["method", "seed", *(escape(label(metric)) for metric in metrics), "", "files"]
    return f"<details><summary>Runs</summary>{grid(head, body, 'Runs')}</details>"


def page(
    name: str, sections: list[str], tables: list[Table], warnings: list[str], files: list[str]
) -> str:
    """The whole page. sections: one per table. files: names of the files with the same numbers."""
    runs = sum(len(method.runs) for table in tables for method in table.methods)
    methods = sum(len(table.methods) for table in tables)
    counts = f"{runs} runs, {methods} methods"
    contents = []
    if len(tables) > 1:
        counts += f", {len(tables)} tables"
        for k, table in enumerate(tables, 1):
            contents.append(f'<li><a href="#table-{k}">{escape(heading(table.protocol))}</a></li>')
    listed = ", ".join(link(file, file) for file in files)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{counts}. As text: {listed}</p>',
        *(f'<p class="soft">{escape(warning)}</p>' for warning in warnings),
    ]
    if contents:
        parts.append(f"<ol>{''.join(contents)}</ol>")
    return document(name, "\n".join([*parts, *sections]), "folder")
