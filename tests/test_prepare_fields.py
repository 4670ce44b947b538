"""prepare.fields: arrays of all kinds of files become shards of fields."""

import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from prepare import arrays, fields
from runtime.console import UserError
from shards import Shards


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def prepare(folder, *flags, workers: int = 1) -> dict:
    """Run the command's functions in this process -> the manifest."""
    flags = ["--out", str(folder / "out"), "--workers", str(workers), *map(str, flags)]
    return fields.make(fields.parse(flags))


def read_all(folder, split: str) -> list[np.ndarray]:
    shards = Shards(folder / "out" / split)
    assert shards.key == "fields"
    return [shards.read(v, slice(None)) for v in range(len(shards))]


def netcdf(path, variables: dict, dims: dict) -> None:
    """Write a NetCDF-4 file: an HDF5 file in which scales name the dimensions.

    variables: {name: (array, names of its dimensions, attributes)}. dims: {name: length}.
    """
    with h5py.File(path, "w") as file:
        for name, length in dims.items():
            file[name] = np.arange(length, dtype=np.float64)
            file[name].make_scale(name)
        for name, (array, names, attrs) in variables.items():
            data = file.create_dataset(name, data=array)
            for axis, dim in enumerate(names):
                data.dims[axis].attach_scale(file[dim])
            data.attrs.update(attrs)


# ------------------------------------------------------------------------------------ file formats
def test_an_npy_file_becomes_shards(tmp_path):
    video = noise(40, 3, 24, 40)
    np.save(tmp_path / "waves.npy", video)
    manifest = prepare(tmp_path, "--source", tmp_path / "waves.npy", "--fps", 4)
    (train,), (val,), (test,) = (read_all(tmp_path, split) for split in ("train", "val", "test"))
    # One video is split by time, in this order, and no value changes.
    assert (len(train), len(val), len(test)) == (32, 4, 4)
    assert np.array_equal(np.concatenate([train, val, test]), video)
    shards = Shards(tmp_path / "out/train")
    assert (shards.shape, shards.fps) == ((3, 24, 40), 4.0)
    assert shards.channels == ("field 1", "field 2", "field 3")
    assert manifest["split_rule"] == "split by time" and manifest["padding"]["rows"] == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["channels"] == list(
        shards.channels
    )


def test_the_variables_of_an_npz_file_are_its_channels(tmp_path):
    u, v = noise(12, 8, 16), noise(12, 2, 8, 16, seed=1).astype(np.float64)
    np.savez(tmp_path / "a.npz", u=u, v=v, time=np.arange(12))
    prepare(tmp_path, "--source", tmp_path / "a.npz", "--variables", "v", "u")
    assert Shards(tmp_path / "out/train").channels == ("v 1", "v 2", "u")
    (train,) = read_all(tmp_path, "train")
    expected = np.concatenate([v.astype(np.float32), u[:, None]], 1)
    assert np.array_equal(train, expected[: len(train)])


