"""Faces turned upright and brought to one size by five landmarks: dlib's aligned face chip, byte for byte.

dlib (davisking/dlib, ``extract_image_chips``) fits a rotated square to the landmarks, halves a large picture until the square is
no more than twice the chip, and samples it bilinearly. The numbers below are its own; tests compare every byte with dlib's.
Coordinates may differ in the last of 53 bits: in about 2 of 1,000 chips that makes one byte one grey level brighter or darker.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from featurestore.keys import LANDMARKS, Place
from featurestore.photos.decode import ImageError

PADDING = 0.25  # of the face's square, added on each side: what dlib's face network was trained on
# Where the landmarks, in the order of LANDMARKS, are in a square face without padding (x, y).
_MEAN_FACE = np.array([
    [0.8595674595992, 0.2134981538014],
    [0.6460604764104, 0.2289674387677],
    [0.1205750620789, 0.2137274526848],
    [0.3340850613712, 0.2290642403242],
    [0.4901123135679, 0.6277975316475],
])  # fmt: skip
_BINOMIAL = np.array([1, 4, 6, 4, 1], np.float32)
_LEAST_HALVED = 9  # pixels: dlib makes nothing of a smaller picture


@dataclass(frozen=True)
class _Square:
    """A rotated square in a picture: its centre, its angle in radians, and the distance between its corner pixels."""

    x: float
    y: float
    angle: float
    side: float


def face_chip(rgb: np.ndarray, landmarks: Place, size: int) -> np.ndarray:
    """uint8 RGB (height, width, 3) to the aligned face, uint8 RGB (size, size, 3); black where it reaches outside the picture.

    ``landmarks`` are the ten numbers of ``LANDMARKS`` in pixels. Raises ImageError where they are outside the picture, or
    the same point, so that they say neither a size nor an angle.
    """
    square, levels = _found_square(rgb.shape[0], rgb.shape[1], landmarks, size)
    left, top, right, bottom = _reach(rgb.shape[0], rgb.shape[1], square, levels)
    picture, square = rgb[top : bottom + 1, left : right + 1], _moved(square, left, top)
    for _ in range(levels):
        picture, square = _halve(picture), _halved(square)
    return _sample(picture, square, size)


def chip_to_photograph(height: int, width: int, landmarks: Place, size: int) -> np.ndarray:
    """(2, 3) float64: (x, y, 1) of a chip's pixel to pixels of the picture of that size which the chip is made of.

    Raises ImageError as ``face_chip``.
    """
    square, levels = _found_square(height, width, landmarks, size)
    left, top, _, _ = _reach(height, width, square, levels)
    square = _moved(square, left, top)
    for _ in range(levels):
        square = _halved(square)
    x, y, right, down = square.x, square.y, *_step(square, size)
    for _ in range(levels):
        x, y, right, down = 2 * x + 2, 2 * y + 2, 2 * right, 2 * down
    turn, middle = np.array([[right, -down], [down, right]]), (size - 1) / 2
    return np.column_stack([turn, [x + left, y + top] - turn @ [middle, middle]])


def _found_square(height: int, width: int, landmarks: Place, size: int) -> tuple[_Square, int]:
    """The face's square, and how often the picture is halved; ImageError for landmarks that cannot be."""
    points = np.asarray(landmarks, np.float64).reshape(5, 2)
    outside = [i for i, (x, y) in enumerate(points) if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5)]
    if outside:
        x, y = points[outside[0]]
        raise ImageError(
            f"the landmark {LANDMARKS[2 * outside[0]][:-2]} ({x:g}, {y:g}) is outside the picture of {width} × {height}"
        )
    square = _face_square(points, size)
    if square.side < 1:
        raise ImageError(
            f"the five landmarks near ({points[0, 0]:g}, {points[0, 1]:g}) are too close together to align a face"
        )
    levels = 0
    while square.side / 2 ** (levels + 1) > size - 1:
        levels += 1
    return square, levels


