"""Rendered heads to try everything on: no photographs of people, no download, the same from the same seed.

A face is a vector of 14 traits. Geometry and colouring are functions of the traits, so a face looks like itself from
every side; simulated observers compare the traits, so the best accuracy anyone can reach on their choices is known.
Lengths are in head half-heights: the chin is at y = -1, the crown at y = 1, the viewer looks along -z.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

TRAITS = (
    "face_width", "jaw", "chin", "cheeks", "brow", "eye_distance", "eye_size",
    "nose_length", "nose_width", "mouth_width", "lips", "skin", "hair_tone", "hair_length",
)  # fmt: skip
SIZE = 224  # pixels, after supersampling
_SUPER = 320
_FLOAT = np.float32


@dataclass(frozen=True)
class Face:
    """One identity: its key, its traits (standard normal values in the order of TRAITS), a gender-like attribute."""

    face_id: str
    traits: np.ndarray
    gender: str

    def __getitem__(self, trait: str) -> float:
        return float(np.clip(self.traits[TRAITS.index(trait)], -2.2, 2.2))


@dataclass(frozen=True)
class Surface:
    """Points of a face in its own frame: positions and unit normals (n, 3), colours (n, 3) in 0 … 1, gloss (n,)."""

    points: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    gloss: np.ndarray


def draw_faces(n: int, seed: int) -> list[Face]:
    """``n`` identities from one seed; the first faces are the same however many are drawn."""
    faces = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        traits = rng.standard_normal(len(TRAITS))
        gender = "female" if rng.random() < 0.5 else "male"
        shift = {"jaw": 0.9, "brow": 0.9, "chin": 0.4, "lips": -0.6, "hair_length": -1.2}
        for trait, amount in shift.items():
            traits[TRAITS.index(trait)] += amount if gender == "male" else -amount
        faces.append(Face(f"face-{i + 1:03d}", traits, gender))
    return faces


def yaw_angles(views: int) -> list[float]:
    """``views`` yaw angles in degrees from -60 to 60, the frontal one among them."""
    if views == 1:
        return [0.0]
    half = views // 2
    right = [60.0 * (i + 1) / half for i in range(half)]
    left = right if views % 2 else right[:-1]
    return [-angle for angle in reversed(left)] + [0.0] + right


def _bump(x: np.ndarray, y: np.ndarray, at: tuple[float, float], size: tuple[float, float]) -> np.ndarray:
    return np.exp(-(((x - at[0]) / size[0]) ** 2) - ((y - at[1]) / size[1]) ** 2)


def _step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _sphere(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    elevation = np.linspace(-np.pi / 2, np.pi / 2, rows, dtype=_FLOAT)[:, None]
    azimuth = np.linspace(-np.pi, np.pi, columns, dtype=_FLOAT)[None, :]
    grids = np.broadcast_arrays(elevation, azimuth)
    return grids[0], grids[1]


def _surface(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, colours: np.ndarray, gloss: np.ndarray, keep: np.ndarray
) -> Surface:
    """Grid positions to a Surface; normals from the grid's own tangents, outward because rows go up and columns right."""
    grid = np.stack([x, y, z], axis=-1).astype(_FLOAT)
    normals = np.cross(np.gradient(grid, axis=1), np.gradient(grid, axis=0))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9
    return Surface(
        grid[keep], normals[keep], np.broadcast_to(colours, grid.shape)[keep], np.broadcast_to(gloss, x.shape)[keep]
    )


