"""Activations that other programs made, as a source of their own that says so.

Nothing is known of the photographs: their hashes are empty, so that no query takes such an item for the same photograph as one of
a source computed here.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import pandas as pd
from scipy.io import loadmat

from featurestore.errors import FeatureStoreError
from featurestore.files import safe_name, sha256_of
from featurestore.keys import KEY
from featurestore.store.file_names import FILE_COLUMN, TABLE
from featurestore.store.pickled_tables import read_pickle
from featurestore.store.writer import SourceWriter, refuse_other_folder, store_lock
from featurestore.store.zarr_format import METADATA
from featurestore.text import in_natural_order, listing, near_matches

Items: TypeAlias = pd.DataFrame | pd.MultiIndex | Sequence[tuple[str, str]]
CountRows: TypeAlias = Callable[[int], None]

FILE_NAMES = "file_names.txt"  # a path a line, as thingsvision writes it beside its features
_READ_AT_ONCE = 1 << 26  # bytes
_SHARD_BYTES = 1 << 28
_SLOTS = 256  # of a shard, unless its rows are large
_UNKNOWN = "unknown"
_TAKEN = re.compile(r"item|items|zarr\.json|.*\.partial|(channel|y|x|feature|token)_[0-9]+")  # as photos.keys has them


@dataclass(frozen=True)
class Imported:
    """What an import wrote: the source's name, its items and layers, and what the user should know."""

    source: str
    n_items: int
    layers: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """A layer of a file: ``read(start, stop)`` gives (stop - start, *shape)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]


@dataclass
class _Found:
    """Layers of ``n`` rows; what the file says of its items: a table with their keys, or a name for each."""

    n: int
    layers: dict[str, _Rows]
    table: pd.DataFrame | None = None
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


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
    if kind not in _KINDS:
        raise FeatureStoreError(f"there is no `kind` {kind!r}. {near_matches(kind, _KINDS)}")
    if not source.exists():
        raise FeatureStoreError(f"there is no file or folder {source}. Check the `path` given.")
    with _opened(source, kind, layer) as found:
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
    if kind not in _KINDS:
        raise FeatureStoreError(f"there is no `kind` {kind!r}. {near_matches(kind, _KINDS)}")
    with _opened(Path(path), kind, layer) as found:
        return found.names if found.table is None else None


@contextmanager
def _opened(path: Path, kind: str, layer: str | None) -> Iterator[_Found]:
    with ExitStack() as opened:
        try:
            found = _KINDS[kind](path, layer, opened)
        except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FeatureStoreError(f"{path} cannot be read as `kind` {kind}: {reason.rstrip('.')[:200]}.") from None
        for name, rows in found.layers.items():
            if rows.dtype.kind not in "iuf":
                raise FeatureStoreError(
                    f"{path} holds {rows.dtype.name} where activations ({name}) were expected: numbers."
                )
            if not 1 <= len(rows.shape) <= 3 or 0 in rows.shape:
                raise FeatureStoreError(
                    f"{path} has rows of shape {rows.shape} ({name}); a store's have 1 to 3 dimensions: (feature,), "
                    "(token, feature) or (channel, y, x). Is its first dimension the photographs?"
                )
        yield found


def _of_array(array: Any) -> _Rows:
    """Of an array, a memory map or an HDF5 dataset (n, *shape)."""
    return _Rows(tuple(array.shape[1:]), np.dtype(array.dtype), lambda start, stop: np.asarray(array[start:stop]))


def _open_numpy(path: Path, layer: str | None, opened: ExitStack) -> _Found:
    array = _array_in(path, layer, opened)
    beside, listed = path.with_name(TABLE), path.with_name(FILE_NAMES)
    names = None
    if listed.is_file():
        names = [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
    table = _read_table(beside) if beside.is_file() else None
    return _Found(len(array), {layer or path.stem: _of_array(array)}, table, names)


def _array_in(path: Path, layer: str | None, opened: ExitStack) -> Any:
    """(n, *shape), mapped or read; nothing in it can run."""
    ending = path.suffix.lower()
    if ending == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if ending == ".txt":
        return np.loadtxt(path, ndmin=2)
    if ending == ".npz":
        held: Any = opened.enter_context(np.load(path, allow_pickle=False))
        return held[_only(path, list(held.files), layer)]
    if ending == ".mat":
        held = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
        return held[_only(path, list(held), layer)]
    if ending in (".h5", ".hdf5"):
        held = opened.enter_context(h5py.File(path, "r"))
        return _dataset(held, _only(path, list(held), layer))
    raise FeatureStoreError(f"`kind` numpy reads .npy, .npz, .txt, .mat and .h5, not {path.name}.")


def _only(path: Path, names: list[str], layer: str | None) -> str:
    wanted = [name for name in (layer, "features") if name in names]
    if wanted or len(names) == 1:
        return str((wanted or names)[0])
    raise FeatureStoreError(f"{path} holds {listing(names)}. Say which with `layer`.")


def _dataset(file: h5py.File, name: str) -> Any:
    """A dataset of this very file: others could be named by it."""
    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or not found.ndim:
        raise ValueError(f"{name!r} is no array in this file")
    return found


def _open_files(path: Path, layer: str | None, opened: ExitStack) -> _Found:
    if not path.is_dir():
        raise FeatureStoreError(
            f"{path} is not a folder. `kind` files is a folder face/view.npy; for one array: numpy."
        )
    if (path / TABLE).is_file():
        table = _read_table(path / TABLE)
        if FILE_COLUMN not in table:
            raise FeatureStoreError(f"{path / TABLE} has no column {FILE_COLUMN}; it has {listing(table.columns, 12)}.")
        files = [path / str(file) for file in table[FILE_COLUMN]]
        outside = [file for file in files if not file.resolve().is_relative_to(path.resolve())]
        if outside:
            raise FeatureStoreError(f"{path / TABLE} names {outside[0]}, which is outside of its folder.")
        table = table.drop(columns=FILE_COLUMN)
    else:
        found = in_natural_order(file.relative_to(path).as_posix() for file in path.glob("*/*.npy"))
        files = [path / file for file in found]
        table = pd.DataFrame({"face_id": [file.parent.name for file in files], "view": [file.stem for file in files]})
    if not files:
        raise FeatureStoreError(f"no .npy files in {path}: looked for face/view.npy.")
    first = np.load(files[0], mmap_mode="r", allow_pickle=False)
    read = partial(_stacked, files, first.shape, first.dtype)
    return _Found(len(files), {layer or path.name: _Rows(first.shape, first.dtype, read)}, table)


def _stacked(files: list[Path], shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    values = np.empty((stop - start, *shape), dtype)
    for i, file in enumerate(files[start:stop]):
        try:
            row = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise FeatureStoreError(f"{file} cannot be read as an array: {error}.") from None
        if row.shape != shape or row.dtype != dtype:
            raise FeatureStoreError(
                f"{file} has shape {row.shape} {row.dtype.name}, {files[0]} {shape} {dtype.name}; all have to have the same."
            )
        values[i] = row
    return values


def _open_hdf5(path: Path, layer: str | None, opened: ExitStack) -> _Found:
    file = opened.enter_context(h5py.File(path, "r"))
    others = file.get("items", {})
    columns = {name: _dataset(file, name) for name in KEY if name in file}
    columns |= {str(name): _dataset(others, name) for name in others}
    texts = {name: one.asstr()[:] if one.dtype.kind == "O" else one[:] for name, one in columns.items()}
    datasets = [_dataset(file, name) for name in file if name not in (*KEY, "items")]
    arrays = {str(one.attrs.get("layer", one.name.strip("/"))): one for one in datasets}
    if layer is not None and layer not in arrays:
        raise FeatureStoreError(f"{path} has no layer {layer!r}. {near_matches(layer, arrays)}")
    chosen = {name: array for name, array in arrays.items() if layer in (None, name)}
    sizes = {len(array) for array in (*chosen.values(), *texts.values())}
    if not chosen or len(sizes) != 1:
        raise ValueError("its layers and items are not of one number" if chosen else "it holds no layer")
    return _Found(sizes.pop(), {name: _of_array(array) for name, array in chosen.items()}, pd.DataFrame(texts))


def _open_pickle(path: Path, layer: str | None, opened: ExitStack) -> _Found:
    held = read_pickle(path)
    if isinstance(held, pd.DataFrame):
        return _open_table(path, held, layer)
    if not held:
        raise ValueError("it is empty")
    if layer in held and isinstance(held[layer], np.ndarray):
        return _Found(len(held[layer]), {str(layer): _of_array(held[layer])})
    pairs: list[tuple[Any, Any]] = list(held.items())
    if all(isinstance(value, dict) for value in held.values()):
        pairs = [((face, view), array) for face, views in held.items() for view, array in views.items()]
    arrays = [array for _, array in pairs]
    if all(isinstance(key, tuple) and len(key) == 2 for key, _ in pairs):
        table = pd.DataFrame([tuple(map(str, key)) for key, _ in pairs], columns=list(KEY))
        return _Found(len(arrays), {layer or path.stem: _of_list(arrays, [key for key, _ in pairs])}, table)
    names = [str(key) for key, _ in pairs]
    return _Found(len(arrays), {layer or path.stem: _of_list(arrays, names)}, None, names)


def _open_table(path: Path, table: pd.DataFrame, layer: str | None) -> _Found:
    named = [str(each) for each in table.index.names if each is not None]
    names = None
    if named:
        table = table.reset_index()
    elif not isinstance(table.index, pd.RangeIndex):
        names, table = [str(each) for each in table.index], table.reset_index(drop=True)
    table.columns = [str(column) for column in table.columns]
    if table.columns.has_duplicates or table.empty:
        raise ValueError("it has no rows" if table.empty else "it has two columns of one name")
    keys = set(KEY) <= set(table.columns)
    if not keys and len(named) == 1:
        names = [str(each) for each in table.pop(named[0])]
    arrays = [each for each in table if all(isinstance(value, np.ndarray) for value in table[each])]
    if arrays:
        column = _only(path, arrays, layer)
        found = {layer or column: _of_list(table[column].tolist(), range(len(table)))}
        table = table.drop(columns=arrays)
    else:
        numbers = [each for each in table if table[each].dtype.kind in "iuf" and each not in KEY]
        if not numbers:
            raise ValueError("it has neither a column of arrays nor columns of numbers")
        found = {layer or path.stem: _of_array(table[numbers].to_numpy())}
        table = table.drop(columns=numbers)
    return _Found(len(table), found, table if keys else None, names)


def _of_list(arrays: list[np.ndarray], names: Sequence[Any]) -> _Rows:
    """Of an array for each row; FeatureStoreError names those that differ."""
    shape, dtype = arrays[0].shape, arrays[0].dtype
    other = [i for i, array in enumerate(arrays) if array.shape != shape or array.dtype != dtype]
    if other:
        wrong = arrays[other[0]]
        raise FeatureStoreError(
            f"{len(other)} arrays have another shape or type than the first, {shape} {dtype.name}: {names[other[0]]} has "
            f"{wrong.shape} {wrong.dtype.name}; all have to have the same."
        )
    return _Rows(shape, dtype, lambda start, stop: np.stack(arrays[start:stop]))


_KINDS: dict[str, Callable[[Path, str | None, ExitStack], _Found]] = {
    "numpy": _open_numpy,
    "files": _open_files,
    "hdf5": _open_hdf5,
    "pickle": _open_pickle,
}


def _read_table(path: Path) -> pd.DataFrame:
    """Keys as text: a face may be called 007, or NA."""
    text = {"dtype": str, "keep_default_na": False}
    try:
        table = pd.read_csv(path, index_col=False)
        texts = pd.read_csv(path, index_col=False, **text)
    except (ValueError, UnicodeDecodeError) as error:
        raise FeatureStoreError(f"{path} cannot be read as a CSV: {error}.") from None
    return table.assign(**{name: texts[name] for name in (*KEY, FILE_COLUMN, "path") if name in texts})


def _keyed(found: _Found, items: Items | None, path: Path) -> pd.DataFrame:
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


def _named(found: _Found, layer: str | None, table: pd.DataFrame) -> dict[str, _Rows]:
    """The layers by names that a store can have."""
    layers = dict(found.layers)
    if layer is not None:
        (rows,) = layers.values()
        layers = {layer: rows}
    for name in layers:
        if not safe_name(name) or _TAKEN.fullmatch(name) or name in table:
            raise FeatureStoreError(f"{name!r} cannot name a layer of the store. Give another `layer`.")
    return layers


def _conversions(layers: dict[str, _Rows]) -> Iterator[str]:
    for name, rows in layers.items():
        if rows.dtype.newbyteorder("=") not in (np.float16, np.float32):
            yield f"{name}: {rows.dtype.name} became float32"


def _write(
    store: Path,
    name: str,
    attributes: dict[str, Any],
    layers: dict[str, _Rows],
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
            shutil.rmtree(store / name, ignore_errors=True)
        raise


def _write_layer(writer: SourceWriter, layer: str, rows: _Rows, table: pd.DataFrame, progress: CountRows) -> None:
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
