"""The pass in many processes: the same bytes as from one, whoever dies; and what is said of clusters that will not do."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dask.config
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from safetensors.torch import save_file

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.cluster import ClusterPass
from featurestore.caching.job import prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import Summary, cache_layers
from featurestore.checkpoints.weights import open_weights
from featurestore.cluster import connected, in_order, prepare_local
from featurestore.demo.dataset import make_faces
from featurestore.networks.registry import get_backbone
from featurestore.store.lock import store_lock
from tests.commands import ROOT, command
from tests.conftest import files_of, request_for, write_photographs
from tests.heads.tiny_network import NAME, RECIPE

pytestmark = pytest.mark.xdist_group("cluster")  # one process makes the cluster
NAMES = ["relu1", "descriptor"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with ExitStack() as stack:
        prepare_local(stack)
        yield stack.enter_context(
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=None)
        )


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with connected(cluster.scheduler_address) as made:
        yield made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Last digits depend on how many threads share a product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_workers_of_this_machine_keep_freed_memory(client: Client) -> None:
    """Dask starts them with a setting of malloc that would be taken for the user's own."""
    here = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    there = client.run(lambda: {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")})
    assert all(found == here for found in there.values())


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Summary]:
    """The real pass with a small network, here or on a cluster."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)

    def run(images: Path, store: Path, layers=NAMES, client=None, progress=lambda n: None, **options) -> Summary:
        job = prepare_job(request_for(images, store, layers, **{"backbone": NAME, "recipe": str(recipe), **options}))
        with store_lock(store, "test"):
            elsewhere = ClusterPass(client, threads=1) if client else None
            return cache_layers(job, make_plan(job), progress, elsewhere=elsewhere)

    return run


def no_leftovers(store: Path) -> bool:
    """Whether nothing is there but what the store's documents speak of."""
    source = FeatureStore.open(store).source()
    shards = {path for layer in source.layers.values() for path in map(layer.shard_path, range(layer.n_shards))}
    there = {path for name in source.layers for path in (source.folder / name / "c").rglob("*") if path.is_file()}
    return there <= shards and not list(store.rglob("*.partial"))


@pytest.mark.parametrize("n", [2, 4])
def test_a_cluster_writes_the_same_bytes(cluster: LocalCluster, client: Client, tiny, tmp_path: Path, n: int) -> None:
    """Appended across a shard's end, then more photographs and another layer; photographs counted once."""
    cluster.scale(n)
    client.wait_for_workers(n, timeout=60)
    images, one, many = write_photographs(tmp_path / "p", 7, 2), tmp_path / "one.zarr", tmp_path / "many.zarr"
    seen: list[int] = []
    compress = {2: "none", 4: "zstd"}[n]
    for store in (one, many):
        tiny(images, store, client=client if store is many else None, compress=compress)
    assert files_of(many) == files_of(one)
    write_photographs(images, 9, 2)
    for store in (one, many):
        where = client if store is many else None
        done = tiny(images, store, [*NAMES, "block1"], where, seen.append, compress=compress)
        assert done.computed == 14 + 4  # the new layer of the old ones, all layers of the new ones
    assert sum(seen) == 2 * (14 + 4)
    assert files_of(many) == files_of(one)
    stamps = {path: path.stat().st_mtime_ns for path in many.rglob("*") if path.is_file()}
    assert tiny(images, many, [*NAMES, "block1"], client, compress=compress).computed == 0
    assert {path: path.stat().st_mtime_ns for path in many.rglob("*") if path.is_file()} == stamps


def test_broken_photographs_are_left_out_as_in_one_process(client: Client, tiny, tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 9, 2)
    for name in ("f1/1", "f4/2", "f5/1", "f9/2"):
        (images / f"{name}.png").write_bytes(b"no picture")
    one = tiny(images, tmp_path / "one.zarr", on_error="skip")
    many = tiny(images, tmp_path / "many.zarr", client=client, on_error="skip")
    assert files_of(tmp_path / "many.zarr") == files_of(tmp_path / "one.zarr")
    assert many.failures == one.failures
    assert len(many.failures) == 4
    (images / "f2/1.png").write_bytes(b"no picture now")  # its row stays, and the others get the new layer
    one = tiny(images, tmp_path / "one.zarr", [*NAMES, "block1"], on_error="skip")
    many = tiny(images, tmp_path / "many.zarr", [*NAMES, "block1"], client, on_error="skip")
    assert many.failures == one.failures
    assert many.computed == one.computed == 13
    assert files_of(tmp_path / "many.zarr") == files_of(tmp_path / "one.zarr")


def test_a_broken_photograph_stops_it_where_it_stops_one_process(client: Client, tiny, tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 9, 2)
    (images / "f4/2.png").write_bytes(b"no picture")
    said = []
    for name, where in (("one", None), ("many", client)):
        with pytest.raises(FeatureStoreError, match=r"f4/2\.png") as error:
            tiny(images, tmp_path / f"{name}.zarr", client=where)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert FeatureStore.open(tmp_path / "many.zarr").source().n_items == 7
    assert files_of(tmp_path / "many.zarr") == files_of(tmp_path / "one.zarr")


def test_a_killed_worker_changes_nothing(client: Client, tiny, tmp_path: Path) -> None:
    """SIGKILL to a worker that has a shard, once the first shard is there."""
    images = write_photographs(tmp_path / "p", 40, 3)
    pids = client.run(os.getpid)
    killed = []

    def kill(n: int) -> None:
        busy = [address for address, keys in client.processing().items() if keys]
        if busy and not killed:
            os.kill(pids[busy[0]], signal.SIGKILL)
            killed.append(busy[0])

    tiny(images, tmp_path / "many.zarr", client=client, progress=kill)
    assert killed
    tiny(images, tmp_path / "one.zarr")
    assert files_of(tmp_path / "many.zarr") == files_of(tmp_path / "one.zarr")
    assert no_leftovers(tmp_path / "many.zarr")


def test_ctrl_c_keeps_what_is_there(client: Client, tiny, tmp_path: Path) -> None:
    images, store = write_photographs(tmp_path / "p", 20, 3), tmp_path / "many.zarr"

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    done = tiny(images, store, client=client, progress=stop)
    assert done.interrupted
    assert 0 < done.computed < 60
    assert FeatureStore.open(store).source().n_items == done.computed
    tiny(images, store, client=client)
    tiny(images, tmp_path / "one.zarr")
    assert files_of(store) == files_of(tmp_path / "one.zarr")


@contextmanager
def dask_process(kind: str, *arguments: object, cwd: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """``dask scheduler`` or ``dask worker``, ended if it has not ended by itself."""
    line = [sys.executable, "-m", "dask", kind, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), **environment}  # the tests' networks
    with (cwd / f"{kind}.log").open("w") as log:
        process = subprocess.Popen(
            line, cwd=cwd, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_scheduler_ends_it_and_the_same_command_goes_on(client: Client, tiny, tmp_path: Path) -> None:
    images, store = write_photographs(tmp_path / "p", 40, 3), tmp_path / "many.zarr"
    file = tmp_path / "scheduler.json"
    where = ["--scheduler-file", file]
    with (
        dask_process(
            "scheduler", *where, "--port", 0, "--host", "127.0.0.1", "--no-dashboard", cwd=tmp_path
        ) as scheduler,
        dask_process("worker", *where, "--no-nanny", "--nthreads", 1, "--no-dashboard", cwd=tmp_path),
    ):
        started = time.monotonic()
        while not file.exists() and time.monotonic() < started + 60:
            time.sleep(0.05)
        with Client(scheduler_file=str(file), timeout=60) as there:
            there.wait_for_workers(1, timeout=60)
            address = there.scheduler.address

        def kill(n: int) -> None:
            if FeatureStore.open(store).source().n_items:
                scheduler.kill()

        with pytest.raises(FeatureStoreError, match=rf"scheduler at {address} is gone"), connected(address) as there:
            tiny(images, store, client=there, progress=kill)
    kept = FeatureStore.open(store).source().n_items
    assert 0 < kept < 120
    assert tiny(images, store, client=client).computed == 120 - kept
    tiny(images, tmp_path / "one.zarr")
    assert files_of(store) == files_of(tmp_path / "one.zarr")
    assert no_leftovers(store)


def test_a_worker_with_other_code_is_named(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "featurestore", tmp_path / "featurestore", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "featurestore" / "keys.py").open("a") as file:
        file.write("\n# edited\n")
    before = set(client.scheduler_info(n_workers=-1)["workers"])
    arguments = cluster.scheduler_address, "--no-nanny", "--no-dashboard"
    with dask_process("worker", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path)):
        client.wait_for_workers(len(before) + 1, timeout=60)
        (other,) = set(client.scheduler_info(n_workers=-1)["workers"]) - before
        said = rf"the worker at {other} has featurestore [0-9a-f]{{12}}, here [0-9a-f]{{12}}\. .*same installation"
        with pytest.raises(FeatureStoreError, match=said), connected(cluster.scheduler_address):
            pass
    while len(client.scheduler_info(n_workers=-1)["workers"]) > len(before):
        time.sleep(0.05)


def test_a_worker_with_other_weights_is_named(client: Client, tmp_path: Path) -> None:
    """The file is another one by the time that workers read it."""
    images, weights, recipe = write_photographs(tmp_path / "p", 4, 1), tmp_path / "w.safetensors", tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    drawn = open_weights("random:0", get_backbone(NAME))
    save_file(drawn.read(drawn.keys), weights)
    options = {"backbone": NAME, "recipe": str(recipe), "weights": str(weights)}
    job = prepare_job(request_for(images, tmp_path / "s.zarr", NAMES, **options))
    save_file({key: value + 1 for key, value in drawn.read(drawn.keys).items()}, weights)
    other = prepare_job(request_for(images, tmp_path / "s.zarr", NAMES, **options))
    ours, theirs = job.weights.identity, other.weights.identity
    said = rf"the worker at tcp://\S+ has other weights in \S+w\.safetensors: {theirs}, here {ours}"
    with store_lock(tmp_path / "s.zarr", "test"), pytest.raises(FeatureStoreError, match=said):
        cache_layers(job, make_plan(job), elsewhere=ClusterPass(client, threads=1))


def test_an_address_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FeatureStoreError, match=rf"no Dask scheduler answers at {address}: "), connected(address):
            pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "tcp:/127.0.0.1:8786"])
