"""What a query is about: layers of the items chosen, read block by block, so that memory does not depend on their number."""

import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import pandas as pd

from featurestore.conditions import rows_that_meet
from featurestore.errors import FeatureStoreError
from featurestore.files import OpenFolder
from featurestore.keys import BOX, KEY, LANDMARKS
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.remote_rows import open_rows
from featurestore.store.rows import Rows
from featurestore.store.zarr_format import Layer
from featurestore.text import in_natural_order, listing, near_matches

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

Data: TypeAlias = "FeatureStore | Source | xr.Dataset | xr.DataArray | da.Array | np.ndarray"
Items: TypeAlias = pd.DataFrame | pd.MultiIndex | Sequence[tuple[str, str]]
Names: TypeAlias = str | Iterable[str] | None

_MEAN_AT_ONCE = 64  # rows of a group that are averaged at once


class Reader(Protocol):
    """Rows by their number. Can be sent to another process."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) int64 as (n, features), as they are stored."""


class StoredReader:
    """Rows of a store's layer, by memory map; each process makes its own maps, once."""

    def __init__(self, layer: Layer, opened: OpenFolder, token: str | None = None) -> None:
        self.layer, self.opened, self.token = layer, opened, token or uuid.uuid4().hex
        self._rows: Rows | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reader_of, (self.layer, self.opened, self.token)

    @property
    def rows(self) -> Rows:
        """The layer's rows, mapped when they are first asked for."""
        if self._rows is None:
            with self.opened.unchanged():
                self._rows = open_rows(self.layer)
        return self._rows

    def read(self, rows: np.ndarray) -> np.ndarray:
        """FeatureStoreError if the source was rewritten since it was opened."""
        with self.opened.unchanged():
            values: np.ndarray = self.rows.gather(rows).flatten(1).numpy()
        return values


@lru_cache(maxsize=32)
def _reader_of(layer: Layer, opened: OpenFolder, token: str) -> StoredReader:
    return StoredReader(layer, opened, token)


class ArrayReader:
    """Rows of a Dask or NumPy array (item, *shape). No dataclass: Dask would look into it, and compute all of the array."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def read(self, rows: np.ndarray) -> np.ndarray:
        """A copy. A contiguous part is sliced, so that Dask reads no more than its blocks."""
        first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
        contiguous = last - first + 1 == len(rows) and (np.diff(rows) == 1).all()
        part = self.array[first : last + 1] if contiguous else self.array[rows]
        if hasattr(part, "compute"):
            part = part.compute(scheduler="synchronous")
        return np.array(part).reshape(len(rows), -1)


@dataclass(frozen=True)
class Block:
    """Some rows of a layer, not read yet: for each, the stored rows that it is the mean of, and its name."""

    layer: str
    reader: Reader
    rows: tuple[np.ndarray, ...] | np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def load(self) -> np.ndarray:
        """Float32 (n, features). FeatureStoreError names items that hold NaN or infinity."""
        if isinstance(self.rows, np.ndarray):
            values = self.reader.read(self.rows)
        else:
            values = np.stack([_mean(self.reader, rows) for rows in self.rows])
        if values.dtype != np.float32:
            values = values.astype(np.float32)
        sums = values.sum(axis=1, dtype=np.float64)  # NaN or infinite if one of them is: much faster than asking each
        if not np.isfinite(sums).all():
            wrong = self.names[~np.isfinite(sums)]
            raise FeatureStoreError(
                f"layer {self.layer!r} holds NaN or infinite numbers for {len(wrong)} items: {listing(wrong, 3)}. Find out why "
                "with pipelines/verify_store.py, or leave these items out with `where`."
            )
        return values


def _mean(reader: Reader, rows: np.ndarray) -> np.ndarray:
    total: Any = 0.0
    for start in range(0, len(rows), _MEAN_AT_ONCE):
        total = total + reader.read(rows[start : start + _MEAN_AT_ONCE]).sum(axis=0, dtype=np.float64)
    return np.asarray(total / len(rows), np.float32)


@dataclass(frozen=True)
class LayerRows:
    """One layer of a selection; ``shape`` is one item's. ``rows`` says what each of its rows is made of, as ``Block`` has it."""

    name: str
    shape: tuple[int, ...]
    reader: Reader
    rows: tuple[np.ndarray, ...] | np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def features(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)

    def block(self, part: "slice | np.ndarray") -> Block:
        """The rows at these places."""
        if isinstance(self.rows, np.ndarray):
            return Block(self.name, self.reader, self.rows[part], self.names[part])
        chosen = self.rows[part] if isinstance(part, slice) else tuple(self.rows[int(i)] for i in part)
        return Block(self.name, self.reader, chosen, self.names[part])

    def blocks(self, size: int) -> list[Block]:
        """All rows, ``size`` to a block."""
        return [self.block(slice(start, start + size)) for start in range(0, len(self), size)]


