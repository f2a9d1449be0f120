"""Every place of a store is bound to what stands there: swaps, flips, cuts are named, and what is right put back."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from crc32c import crc32c

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.verify import check_source, described
from featurestore.store.coordinates import COPY
from featurestore.store.integrity import check_files, restore
from featurestore.store.lock import store_lock
from featurestore.store.shards import DamagedShard
from featurestore.store.writer import SourceWriter
from featurestore.store.zarr_format import METADATA
from tests.commands import command
from tests.conftest import LAYERS, files_of, run_pass, write_photographs
from tests.soak.damage import DAMAGES, Store, damage_and_repair, make_store

IDENTITY = {"backbone": "imported", "weights": "unknown", "recipe": {}, "precision": "float32", "imported": {}}


@pytest.fixture
def store(tmp_path: Path, small_store: Path) -> Path:
    return shutil.copytree(small_store, tmp_path / "s.zarr")


@pytest.fixture
def long_store(tmp_path: Path) -> Path:
    """40,000 items, which are three coordinate chunks, with rows of two numbers."""
    path, n = tmp_path / "long.zarr", 40_000
    with store_lock(path, "test"):
        writer = SourceWriter(path, "long", IDENTITY)
        writer.add_layer("pair", (2,), "float32", "none", 10_000)
        for shard in range(4):
            new = writer.open_shard("pair", shard, end=10_000)
            new.write(range(10_000), np.arange(shard * 20_000, (shard + 1) * 20_000, dtype="f4").reshape(-1, 2))
            new.commit()
        names = np.array([f"f{i}" for i in range(n)], object)
        text = dict.fromkeys(("path", "image_sha256"), np.full(n, "", object))
        writer.append(pd.DataFrame({"face_id": names, "view": np.full(n, "1", object), **text}))
        writer.publish()
    return path


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("damaged"), faces=5)


def exchange(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_anywhere_is_named_and_repaired_to_the_same_bytes(damaged: Store, what: str) -> None:
    """A small dose of ``python -m tests.soak damage``: files take turns, so these are spread over the store."""
    for case in range(0, 200, 29 if what == "flip" else 41):
        found = damage_and_repair(damaged, what, case)
        assert not found.problem, found


def test_rows_that_stand_in_each_others_place_are_not_served_as_their_own(store: Path) -> None:
    layer = FeatureStore.open(store).layers[LAYERS[1]]
    plain = FeatureStore.open(store).rows(LAYERS[1]).gather(range(10))
    assert torch.equal(FeatureStore.open(store).rows(LAYERS[1], verify=True).gather(range(10)), plain)
    exchange(layer.shard_path(0), layer.shard_path(1))
    rows = FeatureStore.open(store).rows(LAYERS[1], verify=True)
    with pytest.raises(DamagedShard, match=r"row 2: the record is damaged, or another one's.*--repair"):
        rows.gather([8, 2])
    assert torch.equal(rows.gather([8, 9]), plain[8:])
    report = check_source(FeatureStore.open(store).source())
    assert {(found.shard, found.row) for found in report.damage} == {(i // 4, i) for i in range(8)}
    lines = described(report.damage)
    assert len(lines) == 2
    assert lines[1].startswith("layer maxp_2_2, shard 1, 4 items, ('f3', '1'), ('f3', '2') and 2 more: the record is")


def test_a_reader_that_is_open_while_a_row_is_repaired(store: Path) -> None:
    """It keeps what it mapped: whole rows as they are, the damaged one refused; a new one sees all of them."""
    before = FeatureStore.open(store).rows(LAYERS[1]).gather(range(10))
    path = FeatureStore.open(store).layers[LAYERS[1]].shard_path(0)
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    rows = FeatureStore.open(store).rows(LAYERS[1], verify=True)
    assert command("verify_store", store, "--repair", "--device", "cpu").returncode == 0
    assert torch.equal(rows.gather(range(1, 10)), before[1:])
    with pytest.raises(DamagedShard, match="row 0: "):
        rows.gather([0])
    assert torch.equal(FeatureStore.open(store).rows(LAYERS[1], verify=True).gather(range(10)), before)


@pytest.mark.parametrize("compress", ["zstd", "blosc"])
def test_compressed_rows_are_compared_too(tmp_path: Path, compress: str) -> None:
    run_pass(write_photographs(tmp_path / "p", 8, 1), tmp_path / "s.zarr", LAYERS[1:], compress=compress)
    layer = FeatureStore.open(tmp_path / "s.zarr").layers[LAYERS[1]]
    FeatureStore.open(tmp_path / "s.zarr").rows(LAYERS[1], verify=True).gather(range(8))
    exchange(layer.shard_path(0), layer.shard_path(1))
    FeatureStore.open(tmp_path / "s.zarr").rows(LAYERS[1]).gather([3])  # its own checksum is right
    with pytest.raises(DamagedShard, match="row 3: the record is damaged, or another one's"):
        FeatureStore.open(tmp_path / "s.zarr").rows(LAYERS[1], verify=True).gather([3])


def test_coordinate_chunks_in_each_others_place_are_refused_and_put_back(long_store: Path) -> None:
    before, folder = files_of(long_store), long_store / "long" / "face_id" / "c"
    exchange(folder / "0", folder / "1")
    with pytest.raises(FeatureStoreError, match=r"sound but not the one that belongs here.*--repair"):
        FeatureStore.open(long_store).find([("f1", "1")])
    assert [found.path for found in check_files(long_store)] == [folder / "0", folder / "1"]
    assert restore(check_files(long_store)) == []
    assert files_of(long_store) == before
    for name in ("0", "0" + COPY):
        (folder / name).write_bytes(b"gone")
    assert all("what was there is lost" in str(found) for found in restore(check_files(long_store)))
    assert len(restore(check_files(long_store))) == 2


def test_checksums_in_each_others_place_do_not_make_rows_wrong(long_store: Path) -> None:
    """Of a chunk and its copy that differ the records tell which is right."""
    before, folder = files_of(long_store), long_store / "long" / "checksums" / "pair" / "c"
    exchange(folder / "0", folder / "1")
    assert {found.path for found in check_files(long_store)} == {folder / "0", folder / "1"}
    restore(check_files(long_store))
    assert files_of(long_store) == before
    (folder / "2").unlink()
    with pytest.raises(DamagedShard, match="it is missing"):
        FeatureStore.open(long_store).rows("pair")
    restore(check_files(long_store))
    assert files_of(long_store) == before


def test_the_noted_checksums_are_those_of_the_rows(long_store: Path) -> None:
    """Read and summed without this package's code."""
    group = zarr.open_group(long_store / "long", mode="r")
    rows, noted = group["pair"][:5], group["checksums/pair"][:5]
    assert noted.tolist() == [crc32c(row.tobytes()) for row in rows]


