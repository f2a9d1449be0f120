"""Stores on an object store (moto's S3 on loopback): the same bytes, rows and errors; what happens to writers and requests."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.job import prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.caching.verify import check_source
from featurestore.files import copies
from featurestore.photos.keys import find_faces
from featurestore.remote import lease as leases
from featurestore.remote.cache import ShardCache
from featurestore.remote.client import Missing, ObjectStore, url_of
from featurestore.remote.lease import Lease
from featurestore.remote.mirror import is_shard, local_store, put_file
from featurestore.store.copying import copy_store, plan_copy
from featurestore.store.lock import store_lock
from featurestore.store.remote_rows import CachedRows, RangedRows
from featurestore.store.removal import removal_of, remove
from featurestore.store.rewriting import remove_items
from featurestore.store.shards import DamagedShard
from tests.commands import FORKS, ROOT, command, start
from tests.conftest import LAYERS, files_of, request_for, run_pass, write_photographs
from tests.heads.conftest import write_store, write_trials
from tests.object_servers import KEYS, Files, Proxy, request, running, s3_server

pytestmark = pytest.mark.xdist_group("remote")  # one process makes what they share


@pytest.fixture(scope="module")
def s3() -> Iterator[int]:
    with s3_server() as port:
        request(port, "PUT", "/bucket")
        yield port


@pytest.fixture(scope="module")
def endpoint(s3: int) -> Iterator[str]:
    """Where S3 is, and the environment that says so."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "FEATURESTORE_REMOTE_TIMEOUT": "3",
            "FEATURESTORE_LEASE_SECONDS": "1.5",
        }.items():
            environment.setenv(name, value)
        yield os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture(autouse=True)
def fresh(endpoint: str) -> None:
    copies.clear()  # clients keep the endpoint and the times that they were made with


@pytest.fixture
def proxy(s3: int, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """From now on requests go through it."""
    server = Proxy(s3)
    with running(server) as port:
        copies.clear()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield server


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.parent.name}/{tmp_path.name}/s.zarr"


@pytest.fixture(scope="module")
def kept(endpoint: str, small_store: Path) -> str:
    """The small store, copied; only for reading."""
    copy_store(plan_copy(small_store, Path("s3://bucket/kept.zarr")), check=False)
    return "s3://bucket/kept.zarr"


@pytest.fixture
def stored(small_store: Path, url: str) -> str:
    """The same for a test of its own."""
    copy_store(plan_copy(small_store, Path(url)), check=False)
    return url


def objects_of(url: str) -> dict[str, bytes]:
    objects = ObjectStore(url)
    return {key: objects.get(key)[0] for key, _ in objects.listed()}


def largest(store: Path) -> int:
    return max(path.stat().st_size for path in store.rglob("*") if path.is_file())


# Reading


@pytest.mark.parametrize("cached", [False, True])
def test_rows_are_those_of_the_store_on_disk(kept: str, small_store: Path, tmp_path: Path, cached: bool) -> None:
    store = FeatureStore.open(kept, cache=tmp_path / "cache" if cached else None)
    ours, theirs = store.rows(LAYERS[1]), FeatureStore.open(small_store).rows(LAYERS[1])
    assert type(ours) is (CachedRows if cached else RangedRows)
    assert store.items.equals(FeatureStore.open(small_store).items)
    which = [9, 3, 3, 0, 5, 9]
    assert torch.equal(ours.gather(which), theirs.gather(which))
    ours.prefetch(which[2:])
    out = torch.empty(4, *ours.shape[1:])
    assert torch.equal(ours.gather(which[2:], out=out), theirs.gather(which[2:])) and ours.present.all()
    assert torch.equal(ours["f2"], theirs["f2"]) and ours.gather([]).shape == theirs.gather([]).shape
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    with pytest.raises(IndexError, match=r"row 10 is outside"):
        ours.gather([10])
    with pytest.raises(FeatureStoreError, match=r"`out` is a"):
        ours.gather([1], out=torch.empty(2))


