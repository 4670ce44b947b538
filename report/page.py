"""Web pages of results: each one file that holds all it shows, opens from the disk and asks no
network for anything.
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
from report.html import WEB, document, grid, row, write_page
from report.style import with_unit
from runtime.console import progress

LIMIT = 40 << 20  # bytes of clips in one page
OPEN = 6  # clips that are not folded away
SPEEDS = {0.25: "¼", 0.5: "½", 1: "1", 2: "2", 4: "4"}


# ---------------------------------------------------------------------------------------- the parts
def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def columns_of(frames: int) -> int:
    return math.ceil(math.sqrt(frames))


def sheet(truth: np.ndarray, samples: np.ndarray) -> str:
    """Truth (T, H, W, 3), then samples (S, P, H, W, 3), frame by frame in the rows of one lossless
    picture: a data URI.
    """
    frames = np.concatenate([truth, samples.reshape(-1, *truth.shape[1:])])
    N, H, W, _ = frames.shape
    columns = columns_of(N)
    rows = -(-N // columns)
    grid = np.zeros((rows * columns, H, W, 3), np.uint8)
    grid[:N] = frames
    image = Image.fromarray(
        grid.reshape(rows, columns, H, W, 3).swapaxes(1, 2).reshape(rows * H, columns * W, 3)
    )
    format = "webp" if max(image.size) < 16384 else "png"  # WebP ends there
    file = io.BytesIO()
    image.save(
        file, format, **({"lossless": True, "quality": 50, "method": 2} if format == "webp" else {})
    )
    return data_uri(file.getvalue(), f"image/{format}")


def embedded(data: dict, id: str) -> str:
    """JSON for a script; no string in it can end the element."""
    text = json.dumps(data).replace("</", "<\\/")
    return f'<script type="application/json" id="{id}">{text}</script>'


def picture(content: bytes, alt: str, wide: bool = False) -> str:
    """wide: on a phone it keeps a legible size, and scrolls."""
    image = f'<img src="{data_uri(content, "image/png")}" alt="{escape(alt)}">'
    if wide:
        return (
            '<div class="card scroll wide" tabindex="0" role="region" '
            f'aria-label="{escape(alt)}">{image}</div>'
        )
    return f'<div class="card">{image}</div>'


# ----------------------------------------------------------------------------- metrics and protocol
def decimals(entry: dict) -> int | None:
    """As many as the standard error gives a meaning to."""
    se = entry.get("se")
    return min(max(1 - math.floor(math.log10(se)), 0), 8) if se and math.isfinite(se) else None


def number(entry: dict | None, digits: int | None = None) -> str:
    """{"mean", "se"} as a person reads it; a dash for what is not there."""
    value = (entry or {}).get("mean")
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}" if digits is not None else f"{value:.4g}"
    return text + (
        f' <span class="se">± {entry["se"]:.{digits}f}</span>'
        if entry.get("se") and digits is not None
        else ""
    )


def against(own: dict, baseline: dict | None, unit: str, higher: bool | None) -> str:
    """A cell: the forecast against a baseline, as a difference where higher is better, else as a
    ratio.
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
    baselines = []
    for suffix in BASELINES:
        if any(name.endswith(suffix) for name in summary):
            baselines.append(suffix)
    rows = []
    for name in own_metrics(summary):
        own, digits = summary[name], decimals(summary[name])
        _, unit, higher = plots.describe(name)
        hint = {None: "", True: "higher is better", False: "lower is better"}[higher]
        cells = [f"<b>{number(own, digits)}</b>"]
        cells += [number(summary.get(name + suffix), digits) for suffix in baselines]
        cells.append(against(own, summary.get(name + "_repeat_last"), unit, higher))
        rows.append(row(f"{label(name)}<small>{hint}</small>", cells))
    labels = [BASELINES[suffix] for suffix in baselines]
    return grid(["metric", "forecast", *labels, "forecast against repeating"], rows, "Metrics")


# sentences of the protocol, and what each is left out for where it is 0 or False
PROTOCOL = [
    ("{skip} frames of the source are skipped between one and the next.", "skip"),
    (
        "Sampled by the solver {solver} with diffusion {diffusion}, {steps} steps on a {grid} "
        "grid: "
        "{network_evaluations_per_frame:.4g} evaluations of the network a frame.",
        "steps",
    ),
    ("Begun at flow time {warm_start}.", "warm_start"),
    ("Context frame: {context}, drawn anew every {redraw}.", "context"),
    (
        "A forecast frame passes through the autoencoder’s pixels before it is forecast from.",
        "reencode",
    ),
    ("Weights after {updates:,} updates.", "updates"),
    ("Checkpoint: {checkpoint}.", "checkpoint"),
]


def in_words(protocol: dict) -> list[str]:
    """Sentences; what they do not know follows by its name."""
    # The rates of the single clips would be a long list.
    said, told = [], {"rates"}
    if {"name", "source", "clips", "rule"} <= protocol.keys():
        said = [
            f"{line[0].upper()}{line[1:]}."
            for line in [*protocols.in_words(protocol), protocol["source"]]
        ]
        told |= {field.name for field in dataclasses.fields(protocols.Protocol)} | {
            "samples_per_video",
            "fps",
            "metrics",
        }
    for sentence, unless in PROTOCOL:
        names = {field for _, field, _, _ in Formatter().parse(sentence) if field} | {unless}
        if names <= protocol.keys():
            told |= names
            if protocol[unless]:
                said.append(sentence.format(**protocol))
    rest = [f"{name}: {value}" for name, value in protocol.items() if name not in told]
    return said + ["; ".join(rest) + "."] * bool(rest)