def test_paths_within_an_hdf5_file_name_variables(tmp_path):
    values = noise(12, 8, 16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("run/fields/u", data=values, compression="gzip")
        file["run/other"] = values
        file["link"] = h5py.SoftLink("/run/other")
    path = tmp_path / "a.h5"
    with pytest.raises(
        UserError, match=r"which variables .* run/fields/u \(12, 8, 16\), run/other"
    ):
        prepare(tmp_path, "--source", path)
    prepare(tmp_path, "--source", path, "--variables", "/run/fields/u")
    (train,) = read_all(tmp_path, "train")
    assert np.array_equal(train[:, 0], values[: len(train)])
    assert Shards(tmp_path / "out/train").channels == ("u",)


def test_netcdf_is_read_by_the_names_of_dimensions_and_unpacked(tmp_path):
    T, H, W = 20, 8, 16
    packed = np.random.default_rng(0).integers(-1000, 1000, (1, W, H, T)).astype(np.int16)
    wind = noise(T, 3, H, W)
    attrs = {"scale_factor": 0.01, "add_offset": 280.0, "_FillValue": np.int16(-32767)}
    netcdf(
        tmp_path / "a.nc",
        {
            "t2m": (packed, ("height", "longitude", "latitude", "time"), attrs),
            "wind": (wind, ("time", "level", "latitude", "longitude"), {}),
        },
        {"time": T, "latitude": H, "longitude": W, "level": 3, "height": 1},
    )
    prepare(tmp_path, "--source", tmp_path / "a.nc", "--variables", "t2m", "wind")
    (train,) = read_all(tmp_path, "train")
    n = len(train)
    expected = (packed[0] * 0.01 + 280).transpose(2, 1, 0)[:n]
    assert np.allclose(train[:, 0], expected, atol=1e-4)
    assert np.array_equal(train[:, 1:], wind[:n])
    names = ("t2m", "wind 1", "wind 2", "wind 3")
    assert Shards(tmp_path / "out/train").channels == names


@pytest.mark.parametrize("attrs", [{"_FillValue": np.float32(-99)}, {"missing_value": -99.0}, {}])
def test_missing_values_of_netcdf_are_named(tmp_path, attrs):
    values = noise(12, 8, 16)
    # Without _FillValue, NetCDF's own value marks what was never written.
    values[7, 2, 3:5] = -99 if attrs else arrays.UNWRITTEN["f4"]
    dims = {"time": 12, "lat": 8, "lon": 16}
    netcdf(tmp_path / "a.nc", {"sst": (values, tuple(dims), attrs)}, dims)
    with pytest.raises(UserError, match="a.nc: sst, frame 7: 2 of 128 values are NaN or infinite"):
        prepare(tmp_path, "--source", tmp_path / "a.nc")


@pytest.mark.parametrize("kind", ["u2", "u4", "i8", "u8"])
def test_integers_that_were_never_written_are_missing(tmp_path, kind):
    netCDF4 = pytest.importorskip("netCDF4")
    with netCDF4.Dataset(tmp_path / "a.nc", "w") as file:
        for name, length in (("time", 12), ("lat", 8), ("lon", 16)):
            file.createDimension(name, length)
        file.createVariable("sst", kind, ("time", "lat", "lon"))[:7] = 1
    with pytest.raises(UserError, match="sst, frame 7: 128 of 128 values are NaN or infinite"):
        prepare(tmp_path, "--source", tmp_path / "a.nc")


@pytest.mark.parametrize(
    "attrs",
    [
        {"valid_range": np.int16([0, 200])},
        {"valid_max": np.int16(200), "scale_factor": 0.5},
        {"valid_min": np.int16(201)},
    ],
)
def test_values_outside_their_valid_range_are_missing(attrs):
    packed = np.int16([0, 200, 201])
    found = np.isnan(arrays.unpack(packed, attrs))
    assert found.tolist() == ([True, True, False] if "valid_min" in attrs else [False, False, True])


@pytest.mark.parametrize("missing", [np.nan, 1e20, 0.5, "N/A"])
def test_a_missing_value_that_no_integer_has_marks_none(missing):
    packed = np.array([0, 1, -(2**15), 2**15 - 1, -1], np.int16)
    assert arrays.unpack(packed, {"missing_value": missing}).tolist() == packed.tolist()
    # An unsigned variable may state the code as signed.
    bytes_ = arrays.unpack(np.int8([1, -1]), {"_Unsigned": "true", "_FillValue": np.int8(-1)})
    assert bytes_[0] == 1 and np.isnan(bytes_[1])


def test_netcdf3_asks_for_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "netCDF4", None)
    (tmp_path / "a.nc").write_bytes(b"CDF\x01" + bytes(100))
    with pytest.raises(
        UserError, match="a NetCDF-3 file, which needs netCDF4: pip install netCDF4"
    ):
        prepare(tmp_path, "--source", tmp_path / "a.nc")


