"""Results of many runs put together: tables with standard errors over seeds, plots, forecasts side by side, and a page.

    python scripts/collect_results.py --runs 'outputs/results/ball_stn-*' --name sweep --nicknames linear=Linear

writes outputs/summarized/<name>/. Runs that differ in nothing but their seed are one method; only results of one protocol
stand in one table.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

from report import comparison, summary_page, tables, videos
from report.methods import Run, Table, differing, rename, run_of, tabulate
from runtime.console import UserError, progress, run_command

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a file, it finds its neighbours too

# noqa: E402
# noqa: E402
# noqa: E402
# noqa: E402

OURS = re.compile(
    r"index\.html|summary\.json|(runs|methods)\.csv|table\.(md|tex)|(horizon|summary|mosaic)(-\d+)?\.(png|mp4|gif)"
)


def metrics_files(patterns: list[str]) -> list[Path]:
    """Every metrics.json that the globs, folders and files lead to, each once."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        wide = os.path.expanduser(pattern)
        paths = (
            [Path(wide)]
            if os.path.exists(wide)
            else [Path(path) for path in sorted(glob.glob(wide, recursive=True))]
        )
        files = [
            file
            for path in paths
            for file in (sorted(path.rglob("metrics.json")) if path.is_dir() else [path])
        ]
        files = [
            file
            for file in files
            if file.name == "metrics.json" and not re.search(r"\.partial(/|\\)", str(file))
        ]
        if not files:
            raise UserError(
                f"--runs {pattern}: no metrics.json there; name folders that sample.py or main.py wrote, such as "
                "'outputs/results/*'"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return sorted(found.values())


def read(file: Path) -> Run:
    try:
        return run_of(
            json.loads(file.read_text(encoding="utf-8")), file.parent, file.stat().st_mtime
        )
    except (ValueError, RecursionError) as error:
        why = (
            str(error)
            if type(error) is ValueError
            else f"cannot be read ({str(error).splitlines()[0]})"
        )
        raise UserError(
            f"{file} {why}: damaged, or no result; make it again with sample.py or leave it out"
        ) from None


def read_all(files: list[Path]) -> list[Run]:
    runs = []
    with progress(len(files), "read results", "file") as bar:
        for file in files:
            runs.append(read(file))
            bar.update()
    return runs


def folder_of(root: str, name: str) -> Path:
    """<root>/summarized/<name>, if it may be written."""
    if not re.fullmatch(r"\w[\w.+ -]*", name) or name.endswith(".partial"):
        raise UserError(
            f"--name {name!r} is not the name of a folder; use letters, digits, -, _ and ."
        )
    out = Path(root) / "summarized" / name
    if out.exists() and not is_ours(out):
        raise UserError(
            f"{out} exists and holds other things than a summary; choose another --name"
        )
    return out


def is_ours(folder: Path) -> bool:
    """Nothing, or nothing but what this command writes."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or "summary.json" in names and all(OURS.fullmatch(name) for name in names)


def plain(value):
    """Without NaN, which is not JSON."""
    if isinstance(value, dict):
        return {key: plain(own) for key, own in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, records: list[dict]) -> None:
    fields = dict.fromkeys(key for record in records for key in record)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fields), restval="")
        writer.writeheader()
        for record in records:
            writer.writerow(
                {key: "" if value is None else value for key, value in plain(record).items()}
            )


def write_pictures(
    found: list[Table], shown: list[list[str]], folder: Path, clips: int
) -> tuple[list[dict[str, str]], list[str]]:
    """-> ({kind: file} of each table, what could not be shown)."""
    made: list[dict[str, str]] = []
    told = []
    with progress(3 * len(found), "draw", "picture") as bar:
        for k, (table, metrics) in enumerate(zip(found, shown)):
            ending, own = f"-{k + 1}" * (len(found) > 1), {}
            comparison.summary_plot(table, metrics, folder / f"summary{ending}.png")
            own["summary"] = f"summary{ending}.png"
            bar.update()
            if comparison.horizon_plot(table, metrics, folder / f"horizon{ending}.png"):
                own["horizon"] = f"horizon{ending}.png"
            bar.update()
            compared = comparison.comparison(table, clips)
            if isinstance(compared, str):
                told.append(f"no mosaic of table {k + 1}: {compared}")
            else:
                own["mosaic"] = f"mosaic{ending}.{videos.usable_format('mp4')}"
                fps = table.methods[0].runs[0].fps
                videos.write_video(
                    folder / own["mosaic"],
                    comparison.mosaic(*compared),
                    10 if math.isnan(fps) else fps,
                )
                if left := len(table.methods) - len(compared[1]):
                    told.append(
                        f"the mosaic of table {k + 1} leaves out {left} of {len(table.methods)} methods, which have no "
                        f"arrays or come after {comparison.MOST} others"
                    )
            bar.update()
            made.append(own)
    return made, told


def write(
    out: Path, found: list[Table], metrics: list[str], warnings: list[str], clips: int
) -> tuple[str, list[str]]:
    """Everything there is to look at; the folder appears when it is complete. -> (the Markdown tables, what was left out)."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shown = [tables.measured(table, metrics) for table in found]
    text = "\n\n".join(tables.markdown(*pair) for pair in zip(found, shown))
    of_runs, of_methods = tables.records(found, metrics)
    (partial / "table.md").write_text(text + "\n", encoding="utf-8")
    (partial / "table.tex").write_text(
        "% needs \\usepackage{booktabs}\n"
        + "\n\n".join(tables.latex(*pair) for pair in zip(found, shown))
        + "\n",
        encoding="utf-8",
    )
    write_csv(partial / "runs.csv", of_runs)
    write_csv(partial / "methods.csv", of_methods)
    made, told = write_pictures(found, shown, partial, clips)
    sections = [
        summary_page.section(table, own, files, out, k)
        for k, (table, own, files) in enumerate(zip(found, shown, made), 1)
    ]
    texts = ["table.md", "table.tex", "runs.csv", "methods.csv", "summary.json"]
    (partial / "index.html").write_text(
        summary_page.page(out.name, sections, found, warnings + told, texts), encoding="utf-8"
    )
    summary = {
        "warnings": warnings + told,
        "tables": [table.protocol for table in found],
        "methods": [plain(record) for record in of_methods],
        "runs": [plain(record) for record in of_runs],
    }
    (partial / "summary.json").write_text(
        json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8"
    )
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return text, told


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/collect_results.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="folders, metrics.json files or globs of either, quoted; ** is any number of folders",
    )
    parser.add_argument(
        "--name", required=True, help="of the folder to write, outputs/summarized/NAME"
    )
    parser.add_argument(
        "--nicknames",
        nargs="+",
        action="extend",
        default=[],
        metavar="OLD=NEW",
        help="other names of methods, in the order in which they are to stand",
    )
    parser.add_argument(
        "--only", action="store_true", help="leave out the methods that have no nickname"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        help="in this order, e.g. crps psnr fvd; default: all there are",
    )
    parser.add_argument("--clips", type=int, default=6, help="rows of the mosaic (default 6)")
    parser.add_argument("--root", default="outputs", help="output.root; default: outputs")
    args = parser.parse_args()
    if args.clips < 1:
        raise UserError(f"--clips must be >= 1, got {args.clips}")
    if args.only and not args.nicknames:
        raise UserError(
            "--only shows the methods that --nicknames names; give it, or leave --only out"
        )
    out = folder_of(args.root, args.name)
    found, warnings = tabulate(read_all(metrics_files(args.runs)))
    found = rename(found, args.nicknames, args.only)
    warnings = differing(found) + warnings
    metrics = tables.metrics_of(found, args.metrics)
    if not metrics:
        raise UserError("the results hold no finite metric; measure them again with sample.py")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    text, told = write(out, found, metrics, warnings, args.clips)
    for line in told:
        print(f"note: {line}", file=sys.stderr)
    print(text + "\n")
    for label, file in (
        ("page", "index.html"),
        ("table", "table.md"),
        ("LaTeX", "table.tex"),
        ("CSV", "methods.csv"),
    ):
        print(f"{label:<15}{out / file}")


if __name__ == "__main__":
    run_command(main)
