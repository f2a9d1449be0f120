"""Mirrored photographs as views of their own: against photographs that were mirrored beforehand."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.keys import LANDMARKS
from featurestore.photos.chips import face_chip
from featurestore.photos.keys import find_faces, with_flipped
from tests.commands import command
from tests.conftest import write_photographs


def cache(images: Path, store: Path, *options: object):
    line = ["--layers", "relu_1_1", "--images", images, "--weights", "random:0", "--store", store, *options]
    done = command("cache_layers", *line)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def mirrored(images: Path, to: Path) -> Path:
    """The same photographs, mirrored by Pillow and saved without loss."""
    for path in images.rglob("*.png"):
        (to / path.parent.name).mkdir(parents=True, exist_ok=True)
        ImageOps.mirror(Image.open(path)).save(to / path.parent.name / path.name)
    return to


def rows_by_key(store: Path, ending: str = "") -> dict[tuple[str, str], np.ndarray]:
    source = FeatureStore.open(store).source()
    rows = source.rows("relu_1_1").gather(range(source.n_items)).numpy()
    return {
        (face, view.removesuffix(ending)): rows[i]
        for i, (face, view) in enumerate(source.keys)
        if view.endswith(ending)
    }


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, row in one.items():
        assert np.array_equal(row, other[key]), key


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "photos", 2, 3)


def test_rows_are_those_of_photographs_mirrored_beforehand(images: Path, tmp_path: Path) -> None:
    done = cache(images, tmp_path / "both.zarr", "--flip", "both")
    assert "6 photographs of 2 faces, each also mirrored (view|flipped)" in done.stdout
    store = FeatureStore.open(tmp_path / "both.zarr")
    assert [view for _, view in store.source().keys[:4]] == ["1", "1|flipped", "2", "2|flipped"]
    cache(mirrored(images, tmp_path / "mirrored"), tmp_path / "mirrored.zarr")
    cache(images, tmp_path / "plain.zarr")
    both = rows_by_key(tmp_path / "both.zarr")
    assert_equal({key: row for key, row in both.items() if "|" not in key[1]}, rows_by_key(tmp_path / "plain.zarr"))
    assert_equal(rows_by_key(tmp_path / "both.zarr", "|flipped"), rows_by_key(tmp_path / "mirrored.zarr"))
    assert store.source().originals.tolist() == list(range(12))  # the file is the same, the photograph is not
    checked = command("verify_store", tmp_path / "both.zarr", "--recompute", 12)
    assert checked.returncode == 0, checked.stdout
    assert "recomputed rows agree within 0.0e+00" in checked.stdout
    assert "same photograph" not in checked.stdout


def test_boxes_are_mirrored_with_the_picture(images: Path, tmp_path: Path) -> None:
    boxes = {path: (3 + i, 5 + 2 * i, 30 + i, 41) for i, path in enumerate(sorted(images.rglob("*.png")))}
    for name, left in (("boxes", lambda x, w: x), ("mirrored", lambda x, w: 64 - x - w)):
        rows = [(f"{p.parent.name}/{p.stem}", left(x, w), y, w, h) for p, (x, y, w, h) in boxes.items()]
        pd.DataFrame(rows, columns=["NAME_ID", "X", "Y", "W", "H"]).to_csv(tmp_path / f"{name}.csv", index=False)
    cache(images, tmp_path / "both.zarr", "--flip", "both", "--boxes", tmp_path / "boxes.csv")
    there = mirrored(images, tmp_path / "m")
    cache(there, tmp_path / "mirrored.zarr", "--boxes", tmp_path / "mirrored.csv")
    assert_equal(rows_by_key(tmp_path / "both.zarr", "|flipped"), rows_by_key(tmp_path / "mirrored.zarr"))
    items = FeatureStore.open(tmp_path / "both.zarr").items
    assert items["box_x"].tolist() == np.repeat([box[0] for box in boxes.values()], 2).tolist()  # as the file shows it
    checked = command("verify_store", tmp_path / "both.zarr", "--recompute", 12)
    assert checked.returncode == 0, checked.stdout


CHIPS = 'size = 224\nresize = "chip"\nchannels = "RGB"\nmean = 127.5\nscale = 128\n'


def landmarks_of(i: int) -> dict[str, float]:
    """Five points of a tilted face in a picture of 64 × 80."""
    names = ["eye_right_outer", "eye_right_inner", "eye_left_outer", "eye_left_inner", "nose"]
    x, y = [48.0, 38.25, 12.0, 21.5, 33.25 + i], [30.0 + i, 31.25, 27.5, 29.0, 52.0]
    return dict(zip([f"{name}_x" for name in names], x, strict=True)) | dict(
        zip([f"{name}_y" for name in names], y, strict=True)
    )


def mirrored_landmarks(points: dict[str, float], width: int) -> dict[str, float]:
    """By name: what was the corner of the right eye is that of the left one, as far from the other edge."""
    swapped = {"right": "left", "left": "right"}
    there = {}
    for name, value in points.items():
        side = next((side for side in swapped if side in name), "")
        there[name.replace(side, swapped[side]) if side else name] = width - 1 - value if name.endswith("_x") else value
    return there


def test_landmarks_are_mirrored_with_the_picture_and_the_eyes_swapped(images: Path, tmp_path: Path) -> None:
    (tmp_path / "chips.toml").write_text(CHIPS)
    there = mirrored(images, tmp_path / "m")
    for folder, name, change in (
        (images, "plain", lambda points: points),
        (there, "mirrored", lambda p: mirrored_landmarks(p, 64)),
    ):
        rows = [
            {"face_id": path.parent.name, "view": path.stem, "path": path, **change(landmarks_of(i))}
            for i, path in enumerate(sorted(folder.rglob("*.png")))
        ]
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    recipe = ["--recipe", tmp_path / "chips.toml"]
    cache(tmp_path / "plain.csv", tmp_path / "both.zarr", "--flip", "both", *recipe)
    cache(tmp_path / "mirrored.csv", tmp_path / "mirrored.zarr", *recipe)
    assert_equal(rows_by_key(tmp_path / "both.zarr", "|flipped"), rows_by_key(tmp_path / "mirrored.zarr"))


def test_the_chip_of_a_mirrored_photograph_is_the_mirrored_chip() -> None:
    """But for a pixel: dlib's mean face is not symmetric (the nose at 0.49), and its chip's centre lies half a pixel aside."""
    y, x = np.mgrid[:80, :64]
    smooth = np.stack([2 * x + y, 3 * y - x + 64, 128 + 40 * np.sin(x / 9)], axis=2).clip(0, 255).astype(np.uint8)
    points = landmarks_of(0)
    chip = face_chip(smooth, tuple(points[name] for name in LANDMARKS), 150).astype(int)
    turned = mirrored_landmarks(points, 64)
    of_mirrored = face_chip(np.ascontiguousarray(smooth[:, ::-1]), tuple(turned[name] for name in LANDMARKS), 150)
    seen = (chip.sum(axis=2) > 0)[:, ::-1] & (of_mirrored.sum(axis=2) > 0)
    inner = np.zeros_like(seen)
    inner[3:-3, 3:-3] = seen[3:-3, 3:-3]
    assert inner.mean() > 0.5
    assert (
        np.abs(of_mirrored - chip[:, ::-1])[inner].max() <= 8
    )  # one pixel of a chip is at most 2 to 4 grey levels here
    assert np.abs(of_mirrored - chip)[inner].mean() > 20


def test_added_later_and_changed(images: Path, tmp_path: Path) -> None:
    """A plain store is added to; a changed photograph is changed in both views; resumed runs compute what is missing."""
    store = tmp_path / "s.zarr"
    cache(images, store)
    assert "6 images to compute" in cache(images, store, "--flip", "both").stdout
    assert "0 images to compute" in cache(images, store).stdout
    Image.fromarray(np.full((80, 64, 3), 7, np.uint8)).save(images / "f1" / "2.png")
    kept = cache(images, store, "--flip", "both").stdout
    assert "2 photographs (or their faces' places) differ" in kept
    assert "('f1', '2|flipped')" in kept
    cache(images, store, "--flip", "both", "--recompute-changed")
    cache(images, tmp_path / "fresh.zarr", "--flip", "both")
    assert_equal(rows_by_key(store), rows_by_key(tmp_path / "fresh.zarr"))


@pytest.mark.parametrize("flip", ["none", "both"])
@pytest.mark.parametrize("moves", [{"1": "11"}, {"1": "2", "2": "1"}])
def test_a_renamed_photograph_takes_its_mirror_image_along(
    images: Path, tmp_path: Path, flip: str, moves: dict[str, str]
) -> None:
    store = tmp_path / "s.zarr"
    cache(images, store, "--flip", "both")
    other = ["--images", images, "--weights", "random:1", "--store", store, "--layers", "relu_1_1"]
    assert command("cache_layers", *other, "--flip", "both").returncode == 0  # another source follows
    for old in moves:
        shutil.move(images / "f1" / f"{old}.png", images / "f1" / f"{old}.moving")
    for old, new in moves.items():
        shutil.move(images / "f1" / f"{old}.moving", images / "f1" / f"{new}.png")
    done = cache(images, store, "--flip", flip, "--rename")
    assert "0 images to compute" in done.stdout
    assert all(f"f1/{old}|flipped → f1/{new}|flipped" in done.stdout for old, new in moves.items())
    cache(images, tmp_path / "fresh.zarr", "--flip", "both")
    fresh = rows_by_key(tmp_path / "fresh.zarr")
    first, second = FeatureStore.open(store).sources.values()
    assert set(first.keys) == set(second.keys) == set(fresh)
    assert first.name != second.name
    mine = next(source for source in (first, second) if source.attributes["weights"] == "seed:0")
    for key, row in fresh.items():
        assert np.array_equal(mine.rows("relu_1_1").gather(mine.find(key)).numpy()[0], row), key


def test_gone_and_forgotten(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    cache(images, store, "--flip", "both")
    (images / "f1" / "1.png").unlink()
    done = cache(images, store, "--forget", "gone")
    assert "Removed: 2 items" in done.stdout
    assert "f1/1, f1/1|flipped" in done.stdout
    assert FeatureStore.open(store).source().n_items == 10


def test_a_name_that_is_kept_for_them(images: Path) -> None:
    (images / "f1" / "1.png").rename(images / "f1" / "1|flipped.png")
    with pytest.raises(FeatureStoreError, match=r"has the view '1\|flipped', but names that end in \|flipped are kept"):
        find_faces(images)


def test_the_table(images: Path) -> None:
    found = find_faces(images)
    both = with_flipped(found)
    assert both.table["path"].tolist() == np.repeat(found.table["path"].to_numpy(), 2).tolist()
    assert both.layout == found.layout
