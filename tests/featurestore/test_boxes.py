"""Faces cut out by VGGFace2's boxes, with the 15 % margin."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurestore import FeatureStore
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import RECIPES, get_backbone
from featurestore.photos.boxes import with_boxes
from featurestore.photos.decode import ImageError, decode
from featurestore.photos.keys import find_faces
from featurestore.photos.recipes import Recipe
from featurestore.photos.resize import crop
from featurestore.store.lock import store_lock
from tests.commands import command
from tests.conftest import write_photographs

HEADER = "NAME_ID,X,Y,W,H\n"


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """VGGFace2's folders, ``n000001/0001_01.png``: 2 faces × 2 views of 64 × 80 pixels, and their boxes."""
    made = write_photographs(tmp_path / "made", 2, 2)
    folder = tmp_path / "photographs"
    boxes = HEADER
    for i, path in enumerate(sorted(made.rglob("*.png"))):
        target = folder / f"n00000{path.parent.name[1]}" / f"000{path.stem}_01.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        boxes += f'"{target.parent.name}/{target.stem}",{10 + i},{20 - i},30,40\n'
    (tmp_path / "loose_bb_test.csv").write_text(boxes + '"n999999/0001_01",1,2,3,4\n')
    return folder


def cache(folder: Path, store: Path, **options) -> None:
    found = with_boxes(find_faces(folder), folder.parent / "loose_bb_test.csv")
    request = CachingRequest(store, found, ["conv1"], "random:0", backbone="resnet50_ft", device="cpu", **options)
    job = prepare_job(request)
    with store_lock(store, "test"):
        cache_layers(job, make_plan(job))


def test_margin_and_borders() -> None:
    rgb = np.arange(50 * 100 * 3, dtype=np.uint8).reshape(50, 100, 3)
    assert np.array_equal(crop(rgb, (20, 10, 40, 20), 0.15), rgb[7:33, 14:66])  # 6 and 3 pixels more on each side
    assert np.array_equal(crop(rgb, (0, 0, 100, 50), 0.15), rgb)  # outside the picture nothing is added
    assert np.array_equal(crop(rgb, (90, 40, 40, 40), 0.15), rgb[34:, 84:])
    for box in ((200, 10, 10, 10), (10, 10, 0, 10), (-50, -50, 10, 10)):
        with pytest.raises(ImageError, match="holds nothing of a picture of 100 × 50"):
            crop(rgb, box, 0.15)


def test_rows_are_those_of_the_picture_cut_beforehand(faces: Path, tmp_path: Path) -> None:
    cache(faces, tmp_path / "boxed.zarr")
    source = FeatureStore.open(tmp_path / "boxed.zarr").source()
    assert source.attributes["recipe"]["box_margin"] == 0.15
    assert source.items["box_x"].tolist() == [10, 11, 12, 13]
    beforehand = tmp_path / "cut"
    for (face, view), item in source.items.iterrows():
        rgb = decode(Path(item["path"]).read_bytes())
        x, y = item["box_x"], item["box_y"]  # 30 × 40 with 4.5 and 6 pixels more
        part = rgb[max(0, round(y - 6)) : round(y + 46), round(x - 4.5) : round(x + 34.5)]
        (beforehand / face).mkdir(parents=True, exist_ok=True)
        Image.fromarray(part).save(beforehand / face / f"{view}.png")
    plain = tmp_path / "plain.zarr"
    request = CachingRequest(plain, find_faces(beforehand), ["conv1"], "random:0", backbone="resnet50_ft", device="cpu")
    job = prepare_job(request)
    with store_lock(plain, "test"):
        cache_layers(job, make_plan(job))
    uncut = FeatureStore.open(plain).source()
    assert uncut.name != source.name  # another recipe is another source
    assert uncut.rows("conv1").gather(range(4)).equal(source.rows("conv1").gather(range(4)))


