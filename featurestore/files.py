"""What everything that reads or writes files shares: their hash and name, and replacing them in one step."""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from featurestore.errors import FeatureStoreError

PARTIAL = ".partial"  # ending of a file or folder that is being written or removed; readers never open it


class Elsewhere(Protocol):
    """A store kept elsewhere, of whose small files a folder here holds copies. It is told of what is to change, before."""

    def put(self, partial: Path, path: Path) -> None:
        """``partial`` is whole, and takes the place of ``path``."""

    def remove(self, path: Path, folder: bool) -> None:
        """A file goes, or a ``folder`` with all that is in it there."""

    def nbytes(self, folder: Path) -> int:
        """Bytes of all files below ``folder`` there."""


copies: dict[Path, Elsewhere] = {}  # by the folder here


def elsewhere(path: Path) -> Elsewhere | None:
    """Where the file or folder is really kept, if it is one of a folder of copies."""
    return next((kept for root, kept in copies.items() if root == path or root in path.parents), None)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a file that is whole; see ``replacing``."""
    kept = elsewhere(path)
    if kept:
        kept.put(partial, path)
    else:
        partial.replace(path)


def remove_file(path: Path) -> None:
    """Delete a file, which may be a shard that has no copy here. FileNotFoundError if it is not there."""
    kept = elsewhere(path)
    if kept:
        kept.remove(path, folder=False)
    path.unlink(missing_ok=kept is not None)


def remove_folder(path: Path, missing_ok: bool = False) -> None:
    """Delete a folder with all that is in it."""
    kept = elsewhere(path)
    if kept:
        kept.remove(path, folder=True)
    shutil.rmtree(path, ignore_errors=missing_ok)


def read_file(path: Path, most: int = 1 << 30) -> bytes:
    """The content of a file. OSError also for what is none (a folder, device, pipe) and for more than ``most`` bytes."""
    fd = open_file(path)
    try:
        size = os.fstat(fd).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {most} that it can need", str(path))
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(size)
    finally:
        os.close(fd)


def refuse_bomb(size: int, n_bytes: int) -> None:
    """ValueError where ``size`` bytes of a file would become ``n_bytes`` of numbers, more than what is packed to save space."""
    if n_bytes > max(1 << 28, 200 * size):
        raise ValueError(f"{size:,} bytes would become {n_bytes:,}")


def open_file(path: Path) -> int:
    """A file opened for reading: its descriptor. OSError also for a device or a pipe, without waiting for it."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
    raise OSError(errno.EINVAL, f"it is {what}, not a file", str(path))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """A file's sha256 in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_name(name: str) -> bool:
    """Whether a name from a file may be used as a folder's name."""
    return re.fullmatch(r"[\w][\w.+=@ -]*", name) is not None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. It is flushed to disk and renamed to ``path`` at the end: readers see the old file or the new one.

    If the block raises, what was written is removed and ``path`` is as before. Raises OSError as writing does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two processes may write one table of runs
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """``content`` (text as UTF-8) as the whole of a file, in one step; see ``replacing``."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``; 0 if it is not there."""
    kept = elsewhere(folder)
    if kept:
        return kept.nbytes(folder)
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def exchange(one: Path, other: Path) -> None:
    """Two folders of one file system trade places in one step: no other program sees one of them missing.

    FeatureStoreError, with both as they were, where the file system cannot do that.
    """
    names = [os.fsencode(path) for path in (one, other)]
    if _exchange_in_kernel(*names):
        number = ctypes.get_errno()
        raise FeatureStoreError(
            f"{one} cannot be replaced in one step: {os.strerror(number)}. Its file system, or this system, cannot exchange two "
            "folders (ext4, XFS, Btrfs and APFS can). Nothing has changed; copy the store to such a disk and try again there."
        )


def _exchange_in_kernel(one: bytes, other: bytes) -> int:
    """Not 0 if it failed; then errno says why."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            return int(libc.renamex_np(one, other, ctypes.c_uint(2)))  # RENAME_SWAP of <stdio.h>
        here = ctypes.c_int(-100)  # AT_FDCWD of <fcntl.h>; 2 is RENAME_EXCHANGE of <linux/fs.h>
        return int(libc.renameat2(here, one, here, other, ctypes.c_uint(2)))
    except AttributeError:  # a C library that does not have the call
        ctypes.set_errno(errno.ENOSYS)
        return -1


class OpenFolder:
    """A folder as it was opened, to notice that another one has been put in its place since.

    It is held open, because the inode number of a folder that is removed may be given to the next one. What it is pickled for
    compares the number alone, while the object that was pickled holds it.
    """

    def __init__(self, path: Path, inode: int | None = None) -> None:
        self.path = Path(os.path.realpath(path))
        self._inode = inode
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if inode is None:
                raise FeatureStoreError(f"{path} cannot be opened: {error.strerror or error}.") from None
            return
        weakref.finalize(self, os.close, descriptor)
        self._inode = inode or os.fstat(descriptor).st_ino

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return OpenFolder, (self.path, self._inode)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """FeatureStoreError after the block, whatever it raised, if the folder is another one by then or is gone."""
        try:
            yield
        finally:
            try:
                now: int | None = self.path.stat().st_ino
            except OSError:
                now = None
            if now != self._inode:
                what = "removed" if now is None else "rewritten"
                raise FeatureStoreError(f"{self.path} was {what} since it was opened: open the store again.") from None