def test_a_second_opening_fetches_only_what_has_changed(
    stored: str, photographs: Path, small_store: Path, proxy: Proxy, tmp_path: Path
) -> None:
    FeatureStore.open(stored, cache=tmp_path / "cache").rows(LAYERS[1]).gather([0, 9])
    copies.clear()
    answers: list[tuple[str, int]] = []
    proxy.answered = lambda path, status: answers.append((path, status))
    rows = FeatureStore.open(stored, cache=tmp_path / "cache").rows(LAYERS[1])
    assert len(answers) > 10 and {status for _, status in answers} == {304}
    answers.clear()
    rows.gather([0, 9])
    assert not answers  # both shards are in the cache
    copies.clear()
    run_pass(write_photographs(tmp_path / "photographs", 6, 2), Path(stored), LAYERS)
    answers.clear()
    store = FeatureStore.open(stored, cache=tmp_path / "cache")
    assert len(store.items) == 12 and 304 in {status for _, status in answers}
    rows = store.rows(LAYERS[1])
    answers.clear()
    rows.gather([0, 9, 11])
    assert len(answers) == 1  # only the shard that was completed is another


def test_a_plain_web_server_is_read_and_not_written(small_store: Path, tmp_path: Path) -> None:
    files = Files(small_store.parent)
    with running(files) as port:
        url = f"http://127.0.0.1:{port}/{small_store.name}"
        store, local = FeatureStore.open(url), FeatureStore.open(small_store)
        assert torch.equal(store.rows(LAYERS[1]).gather([7, 2]), local.rows(LAYERS[1]).gather([7, 2]))
        assert not any(path.endswith("/") or "?" in path for path in files.seen)  # nothing is listed
        done = command("verify_store", url)
        assert done.returncode == 0 and "sound" in done.stdout, done.stdout + done.stderr
        copy_store(plan_copy(Path(url), tmp_path / "copied.zarr"))
        assert files_of(tmp_path / "copied.zarr") == files_of(small_store)
        with pytest.raises(FeatureStoreError, match=r"can only be read"), store_lock(Path(url), "test"):
            pass
        with pytest.raises(FeatureStoreError, match=r"there is no store http://127"):
            FeatureStore.open(f"http://127.0.0.1:{port}/nothing.zarr")


def test_dask_xarray_and_checks_read_it(kept: str, small_store: Path, tmp_path: Path) -> None:
    store, local = FeatureStore.open(kept), FeatureStore.open(small_store)
    assert np.array_equal(store.dask(LAYERS[1]).compute(scheduler="threads"), local.dask(LAYERS[1]).compute())
    assert np.array_equal(store.xarray()[LAYERS[0]].sel(face_id="f3"), local.xarray()[LAYERS[0]].sel(face_id="f3"))
    report = check_source(store.source())
    assert report.sound and report.records == 20
    answers = []
    for place in (kept, small_store):
        done = command("query_layers", "rdm", "--store", place, "--layers", LAYERS[1], "--out", tmp_path / "rdm.csv")
        assert done.returncode == 0, done.stderr
        answers.append((tmp_path / "rdm.csv").read_bytes())
    assert answers[0] == answers[1]
    info = command("store_info", kept)
    assert f"{kept}: 1 sources" in info.stdout and "10 of 10" in info.stdout


def _mean_of(pickled: bytes, answer: str) -> None:
    layer, opened = pickle.loads(pickled)
    from featurestore.store.lazy import dask_array

    Path(answer).write_text(str(float(dask_array(layer, opened).mean().compute(scheduler="synchronous"))))


