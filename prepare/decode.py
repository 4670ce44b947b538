"""Decode frames of video files and folders of images with PyAV and Pillow.

A file is on disk or in memory (a member of a zip, for example).
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from runtime.console import UserError

try:
    import av
    from av.video.reformatter import VideoReformatter
except ModuleNotFoundError:
    # Images do not need PyAV; `opened` raises UserError for video files.
    av = None

PLAIN_CHUNKS = (
    b"IHDR",
    b"IDAT",
    b"IEND",
    b"pHYs",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"tIME",
    b"gAMA",
    b"cHRM",
    b"sRGB",
)
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
if av is not None:
    READ_ERRORS = (av.error.FFmpegError, *READ_ERRORS)
AV_VERSION = "not installed" if av is None else av.__version__


class Broken(Exception):
    """A source, or its rest, cannot be used; the message is the reason."""


@dataclass
class Film:
    """One video file or frame folder, and its properties."""

    path: Path
    name: str  # relative to --source
    images: list[Path | io.BytesIO] | None = None  # of a frame folder, in order
    data: bytes | None = None  # content of a video file, if it is in memory
    frames: int = 0  # counted without decoding
    decoded: int = 0  # frames decoded so far
    rate: float | None = None  # frames per second; None for a frame folder
    size: tuple[int, int] = (0, 0)  # width, height
    short: str | None = None  # evidence that the file is cut short
    corrupt: int = 0  # frames that the decoder flagged


def crop_boxes(width: int, height: int, tile: int | None) -> list[tuple[int, int, int, int]]:
    """Return (left, top, right, bottom) of the centre square, or of all whole tiles row by row.

    Margins on opposite sides are equal up to one pixel.
    """
    side = tile or min(width, height)
    columns, rows = (width // side, height // side) if tile else (1, 1)
    left, top = (width - columns * side) // 2, (height - rows * side) // 2
    corners = [(left + x * side, top + y * side) for y in range(rows) for x in range(columns)]
    return [(x, y, x + side, y + side) for x, y in corners]


def at_ticks(frames: Iterable[tuple[float, object]], fps: float) -> Iterator:
    """Yield the items of (seconds, item) that are nearest to the ticks 0, 1/fps, ..., each once.

    Ticks count from the first frame. A frame is nearest to the ticks from halfway to its
    predecessor up to halfway to its successor.
    """
    start, held, half, tick = 0.0, None, 0.5 / fps, 0
    for seconds, item in frames:
        if held is None:
            start = seconds
        else:
            half = (seconds - held[0]) / 2
            after = math.ceil((held[0] + half - start) * fps - 1e-6)
            if after > tick:
                yield held[1]
            tick = max(tick, after)
        held = seconds, item
    if held is not None and math.ceil((held[0] + half - start) * fps - 1e-6) > tick:
        yield held[1]


def natural(path: PurePath) -> tuple:
    """Sort key that sorts 2.png before 10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], path.name


