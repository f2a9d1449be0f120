"""Decoding and recipes, against the original implementations' pixels and against pictures made by hand."""

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import RECIPES, get_recipe
from featurestore.photos.decode import ImageError, decode
from featurestore.photos.recipes import recipe_from_dict

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("recipe", "original"),
    [("vggface-published", "facesim3d_bgr224"), ("facenet", "facenet_rgb160"), ("vggface2", "vggface2_rgb224")],
)
@pytest.mark.parametrize("image", ["s0_250x250", "s2_w300_h200"])
def test_pixels_equal_the_originals(parity: Path, recipe: str, original: str, image: str) -> None:
    expected = np.load(parity / "expected.npz")[f"preprocessed/{original}/{image}"]
    pixels = RECIPES[recipe].pixels(decode((parity / "images" / f"{image}.png").read_bytes()))
    if recipe == "vggface2":  # the original's numbers are from before it turns RGB to BGR
        pixels = pixels[:, :, ::-1]
    assert np.array_equal(pixels, expected)


SIZES = [(480, 640), (640, 480), (301, 299), (97, 500), (224, 224), (256, 256), (31, 17), (112, 92), (1, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_odd_sizes_and_grey_pictures_as_the_original_pipelines_make_them(tmp_path: Path, size, mode: str) -> None:
    """uint8 for uint8, against the libraries' own calls, as the published code strings them together."""
    rgb = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    path = tmp_path / "face.png"
    image = Image.fromarray(rgb if mode == "RGB" else rgb[:, :, 0])
    image.save(path)
    pixels = {
        name: RECIPES[name].pixels(decode(path.read_bytes())) for name in ("vggface-published", "facenet", "vggface2")
    }

    assert np.array_equal(pixels["vggface-published"], cv2.resize(cv2.imread(str(path)), (224, 224)))

    image = Image.open(path).convert("RGB")
    assert np.array_equal(pixels["facenet"], np.asarray(image.resize((160, 160), Image.Resampling.BILINEAR)))

    resized = torchvision.transforms.Resize(256)(image)
    assert size != (480, 640) or resized.size == (341, 256)
    cropped = np.asarray(torchvision.transforms.CenterCrop(224)(resized))
    assert np.array_equal(pixels["vggface2"], cropped[:, :, ::-1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("box", [None, (10.4, 3.7, 20.2, 9.1), (-5, -5, 30, 30)])
def test_the_script_that_takes_the_means_in_the_other_order(tmp_path: Path, size, box) -> None:
    """OpenCV, short side 224 and sides rounded up, the middle, 131.0912, 103.8827, 91.4953 off B, G, R; boxes outward."""
    if size == (1, 3) and box:
        return  # no part of so small a picture
    path = tmp_path / "face.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)).save(path)
    picture = cv2.imread(str(path))
    recipe = RECIPES["vggface2-swapped"]
    if box:
        x, y, w, h = box
        top, left = max(0, int(np.floor(y - 0.15 * h))), max(0, int(np.floor(x - 0.15 * w)))
        picture = picture[top : int(np.ceil(y + 1.15 * h)), left : int(np.ceil(x + 1.15 * w))]
        recipe = dataclasses.replace(recipe, box_margin=0.15)
    ratio = 224.0 / min(picture.shape[:2])
    width, height = int(np.ceil(picture.shape[1] * ratio)), int(np.ceil(picture.shape[0] * ratio))
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = (height - 224) // 2, (width - 224) // 2
    expected = resized[top : top + 224, left : left + 224] - np.array([131.0912, 103.8827, 91.4953])
    got = recipe.normalise(torch.from_numpy(recipe.pixels(decode(path.read_bytes()), box)[None]))
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_a_recipe_says_only_what_it_uses() -> None:
    """So that a field added later renames no source of a store."""
    recipe = RECIPES["vggface2-swapped"]
    assert "box_edges" not in recipe.as_dict()
    boxed = dataclasses.replace(recipe, box_margin=0.15)
    assert boxed.as_dict()["box_edges"] == "outward"
    assert recipe_from_dict(boxed.as_dict()) == dataclasses.replace(boxed, note="")
    with pytest.raises(FeatureStoreError, match="box_edges 'inward' is not one of nearest, outward"):
        dataclasses.replace(recipe, box_edges="inward")


@pytest.mark.parametrize("name", RECIPES)
def test_normalise_is_the_arithmetic_it_says(name: str) -> None:
    recipe = RECIPES[name]
    pixels = np.random.default_rng(1).integers(0, 256, (2, recipe.size, recipe.size, 3), np.uint8)
    expected = (pixels.astype(np.float64) - np.array(recipe.mean)) / recipe.scale
    got = recipe.normalise(torch.from_numpy(pixels))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.permute(0, 2, 3, 1).numpy(), expected, atol=1e-4)


def test_the_published_recipe_takes_rgb_means_off_bgr_channels() -> None:
    red = np.zeros((10, 10, 3), np.uint8)
    red[..., 0] = 255
    published, matched = (
        RECIPES[name].normalise(torch.from_numpy(RECIPES[name].pixels(red)[None]))
        for name in ("vggface-published", "vggface-bgr")
    )
    np.testing.assert_allclose(published[0, :, 0, 0], [-129.1863, -104.7624, 255 - 93.5940], rtol=1e-6)
    np.testing.assert_allclose(matched[0, :, 0, 0], [-93.5940, -104.7624, 255 - 129.1863], rtol=1e-6)


@pytest.mark.parametrize("bits", ["8", "16-png", "16-pgm", "16-tiff"])
def test_grey_of_any_depth_is_scaled_not_clipped(bits: str) -> None:
    grey = np.array([[0, 64, 128, 255]], np.uint8)
    if bits == "8":
        content = encoded(Image.fromarray(grey))
    elif bits == "16-pgm":
        content = b"P5 4 1 65535\n" + (grey.astype(">u2") * 257).tobytes()
    else:
        content = encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG" if bits == "16-png" else "TIFF")
    assert decode(content)[0, :, 0].tolist() == [0, 64, 128, 255]
    assert decode(content).shape == (1, 4, 3)


def test_colour_models_become_the_rgb_a_viewer_shows() -> None:
    image = Image.fromarray(RGB)
    assert np.array_equal(decode(encoded(image)), RGB)
    few = Image.fromarray((RGB // 128) * 255)
    assert np.array_equal(decode(encoded(few.convert("P", palette=Image.Palette.ADAPTIVE, colors=8))), np.asarray(few))
    alpha = np.concatenate([RGB, np.zeros((6, 9, 1), np.uint8)], axis=2)
    alpha[0, :, 3] = 255
    shown = decode(encoded(Image.fromarray(alpha)))
    assert np.array_equal(shown[0], RGB[0])
    assert (shown[1:] == 255).all()  # transparent means white paper
    white_cmyk = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    assert (decode(encoded(white_cmyk, "JPEG", quality=100)) > 250).all()
    black_cmyk = Image.new("CMYK", (4, 4), (0, 0, 0, 255))
    assert (decode(encoded(black_cmyk, "JPEG", quality=100)) < 5).all()


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90° clockwise to view
    content = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    assert np.array_equal(decode(content), np.rot90(RGB, -1))


@pytest.mark.parametrize("what", ["empty", "text", "truncated", "half a header", "eps"])
def test_damaged_files_are_image_errors(what: str) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    content = {
        "empty": b"",
        "text": b"not an image",
        "truncated": whole[: len(whole) // 2],
        "half a header": whole[:10],
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
    }[what]
    with pytest.raises(ImageError, match="image cannot be decoded"):
        decode(content)


def test_an_image_of_a_billion_pixels_is_refused_before_it_is_decoded() -> None:
    header = b"P5 40000 40000 255\n"
    with pytest.raises(ImageError, match="too many pixels"):
        decode(header)


def png(width: int, height: int) -> bytes:
    """An 8-bit RGB PNG of that size, with no pixels in it."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_in_a_tile(side: int) -> bytes:
    """A TIFF of 10 × 10 grey pixels, in one tile of ``side`` × ``side``."""
    packed = zlib.compress(bytes(side * side if side < 1000 else 10))
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(178_956_970, 1), r"178956970 × 1 are 178,956,970, and 102,000,000 may be decoded.*`max_pixels`"),
        (png(1, 70_000), "a side of 1 × 70000 is longer than 65,535"),
        (tiff_in_a_tile(16_000), "a tile of it has more pixels than the 102,000,000"),
    ],
    ids=["many", "long", "tile"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_many_pixels_is_refused_by_its_header(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(content)


def test_the_limit_of_pixels_is_an_argument() -> None:
    assert decode(tiff_in_a_tile(16)).shape == (10, 10, 3)
    image = Image.fromarray(RGB)  # of 54 pixels
    assert np.array_equal(decode(encoded(image), 54), RGB)
    assert decode(encoded(image, "WEBP"), 108).shape == RGB.shape
    for kind, most in (("PNG", 53), ("JPEG", 53), ("WEBP", 107)):
        with pytest.raises(ImageError, match="too many pixels: 9 × 6 are 54, and 53 may be"):
            decode(encoded(image, kind), most)


def test_a_picture_of_many_strips_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (6, 9, 4), np.uint8)
    contents = [encoded(Image.fromarray(rgba)), encoded(Image.fromarray(rgba[:, :, 0].astype(np.uint16) * 257))]
    whole = [decode(content) for content in contents]
    monkeypatch.setattr("featurestore.photos.decode._STRIP", 20)  # two rows
    assert all(np.array_equal(decode(content), shown) for content, shown in zip(contents, whole, strict=True))


def test_an_unknown_recipe_names_its_neighbours() -> None:
    with pytest.raises(FeatureStoreError, match=r"Did you mean .*vggface-published"):
        get_recipe("vggface-publisched")
