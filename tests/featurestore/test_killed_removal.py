"""Removing and renaming, killed by SIGKILL before one file operation after another: the store is as before or as after."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from featurestore import FeatureStore
from featurestore.store.lock import store_lock
from featurestore.store.removal import finish_removals, removal_of, remove
from featurestore.store.rewriting import remove_items, rename_items
from tests.commands import FORKS
from tests.featurestore.test_cache import contents
from tests.heads.conftest import write_store

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


def drop_items(store: Path) -> None:
    remove_items(store, "a", FeatureStore.open(store).source("a").find(["face-003", "face-030"]))


def rename_in_a_circle(store: Path) -> None:
    one, other = ("face-001", "left"), ("face-002", "up")
    rename_items(store, "a", {one: (*other, "x.png"), other: (*one, "y.png")})


def drop_source(store: Path) -> None:
    remove(store, removal_of(FeatureStore.open(store), "a", None))


def drop_layer(store: Path) -> None:
    remove(store, removal_of(FeatureStore.open(store), "a", "fc7-relu"))


STEPS = {drop_items: 4, rename_in_a_circle: 4, drop_source: 2, drop_layer: 1}  # every 4th operation is enough of many


def run(operation: Callable[[Path], None], store: Path, kill_at: int) -> None:
    """Under the lock; before change number ``kill_at`` of a file or folder, this process kills itself."""
    with store_lock(store, "test"):
        done = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal done
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                done += 1
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        operation(store)
        os._exit(0)  # releasing the lock is not what is tested


def state(store: Path) -> dict[str, tuple]:
    """Everything a reader sees."""
    sources = FeatureStore.open(store).sources.values()
    return {
        source.name: (
            source.items.reset_index().to_csv(),
            {name: source.rows(name).gather(range(source.n_items)).numpy().tobytes() for name in source.layers},
        )
        for source in sources
    }


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: each step flushes files to disk many times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.parametrize("operation", STEPS)
def test_killed_at_any_step(operation: Callable[[Path], None], folder: Path) -> None:
    process = FORKS.Process(target=kill_at_steps, args=(operation, folder))  # it has no threads, so it may fork
    process.start()
    process.join()
    assert process.exitcode == 0, "see its traceback"


def kill_at_steps(operation: Callable[[Path], None], folder: Path) -> None:
    store = write_store(write_store(folder / "before.zarr", "a"), "b", seed=1)
    after, work = shutil.copytree(store, folder / "after.zarr"), folder / "work.zarr"
    operation(after)
    states, files = [state(store), state(after)], [contents(store), contents(after)]
    assert states[0] != states[1]
    seen, ended = [], 1
    while ended != 0:
        shutil.copytree(store, work, copy_function=os.link)  # no shard is ever changed in place
        child = os.fork()
        if not child:
            run(operation, work, kill_at=1 + STEPS[operation] * len(seen))
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        which = states.index(state(work))
        seen.append(which)
        with store_lock(work, "test"):
            finish_removals(work)
        assert contents(work) == files[which]
        shutil.rmtree(work)
    assert seen == sorted(seen)  # once it has happened it stays
    assert set(seen[:-1]) == {0, 1}  # there was something to do on both sides of it
    assert seen[-1] == 1
    assert contents(store) == files[0]
