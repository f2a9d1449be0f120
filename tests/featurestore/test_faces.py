"""Finding photographs and reading their keys."""

import os
import random
from pathlib import Path

import pytest

from featurestore.errors import FeatureStoreError
from featurestore.photos.keys import find_faces
from featurestore.text import natural_order


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def keys(root: Path, pattern: str | None = None) -> list[tuple[str, str]]:
    table = find_faces(root, pattern).table
    return list(zip(table["face_id"], table["view"], strict=True))


def test_folders_sort_naturally_and_hidden_files_are_no_photographs(tmp_path: Path) -> None:
    touch(tmp_path, "s10/1.pgm", "s2/10.pgm", "s2/9.PGM", "s2/README.txt", ".git/x.png", "s2/._9.pgm")
    assert keys(tmp_path) == [("s2", "9"), ("s2", "10"), ("s10", "1")]


def test_vggface2_and_head_names(tmp_path: Path) -> None:
    touch(tmp_path / "v", "n000129/0003_01.jpg")
    assert keys(tmp_path / "v") == [("n000129", "0003_01")]
    touch(
        tmp_path / "h",
        "head-007_angle-348.75.png",
        "head-007_frontal.png",
        "head-007_angle-11.25.png",
        "sub/head-012_frontal.png",
    )
    assert keys(tmp_path / "h") == [
        ("head-007", "11.25"),
        ("head-007", "348.75"),
        ("head-007", "frontal"),
        ("head-012", "frontal"),
    ]


def test_a_pattern_reads_keys_and_says_what_it_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "id7-left.jpg", "id7-right.jpg", "mosaic.jpg")
    found = find_faces(tmp_path, r"(?P<face>id\d+)-(?P<view>\w+)\.jpg")
    assert found.table["face_id"].tolist() == ["id7", "id7"]
    assert found.left_out == ("mosaic.jpg",)


def test_images_without_a_key_are_never_dropped_silently(tmp_path: Path) -> None:
    touch(tmp_path, "s1/1.png", "stray.png", "a/b/c.png")
    with pytest.raises(FeatureStoreError, match=r"2 of 3 images .*stray\.png.*`pattern`"):
        find_faces(tmp_path)


def test_two_files_for_one_key_are_both_named(tmp_path: Path) -> None:
    touch(tmp_path, "s1/1.png", "s1/1.jpg")
    with pytest.raises(
        FeatureStoreError, match=r"two files for one key.*1\.jpg.*1\.png|two files for one key.*1\.png.*1\.jpg"
    ):
        find_faces(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing", "there is no folder or CSV"),
        (lambda p: touch(p, "notes.txt"), "no images in .*looked in all its folders for files ending in"),
    ],
)
def test_missing_and_empty_folders(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        find_faces(make(tmp_path))


@pytest.mark.parametrize("pattern", ["(", "(?P<face>x)", "fodlers"])
def test_a_bad_pattern_is_explained(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "s1/1.png")
    with pytest.raises(FeatureStoreError, match="`pattern`"):
        find_faces(tmp_path, pattern)


def test_a_csv_keeps_keys_as_text_and_carries_metadata(tmp_path: Path) -> None:
    touch(tmp_path, "pictures/a.png", "pictures/b.png")
    table = tmp_path / "faces.csv"
    table.write_text(
        "face_id,view,path,gender,response time\n007,02,pictures/a.png,female,1.5\n007,10,pictures/b.png,male,\n"
    )
    found = find_faces(table).table
    assert found["face_id"].tolist() == ["007", "007"]
    assert found["view"].tolist() == ["02", "10"]
    assert found["path"].tolist() == [str(tmp_path / "pictures/a.png"), str(tmp_path / "pictures/b.png")]
    assert found["gender"].tolist() == ["female", "male"]
    assert found["response_time"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("face,view,path\na,b,c\n", "has no column face_id; it has face, view, path"),
        ("face_id,view,path\na,,x.png\n", "line 2 has no view"),
        ("face_id,view,path\na,b,gone.png\n", "1 of 1 images .* do not exist.*gone.png"),
        ("face_id,view,path\n", "has a header and no rows"),
        ("face_id,view,path,a/b\nq,w,x.png,1\n", "cannot name a coordinate"),
        ("face_id,view,path\na,1,,9\n", "line 2 has 4 fields, the header 3"),
        ("face_id,view,path,x.partial\nq,w,x.png,1\n", "cannot name a coordinate"),
        ("face_id,view,path,channel_512\nq,w,x.png,1\n", "cannot name a coordinate"),
        ('face_id,view,path\n"a,b,x.png\n', "cannot be read as a CSV"),
    ],
)
def test_a_bad_csv_says_what_is_wrong_and_where(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "x.png")
    (tmp_path / "faces.csv").write_text(text)
    with pytest.raises(FeatureStoreError, match=message):
        find_faces(tmp_path / "faces.csv")


