"""Videos and contact sheets: sizes, edges, and files that play."""

import numpy as np
import pytest
from PIL import Image

from report import videos

av = pytest.importorskip("av")


def clip():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (2, 5, 8, 8, 3)).astype(np.uint8)
    return truth, rng.integers(0, 255, (2, 3, 3, 8, 8, 3)).astype(np.uint8)


def test_conditioning_and_forecast_frames_have_their_own_edges():
    truth, samples = clip()
    frames = videos.add_edges(truth[0], 2, 4)
    assert (frames[1, 0, 0] == videos.GIVEN).all() and (frames[2, 0, 0] == videos.FORECAST).all()
    assert (frames[:, videos.GAP : -videos.GAP : 4, videos.GAP : -videos.GAP : 4] == truth[0]).all()


def test_samples_begin_with_the_given_frames():
    truth, samples = clip()
    tracks = videos.tracks(truth[0], samples[0])
    assert [label for label, _ in tracks] == ["truth", "sample 1", "sample 2", "sample 3"]
    assert (tracks[2][1][:2] == truth[0, :2]).all() and (tracks[2][1][2:] == samples[0, 1]).all()


def test_contact_sheet_shows_each_shown_frame_in_its_place():
    truth, samples = clip()
    sheet = np.asarray(videos.contact_sheet(truth, samples))
    factor, cell = 8, 8 * 8 + 2 * videos.GAP
    assert sheet.shape[1] == 60 + 5 * cell
    top = videos.HEADER + videos.GAP
    for t in range(5):
        left = 60 + t * cell + videos.GAP
        assert (sheet[top : top + 64 : factor, left : left + 64 : factor] == truth[0, t]).all()


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_videos_play_with_every_frame(tmp_path, name):
    truth, samples = clip()
    frames = videos.draw_mosaic(truth, samples)
    videos.write_video(tmp_path / name, frames, 10)
    if name.endswith("gif"):
        with Image.open(tmp_path / name) as gif:
            assert gif.n_frames == 5 and gif.info["duration"] == 100
        return
    with av.open(str(tmp_path / name)) as video:
        shown = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert float(video.streams.video[0].average_rate) == 10
    assert len(shown) == 5
    assert (
        np.abs(shown[2][: frames.shape[1], : frames.shape[2]].astype(float) - frames[2]).mean() < 25
    )


def test_videos_are_ranked_by_the_motion_of_their_given_frames():
    truth = np.zeros((4, 6, 8, 8, 3), np.uint8)
    truth[1, 1, :2] = 255  # some motion among the given frames
    truth[3, 1] = 255  # more
    truth[2, 4:] = 255  # and some that only the forecast could know of
    assert videos.rank_by_motion(truth, 3).tolist() == [3, 1, 0, 2]
    assert videos.rank_by_motion(truth, 1).tolist() == [3, 1, 0, 2]


def delays_of(path):
    """Delays of the frames of a GIF, in milliseconds."""
    with Image.open(path) as gif:
        delays = []
        for k in range(gif.n_frames):
            gif.seek(k)
            delays.append(gif.info["duration"])
    return delays


@pytest.mark.parametrize(
    "fps, every, delays",
    [
        (5, 1, {200}),
        (10, 1, {100}),
        (12.5, 1, {80}),
        (24, 1, {40, 50}),
        (25, 1, {40}),
        (29.97, 1, {30, 40}),
        (30, 1, {30, 40}),
        (50, 1, {20}),
        (60, 2, {30, 40}),
        (120, 3, {20, 30}),
    ],
)
def test_a_gif_lasts_as_long_as_the_film(tmp_path, fps, every, delays, capsys):
    count = 60
    frames = np.zeros((count, 16, 16, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(count)[:, None, None] * 4
    videos.write_video(tmp_path / "a.gif", frames, fps)
    found = delays_of(tmp_path / "a.gif")
    assert len(found) == count // every
    assert set(found) == delays
    assert abs(sum(found) - 1000 * count / fps) <= 5
    # At every time the GIF shows the frame that the film shows, up to one hundredth of a second.
    ends = np.cumsum(found)
    assert np.abs(ends - 1000 * every * np.arange(1, len(found) + 1) / fps).max() <= 5
    assert ("one frame in 2" in capsys.readouterr().out) == (fps == 60)


@pytest.mark.parametrize("count", [1, 2, 61])
def test_a_gif_whose_last_frame_is_shown_for_less_long(count):
    every, delays = videos.gif_delays(count, 60)
    assert every == 2 and len(delays) == -(-count // 2)
    assert abs(sum(delays) - 100 * count / 60) <= 1
