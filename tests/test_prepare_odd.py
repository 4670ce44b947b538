"""prepare.videos on unusual files: damaged, turned, uneven, joined, trimmed, duplicated."""

import gc
import json
import os
import shutil
from fractions import Fraction

import numpy as np
import pytest
from conftest import REPO
from odd import (
    av,
    corners,
    damage,
    empty_chunks,
    encode,
    greys,
    join,
    sound,
    turned,
    two_tracks,
    with_cover,
)
from PIL import Image
from test_prepare_videos import launch

from prepare import timing, videos
from prepare.container import TURNS
from prepare.decode import Broken, Film, probe, read
from prepare.sources import Source, decode_clips, read_film
from runtime.console import UserError
from shards import Shards

WALK = REPO / "tests" / "data" / "walk.mp4"
ALL_TRAIN = ("--image_size", 16, "--val", 0, "--test", 0)


def prepared(source, out, *flags):
    """Run prepare.videos with all sources in train; returns (manifest, shards)."""
    words = ["--source", source, "--out", out, *ALL_TRAIN, *flags]
    manifest = videos.make(videos.parse([str(word) for word in words]))
    return manifest, Shards(out / "train")


def levels(shards):
    """The grey level of each frame of each video."""
    return [
        shards.read(k, slice(None))[:, 8, 8, 0].astype(int).tolist() for k in range(len(shards))
    ]


def close(got, wanted):
    """Whether videos have the grey levels of `wanted`, up to the loss of the codec."""
    assert [len(video) for video in got] == [len(video) for video in wanted]
    return all(np.abs(np.subtract(a, b)).max() <= 3 for a, b in zip(got, wanted))


def notes(manifest):
    (entry,) = manifest["sources"]
    return "; ".join(entry["notes"])


# --------------------------------------------------------------------------------- index arithmetic
@pytest.mark.parametrize(
    "decoding, shown, median, regular",
    [
        (range(5), range(5), 1, 1),
        # Rounded to milliseconds: 30 frames per second.
        ([0, 33, 67, 100, 133, 167], [0, 33, 67, 100, 133, 167], 33, 33.4),
        # B-frames: the file's order is not the order of presentation.
        ([0, 1, 2, 3], [0, 3, 1, 2], 1, 1),
        # A joint: steps are measured within the parts.
        ([0, 10, 20, 0, 10, 20], [0, 10, 20, 5, 15, 25], 10, 10),
        # A frame lost in a format that counts frames.
        ([0, 1, 2, 4, 5, 6], [0, 1, 2, 4, 5, 6], 1, 1),
    ],
)
def test_measure_steps(decoding, shown, median, regular):
    steps = timing.measure_steps(np.array(decoding), np.array(shown), 1.0)
    assert (steps.median, steps.regular) == (median, pytest.approx(regular))


def test_measure_steps_of_too_few_timestamps():
    for stamps in ([], [3], [3, 3]):
        assert timing.measure_steps(np.array(stamps), np.array(stamps), 1.0) is None


@pytest.mark.parametrize(
    "times, parts",
    [
        ([0, 1, 2, 3], [1, 1, 1, 1]),
        ([0, 2, 4, 7], [1, 1, 1, 1]),
        ([0, 1, 5, 6], [1, 1, 2, 2]),
        ([0, 1, 0, 1], [1, 1, 2, 2]),
        ([0, 1, 1, 2], [1, 1, 1, 1]),
        ([-3, -2, None, 0, 9], [1, 1, 1, 1, 2]),
        ([None, None], [1, 1]),
    ],
)
def test_clock_divides_frames_at_holes_and_joints(times, parts):
    clock = timing.Clock(1.0, 3.0, 0.001)
    assert [clock.show(seconds)[0] for seconds in times] == parts


def test_clock_is_strict_after_damage():
    clock = timing.Clock(1.0, 3.0, 0.001)
    clock.show(0.0)
    clock.suspect()
    assert [clock.show(seconds)[0] for seconds in (1.0, 3.0)] == [1, 2]
    for k in range(timing.DELAY):
        clock.show(4.0 + k)
    assert clock.show(5.0 + timing.DELAY)[0] == 2 and (clock.holes, clock.longest) == (1, 2.0)


