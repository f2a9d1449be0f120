"""Activations that other programs made, as a source of their own that says so.

Nothing is known of the photographs: their hashes are empty, so that no query takes such an item for the same photograph as one of
a source computed here.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.files import remove_folder, safe_name, sha256_of
from featurestore.keys import KEY
from featurestore.store.activation_files import FileRows, Found, open_activations
from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter, refuse_other_folder
from featurestore.store.zarr_format import METADATA
from featurestore.text import listing

Items: TypeAlias = pd.DataFrame | pd.MultiIndex | Sequence[tuple[str, str]]
CountRows: TypeAlias = Callable[[int], None]

_READ_AT_ONCE = 1 << 26  # bytes
_SHARD_BYTES = 1 << 28
_SLOTS = 256  # of a shard, unless its rows are large
_UNKNOWN = "unknown"
_TAKEN = re.compile(
    r"item|items|checksums|zarr\.json|.*\.partial|(channel|y|x|feature|token)_[0-9]+"
)  # as photos.keys has them


@dataclass(frozen=True)
class Imported:
    """What an import wrote: the source's name, its items and layers, and what the user should know."""

    source: str
    n_items: int
    layers: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()


def import_activations(
    path: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    kind: str,
    layer: str | None = None,
    name: str | None = None,
    items: Items | None = None,
    compress: str = "none",
    progress: CountRows = lambda n: None,
) -> Imported:
    """Write activations of a file, or of a folder, as a new source of ``store``, which is made if it is not there.

    ``kind``:

    - ``numpy``: an array (n, *shape) in ``.npy``, ``.npz``, ``.txt``, ``.mat`` (version 5) or ``.h5``: in those that hold
      several, the one named ``layer`` or ``features``, or the only one. Keys come from ``items``, or ``items.csv`` beside it.
    - ``files``: a folder ``face/view.npy`` (*shape), or with an ``items.csv`` whose column ``npy_file`` says which is whose.
    - ``hdf5``: what ``export`` wrote; ``layer`` chooses one, otherwise all are taken.
    - ``pickle``: a pandas table (a column of arrays, that named ``layer`` if there are several, or columns of numbers) with
      ``face_id`` and ``view`` as columns or as its index; or a dict of arrays by ``(face, view)``, by face and then view, or of
      ``layer``'s (n, *shape). It is read whole; nothing in it runs, and what is no array and no table is refused by name.

    ``items`` are the keys (face_id, view), and metadata, of the rows in the file's order: a table, a MultiIndex or a list. A file
    that names its rows otherwise (``row_names``) needs them. ``layer`` is the layer's name in the store, needed but for ``hdf5``.
    ``name`` is the source's; ``imported-`` and the first digits of the file's sha256 by default. A row has 1 to 3 dimensions.

    Numbers are kept as float16 or float32; others become float32, which ``notes`` say. The source's ``backbone`` is ``imported``,
    its ``weights`` ``unknown``, its ``precision`` the type of the file's numbers, ``imported`` says where it is from. Nothing of
    the source is visible before all of it is written; memory is bounded but for pickles, ``.npz``, ``.txt`` and ``.mat``.

    FeatureStoreError for a file that is missing, damaged or of another kind, without keys or with one twice, shapes that differ,
    NaN or infinity (naming items), names that a store cannot have, and a source that is already there.
    """
    source, target = Path(path).expanduser(), Path(store)
    with open_activations(source, kind, layer) as found:
        table = _keyed(found, items, source)
        digest = _digest(source, table)
        chosen = _named(found, layer, table)
        full = f"imported-{digest[:12]}" if name is None else name
        if not safe_name(full) or full.endswith(".partial"):
            raise FeatureStoreError(f"`name` {full!r} cannot name a source: give letters, digits and _.+=@- alone.")
        attributes = {
            "backbone": "imported",
            "weights": _UNKNOWN,
            "weights_name": f"{_UNKNOWN}: imported from {source.name}",
            "recipe": {},
            "precision": " and ".join(dict.fromkeys(rows.dtype.name for rows in chosen.values())),
            "imported": {"from": source.name, "kind": kind, "sha256": digest},
        }
        with store_lock(target, "an import of activations"):
            _write(target, full, attributes, chosen, table, compress, progress)
    shapes = {each: rows.shape for each, rows in chosen.items()}
    return Imported(full, len(table), shapes, (*found.notes, *_conversions(chosen)))


def row_names(path: str | os.PathLike[str], *, kind: str, layer: str | None = None) -> list[str] | None:
    """The names that a file gives its rows, in their order: lines of ``file_names.txt``, an index, or keys of a dict of arrays.

    None if there are none, or if they are keys already. For these names keys (face, view) are made, and given as ``items``.
    FeatureStoreError as ``import_activations`` raises it.
    """
    with open_activations(Path(path), kind, layer) as found:
        return found.names if found.table is None else None