def test_a_layer_finds_its_store_in_another_process(kept: str, small_store: Path, tmp_path: Path) -> None:
    source = FeatureStore.open(kept).source()
    pickled = pickle.dumps((source.layers[LAYERS[1]], source.opened))
    process = FORKS.Process(target=_in_environment, args=(dict(os.environ), pickled, str(tmp_path / "mean")))
    process.start()
    process.join()
    expected = FeatureStore.open(small_store).dask(LAYERS[1]).mean().compute(scheduler="synchronous")
    assert float((tmp_path / "mean").read_text()) == float(expected)
    assert str(source.folder) not in pickled.decode("latin1")


def _in_environment(environment: dict[str, str], pickled: bytes, answer: str) -> None:
    os.environ.update(environment)
    _mean_of(pickled, answer)


def test_training_from_a_cache_is_training_from_disk(url: str, tmp_path: Path) -> None:
    write_store(tmp_path / "made.zarr")
    write_trials(tmp_path / "trials.csv", 300)
    for name in files_of(tmp_path / "made.zarr"):
        put_file(ObjectStore(url), name, tmp_path / "made.zarr" / name)
    options = [
        "--trials",
        tmp_path / "trials.csv",
        "--layers",
        "fc7-relu",
        "--heads",
        "similarity",
        "--epochs",
        2,
        "--jobs",
        1,
    ]
    for place, out in ((tmp_path / "made.zarr", "local"), (url, "remote")):
        cache = ["--cache-dir", tmp_path / "cache"] if place == url else []
        done = command("train_heads", "--store", place, *options, "--out", tmp_path / out, *cache)
        assert done.returncode == 0, done.stderr
    tables = [pd.read_csv(tmp_path / out / "runs.csv") for out in ("local", "remote")]
    assert list(tables[0]["accuracy"]) == list(tables[1]["accuracy"]) and len(
        list((tmp_path / "cache/shards").iterdir())
    )


def test_zarr_python_reads_it(kept: str, small_store: Path) -> None:
    import zarr
    from obstore.store import from_url
    from zarr.storage import ObjectStore as ZarrStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(
            ZarrStore(from_url(kept, client_options={"allow_http": True}), read_only=True), mode="r"
        )
        source = FeatureStore.open(small_store).source()
        values = group[source.name][LAYERS[1]][:]
        assert np.array_equal(values, np.asarray(source.rows(LAYERS[1])))
        assert list(group[source.name]["face_id"][:]) == list(source.coordinate("face_id"))


# The cache


def test_the_cache_keeps_to_its_bound(kept: str, small_store: Path, tmp_path: Path) -> None:
    most = 2 * largest(small_store)
    ours = FeatureStore.open(kept, cache=tmp_path / "cache", cache_bytes=most).rows(LAYERS[0])
    theirs = FeatureStore.open(small_store).rows(LAYERS[0])
    for which in ([0, 9, 4], [5, 0], [9, 8, 1, 6]):
        assert torch.equal(ours.gather(which), theirs.gather(which))
        files = [path for path in (tmp_path / "cache" / "shards").iterdir() if not path.name.startswith(".")]
        assert sum(path.stat().st_size for path in files) <= most and len(files) == 2  # of three
    assert sum(ours._shard_bytes.values()) <= most
    ours.prefetch([0])
    with pytest.raises(IndexError):
        ours.gather([11])


def test_what_another_process_removes_stays_readable(kept: str, small_store: Path, tmp_path: Path) -> None:
    rows = FeatureStore.open(kept, cache=tmp_path / "cache").rows(LAYERS[0])
    before = rows.gather(range(10))
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    assert torch.equal(rows.gather(range(10)), before)
    assert torch.equal(FeatureStore.open(kept, cache=tmp_path / "cache").rows(LAYERS[0]).gather([9]), before[9:])


def _gather_all(environment: dict[str, str], url: str, cache: Path, most: int, answer: Path) -> None:
    os.environ.update(environment)
    rows = FeatureStore.open(url, cache=cache, cache_bytes=most).rows(LAYERS[0])
    for seed in range(8):
        rows.gather(np.random.default_rng(seed).permutation(10))
    answer.write_text(str(float(rows.gather(range(10)).double().sum())))


