"""prepare/frames.py: order of frames, content, extensions, zips, missing and damaged frames."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from raw import png, psnr, walk

from prepare import build, frames
from prepare.decode import WHITENED, Film, png_pixels, read_rgb
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


def test_split_of():
    assert frames.split_of("x/train/b/c") == ("train", "train/b/c") and frames.split_of(
        "test/a"
    ) == ("test", "test/a")
    assert frames.split_of("raw/Train/b") == ("train", "Train/b")
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
    (train / "0/3.png").rename(train / "0/02.png")
    (train / "1/4.png").write_bytes((train / "1/4.png").read_bytes()[:900])
    (train / "2/2.png").write_bytes(png(walk()[0, :50]))
    args = frames.parse(
        ["--source", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    )
    manifest = frames.make(args)
    reasons = [entry["skipped"] for entry in manifest["sources"]]
    assert "02.png and 2.png have the same number" in reasons[0]
    assert reasons[1].startswith("4.png: ")
    assert reasons[2] == "2.png: frame 2 is 160x50, the first 160x120" and reasons[3] is None
    assert build.report(manifest, args) == 1 and Shards(
        tmp_path / "out/train"
    ).lengths.tolist() == [6]


def test_ffmpeg_decodes_plain_pngs_to_the_pixels_of_pillow():
    plain, tagged = png(walk()[3]), io.BytesIO()
    Image.fromarray(walk()[3]).save(tagged, "png", dpi=(72, 72))
    assert (png_pixels(tagged.getvalue()) == walk()[3]).all()
    assert (png_pixels(plain) == walk()[3]).all() and (
        np.asarray(read_rgb(Film(None, ""), io.BytesIO(plain))) == walk()[3]
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


def fill(folder, frames_of_video, pattern="{}.png"):
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames_of_video):
        (folder / pattern.format(t)).write_bytes(png(frame))


def parse(tmp_path):
    source, out = str(tmp_path / "raw"), str(tmp_path / "out")
    return frames.parse(["--source", source, "--out", out, "--workers", "1"])


def test_the_same_video_in_two_splits_is_kept_in_test_and_named(tmp_path, capsys):
    fill(tmp_path / "raw/train/a", walk()[:5])
    fill(tmp_path / "raw/train/x", walk()[10:13])
    fill(tmp_path / "raw/val/x", walk()[10:13])
    fill(tmp_path / "raw/test/copy of x", walk()[10:13], "{:04d}.png")
    args = parse(tmp_path)
    manifest = frames.make(args)
    assert build.report(manifest, args) == 0
    printed = capsys.readouterr().out
    assert "train/x, val/x, test/copy of x" in printed and "2 copies are left out" in printed
    assert Shards(tmp_path / "out/train").lengths.tolist() == [5]
    assert Shards(tmp_path / "out/test").lengths.tolist() == [3]
    assert not (tmp_path / "out/val").exists()
    assert {entry["name"]: entry["copy_of"] for entry in manifest["sources"]} == {
        "train/a": None,
        "train/x": "test/copy of x",
        "val/x": "test/copy of x",
        "test/copy of x": None,
    }


def test_the_same_video_twice_in_one_split_is_kept_and_named(tmp_path, capsys):
    fill(tmp_path / "raw/train/a", walk()[:5])
    fill(tmp_path / "raw/train/b", walk()[:5])
    args = parse(tmp_path)
    assert build.report(frames.make(args), args) == 0
    assert "train/a, train/b" in capsys.readouterr().out
    assert Shards(tmp_path / "out/train").lengths.tolist() == [5, 5]


def test_a_new_video_begins_at_missing_numbers(tmp_path, capsys):
    fill(tmp_path / "raw/train/a", walk()[:12])
    for t in (4, 6, 7):
        (tmp_path / f"raw/train/a/{t}.png").unlink()
    args = parse(tmp_path)
    manifest = frames.make(args)
    assert build.report(manifest, args) == 0
    # Frame 5 stands alone.
    shards = Shards(tmp_path / "out/train")
    assert shards.lengths.tolist() == [4, 4]
    assert (shards.read(1, slice(None)) == resized(walk()[8:12])).all()
    note = manifest["sources"][0]["note"]
    assert "between 3.png and 5.png, 5.png and 8.png" in note and "1 frame alone" in note


def test_several_kinds_of_images_are_refused(tmp_path):
    fill(tmp_path / "raw/train/a", walk()[:4], "img_{:02d}.png")
    for t in range(4):
        (tmp_path / f"raw/train/a/flow_x_{t:02d}.png").write_bytes(png(walk()[20 + t]))
    fill(tmp_path / "raw/train/b", walk()[:4])
    args = parse(tmp_path)
    manifest = frames.make(args)
    assert "2 kinds of images (flow_x_#.png, img_#.png)" in manifest["sources"][0]["skipped"]
    assert build.report(manifest, args) == 1


def test_a_single_image_of_another_kind_is_left_out_and_named(tmp_path):
    fill(tmp_path / "raw/train/a", walk()[:4])
    (tmp_path / "raw/train/a/background.png").write_bytes(png(walk()[30]))
    manifest = frames.make(parse(tmp_path))
    assert "background.png: not of the kind #.png; left out" in manifest["sources"][0]["note"]
    assert Shards(tmp_path / "out/train").lengths.tolist() == [4]


def test_links_are_followed_once_and_dead_ones_named(tmp_path, capsys):
    fill(tmp_path / "elsewhere", walk()[:4])
    (tmp_path / "raw/train").mkdir(parents=True)
    (tmp_path / "raw/train/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw/train/loop").symlink_to(tmp_path / "raw/train")
    (tmp_path / "raw/train/dead").symlink_to(tmp_path / "nothing")
    frames.make(parse(tmp_path))
    assert Shards(tmp_path / "out/train").lengths.tolist() == [4]
    err = capsys.readouterr().err
    assert "loop: a link to a folder that was read already" in err
    assert "dead: a broken link" in err


def test_names_in_upper_case_are_read(tmp_path):
    fill(tmp_path / "raw/TRAIN/A", walk()[:4], "F{}.PNG")
    frames.make(parse(tmp_path))
    assert Shards(tmp_path / "out/train").lengths.tolist() == [4]


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, "png", **options)
    return file


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_are_composed_on_white(mode):
    image = Image.new("RGBA", (8, 4), (200, 200, 200, 255))
    image.paste((10, 10, 10, 0), (4, 0, 8, 4))
    film = Film(None, "")
    options = {}
    if mode == "P":
        image = Image.new("P", (8, 4), 0)
        image.putpalette([200, 200, 200, 10, 10, 10])
        image.paste(1, (4, 0, 8, 4))
        options = {"transparency": 1}
    elif mode != "RGBA":
        image = image.convert(mode)
    pixels = np.asarray(read_rgb(film, saved(image, **options)))
    assert (pixels[:, :4] == 200).all() and (pixels[:, 4:] == 255).all()
    assert film.notes == [WHITENED]


def test_opaque_alpha_is_not_noted():
    film = Film(None, "")
    read_rgb(film, saved(Image.new("RGBA", (8, 4), (1, 2, 3, 255))))
    assert film.notes == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :32] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    folder = tmp_path / "raw/train/a"
    folder.mkdir(parents=True)
    for t in range(2):
        Image.fromarray(np.ascontiguousarray(stored)).save(folder / f"{t}.png", exif=exif)
    frames.make(parse(tmp_path))
    assert (Shards(tmp_path / "out/train").read(0, [0])[0] == resized(upright[None])[0]).all()


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
