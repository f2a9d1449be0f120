"""Activations of other programs as a source: what was exported comes back, and what is wrong is refused."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat, savemat

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.files import sha256_of
from featurestore.queries.dissimilarity import rdm
from featurestore.queries.exporting import export
from featurestore.queries.selection import shared_items
from featurestore.store import importing as module
from featurestore.store.activation_files import open_activations
from featurestore.store.importing import Imported, import_activations, row_names
from featurestore.store.matlab import arrays_in
from featurestore.store.summary import describe_store
from tests.conftest import LAYERS

KEYS = [("a/b", "1"), ("ä", "x|flipped"), ("007", "NA"), ("A", "1"), ("a", "1")]


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(KEYS), 2, 3)).astype(np.float32)


def rows_of(store: Path, done: Imported, layer: str) -> np.ndarray:
    source = FeatureStore.open(store).source(done.source)
    assert source.n_items == done.n_items
    return source.rows(layer).gather(range(source.n_items)).numpy()


@pytest.mark.parametrize("kind", ["numpy", "files", "hdf5"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip(array: np.ndarray, tmp_path: Path, kind: str, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOTS", 2)
    monkeypatch.setattr(module, "_READ_AT_ONCE", 1)
    array = array.astype(dtype)
    written = export(array, tmp_path / ("e.h5" if kind == "hdf5" else "e"), "conv", format=kind, items=KEYS)
    path = written[-1].parent if kind == "files" else written[0]
    counted: list[int] = []
    done = import_activations(path, tmp_path / "s.zarr", kind=kind, layer="conv", progress=counted.append)
    assert (done.n_items, done.layers, done.notes, sum(counted)) == (5, {"conv": (2, 3)}, (), 5)
    values = rows_of(tmp_path / "s.zarr", done, "conv")
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, array)
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    assert list(source.keys) == KEYS
    assert source.layers["conv"].slots == 2


@pytest.mark.parametrize("kind", ["numpy", "hdf5"])
def test_a_store_that_was_exported(small_store: Path, tmp_path: Path, kind: str) -> None:
    store = FeatureStore.open(small_store)
    path, *_ = export(store, tmp_path / ("e.h5" if kind == "hdf5" else "e"), format=kind)
    layer = None if kind == "hdf5" else LAYERS[0]
    done = import_activations(path, tmp_path / "s.zarr", kind=kind, layer=layer)
    for name in LAYERS if kind == "hdf5" else LAYERS[:1]:
        np.testing.assert_array_equal(rows_of(tmp_path / "s.zarr", done, name), store.rows(name).gather(range(10)))
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    assert source.name == f"imported-{sha256_of(path)[:12]}"
    assert source.attributes["imported"] == {"from": path.name, "kind": kind, "sha256": sha256_of(path)}
    assert {name: source.attributes[name] for name in ("backbone", "weights", "recipe")} == {
        "backbone": "imported",
        "weights": "unknown",
        "recipe": {},
    }
    assert source.weights == f"unknown: imported from {path.name}"
    assert source.attributes["precision"] == store.layers[LAYERS[0]].dtype.name
    assert list(source.items["path"]) == list(store.items["path"])
    assert set(source.items["image_sha256"]) == {""}
    assert "unknown: imported from" in describe_store(FeatureStore.open(tmp_path / "s.zarr"))
    with pytest.raises(FeatureStoreError, match="have no photograph in common"):
        shared_items([source, store.source()])
    assert rdm(FeatureStore.open(tmp_path / "s.zarr"), LAYERS[0]).shape == (10, 10)


def test_what_thingsvision_saves(array: np.ndarray, tmp_path: Path) -> None:
    flat = array.reshape(5, 6)
    (tmp_path / "file_names.txt").write_text("\n".join(f"p/{i}.png" for i in range(5)) + "\n")
    np.save(tmp_path / "features.npy", flat)
    np.savez(tmp_path / "features.npz", other=flat * 2, features=flat)
    np.savetxt(tmp_path / "features.txt", flat)
    savemat(tmp_path / "features.mat", {"features": flat})
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = flat
    for ending in ("npy", "npz", "txt", "mat", "h5"):
        path = tmp_path / f"features.{ending}"
        assert row_names(path, kind="numpy") == [f"p/{i}.png" for i in range(5)]
        with pytest.raises(FeatureStoreError, match=r"does not say which.*`items`.*rows p/0.png, p/1.png and 3 more"):
            import_activations(path, tmp_path / "s.zarr", kind="numpy", layer="l")
        done = import_activations(path, tmp_path / "s.zarr", kind="numpy", layer="l", items=KEYS, name=ending)
        assert done.notes == (("l: float64 became float32",) if ending == "txt" else ())
        np.testing.assert_array_equal(rows_of(tmp_path / "s.zarr", done, "l"), flat)
    assert len(FeatureStore.open(tmp_path / "s.zarr").sources) == 5


def test_metadata_comes_along(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array.astype(np.int32))
    table = pd.DataFrame(KEYS, columns=["face_id", "view"]).assign(
        age=[1.5, 2, 3, 4, np.nan], sex=["f", None, "m", "f", "m"], n=range(5), channel_3=1, image_sha256="x"
    )
    done = import_activations(tmp_path / "a.npy", tmp_path / "s.zarr", kind="numpy", layer="l", items=table)
    items = FeatureStore.open(tmp_path / "s.zarr").items
    assert list(items) == ["path", "image_sha256", "age", "sex", "n"]
    assert list(items["sex"]) == ["f", "", "m", "f", "m"]
    np.testing.assert_array_equal(items["age"], table["age"])
    assert done.notes == (
        "the column 'channel_3' is left out: it cannot name a coordinate of a store",
        "l: int32 became float32",
    )


def test_a_folder_of_files(array: np.ndarray, tmp_path: Path) -> None:
    for face, view, row in (("f10", "1", array[0]), ("f2", "10", array[1]), ("f2", "9", array[2])):
        (tmp_path / "f" / face).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "f" / face / f"{view}.npy", row)
    done = import_activations(tmp_path / "f", tmp_path / "s.zarr", kind="files", layer="l")
    assert list(FeatureStore.open(tmp_path / "s.zarr").source().keys) == [("f2", "9"), ("f2", "10"), ("f10", "1")]
    np.testing.assert_array_equal(rows_of(tmp_path / "s.zarr", done, "l"), array[[2, 1, 0]])
    np.save(tmp_path / "f" / "f2" / "9.npy", array[0].T)
    np.save(tmp_path / "f" / "f2" / "10.npy", array[0])
    with pytest.raises(FeatureStoreError, match=r"f2/10.npy has shape \(2, 3\) float32, .*f2/9.npy \(3, 2\)"):
        import_activations(tmp_path / "f", tmp_path / "t.zarr", kind="files", layer="l")
    np.save(tmp_path / "f" / "f2" / "9.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(FeatureStoreError, match=r"cannot be read as `kind` files"):
        import_activations(tmp_path / "f", tmp_path / "t.zarr", kind="files", layer="l")
    (tmp_path / "f" / "items.csv").write_text("face_id,view,npy_file\na,1,../secret.npy\n")
    with pytest.raises(FeatureStoreError, match=r"secret\.npy, which is outside of its folder"):
        import_activations(tmp_path / "f", tmp_path / "t.zarr", kind="files", layer="l")
    assert not list((tmp_path / "t.zarr").glob("*/*"))


def pickled(path: Path, thing: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(thing, protocol))
    return path


def test_pickles(array: np.ndarray, tmp_path: Path) -> None:
    keys = pd.DataFrame(KEYS, columns=["face_id", "view"])
    flat = array.reshape(5, 6).astype(np.float64)
    index = pd.MultiIndex.from_frame(keys)
    wide = pd.DataFrame(flat)
    nested: dict = {}
    for (face, view), row in zip(KEYS, array, strict=True):
        nested.setdefault(face, {})[view] = row
    cases = {
        "a column of arrays": (keys.assign(age=range(5), fc7=list(array)), array),
        "two of them": (keys.assign(fc6=list(array * 2), l=list(array)), array),
        "columns of numbers": (pd.concat([keys, wide], axis=1), flat),
        "keys in the index": (wide.set_axis(index), flat),
        "a dict by key": (dict(zip(KEYS, array, strict=True)), array),
        "a dict by face": (nested, array),
    }
    for name, (thing, expected) in cases.items():
        for protocol in (2, 5):
            path = pickled(tmp_path / "a.pkl", thing, protocol)
            done = import_activations(path, tmp_path / f"{name}{protocol}.zarr", kind="pickle", layer="l")
            values = rows_of(tmp_path / f"{name}{protocol}.zarr", done, "l")
            np.testing.assert_array_equal(values, expected.astype(np.float32), err_msg=name)
            assert list(FeatureStore.open(tmp_path / f"{name}{protocol}.zarr").source().keys) == KEYS


def test_pickles_that_name_rows_otherwise(array: np.ndarray, tmp_path: Path) -> None:
    names = [f"p/{i}.png" for i in range(5)]
    for i, thing in enumerate((dict(zip(names, array, strict=True)), pd.DataFrame({"fc7": list(array)}, index=names))):
        path = pickled(tmp_path / f"{i}.pkl", thing)
        assert row_names(path, kind="pickle") == names
        done = import_activations(path, tmp_path / "s.zarr", kind="pickle", layer="l", items=KEYS)
        np.testing.assert_array_equal(rows_of(tmp_path / "s.zarr", done, "l"), array)
    path = pickled(tmp_path / "layers.pkl", {"fc6": array, "fc7": array * 2})
    done = import_activations(path, tmp_path / "s.zarr", kind="pickle", layer="fc7", items=KEYS)
    np.testing.assert_array_equal(rows_of(tmp_path / "s.zarr", done, "fc7"), array * 2)


def test_nothing_is_left_of_an_import_that_fails(array: np.ndarray, tmp_path: Path) -> None:
    array[[1, 3], 0, 0] = np.nan, np.inf
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(FeatureStoreError, match=r"'l' holds NaN.* for 2 items: ä\|x\|flipped, A\|1\. Nothing was"):
        import_activations(tmp_path / "a.npy", tmp_path / "s.zarr", kind="numpy", layer="l", items=KEYS)
    assert FeatureStore.open(tmp_path / "s.zarr").sources == {}
    assert [path.name for path in (tmp_path / "s.zarr").iterdir()] == ["zarr.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "nump"}, r"no `kind` 'nump'. Did you mean numpy\?"),
        ({"items": None}, r"does not say which face and view its 5 rows are of. Give `items`"),
        ({"items": KEYS[:4]}, "there are 4 items for 5 rows of .*a.npy"),
        ({"items": [*KEYS[:4], KEYS[0]]}, r"1 items have a key that another one has: a/b\|1"),
        ({"items": [*KEYS[:4], ("", "1")]}, "item 5 of 5 has no face_id"),
        ({"items": ["a"] * 5}, r"`items` are \(face, view\) pairs or a table; got a, a and 3 more"),
        ({"items": pd.DataFrame({"face_id": list("abcde")})}, "the items have no column view; they have face_id"),
        ({"layer": "a/b"}, "'a/b' cannot name a layer of the store. Give another `layer`"),
        ({"layer": "view"}, "'view' cannot name a layer"),
        ({"name": "../x"}, "`name` '../x' cannot name a source"),
        ({"kind": "hdf5"}, "a.npy cannot be read as `kind` hdf5"),
        ({"kind": "files"}, "is not a folder. `kind` files is a folder"),
        ({"kind": "pickle"}, "is damaged, or no pickle of arrays"),
    ],
)
def test_what_can_be_wrong(array: np.ndarray, tmp_path: Path, options: dict, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    given = {"kind": "numpy", "layer": "l", "items": KEYS, **options}
    with pytest.raises(FeatureStoreError, match=message):
        import_activations(tmp_path / "a.npy", tmp_path / "s.zarr", **given)
    assert not (tmp_path / "s.zarr").exists()


def test_files_that_are_wrong(array: np.ndarray, tmp_path: Path) -> None:
    def refused(path: Path, message: str, **options) -> None:
        with pytest.raises(FeatureStoreError, match=message):
            import_activations(path, tmp_path / "s.zarr", **{"kind": "numpy", "layer": "l", "items": KEYS, **options})

    refused(tmp_path / "none.npy", "there is no file or folder .*none.npy. Check the `path`")
    for name, content, message in (
        ("flat", array[:, 0, 0], r"has rows of shape \(\)"),
        ("deep", array.reshape(5, 2, 3, 1, 1), r"has rows of shape \(2, 3, 1, 1\)"),
        ("texts", np.array(["a"] * 5), "holds str.* where activations"),
        ("complex", array.astype(complex), "holds complex128 where activations"),
    ):
        np.save(tmp_path / f"{name}.npy", content)
        refused(tmp_path / f"{name}.npy", message)
    np.savez(tmp_path / "two.npz", a=array, b=array)
    refused(tmp_path / "two.npz", "two.npz holds a, b. Say which with `layer`")
    (tmp_path / "a.csv").write_text("")
    refused(tmp_path / "a.csv", r"reads .npy, .npz, .txt, .mat and .h5, not a.csv")
    pickled(tmp_path / "s.pkl", dict(zip(KEYS, [*array[:4], array[0].T], strict=True)))
    refused(tmp_path / "s.pkl", r"1 arrays have another shape .*\('a', '1'\) has \(3, 2\) float32", kind="pickle")
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["face_id"], file["view"] = ["a"], ["1"]
        file["l"] = h5py.ExternalLink("other.h5", "l")
    refused(tmp_path / "e.h5", "'l' is no array in this file", kind="hdf5")
    export(array, tmp_path / "f.h5", "l", format="hdf5", items=KEYS)
    refused(tmp_path / "f.h5", "f.h5 has no layer 'fc'", kind="hdf5", layer="fc")
    import_activations(tmp_path / "f.h5", tmp_path / "s.zarr", kind="hdf5", name="mine")
    refused(tmp_path / "f.h5", "already holds a source mine. Give another `name`", kind="hdf5", name="mine")


def matlab_file(values: dict, **options) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_of_matlab_are_those_that_scipy_reads(tmp_path: Path, packed: bool) -> None:
    numbers = np.arange(24)
    values = {
        "features": numbers.reshape(4, 3, 2).astype(np.float32),
        "wide": numbers.reshape(1, 24) / 7,
        "of_few_bytes": np.array([[1], [2]], np.int16),
        "whole": numbers.reshape(12, 2).astype(np.uint64),
        "none": np.empty((0, 3)),
    }
    others = {"text": "a", "cell": np.array(["a", "b"], object), "structure": {"a": 1}, "flags": np.array([[True]])}
    path = tmp_path / "a.mat"
    path.write_bytes(matlab_file({**values, **others}, do_compression=packed))
    found = {name: read() for name, read in arrays_in(path).items()}
    expected = loadmat(path)
    assert list(found) == [*values, "flags"]
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(value, expected[name])


def test_arrays_of_matlab_in_the_other_byte_order(tmp_path: Path) -> None:
    parts = [struct.pack(">IIII", 6, 8, 7, 0), struct.pack(">IIii", 5, 8, 2, 3), struct.pack(">HH4s", 1, 1, b"f")]
    content = b"".join([*parts, struct.pack(">II6f", 7, 24, *range(6))])
    (tmp_path / "a.mat").write_bytes(b"MATLAB".ljust(124) + b"\1\0MI" + struct.pack(">II", 14, len(content)) + content)
    expected = loadmat(tmp_path / "a.mat")["f"]
    np.testing.assert_array_equal(arrays_in(tmp_path / "a.mat")["f"](), expected)
    import_activations(tmp_path / "a.mat", tmp_path / "s.zarr", kind="numpy", layer="l", items=KEYS[:2])
    stored = FeatureStore.open(tmp_path / "s.zarr").rows("l").gather([0, 1]).numpy()
    np.testing.assert_array_equal(stored, np.array([[0, 2, 4], [1, 3, 5]], np.float32))


def row_of(path: Path, kind: str = "numpy") -> list[float]:
    with open_activations(path, kind, None) as found:
        (layer,) = found.layers.values()
        return layer.read(1, 2)[0].tolist()


def damaged_files(rows: np.ndarray) -> dict[str, bytes]:
    """By their names: what is wrong in them."""
    held, arrays = io.BytesIO(), io.BytesIO()
    np.save(held, rows)
    np.savez(arrays, features=rows)
    npy, npz = held.getvalue(), arrays.getvalue()
    packed = matlab_file({"features": rows}, do_compression=True)
    plain = matlab_file({"features": rows})
    cells = matlab_file({"features": rows, "names": np.array(["a", "b"], object)})
    strange = io.BytesIO()
    with zipfile.ZipFile(strange, "w") as archive:
        archive.writestr("features.npy", b"no array")
    hdf5 = io.BytesIO()
    with h5py.File(hdf5, "w") as file:
        file["features"] = rows
    huge = io.BytesIO()
    with h5py.File(huge, "w") as file:
        file.create_dataset("features", (6, 1 << 30), np.float32, chunks=(1, 1 << 20))
    directory = npz.index(b"PK\1\2")
    dims = plain.index(struct.pack("<IIii", 5, 8, 6, 2))
    return {
        "a header that does not end.npy": npy.replace(b"(6, 2), }", b"(6, 2), (", 1),
        "the end of the archive.npz": npz.replace(b"PK\1\2", b"PK\1\3"),
        "a sum.npz": npz.replace(rows.tobytes(), (rows + 1).tobytes()),
        "no array.npz": strange.getvalue(),
        "far more than its bytes.npz": npz[: directory + 24] + struct.pack("<I", 1 << 30) + npz[directory + 28 :],
        "a name.h5": hdf5.getvalue().replace(b"SNOD", b"SNOX"),
        "far more than its bytes.h5": huge.getvalue(),
        "packed numbers.mat": packed[:-4] + bytes(4),
        "packed numbers that end early.mat": packed[:-10],
        "text in a cell, which ends the process in SciPy.mat": cells[:-8] + b"\0\0\1\0" + cells[-8:],
        "a header that ends early.mat": plain[:125],
        "numbers that end early.mat": plain[:-10],
        "a shape of fewer numbers.mat": plain[:dims] + struct.pack("<IIii", 5, 8, 6, 1) + plain[dims + 16 :],
        "an older version.mat": matlab_file({"features": rows}, format="4"),
        "complex numbers.mat": matlab_file({"features": rows * 1j}),
    }


@pytest.mark.parametrize("name", damaged_files(np.arange(12.0, dtype=np.float32).reshape(6, 2)))
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(damaged_files(np.arange(12.0, dtype=np.float32).reshape(6, 2))[name])
    with pytest.raises(FeatureStoreError, match=f"{name} cannot be read as `kind` numpy: "):
        row_of(path)


def test_a_damaged_file_among_others_is_named(tmp_path: Path) -> None:
    for view in "12":
        np.save(tmp_path / f"{view}.npy", np.ones(3, np.float32))
    (tmp_path / "a").mkdir()
    (tmp_path / "1.npy").rename(tmp_path / "a" / "1.npy")
    (tmp_path / "a" / "2.npy").write_bytes((tmp_path / "2.npy").read_bytes().replace(b"(3,), }", b"(3,), ("))
    with pytest.raises(FeatureStoreError, match=r"2\.npy cannot be read as an array"):
        row_of(tmp_path, "files")
