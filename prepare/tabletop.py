"""Coloured solids on a grey plane, drawn by pybullet's CPU renderer (TinyRenderer), without a screen.

Objects alone go through the renderer, twice as large and twice over: matt for rubber, with highlights for metal. The ground
stays the same, so it is worked out once; the renderer's own shadows would cost four times as much and do not fall right on a
large plane, so a third small picture, seen from the lamp, says which of the ground's pixels lie in shadow.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

SHAPES, MATERIALS = ("cube", "sphere", "cylinder"), ("rubber", "metal")
COLORS = {
    "gray": (0.38, 0.38, 0.38),
    "red": (0.68, 0.14, 0.14),
    "blue": (0.16, 0.29, 0.84),
    "green": (0.11, 0.45, 0.12),
    "brown": (0.51, 0.29, 0.10),
    "purple": (0.51, 0.15, 0.75),
    "cyan": (0.16, 0.78, 0.78),
    "yellow": (0.95, 0.86, 0.16),
}
RADIUS = 0.2  # metres: of spheres and cylinders; cubes are a little less than twice as wide
EYE, TARGET, VIEW = (0.0, -6.0, 4.2), (0.0, 0.1, 0.0), 29.0  # the camera: metres, degrees
LAMP, LAMP_VIEW, LAMP_PIXELS = (4.0, -3.0, 8.0), 46.0, 256
LIGHTS = {"rubber": (0.45, 0.6, 0.02), "metal": (0.35, 0.55, 1.6)}  # ambient, diffuse and specular
GROUND, SHADE = 0.66, 0.5  # brightness; of which a shadow takes that much
MARGIN = 0.5  # metres beyond the edge of the picture, where things come in from


class Scene(NamedTuple):
    """What the objects are: indices (N,) into SHAPES, COLORS and MATERIALS."""

    shapes: np.ndarray
    colours: np.ndarray
    materials: np.ndarray


class Table:
    """A physics server of this process's own, and the camera over it."""

    def __init__(self, size: int):
        self.bullet = importlib.import_module("pybullet")  # optional, so not at the top
        self.size, self.side = size, 2 * size
        self.client = self.bullet.connect(self.bullet.DIRECT)
        self.view = self.bullet.computeViewMatrix(EYE, TARGET, (0, 0, 1))
        self.projection = self.bullet.computeProjectionMatrixFOV(VIEW, 1, 1, 30)
        self.lamp_view = self.bullet.computeViewMatrix(LAMP, (0, 0.3, 0), (0, 0, 1))
        self.lamp_projection = self.bullet.computeProjectionMatrixFOV(LAMP_VIEW, 1, 1, 30)
        self.ground, self.in_lamp = self._ground()

    @staticmethod
    @functools.lru_cache(1)
    def of(size: int) -> Table:
        """The one of this process."""
        return Table(size)

    # ------------------------------------------------------------------------------------- geometry
    def _ground(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty plane (side, side, 3) uint8, and where each of its pixels lies in the lamp's picture (flat index)."""
        ndc = (np.arange(self.side) + 0.5) / self.side * 2 - 1
        x, y = np.meshgrid(ndc, -ndc)
        inverse = np.linalg.inv(matrix(self.projection) @ matrix(self.view))
        near, far = (
            homogeneous(inverse, np.stack([x, y, np.full_like(x, z)], -1)) for z in (-1, 1)
        )
        along = near[..., 2] / (near[..., 2] - far[..., 2])
        point = near + along[..., None] * (far - near)
        way = np.array(LAMP) - point
        distance = np.linalg.norm(way, axis=-1)
        light = 0.5 + 0.5 * way[..., 2] / distance * (np.linalg.norm(LAMP) / distance) ** 2
        ground = np.clip(GROUND * light, 0, 1)[..., None] * 255
        lamp = homogeneous(matrix(self.lamp_projection) @ matrix(self.lamp_view), point)
        column, row = (
            np.clip((v + 1) / 2 * LAMP_PIXELS, 0, LAMP_PIXELS - 1).astype(np.int64)
            for v in (lamp[..., 0], -lamp[..., 1])
        )
        return np.repeat(ground, 3, -1).round().astype(np.uint8), row * LAMP_PIXELS + column

    def outside(self, angle: float) -> np.ndarray:
        """(2,) the point of the plane in that direction from the middle where an object is MARGIN beyond the picture's edge."""
        way = np.array([np.cos(angle), np.sin(angle)])
        far = np.arange(0, 8, 0.05)
        points = np.stack(
            [np.insert(far[:, None] * way, 2, z, axis=1) for z in (0, 2 * RADIUS)]
        )  # its foot, its top
        ndc = homogeneous(matrix(self.projection) @ matrix(self.view), points)[..., :2]
        return way * (far[np.argmax(abs(ndc).max(-1).min(0) > 1)] + MARGIN)

    # -------------------------------------------------------------------------------------- objects
    def place(
        self, scene: Scene, places: np.ndarray, headings: np.ndarray, mass: tuple[float, float]
    ) -> list[int]:
        """An empty world with these objects on the plane z = 0, which is not in it -> their numbers there."""
        bullet, client = self.bullet, {"physicsClientId": self.client}
        bullet.resetSimulation(**client)
        bullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1, **client)
        bodies = []
        for shape, colour, material, place, heading in zip(*scene, places, headings):
            form, sizes, half = self.form(SHAPES[shape])
            height = {"length": 2 * half} if form == bullet.GEOM_CYLINDER else {}
            visual = bullet.createVisualShape(
                form, **sizes, **height, rgbaColor=(*list(COLORS.values())[colour], 1), **client
            )
            height = {"height": 2 * half} if height else {}
            solid = bullet.createCollisionShape(form, **sizes, **height, **client)
            turn = bullet.getQuaternionFromEuler((0, 0, heading))
            bodies.append(
                bullet.createMultiBody(
                    mass[material], solid, visual, (*place, half), turn, **client
                )
            )
        return bodies

    def form(self, shape: str) -> tuple[int, dict, float]:
        """-> pybullet's shape, its sizes, half its height."""
        half = 0.85 * RADIUS
        return {
            "cube": (self.bullet.GEOM_BOX, {"halfExtents": [half] * 3}, half),
            "sphere": (self.bullet.GEOM_SPHERE, {"radius": RADIUS}, RADIUS),
            "cylinder": (self.bullet.GEOM_CYLINDER, {"radius": RADIUS}, half),
        }[shape]

    # ------------------------------------------------------------------------------------- pictures
    def render(self, scene: Scene, positions: np.ndarray, orientations: np.ndarray) -> np.ndarray:
        """positions (T, N, 3), orientations (T, N, 4) -> frames (T, size, size, 3) uint8."""
        T, N, _ = positions.shape
        bodies = self.place(scene, positions[0, :, :2], np.zeros(N), (0.0, 0.0))
        metal = np.zeros(max(bodies) + 2, bool)  # by number of the body; the last for none, -1
        metal[
            [
                body
                for body, material in zip(bodies, scene.materials)
                if MATERIALS[material] == "metal"
            ]
        ] = True
        frames = np.empty((T, self.size, self.size, 3), np.uint8)
        for t in range(T):
            for body, position, orientation in zip(
                bodies, positions[t].tolist(), orientations[t].tolist()
            ):
                self.bullet.resetBasePositionAndOrientation(
                    body, position, orientation, physicsClientId=self.client
                )
            frames[t] = self.picture(metal)
        return frames

    def picture(self, metal: np.ndarray) -> np.ndarray:
        """(size, size, 3) uint8 of the objects as they are now."""
        shadow = self.shadow()
        picture = self.ground - (self.ground * shadow[..., None]).astype(np.uint8)
        pixels, who = self.camera("rubber")
        there = who >= 0
        picture[there] = pixels[there]
        shiny = metal[who]
        if shiny.any():
            picture[shiny] = self.camera("metal")[0][shiny]
        return np.asarray(Image.fromarray(picture).reduce(2))

    def camera(self, material: str) -> tuple[np.ndarray, np.ndarray]:
        """-> pixels (side, side, 3) as though all were of that material, and whose each is (side, side)."""
        ambient, diffuse, specular = LIGHTS[material]
        _, _, pixels, _, who = self.bullet.getCameraImage(
            self.side,
            self.side,
            self.view,
            self.projection,
            lightDirection=LAMP,
            lightColor=(1, 1, 1),
            shadow=0,
            lightAmbientCoeff=ambient,
            lightDiffuseCoeff=diffuse,
            lightSpecularCoeff=specular,
            renderer=self.bullet.ER_TINY_RENDERER,
            physicsClientId=self.client,
        )
        pixels = np.asarray(pixels, np.uint8).reshape(self.side, self.side, 4)[..., :3]
        return pixels, np.asarray(who).reshape(self.side, self.side)

    def shadow(self) -> np.ndarray:
        """(side, side) float32: how much of the ground's light is taken at each pixel."""
        who = self.bullet.getCameraImage(
            LAMP_PIXELS,
            LAMP_PIXELS,
            self.lamp_view,
            self.lamp_projection,
            shadow=0,
            renderer=self.bullet.ER_TINY_RENDERER,
            physicsClientId=self.client,
        )[4]
        mask = (np.asarray(who).reshape(LAMP_PIXELS, LAMP_PIXELS) >= 0).astype(np.uint8) * 255
        soft = np.array(Image.fromarray(mask).filter(ImageFilter.BoxBlur(2)))
        soft[[0, -1]] = soft[:, [0, -1]] = 0  # where all that lies beyond this picture looks
        return (soft * np.float32(SHADE / 255)).ravel()[self.in_lamp]


def matrix(columns: tuple[float, ...]) -> np.ndarray:
    """pybullet's 16 numbers, column by column -> (4, 4)."""
    return np.array(columns).reshape(4, 4).T


def homogeneous(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(4, 4) applied to points (..., 3), divided by w."""
    out = points @ matrix[:3, :3].T + matrix[:3, 3]
    return out / (points @ matrix[3, :3] + matrix[3, 3])[..., None]
