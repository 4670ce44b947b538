"""prepare/clevrer_like.py: collisions, rendering, and reproducibility of the command."""

import json

import numpy as np
import pytest

pytest.importorskip("pybullet")

from prepare import build, clevrer_like, tabletop  # noqa: E402
from prepare.clevrer_like import MAX_OBJECTS, plan_collision  # noqa: E402
from prepare.tabletop import COLORS, MATERIALS, RADIUS, SHAPES, Scene, Table  # noqa: E402
from shards import Shards  # noqa: E402

FRAMES, SIZE = 64, 64


def parse(out, *flags, workers=1):
    return clevrer_like.parse(
        [
            "--out",
            str(out),
            "--frames",
            str(FRAMES),
            "--image_size",
            str(SIZE),
            "--videos",
            "10",
            "--held_out",
            "1",
            "--workers",
            str(workers),
            *map(str, flags),
        ]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "clevrer_like"
    return out, clevrer_like.make(parse(out, workers=2))


def extras(shards, video):
    names = ("positions", "orientations", "contacts", "present", "shapes", "colours", "materials")
    return {name: shards.read_extra(name, video, slice(None)) for name in names}


def pixels_of(points):
    """(..., 3) metres -> column and row in a picture of SIZE."""
    table = Table.of(SIZE)
    matrix = tabletop.matrix(table.projection) @ tabletop.matrix(table.view)
    ndc = tabletop.project(matrix, points)
    return (ndc[..., :2] * [1, -1] + 1) / 2 * SIZE - 0.5


def test_shards_and_manifest(made):
    out, manifest = made
    shards = Shards(out / "train")
    assert (
        shards.lengths.tolist() == [FRAMES] * 10
        and shards.shape == (SIZE, SIZE, 3)
        and shards.fps == 25
    )
    assert len(shards.paths) == 2 and manifest["splits"]["test"]["videos"] == 1
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["legend"]["shapes"] == list(SHAPES) and manifest["versions"]["pybullet"]
    assert len({entry["sha256"] for entry in manifest["sources"]}) == 12 and not manifest["shared"]
    facts = extras(shards, 3)
    assert facts["positions"].shape == (FRAMES, MAX_OBJECTS, 3) and facts["orientations"].shape == (
        FRAMES,
        MAX_OBJECTS,
        4,
    )
    assert (
        facts["contacts"].shape == (FRAMES, MAX_OBJECTS, MAX_OBJECTS)
        and not facts["positions"][facts["present"] == 0].any()
    )


def test_a_video_depends_on_seed_split_and_number_only(made, tmp_path):
    out, _ = made
    args = parse(tmp_path / "x", "--seed", 0)
    sources = (
        build.Source("train/00009", "train", "", detail=(0, 9)),
        build.Source("train/00000", "train", "", detail=(0, 0)),
    )
    # The other run has another process and another order.
    last, first = (clevrer_like.read(source, args) for source in sources)
    shards = Shards(out / "train")
    assert (first.clips[0] == shards.read(0, slice(None))).all() and (
        last.clips[0] == shards.read(9, slice(None))
    ).all()
    assert (last.extra["positions"] == shards.read_extra("positions", 9, slice(None))).all()
    args.seed = 1
    assert not (
        clevrer_like.read(sources[1], args).extra["positions"][0] == first.extra["positions"][0]
    ).all()


def test_every_video_has_a_collision_and_bodies_do_not_overlap(made):
    shards, counts = Shards(made[0] / "train"), set()
    for video in range(len(shards)):
        facts = extras(shards, video)
        n = int(facts["present"][0].sum())
        x, touch = facts["positions"][:, :n].astype(np.float64), facts["contacts"][:, :n, :n]
        counts.add(n)
        assert (
            3 <= n <= MAX_OBJECTS
            and (touch == touch.transpose(0, 2, 1)).all()
            and not facts["contacts"][:, n:].any()
        )
        apart = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1) + 9 * np.eye(n)
        assert (
            apart.min() > 2 * 0.85 * RADIUS - 0.03 and (apart[touch == 1] < 4 * 0.85 * RADIUS).all()
        )
        assert x[:, :, 2].min() > 0.85 * RADIUS - 0.03  # nor do they sink
        t, a, b = np.argwhere(np.triu(touch, 1))[0]  # the first collision
        assert np.linalg.norm(x[t, a] - x[t - 1, a]) + np.linalg.norm(x[t, b] - x[t - 1, b]) > 0.005
        steps = np.linalg.norm(np.diff(x[..., :2], axis=0), axis=-1)
        # No object jumps, and the entering objects do enter.
        assert steps.max() < 0.25 and (steps.sum(0) > 0.5).sum() >= 2
        assert np.allclose(np.linalg.norm(facts["orientations"][:, :n], axis=-1), 1, atol=1e-5)
        kinds = np.stack([facts[name][0, :n] for name in ("shapes", "colours", "materials")], -1)
        assert len(np.unique(kinds, axis=0)) == n
    assert len(counts) > 1


