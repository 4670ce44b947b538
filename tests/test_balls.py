"""The bouncing balls: physics, the colour rule, drawing, and the command."""

import numpy as np
import pytest
from conftest import launch

from prepare import balls
from prepare.balls import BOX, GREEN, NEXT_COLOR, NONE, RADIUS, RED, YELLOW, World, draw
from shards import Shards


@pytest.fixture(scope="module")
def motion():
    return World(np.random.default_rng(3)).simulate(20_000)


def test_energy_is_kept_and_balls_stay_inside_and_apart(motion):
    x, v, _ = motion
    assert np.allclose((v**2).sum((1, 2)), balls.SPEED**2, rtol=1e-3)
    # A half-step may carry a ball this far past a wall or into the other before it bounces.
    overlap = 0.5 * balls.SPEED
    assert x.min() > RADIUS - overlap and x.max() < BOX - RADIUS + overlap
    assert np.linalg.norm(x[:, 0] - x[:, 1], axis=1).min() > 2 * RADIUS - 2 * overlap
    assert x.min() < RADIUS + 0.1 and x.max() > BOX - RADIUS - 0.1  # and they do reach the walls


def test_free_flight_is_straight_and_momentum_passes_between_balls(motion):
    x, v, c = motion
    free = (v[1:] == v[:-1]).all((1, 2))
    assert np.allclose((x[1:] - x[:-1])[free], v[:-1][free], atol=1e-4)
    # Far from walls: only balls can meet.
    inside = ((x > RADIUS + 1) & (x < BOX - RADIUS - 1)).all((1, 2))[:-1]
    hit = inside & ~free
    assert hit.sum() > 20
    assert np.allclose(v[1:][hit].sum(1), v[:-1][hit].sum(1), atol=1e-4)


def test_colours_change_exactly_at_bounces_and_by_the_rule(motion):
    _, v, c = motion
    for ball in range(2):
        changed = np.flatnonzero(np.diff(c[:, ball]))
        turned = np.flatnonzero((np.diff(v[:, ball], axis=0) != 0).any(1))
        assert len(changed) > 500 and set(changed) <= set(turned)
        # Two bounces within one frame may hide a change, rarely.
        assert len(changed) > 0.97 * len(turned)
        colors = [int(c[0, ball]), *c[changed + 1, ball].tolist()]
        followed = [
            NEXT_COLOR.get((a, b)) == after for a, b, after in zip(colors, colors[1:], colors[2:])
        ]
        assert np.mean(followed) > 0.95


def test_the_rule_is_the_published_one():
    world = World(np.random.default_rng(0))
    world.colors, world.previous = [YELLOW, GREEN], [NONE, NONE]
    seen = []
    for _ in range(5):
        world.change_color(0)
        seen.append(world.colors[0])
    assert seen == [RED, GREEN, RED, YELLOW, RED]
    assert NEXT_COLOR[NONE, RED] == YELLOW and NEXT_COLOR[NONE, GREEN] == RED


def test_drawing_follows_the_formula():
    x = np.array([[[2.5, 5.0], [7.0, 5.0]]], np.float32)
    frame = draw(x, np.array([[RED, GREEN]], np.int8), np.array([0.25], np.float32))[0]
    assert frame.shape == (32, 32, 3) and frame.dtype == np.uint8
    for row, column in [(16, 8), (16, 4), (12, 22), (0, 0), (15, 11), (15, 15)]:
        X, Y = (column + 0.5) * BOX / 32, (row + 0.5) * BOX / 32
        bump = [np.exp(-((((X - a) ** 2 + (Y - b) ** 2) / RADIUS**2) ** 4)) for a, b in x[0]]
        wanted = np.array([bump[0], bump[1], 0.25 * sum(bump)])
        assert np.abs(frame[row, column] / 255 - np.minimum(wanted, 1)).max() < 0.5 / 255 + 1e-6


def test_command_writes_three_streams_and_the_blue_shift(tmp_path):
    launch(
        tmp_path,
        "-m",
        "prepare.balls",
        "--out",
        "d",
        "--frames",
        "300",
        "--held_out",
        "50",
        "--color_shift",
    )
    train, test = Shards(tmp_path / "d/train"), Shards(tmp_path / "d/test")
    assert (
        train.lengths.tolist() == [300]
        and test.lengths.tolist() == [50]
        and train.shape == (32, 32, 3)
    )
    every = slice(None)
    x, c, blue = (train.read_extra(name, 0, every) for name in ("positions", "colors", "blue"))
    assert blue[0] == 0 and blue[-1] == 1 and np.allclose(np.diff(blue), 1 / 299, rtol=1e-3)
    assert (draw(x, c, blue) == train.read(0, every)).all()
    assert not np.array_equal(x[:50], test.read_extra("positions", 0, every))
    again = launch(tmp_path, "-m", "prepare.balls", "--out", "d", check=False)
    assert (
        again.returncode == 2 and again.stderr.count("\n") == 1 and "already exists" in again.stderr
    )


def test_a_seed_gives_the_same_stream_in_any_pieces():
    whole = World(np.random.default_rng(5)).simulate(100)
    world = World(np.random.default_rng(5))
    first, second = world.simulate(40), world.simulate(60)
    for a, b, c in zip(whole, first, second):
        assert (a == np.concatenate([b, c])).all()
