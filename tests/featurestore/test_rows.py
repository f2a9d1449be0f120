"""Gathering rows: against NumPy on rows computed without the store."""

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from featurestore import FeatureStore, FeatureStoreError
from featurestore.store.lock import store_lock
from featurestore.store.mapped import Region
from featurestore.store.rows import Rows
from featurestore.store.shards import DamagedShard
from featurestore.store.writer import SourceWriter
from tests.conftest import LAYERS, run_pass, write_photographs

PICK = [7, 0, 9, 4, 4, 3, 8]  # crosses shards, repeats, out of order


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "indices",
    [
        PICK,
        np.array(PICK, np.uint8),
        np.array(PICK, np.int32),
        torch.tensor(PICK),
        torch.tensor(PICK, dtype=torch.int16),
        range(10),
    ],
)
def test_gather_is_indexing(small_store: Path, small_rows, layer: str, indices) -> None:
    got = FeatureStore.open(small_store).rows(layer).gather(indices)
    expected = small_rows[layer][np.asarray(indices)]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_out_is_filled_and_returned(small_store: Path) -> None:
    rows = FeatureStore.open(small_store).rows("maxp_2_2")
    out = torch.full((len(PICK), *rows.shape[1:]), torch.nan)
    assert rows.gather(PICK, out=out) is out
    assert torch.equal(out, rows.gather(PICK))


def test_nothing_asked_nothing_given(small_store: Path) -> None:
    assert FeatureStore.open(small_store).rows("maxp_2_2").gather([]).shape == (0, 128, 56, 56)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "strides"])
def test_a_wrong_out_gives_both_shapes(small_store: Path, wrong: str) -> None:
    rows = FeatureStore.open(small_store).rows("maxp_2_2")
    out = {
        "shape": torch.empty(3, 128, 56, 56),
        "dtype": torch.empty(2, 128, 56, 56, dtype=torch.float16),
        "strides": torch.empty(2, 56, 56, 128).permute(0, 3, 1, 2),
    }[wrong]
    with pytest.raises(
        FeatureStoreError, match=r"these rows need contiguous torch.float32 of shape \(2, 128, 56, 56\)"
    ):
        rows.gather([0, 1], out=out)


@pytest.mark.parametrize("index", [-1, 10, 10**12, -(10**12)])
def test_rows_outside_are_refused(small_store: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"row {index} is outside 0 … 9"):
        FeatureStore.open(small_store).rows("maxp_2_2").gather([3, index])


@pytest.mark.parametrize("indices", [[0.5], [True, False], [[0, 1]]])
def test_only_integers_are_indices(small_store: Path, indices) -> None:
    with pytest.raises(FeatureStoreError, match="one-dimensional array of integers"):
        FeatureStore.open(small_store).rows("maxp_2_2").gather(indices)


