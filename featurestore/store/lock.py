"""One writer at a time: the lock of a store."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from featurestore.errors import FeatureStoreError


@contextmanager
def store_lock(store: Path, doing: str) -> Iterator[None]:
    """Hold the store for writing; FeatureStoreError names who holds it already. Released even by SIGKILL."""
    store = store.resolve()  # a link to a store is the same store
    lock_path = store.with_name(store.name + ".lock")
    holder_path = store.with_name(store.name + ".lock.json")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path, timeout=0)
        lock.acquire()
        holder = {"pid": os.getpid(), "host": platform.node(), "doing": doing}
        holder_path.write_text(json.dumps(holder), "utf-8")
    except Timeout:
        raise FeatureStoreError(
            f"{store} is being written by {_holder(holder_path)}. Wait for it or stop it."
        ) from None
    except OSError as error:
        raise FeatureStoreError(
            f"{store} cannot be written: {error.strerror or error} ({lock_path}). Choose another `store`."
        ) from None
    try:
        yield
    finally:
        holder_path.unlink(missing_ok=True)
        lock.release()


def is_being_written(store: Path) -> bool:
    """Whether somebody holds ``store_lock`` now."""
    path = store.resolve()
    path = path.with_name(path.name + ".lock")
    try:
        with FileLock(path, timeout=0) if path.exists() else nullcontext():
            return False
    except Timeout:
        return True
    except OSError:  # a disk that cannot be written is not being written
        return False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text("utf-8"))
        return f"process {holder['pid']} on {holder['host']} ({holder['doing']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
