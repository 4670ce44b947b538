"""Draw forecasts: videos (MP4, AVI or GIF) of the truth beside samples, and contact sheets.

Frames are (H, W, 3) uint8. Given frames have a green edge, forecast frames an orange edge. Fields
are drawn by a colour map first (`as_pictures`), and the pictures get the colour bars (`add_bars`).
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configs import Config
from report.colours import Colours, choose_colours, colour_table, paint
from runtime.console import has_package, print_once

GIVEN, FORECAST = (40, 180, 70), (245, 140, 20)
PAPER, INK = (255, 255, 255), (40, 40, 40)
# pixels: between pictures, above a contact sheet, per line of a label
GAP, HEADER, LINE = 4, 16, 12
# pixels: width and height of a colour bar, and width of the cell that holds it
BAR_WIDTH, BAR_HEIGHT, BAR_CELL = 140, 10, 164
# The codecs that play almost everywhere: H.264 in MP4, Motion JPEG in AVI.
CODECS = {
    ".mp4": {"codec": "libx264", "quality": 8, "output_params": ["-preset", "veryfast"]},
    ".avi": {"codec": "mjpeg", "quality": 9, "pixelformat": "yuvj444p"},
}
# Browsers slow down delays that are shorter than two hundredths of a second.
MOST_GIF_FPS = 50
ENDINGS = (*CODECS, ".gif")


def as_pictures(
    truth: np.ndarray, samples: np.ndarray, channels: tuple[str, ...] = ()
) -> tuple[np.ndarray, np.ndarray, list[Colours]]:
    """Draw fields, truth (V, T, C, H, W) and samples (V, S, P, C, H, W) float32, as RGB frames.

    -> (truth (V, T, H', W', 3) uint8, samples (V, S, P, H', W', 3) uint8, colours of the channels).
    The range of the truth gives the colours, the same for all clips. Frames that are uint8 already
    are returned unchanged, without colours.
    """
    if truth.dtype == np.uint8:
        return truth, samples, []
    colours = choose_colours(truth, channels)
    return paint(truth, colours), paint(samples, colours), colours


def draw_bars(colours: Sequence[Colours], width: int) -> np.ndarray:
    """Draw the colour bar of each channel, with its name and its range, as an image (height, width,
    3). The image is wider than `width` where one bar needs more."""
    columns = max(1, width // BAR_CELL)
    cell = BAR_HEIGHT + 2 * LINE + 8
    image = Image.new("RGB", (max(width, BAR_CELL), cell * -(-len(colours) // columns)), PAPER)
    pen = ImageDraw.Draw(image)
    levels = np.linspace(0, 255, BAR_WIDTH).round().astype(int)
    for k, colour in enumerate(colours):
        left, top = k % columns * BAR_CELL + GAP, k // columns * cell + 2
        pen.text((left, top), wrap_text(colour.name, BAR_WIDTH)[0], INK, font=font())
        bar = np.broadcast_to(colour_table(colour.signed)[levels], (BAR_HEIGHT, BAR_WIDTH, 3))
        image.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, top + LINE + 2))
        marks = [(0.0, f"{colour.low:.3g}"), (1.0, f"{colour.high:.3g}")]
        if colour.signed:
            marks.insert(1, (0.5, "0"))
        for share, text in marks:
            # The first mark is aligned left, the last one right.
            x = left + share * (BAR_WIDTH - font().getlength(text))
            pen.text((x, top + LINE + BAR_HEIGHT + 3), text, INK, font=font())
    return np.asarray(image)


def add_bars(frames: np.ndarray, colours: Sequence[Colours]) -> np.ndarray:
    """Add the colour bars below frames (T, H, W, 3). Without colours, the frames are returned
    unchanged."""
    if not colours:
        return frames
    T, _, W, _ = frames.shape
    bars = draw_bars(colours, W)
    wider = ((0, 0), (0, 0), (0, bars.shape[1] - W), (0, 0))
    frames = np.pad(frames, wider, constant_values=255)
    return np.concatenate([frames, np.broadcast_to(bars, (T, *bars.shape))], 1)


def add_bars_to_sheet(sheet: Image.Image, colours: Sequence[Colours]) -> Image.Image:
    """`add_bars` for a contact sheet."""
    if not colours:
        return sheet
    return Image.fromarray(add_bars(np.asarray(sheet)[None], colours)[0])


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """(…, H, W, 3) -> (…, H * factor, W * factor, 3) by repeating pixels."""
    return frames.repeat(factor, -3).repeat(factor, -2)


def add_edges(frames: np.ndarray, condition: int, factor: int) -> np.ndarray:
    """Enlarge frames (T, H, W, 3) and add an edge: green for the first `condition` frames, orange
    for the others.
    """
    T, H, W, _ = frames.shape
    out = np.empty((T, H * factor + 2 * GAP, W * factor + 2 * GAP, 3), np.uint8)
    out[:condition], out[condition:] = GIVEN, FORECAST
    out[:, GAP:-GAP, GAP:-GAP] = enlarge(frames, factor)
    return out


def scale_of(size: int, wanted: int) -> int:
    return max(1, round(wanted / size))


def tracks(truth: np.ndarray, samples: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """[(label, frames (T, H, W, 3))] of the truth and of each sample. The given frames, which are
    true, precede each sample.
    """
    condition = len(truth) - samples.shape[1]
    named = [("truth", truth)]
    for k, sample in enumerate(samples, 1):
        named.append((f"sample {k}", np.concatenate([truth[:condition], sample])))
    return named


def rank_by_motion(truth: np.ndarray, condition: int) -> np.ndarray:
    """Indices of videos (V, T, H, W, 3), sorted by the motion in their first `condition` frames,
    largest first: a forecast is easiest to judge where the given frames show motion.
    """
    motion = []
    for video in truth[:, : max(2, condition)]:
        motion.append(np.abs(np.diff(video.astype(np.int16), axis=0)).mean())
    return np.argsort(-np.array(motion), kind="stable")


@functools.cache
def font():
    """Load the font that comes with matplotlib. Pillow's default font lacks letters such as ö."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 10)


