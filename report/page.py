"""Write the web page of a results folder: one file that contains all pictures and clips. It opens
from the disk and loads nothing from the network.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from html import escape
from pathlib import Path
from string import Formatter

import numpy as np
from PIL import Image

from evaluation import protocols
from evaluation.metrics import BASELINES, own_metrics
from report import plots, results, videos
from report.colours import Colours
from report.html import WEB, document, grid, row, write_page
from report.style import with_unit
from runtime.console import progress

MAX_CLIP_BYTES = 40 << 20  # bytes of clips in one page
OPEN_CLIPS = 6  # clips shown at first; the others are in a collapsed section
SPEEDS = {0.25: "¼", 0.5: "½", 1: "1", 2: "2", 4: "4"}


# ---------------------------------------------------------------------------------------- the parts
def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def columns_of(frames: int) -> int:
    return math.ceil(math.sqrt(frames))


def encode_sheet(truth: np.ndarray, samples: np.ndarray) -> str:
    """Tile all frames of a clip into one lossless picture -> data URI.

    The frames are in rows: the truth (T, H, W, 3), then the samples (S, P, H, W, 3).
    """
    frames = np.concatenate([truth, samples.reshape(-1, *truth.shape[1:])])
    N, H, W, _ = frames.shape
    columns = columns_of(N)
    rows = -(-N // columns)
    tiles = np.zeros((rows * columns, H, W, 3), np.uint8)
    tiles[:N] = frames
    tiles = tiles.reshape(rows, columns, H, W, 3).swapaxes(1, 2)
    image = Image.fromarray(tiles.reshape(rows * H, columns * W, 3))
    file = io.BytesIO()
    # WebP allows at most 16,383 pixels per side.
    if max(image.size) < 16384:
        image.save(file, "webp", lossless=True, quality=50, method=2)
        return data_uri(file.getvalue(), "image/webp")
    image.save(file, "png")
    return data_uri(file.getvalue(), "image/png")


def embed_json(data: dict, id: str) -> str:
    """A script element with JSON, escaped so that no string in `data` can end the element."""
    text = json.dumps(data).replace("</", "<\\/")
    return f'<script type="application/json" id="{id}">{text}</script>'


def picture(content: bytes, alt: str, wide: bool = False) -> str:
    """A PNG as an image element. wide: scrolls on a narrow screen instead of shrinking."""
    image = f'<img src="{data_uri(content, "image/png")}" alt="{escape(alt)}">'
    if wide:
        return (
            '<div class="card scroll wide" tabindex="0" role="region" '
            f'aria-label="{escape(alt)}">{image}</div>'
        )
    return f'<div class="card">{image}</div>'


# ----------------------------------------------------------------------------- metrics and protocol
def decimals(entry: dict) -> int | None:
    """Number of decimals to print: two significant digits of the standard error. None without a
    standard error.
    """
    se = entry.get("se")
    if not se or not math.isfinite(se):
        return None
    return min(max(1 - math.floor(math.log10(se)), 0), 8)


def format_number(entry: dict | None, digits: int | None = None) -> str:
    """{"mean", "se"} as HTML; a dash for a missing value."""
    value = (entry or {}).get("mean")
    if value is None or not math.isfinite(value):
        return "–"
    if digits is None:
        return f"{value:.4g}"
    error = f' <span class="se">± {entry["se"]:.{digits}f}</span>' if entry.get("se") else ""
    return f"{value:.{digits}f}{error}"


def compare_with_baseline(own: dict, baseline: dict | None, unit: str, higher: bool | None) -> str:
    """A cell that compares the forecast with a baseline: by the difference if higher values are
    better (PSNR), else by the ratio. higher: None if neither direction is better.
    """
    value, base = own.get("mean"), (baseline or {}).get("mean")
    if None in (value, base) or not math.isfinite(value - base) or (not higher and base == 0):
        return "<td>–</td>"
    text = f"{value - base:+.3g} {unit}".replace("-", "−") if higher else f"× {value / base:.2f}"
    if higher is None or value == base:
        return f"<td>{text}</td>"
    word = "better" if (value > base) == higher else "worse"
    return f'<td class="{word}">{text.strip()} <span class="se">{word}</span></td>'


def label(metric: str) -> str:
    return escape(with_unit(metric))


def metrics_table(summary: dict) -> str:
    """The metrics of the forecasts beside those of the baselines, as HTML."""
    baselines = []
    for suffix in BASELINES:
        if any(name.endswith(suffix) for name in summary):
            baselines.append(suffix)
    rows = []
    for name in own_metrics(summary):
        own, digits = summary[name], decimals(summary[name])
        _, unit, higher = plots.describe(name)
        hint = {None: "", True: "higher is better", False: "lower is better"}[higher]
        cells = [f"<b>{format_number(own, digits)}</b>"]
        cells += [format_number(summary.get(name + suffix), digits) for suffix in baselines]
        cells.append(compare_with_baseline(own, summary.get(name + "_repeat_last"), unit, higher))
        rows.append(row(f"{label(name)}<small>{hint}</small>", cells))
    labels = [BASELINES[suffix] for suffix in baselines]
    return grid(["metric", "forecast", *labels, "forecast against repeating"], rows, "Metrics")


# (sentence about fields of the protocol, field whose absence or zero omits the sentence)
SENTENCES = [
    ("Between two frames, {skip} frames of the source are skipped.", "skip"),
    (
        "Sampler: solver {solver}, diffusion {diffusion}, {steps} steps on a {grid} grid, "
        "{network_evaluations_per_frame:.4g} network evaluations per frame.",
        "steps",
    ),
    ("Sampling starts at flow time {warm_start}.", "warm_start"),
    ("Context frame: {context}, drawn for every {redraw}.", "context"),
    ("Each forecast frame is decoded and encoded again before the next one.", "reencode"),
    (
        "Where a forecast differs from the last given frame by less than about {restore} of the "
        "range of values, it gets the detail of that frame.",
        "restore",
    ),
    ("Weights after {updates:,} updates.", "updates"),
    ("Checkpoint: {checkpoint}.", "checkpoint"),
]


def describe_protocol(protocol: dict) -> list[str]:
    """Describe a protocol in sentences. Fields without a sentence follow as `name: value`."""
    # `rates` is never printed: it lists the frame rate of every clip.
    sentences, covered = [], {"rates"}
    if {"name", "source", "clips", "rule"} <= protocol.keys():
        for line in [*protocols.describe(protocol), protocol["source"]]:
            sentences.append(f"{line[0].upper()}{line[1:]}.")
        covered |= {field.name for field in dataclasses.fields(protocols.Protocol)}
        covered |= {"samples_per_video", "fps", "metrics", "scale", "channels"}
    # A sentence is used only if the protocol has all its fields; results of earlier versions lack
    # some.
    for sentence, condition in SENTENCES:
        names = {field for _, field, _, _ in Formatter().parse(sentence) if field} | {condition}
        if names <= protocol.keys():
            covered |= names
            if protocol[condition]:
                sentences.append(sentence.format(**protocol))
    rest = [f"{name}: {value}" for name, value in protocol.items() if name not in covered]
    if rest:
        sentences.append("; ".join(rest) + ".")
    return sentences


def list_settings(config: dict) -> str:
    """List all settings as lines `group.field=value`, the format of --set."""
    lines = []

    def add(name: str, value: object) -> None:
        lines.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")

    for group, fields in config.items():
        if isinstance(fields, dict):
            for name, value in fields.items():
                add(f"{group}.{name}", value)
        else:
            add(group, fields)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ page of a run
CONTROLS = """<div class="bar" role="group" aria-label="Playback of all clips">
<button id="play" type="button" title="space">▶ Play</button>
<button id="back" type="button" aria-label="One frame back" title="left arrow">◀</button>
<button id="next" type="button" aria-label="One frame on" title="right arrow">▶</button>
<label class="scrub"><span class="hidden">Frame</span><input id="frame" type="range"
 min="1" max="{frames}" value="1" style="--track: linear-gradient(to right,
 var(--given) {share:.2f}%, var(--forecast) {share:.2f}%)"></label>
