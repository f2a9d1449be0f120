"""Whole shards of remote stores in a folder of this machine, fetched once, the least recently used ones removed first.

Several processes may share the folder. A file's name says what has to be in it, so nothing in it is ever out of date. A file that
another process removes while it is mapped stays readable; its space is free when the last one has let go of it.
"""

import atexit
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL
from featurestore.text import human_bytes

CACHE_DIR, CACHE_BYTES = "FEATURESTORE_CACHE_DIR", "FEATURESTORE_CACHE_BYTES"
DEFAULT_BYTES = 50 << 30  # of a folder that was given
_OWN_BYTES = 2 << 30  # of this process's, without one
_LOCKS = 64  # files that processes wait for each other by
_ABANDONED = 3600.0  # seconds after which a file that is being fetched was left by a process that was killed

Fetch = Callable[[Path, Callable[[int], None]], bool]


class ShardCache:
    """Files by name in ``folder``, at most ``most`` bytes of them."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    def open(self, name: str, fetch: Fetch) -> tuple[int, bool]:
        """A descriptor of the file ``name``, and whether it is what it has to be. One that is not, is not kept.

        ``fetch`` writes it to a path, and calls its second argument with the size (bytes) before it does; it returns whether the
        content is right. FeatureStoreError where the file does not fit.
        """
        path = self.folder / "shards" / name
        try:
            return self._opened(path), True
        except FileNotFoundError:
            pass
        partial = path.with_name(f"{name}.{os.getpid()}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "shards" / f".lock-{int(name[-8:], 16) % _LOCKS}", is_singleton=False):
                try:
                    return self._opened(path), True  # another process, or thread, has fetched it in the meantime
                except FileNotFoundError:
                    pass
                try:
                    sound = fetch(partial, self._make_room)
                    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
                    if sound:
                        self._keep(partial, path)
                    return descriptor, sound
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FeatureStoreError(
                    f"the cache folder {self.folder} is full: {error.strerror}. Make room on its disk, lower its bound "
                    f"({CACHE_BYTES}, now {human_bytes(self.most)}), or give another `cache`."
                ) from None
            if isinstance(error, FileNotFoundError) or error.errno is None:
                raise
            raise FeatureStoreError(
                f"the cache folder {self.folder} cannot be written: {error.strerror}. Give another `cache`."
            ) from None

    def _opened(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError):  # a cache that is only read
            os.utime(descriptor)  # used now
        return descriptor

    def _make_room(self, nbytes: int) -> None:
        """Room for what will be fetched, beside what others are fetching."""
        if nbytes > self.most:
            raise FeatureStoreError(
                f"a shard has {human_bytes(nbytes)}, more than the cache may hold ({human_bytes(self.most)}). Give it more: "
                f"`cache_bytes`, or {CACHE_BYTES} in the environment."
            )
        with self._removing:
            self._remove_beyond(self.most - nbytes, unfinished=True)

    def _keep(self, partial: Path, path: Path) -> None:
        """Put a file that is whole in its place. Others may have come there since room was made for it."""
        with self._removing:
            self._remove_beyond(self.most - partial.stat().st_size, unfinished=False)
            partial.replace(path)

    @property
    def _removing(self) -> FileLock:
        return FileLock(self.folder / "shards" / ".lock-removal", is_singleton=False)

    def _remove_beyond(self, most: int, unfinished: bool) -> None:
        """Remove the least recently used files until all, with those that are being written or without, have ``most`` bytes."""
        files, now = [], time.time()
        for entry in os.scandir(self.folder / "shards"):
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue
            if not entry.name.endswith(PARTIAL):
                files.append((found.st_mtime_ns, found.st_size, entry))
            elif now - found.st_mtime > _ABANDONED:
                Path(entry.path).unlink(missing_ok=True)
            elif unfinished:
                most -= found.st_size
        total = sum(size for _, size, _ in files)
        for _, size, entry in sorted(files, key=lambda each: each[0]):
            if total <= most:
                break
            if not entry.name.startswith(".lock"):
                Path(entry.path).unlink(missing_ok=True)
                total -= size


@cache
def own_folder() -> Path:
    """A folder of this process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="featurestore-")).resolve()
    made_by = os.getpid()

    def remove() -> None:
        if os.getpid() == made_by:  # not at the end of a process that was forked
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@cache
def _cache_at(folder: Path, most: int) -> ShardCache:
    return ShardCache(folder, most)


def cache_for(folder: str | os.PathLike[str] | None, most: int | None) -> ShardCache:
    """The cache in ``folder`` with its bound, by default those of the environment; otherwise a small one of this process."""
    given = folder or os.environ.get(CACHE_DIR)
    if most is None and os.environ.get(CACHE_BYTES):
        most = _bytes_of(os.environ[CACHE_BYTES])
    if most is not None and most <= 0:
        raise FeatureStoreError(f"`cache_bytes` is {most}; it has to be a number of bytes above 0.")
    if given:
        return _cache_at(Path(given).expanduser().resolve(), most or DEFAULT_BYTES)
    return _cache_at(own_folder(), most or _OWN_BYTES)


def is_kept(shards: ShardCache) -> bool:
    """Whether the cache outlives this process."""
    return shards.folder != own_folder()


def _bytes_of(text: str) -> int:
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        return int(float(number) * (1 << units.get(unit, 0)))
    except (ValueError, OverflowError):
        raise FeatureStoreError(
            f"{CACHE_BYTES} is {text!r}; it has to be a number of bytes, or one such as 500M, 20G or 1T."
        ) from None