def test_records_begin_at_multiples_of_64_bytes(long_store: Path) -> None:
    layer = FeatureStore.open(long_store).layers["pair"]
    assert layer.record.stride == 64
    content = layer.shard_path(1).read_bytes()
    assert np.frombuffer(content[64:72], "f4").tolist() == [20_002, 20_003]
    assert len(content) == 10_000 * 64 + 16 * 10_000 + 4


@pytest.mark.parametrize("bytes_", [1, 4, 60, 64])
def test_a_shard_that_lost_bytes_is_refused_before_a_row_is_served(store: Path, bytes_: int) -> None:
    path = FeatureStore.open(store).layers[LAYERS[1]].shard_path(0)
    content = path.read_bytes()
    for changed in (content[:5000] + content[5000 + bytes_ :], content[:5000] + bytes(bytes_) + content[5000:]):
        path.write_bytes(changed)
        with pytest.raises(DamagedShard, match=r"the records end at byte .*, the index begins at|outside the file"):
            FeatureStore.open(store).rows(LAYERS[1])


@pytest.mark.parametrize("within", [None, "other", "a.zarr"])
def test_what_is_no_store_is_left_alone(tmp_path: Path, store: Path, within: str | None) -> None:
    """A folder of photographs, of another program's Zarr groups, or of stores."""
    folder = write_photographs(tmp_path / "photographs", 2, 1)
    if within == "other":
        zarr.create_group(folder / within, zarr_format=3)
    elif within:
        shutil.copytree(store, folder / within)
    before = files_of(folder)
    for path in (folder, tmp_path / "nothing"):
        done = command("verify_store", path, "--repair")
        assert done.returncode == 1
        assert "WRONG" not in done.stdout
        assert "not a feature store: it has no zarr.json" in done.stderr or "there is no store" in done.stderr
    assert files_of(folder) == before
    assert not (tmp_path / "nothing").exists()


