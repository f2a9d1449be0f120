"""Activations and RDMs as files, read back by NumPy, h5py and rsatoolbox."""

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.spatial.distance import pdist

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.queries import exporting as module
from featurestore.queries.dissimilarity import rdm
from featurestore.queries.exporting import export, export_rdm
from featurestore.store.file_names import file_name, file_names, original_name
from tests.conftest import LAYERS

ODD = [("a/b", "1"), ("a/b", "ä ö|flipped"), ("..", "x=2F"), ("A", "NA"), ("a", "NA"), ("_a", ""), ("", ".hidden")]


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(ODD), 2, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "block_rows", lambda n, *_: 3)


def keys_of(path: Path) -> list[tuple[str, str]]:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return list(zip(table["face_id"], table["view"], strict=True))


def test_numpy(small_store: Path, small_rows, tmp_path: Path) -> None:
    counted: list[int] = []
    written = export(FeatureStore.open(small_store), tmp_path / "e", format="numpy", progress=counted.append)
    assert [path.name for path in written] == [f"{name}.npy" for name in LAYERS] + ["items.csv"]
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == sorted(path.name for path in written)
    source = FeatureStore.open(small_store).source()
    for path, name in zip(written, LAYERS, strict=False):
        values = np.load(path)
        assert values.dtype == source.layers[name].dtype
        np.testing.assert_array_equal(values, source.rows(name).gather(range(10)).numpy())
        np.testing.assert_allclose(values, small_rows[name], atol=1e-3)
    assert keys_of(written[-1]) == list(source.keys)
    assert list(pd.read_csv(written[-1])["path"]) == list(source.items["path"])
    assert sum(counted) == 20
    assert max(counted) == 3


def test_half_precision_stays_and_means_do_not(tmp_path: Path) -> None:
    half = np.arange(12).reshape(4, 3).astype(np.float16)
    items = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    export(half, tmp_path / "rows", "layer", format="numpy", items=items)
    assert np.load(tmp_path / "rows" / "layer.npy").dtype == np.float16
    export(half, tmp_path / "faces", "layer", format="numpy", items=items, by="face", where="view != '3'")
    means = np.load(tmp_path / "faces" / "layer.npy")
    assert means.dtype == np.float32
    np.testing.assert_array_equal(means, [half[:2].mean(0), half[2:].mean(0)])
    assert pd.read_csv(tmp_path / "faces" / "items.csv").to_dict("list") == {"face": ["a", "b"], "items": [2, 2]}


def test_files_of_odd_names(array: np.ndarray, tmp_path: Path) -> None:
    written = export(array, tmp_path / "e", "conv: 1", format="files", items=ODD)
    folder = tmp_path / "e" / "conv=3A=201"
    assert written[-1] == folder / "items.csv"
    assert all(path.parent.parent == folder for path in written[:-1])
    table = pd.read_csv(folder / "items.csv", dtype=str, keep_default_na=False)
    assert keys_of(folder / "items.csv") == ODD
    assert len({file.lower() for file in table["npy_file"]}) == len(ODD)  # where case does not count
    for file, row, key in zip(table["npy_file"], array, ODD, strict=True):
        np.testing.assert_array_equal(np.load(folder / file), row)
        assert tuple(map(original_name, file.removesuffix(".npy").split("/"))) == key


def test_names_of_files_can_be_undone() -> None:
    names = ["s12", "007", "a b", "é", "=41", "_", "__init__", "..", "", "x" * 100, "Ä/ä", "a\nb", "A", "a"]
    assert [original_name(name) for name in file_names(names).values()] == names
    assert [file_name(name) for name in ("s12", "a/b", ".x", "_x")] == ["s12", "a=2Fb", "_.x", "__x"]
    assert file_names(["Ab", "aB", "ab"]) == {"Ab": "_=41b", "aB": "a=42", "ab": "ab"}
    with pytest.raises(ValueError, match="not the name of a file made here"):
        original_name("a=61")
    with pytest.raises(ValueError, match="too long"):
        file_names(["x" * 300])


