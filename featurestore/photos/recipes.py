"""Recipes: everything between a decoded picture and a network's first convolution.

A recipe has a name, it is written into the store, and two recipes never share a group: the sources of these numbers
disagree with each other in public ports. A network's own recipes are in its file; see ``featurestore.networks``.
"""

import dataclasses
import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from featurestore.errors import FeatureStoreError
from featurestore.keys import Place, place_columns
from featurestore.text import near_matches

if TYPE_CHECKING:
    import numpy as np
    import torch

Triple = tuple[float, float, float]
Resize = Literal["cv2", "cv2-crop", "pil", "pil-crop", "chip"]
BoxEdges = Literal["nearest", "outward"]
Interpolation = Literal["bilinear", "bicubic"]

BOX_MARGIN = 0.15  # of the box's width and height, on each side, as VGGFace2's networks were trained
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class Recipe:
    """How a decoded picture becomes a network's input.

    ``size`` is the side of the square input in pixels. ``resize`` is one of

    - ``cv2``: OpenCV bilinear on uint8, no antialias, aspect ignored;
    - ``cv2-crop``: OpenCV bilinear to a short side of ``short_side`` (sides rounded up), then centre crop;
    - ``pil``: Pillow (antialiased), aspect ignored;
    - ``pil-crop``: Pillow to a short side of ``short_side`` (long side truncated), then centre crop;
    - ``chip``: the face turned upright by its five landmarks, as dlib does it (see ``photos.chips``).

    ``interpolation`` is Pillow's. ``mean`` is subtracted from channels 0, 1, 2 (0 … 255) in the order of ``channels``; the
    result is divided by ``scale``, one number or one for each channel. With a ``box_margin`` the picture is first cut
    to a given box, enlarged by that share of its width and height on each side, within the picture; ``box_edges`` says whether
    its edges go to the nearest whole pixel or outward.

    Raises FeatureStoreError for values that make no recipe.
    """

    name: str
    size: int
    resize: Resize
    channels: Literal["RGB", "BGR"]
    mean: Triple
    scale: float | Triple = 1.0
    short_side: int | None = None
    note: str = ""
    interpolation: Interpolation = "bilinear"
    box_margin: float | None = None
    box_edges: BoxEdges = "nearest"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise FeatureStoreError(f"recipe {self.name!r}: {problem}.")

    def _problem(self) -> str:
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,) * 3
        rules = {
            f"size {self.size!r} is not a whole number of pixels from 1 to {_MOST_PIXELS}": _is_side(self.size),
            f"resize {self.resize!r} is not one of {', '.join(get_args(Resize))}": self.resize in get_args(Resize),
            f"channels {self.channels!r} is not RGB or BGR": self.channels in ("RGB", "BGR"),
            f"interpolation {self.interpolation!r} is not one of {', '.join(get_args(Interpolation))}": (
                self.interpolation in get_args(Interpolation)
                and (self.resize in ("pil", "pil-crop") or self.interpolation == "bilinear")
            ),
            f"mean {self.mean!r} is not a number, or three": _is_triple(self.mean),
            f"scale {self.scale!r} is not a number, or three, other than 0": _is_triple(scales) and all(scales),
            f"short_side {self.short_side!r} belongs to a crop, and is at least the size {self.size!r}": (
                self._crops_within() if self.resize in ("cv2-crop", "pil-crop") else self.short_side is None
            ),
            f"box_margin {self.box_margin!r} is not a share from 0 to 1": (
                self.box_margin is None or (_is_number(self.box_margin) and 0 <= self.box_margin <= 1)
            ),
            "a chip is cut out by landmarks, and has no box_margin": self.resize != "chip" or self.box_margin is None,
            f"box_edges {self.box_edges!r} is not one of {', '.join(get_args(BoxEdges))}": (
                self.box_edges in get_args(BoxEdges)
            ),
        }
        return next((problem for problem, holds in rules.items() if not holds), "")

    def _crops_within(self) -> bool:
        sides = self.size, self.short_side
        return all(map(_is_side, sides)) and self.size <= (self.short_side or 0)

    @property
    def place(self) -> tuple[str, ...]:
        """The coordinates by which it cuts faces out: ``BOX``, ``LANDMARKS``, or none where it takes the whole picture."""
        return place_columns({"resize": self.resize, "box_margin": self.box_margin})

    def pixels(self, rgb: "np.ndarray", place: Place | None = None) -> "np.ndarray":
        """uint8 (height, width, 3) RGB to uint8 (size, size, 3) in the recipe's channel order.

        ``place`` are the numbers of the coordinates that ``self.place`` names; ValueError if there are others, or none. Raises
        ImageError for a box that is empty or not in the picture, and for landmarks that are outside or the same point.
        """
        if len(self.place) != len(place or ()):
            raise ValueError(f"recipe {self.name!r} cuts by {self.place}, what is given is {place}")
        from featurestore.photos import resize  # a recipe can be named and described without OpenCV and Pillow

        if self.box_margin is not None and place is not None:
            rgb = resize.crop(rgb, place, self.box_margin, outward=self.box_edges == "outward")
        if self.resize == "chip" and place is not None:
            from featurestore.photos.chips import face_chip

            resized = face_chip(rgb, place, self.size)
        elif self.resize == "cv2":
            resized = resize.resize_opencv(rgb, self.size)
        elif self.resize == "cv2-crop":
            resized = resize.resize_opencv_and_crop(rgb, self.short_side or self.size, self.size)
        elif self.resize == "pil":
            resized = resize.resize_pillow(rgb, self.size, self.size, self.interpolation)
        else:
            resized = resize.resize_and_crop(rgb, self.short_side or self.size, self.size, self.interpolation)
        return (resized[:, :, ::-1] if self.channels == "BGR" else resized).copy(order="C")

    def normalise(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """uint8 or float (n, size, size, 3) to float32 (n, 3, size, size), on the tensor's own device, channels last.

        Differentiable in pixels that are floats.
        """
        import torch  # a recipe can be described without torch

        def channels(values: Triple) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)

        batch = pixels.permute(0, 3, 1, 2).to(torch.float32)
        batch = batch - channels(self.mean) if pixels.is_floating_point() else batch.sub_(channels(self.mean))
        if isinstance(self.scale, tuple):
            return batch.div_(channels(self.scale))
        return batch if self.scale == 1.0 else batch.div_(self.scale)

    def as_dict(self) -> dict[str, Any]:
        """What makes two recipes equal, as JSON types; the note is left out.

        What a recipe does not use is left out too, so that a field added later renames no source in a store.
        """
        fields = asdict(self)
        fields.pop("note")
        fields["mean"] = [float(value) for value in self.mean]  # 128 and 128.0 are one recipe
        fields["scale"] = [float(value) for value in self.scale] if isinstance(self.scale, tuple) else float(self.scale)
        for name, unused in (("interpolation", "bilinear"), ("box_margin", None), ("box_edges", "nearest")):
            if fields[name] == unused:
                fields.pop(name)
        if self.box_margin is None:
            fields.pop("box_edges", None)
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


def read_recipe(path: Path) -> Recipe:
    """The recipe in a ``.toml`` or ``.json`` file, named after the file unless it has a ``name``; else FeatureStoreError."""
    try:
        values = RECIPE_READERS[path.suffix.lower()](path.read_text("utf-8"))
    except OSError as error:
        raise FeatureStoreError(f"the recipe {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise FeatureStoreError(f"the recipe {path} is not {path.suffix[1:].upper()}: {error}.") from None
    if not isinstance(values, dict):
        raise FeatureStoreError(f"the recipe {path} is not a table of fields but a {type(values).__name__}.")
    return recipe_from_dict({"name": path.stem, **values})


RECIPE_READERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
