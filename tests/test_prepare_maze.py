"""The maze: geometry against closed forms, the walker, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import launch

import data
import shards
from prepare import maze, raycast
from prepare.maze import (
    CELLS,
    LEFT,
    RIGHT,
    SPEED,
    carve,
    divide_walk,
    follow_wall,
    poses_along,
    walk,
)
from prepare.raycast import (
    BALL,
    BRICK,
    DX,
    DY,
    EAST,
    EYE,
    HALF_VIEW,
    NORTH,
    SMILEY,
    WEST,
    Scene,
    across,
    cast,
    rays,
    render,
)
from runtime.process import Process
from shards import Shards

SIZE = 64


def corridor(length: int, sprites=()) -> Scene:
    """One straight corridor along x, one cell wide."""
    open = np.zeros((4, length, length), bool)
    open[EAST, :-1, 0] = open[WEST, 1:, 0] = True
    return Scene(
        open, np.full(open.shape, BRICK, np.uint8), np.array(sprites, np.float32).reshape(-1, 5)
    )


def looking(
    scene: Scene, x: float, y: float, heading: float, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Distance and wall of each column's ray."""
    rx, ry = rays(np.array([heading], np.float32), size)
    start = [np.full(size, value, np.float32) for value in (x, y)]
    return cast(scene.open, *start, rx[0], ry[0])


