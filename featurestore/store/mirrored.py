"""What a remote store's mirror has to hold, and its shards: fetched whole, or only their indexes."""

import copyreg
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from featurestore.errors import FeatureStoreError
from featurestore.files import OpenFolder
from featurestore.remote.cache import is_kept
from featurestore.remote.client import Missing
from featurestore.remote.mirror import Mirror, local_store, mirror_of
from featurestore.store.checksums import Checksums
from featurestore.store.coordinates import COORDINATE_CHUNK, COPY, coordinate_chunk
from featurestore.store.shards import DamagedShard, ShardIndex, index_bytes, parse_index, read_index
from featurestore.store.zarr_format import CHECKSUMS, METADATA, Layer, read_json, sources_of_root

_TRANSFERS = 8  # whole shards at once
_AGAIN = 3  # times that documents are fetched which a writer replaced meanwhile


def fetched(store: str | os.PathLike[str], copies: bool = False) -> Path:
    """The folder through which a store is read, up to date; see ``refresh``."""
    root = local_store(store)
    mirror = mirror_of(root)
    if mirror is not None:
        refresh(mirror, copies)
    return root


def refresh(mirror: Mirror, copies: bool = False) -> None:
    """Fetch what has changed, without listing: the root's document names the sources, theirs the arrays and how long they are.

    With ``copies`` also the second copies that repairs need. Without a root document nothing is there afterwards.
    """
    if mirror.lease is not None:
        return  # what is here is what this process has put there
    with mirror.refreshing():
        for _ in range(_AGAIN):
            if mirror.fetch([METADATA]):
                mirror.forget_copies()
                return
            try:
                names = list(sources_of_root(read_json(mirror.root / METADATA)))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return  # opening it says what is wrong
            if not _refresh_sources(mirror, names, copies):
                return


def _refresh_sources(mirror: Mirror, names: list[str], copies: bool) -> bool:
    """Whether something that a document says was not there."""
    before = {name: _document(mirror.root / name) for name in names}
    gone = mirror.fetch(f"{name}/{METADATA}" for name in names)
    documents: list[str] = []
    chunks: list[str] = []
    for name in names:
        document = _document(mirror.root / name)
        if document is None:
            continue
        if before[name] is not None and not _extends(document, before[name] or {}):
            mirror.drop(name)  # what was opened before has to notice
            mirror.fetch([f"{name}/{METADATA}"])
        for array, metadata in document["consolidated_metadata"]["metadata"].items():
            documents.append(f"{name}/{array}/{METADATA}")
            chunks += [f"{name}/{path}" for path in _chunks(document, array, metadata)]
    missing = mirror.fetch([*documents, *chunks]).intersection(chunks)
    mirror.fetch(f"{key}{COPY}" for key in (chunks if copies else missing))  # one that is alone is damage
    mirror.keep_only(names)
    return bool(gone) or any(f"/{CHECKSUMS}/" not in key for key in missing)


def _document(folder: Path) -> dict[str, Any] | None:
    try:
        document = read_json(folder / METADATA)
        return document if document["consolidated_metadata"]["metadata"].items() is not None else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # opening it says what is wrong


