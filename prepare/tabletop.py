"""Render coloured solids on a grey plane with pybullet's CPU renderer (TinyRenderer), off-screen.

TinyRenderer renders only the objects, at twice the size and in two passes: matt for rubber, with
highlights for metal. The ground does not change, so its image is computed once. Shadows come from a
shadow map, a small image from the position of the lamp, which determines the pixels of the ground
that are in shadow: TinyRenderer's own shadows take four times as long and are wrong on a large
plane.
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
RADIUS = 0.2  # metres, of spheres and cylinders; the edge of a cube is 1.7 times as long
EYE, TARGET, VIEW = (0.0, -6.0, 4.2), (0.0, 0.1, 0.0), 29.0  # the camera: metres, degrees
LAMP, LAMP_VIEW, LAMP_PIXELS = (4.0, -3.0, 8.0), 46.0, 256
LIGHTS = {"rubber": (0.45, 0.6, 0.02), "metal": (0.35, 0.55, 1.6)}  # ambient, diffuse and specular
GROUND, SHADE = 0.66, 0.5  # brightness of the ground; share of it that a shadow removes
MARGIN = 0.5  # metres beyond the edge of the picture, where objects start


class Scene(NamedTuple):
    """The objects as indices (N,) into SHAPES, COLORS and MATERIALS."""

    shapes: np.ndarray
    colours: np.ndarray
    materials: np.ndarray


class Table:
    """A physics server in this process, and its camera."""

    def __init__(self, size: int):
        # A late import, because pybullet is optional.
        self.bullet = importlib.import_module("pybullet")
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
        """Return the cached table of this process."""
        return Table(size)

    # ------------------------------------------------------------------------------------- geometry
    def _ground(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the empty plane (side, side, 3) uint8, and flat indices into the shadow map."""
        ndc = (np.arange(self.side) + 0.5) / self.side * 2 - 1
        x, y = np.meshgrid(ndc, -ndc)
        inverse = np.linalg.inv(matrix(self.projection) @ matrix(self.view))
        near, far = (project(inverse, np.stack([x, y, np.full_like(x, z)], -1)) for z in (-1, 1))
        # The point where the ray through each pixel meets the plane z = 0.
        along = near[..., 2] / (near[..., 2] - far[..., 2])
        point = near + along[..., None] * (far - near)
        # Lambert's cosine law with inverse-square falloff, over an ambient half.
        way = np.array(LAMP) - point
        distance = np.linalg.norm(way, axis=-1)
        light = 0.5 + 0.5 * way[..., 2] / distance * (np.linalg.norm(LAMP) / distance) ** 2
        ground = np.clip(GROUND * light, 0, 1)[..., None] * 255
        lamp = project(matrix(self.lamp_projection) @ matrix(self.lamp_view), point)
        column, row = (
            np.clip((v + 1) / 2 * LAMP_PIXELS, 0, LAMP_PIXELS - 1).astype(np.int64)
            for v in (lamp[..., 0], -lamp[..., 1])
        )
        return np.repeat(ground, 3, -1).round().astype(np.uint8), row * LAMP_PIXELS + column

    def outside(self, angle: float) -> np.ndarray:
        """Return the point (2,) in this direction, MARGIN metres beyond the edge of the image."""
        way = np.array([np.cos(angle), np.sin(angle)])
        far = np.arange(0, 8, 0.05)
        # The foot and the top of an object must both be outside the picture.
        points = np.stack([np.insert(far[:, None] * way, 2, z, axis=1) for z in (0, 2 * RADIUS)])
        ndc = project(matrix(self.projection) @ matrix(self.view), points)[..., :2]
        return way * (far[np.argmax(abs(ndc).max(-1).min(0) > 1)] + MARGIN)

    # -------------------------------------------------------------------------------------- objects
    def place(
        self, scene: Scene, places: np.ndarray, headings: np.ndarray, mass: tuple[float, float]
    ) -> list[int]:
        """Reset the world and place the objects at z = 0, without a ground; return body ids."""
        bullet, client = self.bullet, {"physicsClientId": self.client}
        bullet.resetSimulation(**client)
        bullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1, **client)
        bodies = []
        for shape, colour, material, place, heading in zip(*scene, places, headings):
            form, sizes, half = self.describe_shape(SHAPES[shape])
            # pybullet's name for the height of a cylinder differs between these two functions.
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

    def describe_shape(self, shape: str) -> tuple[int, dict, float]:
        """Return pybullet's number of the shape, its sizes, and half its height."""
        half = 0.85 * RADIUS
        return {
            "cube": (self.bullet.GEOM_BOX, {"halfExtents": [half] * 3}, half),
            "sphere": (self.bullet.GEOM_SPHERE, {"radius": RADIUS}, RADIUS),
            "cylinder": (self.bullet.GEOM_CYLINDER, {"radius": RADIUS}, half),
        }[shape]

    # ------------------------------------------------------------------------------------- pictures
    def render(self, scene: Scene, positions: np.ndarray, orientations: np.ndarray) -> np.ndarray:
        """Render positions (T, N, 3) and orientations (T, N, 4) to (T, size, size, 3) uint8."""
        T, N, _ = positions.shape
        bodies = self.place(scene, positions[0, :, :2], np.zeros(N), (0.0, 0.0))
        # Whether each body is of metal, indexed by body id; the last entry is for id -1, no body.
        metal = np.zeros(max(bodies) + 2, bool)
        for body, material in zip(bodies, scene.materials):
            metal[body] = MATERIALS[material] == "metal"
        frames = np.empty((T, self.size, self.size, 3), np.uint8)
        for t in range(T):
            for body, position, orientation in zip(
                bodies, positions[t].tolist(), orientations[t].tolist()
            ):
                self.bullet.resetBasePositionAndOrientation(
                    body, position, orientation, physicsClientId=self.client
                )
            frames[t] = self.render_frame(metal)
        return frames

    def render_frame(self, metal: np.ndarray) -> np.ndarray:
        """Render the current state of the objects: (size, size, 3) uint8."""
        shadow = self.render_shadow()
        picture = self.ground - (self.ground * shadow[..., None]).astype(np.uint8)
        pixels, who = self.render_objects("rubber")
        there = who >= 0
        picture[there] = pixels[there]
        shiny = metal[who]
        if shiny.any():
            picture[shiny] = self.render_objects("metal")[0][shiny]
        return np.asarray(Image.fromarray(picture).reduce(2))

    def render_objects(self, material: str) -> tuple[np.ndarray, np.ndarray]:
        """Render all objects in one material: pixels (side, side, 3), and body ids (side, side)."""
        ambient, diffuse, specular = LIGHTS[material]
        # `who` is the segmentation mask: the id of the body that each pixel shows, -1 for none.
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

    def render_shadow(self) -> np.ndarray:
        """Compute the share of light that shadows remove at each pixel: (side, side) float32."""
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
        # Points outside the shadow map are clipped to its border, which must be without shadow.
        soft[[0, -1]] = soft[:, [0, -1]] = 0
        return (soft * np.float32(SHADE / 255)).ravel()[self.in_lamp]


def matrix(columns: tuple[float, ...]) -> np.ndarray:
    """Convert pybullet's 16 numbers in column-major order to (4, 4)."""
    return np.array(columns).reshape(4, 4).T


def project(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a projective matrix (4, 4) to points (..., 3) and divide by w."""
    out = points @ matrix[:3, :3].T + matrix[:3, 3]
    return out / (points @ matrix[3, :3] + matrix[3, 3])[..., None]
