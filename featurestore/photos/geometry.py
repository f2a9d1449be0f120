"""Where the pixels of a recipe's square are in the photograph: every recipe is an affine map.

Pixels are counted from the middle of the first one, which is 0.
"""

import numpy as np

from featurestore.keys import BOX, Place
from featurestore.photos import resize
from featurestore.photos.chips import chip_to_photograph
from featurestore.photos.recipes import Recipe


def square_to_photograph(
    recipe: Recipe, height: int, width: int, place: Place | None = None, flipped: bool = False
) -> np.ndarray:
    """(2, 3) float64: (x, y, 1) of a pixel of the recipe's square to (x, y) in the decoded photograph of that size.

    ``place`` is as ``Recipe.pixels`` takes it, in the photograph as its file shows it; so is the result, also of a view that
    is mirrored first (``flipped``). Raises ImageError for places that the recipe cannot cut out.
    """
    if flipped:
        mirror = np.array([[-1, 0, width - 1], [0, 1, 0]], np.float64)
        return chained(mirror, square_to_photograph(recipe, height, width, mirrored_place(place, width)))
    if recipe.resize == "chip" and place is not None:
        return chip_to_photograph(height, width, place, recipe.size)
    left = top = 0
    if recipe.box_margin is not None and place is not None:
        left, top, right, bottom = resize.box_edges(
            height, width, place, recipe.box_margin, outward=recipe.box_edges == "outward"
        )
        height, width = bottom - top, right - left
    short_side, size = recipe.short_side or recipe.size, recipe.size
    if recipe.resize == "cv2-crop":
        resized_width, resized_height, x, y = resize.opencv_crop(height, width, short_side, size)
    elif recipe.resize == "pil-crop":
        resized_width, resized_height, x, y = resize.pillow_crop(height, width, short_side, size)
    else:
        resized_width, resized_height, x, y = size, size, 0, 0
    # OpenCV and Pillow both take a picture's edges, not the middles of its outer pixels, to the edges of the resized one.
    across, down = width / resized_width, height / resized_height
    return np.array([[across, 0, (x + 0.5) * across - 0.5 + left], [0, down, (y + 0.5) * down - 0.5 + top]])


def mirrored_place(place: Place | None, width: int) -> Place | None:
    """Where the same face is once left and right of a picture ``width`` pixels wide are exchanged: its box, or its landmarks."""
    if place is None:
        return None
    if len(place) == len(BOX):
        left, top, box_width, box_height = place
        return width - left - box_width, top, box_width, box_height
    # The eye on the picture's right is on its left afterwards, and takes the other's place in the order.
    points = [(width - 1 - x, y) for x, y in zip(place[::2], place[1::2], strict=True)]
    right_outer, right_inner, left_outer, left_inner, nose = points
    return tuple(number for point in (left_outer, left_inner, right_outer, right_inner, nose) for number in point)


def chained(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(2, 3): what ``second`` makes of what ``first`` makes of a point."""
    return np.column_stack([second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2] + second[:, 2]])


def inverse(affine: np.ndarray) -> np.ndarray:
    """(2, 3): back from where a map leads."""
    back = np.linalg.inv(affine[:, :2])
    return np.column_stack([back, -back @ affine[:, 2]])


def moved(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (…, 2) of x and y, where a map (2, 3) leads them."""
    there: np.ndarray = np.asarray(points, np.float64) @ affine[:, :2].T + affine[:, 2]
    return there