# ------------------------------------------------------------------------------------------- damage
def numbered_squares(count):
    """Textured frames whose top band tells their number."""
    base = np.random.default_rng(0).integers(0, 255, (96, 160, 3), np.uint8)
    frames = np.stack([np.roll(base, 3 * k, 1) for k in range(count)])
    for k in range(count):
        frames[k, :12] = 6 * k
    return frames


@pytest.mark.parametrize(
    "name, codec, pixels, options",
    [
        ("a.mkv", "libx264", "yuv420p", {"bf": "0", "g": "10"}),
        ("a.mkv", "libx264", "yuv420p", {"g": "10"}),
        ("a.mp4", "libx264", "yuv420p", {"g": "10"}),
        ("a.mov", "mjpeg", "yuvj420p", {}),
        ("a.ts", "libx264", "yuv420p", {"g": "10"}),
        ("a.avi", "mjpeg", "yuvj420p", {}),
        ("a.avi", "mpeg4", "yuv420p", {"g": "10"}),
        ("a.avi", "mpeg4", "yuv420p", {"g": "10", "bf": "2"}),
        ("a.webm", "libvpx-vp9", "yuv420p", {"g": "10"}),
    ],
)
def test_damage_in_mid_film_is_named_and_no_clip_crosses_it(tmp_path, name, codec, pixels, options):
    path = tmp_path / "in" / name
    encode(path, numbered_squares(40), codec, pixels, options=options)
    clean = prepared(path, tmp_path / "clean")[1].read(0, slice(None)).astype(int)
    assert len(clean) == 40
    for place in (0.4, 0.6):
        damage(path, place, place + 0.05)
    manifest, shards = prepared(path, tmp_path / "out")
    (entry,) = manifest["sources"]
    assert entry["skipped"] is None and shards.fps == pytest.approx(25)
    assert "damage" in notes(manifest)
    total = 0
    for video in range(len(shards)):
        frames = shards.read(video, slice(None)).astype(int)
        error = np.abs(frames[:, None] - clean).mean((2, 3, 4))
        found = error.argmin(1)
        # The decoder replaces damaged frames by copies of their neighbours.
        sure = error.min(1) < 3
        steps = np.diff(found)[sure[1:] & sure[:-1]]
        assert (steps <= 1).all(), found
        total += sure.sum()
    assert 15 <= total < 40


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.ts"])
@pytest.mark.parametrize("gap, parts", [(2, 1), (3, 1), (4, 2)])
def test_a_step_of_over_three_medians_is_a_hole(tmp_path, name, gap, parts):
    times = [*range(10), *range(9 + gap, 19 + gap)]
    stamps = [40 * k for k in times]
    encode(tmp_path / "in" / name, greys(range(0, 80, 4)), stamps=stamps)
    manifest, shards = prepared(tmp_path / "in", tmp_path / "out")
    wanted = list(range(0, 80, 4))
    assert close(levels(shards), [wanted] if parts == 1 else [wanted[:10], wanted[10:]])
    assert shards.fps == pytest.approx(25) and ("1 hole" in notes(manifest)) == (parts == 2)
    if parts == 2:
        _, whole = prepared(tmp_path / "in", tmp_path / "whole", "--max_gap", gap)
        assert whole.lengths.tolist() == [20]
    if gap == 2:
        assert "variable frame rate: 40 to 80 ms" in notes(manifest)
        _, cut = prepared(tmp_path / "in", tmp_path / "cut", "--max_gap", 1.5)
        assert cut.lengths.tolist() == [10, 10]


def test_clips_of_a_fixed_length_do_not_cross_a_hole_and_the_rest_is_counted(tmp_path):
    stamps = [40 * k for k in (*range(10), *range(30, 40))]
    encode(tmp_path / "a.mkv", greys(range(0, 80, 4)), stamps=stamps)
    manifest, shards = prepared(tmp_path / "a.mkv", tmp_path / "out", "--clip_length", 4)
    wanted = [[4 * k + 4 * i for i in range(4)] for k in (0, 4, 10, 14)]
    assert close(levels(shards), wanted)
    assert manifest["sources"][0]["dropped"] == {"left over": 4}


def test_a_lone_frame_between_holes_is_no_video(tmp_path):
    encode(
        tmp_path / "a.mkv",
        greys(range(0, 44, 4)),
        stamps=[*range(0, 200, 40), 2000, *range(4000, 4200, 40)],
    )
    manifest, shards = prepared(tmp_path / "a.mkv", tmp_path / "out")
    assert shards.lengths.tolist() == [5, 5]
    assert manifest["sources"][0]["remainder"] == 1 and "2 holes" in notes(manifest)


