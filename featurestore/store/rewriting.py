"""A source written anew: without some of its items, or with other keys.

The new folder is made where readers do not look, as the only source of a store ``<source>.partial`` inside the store, and takes
the old one's place in one step. A process killed before that step leaves the source as it was, after it as it is to be; the
next writer deletes what lies about. Rows are copied record by record, never computed or decoded.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, exchange, folder_bytes
from featurestore.keys import KEY
from featurestore.store.checksums import NOT_ITS_OWN, Checksums
from featurestore.store.mirrored import refuse_remote
from featurestore.store.reader import Source
from featurestore.store.rows import open_shard
from featurestore.store.shards import DamagedShard, ShardWriter, read_record
from featurestore.store.writer import SourceWriter, drop_leftovers, free_bytes, publish_root, refuse_old_version
from featurestore.store.zarr_format import METADATA, Layer
from featurestore.text import human_bytes

Key = tuple[str, str]
CountRows = Callable[[int], Any]  # called with the number of rows just copied


def remove_items(store: Path, name: str, rows: np.ndarray, progress: CountRows = lambda n: None) -> None:
    """Write a source without the items at ``rows`` (int), under ``store_lock``. Every row that stays is checked as it is copied.

    Memory is bounded by one row; the disk has to take the rows that stay a second time. Raises FeatureStoreError for a damaged
    record, too little disk, a file system that cannot exchange folders, and if no item would stay; nothing has changed then.
    """
    refuse_remote(store, "written anew")
    refuse_old_version(store)
    drop_leftovers(store)
    source = Source(store, name)
    stay = np.setdiff1d(np.arange(source.n_items), rows)
    if not len(stay):
        raise FeatureStoreError(
            f"that is every item of {source.folder}. Remove the whole source: pipelines/store_info.py {store} --remove {name}"
        )
    nbytes, free = folder_bytes(source.folder), free_bytes(store)
    if nbytes > free:
        raise FeatureStoreError(
            f"not enough disk for {store}: {name} is written anew without the items that are removed, up to "
            f"{human_bytes(nbytes)}, and {human_bytes(free)} are free. Make room, or move the store to a larger disk."
        )
    with _replacement(source) as writer:
        for layer in source.layers.values():
            _copy_rows(layer, writer, stay, progress)
        writer.append(source.items.reset_index().iloc[stay].reset_index(drop=True))


def rename_items(store: Path, name: str, renamed: Mapping[Key, tuple[str, str, str]]) -> None:
    """Give items of a source other keys and paths, under ``store_lock``: ``renamed`` maps (face, view) to (face, view, path).

    Shards are linked, or copied where the disk has no links. Raises FeatureStoreError as ``remove_items`` does, and for keys that
    would be there twice.
    """
    refuse_remote(store, "written anew")
    refuse_old_version(store)
    drop_leftovers(store)
    source = Source(store, name)
    rows = source.find(list(renamed))
    table = source.items.reset_index().astype(dict.fromkeys((*KEY, "path"), object))
    for column, values in zip((*KEY, "path"), zip(*renamed.values(), strict=True), strict=True):
        table.loc[rows, column] = np.array(values, object)
    twice = table[table.duplicated(list(KEY))]
    if len(twice):
        raise FeatureStoreError(
            f"{source.folder} already holds {tuple(twice.iloc[0][list(KEY)])}; nothing was renamed."
        )
    with _replacement(source) as writer:
        for layer in source.layers.values():
            for shard in range(layer.n_shards):
                if layer.shard_path(shard).exists():
                    _link(layer.shard_path(shard), writer.layers[layer.name].shard_path(shard))
            writer.note(layer.name, 0, Checksums(layer)[range(layer.n_items)])
        writer.append(table)


@contextmanager
def _replacement(source: Source) -> Iterator[SourceWriter]:
    """A writer of the same layers, without items. What it wrote takes the source's place at the end, but not after an error."""
    store, name = source.folder.parent, source.name
    making = store / (name + PARTIAL)
    try:
        writer = SourceWriter(making, name, source.attributes, source.foreign)
        for layer in source.layers.values():
            writer.add_layer(layer.name, layer.shape, layer.dtype.name, layer.compress, layer.slots)
        yield writer
        writer.publish()
        _copy_what_is_not_ours(source, writer.folder)
        exchange(writer.folder, source.folder)
    except OSError as error:
        raise FeatureStoreError(
            f"{store} cannot be written: {error.strerror or error}. {name} is as it was; free some space and try again."
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    publish_root(store)


def _copy_rows(layer: Layer, writer: SourceWriter, rows: np.ndarray, progress: CountRows) -> None:
    """Records of ``rows`` (int, increasing), closed up; absent ones stay absent."""
    noted = Checksums(layer)[range(layer.n_items)]
    with ExitStack() as reading:
        at, opened = -1, None
        for shard, start in enumerate(range(0, len(rows), layer.slots)):
            part = rows[start : start + layer.slots].tolist()
            new: ShardWriter | None = None
            try:
                for slot, row in enumerate(part):
                    if row // layer.slots != at:
                        reading.close()
                        at = row // layer.slots
                        opened = reading.enter_context(open_shard(layer, at))
                    if noted[row] >= 0:
                        if opened is None or not opened[1].present[row % layer.slots]:
                            raise DamagedShard("the row was cached and is gone")
                        record = read_record(*opened, row % layer.slots)
                        if layer.record.checksum(record) != noted[row]:
                            raise DamagedShard(NOT_ITS_OWN)
                        new = new or writer.open_shard(layer.name, shard, end=len(part))
                        new.write_record(slot, record)
                    progress(1)
                if new:
                    new.commit()
            except DamagedShard as error:
                raise DamagedShard(
                    f"layer {layer.name} of {layer.folder.parent}, row {row}: {error}. Nothing has changed. "
                    f"Repair it first: pipelines/verify_store.py {layer.store} --repair"
                ) from None
            finally:
                if new:
                    new.abandon()


def _link(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:  # a disk without links
        shutil.copyfile(path, to)


def _copy_what_is_not_ours(source: Source, folder: Path) -> None:
    """Arrays and files that other programs put beside the source's."""
    for path in source.folder.iterdir():
        if path.name == METADATA or path.name.endswith(PARTIAL) or (folder / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            shutil.copy2(path, folder / path.name, follow_symlinks=False)
