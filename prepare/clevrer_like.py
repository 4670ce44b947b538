"""Generate videos like CLEVRER's: cubes, spheres and cylinders that enter a plane and collide.

    pip install pybullet
    python -m prepare.clevrer_like --out data/clevrer_like

pybullet simulates the rigid bodies and renders the frames on the CPU (prepare/tabletop.py): 128
frames of 128x128 at 25 frames per second. As in CLEVRER, there are eight colours and two materials,
and no two objects of a video are equal. Some objects stand in view at the start, others enter from
outside, and every video has a collision in view. Stored per frame, for 6 object slots: positions
(metres, z up), orientations (quaternions x, y, z, w), shapes, colours, materials, present (0 in
unused slots) and contacts (pairs that touched since the previous frame).
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

FRAMES, FPS, STEPS = 128, 25.0, 10  # frames; frames per second; physics steps per frame
MAX_OBJECTS = 6  # largest number of objects per video
FRICTION, MASS = 0.07, (1.0, 2.0)  # sliding friction on the plane; kg of rubber and of metal
ROOM = 1.1  # metres; standing objects start within +-ROOM of the centre, in x and in y
MIN_DISTANCE = 3 * RADIUS  # metres, smallest initial distance between two centres
LATEST = 0.6  # latest time at which an object enters, as a share of the video
VISIBLE_RADIUS = 1.4  # metres; a collision within this distance of the centre is in view
MAX_TRIES = 200  # plans per video before an error


class Plan(NamedTuple):
    """The initial state of N objects, and the start of their motion."""

    scene: Scene
    places: np.ndarray  # (N, 2) metres
    headings: np.ndarray  # (N,) radians, rotation of the objects about the vertical
    velocities: np.ndarray  # (N, 2) metres per second
    enters: np.ndarray  # (N,) frame in which the object gets its velocity


class Track(NamedTuple):
    """The simulated motion of N objects over T frames."""

    positions: np.ndarray  # (T, N, 3) float32
    orientations: np.ndarray  # (T, N, 4) float32
    contacts: np.ndarray  # (T, N, N) uint8


# --------------------------------------------------------------------------------------------- plan
def draw_attributes(n: int, rng: np.random.Generator) -> Scene:
    """Draw n objects that differ pairwise in shape, colour or material."""
    chosen = rng.choice(len(SHAPES) * len(COLORS) * len(MATERIALS), n, replace=False)
    return Scene(*np.unravel_index(chosen, (len(SHAPES), len(COLORS), len(MATERIALS))))


def draw_apart(n: int, draw, others: list, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw n places by rejection, at least MIN_DISTANCE from each other and from `others`."""
    places = list(others)
    while len(places) < n + len(others):
        place = draw()
        if all(np.linalg.norm(place - other) >= MIN_DISTANCE for other in places):
            places.append(place)
    return places[len(others) :]


def plan(rng: np.random.Generator, frames: int, table: Table) -> Plan:
    """Plan one to three standing objects, and two or three that enter towards a standing one."""
    standing, coming = int(rng.integers(1, 4)), int(rng.integers(2, 4))
    scene = draw_attributes(standing + coming, rng)
    still = draw_apart(standing, lambda: rng.uniform(-1, 1, 2) * ROOM, [], rng)
    starts = draw_apart(coming, lambda: table.outside(rng.uniform(0, 2 * np.pi)), still, rng)
    velocities = [np.zeros(2)] * standing
    # Each entering object aims at a standing one, with some scatter, so that collisions are likely.
    for start in starts:
        way = still[rng.integers(standing)] + rng.normal(0, 0.6 * RADIUS, 2) - start
        distance = np.linalg.norm(way)
        # sqrt(2 g mu distance) is the speed that friction consumes on the way to the target.
        speed = np.sqrt(2 * 9.8 * FRICTION * distance) + rng.uniform(0.2, 1.0)
        velocities.append(way / distance * speed)
    # One object enters in the first frame, so that no video begins with a still scene.
    times = np.concatenate([[0], rng.uniform(0, LATEST * frames, coming - 1)])
    enters = np.concatenate([np.zeros(standing), rng.permutation(times)]).astype(int)
    headings = rng.uniform(0, 2 * np.pi, standing + coming)
    return Plan(scene, np.array([*still, *starts]), headings, np.array(velocities), enters)


# ------------------------------------------------------------------------------------------ physics
def simulate(table: Table, plan: Plan, frames: int) -> Track:
    """Run the physics for `frames` frames."""
    bullet, client = table.bullet, {"physicsClientId": table.client}
    bodies = table.place(plan.scene, plan.places, plan.headings, MASS)
    ground = bullet.createMultiBody(
        0, bullet.createCollisionShape(bullet.GEOM_PLANE, **client), **client
    )
    bullet.changeDynamics(
        ground, -1, lateralFriction=2 * FRICTION, restitution=0.0, rollingFriction=0.01, **client
    )
    # Bullet multiplies the friction coefficients of two touching bodies, so 2 * FRICTION and 0.5
    # give FRICTION on the plane; restitutions are multiplied, too.
    for body in bodies:
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
    # Several physics steps per frame: a fast object must not pass through another between two
    # steps.
    bullet.setGravity(0, 0, -9.8, **client)
    bullet.setTimeStep(1 / FPS / STEPS, **client)
    N = len(bodies)
    track = Track(
        positions=np.zeros((frames, N, 3), np.float32),
        orientations=np.zeros((frames, N, 4), np.float32),
        contacts=np.zeros((frames, N, N), np.uint8),
    )
    # Bullet numbers bodies in its own way, and the ground is one of them.
    number = {body: k for k, body in enumerate(bodies)}
    for t in range(frames):
        # The pose of a frame is stored before the physics of that frame, so frame 0 is the plan
        # itself.
        for k in np.flatnonzero(plan.enters == t):
            push(table, bodies[k], plan.velocities[k], SHAPES[plan.scene.shapes[k]])
        for k, body in enumerate(bodies):
            track.positions[t, k], track.orientations[t, k] = bullet.getBasePositionAndOrientation(
                body, **client
            )
        if t + 1 < frames:
            step(table, number, track.contacts[t + 1])
    return track