def settings(config: dict) -> str:
    """As --set takes them, one a line."""
    lines = []
    for group, fields in config.items():
        pairs = (
            {f"{group}.{name}": value for name, value in fields.items()}
            if isinstance(fields, dict)
            else {group: fields}
        )
        lines += [
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in pairs.items()
        ]
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


def pick(truth: np.ndarray, samples: np.ndarray, limit: int) -> tuple[list[int], list[str]]:
    """-> the clips that fit into `limit` bytes, those that move most first, and their sheets."""
    clips, sheets, size = [], [], 0
    order = videos.liveliest(truth, truth.shape[1] - samples.shape[2])
    with progress(len(order), "write page", "clip") as bar:
        for v in order:
            new = sheet(truth[v], samples[v])
            size += len(new)
            if sheets and size > limit:
                break
            clips.append(int(v))
            sheets.append(new)
            bar.update()
    return clips, sheets


def player(truth: np.ndarray, samples: np.ndarray, futures: int, fps: float, limit: int) -> str:
    """The clips with their controls. futures: samples shown of each."""
    V, T, H, W, _ = truth.shape
    S, P = samples.shape[1:3]
    shown = samples[:, :futures]
    clips, sheets = pick(truth, shown, limit)
    data = {
        "sheets": sheets,
        "given": T - P,
        "frames": T,
        "fps": fps,
        "width": W,
        "height": H,
        "columns": columns_of(T + shown.shape[1] * P),
    }
    speeds = "".join(
        f'<option value="{value}"{" selected" * (value == 1)}>{name}×</option>'
        for value, name in SPEEDS.items()
    )
    words = [
        f"Truth and {shown.shape[1]} of {S} samples" if S > shown.shape[1] else "Truth and samples",
        "; green edge: given frames, orange edge: forecast. ",
        f"{len(clips)} of {V} clips, those that move most in their given frames, so that the page "
        f"stays small enough to "
        "send."
        if len(clips) < V
        else "The clips that move most in their given frames come first.",
        f" {fps:g} frames a second at speed 1×. Space plays and pauses, the arrow keys step.",
    ]
    names = ["truth", *(f"sample {k + 1}" for k in range(shown.shape[1]))]
    sections = []
    for v in clips:
        boxes = "".join(
            f'<figure><canvas width="{W}" height="{H}" role="img" aria-label="clip {v}, '
            f'{name}"></canvas>'
            f"<figcaption>{name}</figcaption></figure>"
            for name in names
        )
        sections.append(
            f'<section class="clip" aria-label="clip {v}"><h3>clip {v}</h3>'
            f'<div class="tracks">{boxes}</div></section>'
        )
    if len(sections) > OPEN:
        sections[OPEN:] = [
            f"<details><summary>{len(sections) - OPEN} more clips</summary>",
            *sections[OPEN:],
            "</details>",
        ]
    return "\n".join(
        [
            f"<h2>Videos</h2>\n<p class='soft'>{''.join(words)}</p>\n<noscript><p>They need "
            f"JavaScript.</p></noscript>",
            '<div id="player" data-phase="given" style="--shown: '
            f'{W * videos.scale_of(H, 128) + 8}px">',
            CONTROLS.format(frames=T, share=100 * (T - P) / T, speeds=speeds),
            *sections,
            "</div>",
            embedded(data, "sheets"),
            f"<script>\n{(WEB / 'player.js').read_text()}</script>",
        ]
    )


def horizon_picture(dir: Path, result: dict) -> str:
    """curves.png of the folder, or drawn here where it has none."""
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


def result_page(dir: Path, fps: float | None = None, futures: int = 8, limit: int = LIMIT) -> Path:
    """Write dir/index.html from what the results folder holds, and return it. fps of the clips: as
    the protocol says, or 10; futures: at most so many samples of a clip; limit: bytes of clips,
    above which the liveliest are taken.
    """
    result, (truth, samples) = results.read_metrics(dir), results.read_arrays(dir)
    config, protocol = result["config"], result["protocol"]
    dataset, interpolant = (
        config.get("dataset", "?"),
        config.get("flow", {}).get("interpolant", "?"),
    )
    run = results.run_id(config)
    parts = [
        f"<h1>{escape(f'{dataset} · {interpolant}')}</h1>\n<p class='soft'>run {escape(run)}</p>",
        f"<p>{escape(' '.join(in_words(protocol)))}</p>",
        f"<h2>Metrics</h2>\n{metrics_table(result['summary'])}\n<p class='soft'>Mean ± standard "
        f"error over clips.</p>",
        player(truth, samples, futures, fps or results.frame_rate_of(protocol), limit),
        horizon_picture(dir, result),
    ]
    for name, title, alt in (
        ("rank_histogram", "Spread", "Histogram of the truth’s rank among the samples"),
        (
            "contact_sheet",
            "Contact sheet",
            "Contact sheet: time runs to the right, truth above samples",
        ),
    ):
        if (dir / f"{name}.png").is_file():
            parts.append(
                f"<h2>{title}</h2>\n"
                + picture((dir / f"{name}.png").read_bytes(), alt, wide=name == "contact_sheet")
            )
    parts.append(
        f"<details><summary>Config</summary><pre>{escape(settings(config))}</pre></details>"
    )
    return write_page(
        dir / "index.html", document(f"{dataset} {interpolant} {run}", "\n".join(parts))
    )
