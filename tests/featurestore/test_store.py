"""Opening a store, its keys and sources; and other programs opening the same bytes."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorstore
import xarray as xr
import zarr
from dask.system import CPU_COUNT

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.repair import keep_intact
from featurestore.caching.verify import check_source
from featurestore.store import lazy
from featurestore.store.lazy import block_bounds
from featurestore.store.lock import store_lock
from featurestore.store.shards import DamagedShard
from tests.conftest import LAYERS, run_pass, write_photographs

KEPT = Path(__file__).parent / "data"


def test_items_are_in_row_order_with_their_metadata(tmp_path: Path) -> None:
    write_photographs(tmp_path, 11, 1)
    table = tmp_path / "faces.csv"
    pd.DataFrame(
        {"face_id": [f"f{i}" for i in range(11, 0, -1)], "view": "1", "path": [f"f{i}/1.png" for i in range(11, 0, -1)],
         "gender": ["female", "male"] * 5 + ["female"], "age": range(11), "known": [True, False] * 5 + [True]}
    ).to_csv(table, index=False)  # fmt: skip
    run_pass(table, tmp_path / "s.zarr", ["maxp_2_2"])
    items = FeatureStore.open(tmp_path / "s.zarr").items
    assert [face for face, _ in items.index] == [f"f{i}" for i in range(1, 12)]
    assert items["age"].tolist() == list(range(10, -1, -1))
    assert items["known"].dtype == bool
    assert items.loc[("f11", "1"), "gender"] == "female"
    assert items["path"].iloc[0] == str(tmp_path / "f1" / "1.png")


def test_keys_are_found_many_at_once(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    assert store.find([("f5", "2"), ("f1", "1"), ("f5", "2")]).tolist() == [9, 0, 9]
    assert store.find(store.items.index[3:5]).tolist() == [3, 4]
    assert store.find(pd.DataFrame({"face_id": ["f2"], "view": ["1"], "more": [0]})).tolist() == [2]
    assert store.find([]).shape == (0,)


def test_unknown_keys_are_named(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    with pytest.raises(FeatureStoreError, match=r"2 of 3 keys are not in .*\('f55', '1'\).*Did you mean f5"):
        store.find([("f1", "1"), ("f55", "1"), ("f1", "9")])
    with pytest.raises(FeatureStoreError, match=r"Face 'f1' has no view '9'; it has 1, 2\."):
        store.find([("f1", "9")])
    with pytest.raises(FeatureStoreError, match=r"1 of 2 faces are not in .*: f55\. .*Did you mean f5"):
        store.find(["f1", "f55"])
    for wrong in ([("f1", 1.0)], [("f1", None)], [("f1", True)], pd.DataFrame({"face_id": ["f1"], "view": [1.5]})):
        with pytest.raises(FeatureStoreError, match=r"pairs of strings, or of integers; .* is "):
            store.find(wrong)
    for wrong in ([1, 2], [("f1", "1", "x")], [("f1", "1"), "f2"]):
        with pytest.raises(FeatureStoreError, match="or faces alone"):
            store.find(wrong)
    with pytest.raises(FeatureStoreError, match=r"no column angle; it has head, view\..*`columns`"):
        store.find(pd.DataFrame({"head": ["f1"], "view": ["1"]}), columns={"face_id": "head", "view": "angle"})


def test_integers_columns_and_faces_alone_are_keys_too(tmp_path: Path) -> None:
    for name in ("12/2", "12/10", "3/1"):
        path = write_photographs(tmp_path / "one", 1, 1) / "f1" / "1.png"
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "p" / f"{name}.png")
    run_pass(tmp_path / "p", tmp_path / "s.zarr", ["relu_1_1"])
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.items.index.tolist() == [("3", "1"), ("12", "2"), ("12", "10")]
    for keys in ([(12, 10), (3, 1)], [(np.int64(12), "10"), ("3", np.uint8(1))]):
        assert store.find(keys).tolist() == [2, 0]
    assert store.find((12, 2)).tolist() == store.find(("12", "2")).tolist() == [1]
    assert store.find(pd.MultiIndex.from_tuples([(12, 10), (3, 1)])).tolist() == [2, 0]
    table = pd.DataFrame({"head": [12, 3], "angle": ["2", "1"]})
    assert store.find(table, columns={"face_id": "head", "view": "angle"}).tolist() == [1, 0]
    assert store.find("12").tolist() == [1, 2]
    assert store.find(pd.Series(["3"])).tolist() == [0]
    assert store.find(["12", "3", "12"]).tolist() == [1, 2, 0, 1, 2]


def test_keys_are_found_in_a_store_of_several_sources(tmp_path: Path) -> None:
    images, store = write_photographs(tmp_path / "p", 2, 1), tmp_path / "s.zarr"
    run_pass(images, store, ["relu_1_1"])
    run_pass(images, store, ["maxp_1_2"], weights="random:1")
    assert FeatureStore.open(store).find([("f2", "1")]).tolist() == [1]  # the same in both
    write_photographs(images, 3, 1)
    run_pass(images, store, ["relu_1_1"])
    opened = FeatureStore.open(store)
    with pytest.raises(FeatureStoreError, match=r"2 sources are in .* say which"):
        opened.find([("f2", "1")])
    assert opened.find("f3", layer="relu_1_1").tolist() == [2]
    with pytest.raises(FeatureStoreError, match="not in"):
        opened.find("f3", layer="maxp_1_2")


def test_several_sources_have_to_be_told_apart(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 2, 1)
    run_pass(images, tmp_path / "s.zarr", ["maxp_2_2"])
    run_pass(images, tmp_path / "s.zarr", ["maxp_2_2"], weights="random:1")
    run_pass(images, tmp_path / "s.zarr", ["maxp_2_2"], recipe="vggface-rgb")
    run_pass(images, tmp_path / "s.zarr", ["maxp_2_2"], precision="bf16")
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert len(store.sources) == 4
    names = list(store.sources)
    with pytest.raises(FeatureStoreError, match=r"4 sources of .* hold maxp_2_2, so say which") as error:
        store.rows("maxp_2_2")
    assert all(name in str(error.value) for name in names)
    values = [store.rows("maxp_2_2", source=name).gather([0]).numpy() for name in names]
    assert all(not np.array_equal(values[0], other) for other in values[1:])
    assert store.sources[names[0]].attributes["backbone"] == "vggface"
    with pytest.raises(FeatureStoreError, match="no source 'vggface-x'"):
        store.rows("maxp_2_2", source="vggface-x")


def test_a_layer_says_which_source_is_meant(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 2, 1)
    run_pass(images, tmp_path / "s.zarr", ["maxp_1_2", "maxp_2_2"])
    run_pass(images, tmp_path / "s.zarr", ["maxp_1_2", "relu_1_1"], weights="random:1")
    run_pass(images, tmp_path / "s.zarr", ["conv_1_1"], weights="random:2")
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.source(layers=["maxp_2_2"]).attributes["weights"] == "seed:0"
    assert store.source(layers=["relu_1_1", "maxp_1_2"]).attributes["weights"] == "seed:1"
    one = store.source(layers=["relu_1_1"])
    assert np.array_equal(store.rows("relu_1_1").gather([1]), one.rows("relu_1_1").gather([1]))
    assert np.array_equal(store.dask("relu_1_1").compute(), one.dask("relu_1_1").compute())
    with pytest.raises(FeatureStoreError, match=r"2 sources of .* hold maxp_1_2, so say which: `source`") as error:
        store.rows("maxp_1_2")
    assert store.source(layers=["conv_1_1"]).name not in str(error.value)
    with pytest.raises(FeatureStoreError, match=r"no source of .* holds maxp_2_3\. Did you mean maxp_2_2"):
        store.rows("maxp_2_3")
    with pytest.raises(FeatureStoreError, match=r"no source of .* holds maxp_2_2, relu_1_1 together"):
        store.source(layers=["maxp_2_2", "relu_1_1"])
    with pytest.raises(FeatureStoreError, match=r"3 sources are in .*, so say which"):
        store.source()


def test_a_missing_layer_comes_with_its_command(small_store: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"it holds maxp_1_2, maxp_2_2\. Add it: .*--layers fc7-relu"):
        FeatureStore.open(small_store).rows("fc7-relu")


def test_what_is_not_a_store_is_refused(tmp_path: Path, small_store: Path) -> None:
    with pytest.raises(FeatureStoreError, match="there is no store"):
        FeatureStore.open(tmp_path / "gone.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FeatureStoreError, match=r"not a feature store: it has no zarr\.json"):
        FeatureStore.open(tmp_path / "folder")
    zarr.create_group(tmp_path / "other.zarr", zarr_format=3)
    with pytest.raises(FeatureStoreError, match="not a feature store"):
        FeatureStore.open(tmp_path / "other.zarr")
    shutil.copytree(small_store, tmp_path / "new.zarr")
    root = tmp_path / "new.zarr" / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["format_version"] = 3
    root.write_text(json.dumps(document))
    with pytest.raises(FeatureStoreError, match="format version 3; this program reads versions 1, 2"):
        FeatureStore.open(tmp_path / "new.zarr")
    root.write_text("{")
    with pytest.raises(FeatureStoreError, match="damaged"):
        FeatureStore.open(tmp_path / "new.zarr")


def test_a_store_cannot_point_outside_itself(tmp_path: Path, small_store: Path) -> None:
    shutil.copytree(small_store, tmp_path / "s.zarr")
    name = next(iter(FeatureStore.open(small_store).sources))
    path = tmp_path / "s.zarr" / name / "zarr.json"
    document = json.loads(path.read_text())
    arrays = document["consolidated_metadata"]["metadata"]
    arrays["../../secret"] = arrays.pop("maxp_2_2")
    path.write_text(json.dumps(document))
    with pytest.raises(FeatureStoreError, match="damaged"):
        FeatureStore.open(tmp_path / "s.zarr")


def test_zarr_python_reads_it(small_store: Path) -> None:
    source = FeatureStore.open(small_store).source()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(small_store / source.name, mode="r")
        for layer in LAYERS:
            assert np.array_equal(group[layer][:], source.rows(layer).gather(range(10)).numpy())
        assert group["face_id"][:].tolist() == [face for face, _ in source.keys]
        assert group["view"][:].tolist() == [view for _, view in source.keys]
        assert sorted(dict(zarr.open_group(small_store, mode="r").groups())) == [source.name]


def test_tensorstore_reads_it(small_store: Path) -> None:
    source = FeatureStore.open(small_store).source()
    for layer in LAYERS:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(small_store / source.name / layer)}}
        array = tensorstore.open(spec, read=True).result()
        assert np.array_equal(array[:].read().result(), source.rows(layer).gather(range(10)).numpy())
        assert array.domain.labels[0] == "item"


@pytest.mark.parametrize("through_root", [False, True])
def test_xarray_reads_it(small_store: Path, through_root: bool) -> None:
    source = FeatureStore.open(small_store).source()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = (
            xr.open_zarr(small_store, group=source.name) if through_root else xr.open_zarr(small_store / source.name)
        )
    assert dataset["maxp_2_2"].dims == ("item", "channel_128", "y_56", "x_56")
    assert set(dataset.coords) == {"face_id", "view", "path", "image_sha256"}
    chosen = dataset["maxp_2_2"][(dataset.face_id == "f3").compute()]
    assert np.array_equal(chosen.values, source.rows("maxp_2_2").gather([4, 5]).numpy())
    ours = source.xarray()
    xr.testing.assert_equal(dataset.compute(), ours.reset_index("item").compute())
    assert np.array_equal(ours["maxp_2_2"].sel(face_id="f3").values, chosen.values)
    assert np.array_equal(ours["maxp_2_2"].sel(face_id="f3", view="2").values, chosen.values[1])


@pytest.mark.parametrize("compress", ["zstd", "blosc"])
def test_other_readers_read_compressed_layers(tmp_path: Path, compress: str) -> None:
    run_pass(
        write_photographs(tmp_path / "p", 3, 2), tmp_path / "s.zarr", ["maxp_2_2"], compress=compress, dtype="float16"
    )
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    expected = source.rows("maxp_2_2").gather(range(6)).numpy()
    assert np.array_equal(zarr.open_group(tmp_path / "s.zarr" / source.name, mode="r")["maxp_2_2"][:], expected)
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(tmp_path / "s.zarr" / source.name / "maxp_2_2")},
    }
    assert np.array_equal(tensorstore.open(spec, read=True).result()[:].read().result(), expected)


def test_shards_written_by_zarr_python_are_put_in_order(tmp_path: Path, small_store: Path) -> None:
    """Another program puts the same records elsewhere in a shard: refused, and brought back without computing."""
    shutil.copytree(small_store, tmp_path / "s.zarr")
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    expected = source.rows("maxp_2_2").gather(range(10)).numpy()
    shutil.rmtree(tmp_path / "s.zarr" / source.name / "maxp_2_2" / "c")
    array = zarr.open_group(tmp_path / "s.zarr" / source.name, mode="r+", use_consolidated=False)["maxp_2_2"]
    array[:] = expected
    opened = FeatureStore.open(tmp_path / "s.zarr")
    with pytest.raises(DamagedShard, match="records do not begin where they have to"):
        opened.rows("maxp_2_2")
    with store_lock(tmp_path / "s.zarr", "test"):
        lost = keep_intact(opened, opened.source(), check_source(opened.source()).damage)
    assert not lost["maxp_2_2"].any()
    assert np.array_equal(opened.rows("maxp_2_2", verify=True).gather(range(10)).numpy(), expected)
    layers = [store / source.name / "maxp_2_2" for store in (small_store, tmp_path / "s.zarr")]
    assert [[path.read_bytes() for path in sorted(layer.rglob("c/*/0/0/0"))] for layer in layers[:1]] == [
        [path.read_bytes() for path in sorted(layers[1].rglob("c/*/0/0/0"))]
    ]


@pytest.mark.parametrize("version", [1, 2])
def test_the_kept_store_of_each_version_opens(version: int) -> None:
    """A tiny store written when the format was made. It must open for ever; do not write it anew."""
    store = FeatureStore.open(KEPT / f"version-{version}.zarr")
    assert list(store.layers) == ["maxp_5_3", "fc7-relu"]
    assert store.items.index.tolist() == [("head-007", "11.25"), ("head-007", "frontal"), ("head-012", "frontal")]
    assert store.items["gender"].tolist() == ["female", "female", "male"]
    assert store.items["age"].tolist() == [31.0, 31.0, 45.5]
    maps = store.rows("maxp_5_3").gather([2, 0])
    assert maps.shape == (2, 8, 2, 2)
    assert maps[0].flatten().tolist() == [i / 8 + 2 for i in range(32)]
    assert store.rows("fc7-relu").gather([1]).tolist() == [[0.5, 1.0, 1.5, 2.0]]
    assert store.rows("fc7-relu").present.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["consolidated_metadata"].update(metadata=None),
        lambda d: d["attributes"].update(coordinates=5),
        lambda d: d["attributes"].pop("recipe"),
        lambda d: d["consolidated_metadata"]["metadata"]["face_id"].pop("shape"),
        lambda d: d["consolidated_metadata"]["metadata"]["view"].update(shape=[3]),
        lambda d: d["consolidated_metadata"]["metadata"]["view"].update(data_type="int64"),
        lambda d: d["consolidated_metadata"]["metadata"]["maxp_2_2"].update(fill_value=0.0),
        lambda d: d["consolidated_metadata"]["metadata"]["maxp_2_2"].update(shape=[10, 128, 56, -56]),
        lambda d: d["consolidated_metadata"]["metadata"]["maxp_2_2"].update(shape=[9, 128, 56, 56]),
    ],
)
def test_a_document_that_was_edited_is_damaged_not_believed(tmp_path: Path, small_store: Path, damage) -> None:
    shutil.copytree(small_store, tmp_path / "s.zarr")
    path = next((tmp_path / "s.zarr").glob("*/zarr.json"))
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FeatureStoreError, match="damaged"):
        FeatureStore.open(tmp_path / "s.zarr")


def test_every_flipped_bit_of_a_key_is_noticed(tmp_path: Path, small_store: Path) -> None:
    shutil.copytree(small_store, tmp_path / "s.zarr")
    path = next((tmp_path / "s.zarr").glob("*/face_id/c/0"))
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(FeatureStoreError, match="does not match its checksum"):
            FeatureStore.open(tmp_path / "s.zarr").find([("f1", "1")])


def test_what_others_put_beside_our_arrays_stays(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 3, 1)
    run_pass(images, tmp_path / "s.zarr", ["maxp_2_2"])
    zarr.open_group(tmp_path / "s.zarr", mode="r+").create_group("analysis")
    assert len(FeatureStore.open(tmp_path / "s.zarr").sources) == 1
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    group = zarr.open_group(tmp_path / "s.zarr" / source.name, mode="r+", use_consolidated=False)
    group.create_array("rdm", data=np.eye(3))
    zarr.consolidate_metadata(tmp_path / "s.zarr" / source.name)
    run_pass(write_photographs(tmp_path / "p", 5, 1), tmp_path / "s.zarr", ["maxp_2_2"])
    assert FeatureStore.open(tmp_path / "s.zarr").source().n_items == 5
    assert np.array_equal(zarr.open_group(tmp_path / "s.zarr" / source.name, mode="r")["rdm"][:], np.eye(3))


@pytest.mark.parametrize(
    ("n", "slots", "row_bytes"), [(500, 500, 16_384), (500, 64, 16_384), (7, 4, 10), (9_999, 256, 100_352), (0, 4, 8)]
)
def test_dask_blocks(n: int, slots: int, row_bytes: int) -> None:
    """All items, in order, at least as many blocks as cores; none within two shards in part, none above 64 MiB."""
    bounds = block_bounds(n, slots, row_bytes)
    assert [item for start, stop in bounds for item in range(start, stop)] == list(range(n))
    assert len(bounds) >= min(n, CPU_COUNT)
    for start, stop in bounds:
        whole = start % slots == 0 and (stop % slots == 0 or stop == n)
        assert whole or start // slots == (stop - 1) // slots
        assert (stop - start) * row_bytes <= 1 << 26


def test_dask_reads_parts_of_shards(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FeatureStore.open(small_store).source()
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 3 * source.layers["maxp_2_2"].row_bytes)
    array = source.dask("maxp_2_2")
    assert array.chunks[0] == (3, 1, 3, 1, 2)
    assert np.array_equal(array.compute(), np.asarray(source.rows("maxp_2_2")))


def test_other_rows_have_another_dask_name(tmp_path: Path) -> None:
    run_pass(write_photographs(tmp_path / "p", 3, 1), tmp_path / "s.zarr", ["maxp_2_2"])
    store = FeatureStore.open(tmp_path / "s.zarr")
    before = store.dask("maxp_2_2").name
    assert store.dask("maxp_2_2").name == before
    shard = store.layers["maxp_2_2"].shard_path(0)
    shutil.copy(shard, tmp_path / "copy")
    (tmp_path / "copy").replace(shard)
    assert store.dask("maxp_2_2").name != before