def test_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    sound(None, tmp_path / "sound.mp4")
    with_cover(tmp_path / "cover.mp4", greys([]), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "text.mkv").write_text("not a film")
    encode(tmp_path / "good.mkv", greys(range(10)))
    manifest, shards = prepared(tmp_path, tmp_path / "out")
    reasons = {entry["name"]: entry["skipped"] for entry in manifest["sources"]}
    assert reasons.pop("good.mkv") is None and len(shards) == 1
    assert reasons["sound.mp4"] == "no video stream"
    assert reasons["cover.mp4"] == "no video stream except a cover picture"
    assert all(reasons.values()) and len(reasons) == 4


# -------------------------------------------------------------------------------------- the picture
@pytest.mark.parametrize("matrix", TURNS)
def test_display_matrices_turn_and_mirror(tmp_path, matrix):
    turned(encode(tmp_path / "a.mp4", corners(6)), matrix)
    manifest, shards = prepared(
        tmp_path, tmp_path / "out", "--tile", 16, "--clip_length", 6, "--min_motion", 0
    )
    a, b, c, d = matrix
    # By the definition of the matrix: the stored pixel (x, y) is shown at (ax + cy, bx + dy).
    stored = corners(1)[0].astype(int)
    size = (48, 80) if a == 0 else (80, 48)
    assert manifest["sources"][0]["size"] == size
    shown = np.zeros((size[1], size[0], 3), int)
    for y in range(48):
        for x in range(80):
            across = a * x + c * y + (size[0] - 1 if a + c < 0 else 0)
            down = b * x + d * y + (size[1] - 1 if b + d < 0 else 0)
            shown[down, across] = stored[y, x]
    rows, columns = size[1] // 16, size[0] // 16
    assert len(shards) == rows * columns
    tiles = np.stack([shards.read(k, np.array([3]))[0] for k in range(len(shards))])
    whole = tiles.reshape(rows, columns, 16, 16, 3).swapaxes(1, 2).reshape(size[1], size[0], 3)
    assert np.abs(whole - shown).mean() < 3


@pytest.mark.parametrize("name", ["a.mov", "a.mkv"])
@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_in_other_containers(tmp_path, name, angle):
    path = tmp_path / name
    encode(path, corners(6), setup=lambda stream: stream.set_display_rotation(angle))
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation % 360 == angle
    manifest, shards = prepared(path, tmp_path / "out")
    width, height = manifest["sources"][0]["size"]
    assert (width, height) == ((80, 48) if angle == 180 else (48, 80))
    # PyAV's angles are counterclockwise, as numpy's.
    wanted = np.rot90(corners(1)[0], angle // 90)
    frame = shards.read(0, slice(None))[2].astype(int)
    for y, x in ((3, 3), (3, 12), (12, 3), (12, 12)):
        corner = wanted[0 if y < 8 else -1, 0 if x < 8 else -1]
        assert np.abs(frame[y, x] - corner).max() <= 4


def test_an_odd_angle_is_named(tmp_path):
    path = encode(tmp_path / "a.mov", corners(6))
    data = turned(path, (1, 0, 0, 1)).read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    slanted = one + (1 << 15).to_bytes(4, "big") + bytes(8) + one
    at = data.find(one + bytes(12) + one, data.find(b"tkhd"))
    path.write_bytes(data[:at] + slanted + data[at + 20 :])
    assert "display matrix" in notes(prepared(path, tmp_path / "out")[0])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(64, 45)])
def test_pixel_aspect_ratio_is_applied(tmp_path, name, aspect):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    frames = np.zeros((6, 48, 80, 3), np.uint8)
    frames[:, 12:36, 30:50] = 200
    encode(tmp_path / name, frames, setup=setup)
    manifest, shards = prepared(tmp_path / name, tmp_path / "out", "--image_size", 48)
    width = round(80 * aspect)
    assert manifest["sources"][0]["size"] == (width, 48)
    bright = shards.read(0, slice(None))[3, ..., 1] > 100
    scale = 48 / min(48, width)
    assert bright.any(0).sum() == pytest.approx(min(48, 20 * float(aspect) * scale), abs=3)
    assert bright.any(1).sum() == pytest.approx(24 * scale, abs=3)


