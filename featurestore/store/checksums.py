"""Which row stands where: a layer's checksum of every item, kept apart from its records.

A record's own checksum says that its bytes are whole, not that they are this item's. An array beside the layer holds, for each
item, the checksum that its record has to end in, and -1 for a row that is not there: a row counts as cached once it is noted
here. Rows are noted after their shard is in its place, and forgotten before they are written anew.
"""

from pathlib import Path
from typing import Any

import numpy as np

from featurestore.files import read_file
from featurestore.store.coordinates import (
    COORDINATE_CHUNK,
    COPY,
    coordinate_chunk,
    coordinate_metadata,
    decode_coordinate,
    write_chunk,
)
from featurestore.store.shards import DamagedShard
from featurestore.store.zarr_format import CHECKSUMS, Layer

_KIND = "checksum"
_KEPT = 2  # chunks that stay in memory although they are on disk
NOT_ITS_OWN = "the record is damaged, or another one's: it does not have the checksum that is noted of this item"


def checksum_metadata(n_items: int) -> dict[str, Any]:
    """The Zarr document of the array that holds a layer's checksums."""
    return coordinate_metadata(_KIND, n_items)


class Checksums:
    """The checksums of one layer's rows, read chunk by chunk as they are asked for; ``save`` writes what ``note`` changed."""

    def __init__(self, layer: Layer) -> None:
        self.folder = layer.folder.parent / CHECKSUMS / layer.name
        self._registered = layer.n_items  # what a killed writer noted of items after these is of no item
        self._chunks: dict[int, np.ndarray] = {}
        self._changed: set[int] = set()

    def chunk_file(self, chunk: int) -> Path:
        """The file of one chunk."""
        return coordinate_chunk(self.folder, checksum_metadata(0), chunk)

    def __getitem__(self, items: range | slice) -> np.ndarray:
        """Of consecutive items: int64, -1 where there is no row. DamagedShard if a chunk is damaged or missing."""
        start, stop = items.start, max(items.start, items.stop)
        parts = [np.empty(0, np.int64)]
        for chunk in range(start // COORDINATE_CHUNK, -(-stop // COORDINATE_CHUNK)):
            first = chunk * COORDINATE_CHUNK
            parts.append(self._chunk(chunk)[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def note(self, start: int, checksums: np.ndarray) -> None:
        """Put other values in the place of those of the items from ``start`` on."""
        position = 0
        while position < len(checksums):
            chunk, at = divmod(start + position, COORDINATE_CHUNK)
            part = checksums[position : position + COORDINATE_CHUNK - at]
            values = self._chunk(chunk)
            if not np.array_equal(values[at : at + len(part)], part):
                values[at : at + len(part)] = part
                self._changed.add(chunk)
            position += len(part)

    def forget(self, items: np.ndarray) -> bool:
        """None of these (int) is noted any more; whether any was."""
        any_was = False
        for chunk in np.unique(items // COORDINATE_CHUNK).tolist():
            values, at = self._chunk(chunk), items[items // COORDINATE_CHUNK == chunk] % COORDINATE_CHUNK
            if (values[at] >= 0).any():
                values[at] = -1
                self._changed.add(chunk)
                any_was = True
        return any_was

    def save(self) -> None:
        """Write the chunks that have changed."""
        for chunk in sorted(self._changed):
            write_chunk(self.chunk_file(chunk), self._chunks[chunk], _KIND)
        self._changed.clear()

    def _chunk(self, chunk: int) -> np.ndarray:
        if chunk not in self._chunks:
            path = self.chunk_file(chunk)
            try:
                values = decode_coordinate(read_file(path), _KIND, COORDINATE_CHUNK).copy()
            except FileNotFoundError:
                if path.with_name(path.name + COPY).exists():
                    raise self._damaged(path, "it is missing") from None
                values = np.full(COORDINATE_CHUNK, -1, np.int64)  # no row of these items has been noted yet
            except (OSError, RuntimeError, ValueError) as error:
                raise self._damaged(path, getattr(error, "strerror", None) or error) from None
            values[max(0, self._registered - chunk * COORDINATE_CHUNK) :] = -1
            for old in [each for each in self._chunks if each not in self._changed][:-_KEPT]:
                del self._chunks[old]
            self._chunks[chunk] = values
        return self._chunks[chunk]

    def _damaged(self, path: Path, reason: object) -> DamagedShard:
        store = self.folder.parent.parent.parent
        return DamagedShard(
            f"{path} cannot be read: {reason}. Its copy takes its place: pipelines/verify_store.py {store} --repair"
        )