def _mix(base: np.ndarray, colour: np.ndarray | tuple[float, float, float], amount: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = base + (np.asarray(colour, _FLOAT) - base) * np.clip(amount, 0, 1)[..., None]
    return mixed


def _skin_colour(face: Face) -> np.ndarray:
    t = (face["skin"] + 2.2) / 4.4
    tones = np.array([[0.36, 0.23, 0.17], [0.62, 0.43, 0.32], [0.83, 0.64, 0.53], [0.94, 0.80, 0.72]], _FLOAT)
    return np.array([np.interp(t * 3, range(4), tones[:, c]) for c in range(3)], _FLOAT)


def _hair_colour(face: Face) -> np.ndarray:
    t = (face["hair_tone"] + 2.2) / 4.4
    tones = np.array([[0.06, 0.05, 0.05], [0.22, 0.13, 0.08], [0.45, 0.25, 0.12], [0.78, 0.62, 0.36]], _FLOAT)
    return np.array([np.interp(t * 3, range(4), tones[:, c]) for c in range(3)], _FLOAT)


def build(face: Face) -> Surface:
    """All surfaces of a face: head with its features, hair, ears, neck, shoulders."""
    parts = [_head(face), *_ears(face), _neck(face), _shoulders(face)]
    if face["hair_length"] > -0.2:
        parts.append(_long_hair(face))
    return _join(parts)


def _join(parts: list[Surface]) -> Surface:
    return Surface(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("points", "normals", "colours", "gloss"))
    )


def _widths(face: Face) -> tuple[float, float]:
    return 0.70 + 0.05 * face["face_width"], 0.86


def _head_shape(face: Face) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Azimuth, how far a point looks forward (-1 … 1), x, y, z, and how much it belongs to the front (0 … 1), on one grid."""
    elevation, azimuth = _sphere(260, 500)
    width, depth = _widths(face)
    forward = np.cos(elevation) * np.cos(azimuth)
    x = width * np.cos(elevation) * np.sin(azimuth)
    y = np.sin(elevation)
    z = depth * np.sign(forward) * np.abs(forward) ** 0.82  # a face is flatter than an ellipsoid
    low = np.clip(-y, 0, 1)
    x = x * (1 - (0.34 - 0.07 * face["jaw"]) * low**1.6)
    z = z - 0.10 * low**2 * (forward < 0)
    front = _step(forward, 0.02, 0.35)
    return azimuth, forward, x, y, z + front * _relief(face, x, y), front


def _head(face: Face) -> Surface:
    azimuth, forward, x, y, z, front = _head_shape(face)
    colours, gloss = _complexion(face, x, y, front)
    hair, thickness, sheen = _short_hair(face, x, y, forward, azimuth)
    colours = colours + (sheen - colours) * hair[..., None]
    scale = 1 + thickness
    return _surface(x * scale, y * scale, z * scale, colours, gloss * (1 - hair) + 0.25 * hair, np.ones(x.shape, bool))


def places(face: Face, yaws: list[float]) -> list[tuple[list[int], list[int]]]:
    """Where a face is in its picture at each yaw, in whole pixels: its box and its landmarks.

    The box is left, top, width and height, from the brows to the chin. The landmarks are x and y of five points: the outer and
    inner corner of the eye on the picture's right, those of the eye on its left, the tip of the nose.
    """
    _, forward, x, y, z, _ = _head_shape(face)
    points = np.stack([x, y, z], axis=-1)[forward > 0.1]
    eye, half = 0.285 + 0.022 * face["eye_distance"], 0.108 * (1 + 0.12 * face["eye_size"])
    tip = -0.265 - 0.030 * face["nose_length"]
    wanted = [(eye + half, 0.08), (eye - half, 0.08), (-eye - half, 0.08), (-eye + half, 0.08), (0, tip)]
    nearest = [int(np.square(points[:, :2] - point).sum(axis=1).argmin()) for point in wanted]
    corners, outline = points[nearest], points[points[:, 1] < 0.4][::8]
    found = []
    for yaw in yaws:
        turned = outline @ _turn(yaw).T
        seen = _pixels(turned[turned[:, 2] > 0])
        left, top, right, bottom = np.round([*seen.min(axis=0), *seen.max(axis=0)]).astype(int).tolist()
        landmarks = np.round(_pixels(corners @ _turn(yaw).T)).astype(int).ravel().tolist()
        found.append(([left, top, right - left, bottom - top], landmarks))
    return found


def _pixels(points: np.ndarray) -> np.ndarray:
    """Points of a turned head (n, 3) in its picture (n, 2)."""
    return np.stack(_projected(points), axis=-1) * (SIZE / _SUPER)


def _relief(face: Face, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far features stand out of the front of the head."""
    side = np.abs(x)
    eye = 0.285 + 0.022 * face["eye_distance"]
    size = 1 + 0.10 * face["eye_size"]
    tip = -0.20 - 0.030 * face["nose_length"]
    nose = 1 + 0.17 * face["nose_width"]
    ridge = np.exp(-((x / (0.075 * nose)) ** 2)) * _step(y, 0.20, tip) * _step(y, tip - 0.10, tip + 0.02)
    mouth = 0.21 + 0.022 * face["mouth_width"]
    lips = 1 + 0.28 * face["lips"]
    across = np.exp(-((x / mouth) ** 4))
    relief: np.ndarray = (
        (0.135 + 0.016 * face["nose_length"]) * ridge
        + 0.065 * _bump(x, y, (0, tip), (0.085 * nose, 0.075))
        + 0.055 * _bump(side, y, (0.105 * nose, tip - 0.02), (0.05 * nose, 0.055))
        - 0.075 * _bump(side, y, (eye, 0.08), (0.15, 0.10))
        + 0.045 * _bump(side, y, (eye, 0.08), (0.095 * size, 0.06 * size))
        + (0.035 + 0.016 * face["brow"]) * _bump(side, y, (0.27, 0.235), (0.21, 0.06))
        + (0.045 + 0.025 * face["cheeks"]) * _bump(side, y, (0.43, -0.14), (0.17, 0.14))
        + 0.050 * _bump(x, y, (0, -0.47), (0.26, 0.15))
        + 0.030 * lips * across * np.exp(-(((y + 0.445) / 0.034) ** 2))
        + 0.040 * lips * across * np.exp(-(((y + 0.535) / 0.042) ** 2))
        - 0.030 * across * np.exp(-(((y + 0.488) / 0.014) ** 2))
        - 0.020 * np.exp(-((x / 0.03) ** 2)) * _bump(x, y, (0, -0.36), (0.05, 0.05))
        + (0.055 + 0.025 * face["chin"]) * _bump(x, y, (0, -0.80), (0.17, 0.13))
    )
    return relief