def test_hdf5(small_store: Path, array: np.ndarray, tmp_path: Path) -> None:
    store = FeatureStore.open(small_store)
    (path,) = export(store, tmp_path / "e.h5", format="hdf5", where="face_id != 'f1'")
    source = store.source()
    with h5py.File(path) as file:
        assert list(zip(file["face_id"].asstr()[:], file["view"].asstr()[:], strict=True)) == list(source.keys[2:])
        for name in LAYERS:
            np.testing.assert_array_equal(file[name][:], source.rows(name).gather(range(2, 10)).numpy())
            assert file[name].attrs["backbone"] == "vggface"
            assert file[name].attrs["weights"] == source.attributes["weights"]
            assert json.loads(file[name].attrs["recipe"]) == source.attributes["recipe"]
        assert list(file["items/path"].asstr()[:]) == list(source.items["path"][2:])
    export(array, path, "a/b", format="hdf5", items=ODD)  # takes its place
    with h5py.File(path) as file:
        assert list(file) == ["a=2Fb", "face_id", "items", "view"]
        assert file["a=2Fb"].attrs["layer"] == "a/b"
    with pytest.raises(FeatureStoreError, match="a layer and a column of one name"):
        export(array, path, "view", format="hdf5", items=ODD)


def test_an_xarray_dataset_says_what_it_is_of(small_store: Path, tmp_path: Path) -> None:
    (path,) = export(FeatureStore.open(small_store).xarray(), tmp_path / "e.h5", LAYERS[0], format="hdf5")
    with h5py.File(path) as file:
        assert file[LAYERS[0]].attrs["backbone"] == "vggface"


def layout(path: Path) -> dict[str, str]:
    with h5py.File(path) as file:
        found = {"attributes": " ".join(sorted(file.attrs))}
        file.visititems(lambda name, one: found.update({name: type(one).__name__}))
    return found


def test_rsatoolbox_datasets_have_its_layout(array: np.ndarray, tmp_path: Path) -> None:
    """That of rsatoolbox 0.3.2, as its own ``Dataset.save`` wrote it."""
    (path,) = export(array, tmp_path / "e", "l", format="rsatoolbox", items=[(f"f{i}", "1") for i in range(7)])
    assert layout(path) == {
        "attributes": "rsatoolbox_version type",
        "channel_descriptors": "Group",
        "channel_descriptors/feature": "Dataset",
        "descriptors": "Group",
        "measurements": "Dataset",
        "obs_descriptors": "Group",
        "obs_descriptors/face_id": "Dataset",
        "obs_descriptors/view": "Dataset",
    }
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["measurements"][:], array.reshape(7, 6))
        assert file["obs_descriptors/face_id"].dtype.kind == "S"
        assert file.attrs["type"] == "Dataset"


@pytest.mark.parametrize("items", [[(f"f{i}", "1") for i in range(7)], ODD])
def test_rsatoolbox_reads_datasets(array: np.ndarray, tmp_path: Path, items) -> None:
    rsatoolbox = pytest.importorskip("rsatoolbox")
    (path,) = export(array, tmp_path / "e", "l", format="rsatoolbox", items=items)
    found = rsatoolbox.data.dataset.load_dataset(str(path))
    np.testing.assert_array_equal(found.measurements, array.reshape(7, 6))
    assert list(zip(*(map(str, found.obs_descriptors[name]) for name in ("face_id", "view")), strict=True)) == items
    assert found.descriptors["layer"] == "l"
    one = found.subset_obs("face_id", items[3][0])
    np.testing.assert_array_equal(one.measurements, array[3].reshape(1, 6))


