"""From an image file to a network's input: decoding and recipes.

A recipe is everything between the file and the first convolution. It has a name, it is written into the store,
and two recipes never share a group: the sources of these numbers disagree with each other in public ports.
"""

import dataclasses
import io
import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageOps

from featurestore.errors import FeatureStoreError
from featurestore.text import near_matches

if TYPE_CHECKING:
    import torch

# Only raster formats of photographs: PIL would also hand a stranger's file to Ghostscript.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")


class ImageError(FeatureStoreError):
    """A file that is not a readable image."""


def decode(content: bytes) -> np.ndarray:
    """The picture a viewer shows: uint8 RGB of shape (height, width, 3).

    EXIF rotation is applied, palettes are resolved, transparency is laid over white, CMYK converted, and 16 bits
    are scaled to 8 (not clipped). Embedded colour profiles are ignored, as in every published pipeline for these
    networks: an image in Display P3 keeps its numbers. Raises ImageError for anything truncated, damaged or not an image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError as error:
        raise ImageError(f"image refused, too many pixels: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError) as error:
        # PIL's decoders raise all of these on damaged input; the types carry no meaning beyond "damaged".
        reason = "is not a PNG, JPEG, PGM/PPM, BMP, TIFF or WebP" if "cannot identify" in str(error) else str(error)
        raise ImageError(f"image cannot be decoded: {reason}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"grey values {values.min():.0f} to {values.max():.0f} are not 16-bit; save it as 8 or 16 bits"
            )
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels have no fixed white; save it as 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


Box = tuple[float, float, float, float]  # left, top, width, height of a face, in pixels of the decoded picture
Triple = tuple[float, float, float]

BOX_MARGIN = 0.15  # of the box's width and height, on each side, as VGGFace2's networks were trained
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class Recipe:
    """How a decoded picture becomes a network's input.

    ``size`` is the side of the square input in pixels. ``resize`` is one of

    - ``cv2``: OpenCV bilinear on uint8, no antialias, aspect ignored;
    - ``pil``: Pillow (antialiased), aspect ignored;
    - ``pil-crop``: Pillow to a short side of ``short_side`` (long side truncated), then centre crop.

    ``interpolation`` is Pillow's. ``mean`` is taken off channels 0, 1, 2 (0 … 255) as they stand after ``channels``; the
    result is divided by ``scale``, one number or one for each channel. With a ``box_margin`` the picture is first cut
    to a given box, enlarged by that share of its width and height on each side, as far as the picture goes.

    Raises FeatureStoreError for values that make no recipe.
    """

    name: str
    size: int
    resize: Literal["cv2", "pil", "pil-crop"]
    channels: Literal["RGB", "BGR"]
    mean: Triple
    scale: float | Triple = 1.0
    short_side: int | None = None
    note: str = ""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    box_margin: float | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise FeatureStoreError(f"recipe {self.name!r}: {problem}.")

    def _problem(self) -> str:
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,) * 3
        rules = {
            f"size {self.size!r} is not a whole number of pixels from 1 to {_MOST_PIXELS}": _is_side(self.size),
            f"resize {self.resize!r} is not one of {', '.join(_RESIZERS)}": self.resize in tuple(_RESIZERS),
            f"channels {self.channels!r} is not RGB or BGR": self.channels in ("RGB", "BGR"),
            f"interpolation {self.interpolation!r} is not one of {', '.join(_INTERPOLATION)}": (
                self.interpolation in tuple(_INTERPOLATION)
                and (self.resize != "cv2" or self.interpolation == "bilinear")
            ),
            f"mean {self.mean!r} is not a number, or three": _is_triple(self.mean),
            f"scale {self.scale!r} is not a number, or three, other than 0": _is_triple(scales) and all(scales),
            f"short_side {self.short_side!r} belongs to pil-crop, and is at least the size {self.size!r}": (
                self._crops_within() if self.resize == "pil-crop" else self.short_side is None
            ),
            f"box_margin {self.box_margin!r} is not a share from 0 to 1": (
                self.box_margin is None or (_is_number(self.box_margin) and 0 <= self.box_margin <= 1)
            ),
        }
        return next((problem for problem, holds in rules.items() if not holds), "")

    def _crops_within(self) -> bool:
        sides = self.size, self.short_side
        return all(map(_is_side, sides)) and self.size <= (self.short_side or 0)

    def pixels(self, rgb: np.ndarray, box: Box | None = None) -> np.ndarray:
        """uint8 (height, width, 3) RGB to uint8 (size, size, 3) in the recipe's channel order.

        ``box`` goes with a recipe that has a ``box_margin``, and ValueError says so if it does not. Raises ImageError for a
        box that is empty or not in the picture.
        """
        if (self.box_margin is None) != (box is None):
            raise ValueError(f"recipe {self.name!r} has box_margin {self.box_margin}, the box is {box}")
        if self.box_margin is not None and box is not None:
            rgb = crop(rgb, box, self.box_margin)
        resized = _RESIZERS[self.resize](rgb, self)
        return np.ascontiguousarray(resized[:, :, ::-1] if self.channels == "BGR" else resized)

    def normalise(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """uint8 (n, size, size, 3) to float32 (n, 3, size, size), on the tensor's own device, channels last."""
        import torch  # a recipe can be named and described without loading torch

        def channels(values: Triple) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)

        batch = pixels.permute(0, 3, 1, 2).to(torch.float32)
        batch -= channels(self.mean)
        if isinstance(self.scale, tuple):
            return batch.div_(channels(self.scale))
        return batch if self.scale == 1.0 else batch.div_(self.scale)

    def as_dict(self) -> dict[str, Any]:
        """What makes two recipes equal, as JSON types; the note is for people and left out.

        What a recipe does not use is left out too, so that a field added later renames no source in a store.
        """
        fields = asdict(self)
        fields.pop("note")
        fields["mean"] = [float(value) for value in self.mean]  # 128 and 128.0 are one recipe
        fields["scale"] = [float(value) for value in self.scale] if isinstance(self.scale, tuple) else float(self.scale)
        for name, unused in (("interpolation", "bilinear"), ("box_margin", None)):
            if fields[name] == unused:
                fields.pop(name)
        return fields


