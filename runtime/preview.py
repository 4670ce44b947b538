"""A page that shows a run while it trains: preview.html beside the checkpoints.

The page is written once. It reloads two pictures, which the run replaces: preview.png, the newest
forecasts, and curve.svg, the loss. It works from a local folder and needs no network.
"""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

from runtime.folders import write_atomically

# Size of the plot in pixels, and its margins: left, top, right, bottom.
WIDTH, HEIGHT = 900, 300
LEFT, TOP, RIGHT, BOTTOM = 70, 15, 15, 35
# The curve has at most this many points, each the mean of consecutive rows.
MOST_POINTS = 400

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto }}
  img {{ max-width: 100%; image-rendering: pixelated }}
  p {{ color: #555 }}
</style>
<h1>{name}</h1>
<p>Loss of the velocity network, log scale. Updated while the run trains.</p>
<img id="curve" data-file="curve.svg" alt="No loss yet.">
<p>Newest forecasts: for each clip the truth, then two forecasts. The first comes after
{first} updates.</p>
<img id="preview" data-file="preview.png" alt="No forecasts yet.">
<script>
  function reload() {{
    for (const image of document.images) image.src = image.dataset.file + "?" + Date.now();
  }}
  reload();
  setInterval(reload, 10000);
</script>
</html>
"""


def write_page(dir: Path, name: str, first: str) -> None:
    """Write preview.html, unless it exists.

    first: the number of updates before the first picture, as text.
    """
    path = dir / "preview.html"
    if not path.exists():
        with write_atomically(path) as file:
            file.write(PAGE.format(name=html.escape(name), first=html.escape(first)).encode())


def read_loss(path: Path) -> list[tuple[int, float]]:
    """The (step, loss) of the rows of metrics.jsonl whose loss is finite and positive."""
    points = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        loss = row.get("loss", math.nan)
        if math.isfinite(loss) and loss > 0:
            points.append((row["step"], loss))
    return points


def thin_out(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Average consecutive points, so that at most `most` remain."""
    size = -(-len(points) // most)
    thinned = []
    for start in range(0, len(points), max(size, 1)):
        steps, losses = zip(*points[start : start + size])
        thinned.append((steps[-1], sum(losses) / len(losses)))
    return thinned


def curve_svg(points: list[tuple[int, float]]) -> str:
    """Draw (step, loss) points as an SVG picture, with a logarithmic axis for the loss."""
    points = thin_out(points)
    losses = [loss for _, loss in points]
    low, high = math.log10(min(losses)), math.log10(max(losses))
    # A flat curve lies in the middle of one decade.
    low, high = (low, high) if high - low > 1e-3 else (low - 0.5, high + 0.5)
    last = max(step for step, _ in points)

    def x_of(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

    def y_of(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">']
    lines.append("<style>text{font:13px sans-serif;fill:#555} line{stroke:#ddd}</style>")
    # Five grid lines with the loss, and below the plot five numbers of updates.
    for k in range(5):
        value = low + (high - low) * k / 4
        y = y_of(value)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        label = f"{10**value:.3g}"
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        x = x_of(last * k / 4)
        anchor = "end" if k == 4 else "middle"
        label = f"{round(last * k / 4):,}"
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{label}</text>')
    path = " ".join(f"{x_of(step):.1f},{y_of(math.log10(loss)):.1f}" for step, loss in points)
    lines.append(f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    return "\n".join([*lines, "</svg>", ""])


def draw_curve(dir: Path) -> None:
    """Draw the loss of metrics.jsonl as curve.svg, if that file holds a loss."""
    points = read_loss(dir / "metrics.jsonl")
    if points:
        with write_atomically(dir / "curve.svg") as file:
            file.write(curve_svg(points).encode())