def why(error: Exception) -> str:
    """Return the first line of an error's message."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(message).splitlines()[0]


def opened(film: Film) -> av.container.InputContainer:
    """Open a video file; UserError if PyAV is not installed."""
    if av is None:
        raise UserError(
            f"{film.path}: decoding video needs PyAV, which is not installed: pip install av"
        )
    file = str(film.path) if film.data is None else io.BytesIO(film.data)
    return av.open(file, metadata_errors="ignore")


def probe(film: Film) -> None:
    """Set frames, rate, size and short of a film without decoding it; raises Broken."""
    try:
        if film.images:
            film.frames = len(film.images)
            with Image.open(film.images[0]) as image:
                film.size = image.size
        else:
            with opened(film) as container:
                probe_video(film, container)
    except READ_ERRORS as error:
        raise Broken(why(error)) from None


def probe_video(film: Film, container: av.container.InputContainer) -> None:
    if not container.streams.video:
        raise Broken("no video stream")
    stream = container.streams.video[0]
    film.size, film.rate = (stream.width, stream.height), float(stream.average_rate or 0) or None
    first, last = math.inf, -math.inf  # seconds, of the video's frames
    end = 0.0  # seconds, end of the last packet of any stream
    cut_off = False
    try:
        for packet in container.demux():
            stamp = packet.dts if packet.pts is None else packet.pts
            video = bool(packet.size) and packet.stream.index == stream.index
            film.frames += video
            cut_off = packet.is_corrupt if video else cut_off
            if packet.size and stamp is not None:
                seconds = float(stamp * packet.time_base)
                end = max(end, seconds + float((packet.duration or 0) * packet.time_base))
                if video:
                    first, last = min(first, seconds), max(last, seconds)
    except READ_ERRORS as error:
        # The frames before the error can be used.
        film.short = why(error)
    # The rate in the header may be wrong, as for GIFs.
    if last > first and not 0.99 < (film.rate or 0) * (last - first) / (film.frames - 1) < 1.01:
        film.rate = (film.frames - 1) / (last - first)
    announced = (container.duration or 0) / av.time_base
    # FFmpeg reduces the duration of a truncated AVI by the size of the file.
    if container.format.name == "avi" and film.rate:
        announced = max(announced, stream.frames / film.rate)
    if cut_off and not film.short:
        film.short = "cut short: its last frame is not whole"
    # FFmpeg reads a truncated file to its end without an error.
    if last >= first and end < 0.98 * announced - 0.2:
        film.short = f"cut short: {end:.1f} of {announced:.1f} s are there"


def timed_frames(
    film: Film, tick: Callable
) -> Iterator[tuple[float, tuple[int, Path | io.BytesIO | av.VideoFrame]]]:
    """Yield (seconds, (index, image file or video frame)) of all frames; call tick() per frame."""
    with nullcontext() if film.images else opened(film) as container:
        if container and film.data is None:
            container.streams.video[0].thread_type = "AUTO"
        elif container:
            # prepare/build.py decodes one file per process, with one thread each.
            container.streams.video[0].codec_context.thread_count = 1
        for item in film.images or container.decode(video=0):
            index, seconds = film.decoded, getattr(item, "time", None)
            film.decoded += 1
            film.corrupt += bool(getattr(item, "is_corrupt", False))
            tick()
            yield index / (film.rate or 1) if seconds is None else seconds, (index, item)


def is_plain_png(data: bytes) -> bool:
    """Return whether data is a complete PNG of 8-bit RGB without interlacing.

    Only chunks that do not change pixel values may be present, and all checksums must match.
    """
    if (
        data[:8] != b"\x89PNG\r\n\x1a\n"
        or data[12:16] != b"IHDR"
        or data[24:29] != b"\x08\x02\0\0\0"
    ):
        return False
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind not in PLAIN_CHUNKS or end > len(data):
            return False
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if kind == b"IEND":
            return end == len(data)
        at = end
    return False


def png_pixels(data: bytes) -> np.ndarray | None:
    """Decode a plain PNG with FFmpeg to (H, W, 3) uint8; None for any other file.

    FFmpeg takes two thirds of Pillow's time for the same pixels. Pillow decodes the other files,
    because it supports more formats.
    """
    if av is None or not is_plain_png(data):
        return None
    codec = av.CodecContext.create("png", "r")
    codec.thread_count = 1
    frames = codec.decode(av.Packet(data))
    return frames[0].to_ndarray() if len(frames) == 1 and frames[0].format.name == "rgb24" else None


def rgb(item: Path | io.BytesIO | av.VideoFrame, reformat: Callable | None = None) -> Image.Image:
    """Convert an image file or video frame to RGB; raises Broken for more than 8 bits per channel.

    reformat: method of a VideoReformatter that the frames of one film share, because its setup
    takes longer than the conversion of a frame.
    """
    if not isinstance(item, Path | io.BytesIO):
        reformat = reformat or av.VideoFrame.reformat
        return Image.fromarray(reformat(item, format="rgb24").to_ndarray())
    if isinstance(item, io.BytesIO) and (pixels := png_pixels(item.getvalue())) is not None:
        return Image.fromarray(pixels)
    with Image.open(item) as image:
        if image.mode.startswith(("I", "F")):
            raise Broken(f"{item.name}: pixels of mode {image.mode}, need 8 bits per channel")
        return image.convert("RGB")


def read(
    film: Film, fps: float | None = None, tick: Callable = lambda: None
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index in the film, RGB image) of the frames to keep, all of the same size.

    Raises Broken at the first frame that cannot be decoded or has another size.
    """
    frames = timed_frames(film, tick)
    reformat = None if film.images else VideoReformatter().reformat
    if fps and not film.images:
        kept = at_ticks(frames, fps)
    else:
        kept = (item for _, item in frames)
    try:
        for index, item in kept:
            image = rgb(item, reformat)
            if image.size != film.size:
                raise Broken(
                    "frame {} is {}x{}, the first {}x{}".format(index, *image.size, *film.size)
                )
            yield index, image
    except READ_ERRORS as error:
        raise Broken(why(error)) from None
    if not film.decoded:
        raise Broken("not one frame could be decoded")
    if film.short:
        raise Broken(film.short)