def _chunks(document: Mapping[str, Any], array: str, metadata: Mapping[str, Any]) -> Iterator[str]:
    """The chunks of an array that is no layer, as paths in the source's folder."""
    try:
        ours = array in document["attributes"]["coordinates"].split() or array.startswith(f"{CHECKSUMS}/")
        if ours:
            for chunk in range(-(-int(metadata["shape"][0]) // COORDINATE_CHUNK)):
                yield coordinate_chunk(Path(array), metadata, chunk).as_posix()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return  # not as this program writes it


def _extends(document: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether rows mean the same items as before, perhaps with others after them."""
    try:
        old, new = before["attributes"], document["attributes"]
        arrays = before["consolidated_metadata"]["metadata"], document["consolidated_metadata"]["metadata"]
        n_items = [each["face_id"]["shape"][0] for each in arrays]
        whole = n_items[0] // COORDINATE_CHUNK if n_items[1] != n_items[0] else None
        keys = ("face_id", "view")
        return n_items[0] <= n_items[1] and all(
            old["digests"][key][:whole] == new["digests"][key][:whole] for key in keys
        )
    except (KeyError, TypeError, IndexError):
        return False


def shard_index(layer: Layer, shard: int) -> ShardIndex | None:
    """The index of a remote shard, by one request; None if it has not been written. Raises DamagedShard."""
    mirror = mirror_of(layer.folder)
    assert mirror is not None
    path = layer.shard_path(shard)
    try:
        size, raw = mirror.objects.tail(mirror.key(path), index_bytes(layer.slots))
    except Missing:
        return None
    return parse_index(raw, size, layer.slots, layer.record, path)


def open_remote_shard(layer: Layer, shard: int) -> tuple[int, bool]:
    """A remote shard in the cache: its file opened, and whether every row that is noted is in it as noted.

    One that is not so the second time either is not kept. FileNotFoundError if it has not been written.
    """
    mirror = mirror_of(layer.folder)
    assert mirror is not None
    noted = Checksums(layer)[layer.shard_rows(shard)]
    key = mirror.key(layer.shard_path(shard))
    # The checksums say what has to be in it: one that was completed or written anew since has another name.
    about = repr((mirror.url, key, layer.record)).encode() + noted.tobytes()

    def fetch(path: Path, announce: Callable[[int], None]) -> bool:
        for _ in range(2):
            download(mirror, key, path, announce)
            if holds_noted(layer, shard, path, noted):
                return True
        return False

    try:
        return mirror.shards.open(blake2b(about, digest_size=16).hexdigest(), fetch)
    except Missing:
        raise FileNotFoundError(key) from None


def download(mirror: Mirror, key: str, path: Path, announce: Callable[[int], None] = lambda nbytes: None) -> int:
    """An object into a file; the crc32c of what came. ``announce`` is told its size before."""
    size, pieces = mirror.objects.stream(key)
    announce(size)
    crc = 0
    with path.open("wb") as file:
        for piece in pieces:
            crc = crc32c(piece, crc)
            file.write(piece)
    return crc


def holds_noted(layer: Layer, shard: int, path: Path, noted: np.ndarray) -> bool:
    """Whether the file has, of each row of the shard that is ``noted`` (int64), a whole record with that checksum."""
    with path.open("rb") as file:
        fd = file.fileno()
        try:
            index = read_index(fd, layer.slots, layer.record, path)
        except DamagedShard:
            return False

        def right(slot: int) -> bool:
            if not index.present[slot]:
                return False
            record = os.pread(fd, int(index.nbytes[slot]), int(index.offsets[slot]))
            return crc32c(memoryview(record)[:-4]) == int(noted[slot]) == layer.record.checksum(record)

        return all(map(right, np.flatnonzero(noted >= 0).tolist()))  # this thread may be one of the pool's


def fetch_to_complete(layer: Layer, shard: int) -> None:
    """Put a remote shard where a writer looks for the one that it completes."""
    if mirror_of(layer.folder) is None:
        return
    fd, _ = open_remote_shard(layer, shard)
    path = layer.shard_path(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(fd, "rb") as shard_file, path.open("wb") as file:
        while piece := shard_file.read(1 << 22):
            file.write(piece)


def _remade(url: str, cache: tuple[Path, int] | None, inside: str) -> Path:
    """A file or folder of a remote store's mirror, in a process that it was pickled for."""
    root = local_store(url, False, *(cache or ()))
    mirror = mirror_of(root)
    if mirror is not None and not mirror.fetched:
        refresh(mirror)
    return root / inside


def _portable(path: Path, mirror: Mirror) -> tuple[Any, ...]:
    return mirror.url, (mirror.shards.folder, mirror.shards.most) if is_kept(mirror.shards) else None, mirror.key(path)


def _layer_here(values: dict[str, Any], *place: Any) -> Layer:
    return Layer(**values, folder=_remade(*place))


def _folder_here(*place: Any) -> OpenFolder:
    return OpenFolder(_remade(*place))


def _reduce_layer(layer: Layer) -> tuple[Any, ...] | str:
    mirror = mirror_of(layer.folder)
    if mirror is None:
        return layer.__reduce_ex__(2)
    values = {each.name: getattr(layer, each.name) for each in fields(layer) if each.name != "folder"}
    return _layer_here, (values, *_portable(layer.folder, mirror))


def _reduce_folder(opened: OpenFolder) -> tuple[Any, ...] | str:
    mirror = mirror_of(opened.path)
    return opened.__reduce__() if mirror is None else (_folder_here, _portable(opened.path, mirror))


# What is pickled for another process, perhaps on another machine, finds the store again by its URL.
copyreg.pickle(Layer, _reduce_layer)
copyreg.pickle(OpenFolder, _reduce_folder)


def refuse_remote(store: Path, doing: str) -> None:
    """FeatureStoreError for what takes a folder's place in one step, which object stores cannot."""
    mirror = mirror_of(store)
    if mirror is not None:
        raise FeatureStoreError(
            f"a source of {mirror.url} cannot be {doing} where it is: an object store cannot replace it in one step. Copy the "
            f"store to a disk, do it there, and copy it back: pipelines/copy_store.py {mirror.url} FOLDER"
        )


@cache
def transfers() -> ThreadPoolExecutor:
    """Threads that fetch or put whole shards; made at first use."""
    return ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="transfers")