def test_processes_share_a_cache_that_is_too_small(kept: str, small_store: Path, tmp_path: Path) -> None:
    most = 2 * largest(small_store)
    answers = [tmp_path / f"answer-{i}" for i in range(3)]
    arguments = (dict(os.environ), kept, tmp_path / "cache", most)
    processes = [FORKS.Process(target=_gather_all, args=(*arguments, answer)) for answer in answers]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    expected = float(FeatureStore.open(small_store).rows(LAYERS[0]).gather(range(10)).double().sum())
    assert [float(answer.read_text()) for answer in answers] == [expected] * 3
    sizes = [path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()]
    assert sum(sizes) <= most


def test_a_cache_that_cannot_hold_a_shard_says_so(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FeatureStore.open(kept, cache=tmp_path / "cache", cache_bytes=1000).rows(LAYERS[0])
    with pytest.raises(FeatureStoreError, match=r"more than the cache may hold .1000 B.. Give it more: `cache_bytes`"):
        rows.gather([0])

    def full(path: Path, announce: object) -> bool:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FeatureStoreError, match=r"cache folder .* is full: No space left on device. Make room"):
        ShardCache(tmp_path, 1000).open("0" * 32, full)
    assert not [path for path in (tmp_path / "shards").iterdir() if not path.name.startswith(".")]
    monkeypatch.setenv("FEATURESTORE_CACHE_BYTES", "much")
    with pytest.raises(FeatureStoreError, match=r"'much'; it has to be a number of bytes"):
        FeatureStore.open(kept)


def test_a_damaged_shard_is_named_and_not_kept(stored: str, small_store: Path, tmp_path: Path) -> None:
    source = FeatureStore.open(stored).source()
    key = next(key for key, _ in ObjectStore(stored).listed() if f"/{LAYERS[0]}/c/1/" in key)
    content = bytearray(ObjectStore(stored).get(key)[0])
    content[100] ^= 1  # of row 4
    ObjectStore(stored).put(key, bytes(content))
    with pytest.raises(DamagedShard, match=f"row 4: the record is damaged.*verify_store.py {stored} --repair"):
        source.rows(LAYERS[0]).gather([5, 4])
    with pytest.raises(DamagedShard, match=r"for some of its rows"):
        FeatureStore.open(stored, cache=tmp_path / "cache").rows(LAYERS[0]).gather([5])
    assert not [path for path in (tmp_path / "cache" / "shards").iterdir() if not path.name.startswith(".")]
    with pytest.raises(DamagedShard):
        copy_store(plan_copy(Path(stored), tmp_path / "copied.zarr"))
    done = command("verify_store", stored, "--repair")
    assert done.returncode == 0 and "1 damaged" in done.stdout, done.stdout + done.stderr
    assert objects_of(stored) == files_of(small_store)


# Writing


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_pass_writes_the_same_bytes(photographs: Path, url: str, tmp_path: Path, compress: str) -> None:
    for place in (tmp_path / "s.zarr", Path(url)):
        shutil.move(photographs / "f5", tmp_path / "f5")
        run_pass(photographs, place, LAYERS[1:], compress=compress)
        shutil.move(tmp_path / "f5", photographs / "f5")
        run_pass(photographs, place, LAYERS, compress=compress)  # completes a shard, adds a layer
    assert objects_of(url) == files_of(tmp_path / "s.zarr")
    store, local = FeatureStore.open(url), FeatureStore.open(tmp_path / "s.zarr")
    assert torch.equal(store.rows(LAYERS[1]).gather([9, 1]), local.rows(LAYERS[1]).gather([9, 1]))
    if compress != "none":
        return
    assert run_pass(photographs, Path(url), LAYERS).computed == 0
    for place in (tmp_path / "s.zarr", Path(url)):
        with store_lock(place, "test"):
            remove(place, removal_of(FeatureStore.open(place), None, LAYERS[0]))
    assert objects_of(url) == files_of(tmp_path / "s.zarr")
    with store_lock(Path(url), "test"):
        folder = local_store(url, writing=True)
        with pytest.raises(FeatureStoreError, match=r"cannot be written anew where it is.*copy_store.py s3://"):
            remove_items(folder, store.source().name, np.array([0]))
        remove(folder, removal_of(FeatureStore.open(folder), store.source().name, None))
    assert list(objects_of(url)) == ["zarr.json"]