def recipe_from_dict(values: Any) -> Recipe:
    """The recipe that ``as_dict`` or a recipe file describes; FeatureStoreError says what is wrong with it."""
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise FeatureStoreError(f"{values!r:.200} does not describe a recipe: it needs a name.")
    known = {field.name: field for field in dataclasses.fields(Recipe)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise FeatureStoreError(
            f"recipe {values['name']!r}: there is no field {unknown[0]!r}. {near_matches(str(unknown[0]), known)}"
        )
    missing = [
        name for name, field in known.items() if field.default is dataclasses.MISSING and values.get(name) is None
    ]
    if missing:
        raise FeatureStoreError(f"recipe {values['name']!r} lacks {', '.join(missing)}.")
    fields = {name: _tuples(value) for name, value in values.items()}
    if _is_number(fields["mean"]):
        fields["mean"] = (fields["mean"],) * 3
    return Recipe(**fields)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # nor NaN


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_PIXELS


def _is_triple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))


def crop(rgb: np.ndarray, box: Box, margin: float) -> np.ndarray:
    """The part of a picture within ``box``, enlarged by ``margin`` on each side; outside the picture nothing is added.

    Edges are rounded to whole pixels. Raises ImageError if nothing of the picture is left.
    """
    height, width = rgb.shape[:2]
    left, top, box_width, box_height = box
    x, y = margin * box_width, margin * box_height
    x0, x1 = max(0, round(left - x)), min(width, round(left + box_width + x))
    y0, y1 = max(0, round(top - y)), min(height, round(top + box_height + y))
    if x0 >= x1 or y0 >= y1 or box_width <= 0 or box_height <= 0:
        raise ImageError(
            f"the box x={left:g} y={top:g} w={box_width:g} h={box_height:g} holds nothing of a picture of {width} × {height}"
        )
    return rgb[y0:y1, x0:x1]


