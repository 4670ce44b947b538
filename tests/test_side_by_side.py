"""scripts/side_by_side.py: samples of several results folders of the same clips."""

import json
import re

import numpy as np
import pytest

from report import comparison, videos
from scripts import side_by_side


@pytest.fixture
def folders(tmp_path):
    """Three results folders of the same 2 clips: 3 given and 2 forecast frames."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (2, 5, 16, 16, 3), np.uint8)
    found = []
    for evaluations in (5, 2, 1):
        dir = tmp_path / f"run_{evaluations}"
        dir.mkdir()
        np.save(dir / "truth.npy", truth)
        np.save(dir / "samples.npy", rng.integers(0, 255, (2, 3, 2, 16, 16, 3), np.uint8))
        summary = {"crps": {"mean": 0.1 / evaluations, "se": 0.01}}
        protocol = {"fps": 5.0, "network_evaluations_per_frame": float(evaluations)}
        result = {"protocol": protocol, "config": {}, "summary": summary, "horizon": {}}
        (dir / "metrics.json").write_text(json.dumps(result))
        found.append(dir)
    return found


def test_the_page_names_the_evaluations_and_shows_the_first_samples(folders, command, tmp_path):
    out = tmp_path / "few.html"
    code, err = command(tmp_path, "scripts/side_by_side.py", "--results", *folders, "--out", out)
    assert code == 0, err
    text = out.read_text()
    names = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert names == ["truth", "5 evaluations", "2 evaluations", "1 evaluation"] * 2
    assert "0.020" in text and "0.050" in text and "0.100" in text
    data = json.loads(re.search(r'id="sheets">(.*?)</script>', text)[1])
    assert (data["given"], data["frames"], len(data["sheets"])) == (3, 5, 2)


def test_a_video_has_a_column_per_folder(folders, command, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(videos, "write_video", lambda path, frames, fps: seen.append((frames, fps)))
    flags = ["--labels", "a", "b", "c", "--out", tmp_path / "few.gif"]
    code, err = command(tmp_path, "scripts/side_by_side.py", "--results", *folders, *flags)
    assert code == 0, err
    truth = np.load(folders[0] / "truth.npy")
    order = videos.rank_by_motion(truth, 3)
    columns = []
    for name, dir in zip("abc", folders):
        columns.append((name, np.load(dir / "samples.npy")[order, 0]))
    frames, fps = seen[0]
    assert np.array_equal(frames, comparison.draw_mosaic(truth[order], columns)) and fps == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "few.txt"], "use one of the endings .html"),
        (["--out", "none/few.gif"], "there is no folder none"),
        (["--out", "few.gif", "--labels", "a"], "--labels names 1 folders, --results 3"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(folders, command, tmp_path, flags, message):
    code, err = command(tmp_path, "scripts/side_by_side.py", "--results", *folders, *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_folders_of_other_clips_are_refused(folders, command, tmp_path):
    np.save(folders[1] / "truth.npy", np.zeros((2, 5, 16, 16, 3), np.uint8))
    flags = ["--results", *folders, "--out", "few.gif"]
    code, err = command(tmp_path, "scripts/side_by_side.py", *flags)
    assert code == 2 and "run_2 holds other clips than" in err


def test_fields_are_drawn_in_the_same_colours(folders, command, tmp_path):
    truth = np.random.default_rng(1).standard_normal((2, 5, 2, 16, 24)).astype(np.float32)
    samples = np.repeat(truth[:, None, 3:], 3, 1)
    for dir in folders:
        np.save(dir / "truth.npy", truth)
        np.save(dir / "samples.npy", samples)
    drawn, found, _ = side_by_side.read(folders)
    assert (drawn.dtype, drawn.ndim, drawn.shape[-1]) == (np.uint8, 5, 3)
    # The samples are the truth, in its colours.
    assert len(found) == 3 and all((one == drawn[:, 3:]).all() for one in found)
    out = tmp_path / "few.html"
    code, err = command(tmp_path, "scripts/side_by_side.py", "--results", *folders, "--out", out)
    assert code == 0, err
