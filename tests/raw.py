"""Miniature raw datasets from the committed clip, for the tests of prepare/."""

import functools
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.console import run_command

av = pytest.importorskip("av")

WALK = Path(__file__).parent / "data/walk.mp4"  # 60 frames of 320x180


@functools.cache
def walk(width=160, height=120):
    """(60, height, width, 3) uint8."""
    with av.open(str(WALK)) as container:
        frames = container.decode(video=0)
        return np.stack([frame.to_image().resize((width, height)) for frame in frames])


def write_video(path, frames, codec="mpeg4", rate=25):
    """Encode frames (T, H, W, 3) uint8, at a quality at which tests can tell frames apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = 4_000_000
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(path, size, box=None):
    """Decode a video file with PyAV and resize with Pillow -> (T, size, size, 3) uint8."""
    resized = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = frame.to_image().resize((size, size), Image.Resampling.BICUBIC, box)
            resized.append(np.asarray(image))
    return np.stack(resized)


def psnr(a, b):
    """PSNR in dB of two uint8 arrays of one shape."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def zipped(folder, path, names):
    """Write the named files of a folder to a zip archive, beside a file of macOS's metadata."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(folder / name, f"inner/{name}")
        archive.writestr("__MACOSX/inner/._" + os.path.basename(names[0]), b"not a video")


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def tree_bytes(folder):
    """{path: content} of the shards in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.hdf5"))
    }


def exit_code(main):
    try:
        run_command(main)
    except SystemExit as stop:
        return stop.code