def test_a_list_of_photographs(tmp_path: Path) -> None:
    """A path a line, as VGGFace2's test_list.txt: the same keys as of the folder, of those that are named."""
    root = touch(tmp_path / "test", "n000001/0001_01.jpg", "n000001/0002_01.jpg", "n000009/0001_01.JPG")
    lines = ["n000009/0001_01.JPG", "", "./n000001/0002_01.jpg"]
    (tmp_path / "test_list.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    found = find_faces(tmp_path / "test_list.txt", images_root=root)
    assert found.table["face_id"].tolist() == ["n000001", "n000009"]
    assert found.table["path"].tolist() == [str(root / "n000001/0002_01.jpg"), str(root / "n000009/0001_01.JPG")]
    assert found.layout == "folders in list test_list.txt"
    (root / "list.txt").write_text(f"{root}/n000001/0001_01.jpg\n")  # absolute, and beside the photographs
    assert keys(root / "list.txt") == [("n000001", "0001_01")]
    (tmp_path / "by_pattern.txt").write_text("test/n000009/0001_01.JPG\n")
    assert keys(tmp_path / "by_pattern.txt", r"(?P<face>n\d+)/(?P<view>\w+)") == [("n000009", "0001_01")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f1/1.png\nf1/2.png\n", r"1 of 2 images named in .*list.txt do not exist: f1/2.png.*`images_root`"),
        ("f1/1.png 3\n", r"line 1 is no path of an image: 'f1/1.png 3'"),
        ("\n\nf1/\0.png\n", "line 3 is no path of an image"),
        ("\n", "it has no line with a path"),
        ("f1/1.png\nstray.png\n", "1 of 2 images in .*list.txt have no key: stray.png"),
        ("f1/1.png\nf1/1.png\n", "two files for one key"),
        ("f1/\udcff.png\n", "cannot be read as a list of paths"),
    ],
)
def test_what_can_be_wrong_with_a_list(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "f1/1.png", "stray.png")
    (tmp_path / "list.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FeatureStoreError, match=message):
        find_faces(tmp_path / "list.txt")
    with pytest.raises(FeatureStoreError, match="`images_root` is for lists of photographs"):
        find_faces(tmp_path, images_root=tmp_path)


def test_natural_order_is_numeric_inside_text() -> None:
    wanted = ["s1", "s2", "s2a", "s10", "s10b1", "s10b11", "t"]
    shuffled = random.Random(0).sample(wanted, len(wanted))
    assert sorted(shuffled, key=natural_order) == wanted


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "1.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "s1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    assert keys(tmp_path / "photos") == [("s1", "1")]


def test_a_face_may_be_called_na(tmp_path: Path) -> None:
    touch(tmp_path, "x.png")
    (tmp_path / "faces.csv").write_text("face_id,view,path,age\nNA,null,x.png,NA\n")
    assert keys(tmp_path / "faces.csv") == [("NA", "null")]
    assert find_faces(tmp_path / "faces.csv").table["age"].isna().all()


def test_odd_names_in_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "s1/ünï côdé.png", "s2.png/1.png")
    os.mkfifo(tmp_path / "s1" / "pipe.png")
    assert keys(tmp_path) == [("s1", "ünï côdé"), ("s2.png", "1")]
    (tmp_path / "s1" / os.fsdecode(b"a\xff.png")).write_bytes(b"x")
    with pytest.raises(FeatureStoreError, match="not UTF-8"):
        find_faces(tmp_path)


def test_names_of_thousands_of_digits_are_names(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    large, larger = "9" * 5000, "1" + "0" * 5000
    (tmp_path / "faces.csv").write_text(
        f"face_id,view,path\n{larger},1,a.png\n{large},1,a.png\n07,1,a.png\n7,1,a.png\n"
    )
    assert find_faces(tmp_path / "faces.csv").table["face_id"].tolist() == ["07", "7", large, larger]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("face_id,view,path," + "x," * 100_000 + "x\n", r"it has 100,004 columns, more than 5,000"),
        ("face_id,view,x" + "x" * 100_000 + "\n1,2,3\n", "has no column path; it has face_id, view, x"),
        (
            "face_id,view,path\n" + f"{'f' * 100_000},1,a.png\n" * 2,
            r"two files for one key: face 'f+… \(100,000 characters\)",
        ),
    ],
    ids=["columns", "a column", "a face"],
)
def test_messages_on_large_tables_are_short(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "faces.csv").write_text(text)
    with pytest.raises(FeatureStoreError, match=message) as raised:
        find_faces(tmp_path / "faces.csv")
    assert len(str(raised.value)) < 1000


def test_links_to_photographs_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.png")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "b.png").symlink_to("real/a.png")
    (tmp_path / "faces.csv").write_text("face_id,view,path\n1,1,folder/a.png\n2,1,b.png\n3,1,folder/../real/a.png\n")
    assert find_faces(tmp_path / "faces.csv").table["path"].unique().tolist() == [
        str((tmp_path / "real/a.png").resolve())
    ]
