"""Index arithmetic of prepare/splits.py, decode.py and timing.py at its edges."""

import pytest

from prepare import decode, splits, timing
from prepare.build import SPLITS

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


@pytest.mark.parametrize(
    "count, fractions, sizes",
    [
        (10, (0.8, 0.1, 0.1), [8, 1, 1]),
        (795, (0.8, 0.1, 0.1), [636, 80, 79]),
        (3, (0.8, 0.1, 0.1), [1, 1, 1]),
        (2, (0.8, 0.1, 0.1), [2, 0, 0]),
        (0, (0.8, 0.1, 0.1), [0, 0, 0]),
        (7, (1.0, 0.0, 0.0), [7, 0, 0]),
        (20, (0.5, 0.49, 0.01), [9, 10, 1]),
        (4, (0.02, 0.9, 0.08), [1, 2, 1]),
    ],
)
def test_shares(count, fractions, sizes):
    assert splits.divide(count, fractions) == sizes


def test_split_sources_is_seeded_and_near_the_fractions():
    first = splits.split_sources(50, FRACTIONS, seed=3)
    assert (
        first
        == splits.split_sources(50, FRACTIONS, seed=3)
        != splits.split_sources(50, FRACTIONS, seed=4)
    )
    assert [first.count(split) for split in SPLITS] == [40, 5, 5]


def test_time_cuts_cover_without_overlap():
    for frames in (0, 1, 5, 24, 100, 795):
        cuts = splits.time_cuts(frames, FRACTIONS)
        assert [k for start, stop in cuts.values() for k in range(start, stop)] == list(
            range(frames)
        )
        assert list(cuts) == list(SPLITS)
    cuts = splits.time_cuts(100, FRACTIONS)
    assert [splits.split_at(k, cuts) for k in (0, 79, 80, 89, 90, 99, 100)] == [
        "train",
        "train",
        "val",
        "val",
        "test",
        "test",
        "test",
    ]


@pytest.mark.parametrize(
    "width, height, tile, boxes",
    [
        (320, 180, None, [(70, 0, 250, 180)]),
        (101, 200, None, [(0, 49, 101, 150)]),
        (64, 64, 64, [(0, 0, 64, 64)]),
        (150, 70, 64, [(11, 3, 75, 67), (75, 3, 139, 67)]),
        (63, 200, 64, []),
    ],
)
def test_crop_boxes(width, height, tile, boxes):
    assert decode.crop_boxes(width, height, tile) == boxes


@pytest.mark.parametrize(
    "times, fps, kept",
    [
        ([k / 30 for k in range(60)], 10, list(range(0, 60, 3))),
        ([k / 30 for k in range(7)], 30, list(range(7))),
        ([0, 1, 2], 3, [0, 0, 1, 1, 1, 2, 2, 2]),
        ([0, 1, 2], 2, [0, 1, 1, 2, 2]),
        ([5 + k / 25 for k in range(10)], 10, [0, 3, 5, 8]),
        ([0.0, 0.1, 0.11, 0.12, 0.52, 0.6], 10, [0, 1, 3, 3, 4, 4, 5]),
        ([0.0, 0.9, 1.05, 1.9, 2.2], 1, [0, 2, 3]),
        ([0.7], 10, [0]),
        ([], 10, []),
    ],
)
def test_at_ticks(times, fps, kept):
    frames = ((seconds, k) for k, seconds in enumerate(times))
    assert list(timing.at_ticks(frames, fps)) == kept


def test_the_last_frame_lasts_no_longer_than_a_step():
    frames = [(0.0, 0), (0.1, 1), (0.5, 2)]
    assert list(timing.at_ticks(frames, 10, step=0.1)) == [0, 1, 1, 2, 2, 2]
    assert list(timing.at_ticks(frames, 10)) == [0, 1, 1, 2, 2, 2, 2]


def test_sources_of_equal_content_get_one_split(tmp_path):
    fractions = {"train": 0.5, "val": 0.25, "test": 0.25}
    digests = [str(k % 8) for k in range(24)]
    chosen = splits.split_sources(24, fractions, 0, digests)
    assert chosen[:8] == chosen[8:16] == chosen[16:]
    # Without copies the choice is the same as before there were digests.
    assert chosen[:8] == splits.split_sources(8, fractions, 0)
    assert sorted(chosen[:8]) == ["test"] * 2 + ["train"] * 4 + ["val"] * 2
    for name, content in (("a", b"12"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    one, two = splits.digest([tmp_path / "a"]), splits.digest([tmp_path / "b", tmp_path / "c"])
    assert one == two != splits.digest([tmp_path / "c", tmp_path / "b"])
