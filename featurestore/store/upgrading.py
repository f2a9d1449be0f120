"""A store of format version 1 made one of version 2, in its place: records are moved, and none is computed.

Shards are written anew one by one, then checksums and coordinates, and then the source's document, which is what readers go by;
until then it describes them as they are now too, because version 1 lets records lie anywhere in a shard. A process killed in
between leaves a store of version 1 that is read as before; run again, it goes on with the shards that are left.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.errors import FeatureStoreError
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rows import open_shard, whole_records
from featurestore.store.shards import DamagedShard, ShardWriter
from featurestore.store.writer import SourceWriter, publish_root
from featurestore.store.zarr_format import Layer

CountRows = Callable[[int], Any]  # called with the number of rows just done


def rows_to_upgrade(store: FeatureStore) -> int:
    """Rows of the layers of all sources that have format version 1."""
    return sum(source.n_items * len(source.layers) for source in store.sources.values() if source.version == 1)


def upgrade_store(store: FeatureStore, progress: CountRows = lambda n: None) -> list[str]:
    """Bring every source to format version 2, under ``store_lock``. Needs room for one shard more.

    That a row is its item's is believed: version 1 says nothing of it. Returns what was damaged, in words: those rows count as
    not cached from then on. FeatureStoreError if the disk takes no more; run again, it goes on where it was.
    """
    lost: list[str] = []
    try:
        for source in store.sources.values():
            if source.version == 1:
                lost += _upgrade_source(store.path, source, progress)
        publish_root(store.path)
    except OSError as error:
        raise FeatureStoreError(
            f"{store.path} cannot be written: {error.strerror or error}. It can be read as before; free some space and run the "
            "same command again, which goes on where it was."
        ) from error
    return lost


def _upgrade_source(store: Path, source: Source, progress: CountRows) -> Iterator[str]:
    writer = SourceWriter(store, source.name, {}, upgraded=True)
    for layer in source.layers.values():
        for path in (layer.folder / "c").glob("*"):
            if path.name.isdecimal() and int(path.name) >= layer.n_shards:
                shutil.rmtree(path)  # of items that were never registered
        for shard in range(layer.n_shards):
            rows = layer.shard_rows(shard)
            problem, gone = _upgrade_shard(layer, shard, writer)
            if len(gone):
                first = source.keys[rows.start + int(gone[0])]
                yield f"layer {layer.name}, {len(gone)} items from {first} on: {problem}"
            progress(len(rows))
    writer.publish()


def _upgrade_shard(layer: Layer, shard: int, writer: SourceWriter) -> tuple[str, np.ndarray]:
    """What was wrong with it, and the slots (int) whose rows are lost."""
    rows, new = layer.shard_rows(shard), writer.layers[layer.name]
    try:
        with open_shard(layer, shard) as opened:
            if opened is None:
                return "", np.empty(0, int)
            index, problem = opened[1], "a record does not match its checksum"
            due = index.present[: len(rows)].copy()
            extra = bool(index.present[len(rows) :].any())  # of items that were never registered
    except DamagedShard as error:
        problem, due, extra = str(error), np.ones(len(rows), bool), True
    checksums = np.full(len(rows), -1, np.int64)
    placed: ShardWriter | None = None
    if extra or not _is_placed(new, shard):
        placed = writer.open_shard(layer.name, shard, end=len(rows))
    for row, record in whole_records(layer, shard):
        checksums[row - rows.start] = layer.record.checksum(record)
        if placed:
            placed.write_record(row - rows.start, record)
    gone = np.flatnonzero(due & (checksums < 0))
    if placed:
        placed.commit()
    elif len(gone):  # not a record's bytes are kept that no checksum is noted of
        writer.open_shard(layer.name, shard, keep=np.flatnonzero(checksums >= 0).tolist()).commit()
    writer.note(layer.name, rows.start, checksums)
    return problem, gone


def _is_placed(layer: Layer, shard: int) -> bool:
    """Whether a shard's records lie where version 2 has them."""
    try:
        with open_shard(layer, shard):
            return True
    except DamagedShard:
        return False
