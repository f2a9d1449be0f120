"""Rows of a remote store: by byte ranges of its shards, or from shards that are fetched once and mapped."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from crc32c import crc32c

from featurestore.remote.cache import is_kept
from featurestore.remote.mirror import Mirror, mirror_of
from featurestore.store.checksums import NOT_ITS_OWN
from featurestore.store.mapped import Region
from featurestore.store.mirrored import open_remote_shard, shard_index, transfers
from featurestore.store.read_ahead import PREFETCH_BYTES
from featurestore.store.rows import Indices, Rows, as_index
from featurestore.store.shards import DamagedShard, read_index
from featurestore.store.zarr_format import Layer

_GAP = 64 << 10  # bytes between two records up to which one answer brings both: they come faster than another answer
_SHARDS = 16  # asked for ranges at once, each for up to ten


def open_rows(layer: Layer, find: Callable[[Any], np.ndarray] | None = None, verify: bool = False) -> Rows:
    """The rows of a layer: memory-mapped on a disk, by ranges or from the cache at a URL; see ``Rows``."""
    mirror = mirror_of(layer.folder)
    if mirror is None:
        return Rows(layer, find, verify)
    return (CachedRows if is_kept(mirror.shards) else RangedRows)(layer, find, verify)


class RangedRows(Rows):
    """Rows that are read by byte ranges, each compared with its checksum. ``prefetch`` fetches one batch ahead, in memory."""

    def __init__(self, layer: Layer, find: Callable[[Any], np.ndarray] | None = None, verify: bool = False) -> None:
        super().__init__(layer, find, verify=True)
        mirror = mirror_of(layer.folder)
        assert mirror is not None
        self._mirror: Mirror = mirror
        self._places: dict[
            int, tuple[np.ndarray, np.ndarray]
        ] = {}  # of a compressed shard's records: first bytes, lengths
        self._coming: tuple[torch.Tensor, Future[torch.Tensor]] | None = None

    def _mapped(self, noted: np.ndarray | None) -> tuple[Region, np.ndarray, np.ndarray]:
        """Nothing is mapped; a row that is noted is there."""
        assert noted is not None  # a remote store has format version 2
        return Region(0, 0), np.where(noted < 0, -1, 0), np.zeros(len(noted), np.int64)

    def gather(self, indices: Indices, out: torch.Tensor | None = None) -> torch.Tensor:
        """See ``Rows.gather``. FeatureStoreError also if the object store does not give them."""
        index = as_index(indices)
        n = index.shape[0]
        out = self._output(out, n)
        if bool(((index < 0) | (index >= len(self))).any()) or bool((self._positions[index] < 0).any()):
            self._refuse(index)
        flat, came = out.view(n, self._elements), 0
        if self._coming is not None and torch.equal(self._coming[0], index):
            (_, coming), self._coming = self._coming, None
            first = coming.result()
            came = len(first)
            flat[:came] = first
        self._fetch(index[came:].numpy(), flat[came:].numpy())
        return out

    def prefetch(self, indices: Indices) -> None:
        """Start fetching the rows that are gathered next, the first 256 MiB of them, one batch. See ``Rows.prefetch``."""
        index = as_index(indices)
        if bool(((index < 0) | (index >= len(self))).any()) or bool((self._positions[index] < 0).any()):
            return
        if self._coming is not None and not self._coming[1].done():
            return
        first = index[: max(1, PREFETCH_BYTES // self.layer.row_bytes)].numpy()

        def fetch() -> torch.Tensor:
            rows = torch.empty(len(first), self._elements, dtype=self.dtype)
            self._fetch(first, rows.numpy())
            return rows

        self._coming = index, _ahead().submit(fetch)

    def _fetch(self, index: np.ndarray, out: np.ndarray) -> None:
        """Rows (n) that are there into ``out`` (n, elements)."""
        rows, inverse = np.unique(index, return_inverse=True)
        first = np.full(len(rows), len(index))
        np.minimum.at(first, inverse, np.arange(len(index)))  # where each is written; others copy it from there
        shards = rows // self.layer.slots
        groups = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(shards)) + 1) if len(rows) else []

        def fetch(group: np.ndarray) -> None:
            self._fetch_of_shard(int(shards[group[0]]), rows[group], first[group], out)

        for _ in _side_by_side().map(fetch, groups):
            pass
        again = np.flatnonzero(first[inverse] != np.arange(len(index)))
        out[again] = out[first[inverse[again]]]

    def _fetch_of_shard(self, shard: int, rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        layer = self.layer
        starts, lengths = self._ranges_of(shard, rows - shard * layer.slots)
        key = self._mirror.key(layer.shard_path(shard))
        parts = self._mirror.objects.ranges(key, starts.tolist(), lengths.tolist(), _GAP)
        assert self._checksums is not None
        for row, place, part in zip(rows.tolist(), places.tolist(), parts, strict=True):
            if layer.compress == "none":
                if len(part) != layer.row_bytes or crc32c(part) != self._checksums[row]:
                    raise self._not_its_own(row)
                out[place] = np.frombuffer(part, layer.dtype)
            else:
                if layer.record.checksum(part) != self._checksums[row]:
                    raise self._not_its_own(row)
                out[place] = layer.record.decode(part)

    def _ranges_of(self, shard: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First bytes and lengths of what is read of each slot."""
        layer = self.layer
        if layer.compress == "none":  # where the format says that they are
            return slots * layer.record.stride, np.full(len(slots), layer.row_bytes)
        if shard not in self._places:
            index = shard_index(layer, shard)
            if index is None:
                raise self._not_its_own(shard * layer.slots + int(slots[0]))
            self._places[shard] = index.offsets, index.nbytes
        starts, lengths = (part[slots] for part in self._places[shard])
        if (starts < 0).any():
            raise self._not_its_own(shard * layer.slots + int(slots[int((starts < 0).argmax())]))
        return starts, lengths