def arguments(images: Path, store: str | Path) -> list[str]:
    options = ["--images", images, "--store", store, "--weights", "random:0", "--batch-size", 2, "--items-per-shard", 4]
    return ["--layers", *LAYERS, *map(str, options)]


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def test_a_pass_that_is_killed_in_an_upload_leaves_no_half_shard_and_is_resumed(
    url: str, proxy: Proxy, tmp_path: Path
) -> None:
    images = write_photographs(tmp_path / "photographs", 4, 2)
    run_pass(images, tmp_path / "s.zarr", LAYERS, batch_size=2)
    reached: list[str] = []

    def hang(method: str, path: str) -> str | None:
        if method == "PUT" and "partNumber=2" in path and f"/{LAYERS[0]}/c/1/" in path:
            reached.append(path)
            return "silent"
        return None

    proxy.fault = hang
    process = start("cache_layers", *arguments(images, url))
    until(lambda: reached or not process.is_alive())
    assert reached
    process.kill()
    process.join()
    proxy.fault = lambda method, path: None
    left, whole = objects_of(url), files_of(tmp_path / "s.zarr")
    assert f"{FeatureStore.open(tmp_path / 's.zarr').source().name}/{LAYERS[0]}/c/1/0/0/0" not in left
    shards = [key for key in left if is_shard(key)]
    assert shards and all(left[key] == whole[key] for key in shards)
    done = command("cache_layers", *arguments(images, url))  # when the dead writer's lease is over
    assert done.returncode == 0, done.stderr
    assert objects_of(url) == whole
    assert url in done.stdout and "mirror-" not in done.stdout + done.stderr


# One writer


def lease(url: str, doing: str = "test") -> Lease:
    above, _, name = url.rpartition("/")
    return Lease(ObjectStore(above), f"{name}.lock", url, doing)


def test_a_second_writer_is_refused_by_name(url: str) -> None:
    first = lease(url, "the first")
    with pytest.raises(
        FeatureStoreError, match=rf"{url} is being written by process {os.getpid()} on .* .the first.. Wait"
    ):
        lease(url, "the second")
    with pytest.raises(FeatureStoreError, match=r"is being written by"), store_lock(Path(url), "the third"):
        pass
    first.require()
    first.release()
    lease(url).release()


def test_the_lease_of_a_dead_writer_is_taken_over(url: str) -> None:
    dead = lease(url, "dead")
    dead._stop.set()  # its thread is gone, as its process would be
    dead._thread.join()
    alive = lease(url, "alive")
    with pytest.raises(FeatureStoreError, match=r"no longer held by this process.*being written by process .*alive"):
        dead._renewed = -1e9
        dead.require()
    dead.release()  # takes nothing away from the other
    alive.require()
    alive.release()


def test_a_writer_that_lost_its_lease_publishes_nothing(photographs: Path, url: str) -> None:
    run_pass(photographs, Path(url), LAYERS[:1])
    before = objects_of(url)
    with pytest.raises(FeatureStoreError, match=r"no longer held by this process"), store_lock(Path(url), "slow"):
        folder = local_store(url, writing=True)
        held = copies[folder].lease
        held._stop.set()
        held._thread.join()
        held._renewed -= 100  # as if it had been halted
        other = lease(url, "other")
        remove(folder, removal_of(FeatureStore.open(folder), None, LAYERS[0]))
    other.release()
    assert objects_of(url) == before


