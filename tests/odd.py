"""Small video files of the kinds that phones, screen recorders, cameras and damaged disks leave."""

import struct
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

IDENTITY = (1, 0, 0, 1)


def greys(levels, height=64, width=64):
    """Frames (T, H, W, 3) uint8 of one grey level each."""
    levels = np.asarray(list(levels), np.uint8)[:, None, None, None]
    return np.broadcast_to(levels, (len(levels), height, width, 3))


def corners(count, height=48, width=80):
    """Frames of four colours: red, green above blue, white."""
    frame = np.zeros((height, width, 3), np.uint8)
    top, left = slice(None, height // 2), slice(None, width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    frame[top, left] = (200, 30, 30)
    frame[top, right] = (30, 200, 30)
    frame[bottom, left] = (30, 30, 200)
    frame[bottom, right] = 200
    return np.repeat(frame[None], count, 0)


def encode(
    path,
    frames,
    codec="libx264",
    pixels="yuv420p",
    rate=25,
    stamps=None,
    unit=Fraction(1, 1000),
    options=None,
    setup=lambda stream: None,
    format=None,
):
    """Write frames (T, H, W, 3) uint8. stamps: of each frame, in units of seconds; setup(stream) is
    called before the first frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open("file:" + str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.options = {"crf": "4"} if options is None and codec == "libx264" else options or {}
        if stamps is not None:
            stream.time_base = stream.codec_context.time_base = unit
        setup(stream)
        for k, array in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            picture = picture.reformat(format=pixels)
            if stamps is not None:
                picture.pts, picture.time_base = stamps[k], unit
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def turned(path, matrix):
    """Write the display matrix (a, b, c, d) into an MP4."""
    a, b, c, d = (value << 16 for value in matrix)
    data = bytearray(path.read_bytes())
    box = data.find(b"tkhd") + 4
    at = box + (40 if data[box] == 0 else 52)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def damage(path, first, last, seed=0):
    """Overwrite the share from `first` to `last` of a file with noise."""
    data = bytearray(path.read_bytes())
    start, stop = int(first * len(data)), int(last * len(data))
    data[start:stop] = np.random.default_rng(seed).bytes(stop - start)
    path.write_bytes(data)
    return path


def join(path, *parts):
    """Append files, as some recorders do."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def empty_chunks(path, numbers):
    """Empty some frames of an AVI, as recorders do for frames that repeat the one before."""
    data = bytearray(path.read_bytes())
    at = data.find(b"movi") + 4
    index = data.find(b"idx1")
    for k in range((len(data) - index - 8) // 16):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if k in numbers:
            # The rest of the chunk becomes one that no player reads.
            data[at + 4 : at + 8] = bytes(4)
            data[at + 8 : at + 16] = b"JUNK" + (size - 8).to_bytes(4, "little")
            entry = index + 8 + 16 * k
            data[entry + 12 : entry + 16] = bytes(4)
        at += 8 + size + size % 2
    path.write_bytes(data)
    return path


def with_cover(path, frames, cover):
    """Write an MP4 whose first video stream is a cover picture."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mjpeg", rate=25)
        picture.height, picture.width = cover.shape[:2]
        picture.pix_fmt = "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        film = None
        if len(frames):
            film = container.add_stream("libx264", rate=25, options={"crf": "4"})
            film.height, film.width = frames.shape[1:3]
            film.pix_fmt = "yuv420p"
        else:
            sound(container, None)
        image = av.VideoFrame.from_ndarray(cover, format="rgb24").reformat(format="yuvj420p")
        image.pts = 0
        container.mux(picture.encode(image))
        for array in frames:
            container.mux(film.encode(av.VideoFrame.from_ndarray(array.copy(), format="rgb24")))
        container.mux([*(film.encode() if film else []), *picture.encode()])
    return path


def two_tracks(path, small, large):
    """Write an MKV with two tracks of moving pictures."""
    with av.open(str(path), "w") as container:
        streams = []
        for frames in (small, large):
            stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        for pair in zip(small, large):
            for stream, array in zip(streams, pair):
                picture = av.VideoFrame.from_ndarray(array.copy(), format="rgb24")
                container.mux(stream.encode(picture))
        for stream in streams:
            container.mux(stream.encode())
    return path


def sound(container, path):
    """Write a second of silence; path: into a file of its own."""
    if path is not None:
        with av.open(str(path), "w") as own:
            sound(own, None)
        return path
    stream = container.add_stream("aac", rate=16000)
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
    silence.rate = 16000
    container.mux([*stream.encode(silence), *stream.encode()])
    return None