def push(table: Table, body: int, velocity: np.ndarray, shape: str) -> None:
    """Set the velocity of an object; a sphere rolls, other shapes slide."""
    x, y = velocity
    spin = (-y / RADIUS, x / RADIUS, 0) if shape == "sphere" else (0, 0, 0)
    table.bullet.resetBaseVelocity(body, (x, y, 0), spin, physicsClientId=table.client)


def step(table: Table, number: dict[int, int], contacts: np.ndarray) -> None:
    """Run the physics for one frame; set contacts (N, N) to 1 for pairs that touch."""
    for _ in range(STEPS):
        table.bullet.stepSimulation(physicsClientId=table.client)
        for contact in table.bullet.getContactPoints(physicsClientId=table.client):
            a, b = number.get(contact[1]), number.get(contact[2])
            # contact[8] is the distance of the bodies: negative if they overlap.
            if a is not None and b is not None and contact[8] <= 0:
                contacts[a, b] = contacts[b, a] = 1


def collides(track: Track) -> bool:
    """Return whether two objects touch in view at some time."""
    t, a, _ = np.nonzero(track.contacts)
    return bool((np.linalg.norm(track.positions[t, a, :2], axis=-1) < VISIBLE_RADIUS).any())


def plan_collision(table: Table, seed: list[int], frames: int) -> tuple[Plan, Track]:
    """Plan and simulate with this seed until two objects collide in view; return both."""
    rng = np.random.default_rng(seed)
    for _ in range(MAX_TRIES):
        planned = plan(rng, frames, table)
        track = simulate(table, planned, frames)
        if collides(track):
            return planned, track
    raise UserError(
        f"no collision within {frames} frames in {MAX_TRIES} simulations; raise --frames"
    )


# ------------------------------------------------------------------------------------------ command
def read(source: Source, args: argparse.Namespace) -> Video:
    """Generate one video with its annotations, as a function of (seed, split, number) only."""
    table = Table.of(args.image_size)
    planned, track = plan_collision(table, [args.seed, *source.detail], args.frames)
    frames = table.render(planned.scene, track.positions, track.orientations)
    T, N, _ = track.positions.shape
    extra = {
        "positions": pad_objects(track.positions),
        "orientations": pad_objects(track.orientations),
        "contacts": pad_objects(track.contacts, axes=2),
        "present": pad_objects(np.ones((T, N), np.uint8)),
    }
    for name, values in planned.scene._asdict().items():
        extra[name] = pad_objects(np.broadcast_to(values.astype(np.uint8), (T, N)))
    return Video(digest([frames.tobytes()]), [frames], T, FPS, extra=extra)


def pad_objects(array: np.ndarray, axes: int = 1) -> np.ndarray:
    """Pad the object axes of (T, N, ...), the first `axes` after T, with zeros to MAX_OBJECTS."""
    missing = MAX_OBJECTS - array.shape[1]
    rest = array.ndim - 1 - axes
    return np.pad(array, [(0, 0), *[(0, missing)] * axes, *[(0, 0)] * rest])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.clevrer_like", description=__doc__.splitlines()[0]
    )
    build.add_flags(parser, "", 128, crop=False)
    add = parser.add_argument
    add("--videos", type=int, default=200, help="training videos (CLEVRER: 10,000)")
    add("--held_out", type=int, default=40, help="val videos, and test videos (CLEVRER: 5,000)")
    add("--frames", type=int, default=FRAMES, help="frames per video")
    add("--seed", type=int, default=0)
    args = build.check_flags(parser.parse_args(argv))
    build.check_ranges(
        args,
        videos=(1, 10**7),
        held_out=(1, 10**7),
        frames=(32, 10**4),
        seed=(0, 2**31),
        image_size=(16, 1024),
    )
    if importlib.util.find_spec("pybullet") is None:
        raise UserError(
            "this needs pybullet: pip install pybullet (wheels for Python 3.10 and 3.11; else it "
            "is compiled)"
        )
    return args


def make(args: argparse.Namespace) -> dict:
    counts = {"train": args.videos, "val": args.held_out, "test": args.held_out}
    sources = []
    for index, (split, count) in enumerate(counts.items()):
        for k in range(count):
            sources.append(Source(f"{split}/{k:05d}", split, "", detail=(index, k)))
    size = args.image_size
    legend = {"shapes": list(SHAPES), "colours": list(COLORS), "materials": list(MATERIALS)}
    recipe = build.Recipe(
        dataset="clevrer_like",
        module="prepare.clevrer_like",
        read=read,
        split_rule="each video by its own seed: (--seed, split, number)",
        per_shard=8,
        frame_rule=f"drawn at {2 * size}x{2 * size}, averaged to {size}x{size}",
        versions={"pybullet": importlib.metadata.version("pybullet")},
        facts={"legend": legend},
    )
    return build.make(recipe, Found(sources), args)


def main() -> int:
    args = parse()
    print(f"{Path(args.out)}: each video has 3 to 6 objects, of the shapes {', '.join(SHAPES)}")
    return build.report(make(args), args)


if __name__ == "__main__":
    run_command(main)