@dataclass(frozen=True)
class Selection:
    """Layers of the same items, or of the same groups of items, in one order.

    ``labels`` has a row for each: items by (face_id, view) with their metadata, or groups by name with their number of
    ``items``. ``notes`` say what was left out, and why.
    """

    labels: pd.DataFrame
    layers: tuple[LayerRows, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> np.ndarray:
        """``face|view`` of each item, or the group's name."""
        return _names_of(self.labels.index)

    def require(self, least: int, what: str) -> "Selection":
        """Itself; FeatureStoreError if it has fewer than ``least`` rows, which ``what`` needs."""
        if len(self) < least:
            kind = "items" if self.labels.index.nlevels == 2 else "groups"
            raise FeatureStoreError(
                f"{len(self)} {kind} are left, and {what} needs at least {least}. Choose a wider `where`, or cache more "
                "photographs."
            )
        return self

    def require_faces(self, least: int, what: str) -> np.ndarray:
        """The face of each item; FeatureStoreError if there are fewer than ``least``, which ``what`` needs."""
        faces = self.labels.index.get_level_values("face_id").to_numpy(object)
        n = len(set(faces))
        if n < least:
            raise FeatureStoreError(
                f"{n} faces are left, and {what} needs at least {least}. Choose a wider `where`, or cache more photographs."
            )
        return np.asarray(faces)


def select(
    data: Data,
    layers: Names = None,
    *,
    sources: Names = None,
    where: str | Sequence[str] = (),
    by: str | None = None,
    items: Items | None = None,
) -> Selection:
    """Layers of ``data``: a store, a source, an xarray dataset or array, or a Dask or NumPy array with its ``items``.

    ``layers`` are all if none are named, of all ``sources`` that hold them if these are not named either. Items are those that
    meet ``where`` (conditions on metadata, face_id and view), that every layer has a row of and that every source has
    the same photograph of. ``by`` averages the items of each face (``"face"``), view, or value of a metadata column.

    Raises FeatureStoreError for names that are not there (with those near them), conditions that cannot be evaluated, sources
    without a photograph in common, and if nothing is left.
    """
    names = _listed(layers)
    if names == []:
        raise FeatureStoreError("`layers` is empty. Name one or more, or leave it out for all.")
    chosen, labels, notes = _found(data, names, _listed(sources), items)
    conditions = [where] if isinstance(where, str) else list(where)
    meets = np.ones(len(labels), bool)
    for condition in conditions:
        meets &= rows_that_meet(condition, labels)
    if not meets.any():
        raise FeatureStoreError(
            f"none of the {len(labels)} items meet `where` {' and '.join(conditions)}. Choose a wider one."
        )
    present = np.ones(len(labels), bool)
    for layer in chosen:
        if isinstance(layer.reader, StoredReader):
            present &= layer.reader.rows.present[layer.rows]
    if not (meets & present).any():
        raise FeatureStoreError(
            f"no item has a row of {listing(layer.name for layer in chosen)}. Finish the caching run: pipelines/cache_layers.py"
        )
    if (meets & ~present).any():
        notes.append(f"{int((meets & ~present).sum())} items of which a layer has no row yet")
    kept = np.flatnonzero(meets & present)
    labels = labels.iloc[kept]
    parts = groups(labels, by) if by else None
    if parts:
        index = pd.Index(list(parts), name=by)
        labels = pd.DataFrame({"items": [len(rows) for rows in parts.values()]}, index=index)
    row_names = _names_of(labels.index)
    made = []
    for layer in chosen:
        rows: Any = np.asarray(layer.rows)[kept]
        if parts:
            rows = tuple(rows[part] for part in parts.values())
        made.append(LayerRows(layer.name, layer.shape, layer.reader, rows, row_names))
    return Selection(labels, tuple(made), tuple(notes))


def _listed(names: Names) -> list[str] | None:
    return None if names is None else [names] if isinstance(names, str) else [str(name) for name in names]


def _names_of(index: pd.Index) -> np.ndarray:
    names = ["|".join(key) for key in index] if index.nlevels == 2 else [str(name) for name in index]
    return np.array(names, object)


def groups(labels: pd.DataFrame, by: str) -> dict[str, np.ndarray]:
    """Places (n,) int64 of the items of each group, by its name, in natural order of these.

    ``by`` is ``"face"``, ``"view"`` or a column of ``labels``; FeatureStoreError if there is none of that name, or it is empty
    for some items.
    """
    table = labels.reset_index()
    column = {"face": KEY[0]}.get(by, by)
    if column not in table:
        known = [str(name) for name in table.columns if name not in (*BOX, *LANDMARKS, "image_sha256", "path")]
        raise FeatureStoreError(f"items have no column {by!r} to be grouped by. {near_matches(by, ['face', *known])}")
    values = table[column]
    if values.isna().any():
        raise FeatureStoreError(
            f'{int(values.isna().sum())} items have no {by}, so they belong to no group. Leave them out: `where` "{by} == {by}".'
        )
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        order: Iterable[Any] = np.sort(values.unique())
    else:
        values = values.astype(str)
        order = in_natural_order(values.unique())
    places = table.groupby(values, sort=False).indices
    return {str(value): np.asarray(places[value]) for value in order}


def _found(
    data: Data, layers: list[str] | None, sources: list[str] | None, items: Items | None
) -> tuple[list[LayerRows], pd.DataFrame, list[str]]:
    """The layers asked for, with the row of each label; the labels; and what was left out."""
    if isinstance(data, Source):
        data = FeatureStore(data.folder.parent, {data.name: data})
    if isinstance(data, FeatureStore):
        return _stored(data, layers, sources)
    if sources is not None:
        raise FeatureStoreError("`sources` are those of a store; an array has none.")
    if hasattr(data, "data_vars"):
        arrays = {str(name): array for name, array in data.data_vars.items() if array.dims[:1] == ("item",)}
        names = _known_layers(layers, arrays, "the dataset")
        labels = _labels_of(data)
        return [_array_rows(name, arrays[name].data, len(labels)) for name in names], labels, []
    if hasattr(data, "dims"):
        array: Any = data  # of xarray
        if array.dims[:1] != ("item",):
            raise FeatureStoreError(
                f"the xarray array has the dimensions {', '.join(map(str, array.dims))}; the first has to be item: "
                '`data.transpose("item", ...)`.'
            )
        labels = _labels_of(data)
        name = str(array.name or "activations")
        return (
            [_array_rows(name, array.data, len(labels)) for name in _known_layers(layers, [name], "the array")],
            labels,
            [],
        )
    if not hasattr(data, "shape") or hasattr(data, "iloc") or items is None:
        raise FeatureStoreError(
            f"a query is asked of a store, of an xarray dataset, or of an array with its `items` (face, view); got "
            f"{type(data).__name__}{'' if items is None else ' with items'}."
        )
    name = (layers or ["activations"])[0]
    labels = _labels_of(items)
    if len(labels) != data.shape[0]:
        raise FeatureStoreError(
            f"`items` has {len(labels)} rows, and the array {data.shape[0]}. They have to be in the same order."
        )
    return [_array_rows(name, data, len(labels))], labels, []


def _labels_of(items: Any) -> pd.DataFrame:
    """Metadata by (face_id, view) of an xarray object's dimension ``item``, of a table, or of a list of keys."""
    if hasattr(items, "coords"):
        if "face_id" not in items.coords or "view" not in items.coords:
            raise FeatureStoreError("the xarray object has no coordinates face_id and view along its dimension item.")
        columns = {name: one.values for name, one in items.coords.items() if one.dims == ("item",) and name != "item"}
        table = pd.DataFrame({str(name): values for name, values in columns.items()})
    elif isinstance(items, pd.DataFrame):
        table = items.reset_index() if items.index.names[0] else items
    elif isinstance(items, pd.MultiIndex) and set(KEY) <= set(items.names):
        table = items.to_frame(index=False)
    else:
        pairs = list(items)
        wrong = [pair for pair in pairs if not (isinstance(pair, tuple | list) and len(pair) == 2)]
        if wrong:
            raise FeatureStoreError(f"`items` are (face, view) pairs or a table; got {listing(map(repr, wrong), 2)}.")
        table = pd.DataFrame([tuple(pair) for pair in pairs], columns=list(KEY))
    absent = [name for name in KEY if name not in table]
    if absent:
        raise FeatureStoreError(f"`items` has no column {absent[0]}; it has {listing(table.columns, 12)}.")
    return table.astype(dict.fromkeys(KEY, str)).set_index(list(KEY))


def _array_rows(name: str, array: Any, n: int) -> LayerRows:
    return LayerRows(name, tuple(array.shape[1:]), ArrayReader(array), np.arange(n), np.empty(0, object))


def _known_layers(layers: list[str] | None, there: Iterable[str], where: str) -> list[str]:
    known = list(there)
    unknown = [name for name in layers or () if name not in known]
    if unknown:
        raise FeatureStoreError(f"{where} has no layer {listing(unknown)}. {near_matches(unknown[0], known)}")
    return known if layers is None else list(dict.fromkeys(layers))


def _stored(
    store: FeatureStore, layers: list[str] | None, sources: list[str] | None
) -> tuple[list[LayerRows], pd.DataFrame, list[str]]:
    chosen = [store.source(name) for name in sources] if sources else [store.source(name) for name in store.sources]
    chosen = list({source.name: source for source in chosen}.values())
    if not chosen:
        store.source()  # says that it is empty
    there = dict.fromkeys(name for source in chosen for name in source.layers)
    wanted = _known_layers(layers, there, " and ".join(map(str, sources)) if sources else str(store.path))
    chosen = [source for source in chosen if source.layers.keys() & set(wanted)]
    masks = shared_items(chosen)
    first = np.flatnonzero(masks[0])
    labels = chosen[0].items.iloc[first]
    notes = [
        f"{int((~mask).sum())} items of {source.name} that not all sources share"
        for source, mask in zip(chosen, masks, strict=True)
        if not mask.all()
    ]
    rows = [first, *(source.find(labels.index) for source in chosen[1:])]
    backbones = [source.attributes["backbone"] for source in chosen]
    made = []
    for source, numbers in zip(chosen, rows, strict=True):
        prefix = source.attributes["backbone"] if backbones.count(source.attributes["backbone"]) == 1 else source.name
        for name in wanted if layers else source.layers:
            if name in source.layers:
                layer = source.layers[name]
                held = sum(name in other.layers for other in chosen)
                reader = StoredReader(layer, source.opened)
                full = name if held == 1 else f"{prefix}: {name}"
                made.append(LayerRows(full, layer.shape, reader, numbers, np.empty(0, object)))
    return made, labels, notes


def shared_items(sources: list[Source]) -> list[np.ndarray]:
    """Of each source, bool per item: whether all the others have the same photograph under its key."""
    if len(sources) == 1:
        return [np.ones(sources[0].n_items, bool)]
    photographs = []
    for source in sources:
        source.require_unique_keys()
        hashes = source.coordinate("image_sha256")
        photographs.append([
            (*key, digest) if digest else None for key, digest in zip(source.keys, hashes, strict=True)
        ])  # fmt: skip
    common = set.intersection(*map(set, photographs)) - {None} if photographs else set()
    if sources and not common:
        raise FeatureStoreError(
            f"{listing(source.name for source in sources)} have no photograph in common, so they cannot be compared. Choose one "
            "with `sources`, or cache the same photographs in all."
        )
    return [np.array([photograph in common for photograph in of], bool) for of in photographs]
