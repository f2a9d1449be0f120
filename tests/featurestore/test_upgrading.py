"""Stores of format version 1 are read, are not written, and become version 2 without computing."""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.verify import check_source
from featurestore.store.coordinates import COPY, coordinate_metadata
from featurestore.store.lock import store_lock
from featurestore.store.removal import removal_of, remove
from featurestore.store.shards import ShardWriter
from featurestore.store.upgrading import upgrade_store
from featurestore.store.zarr_format import METADATA, root_document, write_json
from tests import commands
from tests.commands import command
from tests.conftest import LAYERS, files_of, run_pass, write_photographs

KEPT = Path(__file__).parent / "data" / "version-1.zarr"
NAMES = {"string": 0, "float64": 1, "int64": 2}  # how version 1 named the chunks of each type


def as_version_1(store: Path) -> Path:
    """The store as version 1 had it: records without gaps, no checksums apart from them, no copies, no digests."""
    (source,) = FeatureStore.open(store).sources.values()
    for layer in source.layers.values():
        rows = source.rows(layer.name)
        for shard in range(layer.n_shards):
            old = ShardWriter(layer.shard_path(shard), replace(layer, version=1).record, layer.slots)
            numbers = layer.shard_rows(shard)
            old.write(range(len(numbers)), rows.gather(numbers).numpy().reshape(len(numbers), -1))
            old.commit()
    for path in store.rglob("*" + COPY):
        path.unlink()
    shutil.rmtree(source.folder / "checksums")
    document = json.loads((source.folder / METADATA).read_text())
    document["attributes"]["format_version"] = 1
    del document["attributes"]["digests"], document["attributes"]["sha256"]
    arrays = document["consolidated_metadata"]["metadata"]
    for name in [name for name in arrays if name.startswith("checksums")]:
        del arrays[name]
    for name, array in source.coordinates.items():
        kind = array["data_type"]
        arrays[name] = coordinate_metadata(kind, source.n_items, NAMES[kind])
        if NAMES[kind]:
            (source.folder / name / "c" / "0").rename(source.folder / name / ("c.0" if kind == "float64" else "0"))
            (source.folder / name / "c").rmdir()
        write_json(source.folder / name / METADATA, arrays[name])
    write_json(source.folder / METADATA, document)
    root = root_document({source.name: document})
    write_json(store / METADATA, {**root, "attributes": {**root["attributes"], "format_version": 1}})
    return store


@pytest.fixture
def table(tmp_path: Path) -> Path:
    images = write_photographs(tmp_path / "p", 5, 2)
    keys = [(f"f{face}", str(view)) for face in range(1, 6) for view in (1, 2)]
    made = pd.DataFrame(keys, columns=["face_id", "view"]).assign(
        path=[f"{face}/{view}.png" for face, view in keys], age=np.arange(10) + 0.5, year=range(10)
    )
    made.to_csv(images / "faces.csv", index=False)
    return images / "faces.csv"


@pytest.mark.parametrize("options", [{}, {"compress": "zstd"}, {"dtype": "float16"}])
def test_an_upgraded_store_is_the_one_that_the_pass_writes(table: Path, tmp_path: Path, options: dict) -> None:
    run_pass(table, tmp_path / "new.zarr", LAYERS, **options)
    store = as_version_1(shutil.copytree(tmp_path / "new.zarr", tmp_path / "s.zarr"))
    before = FeatureStore.open(store)
    assert before.source().version == 1
    assert before.items["age"].tolist() == [i + 0.5 for i in range(10)]
    expected = FeatureStore.open(tmp_path / "new.zarr").rows(LAYERS[1], verify=True).gather(range(10))
    assert np.array_equal(before.rows(LAYERS[1]).gather(range(10)), expected)
    assert files_of(store) != files_of(tmp_path / "new.zarr")
    opened = before.rows(LAYERS[1])
    done = command("upgrade_store", store)
    assert done.returncode == 0, done.stderr
    assert files_of(store) == files_of(tmp_path / "new.zarr")
    assert np.array_equal(opened.gather(range(10)), expected)  # a reader that was open
    assert "nothing to do" in command("upgrade_store", store).stdout


