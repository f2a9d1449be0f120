"""The bytes of one shard: equal records, each with its crc32c, then an index.

A shard is a standard Zarr v3 ``sharding_indexed`` chunk whose inner chunk is one item:

    record of slot 0 | crc32c u32 | record of slot 1 | crc32c u32 | … | (offset u64, nbytes u64) per slot | crc32c u32

Without compression every record has the same length and slot ``i`` begins at ``i * stride``, the length rounded up to 64 bytes
(in format version 1 not rounded), so that the file can be memory-mapped as a strided array of aligned rows; the bytes between
are zero. Compressed records follow each other without gaps. A slot without a record has ``(2**64 - 1, 2**64 - 1)`` in the index.
"""

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from crc32c import crc32c
from numcodecs import Blosc, Zstd, blosc

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, put_in_place

Compress = Literal["none", "zstd", "blosc"]
COMPRESS: tuple[Compress, ...] = ("none", "zstd", "blosc")
CRC_BYTES = 4
ALIGNMENT = 64  # bytes: a cache line, and the widest register

KEPT = -2  # in the place of the checksum of a record that was carried over

_ABSENT = np.uint64(2**64 - 1)
_BUFFERS_PER_WRITE = 512  # under IOV_MAX, which is 1024 on Linux and macOS
_ROWS_PER_WRITE = 32

# Blosc's own thread pool is not safe to share between our threads.
blosc.use_threads = False


class DamagedShard(FeatureStoreError):
    """A shard file whose bytes contradict their checksum or themselves."""


@cache
def thread_pool() -> ThreadPoolExecutor:
    """Threads for encoding, decoding and checksums, which release the GIL; made at first use."""
    return ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="records")


@dataclass(frozen=True)
class RecordFormat:
    """How one item's row becomes a record: element type, length in elements, compression; where records begin.

    Uncompressed ones begin at multiples of ``alignment`` bytes, which is 1 in format version 1.
    """

    dtype: np.dtype
    elements: int
    compress: Compress
    alignment: int = ALIGNMENT

    @property
    def row_bytes(self) -> int:
        """Bytes of a decoded row."""
        return self.elements * self.dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes from one uncompressed record to the next."""
        return -(-self.nbytes // self.alignment) * self.alignment

    @property
    def nbytes(self) -> int:
        """Bytes of an uncompressed record, checksum included."""
        return self.row_bytes + CRC_BYTES

    def largest_shard(self, slots: int) -> int:
        """Upper bound on a shard file's bytes. Zstd and Blosc may lengthen what they cannot compress, by under 1 %."""
        return slots * (self.stride + (0 if self.compress == "none" else self.row_bytes // 100 + 1024)) + index_bytes(
            slots
        )

    def zarr_codecs(self) -> list[dict[str, Any]]:
        """The inner codec chain, as Zarr metadata."""
        settings: dict[Compress, dict[str, Any]] = {
            "zstd": {"level": 3, "checksum": False},
            "blosc": {
                "typesize": self.dtype.itemsize,
                "cname": "lz4",
                "clevel": 5,
                "shuffle": "shuffle",
                "blocksize": 0,
            },
        }
        chain: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.compress != "none":
            chain.append({"name": self.compress, "configuration": settings[self.compress]})
        return [*chain, {"name": "crc32c"}]

    def encode(self, row: np.ndarray) -> bytes:
        """A compressed record, checksum included."""
        payload = _compressor(self.compress, self.dtype.itemsize).encode(row)
        return bytes(payload + crc32c(payload).to_bytes(CRC_BYTES, "little"))

    def decode(self, record: bytes | memoryview) -> np.ndarray:
        """A record's row, as a flat array. Raises DamagedShard if its checksum or length is wrong."""
        payload = memoryview(record)[:-CRC_BYTES]
        if len(record) < CRC_BYTES or crc32c(payload) != self.checksum(record):
            raise DamagedShard("a record does not match its checksum")
        if self.compress != "none":
            try:
                payload = memoryview(_compressor(self.compress, self.dtype.itemsize).decode(bytes(payload)))
            except (RuntimeError, ValueError) as error:
                raise DamagedShard(f"a record cannot be decompressed: {error}") from None
        if payload.nbytes != self.row_bytes:
            raise DamagedShard(f"a record holds {payload.nbytes} bytes, not {self.row_bytes}")
        return np.frombuffer(payload, self.dtype)

    def checksum(self, record: bytes | memoryview) -> int:
        """The crc32c that a record ends in."""
        return int.from_bytes(record[-CRC_BYTES:], "little")


def _compressor(compress: Compress, itemsize: int) -> Zstd | Blosc:
    if compress == "zstd":
        return Zstd(level=3)
    return Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE, typesize=itemsize)


