"""prepare/frames.py: order of frames, content, extensions, zips, missing and damaged frames."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from raw import png, psnr, walk

from prepare import build, frames
from prepare.decode import Broken, png_pixels, rgb
from shards import Shards


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """train/2 and train/10 with unpadded numbers, test/a with padded ones; 12 frames each."""
    folder = tmp_path_factory.mktemp("raw")
    for k, (video, pattern) in enumerate(
        (("train/2", "{}.png"), ("train/10", "frame{}.png"), ("test/a", "{:05d}.png"))
    ):
        (folder / video).mkdir(parents=True)
        for t in range(12):
            (folder / video / pattern.format(t)).write_bytes(png(walk()[12 * k + t]))
    (folder / "train/notes.txt").write_text("not a frame")
    return folder


def make(source, out, *flags):
    return frames.make(
        frames.parse(
            ["--source", str(source), "--out", str(out), "--workers", "1", *map(str, flags)]
        )
    )


def resized(array, size=64):
    return np.stack(
        [
            np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))
            for frame in array
        ]
    )


def test_in_order():
    assert frames.in_order(["10.png", "9.png", "008.png"]) == ["008.png", "9.png", "10.png"]
    assert frames.in_order(["a_15_2.png", "a_5_2.png", "a_10_2.png"]) == [
        "a_5_2.png",
        "a_10_2.png",
        "a_15_2.png",
    ]
    assert frames.in_order(["1h59.png", "2h00.png"]) == ["1h59.png", "2h00.png"]
    assert frames.in_order(["b.png", "a.png"]) == ["a.png", "b.png"] and frames.in_order(
        ["x.png"]
    ) == ["x.png"]
    assert frames.in_order(["a_1.png", "b_1.png"]) == ["a_1.png", "b_1.png"]
    for names, said in (
        (["1.png", "01.png"], "same number"),
        (["0.png", "1.png", "3.png", "4.png"], "2 apart, the others 1"),
        (["1.png", "2.png", "02.png", "3.png"], "the same number"),
    ):
        with pytest.raises(Broken, match=said):
            frames.in_order(names)


def test_split_of():
    assert frames.split_of("x/train/b/c") == ("train", "train/b/c") and frames.split_of(
        "test/a"
    ) == ("test", "test/a")
    assert frames.split_of("train") is frames.split_of("a/b") is frames.split_of(".") is None


def test_order_content_and_split(raw, tmp_path):
    manifest = make(raw, tmp_path / "out", "--fps", 5)
    assert [entry["name"] for entry in manifest["sources"]] == ["train/2", "train/10", "test/a"]
    train, test = Shards(tmp_path / "out/train"), Shards(tmp_path / "out/test")
    for k, got in enumerate(
        (train.read(0, slice(None)), train.read(1, slice(None)), test.read(0, slice(None)))
    ):
        assert (got == resized(walk()[12 * k : 12 * k + 12])).all()
    assert (
        train.fps == 5
        and manifest["split_rule"] == "as the folders are"
        and not (tmp_path / "out/val").exists()
    )


def test_zips_of_splits_give_the_same(raw, tmp_path):
    (tmp_path / "zips").mkdir()
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / "zips" / f"{split}.zip", "w") as archive:
            for path in sorted((raw / split).rglob("*.png"), reverse=True):
                archive.write(path, path.relative_to(raw / split).as_posix())
    zipped, plain = make(tmp_path / "zips", tmp_path / "a"), make(raw, tmp_path / "b")
    assert zipped["sources"] == plain["sources"]
    assert [part["fingerprint"] for part in zipped["splits"].values()] == [
        p["fingerprint"] for p in plain["splits"].values()
    ]


def test_jpeg_by_extension(raw, tmp_path):
    folder = tmp_path / "raw/val/x"
    folder.mkdir(parents=True)
    for t in range(3):
        Image.fromarray(walk()[t]).save(folder / f"{t}.JPG", quality=95)
    make(tmp_path / "raw", tmp_path / "out", "--extension", ".jpg")
    assert psnr(Shards(tmp_path / "out/val").read(0, slice(None)), resized(walk()[:3])) > 30


def test_broken_videos_are_named_with_the_frame(raw, tmp_path, capsys):
    for k in range(4):
        folder = tmp_path / "raw/train" / str(k)
        folder.mkdir(parents=True)
        for t in range(6):
            (folder / f"{t}.png").write_bytes(png(walk()[k + t]))
    train = tmp_path / "raw/train"
    (train / "0/3.png").unlink()
    (train / "1/4.png").write_bytes((train / "1/4.png").read_bytes()[:900])
    (train / "2/2.png").write_bytes(png(walk()[0, :50]))
    args = frames.parse(
        ["--source", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    )
    manifest = frames.make(args)
    reasons = [entry["skipped"] for entry in manifest["sources"]]
    assert "2.png and 4.png are 2 apart" in reasons[0] and reasons[1].startswith("4.png: ")
    assert reasons[2] == "2.png: frame 2 is 160x50, the first 160x120" and reasons[3] is None
    assert build.report(manifest, args) == 1 and Shards(
        tmp_path / "out/train"
    ).lengths.tolist() == [6]


def test_plain_pngs_have_a_quicker_way_with_the_same_pixels():
    plain, tagged = png(walk()[3]), io.BytesIO()
    Image.fromarray(walk()[3]).save(tagged, "png", dpi=(72, 72))
    assert (png_pixels(tagged.getvalue()) == walk()[3]).all()
    assert (png_pixels(plain) == walk()[3]).all() and (
        np.asarray(rgb(io.BytesIO(plain))) == walk()[3]
    ).all()
    for mode in ("L", "P", "RGBA", "I;16"):
        other = io.BytesIO()
        image = (
            Image.fromarray(walk()[3]).convert(mode)
            if mode != "I;16"
            else Image.fromarray(np.zeros((9, 9), np.uint16))
        )
        image.save(other, "png")
        assert png_pixels(other.getvalue()) is None
    for broken in (
        plain[:-20],
        plain[:900],
        plain + b"x",
        plain[:400] + bytes([plain[400] ^ 1]) + plain[401:],
        b"",
        plain[:8],
    ):
        assert png_pixels(broken) is None


def test_the_same_video_in_two_splits_is_told(raw, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "raw" / split / "x").mkdir(parents=True)
        for t in range(3):
            (tmp_path / "raw" / split / "x" / f"{t}.png").write_bytes(png(walk()[t]))
    args = frames.parse(
        ["--source", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    )
    assert build.report(frames.make(args), args) == 1
    assert "warning: the same video in different splits: train/x, test/x" in capsys.readouterr().out


def test_mistakes(raw, tmp_path, command):
    for flags, said in (
        (["--source", raw / "train", "--out", "o"], "no train/<video>/<frame>.png"),
        (["--source", raw, "--out", "o", "--extension", "webp"], "no train/<video>/<frame>.webp"),
        (["--source", "none", "--out", "o"], "none: no such file"),
        (["--source", raw, "--out", "o", "--fps", "0"], "--fps must be"),
    ):
        code, err = command(tmp_path, "prepare/frames", *flags)
        assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
