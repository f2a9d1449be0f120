"""From an image file to a network's input: decoding and recipes.

A recipe is everything between the file and the first convolution. It has a name, it is written into the store,
and two recipes never share a group: the sources of these numbers disagree with each other in public ports.
"""

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageOps

from featurestore.errors import FeatureStoreError, near_matches

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


@dataclass(frozen=True)
class Recipe:
    """How a decoded picture becomes a network's input.

    ``size`` is the side of the square input in pixels. ``resize`` is one of

    - ``cv2``: OpenCV bilinear on uint8, no antialias, aspect ignored;
    - ``pil``: Pillow bilinear (antialiased), aspect ignored;
    - ``pil-crop``: Pillow bilinear to a short side of ``short_side`` (long side truncated), then centre crop.

    ``mean`` is taken off channels 0, 1, 2 as they stand after ``channels``; the result is divided by ``scale``.
    """

    name: str
    size: int
    resize: Literal["cv2", "pil", "pil-crop"]
    channels: Literal["RGB", "BGR"]
    mean: tuple[float, float, float]
    scale: float = 1.0
    short_side: int | None = None
    note: str = ""

    def pixels(self, rgb: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 3) RGB to uint8 (size, size, 3) in the recipe's channel order."""
        resized = _RESIZERS[self.resize](rgb, self)
        return np.ascontiguousarray(resized[:, :, ::-1] if self.channels == "BGR" else resized)

    def normalise(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """uint8 (n, size, size, 3) to float32 (n, 3, size, size), on the tensor's own device, channels last."""
        import torch  # a recipe can be named and described without loading torch

        batch = pixels.permute(0, 3, 1, 2).to(torch.float32)
        mean = torch.tensor(self.mean, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)
        batch -= mean
        return batch if self.scale == 1.0 else batch.div_(self.scale)

    def as_dict(self) -> dict[str, Any]:
        """What makes two recipes equal, as JSON types; the note is for people and left out."""
        fields = asdict(self)
        fields.pop("note")
        fields["mean"] = list(self.mean)
        return fields


def _resize_cv2(rgb: np.ndarray, recipe: Recipe) -> np.ndarray:
    return cv2.resize(rgb, (recipe.size, recipe.size), interpolation=cv2.INTER_LINEAR)


def _resize_pil(rgb: np.ndarray, recipe: Recipe) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).resize((recipe.size, recipe.size), Image.Resampling.BILINEAR))


def _resize_pil_crop(rgb: np.ndarray, recipe: Recipe) -> np.ndarray:
    height, width = rgb.shape[:2]
    short = recipe.short_side or recipe.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    resized = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
    # Python's round is banker's rounding, as in the published centre crop.
    top, left = round((height - recipe.size) / 2), round((width - recipe.size) / 2)
    return resized[top : top + recipe.size, left : left + recipe.size]


_RESIZERS = {"cv2": _resize_cv2, "pil": _resize_pil, "pil-crop": _resize_pil_crop}

_VGGFACE_MEAN_RGB = (129.1863, 104.7624, 93.5940)  # mean face of the VGG-Face training set, in R, G, B order
_VGGFACE_MEAN_BGR = _VGGFACE_MEAN_RGB[::-1]

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
        Recipe("vggface2", 224, "pil-crop", "BGR", (91.4953, 103.8827, 131.0912), short_side=256,
               note="VGGFace2: short side 256, centre crop"),
    ]
}  # fmt: skip


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; FeatureStoreError with the near matches if there is none."""
    if name not in RECIPES:
        raise FeatureStoreError(f"there is no recipe {name!r}. {near_matches(name, RECIPES)}")
    return RECIPES[name]