def test_netcdf3_is_read_by_netcdf4(tmp_path):
    netCDF4 = pytest.importorskip("netCDF4")
    values = noise(12, 8, 16)
    with netCDF4.Dataset(tmp_path / "a.nc", "w", format="NETCDF3_CLASSIC") as file:
        for name, length in (("time", 12), ("lat", 8), ("lon", 16)):
            file.createDimension(name, length)
        file.createVariable("sst", "f4", ("time", "lat", "lon"))[:] = values
    prepare(tmp_path, "--source", tmp_path / "a.nc")
    (train,) = read_all(tmp_path, "train")
    assert np.array_equal(train[:, 0], values[: len(train)])


# -------------------------------------------------------------------------------------------- axes
@pytest.mark.parametrize(
    "axes, shape, order",
    [
        ("time,y,x,channel", (12, 8, 16, 3), (0, 3, 1, 2)),
        ("x,y,channel,time", (16, 8, 3, 12), (3, 2, 1, 0)),
        (None, (12, 3, 8, 16), (0, 1, 2, 3)),
    ],
)
def test_axes_in_any_order(tmp_path, axes, shape, order):
    values = noise(*shape)
    np.save(tmp_path / "a.npy", values)
    flags = ["--axes", axes] if axes else []
    prepare(tmp_path, "--source", tmp_path / "a.npy", *flags)
    found = np.concatenate(
        [part for split in fields.build.SPLITS for part in part_of(tmp_path, split)]
    )
    expected = values.transpose(order)
    assert np.array_equal(found, expected[: len(found)]) and len(found) >= 10


def part_of(folder, split: str) -> list[np.ndarray]:
    return read_all(folder, split) if (folder / "out" / split).exists() else []


def test_an_axis_of_videos_and_several_files_are_several_videos(tmp_path):
    (tmp_path / "in").mkdir()
    all_videos = [noise(6, 9, 8, 8, seed=k) for k in range(2)]
    for k, videos in enumerate(all_videos):
        np.save(tmp_path / f"in/{k}.npy", videos)
    flags = ["--source", tmp_path / "in", "--axes", "video,time,y,x", "--seed", 3]
    manifest = prepare(tmp_path, *flags)
    assert manifest["split_rule"] == "split by video"
    found = {split: read_all(tmp_path, split) for split in ("train", "val", "test")}
    assert {split: len(videos) for split, videos in found.items()} == {
        "train": 10,
        "val": 1,
        "test": 1,
    }
    # Each video is in one split, whole.
    expected = {video[:, None].tobytes() for videos in all_videos for video in videos}
    assert {video.tobytes() for videos in found.values() for video in videos} == expected


@pytest.mark.parametrize(
    "shape, flags, says",
    [
        ((12, 8, 16, 3), [], "do the channels come last? Name the axes: --axes time,y,x,channel"),
        ((12, 8), [], "2 axes; name them: --axes"),
        ((1, 8, 16), [], "a video needs two frames, field has 1; join files"),
        ((12, 40, 8, 16), [], "are these 40 channels? Name the axes: --axes time,channel,y,x, or"),
        ((2, 2, 2, 12, 8, 16), [], "6 axes; name them: --axes"),
        ((12, 3, 8, 16), ["--axes", "time,y,x"], "--axes time,y,x names 3 axes"),
        ((12, 3, 8, 16), ["--axes", "time,y,x,y"], "its axes are time, y, x, y, but time"),
        ((12, 3, 8, 16), ["--axes", "time,z,y,x"], "no axis z; use video, time, channel, y, x"),
        ((12, 8, 16), ["--variables", "v"], "no variable v; it holds a (12, 8, 16); choose"),
        ((12, 8, 16), ["--nan", "nothing"], "--nan must be error, drop or a number, got nothing"),
        ((12, 8, 16), ["--val", "0.5", "--test", "0.5"], "leave nothing to train"),
        ((12, 8, 16), ["--multiple", "0"], "--multiple"),
    ],
)
def test_mistakes_are_one_line_and_code_2(tmp_path, command, shape, flags, says):
    np.save(tmp_path / "a.npy", noise(*shape))
    code, err = command(
        tmp_path, "prepare/fields", "--source", "a.npy", "--out", "out", "--workers", "1", *flags
    )
    assert code == 2 and says in err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_dimensions_without_a_known_name_are_named(tmp_path):
    dims = {"time": 12, "depth": 4, "lat": 8, "lon": 16}
    netcdf(tmp_path / "a.nc", {"s": (noise(12, 4, 8, 16), tuple(dims), {})}, dims)
    message = r"what is the dimension depth of time, depth, lat, lon\? Name all axes: --axes"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, "--source", tmp_path / "a.nc")
    manifest = prepare(tmp_path, "--source", tmp_path / "a.nc", "--axes", "time,channel,y,x")
    assert manifest["channels"] == ("s 1", "s 2", "s 3", "s 4")


