"""Files of activations that other programs wrote: NumPy, folders of ``.npy``, HDF5, pickles. Nothing in them runs."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.files import refuse_bomb
from featurestore.keys import KEY
from featurestore.store.file_names import FILE_COLUMN, TABLE
from featurestore.store.matlab import arrays_in
from featurestore.store.pickled_tables import read_pickle
from featurestore.text import in_natural_order, listing, near_matches

FILE_NAMES = "file_names.txt"  # a path a line, as thingsvision writes it beside its features


@dataclass(frozen=True)
class FileRows:
    """A layer of a file: ``read(start, stop)`` gives (stop - start, *shape)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]


@dataclass
class Found:
    """Layers of ``n`` rows; what the file says of its items: a table with their keys, or a name for each."""

    n: int
    layers: dict[str, FileRows]
    table: pd.DataFrame | None = None
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def open_activations(path: Path, kind: str, layer: str | None) -> Iterator[Found]:
    """What a file or folder of one of ``KINDS`` holds, open within; FeatureStoreError for one that cannot be read as such."""
    if kind not in KINDS:
        raise FeatureStoreError(f"there is no `kind` {kind!r}. {near_matches(kind, KINDS)}")
    if not path.is_file() and not path.is_dir():
        raise FeatureStoreError(f"there is no file or folder {path}. Check the `path` given.")
    with ExitStack() as opened:
        with _refusing(path, kind):
            found = KINDS[kind](path, layer, opened)
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
            if path.is_file():
                with _refusing(path, kind):
                    refuse_bomb(path.stat().st_size, found.n * math.prod(rows.shape) * rows.dtype.itemsize)
        layers = {
            name: replace(rows, read=partial(_read, path, kind, rows.read)) for name, rows in found.layers.items()
        }
        yield replace(found, layers=layers)