@dataclass(frozen=True)
class ShardIndex:
    """Where each slot's record lies in its file: int64 byte offsets (-1 where absent) and lengths (checksum included)."""

    offsets: np.ndarray
    nbytes: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """bool per slot: whether there is a record."""
        return self.offsets >= 0

    def strided(self, record: RecordFormat, count: int) -> bool:
        """Whether the first ``count`` slots are all there, uncompressed, one stride apart from the file's start."""
        return record.compress == "none" and np.array_equal(self.offsets[:count], np.arange(count) * record.stride)


def index_bytes(slots: int) -> int:
    """Length of a shard's index, checksum included."""
    return 16 * slots + CRC_BYTES


def read_index(fd: int, slots: int, record: RecordFormat, name: object, anywhere: bool = False) -> ShardIndex:
    """The index of an open shard. Raises DamagedShard if it points outside the file, or to other places than records have.

    With ``anywhere`` records may lie as another program would put them.
    """
    size, length = os.fstat(fd).st_size, index_bytes(slots)
    return parse_index(os.pread(fd, length, max(0, size - length)), size, slots, record, name, anywhere)


def parse_index(
    raw: bytes, size: int, slots: int, record: RecordFormat, name: object, anywhere: bool = False
) -> ShardIndex:
    """The same of a shard of ``size`` bytes that ends in ``raw``."""
    length = index_bytes(slots)
    if len(raw) < length:
        raise DamagedShard(f"{name} has {size} bytes, fewer than its index of {length}")
    if record.compress == "none" and record.alignment > 1:
        whole, index = _index_of_whole(slots, record)
        if raw == whole and size == slots * record.stride + length:
            return index
    if crc32c(raw[:-CRC_BYTES]) != int.from_bytes(raw[-CRC_BYTES:], "little"):
        raise DamagedShard(f"{name}: the index does not match its checksum")
    pairs = np.frombuffer(raw[:-CRC_BYTES], "<u8").reshape(slots, 2)
    absent = (pairs == _ABSENT).all(axis=1)
    offsets, nbytes = np.where(absent[:, None], 0, pairs).T
    inside = (offsets <= size) & (nbytes <= size) & (offsets + nbytes <= np.uint64(size - length))
    plain = record.compress != "none" or (nbytes[~absent] == record.nbytes).all()
    if not inside.all() or not plain:
        raise DamagedShard(f"{name}: the index points outside the file or at records of another length")
    index = ShardIndex(np.where(absent, -1, offsets.astype(np.int64)), nbytes.astype(np.int64))
    problem = "" if anywhere else _misplaced(index, record, size - length)
    if problem:
        raise DamagedShard(f"{name}: {problem}; bytes were lost or put in, or another program wrote it")
    return index


@cache
def _index_of_whole(slots: int, record: RecordFormat) -> tuple[bytes, ShardIndex]:
    """What the index of a shard in which no row is absent has to be: comparing with it is faster than reading it."""
    offsets, nbytes = np.arange(slots) * record.stride, np.full(slots, record.nbytes)
    raw = np.stack([offsets, nbytes], axis=1).astype("<u8").tobytes()
    for values in (offsets, nbytes):
        values.setflags(write=False)
    return raw + crc32c(raw).to_bytes(CRC_BYTES, "little"), ShardIndex(offsets, nbytes)


