"""Where a square's pixels are in the photograph: pictures whose colours say where each pixel is, through the recipes."""

import math

import numpy as np
import pytest

from featurestore.keys import LANDMARKS, Place
from featurestore.photos.chips import _MEAN_FACE, PADDING
from featurestore.photos.decode import ImageError
from featurestore.photos.geometry import chained, inverse, mirrored_place, moved, square_to_photograph
from featurestore.photos.recipes import Recipe

HEIGHT, WIDTH = 230, 200
LANDMARKS_HERE = tuple(np.array([[140, 95], [115, 100], [62, 80], [84, 88], [92, 140]], float).ravel())
BOX_HERE = (41.3, 60.8, 97.4, 120.2)


def recipe(resize: str, size: int = 48, **fields) -> Recipe:
    return Recipe(f"{resize}-{size}", size, resize, "RGB", (0.0, 0.0, 0.0), **fields)  # type: ignore[arg-type]


CASES: dict[str, tuple[Recipe, Place | None]] = {
    "cv2": (recipe("cv2"), None),
    "enlarged": (recipe("cv2", 300), None),
    "pil": (recipe("pil"), None),
    "pil, bicubic": (recipe("pil", interpolation="bicubic"), None),
    "pil-crop": (recipe("pil-crop", short_side=61), None),
    "cv2-crop": (recipe("cv2-crop", short_side=61), None),
    "box": (recipe("pil", box_margin=0.15), BOX_HERE),
    "box, outward": (recipe("cv2", box_margin=0.15, box_edges="outward"), BOX_HERE),
    "box over the edge": (recipe("cv2-crop", short_side=50, box_margin=0.3), (-10.0, 150.0, 90.0, 120.0)),
    "chip": (recipe("chip", 150), LANDMARKS_HERE),
    "chip, halved": (recipe("chip", 40), LANDMARKS_HERE),
    "chip, halved twice": (recipe("chip", 20), LANDMARKS_HERE),
}


def seen(recipe: Recipe, place: Place | None, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """(y, x, 2) of where each pixel of the square was in the photograph, and which saw nothing but the photograph's inside."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rising = np.stack([x, y, np.full_like(x, 255)], axis=2).astype(np.uint8)
    rising[[0, -1], :, 2] = rising[:, [0, -1], 2] = 0
    falling = rising.copy()
    falling[:, :, :2] = 255 - rising[:, :, :2]
    pictures = [each[:, ::-1].copy() if mirrored else each for each in (rising, falling)]
    one, other = (recipe.pixels(each, place).astype(float) for each in pictures)
    middle = (one + 255 - other) / 2  # what is lost by rounding down is lost on both sides
    return middle[:, :, :2], one[:, :, 2] == 255


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_pixels_are_where_the_recipe_takes_them_from(name: str, mirrored: bool) -> None:
    made, place = CASES[name]
    affine = square_to_photograph(made, HEIGHT, WIDTH, place, flipped=mirrored)
    there, inside = seen(made, mirrored_place(place, WIDTH) if mirrored else place, mirrored)
    inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = False  # where a box's edge is repeated, or cuts filters off
    assert inside.mean() > 0.3
    v, u = np.nonzero(inside)
    off = moved(affine, np.column_stack([u, v])) - there[inside]
    assert np.abs(off).max() < 1.0
    assert np.abs(off.mean(axis=0)).max() < 0.06


def test_by_hand() -> None:
    affine = square_to_photograph(recipe("cv2", 50), 100, 200)
    np.testing.assert_allclose(
        moved(affine, [[0, 0], [49, 49], [-0.5, -0.5]]), [[1.5, 0.5], [197.5, 98.5], [-0.5, -0.5]]
    )
    flipped = square_to_photograph(recipe("cv2", 50), 100, 200, flipped=True)
    np.testing.assert_allclose(moved(flipped, [[0, 0]]), [[197.5, 0.5]])
    cropped = square_to_photograph(recipe("pil-crop", 50, short_side=100), 100, 200)
    np.testing.assert_allclose(cropped, [[1, 0, 75], [0, 1, 25]])


@pytest.mark.parametrize("scale", [60, 150, 400])
def test_landmarks_are_where_the_mean_face_has_them(scale: int) -> None:
    turn = scale * np.array([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    points = _MEAN_FACE @ turn.T + scale
    affine = square_to_photograph(recipe("chip", 150), 3 * scale, 3 * scale, tuple(points.ravel()))
    expected = 150 * (PADDING + _MEAN_FACE) / (1 + 2 * PADDING)
    assert (
        np.abs(moved(inverse(affine), points) - expected).max() < 1.2
    )  # dlib's own half pixel, and its halves of more


def test_there_and_back() -> None:
    affine = square_to_photograph(*(CASES["chip"][0], HEIGHT, WIDTH, LANDMARKS_HERE))
    np.testing.assert_allclose(chained(inverse(affine), affine), [[1, 0, 0], [0, 1, 0]], atol=1e-9)


def test_places_that_cannot_be_cut_out() -> None:
    with pytest.raises(ImageError, match="holds nothing of a picture of 200 × 230"):
        square_to_photograph(recipe("pil", box_margin=0.0), HEIGHT, WIDTH, (300.0, 0.0, 20.0, 20.0))
    outside = (*LANDMARKS_HERE[:8], 500.0, 50.0)
    assert len(outside) == len(LANDMARKS)
    with pytest.raises(ImageError, match=r"the landmark nose .* is outside the picture of 200 × 230"):
        square_to_photograph(recipe("chip"), HEIGHT, WIDTH, outside)