def _keyed(found: Found, items: Items | None, path: Path) -> pd.DataFrame:
    """face_id, view, path, image_sha256 (empty), and metadata that can be a coordinate."""
    table = found.table if items is None else _table_of(items)
    if table is None:
        hint = (
            f" It names its rows {listing(found.names, 2)}: give a key for each, in this order." if found.names else ""
        )
        raise FeatureStoreError(
            f"{path} does not say which face and view its {found.n} rows are of. Give `items`, a table with the columns face_id "
            f"and view.{hint}"
        )
    absent = [name for name in KEY if name not in table]
    if absent:
        raise FeatureStoreError(
            f"the items have no column {absent[0]}; they have {listing(table.columns, 12)}. Give `items`."
        )
    if len(table) != found.n:
        raise FeatureStoreError(
            f"there are {len(table)} items for {found.n} rows of {path}. They have to be in the same order."
        )
    table = table.reset_index(drop=True)
    for name in KEY:
        missing = table[name].isna() | (table[name].astype(str) == "")
        if missing.any():
            raise FeatureStoreError(f"item {int(missing.to_numpy().argmax()) + 1} of {len(table)} has no {name}.")
    table = table.assign(**{name: [str(value) for value in table[name]] for name in KEY})
    repeated = table[table.duplicated(list(KEY))]
    if len(repeated):
        keys = [f"{face}|{view}" for face, view in zip(*(repeated[name] for name in KEY), strict=True)]
        raise FeatureStoreError(
            f"{len(keys)} items have a key that another one has: {listing(keys, 3)}. Rename or remove them."
        )
    paths = [str(each) for each in table["path"].fillna("")] if "path" in table else [""] * len(table)
    made = table[list(KEY)].assign(path=paths, image_sha256="")
    for column in table.columns.difference(made.columns, sort=False):
        name = re.sub(r"\s+", "_", str(column).strip())
        if not re.fullmatch(r"\w[\w.-]*", name) or _TAKEN.fullmatch(name) or name in made:
            found.notes.append(f"the column {column!r} is left out: it cannot name a coordinate of a store")
        else:
            numbers = table[column].dtype.kind in "biuf"
            made[name] = table[column] if numbers else [("" if pd.isna(each) else str(each)) for each in table[column]]
    return made.astype(dict.fromkeys((*KEY, "path", "image_sha256"), object))


def _table_of(items: Items) -> pd.DataFrame:
    if isinstance(items, pd.DataFrame):
        return items.reset_index() if items.index.names[0] else items
    if isinstance(items, pd.MultiIndex):
        return items.to_frame(index=False).set_axis(list(KEY), axis=1)
    pairs = list(items)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise FeatureStoreError(f"`items` are (face, view) pairs or a table; got {listing(pairs, 2)}.")
    return pd.DataFrame(pairs, columns=list(KEY))


def _digest(path: Path, table: pd.DataFrame) -> str:
    """The file's sha256; of a folder, of the sha256 of each of its arrays, by name."""
    if path.is_file():
        return sha256_of(path)
    lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}" for file in sorted(path.rglob("*.npy"))]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _named(found: Found, layer: str | None, table: pd.DataFrame) -> dict[str, FileRows]:
    """The layers by names that a store can have."""
    layers = dict(found.layers)
    if layer is not None:
        (rows,) = layers.values()
        layers = {layer: rows}
    for name in layers:
        if not safe_name(name) or _TAKEN.fullmatch(name) or name in table:
            raise FeatureStoreError(f"{name!r} cannot name a layer of the store. Give another `layer`.")
    return layers


def _conversions(layers: dict[str, FileRows]) -> Iterator[str]:
    for name, rows in layers.items():
        if rows.dtype.newbyteorder("=") not in (np.float16, np.float32):
            yield f"{name}: {rows.dtype.name} became float32"


def _write(
    store: Path,
    name: str,
    attributes: dict[str, Any],
    layers: dict[str, FileRows],
    table: pd.DataFrame,
    compress: str,
    progress: CountRows,
) -> None:
    refuse_other_folder(store)
    if (store / name / METADATA).exists():
        raise FeatureStoreError(
            f"{store} already holds a source {name}. Give another `name`, or remove that one first."
        )
    writer = SourceWriter(store, name, attributes)
    try:
        largest = max(int(np.prod(rows.shape)) * 4 for rows in layers.values())
        slots = max(1, min(_SLOTS, _SHARD_BYTES // largest))
        for layer, rows in layers.items():
            half = rows.dtype.newbyteorder("=") == np.float16
            writer.add_layer(layer, rows.shape, "float16" if half else "float32", compress, slots)
            _write_layer(writer, layer, rows, table, progress)
        writer.append(table)
        writer.publish()
    except BaseException:
        if not (store / name / METADATA).exists():
            remove_folder(store / name, missing_ok=True)
        raise


def _write_layer(writer: SourceWriter, layer: str, rows: FileRows, table: pd.DataFrame, progress: CountRows) -> None:
    made = writer.layers[layer]
    at_once = max(1, _READ_AT_ONCE // max(1, int(np.prod(rows.shape)) * rows.dtype.itemsize))
    for first in range(0, len(table), made.slots):
        last = min(first + made.slots, len(table))
        shard = writer.open_shard(layer, first // made.slots, end=last - first)
        try:
            for start in range(first, last, at_once):
                stop = min(start + at_once, last)
                values = _checked(rows.read(start, stop), made.dtype, layer, table.iloc[start:stop])
                shard.write(range(start - first, stop - first), values)
                progress(stop - start)
        except BaseException:
            shard.abandon()
            raise
        shard.commit()


def _checked(values: np.ndarray, dtype: np.dtype, layer: str, table: pd.DataFrame) -> np.ndarray:
    """(n, elements) of the stored type; FeatureStoreError names items with NaN or infinity."""
    with np.errstate(over="ignore"):
        plain = np.ascontiguousarray(values.reshape(len(values), -1), dtype)
    wrong = ~np.isfinite(plain).all(axis=1)
    if wrong.any():
        keys = [f"{face}|{view}" for face, view in zip(*(table[name][wrong] for name in KEY), strict=True)]
        raise FeatureStoreError(
            f"layer {layer!r} holds NaN, or numbers too large for {dtype.name}, for {len(keys)} items: {listing(keys, 3)}. "
            "Nothing was imported; leave them out."
        )
    return plain