# ----------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize("x", [0.5, 1.25, 4.75])
def test_every_column_that_meets_a_wall_ahead_has_its_perpendicular_distance(x):
    distance, wall = looking(corridor(6), x, 0.5, 0.0)
    facing, ahead = wall // 36, 6 - x
    tangent = abs(across(SIZE))
    assert (facing[tangent < 0.5 / ahead] == EAST).all() and np.allclose(
        distance[facing == EAST], ahead, atol=1e-5
    )
    side = tangent > 0.5 / ahead  # the corridor's sides: half a cell to the right or left
    assert (facing[side] % 2 == 1).all() and np.allclose(
        distance[side], 0.5 / tangent[side], rtol=1e-5
    )
    # North is on the left for a viewer that looks east.
    assert (facing[: SIZE // 2][side[: SIZE // 2]] == NORTH).all()


def test_rays_end_on_walls_and_cross_none():
    rng = np.random.default_rng(0)
    open = carve(8, rng)
    x, y, angle = rng.uniform(0, 8, 500), rng.uniform(0, 8, 500), rng.uniform(-np.pi, np.pi, 500)
    rx, ry = np.cos(angle), np.sin(angle)
    distance, wall = cast(open, x, y, rx, ry)
    facing, cell_x, cell_y = np.unravel_index(wall, open.shape)
    end_x, end_y = x + distance * rx, y + distance * ry
    edge = np.where(
        facing % 2 == 0, end_x - (cell_x + (facing == EAST)), end_y - (cell_y + (facing == NORTH))
    )
    assert abs(edge).max() < 1e-5 and not open.reshape(-1)[wall].any()
    # Small steps along each ray: every crossed edge must be open.
    way = np.linspace(0, 1 - 1e-6, 3000)[:, None] * distance
    cells = np.floor(np.stack([x + way * rx, y + way * ry])).astype(int)
    step = np.diff(cells, axis=1)
    for d in range(4):
        crossed = (step[0] == DX[d]) & (step[1] == DY[d])
        assert crossed.any() and open[d][tuple(cells[:, :-1][:, crossed])].all()


@pytest.mark.parametrize("ahead", [1.0, 1.7, 3.2])
def test_a_walls_height_on_the_screen_is_its_height_over_its_distance(ahead):
    frame = render(
        corridor(6), np.array([[6 - ahead, 0.5, 0]], np.float32), np.ones(1, np.float32), 128
    )[0].astype(int)
    middle = frame[:, 56:72].mean(1)
    red = np.flatnonzero(middle[:, 0] > 1.6 * middle[:, 1])  # bricks; floor and ceiling are not
    height = red[-1] - red[0] + 1
    # The tolerance includes one course of mortar.
    assert abs(height - 128 * 0.5 / HALF_VIEW / ahead) <= 4 + 128 / ahead / 64
    assert abs((red[0] + red[-1]) / 2 - 63.5) <= 4


def test_distant_walls_are_darker():
    frames = render(
        corridor(9),
        np.array([[9 - d, 0.5, 0] for d in (1, 3, 6)], np.float32),
        np.ones(3, np.float32),
    )
    near, far, farther = frames[:, 30:34, 31:33].mean((1, 2, 3))
    assert near > 1.2 * far > 1.3 * farther


def test_the_floor_stays_still_while_the_walker_moves():
    x = np.array([1.0, 1.5], np.float32)
    frames = render(corridor(9), np.stack([x, 0 * x + 0.5, 0 * x], 1), np.ones(2, np.float32), 256)

    def row_at(d):
        """The row in which the floor is d ahead."""
        return int((EYE / d / HALF_VIEW + 1) / 2 * 256)

    for place in (2.72, 2.97, 3.22):  # in the middles of slabs: their tone says which
        slabs = [frame[row_at(place - at), 126:130].mean() for frame, at in zip(frames, x)]
        assert abs(slabs[0] - slabs[1]) < 25
    tones = [frames[0, row_at(place - 1), 140].mean() for place in (2.75, 3.25)]
    assert abs(tones[0] - tones[1]) > 25


def test_billboards_are_seen_where_they_stand_and_hidden_behind_walls():
    at = (4.5, 0.7, EYE, 0.2, SMILEY)
    pose, light = np.array([[2.5, 0.5, 0]], np.float32), np.ones(1, np.float32)
    changed = (render(corridor(6, [at]), pose, light) != render(corridor(6), pose, light)).any(-1)[
        0
    ]
    rows, columns = np.nonzero(changed)
    wide = 0.2 / 2 / HALF_VIEW * SIZE / 2
    assert (
        abs(columns.mean() + 0.5 - (1 - 0.2 / 2 / HALF_VIEW) * SIZE / 2) < 1
        and abs(rows.mean() + 0.5 - SIZE / 2) < 1
    )
    assert abs(np.ptp(rows) + 1 - wide) < 2 and abs(np.ptp(columns) + 1 - wide) < 2
    # One sprite behind a wall, one behind the walker.
    behind = corridor(6, [(4.5, 1.5, EYE, 0.9, SMILEY), (1.0, 0.5, EYE, 0.5, BALL)])
    assert (render(behind, pose, light) == render(corridor(6), pose, light)).all()


def test_the_nearer_of_two_billboards_hides_the_farther():
    pose, light = np.array([[0.5, 0.5, 0]], np.float32), np.ones(1, np.float32)
    near, far = (2.0, 0.5, EYE, 0.5, SMILEY), (3.0, 0.5, EYE, 0.3, BALL)
    alone = render(corridor(6, [near]), pose, light)
    for order in ([near, far], [far, near]):
        both = render(corridor(6, order), pose, light)
        assert (both == alone).all()


def test_a_frame_does_not_depend_on_the_rest_of_the_batch():
    scene, poses, light = walk(np.random.default_rng(3))
    poses, light = poses[:50], light[:50]
    whole = render(scene, poses, light)
    assert (
        np.concatenate([render(scene, poses[k : k + 7], light[k : k + 7]) for k in range(0, 50, 7)])
        == whole
    ).all()
    assert whole[0].max() < 45 < whole[20].mean()  # the lights go on


# ------------------------------------------------------------------------------------------- walker
@pytest.mark.parametrize("seed", range(5))
def test_a_maze_has_one_way_between_any_two_cells(seed):
    open = carve(9, np.random.default_rng(seed))
    assert open.sum() == 2 * (81 - 1)  # a tree: one edge less than cells, each seen from two sides
    for d in range(4):
        for x, y in np.argwhere(open[d]):
            assert open[(d + 2) % 4, x + DX[d], y + DY[d]]
    reached, rest = {(0, 0)}, [(0, 0)]
    while rest:
        x, y = rest.pop()
        new = {(x + DX[d], y + DY[d]) for d in range(4) if open[d, x, y]} - reached
        reached |= new
        rest += new
    assert len(reached) == 81


@pytest.mark.parametrize("hand", [LEFT, RIGHT])
def test_the_hand_never_leaves_the_wall(hand):
    open = carve(9, np.random.default_rng(1))
    start = tuple(np.argwhere(open.sum(0) == 1)[0].tolist())
    steps = follow_wall(open, start, int(open[:, start[0], start[1]].argmax()), hand)
    assert {start, *(cell for cell, _, _ in steps)} == {(x, y) for x in range(9) for y in range(9)}
    for (cell, entered, leaving), (after, entered_after, _) in zip(steps, steps[1:]):
        assert after == (cell[0] + DX[leaving], cell[1] + DY[leaving]) and entered_after == leaving
        for nearer in [(entered + k * hand) % 4 for k in (1, 0, -1, 2)]:  # towards the wall first
            if nearer == leaving:
                break
            assert not open[nearer][cell]


@pytest.mark.parametrize("seed", range(4))
def test_poses_keep_off_walls_and_are_smooth(seed):
    scene, poses, light = walk(np.random.default_rng(seed))
    x, y, heading = poses.astype(float).T
    # All cells but the last, because the light is out before that cell.
    assert len(np.unique(np.floor(poses[:, :2]), axis=0)) == CELLS**2 - 1
    moved = np.hypot(np.diff(x), np.diff(y))
    turned = abs(np.diff(heading))
    assert moved.max() < SPEED + 1e-5 and np.median(moved) > 0.95 * SPEED
    # The turning rate changes most where one arc follows another.
    assert (
        turned.max() < 1.001 * np.pi**2 / 2 / maze.SPIN
        and abs(np.diff(heading, 2)).max() < 4.01 * SPEED
    )
    walking = moved > 0.9 * SPEED
    # The walker moves in the direction of the heading.
    way = np.arctan2(np.diff(y), np.diff(x)) - (heading[1:] + heading[:-1]) / 2
    assert abs(np.angle(np.exp(1j * way[walking]))).max() < 0.1
    rx, ry = rays(poses[::5, 2], 8)
    aside = np.linspace(-np.pi, np.pi, 16, endpoint=False)
    for angle in aside:
        distance, _ = cast(
            scene.open,
            x[::5],
            y[::5],
            np.full(len(x[::5]), np.cos(angle)),
            np.full(len(x[::5]), np.sin(angle)),
        )
        assert distance.min() > 0.3
    assert light[0] == light[-1] == 1 / maze.FADE and (light[maze.FADE : -maze.FADE] == 1).all()


def test_quarter_circles_and_turns_about_in_closed_form():
    steps = [((1, 0), EAST, NORTH), ((1, 1), NORTH, (NORTH + 2) % 4), ((1, 0), 3, 2)]
    rows = divide_walk((0, 0), steps)
    assert np.allclose(
        rows[:, 5], [0.5 / SPEED, np.pi / 4 / SPEED, 0.5 / SPEED, maze.SPIN, 0.5 / SPEED]
    )
    poses = poses_along(rows).astype(float)
    arc = poses[int(0.5 / SPEED) + 1 : int((0.5 + np.pi / 4) / SPEED)]
    # The arc is centred on the corner at (1, 1).
    assert np.allclose(np.hypot(arc[:, 0] - 1, arc[:, 1] - 1), 0.5, atol=1e-5)
    assert np.allclose(arc[:, 2], np.arctan2(arc[:, 1] - 1, arc[:, 0] - 1) + np.pi / 2, atol=1e-4)
    assert np.allclose(poses[-1], [1.5, 1.0, 1.5 * np.pi], atol=2 * SPEED)


# ------------------------------------------------------------------------------------------ command
def test_the_command_writes_three_streams_the_same_twice(tmp_path):
    flags = ["--frames", "500", "--held_out", "70", "--cells", "3", "--image_size", "32"]
    printed = launch(tmp_path, "-m", "prepare.maze", "--out", "a", *flags).stdout
    launch(tmp_path, "-m", "prepare.maze", "--out", "b", *flags)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["splits"]["train"]["frames"] == 500 and manifest["splits"]["test"]["seed"] == [
        0,
        2,
    ]
    assert (
        manifest["command"].startswith("python -m prepare.maze --out a")
        and "numpy" in manifest["versions"]
    )
    mazes = manifest["splits"]["train"]["mazes"]
    assert mazes > 1 and f"500 frames in {mazes} mazes" in printed
    every = slice(None)
    for split, count in (("train", 500), ("val", 70), ("test", 70)):
        made, again = Shards(tmp_path / "a" / split), Shards(tmp_path / "b" / split)
        assert made.lengths.tolist() == [count] and made.shape == (32, 32, 3) and made.fps == 20
        assert made.fingerprint() == again.fingerprint()
        assert (made.read(0, every) == again.read(0, every)).all()
    train = Shards(tmp_path / "a/train")
    number = train.read_extra("maze", 0, every)
    assert number[0] == 0 and number[-1] == mazes - 1 and (np.diff(number) >= 0).all()
    # The splits have different mazes.
    assert not np.array_equal(train.read(0, np.arange(70)), made.read(0, every))
    last = np.flatnonzero(number == number[-1])
    poses, light = (train.read_extra(name, 0, last) for name in ("poses", "light"))
    # A maze is a function of its number only.
    scene = walk(np.random.default_rng([0, 0, int(number[-1])]), 3).scene
    assert (render(scene, poses, light, 32) == train.read(0, last)).all()


def test_mistakes_are_reported_in_one_line(command, tmp_path):
    (tmp_path / "there").mkdir()
    for flags, message in (
        (["--out", "there"], "already exists"),
        (["--out", "d", "--frames", "0"], "--frames must be"),
        (["--out", "d", "--cells", "2"], "--cells must be"),
    ):
        code, said = command(tmp_path, "prepare/maze", *flags)
        assert code == 2 and message in said and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_full_disk_leaves_nothing(command, tmp_path, monkeypatch):
    left = iter([10**9, 10**9, 10**6])
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(left)))
    monkeypatch.setenv("DRIFTCAST_QUIET", "1")
    (tmp_path / "d.partial").mkdir()  # of a command that was killed
    (tmp_path / "d.partial/old").touch()
    code, said = command(tmp_path, "prepare/maze", "--out", "d", "--frames", "999")
    assert (
        code == 1
        and "No space left" in said
        and len(said.splitlines()) == 1
        and not list(tmp_path.iterdir())
    )


