"""Activations and RDMs as files for other programs: NumPy, HDF5, rsatoolbox."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import pandas as pd
import xarray as xr

from featurestore.errors import FeatureStoreError
from featurestore.files import replacing
from featurestore.queries.blocks import MEMORY, block_rows
from featurestore.queries.selection import Data, Items, LayerRows, Names, Selection, StoredReader, select
from featurestore.store.file_names import FILE_COLUMN, TABLE, file_names
from featurestore.store.zarr_format import read_document
from featurestore.text import listing, near_matches

CountRows: TypeAlias = Callable[[int], None]

_SAID = (
    "backbone",
    "weights",
    "weights_name",
    "recipe",
    "precision",
    "licence",
    "imported",
)  # of a source, beside its layers
_RSATOOLBOX = "0.3.2"  # the version whose layout is written


def export(
    data: Data,
    path: str | os.PathLike[str],
    layers: Names = None,
    *,
    format: str,
    by: str | None = None,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
    progress: CountRows = lambda n: None,
) -> list[Path]:
    """Write layers for other programs, block by block; the paths of what was written, those of tables and folders last.

    ``format``:

    - ``numpy``: in the folder ``path``, ``layer.npy`` (n, *shape) for each layer, and ``items.csv`` with a row for each of n.
    - ``files``: ``path/layer/face/view.npy`` (*shape) for each photograph, and ``path/layer/items.csv``, whose column
      ``npy_file`` says which is whose.
    - ``hdf5``: the file ``path`` with a dataset (n, *shape) for each layer, the string datasets ``face_id`` and ``view`` (n,),
      further columns in the group ``items``, and what is known of a layer's source as attributes of its dataset.
    - ``rsatoolbox``: in the folder ``path``, ``layer.h5`` for each layer, which ``rsatoolbox.data.dataset.load_dataset`` reads:
      measurements (n, features) float32, columns of the items as ``obs_descriptors``, what is known of the source as
      ``descriptors``.

    Numbers are float16 where the store has them so and nothing is averaged, otherwise float32. Names of faces, views and layers
    are spelled for file systems as ``store.file_names`` does; tables and attributes have them as they are. Each file appears
    whole, in one step, in the place of one of its name, and a table after the files that it lists. ``progress`` is called with
    the number of rows written since the last call.

    Other options are those of ``rdm``. FeatureStoreError as ``select`` raises it, for an unknown format, rows with NaN or
    infinity, a cap that one row exceeds, and what cannot be written.
    """
    if format not in _FORMATS:
        raise FeatureStoreError(f"there is no `format` {format!r}. {near_matches(format, _FORMATS)}")
    chosen = select(data, layers, sources=sources, where=where, by=by, items=items)
    with _writing(Path(path)):
        return list(_FORMATS[format](chosen, _attributes(data, chosen), Path(path), memory, progress))


def export_rdm(rdm: xr.DataArray, path: str | os.PathLike[str]) -> Path:
    """Write RDMs made by ``rdm`` as the HDF5 file that ``rsatoolbox.rdm.load_rdm`` reads; its name should end in ``.h5``.

    ``dissimilarities`` (layers, n(n-1)/2) float32, the upper triangle row by row (the order of SciPy's ``squareform``), computed
    and written some rows at a time; ``pattern_descriptors`` are item, face_id and view, or the groups' names;
    ``rdm_descriptors`` the layers. FeatureStoreError if it is no such array, or cannot be written.
    """
    if rdm.dims[-2:] != ("item", "other") or "layer" not in rdm.coords:
        raise FeatureStoreError(
            f"`rdm` has the dimensions {', '.join(map(str, rdm.dims))}; give what queries.rdm returns."
        )
    stacked = rdm if "layer" in rdm.dims else rdm.expand_dims("layer")
    along = {str(name): one.values for name, one in stacked.coords.items() if one.dims == ("item",)}
    n = stacked.sizes["item"]
    with _writing(Path(path)), _hdf5(Path(path)) as file:
        found = file.create_dataset("dissimilarities", (stacked.sizes["layer"], n * (n - 1) // 2), "float32")
        for number in range(len(found)):
            for start, upper in _upper_rows(stacked[number]):
                found[number, start : start + len(upper)] = upper
        file.attrs["dissimilarity_measure"] = str(rdm.attrs.get("metric", ""))
        file.attrs["rsatoolbox_version"] = _RSATOOLBOX
        file.create_group("descriptors")
        _descriptors(file, "pattern_descriptors", {"index": np.arange(n), **along})
        names = stacked["layer"].values
        _descriptors(file, "rdm_descriptors", {"index": np.arange(len(names)), "layer": names})
    return Path(path)


def _upper_rows(square: xr.DataArray) -> Iterator[tuple[int, np.ndarray]]:
    """Of each block of rows, what lies right of the diagonal, in a row, and where it begins."""
    n, start, position = len(square), 0, 0
    rows = square.chunks[0] if square.chunks else (n,)
    for size in rows:
        block = np.asarray(square[start : start + size, start:].values, np.float32)
        upper = block[np.triu(np.ones(block.shape, bool), 1)]
        yield position, upper
        start, position = start + size, position + len(upper)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FeatureStoreError(f"{path} cannot be written: {reason}. Choose another `path`.") from None


def _attributes(data: Data, chosen: Selection) -> dict[str, dict[str, str]]:
    """What is known of each layer's source, as text."""
    found: dict[str, dict[str, str]] = {}
    for layer in chosen.layers:
        attributes: Any = dict(getattr(data, "attrs", {}))
        if isinstance(layer.reader, StoredReader):
            folder = layer.reader.layer.folder.parent
            attributes = {"source": folder.name, **read_document(folder)["attributes"]}
        said = {name: attributes[name] for name in ("source", *_SAID) if name in attributes}
        found[layer.name] = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()
        }
    return found


