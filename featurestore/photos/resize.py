"""Pictures cut to a face's box and brought to a network's size, each as the published pipelines do it.

Everything here takes and returns uint8 RGB of shape (height, width, 3).
"""

import math

import cv2
import numpy as np
from PIL import Image

from featurestore.keys import Place
from featurestore.photos.decode import ImageError

_INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MOST_RESIZED = 1 << 16  # pixels along the long side of a resized picture: a picture of 1 × 60,000 would need gigabytes


def crop(rgb: np.ndarray, box: Place, margin: float, outward: bool = False) -> np.ndarray:
    """The part of a picture within ``box``, enlarged by ``margin`` on each side; outside the picture nothing is added.

    Edges are rounded to whole pixels, or ``outward``: down at the left and top, up at the right and bottom.
    Raises ImageError if nothing of the picture is left.
    """
    left, top, right, bottom = box_edges(rgb.shape[0], rgb.shape[1], box, margin, outward)
    return rgb[top:bottom, left:right]


def box_edges(height: int, width: int, box: Place, margin: float, outward: bool = False) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (the first pixel outside) of what ``crop`` cuts out of a picture of that size."""
    left, top, box_width, box_height = box
    x, y = margin * box_width, margin * box_height
    start, end = (math.floor, math.ceil) if outward else (round, round)
    x0, x1 = max(0, start(left - x)), min(width, end(left + box_width + x))
    y0, y1 = max(0, start(top - y)), min(height, end(top + box_height + y))
    if x0 >= x1 or y0 >= y1 or box_width <= 0 or box_height <= 0:
        raise ImageError(
            f"the box x={left:g} y={top:g} w={box_width:g} h={box_height:g} holds nothing of a picture of {width} × {height}"
        )
    return x0, y0, x1, y1


def resize_opencv(rgb: np.ndarray, size: int) -> np.ndarray:
    """To ``size`` × ``size`` by OpenCV's bilinear interpolation, without antialiasing, the aspect ignored."""
    return cv2.resize(rgb, (size, size), interpolation=cv2.INTER_LINEAR)


def resize_opencv_and_crop(rgb: np.ndarray, short_side: int, size: int) -> np.ndarray:
    """By OpenCV (bilinear) to a short side of ``short_side``, sides rounded up, then the central ``size`` × ``size``.

    Raises ImageError for a picture so narrow that the long side would pass 65,536 pixels.
    """
    width, height, left, top = opencv_crop(rgb.shape[0], rgb.shape[1], short_side, size)
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LINEAR)[top : top + size, left : left + size]


def opencv_crop(height: int, width: int, short_side: int, size: int) -> tuple[int, int, int, int]:
    """Width and height of a picture of that size once it is resized, and the left and top of what is cut out of it."""
    ratio = short_side / min(height, width)
    _refuse_narrow(height, width, max(height, width) * ratio)
    # Rounded up from this product, so that a short side may come out a pixel longer, as it does in the published script.
    resized_width, resized_height = math.ceil(width * ratio), math.ceil(height * ratio)
    return resized_width, resized_height, (resized_width - size) // 2, (resized_height - size) // 2


def resize_pillow(rgb: np.ndarray, width: int, height: int, interpolation: str) -> np.ndarray:
    """To ``width`` × ``height`` by Pillow, antialiased; ``interpolation`` is bilinear or bicubic."""
    return np.array(Image.fromarray(rgb).resize((width, height), _INTERPOLATION[interpolation]))  # writable


def resize_and_crop(rgb: np.ndarray, short_side: int, size: int, interpolation: str) -> np.ndarray:
    """By Pillow to a short side of ``short_side`` (the long side is truncated), then the central ``size`` × ``size``.

    Raises ImageError for a picture so narrow that the long side would pass 65,536 pixels.
    """
    width, height, left, top = pillow_crop(rgb.shape[0], rgb.shape[1], short_side, size)
    return resize_pillow(rgb, width, height, interpolation)[top : top + size, left : left + size]


def pillow_crop(height: int, width: int, short_side: int, size: int) -> tuple[int, int, int, int]:
    """As ``opencv_crop``, by Pillow."""
    if width <= height:
        resized_width, resized_height = short_side, int(short_side * height / width)
    else:
        resized_width, resized_height = int(short_side * width / height), short_side
    _refuse_narrow(height, width, max(resized_width, resized_height))
    # Python's round is banker's rounding, as in the published centre crop.
    return resized_width, resized_height, round((resized_width - size) / 2), round((resized_height - size) / 2)


def _refuse_narrow(height: int, width: int, long_side: float) -> None:
    if long_side > _MOST_RESIZED:
        raise ImageError(f"a picture of {width} × {height} is too narrow to be cropped from its middle")
