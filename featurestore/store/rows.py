"""Memory-mapped rows of one layer, gathered by index.

All shards of a layer are mapped side by side into one reserved range of addresses. A tensor laid over that range
with strides (1, 1) then has the row that begins at *any* element, so one ``torch.index_select`` gathers from any
number of shards at the speed of a bare memory map; nothing is read before it is asked for. Rows that are not in memory
are asked of the disk all at once (``read_ahead``) before they are copied.
"""

import mmap
import numbers
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from crc32c import crc32c

from featurestore.errors import FeatureStoreError
from featurestore.files import open_file
from featurestore.remote.mirror import mirror_of, requests
from featurestore.store.checksums import NOT_ITS_OWN, Checksums
from featurestore.store.mapped import PAGE, Region
from featurestore.store.mirrored import open_remote_shard, shard_index
from featurestore.store.read_ahead import PREFETCH_BYTES, ReadAhead, Unreadable, major_faults
from featurestore.store.shards import DamagedShard, ShardIndex, read_index, read_record, thread_pool
from featurestore.store.zarr_format import Layer

Indices = torch.Tensor | np.ndarray | list[int] | range


class Rows:
    """The rows of one layer: shape (len, *shape), of ``dtype``, in the order of the source's items.

    ``rows["s12", "3"]`` and ``rows[5]`` are one item's row, ``rows["s12"]`` and ``rows[2:5]`` several, as CPU tensors;
    ``numpy.asarray(rows)`` reads all of them. ``find`` gives the row numbers of keys, as ``Source.find`` does. A view of the
    files as they were when it was made: rows that a caching run adds later need a new ``Rows``.

    With ``verify`` every row that is gathered is compared with the checksum that the store holds of it, apart from the row: a
    record that was damaged, or stands in another one's place, raises DamagedShard. Without it only those of compressed layers
    are checked, and against their own checksum alone.
    """

    def __init__(self, layer: Layer, find: Callable[[Any], np.ndarray] | None = None, verify: bool = False) -> None:
        if verify and layer.version == 1:
            raise FeatureStoreError(
                f"{layer.store} has format version 1, which holds no checksums apart from the rows, so `verify` can compare them "
                f"with nothing. Upgrade it: pipelines/upgrade_store.py {layer.store}"
            )
        self.layer = layer
        self._find = find
        self.shape = (layer.n_items, *layer.shape)
        self.dtype: torch.dtype = getattr(torch, layer.dtype.name)
        self._row_shape, self._elements = layer.shape, layer.record.elements
        noted = noted_rows(layer)  # before the shards: what is noted is in them
        self._checksums = noted if verify else None
        self._region, positions, self._lengths = self._mapped(noted)
        if noted is not None:
            positions[noted < 0] = -1
        self._view: torch.Tensor | None = None
        if layer.compress == "none":
            if (positions[positions >= 0] % layer.dtype.itemsize).any():
                raise FeatureStoreError(f"{layer.folder} has records that are not aligned to their elements.")
            positions //= layer.dtype.itemsize  # -1 stays -1
            flat = self._region.tensor(self.dtype)
            last = max(flat.numel() - self._elements + 1, 0)
            self._view = flat.as_strided((last, self._elements), (1, 1))
        self._positions = torch.from_numpy(positions)
        self._ahead = ReadAhead(self._region)

    def _mapped(self, noted: np.ndarray | None) -> tuple[Region, np.ndarray, np.ndarray]:
        """The files' memory, and each row's byte position there (-1 if absent) and length."""
        return _map_shards(self.layer)

    def __len__(self) -> int:
        return self.layer.n_items

    def __getitem__(self, which: "int | slice | str | tuple[Any, Any] | Indices") -> torch.Tensor:
        """The row of a number or of a key (face, view); the rows of a slice, of a face, of an array of numbers.

        Errors are those of ``gather`` and ``Source.find``; numbers are not counted from the end.
        """
        if isinstance(which, str | tuple):
            if self._find is None:
                raise FeatureStoreError(
                    f"these rows know no keys: take them from a store, store.rows({self.layer.name!r})."
                )
            found = self.gather(self._find(which))
            return found if isinstance(which, str) else found[0]
        if isinstance(which, slice):
            return self.gather(range(*which.indices(len(self))))
        if isinstance(which, int | numbers.Integral):
            return self.gather([int(which)])[0]
        return self.gather(which)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, read into memory."""
        return self.gather(range(len(self))).numpy().astype(dtype or self.layer.dtype, copy=False)

    @property
    def present(self) -> np.ndarray:
        """bool per item: whether its row has been cached."""
        return self._positions.numpy() >= 0

    def gather(self, indices: Indices, out: torch.Tensor | None = None) -> torch.Tensor:
        """The rows at ``indices`` (any integers, repeats allowed), as a CPU tensor of shape (n, *layer shape).

        ``out`` is filled and returned if given: contiguous, of this dtype and exactly that shape. Reusing it is
        what makes small batches fast. Raises IndexError for an index outside 0 … len - 1, FeatureStoreError for a
        row that is not cached, DamagedShard for a compressed record that fails its checksum, or with ``verify`` any that does.
        """
        index = as_index(indices)
        n = index.shape[0]
        out = self._output(out, n)
        flat = out.view(n, self._elements)
        try:
            # Both selections check their bounds: the first refuses rows that do not exist, the second absent ones (-1).
            positions = torch.index_select(self._positions, 0, index)
            if self._ahead.cold:
                self._copy_cold(index, positions, flat)
            else:
                faults = major_faults()
                self._select(index, positions, flat)
                if major_faults() != faults:  # something was read from the disk, page by page
                    self._ahead.cold = True
            if self._checksums is not None and self._view is not None:
                self._compare(index, flat.numpy())
        except IndexError:
            self._refuse(index)
            raise
        return out

    def prefetch(self, indices: Indices) -> None:
        """Start reading the rows that are gathered next; returns at once, and does nothing while rows are found in memory.

        They are read into the page cache, the first ``PREFETCH_BYTES`` (256 MiB) of them, which takes none of this process's
        memory. Rows that do not exist or are not cached are left to ``gather`` to refuse.
        """
        if not self._ahead.cold:
            return
        index = as_index(indices)
        self._ahead.announced = index
        index = index[(index >= 0) & (index < len(self))][: max(1, PREFETCH_BYTES // self.layer.row_bytes)]
        positions = torch.index_select(self._positions, 0, index)
        there = positions >= 0
        self._ahead.start(*self._ranges(index[there], positions[there]))

    def _select(self, index: torch.Tensor, positions: torch.Tensor, flat: torch.Tensor) -> None:
        """Rows whose records are at ``positions`` into ``flat`` (n, elements)."""
        if self._view is None:
            self._decode(index, positions, flat.numpy())
        else:
            torch.index_select(self._view, 0, positions, out=flat)

    def _copy_cold(self, index: torch.Tensor, positions: torch.Tensor, flat: torch.Tensor) -> None:
        """The same for rows that are perhaps not in memory: they are copied while those after them are being read."""
        if bool((positions < 0).any()):
            raise IndexError("an absent row")
        announced, self._ahead.announced = self._ahead.announced, None
        starts, lengths = self._ranges(index, positions)
        probe = announced is None or not torch.equal(announced, index)
        try:
            for some in self._ahead.arriving(starts, lengths, probe):
                if self._view is not None and self.layer.row_bytes >= PAGE:
                    # One by one: they come slower than they are copied, and a selection would wait for all its threads.
                    for i in some.tolist():
                        self._region.copy(int(starts[i]), self.layer.row_bytes, flat[i])
                else:
                    part = torch.empty(len(some), self._elements, dtype=self.dtype)
                    self._select(index[some], positions[some], part)
                    flat[some] = part
        except Unreadable as error:
            raise self._unreadable(int(index[error.which])) from None

    def _ranges(self, index: torch.Tensor, positions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Where in the region the records begin, and how long they are, in bytes."""
        starts = positions.numpy() * (1 if self._view is None else self.layer.dtype.itemsize)
        lengths = self._lengths[index.numpy()] if self._view is None else np.full(len(starts), self.layer.row_bytes)
        return starts, lengths

    def _unreadable(self, row: int) -> DamagedShard:
        """What reading the file of a row says, of which the memory map only says that it cannot be read."""
        path = self.layer.shard_path(row // self.layer.slots)
        reason = "the file is shorter than it was when these rows were opened"
        try:
            stored_row(self.layer, row)
        except (OSError, DamagedShard) as error:
            reason = getattr(error, "strerror", None) or str(error)
        return DamagedShard(
            f"layer {self.layer.name!r}, row {row} cannot be read from {path}: {reason}. Check the disk, then repair the store: "
            f"pipelines/verify_store.py {self.layer.store} --repair"
        )

    def _output(self, out: torch.Tensor | None, n: int) -> torch.Tensor:
        """``out`` if rows fit it, or a new one; FeatureStoreError."""
        if out is None:
            return torch.empty((n, *self._row_shape), dtype=self.dtype)
        if out.shape != (n, *self._row_shape) or out.dtype != self.dtype or not out.is_cpu or not out.is_contiguous():
            self._refuse_output(out, n)
        return out

    def _refuse_output(self, out: torch.Tensor, n: int) -> None:
        kind = "contiguous" if out.is_contiguous() else "non-contiguous"
        raise FeatureStoreError(
            f"`out` is a {kind} {out.dtype} tensor of shape {tuple(out.shape)} on {out.device}; "
            f"these rows need contiguous {self.dtype} of shape {(n, *self._row_shape)} on cpu."
        )

    def _refuse(self, index: torch.Tensor) -> None:
        """Say which rows were asked for in vain."""
        outside = index[(index < 0) | (index >= len(self))]
        if len(outside):
            raise IndexError(
                f"row {int(outside[0])} is outside 0 … {len(self) - 1}; rows are never counted from the end"
            )
        rows = index[self._positions[index] < 0]
        layer = self.layer
        raise FeatureStoreError(
            f"layer {layer.name!r} has no row yet for {len(rows)} of the items asked for (row {int(rows[0])} is the "
            f"first; {int((~self.present).sum())} of {len(self)} are absent in all). "
            f"Finish it: pipelines/cache_layers.py --layers {layer.name}, with the images and store of the first run."
        )

    def _decode(self, rows: torch.Tensor, positions: torch.Tensor, out: np.ndarray) -> None:
        if bool((positions < 0).any()):
            raise IndexError("an absent row")
        content, decode = self._region.content(), self.layer.record.decode

        def put(i: int, row: int, start: int, length: int) -> None:
            record = content[start : start + length]
            out[i] = decode(record)
            if self._checksums is not None and self.layer.record.checksum(record) != self._checksums[row]:
                raise self._not_its_own(row)

        lengths = self._lengths[rows.numpy()].tolist()
        for _ in thread_pool().map(put, range(len(lengths)), rows.tolist(), positions.tolist(), lengths):
            pass

    def _compare(self, rows: torch.Tensor, values: np.ndarray) -> None:
        """DamagedShard if a row of ``values`` (n, elements) is not what was noted of the item."""
        assert self._checksums is not None
        found = thread_pool().map(crc32c, values.view(np.uint8))
        for row, due, checksum in zip(rows.tolist(), self._checksums[rows.numpy()].tolist(), found, strict=True):
            if checksum != due:
                raise self._not_its_own(row)

    def _not_its_own(self, row: int) -> DamagedShard:
        return DamagedShard(f"layer {self.layer.name!r}, row {row}: {NOT_ITS_OWN}. {self._advice}")

    @property
    def _advice(self) -> str:
        return (
            "If a caching run has written it anew since these rows were opened, open them again; otherwise repair it: "
            f"pipelines/verify_store.py {self.layer.store} --repair"
        )


def noted_rows(layer: Layer) -> np.ndarray | None:
    """int64 per item: the checksum that its record has to end in, -1 if no row is cached; None in format version 1."""
    return Checksums(layer)[range(layer.n_items)] if layer.version > 1 else None


def _map_shards(layer: Layer) -> tuple["Region", np.ndarray, np.ndarray]:
    """All shards mapped, and each row's byte position there (-1 if absent) and length."""
    positions, lengths = np.full((2, layer.n_items), -1, np.int64)
    region = Region(layer.n_shards, layer.record.largest_shard(layer.slots))
    for shard in range(layer.n_shards):
        with open_shard(layer, shard) as opened:
            if opened is None:
                continue
            fd, index = opened
            start = region.map(shard, fd, layer.shard_path(shard))
            rows = layer.shard_rows(shard)
            offsets = index.offsets[: len(rows)]
            positions[rows.start : rows.stop] = np.where(offsets < 0, -1, start + offsets)
            lengths[rows.start : rows.stop] = index.nbytes[: len(rows)]
    return region, positions, lengths


@contextmanager
def open_shard(layer: Layer, shard: int, anywhere: bool = False) -> Iterator[tuple[int, ShardIndex] | None]:
    """A shard's file and its index; None if it has not been written. DamagedShard if it cannot be read; see ``read_index``."""
    path = layer.shard_path(shard)
    try:
        fd = open_file(path) if mirror_of(path) is None else open_remote_shard(layer, shard)[0]
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise DamagedShard(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        yield fd, read_index(fd, layer.slots, layer.record, path, anywhere)
    finally:
        os.close(fd)


def read_shard(layer: Layer, shard: int, part: slice = slice(None)) -> np.ndarray:
    """Rows of one shard, or a ``part`` of them, (n, *shape), read-only; absent ones are NaN. Mapped where the file allows.

    DamagedShard for rows that were cached and are gone.
    """
    rows = layer.shard_rows(shard)
    slots = range(len(rows))[part]
    with open_shard(layer, shard) as opened:
        if opened is not None and opened[1].strided(layer.record, len(rows)):
            mapped = mmap.mmap(opened[0], 0, prot=mmap.PROT_READ)
            if hasattr(mmap, "MADV_SEQUENTIAL"):  # read far ahead, and free what was read before what others use
                mapped.madvise(mmap.MADV_SEQUENTIAL)
            inner = np.empty(layer.shape, layer.dtype).strides
            shape = (len(rows), *layer.shape)
            return np.ndarray(shape, layer.dtype, mapped, strides=(layer.record.stride, *inner))[part]
        present = opened[1].present[: len(rows)] if opened is not None else np.zeros(len(rows), bool)
        gone = ~present & (Checksums(layer)[rows] >= 0) if layer.version > 1 else np.zeros(len(rows), bool)
        if gone.any():
            raise DamagedShard(
                f"layer {layer.name!r} of {layer.folder.parent}: {int(gone.sum())} rows that were cached are gone, the first is "
                f"row {rows[int(gone.argmax())]}. Compute them again: pipelines/verify_store.py {layer.store} --repair"
            )
        values = np.full((len(slots), *layer.shape), np.nan, layer.dtype)
        if opened is not None:
            fd, index = opened
            for i, slot in enumerate(slots):
                if present[slot]:
                    values[i] = layer.record.decode(read_record(fd, index, slot)).reshape(layer.shape)
        return values


def stored_row(layer: Layer, row: int) -> np.ndarray | None:
    """One item's row, checksum verified, as a flat array; None if it is absent. Raises DamagedShard."""
    shard, slot = divmod(row, layer.slots)
    with open_shard(layer, shard) as opened:
        if opened is None or not opened[1].present[slot]:
            return None
        return layer.record.decode(read_record(*opened, slot))


def whole_records(layer: Layer, shard: int) -> Iterator[tuple[int, bytes]]:
    """Rows of a shard, by number, with their records that match their own checksums, wherever in the file they lie.

    Where the index is lost, uncompressed records are looked for in the places that they have to be in.
    """
    rows, record = layer.shard_rows(shard), layer.record
    with ExitStack() as reading:
        try:
            opened = reading.enter_context(open_shard(layer, shard, anywhere=True))
            if opened is None:
                return
            fd, index = opened
            places = [(int(index.offsets[slot]), int(index.nbytes[slot])) for slot in range(len(rows))]
        except DamagedShard:
            path = layer.shard_path(shard)
            if record.compress != "none" or not path.is_file():
                return
            fd = reading.enter_context(path.open("rb")).fileno()
            places = [(slot * record.stride, record.nbytes) for slot in range(len(rows))]
        for row, (offset, nbytes) in zip(rows, places, strict=True):
            content = os.pread(fd, nbytes, offset) if offset >= 0 else b""
            try:
                record.decode(content)
            except DamagedShard:
                continue
            yield row, content


def present_rows(layer: Layer) -> np.ndarray:
    """bool per item: whether its row is in the store, by the shards' indexes and what is noted of them; rows are not read."""
    present = np.zeros(layer.n_items, bool)
    for shard, index in enumerate(_indexes(layer)):
        rows = layer.shard_rows(shard)
        if index is not None:
            present[rows.start : rows.stop] = index.present[: len(rows)]
    noted = noted_rows(layer)
    return present if noted is None else present & (noted >= 0)


def stored_index(layer: Layer, shard: int) -> ShardIndex | None:
    """A shard's index alone; see ``open_shard``."""
    if mirror_of(layer.folder) is not None:
        return shard_index(layer, shard)
    with open_shard(layer, shard) as opened:
        return opened[1] if opened is not None else None


def _indexes(layer: Layer) -> Iterator[ShardIndex | None]:
    """Those of all shards; remote ones are asked for many at once."""
    each = requests().map if mirror_of(layer.folder) is not None else map
    yield from each(partial(stored_index, layer), range(layer.n_shards))


def as_index(indices: Indices) -> torch.Tensor:
    """int64, one-dimensional, on the CPU."""
    if isinstance(indices, torch.Tensor) and indices.dtype == torch.int64 and indices.ndim == 1:
        return indices if indices.is_cpu else indices.cpu()
    index = indices.detach().cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
    if index.size == 0:
        return torch.empty(0, dtype=torch.int64)
    if index.dtype.kind not in "iu" or index.ndim != 1:
        raise FeatureStoreError(
            f"rows are gathered by a one-dimensional array of integers, not {index.dtype} of shape {index.shape}. "
            "For a mask use numpy.flatnonzero(mask); for keys use source.find(keys)."
        )
    return torch.from_numpy(index.astype(np.int64))