def _table(chosen: Selection) -> pd.DataFrame:
    return chosen.labels.reset_index()


def _dtype(layer: LayerRows) -> np.dtype:
    stored: Any = layer.reader.layer if isinstance(layer.reader, StoredReader) else getattr(layer.reader, "array", None)
    averaged = not isinstance(layer.rows, np.ndarray)
    return np.dtype(np.float16 if getattr(stored, "dtype", None) == np.float16 and not averaged else np.float32)


def _blocks(layer: LayerRows, memory: str | int, progress: CountRows) -> Iterator[tuple[int, np.ndarray]]:
    """The layer (n, *shape) in blocks, each with the place of its first row; one is held at a time."""
    dtype, start = _dtype(layer), 0
    size = block_rows(len(layer), memory, layer.features * 12)
    for block in layer.blocks(size):
        yield start, block.load().astype(dtype, copy=False).reshape(-1, *layer.shape)
        start += len(block)
        progress(len(block))


def _write_table(path: Path, table: pd.DataFrame) -> Path:
    with replacing(path) as partial:
        table.to_csv(partial, index=False)
    return path


def _as_numpy(chosen: Selection, attributes: Any, path: Path, memory: str | int, progress: CountRows) -> Iterator[Path]:
    names = file_names(layer.name for layer in chosen.layers)
    for layer in chosen.layers:
        target = path / f"{names[layer.name]}.npy"
        with replacing(target) as partial:
            array = np.lib.format.open_memmap(partial, "w+", _dtype(layer), (len(layer), *layer.shape))
            for start, values in _blocks(layer, memory, progress):
                array[start : start + len(values)] = values
            array.flush()
            del array
        yield target
    yield _write_table(path / TABLE, _table(chosen))


def _as_files(chosen: Selection, attributes: Any, path: Path, memory: str | int, progress: CountRows) -> Iterator[Path]:
    index = chosen.labels.index
    if not index.is_unique:
        raise FeatureStoreError(
            f"`items` holds {listing(index[index.duplicated()], 3)} twice, which would be one file. Give each its own view, or "
            "choose `format` numpy."
        )
    names = file_names(layer.name for layer in chosen.layers)
    files = _files_of(chosen.labels.index)
    for layer in chosen.layers:
        folder = path / names[layer.name]
        for start, values in _blocks(layer, memory, progress):
            for file, row in zip(files[start:], values, strict=False):
                with replacing(folder / file) as partial, partial.open("wb") as opened:
                    np.save(opened, row)
                yield folder / file
        yield _write_table(folder / TABLE, _table(chosen).assign(**{FILE_COLUMN: files}))


