"""Render a maze from inside by ray casting: textured walls, floor, ceiling and billboards.

All functions work on batches of poses. Cells are unit squares; walls are on their edges, one unit
high; x is east, y is north, headings are radians from east towards north. A pixel is the mean of
four texels. The texels are read from a table of mipmaps: every texture at several distances,
blurred against aliasing and darkened by fog. Distances are perpendicular to the screen.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

EAST, NORTH, WEST, SOUTH = range(4)
DX, DY = (1, 0, -1, 0), (0, 1, 0, -1)
HALF_VIEW = 0.7  # tangent of half the angle of view, across and up (70 degrees)
EYE = 0.5  # height of the camera
TEXELS, FINE = 64, 2  # texels per side of a texture; rays per side of a pixel (supersampling)
NEAR, FAR, LEVELS = 0.25, 12.0, 24  # distances in the table: smallest, largest, number (geometric)
FOG = 0.2  # per cell
SPRITE_NEAR = 0.12  # billboards nearer than this are not drawn
BRICK, SUNSET, RINGS = range(3)  # pictures on walls
SMILEY, GEM, BALL = range(3)  # pictures on billboards
OPAQUE = 1 << 30  # bit of a packed texel, above its three channels


class Scene(NamedTuple):
    """A maze of n x n cells with its pictures and billboards."""

    open: np.ndarray  # (4, n, n) bool: no wall in that direction of cell (x, y)
    pictures: np.ndarray  # (4, n, n) uint8: picture on the wall, seen from the cell
    sprites: np.ndarray  # (B, 5) float32: x, y, height of the centre, size, picture


# ----------------------------------------------------------------------------------------- textures
def grid() -> tuple[np.ndarray, np.ndarray]:
    """Return texel centres in [-1, 1]: x (to the right), y (down)."""
    line = (np.arange(TEXELS) + 0.5) / TEXELS * 2 - 1
    return np.meshgrid(line, line)


def bricks(rng: np.random.Generator) -> np.ndarray:
    """Draw eight courses of four bricks in different reds, with light mortar and a bevel."""
    row, column = np.divmod(np.arange(TEXELS * TEXELS).reshape(TEXELS, TEXELS), TEXELS)
    course = row // 8
    shifted = (column + 8 * (course % 2)) % TEXELS
    tone = rng.uniform(0.72, 1.12, (8, 4))[course, shifted // 16]
    color = np.array([176, 66, 46]) * tone[..., None] * rng.uniform(0.9, 1.1, (TEXELS, TEXELS, 1))
    color[(row % 8 == 1) | (shifted % 16 == 1)] *= 1.18
    color[(row % 8 == 7) | (shifted % 16 == 15)] *= 0.75
    mortar = (row % 8 == 0) | (shifted % 16 == 0)
    grey = np.array([188, 178, 165]) * rng.uniform(0.85, 1.0, (TEXELS, TEXELS, 1))
    color[mortar] = grey[mortar]
    return color


def add_frame(picture: np.ndarray, wall: np.ndarray) -> np.ndarray:
    """Draw a picture in a wooden frame on a wall."""
    x, y = grid()
    edge = np.maximum(abs(x), abs(y))
    return np.select(
        [(edge < 0.56)[..., None], (edge < 0.68)[..., None]],
        [picture, np.array([92, 58, 26.0])],
        wall,
    )


def wall_pictures(rng: np.random.Generator) -> list[np.ndarray]:
    """Draw BRICK, SUNSET, RINGS."""
    x, y = grid()
    wall = bricks(rng)
    sky = np.stack([250 - 40 * y, 150 - 90 * y, 90 + 60 * y], -1)
    hills = y > 0.2 + 0.12 * np.sin(5 * x)
    sunset = np.select(
        [hills[..., None], (np.hypot(x, y - 0.05) < 0.3)[..., None]],
        [[30, 90, 60], [255, 235, 90]],
        sky,
    )
    wheel = np.array([[220, 40, 40], [240, 200, 40], [40, 160, 80], [40, 90, 200], [240, 240, 240]])
    rings = wheel[(np.hypot(x, y) * 8).astype(int) % 5]
    return [wall, add_frame(sunset, wall), add_frame(rings, wall)]


def floor_picture(rng: np.random.Generator) -> np.ndarray:
    """Draw four stone slabs in two tones, with dark joints."""
    row, column = np.divmod(np.arange(TEXELS * TEXELS).reshape(TEXELS, TEXELS), TEXELS)
    light = ((row // 32 + column // 32) % 2)[..., None]
    noise = rng.uniform(0.88, 1.12, (TEXELS, TEXELS, 1))
    slab = np.where(light, [172, 142, 96], [122, 92, 58]) * noise
    slab[(row % 32 == 0) | (column % 32 == 0)] = [58, 46, 34]
    return slab


def ceiling_picture(rng: np.random.Generator) -> np.ndarray:
    """Draw pale panels with speckles."""
    row, column = np.divmod(np.arange(TEXELS * TEXELS).reshape(TEXELS, TEXELS), TEXELS)
    panel = np.array([196, 200, 208]) * rng.choice([1, 0.82], (TEXELS, TEXELS, 1), p=[0.85, 0.15])
    panel[(row % 32 < 2) | (column % 32 < 2)] = [116, 122, 136]
    return panel


def billboards() -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw SMILEY, GEM, BALL as pairs (colours, mask of opaque texels)."""
    x, y = grid()
    r = np.hypot(x, y)
    light = np.clip(1.15 - 0.45 * np.hypot(x + 0.35, y + 0.4), 0.45, 1.15)[..., None]
    eyes = np.hypot(abs(x) - 0.33, (y + 0.3) / 1.5) < 0.13
    mouth = (abs(np.hypot(x, y + 0.05) - 0.58) < 0.08) & (y > 0.15)
    ink = eyes | mouth | (r > 0.88)
    smiley = np.where(ink[..., None], [20, 20, 20], np.array([255, 220, 30]) * light)
    # A gem has three facets in its upper half and three in its lower half.
    lower = (y > 0).astype(int)
    facet = lower * 3 + (x > -0.25 * (1 - abs(y))).astype(int) + (x > 0.35 * (1 - abs(y)))
    gem = np.array(
        [
            [120, 220, 255],
            [190, 240, 255],
            [60, 150, 230],
            [50, 140, 230],
            [90, 180, 250],
            [20, 80, 180],
        ]
    )[facet]
    stripe = ((np.arctan2(y + 0.3, x + 0.3) * 3 / np.pi).astype(int) % 2 == 0)[..., None]
    ball = np.where(stripe, [235, 235, 235], [40, 170, 70]) * light
    return [(smiley, r < 0.97), (gem, abs(x) * 1.35 + abs(y) < 0.97), (ball, r < 0.95)]


