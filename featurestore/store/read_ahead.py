"""Records that are not in memory, asked of the disk all at once before they are copied.

A memory map reads a page when it is touched and waits for it, so random rows come at a fraction of what the disk gives. Telling
the kernel first which pages will be needed (``madvise``) makes it read them side by side. That costs a few microseconds a
record, which a gather from memory would feel; so it is done only while records are *cold*: until 32 in a row that were looked
at, two of each batch, were in memory, and again as soon as a gather had to read from the disk.
"""

import errno
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from featurestore.store.mapped import PAGE, POPULATE_READ, WILLNEED, Region

AHEAD_BYTES = 32 << 20  # being read while records before them are copied
PREFETCH_BYTES = 256 << 20
_PIECE_BYTES = 512 << 10  # waited for at once
_ADVISED = 128 << 10  # bytes: what the kernel reads of one piece of advice is as little as its read-ahead
_PROBES = 2  # records of a batch that are looked at
_WARM = 32  # of them in a row that were in memory

_UNREADABLE = (errno.EFAULT, errno.EIO, getattr(errno, "EHWPOISON", errno.EIO))
_OF_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)


class Unreadable(OSError):
    """A record that touching would end the process: number ``which`` of those waited for."""

    def __init__(self, which: int) -> None:
        super().__init__(errno.EIO, "cannot be read")
        self.which = which


def major_faults() -> int:
    """Pages that this process has had to wait for the disk for, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class ReadAhead:
    """Asks for records of ``region``, given as first bytes and lengths (n,) int64.

    ``cold`` tells whether they have to be asked for; ``announced`` are the rows that were prefetched last.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._in_memory = 0  # records in a row that were looked at and were in memory
        self._can_wait = True
        self.announced: torch.Tensor | None = None

    @property
    def cold(self) -> bool:
        """Whether records were lately found not to be in memory, or it is not known yet."""
        return self._in_memory < _WARM

    @cold.setter
    def cold(self, value: bool) -> None:
        self._in_memory = 0 if value else _WARM

    def arriving(self, starts: np.ndarray, lengths: np.ndarray, probe: bool = True) -> Iterator[np.ndarray]:
        """The numbers of all records, some at a time, int64, in the order of the file, when those are in memory and mapped.

        The records after them, up to ``AHEAD_BYTES``, are being read meanwhile. ``probe`` whether some are in memory already.
        Raises Unreadable for one that the disk does not give.
        """
        order = np.argsort(starts, kind="stable")
        before = np.cumsum(lengths[order]) - lengths[order]  # bytes
        cuts = np.flatnonzero(np.diff(before // _PIECE_BYTES, prepend=-1))
        pieces, before = np.split(order, cuts)[1:], before[cuts]
        if probe:
            self.probe(starts)
        asked = 0
        for number, piece in enumerate(pieces):
            due = max(number + 1, int(np.searchsorted(before, before[number] + AHEAD_BYTES)))
            for each in pieces[asked:due]:
                self.ask(starts[each], lengths[each])
            asked = due
            self._wait(starts[piece], lengths[piece], piece)
            yield piece

    def start(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """``probe`` and ``ask`` in another thread: the kernel may make who asks wait while the disk's queue is full."""
        _asking().submit(self._start, starts, lengths)

    def _start(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.probe(starts)
        self.ask(starts, lengths)

    def probe(self, starts: np.ndarray) -> None:
        """Look at some records, whether they are in memory."""
        for start in starts[:: max(1, len(starts) // _PROBES)][:_PROBES].tolist():
            before = resource.getrusage(_OF_THREAD).ru_majflt
            self._region.touch(start)
            self._in_memory = 0 if resource.getrusage(_OF_THREAD).ru_majflt != before else self._in_memory + 1

    def ask(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Have the kernel read records, without waiting for them."""
        for start, length in _pages(starts, lengths):
            for first in range(start, start + length, _ADVISED):
                self._region.advise(first, min(_ADVISED, start + length - first), WILLNEED)

    def _wait(self, starts: np.ndarray, lengths: np.ndarray, numbers: np.ndarray) -> None:
        """Until records are in memory. Does nothing on other systems than Linux, where the copy waits."""
        if not self._can_wait:
            return
        for start, length in _pages(starts, lengths):
            error = self._region.advise(start, length, POPULATE_READ)
            self._can_wait = error != errno.EINVAL
            if error in _UNREADABLE:
                raise Unreadable(int(numbers[self._first_unreadable(starts, lengths)]))

    def _first_unreadable(self, starts: np.ndarray, lengths: np.ndarray) -> int:
        for which, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            first = start // PAGE * PAGE
            if self._region.advise(first, start + length - first, POPULATE_READ) in _UNREADABLE:
                return which
        return 0


@cache
def _asking() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="prefetch")


def _pages(starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pages of records as ranges in bytes, first and length, those that touch together, in the order of the file."""
    if not len(starts):
        return iter(())
    order = np.argsort(starts, kind="stable")
    first = starts[order] // PAGE * PAGE
    last = np.maximum.accumulate(-(-(starts + lengths)[order] // PAGE) * PAGE)
    begins = np.concatenate([[True], first[1:] > last[:-1]])
    ends = np.concatenate([begins[1:], [True]])
    return zip(first[begins].tolist(), (last[ends] - first[begins]).tolist(), strict=True)