def _misplaced(index: ShardIndex, record: RecordFormat, end: int) -> str:
    """What is wrong with the places of a shard's records, whose index begins at byte ``end``; empty if nothing is."""
    slots = np.flatnonzero(index.present)
    offsets, nbytes = index.offsets[slots], index.nbytes[slots]
    if record.alignment == 1:  # in version 1 records may lie anywhere, as those of a shard that was upgraded do
        due, last = offsets, int((offsets + nbytes).max(initial=0))
        last += -last % ALIGNMENT if last != end else 0
    elif record.compress == "none":
        due, last = slots * record.stride, (int(slots[-1]) + 1) * record.stride if len(slots) else 0
    else:
        due, last = np.cumsum(nbytes) - nbytes, int(nbytes.sum())
    if not np.array_equal(offsets, due):
        return f"{int((offsets != due).sum())} records do not begin where they have to"
    return "" if last == end else f"the records end at byte {last}, the index begins at {end}"


class ShardWriter:
    """Writes one shard to a temporary name, slot by slot in order, and renames it when it is whole.

    ``keep`` are slots of the present file to carry over byte for byte unless they are rewritten, so that a run
    which ends early loses no row; ``end`` is one past the last slot that will be written, for preallocation.
    A full disk is met here, before anything is computed into the file. ``noting`` is entered, with each slot's checksum, while
    the shard is put in its place: int64 (slots,), -1 where there is no record, KEPT where one was carried over. ``attempt`` is
    part of the temporary name where several processes may write one shard.
    """

    def __init__(
        self,
        path: Path,
        record: RecordFormat,
        slots: int,
        *,
        keep: Sequence[int] = (),
        end: int = 0,
        attempt: str = "",
        noting: Callable[[np.ndarray], AbstractContextManager[object]] = lambda checksums: nullcontext(),
    ) -> None:
        self.path = path
        self.record = record
        self.slots = slots
        self._noting = noting
        self._checksums = np.full(slots, -1, np.int64)
        self._pairs = np.full((slots, 2), _ABSENT, "<u8")
        self._position = 0
        self._kept = sorted(keep)
        self._old: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = path.with_name(path.name + (f".{attempt}" if attempt else "") + PARTIAL)
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            if self._kept:
                self._old = os.open(path, os.O_RDONLY)
                self._old_index = read_index(self._old, slots, record, path)
            if record.compress == "none":
                last = max([end, *(slot + 1 for slot in self._kept[-1:])])
                _allocate(self._fd, last * record.stride + index_bytes(slots))
        except BaseException:
            self.abandon()
            raise

    def write(self, slots: Sequence[int], rows: np.ndarray) -> None:
        """Rows (n, elements), C-contiguous and of the stored dtype, for increasing ``slots``."""
        start = 0
        while start < len(slots):
            self._carry_over(before=slots[start])
            if self._kept and self._kept[0] == slots[start]:
                self._kept.pop(0)
            stop = start + 1
            following = self._kept[0] if self._kept else self.slots
            while stop < len(slots) and slots[stop] < following:
                stop += 1
            self._write_run(slots[start:stop], rows[start:stop])
            start = stop

    def write_record(self, slot: int, record: bytes) -> None:
        """A record as it is stored, checksum included, for a ``slot`` above all that were written. Raises DamagedShard."""
        if len(record) < CRC_BYTES or crc32c(memoryview(record)[:-CRC_BYTES]) != self.record.checksum(record):
            raise DamagedShard("a record does not match its checksum")
        self._copy(slot, record)

    def commit(self) -> None:
        """``finish``, and put the shard in its place in one step."""
        with self._noting(self.finish()):
            put_in_place(self.partial, self.path)

    def finish(self) -> np.ndarray:
        """Write the index and flush to disk, under the temporary name still. Returns each slot's checksum, as for ``noting``."""
        self._carry_over(before=self.slots)
        self._seek(self._position)
        index = self._pairs.tobytes()
        _write_all(self._fd, [index + crc32c(index).to_bytes(CRC_BYTES, "little")])
        end = self._position + index_bytes(self.slots)
        if end < os.fstat(self._fd).st_size:  # fewer rows came than space was reserved for
            os.ftruncate(self._fd, end)
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        self._close()
        return self._checksums

    def abandon(self) -> None:
        """Drop what was written; the present file, if there is one, stays as it is."""
        self._close()
        self.partial.unlink(missing_ok=True)

    def _close(self) -> None:
        for fd in (self._fd, self._old):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._old = -1, None

    def _write_run(self, slots: Sequence[int], rows: np.ndarray) -> None:
        if self.record.compress != "none":
            for slot, encoded in zip(slots, thread_pool().map(self.record.encode, rows), strict=True):
                self._note(slot, len(encoded), self.record.checksum(encoded))
                _write_all(self._fd, [encoded])
            return
        content = np.ascontiguousarray(rows).data.cast("B")
        length = self.record.row_bytes
        groups = [
            range(first, min(first + _ROWS_PER_WRITE, len(slots))) for first in range(0, len(slots), _ROWS_PER_WRITE)
        ]

        def checksums(group: range) -> list[int]:
            return [crc32c(content[i * length : (i + 1) * length]) for i in group]

        # One thread sums ahead while this one hands bytes to the kernel: both are as fast as memory.
        for group, sums in zip(groups, thread_pool().map(checksums, groups), strict=True):
            buffers: list[bytes | memoryview] = []
            for i, checksum in zip(group, sums, strict=True):
                self._place(slots[i], buffers)
                tail = checksum.to_bytes(CRC_BYTES, "little").ljust(self.record.stride - length, b"\0")
                buffers += [content[i * length : (i + 1) * length], tail]
                self._note(slots[i], self.record.nbytes, checksum)
            _write_all(self._fd, buffers)

    def _place(self, slot: int, buffers: list[bytes | memoryview]) -> None:
        """Uncompressed records lie at their slot's own offset, so a slot left out leaves a gap, not a shift."""
        offset = slot * self.record.stride
        if offset != self._position:
            _write_all(self._fd, buffers)
            buffers.clear()
            self._seek(offset)

    def _seek(self, offset: int) -> None:
        os.lseek(self._fd, offset, os.SEEK_SET)
        self._position = offset

    def _note(self, slot: int, nbytes: int, checksum: int) -> None:
        self._pairs[slot] = self._position, nbytes
        self._checksums[slot] = checksum
        self._position += nbytes if self.record.compress != "none" else self.record.stride

    def _carry_over(self, before: int) -> None:
        while self._kept and self._kept[0] < before:
            slot = self._kept.pop(0)
            assert self._old is not None
            self._copy(slot, read_record(self._old, self._old_index, slot))
            self._checksums[slot] = KEPT

    def _copy(self, slot: int, record: bytes) -> None:
        if self.record.compress == "none":
            self._place(slot, [])
            record = record.ljust(self.record.stride, b"\0")
        nbytes = len(record) if self.record.compress != "none" else self.record.nbytes
        self._note(slot, nbytes, self.record.checksum(record[:nbytes]))
        _write_all(self._fd, [record])


def _allocate(fd: int, nbytes: int) -> None:
    """Reserve disk space now; also keeps ext4 from flushing delayed blocks at every rename."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot reserve
                raise


def _write_all(fd: int, buffers: list[bytes | memoryview]) -> None:
    """``writev`` until everything is written: the kernel may take less than it is given."""
    views = [memoryview(buffer) for buffer in buffers]
    while views:
        written = os.writev(fd, views[:_BUFFERS_PER_WRITE])
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


def read_record(fd: int, index: ShardIndex, slot: int) -> bytes:
    """A slot's record of an open shard, checksum included; see ``RecordFormat.decode``."""
    return os.pread(fd, int(index.nbytes[slot]), int(index.offsets[slot]))