def blur(texture: np.ndarray, down: float, across: float) -> np.ndarray:
    """Blur (TEXELS, TEXELS, 3) by a periodic Gaussian of standard deviations down, across."""
    frequency = 2 * np.pi * np.fft.fftfreq(TEXELS)
    weight = np.exp(-0.5 * ((down * frequency[:, None]) ** 2 + (across * frequency) ** 2))
    return np.fft.ifft2(np.fft.fft2(texture, axes=(0, 1)) * weight[..., None], axes=(0, 1)).real


def pack(color: np.ndarray) -> np.ndarray:
    """Pack (…, 3) in [0, 255] to uint32, ten bits per channel: a sum of four does not overflow."""
    red, green, blue = np.moveaxis(np.clip(np.rint(color), 0, 255).astype(np.uint32), -1, 0)
    return red << 20 | green << 10 | blue


def level_of(distance: np.ndarray) -> np.ndarray:
    """Return the level of the table that is nearest to each distance, on a log scale."""
    scale = (LEVELS - 1) / np.log(FAR / NEAR)
    level = (np.log(np.maximum(distance, NEAR) / NEAR) * scale + 0.5).astype(np.int32)
    return np.clip(level, 0, LEVELS - 1)


@cache
def tables(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the flat texel tables (surfaces, billboards) for screens of `size` pixels.

    Surfaces: (2 * 3 wall pictures + 2) x LEVELS x TEXELS x TEXELS. Each wall picture appears twice:
    seen while looking east or west, then darker, while looking north or south. Floor and ceiling
    follow. Billboards: 3 x LEVELS x TEXELS x TEXELS, 0 where transparent.
    """
    rng = np.random.default_rng(0)
    distances = NEAR * (FAR / NEAR) ** (np.arange(LEVELS) / (LEVELS - 1))
    footprint = TEXELS * distances * 2 * HALF_VIEW / (size * FINE)  # texels between two rays
    shade = 1 / (1 + (FOG * distances) ** 1.5)
    walls, planes = wall_pictures(rng), (floor_picture(rng), ceiling_picture(rng))
    surfaces = []
    for wall in walls:
        for side in (1.0, 0.72):
            for f, s in zip(footprint, shade):
                surfaces.append(blur(wall, 0.4 * f, 0.6 * f) * side * s)
    for plane in planes:
        for d, f, s in zip(distances, footprint, shade):
            # Seen at a slant, the footprint is d / EYE times as long as wide: use the
            # geometric mean of both.
            width = 0.5 * f * np.sqrt(d / EYE)
            surfaces.append(blur(plane, width, width) * s)
    sprites = []
    for color, opaque in billboards():
        for s in shade:
            sprites.append(np.where(opaque, pack(color * s) | OPAQUE, 0))
    return pack(np.stack(surfaces)).reshape(-1), np.stack(sprites).astype(np.uint32).reshape(-1)


# --------------------------------------------------------------------------------------------- rays
def rays(heading: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ray through each screen column, left to right, one unit deep.

    heading: (F,). Returns the east and north components, each (F, size).
    """
    c, s = np.cos(heading)[:, None], np.sin(heading)[:, None]
    right = across(size)
    return c + s * right, s - c * right


def across(size: int) -> np.ndarray:
    """Return column (or row) centres (size,) as tangents: positive to the right (down)."""
    return (((np.arange(size) + 0.5) / size * 2 - 1) * HALF_VIEW).astype(np.float32)


def cast(
    open: np.ndarray, x: np.ndarray, y: np.ndarray, rx: np.ndarray, ry: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Follow rays (N,) from cell to cell until each hits a wall (digital differential analyser).

    Returns the distance in multiples of the ray's length, and the wall as a flat index into
    (4, n, n).
    """
    n = open.shape[1]
    shut = ~open.reshape(-1)
    distance, wall = np.empty(len(x), np.float32), np.empty(len(x), np.int32)
    cell = x.astype(np.int32) * n + y.astype(np.int32)
    east, north = rx > 0, ry > 0
    # Distance along the ray between two grid lines of x, and of y.
    each_x = 1 / np.maximum(abs(rx), 1e-9)
    each_y = 1 / np.maximum(abs(ry), 1e-9)
    # to_x, to_y: distance to the next grid line of x, and of y. The nearer one is crossed first.
    fx, fy = x - np.floor(x), y - np.floor(y)
    to_x, to_y = np.where(east, 1 - fx, fx) * each_x, np.where(north, 1 - fy, fy) * each_y
    face_x, face_y = np.where(east, EAST, WEST) * n * n, np.where(north, NORTH, SOUTH) * n * n
    step_x, step_y = np.where(east, n, -n), np.where(north, 1, -1)
    ray = np.arange(len(x))
    while len(ray):
        sideways = to_x < to_y
        face = np.where(sideways, face_x, face_y) + cell
        hit = shut[face]
        distance[ray[hit]] = np.minimum(to_x, to_y)[hit]
        wall[ray[hit]] = face[hit]
        cell = cell + np.where(sideways, step_x, step_y)
        to_x, to_y = to_x + each_x * sideways, to_y + each_y * ~sideways
        # Keep only the rays that have not hit a wall.
        ray, cell, to_x, to_y, each_x, each_y, face_x, face_y, step_x, step_y = (
            part[~hit]
            for part in (ray, cell, to_x, to_y, each_x, each_y, face_x, face_y, step_x, step_y)
        )
    return distance, wall


# ------------------------------------------------------------------------------------------ drawing
def render(scene: Scene, poses: np.ndarray, light: np.ndarray, size: int = 64) -> np.ndarray:
    """Render frames (F, size, size, 3) uint8.

    poses: (F, 3) float32, x, y, heading; light: (F,) in [0, 1]. A frame does not depend on the
    other frames of the batch.
    """
    F, S = len(poses), size * FINE
    x, y = poses[:, :1], poses[:, 1:2]
    rx, ry = rays(poses[:, 2], S)
    # One ray per column: walls are vertical, so all pixels of a column see the same wall.
    flat = [np.broadcast_to(part, rx.shape).reshape(-1) for part in (x, y, rx, ry)]
    distance, wall = (part.reshape(F, S) for part in cast(scene.open, *flat))
    canvas = np.empty((F, S, S), np.uint32)
    draw_surfaces(canvas, scene, x, y, rx, ry, distance, wall)
    draw_sprites(canvas, scene.sprites, poses, distance)
    total = canvas[:, 0::2] + canvas[:, 1::2]
    # The sum of four texels has ten bits per channel; the shifts divide by four.
    total = total[..., 0::2] + total[..., 1::2]
    frames = np.stack([(total >> shift).astype(np.uint8) for shift in (22, 12, 2)], -1)
    dim = light < 1
    frames[dim] = (frames[dim] * light[dim, None, None, None]).astype(np.uint8)
    return frames


def draw_surfaces(canvas: np.ndarray, scene: Scene, x, y, rx, ry, distance, wall) -> None:
    """Draw walls, floor and ceiling.

    The upper half of the screen mirrors the geometry of the lower half, so the texel positions are
    computed once.
    """
    F, S, _ = canvas.shape
    surfaces = tables(S // FINE)[0]
    n, page = scene.open.shape[1], TEXELS * TEXELS
    facing = wall // (n * n)
    # Position along the wall, from left to right for the viewer.
    along = np.where(facing % 2 == EAST, y + distance * ry, x + distance * rx)
    along = np.where((facing == EAST) | (facing == SOUTH), -along, along)
    # Wall pictures come in pairs in the table: bright for east and west, dark for north and south.
    kind = scene.pictures.reshape(-1)[wall].astype(np.int32) * 2 + facing % 2
    texel = np.floor(along * TEXELS).astype(np.int32) & (TEXELS - 1)
    column = (kind * LEVELS + level_of(distance)) * page + texel
    down = across(S)[S // 2 :, None]  # tangents below the horizon
    drop = down * distance[:, None]  # (F, S/2, S): height of the eye above the hit point
    # A ray that falls below the eye's height before the wall hits the floor, `reach` units ahead.
    on_wall = drop < EYE
    reach = EYE / down
    u = ((x[..., None] + reach * rx[:, None]) * TEXELS).astype(np.int32) & (TEXELS - 1)
    v = ((y[..., None] + reach * ry[:, None]) * TEXELS).astype(np.int32) & (TEXELS - 1)
    plane = v * TEXELS + u + (2 * 3 * LEVELS + level_of(reach)) * page
    row = (np.minimum(EYE + drop, 0.999) * TEXELS).astype(np.int32)
    below = np.where(on_wall, row * TEXELS + column[:, None], plane)
    canvas[:, S // 2 :] = surfaces[below]
    # The ceiling follows the floor in the table.
    plane += LEVELS * page
    row = (np.maximum(EYE - drop, 0) * TEXELS).astype(np.int32)
    above = np.where(on_wall, row * TEXELS + column[:, None], plane)
    canvas[:, S // 2 - 1 :: -1] = surfaces[above]


def draw_sprites(
    canvas: np.ndarray, sprites: np.ndarray, poses: np.ndarray, walls: np.ndarray
) -> None:
    """Draw billboards, which face the screen, from far to near, except behind walls.

    walls: (F, S), the distance of the wall in each column.
    """
    c, s = np.cos(poses[:, 2:]), np.sin(poses[:, 2:])
    dx, dy = sprites[:, 0] - poses[:, :1], sprites[:, 1] - poses[:, 1:2]
    ahead, right = c * dx + s * dy, s * dx - c * dy  # (F, B)
    seen = (ahead > SPRITE_NEAR) & (abs(right) - sprites[:, 3] / 2 < HALF_VIEW * ahead)
    order = np.argsort(-ahead, axis=1, kind="stable")
    # In step n, draw the n-th farthest billboard of every frame; these differ between frames.
    for nth in order.T:
        frames = np.flatnonzero(np.take_along_axis(seen, nth[:, None], 1)[:, 0])
        if len(frames):
            chosen = nth[frames]
            depth, side = ahead[frames, chosen], right[frames, chosen]
            draw_sprite(canvas, frames, sprites[chosen], depth, side, walls)


def draw_sprite(
    canvas: np.ndarray,
    frames: np.ndarray,
    sprites: np.ndarray,
    ahead: np.ndarray,
    right: np.ndarray,
    walls: np.ndarray,
) -> None:
    """Draw one billboard into each of `frames`."""
    S = canvas.shape[1]
    # Texture coordinates of each screen column (u) and row (v), in [0, 1) within the billboard.
    line, size = across(S), sprites[:, 3:4]
    u = (line * ahead[:, None] - right[:, None]) / size + 0.5
    v = (line * ahead[:, None] - (EYE - sprites[:, 2:3])) / size + 0.5
    columns = (u >= 0) & (u < 1) & (ahead[:, None] < walls[frames])
    some = np.flatnonzero(columns.any(1))
    if not len(some):
        return
    frames, columns, rows = frames[some], columns[some], (v[some] >= 0) & (v[some] < 1)
    u, v = (np.clip((part[some] * TEXELS).astype(np.int32), 0, TEXELS - 1) for part in (u, v))
    page = (sprites[some, 4].astype(np.int32) * LEVELS + level_of(ahead[some])) * (TEXELS * TEXELS)
    texels = tables(S // FINE)[1][page[:, None, None] + v[:, :, None] * TEXELS + u[:, None]]
    there = (texels >= OPAQUE) & columns[:, None] & rows[..., None]
    canvas[frames] = np.where(there, texels & (OPAQUE - 1), canvas[frames])
