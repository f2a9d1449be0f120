"""A local folder with copies of a remote store's small files: everything but shards.

What reads a store reads these copies as it reads a store on disk. What writes one writes them too, and each file that takes its
place here, or goes, is first put or deleted at the URL (``files.put_in_place`` and its neighbours), in the order in which the
writer does it. A reader's mirror is kept in the cache folder, where there is one, and then only what has changed is fetched; a
writer has one of its own.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from crc32c import crc32c
from filelock import FileLock

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, copies, elsewhere
from featurestore.remote.cache import ShardCache, cache_for, own_folder
from featurestore.remote.client import Missing, ObjectStore, Unchanged, url_of
from featurestore.remote.lease import Lease
from featurestore.text import MIRROR, listing

REQUESTS = 32  # at once, of small files and of indexes
CRC32C = "crc32c"  # noted of every object that is put: what it has to be
_SHARD = re.compile(r".+/c(/\d+){2,}")  # a coordinate's chunk has one number
_ETAGS = "etags.json"
METADATA = "zarr.json"


class Mirror:
    """The copies of the store at ``url`` in ``root``. ``lease`` is there while this process may write it."""

    def __init__(self, url: str, root: Path, shards: ShardCache) -> None:
        self.url, self.root, self.shards = url, root, shards
        self.objects = ObjectStore(url)
        self.lease: Lease | None = None
        self.fetched = False  # by this process

    def key(self, path: Path) -> str:
        """The object whose copy ``path`` is; empty for the whole store."""
        key = path.relative_to(self.root).as_posix()
        return "" if key == "." else key

    def fetch(self, keys: Iterable[str]) -> set[str]:
        """Bring the copies of ``keys`` up to date, many at once; those that are not there, here neither."""
        self.root.mkdir(parents=True, exist_ok=True)
        etags, keys = self._etags(), list(keys)

        def fetch(key: str) -> str | None:
            path = self.root / key
            try:
                content, etag = self.objects.get(key, etags.get(key) if path.is_file() else None)
            except Unchanged:
                return None
            except Missing:
                etags.pop(key, None)
                path.unlink(missing_ok=True)
                return key
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + PARTIAL)
            partial.write_bytes(content)
            partial.replace(path)
            etags[key] = etag
            return None

        self.fetched = True
        try:
            return {key for key in requests().map(fetch, keys) if key is not None}
        finally:
            self._etag_file.write_text(json.dumps(etags), "utf-8")

    def refreshing(self) -> FileLock:
        """Held while copies are fetched, since processes may share them."""
        self.root.mkdir(parents=True, exist_ok=True)
        return FileLock(self._etag_file.with_suffix(".lock"))

    def fetch_all(self) -> None:
        """Make the copies anew: all files of sources that are no shards, and an empty folder where a shard's number would be.

        FeatureStoreError if there are objects below the URL that are no store's.
        """
        self.forget_copies()
        self.root.mkdir(parents=True)
        keys = dict(self.objects.listed())
        if keys and METADATA not in keys:
            raise FeatureStoreError(
                f"{self.url} is no store, or an unfinished copy of one: it holds {listing(sorted(keys), 2)}. Choose "
                "another `store`, or finish the copy: pipelines/copy_store.py."
            )
        keys = of_sources(keys)
        for key in keys:
            if is_shard(key):
                (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        self.fetch(key for key in keys if not is_shard(key))

    def drop(self, name: str) -> None:
        """Remove the copies of a source."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove the copies of all other sources."""
        kept = set(names)
        for path in self.root.iterdir():
            if path.is_dir() and path.name not in kept:
                self.drop(path.name)

    def forget_copies(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._etag_file.unlink(missing_ok=True)

    def put(self, partial: Path, path: Path) -> None:
        """See ``Elsewhere``. FeatureStoreError if the store may not be written by now."""
        self.require_lease()
        key = self.key(path)
        put_file(self.objects, key, partial)
        if is_shard(key):
            partial.unlink()
            path.unlink(missing_ok=True)  # fetched to complete it
        else:
            partial.replace(path)

    def remove(self, path: Path, folder: bool) -> None:
        """See ``Elsewhere``. In a folder documents go first, so that nothing says more than is there."""
        self.require_lease()
        key = self.key(path)
        keys = [each for each, _ in self.objects.listed(key)] if folder else [key]
        self.objects.delete(sorted(keys, key=lambda each: (each.count("/"), each)))

    def nbytes(self, folder: Path) -> int:
        """See ``Elsewhere``. Of a store that is read by http(s), which cannot be listed, those of the copies."""
        if self.objects.read_only:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return sum(size for _, size in self.objects.listed(self.key(folder)))

    def require_lease(self) -> None:
        """FeatureStoreError unless the store is this process's to write."""
        if self.lease is None:
            raise FeatureStoreError(f"{self.url} is not held for writing by this process (`store_lock`).")
        self.lease.require()

    @property
    def _etag_file(self) -> Path:
        return next(parent for parent in self.root.parents if parent.name.startswith(MIRROR)) / _ETAGS

    def _etags(self) -> dict[str, str | None]:
        try:
            etags = json.loads(self._etag_file.read_text("utf-8"))
            return etags if isinstance(etags, dict) else {}
        except (OSError, ValueError):
            return {}


def of_sources(keys: dict[str, int]) -> dict[str, int]:
    """Those that are a store's: its document, and what is in folders that have one. Size (bytes) by key."""
    sources = {key.removesuffix(f"/{METADATA}") for key in keys if key.count("/") == 1 and key.endswith(f"/{METADATA}")}
    return {key: size for key, size in keys.items() if key == METADATA or key.partition("/")[0] in sources}


def is_shard(key: str) -> bool:
    """Whether an object is a layer's shard, by its key."""
    return _SHARD.fullmatch(key) is not None


def put_file(objects: ObjectStore, key: str, path: Path) -> int:
    """Put a file, its checksum noted beside it (crc32c, which is returned)."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = crc32c(piece, crc)
    objects.put(key, path, {CRC32C: f"{crc:08x}"})
    return crc


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a file or folder belongs to; None where a store is on this machine's disk."""
    found = elsewhere(path)
    return found if isinstance(found, Mirror) else None


def local_store(
    store: str | os.PathLike[str],
    writing: bool = False,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Path:
    """The folder through which a store is read (or, ``writing``, written): the store itself, or the mirror of a URL.

    Nothing is fetched. ``cache`` and ``cache_bytes`` are those of ``FeatureStore.open``.
    """
    url = url_of(store)
    known = mirror_of(Path(store)) if url is None else None
    if known is not None:
        url = known.url
        if not writing and cache is None:
            return known.root
    if url is None:
        return Path(store)
    shards = cache_for(cache, cache_bytes)
    name = MIRROR + hashlib.sha256(url.encode()).hexdigest()[:16]
    base = own_folder() / "writing" if writing else shards.folder
    scheme, _, rest = url.partition("://")
    root = base / name / f"{scheme}:" / rest
    if root not in copies or copies[root].shards is not shards:  # type: ignore[attr-defined]
        copies[root] = Mirror(url, root, shards)
    return root


@cache
def requests() -> ThreadPoolExecutor:
    """Threads that wait for small answers; made at first use."""
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="requests")