def wrap_text(text: str, width: int) -> list[str]:
    """Wrap a text into lines of at most `width` pixels; break words that are longer."""
    length, lines = font().getlength, [""]
    for word in text.split():
        pieces = list(word) if length(word) > width else [word]
        for k, piece in enumerate(pieces):
            space = " " if k == 0 and lines[-1] else ""
            if lines[-1] and length(lines[-1] + space + piece) > width:
                lines.append(piece)
            else:
                lines[-1] += space + piece
    return lines


def draw_header(lines: list[str], height: int, width: int) -> np.ndarray:
    """Draw lines of text at the bottom of an image (height, width, 3)."""
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    for k, line in enumerate(reversed(lines)):
        pen.text((GAP, height - LINE * (k + 1) - 3), line, INK, font=font())
    return np.asarray(image)


def labelled_columns(
    columns: list[tuple[str, np.ndarray]], condition: int, factor: int
) -> np.ndarray:
    """Draw [(label, clips (V, T, H, W, 3))] as frames (T, H', W', 3): a column per label, a row per
    clip, with coloured edges.
    """
    stacks = []
    for _, clips in columns:
        stacks.append(np.concatenate([add_edges(clip, condition, factor) for clip in clips], 1))
    T, height, width, _ = stacks[0].shape
    labels = [wrap_text(label, width - 2 * GAP)[:5] for label, _ in columns]
    head = LINE * max(map(len, labels)) + 4
    # A gap after each column; the last one is dropped.
    gap = np.full((T, head + height, GAP, 3), 255, np.uint8)
    parts = []
    for lines, stack in zip(labels, stacks):
        top = np.broadcast_to(draw_header(lines, head, width), (T, head, width, 3))
        parts += [np.concatenate([top, stack], 1), gap]
    return np.concatenate(parts[:-1], 2)


def side_by_side(
    truth: np.ndarray, samples: np.ndarray, wanted: int = 128, with_truth: bool = True
) -> np.ndarray:
    """Draw one clip: truth (T, H, W, 3) beside samples (S, T - condition, H, W, 3).

    -> labelled frames (T, H', W', 3). wanted: approximate width of a column in pixels.
    """
    condition, factor = len(truth) - samples.shape[1], scale_of(truth.shape[1], wanted)
    shown = tracks(truth, samples)[0 if with_truth else 1 :]
    return labelled_columns([(label, frames[None]) for label, frames in shown], condition, factor)


def draw_mosaic(truth: np.ndarray, samples: np.ndarray, rows: int = 6) -> np.ndarray:
    """Stack the first `rows` clips: truth (V, T, …), samples (V, S, T - condition, …) -> frames (T,
    H', W', 3).
    """
    wanted = 128 if len(truth) <= 2 else 96
    stacked = [side_by_side(t, s, wanted) for t, s in zip(truth[:rows], samples[:rows])]
    return np.concatenate(stacked, 1)


