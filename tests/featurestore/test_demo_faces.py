"""Rendered faces: the same from the same seed, and recognisable in the plainest sense."""

import csv
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from featurestore.demo.dataset import make_faces
from featurestore.demo.faces import TRAITS, draw_faces, yaw_angles
from featurestore.photos.keys import find_faces


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_faces(folder, 12, 5, seed=1, n_trials=3000, error_rate=0.2)
    return folder


def pictures(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    table = find_faces(folder / "faces.csv").table
    return {(row.face_id, row.view): cv2.imread(row.path).astype(float) for row in table.itertuples()}


def test_the_same_seed_gives_the_same_files(demo: Path, tmp_path: Path) -> None:
    make_faces(tmp_path / "again", 12, 5, seed=1, n_trials=3000, error_rate=0.2)
    files = sorted(path.relative_to(demo) for path in demo.rglob("*") if path.is_file())
    assert len(files) == 63
    assert all((demo / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    make_faces(tmp_path / "other", 12, 5, seed=2, n_trials=10)
    assert (demo / "face-001/frontal.png").read_bytes() != (tmp_path / "other/face-001/frontal.png").read_bytes()


def test_a_face_looks_more_like_itself_than_like_others(demo: Path) -> None:
    """Between neighbouring views, by mean pixel difference: the nearest other picture in the next view is the same face."""
    images = pictures(demo)
    faces = sorted({face for face, _ in images})
    right = 0
    for face in faces:
        differences = [np.abs(images[face, "frontal"] - images[other, "yaw+30"]).mean() for other in faces]
        right += faces[int(np.argmin(differences))] == face
    assert right >= 9  # of 12; chance is 1


def test_views_are_turns_of_one_head(demo: Path) -> None:
    """Lit alike, a head turned left mirrors the head turned right: in outline, since the light comes from one side."""
    images = pictures(demo)
    for face in ("face-001", "face-002", "face-003"):
        left, right = (np.abs(np.diff(images[face, view].mean(axis=2))).sum(axis=0) for view in ("yaw-60", "yaw+60"))
        assert np.corrcoef(left, right[::-1])[0, 1] > np.corrcoef(left, right)[0, 1]


def test_trials_have_the_error_rate_that_was_asked_for(demo: Path) -> None:
    faces = {face.face_id: face.traits for face in draw_faces(12, 1)}
    with (demo / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    best = 0
    for trial in trials:
        three = [trial[f"face_{i}"] for i in (1, 2, 3)]
        assert trial["odd"] in three
        assert len(set(three)) == 3
        pair = min(combinations(three, 2), key=lambda pair: np.linalg.norm(faces[pair[0]] - faces[pair[1]]))
        best += next(face for face in three if face not in pair) == trial["odd"]
    error = 1 - best / len(trials)
    assert abs(error - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(trials))


def test_the_table_carries_traits_and_gender(demo: Path) -> None:
    table = find_faces(demo / "faces.csv").table
    assert len(table) == 60
    assert set(table["gender"]) == {"female", "male"}
    assert set(TRAITS) <= set(table.columns)


@pytest.mark.parametrize("views", range(1, 12))
def test_every_number_of_views_has_a_frontal_one(views: int) -> None:
    angles = yaw_angles(views)
    assert len(set(angles)) == views
    assert 0.0 in angles
    assert max(map(abs, angles)) <= 60
