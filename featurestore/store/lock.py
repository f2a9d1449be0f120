"""One writer at a time: the lock of a store."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from featurestore.errors import FeatureStoreError
from featurestore.remote.client import ObjectStore
from featurestore.remote.lease import Lease, holder_of
from featurestore.remote.mirror import Mirror, local_store, mirror_of


@contextmanager
def store_lock(store: Path, doing: str, unfinished: bool = False) -> Iterator[None]:
    """Hold the store for writing; FeatureStoreError names who holds it already. Released even by SIGKILL.

    A store on an object store is held by a lease, which others may take over when it has not been renewed for a minute. One that
    is ``unfinished`` is held without looking at what is there.
    """
    remote = mirror_of(local_store(store, writing=True))
    if remote is not None:
        with _writing(remote, doing, unfinished):
            yield
        return
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
    remote = mirror_of(local_store(store))
    if remote is not None:
        return not remote.objects.read_only and holder_of(*_lease_of(remote)) is not None
    path = store.resolve()
    path = path.with_name(path.name + ".lock")
    try:
        with FileLock(path, timeout=0) if path.exists() else nullcontext():
            return False
    except Timeout:
        return True
    except OSError:  # a disk that cannot be written is not being written
        return False


@contextmanager
def _writing(remote: Mirror, doing: str, unfinished: bool) -> Iterator[None]:
    """The same of a store on an object store, whose copies are made anew; see ``Lease``."""
    if remote.objects.read_only:
        raise FeatureStoreError(f"{remote.url} can only be read. Write to s3://, gs:// or az://, or to a folder.")
    lease = Lease(*_lease_of(remote), remote.url, doing)
    try:
        if not unfinished:
            remote.fetch_all()
        remote.lease = lease
        yield
    finally:
        remote.lease = None
        lease.release()


def _lease_of(remote: Mirror) -> tuple[ObjectStore, str]:
    """Where the lease is: beside the store."""
    above, _, name = remote.url.rpartition("/")
    if above.endswith(":/"):  # the store is the whole bucket
        return remote.objects, ".lock"
    return ObjectStore(above), f"{name}.lock"


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text("utf-8"))
        return f"process {holder['pid']} on {holder['host']} ({holder['doing']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