def test_files_of_other_sizes_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", noise(12, 8, 16))
    np.save(tmp_path / "b.npy", noise(12, 8, 24))
    with pytest.raises(UserError, match=r"b.npy: size \(8, 24\), but .*a.npy has \(8, 16\)"):
        prepare(tmp_path, "--source", tmp_path / "a.npy", tmp_path / "b.npy")


def test_files_of_other_variables_are_refused(tmp_path):
    for name in ("t", "q"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file[name] = noise(12, 8, 16)
    with pytest.raises(UserError, match=r"t.h5: channels \('t',\), but .*q.h5 has \('q',\)"):
        prepare(tmp_path, "--source", tmp_path)


def test_files_and_variables_of_the_same_name_keep_apart(tmp_path):
    for k, folder in enumerate(("a", "b")):
        values = noise(12, 8, 8)
        values[3 + k] = np.nan
        (tmp_path / "in" / folder).mkdir(parents=True)
        with h5py.File(tmp_path / "in" / folder / "x.h5", "w") as file:
            file["one/u"] = values
            file["two/u"] = values
    flags = ["--variables", "one/u", "two/u", "--nan", "drop"]
    manifest = prepare(tmp_path, "--source", tmp_path / "in", *flags)
    left_out = {f"{tmp_path}/in/{name}/x.h5": [3 + k] for k, name in enumerate("ab")}
    assert manifest["not_finite"] == left_out
    assert manifest["channels"] == ("one/u", "two/u")


def test_many_files_are_not_open_at_once(tmp_path):
    for k in range(40):
        with h5py.File(tmp_path / f"{k:02d}.h5", "w") as file:
            file["u"] = noise(2, 8, 8, seed=k)
    found = fields.open_files(
        fields.find_files([tmp_path]), fields.parse(["--source", "a", "--out", "b"])
    )
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert len(found) == 40 and sum(str(tmp_path) in link for link in links) <= 16


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[b"bad\xff"] = noise(12, 8, 8)
    assert prepare(tmp_path, "--source", tmp_path / "a.h5")["channels"] == ("bad\\xff",)


def test_axes_of_which_some_have_names_are_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["u"] = noise(16, 8, 12)
        file["u"].dims[2].label = "time"
    with pytest.raises(
        UserError, match=r"the dimension \(no name\) of \(no name\), \(no name\), t"
    ):
        prepare(tmp_path, "--source", tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.nc"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no array at all")
    with pytest.raises(UserError, match=f"{name}: not a whole file of arrays"):
        prepare(tmp_path, "--source", tmp_path / name)


def test_damaged_frames_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "PIECE_BYTES", 4 * 16 * 16 * 4)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("u", data=noise(40, 16, 16), chunks=(4, 16, 16), compression=9)
        place = data.id.get_chunk_info(3).byte_offset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes(100))
    with pytest.raises(UserError, match="a.h5: frames 12 to 15 cannot be read"):
        prepare(tmp_path, "--source", path)
    manifest = prepare(tmp_path, "--source", path, "--nan", 0)
    (broken,) = [entry for entry in manifest["sources"] if entry["skipped"]]
    assert broken["name"] == "a.h5, frames 12 to 15"
    assert [len(video) for video in read_all(tmp_path, "train")] == [12, 16]


def test_arrays_of_objects_are_not_loaded(tmp_path):
    """An .npy file of objects is a pickle, which could run code."""
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UserError, match="a.npy: not a whole file of arrays .*[Oo]bject"):
        prepare(tmp_path, "--source", tmp_path / "a.npy")