def test_tables_hold_every_texture_at_every_distance():
    surfaces, sprites = raycast.tables(SIZE)
    page = raycast.LEVELS * raycast.TEXELS**2
    assert len(surfaces) == 8 * page and len(sprites) == 3 * page and surfaces.max() < 1 << 28
    levels = raycast.level_of(np.array([0, raycast.NEAR, raycast.FAR, 99]))
    assert levels.tolist() == [0, 0, raycast.LEVELS - 1, raycast.LEVELS - 1]


def test_the_dataset_wmaze_generates_its_stream_and_recognises_it(tmp_path):
    import torch

    import configs
    from runtime.console import UserError

    wanted = {"data.root": str(tmp_path / "d"), "data.stream": 60, "data.held_out": 30}
    alone = Process(0, 1, torch.device("cpu"))
    data.ensure_data(configs.build("wmaze", wanted), alone)
    made = Shards(tmp_path / "d/train")
    assert made.lengths.tolist() == [60] and made.shape == (64, 64, 3)
    data.ensure_data(configs.build("wmaze", wanted), alone)
    for changed in ({"data.stream": 61}, {"data.generate": "balls"}):
        with pytest.raises(
            UserError, match="holds 60 frames .walk through mazes., but data.stream, .* require 6"
        ):
            data.ensure_data(configs.build("wmaze", {**wanted, **changed}), alone)
