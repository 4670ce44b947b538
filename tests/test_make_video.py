"""scripts/make_video.py: one video from saved samples, with selected clips, samples and size."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO

from report import results, videos

av = pytest.importorskip("av")


@pytest.fixture
def saved(tmp_path):
    """A results folder: 4 clips of 5 frames, of which 3 samples forecast the last 3."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "truth.npy", rng.integers(0, 255, (4, 5, 16, 16, 3), np.uint8))
    np.save(tmp_path / "samples.npy", rng.integers(0, 255, (4, 3, 3, 16, 16, 3), np.uint8))
    return tmp_path


def written(monkeypatch, saved, command, *flags, name="a.mp4") -> tuple[np.ndarray, float]:
    """Run the command -> (frames, frames per second) that it passes to the encoder."""
    seen = []

    def write_video(path, frames, fps):
        seen.append((frames, fps))

    monkeypatch.setattr(videos, "write_video", write_video)
    arguments = ["--results", saved, "--out", name, *flags]
    code, _ = command(saved, "scripts/make_video.py", *arguments)
    assert code == 0
    return seen[0]


def test_flags_select_clips_samples_and_size(monkeypatch, saved, command):
    truth, samples = np.load(saved / "truth.npy"), np.load(saved / "samples.npy")
    frames, fps = written(
        monkeypatch, saved, command, "--videos", 3, 1, "--samples", 2, "--size", 30
    )
    assert fps == 10
    rows = [videos.side_by_side(truth[v], samples[v, :2], 32) for v in (3, 1)]
    assert (frames == np.concatenate(rows, 1)).all()
    frames, fps = written(monkeypatch, saved, command, "--liveliest", 1, "--truth", 0, "--fps", 2.5)
    first = videos.rank_by_motion(truth, 2)[0]
    expected = videos.side_by_side(truth[first], samples[first], 128, with_truth=False)
    assert (frames == expected).all()
    assert fps == 2.5
    assert frames.shape[2] == 3 * (128 + 2 * videos.GAP) + 2 * videos.GAP
    frames, _ = written(monkeypatch, saved, command, "--samples", 0)
    assert frames.shape[1:3] == (4 * (128 + 2 * videos.GAP + videos.HEADER), 128 + 2 * videos.GAP)


def test_the_rate_is_that_of_the_results(monkeypatch, saved, command):
    (saved / "metrics.json").write_text(
        json.dumps({"protocol": {"fps": 6.25}, "config": {}, "summary": {}, "horizon": {}})
    )
    assert written(monkeypatch, saved, command)[1] == 6.25


def test_a_clip_of_another_rate_keeps_its_own(monkeypatch, saved, command):
    protocol = {"fps": 25, "rates": [25, 5, 25, 12.5]}
    (saved / "metrics.json").write_text(
        json.dumps({"protocol": protocol, "config": {}, "summary": {}, "horizon": {}})
    )
    assert written(monkeypatch, saved, command, "--videos", 1)[1] == 5
    assert written(monkeypatch, saved, command, "--videos", 3)[1] == 12.5
    assert written(monkeypatch, saved, command, "--videos", 3, "--fps", 2)[1] == 2


def test_results_write_each_clip_at_its_rate(monkeypatch, saved):
    seen = {}
    monkeypatch.setattr(
        videos, "write_video", lambda path, frames, fps: seen.setdefault(path.name, fps)
    )
    truth, samples = np.load(saved / "truth.npy"), np.load(saved / "samples.npy")
    results.write_videos(saved, truth, samples, [25, 5, 25, 12.5], "mp4")
    rates = [seen[f"{k:03d}.mp4"] for k in range(4)]
    assert rates == [25, 5, 25, 12.5] and seen["forecasts.mp4"] == 25


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.gif"])
def test_every_kind_of_file_holds_every_frame(saved, command, name):
    flags = ["--fps", 5, "--videos", 2, "--samples", 1]
    assert command(saved, "scripts/make_video.py", "--results", ".", "--out", name, *flags)[0] == 0
    with av.open(str(saved / name)) as video:
        shown = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 5
    truth, samples = np.load(saved / "truth.npy"), np.load(saved / "samples.npy")
    expected = videos.side_by_side(truth[2], samples[2, :1])
    assert len(shown) == 5
    # The encoder may pad the frame; compression changes the pixels a little.
    cropped = shown[4][: expected.shape[1], : expected.shape[2]].astype(float)
    assert np.abs(cropped - expected[4]).mean() < 20


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--videos", 1, 4], "--videos 4: . holds 4 clips; take 0 to 3"),
        (["--videos", -1], "--videos -1: . holds 4 clips"),
        (["--liveliest", 5], "--liveliest 5: . holds 4 clips; take 1 to 4"),
        (["--samples", 4], "--samples 4: . holds 3 of each clip"),
        (["--samples", 0, "--truth", 0], "--samples must be at least 1, got 0"),
        (["--size", 0], "--size must be at least 1"),
        (["--size", 9000], "at most 16000 are possible; lower --size"),
        (["--fps", 0], "--fps must be greater than 0, got 0"),
        (["--fps", "nan"], "--fps must be greater than 0, got nan"),
        (["--out", "a.webm"], "ending .webm; use one of .mp4, .avi, .gif"),
        (["--out", "a"], "ending missing"),
        (["--out", "none/a.mp4"], "there is no folder none"),
        (["--results", "tests"], "tests/samples.npy: no such file; name a results folder"),
    ],
)
def test_mistakes_are_one_line_and_code_2(saved, command, flags, says):
    code, err = command(saved, "scripts/make_video.py", "--results", ".", "--out", "b.mp4", *flags)
    assert code == 2 and says in err and err.count("\n") == 1 and not (saved / "b.mp4").exists()


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("samples", b"", "samples.npy: not an array"),
        ("samples", b"no array at all", "samples.npy: not an array"),
        (
            "samples",
            np.zeros((4, 3, 3, 16, 16, 3), np.float64),
            "samples.npy: float64 (4, 3, 3, 16, 16, 3), not uint8 or float32 with 6 axes",
        ),
        # Fields beside frames.
        ("samples", np.zeros((4, 3, 3, 16, 16, 3), np.float32), "do not match"),
        ("truth", np.zeros((4, 5, 16, 16), np.uint8), "not uint8 or float32 with 5 axes"),
        ("truth", np.zeros((4, 3, 16, 16, 3), np.uint8), "do not match"),
        ("truth", np.zeros((3, 5, 16, 16, 3), np.uint8), "do not match"),
        ("truth", np.array([{"a": 1}]), "truth.npy: not an array"),
    ],
)
def test_invalid_arrays_are_reported(saved, command, name, content, says):
    file = saved / f"{name}.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    code, err = command(saved, "scripts/make_video.py", "--results", ".", "--out", "b.mp4")
    assert code == 2 and says in err and err.count("\n") == 1


def test_a_cut_off_array_and_metrics_that_are_not_json(saved, command):
    flags = ["--results", ".", "--out", "b.mp4"]
    (saved / "metrics.json").write_text("{")
    assert "metrics.json: not JSON" in command(saved, "scripts/make_video.py", *flags)[1]
    with open(saved / "samples.npy", "r+b") as file:
        file.truncate(5000)
    assert "samples.npy: not an array" in command(saved, "scripts/make_video.py", *flags)[1]


def test_help_works_from_the_root_of_the_repository():
    done = subprocess.run(
        [sys.executable, "scripts/make_video.py", "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--liveliest" in done.stdout
