"""Photographs with parts hidden: what is hidden, where, and what is left as it was."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image

from featurestore import FeatureStore
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.errors import FeatureStoreError
from featurestore.keys import LANDMARKS
from featurestore.photos.keys import find_faces, with_flipped
from featurestore.store.lock import store_lock
from featurestore.store.reader import Source
from heads.explain.stimuli import export_masked
from tests.conftest import write_photographs
from tests.heads.explained import write_maps

SIZE = 224  # of the input; photographs are 64 × 80
ITEMS = [[("f1", "1"), ("f2", "2"), ("f3", "1")], [("f2", "1"), ("f4", "1"), ("f5", "2")]]


@pytest.fixture(scope="module")
def source(small_store: Path) -> Source:
    return FeatureStore.open(small_store).source()


def planted(spots: list[list[tuple[int, int]]]) -> np.ndarray:
    """(2, 2, 3, 224, 224): negative, but for a square of 56 pixels at each spot (y, x)."""
    values = np.full((2, 2, 3, SIZE, SIZE), -0.1)
    values[:, 1] = np.nan
    for trial, of in enumerate(spots):
        for place, (y, x) in enumerate(of):
            values[trial, 0, place, y : y + 56, x : x + 56] = 1
    return values


SPOTS = [[(0, 0), (56, 112), (168, 168)], [(112, 0), (0, 168), (84, 70)]]


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    return write_maps(tmp_path_factory.mktemp("maps") / "a.zarr", ITEMS, {"lrp": planted(SPOTS)})


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def original(source: Source, row: pd.Series) -> np.ndarray:
    return read(Path(source.items.loc[(row["face_id"], row["view"]), "path"]))


def test_what_is_relevant_is_hidden_and_nothing_else(maps: xr.Dataset, source: Source, tmp_path: Path) -> None:
    table = export_masked(maps, "lrp", source, tmp_path, share=1 / 16, block=14)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*table["file"], "masked.csv"])
    assert len(table) == 12
    for _, row in table.iterrows():
        assert ITEMS[row["trial"]][row["place"] - 1] == (row["face_id"], row["view"])
        before, after = original(source, row), read(tmp_path / row["file"])
        assert after.shape == before.shape == (80, 64, 3)
        changed = (before != after).any(axis=2)
        fill = np.rint(before.reshape(-1, 3).mean(axis=0))
        assert (after[changed] == fill).all()
        y, x = SPOTS[row["trial"]][row["place"] - 1]
        spot = np.zeros((SIZE, SIZE), bool)
        spot[y : y + 56, x : x + 56] = True
        inside = cv2.resize(spot.astype(np.uint8), (64, 80), interpolation=cv2.INTER_NEAREST).astype(bool)
        assert row["share"] == pytest.approx(1 / 16)
        if row["kind"] == "relevant":
            assert (changed != inside).mean() < 0.01  # the filled pixel may have had that colour, and edges are rounded
            assert row["relevance"] == 1
        else:
            assert not (changed & inside).any() or (changed & inside).mean() < 0.01
            assert row["relevance"] == 0
            assert changed.mean() == pytest.approx(1 / 16, abs=0.02)


def test_the_table_says_where(maps: xr.Dataset, source: Source, tmp_path: Path) -> None:
    table = export_masked(maps, "lrp", source, tmp_path, share=1 / 16, block=14)
    written = pd.read_csv(tmp_path / "masked.csv", dtype={"face_id": str, "view": str})
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    row = table.iloc[0]
    corners = np.array(json.loads(row["blocks"]))
    assert corners.shape == (16, 4, 2)
    drawn = np.zeros((800, 640), np.uint8)  # ten times as large, in which a pixel's middle is at 4.5
    for block in corners:
        cv2.fillConvexPoly(drawn, np.rint((block + 0.5) * 10 - 0.5).astype(int), 1)
    share = drawn.reshape(80, 10, 64, 10).mean(axis=(1, 3))
    changed = (original(source, row) != read(tmp_path / row["file"])).any(axis=2)
    assert not changed[share == 0].any()
    assert changed[share > 0.9].mean() > 0.9


def test_random_blocks_overlap_only_where_they_have_to(maps: xr.Dataset, source: Source, tmp_path: Path) -> None:
    table = export_masked(maps, "lrp", source, tmp_path, share=0.75, block=56)
    for _, pair in table.groupby(["trial", "place"]):
        blocks = {row["kind"]: {str(block) for block in json.loads(row["blocks"])} for _, row in pair.iterrows()}
        assert len(blocks["relevant"]) == len(blocks["random"]) == 12
        assert len(blocks["relevant"] & blocks["random"]) == 8


def test_again_and_over_other_files(maps: xr.Dataset, source: Source, tmp_path: Path) -> None:
    table = export_masked(maps, "lrp", source, tmp_path, fill="blur")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    again = export_masked(maps, "lrp", source, tmp_path, fill="blur")
    pd.testing.assert_frame_equal(again, table)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")} == before
    with pytest.raises(FeatureStoreError, match=r"random\.png is there already, and is another one .* it is kept"):
        export_masked(maps, "lrp", source, tmp_path, fill="blur", seed=1)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")} == before


def test_a_blur_takes_details_away(maps: xr.Dataset, source: Source, tmp_path: Path) -> None:
    table = export_masked(maps, "lrp", source, tmp_path, share=0.5, fill="blur")
    row = table.iloc[0]
    before, after = original(source, row), read(tmp_path / row["file"])
    changed = (before != after).any(axis=2)
    assert changed.mean() > 0.4
    assert after[changed].std() < before[changed].std()


def chips(folder: Path, images: Path) -> Source:
    """Turned upright by landmarks, beyond the photograph's edge, and mirrored."""
    points = [48, 30, 38.25, 31.25, 12, 27.5, 21.5, 29, 33.25, 52]
    rows = [[path.parent.name, path.stem, path, *points] for path in sorted(images.rglob("*.png"))]
    pd.DataFrame(rows, columns=["face_id", "view", "path", *LANDMARKS]).to_csv(folder / "faces.csv", index=False)
    faces = with_flipped(find_faces(folder / "faces.csv"))
    job = prepare_job(CachingRequest(folder / "a.zarr", faces, ["stem"], "random:0", "dlib_resnet_v1", device="cpu"))
    with store_lock(folder / "a.zarr", "test"):
        cache_layers(job, make_plan(job))
    return FeatureStore.open(folder / "a.zarr").source()