def test_a_changed_box_is_a_changed_photograph(faces: Path, tmp_path: Path) -> None:
    store = tmp_path / "boxed.zarr"
    cache(faces, store)
    before = FeatureStore.open(store).source().rows("conv1").gather(range(4)).clone()
    table = faces.parent / "loose_bb_test.csv"
    table.write_text(table.read_text().replace(",11,19,30,40", ",11,19,20,20"))
    cache(faces, store)  # kept as it was, and so is the box that it was cut by
    source = FeatureStore.open(store).source()
    assert source.rows("conv1").gather(range(4)).equal(before)
    assert source.items["box_w"].tolist() == [30] * 4
    cache(faces, store, recompute_changed=True)
    source = FeatureStore.open(store).source()
    rows = source.rows("conv1").gather(range(4))
    assert [bool(rows[i].equal(before[i])) for i in range(4)] == [True, False, True, True]
    assert source.items["box_w"].tolist() == [30, 20, 30, 30]
    checked = command("verify_store", store)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "recomputed rows agree" in checked.stdout


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("NAME_ID,X,Y,W\nn000001/0001_01,1,2,3\n", "has no column H"),
        (HEADER + "n000001/0001_01,1,2,3,4\n", "3 of 4 photographs have no box"),
        (HEADER + "n000001/0001_01,1,2,0,4\n", "line 2 is no box: NAME_ID=n000001/0001_01, X=1"),
        (HEADER + "n000001/0001_01,1,left,3,4\n", "line 2 is no box"),
        (HEADER + "n000001/0001_01,1,inf,3,4\n", "line 2 is no box"),
        pytest.param(HEADER + f"n000001/0001_01,1,2,3,{'9' * 500}\n", "line 2 is no box", id="no float"),
        (HEADER + "n000001/0001_01,1,2,3,4\n" * 2, "two boxes for n000001/0001_01"),
        (HEADER + "n000001/0001_01,1,2,3,4,5\n", "has 6 fields, the header 5"),
    ],
)
def test_what_can_be_wrong_with_boxes(faces: Path, table: str, message: str) -> None:
    path = faces.parent / "boxes.csv"
    path.write_text(table)
    with pytest.raises(FeatureStoreError, match=message):
        with_boxes(find_faces(faces), path)


def test_a_source_of_an_earlier_recipe_of_that_name_stays_what_it_is(faces: Path, tmp_path: Path, monkeypatch) -> None:
    """A source keeps its whole recipe: one that was changed since is another, and both are checked against their own."""
    store = tmp_path / "s.zarr"
    earlier = Recipe("vggface2-swapped", 224, "pil-crop", "BGR", (131.0912, 103.8827, 91.4953), short_side=256)
    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "vggface2-swapped", earlier)
        cache(faces, store, recipe="vggface2-swapped")
    cache(faces, store, recipe="vggface2-swapped")
    before, now = FeatureStore.open(store).sources.values()
    assert {source.attributes["recipe"]["resize"] for source in (before, now)} == {"pil-crop", "cv2-crop"}
    assert not before.rows("conv1").gather([0]).equal(now.rows("conv1").gather([0]))
    checked = command("verify_store", store)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("recomputed rows agree") == 2


def test_a_box_beside_the_picture_names_the_photograph(faces: Path, tmp_path: Path) -> None:
    table = faces.parent / "loose_bb_test.csv"
    table.write_text(table.read_text().replace(",11,19,30,40", ",500,500,30,40"))
    with pytest.raises(FeatureStoreError, match=r"'n000001', '0002_01'.*the box x=500 y=500 w=30 h=40 holds nothing"):
        cache(faces, tmp_path / "boxed.zarr")
    cache(faces, tmp_path / "boxed.zarr", on_error="skip")
    assert FeatureStore.open(tmp_path / "boxed.zarr").source().n_items == 3


def test_a_recipe_with_a_margin_of_its_own(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.toml").write_text('size = 224\nresize = "pil"\nchannels = "BGR"\nmean = 100\nbox_margin = 0.5\n')
    cache(faces, tmp_path / "wide.zarr", recipe=str(tmp_path / "wide.toml"))
    assert FeatureStore.open(tmp_path / "wide.zarr").source().attributes["recipe"]["box_margin"] == 0.5
    request = CachingRequest(
        tmp_path / "no.zarr",
        find_faces(faces),
        ["conv1"],
        "random:0",
        backbone="resnet50_ft",
        recipe=str(tmp_path / "wide.toml"),
    )
    with pytest.raises(FeatureStoreError, match="the photographs have no box_x"):
        prepare_job(request)


def test_the_command_takes_boxes(faces: Path, tmp_path: Path) -> None:
    done = command(
        "cache_layers", "--layers", "maxpool", "--backbone", "senet50_scratch", "--images", faces, "--weights", "random:0",
        "--boxes", faces.parent / "loose_bb_test.csv", "--store", tmp_path / "s.zarr",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cut to each face's box and 15% of it on each side" in done.stdout
    assert get_backbone("senet50_scratch").default_recipe().box_margin is None