def test_turn_and_aspect_together_and_in_tiles(tmp_path):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    turned(encode(tmp_path / "a.mp4", corners(4), setup=setup), (0, 1, -1, 0))
    flags = ("--tile", 48, "--clip_length", 4, "--min_motion", 0)
    manifest, shards = prepared(tmp_path / "a.mp4", tmp_path / "out", *flags)
    assert manifest["sources"][0]["size"] == (48, 160) and len(shards) == 3
    # Clockwise: the blue corner is at the top left.
    assert np.abs(shards.read(0, np.array([0]))[0, 3, 3].astype(int) - (30, 30, 200)).max() < 8


def test_other_scripts_also_turn_videos_and_divide_them_at_holes(tmp_path):
    stamps = [40 * k for k in (*range(5), *range(30, 35))]
    path = turned(encode(tmp_path / "a.mp4", corners(10), stamps=stamps), (0, 1, -1, 0))
    film = Film(path, "a", data=path.read_bytes())
    clips = decode_clips(film, 16, "squeeze")
    assert [clip.shape for clip in clips] == [(5, 16, 16, 3), (5, 16, 16, 3)]
    assert np.abs(clips[0][0, 3, 3].astype(int) - (30, 30, 200)).max() < 8 and film.holes == 1


def test_other_scripts_leave_out_a_damaged_video(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_squares(40), options={"g": "10"})
    damage(path, 0.4, 0.5)
    source = Source("a.mp4", "train", str(path), size=path.stat().st_size)
    with pytest.raises(Broken, match="lost to damage"):
        read_film(source, 16, "squeeze")


@pytest.mark.parametrize(
    "name, codec, pixels", [("a.mov", "png", "rgba"), ("a.mkv", "ffv1", "bgra")]
)
def test_transparent_films_are_composed_on_white(tmp_path, name, codec, pixels):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height = stream.width = 32
        stream.pix_fmt = pixels
        frame = np.zeros((32, 32, 4), np.uint8)
        frame[:, 16:] = (200, 30, 30, 255)
        for _ in range(4):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format=pixels)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    manifest, shards = prepared(tmp_path, tmp_path / "out")
    left, right = shards.read(0, slice(None))[2, 8, [3, 12]].tolist()
    assert (left, right) == ([255] * 3, [200, 30, 30])
    assert "transparent; composed on white" in notes(manifest)


def test_the_film_is_used_and_not_the_cover(tmp_path):
    cover = np.full((128, 128, 3), 255, np.uint8)
    with_cover(tmp_path / "a.mp4", greys(range(0, 80, 4)), cover)
    manifest, shards = prepared(tmp_path, tmp_path / "out")
    assert close(levels(shards), [list(range(0, 80, 4))]) and not notes(manifest)


def test_two_tracks_are_named(tmp_path):
    two_tracks(tmp_path / "a.mkv", greys(range(0, 40, 4)), greys(range(100, 140, 4)))
    manifest, shards = prepared(tmp_path, tmp_path / "out")
    with av.open(str(tmp_path / "a.mkv")) as container:
        best = container.streams.best("video").index
    assert "2 video tracks" in notes(manifest) and f"track {best} is used" in notes(manifest)
    assert close(levels(shards), [list(range(100 * best, 100 * best + 40, 4))])


@pytest.mark.parametrize("name, codec", [("a.mpg", "mpeg2video"), ("a.mp4", "libx264")])
def test_interlaced_film_is_named(tmp_path, name, codec):
    options = {"flags": "+ildct+ilme"} if codec == "mpeg2video" else {"x264-params": "tff=1"}
    encode(tmp_path / name, numbered_squares(10), codec, options=options)
    manifest, _ = prepared(tmp_path, tmp_path / "out")
    assert "10 interlaced frames" in notes(manifest) and "bwdif" in notes(manifest)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG"), (1, "")])
def test_hdr_is_named(tmp_path, transfer, name):
    def setup(stream):
        stream.codec_context.color_trc = transfer

    encode(tmp_path / "a.mp4", corners(4), pixels="yuv420p10le", setup=setup)
    manifest, _ = prepared(tmp_path, tmp_path / "out")
    assert ("HDR" in notes(manifest)) == bool(name) and name in notes(manifest)


