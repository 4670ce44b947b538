"""Videos like CLEVRER's, made rather than fetched: cubes, spheres and cylinders that enter a plane and collide.

    pip install pybullet
    python -m prepare.clevrer_like --out data/clevrer_like

Rigid-body physics by pybullet, pictures by its CPU renderer (prepare/tabletop.py): 128 frames of 128x128, 25 a second. As in
CLEVRER there are eight colours and two materials, no two objects alike; some stand there at first, others come in from
outside, and something collides in view in every video. Stored for each frame and each of 6 objects: positions (metres, z up),
orientations (quaternions x, y, z, w), shapes, colours, materials, present (0 where a video has fewer objects) and contacts
(which have touched which since the frame before).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare import build
from prepare.sources import Found, Source, Video, digest
from prepare.tabletop import COLORS, MATERIALS, RADIUS, SHAPES, Scene, Table
from runtime.console import UserError, run_command

FRAMES, FPS, STEPS = 128, 25.0, 10  # of a video; per second; of physics per frame
MOST = 6  # objects of a video
FRICTION, MASS = 0.07, (1.0, 2.0)  # sliding on the plane; of rubber and of metal, kg
ROOM = 1.1  # metres from the middle: where objects stand at first
APART = 3 * RADIUS  # metres between two centres, at least, at first
LATEST = 0.6  # of a video: when the last object comes in
MIDDLE = 1.4  # metres from the middle: a collision in here is in view
TRIES = 200


class Plan(NamedTuple):
    """What is there at first, and what happens to it."""

    scene: Scene
    places: np.ndarray  # (N, 2) metres
    headings: np.ndarray  # (N,) radians, of the objects themselves
    velocities: np.ndarray  # (N, 2) metres per second
    enters: np.ndarray  # (N,) frame in which the velocity is given


class Track(NamedTuple):
    """What has happened, for each of T frames."""

    positions: np.ndarray  # (T, N, 3) float32
    orientations: np.ndarray  # (T, N, 4) float32
    contacts: np.ndarray  # (T, N, N) uint8


# --------------------------------------------------------------------------------------------- plan
def attributes(n: int, rng: np.random.Generator) -> Scene:
    """n objects, no two alike in shape, colour and material."""
    chosen = rng.choice(len(SHAPES) * len(COLORS) * len(MATERIALS), n, replace=False)
    return Scene(*np.unravel_index(chosen, (len(SHAPES), len(COLORS), len(MATERIALS))))


def spread(n: int, draw, others: list, rng: np.random.Generator) -> list[np.ndarray]:
    """n places by draw(), none too near to another."""
    places = list(others)
    while len(places) < n + len(others):
        place = draw()
        if all(np.linalg.norm(place - other) >= APART for other in places):
            places.append(place)
    return places[len(others) :]


def plan(rng: np.random.Generator, frames: int, table: Table) -> Plan:
    """One to three objects that stand, two or three that come in, each aimed at one that stands or past it."""
    standing, coming = int(rng.integers(1, 4)), int(rng.integers(2, 4))
    scene = attributes(standing + coming, rng)
    still = spread(standing, lambda: rng.uniform(-1, 1, 2) * ROOM, [], rng)
    starts = spread(coming, lambda: table.outside(rng.uniform(0, 2 * np.pi)), still, rng)
    velocities = [np.zeros(2)] * standing
    for start in starts:
        way = still[rng.integers(standing)] + rng.normal(0, 0.6 * RADIUS, 2) - start
        distance = np.linalg.norm(way)
        speed = np.sqrt(2 * 9.8 * FRICTION * distance) + rng.uniform(
            0.2, 1.0
        )  # it gets there, and is not slow then
        velocities.append(way / distance * speed)
    enters = np.concatenate(
        [
            np.zeros(standing),
            rng.permutation(np.concatenate([[0], rng.uniform(0, LATEST * frames, coming - 1)])),
        ]
    ).astype(int)
    return Plan(
        scene,
        np.array([*still, *starts]),
        rng.uniform(0, 2 * np.pi, standing + coming),
        np.array(velocities),
        enters,
    )


# ------------------------------------------------------------------------------------------ physics
def simulate(table: Table, plan: Plan, frames: int) -> Track:
    bullet, client = table.bullet, {"physicsClientId": table.client}
    bodies = table.place(plan.scene, plan.places, plan.headings, MASS)
    ground = bullet.createMultiBody(
        0, bullet.createCollisionShape(bullet.GEOM_PLANE, **client), **client
    )
    bullet.changeDynamics(
        ground, -1, lateralFriction=2 * FRICTION, restitution=0.0, rollingFriction=0.01, **client
    )
    for body in (
        bodies
    ):  # Bullet multiplies the two friction coefficients, and the two restitutions, of what touches
        bullet.changeDynamics(
            body,
            -1,
            lateralFriction=0.5,
            restitution=0.7,
            rollingFriction=0.03,
            linearDamping=0.0,
            angularDamping=0.02,
            **client,
        )
    bullet.setGravity(0, 0, -9.8, **client)
    bullet.setTimeStep(1 / FPS / STEPS, **client)
    track = Track(
        *(
            np.zeros((frames, len(bodies), *shape), kind)
            for shape, kind in (((3,), np.float32), ((4,), np.float32), ((len(bodies),), np.uint8))
        )
    )
    number = {body: k for k, body in enumerate(bodies)}
    for t in range(frames):
        for k in np.flatnonzero(plan.enters == t):
            push(table, bodies[k], plan.velocities[k], SHAPES[plan.scene.shapes[k]])
        for k, body in enumerate(bodies):
            track.positions[t, k], track.orientations[t, k] = bullet.getBasePositionAndOrientation(
                body, **client
            )
        if t + 1 < frames:
            touched(table, number, track.contacts[t + 1])
    return track


def push(table: Table, body: int, velocity: np.ndarray, shape: str) -> None:
    x, y = velocity
    spin = (
        (-y / RADIUS, x / RADIUS, 0) if shape == "sphere" else (0, 0, 0)
    )  # a ball comes in rolling
    table.bullet.resetBaseVelocity(body, (x, y, 0), spin, physicsClientId=table.client)


def touched(table: Table, number: dict[int, int], contacts: np.ndarray) -> None:
    """One frame of physics; contacts (N, N) is filled with which objects touch which in it."""
    for _ in range(STEPS):
        table.bullet.stepSimulation(physicsClientId=table.client)
        for contact in table.bullet.getContactPoints(physicsClientId=table.client):
            a, b = number.get(contact[1]), number.get(contact[2])
            if a is not None and b is not None and contact[8] <= 0:  # distance
                contacts[a, b] = contacts[b, a] = 1


def collides(track: Track) -> bool:
    """Has something that moves hit another in view?"""
    t, a, _ = np.nonzero(track.contacts)
    return bool(len(t)) and bool(
        (np.linalg.norm(track.positions[t, a, :2], axis=-1) < MIDDLE).any()
    )


def happening(table: Table, seed: list[int], frames: int) -> tuple[Plan, Track]:
    """The first of the plans that follow from the seed in which something collides."""
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        planned = plan(rng, frames, table)
        track = simulate(table, planned, frames)
        if collides(track):
            return planned, track
    raise UserError(f"in {TRIES} tries nothing collided within {frames} frames; give more --frames")


# ------------------------------------------------------------------------------------------ command
def read(source: Source, args: argparse.Namespace) -> Video:
    """One video with its annotations: a function of seed, split and number alone."""
    table = Table.of(args.image_size)
    planned, track = happening(table, [args.seed, *source.detail], args.frames)
    frames = table.render(planned.scene, track.positions, track.orientations)
    T, N, _ = track.positions.shape
    pad = lambda array, axes=1: np.pad(
        array, [(0, 0)] + [(0, MOST - N)] * axes + [(0, 0)] * (array.ndim - 1 - axes)
    )  # noqa: E731
    ids = {
        name: pad(np.broadcast_to(values.astype(np.uint8), (T, N)))
        for name, values in planned.scene._asdict().items()
    }
    extra = {
        "positions": pad(track.positions),
        "orientations": pad(track.orientations),
        "contacts": pad(track.contacts, 2),
        "present": pad(np.ones((T, N), np.uint8)),
        **ids,
    }
    return Video(digest([frames.tobytes()]), [frames], T, FPS, extra=extra)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.clevrer_like", description=__doc__.splitlines()[0]
    )
    build.add_flags(parser, "", 128, crop=False)
    add = parser.add_argument
    add("--videos", type=int, default=200, help="to train with (CLEVRER: 10,000)")
    add("--held_out", type=int, default=40, help="of val and of test (CLEVRER: 5,000)")
    add("--frames", type=int, default=FRAMES, help="of a video")
    add("--seed", type=int, default=0)
    args = build.check_flags(parser.parse_args(argv))
    for name, low, high in (
        ("videos", 1, 10**7),
        ("held_out", 1, 10**7),
        ("frames", 32, 10**4),
        ("seed", 0, 2**31),
        ("image_size", 16, 1024),
    ):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} must be from {low} to {high}, got {getattr(args, name)}")
    if importlib.util.find_spec("pybullet") is None:
        raise UserError(
            "this needs pybullet: pip install pybullet (wheels for Python 3.10 and 3.11; else it is compiled)"
        )
    return args


def make(args: argparse.Namespace) -> dict:
    counts = {"train": args.videos, "val": args.held_out, "test": args.held_out}
    sources = [
        Source(f"{split}/{k:05d}", split, "", detail=(index, k))
        for index, (split, count) in enumerate(counts.items())
        for k in range(count)
    ]
    size, legend = (
        args.image_size,
        {"shapes": list(SHAPES), "colours": list(COLORS), "materials": list(MATERIALS)},
    )
    recipe = build.Recipe(
        "clevrer_like",
        "prepare.clevrer_like",
        read,
        "each video by its own seed: (--seed, split, number)",
        8,
        frame_rule=f"drawn at {2 * size}x{2 * size}, averaged to {size}x{size}",
        versions={"pybullet": importlib.metadata.version("pybullet")},
        facts={"legend": legend},
    )
    return build.make(recipe, Found(sources), args)


def main() -> int:
    args = parse()
    print(f"{Path(args.out)}: 3 to 6 of them a video: {', '.join(SHAPES)}")
    return build.report(make(args), args)


if __name__ == "__main__":
    run_command(main)