<output id="where" for="frame" aria-live="off"></output>
<label class="speed"><span>Speed</span>
 <select id="speed" aria-label="Speed">{speeds}</select></label>
</div>"""


def choose_clips(truth: np.ndarray, samples: np.ndarray, limit: int) -> tuple[list[int], list[str]]:
    """Choose clips, those with most motion first, until their sheets exceed `limit` bytes.

    Returns (indices, sheets) of at least one clip.
    """
    clips, sheets, size = [], [], 0
    order = videos.rank_by_motion(truth, truth.shape[1] - samples.shape[2])
    with progress(len(order), "write page", "clip") as bar:
        for v in order:
            new = encode_sheet(truth[v], samples[v])
            size += len(new)
            if sheets and size > limit:
                break
            clips.append(int(v))
            sheets.append(new)
            bar.update()
    return clips, sheets


def player(
    truth: np.ndarray,
    samples: np.ndarray,
    futures: int,
    fps: float,
    limit: int,
    names: list[str] | None = None,
) -> str:
    """The clips and their playback controls, as HTML.

    futures: number of samples to show per clip. limit: as for `choose_clips`. names: of the shown
    samples; by default they are numbered.
    """
    V, T, H, W, _ = truth.shape
    S, P = samples.shape[1:3]
    shown = samples[:, :futures]
    clips, sheets = choose_clips(truth, shown, limit)
    # player.js reads the sheets and their geometry from JSON, and draws the frames on canvases.
    data = {
        "sheets": sheets,
        "given": T - P,
        "frames": T,
        "fps": fps,
        "width": W,
        "height": H,
        "columns": columns_of(T + shown.shape[1] * P),
    }
    speeds = []
    for value, name in SPEEDS.items():
        selected = " selected" if value == 1 else ""
        speeds.append(f'<option value="{value}"{selected}>{name}×</option>')
    names = names or [f"sample {k + 1}" for k in range(shown.shape[1])]
    sections = [clip_section(v, names, W, H) for v in clips]
    if len(sections) > OPEN_CLIPS:
        more = f"<details><summary>{len(sections) - OPEN_CLIPS} more clips</summary>"
        sections = [*sections[:OPEN_CLIPS], more, *sections[OPEN_CLIPS:], "</details>"]
    about = describe_clips(len(clips), V, shown.shape[1], S, fps)
    width = W * videos.scale_of(H, 128) + 8
    return "\n".join(
        [
            f"<h2>Videos</h2>\n<p class='soft'>{about}</p>",
            "<noscript><p>The videos need JavaScript.</p></noscript>",
            f'<div id="player" data-phase="given" style="--shown: {width}px">',
            CONTROLS.format(frames=T, share=100 * (T - P) / T, speeds="".join(speeds)),
            *sections,
            "</div>",
            embed_json(data, "sheets"),
            f"<script>\n{(WEB / 'player.js').read_text()}</script>",
        ]
    )


def describe_clips(clips: int, of_clips: int, samples: int, of_samples: int, fps: float) -> str:
    """The text above the videos: how many clips and samples are shown, and how to play them."""
    shown = "Truth and samples"
    if samples < of_samples:
        shown = f"Truth and {samples} of {of_samples} samples"
    order = "Clips with the most motion in their given frames come first."
    if clips < of_clips:
        order = (
            f"{clips} of {of_clips} clips, those with the most motion in their given frames, so "
            "that the page stays small enough to send."
        )
    return (
        f"{shown}; green edge: given frames, orange edge: forecast. {order} {fps:g} frames per "
        "second at speed 1×. Space plays and pauses, the arrow keys step."
    )


def clip_section(v: int, names: list[str], width: int, height: int) -> str:
    """The canvases of clip v, of the truth and of each sample."""
    figures = []
    for name in ["truth", *map(escape, names)]:
        figures.append(
            f'<figure><canvas width="{width}" height="{height}" role="img" '
            f'aria-label="clip {v}, {name}"></canvas><figcaption>{name}</figcaption></figure>'
        )
    return (
        f'<section class="clip" aria-label="clip {v}"><h3>clip {v}</h3>'
        f'<div class="tracks">{"".join(figures)}</div></section>'
    )


def colour_bars(colours: list[Colours]) -> list[str]:
    """The colour bars of the channels of fields, as HTML; [] without channels."""
    if not colours:
        return []
    file = io.BytesIO()
    Image.fromarray(videos.draw_bars(colours, 4 * videos.BAR_CELL)).save(file, "png")
    names = ", ".join(colour.name for colour in colours)
    return [picture(file.getvalue(), f"Colours of {names}", wide=True)]


def horizon_picture(dir: Path, result: dict) -> str:
    """The plot of metrics against the predicted frame: curves.png if it exists, else drawn now."""
    if (dir / "curves.png").is_file():
        content = (dir / "curves.png").read_bytes()
    elif own_metrics(result["horizon"]):
        file = io.BytesIO()
        plots.curves(result["horizon"], file, result.get("horizon_se"))
        content = file.getvalue()
    else:
        return ""
    return "<h2>Over the horizon</h2>\n" + picture(
        content, "Metrics by predicted frame, with the baselines", wide=True
    )


def result_page(
    dir: Path, fps: float | None = None, futures: int = 8, limit: int = MAX_CLIP_BYTES
) -> Path:
    """Write dir/index.html from the files of a results folder; returns its path.

    fps: frames per second of the clips; default: the protocol's. futures: maximum number of samples
    shown per clip. limit: maximum size of all clips in bytes; clips with most motion come first.
    """
    result, (truth, samples, colours) = results.read_metrics(dir), results.read_pictures(dir)
    # The metrics.json may be of an earlier version, whose config lacks fields.
    config, protocol = result["config"], result["protocol"]
    dataset = config.get("dataset", "?")
    interpolant = config.get("flow", {}).get("interpolant", "?")
    run = results.run_id(config)
    parts = [
        f"<h1>{escape(f'{dataset} · {interpolant}')}</h1>\n<p class='soft'>run {escape(run)}</p>",
        f"<p>{escape(' '.join(describe_protocol(protocol)))}</p>",
        f"<h2>Metrics</h2>\n{metrics_table(result['summary'])}\n<p class='soft'>Mean ± standard "
        f"error over clips.</p>",
        player(truth, samples, futures, fps or results.frame_rate_of(protocol), limit),
        *colour_bars(colours),
        horizon_picture(dir, result),
    ]
    rank_alt = "Histogram of the truth’s rank among the samples"
    sheet_alt = "Contact sheet: time runs to the right, truth above samples"
    # Pictures that the folder lacks are left out: a result without a rank histogram is complete.
    for name, title, alt in (
        ("rank_histogram", "Spread", rank_alt),
        ("contact_sheet", "Contact sheet", sheet_alt),
    ):
        file = dir / f"{name}.png"
        if file.is_file():
            image = picture(file.read_bytes(), alt, wide=name == "contact_sheet")
            parts.append(f"<h2>{title}</h2>\n{image}")
    config_text = escape(list_settings(config))
    parts.append(f"<details><summary>Config</summary><pre>{config_text}</pre></details>")
    title = f"{dataset} {interpolant} {run}"
    return write_page(dir / "index.html", document(title, "\n".join(parts)))
