"""Items removed and renamed, layers and sources removed: the same bytes as a store made that way, and readers that notice."""

import pickle
import resource
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.verify import check_source
from featurestore.files import exchange
from featurestore.store.lock import store_lock
from featurestore.store.removal import finish_removals, removal_of, remove
from featurestore.store.rewriting import remove_items, rename_items
from featurestore.store.shards import DamagedShard
from tests.commands import FORKS
from tests.conftest import LAYERS, forget_shard, run_pass, write_photographs
from tests.featurestore.test_cache import contents, values

GONE = [("f1", "2"), ("f3", "1"), ("f5", "2")]  # in three shards of four items; the last item of all among them


def without(images: Path) -> Path:
    for face, view in GONE:
        (images / face / f"{view}.png").unlink()
    return images


def remove_keys(store: Path, keys: list[tuple[str, str]]) -> None:
    with store_lock(store, "test"):
        source = FeatureStore.open(store).source()
        remove_items(store, source.name, source.find(keys))


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_store_without_items_is_as_if_they_had_never_been(photographs: Path, tmp_path: Path, compress: str) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS, compress=compress, batch_size=1)
    remove_keys(store, GONE)
    run_pass(without(photographs), tmp_path / "never.zarr", LAYERS, compress=compress, batch_size=1)
    assert contents(store) == contents(tmp_path / "never.zarr")
    source = FeatureStore.open(store).source()
    assert check_source(source).sound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(store, mode="r")[source.name]
    assert np.array_equal(group[LAYERS[1]][:], values(tmp_path / "never.zarr", LAYERS[1]))
    assert run_pass(photographs, store, LAYERS).computed == 0