def contact_sheet(
    truth: np.ndarray, samples: np.ndarray, rows: int = 4, columns: int = 12
) -> Image.Image:
    """Draw `rows` clips with time to the right: the last given frames and the forecast, the truth
    above at most three samples. columns: number of frames, evenly spaced.
    """
    condition, T = truth.shape[1] - samples.shape[2], truth.shape[1]
    shown = np.linspace(max(0, condition - 3), T - 1, min(columns, T)).round().astype(int)
    # The first forecast frame is always shown.
    shown = np.unique(np.append(shown, condition))
    factor, margin = scale_of(truth.shape[2], 64), 60
    cell_h, cell_w = truth.shape[2] * factor + 2 * GAP, truth.shape[3] * factor + 2 * GAP
    # Lay out the rows first: their number gives the height of the sheet.
    lines = []
    clips = min(rows, len(truth))
    for v in range(clips):
        for label, frames in tracks(truth[v], samples[v][:3]):
            lines.append((v, label, frames))
    height = HEADER + cell_h * len(lines) + 8 * (clips - 1)
    sheet = Image.new("RGB", (margin + cell_w * len(shown), height), PAPER)
    pen, y, previous = ImageDraw.Draw(sheet), HEADER, 0
    for k, t in enumerate(shown):
        pen.text((margin + k * cell_w + GAP, 2), f"t={t + 1 - condition:+d}", INK)
    for v, label, frames in lines:
        y, previous = y + 8 * (v != previous), v
        pen.text((2, y + cell_h // 2 - 6), label, INK)
        for k, cell in enumerate(add_edges(frames, condition, factor)[shown]):
            sheet.paste(Image.fromarray(cell), (margin + k * cell_w, y))
        y += cell_h
    return sheet


def usable_format(format: str) -> str:
    """Return the format. If the encoder of mp4 and avi is not installed, print so; return gif."""
    if format == "gif" or has_package("imageio_ffmpeg"):
        return format
    print_once(
        f"imageio-ffmpeg is not installed, so videos are GIFs; for {format}: pip install "
        "imageio-ffmpeg"
    )
    return "gif"


def gif_delays(count: int, fps: float) -> tuple[int, list[int]]:
    """Plan a GIF that lasts as long as `count` frames at `fps` -> (stride, delays): show every
    stride-th frame, each for its delay in hundredths of a second.

    GIF stores whole hundredths, so delays may differ by one. Browsers slow down delays below two,
    so the stride is larger than 1 above 50 frames per second.
    """
    every = math.ceil(fps / MOST_GIF_FPS)
    shown = range(0, count, every)
    # End of each shown frame. Rounding the ends, not the delays, keeps the errors from adding up.
    ends = [round(100 * min(k + every, count) / fps) for k in shown]
    delays = [end - start for start, end in zip([0, *ends], ends)]
    return every, [max(delay, 2) for delay in delays]


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (T, H, W, 3) as .mp4, .avi or .gif, chosen by the ending of the path."""
    if path.suffix == ".gif":
        every, delays = gif_delays(len(frames), fps)
        if every > 1:
            print_once(
                f"GIFs show at most {MOST_GIF_FPS} frames per second: of {fps:g}, one frame in "
                f"{every} is written (an .mp4 has all)"
            )
        imageio.mimwrite(path, list(frames[::every]), duration=[10 * d for d in delays], loop=0)
        return
    # H.264 with subsampled chroma needs an even height and width.
    frames = np.pad(
        frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge"
    )
    with imageio.get_writer(
        path, fps=fps, macro_block_size=2, ffmpeg_log_level="error", **CODECS[path.suffix]
    ) as writer:
        for frame in frames:
            writer.append_data(frame)


def measure_writing(config: Config) -> float:
    """Seconds to draw and write the video of one clip on this machine."""
    data, sample = config.data, config.sample
    size = (data.image_size, data.image_size, 3)
    if config.vqvae.kind == "none":
        C, H, W = config.latent.shape
        size = (H, C * W, 3)
    truth = np.zeros((data.condition + data.predict, *size), np.uint8)
    samples = np.zeros((sample.num_samples, data.predict, *size), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{usable_format(sample.format)}"
        # The first video also loads the font and the encoder.
        for _ in range(2):
            began = time.perf_counter()
            write_video(path, side_by_side(truth, samples), 10)
        return time.perf_counter() - began