# ----------------------------------------------------------------------------------------- the time
def test_packets_hidden_by_an_edit_list_count_for_nothing(tmp_path):
    stamps = range(-20, 20)
    encode(tmp_path / "a.mp4", greys(range(0, 160, 4)), stamps=list(stamps), unit=Fraction(1, 25))
    words = ["--source", tmp_path, "--out", tmp_path / "out", "--image_size", 16]
    args = videos.parse([str(word) for word in (*words, "--val", 0.25, "--test", 0.25)])
    manifest = videos.make(args)
    splits = [levels(Shards(tmp_path / "out" / split)) for split in videos.SPLITS]
    assert close(splits[0], [range(80, 120, 4)])
    assert close(splits[1], [range(120, 140, 4)]) and close(splits[2], [range(140, 160, 4)])
    (entry,) = manifest["sources"]
    assert entry["frames"] == entry["decoded"] == 20 and not entry["notes"]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.webm"])
def test_frames_are_taken_by_time_where_the_rate_varies(tmp_path, name):
    # Two bursts of 30 frames per second, and 10 frames at 15, with a pause of 3 s.
    times = [*range(0, 990, 33), *range(3990, 4980, 33), *range(4980, 5640, 66)]
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    options = {"crf": "4", "b:v": "0"} if codec == "libvpx-vp9" else None
    shown = [2 * k for k in range(len(times))]
    encode(tmp_path / name, greys(shown), codec, stamps=times, options=options)
    flags = ("--fps", 25)
    manifest, shards = prepared(tmp_path, tmp_path / "out", *flags)
    got = levels(shards)
    (entry,) = manifest["sources"]
    assert len(got) == 2 and shards.rates.tolist() == [25, 25] and "1 hole" in notes(manifest)
    repeated = 0
    for video, (first, last) in zip(got, ((0, 957), (3990, 5574))):
        ticks = np.arange(first, last + 17, 40)
        inside = [k for k, time in enumerate(times) if first <= time <= last]
        nearest = [inside[np.abs(np.array(times)[inside] - tick).argmin()] for tick in ticks]
        assert len(video) == len(ticks)
        # Between two frames equally near, either is right.
        assert np.abs(np.array(video) / 2 - nearest).max() <= 1.5
        assert np.mean(np.abs(np.array(video) / 2 - nearest) > 0.5) < 0.15
        repeated += len(nearest) - len(set(nearest))
    assert entry["repeated"] == repeated > 5 and f"{repeated} frames repeated" in notes(manifest)
    assert entry["dropped"]["between the ticks of --fps"] == entry["decoded"] - entry["used"] > 0


def test_a_raised_max_gap_holds_the_picture_over_a_pause(tmp_path):
    stamps = [*range(0, 1000, 100), *range(2900, 3900, 100)]
    encode(tmp_path / "a.mkv", greys(range(0, 80, 4)), stamps=stamps)
    manifest, shards = prepared(tmp_path, tmp_path / "out", "--fps", 10, "--max_gap", 50)
    assert shards.lengths.tolist() == [39] and manifest["sources"][0]["repeated"] == 19


def test_a_video_slower_than_fps_keeps_its_rate(tmp_path):
    encode(tmp_path / "a.mp4", greys(range(0, 80, 4)), rate=5)
    encode(tmp_path / "b.mp4", greys(range(100, 180, 4)), rate=30)
    encode(tmp_path / "c.mp4", greys(range(80, 160, 4)), rate=25)
    manifest, shards = prepared(tmp_path, tmp_path / "out", "--fps", 25)
    assert shards.rates.tolist() == [5, 25, 25] and shards.fps == 5
    assert shards.lengths.tolist()[::2] == [20, 20]
    assert "--fps 25 is above its rate of 5" in manifest["sources"][0]["notes"][0]


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.ts", "libx264", None),
        ("a.mpg", "mpeg2video", {"q:v": "2"}),
        ("a.mkv", "libx264", None),
        ("a.webm", "libvpx-vp9", {"crf": "4", "b:v": "0"}),
    ],
)
def test_joined_recordings_keep_the_second_part(tmp_path, name, codec, options):
    first = encode(tmp_path / "1" / name, greys(range(0, 80, 4)), codec, options=options)
    second = encode(tmp_path / "2" / name, greys(range(100, 160, 4)), codec, options=options)
    (tmp_path / "in").mkdir()
    join(tmp_path / "in" / name, first, second)
    manifest, shards = prepared(tmp_path / "in", tmp_path / "out", "--fps", 25)
    assert close(levels(shards), [range(0, 80, 4), range(100, 160, 4)])
    assert "timestamps go back 1 time" in notes(manifest) and shards.fps == 25
    assert manifest["sources"][0]["skipped"] is None


