"""prepare/clevrer.py: split and order by number, content, zips, short videos."""

import pytest
from raw import decoded, psnr, walk, write_video, zipped

from prepare import clevrer
from shards import Shards

NUMBERS = (3, 9999, 10000, 14999, 15000, 19999)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Six videos in the folders that the zips have, and one that is not of CLEVRER."""
    folder = tmp_path_factory.mktemp("raw")
    for k, number in enumerate((*NUMBERS, 20000)):
        path = (
            folder
            / f"video_{number // 1000 * 1000:05d}-{number // 1000 * 1000 + 1000:05d}"
            / f"video_{number:05d}.mp4"
        )
        write_video(path, walk(240, 160)[k : k + 12])
    return folder


def make(source, out, *flags):
    return clevrer.make(
        clevrer.parse(
            ["--source", str(source), "--out", str(out), "--workers", "1", *map(str, flags)]
        )
    )


def test_split_order_and_content(raw, tmp_path, capsys):
    manifest = make(raw, tmp_path / "out")
    assert "2 of the 10,000 train videos" in capsys.readouterr().out
    paths = sorted(raw.rglob("*.mp4"))[:-1]
    assert [entry["name"] for entry in manifest["sources"]] == [
        path.relative_to(raw).as_posix() for path in paths
    ]
    for k, path in enumerate(paths):
        shards = Shards(tmp_path / "out" / ("train", "val", "test")[k // 2])
        assert len(shards) == 2 and shards.shape == (128, 128, 3)
        assert psnr(shards.read(k % 2, slice(None)), decoded(path, 128)) > 45
    assert (
        manifest["sources"][0]["note"] == "has 12 frames, the others 128; kept"
        and not manifest["skipped"]
    )


def test_one_zip_and_a_limit_of_each_split(raw, tmp_path):
    names = [path.relative_to(raw).as_posix() for path in sorted(raw.rglob("*.mp4"))]
    zipped(raw, tmp_path / "video_train.zip", names)
    manifest = make(
        tmp_path / "video_train.zip", tmp_path / "out", "--limit", 1, "--image_size", 32
    )
    assert [entry["name"].rpartition("/")[2] for entry in manifest["sources"]] == [
        "video_00003.mp4",
        "video_10000.mp4",
        "video_15000.mp4",
    ]
    assert {split: part["videos"] for split, part in manifest["splits"].items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }


def test_a_cut_off_video_is_skipped(raw, tmp_path):
    path = tmp_path / "raw" / "video_00003.mp4"
    path.parent.mkdir()
    whole = sorted(raw.rglob("*.mp4"))
    path.write_bytes(whole[0].read_bytes()[:-2000])
    (path.parent / "video_00007.mp4").write_bytes(whole[1].read_bytes())
    manifest = make(path.parent, tmp_path / "out", "--image_size", 16)
    assert [bool(entry["skipped"]) for entry in manifest["sources"]] == [True, False]