def _resize_cv2(rgb: np.ndarray, recipe: Recipe) -> np.ndarray:
    return cv2.resize(rgb, (recipe.size, recipe.size), interpolation=cv2.INTER_LINEAR)


def _resize_pil(rgb: np.ndarray, recipe: Recipe) -> np.ndarray:
    return _pil(rgb, recipe.size, recipe.size, recipe)


def _resize_pil_crop(rgb: np.ndarray, recipe: Recipe) -> np.ndarray:
    height, width = rgb.shape[:2]
    short = recipe.short_side or recipe.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    if max(width, height) > _MOST_RESIZED:
        raise ImageError(f"a picture of {rgb.shape[1]} × {rgb.shape[0]} is too narrow to be cropped from its middle")
    resized = _pil(rgb, width, height, recipe)
    # Python's round is banker's rounding, as in the published centre crop.
    top, left = round((height - recipe.size) / 2), round((width - recipe.size) / 2)
    return resized[top : top + recipe.size, left : left + recipe.size]


def _pil(rgb: np.ndarray, width: int, height: int, recipe: Recipe) -> np.ndarray:
    return np.array(Image.fromarray(rgb).resize((width, height), _INTERPOLATION[recipe.interpolation]))  # writable


_RESIZERS = {"cv2": _resize_cv2, "pil": _resize_pil, "pil-crop": _resize_pil_crop}
_INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MOST_RESIZED = 1 << 16  # pixels along the long side of a resized picture: a picture of 1 × 60,000 would need gigabytes

_VGGFACE_MEAN_RGB = (129.1863, 104.7624, 93.5940)  # mean face of the VGG-Face training set, in R, G, B order
_VGGFACE_MEAN_BGR = _VGGFACE_MEAN_RGB[::-1]
_VGGFACE2_MEAN_BGR = (91.4953, 103.8827, 131.0912)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in [
        Recipe("vggface-published", 224, "cv2", "BGR", _VGGFACE_MEAN_RGB,
               note="as the published PyTorch ports: B, G, R pixels minus means in R, G, B order"),
        Recipe("vggface-bgr", 224, "cv2", "BGR", _VGGFACE_MEAN_BGR,
               note="B, G, R pixels minus the means of their own channels"),
        Recipe("vggface-rgb", 224, "cv2", "RGB", _VGGFACE_MEAN_RGB,
               note="R, G, B pixels minus the means of their own channels"),
        Recipe("facenet", 160, "pil", "RGB", (127.5, 127.5, 127.5), scale=128.0,
               note="FaceNet's fixed standardisation"),
        Recipe("vggface2", 224, "pil-crop", "BGR", _VGGFACE2_MEAN_BGR, short_side=256,
               note="VGGFace2: short side 256, centre crop, B, G, R pixels minus the means of their own channels"),
        Recipe("vggface2-swapped", 224, "pil-crop", "BGR", _VGGFACE2_MEAN_BGR[::-1], short_side=256,
               note="as one published script: the same, minus the means in the other order"),
    ]
}  # fmt: skip


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, or in that ``.toml`` or ``.json`` file; FeatureStoreError if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix.lower() in _READERS:
        return _recipe_from_file(Path(name).expanduser())
    raise FeatureStoreError(
        f"there is no recipe {name!r}. {near_matches(name, RECIPES)} A recipe of your own is a .toml or .json file."
    )


def _recipe_from_file(path: Path) -> Recipe:
    try:
        values = _READERS[path.suffix.lower()](path.read_text("utf-8"))
    except OSError as error:
        raise FeatureStoreError(f"the recipe {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise FeatureStoreError(f"the recipe {path} is not {path.suffix[1:].upper()}: {error}.") from None
    if not isinstance(values, dict):
        raise FeatureStoreError(f"the recipe {path} is not a table of fields but a {type(values).__name__}.")
    recipe = recipe_from_dict({"name": path.stem, **values})
    if recipe.name in RECIPES:
        raise FeatureStoreError(
            f"the recipe {path} has the name {recipe.name!r} of a published one. Give it another name."
        )
    return recipe


_READERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