def test_a_scheduler_that_is_none(address: str) -> None:
    with pytest.raises(FeatureStoreError, match=f"no Dask scheduler answers at {address}: "), connected(address):
        pass


def _squared(number: int, last: int) -> int:
    time.sleep(0.3 if number == last else 0)
    return number**2


def _slow_but_for_the_first(number: int) -> int:
    time.sleep(0.3 if number else 0)
    return number


def test_results_come_in_order_and_calls_are_made_a_few_at_a_time(client: Client) -> None:
    assert list(in_order(client, _squared, ((n, 0) for n in range(40)))) == [n**2 for n in range(40)]
    assert list(in_order(client, _squared, ())) == []
    begun: list[int] = []
    results = in_order(client, _slow_but_for_the_first, ((begun.append(n) or n,) for n in range(200)))
    assert next(results) == 0
    assert len(begun) < 100
    results.close()
    with pytest.raises(ZeroDivisionError):
        list(in_order(client, divmod, ((1, n) for n in (2, 1, 0))))


def test_a_cluster_checks_a_store(cluster: LocalCluster, tiny, tmp_path: Path) -> None:
    """As a process does by itself: damaged records are found, and named alike."""
    store = tmp_path / "s.zarr"
    tiny(write_photographs(tmp_path / "p", 5, 2), store)
    shard = FeatureStore.open(store).source().layer("descriptor").shard_path(1)
    content = bytearray(shard.read_bytes())
    content[130] ^= 1
    shard.write_bytes(content)
    given = [store, "--recompute", 0]
    here, there = (command("verify_store", *given, *more) for more in ([], ["--scheduler", cluster.scheduler_address]))
    assert here.returncode == there.returncode == 1, there.stderr
    assert "layer descriptor, shard 1, item ('f3', '2')" in here.stdout
    assert there.stdout == here.stdout
    assert f"at {cluster.scheduler_address}" in there.stderr


