"""Files mapped into memory side by side, and advice to the kernel about ranges of them."""

import ctypes
import errno
import mmap
import os
import weakref

import torch

from featurestore.errors import FeatureStoreError
from featurestore.store.shards import DamagedShard

PAGE = mmap.PAGESIZE
WILLNEED = 3  # the same on Linux and macOS: start reading, do not wait
RANDOM = 1
POPULATE_READ = 22  # Linux 5.14: read and map; an error where touching the pages would end the process

_MAP_FIXED = 0x10  # not in Python's mmap module; the same on Linux and macOS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Region:
    """One reserved range of addresses with a place of ``capacity`` bytes for each of ``n`` files, mapped read-only.

    Reserving takes no memory, and files can be closed once they are mapped: a million items need no more
    open files than ten. The kernel is told that reading is at random: a page that is touched brings no others with it,
    and pages that were read only through here are the first to go when memory is short.
    """

    def __init__(self, n: int, capacity: int) -> None:
        self._capacity = -(-capacity // PAGE) * PAGE
        self._nbytes = n * self._capacity
        if self._nbytes:
            self._base = _mmap(None, self._nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            self._finalizer = weakref.finalize(self, _libc.munmap, self._base, self._nbytes)

    def map(self, place: int, fd: int, name: object) -> int:
        """Map an open file into its place; returns the place's first byte.

        Raises DamagedShard if the file is too large, FeatureStoreError if its file system cannot map files.
        """
        size, start = os.fstat(fd).st_size, place * self._capacity
        if size > self._capacity:
            raise DamagedShard(f"{name} has {size} bytes, more than its records can take ({self._capacity})")
        try:
            _mmap(self._base + start, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, fd)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EACCES):
                raise
            raise FeatureStoreError(
                f"{name} cannot be mapped into memory: {os.strerror(error.errno)}. Rows are read through memory maps, which its "
                "file system does not have; copy the store to a local disk."
            ) from None
        _libc.madvise(self._base + start, size, RANDOM)
        return start

    def unmap(self, place: int) -> None:
        """Let go of the file in a place; nobody may read there meanwhile or afterwards."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _mmap(self._base + place * self._capacity, self._capacity, 0, flags, -1)

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole range as a flat tensor. Only for reading, only inside the files, only while this object lives."""
        if not self._nbytes:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer((ctypes.c_uint8 * self._nbytes).from_address(self._base), dtype=dtype)

    def content(self) -> memoryview:
        """The whole range as bytes, under the same conditions."""
        return (
            memoryview((ctypes.c_uint8 * self._nbytes).from_address(self._base)).cast("B")
            if self._nbytes
            else memoryview(b"")
        )

    def copy(self, start: int, length: int, into: torch.Tensor) -> None:
        """Bytes of the range into a contiguous tensor of that length."""
        ctypes.memmove(into.data_ptr(), self._base + start, length)

    def touch(self, start: int) -> None:
        """Wait until the page of a byte is in memory."""
        page = start // PAGE * PAGE
        if self.advise(page, PAGE, POPULATE_READ) == errno.EINVAL:  # a kernel without it
            ctypes.c_uint8.from_address(self._base + page).value  # noqa: B018 (reads it)

    def advise(self, start: int, length: int, advice: int) -> int:
        """``madvise`` of pages, from one byte on; 0, or the number of the error."""
        return 0 if _libc.madvise(self._base + start, length, advice) == 0 else ctypes.get_errno()


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    found: int = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {nbytes} bytes: {os.strerror(number)}")
    return found