def test_a_mirrored_view_is_hidden_on_the_other_side_of_the_photograph(tmp_path: Path) -> None:
    source = chips(tmp_path, write_photographs(tmp_path / "photographs", 1, 1))
    values = np.full((2, 2, 1, 150, 150), np.nan)
    values[:, 0] = 0
    values[:, 0, 0, 60:90, 30:60] = 1
    maps = write_maps(tmp_path / "m.zarr", [[("f1", "1")], [("f1", "1|flipped")]], {"lrp": values})
    table = export_masked(maps, "lrp", source, tmp_path / "out", share=0.04, block=10)
    of_kind = table[table["kind"] == "relevant"]
    assert (of_kind["relevance"] == 1).all()
    middles = [np.array(json.loads(blocks)).mean(axis=(0, 1)) for blocks in of_kind["blocks"]]
    for middle, (_, row) in zip(middles, of_kind.iterrows(), strict=True):
        changed = (original(source, row) != read(tmp_path / "out" / row["file"])).any(axis=2)
        np.testing.assert_allclose(np.argwhere(changed).mean(axis=0)[::-1], middle, atol=0.5)
    assert middles[0][0] < 30 < middles[1][0]  # the face's middle is at 30
    for blocks in table["blocks"]:
        corners = np.array(json.loads(blocks))
        assert (corners >= -1).all() and (corners <= [64, 80]).all()  # nothing beyond the edge counts as hidden


BAD = {
    "share": ({"share": 1.0}, r"`share` 1\.0 of the area cannot be hidden"),
    "block": ({"block": 300}, r"`block` 300 is no side of a block, 1 … 224"),
    "fill": ({"fill": "black"}, "`fill` 'black' is not mean or blur"),
    "method": ({"method": "gradcam"}, "no maps of the method 'gradcam'"),
    "choice": ({"choice": "person"}, "no map of 'lrp' for the person's choice was computed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_hidden(name: str, maps: xr.Dataset, source: Source, tmp_path: Path) -> None:
    options, message = BAD[name]
    with pytest.raises(FeatureStoreError, match=message):
        export_masked(maps, **{"method": "lrp", "source": source, "folder": tmp_path, **options})
    assert not list(tmp_path.iterdir())


def test_maps_of_another_source_and_photographs_that_changed(maps: xr.Dataset, source: Source, tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match="the maps are 100 × 224 pixels, the source's input 224 × 224"):
        export_masked(maps.isel(x=slice(100)), "lrp", source, tmp_path / "out")
    images = write_photographs(tmp_path / "photographs", 1, 1)
    own = chips(tmp_path, images)
    Image.fromarray(np.zeros((80, 64, 3), np.uint8)).save(images / "f1" / "1.png")
    other = write_maps(tmp_path / "m.zarr", [[("f1", "1")]], {"lrp": np.ones((1, 2, 1, 150, 150))})
    with pytest.raises(FeatureStoreError, match="changed since its other layers were cached"):
        export_masked(other, "lrp", own, tmp_path / "out")
    assert not (tmp_path / "out").exists()