def _face_square(points: np.ndarray, size: int) -> _Square:
    """The least-squares similarity from the mean face in a chip to the landmarks, as the square that the chip becomes."""
    mean = size * (PADDING + _MEAN_FACE) / (1 + 2 * PADDING)
    target, face = mean @ [1, 1j], points @ [1, 1j]
    from_centre = target - target.mean()
    turn = (from_centre.conj() * (face - face.mean())).sum() / (np.abs(from_centre) ** 2).sum()
    centre = face.mean() + turn * (size / 2 * (1 + 1j) - target.mean())
    return _Square(centre.real, centre.imag, math.atan2(turn.imag, turn.real), size * abs(turn) - 1)


def _reach(height: int, width: int, square: _Square, levels: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is read; which rows and columns survive halving depends on where it begins."""
    grown = 2 ** (levels + 2) - 2  # 2, 6, 14 … pixels: what the filters of all levels reach
    reach = square.side / 2 * (abs(math.cos(square.angle)) + abs(math.sin(square.angle))) + grown
    left, right = (_rounded(min(max(x, 0), width - 1)) for x in (square.x - reach, square.x + reach))
    top, bottom = (_rounded(min(max(y, 0), height - 1)) for y in (square.y - reach, square.y + reach))
    return left, top, right, bottom


def _moved(square: _Square, left: int, top: int) -> _Square:
    return replace(square, x=square.x - left, y=square.y - top)


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _halved(square: _Square) -> _Square:
    """Where it is in the halved picture: moved by dlib's −1.25 and −0.75 pixels, where −1 each would be exact."""
    return _Square(square.x / 2 - 1.25, square.y / 2 - 0.75, square.angle, square.side / 2)


def _halve(picture: np.ndarray) -> np.ndarray:
    """Half the size by a binomial filter, in whole numbers; pixel i is centred on pixel 2i + 2."""
    height, width = picture.shape[:2]
    if min(height, width) < _LEAST_HALVED:
        return picture[:0, :0]
    sums = cv2.sepFilter2D(picture, cv2.CV_32F, _BINOMIAL, _BINOMIAL)  # exact: at most 255 × 256
    sums = sums[2 : 2 * ((height - 3) // 2) + 1 : 2, 2 : 2 * ((width - 3) // 2) + 1 : 2]
    return (sums / 256).astype(np.uint8)


def _step(square: _Square, size: int) -> tuple[float, float]:
    """From one pixel of the chip to the next one on its right: how far right and down in the picture."""
    step = square.side / (size - 1) if size > 1 else 0.0
    return step * math.cos(square.angle), step * math.sin(square.angle)


def _sample(picture: np.ndarray, square: _Square, size: int) -> np.ndarray:
    """Bilinear and truncated; black where one of the four pixels is outside."""
    chip = np.zeros((size, size, 3), np.uint8)
    right, down = _step(square, size)
    along = np.arange(size) - (size - 1) / 2
    x = square.x + right * along[None, :] - down * along[:, None]
    y = square.y + down * along[None, :] + right * along[:, None]
    left, top = np.floor(x), np.floor(y)
    height, width = picture.shape[:2]
    inside = (left >= 0) & (top >= 0) & (left + 1 < width) & (top + 1 < height)
    if not inside.any():
        return chip
    x, y, left, top = x[inside], y[inside], left[inside], top[inside]
    across, along_y = (x - left)[:, None], (y - top)[:, None]
    first = top.astype(np.int64) * width + left.astype(np.int64)
    flat = np.ascontiguousarray(picture).reshape(-1, 3)
    upper = (1 - across) * flat[first] + across * flat[first + 1]
    lower = (1 - across) * flat[first + width] + across * flat[first + width + 1]
    chip[inside] = ((1 - along_y) * upper + along_y * lower).astype(np.uint8)
    return chip