@pytest.mark.parametrize("start", [0, 90_000, 3_600_000])
def test_films_that_do_not_start_at_zero(tmp_path, start):
    stamps = [start + 40 * k for k in range(20)]
    encode(tmp_path / "a.mkv", greys(range(0, 80, 4)), stamps=stamps)
    manifest, shards = prepared(tmp_path, tmp_path / "out", "--fps", 25)
    assert close(levels(shards), [range(0, 80, 4)]) and not notes(manifest)
    assert manifest["sources"][0]["skipped"] is None and shards.fps == 25


def test_films_without_timestamps(tmp_path):
    encode(tmp_path / "a.h264", greys(range(0, 80, 4)))
    encode(tmp_path / "b.avi", greys(range(0, 80, 4)), "mpeg4", options={"q:v": "1", "bf": "2"})
    encode(tmp_path / "c.avi", greys(range(0, 80, 4)))
    manifest, shards = prepared(tmp_path, tmp_path / "out")
    assert close(levels(shards), [range(0, 80, 4)] * 3)
    assert shards.fps == 25 and not any(entry["notes"] for entry in manifest["sources"])


def test_empty_packets_do_not_end_an_avi(tmp_path):
    path = encode(tmp_path / "a.avi", corners(30), "mjpeg", "yuvj420p", options={})
    empty_chunks(path, (4, 10, 11))
    manifest, shards = prepared(path, tmp_path / "out")
    assert shards.lengths.tolist() == [27] and shards.fps == 25
    assert "variable frame rate: 40 to 120 ms" in notes(manifest)
    manifest, shards = prepared(path, tmp_path / "ticks", "--fps", 25)
    assert shards.lengths.tolist() == [30] and manifest["sources"][0]["repeated"] == 3


