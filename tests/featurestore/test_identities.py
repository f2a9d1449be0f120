"""Names and gender out of identity_meta.csv, and the network's own answers by name, against SciPy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.special

from featurestore import FeatureStore, answers_table
from featurestore.errors import FeatureStoreError
from featurestore.photos.identities import class_names, with_identities
from featurestore.photos.keys import find_faces
from tests.commands import command
from tests.conftest import write_photographs

HEADER = "Class_ID, Name, Sample_Num, Flag, Gender\n"  # with blanks, as the published file


def write_table(path: Path, n: int) -> Path:
    """``n`` identities of the training set, every fourth row one of the test set; names with commas and letters as they come."""
    lines, trained = [], 0
    while trained < n:
        flag = int(len(lines) % 4 != 3)
        trained += flag
        number = len(lines) + 1
        lines.append(f'n{number:06}, "Zoë_{number},_Jr.", {number}, {flag}, {"mf"[number % 2]}\n')
    path.write_text(HEADER + "".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-50's 8,631 answers to six photographs of two of its classes and one face that is none."""
    folder = tmp_path_factory.mktemp("answers")
    made = write_photographs(folder / "made", 3, 2)
    for i, name in enumerate(("n000001", "n000002", "n000004"), start=1):  # the fourth row is of the test set
        (folder / "photos").mkdir(exist_ok=True)
        (made / f"f{i}").rename(folder / "photos" / name)
    table = write_table(folder / "identity_meta.csv", 8631)
    line = [
        "--backbone",
        "resnet50_ft",
        "--layers",
        "fc",
        "descriptor",
        "--images",
        folder / "photos",
        "--weights",
        "random:0",
    ]
    done = command("cache_layers", *line, "--identities", table, "--store", folder / "s.zarr")
    assert done.returncode == 0, done.stderr
    return folder / "s.zarr"


def test_names_and_gender_are_stored_beside_the_keys(store: Path) -> None:
    items = FeatureStore.open(store).items
    assert items["name"].tolist() == [f"Zoë_{i},_Jr." for i in (1, 1, 2, 2, 4, 4)]
    assert items["gender"].tolist() == ["f", "f", "m", "m", "m", "m"]


def test_answers_are_the_largest_probabilities(store: Path) -> None:
    source = FeatureStore.open(store).source()
    table = answers_table(FeatureStore.open(store), store.parent / "identity_meta.csv", top=3)
    logits = source.rows("fc").gather(range(6)).numpy().astype(np.float64)
    meta = pd.read_csv(store.parent / "identity_meta.csv", skipinitialspace=True)
    trained = meta[meta["Flag"] == 1].reset_index(drop=True)
    for (key, answers), row in zip(table.groupby(["face_id", "view"], sort=False), logits, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        assert key in source.keys
        assert answers["rank"].tolist() == [1, 2, 3]
        assert answers["class"].tolist() == best.tolist()
        assert answers["identity"].tolist() == trained["Class_ID"][best].tolist()
        assert answers["label"].tolist() == trained["Name"][best].tolist()
        np.testing.assert_allclose(answers["probability"], scipy.special.softmax(row)[best], rtol=1e-9)
        if key[0] == "n000004":
            assert answers["right"].isna().all()
        else:
            assert answers["right"].tolist() == (answers["identity"] == key[0]).tolist()


def test_the_command_counts_right_answers(store: Path, tmp_path: Path) -> None:
    """Labels in the order of the answers: then the first photograph's first answer, and its fifth, is its face."""
    best = answers_table(FeatureStore.open(store), top=5)
    order = best[(best["face_id"] == "n000001") & (best["view"] == "1")]["class"].tolist()
    for place, first, fifth in ((0, 1, 1), (4, 0, 1)):
        names = [f"somebody {i}" for i in range(8631)]
        names[order[place]] = "n000001"
        (tmp_path / "names.txt").write_text("\n".join(names))
        table = answers_table(FeatureStore.open(store), tmp_path / "names.txt")
        mine = table[table["view"] == "1"]
        assert mine["right"].fillna(False).sum() == 1
        done = command("name_faces", store, "--labels", tmp_path / "names.txt", "--top", 2, "--out", tmp_path / "a.csv")
        assert done.returncode == 0, done.stderr
        rights = [
            table[(table["face_id"] == "n000001") & (table["rank"] <= rank)]["right"].sum() / 2 for rank in (1, 5)
        ]
        assert rights[0] >= first / 2 and rights[1] >= fifth / 2
        assert f"top-1 right: {rights[0]:.3f} [" in done.stdout
        assert f"top-5 right: {rights[1]:.3f} [" in done.stdout
        assert "of 2 items whose face is one of the classes" in done.stdout
        assert len(pd.read_csv(tmp_path / "a.csv")) == 12
    bare = command("name_faces", store)
    assert f"n000001/1: {order[0]} " in bare.stdout
    assert "right" not in bare.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "few.txt"], "few.txt has 2 lines, but the layer 8631 classes"),
        (["--labels", "few.csv"], "few.csv has 3 rows with Flag 1, 3 in all, but the layer 8631 classes"),
        (["--labels", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--labels", "bytes.txt"], "cannot be read as a list of names"),
        (["--layer", "fc8"], "Add it: pipelines/cache_layers.py"),
        (["--source", "vggface"], "has no source 'vggface'"),
    ],
)
def test_what_can_be_wrong(store: Path, tmp_path: Path, monkeypatch, options: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("anna\nberta\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    write_table(tmp_path / "few.csv", 3)
    done = command("name_faces", store, *options, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_store_without_answers(small_store: Path) -> None:
    with pytest.raises(FeatureStoreError, match="holds none of fc8, fc, logits, but maxp_1_2, maxp_2_2"):
        answers_table(FeatureStore.open(small_store))
    with pytest.raises(FeatureStoreError, match="has a map of 64×112×112"):
        answers_table(FeatureStore.open(small_store), layer="maxp_1_2")


def test_the_test_sets_identities_after_the_others(tmp_path: Path) -> None:
    table = write_table(tmp_path / "m.csv", 6)  # 7 rows, the fourth of the test set
    assert class_names(table, 6)["identity"].tolist() == [f"n{i:06}" for i in (1, 2, 3, 5, 6, 7)]
    assert class_names(table, 7)["identity"].tolist() == [f"n{i:06}" for i in (1, 2, 3, 5, 6, 7, 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Class_ID,Name\nf1,a\n", "has no column Flag, Gender; it has Class_ID, Name"),
        (HEADER + "f1,a,1,1,m\n", "1 of 2 faces are not in .*: f2. Its Class_ID are such as f1"),
        (HEADER + "f1,a,1,1,m\nf1,b,1,1,m\n", "the Class_ID f1 twice"),
        (HEADER + "f1,a,b,1,1,m\n", "has 6 fields, the header 5"),
    ],
)
def test_what_can_be_wrong_with_identities(tmp_path: Path, text: str, message: str) -> None:
    found = find_faces(write_photographs(tmp_path / "p", 2, 1))
    (tmp_path / "meta.csv").write_text(text)
    with pytest.raises(FeatureStoreError, match=message):
        with_identities(found, tmp_path / "meta.csv")