def _complexion(face: Face, x: np.ndarray, y: np.ndarray, front: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours and gloss of the skin, eyes, brows and lips."""
    skin, hair = _skin_colour(face), _hair_colour(face)
    side = np.abs(x)
    colours = np.broadcast_to(skin, (*x.shape, 3)).astype(_FLOAT)
    gloss = np.full(x.shape, 0.16, _FLOAT)
    warm = skin * np.array([1.06, 0.86, 0.84], _FLOAT)
    colours = _mix(
        colours,
        warm,
        0.7 * front * (_bump(side, y, (0.42, -0.16), (0.17, 0.14)) + _bump(x, y, (0, -0.22), (0.10, 0.09))),
    )
    if face.gender == "male":
        beard = _step(-y, 0.25, 0.5) * front * (1 - _bump(x, y, (0, -0.49), (0.2, 0.07)))
        colours = _mix(colours, 0.5 * skin + 0.35 * hair, 0.38 * beard)
    mouth = 0.21 + 0.022 * face["mouth_width"]
    lips = 1 + 0.22 * face["lips"]
    middle = -0.488 + 0.012 * np.cos(x / mouth * 3.0)
    open_shape = np.clip(1 - (x / mouth) ** 2, 0, 1)
    above = (y - middle) / (0.062 * lips * open_shape + 1e-3)
    below = (middle - y) / (0.085 * lips * open_shape**0.7 + 1e-3)
    red = front * (side < mouth) * _step(1 - np.maximum(above, below), 0.0, 0.25)
    lip = skin * np.array([0.92, 0.58, 0.58], _FLOAT)
    colours = _mix(colours, lip, red)
    colours = _mix(colours, lip * 0.32, front * (side < mouth) * np.exp(-(((y - middle) / 0.011) ** 2)))
    gloss = gloss + 0.2 * red
    nose = 1 + 0.17 * face["nose_width"]
    tip = -0.20 - 0.030 * face["nose_length"]
    nostril = _bump(side, y, (0.055 * nose, tip - 0.065), (0.030 * nose, 0.017))
    colours = _mix(colours, skin * 0.28, 0.9 * front * nostril)
    colours, gloss = _eyes(face, x, y, front, colours, gloss)
    eye = 0.285 + 0.022 * face["eye_distance"]
    arch = 0.245 + 0.02 * face["eye_size"] - 0.9 * (side - eye - 0.02) ** 2
    thick = 0.024 + 0.007 * face["brow"]
    brow = front * _step(0.165 - np.abs(side - eye - 0.01), 0, 0.05) * np.exp(-(((y - arch) / thick) ** 2))
    return _mix(colours, hair * 0.75, 0.92 * brow), gloss


def _eyes(
    face: Face, x: np.ndarray, y: np.ndarray, front: np.ndarray, colours: np.ndarray, gloss: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    side = np.abs(x)
    eye = 0.285 + 0.022 * face["eye_distance"]
    size = 1 + 0.12 * face["eye_size"]
    u, v = (side - eye) / (0.108 * size), (y - 0.08) / (0.058 * size)
    lid = np.clip(1 - u**2, 0, 1)
    inside = front * (np.abs(u) < 1) * _step(lid - np.where(v > 0, np.abs(v), 1.25 * np.abs(v)), 0, 0.16)
    colours = _mix(colours, (0.93, 0.92, 0.90), inside)
    radius = np.hypot((side - eye) / size, (y - 0.083) / size)
    # One iris colour for a face, from traits that are otherwise unrelated to it.
    tones = np.array([[0.16, 0.09, 0.05], [0.30, 0.20, 0.10], [0.28, 0.38, 0.26], [0.25, 0.40, 0.55]], _FLOAT)
    iris = tones[int(np.clip((face["skin"] + face["hair_tone"]) * 0.7 + 1.5, 0, 3))]
    colours = _mix(colours, iris, inside * _step(0.052 - radius, 0, 0.010))
    colours = _mix(colours, iris * 0.4, inside * np.exp(-(((radius - 0.050) / 0.006) ** 2)))
    colours = _mix(colours, (0.02, 0.02, 0.02), inside * _step(0.024 - radius, 0, 0.008))
    glint = np.hypot(x - np.sign(x) * eye + 0.018, y - 0.105)
    colours = _mix(colours, (1, 1, 1), inside * _step(0.013 - glint, 0, 0.006))
    upper = front * (np.abs(u) < 1.05) * np.exp(-(((v - lid) / 0.16) ** 2))
    lash = 0.55 if face.gender == "male" else 0.95
    colours = _mix(colours, (0.08, 0.05, 0.04), lash * upper)
    crease = front * (np.abs(u) < 1.1) * np.exp(-(((v - lid - 0.62) / 0.16) ** 2))
    return _mix(colours, _skin_colour(face) * 0.62, 0.5 * crease), gloss + 0.5 * inside


def _short_hair(
    face: Face, x: np.ndarray, y: np.ndarray, forward: np.ndarray, azimuth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where hair grows on the head (0 … 1), how thick it is, and its colour with strands."""
    line = 0.60 + 0.05 * face["chin"] - 0.35 * np.clip(np.abs(x) - 0.34, 0, 1) ** 2 * 6
    edge = line + (-0.50 - line) * _step(-forward, -0.30, 0.05)
    fringe = 0.022 * np.sin(x * 41 + 7 * face["hair_tone"]) + 0.012 * np.sin(x * 97)
    hair = _step(y - edge - fringe * (forward > 0), 0, 0.05)
    strands = np.sin(azimuth * 130 + 5 * np.sin(y * 6)) * 0.5 + np.sin(azimuth * 61 + 3 * y) * 0.5
    thickness = hair * (0.055 + 0.022 * face["hair_length"] + 0.006 * strands)
    colour = _hair_colour(face) * (1 + 0.30 * strands[..., None])
    return hair, np.maximum(thickness, 0.01 * hair), np.clip(colour, 0, 1).astype(_FLOAT)


def _long_hair(face: Face) -> Surface:
    """A curtain of hair around the sides and back, open in front."""
    length = 0.45 + 0.42 * face["hair_length"]
    rows, columns = 170, 300
    y = np.linspace(-length - 0.35, 0.62, rows, dtype=_FLOAT)[:, None]
    azimuth = np.linspace(0.33 * np.pi, 1.67 * np.pi, columns, dtype=_FLOAT)[None, :]
    y, azimuth = np.broadcast_arrays(y, azimuth)
    width, depth = _widths(face)
    strands = np.sin(azimuth * 90 + 4 * np.sin(y * 5)) * 0.5 + np.sin(azimuth * 47 + 4 * y) * 0.5
    fall = np.sqrt(np.clip(1 - (np.clip(y, 0, 1)) ** 2, 0.05, 1)) * (
        1.12 + 0.012 * strands + 0.03 * _step(-y, -0.2, 0.8)
    )
    x, z = width * fall * np.sin(azimuth), depth * fall * np.cos(azimuth)
    colour = np.clip(_hair_colour(face) * (1 + 0.30 * strands[..., None]), 0, 1)
    ends = -length - 0.25 + 0.05 * np.sin(azimuth * 23) + 0.03 * np.sin(azimuth * 51)
    outside = _surface(x, y, z, colour, np.full(x.shape, 0.25), y > ends)
    inside = Surface(outside.points * 0.98, -outside.normals, outside.colours * 0.55, outside.gloss * 0)
    return _join([outside, inside])


def _ellipsoid(
    at: tuple[float, float, float], radii: tuple[float, float, float], colour: np.ndarray, n: int, gloss: float
) -> Surface:
    elevation, azimuth = _sphere(n, 2 * n)
    x = at[0] + radii[0] * np.cos(elevation) * np.sin(azimuth)
    y = at[1] + radii[1] * np.sin(elevation)
    z = at[2] + radii[2] * np.cos(elevation) * np.cos(azimuth)
    return _surface(x, y, z, np.broadcast_to(colour, (*x.shape, 3)), np.full(x.shape, gloss), np.ones(x.shape, bool))


def _ears(face: Face) -> Iterator[Surface]:
    width, _ = _widths(face)
    skin = _skin_colour(face)
    for sign in (-1, 1):
        yield _ellipsoid((sign * (width + 0.005), 0.0, -0.04), (0.065, 0.19, 0.11), skin * 0.94, 50, 0.12)


def _neck(face: Face) -> Surface:
    y = np.linspace(-1.55, -0.45, 90, dtype=_FLOAT)[:, None]
    azimuth = np.linspace(-np.pi, np.pi, 220, dtype=_FLOAT)[None, :]
    y, azimuth = np.broadcast_arrays(y, azimuth)
    radius = 0.37 + 0.03 * face["jaw"] + 0.10 * _step(-y, 1.15, 1.55)
    x, z = radius * np.sin(azimuth), radius * np.cos(azimuth) - 0.16
    shade = 0.78 + 0.22 * _step(-y, 0.75, 1.25)  # under the chin
    return _surface(x, y, z, _skin_colour(face) * shade[..., None], np.full(x.shape, 0.1), np.ones(x.shape, bool))


def _shoulders(face: Face) -> Surface:
    rng = np.random.default_rng(int(face.face_id.rpartition("-")[2]))
    cloth = 0.25 + 0.35 * rng.random(3)
    return _ellipsoid((0, -1.92, -0.2), (1.25, 0.55, 0.55), cloth, 150, 0.03)


def _turn(yaw: float) -> np.ndarray:
    """The rotation by ``yaw`` degrees round the vertical."""
    angle = np.deg2rad(yaw)
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]], _FLOAT)


