"""prepare/videos.py: motion, and the command on real, generated and damaged files."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prepare import videos
from runtime.console import UserError
from shards import Shards

av = pytest.importorskip("av")

REPO = Path(__file__).resolve().parents[1]
WALK = REPO / "tests" / "data" / "walk.mp4"  # 60 frames of 320x180 at 15 fps


def make(source, out, *flags):
    return videos.make(videos.parse(["--source", str(source), "--out", str(out), *map(str, flags)]))


def launch(*flags):
    return subprocess.run(
        [sys.executable, "-m", "prepare.videos", *map(str, flags)],
        cwd=REPO,
        text=True,
        capture_output=True,
        env={**os.environ, "DRIFTCAST_QUIET": "1"},
        check=False,
    )


def write_video(path, frames, codec="ffv1", pixels="bgr0", milliseconds=None, rate=10):
    """Write frames (T, H, W, 3) uint8, lossless by default, optionally with a timestamp each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pixels)
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbered(count, height=16, width=16):
    """Frames of one grey level each, which is their index."""
    return np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)
    )


def levels(shards):
    """The grey level of each frame of each video of a split made from numbered()."""
    return [shards.read(k, slice(None))[:, 0, 0, 0].tolist() for k in range(len(shards))]


def walk_squares(size):
    """The fixture's centre squares, by another route than the code's: crop first, then resize."""
    with av.open(str(WALK)) as container:
        images = [frame.to_image().crop((70, 0, 250, 180)) for frame in container.decode(video=0)]
    return np.stack(
        [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    )


def test_motion_sees_a_small_body_but_neither_noise_nor_flicker():
    rng = np.random.default_rng(0)
    still = rng.integers(60, 180, (1, 64, 64, 3)).repeat(24, 0)
    noisy = (
        (still + rng.normal(0, 12, still.shape) + rng.normal(0, 4, (24, 1, 1, 1)))
        .clip(0, 255)
        .astype(np.uint8)
    )
    assert videos.measure_motion(noisy) == 0
    for t in range(24):
        noisy[t, 24:36, 2 * t : 2 * t + 6] = 0
    assert 3 * 12 / 256 * 100 <= videos.measure_motion(noisy) <= 4 * 14 / 256 * 100


def test_walk_round_trip_by_command(tmp_path):
    done = launch(
        "--source", WALK, "--out", tmp_path / "out", "--image_size", 32, "--val", 0.2, "--test", 0
    )
    assert done.returncode == 0, done.stderr
    assert "split by time" in done.stdout and "test" not in done.stdout.replace(str(tmp_path), "")
    train, val = Shards(tmp_path / "out" / "train"), Shards(tmp_path / "out" / "val")
    assert (
        train.lengths.tolist() == [48]
        and val.lengths.tolist() == [12]
        and train.fps == val.fps == 15
    )
    got = np.concatenate([train.read(0, slice(None)), val.read(0, slice(None))])
    # At the border, the resize filter covers other pixels.
    error = got[:, 2:-2, 2:-2].astype(int) - walk_squares(32)[:, 2:-2, 2:-2]
    assert np.abs(error).max() <= 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "train",
        "val",
    ]


def test_whole_videos_longer_than_a_chunk_stay_one_video(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "CHUNK", 16)
    write_video(tmp_path / "a.mkv", numbered(50))
    make(tmp_path / "a.mkv", tmp_path / "out", "--image_size", 8)
    assert [levels(Shards(tmp_path / "out" / split)) for split in videos.SPLITS] == [
        [list(range(40))],
        [list(range(40, 45))],
        [list(range(45, 50))],
    ]