@pytest.mark.parametrize("compress", ["none", "zstd", "blosc"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_encoding_gives_the_same_rows(tmp_path: Path, small_rows, compress: str, dtype: str) -> None:
    images = write_photographs(tmp_path / "photographs", 5, 2)
    run_pass(images, tmp_path / "s.zarr", ["maxp_2_2"], compress=compress, dtype=dtype)
    store = FeatureStore.open(tmp_path / "s.zarr")
    got = store.rows("maxp_2_2").gather(PICK)
    expected = small_rows["maxp_2_2"][PICK]
    assert got.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(
        got.float().numpy(), expected, atol=(1e-5 if dtype == "float32" else 1e-3) * np.abs(expected).max()
    )
    assert np.array_equal(store.dask("maxp_2_2").compute()[PICK], got.numpy())


def test_a_damaged_compressed_record_is_an_error(tmp_path: Path) -> None:
    run_pass(write_photographs(tmp_path / "p", 2, 2), tmp_path / "s.zarr", ["maxp_2_2"], compress="zstd")
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    path = source.layers["maxp_2_2"].shard_path(0)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedShard, match="checksum"):
        source.rows("maxp_2_2").gather([0])


def test_absent_rows_are_refused_with_the_command(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 4, 1)
    run_pass(images, tmp_path / "s.zarr", LAYERS)
    run_pass(write_photographs(tmp_path / "p", 6, 1), tmp_path / "s.zarr", LAYERS[:1])
    store = FeatureStore.open(tmp_path / "s.zarr")
    rows = store.rows(LAYERS[1])
    assert rows.present.tolist() == [True] * 4 + [False] * 2
    with pytest.raises(FeatureStoreError, match=rf"no row yet for 1 .*row 5 .*cache_layers.py --layers {LAYERS[1]}"):
        rows.gather([0, 5])
    assert np.isnan(store.dask(LAYERS[1])[4:].compute()).all()


def test_old_rows_outlive_a_rewritten_shard(tmp_path: Path) -> None:
    run_pass(write_photographs(tmp_path / "p", 3, 1), tmp_path / "s.zarr", ["maxp_2_2"])
    rows = FeatureStore.open(tmp_path / "s.zarr").rows("maxp_2_2")
    before = rows.gather([0, 1, 2])
    run_pass(write_photographs(tmp_path / "p", 6, 1), tmp_path / "s.zarr", ["maxp_2_2"])
    assert torch.equal(rows.gather([0, 1, 2]), before)
    assert torch.equal(FeatureStore.open(tmp_path / "s.zarr").rows("maxp_2_2").gather([0, 1, 2]), before)


def test_rows_by_number_and_by_key(small_store: Path, small_rows: dict[str, np.ndarray]) -> None:
    store = FeatureStore.open(small_store)
    rows, wanted = store.rows("maxp_2_2"), store.rows("maxp_2_2").gather(range(10))
    assert np.allclose(wanted, small_rows["maxp_2_2"], atol=1e-2)
    assert torch.equal(rows["f2", "1"], wanted[2])
    assert torch.equal(rows["f2"], wanted[2:4])
    assert torch.equal(rows[3], wanted[3])
    assert torch.equal(rows[np.int64(3)], wanted[3])
    assert torch.equal(rows[2:9:3], wanted[2:9:3])
    assert torch.equal(rows[[4, 4, 1]], wanted[[4, 4, 1]])
    assert np.array_equal(np.asarray(rows), wanted.numpy())
    assert np.asarray(rows, np.float16).dtype == np.float16
    assert store.find(face="f2").tolist() == store.find("f2").tolist() == [2, 3]
    assert store.find(face=["f5", "f1"]).tolist() == [8, 9, 0, 1]
    with pytest.raises(FeatureStoreError, match="has no view '7'"):
        rows["f2", "7"]
    with pytest.raises(IndexError, match="row 10 is outside"):
        rows[10]
    with pytest.raises(FeatureStoreError, match=r"by `keys`, .* or by `face`; give one of the two"):
        store.find([("f1", "1")], face="f1")
    with pytest.raises(FeatureStoreError, match="these rows know no keys"):
        Rows(store.layers["maxp_2_2"])["f2"]


def test_maps_and_files_are_given_back(small_store: Path) -> None:
    def used() -> tuple[int, int]:
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("needs /proc")
        return maps.read_text().count(str(small_store)), len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = used()[1]
    rows = FeatureStore.open(small_store).rows("maxp_2_2")
    rows.gather([0])
    assert used() == (3, before + 1)  # a mapped file need not stay open, the source's folder does
    del rows
    gc.collect()
    assert used() == (0, before)


def write_rows(store: Path, n: int, shape: tuple[int, ...], slots: int, compress: str = "none") -> np.ndarray:
    """A store of ``n`` random rows of one layer, all its files out of the page cache as far as the system does that."""
    rows = np.random.default_rng(7).standard_normal((n, *shape), np.float32)
    with store_lock(store, "test"):
        writer = SourceWriter(
            store, "source", {"backbone": "none", "weights": "seed:0", "recipe": {}, "precision": "fp32"}
        )
        writer.add_layer("layer", shape, "float32", compress, slots)
        for first in range(0, n, slots):
            shard = writer.open_shard("layer", first // slots, end=slots)
            part = rows[first : first + slots].reshape(-1, int(np.prod(shape)))
            shard.write(range(len(part)), part)
            shard.commit()
        faces = [f"f{i}" for i in range(n)]
        writer.append(pd.DataFrame({"face_id": faces, "view": "1", "path": faces, "image_sha256": "0" * 64}))
        writer.publish()
    for path in (path for path in store.rglob("*") if path.is_file() and hasattr(os, "posix_fadvise")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return rows


def cold(rows: Rows) -> Rows:
    """Rows that take the way of those that are not in memory, whether the page cache could be emptied or not."""
    rows._ahead.cold = True
    return rows


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize(
    ("shape", "slots"),
    [
        ((3,), 64),
        ((1024,), 64),
        ((1025,), 7),
        ((700, 700), 4),
    ],  # less than a page, a page, more, more than is asked for at once
)
def test_rows_from_the_disk_are_those_that_were_written(
    tmp_path: Path, compress: str, shape: tuple[int, ...], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurestore.store.read_ahead.AHEAD_BYTES", 4 << 20)
    written = write_rows(tmp_path / "s.zarr", 40, shape, slots, compress)
    rng = np.random.default_rng(0)
    rows = FeatureStore.open(tmp_path / "s.zarr").rows("layer", verify=True)
    for pick in (range(40), rng.permutation(40), rng.integers(0, 40, 100), [17], [39, 0]):
        following = rng.integers(0, 40, 30)
        assert rows._ahead.cold
        rows.prefetch(following)
        assert np.array_equal(cold(rows).gather(pick).numpy(), written[np.asarray(pick)])
        rows.prefetch([-1, 5, 10**9])  # gather refuses them
        assert np.array_equal(cold(rows).gather(following).numpy(), written[following])
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match=f"row {wrong} is outside"):
            cold(rows).gather([3, wrong])


def test_rows_in_memory_are_found_to_be_so(small_store: Path) -> None:
    rows = FeatureStore.open(small_store).rows("maxp_2_2")
    np.asarray(rows)
    for _ in range(40):
        rows.gather(PICK)
    assert not rows._ahead.cold


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a page that is gone ends the process")
def test_a_row_that_the_disk_does_not_give_is_named(tmp_path: Path) -> None:
    """The last page of a shard is cut off while it is mapped; touching that page would be a bus error."""
    written = write_rows(tmp_path / "s.zarr", 16, (4096,), 8)
    rows = FeatureStore.open(tmp_path / "s.zarr").rows("layer")
    shard = next(path for path in (tmp_path / "s.zarr").glob("*/layer/c/1/**/*") if path.is_file())
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2 // 4096 * 4096)
    with pytest.raises(DamagedShard, match=r"layer 'layer', row 1[0-9] cannot be read from .*verify_store"):
        rows.gather(range(16))
    assert np.array_equal(rows.gather(range(8)).numpy(), written[:8])


def test_a_file_system_without_memory_maps_is_named() -> None:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not file.is_file():
        pytest.skip("no sysfs here")
    with file.open("rb") as opened, pytest.raises(FeatureStoreError, match=r"cannot be mapped.*local disk"):
        Region(1, 1 << 20).map(0, opened.fileno(), file)
