"""Combine results of many runs into tables with standard errors over seeds, plots, and a page.

    python scripts/collect_results.py --runs 'outputs/results/ball_stn-*' --name sweep \\
        --nicknames linear=Linear

The command writes outputs/summarized/<name>/. Runs that differ only in their seed are one method;
a table contains only results of one protocol.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import math
import os
import re
import sys
from pathlib import Path

# Run by path, Python puts scripts/ on sys.path; the imports below need the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import comparison, summary_page, tables, videos
from report.methods import Run, Table, parse_run, rename, tabulate, warn_of_different_protocols
from runtime.console import UserError, progress, run_command
from runtime.folders import replace_folder, restore_folder

# Names of the files that this command writes.
OURS = re.compile(
    r"index\.html|summary\.json|(runs|methods)\.csv|table\.(md|tex)"
    r"|(horizon|summary|mosaic)(-\d+)?\.(png|mp4|gif)"
)


# ----------------------------------------------------------------------------------------- reading
def expand(pattern: str) -> list[Path]:
    """Paths that match a glob. A pattern that is an existing path stands for itself."""
    path = os.path.expanduser(pattern)
    if os.path.exists(path):
        return [Path(path)]
    return [Path(match) for match in sorted(glob.glob(path, recursive=True))]


def metrics_files(patterns: list[str]) -> list[Path]:
    """Find all metrics.json files in the given globs, folders and files, without duplicates."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        candidates = []
        for path in expand(pattern):
            candidates += sorted(path.rglob("metrics.json")) if path.is_dir() else [path]
        files = []
        for file in candidates:
            # A folder that is still being written ends in .partial.
            incomplete = re.search(r"\.partial(/|\\)", str(file))
            if file.name == "metrics.json" and not incomplete:
                files.append(file)
        if not files:
            raise UserError(
                f"--runs {pattern}: no metrics.json there; "
                "name folders that sample.py or main.py wrote, such as 'outputs/results/*'"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return sorted(found.values())


def read_run(file: Path) -> Run:
    """Read one metrics.json; raise UserError if it is damaged or not a result."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return parse_run(content, file.parent, file.stat().st_mtime)
    except (ValueError, RecursionError) as error:
        # A plain ValueError is from parse_run, with a message for the user; a subclass is from the
        # parser.
        if type(error) is ValueError:
            why = str(error)
        else:
            why = f"cannot be read ({str(error).splitlines()[0]})"
        raise UserError(
            f"{file} {why}: damaged, or no result; run sample.py again or leave the file out"
        ) from None


def read_all(files: list[Path]) -> list[Run]:
    runs = []
    with progress(len(files), "read results", "file") as bar:
        for file in files:
            runs.append(read_run(file))
            bar.update()
    return runs


# ----------------------------------------------------------------------------------------- writing
def folder_of(root: str, name: str) -> Path:
    """Return <root>/summarized/<name>; raise UserError if it holds files of something else."""
    if not re.fullmatch(r"\w[\w.+ -]*", name) or name.endswith(".partial"):
        raise UserError(
            f"--name {name!r} is not the name of a folder; use letters, digits, -, _ and ."
        )
    out = Path(root) / "summarized" / name
    restore_folder(out)
    if out.exists() and not is_ours(out):
        raise UserError(
            f"{out} exists and holds files that are not of a summary; choose another --name"
        )
    return out


def is_ours(folder: Path) -> bool:
    """Whether a folder is empty or contains only files that this command writes."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or "summary.json" in names and all(OURS.fullmatch(name) for name in names)


def without_nan(value):
    """Replace NaN and infinity, which JSON does not have, by None; dictionaries recursively."""
    if isinstance(value, dict):
        return {key: without_nan(own) for key, own in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, records: list[dict]) -> None:
    """Write one row per record; the columns are the union of the records' keys."""
    fields = dict.fromkeys(key for record in records for key in record)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fields), restval="")
        writer.writeheader()
        for record in records:
            row = without_nan(record)
            writer.writerow({key: "" if value is None else value for key, value in row.items()})


def write_pictures(
    found: list[Table], shown: list[list[str]], folder: Path, clips: int
) -> tuple[list[dict[str, str]], list[str]]:
    """Draw the plots and the mosaic of each table.

    shown: the metrics of each table. Returns ({kind: file name} per table, notes on what was left
    out).
    """
    pictures: list[dict[str, str]] = []
    notes = []
    with progress(3 * len(found), "draw", "picture") as bar:
        for k, (table, metrics) in enumerate(zip(found, shown), 1):
            # Only several tables need numbered files.
            ending = f"-{k}" if len(found) > 1 else ""
            files = {"summary": f"summary{ending}.png"}
            comparison.summary_plot(table, metrics, folder / files["summary"])
            bar.update()
            if comparison.horizon_plot(table, metrics, folder / f"horizon{ending}.png"):
                files["horizon"] = f"horizon{ending}.png"
            bar.update()
            mosaic = f"mosaic{ending}.{videos.usable_format('mp4')}"
            written, note = write_mosaic(table, k, folder / mosaic, clips)
            if written:
                files["mosaic"] = mosaic
            if note:
                notes.append(note)
            bar.update()
            pictures.append(files)
    return pictures, notes