def test_tiles_have_the_right_place_and_content(tmp_path):
    frames = np.zeros((4, 37, 70, 3), np.uint8)
    for k, (x, y) in enumerate((x, y) for y in (2, 18) for x in (3, 19, 35, 51)):
        frames[:, y : y + 16, x : x + 16] = 20 * (k + 1) + np.arange(4)[:, None, None, None]
    write_video(tmp_path / "a.mkv", frames)
    make(
        tmp_path,
        tmp_path / "out",
        "--image_size",
        8,
        "--tile",
        16,
        "--clip_length",
        2,
        "--min_motion",
        0,
        "--val",
        0,
        "--test",
        0,
    )
    shards = Shards(tmp_path / "out" / "train")
    assert len(shards) == 16
    for k in range(16):
        inner = shards.read(k, slice(None))[:, 2:-2, 2:-2].astype(int)
        expected = 20 * (k % 8 + 1) + 2 * (k // 8) + np.arange(2)[:, None, None, None]
        assert np.abs(inner - expected).max() <= 1  # bicubic weights may round


def test_clips_do_not_overlap_nor_straddle_the_cuts_and_the_rest_is_counted(tmp_path):
    write_video(tmp_path / "a.mkv", numbered(100))
    manifest = make(
        tmp_path,
        tmp_path / "out",
        "--image_size",
        8,
        "--clip_length",
        6,
        "--val",
        0.2,
        "--test",
        0.1,
    )
    parts = {"train": (0, 70), "val": (70, 90), "test": (90, 100)}
    for split, (start, stop) in parts.items():
        clips = levels(Shards(tmp_path / "out" / split))
        assert clips == [list(range(k, k + 6)) for k in range(start, stop - 5, 6)]
    assert manifest["sources"][0]["clips"] == {"train": 11, "val": 3, "test": 1}
    assert manifest["dropped"] == {"still": 0, "remainder": 4 + 2 + 4, "skipped": 0}


def test_split_by_source_keeps_sources_whole(tmp_path):
    for k in range(12):
        write_video(tmp_path / f"{k}.mkv", numbered(2) + np.uint8(10 * k))
    manifest = make(tmp_path, tmp_path / "auto", "--image_size", 8, "--clip_length", 2)
    assert manifest["split_rule"] == "source"
    clips = {split: levels(Shards(tmp_path / "auto" / split)) for split in videos.SPLITS}
    assert [len(clips[split]) for split in videos.SPLITS] == [10, 1, 1]
    assert sorted(clip for part in clips.values() for clip in part) == [
        [10 * k, 10 * k + 1] for k in range(12)
    ]
    assert (
        make(tmp_path / "3.mkv", tmp_path / "few", "--image_size", 8, "--test", 0)["split_rule"]
        == "time"
    )


def test_fps_by_timestamps(tmp_path):
    milliseconds = [0, 30, 110, 190, 240, 310, 350, 400, 490, 700]
    write_video(tmp_path / "a.mkv", numbered(10), milliseconds=milliseconds)
    flags = "--image_size", 8, "--val", 0, "--test", 0
    manifest = make(tmp_path, tmp_path / "out", "--fps", 10, *flags)
    shards = Shards(tmp_path / "out" / "train")
    # The last frame is the nearest to two ticks.
    assert levels(shards) == [[0, 2, 3, 5, 7, 8, 9, 9]] and shards.fps == 10
    # The median step has 70 ms.
    assert manifest["sources"][0]["rate"] == pytest.approx(1 / 0.07, rel=0.01)
    assert manifest["dropped"]["skipped"] == 0  # uneven timestamps are no sign of a cut-off file


def test_differing_rates_are_printed_and_the_first_is_stored(tmp_path, capsys):
    write_video(tmp_path / "a.mkv", numbered(8), rate=20)
    write_video(tmp_path / "b.mkv", numbered(8), rate=10)
    videos.report(make(tmp_path, tmp_path / "out", "--image_size", 8, "--val", 0, "--test", 0))
    assert "10 to 20 frames per second; the shards store 20" in capsys.readouterr().out
    shards = Shards(tmp_path / "out" / "train")
    assert shards.fps == 20 and shards.rates.tolist() == [20, 10]


def test_fps_above_the_source_keeps_all_frames_with_one_note(tmp_path, capsys):
    make(WALK, tmp_path / "out", "--image_size", 8, "--fps", 25)
    assert sum(Shards(tmp_path / "out" / split).lengths.sum() for split in videos.SPLITS) == 60
    assert capsys.readouterr().err.count("--fps 25 is above its rate of 15") == 1


def test_frame_folders_in_numeric_order_and_converted_to_rgb(tmp_path):
    folder = tmp_path / "source" / "a" / "b"
    folder.mkdir(parents=True)
    for k, array in enumerate(numbered(12)):
        image = Image.fromarray(array)
        image.convert(("L", "RGBA", "RGB")[k % 3]).save(folder / f"frame{k}.png")
    (folder / "notes.txt").write_text("not a frame")
    Image.new("RGB", (9, 9)).save(tmp_path / "source" / "poster.png")
    manifest = make(
        tmp_path / "source",
        tmp_path / "out",
        "--image_size",
        8,
        "--fps",
        5,
        "--val",
        0,
        "--test",
        0,
    )
    shards = Shards(tmp_path / "out" / "train")
    assert levels(shards) == [list(range(12))] and shards.fps == 5
    assert [source["name"] for source in manifest["sources"]] == [os.path.join("a", "b")]


def test_gif(tmp_path):
    images = [Image.new("RGB", (20, 16), (20 * k, 0, 255 - 20 * k)) for k in range(10)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    make(tmp_path, tmp_path / "out", "--image_size", 8, "--val", 0, "--test", 0)
    shards = Shards(tmp_path / "out" / "train")
    assert shards.lengths.tolist() == [10] and shards.fps == pytest.approx(10)
    assert shards.read(0, slice(None))[:, 4, 4].tolist() == [
        [20 * k, 0, 255 - 20 * k] for k in range(10)
    ]


def test_a_broken_file_is_named_and_does_not_spoil_the_next(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_video(source / "1.mkv", numbered(8))
    (source / "2.mp4").write_bytes(b"this is no video" * 100)
    write_video(source / "3.mkv", numbered(8) + np.uint8(100))
    flags = "--source", source, "--image_size", 8, "--clip_length", 4, "--val", 0, "--test", 0
    done = launch(*flags, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "2.mp4" in line and "Invalid data" in line]
    assert "1.mkv" not in done.stderr and "3.mkv" not in done.stderr
    assert (
        "skipped: 1 sources" in done.stdout
        and "the shards are complete" in done.stdout.splitlines()[-1]
    )
    assert levels(Shards(tmp_path / "out" / "train")) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [100, 101, 102, 103],
        [104, 105, 106, 107],
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [bool(entry["skipped"]) for entry in manifest["sources"]] == [False, True, False]
    assert manifest["versions"] == {"av": av.__version__, "pillow": Image.__version__}
    assert (
        manifest["command"].startswith("python -m prepare.videos --source")
        and manifest["split_rule"] == "time"
    )
    assert [entry["frames"] for entry in manifest["sources"]] == [8, 0, 8]
    assert launch(*flags, "--out", tmp_path / "again", "--allow_skips").returncode == 0


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_truncated_file_keeps_the_clips_before_the_end(tmp_path, capsys, share):
    data = WALK.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(share * len(data))])
    manifest = make(
        tmp_path, tmp_path / "out", "--image_size", 32, "--clip_length", 4, "--val", 0, "--test", 0
    )
    entry, shards = manifest["sources"][0], Shards(tmp_path / "out" / "train")
    # Some releases of FFmpeg detect the damage.
    assert "cut short: " in entry["skipped"] or "Invalid data" in entry["skipped"]
    assert manifest["dropped"]["skipped"] == 1
    assert entry["clips"]["train"] == len(shards) == entry["decoded"] // 4 > 60 * share / 4 - 4
    assert (
        f"cut.mp4: {entry['skipped']}; skipped after {entry['decoded']} frames"
        in capsys.readouterr().err
    )
    first = shards.read(0, slice(None))[:, 2:-2, 2:-2].astype(int)
    assert np.abs(first - walk_squares(32)[:4, 2:-2, 2:-2]).max() <= 1


def test_damage_that_the_decoder_conceals_is_reported(tmp_path, capsys):
    data = bytearray(WALK.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(range(250)) * 12
    (tmp_path / "bad.mp4").write_bytes(data)
    entry = make(tmp_path, tmp_path / "out", "--image_size", 8, "--val", 0, "--test", 0)["sources"][
        0
    ]
    assert entry["skipped"] or entry["corrupt"] >= 1
    assert "bad.mp4" in capsys.readouterr().err


def test_a_damaged_middle_and_a_change_of_size_break_off_there(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(9):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{k}.png")
    flags = "--image_size", 8, "--clip_length", 2, "--val", 0, "--test", 0
    Image.new("RGB", (16, 20)).save(folder / "7.png")
    entry = make(folder, tmp_path / "size", *flags)["sources"][0]
    assert entry["skipped"] == "frame 7 is 16x20, the first 16x16"
    assert entry["clips"]["train"] == 3 and entry["remainder"] == 1
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:200])
    entry = make(folder, tmp_path / "damage", *flags)["sources"][0]
    assert (
        "truncated" in entry["skipped"] and entry["clips"]["train"] == 2 and entry["remainder"] == 1
    )


def test_min_motion_drops_the_still_clip_and_keeps_the_moving_one(tmp_path):
    frames = np.full((12, 64, 64, 3), 100, np.uint8)
    for t in range(6, 12):
        frames[t, 20:40, 8 * (t - 6) : 8 * (t - 6) + 10] = 200
    write_video(tmp_path / "a.mkv", frames)
    flags = tmp_path / "a.mkv", "--clip_length", 6, "--image_size", 64, "--val", 0, "--test", 0

    def kept(name, *more):
        manifest = make(flags[0], tmp_path / name, *flags[1:], *more)
        return Shards(tmp_path / name / "train").read(0, slice(None)), manifest["dropped"]["still"]

    clip, still = kept("moving", "--min_motion", 2)
    assert still == 1 and (clip == frames[6:]).all()
    assert kept("tile", "--tile", 64)[1] == 1  # the default with --tile
    clip, still = kept("all")
    assert still == 0 and (clip == frames[:6]).all()


def test_a_source_smaller_than_a_tile_is_skipped(tmp_path, capsys):
    write_video(tmp_path / "a.mkv", numbered(4))
    write_video(tmp_path / "b.mkv", numbered(4, 32, 32))
    flags = (
        "--image_size",
        8,
        "--tile",
        32,
        "--clip_length",
        2,
        "--min_motion",
        0,
        "--val",
        0,
        "--test",
        0,
    )
    manifest = make(tmp_path, tmp_path / "out", *flags)
    assert [entry["clips"]["train"] for entry in manifest["sources"]] == [0, 2]
    assert "a.mkv: frames of 16x16 are smaller than --tile 32; skipped" in capsys.readouterr().err


def test_no_video_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "readme.txt").write_text("nothing to see")
    done = launch("--source", tmp_path / "source", "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "source") in done.stderr and ".mp4" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_not_one_clip_leaves_nothing(tmp_path):
    write_video(tmp_path / "a.mkv", numbered(5))
    with pytest.raises(UserError, match="no clip in 1 sources.* 5 frames left over"):
        make(tmp_path, tmp_path / "out", "--clip_length", 6)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_an_empty_split_is_a_warning(tmp_path, capsys):
    write_video(tmp_path / "a.mkv", numbered(30))
    videos.report(make(tmp_path, tmp_path / "out", "--image_size", 8, "--clip_length", 5))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "warning" in line] == ["val", "test"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["train"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--image_size", 7),
        ("--clip_length", 1),
        ("--tile", 7, "--clip_length", 4),
        ("--min_motion", 101),
        ("--fps", 0),
        ("--min_motion", -1),
        ("--val", -0.1),
        ("--val", 1),
        ("--val", 0.5, "--test", 0.5),
        ("--tile", 16),
        ("--fps", "nan"),
        ("--min_motion", 1),
    ],
)
def test_impossible_arguments(tmp_path, flags):
    with pytest.raises(UserError, match=flags[0]):
        make(WALK, tmp_path / "out", *flags)


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="already exists"):
        make(WALK, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        make(tmp_path / "nowhere", tmp_path / "out")