def test_absent_rows_stay_absent_and_what_others_wrote_stays(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    source = FeatureStore.open(store).source()
    before = values(store)
    forget_shard(store, LAYERS[0], 1)  # items 4 to 7
    group = zarr.open_group(store / source.name, mode="r+", use_consolidated=False)
    group.create_array("rdm", data=np.eye(3))
    (store / source.name / "notes.txt").write_text("mine")
    remove_keys(store, GONE[:1])
    rows = FeatureStore.open(store).rows(LAYERS[0])
    assert np.flatnonzero(~rows.present).tolist() == [3, 4, 5, 6]
    assert np.array_equal(rows.gather([0, 1, 2, 7, 8]).numpy(), before[[0, 2, 3, 8, 9]])
    assert np.array_equal(zarr.open_group(store / source.name, mode="r", use_consolidated=False)["rdm"][:], np.eye(3))
    assert (store / source.name / "notes.txt").read_text() == "mine"


def test_a_damaged_record_stops_it_and_nothing_changes(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    shard = FeatureStore.open(store).layers[LAYERS[1]].shard_path(1)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    before = contents(store)
    with pytest.raises(
        DamagedShard, match=r"layer maxp_2_2 .* row 4: .* Nothing has changed.*verify_store.py .* --repair"
    ):
        remove_keys(store, GONE[:1])
    assert contents(store) == before


def remove_on_a_full_disk(store: Path) -> None:
    """The limit is the kernel's own, so the write that fails is a real one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    with pytest.raises(
        FeatureStoreError, match=r"cannot be written: File too large. vggface-\w+ is as it was; free some"
    ):
        remove_keys(store, GONE)


def test_a_disk_that_takes_no_more_leaves_the_store_as_it_was(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS[:1])
    before = contents(store)
    process = FORKS.Process(target=remove_on_a_full_disk, args=(store,))
    process.start()
    process.join()
    assert process.exitcode == 0, "see its traceback"
    assert contents(store) == before


def test_every_item_is_a_source(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS[:1])
    with pytest.raises(FeatureStoreError, match=r"every item of .*pipelines/store_info.py .*s.zarr --remove vggface-"):
        remove_keys(store, list(FeatureStore.open(store).items.index))


def test_readers_notice_that_row_numbers_mean_other_items(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    early = FeatureStore.open(store).source()
    rows, dask = early.rows(LAYERS[0]), early.dask(LAYERS[0])
    sent = pickle.dumps(dask)
    expected = rows.gather(range(10)).clone()
    write_photographs(tmp_path / "more", 6, 2)
    run_pass(tmp_path / "more", store, LAYERS)
    assert np.array_equal(dask.compute(), expected)  # an append changes nothing
    assert early.coordinate("view").tolist() == ["1", "2"] * 5
    remove_keys(store, GONE)
    remove_keys(store, [("f2", "1")])  # the next folder, which may get the inode number of the first
    assert np.array_equal(rows.gather(range(10)), expected)  # the maps are of the old files
    for read in (
        lambda: early.rows(LAYERS[0]),
        lambda: early.coordinate("face_id"),
        lambda: early.keys,
        lambda: early.xarray(),
        lambda: early.dask(LAYERS[0]).compute(),
        lambda: dask.compute(),
        lambda: pickle.loads(sent).compute(),
    ):
        with pytest.raises(FeatureStoreError, match="was rewritten since it was opened: open the store again"):
            read()


def test_keys_are_moved_in_a_circle_without_computing(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    before = {layer: values(store, layer) for layer in LAYERS}
    shards = {path: path.stat().st_ino for path in store.rglob("c/*/0/0/0")}
    name = FeatureStore.open(store).source().name
    circle = {
        ("f1", "1"): ("f1", "2", "/p/f1/2"),
        ("f1", "2"): ("f2", "1", "/p/f2/1"),
        ("f2", "1"): ("f1", "1", "/p/f1/1"),
    }
    rename_items(store, name, circle)
    opened = FeatureStore.open(store)
    assert opened.items.index[:3].tolist() == [("f1", "2"), ("f2", "1"), ("f1", "1")]
    assert opened.items["path"].tolist()[:3] == ["/p/f1/2", "/p/f2/1", "/p/f1/1"]
    assert {path: path.stat().st_ino for path in store.rglob("c/*/0/0/0")} == shards
    for layer in LAYERS:
        assert np.array_equal(values(store, layer), before[layer])
    with pytest.raises(FeatureStoreError, match=r"already holds \('f5', '1'\); nothing was renamed"):
        rename_items(store, name, {("f1", "1"): ("f5", "1", "x")})
    assert not list(store.glob("*.partial"))


def test_a_layer_and_a_source_are_removed(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, tmp_path / "one.zarr", LAYERS[1:])
    shutil.copytree(tmp_path / "one.zarr", store)
    run_pass(photographs, store, LAYERS)
    run_pass(photographs, store, LAYERS[1:], weights="random:1")
    opened = FeatureStore.open(store)
    with pytest.raises(FeatureStoreError, match=r"2 sources of .* hold maxp_2_2"):
        removal_of(opened, None, LAYERS[1])
    removal = removal_of(opened, None, LAYERS[0])
    assert removal.nbytes > 10 * opened.source(removal.source).layers[LAYERS[0]].row_bytes
    remove(store, removal)
    (other,) = set(opened.sources) - {removal.source}
    remove(store, removal_of(FeatureStore.open(store), other[:12], None))
    assert contents(store) == contents(tmp_path / "one.zarr")
    with pytest.raises(FeatureStoreError, match=r"was removed since it was opened"):
        opened.source(other).items  # noqa: B018
    early = FeatureStore.open(store).dask(LAYERS[1])
    remove(store, removal_of(FeatureStore.open(store), None, LAYERS[1]))
    with pytest.raises(FeatureStoreError, match=r"layer 'maxp_2_2' was removed since .* was opened: open it again"):
        early.compute()
    last = FeatureStore.open(store).source()
    assert (last.n_items, list(last.layers)) == (10, [])
    with pytest.raises(FeatureStoreError, match=r"has no source 'vgface'. It is one of: vggface-"):
        removal_of(FeatureStore.open(store), "vgface", None)


def test_what_a_kill_left_is_no_source_and_is_deleted(photographs: Path, tmp_path: Path) -> None:
    """The folders as a kill leaves them; tests/featurestore/test_crash.py kills."""
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS[:1])
    finished = contents(store)
    name = FeatureStore.open(store).source().name
    shutil.copytree(store, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", store / f"{name}.partial")  # half a rewriting
    shutil.copytree(tmp_path / "copy" / name, store / "other-0123.partial")  # half a removal
    shutil.copytree(store / name / LAYERS[0], store / name / "maxp_9_9")  # removed, files still there
    for layer in ("maxp_9_9", LAYERS[0]):  # the second was about to be removed
        (store / name / f"{layer}.removed.partial").touch()
    assert list(FeatureStore.open(store).sources) == [name]
    assert finish_removals(store) == ["other-0123", f"{name}/maxp_9_9"]
    assert contents(store) == finished


def test_folders_that_cannot_be_exchanged_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FeatureStoreError, match=r"cannot be replaced in one step.*Nothing has changed"):
        exchange(tmp_path / "a", tmp_path / "nowhere")
    assert (tmp_path / "a").is_dir()
