"""Decode frames of video files and folders of images with PyAV and Pillow.

A file is on disk or in memory (for example a member of a zip). Frames are returned upright, with
square pixels, and in parts: a new part begins after each hole in the timestamps and at the joint of
two recordings.
"""

from __future__ import annotations

import io
import math
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from prepare.container import (
    Broken,
    Index,
    av,
    decode_packet,
    film_stream,
    film_streams,
    has_alpha,
    has_invented_timestamps,
    open_video,
    read_turn,
    to_upright_rgb,
    upright_size,
)
from prepare.timing import Clock, Steps, at_ticks, measure_steps

# Images do not need PyAV; `open_video` raises UserError for video files.
if av is not None:
    from av.video.reformatter import VideoReformatter

# PNG chunks that do not change the 8-bit pixel values which Pillow and FFmpeg return.
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
WHITENED = "transparent; composed on white"
MAX_GAP = 3.0  # a step between timestamps of more than this many median steps is a hole
WIDEST = 8  # a pixel aspect ratio above this, or below its inverse, is ignored as an error
# Transfer functions of HDR by their number in ITU-T H.273.
HDR = {16: "PQ", 18: "HLG"}


@dataclass
class Film:
    """One video file or frame folder: its properties, and counts of what decoding encountered."""

    path: Path
    name: str  # relative to --source
    images: list[Path | io.BytesIO] | None = None  # of a frame folder, in order
    breaks: tuple[int, ...] = ()  # indices of the images that start a new part
    data: bytes | None = None  # content of a video file, if it is in memory
    max_gap: float = MAX_GAP
    # Set by probe().
    frames: int = 0  # counted without decoding; frames hidden by an edit list do not count
    rate: float | None = None  # frames per second; None for a frame folder
    steps: Steps | None = None  # between timestamps; None if there are none
    by_decoding: bool = False  # use decoding timestamps, see has_invented_timestamps()
    size: tuple[int, int] = (0, 0)  # width, height, as shown
    aspect: float = 1.0  # width of a stored pixel divided by its height
    short: str | None = None  # evidence that the file is cut short
    missing: int = 0  # frames in the file's index that are not in the file
    notes: list[str] = field(default_factory=list)
    # Set by read().
    decoded: int = 0  # frames decoded so far
    broken: bool = False  # whether reading ended before the end of the film
    used: int = 0  # decoded frames that were yielded
    repeated: int = 0  # repetitions of yielded frames, to reach the frame rate
    corrupt: int = 0  # frames that the decoder flagged
    refused: int = 0  # packets that the decoder refused
    interlaced: int = 0  # interlaced frames
    part: int = 0  # number of the part to which the last yielded frame belongs, from 1
    holes: int = 0  # number of holes in the timestamps
    longest: float = 0.0  # length of the longest hole in seconds
    joints: int = 0  # number of times that the timestamps go back
    uneven: tuple[float, float] | None = None  # range of the steps in seconds, if they vary