@contextmanager
def _refusing(path: Path, kind: str) -> Iterator[None]:
    """Libraries raise anything when a file is damaged: here it becomes a FeatureStoreError."""
    try:
        yield
    except FeatureStoreError:
        raise
    except Exception as error:
        raise FeatureStoreError(f"{path} cannot be read as `kind` {kind}: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


def _read(path: Path, kind: str, read: Callable[[int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
    with _refusing(path, kind):
        return read(start, stop)


def _of_array(array: Any) -> FileRows:
    """Of an array, a memory map or an HDF5 dataset (n, *shape)."""
    return FileRows(tuple(array.shape[1:]), np.dtype(array.dtype), lambda start, stop: np.asarray(array[start:stop]))


def _open_numpy(path: Path, layer: str | None, opened: ExitStack) -> Found:
    array = _array_in(path, layer, opened)
    beside, listed = path.with_name(TABLE), path.with_name(FILE_NAMES)
    names = None
    if listed.is_file():
        names = [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
    table = read_table(beside) if beside.is_file() else None
    return Found(len(array), {layer or path.stem: _of_array(array)}, table, names)


def _array_in(path: Path, layer: str | None, opened: ExitStack) -> Any:
    """(n, *shape), mapped or read; nothing in it can run."""
    ending = path.suffix.lower()
    if ending == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if ending == ".txt":
        return np.loadtxt(path, ndmin=2)
    if ending == ".npz":
        held: Any = opened.enter_context(np.load(path, allow_pickle=False))
        name = _only(path, list(held.files), layer)
        refuse_bomb(path.stat().st_size, max(entry.file_size for entry in held.zip.infolist()))
        array = held[name]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is no array")
        return array
    if ending == ".mat":
        arrays = arrays_in(path)
        return arrays[_only(path, list(arrays), layer)]()
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


def _open_files(path: Path, layer: str | None, opened: ExitStack) -> Found:
    if not path.is_dir():
        raise FeatureStoreError(
            f"{path} is not a folder. `kind` files is a folder face/view.npy; for one array: numpy."
        )
    if (path / TABLE).is_file():
        table = read_table(path / TABLE)
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
    return Found(len(files), {layer or path.name: FileRows(first.shape, first.dtype, read)}, table)


def _stacked(files: list[Path], shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    values = np.empty((stop - start, *shape), dtype)
    for i, file in enumerate(files[start:stop]):
        try:
            row = np.load(file, allow_pickle=False)
        except Exception as error:  # a damaged header raises anything
            raise FeatureStoreError(f"{file} cannot be read as an array: {_reason(error)}.") from None
        if row.shape != shape or row.dtype != dtype:
            raise FeatureStoreError(
                f"{file} has shape {row.shape} {row.dtype.name}, {files[0]} {shape} {dtype.name}; all have to have the same."
            )
        values[i] = row
    return values


def _open_hdf5(path: Path, layer: str | None, opened: ExitStack) -> Found:
    file = opened.enter_context(h5py.File(path, "r"))
    others = file.get("items", {})
    columns = {name: _dataset(file, name) for name in KEY if name in file}
    columns |= {str(name): _dataset(others, name) for name in others}
    for one in columns.values():
        refuse_bomb(path.stat().st_size, one.nbytes)
    texts = {name: one.asstr()[:] if one.dtype.kind == "O" else one[:] for name, one in columns.items()}
    datasets = [_dataset(file, name) for name in file if name not in (*KEY, "items")]
    arrays = {str(one.attrs.get("layer", one.name.strip("/"))): one for one in datasets}
    if layer is not None and layer not in arrays:
        raise FeatureStoreError(f"{path} has no layer {layer!r}. {near_matches(layer, arrays)}")
    chosen = {name: array for name, array in arrays.items() if layer in (None, name)}
    sizes = {len(array) for array in (*chosen.values(), *texts.values())}
    if not chosen or len(sizes) != 1:
        raise ValueError("its layers and items are not of one number" if chosen else "it holds no layer")
    return Found(sizes.pop(), {name: _of_array(array) for name, array in chosen.items()}, pd.DataFrame(texts))


def _open_pickle(path: Path, layer: str | None, opened: ExitStack) -> Found:
    held = read_pickle(path)
    if isinstance(held, pd.DataFrame):
        return _open_table(path, held, layer)
    if not held:
        raise ValueError("it is empty")
    if layer in held and isinstance(held[layer], np.ndarray):
        return Found(len(held[layer]), {str(layer): _of_array(held[layer])})
    pairs: list[tuple[Any, Any]] = list(held.items())
    if all(isinstance(value, dict) for value in held.values()):
        pairs = [((face, view), array) for face, views in held.items() for view, array in views.items()]
    arrays = [array for _, array in pairs]
    if all(isinstance(key, tuple) and len(key) == 2 for key, _ in pairs):
        table = pd.DataFrame([tuple(map(str, key)) for key, _ in pairs], columns=list(KEY))
        return Found(len(arrays), {layer or path.stem: _of_list(arrays, [key for key, _ in pairs])}, table)
    names = [str(key) for key, _ in pairs]
    return Found(len(arrays), {layer or path.stem: _of_list(arrays, names)}, None, names)


def _open_table(path: Path, table: pd.DataFrame, layer: str | None) -> Found:
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
    return Found(len(table), found, table if keys else None, names)


def _of_list(arrays: list[np.ndarray], names: Sequence[Any]) -> FileRows:
    """Of an array for each row; FeatureStoreError names those that differ."""
    shape, dtype = arrays[0].shape, arrays[0].dtype
    other = [i for i, array in enumerate(arrays) if array.shape != shape or array.dtype != dtype]
    if other:
        wrong = arrays[other[0]]
        raise FeatureStoreError(
            f"{len(other)} arrays have another shape or type than the first, {shape} {dtype.name}: {names[other[0]]} has "
            f"{wrong.shape} {wrong.dtype.name}; all have to have the same."
        )
    return FileRows(shape, dtype, lambda start, stop: np.stack(arrays[start:stop]))


KINDS: dict[str, Callable[[Path, str | None, ExitStack], Found]] = {
    "numpy": _open_numpy,
    "files": _open_files,
    "hdf5": _open_hdf5,
    "pickle": _open_pickle,
}


def read_table(path: Path) -> pd.DataFrame:
    """Keys as text: a face may be called 007, or NA."""
    text = {"dtype": str, "keep_default_na": False}
    try:
        table = pd.read_csv(path, index_col=False)
        texts = pd.read_csv(path, index_col=False, **text)
    except (ValueError, UnicodeDecodeError) as error:
        raise FeatureStoreError(f"{path} cannot be read as a CSV: {error}.") from None
    return table.assign(**{name: texts[name] for name in (*KEY, FILE_COLUMN, "path") if name in texts})
