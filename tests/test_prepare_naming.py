"""Order, kinds and missing numbers of images, by their names alone."""

import random

import pytest

from prepare.container import Broken
from prepare.naming import group_by_kind, kind_of, put_in_order, select_kind

ROLLED = [f"DSC_{n:04d}.JPG" for n in (9997, 9998, 9999)]


@pytest.mark.parametrize(
    "names",
    [
        ["8.png", "9.png", "10.png"],
        ["008.png", "9.png", "10.png"],
        ["a_5_2.png", "a_10_2.png", "a_15_2.png"],
        ["0.png", "0.25.png", "0.5.png", "0.75.png", "1.png"],
        ["0.png", "0.0333333.png", "0.0666667.png", "0.1.png", "0.133333.png"],
        ["frame_0.033.png", "frame_0.067.png", "frame_0.100.png"],
        ["v1.8.png", "v1.9.png", "v1.10.png", "v1.11.png"],
        ["frame.0009.png", "frame.0010.png", "frame.0011.png"],
        ["1.2.9.png", "1.2.10.png"],
        ["20240131_235959.png", "20240201_000000.png", "20240201_000001.png"],
        ["2024-01-31 23.59.59.9.png", "2024-02-01 00.00.00.0.png"],
        ["0001_1000.png", "0002_1041.png", "0003_1079.png"],
        ["video_03_frame_1.png", "video_03_frame_2.png"],
        ["1700000000033.png", "1700000000067.png", "1700000000100.png"],
        [*ROLLED, "DSC_0001.JPG", "DSC_0002.JPG"],
        [*ROLLED, "DSC_0000.JPG", "DSC_0001.JPG"],
        ["x.png"],
    ],
)
def test_order(names):
    shuffled = random.Random(0).sample(names, len(names))
    ordered = put_in_order(shuffled)
    assert ordered.names == names
    assert ordered.breaks == ()


@pytest.mark.parametrize(
    "names, message",
    [
        (["1.png", "01.png"], "same number"),
        (["1.png", "2.png", "02.png", "3.png"], "same number"),
        (["cam1_1.png", "cam1_2.png", "cam2_1.png", "cam2_2.png"], "several numbers change"),
        (["1h59.png", "2h00.png", "2h01.png", "3h00.png"], "several numbers change"),
    ],
)
def test_names_without_a_clear_order_are_refused(names, message):
    with pytest.raises(Broken, match=message):
        put_in_order(names)


@pytest.mark.parametrize(
    "numbers, breaks",
    [
        ([0, 1, 2, 23, 24, 25], (3,)),
        ([0, 1, 2, 3, 4, 6, 7, 8, 9, 10], (5,)),
        ([0, 5, 10, 15, 20, 25, 35, 40, 45, 50], (6,)),
        (range(0, 100, 5), ()),
        # Times in milliseconds at 30 frames per second, and a pause.
        ([0, 33, 67, 100, 133, 167, 200], ()),
        ([0, 33, 67, 100, 133, 300, 333, 367], (5,)),
        ([0, 33, 67, 133, 167], (3,)),
        # Times at a variable rate: a hole is a step over three times the median.
        ([0, 20, 70, 110, 150, 215, 245, 280], ()),
        ([0, 20, 70, 110, 150, 315, 345, 380], (5,)),
        # One number missing after another.
        ([0, 1, 2, 3, 5, 8, 9, 10, 11], (4, 5)),
        ([3, 4], ()),
    ],
)
def test_breaks_are_at_missing_numbers(numbers, breaks):
    ordered = put_in_order([f"f{n}.png" for n in numbers])
    assert ordered.breaks == breaks
    assert bool(ordered.notes) == bool(breaks)


def test_a_hole_after_a_roll_over_is_found():
    names = [*ROLLED, "DSC_0001.JPG", "DSC_0002.JPG", "DSC_0003.JPG", "DSC_0006.JPG"]
    ordered = put_in_order(names)
    assert ordered.names == names and ordered.breaks == (6,)
    assert "rolls over" in ordered.notes[0] and "DSC_0003.JPG and DSC_0006.JPG" in ordered.notes[1]


def test_a_counter_that_reaches_its_end_without_a_gap_does_not_roll_over():
    names = [f"{n:02d}.png" for n in range(100)]
    assert put_in_order(names) == (names, (), ())


def test_kinds():
    assert kind_of("IMG_0007.PNG") == kind_of("img_12.png") == "img_#.png"
    assert kind_of("0.25.png") == kind_of("1.png") == "#.png"
    assert kind_of("a1.jpeg") == kind_of("a2.JPG")
    names = ["img_1.png", "img_2.png", "flow_x_1.png", "flow_x_2.png", "flow_y_1.png", "bg.png"]
    assert list(group_by_kind(names)) == ["bg.png", "flow_x_#.png", "flow_y_#.png", "img_#.png"]


def test_only_one_kind_may_have_several_images():
    assert select_kind(["1.png", "2.png", "mask.png"]) == (
        ["1.png", "2.png"],
        "mask.png: not of the kind #.png; left out",
    )
    assert select_kind(["still.png"]) == (["still.png"], None)
    with pytest.raises(Broken, match="2 kinds of images"):
        select_kind(["a1.png", "a2.png", "b1.png", "b2.png"])
    with pytest.raises(Broken, match=r"a\.png and b\.png do not determine an order"):
        select_kind(["b.png", "a.png"])