def test_momentum_passes_between_spheres(made):
    """A sphere hits an equal resting one head-on: it almost stops, and the other moves on."""
    table = Table.of(SIZE)
    scene = Scene(*np.array([[1, 1], [0, 1], [0, 0]]))
    planned = clevrer_like.Plan(
        scene,
        np.array([[-1.0, 0], [0, 0]]),
        np.zeros(2),
        np.array([[1.5, 0], [0, 0]]),
        np.array([5, 0]),
    )
    track = clevrer_like.simulate(table, planned, FRAMES)
    hit = int(np.argmax(track.contacts[:, 0, 1]))
    assert 5 + 10 <= hit <= 5 + 12  # 0.6 m at nearly 1.5 m/s, 25 frames a second
    speeds = np.diff(track.positions[:, :, 0], axis=0) * 25
    assert (
        abs(track.positions[: hit - 1, 1, :2]).max() < 1e-3
        and not track.positions[:6, 0, 0].max() > -0.99
    )
    assert speeds[hit + 1, 1] > 2 * abs(speeds[hit + 1, 0]) and 0.5 < speeds[hit + 1, 1] < 1.5


def test_objects_are_seen_where_their_poses_say(made):
    shards, palette, seen = Shards(made[0] / "train"), np.array(list(COLORS.values())), 0
    for video in range(len(shards)):
        frames, facts = shards.read(video, slice(None)), extras(shards, video)
        n = int(facts["present"][0].sum())
        places = pixels_of(facts["positions"][:, :n].astype(float))
        for t in range(0, FRAMES, 7):
            for k, (x, y) in enumerate(places[t]):
                free = np.sort(np.linalg.norm(places[t] - places[t, k], axis=-1))[1] > 12
                colour = palette[facts["colours"][t, k]]
                if free and 1 <= min(x, y) and max(x, y) <= SIZE - 2 and colour.std() > 0.15:
                    pixel = frames[t, round(y), round(x)].astype(float)
                    likeness = np.corrcoef(pixel, colour)[0, 1]
                    assert likeness > 0.9, (video, t, k)
                    seen += 1
    assert seen > 100


def test_metal_shines_and_shadows_fall_away_from_the_lamp():
    table, pictures = Table(128), []
    for material in (0, 1):
        scene = Scene(np.array([1]), np.array([2]), np.array([material]))
        pictures.append(
            table.render(scene, np.array([[[0, 0, RADIUS]]]), np.array([[[0.0, 0, 0, 1]]]))[
                0
            ].astype(int)
        )
    rubber, metal = pictures
    assert MATERIALS == ("rubber", "metal") and (metal - rubber).max() > 40
    empty = np.asarray(tabletop.Image.fromarray(table.ground).reduce(2)).astype(int)
    darker = (empty - rubber > 25).all(-1)
    x = np.argwhere(darker)[:, 1]
    # The lamp is on the right.
    assert darker.sum() > 30 and x.mean() < 62 and not darker[:, 75:].any()
    assert (rubber[:20] == empty[:20]).all()


def test_objects_outside_the_picture_are_not_seen():
    table = Table.of(SIZE)
    for angle in np.linspace(0, 2 * np.pi, 12):
        place = table.outside(angle)
        scene = Scene(np.array([0]), np.array([1]), np.array([0]))
        frame = table.render(scene, np.array([[[*place, 0.17]]]), np.array([[[0.0, 0, 0, 1]]]))[0]
        assert (np.ptp(frame, axis=-1) < 3).all() and 1 < np.linalg.norm(place) < 7  # nothing red


def test_an_interrupted_run_resumes(made, tmp_path, monkeypatch):
    read, calls = clevrer_like.read, []

    def stops(source, args):
        calls.append(source.name)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return read(source, args)

    monkeypatch.setattr(clevrer_like, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        clevrer_like.make(parse(tmp_path / "out"))
    calls.clear()
    monkeypatch.setattr(
        clevrer_like, "read", lambda source, args: calls.append(source.name) or read(source, args)
    )
    clevrer_like.make(parse(tmp_path / "out"))
    assert (
        len(calls) == 4
        and Shards(tmp_path / "out/train").fingerprint() == Shards(made[0] / "train").fingerprint()
    )


def test_mistakes_are_one_line_and_code_2(tmp_path, command, monkeypatch):
    for flags, said in (
        (["--frames", "8"], "--frames must be from 32"),
        (["--videos", "0"], "--videos must be from 1"),
    ):
        code, err = command(tmp_path, "prepare/clevrer_like", "--out", "o", *flags)
        assert code == 2 and said in err and not (tmp_path / "o").exists()
    monkeypatch.setattr(clevrer_like.importlib.util, "find_spec", lambda name: None)
    code, err = command(tmp_path, "prepare/clevrer_like", "--out", "o")
    assert code == 2 and "pip install pybullet" in err and len(err.splitlines()) == 1


def test_too_many_simulations_without_a_collision_are_an_error(monkeypatch):
    monkeypatch.setattr(clevrer_like, "collides", lambda track: False)
    monkeypatch.setattr(clevrer_like, "MAX_TRIES", 2)
    with pytest.raises(clevrer_like.UserError, match="no collision within 32 frames"):
        plan_collision(Table.of(SIZE), [0, 0, 0], 32)