def write_mosaic(table: Table, number: int, path: Path, clips: int) -> tuple[bool, str]:
    """Write the video that shows forecasts of a table's methods side by side.

    Returns (whether the video was written, a note on what was left out or "").
    """
    compared = comparison.select_clips(table, clips)
    # select_clips() returns the reason as a string if there is nothing to show.
    if isinstance(compared, str):
        return False, f"no mosaic of table {number}: {compared}"
    fps = table.methods[0].runs[0].fps
    videos.write_video(path, comparison.draw_mosaic(*compared), 10 if math.isnan(fps) else fps)
    left = len(table.methods) - len(compared[1])
    if not left:
        return True, ""
    return True, (
        f"the mosaic of table {number} leaves out {left} of {len(table.methods)} methods, "
        f"which have no arrays or come after {comparison.MAX_METHODS} others"
    )


def write(
    out: Path, found: list[Table], metrics: list[str], warnings: list[str], clips: int
) -> tuple[str, list[str]]:
    """Write tables, pictures, page and summary.json to `out`, which is replaced atomically.

    Returns (the tables in Markdown, notes on what was left out).
    """
    with replace_folder(out) as partial:
        return write_summary(partial, out.name, found, metrics, warnings, clips)


def write_summary(
    dir: Path, name: str, found: list[Table], metrics: list[str], warnings: list[str], clips: int
) -> tuple[str, list[str]]:
    """Fill the folder of a summary. name: the title of its page. Returns as `write`."""
    shown = [tables.measured_metrics(table, metrics) for table in found]
    text = "\n\n".join(tables.markdown(*pair) for pair in zip(found, shown))
    latex = "\n\n".join(tables.latex(*pair) for pair in zip(found, shown))
    of_runs, of_methods = tables.records(found, metrics)
    (dir / "table.md").write_text(text + "\n", encoding="utf-8")
    (dir / "table.tex").write_text(
        "% needs \\usepackage{booktabs}\n" + latex + "\n", encoding="utf-8"
    )
    write_csv(dir / "runs.csv", of_runs)
    write_csv(dir / "methods.csv", of_methods)

    # The page needs the names of the pictures, and lists their notes as warnings.
    pictures, notes = write_pictures(found, shown, dir, clips)
    sections = []
    for k, (table, own, files) in enumerate(zip(found, shown, pictures), 1):
        sections.append(summary_page.section(table, own, files, dir, k))
    texts = ["table.md", "table.tex", "runs.csv", "methods.csv", "summary.json"]
    page = summary_page.page(name, sections, found, warnings + notes, texts)
    (dir / "index.html").write_text(page, encoding="utf-8")
    summary = {
        "warnings": warnings + notes,
        "tables": [table.protocol for table in found],
        "methods": [without_nan(record) for record in of_methods],
        "runs": [without_nan(record) for record in of_runs],
    }
    (dir / "summary.json").write_text(
        json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8"
    )
    return text, notes


# ------------------------------------------------------------------------------------- the command
def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python scripts/collect_results.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="folders, metrics.json files or quoted globs; ** matches any number of folders",
    )
    add("--name", required=True, help="folder to write: outputs/summarized/NAME")
    add(
        "--nicknames",
        nargs="+",
        action="extend",
        default=[],
        metavar="OLD=NEW",
        help="new names of methods; methods are shown in this order",
    )
    add("--only", action="store_true", help="leave out the methods that have no nickname")
    add(
        "--metrics",
        nargs="+",
        default=[],
        help="metrics to show, in this order, e.g. crps psnr fvd (default: all)",
    )
    add("--clips", type=int, default=6, help="rows of the mosaic (default 6)")
    add("--root", default="outputs", help="output.root of the runs (default: outputs)")
    args = parser.parse_args()
    if args.clips < 1:
        raise UserError(f"--clips must be >= 1, got {args.clips}")
    if args.only and not args.nicknames:
        raise UserError(
            "--only needs --nicknames, which names the methods to show; add it, or leave out --only"
        )
    return args


def main() -> None:
    args = parse()
    out = folder_of(args.root, args.name)
    found, warnings = tabulate(read_all(metrics_files(args.runs)))
    found = rename(found, args.nicknames, args.only)
    warnings = warn_of_different_protocols(found) + warnings
    metrics = tables.metrics_of(found, args.metrics)
    if not metrics:
        raise UserError("the results hold no finite metric; measure them again with sample.py")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    text, notes = write(out, found, metrics, warnings, args.clips)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(text + "\n")
    print(f"page           {out / 'index.html'}")
    print(f"table          {out / 'table.md'}")
    print(f"LaTeX          {out / 'table.tex'}")
    print(f"CSV            {out / 'methods.csv'}")


if __name__ == "__main__":
    run_command(main)
