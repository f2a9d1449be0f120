"""Relevance by region: against slow sums, and regions against masks and faces drawn by hand."""

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
from featurestore.caching.provenance import recipe_of
from featurestore.caching.run import cache_layers
from featurestore.errors import FeatureStoreError
from featurestore.keys import LANDMARKS
from featurestore.photos.chips import face_chip
from featurestore.photos.geometry import inverse, mirrored_place, moved, square_to_photograph
from featurestore.photos.keys import find_faces, with_flipped
from featurestore.store.lock import store_lock
from featurestore.store.reader import Source
from heads.explain.pictures import mean_maps, methods_of, pictures
from heads.explain.regions import (
    FACE_REGIONS,
    OUTSIDE,
    Regions,
    compare_regions,
    region_table,
    regions_from_landmarks,
    regions_from_mask,
)
from tests.conftest import run_pass, write_photographs
from tests.heads.explained import write_maps

SIZE = 224  # of VGG-Face's input; photographs are 64 × 80
NAMES = ("left", "right", "nowhere")
HALVES = Regions(NAMES, np.tile((np.arange(8) >= 2).astype(np.uint8), (8, 1)))  # a quarter, three quarters


def halves(face: str, view: str) -> Regions:
    return HALVES


def some(faces: int = 6, trials: int = 12, seed: int = 0) -> tuple[list[list[tuple[str, str]]], np.ndarray]:
    """Triplets of faces, and relevance (trial, 2, 3, 8, 8), the person's choice computed in every third trial alone."""
    rng = np.random.default_rng(seed)
    items = [[(f"f{face}", f"v{rng.integers(2)}") for face in rng.choice(faces, 3, False)] for _ in range(trials)]
    values = rng.normal(size=(trials, 2, 3, 8, 8)) * np.where(np.arange(8) < 2, 3, 1)
    values[np.arange(trials) % 3 > 0, 1] = np.nan
    return items, values


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    items, values = some()
    return write_maps(tmp_path_factory.mktemp("maps") / "a.zarr", items, {"lrp": values, "grad-cam": values**2})


@pytest.fixture(scope="module")
def source(small_store: Path) -> Source:
    return FeatureStore.open(small_store).source()


def test_pictures_are_those_that_were_computed(maps: xr.Dataset) -> None:
    items, values = some()
    assert set(methods_of(maps)) == {"lrp", "grad-cam"}
    found = list(pictures(maps, ["lrp"]))
    assert len(found) == 3 * (12 + 4)
    for picture in found:
        assert (picture.face, picture.view) == items[picture.row][picture.place]
        choice = ("head", "person").index(picture.choice)
        np.testing.assert_array_equal(picture.relevance, values[picture.row, choice, picture.place].astype(np.float32))


def test_shares_by_a_slow_loop(maps: xr.Dataset) -> None:
    _, values = some()
    table = region_table(maps, halves).set_index(["method", "choice", "region"]).sort_index()
    assert set(table.index.get_level_values("region")) == {"left", "right"}
    for choice, trials in ((0, range(12)), (1, range(0, 12, 3))):
        shares, nets = [], []
        for trial in trials:
            of_places = []
            for place in range(3):
                picture = values[trial, choice, place]
                whole = np.abs(picture).sum()
                of_places.append((np.abs(picture[:, :2]).sum() / whole, picture[:, :2].sum() / whole))
            share, net = np.mean(of_places, axis=0)
            shares.append(share)
            nets.append(net)
        row = table.loc["lrp", ("head", "person")[choice], "left"]
        assert row["n"] == 3 * len(trials)
        assert row["share"] == pytest.approx(np.mean(shares), rel=1e-5)
        assert row["net"] == pytest.approx(np.mean(nets), rel=1e-5)
        assert row["area"] == 0.25
        assert row["density"] == pytest.approx(4 * row["share"])
        assert row["share_low"] < row["share"] < row["share_high"]
        assert row["density_high"] - row["density_low"] == pytest.approx(4 * (row["share_high"] - row["share_low"]))
    both = table.loc["lrp", "head"]
    assert both["share"].sum() == pytest.approx(1)
    assert (
        table.loc["grad-cam", "head", "left"]["net"] == table.loc["grad-cam", "head", "left"]["share"]
    )  # all positive


