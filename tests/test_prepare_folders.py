"""prepare/videos.py on folders of images: kinds, order, gaps, links, names."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO
from odd import encode, greys
from PIL import Image

from prepare import videos
from shards import Shards


def save(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(path)


def make(tmp_path, *flags):
    arguments = ["--source", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    arguments += ["--image_size", "16", "--val", "0", "--test", "0", *flags]
    return videos.make(videos.parse(arguments))


def levels(tmp_path):
    """The grey levels of all videos, divided by ten."""
    shards = Shards(tmp_path / "out/train")
    found = []
    for v in range(len(shards)):
        found.append((shards.read(v, slice(None))[:, 8, 8, 0] / 10).round().astype(int).tolist())
    return found


def test_each_kind_of_image_is_a_video(tmp_path):
    for k in range(5):
        save(tmp_path / f"raw/v/img_{k:05d}.png", 10 * k)
        save(tmp_path / f"raw/v/flow_x_{k:05d}.png", 100 + 10 * k)
        save(tmp_path / f"raw/v/flow_y_{k:05d}.png", 200 + 10 * (k % 2))
    manifest = make(tmp_path)
    names = [source["name"] for source in manifest["sources"]]
    assert names == [f"v/{kind}_#.png" for kind in ("flow_x", "flow_y", "img")]
    assert levels(tmp_path) == [[10, 11, 12, 13, 14], [20, 21, 20, 21, 20], [0, 1, 2, 3, 4]]


def test_a_new_video_begins_at_missing_numbers(tmp_path):
    for k, number in enumerate((0, 1, 2, 23, 24, 25)):
        save(tmp_path / f"raw/f{number}.png", 10 * k)
    (source,) = make(tmp_path)["sources"]
    assert levels(tmp_path) == [[0, 1, 2], [3, 4, 5]]
    assert "numbers are missing between f2.png and f23.png" in source["notes"][0]


def test_clips_do_not_cross_missing_numbers(tmp_path):
    for k in (0, 1, 2, 4, 5, 6, 7):
        save(tmp_path / f"raw/f{k}.png", 10 * k)
    (source,) = make(tmp_path, "--clip_length", "2")["sources"]
    assert levels(tmp_path) == [[0, 1], [4, 5], [6, 7]]
    assert source["dropped"] == {"left over": 1}


def test_images_without_an_order_are_skipped_and_named(tmp_path, capsys):
    for camera in (1, 2):
        for k in range(3):
            save(tmp_path / f"raw/rig/cam{camera}_{k}.png", 10 * k)
    for name in ("dawn", "dusk"):
        save(tmp_path / f"raw/photos/{name}.jpg", 0)
    for k in range(3):
        save(tmp_path / f"raw/good/{k}.png", 10 * k)
    manifest = make(tmp_path)
    skipped = {source["name"]: source["skipped"] for source in manifest["sources"]}
    assert "several numbers change" in skipped["rig"]
    assert "dawn.jpg and dusk.jpg do not determine an order" in skipped["photos"]
    assert skipped["good"] is None and levels(tmp_path) == [[0, 1, 2]]
    err = capsys.readouterr().err
    assert "rig: several numbers" in err and "photos: the names" in err


def test_images_that_form_no_video_are_named(tmp_path, capsys):
    for k in range(3):
        save(tmp_path / f"raw/a/{k}.png", 10 * k)
    save(tmp_path / "raw/a/cover.jpg", 0)
    encode(tmp_path / "raw/b/film.mkv", greys([30, 40, 50]))
    save(tmp_path / "raw/b/thumbnail_1.png", 0)
    make(tmp_path)
    assert levels(tmp_path) == [[0, 1, 2], [3, 4, 5]]
    printed = capsys.readouterr().out
    assert "single images of a kind are left out: cover.jpg" in printed
    assert "b: holds videos, so its 1 images are left out" in printed


def test_endings_in_upper_case(tmp_path):
    for k in range(3):
        save(tmp_path / f"raw/a/IMG{k}.{('PNG', 'png', 'Png')[k]}", 10 * k)
    encode(tmp_path / "raw/b/F.MKV", greys([30, 40, 50]))
    make(tmp_path)
    assert levels(tmp_path) == [[0, 1, 2], [3, 4, 5]]


def test_linked_folders_and_files_are_read_once(tmp_path, capsys):
    for k in range(3):
        save(tmp_path / f"elsewhere/{k}.png", 10 * k)
    encode(tmp_path / "film.mkv", greys([30, 40, 50]))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw/again").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/film.mkv").symlink_to(tmp_path / "film.mkv")
    (tmp_path / "raw/gone.mkv").symlink_to(tmp_path / "gone.mkv")
    make(tmp_path)
    assert levels(tmp_path) == [[3, 4, 5], [0, 1, 2]]
    err = capsys.readouterr().err
    assert "gone.mkv: a broken link" in err and "again: a link to a folder" in err


def test_an_unreadable_image_is_named(tmp_path):
    for k in range(4):
        save(tmp_path / f"raw/a/{k}.png", 10 * k)
        save(tmp_path / f"raw/b/{k}.png", 10 * k)
    broken = tmp_path / "raw/a/2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    manifest = make(tmp_path)
    assert manifest["sources"][0]["skipped"] and manifest["sources"][1]["skipped"] is None
    assert levels(tmp_path)[-1] == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_other_modes_are_read_as_rgb(tmp_path, mode):
    ending = "jpg" if mode == "CMYK" else "png"
    for k in range(2):
        path = tmp_path / f"raw/a/{k}.{ending}"
        save(path, 255 * k)
        Image.open(path).convert(mode).save(path)
    make(tmp_path)
    assert levels(tmp_path) == [[0, pytest.approx(26, abs=1)]]


def test_a_folder_whose_name_is_not_utf8_prints_to_a_pipe(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    save(tmp_path / "0.png", 0)
    for k in range(12):
        os.link(tmp_path / "0.png", folder + b"/%d.png" % k)
    done = subprocess.run(
        [sys.executable, "-m", "prepare.videos", "--source", folder, "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert Shards(tmp_path / "out/train").files[0].file.attrs["source"] == "caf\\udce9"
