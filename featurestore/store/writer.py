"""The one writer of a store: its lock, its source's metadata, its shards.

Order makes it safe. Shards are written first, then the checksums of their rows and coordinate chunks, each by rename; the
source's document is renamed last and is what readers go by. A process killed in between leaves files that nothing refers to,
and ``SourceWriter`` drops them before it writes anything else. A row is forgotten in the checksums before it is written anew.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from crc32c import crc32c

from featurestore.errors import FeatureStoreError
from featurestore.files import (
    PARTIAL,
    OpenFolder,
    put_in_place,
    read_file,
    remove_file,
    remove_folder,
    write_atomically,
)
from featurestore.keys import KEY
from featurestore.remote.mirror import local_store
from featurestore.store.checksums import Checksums, checksum_metadata
from featurestore.store.coordinates import (
    COORDINATE_CHUNK,
    chunk_names,
    coordinate_chunk,
    coordinate_content,
    coordinate_kind,
    coordinate_metadata,
    write_chunk,
)
from featurestore.store.mirrored import fetch_to_complete
from featurestore.store.reader import Source
from featurestore.store.rows import stored_index
from featurestore.store.shards import KEPT, DamagedShard, ShardWriter
from featurestore.store.zarr_format import (
    CHECKSUMS,
    FORMAT_VERSION,
    METADATA,
    Layer,
    checksums_group,
    document_bytes,
    read_document,
    root_document,
    source_document,
    source_names,
    write_json,
)

_REMOVED = ".removed" + PARTIAL  # ending of a file beside the folder of a layer that is being removed


def free_bytes(store: Path) -> int:
    """Free space on the disk that holds, or will hold, ``store``."""
    folder = store.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def refuse_other_folder(store: Path) -> None:
    """FeatureStoreError if ``store`` is something else than a store or a place for one."""
    if (store / METADATA).exists() or not os.path.lexists(store):
        return
    if not store.is_dir() or any(
        not (path.name.startswith(METADATA) and path.name.endswith(PARTIAL)) for path in store.iterdir()
    ):
        what = "a folder with other things in it" if store.is_dir() else "a file"
        raise FeatureStoreError(f"{store} is {what}, not a store. Choose another `store`.")


def refuse_old_version(store: Path) -> None:
    """FeatureStoreError for a store, or one with a source, of an earlier format version: that is only read."""
    for folder in [store, *(store / name for name in source_names(store))]:
        version = read_document(folder)["attributes"]["format_version"]
        if version != FORMAT_VERSION:
            raise FeatureStoreError(
                f"{folder} has format version {version}, which is read but not written. Upgrade the store, which computes "
                f"nothing: pipelines/upgrade_store.py {store}"
            )


def publish_root(store: Path) -> None:
    """Bring the root's document in step with its sources'; touches no file if it is."""
    documents = {name: read_document(store / name) for name in source_names(store)}
    _write_if_changed(store / METADATA, root_document(documents))


def drop_leftovers(store: Path) -> list[str]:
    """Delete what a killed writer left, under ``store_lock``: files that were being written, folders that were being removed.

    The names of the latter: ``source`` or ``source/layer``.
    """
    gone = []
    for path in sorted(store.glob("*" + PARTIAL)):
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
            gone.append(path.name.removesuffix(PARTIAL))
        else:
            remove_file(path)
    for marker in sorted(store.glob(f"*/*{_REMOVED}")):
        source, layer = marker.parent, marker.name.removesuffix(_REMOVED)
        if (
            layer not in read_document(source)["consolidated_metadata"]["metadata"]
        ):  # otherwise killed before it was taken out
            remove_folder(source / layer, missing_ok=True)
            remove_folder(source / CHECKSUMS / layer, missing_ok=True)
            gone.append(f"{source.name}/{layer}")
        remove_file(marker)
    for path in [path for name in source_names(store) for path in (store / name).rglob("*" + PARTIAL)]:
        if path.is_file():
            remove_file(path)
    return gone


def shard_writer(layer: Layer, shard: int, keep: Sequence[int] = (), end: int = 0, **rest: Any) -> ShardWriter:
    """A writer for one shard, see ShardWriter; a remote one that is to be completed is fetched."""
    if keep:
        fetch_to_complete(layer, shard)
    return ShardWriter(layer.shard_path(shard), layer.record, layer.slots, keep=keep, end=end, **rest)


class SourceWriter:
    """Writes one source. Make it under ``store_lock``; it repairs what a killed writer left behind.

    ``table`` holds the registered items' coordinates in row order, columns ``face_id, view, path, image_sha256`` and
    the user's. ``foreign`` are the documents of arrays of other programs, for a source that is made anew. Nothing is visible to
    readers before ``publish``. FeatureStoreError for a store of format version 1, unless it is being ``upgraded``.
    """

    def __init__(
        self,
        store: Path,
        name: str,
        attributes: Mapping[str, Any],
        foreign: Mapping[str, Any] | None = None,
        upgraded: bool = False,
    ) -> None:
        store = local_store(store, writing=True)
        self.store = store
        self.folder = store / name
        self.layers: dict[str, Layer] = {}
        self._parts: list[pd.DataFrame] = []
        self._foreign: dict[str, Any] = dict(foreign or {})
        self._checksums: dict[str, Checksums] = {}
        self._written: dict[str, _Written] = {}  # the coordinates on disk
        self._replaced = False  # whether values may be others than those on disk
        self._unpublished_changes = False
        refuse_other_folder(store)
        if not (store / METADATA).exists():
            write_json(store / METADATA, root_document({}))
        if not upgraded:
            refuse_old_version(store)
        drop_leftovers(store)
        self._opened = OpenFolder(store)
        if (self.folder / METADATA).exists():
            source = Source(store, name)
            self.attributes = source.attributes
            self.layers = {each: replace(layer, version=FORMAT_VERSION) for each, layer in source.layers.items()}
            self._foreign = source.foreign
            self._parts = [source.items.reset_index()]
            self._checksums = {each: Checksums(layer) for each, layer in self.layers.items()}
            for each, document in source.coordinates.items():
                names = chunk_names(document)
                self._written[each] = _Written(document["data_type"], names, list(source.digests(each) or ()))
                self._replaced |= names != 0 and not upgraded  # killed while values were changed
            self._unpublished_changes = self._replaced or upgraded
            if not upgraded:
                self._drop_unregistered()
        else:
            remove_folder(self.folder, missing_ok=True)  # a source that never got its document
            self.attributes = dict(attributes)
        self._published = self.n_items  # rows before this one have their coordinates on disk

    @property
    def table(self) -> pd.DataFrame:
        """Coordinates of all registered items, in row order."""
        if len(self._parts) != 1:
            self._parts = [pd.concat(self._parts, ignore_index=True)] if self._parts else [_empty_table()]
        return self._parts[0]

    @property
    def n_items(self) -> int:
        """Items registered so far, published or not."""
        return sum(len(part) for part in self._parts)

    def add_layer(self, name: str, shape: tuple[int, ...], dtype: str, compress: str, slots: int) -> Layer:
        """Declare a layer; its rows are absent until shards hold them."""
        if name == CHECKSUMS:
            raise FeatureStoreError(f"a layer cannot be named {name!r}: the store keeps its checksums under that name.")
        for folder in (self.folder / name, self.folder / CHECKSUMS / name):
            remove_folder(folder, missing_ok=True)  # left by a run that was killed before it published
        self.layers[name] = Layer(name, shape, np.dtype(dtype), compress, slots, self.n_items, self.folder / name)
        self._checksums[name] = Checksums(self.layers[name])
        self._unpublished_changes = True
        return self.layers[name]

    def remove_layer(self, name: str) -> None:
        """Take a layer out and publish that, then delete its files; killed in between, ``drop_leftovers`` deletes them."""
        marker = self.folder / (name + _REMOVED)
        write_atomically(marker, b"")
        folder, noted = self.layers.pop(name).folder, self._checksums.pop(name).folder
        self._unpublished_changes = True
        self.publish()
        remove_folder(folder)
        remove_folder(noted)
        remove_file(marker)

    def open_shard(self, layer: str, shard: int, keep: Sequence[int] = (), end: int = 0) -> ShardWriter:
        """A writer for one shard of one layer; see ShardWriter."""
        self._require_store()
        return shard_writer(self.layers[layer], shard, keep, end, noting=partial(self._noting, layer, shard))

    def put_shard(self, layer: str, shard: int, file: Path, checksums: np.ndarray) -> None:
        """Put a finished ``file`` in the place of a shard; ``checksums`` as ``ShardWriter.finish`` returned them."""
        self._require_store()
        with self._noting(layer, shard, checksums):
            put_in_place(file, self.layers[layer].shard_path(shard))

    @contextmanager
    def _noting(self, layer: str, shard: int, written: np.ndarray) -> Iterator[None]:
        """Rows that are written anew are forgotten before the block, which puts their shard in its place, and noted after it."""
        slots, noted = self.layers[layer].slots, self._checksums[layer]
        first = shard * slots
        before = noted[range(first, first + slots)]
        after = np.where(written == KEPT, before, written)
        if noted.forget(first + np.flatnonzero(before != after)):
            noted.save()
        yield
        noted.note(first, after)

    def note(self, layer: str, start: int, checksums: np.ndarray) -> None:
        """The checksums (int64, -1 for none) of rows from ``start`` on whose shards are in their places already."""
        self._checksums[layer].note(start, checksums)

    def present_slots(self, layer: str, shard: int) -> np.ndarray:
        """bool per slot of a shard: whether it holds a registered item's row. A lost index holds none."""
        self._require_store()
        found = self.layers[layer]
        first = shard * found.slots
        try:
            index = stored_index(found, shard)
            present = index.present.copy() if index else np.zeros(found.slots, bool)
        except DamagedShard:
            present = np.zeros(found.slots, bool)
        present &= self._checksums[layer][range(first, first + found.slots)] >= 0
        present[max(0, self.n_items - first) :] = False
        return present

    def append(self, table: pd.DataFrame) -> None:
        """Register items whose rows are in committed shards; columns as ``table``'s."""
        self._parts.append(table)
        self._unpublished_changes = True

    def replace_table(self, table: pd.DataFrame) -> None:
        """Put other values into the coordinates; items and their order must stay the same."""
        self._parts = [table.reset_index(drop=True)]
        self._replaced = True
        self._unpublished_changes = True

    def publish(self) -> None:
        """Show readers everything committed so far, in one step; touches no file if nothing changed."""
        self._require_store()
        with self._opened.unchanged():
            for noted in self._checksums.values():
                noted.save()
            if self._unpublished_changes:
                changed = self._changed_columns() if self._replaced else set()
                if changed:  # under names that no published document describes, and then under the usual ones
                    self._publish_source(changed)
                self._publish_source(set())
                self._published = self.n_items
                self._unpublished_changes = self._replaced = False
            publish_root(self.store)  # also after a kill just before it

    def _require_store(self) -> None:
        """FeatureStoreError if the store was removed, or another one put in its place, since this writer was made."""
        with self._opened.unchanged():
            pass

    def _changed_columns(self) -> set[str]:
        """Coordinates whose published values are others now, or of another type."""
        published, changed = self.table.iloc[: self._published], set()
        for name, written in self._written.items():
            values = published[name].to_numpy()
            kind = coordinate_kind(values)
            if kind != written.kind or [_digest(part, kind) for part in _chunks(values)] != written.digests:
                changed.add(name)
        return changed

    def _publish_source(self, moved: set[str]) -> None:
        """Write what has changed and then the source's document; the chunks of ``moved`` coordinates under other names."""
        table = self.table
        kinds = {str(name): coordinate_kind(table[name].to_numpy()) for name in table.columns}
        arrays: dict[str, Any] = {
            name: coordinate_metadata(kind, len(table), int(name in moved)) for name, kind in kinds.items()
        }
        for name in kinds:
            self._write_chunks(name, table[name].to_numpy(), arrays[name])
        arrays[CHECKSUMS] = checksums_group()
        for name, layer in self.layers.items():
            self.layers[name] = replace(layer, n_items=len(table))
            arrays[name] = self.layers[name].metadata()
            arrays[f"{CHECKSUMS}/{name}"] = checksum_metadata(len(table))
        self.attributes["coordinates"] = " ".join(kinds)
        self.attributes["digests"] = {name: self._written[name].digests for name in kinds}
        for name, document in arrays.items():
            _write_if_changed(self.folder / name / METADATA, document)
        write_json(self.folder / METADATA, source_document(self.attributes, {**arrays, **self._foreign}, self._foreign))
        for name in kinds:
            _drop_other_chunks(self.folder / name, arrays[name])

    def _write_chunks(self, name: str, values: np.ndarray, document: Mapping[str, Any]) -> None:
        """Those that are not on disk already."""
        kind, names = document["data_type"], chunk_names(document)
        before = self._written.get(name)
        known = before.digests if before and (before.kind, before.names) == (kind, names) else []
        start = 0 if self._replaced else min(self._published // COORDINATE_CHUNK, len(known))
        digests = known[:start]
        for chunk, part in enumerate(_chunks(values[start * COORDINATE_CHUNK :]), start):
            digests.append(_digest(part, kind))
            if digests[chunk : chunk + 1] != known[chunk : chunk + 1]:
                write_chunk(coordinate_chunk(self.folder / name, document, chunk), part, kind)
        self._written[name] = _Written(kind, names, digests)

    def _drop_unregistered(self) -> None:
        """Remove the rows that a killed caching run wrote and whose items it never registered.

        Otherwise the item registered next under that row number would be given this row.
        """
        for layer in self.layers.values():
            for path in (layer.folder / "c").glob("*"):
                if path.name.isdecimal() and int(path.name) >= layer.n_shards:
                    remove_folder(path)
            if layer.n_items % layer.slots == 0:
                continue
            last = layer.n_shards - 1
            registered = len(layer.shard_rows(last))
            try:
                index = stored_index(layer, last)
                present = index.present if index else np.zeros(layer.slots, bool)
            except DamagedShard:
                continue  # an index that cannot be read serves no row; verify_store repairs it
            if present[registered:].any():
                keep = np.flatnonzero(present[:registered]).tolist()
                self.open_shard(layer.name, last, keep=keep).commit()


@dataclass
class _Written:
    """A coordinate on disk: its type, how its chunks are named, and the digest of each one's values."""

    kind: str
    names: int
    digests: list[int]


def _chunks(values: np.ndarray) -> list[np.ndarray]:
    return [values[start : start + COORDINATE_CHUNK] for start in range(0, len(values), COORDINATE_CHUNK)]


def _digest(values: np.ndarray, kind: str) -> int:
    return crc32c(coordinate_content(values, kind))


def _drop_other_chunks(folder: Path, document: Mapping[str, Any]) -> None:
    """Remove chunks under the names that a coordinate's had before."""
    keep = coordinate_chunk(folder, document, 0)
    for path in folder.iterdir():
        if path.is_dir():
            if path != keep.parent:
                remove_folder(path)
        elif path.name != METADATA and keep.parent != folder:
            remove_file(path)


def _write_if_changed(path: Path, document: Mapping[str, Any]) -> None:
    try:
        if read_file(path) == document_bytes(document):
            return
    except OSError:
        pass
    write_json(path, document)


def _empty_table() -> pd.DataFrame:
    return pd.DataFrame({name: np.empty(0, object) for name in (*KEY, "path", "image_sha256")})