def _projected(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of points in a _SUPER-sized picture."""
    perspective = 1 / (1 - 0.10 * points[:, 2])
    scale = _SUPER / 2.62
    return _SUPER / 2 + scale * points[:, 0] * perspective, _SUPER * 0.465 - scale * points[:, 1] * perspective


def render(surface: Surface, yaw: float, background: float = 0.55) -> np.ndarray:
    """uint8 RGB (SIZE, SIZE, 3) of a surface turned by ``yaw`` degrees, lit from above left of the camera."""
    turn = _turn(yaw)
    normals = surface.normals @ turn.T
    facing = np.flatnonzero(normals[:, 2] > -0.05)
    points = surface.points[facing] @ turn.T
    nearest = _nearest_points(points)
    seen = nearest >= 0
    chosen = facing[nearest[seen]]
    down = np.linspace(1.12, 0.80, _SUPER, dtype=_FLOAT)[:, None, None]
    image = np.broadcast_to(background * down * np.array([0.93, 0.97, 1.02], _FLOAT), (_SUPER, _SUPER, 3)).copy()
    image[seen] = _shade(surface.colours[chosen], normals[chosen], surface.gloss[chosen])
    small = cv2.resize(np.clip(image, 0, 1), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return np.round(255 * small ** (1 / 1.15)).astype(np.uint8)


def _nearest_points(points: np.ndarray) -> np.ndarray:
    """Index of the point nearest to the camera at every pixel of a _SUPER-sized picture, -1 where there is none.

    Each point covers 2 × 2 pixels, so that a dense surface has no holes.
    """
    column, row = (value.astype(np.int32) for value in _projected(points))
    order = np.argsort(points[:, 2], kind="stable").astype(np.int32)
    order = order[(row[order] >= 0) & (row[order] < _SUPER - 1) & (column[order] >= 0) & (column[order] < _SUPER - 1)]
    flat = row[order] * _SUPER + column[order]
    depth = np.append(points[:, 2], -np.inf)
    best = np.full(_SUPER * _SUPER, -1, np.int32)
    for offset in (0, 1, _SUPER, _SUPER + 1):
        layer = np.full(_SUPER * _SUPER, -1, np.int32)
        layer[flat + offset] = order  # in order of depth, so the nearest stays
        nearer = depth[layer] > depth[best]
        best[nearer] = layer[nearer]
    return best.reshape(_SUPER, _SUPER)


def _shade(colours: np.ndarray, normals: np.ndarray, gloss: np.ndarray) -> np.ndarray:
    key = np.array([-0.45, 0.55, 0.70], _FLOAT)
    fill = np.array([0.75, 0.10, 0.65], _FLOAT)
    key, fill = key / np.linalg.norm(key), fill / np.linalg.norm(fill)
    # Wrapped diffuse light is softer than a bare cosine, as skin is.
    wrapped = np.clip((normals @ key + 0.25) / 1.25, 0, 1)
    diffuse = 0.30 + 0.72 * wrapped + 0.20 * np.clip(normals @ fill, 0, 1)
    half = key + np.array([0, 0, 1], _FLOAT)
    shine = np.clip(normals @ (half / np.linalg.norm(half)), 0, 1) ** 28
    rim = 1 - 0.25 * (1 - np.clip(normals[:, 2], 0, 1)) ** 3
    shaded: np.ndarray = colours * (diffuse * rim)[:, None] + (gloss * shine)[:, None]
    return shaded.astype(_FLOAT)
