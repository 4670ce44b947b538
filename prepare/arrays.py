"""Arrays in .npy, .npz, HDF5 and NetCDF files: their names, the names of their axes, and slices of
them as float32."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from runtime.console import UserError, first_line
from shards import DAMAGED, check_dataset, open_to_read

NUMPY = (".npy", ".npz")
NETCDF = (".nc", ".nc4", ".cdf", ".netcdf")
HDF5 = (".h5", ".hdf5", ".he5")
ENDINGS = (*NUMPY, *HDF5, *NETCDF)
# The first bytes of a NetCDF-3 file. NetCDF-4 files are HDF5 files.
NETCDF3 = b"CDF"
# The values that NetCDF stores where nothing has been written, unless the variable has a
# _FillValue (netcdf.h).
UNWRITTEN = {
    "f4": 9.969209968386869e36,
    "f8": 9.969209968386869e36,
    "i2": -32767,
    "i4": -(2**31 - 1),
    "i8": -(2**63 - 2),
    "u2": 2**16 - 1,
    "u4": 2**32 - 1,
    "u8": 2**64 - 2,
}
UNREADABLE = (*DAMAGED, EOFError, SyntaxError, zipfile.BadZipFile, NotImplementedError)


class Stored(NamedTuple):
    """A numeric array in a file.

    dims: the name of each axis, "" where the file states none. read(index): the selected values as
    float32, unpacked; missing values are NaN. The index holds a slice or an integer for each axis.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    read: Callable[[tuple], np.ndarray]


def open_arrays(path: str) -> dict[str, Stored]:
    """List the numeric arrays of a file by name. An .npy file holds one, named after the file.

    UserError for a file that cannot be read, and for other types of files.
    """
    found = {}
    for name, stored in open_version(path).items():
        found[name] = stored._replace(read=functools.partial(read_array, path, name))
    return found


def read_array(path: str, name: str, index: tuple) -> np.ndarray:
    """Read from an array by its name, so that a list of many files does not keep them all open."""
    return open_version(path)[name].read(index)


def open_version(path: str) -> dict[str, Stored]:
    """The arrays of a file as it is now. Their `read` keeps the file open."""
    stat = os.stat(path)
    return open_once(path, os.path.realpath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(16)
def open_once(path: str, *_version: str | int) -> dict[str, Stored]:
    """`open_arrays` of one version of a file."""
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".npy":
            return open_npy(path)
        if suffix == ".npz":
            return open_npz(path)
        with open(path, "rb") as file:
            start = file.read(len(NETCDF3))
        if start == NETCDF3:
            return open_netcdf3(path)
        return open_hdf5(path, suffix in NETCDF)
    except UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: not a whole file of arrays ({first_line(error)[:120]}); fetch it again"
        ) from None


def is_numeric(dtype: np.dtype) -> bool:
    """Whether values convert to float32: real numbers and booleans."""
    return dtype.kind in "fiub"


# ------------------------------------------------------------------------------------------- numpy
def of_array(name: str, array: np.ndarray) -> Stored:
    def read(index: tuple) -> np.ndarray:
        return to_float32(array[index])

    return Stored(name, array.shape, ("",) * array.ndim, read)


def open_npy(path: str) -> dict[str, Stored]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    # np.load returns an archive for an .npz file of this name.
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of several arrays; name it .npz")
    name = Path(path).stem
    return {name: of_array(name, array)} if is_numeric(array.dtype) else {}


def open_npz(path: str) -> dict[str, Stored]:
    found = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            array = archive[name]
            if is_numeric(array.dtype):
                found[name] = of_array(name, array)
    return found


