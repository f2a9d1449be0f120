"""Kill a real pass again and again; the store ends up as if nothing had happened, and a reader never saw half a row."""

import hashlib
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr

from featurestore import FeatureStore, FeatureStoreError
from tests import commands
from tests.commands import ROOT
from tests.conftest import write_photographs

pytestmark = pytest.mark.xdist_group("crash")  # one process makes what they share
LAYERS = ["maxp_1_2", "maxp_2_2"]
KILLS = 20


def arguments(images: Path, store: Path, layers: list[str]) -> list[str]:
    """Small shards and batches, so that there is much to be in the middle of."""
    options = ["--images", images, "--store", store, "--weights", "random:0", "--batch-size", 2, "--items-per-shard", 4]
    return ["--layers", *layers, *map(str, options)]


def start(images: Path, store: Path, layers: list[str]) -> subprocess.Popen:
    line = [sys.executable, str(ROOT / "pipelines" / "cache_layers.py"), *arguments(images, store, layers)]
    # A shell that runs the tests in the background ignores Ctrl-C, and its processes inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed)


def fork(images: Path, store: Path) -> multiprocessing.Process:
    return commands.start("cache_layers", *arguments(images, store, LAYERS))


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def digests(store: Path) -> dict[str, str]:
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


class Reader(threading.Thread):
    """Opens the store over and over, in both ways, and compares every row it is shown with what it must be."""

    def __init__(self, store: Path, expected: dict[tuple[str, str], dict[str, np.ndarray]]) -> None:
        super().__init__(daemon=True)
        self.store, self.expected = store, expected
        self.done = threading.Event()
        self.wrong: list[str] = []
        self.rows_seen = 0
        self.sizes: set[int] = set()

    def run(self) -> None:
        while not self.done.wait(0.02):
            try:
                self.look()
            except Exception as error:  # whatever a reader would have met is a failure of the test
                self.wrong.append(f"{type(error).__name__}: {error}")
                return

    def look(self) -> None:
        try:
            source = FeatureStore.open(self.store).source()
        except FeatureStoreError as error:
            if "there is no store" in str(error) or "holds no source" in str(error) or "has no zarr.json" in str(error):
                return  # not begun yet
            raise
        self.sizes.add(source.n_items)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = zarr.open_group(self.store / source.name, mode="r")
        for layer in source.layers:
            rows = source.rows(layer, verify=True)
            there = np.flatnonzero(rows.present)
            for row in np.random.default_rng().permutation(there)[:3]:
                self.compare(source.keys[row], layer, rows.gather([row])[0].numpy())
                self.compare(source.keys[row], layer, group[layer][int(row)])

    def compare(self, key: tuple[str, str], layer: str, row: np.ndarray) -> None:
        if np.isnan(row).all():
            return  # absent, because the test took the shard away: never half a row
        self.rows_seen += 1
        if not np.array_equal(row, self.expected[key][layer]):
            self.wrong.append(f"{key} of {layer} is not what it must be")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    images = write_photographs(folder / "photographs", 20, 2)
    finish(start(images, folder / "whole.zarr", LAYERS))
    start_time = time.perf_counter()
    process = fork(images, folder / "timed.zarr")
    process.join()
    assert process.exitcode == 0
    return images, folder / "whole.zarr", time.perf_counter() - start_time


def test_killed_twenty_times(uninterrupted: tuple[Path, Path, float], tmp_path: Path) -> None:
    images, whole, seconds = uninterrupted
    source = FeatureStore.open(whole).source()
    expected = {
        key: {layer: source.rows(layer).gather([row])[0].numpy() for layer in LAYERS}
        for row, key in enumerate(source.keys)
    }
    store = tmp_path / "killed.zarr"
    reader = Reader(store, expected)
    reader.start()
    chance = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = fork(images, store)
        # From before the first file to the last commit of what is left.
        if kills % 2:
            time.sleep(chance.uniform(0.0, seconds))
        else:
            wait_for_a_shard(store, process.is_alive)
            time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.exitcode == 0
        for path in list(store.rglob("c/*/0/0/0"))[::3]:  # finished too early: give it something to do again
            path.unlink()
    finish(start(images, store, LAYERS))
    reader.done.set()
    reader.join(30)
    assert not reader.wrong
    assert reader.rows_seen > 100
    assert len(reader.sizes) > 3  # it did see the store grow
    assert digests(store) == digests(whole)


def wait_for_a_shard(store: Path, alive: Callable[[], bool]) -> None:
    """Until the process has begun to write a shard, or has ended."""
    while alive() and not any(store.rglob("c/*/0/0/0.partial")):
        time.sleep(0.005)


def test_interrupted_at_the_keyboard(uninterrupted: tuple[Path, Path, float], tmp_path: Path) -> None:
    """Ctrl-C keeps everything computed so far, says how to go on, and going on gives the same store."""
    images, whole, _ = uninterrupted
    store = tmp_path / "interrupted.zarr"
    process = start(images, store, LAYERS)
    wait_for_a_shard(store, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Run the same command again" in output
    source = FeatureStore.open(store).source()
    assert all(source.rows(layer).present.all() for layer in LAYERS)
    finish(start(images, store, LAYERS))
    assert digests(store) == digests(whole)


def test_a_layer_added_by_a_killed_pass(uninterrupted: tuple[Path, Path, float], tmp_path: Path) -> None:
    images, whole, _ = uninterrupted
    store = tmp_path / "extended.zarr"
    finish(start(images, store, LAYERS[:1]))
    for _ in range(3):
        process = fork(images, store)
        wait_for_a_shard(store, process.is_alive)
        time.sleep(0.2)
        process.kill()
        process.join()
        rows = FeatureStore.open(store).rows(LAYERS[1])
        expected = FeatureStore.open(whole).rows(LAYERS[1])
        there = np.flatnonzero(rows.present)
        assert np.array_equal(rows.gather(there).numpy(), expected.gather(there).numpy())
    finish(start(images, store, LAYERS))
    assert {name: digest for name, digest in digests(store).items() if "/c/" in name} == {
        name: digest for name, digest in digests(whole).items() if "/c/" in name
    }


def test_a_disk_that_takes_no_more(uninterrupted: tuple[Path, Path, float], tmp_path: Path) -> None:
    """The limit is the kernel's own (RLIMIT_FSIZE), so the write that fails is a real one."""
    images, whole, _ = uninterrupted
    store = tmp_path / "full.zarr"
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20)); "
        "sys.argv = sys.argv[1:]; from pipelines.cache_layers import main; main()"
    )
    line = [sys.executable, "-c", limited, "cache_layers", *arguments(images, store, LAYERS)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 1
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(store.rglob("*.partial"))
    finish(start(images, store, LAYERS))
    assert digests(store) == digests(whole)