@pytest.mark.parametrize("items", [[(f"f{i}", "1") for i in range(7)], ODD])
def test_rdms(array: np.ndarray, tmp_path: Path, items, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurestore.queries.dissimilarity.pair_block_rows", lambda *_: 3)
    made = rdm(array, "l", items=items, metric="euclidean")
    path = export_rdm(made, tmp_path / "r.h5")
    expected = pdist(array.reshape(7, 6))
    with h5py.File(path) as file:
        np.testing.assert_allclose(file["dissimilarities"][:], [expected], rtol=1e-6)
        assert file.attrs["dissimilarity_measure"] == "euclidean"
        assert sorted(file) == ["descriptors", "dissimilarities", "pattern_descriptors", "rdm_descriptors"]
    computed = export_rdm(made.compute(), tmp_path / "c.h5")
    with h5py.File(path) as file, h5py.File(computed) as other:
        np.testing.assert_array_equal(file["dissimilarities"][:], other["dissimilarities"][:])


@pytest.mark.parametrize("items", [[(f"f{i}", "1") for i in range(7)], ODD])
def test_rsatoolbox_reads_rdms(array: np.ndarray, tmp_path: Path, items) -> None:
    rsatoolbox = pytest.importorskip("rsatoolbox")
    made = rdm(array, "l", items=items, metric="euclidean")
    found = rsatoolbox.rdm.load_rdm(str(export_rdm(made, tmp_path / "r.h5")))
    np.testing.assert_allclose(found.get_matrices()[0], made.values)
    assert list(map(str, found.pattern_descriptors["face_id"])) == [face for face, _ in items]
    assert list(map(str, found.rdm_descriptors["layer"])) == ["l"]
    assert found.dissimilarity_measure == "euclidean"


def test_rdms_of_several_layers(small_store: Path, small_rows, tmp_path: Path) -> None:
    path = export_rdm(rdm(FeatureStore.open(small_store), metric="correlation"), tmp_path / "r.h5")
    with h5py.File(path) as file:
        assert [name.decode() for name in file["rdm_descriptors/layer"]] == LAYERS
        for name, row in zip(LAYERS, file["dissimilarities"], strict=True):
            np.testing.assert_allclose(row, pdist(small_rows[name].reshape(10, -1), "correlation"), atol=1e-4)


def test_a_failed_export_leaves_what_was_there(array: np.ndarray, tmp_path: Path) -> None:
    export(array, tmp_path / "e", "l", format="numpy", items=ODD)
    array[5, 0, 0] = np.nan
    for format, path in (("numpy", "e"), ("hdf5", "f.h5"), ("rsatoolbox", "e")):
        with pytest.raises(FeatureStoreError, match=r"'l' holds NaN or infinite numbers for 1 items: _a\|"):
            export(array * 2, tmp_path / path, "l", format=format, items=ODD)
    assert np.load(tmp_path / "e" / "l.npy")[0, 0, 0] == array[0, 0, 0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["e", "items.csv", "l.npy"]


def test_what_can_be_wrong(array: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"no `format` 'hdf'. Did you mean hdf5\?"):
        export(array, tmp_path, "l", format="hdf", items=ODD)
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureStoreError, match=r"file cannot be written: .*Choose another `path`"):
        export(array, tmp_path / "file", "l", format="numpy", items=ODD)
    with pytest.raises(FeatureStoreError, match=r"cannot be written: 'xxx.*too long a name.*`path`"):
        export(array[:1], tmp_path / "e", "l", format="files", items=[("x" * 300, "1")])
    with pytest.raises(FeatureStoreError, match="`rdm` has the dimensions a, b; give what"):
        export_rdm(xr.DataArray(np.zeros((3, 3)), dims=("a", "b")), tmp_path / "r.h5")


def test_two_items_of_one_key_are_not_one_file(tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"`items` holds \('a', '1'\) twice, which would be one file"):
        export(np.ones((2, 3)), tmp_path / "x", items=[("a", "1"), ("a", "1")], format="files")
