"""The aligned face chip, against dlib itself and against its numbers."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from featurestore.keys import LANDMARKS
from featurestore.networks.registry import get_recipe
from featurestore.photos.chips import face_chip
from featurestore.photos.decode import ImageError
from featurestore.photos.recipes import recipe_from_dict

# x and y of five landmarks in a face of 100 × 100.
FACE = np.array([(86, 21), (65, 23), (12, 21), (33, 23), (49, 63)])


DLIB_CHIP = get_recipe("dlib-chip")


@pytest.fixture(scope="module")
def dlib():
    return pytest.importorskip("dlib", reason="dlib-bin is not installed")


def dlib_chip(dlib, rgb: np.ndarray, points: np.ndarray, size: int = 150) -> np.ndarray:
    shape = dlib.full_object_detection(
        dlib.rectangle(0, 0, 9, 9), dlib.points([dlib.point(int(x), int(y)) for x, y in points])
    )
    return dlib.get_face_chip(rgb, shape, size=size, padding=0.25)


def assert_dlibs(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Every byte, but for values that are whole numbers: dlib's coordinates differ in the last of 53 bits, and truncation makes
    one grey level of it. In 3,000 chips of smooth pictures seven such bytes were found, one to a chip.
    """
    differ = ours != theirs
    assert differ.sum() <= 3
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("image", ["orl_s1_v1", "orl_s2_v1"])
def test_a_chip_is_the_one_that_dlib_wrote_down(parity: Path, orl: Path, image: str) -> None:
    _, person, view = image.split("_")
    grey = cv2.imread(str(orl / person / f"{view[1:]}.pgm"))
    doubled = cv2.resize(grey, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
    picture = cv2.copyMakeBorder(doubled, 40, 40, 40, 40, cv2.BORDER_REPLICATE)
    expected = np.load(parity / "dlib_expected_public.npz")
    ours = face_chip(picture, expected[f"{image}|landmarks"].ravel(), 150)
    assert np.array_equal(ours, expected[f"{image}|chip"])


@pytest.mark.parametrize("width", [30, 90, 150, 260, 420, 700, 1300])
def test_chips_of_every_size_and_angle(dlib, width: int) -> None:
    """From enlarged to three times halved; upright to upside down; inside the picture and reaching far outside; in colour."""
    rng = np.random.default_rng(width)
    black = 0
    for _ in range(12):
        height, across = rng.integers(width, 2 * width, 2)
        rgb = cv2.resize(rng.integers(0, 256, (24, 24, 3), np.uint8), (across, height), interpolation=cv2.INTER_CUBIC)
        angle = rng.uniform(-np.pi, np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        face = (FACE - 50) / 100 * width * rng.uniform(0.4, 0.95) @ turn.T + [across / 2, height / 2]
        points = np.clip(np.round(face + rng.normal(0, width / 60, (5, 2))), 0, [across - 1, height - 1])
        ours = face_chip(rgb, points.ravel(), 150)
        assert_dlibs(ours, dlib_chip(dlib, rgb, points))
        black += bool((ours == 0).all(axis=2).any())
    assert black  # some reach outside


def test_any_landmarks_in_any_picture(dlib) -> None:
    """Noise, where each wrong pixel would be seen, and points that are no face; narrow pictures, which dlib cannot halve."""
    rng = np.random.default_rng(3)
    for _ in range(150):
        height, width = rng.integers(5, 900, 2)
        rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
        points = np.stack([rng.integers(0, width, 5), rng.integers(0, height, 5)], axis=1)
        assert_dlibs(face_chip(rgb, points.ravel(), 150), dlib_chip(dlib, rgb, points))


@pytest.mark.parametrize("size", [20, 64, 224])
def test_chips_of_other_sizes(dlib, size: int) -> None:
    rgb = cv2.resize(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8), (600, 400))
    assert_dlibs(face_chip(rgb, (FACE * 3 + 20).ravel(), size), dlib_chip(dlib, rgb, FACE * 3 + 20, size))


def test_a_picture_that_is_no_contiguous_array_gives_the_same_chip() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    landmarks = (FACE + 40).ravel()
    assert np.array_equal(face_chip(rgb, landmarks, 150), face_chip(np.asfortranarray(rgb), landmarks, 150))


def test_landmarks_that_cannot_be() -> None:
    rgb = np.zeros((120, 160, 3), np.uint8)
    outside = (FACE + 40).astype(float).ravel()
    outside[8] = 400.5
    with pytest.raises(ImageError, match=r"the landmark nose \(400\.5, 103\) is outside the picture of 160 × 120"):
        face_chip(rgb, outside, 150)
    with pytest.raises(ImageError, match=r"five landmarks near \(50, 50\) are too close together"):
        face_chip(rgb, [50.0] * 10, 150)
    with pytest.raises(ImageError, match="outside the picture"):
        face_chip(rgb, [float("nan"), *outside[1:8], 10.0, 10.0], 150)


def test_the_recipe_takes_landmarks_and_dlibs_means() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    assert DLIB_CHIP.place == LANDMARKS
    pixels = DLIB_CHIP.pixels(rgb, tuple((FACE + 40).ravel().tolist()))
    assert np.array_equal(pixels, face_chip(rgb, (FACE + 40).ravel(), 150))
    expected = (pixels.astype(np.float64) - [122.782, 117.001, 104.298]) / 256
    normalised = DLIB_CHIP.normalise(torch.from_numpy(pixels[None]))[0].permute(1, 2, 0).numpy()
    assert np.allclose(normalised, expected, atol=1e-6)
    assert recipe_from_dict(DLIB_CHIP.as_dict()).place == LANDMARKS
    with pytest.raises(ValueError, match="what is given is None"):
        DLIB_CHIP.pixels(rgb)


def test_the_mean_of_the_recipe_is_the_files(parity: Path) -> None:
    """The prototype's input, of a picture that was resized and not aligned."""
    expected = np.load(parity / "dlib_expected_public.npz")
    chip = expected["s0_250x250|chip"]
    normalised = DLIB_CHIP.normalise(torch.from_numpy(chip[None]))[0]
    assert np.allclose(normalised.flatten()[:16], expected["prototype|s0_250x250|input|first16"], atol=1e-6)
    assert abs(float(normalised.double().std(correction=0)) - expected["prototype|s0_250x250|input|std"]) < 1e-6