def test_a_cluster_finds_faces(cluster: LocalCluster, tmp_path: Path) -> None:
    """A rendered face, one that shows none, one that is no picture; and again, from the table."""
    pytest.importorskip("dlib")
    make_faces(tmp_path / "faces", 1, progress=lambda n: None)
    (pictures := tmp_path / "photographs" / "anna").mkdir(parents=True)
    for i, picture in enumerate(sorted((tmp_path / "faces").rglob("*.png"))):
        shutil.copy(picture, pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    for _ in range(2):
        printed = []
        for name, more in (("here", []), ("there", ["--scheduler", cluster.scheduler_address])):
            done = command("find_faces", "photographs", "--out", f"{name}.csv", *more, cwd=tmp_path)
            assert done.returncode == 3, done.stderr
            printed.append(done.stdout.replace(f"{name}.", "."))
        assert printed[0] == printed[1]
        assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()


def test_the_command_makes_a_cluster(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 5, 2)
    (tmp_path / "r.toml").write_text(RECIPE)
    given = ["--images", images, "--backbone", NAME, "--recipe", tmp_path / "r.toml", "--weights", "random:0"]
    made = command("cache_layers", *given, "--layers", *NAMES, "--store", tmp_path / "s.zarr", "--processes", 2)
    assert made.returncode == 0, made.stderr
    assert "cluster   2 workers at tcp://127.0.0.1:" in made.stdout
    assert "dashboard: http://127.0.0.1:" in made.stdout
    assert "Done: 10 of 10 images" in made.stdout
    assert np.isfinite(FeatureStore.open(tmp_path / "s.zarr").rows("descriptor").gather(range(10)).numpy()).all()
    both = command("cache_layers", *given, "--layers", "relu1", "--processes", 2, "--scheduler", "tcp://127.0.0.1:1")
    assert "give one of the two" in both.stderr
