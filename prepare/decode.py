"""Frames out of video files and folders of images, by PyAV and Pillow; a file may lie on disk or in memory (of a zip, say)."""

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
    # Images are read without PyAV, see `opened` for video files.
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
    """A source that cannot be used, or not from here on; the message is the reason."""


@dataclass
class Film:
    """One video file or frame folder, and what is known of it."""

    path: Path
    name: str  # relative to --source
    images: list[Path | io.BytesIO] | None = None  # of a frame folder, in order
    data: bytes | None = None  # a video file's content, where it is at hand
    frames: int = 0  # counted without decoding
    decoded: int = 0
    rate: float | None = None  # frames per second; None for a frame folder
    size: tuple[int, int] = (0, 0)  # width, height
    short: str | None = None  # why the file is known to end too early
    corrupt: int = 0  # frames that the decoder flagged


def crop_boxes(width: int, height: int, tile: int | None) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the centre square, or of all whole tiles, row by row, with even margins."""
    side = tile or min(width, height)
    columns, rows = (width // side, height // side) if tile else (1, 1)
    left, top = (width - columns * side) // 2, (height - rows * side) // 2
    corners = [(left + x * side, top + y * side) for y in range(rows) for x in range(columns)]
    return [(x, y, x + side, y + side) for x, y in corners]


def at_ticks(frames: Iterable[tuple[float, object]], fps: float) -> Iterator:
    """From (seconds, item) in order, the items nearest to the ticks 0, 1/fps, ... after the first, each at most once.

    A frame is nearest to the ticks from halfway to its predecessor up to halfway to its successor.
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
    """Sorts 2.png before 10.png."""
    return [
        int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", path.name))
    ], path.name


def why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[
        0
    ]


def opened(film: Film) -> av.container.InputContainer:
    """UserError where PyAV is not installed."""
    if av is None:
        raise UserError(
            f"{film.path}: decoding video needs PyAV, which is not installed: pip install av"
        )
    return av.open(
        str(film.path) if film.data is None else io.BytesIO(film.data), metadata_errors="ignore"
    )


def probe(film: Film) -> None:
    """Fills in frames, rate, size and whether the file is cut short, without decoding; raises Broken."""
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
    first, last, end = (
        math.inf,
        -math.inf,
        0.0,
    )  # seconds: of the video's frames; where the last of any stream ends
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
                first, last = (min(first, seconds), max(last, seconds)) if video else (first, last)
    except READ_ERRORS as error:  # the frames before it can be used
        film.short = why(error)
    if last > first and not 0.99 < (film.rate or 0) * (last - first) / (film.frames - 1) < 1.01:
        film.rate = (film.frames - 1) / (last - first)  # the header is wrong, as it is for GIFs
    announced = (container.duration or 0) / av.time_base
    if (
        container.format.name == "avi" and film.rate
    ):  # whose duration FFmpeg shortens to what the file has room for
        announced = max(announced, stream.frames / film.rate)
    if cut_off and not film.short:
        film.short = "cut short: its last frame is not whole"
    if (
        last >= first and end < 0.98 * announced - 0.2
    ):  # a cut-off file is read to its end without an error
        film.short = f"cut short: {end:.1f} of {announced:.1f} s are there"


def timed_frames(
    film: Film, tick: Callable
) -> Iterator[tuple[float, tuple[int, Path | io.BytesIO | av.VideoFrame]]]:
    """(seconds, (index, image file or video frame)) of all frames; calls tick() at each."""
    with nullcontext() if film.images else opened(film) as container:
        if container and film.data is None:
            container.streams.video[0].thread_type = "AUTO"
        elif container:  # one of several files at once (prepare/build.py): a thread each
            container.streams.video[0].codec_context.thread_count = 1
        for item in film.images or container.decode(video=0):
            index, seconds = film.decoded, getattr(item, "time", None)
            film.decoded += 1
            film.corrupt += bool(getattr(item, "is_corrupt", False))
            tick()
            yield index / (film.rate or 1) if seconds is None else seconds, (index, item)


def is_plain_png(data: bytes) -> bool:
    """A whole PNG of 8-bit RGB, not interlaced, with nothing in it that bears on pixels but those, and every checksum right?"""
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
    """(H, W, 3) uint8 of a plain PNG by FFmpeg, which takes two thirds of Pillow's time for the same pixels; None for any
    other, of which Pillow knows more."""
    if av is None or not is_plain_png(data):
        return None
    codec = av.CodecContext.create("png", "r")
    codec.thread_count = 1
    frames = codec.decode(av.Packet(data))
    return frames[0].to_ndarray() if len(frames) == 1 and frames[0].format.name == "rgb24" else None


def rgb(item: Path | io.BytesIO | av.VideoFrame, reformat: Callable | None = None) -> Image.Image:
    """reformat: a VideoReformatter's, where many frames of one film follow: to set up the conversion takes longer than to
    convert."""
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
    """(index in the film, RGB image) of the frames to keep, all of one size; raises Broken where it cannot go on."""
    frames = timed_frames(film, tick)
    reformat = None if film.images else VideoReformatter().reformat
    try:
        for index, item in (
            at_ticks(frames, fps) if fps and not film.images else (item for _, item in frames)
        ):
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
