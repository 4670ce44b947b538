"""Index arithmetic of prepare/splits.py and prepare/decode.py at its edges."""

import pytest

from prepare import decode, splits
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
    assert splits.shares(count, fractions) == sizes


def test_split_sources_is_seeded_and_about_as_asked():
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
        ([k / 15 for k in range(5)], 60, list(range(5))),
        ([5 + k / 25 for k in range(10)], 10, [0, 3, 5, 8]),
        ([0.0, 0.1, 0.11, 0.12, 0.52, 0.6], 10, [0, 1, 3, 4, 5]),
        ([0.0, 0.9, 1.05, 1.9, 2.2], 1, [0, 2, 3]),
        ([0.7], 10, [0]),
        ([], 10, []),
    ],
)
def test_at_ticks(times, fps, kept):
    assert list(decode.at_ticks(((seconds, k) for k, seconds in enumerate(times)), fps)) == kept
