"""An image file as the picture that a viewer shows."""

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from featurestore.errors import FeatureStoreError

# Only raster formats of photographs: PIL would also pass an untrusted file to Ghostscript.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")
# The largest cameras take 101.9 million. Decoding takes up to 10 bytes a pixel, 1 GiB for so many (a progressive CMYK 12).
MOST_PIXELS = 102_000_000
PILLOWS_MOST = 178_956_970  # pixels, that it decodes at all
_WEBP = 2  # times the memory of other formats: its decoder keeps copies
warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # of half of these; the limit here is our own
_LONGEST_SIDE = 65_535  # pixels
_TILE = (322, 323)  # TIFF's tags of its width and length
_STRIP = 1 << 20  # pixels that are converted at once


class ImageError(FeatureStoreError):
    """A file that is not a readable image."""


def decode(content: bytes, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The picture a viewer shows: uint8 RGB of shape (height, width, 3).

    EXIF rotation is applied, palettes are resolved, transparency is laid over white, CMYK converted, and 16 bits
    are scaled to 8 (not clipped). Embedded colour profiles are ignored, as in every published pipeline for these
    networks: an image in Display P3 keeps its numbers. Raises ImageError for anything truncated, damaged or not an image, for
    more than ``max_pixels`` (of a WebP half of them) or a side of more than 65,535, and where memory is not to be had.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            refuse_large(image, max_pixels)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _in_strips(image)
    except Image.DecompressionBombError:
        raise ImageError(
            f"image refused, too many pixels: more than {PILLOWS_MOST:,}, the most that Pillow reads"
        ) from None
    except MemoryError:
        raise ImageError("image cannot be decoded: there is not enough memory for it") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError) as error:
        # PIL's decoders raise all of these on damaged input; the types carry no meaning beyond "damaged".
        reason = "is not a PNG, JPEG, PGM/PPM, BMP, TIFF or WebP" if "cannot identify" in str(error) else str(error)
        raise ImageError(f"image cannot be decoded: {reason}") from None


def refuse_large(image: Image.Image, max_pixels: int = MOST_PIXELS) -> None:
    """ImageError for an opened picture that has more pixels, is packed in tiles of more, or is too long; none is decoded."""
    width, height = image.size
    most = max_pixels // _WEBP if image.format == "WEBP" else max_pixels
    if width * height > most:
        raise ImageError(
            f"image refused, too many pixels: {width} × {height} are {width * height:,}, and {most:,} may be decoded; "
            f"shrink it, or allow more with `max_pixels`"
        )
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if math.prod(int(tags.get(tag, 1)) for tag in _TILE) > max_pixels:
        raise ImageError(f"image refused: a tile of it has more pixels than the {max_pixels:,} that may be decoded")
    if max(width, height) > _LONGEST_SIDE:
        raise ImageError(f"image refused: a side of {width} × {height} is longer than {_LONGEST_SIDE:,} pixels")


def to_rgb(image: Image.Image) -> np.ndarray:
    """An opened picture as ``decode`` gives it."""
    image.load()
    return _in_strips(ImageOps.exif_transpose(image))


def _in_strips(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3) RGB; what is converted is copied, so that it is done in parts."""
    _refuse_other_numbers(image)
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        rgb[top : top + rows] = np.asarray(_to_rgb(image.crop((0, top, width, min(height, top + rows)))))
    return rgb


def _refuse_other_numbers(image: Image.Image) -> None:
    """ImageError for grey values without a white that is known."""
    if image.mode == "F":
        raise ImageError("floating-point pixels have no fixed white; save it as 8 or 16 bits")
    if image.mode == "I":
        low, high = np.ravel(image.getextrema()).astype(int)
        if low < 0 or high > 65535:
            raise ImageError(f"grey values {low} to {high} are not 16-bit; save it as 8 or 16 bits")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