def to_float32(values: np.ndarray) -> np.ndarray:
    """Convert to float32. A number beyond its range becomes infinite, and is reported as such."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32)


# ------------------------------------------------------------------------------------- HDF5, NetCDF
def open_hdf5(path: str, netcdf: bool) -> dict[str, Stored]:
    """List the arrays of an HDF5 file, by their paths within it. Scales of dimensions, such as the
    coordinates of NetCDF, are left out. netcdf: whether it is a NetCDF-4 file."""
    file = open_to_read(Path(path))
    found = {}

    def add(name: str | bytes, data: object) -> None:
        # h5py gives a name that is not UTF-8 as bytes.
        if isinstance(name, bytes):
            name = name.decode("utf-8", "backslashreplace")
        if not isinstance(data, h5py.Dataset) or not is_numeric(data.dtype):
            return
        if data.attrs.get("CLASS") in (b"DIMENSION_SCALE", "DIMENSION_SCALE"):
            return
        attrs = dict(data.attrs)
        if netcdf:
            attrs.setdefault("_FillValue", UNWRITTEN.get(data.dtype.str[1:]))

        def read(index: tuple) -> np.ndarray:
            # Checked here, so that an array that is not read cannot make the file useless.
            return unpack(check_dataset(data, file)[index], attrs)

        dims = tuple(axis_name(data, axis) for axis in range(data.ndim))
        found[name] = Stored(name, data.shape, dims, read)

    # Links to other files are not followed.
    file.visititems(add)
    return found


def axis_name(data: h5py.Dataset, axis: int) -> str:
    """The name of an axis: that of its scale, as in NetCDF, or its label, or ""."""
    scales = data.dims[axis]
    if len(scales):
        return scales[0].name.rpartition("/")[2]
    return scales.label


def unpack(values: np.ndarray, attrs: Mapping) -> np.ndarray:
    """Unpack values as the attributes of a variable state (CF conventions 1.11, section 8.1):
    value * scale_factor + add_offset; NaN for missing values."""
    if str(attrs.get("_Unsigned", "")).lower().strip("b'") == "true":
        values = values.view(f"u{values.dtype.itemsize}")
    missing = find_missing(values, attrs)
    scale, offset = attrs.get("scale_factor"), attrs.get("add_offset")
    if scale is not None or offset is not None:
        values = values * np.float64(1 if scale is None else np.ravel(scale)[0])
        values = values + np.float64(0 if offset is None else np.ravel(offset)[0])
    values = to_float32(values)
    values[missing] = np.nan
    return values


def find_missing(values: np.ndarray, attrs: Mapping) -> np.ndarray:
    """Where packed values are missing: _FillValue, missing_value, or outside valid_min, valid_max
    or valid_range (CF conventions 1.11, section 2.5.1)."""

    def codes(name: str) -> list[np.ndarray]:
        """The numbers of an attribute in the type of the data; none that it cannot represent."""
        found = []
        for number in np.ravel(attrs[name]) if attrs.get(name) is not None else ():
            if not is_numeric(number.dtype):
                continue
            with np.errstate(invalid="ignore"):
                code = number.astype(values.dtype)
            # Integers of the same size may differ in their sign, see _Unsigned.
            same_size = number.dtype.kind in "iu" and code.itemsize == number.itemsize
            if values.dtype.kind == "f" or same_size or code == number:
                found.append(code)
        return found

    missing = np.zeros(np.shape(values), bool)
    for code in (*codes("_FillValue"), *codes("missing_value")):
        missing |= values == code
    for code in (*codes("valid_min"), *codes("valid_range")[:1]):
        missing |= values < code
    for code in (*codes("valid_max"), *codes("valid_range")[1:]):
        missing |= values > code
    return missing


def open_netcdf3(path: str) -> dict[str, Stored]:
    """List the variables of a NetCDF-3 file, which h5py cannot read."""
    try:
        from netCDF4 import Dataset
    except ImportError:
        raise UserError(
            f"{path} is a NetCDF-3 file, which needs netCDF4: pip install netCDF4 (NetCDF-4 files "
            "need no package)"
        ) from None
    found = {}
    for name, variable in Dataset(path).variables.items():
        # A variable of the name of its dimension holds coordinates.
        if variable.dimensions == (name,) or not is_numeric(np.dtype(variable.dtype)):
            continue

        def read(index: tuple, variable=variable) -> np.ndarray:
            # netCDF4 unpacks and masks.
            return to_float32(np.ma.filled(np.ma.asarray(variable[index], np.float64), np.nan))

        found[name] = Stored(name, variable.shape, variable.dimensions, read)
    return found