def test_a_gif_whose_delays_vary(tmp_path):
    images = [Image.new("RGB", (20, 16), (20 * k, 0, 0)) for k in range(8)]
    delays = [100, 100, 200, 100, 1000, 100, 100, 100]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=delays)
    manifest, shards = prepared(tmp_path, tmp_path / "out", "--fps", 10)
    got = [[level // 20 for level in video] for video in levels(shards)]
    assert got == [[0, 1, 2, 3, 3, 4], [5, 6, 7]] and shards.fps == 10
    assert "1 hole" in notes(manifest)


# -------------------------------------------------------------------------------- names and doubles
@pytest.mark.parametrize("name", ["12:30.mp4", "%d.mp4", "-x.mp4", "a b#?.MP4", "file:x.mkv"])
def test_any_file_name(tmp_path, name, monkeypatch):
    encode(tmp_path / "in" / "a.mp4", greys(range(10)))
    (tmp_path / "in" / "a.mp4").rename(tmp_path / "in" / name)
    for source, out in ((tmp_path / "in", "folder"), (tmp_path / "in" / name, "file")):
        _, shards = prepared(source, tmp_path / out)
        assert shards.lengths.tolist() == [10]
    monkeypatch.chdir(tmp_path / "in")
    args = videos.parse([f"--source={name}", f"--out={tmp_path / 'here'}", "--image_size=16"])
    assert videos.make(args)["sources"][0]["decoded"] == 10


def test_names_that_are_not_utf8(tmp_path):
    encode(tmp_path / "a.mp4", greys(range(10)))
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    os.rename(tmp_path / "a.mp4", folder + b"/\xe9.mp4")
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9")
    done = launch("--source", os.fsdecode(folder), "--out", out, *ALL_TRAIN)
    assert done.returncode == 0 and "\\udce9.mp4" in done.stdout, done.stderr
    assert Shards(os.path.join(out, "train")).lengths.tolist() == [10]


@pytest.mark.parametrize("rule", ["source", "time"])
def test_the_same_video_twice_stays_in_one_split(tmp_path, rule):
    for k in range(12):
        encode(tmp_path / "in" / f"{k:02d}.mkv", greys(range(20 * k, 20 * k + 20)), "ffv1", "bgr0")
    for copy in ("03 (1).mkv", "x/again.mkv"):
        (tmp_path / "in/x").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "in/03.mkv", tmp_path / "in" / copy)
    words = ["--source", tmp_path / "in", "--out", tmp_path / "out", "--image_size", 16]
    done = launch(*words, "--split_by", rule, "--val", 0.3, "--test", 0.3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same content as 03 (1).mkv") == 2
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    clips = {entry["name"]: entry["clips"] for entry in manifest["sources"]}
    assert clips["03.mkv"] == clips["03 (1).mkv"] == clips["x/again.mkv"]
    seen = []
    for split in videos.SPLITS:
        seen.append(
            {level for video in levels(Shards(tmp_path / "out" / split)) for level in video}
        )
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_copies_do_not_count_as_sources_when_the_rule_is_chosen(tmp_path):
    first = encode(tmp_path / "in" / "0.mkv", greys(range(20)), "ffv1", "bgr0")
    for k in range(1, 12):
        shutil.copy(first, tmp_path / "in" / f"{k}.mkv")
    args = videos.parse(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert videos.make(args)["split_rule"] == "time"


@pytest.mark.parametrize("value", ["0.5", "nan", "-1"])
def test_an_impossible_max_gap(tmp_path, value):
    with pytest.raises(UserError, match="--max_gap"):
        videos.parse(["--source", "x", "--out", "y", "--max_gap", value])


def test_a_file_that_vanishes_is_named(tmp_path):
    with pytest.raises(Broken, match="No such file"):
        probe(Film(tmp_path / "a.mp4", "a.mp4"))


# -------------------------------------------------------------------------------- all in one folder
def folder_of_everything(folder):
    """Write one file of every kind; return {name: (levels of its videos, words of remarks)}."""
    plain = greys(range(0, 80, 4))
    wanted = [range(0, 80, 4)]
    everything = {}

    def put(name, levels, *words):
        everything[name] = (levels, words)
        return folder / name

    encode(put("12:30.mp4", wanted), plain, rate=24)
    encode(put("avi.avi", wanted), plain, "mjpeg", "yuvj420p", options={"q:v": "1"})
    encode(
        put("aspect.mp4", wanted),
        plain,
        options={"crf": "5"},
        setup=lambda s: setattr(s.codec_context, "sample_aspect_ratio", Fraction(2)),
    )
    with_cover(put("cover.mp4", wanted), plain, np.full((128, 128, 3), 255, np.uint8))
    shutil.copy(folder / "12:30.mp4", put("copy.mp4", wanted, "the same content as 12:30.mp4"))
    encode(
        put("edit.mp4", [range(40, 80, 4)]),
        plain,
        stamps=list(range(-10, 10)),
        unit=Fraction(1, 25),
    )
    put("empty.mp4", [], "skipped: the file is empty").touch()
    encode(
        put("gap.mkv", [range(0, 40, 4), range(40, 80, 4)], "1 hole"),
        plain,
        stamps=[40 * k for k in (*range(10), *range(13, 23))],
    )
    Image.new("RGB", (64, 64)).save(
        put("gif.gif", [range(0, 80, 20)]),
        save_all=True,
        duration=40,
        append_images=[Image.new("RGB", (64, 64), (k, k, k)) for k in range(20, 80, 20)],
    )
    encode(
        put("hdr.mp4", wanted, "HDR (HLG)"),
        plain,
        pixels="yuv420p10le",
        setup=lambda s: setattr(s.codec_context, "color_trc", 18),
    )
    encode(
        put("interlaced.mpg", wanted, "20 interlaced frames"),
        plain,
        "mpeg2video",
        options={"flags": "+ildct+ilme", "q:v": "1"},
    )
    part = encode(folder / "part.ts", plain)
    join(put("joined.ts", wanted * 2, "go back 1 time"), part, part)
    part.unlink()
    encode(put("quiet.webm", wanted), plain, "libvpx-vp9", options={"crf": "4", "b:v": "0"})
    encode(put("raw.h264", wanted), plain, options={"crf": "6"})
    turned(encode(put("rotated.mp4", wanted), plain, options={"crf": "7"}), (0, 1, -1, 0))
    encode(put("slow.mp4", wanted, "--fps 25 is above its rate of 5"), plain, rate=5)
    sound(None, put("sound.mp4", [], "skipped: no video stream"))
    two_tracks(put("tracks.mkv", wanted, "2 video tracks; track 0"), plain, plain[:, :32, :32])
    encode(
        put("uneven.mkv", [[0, 4, 8, 8, 12, 16, 20, 24]], "1 frame repeated"),
        plain[:7],
        stamps=[0, 40, 120, 160, 200, 240, 280],
    )
    folders_of_images(put)
    return everything


def folders_of_images(put) -> None:
    """Write one folder of images of every kind. put(name, levels, *words) -> its path."""

    def save(name, levels, names, *words, values=None, **options):
        path = put(name, levels, *words)
        # Another kind of image in the folder has a name of its own.
        path = path.parent if path.suffix == ".png" else path
        path.mkdir(exist_ok=True)
        values = [value for part in levels for value in part] if values is None else values
        for value, image in zip(values, names):
            Image.new("RGB", (64, 64), (value,) * 3).save(path / image, **options)
        return path

    save("alone", [[8, 16, 24]], ["1.png", "2.png", "3.PNG"])
    save("cameras", [], ["a1_1.png", "a1_2.png", "a2_1.png"], "skipped: several", values=[0] * 3)
    save("counter", [[48, 16, 24]], ["F_9998.png", "F_9999.png", "F_0001.png"], "rolls over")
    save("kinds/flow_#.png", [[40, 80]], ["flow_1.png", "flow_2.png"])
    save("kinds/img_#.png", [[8, 16]], ["img_1.png", "img_2.png"])
    gap = ["f1.png", "f2.png", "f7.png", "f8.png"]
    save("missing", [[8, 16], [24, 32]], gap, "numbers are missing between f2.png and f7.png")
    save("times", [[32, 16, 24]], ["0.png", "0.5.png", "1.png"])
    path = save("transparent", [[255, 255]], [], "composed on white")
    for k in range(2):
        Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(path / f"{k}.png")


def test_a_folder_of_everything(tmp_path):
    everything = folder_of_everything(tmp_path / "in")
    data = WALK.read_bytes()
    (tmp_path / "in/cut.mp4").write_bytes(data[: int(0.7 * len(data))])
    damage(encode(tmp_path / "in/damaged.mkv", numbered_squares(40), options={"g": "10"}), 0.4, 0.5)
    flags = ("--source", tmp_path / "in", "--out", tmp_path / "out", *ALL_TRAIN, "--fps", 25)
    flags = (*flags, "--split_by", "time")
    done = launch(*flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    shards = Shards(tmp_path / "out/train")
    rows = {line.split("  ")[1].strip(): line for line in done.stdout.splitlines() if "  " in line}
    got, at = levels(shards), 0
    for entry in manifest["sources"]:
        name, clips = entry["name"], entry["clips"]["train"]
        row = rows[name]
        assert row.split("  ")[1] == name and f" {clips} " in row
        if name in ("cut.mp4", "damaged.mkv"):
            assert ("cut short" in row or "Invalid data" in row or "damage" in row) and clips
        else:
            wanted, words = everything.pop(name)
            if name in ("12:30.mp4", "copy.mp4"):
                words = (*words, "--fps 25 is above its rate of 24")
            assert close(got[at : at + clips], wanted), name
            assert all(word in row for word in words), row
            assert words or row.rstrip() == row and row.split()[-1].isdigit(), row
            if entry["skipped"] is None and name != "slow.mp4" and ":" not in name:
                assert name == "copy.mp4" or (shards.rates[at : at + clips] == 25).all(), name
        at += clips
    assert at == len(shards) and not everything
    assert shards.fps == 24 and 5 in shards.rates
    assert launch(*flags[:3], tmp_path / "again", *flags[4:], "--allow_skips").returncode == 0


# ------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("fps", [None, 10])
@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, -1, -1, 0)])
def test_no_more_than_a_few_frames_are_in_memory(tmp_path, fps, matrix):
    path = turned(encode(tmp_path / "a.mp4", corners(80)), matrix)
    film = Film(path, "a.mp4")
    probe(film)
    gc.collect()
    gc.disable()
    try:
        most = 0
        for _ in read(film, fps):
            most = max(most, sum(type(item) is av.VideoFrame for item in gc.get_objects()))
    finally:
        gc.enable()
    assert film.decoded == 80 and 1 <= most <= 8
