"""Show samples of several results folders of the same clips side by side, as a page or a video.

python scripts/side_by_side.py --results RESULTS_5 RESULTS_2 RESULTS_1 --out few.html
python scripts/side_by_side.py --results RESULTS_5 RESULTS_1 --labels before after --out few.gif
"""

from __future__ import annotations

import argparse
import sys
from html import escape
from pathlib import Path

import numpy as np

# Run by path, Python puts scripts/ on sys.path; the imports below need the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.metrics import own_metrics
from report import comparison, page, results, videos
from report.html import document, grid, row, write_page
from runtime.console import UserError, run_command

# Clips of a video, those with the most motion in their given frames.
CLIPS = 6
ENDINGS = (".html", *videos.ENDINGS)


def label_of(result: dict, dir: Path) -> str:
    """The number of network evaluations per frame, or the folder's name if it is not stored."""
    number = result["protocol"].get("network_evaluations_per_frame")
    if not isinstance(number, (int, float)):
        return dir.name
    return f"{number:g} evaluation" + ("" if number == 1 else "s")


def read(dirs: list[Path]) -> tuple[np.ndarray, list[np.ndarray], list[dict]]:
    """Read results folders -> (truth (V, T, H, W, 3), first samples of each folder (V, P, H, W,
    3), metrics of each), of fields as pictures. UserError if their clips differ."""
    found = [results.read_arrays(dir) for dir in dirs]
    truth = found[0][0]
    for dir, (other, samples) in zip(dirs, found):
        if not np.array_equal(other, truth) or samples.shape[2] != found[0][1].shape[2]:
            raise UserError(
                f"{dir} holds other clips than {dirs[0]}; sample both with the same data, split, "
                "--num_videos and --num_frames"
            )
    metrics = [results.read_metrics(dir) for dir in dirs]
    # The truth gives the colours of fields, so that they are the same in all columns.
    drawn = [videos.as_pictures(truth, samples[:, :1]) for _, samples in found]
    return drawn[0][0], [samples[:, 0] for _, samples, _ in drawn], metrics


def write_side_by_side(
    file: Path, truth: np.ndarray, samples: list[np.ndarray], metrics: list[dict], names: list[str]
) -> None:
    """Write the page: a table of the metrics, and the clips with a column per results folder."""
    rows = []
    for metric in own_metrics(metrics[0]["summary"]):
        entries = [result["summary"].get(metric) for result in metrics]
        digits = page.decimals(entries[0])
        rows.append(row(page.label(metric), [page.format_number(e, digits) for e in entries]))
    heads = [escape(name) for name in names]
    fps = results.frame_rate_of(metrics[0]["protocol"])
    stacked = np.stack(samples, 1)
    parts = [
        "<h1>Samples side by side</h1>",
        f"<h2>Metrics</h2>\n{grid(['metric', *heads], rows, 'Metrics')}",
        "<p class='soft'>Mean ± standard error over clips, of all samples. The videos show the "
        "first sample of each.</p>",
        page.player(truth, stacked, len(names), fps, page.MAX_CLIP_BYTES, names),
    ]
    write_page(file, document("Samples side by side", "\n".join(parts)))


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python scripts/side_by_side.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    about = "folders that sample.py wrote, for the same clips"
    add("--results", type=Path, nargs="+", required=True, metavar="DIR", help=about)
    about = "a name for each folder; default: its network evaluations per frame"
    add("--labels", nargs="+", metavar="NAME", help=about)
    about = f"file to write: {', '.join(ENDINGS)}"
    add("--out", type=Path, required=True, metavar="FILE", help=about)
    args = parser.parse_args()
    if args.out.suffix not in ENDINGS:
        raise UserError(f"--out {args.out}: use one of the endings {', '.join(ENDINGS)}")
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}; create it first")
    if args.labels and len(args.labels) != len(args.results):
        raise UserError(
            f"--labels names {len(args.labels)} folders, --results {len(args.results)}; name each"
        )
    return args


def main() -> None:
    args = parse()
    truth, samples, metrics = read(args.results)
    names = args.labels
    if names is None:
        names = [label_of(result, dir) for result, dir in zip(metrics, args.results)]
    if args.out.suffix == ".html":
        write_side_by_side(args.out, truth, samples, metrics, names)
        print(f"page           {args.out}")
        return
    chosen = videos.rank_by_motion(truth, truth.shape[1] - samples[0].shape[1])[:CLIPS]
    columns = [(name, own[chosen]) for name, own in zip(names, samples)]
    fps = results.frame_rate_of(metrics[0]["protocol"], int(chosen[0]))
    args.out.touch()
    videos.write_video(args.out, comparison.draw_mosaic(truth[chosen], columns), fps)
    print(f"video          {args.out}")


if __name__ == "__main__":
    run_command(main)
