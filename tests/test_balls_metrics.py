"""Balls found in drawn frames, against the positions and colours that were drawn."""

import numpy as np
import pytest

from evaluation import balls
from prepare.balls import BOX, GREEN, RED, YELLOW, World, draw


@pytest.mark.parametrize("size, blue", [(32, 0.0), (32, 1.0), (64, 0.4)])
def test_places_and_colours_of_drawn_balls(size, blue):
    positions, _, colors = World(np.random.default_rng(0)).simulate(400)
    frames = draw(positions, colors, np.full(400, blue, np.float32), size)
    places, seen = balls.follow(
        *(x[None] for x in balls.find(frames)), start=positions[:1] * size / BOX
    )
    assert np.linalg.norm(places[0] - positions * size / BOX, axis=-1).max() < 0.01 * size
    assert (seen[0] == colors).all()
    assert (
        balls.count_transitions(seen)[0] == balls.count_transitions(colors[None].astype(int))[0]
    ).all()


def test_a_lost_ball_and_a_smeared_one_have_no_colour():
    positions, colors = np.array([[[2.5, 2.5], [7.5, 7.5]]], np.float32), np.array([[RED, GREEN]])
    frame = draw(positions, colors, np.zeros(1, np.float32))
    half = frame.copy()
    half[:, 16:, 16:] = 0
    assert sorted(balls.find(half)[1][0]) == [balls.LOST, RED]
    faded = frame.copy()
    faded[:, 16:, 16:] = faded[:, 16:, 16:] // 3
    assert sorted(balls.find(faded)[1][0]) == [balls.LOST, RED]
    assert (balls.find(np.zeros((2, 3, 32, 32, 3), np.uint8))[1] == balls.LOST).all()


def test_tracks_keep_the_balls_apart():
    places = np.array([[[[0, 0], [9, 9]], [[8, 9], [1, 0]], [[2, 0], [7, 9]]]], float)
    colors = np.array([[[RED, GREEN], [GREEN, RED], [YELLOW, GREEN]]])
    followed, same = balls.follow(places, colors)
    assert followed[0, :, 0].tolist() == [[0, 0], [1, 0], [2, 0]] and same[0, :, 0].tolist() == [
        RED,
        RED,
        YELLOW,
    ]
    started, _ = balls.follow(places, colors, start=places[:, 0, ::-1])
    assert started[0, :, 1].tolist() == [[0, 0], [1, 0], [2, 0]]


def test_transitions_count_changes_only():
    colors = np.array([[[RED, GREEN], [RED, balls.LOST], [YELLOW, RED], [RED, RED]]])
    counts = balls.count_transitions(colors)[0]
    assert counts.sum() == 2 and counts[RED, YELLOW] == 1 and counts[YELLOW, RED] == 1