def test_a_clock_that_jumps_steals_no_lease(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lease(url, "the first")
    monkeypatch.setattr(time, "time", lambda: 4e9)  # the year 2096
    with pytest.raises(FeatureStoreError, match=r"the first"):
        lease(url)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    first.require()
    time.sleep(1)
    first.require()
    first.release()
    content = ObjectStore(url.rpartition("/")[0]).get("s.zarr.lock")[0]
    assert "secret" not in str(json.loads(content)) and "4000000000" not in content.decode()


def test_a_lease_whose_answer_was_lost_is_held(url: str, proxy: Proxy) -> None:
    lost = iter(["lost"])
    proxy.fault = lambda method, path: next(lost, None) if method == "PUT" and path.endswith(".lock") else None
    held = lease(url)
    with pytest.raises(FeatureStoreError, match=r"being written"):
        lease(url)
    held.release()


def test_of_several_at_once_one_is_first(url: str) -> None:
    ready = leases.threading.Barrier(4)
    won: list[Lease] = []
    refused: list[str] = []

    def try_it(name: str) -> None:
        ready.wait()
        try:
            won.append(lease(url, name))
        except FeatureStoreError as error:
            refused.append(str(error))

    threads = [leases.threading.Thread(target=try_it, args=(f"number {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 3 and len(set(refused)) <= 2
    won[0].release()


# Requests that fail


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "slow"])
def test_requests_that_fail_are_sent_again(
    kept: str, url: str, small_store: Path, proxy: Proxy, tmp_path: Path, fault: str
) -> None:
    count = iter(range(10**9))
    proxy.fault = lambda method, path: fault if next(count) % 3 == 1 else None
    for cache in (None, tmp_path / "cache"):
        rows = FeatureStore.open(kept, cache=cache).rows(LAYERS[1])
        assert torch.equal(rows.gather([9, 0, 5]), FeatureStore.open(small_store).rows(LAYERS[1]).gather([9, 0, 5]))
    copy_store(plan_copy(small_store, Path(url)), check=False)
    proxy.fault = lambda method, path: None
    assert objects_of(url) == files_of(small_store)


@pytest.mark.parametrize(
    "fault, says",
    [("503", "answers SlowDown, also when asked again for 1 s"), ("reset", "does not answer, or breaks off")],
)
def test_requests_that_always_fail_end_in_an_error(
    kept: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    rows = FeatureStore.open(kept).rows(LAYERS[1])
    monkeypatch.setenv("FEATURESTORE_REMOTE_TIMEOUT", "1")
    copies.clear()
    other = FeatureStore.open(kept).rows(LAYERS[1])
    proxy.fault = lambda method, path: fault
    with pytest.raises(FeatureStoreError, match=f"{kept}/.* cannot be read: the object store {says}"):
        other.gather([1])
    proxy.fault = lambda method, path: None
    assert torch.equal(rows.gather([1]), other.gather([1]))


def test_a_store_that_stays_silent_is_given_up(kept: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURESTORE_REMOTE_TIMEOUT", "1")
    copies.clear()
    proxy.fault = lambda method, path: "silent"
    with pytest.raises(FeatureStoreError, match=r"does not answer, or breaks off, also when asked again for 1 s"):
        FeatureStore.open(kept)


def test_no_bucket_and_wrong_credentials(s3: int, url: str, kept: str, photographs: Path) -> None:
    with pytest.raises(
        FeatureStoreError, match=r"s3://nobody/s.zarr/zarr.json cannot be read: there is no bucket nobody"
    ):
        FeatureStore.open("s3://nobody/s.zarr")
    done = command("cache_layers", *arguments(photographs, "s3://nobody/s.zarr"))
    assert done.returncode == 1 and "there is no bucket nobody" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(FeatureStoreError, match=r"there is no store s3://bucket/none.zarr"):
        FeatureStore.open("s3://bucket/none.zarr")
    request(s3, "POST", "/moto-api/reset-auth", b"0")
    try:
        with pytest.raises(FeatureStoreError, match=r"refuses access.*AWS_ACCESS_KEY_ID and AWS_SECRET") as raised:
            FeatureStore.open(kept)
    finally:
        request(s3, "POST", "/moto-api/reset-auth", b"Infinity")
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(raised.value) and KEYS["AWS_ACCESS_KEY_ID"] not in str(raised.value)
    FeatureStore.open(kept)
    for place in ("s3://me:password@bucket/x", "https://me:password@host/x"):
        with pytest.raises(FeatureStoreError, match=r"a URL with a user or password in it is refused") as raised:
            FeatureStore.open(place)
        assert "password@" not in str(raised.value)
    with pytest.raises(FeatureStoreError, match=r"perhaps a signature"):
        FeatureStore.open("https://host/x?X-Amz-Signature=abc")


def test_urls_as_pathlib_writes_them() -> None:
    assert url_of(Path("s3://bucket/a/b/")) == "s3://bucket/a/b" == url_of("s3://bucket/a/b/")
    assert url_of(Path("store/demo.zarr")) is None and url_of("c3://x") is None
    assert str(FeatureStoreError(f"{Path('gs://b/x')} and {Path('/t/mirror-0a1b/s3:/b/p/zarr.json')}")) == (
        "gs://b/x and s3://b/p/zarr.json"
    )


def test_without_obstore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(FeatureStoreError, match=r"pip install 'face-featurestore\[remote\]'"):
        FeatureStore.open("s3://bucket/x.zarr")


# Copies


def test_a_copy_there_and_back_is_the_same(small_store: Path, url: str, tmp_path: Path) -> None:
    planned = command("copy_store", small_store, url, "--dry-run")
    files = files_of(small_store)
    assert f"{len(files)} objects, 6 of them shards" in planned.stdout and planned.returncode == 0, planned.stderr
    with pytest.raises(FeatureStoreError, match=r"there is no store"):
        FeatureStore.open(url)
    for source, destination in ((small_store, url), (url, tmp_path / "back.zarr"), (url, url + "2")):
        done = command("copy_store", source, destination)
        assert done.returncode == 0 and f"{len(files)} files copied" in done.stdout, done.stderr
    assert objects_of(url) == files == files_of(tmp_path / "back.zarr") == objects_of(url + "2")


def test_a_copy_goes_on_where_it_was(small_store: Path, url: str, proxy: Proxy, tmp_path: Path) -> None:
    copy_store(plan_copy(small_store, Path(url)))
    objects = ObjectStore(url)
    shards = [key for key in objects_of(url) if is_shard(key)]
    objects.delete([shards[0], "zarr.json"])  # as if it had been killed
    damaged = bytearray(objects.get(shards[1])[0])
    damaged[7] ^= 1
    objects.put(shards[1], bytes(damaged))  # of the same size
    with (
        pytest.raises(FeatureStoreError, match=r"no store, or an unfinished copy of one"),
        store_lock(Path(url), "test"),
    ):
        pass
    done = copy_store(plan_copy(small_store, Path(url)))
    assert (done.files, done.there) == (3, len(files_of(small_store)) - 3)
    assert objects_of(url) == files_of(small_store)
    copy_store(plan_copy(Path(url), tmp_path / "s.zarr"))
    path = next((tmp_path / "s.zarr").rglob(f"{LAYERS[0]}/c/1/0/0/0"))
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    (tmp_path / "s.zarr" / "zarr.json").unlink()
    copy_store(plan_copy(Path(url), tmp_path / "s.zarr"))
    assert files_of(tmp_path / "s.zarr") == files_of(small_store)


def test_a_copy_is_not_made_over_something_else(small_store: Path, url: str, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(FeatureStoreError, match=r"holds what .* does not .chapter.tex., so it is not a copy"):
        plan_copy(small_store, tmp_path / "thesis")
    with pytest.raises(FeatureStoreError, match=r"there is no store"):
        plan_copy(tmp_path / "thesis2", Path(url))
    with pytest.raises(Missing):
        ObjectStore(url).get("zarr.json")


def test_the_examples_of_the_documentation_run(small_store: Path, tmp_path: Path) -> None:
    shutil.copytree(small_store, tmp_path / "store" / "demo.zarr")
    page = (ROOT / "docs" / "stores.md").read_text("utf-8")
    lines = [
        line for line in page.splitlines() if line.startswith("python ") and "s3://" in line and "photos" not in line
    ]
    assert len(lines) == 5
    for line in lines:
        _, script, *given = line.split()
        done = command(Path(script).stem, *given, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert files_of(tmp_path / "store" / "back.zarr") == files_of(small_store)
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    line = [sys.executable, "-c", code.replace("fc7-relu", LAYERS[1]) + "\nprint(len(rows))"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "10\n", done.stderr


def test_photographs_at_a_url_give_the_rows_of_those_on_disk(tmp_path: Path, url: str) -> None:
    """By prefix, by list, by a CSV of URLs; one that is gone is named, or left out."""
    photographs = write_photographs(tmp_path / "p", 2, 2)
    prefix = url.removesuffix("s.zarr") + "p"
    objects = ObjectStore(prefix)
    files = sorted(path for path in photographs.rglob("*.png"))
    for path in files:
        objects.put(path.relative_to(photographs).as_posix(), path)
    run_pass(photographs, tmp_path / "disk.zarr", LAYERS)
    due = FeatureStore.open(tmp_path / "disk.zarr")
    (tmp_path / "list.txt").write_text("".join(f"{path.relative_to(photographs).as_posix()}\n" for path in files))
    table = pd.DataFrame({"path": [f"{prefix}/{path.relative_to(photographs).as_posix()}" for path in files]})
    table.assign(face_id=[path.parent.name for path in files], view=[path.stem for path in files]).to_csv(
        tmp_path / "table.csv", index=False
    )
    found = [
        find_faces(prefix),
        find_faces(Path(prefix)),
        find_faces(tmp_path / "list.txt", images_root=prefix),
        find_faces(tmp_path / "table.csv"),
    ]
    for faces in found[1:]:
        assert faces.table[["face_id", "view", "path"]].equals(found[0].table[["face_id", "view", "path"]])
    job = prepare_job(replace(request_for(photographs, tmp_path / "remote.zarr", LAYERS), faces=found[0]))
    with store_lock(tmp_path / "remote.zarr", "test"):
        cache_layers(job, make_plan(job))
    store = FeatureStore.open(tmp_path / "remote.zarr")
    assert store.items.index.equals(due.items.index) and store.items["path"].str.startswith(prefix).all()
    assert store.items["image_sha256"].equals(due.items["image_sha256"])
    assert torch.equal(store.rows(LAYERS[0]).gather(range(4)), due.rows(LAYERS[0]).gather(range(4)))
    assert not make_plan(job).changed and not make_plan(job).images  # their hashes are those that were cached

    objects.delete([files[1].relative_to(photographs).as_posix()])
    job = prepare_job(replace(job.request, store=tmp_path / "other.zarr"))
    with store_lock(tmp_path / "other.zarr", "test"), pytest.raises(FeatureStoreError, match="there is no such object"):
        cache_layers(job, make_plan(job))
    with pytest.raises(FeatureStoreError, match="no images below"):
        find_faces(f"{prefix}/nobody")
    with pytest.raises(FeatureStoreError, match="cannot be listed"):
        find_faces("http://127.0.0.1:9/photos")


def test_workers_do_not_write_to_a_url(tmp_path: Path, url: str) -> None:
    photographs = write_photographs(tmp_path / "p", 1, 1)
    options = ["--layers", *LAYERS, "--images", photographs, "--weights", "random:0", "--store", url, "--processes", 2]
    refused = command("cache_layers", *options)
    assert refused.returncode == 1 and f"share, not to {url}. Give --store a folder" in refused.stderr
    assert not objects_of(url)