def crop_boxes(width: int, height: int, tile: int | None) -> list[tuple[int, int, int, int]]:
    """Return (left, top, right, bottom) of the centre square, or of all whole tiles row by row.

    The remaining margins on opposite sides are equal up to one pixel. tile: pixels; None or 0: the
    centre square.
    """
    side = tile or min(width, height)
    columns, rows = (width // side, height // side) if tile else (1, 1)
    left, top = (width - columns * side) // 2, (height - rows * side) // 2
    corners = [(left + x * side, top + y * side) for y in range(rows) for x in range(columns)]
    return [(x, y, x + side, y + side) for x, y in corners]


def why(error: Exception) -> str:
    """Return the first line of an error's message."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(message).splitlines()[0]


# ------------------------------------------------------------------------------------------ probing
def probe(film: Film) -> None:
    """Set the properties of a film without decoding more than one frame; raises Broken."""
    try:
        if film.images:
            film.frames = len(film.images)
            with Image.open(film.images[0]) as image:
                film.size = image.size[::-1] if is_turned(image) else image.size
        else:
            if film.data is None and not film.path.stat().st_size:
                raise Broken("the file is empty")
            with open_video(film.path, film.data) as container:
                probe_video(film, container)
    except READ_ERRORS as error:
        raise Broken(why(error)) from None


def probe_video(film: Film, container: av.container.InputContainer) -> None:
    """Read all packets of a video and set the film's properties; decodes the first frame only."""
    stream = film_stream(container)
    index = Index(stream)
    # Decoding and presentation timestamps of the frames, in the order of the file.
    decoding, shown = array("q"), array("q")
    end = 0.0  # seconds, end of the last packet of any stream
    cut_off = False
    first = None
    try:
        for packet in container.demux():
            ours = packet.stream.index == stream.index
            if ours and first is None:
                first = next(decode_packet(packet), None)
            if not packet.size:
                continue
            if ours:
                index.correct(packet)
                cut_off = packet.is_corrupt
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                seconds = float((stamp + (packet.duration or 0)) * packet.time_base)
                end = max(end, seconds)
            if ours and not packet.is_discard:
                film.frames += 1
                if stamp is not None:
                    # Matroska does not state when the first frames have to be decoded.
                    last = decoding[-1] if len(decoding) else -(1 << 62)
                    decoding.append(last if packet.dts is None else packet.dts)
                    shown.append(stamp)
    except READ_ERRORS as error:
        # The frames before the error can be used.
        film.short = why(error)
    if first is None:
        raise Broken(film.short or "not one frame could be decoded")
    film.missing = index.missing()
    film.by_decoding = has_invented_timestamps(stream, np.array(shown))
    set_picture_properties(film, first, stream)
    set_rate(film, stream, np.array(decoding), np.array(shown))
    announced = (container.duration or 0) / av.time_base
    # FFmpeg reduces the duration of a truncated AVI by the size of the file.
    if container.format.name == "avi" and film.rate:
        announced = max(announced, stream.frames / film.rate)
    if cut_off and not film.short:
        film.short = "cut short: its last frame is not whole"
    # FFmpeg reads a truncated file to its end without an error.
    if len(shown) and end < 0.98 * announced - 0.2:
        film.short = f"cut short: contains {end:.1f} of {announced:.1f} s"


def set_rate(film: Film, stream: av.VideoStream, decoding: np.ndarray, shown: np.ndarray) -> None:
    """Set the steps and the frame rate from the timestamps, or from the header without any."""
    announced = float(stream.average_rate or 0)
    film.rate = announced or None
    film.steps = measure_steps(decoding, shown, float(stream.time_base or 0))
    # The rate in the header is exact if it agrees with the timestamps, which are rounded. It may
    # also be wrong, as for GIFs.
    if film.steps and not 0.99 < announced * film.steps.regular < 1.01:
        film.rate = 1 / film.steps.regular


def set_picture_properties(film: Film, frame: av.VideoFrame, stream: av.VideoStream) -> None:
    """Set size and aspect from the first frame, and add notes about the whole film."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if 1 / WIDEST <= aspect <= WIDEST:
        film.aspect = aspect
    else:
        film.notes.append(f"its pixel aspect ratio {aspect:g} is not applied")
    if not read_turn(frame)[1]:
        film.notes.append("its display matrix is no multiple of a right angle, and is not applied")
    # Most files with an alpha channel are opaque, so only transparent pixels are worth a note.
    if has_alpha(frame) and frame.to_ndarray(format="rgba")[..., 3].min() < 255:
        film.notes.append(WHITENED)
    film.size = upright_size(frame, film.aspect)
    films = len(film_streams(stream.container))
    if films > 1:
        film.notes.append(
            f"{films} video tracks; track {stream.index} is used, {stream.width}x{stream.height}"
        )
    transfer = HDR.get(int(frame.color_trc or 0))
    if transfer:
        film.notes.append(
            f"HDR ({transfer}): kept without tone mapping, so its colours are pale; convert it to "
            "SDR first, e.g. by FFmpeg's filters zscale and tonemap"
        )


# ----------------------------------------------------------------------------------------- decoding
def video_frames(film: Film, clock: Clock, container: av.container.InputContainer) -> Iterator:
    """Yield the frames of a video; call clock.suspect() where frames may have been lost."""
    stream = film_stream(container)
    index = Index(stream)

    def refuse() -> None:
        film.refused += 1
        clock.suspect()

    if film.data is None:
        stream.thread_type = "AUTO"
    else:
        # prepare/build.py decodes one file per process, with one thread each.
        stream.codec_context.thread_count = 1
    for packet in container.demux(stream):
        if packet.size and (index.correct(packet) or packet.is_corrupt):
            clock.suspect()
        yield from decode_packet(packet, refuse)


def timed_frames(film: Film, tick: Callable) -> Iterator[tuple[int, float, tuple[int, object]]]:
    """Yield (part, seconds, (index, image file or video frame)) of all frames.

    Calls tick() once per frame. For a folder of images, seconds is the index.
    """
    if film.images:
        for index, image in enumerate(film.images):
            film.decoded += 1
            tick()
            yield 1 + sum(index >= k for k in film.breaks), float(index), (index, image)
        return
    with open_video(film.path, film.data) as container:
        stream = film_stream(container)
        step = film.steps.median if film.steps else 1 / (film.rate or 1)
        # The clock divides the frames, which arrive in order of presentation, into parts.
        clock = Clock(step, film.max_gap, float(stream.time_base or 0))
        for frame in video_frames(film, clock, container):
            stamp = frame.dts if film.by_decoding else frame.pts
            seconds = None if stamp is None else float(stamp * frame.time_base)
            part, seconds = clock.show(seconds)
            film.holes, film.longest, film.joints = clock.holes, clock.longest, clock.joints
            film.uneven = clock.uneven
            film.decoded += 1
            if frame.is_corrupt:
                film.corrupt += 1
                clock.suspect()
            film.interlaced += bool(frame.interlaced_frame)
            tick()
            yield part, seconds, (film.decoded - 1, frame)


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
    # Walk through the chunks; each has a length, a type, its data and a CRC-32.
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

    FFmpeg returns the same pixels in two thirds of Pillow's time. Pillow reads all other files,
    because it supports more formats.
    """
    if av is None or not is_plain_png(data):
        return None
    codec = av.CodecContext.create("png", "r")
    codec.thread_count = 1
    frames = codec.decode(av.Packet(data))
    return frames[0].to_ndarray() if len(frames) == 1 and frames[0].format.name == "rgb24" else None


def is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF orientation of an image exchanges its width and its height."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def read_rgb(film: Film, item: Path | io.BytesIO) -> Image.Image:
    """Read an image file as upright RGB; raises Broken for more than 8 bits per channel.

    The EXIF orientation is applied. A transparent image is composed on white.
    """
    if isinstance(item, io.BytesIO) and (pixels := png_pixels(item.getvalue())) is not None:
        return Image.fromarray(pixels)
    with Image.open(item) as image:
        if image.mode.startswith(("I", "F")):
            raise Broken(f"{item.name}: pixels of mode {image.mode}, need 8 bits per channel")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255 and WHITENED not in film.notes:
                film.notes.append(WHITENED)
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def keeps_own_rate(film: Film, fps: float | None) -> bool:
    """Return whether a film keeps its frame rate: if --fps is not set, or above the film's rate."""
    return fps is None or (film.rate is not None and fps > 1.01 * film.rate)


def resample(film: Film, frames: Iterator, fps: float) -> Iterator[tuple[int, tuple[int, object]]]:
    """Yield (part, (index, item)) of the frames nearest to the ticks of each part."""
    step = film.steps.median if film.steps else math.inf
    for part, members in groupby(frames, key=lambda frame: frame[0]):
        times = ((seconds, item) for _, seconds, item in members)
        for item in at_ticks(times, fps, step):
            yield part, item


def read(
    film: Film, fps: float | None = None, tick: Callable = lambda: None
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index in the film, RGB image) of the frames to keep, all of the same size.

    fps: frames per second to resample to by the timestamps, where frames are dropped or repeated;
    a slower film and a folder of images keep all frames. After each yield, film.part is the number
    of the part to which the frame belongs: no clip may contain frames of two parts.

    Raises Broken at the first frame that has another size, or where reading the file fails.
    """
    frames = timed_frames(film, tick)
    reformat = None if film.images else VideoReformatter().reformat
    if film.images or keeps_own_rate(film, fps):
        kept = ((part, item) for part, _, item in frames)
    else:
        kept = resample(film, frames, fps)
    last, turns = -1, {}
    # Reset at the end, so that the film counts as broken if an error ends the reading.
    film.broken = True
    try:
        for part, (index, item) in kept:
            # Resampling repeats an item by yielding it again; the image is converted only once.
            if index == last:
                film.repeated += 1
            else:
                if film.images:
                    image = read_rgb(film, item)
                else:
                    image = to_upright_rgb(item, film.aspect, reformat, turns)
                film.used += 1
            if image.size != film.size:
                raise Broken(
                    "frame {} is {}x{}, the first {}x{}".format(index, *image.size, *film.size)
                )
            last, film.part = index, part
            yield index, image
    except READ_ERRORS as error:
        raise Broken(why(error)) from None
    if not film.decoded:
        raise Broken("not one frame could be decoded")
    if film.short:
        raise Broken(film.short)
    film.broken = False


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where necessary."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def lost_frames(film: Film) -> int:
    """Return the number of frames lost to damage; 0 if the decoder met no damage."""
    if not (film.corrupt or film.refused or film.missing):
        return 0
    # If reading stopped early, the frames after that point do not count as lost to damage.
    undecoded = 0 if film.broken else film.frames - film.decoded
    return max(film.missing + film.refused, film.missing + undecoded)


def list_findings(film: Film) -> list[str]:
    """Return notes for the user on a film that was read, one line each."""
    found = list(film.notes)
    # Damage first, then what the timestamps show, then properties of the whole film.
    if film.corrupt:
        found.append(f"{count(film.corrupt, 'damaged frame')} reported by the decoder; kept")
    lost = lost_frames(film)
    if lost:
        found.append(f"{count(lost, 'frame')} lost to damage")
    step = film.steps.median if film.steps else 1 / (film.rate or 1)
    if film.holes:
        found.append(
            f"{count(film.holes, 'hole')} in the timestamps (damage or a pause) of up to "
            f"{film.longest:.2f} s, while frames are {1000 * step:.0f} ms apart; no clip crosses a "
            "hole (--max_gap)"
        )
    if film.joints:
        found.append(
            f"its timestamps go back {count(film.joints, 'time')}, as in joined recordings or "
            "after damage; no clip crosses that point"
        )
    if film.uneven and not film.repeated:
        low, high = film.uneven
        kept = "" if film.used < film.decoded else ", all of them kept; --fps resamples by time"
        found.append(
            f"variable frame rate: {1000 * low:.0f} to {1000 * high:.0f} ms between frames{kept}"
        )
    if film.repeated:
        found.append(f"{count(film.repeated, 'frame')} repeated, to keep to --fps by time")
    if film.interlaced:
        found.append(
            f"{count(film.interlaced, 'interlaced frame')}, each of two fields of different times; "
            "deinterlace it first, e.g. by FFmpeg's filter bwdif"
        )
    return found
