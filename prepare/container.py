"""Read one video file with PyAV: choose its best stream, correct its packets, convert its frames to
upright RGB.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.console import UserError

try:
    import av
except ModuleNotFoundError:
    # Folders of images do not need PyAV.
    av = None

AV_VERSION = "not installed" if av is None else av.__version__
# A display matrix (a, b, c, d) maps the stored point (x, y) to (ax + cy, bx + dy), y downwards.
TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
# The transpositions that exchange width and height.
SIDEWAYS = (
    Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)


class Broken(Exception):
    """A source, or the rest of it, cannot be used. The message is the reason."""


# -------------------------------------------------------------------------------------- the stream
def open_video(path: Path, data: bytes | None = None) -> av.container.InputContainer:
    """Open a video file; UserError if PyAV is not installed."""
    if av is None:
        raise UserError(
            f"{path}: decoding video needs PyAV, which is not installed: pip install av"
        )
    # Without the prefix, FFmpeg reads a name such as `12:30.mp4` as protocol `12`.
    file = f"file:{path}" if data is None else io.BytesIO(data)
    return av.open(file, metadata_errors="ignore")


def film_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Return the video stream that FFmpeg ranks best, cover pictures excluded; raises Broken."""
    films = film_streams(container)
    if not films:
        cover = " except a cover picture" if container.streams.video else ""
        raise Broken(f"no video stream{cover}")
    best = container.streams.best("video")
    chosen = best if best in films else films[0]
    if chosen.codec_context is None:
        raise Broken("FFmpeg has no decoder for its video stream")
    return chosen


def film_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Return the video streams, without cover pictures."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


# ------------------------------------------------------------------------------------- its packets
class Index:
    """The index of an AVI, which states the time of each frame; empty for other containers.

    FFmpeg takes the time of an AVI frame from the number of frames read before. After a damaged
    chunk, all times are therefore too early; `correct` replaces them by the times of the index.
    """

    def __init__(self, stream: av.VideoStream):
        entries = ()
        if stream.container.format.name == "avi":
            entries = getattr(stream, "index_entries", ())
        # A chunk has a header of 8 bytes.
        positions = (entry.pos + 8 for entry in entries if entry.size)
        self.positions = np.fromiter(positions, np.int64)
        stamps = (entry.timestamp for entry in entries if entry.size)
        self.stamps = np.fromiter(stamps, np.int64)
        self.found = 0
        self.unknown = 0
        self.last = -1

    def missing(self) -> int:
        """Return how many frames of the index were not read; 0 if a packet was not in the index,
        which is then not trusted.
        """
        return 0 if self.unknown else len(self.positions) - self.found

    def correct(self, packet: av.Packet) -> bool:
        """Correct the timestamps of a packet; return whether packets before it are missing."""
        k = int(np.searchsorted(self.positions, packet.pos or 0))
        if k == len(self.positions) or self.positions[k] != packet.pos:
            self.unknown += 1
            return False
        jump = k > self.last + 1
        self.last = k
        self.found += 1
        shift = int(self.stamps[k]) - packet.dts if packet.dts is not None else 0
        if shift:
            packet.dts += shift
            if packet.pts is not None:
                packet.pts += shift
        return jump


def has_invented_timestamps(stream: av.VideoStream, shown: np.ndarray) -> bool:
    """Return whether the presentation timestamps of a stream must be ignored.

    An AVI stores none, so FFmpeg derives them from the decoding order. With B-frames, frames are
    presented in another order: if the derived timestamps only grow, FFmpeg missed that order.
    shown: (frames,) the presentation timestamps, in decoding order.
    """
    if stream.container.format.name != "avi":
        return False
    return not stream.codec_context.has_b_frames or bool((np.diff(shown) > 0).all())


def decode_packet(packet: av.Packet, refused: Callable[[], None] = lambda: None) -> Iterator:
    """Yield the frames that a packet completes; call refused() if it cannot be decoded."""
    # Some AVIs have empty packets for repeated frames; a decoder reads an empty packet as the end.
    if not packet.size and packet.dts is not None:
        return
    try:
        yield from packet.decode()
    except EOFError:
        return
    except av.error.FFmpegError:
        refused()


# -------------------------------------------------------------------------------------- its frames
def read_turn(frame: av.VideoFrame) -> tuple[Image.Transpose | None, bool]:
    """Convert a frame's display matrix to a transposition, None if the frame is upright.

    The second value is False if the matrix is no transposition, for example a rotation by an angle
    that is no multiple of 90 degrees.
    """
    side = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if side is None:
        return None, True
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side)[:36])
    scale = max(map(abs, (a, b, c, d))) or 1
    exact = [value / scale for value in (a, b, c, d)]
    matrix = tuple(map(round, exact))
    near = max(abs(value - whole) for value, whole in zip(exact, matrix)) < 0.02
    return TURNS.get(matrix), near and matrix in TURNS


def displayed_width(frame: av.VideoFrame, aspect: float) -> int:
    """Return the width of a frame after conversion to square pixels, before rotation."""
    return max(1, round(frame.width * aspect))


def upright_size(frame: av.VideoFrame, aspect: float) -> tuple[int, int]:
    """Return the width and height of the image that to_upright_rgb() makes of a frame."""
    width, height = displayed_width(frame, aspect), frame.height
    turn, _ = read_turn(frame)
    return (height, width) if turn in SIDEWAYS else (width, height)


def has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def to_upright_rgb(
    frame: av.VideoFrame,
    aspect: float,
    reformat: Callable,
    turns: dict[int, Image.Transpose | None],
) -> Image.Image:
    """Convert a video frame to RGB with square pixels, and turn it by its display matrix.

    A transparent frame is composed on white.

    reformat: method of a VideoReformatter. All frames of a film share it, because its setup takes
    longer than the conversion of a frame. turns: cache {angle of the frame: its transposition} that
    all frames of a film share, because a frame whose side data are read stays in memory until
    Python's garbage collection.
    """
    width = displayed_width(frame, aspect)
    format = "rgba" if has_alpha(frame) else "rgb24"
    if width == frame.width:
        pixels = reformat(frame, format=format)
    else:
        pixels = reformat(frame, width, frame.height, format=format, interpolation="BICUBIC")
    image = Image.fromarray(pixels.to_ndarray())
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if frame.rotation not in turns:
        turns[frame.rotation], _ = read_turn(frame)
    turn = turns[frame.rotation]
    return image if turn is None else image.transpose(turn)