# -------------------------------------------------------------------------- padding, NaN, resuming
@pytest.mark.parametrize("rule", ["edge", "wrap"])
def test_sizes_are_padded_with_a_note(tmp_path, rule, capsys):
    values = noise(12, 2, 9, 14)
    np.save(tmp_path / "a.npy", values)
    flags = ["--source", tmp_path / "a.npy", "--multiple", 8, "--pad", rule]
    manifest = prepare(tmp_path, *flags)
    (train,) = read_all(tmp_path, "train")
    assert train.shape[1:] == (2, 16, 16)
    assert np.array_equal(train[..., :9, :14], values[: len(train)])
    edge = values[: len(train), :, -1, -1] if rule == "edge" else values[: len(train), :, 6, 1]
    assert np.array_equal(train[..., -1, -1], edge)
    assert manifest["padding"] == {"rows": 7, "columns": 2, "rule": rule}
    assert "padded to 16 x 16: the last 7 rows and 2 columns" in manifest["resize_rule"]


def test_frames_with_nan_are_left_out_and_end_a_video(tmp_path):
    values = noise(30, 1, 8, 8)
    values[10, 0, 2, 2] = np.nan
    values[12, 0, 0, 0] = np.inf
    np.save(tmp_path / "a.npy", values)
    source = ["--source", tmp_path / "a.npy"]
    with pytest.raises(UserError, match="a.npy: field, frame 10: 1 of 64 values are NaN"):
        prepare(tmp_path, *source)
    manifest = prepare(tmp_path, *source, "--nan", "drop")
    first, second = read_all(tmp_path, "train")
    # Frame 11 alone is no video.
    assert np.array_equal(first, values[:10]) and np.array_equal(second, values[13:24])
    assert manifest["not_finite"] == {"a.npy": [10, 12]}


def test_nan_is_filled_by_a_number(tmp_path):
    values = noise(20, 1, 8, 8)
    values[:, 0, :2] = np.nan
    np.save(tmp_path / "a.npy", values)
    prepare(tmp_path, "--source", tmp_path / "a.npy", "--nan", -2)
    (train,) = read_all(tmp_path, "train")
    assert (train[:, 0, :2] == -2).all()
    assert np.array_equal(train[:, 0, 2:], values[: len(train), 0, 2:])


def test_large_videos_are_written_in_pieces_by_several_processes(tmp_path, monkeypatch):
    """The shards do not depend on the number of processes."""
    np.save(tmp_path / "a.npy", noise(40, 1, 16, 16))
    monkeypatch.setattr(fields, "PIECE_BYTES", 4 * 16 * 16 * 3)
    monkeypatch.setattr(fields, "PER_SHARD", 2)
    fingerprints = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        prepare(folder, "--source", tmp_path / "a.npy", workers=workers)
        shards = Shards(folder / "out/train")
        assert len(shards.paths) > 3 and shards.lengths.tolist() == [32]
        assert np.array_equal(shards.read(0, slice(None)), np.load(tmp_path / "a.npy")[:32])
        fingerprints.append(shards.fingerprint())
    assert fingerprints[0] == fingerprints[1]


def test_an_interrupted_preparation_resumes(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", noise(40, 1, 16, 16))
    monkeypatch.setattr(fields, "PIECE_BYTES", 4 * 16 * 16 * 4)
    monkeypatch.setattr(fields, "PER_SHARD", 2)
    read, calls = fields.read, []

    def stop_after_some(source, args):
        calls.append(source.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read(source, args)

    monkeypatch.setattr(fields, "read", stop_after_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, "--source", tmp_path / "a.npy")
    assert not (tmp_path / "out").exists()
    finished = len(list((tmp_path / "out.partial/notes").iterdir()))
    assert finished > 0
    monkeypatch.setattr(fields, "read", read)
    prepare(tmp_path, "--source", tmp_path / "a.npy")
    assert f"{2 * finished} of 10 pieces are done already" in capsys.readouterr().out
    (train,) = read_all(tmp_path, "train")
    assert np.array_equal(train, np.load(tmp_path / "a.npy")[:32])