class CachedRows(Rows):
    """Rows from shards that are fetched into the cache when a row of theirs is first asked for, and mapped there.

    Where the whole layer is within the cache's bound, its shards stay mapped. Otherwise they take turns.
    """

    def __init__(self, layer: Layer, find: Callable[[Any], np.ndarray] | None = None, verify: bool = False) -> None:
        mirror = mirror_of(layer.folder)
        assert mirror is not None
        self._most = mirror.shards.most
        self._shard_bytes: dict[int, int] = {}  # of those that are mapped, the last used last
        self._lock = threading.Lock()
        self._takes_turns = layer.n_shards * layer.record.largest_shard(layer.slots) > self._most
        super().__init__(layer, find, verify)
        # Only shards with rows are fetched; when all of them are mapped there is nothing to look for any more.
        self._due = set(np.unique(np.flatnonzero(self._there) // layer.slots).tolist())

    def _mapped(self, noted: np.ndarray | None) -> tuple[Region, np.ndarray, np.ndarray]:
        assert noted is not None  # a remote store has format version 2
        self._there = noted >= 0
        n_items = self.layer.n_items
        region = Region(self.layer.n_shards, self.layer.record.largest_shard(self.layer.slots))
        return region, np.full(n_items, -1, np.int64), np.full(n_items, -1, np.int64)

    @property
    def present(self) -> np.ndarray:
        """bool per item: whether its row has been cached in the store."""
        return self._there

    def gather(self, indices: Indices, out: torch.Tensor | None = None) -> torch.Tensor:
        """See ``Rows.gather``. FeatureStoreError also if the object store does not give a shard, or it does not fit the cache."""
        if not self._takes_turns:
            index = as_index(indices)
            if self._due:
                self._map(self._shards_of(index))
            return super().gather(index, out)
        index = as_index(indices)
        out = self._output(out, len(index))
        if bool(((index < 0) | (index >= len(self))).any()):
            self._refuse(index)
        for shard in torch.unique(index // self.layer.slots).tolist():
            which = torch.nonzero(index // self.layer.slots == shard).flatten()
            with self._lock:
                if bool(self._there[index[which].numpy()].any()):
                    self._map_one(shard, *self._open(shard))
                out[which] = super().gather(index[which])
        return out

    def prefetch(self, indices: Indices) -> None:
        """Start fetching the shards of the rows that are gathered next, or reading them. See ``Rows.prefetch``."""
        index = as_index(indices)
        if self._due or self._takes_turns:
            missing = [shard for shard in self._shards_of(index) if shard not in self._shard_bytes]
            for shard in missing[: max(1, self._most // 2 // self.layer.record.largest_shard(self.layer.slots))]:
                transfers().submit(self._keep, shard)
        else:
            super().prefetch(index)

    def _shards_of(self, index: torch.Tensor) -> list[int]:
        """Those that hold rows of ``index`` which are there."""
        inside = index[(index >= 0) & (index < len(self))].numpy()
        return [int(shard) for shard in np.unique(inside[self._there[inside]] // self.layer.slots)]

    def _map(self, shards: list[int]) -> None:
        missing = [shard for shard in shards if shard in self._due]
        for shard, opened in zip(missing, transfers().map(self._open, missing), strict=True):
            with self._lock:
                self._map_one(shard, *opened)
                self._due.discard(shard)

    def _keep(self, shard: int) -> None:
        os.close(self._open(shard)[0])

    def _open(self, shard: int) -> tuple[int, bool]:
        if shard in self._shard_bytes:
            return -1, True
        try:
            return open_remote_shard(self.layer, shard)
        except FileNotFoundError:
            raise self._not_its_own(shard * self.layer.slots) from None

    def _map_one(self, shard: int, fd: int, sound: bool) -> None:
        if fd < 0 or shard in self._shard_bytes:
            self._shard_bytes[shard] = self._shard_bytes.pop(shard)
            if fd >= 0:
                os.close(fd)
            return
        layer, rows = self.layer, self.layer.shard_rows(shard)
        try:
            index = read_index(fd, layer.slots, layer.record, layer.shard_path(shard))
            if not sound:
                raise DamagedShard(f"{layer.shard_path(shard)}: {NOT_ITS_OWN}, for some of its rows. {self._advice}")
            size = os.fstat(fd).st_size
            self._make_room(size)
            start = self._region.map(shard, fd, layer.shard_path(shard))
        finally:
            os.close(fd)
        self._shard_bytes[shard] = size
        offsets = index.offsets[: len(rows)]
        unit = layer.dtype.itemsize if self._view is not None else 1
        here = self._there[rows.start : rows.stop]
        self._lengths[rows.start : rows.stop] = index.nbytes[: len(rows)]
        self._positions[rows.start : rows.stop] = torch.from_numpy(np.where(here, (start + offsets) // unit, -1))

    def _make_room(self, size: int) -> None:
        """Let go of shards, the least recently used first, so that what is mapped is within the bound."""
        while self._shard_bytes and sum(self._shard_bytes.values()) + size > self._most:
            shard = next(iter(self._shard_bytes))
            rows = self.layer.shard_rows(shard)
            self._positions[rows.start : rows.stop] = -1
            self._region.unmap(shard)
            del self._shard_bytes[shard]


@cache
def _side_by_side() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_SHARDS, thread_name_prefix="ranges")


@cache
def _ahead() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="prefetch")