def test_version_1_is_read_and_not_written(table: Path, tmp_path: Path) -> None:
    run_pass(table, tmp_path / "s.zarr", LAYERS)
    store = as_version_1(tmp_path / "s.zarr")
    before = files_of(store)
    report = check_source(FeatureStore.open(store).source())
    assert report.sound
    assert "format version 1 does not say whose row stands where" in report.notes[0]
    with pytest.raises(
        FeatureStoreError, match=r"version 1, which is read but not written.*pipelines/upgrade_store.py"
    ):
        run_pass(table, store, [*LAYERS, "conv_1_1"])
    with pytest.raises(FeatureStoreError, match="read but not written"):
        remove(store, removal_of(FeatureStore.open(store), None, LAYERS[0]))
    with pytest.raises(FeatureStoreError, match=r"holds no checksums apart from the rows.*upgrade_store"):
        FeatureStore.open(store).rows(LAYERS[0], verify=True)
    assert files_of(store) == before


def test_the_kept_store_is_upgraded_with_its_absent_row(tmp_path: Path) -> None:
    store = shutil.copytree(KEPT, tmp_path / "s.zarr")
    maps = FeatureStore.open(store).rows("maxp_5_3").gather(range(3))
    with store_lock(store, "test"):
        assert upgrade_store(FeatureStore.open(store)) == []
    opened = FeatureStore.open(store)
    assert opened.source().version == 2
    assert np.array_equal(opened.rows("maxp_5_3", verify=True).gather(range(3)), maps)
    assert opened.rows("fc7-relu").present.tolist() == [True, True, False]
    assert opened.items["age"].tolist() == [31.0, 31.0, 45.5]
    assert check_source(opened.source()).sound
    group = zarr.open_group(store / opened.source().name, mode="r")
    assert np.array_equal(group["maxp_5_3"][:], maps)
    assert group["checksums/fc7-relu"][:].tolist()[2] == -1


def test_what_is_damaged_is_named_and_counts_as_not_cached(table: Path, tmp_path: Path) -> None:
    run_pass(table, tmp_path / "new.zarr", LAYERS)
    store = as_version_1(shutil.copytree(tmp_path / "new.zarr", tmp_path / "s.zarr"))
    layer = FeatureStore.open(store).layers[LAYERS[1]]
    for number, at in ((0, layer.record.stride + 9), (1, -3)):  # a record; an index, which the records do without
        content = bytearray(layer.shard_path(number).read_bytes())
        content[at] ^= 1
        layer.shard_path(number).write_bytes(content)
    done = command("upgrade_store", store)
    assert done.returncode == 1
    assert "layer maxp_2_2, 1 items from ('f1', '2') on: a record does not match its checksum" in done.stdout
    assert np.flatnonzero(~FeatureStore.open(store).rows(LAYERS[1]).present).tolist() == [1]
    run_pass(table, store, LAYERS)
    assert files_of(store) == files_of(tmp_path / "new.zarr")


def test_an_upgrade_that_is_killed_goes_on(table: Path, tmp_path: Path) -> None:
    run_pass(table, tmp_path / "new.zarr", LAYERS, items_per_shard=1)
    expected = FeatureStore.open(tmp_path / "new.zarr").rows(LAYERS[0]).gather(range(10))
    for delay in (0.0, 0.02, 0.05, 0.1):
        store = as_version_1(shutil.copytree(tmp_path / "new.zarr", tmp_path / f"{delay}.zarr"))
        old = FeatureStore.open(store)
        process = commands.start("upgrade_store", store)
        while process.is_alive() and not list(store.rglob("*.partial")):
            pass
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        for opened in (old, FeatureStore.open(store)):
            assert np.array_equal(opened.rows(LAYERS[0]).gather(range(10)), expected)
            assert np.array_equal(opened.dask(LAYERS[0]).compute(), expected)
        assert command("upgrade_store", store).returncode == 0
        assert files_of(store) == files_of(tmp_path / "new.zarr")