def test_a_document_is_restored_from_the_roots_and_the_roots_from_it(store: Path) -> None:
    before = files_of(store)
    name = FeatureStore.open(store).source().name
    for path in (store / METADATA, store / name / METADATA, store / name / LAYERS[0] / METADATA):
        path.write_text("{")
        done = command("verify_store", store, "--recompute", 0)
        assert done.returncode == 1
        assert f"WRONG  {path}: " in done.stdout
        assert command("verify_store", store, "--recompute", 0, "--repair").returncode == 0
        assert files_of(store) == before
    for path in (store / METADATA, store / name / METADATA):
        path.write_text("{")
    done = command("verify_store", store, "--repair")
    assert done.returncode == 1
    assert "what was there is lost" in done.stdout


def test_a_repair_writes_nothing_outside_of_the_store(store: Path, long_store: Path) -> None:
    """A root's document that calls the folder above a source, with a whole document for it."""
    document = json.loads((long_store / "long" / METADATA).read_text())
    root = json.loads((store / METADATA).read_text())
    for name, array in {"..": document, **document["consolidated_metadata"]["metadata"]}.items():
        root["consolidated_metadata"]["metadata"][name if name == ".." else f"../{name}"] = array
    (store / METADATA).write_text(json.dumps(root))
    above = sorted(path.name for path in store.parent.iterdir())
    command("verify_store", store, "--repair", "--recompute", 0)
    assert set(path.name for path in store.parent.iterdir()) - set(above) <= {"s.zarr.lock"}


@pytest.mark.parametrize("text", ["\ud800", float("nan")])
def test_a_document_that_could_not_be_written_is_refused(store: Path, text: object) -> None:
    """Half a surrogate pair and NaN, which JSON readers let pass."""
    path = store / FeatureStore.open(store).source().name / METADATA
    document = json.loads(path.read_text())
    document["attributes"]["licence"] = text
    path.write_text(json.dumps(document))
    with pytest.raises(FeatureStoreError, match="is damaged or was written by another program"):
        FeatureStore.open(store)
    assert str(check_files(store)[0]).startswith(str(path))
    restore(check_files(store))
    assert len(FeatureStore.open(store).sources) == 1


def test_a_source_that_denies_being_one_is_not_passed_over(store: Path) -> None:
    path = store / FeatureStore.open(store).source().name / METADATA
    path.write_text(path.read_text().replace('"face-featurestore"', '"face-featurestorf"'))
    with pytest.raises(FeatureStoreError, match="not a feature store"):
        FeatureStore.open(store)


def test_rows_that_were_removed_are_no_absent_ones(store: Path) -> None:
    opened = FeatureStore.open(store)
    array, layer = opened.dask(LAYERS[1]), opened.layers[LAYERS[1]]
    layer.shard_path(1).unlink()
    with pytest.raises(DamagedShard, match="4 rows that were cached are gone, the first is row 4"):
        array.compute()
    assert "the row was cached and is gone" in str(check_source(opened.source()).damage[0])


@pytest.mark.parametrize("made", ["folder", "loop", "device", "pipe"])
@pytest.mark.parametrize(
    "name", [METADATA, "*/zarr.json", "*/face_id/c/0", "*/checksums/*/c/0", "*/maxp_2_2/c/0/0/0/0"]
)
def test_what_is_no_file_is_refused(store: Path, made: str, name: str) -> None:
    path = next(iter(sorted(store.glob(name))))
    path.unlink()
    if made == "folder":
        path.mkdir()
    elif made == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if made == "loop" else "/dev/zero")
    with pytest.raises(FeatureStoreError):
        opened = FeatureStore.open(store)
        opened.items, [opened.rows(layer) for layer in sorted(opened.layers)]
    done = command("verify_store", store, "--recompute", 0)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
