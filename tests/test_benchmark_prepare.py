"""benchmarks/prepare.py at its smallest: it compares what both ways store, and writes its table."""

import json

import numpy as np
import pytest

from benchmarks import prepare
from shards import Shards


def test_tiny(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        [
            "x",
            "--videos",
            "3",
            "--png_frames",
            "5",
            "--avi_frames",
            "7",
            "--repeats",
            "1",
            "--workers",
            "1",
            "--out",
            str(tmp_path),
        ],
    )
    prepare.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["frames"] for row in line["rows"]] == [15, 21] and all(
        row["ratio"] > 0 for row in line["rows"]
    )
    table = (tmp_path / "RESULTS.md").read_text()
    assert "## Preparing data" in table and "| AVIs, prepare.kth | 21 |" in table


def test_frames_that_differ_are_found(tmp_path):
    prepare.write_tree(tmp_path / "raw", 10, 4)
    prepare.plain_tree(tmp_path / "raw", tmp_path / "a")
    prepare.plain_tree(tmp_path / "raw", tmp_path / "b")
    assert (
        prepare.check_same(tmp_path / "a", tmp_path / "b") == 40
        and len(Shards(tmp_path / "a/test")) == 1
    )
    (tmp_path / "raw/train/0003/00002.png").write_bytes(
        (tmp_path / "raw/train/0003/00000.png").read_bytes()
    )
    prepare.plain_tree(tmp_path / "raw", tmp_path / "c")
    with pytest.raises(AssertionError, match="frames of video 3 differ"):
        prepare.check_same(tmp_path / "a", tmp_path / "c")


def test_clips_differ():
    source = np.arange(6)[:, None, None] * np.ones((1, 1, 2), int) + [0, 100]
    clips = [prepare.clip(source, k, 12)[:, 0, 0].tolist() for k in range(3)]
    assert (
        clips[0] == [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 1]
        and clips[1][0] == 103
        and clips[2] != clips[0]
    )