def test_shares_by_view_and_place(maps: xr.Dataset) -> None:
    items, values = some()
    by_view = region_table(maps, halves, by="view").set_index(["method", "choice", "view", "region"])
    of_trials = []
    for trial in range(12):
        of = [
            np.abs(values[trial, 0, place, :, :2]).sum() / np.abs(values[trial, 0, place]).sum()
            for place in range(3)
            if items[trial][place][1] == "v1"
        ]
        of_trials += [np.mean(of)] if of else []
    assert by_view.loc["lrp", "head", "v1", "left"]["share"] == pytest.approx(np.mean(of_trials), rel=1e-5)
    by_place = region_table(maps, halves, by="place").set_index(["method", "choice", "place", "region"])
    first = np.abs(values[:, 0, 0, :, :2]).sum((1, 2)) / np.abs(values[:, 0, 0]).sum((1, 2))
    assert by_place.loc["lrp", "head", 1, "left"]["share"] == pytest.approx(first.mean(), rel=1e-5)


def test_a_planted_region_is_found_and_its_interval_holds_the_truth(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    items, _ = some(faces=30, trials=80)
    own = {f"f{face}": rng.normal(0, 0.5) for face in range(30)}  # faces differ in what is looked at
    values = np.abs(rng.normal(size=(80, 2, 3, 8, 8)))
    for trial, of in enumerate(items):
        for place, (face, _) in enumerate(of):
            values[trial, :, place, :, :2] *= 5 * np.exp(own[face])
    table = region_table(write_maps(tmp_path / "a.zarr", items, {"lrp": values}), halves)
    left = table[(table["region"] == "left") & (table["choice"] == "head")].iloc[0]
    assert left["density"] > 2
    truth = np.mean([5 * np.exp(of) / (5 * np.exp(of) + 3) for of in rng.normal(0, 0.5, 100_000)])
    assert left["share_low"] < truth < left["share_high"]
    assert 0.01 < left["share_high"] - left["share_low"] < 0.2


def test_differences_are_paired(tmp_path: Path, maps: xr.Dataset) -> None:
    items, values = some()
    changed = values.copy()
    changed[..., :2] *= 1.5
    order = np.random.default_rng(2).permutation(12)[:9]
    other = write_maps(tmp_path / "b.zarr", [items[i] for i in order], {"lrp": changed[order]}, [int(i) for i in order])
    table, differences = compare_regions({"fc7": maps, "conv": other}, halves)
    assert set(table["run"]) == {"fc7", "conv"}
    row = differences.set_index(["method", "choice", "region"]).loc["lrp", "head", "left"]
    whole = np.abs(values[:, 0]).sum((2, 3)), np.abs(changed[:, 0]).sum((2, 3))
    parts = [np.abs(each[:, 0, :, :, :2]).sum((2, 3)) / of for each, of in zip((values, changed), whole, strict=True)]
    assert row["n"] == 9
    assert row["difference"] == pytest.approx((parts[0] - parts[1])[order].mean(), rel=1e-4)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert row["p"] <= row["p_holm"] < 0.01
    with pytest.raises(FeatureStoreError, match="needs two explained runs"):
        compare_regions({"fc7": maps}, halves)
    moved = other.assign_coords(trial=[int(i) + 1 for i in order])
    with pytest.raises(FeatureStoreError, match=r"trial \d+ shows f.* in fc7 and f.* in moved"):
        compare_regions({"fc7": maps, "moved": moved}, halves)
    apart = other.assign_coords(trial=[int(i) + 100 for i in order])
    with pytest.raises(FeatureStoreError, match="fc7 and apart have no trial, method or region in common"):
        compare_regions({"fc7": maps, "apart": apart}, halves)


def test_means_by_face(maps: xr.Dataset) -> None:
    items, values = some()
    means = mean_maps(maps, "lrp")
    for face in ("f0", "f3"):
        shown = [values[t, 0, p] for t in range(12) for p in range(3) if items[t][p][0] == face]
        np.testing.assert_allclose(means.sel(face=face), np.mean(shown, axis=0), rtol=1e-4, atol=1e-6)
        assert means["n"].sel(face=face) == len(shown)
    assert list(mean_maps(maps, "lrp", faces=["f3", "f0"])["face"].values) == ["f3", "f0"]
    with pytest.raises(FeatureStoreError, match="no maps of 'lrp' for the head's choice of f9"):
        mean_maps(maps, "lrp", faces=["f9"])


def test_maps_that_cannot_be_summed(maps: xr.Dataset, tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"no maps of the method 'lpr'\. Did you mean lrp\?"):
        list(pictures(maps, ["lpr"]))
    with pytest.raises(FeatureStoreError, match="no variable has the dimensions trial, choice"):
        methods_of(xr.Dataset({"a": ("x", [1])}))
    with pytest.raises(FeatureStoreError, match="regions of 4 × 4 pixels do not fit maps of 8 × 8"):
        region_table(maps, lambda *_: Regions(("a",), np.zeros((4, 4), int)))
    items, values = some()
    values[3, 0, 1, 2, 2] = np.nan
    broken = write_maps(tmp_path / "a.zarr", items, {"lrp": values})
    with pytest.raises(FeatureStoreError, match="for the head's choice in trial 3 has 1 pixels that are no numbers"):
        region_table(broken, halves)
    with pytest.raises(FeatureStoreError, match="no relevance: none was computed, or all of it is zero"):
        region_table(write_maps(tmp_path / "b.zarr", items, {"lrp": 0 * np.nan_to_num(values)}), halves)


def a_mask(height: int, width: int) -> np.ndarray:
    """Labels 0, 1 and 7."""
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2, width // 4 :] = 1
    mask[-height // 4 :] = 7
    return mask


def save(path: Path, mask: np.ndarray, table: str = "label,name\n0,rest\n1,eyes\n7,mouth\n") -> tuple[Path, Path]:
    Image.fromarray(mask).save(path)
    path.with_suffix(".csv").write_text(table)
    return path, path.with_suffix(".csv")


def test_a_mask_of_the_square_and_one_of_the_photograph(source: Source, tmp_path: Path) -> None:
    square = regions_from_mask(*save(tmp_path / "square.png", a_mask(SIZE, SIZE)), source)("f1", "1")
    assert square.names == ("rest", "eyes", "mouth", OUTSIDE)
    np.testing.assert_array_equal(square.labels, np.where(a_mask(SIZE, SIZE) == 7, 2, a_mask(SIZE, SIZE)))
    photograph = regions_from_mask(*save(tmp_path / "photo.png", a_mask(80, 64)), source)("f1", "1")
    resized = cv2.resize(a_mask(80, 64), (SIZE, SIZE), interpolation=cv2.INTER_NEAREST)
    assert (photograph.labels == np.where(resized == 7, 2, resized)).mean() > 0.97  # but for rounding at the edges


def test_colours_palettes_and_a_mask_for_each_item(source: Source, tmp_path: Path) -> None:
    colours = np.array([[0, 0, 0], [255, 128, 0], [0, 0, 255]], np.uint8)
    places = np.where(a_mask(SIZE, SIZE) == 7, 2, a_mask(SIZE, SIZE))
    files = save(tmp_path / "c.png", colours[places], "colour,name\n#000000,rest\n#ff8000,eyes\n0000FF,mouth\n")
    np.testing.assert_array_equal(regions_from_mask(*files, source)("f1", "1").labels, places)
    palette = Image.fromarray(places.astype(np.uint8), "P")
    palette.putpalette(colours.ravel().tolist())
    palette.save(tmp_path / "p.png")
    (tmp_path / "p.csv").write_text("label,name\n0,rest\n1,eyes\n2,rest\n")
    one_name = regions_from_mask(tmp_path / "p.png", tmp_path / "p.csv", source)("f1", "1")
    np.testing.assert_array_equal(one_name.labels, places == 1)
    (tmp_path / "each.csv").write_text("face_id,view,mask\nf1,2,p.png\n")
    each = regions_from_mask(tmp_path / "each.csv", tmp_path / "p.csv", source)
    np.testing.assert_array_equal(each("f1", "2").labels, places == 1)
    with pytest.raises(FeatureStoreError, match=r"each\.csv has no mask of f1/1"):
        each("f1", "1")


BAD = {
    "size": (np.zeros((30, 20), np.uint8), "label,name\n0,a\n", r"20 × 30 pixels; .* 224 × 224, or .* f1/1, 64 × 80"),
    "label": (a_mask(80, 64), "label,name\n0,a\n1,b\n", r"has the label 7 \(1,280 pixels\), which its table lacks"),
    "colour": (
        np.zeros((80, 64, 3), np.uint8),
        "label,name\n0,a\n",
        "is in colours: its table needs the column `colour`",
    ),
    "columns": (
        a_mask(80, 64),
        "value,name\n0,a\n",
        "needs rows with `label,name` or `colour,name`; it has value, name",
    ),
    "number": (a_mask(80, 64), "label,name\n#00,a\n", "line 2: the label '#00' is not a whole number"),
    "twice": (a_mask(80, 64), "label,name\n0,a\n0,b\n", "line 3: the label 0 has two names"),
}


@pytest.mark.parametrize("name", BAD)
def test_masks_that_do_not_fit(name: str, source: Source, tmp_path: Path) -> None:
    mask, table, message = BAD[name]
    with pytest.raises(FeatureStoreError, match=message):
        regions_from_mask(*save(tmp_path / "m.png", mask, table), source)("f1", "1")


def test_a_file_that_is_no_png(source: Source, tmp_path: Path) -> None:
    files = save(tmp_path / "m.png", a_mask(80, 64))
    files[0].write_bytes(b"GIF89a")
    with pytest.raises(FeatureStoreError, match=r"m\.png cannot be read as a PNG"):
        regions_from_mask(*files, source)("f1", "1")


# Of a frontal face in 64 × 80: the points of LANDMARKS, and where its parts are.
FACE = np.array([[46, 34], [38, 34], [18, 34], [26, 34], [32, 49.4]])
PARTS = {"eyes": (42, 34), "brows": (22, 27), "nose": (32, 46), "mouth": (32, 57), "chin": (32, 67)}
PARTS |= {"cheeks": (18, 48), "forehead": (32, 20), "hair": (32, 4), "background": (2, 75)}


def landmark_table(path: Path, points: np.ndarray) -> Path:
    table = pd.DataFrame([points.ravel()] * 10, columns=list(LANDMARKS))
    keys = [(f"f{face}", str(view)) for face in range(1, 6) for view in (1, 2)]
    table.assign(face_id=[face for face, _ in keys], view=[view for _, view in keys]).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_parts_of_a_face_are_in_their_regions(angle: float, source: Source, tmp_path: Path) -> None:
    """In a square into which 64 × 80 pixels are squeezed."""
    middle = np.array([32, 45])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (FACE - middle) @ turn.T + middle
    regions = regions_from_landmarks(source, landmark_table(tmp_path / "l.csv", points))("f1", "1")
    assert regions.names == FACE_REGIONS
    for name, at in PARTS.items():
        x, y = (np.array(at) - middle) @ turn.T + middle
        found = (
            regions.labels[round(y / 80 * SIZE), round(x / 64 * SIZE)]
            if name != "background"
            else regions.labels[-1, 0]
        )
        assert regions.names[found] == name
    assert set(np.unique(regions.labels)) == set(range(len(FACE_REGIONS)))


def test_landmarks_that_are_not_there(source: Source, tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"has no eye_right_outer_x\. Regions need five landmarks"):
        regions_from_landmarks(source)
    table = landmark_table(tmp_path / "l.csv", FACE * 0 + 3)
    with pytest.raises(FeatureStoreError, match="the eyes of f1/1 are 0 pixels apart"):
        regions_from_landmarks(source, table)("f1", "1")
    pd.read_csv(table)[1:].to_csv(table, index=False)
    with pytest.raises(FeatureStoreError, match=r"l\.csv has no landmarks of f1/1"):
        regions_from_landmarks(source, table)("f1", "1")


# Marked by eye in ORL's photographs, whose landmarks are dlib's.
MARKED = {
    "s1": (
        [68.75, 51.25, 54.75, 52.25, 20.25, 52.75, 34.25, 52.75, 44.75, 78.25],
        {"eyes": (26, 51), "brows": (26, 44), "forehead": (45, 30), "nose": (44, 66), "mouth": (45, 88)},
        {"chin": (45, 103), "cheeks": (22, 72), "hair": (45, 3), "background": (2, 100)},
    ),
    "s20": (
        [73.75, 52.75, 60.75, 52.25, 29.25, 50.75, 43.25, 50.75, 53.25, 72.75],
        {"eyes": (67, 52), "brows": (32, 43), "forehead": (48, 35), "nose": (53, 66), "mouth": (51, 84)},
        {"chin": (51, 104), "cheeks": (28, 73), "hair": (35, 10), "background": (5, 105)},
    ),
}


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory, orl: Path) -> Source:
    """Turned upright by the landmarks, which are the source's own; and mirrored."""
    folder = tmp_path_factory.mktemp("chips")
    rows = [[face, "1", orl / face / "1.pgm", *MARKED[face][0]] for face in MARKED]
    pd.DataFrame(rows, columns=["face_id", "view", "path", *LANDMARKS]).to_csv(folder / "faces.csv", index=False)
    faces = with_flipped(find_faces(folder / "faces.csv"))
    job = prepare_job(CachingRequest(folder / "a.zarr", faces, ["stem"], "random:0", "dlib_resnet_v1", device="cpu"))
    with store_lock(folder / "a.zarr", "test"):
        cache_layers(job, make_plan(job))
    return FeatureStore.open(folder / "a.zarr").source()


@pytest.mark.parametrize("face", MARKED)
def test_parts_of_real_faces_are_in_their_regions(face: str, chips: Source) -> None:
    landmarks, upper, lower = MARKED[face]
    shapes = {"face": (112, 92), "chip": (150, 150)}
    affine = square_to_photograph(recipe_of(chips), *shapes["face"], tuple(landmarks))
    regions = regions_from_landmarks(chips)(face, "1")
    assert regions.labels.shape == shapes["chip"]
    seen = 0
    for name, point in {**upper, **lower}.items():
        x, y = np.rint(moved(inverse(affine), np.array(point))).astype(int)
        if 0 <= x < 150 and 0 <= y < 150:
            assert (name, regions.names[regions.labels[y, x]]) == (name, name)
            seen += 1
    assert seen >= 7


def test_regions_of_a_mirrored_view_are_mirrored(chips: Source) -> None:
    of = regions_from_landmarks(chips)
    plain, mirrored = of("s20", "1").labels, of("s20", "1|flipped").labels
    alike = (plain[:, ::-1] == mirrored).mean()
    assert alike > 0.9  # dlib's mean face is not quite symmetric
    assert (plain == mirrored).mean() < alike - 0.05


def test_a_mask_of_a_photograph_in_a_mirrored_chip(chips: Source, tmp_path: Path) -> None:
    mask = a_mask(112, 92)
    of = regions_from_mask(*save(tmp_path / "m.png", mask), chips)
    for view, picture, points in (
        ("1", mask, MARKED["s1"][0]),
        ("1|flipped", mask[:, ::-1], mirrored_place(tuple(MARKED["s1"][0]), 92)),
    ):
        grey = np.repeat(picture[:, :, None] * 30 + 20, 3, axis=2)
        chip = face_chip(np.ascontiguousarray(grey), tuple(points), 150)[:, :, 0].astype(int)
        labels = of("s1", view).labels
        expected = np.select([chip == 20, chip == 50, chip == 230, chip == 0], [0, 1, 2, 3], -1)
        whole = (expected >= 0) & (expected < 3)  # between two regions the chip has other values
        assert whole.mean() > 0.7
        assert (labels == expected)[whole].mean() > 0.99
        assert (expected == 3).mean() - 0.04 < (labels == 3).mean() < (expected == 3).mean()
        assert (expected[labels == 3] == 3).all()  # all that is beyond the edge is black


def test_a_photograph_that_changed_is_not_measured(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs", 1, 1)
    run_pass(folder, tmp_path / "a.zarr", ["relu_1_1"])
    source = FeatureStore.open(tmp_path / "a.zarr").source()
    Image.fromarray(np.zeros((80, 64, 3), np.uint8)).save(folder / "f1" / "1.png")
    table = landmark_table(tmp_path / "l.csv", FACE)
    with pytest.raises(FeatureStoreError, match="changed since its other layers were cached"):
        regions_from_landmarks(source, table)("f1", "1")