def _files_of(index: pd.Index) -> list[str]:
    """``face/view.npy`` of each item, or ``group.npy``."""
    if index.nlevels == 1:
        return [f"{name}.npy" for name in file_names(map(str, index)).values()]
    faces = file_names(index.get_level_values(0))
    by_face: dict[str, list[str]] = {}
    for face, view in index:
        by_face.setdefault(face, []).append(view)
    views = {face: file_names(of) for face, of in by_face.items()}
    return [f"{faces[face]}/{views[face][view]}.npy" for face, view in index]


@contextmanager
def _hdf5(path: Path) -> Iterator[h5py.File]:
    # the newest layout keeps long attributes, which rsatoolbox's descriptors of other letters than ASCII are
    with replacing(path) as partial, h5py.File(partial, "w", libver="latest") as file:
        yield file


def _as_hdf5(chosen: Selection, attributes: Any, path: Path, memory: str | int, progress: CountRows) -> Iterator[Path]:
    table = _table(chosen)
    keys = list(chosen.labels.index.names)
    names = file_names(layer.name for layer in chosen.layers)
    if set(names.values()) & {*keys, "items"}:
        raise FeatureStoreError(f"{path} cannot hold a layer and a column of one name. Choose `format` numpy.")
    with _hdf5(path) as file:
        for name in keys:
            file.create_dataset(str(name), data=_plain(table[name]), dtype=h5py.string_dtype())
        others = file.create_group("items")
        for name in table.columns.drop(keys):
            values = _plain(table[name])
            others.create_dataset(str(name), data=values, dtype=h5py.string_dtype() if values.dtype == object else None)
        for layer in chosen.layers:
            array = file.create_dataset(names[layer.name], (len(layer), *layer.shape), _dtype(layer))
            array.attrs.update({"layer": layer.name, **attributes[layer.name]})
            for start, values in _blocks(layer, memory, progress):
                array[start : start + len(values)] = values
    yield path


def _plain(column: Any) -> np.ndarray:
    """Numbers, or an object array of str, empty where there is none."""
    values = np.asarray(column)
    if values.dtype.kind in "biuf":
        return values
    return np.array(["" if pd.isna(value) else str(value) for value in values], object)


def _as_rsatoolbox(
    chosen: Selection, attributes: Any, path: Path, memory: str | int, progress: CountRows
) -> Iterator[Path]:
    table = _table(chosen)
    names = file_names(layer.name for layer in chosen.layers)
    for layer in chosen.layers:
        target = path / f"{names[layer.name]}.h5"
        with _hdf5(target) as file:
            file.attrs.update({"type": "Dataset", "rsatoolbox_version": _RSATOOLBOX})
            array = file.create_dataset("measurements", (len(layer), layer.features), np.float32)
            for start, values in _blocks(layer, memory, progress):
                array[start : start + len(values)] = values.reshape(len(values), -1)
            file.create_group("descriptors").attrs.update({"layer": layer.name, **attributes[layer.name]})
            _descriptors(file, "obs_descriptors", {str(name): table[name] for name in table})
            _descriptors(file, "channel_descriptors", {"feature": np.arange(layer.features)})
        yield target


def _descriptors(file: h5py.File, name: str, columns: dict[str, Any]) -> None:
    """rsatoolbox reads datasets of strings as ASCII, and attributes as any text: what is not ASCII becomes one."""
    group = file.create_group(name)
    for column, content in columns.items():
        values = _plain(content)
        if values.dtype != object:
            group[column] = values
        elif all(text.isascii() and "\0" not in text for text in values):
            group[column] = values.astype("S")
        else:
            group.attrs.create(column, values, dtype=h5py.string_dtype())


_FORMATS = {"numpy": _as_numpy, "files": _as_files, "hdf5": _as_hdf5, "rsatoolbox": _as_rsatoolbox}
