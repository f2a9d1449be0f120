"""An image file as the picture that a viewer shows."""

import io

import numpy as np
from PIL import Image, ImageOps

from featurestore.errors import FeatureStoreError

# Only raster formats of photographs: PIL would also pass an untrusted file to Ghostscript.
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
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image refused, too many pixels: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError) as error:
        # PIL's decoders raise all of these on damaged input; the types carry no meaning beyond "damaged".
        reason = "is not a PNG, JPEG, PGM/PPM, BMP, TIFF or WebP" if "cannot identify" in str(error) else str(error)
        raise ImageError(f"image cannot be decoded: {reason}") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """An opened picture as ``decode`` gives it."""
    image.load()
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


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
