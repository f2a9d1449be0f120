"""Open a store and ask it: sources, items, layers, rows.

    store = FeatureStore.open("store/demo.zarr")
    rows = store.rows("maxp_5_3")
    batch = rows.gather(store.find([("s12", "3"), ("s12", "10")]))

A store holds one group per source: backbone + weights + recipe + precision. With several, name the one you mean where it
is not clear from the layer.
"""

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.files import OpenFolder
from featurestore.keys import FLIPPED, KEY, place_columns
from featurestore.remote.mirror import local_store, mirror_of
from featurestore.store.contents import contents_of
from featurestore.store.coordinates import read_coordinate
from featurestore.store.mirrored import refresh
from featurestore.store.zarr_format import METADATA, Layer, read_document, source_names
from featurestore.text import in_natural_order, listing, natural_order, near_matches, with_urls

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

    from featurestore.store.rows import Rows

Part: TypeAlias = "str | SupportsIndex"  # of a key: an integer stands for its digits
Keys: TypeAlias = "str | tuple[Part, Part] | Iterable[tuple[Part, Part] | str] | pd.MultiIndex | pd.DataFrame"


class Source:
    """One group of a store, as it was when opened: items, and the layers one network made of them.

    What is read after the source has been rewritten (items removed or renamed) raises FeatureStoreError, since row numbers
    may mean other items by then; items that are appended change nothing. ``Rows`` that were made before stay as they are.
    ``attributes`` say backbone, weights, recipe, precision, library versions and licence. ``layers`` maps names to
    ``Layer`` (shape, dtype, compression) in the order they were added.
    """

    def __init__(self, store: Path, name: str) -> None:
        self.name = name
        self.folder = store / name
        self.opened = OpenFolder(
            self.folder
        )  # before its document is read: what follows belongs to this folder or is refused
        with self.opened.unchanged():
            document = read_document(self.folder)
        try:
            contents = contents_of(document, self.folder)
        except FeatureStoreError as error:
            raise FeatureStoreError(
                f"{self.folder / METADATA} is damaged or was written by another program: {error}. "
                f"Restore it: pipelines/verify_store.py {store} --repair"
            ) from None
        self.attributes, self.n_items, self.version = contents.attributes, contents.n_items, contents.version
        if self.version == 1 and mirror_of(store) is not None:
            raise FeatureStoreError(
                f"{self.folder} has format version 1, which is read from a disk alone. Copy it to one and upgrade it there: "
                "pipelines/upgrade_store.py STORE"
            )
        self.coordinates, self.layers, self.foreign = contents.coordinates, contents.layers, contents.foreign

    def __repr__(self) -> str:
        return f"<Source {self.name}: {self.n_items} items, {len(self.layers)} layers ({', '.join(self.layers)})>"

    @cached_property
    def keys(self) -> pd.MultiIndex:
        """(face_id, view) of every item, in row order."""
        return pd.MultiIndex.from_arrays([self.coordinate(name) for name in KEY], names=KEY)

    @cached_property
    def items(self) -> pd.DataFrame:
        """One row per item in row order, indexed by (face_id, view): path, image_sha256 and the user's metadata."""
        columns = {name: self.coordinate(name) for name in self.coordinates if name not in KEY}
        return pd.DataFrame(columns, index=self.keys)

    def coordinate(self, name: str) -> np.ndarray:
        """One coordinate's values, (n_items,): an object array of str, or numbers."""
        document = self.coordinates[name]
        with self.opened.unchanged():
            return read_coordinate(self.folder / name, document, document["data_type"], self.digests(name))

    def digests(self, name: str) -> list[int] | None:
        """crc32c of each chunk of a coordinate, as the source's document says them; None in format version 1."""
        return self.attributes["digests"][name] if self.version > 1 else None

    @property
    def weights(self) -> str:
        """The weights' name; random ones are called so."""
        name = self.attributes.get("weights_name", self.attributes["weights"])
        random = self.attributes["weights"].startswith("seed:")
        return f"{name} (random numbers, not a trained network)" if random else name

    @cached_property
    def originals(self) -> np.ndarray:
        """(n_items,) int64: of each item, the first row with the same photograph, its own if there is no other.

        The same photograph is an equal ``image_sha256`` and, where faces were cut out, an equal box (equal landmarks); mirrored
        (``|flipped``) it is another. An item whose hash is not known (empty while it is recomputed, or zeros) is the same as
        no other.
        """
        return self._first_of_photograph(mirrored_is_another=True)

    @cached_property
    def photographs(self) -> np.ndarray:
        """As ``originals``, with a photograph and its mirror image taken for the same: nearly one picture, to a network."""
        return self._first_of_photograph(mirrored_is_another=False)

    def _first_of_photograph(self, mirrored_is_another: bool) -> np.ndarray:
        names = [
            name for name in ("image_sha256", *place_columns(self.attributes.get("recipe"))) if name in self.coordinates
        ]
        table = pd.DataFrame({name: self.coordinate(name) for name in names}, index=self.keys)
        return first_of_photograph(table, mirrored_is_another)

    def find(
        self,
        keys: "Keys | None" = None,
        columns: Mapping[str, str] | None = None,
        *,
        face: "str | Iterable[str] | None" = None,
    ) -> np.ndarray:
        """Row numbers (int64) of items, many at once, in the order asked for.

        ``keys``: (face, view) pairs, as a list, one alone, a MultiIndex or a DataFrame; or faces, ``"s12"`` or
        ``["s12", "s13"]``, for all their views in natural order, which ``face`` says too. An integer stands for its digits:
        (12, 3) for ("12", "3").
        ``columns`` says where a DataFrame with other names has them: ``{"face_id": "head", "view": "angle"}``.
        FeatureStoreError names the keys that are not there, and those near them that are.
        """
        self.require_unique_keys()
        if (keys is None) == (face is None):
            raise FeatureStoreError("items are found by `keys`, (face, view) pairs, or by `face`; give one of the two.")
        if keys is None:
            return self._rows_of([face] if isinstance(face, str) else [str(name) for name in face or ()])
        if not isinstance(keys, tuple | pd.MultiIndex | pd.DataFrame):
            keys = [keys] if isinstance(keys, str) else list(keys)
            faces = [key for key in keys if isinstance(key, str)]
            if faces and len(faces) == len(keys):
                return self._rows_of(faces)
        wanted = _key_index(keys, columns or {})
        rows = self.keys.get_indexer(wanted)
        if (rows < 0).any():
            missing = wanted[rows < 0]
            raise FeatureStoreError(
                f"{len(missing)} of {len(wanted)} keys are not in {self.folder}: {listing(missing, 3)}. "
                f"{self._hint(*missing[0])}"
            )
        return np.asarray(rows, np.int64)

    def _rows_of(self, faces: Sequence[str]) -> np.ndarray:
        groups = self._views.groupby("face_id", sort=False).indices
        unknown = [face for face in faces if face not in groups]
        if unknown:
            raise FeatureStoreError(
                f"{len(unknown)} of {len(faces)} faces are not in {self.folder}: {listing(unknown, 3)}. {self._hint(unknown[0])}"
            )
        views = self._views["view"].to_numpy(object)
        parts = [sorted(groups[face].tolist(), key=lambda row: natural_order(views[row])) for face in faces]
        return np.array([row for part in parts for row in part], np.int64)

    def _hint(self, face: str, view: str | None = None) -> str:
        """What is near a face, or a view of one, that is not there."""
        known = self._views[self._views["face_id"] == face]["view"]
        if not len(known) or view is None:
            faces = in_natural_order(set(self._views["face_id"]))
            return f"There is no face {face!r}. {near_matches(face, faces, f'There are {listing(faces)}.')}"
        views = in_natural_order(known)
        return f"Face {face!r} has no view {view!r}; {near_matches(view, views, f'it has {listing(views, 12)}.')}"

    @cached_property
    def _views(self) -> pd.DataFrame:
        return self.keys.to_frame(index=False)

    def require_unique_keys(self) -> None:
        """FeatureStoreError if a key is there twice: a row could not be identified by its key."""
        if not self.keys.is_unique:
            repeated = self.keys[self.keys.duplicated()]
            raise FeatureStoreError(
                f"{self.folder} holds {listing(repeated, 3)} twice, so its rows cannot be identified by key. It was not written "
                "by this program; cache the source again."
            )

    def layer(self, name: str) -> Layer:
        """The layer of that name; FeatureStoreError with the command that adds it."""
        if name not in self.layers:
            raise FeatureStoreError(
                f"layer {name!r} is not in {self.folder}; it holds {', '.join(self.layers) or 'no layers'}. "
                f"Add it: pipelines/cache_layers.py --layers {name}, with the images and store of the first run."
            )
        return self.layers[name]

    def rows(self, layer: str, verify: bool = False) -> "Rows":
        """Memory-mapped rows of one layer. With ``verify`` each is checked, whenever it is gathered, to be its item's."""
        from featurestore.store.remote_rows import open_rows  # opening a store and reading its keys needs no torch

        with self.opened.unchanged():
            return open_rows(self.layer(layer), self.find, verify)

    def dask(self, layer: str) -> "da.Array":
        """The layer as a lazy Dask array (item, *shape); rows that are not cached are NaN."""
        from featurestore.store.lazy import dask_array  # Dask is loaded by those who ask for it

        return dask_array(self.layer(layer), self.opened)

    def xarray(self) -> "xr.Dataset":
        """Items as coordinates and every layer as a lazy variable; ``ds.sel(face_id="s12", view="3")`` chooses items."""
        from featurestore.store.lazy import dataset

        return dataset(self.items, self.layers, self.attributes, self.opened)


class FeatureStore:
    """A folder of sources. Everything a source can be asked, the store answers when it holds only one."""

    def __init__(self, path: Path, sources: Mapping[str, Source]) -> None:
        self.path = path
        self.sources = dict(sources)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> "FeatureStore":
        """Open for reading. FeatureStoreError if ``path`` is missing, is no store, or has another format version.

        ``path`` may be a URL (``s3://``, ``gs://``, ``az://``, ``http(s)://``). Its rows are then read by byte ranges; with
        ``cache``, a folder of this machine, whole shards are fetched into it once and mapped, and of the shards that several
        processes and stores keep there the least recently used are removed beyond ``cache_bytes`` (50 GiB). The environment
        says both by ``FEATURESTORE_CACHE_DIR`` and ``FEATURESTORE_CACHE_BYTES``.
        """
        root = local_store(path, cache=cache, cache_bytes=cache_bytes)
        mirror = mirror_of(root)
        if mirror is not None:
            refresh(mirror)
        try:
            if not root.exists():
                raise FeatureStoreError(f"there is no store {root}. Make it: pipelines/cache_layers.py --store {root}")
            read_document(root)
            return cls(root, {name: Source(root, name) for name in source_names(root)})
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            raise FeatureStoreError(f"{root} cannot be read: {getattr(error, 'strerror', None) or error}.") from None

    def __repr__(self) -> str:
        return f"<FeatureStore {with_urls(str(self.path))}: {', '.join(map(repr, self.sources.values())) or 'empty'}>"

    def source(self, name: str | None = None, layers: Iterable[str] = ()) -> Source:
        """The source of that name, or the only one whose name begins so. Without a name: the only one that holds ``layers``.

        A store of one source answers with it whatever ``layers`` are. FeatureStoreError for a name that is not there, for
        layers that no source holds, and, naming the sources in question, where several hold them.
        """
        if not self.sources:
            raise FeatureStoreError(
                f"{self.path} holds no source yet. Fill it: pipelines/cache_layers.py --store {self.path}"
            )
        if name is None:
            return self._only_source(list(layers))
        found = [source for full, source in self.sources.items() if full.startswith(name)]
        if name in self.sources:
            return self.sources[name]
        if len(found) > 1:
            names = ", ".join(each.name for each in found)
            raise FeatureStoreError(f"{len(found)} sources of {self.path} begin with {name!r}, so say which: {names}.")
        if not found:
            raise FeatureStoreError(f"{self.path} has no source {name!r}. {near_matches(name, self.sources)}")
        return found[0]

    def _only_source(self, layers: list[str]) -> Source:
        if len(self.sources) == 1:
            return next(iter(self.sources.values()))
        found = [source for source in self.sources.values() if source.layers.keys() >= set(layers)]
        if len(found) == 1:
            return found[0]
        if not found:
            known = {name: None for source in self.sources.values() for name in source.layers}
            unknown = [name for name in layers if name not in known]
            hint = near_matches(unknown[0], known) if unknown else "Ask for those of one source at a time."
            what = listing(unknown) if unknown else f"{listing(layers)} together"
            raise FeatureStoreError(f"no source of {self.path} holds {what}. {hint}")
        what = f"of {self.path} hold {listing(layers)}" if layers else f"are in {self.path}"
        names = ", ".join(source.name for source in found)
        raise FeatureStoreError(f"{len(found)} sources {what}, so say which: `source`, one of {names}.")

    @property
    def items(self) -> pd.DataFrame:
        """The only source's items; see ``Source.items``."""
        return self.source().items

    @property
    def layers(self) -> dict[str, Layer]:
        """The only source's layers."""
        return self.source().layers

    def find(
        self,
        keys: "Keys | None" = None,
        source: str | None = None,
        layer: str | None = None,
        columns: Mapping[str, str] | None = None,
        *,
        face: "str | Iterable[str] | None" = None,
    ) -> np.ndarray:
        """Row numbers of items; see ``Source.find``. They are those of ``source``, or of the only one that holds ``layer``.

        Neither has to be given where all sources hold the same items in the same order.
        """
        sources = list(self.sources.values())
        if (
            source is None
            and layer is None
            and sources
            and all(sources[0].keys.equals(other.keys) for other in sources[1:])
        ):
            return sources[0].find(keys, columns, face=face)
        return self.source(source, [layer] if layer else ()).find(keys, columns, face=face)

    def rows(self, layer: str, source: str | None = None, verify: bool = False) -> "Rows":
        """Memory-mapped rows; see ``Source.rows``. Without ``source``: of the only source that holds the layer."""
        return self.source(source, [layer]).rows(layer, verify)

    def dask(self, layer: str, source: str | None = None) -> "da.Array":
        """A lazy Dask array; see ``Source.dask``. Without ``source``: of the only source that holds the layer."""
        return self.source(source, [layer]).dask(layer)

    def xarray(self, source: str | None = None) -> "xr.Dataset":
        """A lazy xarray dataset; see ``Source.xarray``."""
        return self.source(source).xarray()


def first_of_photograph(items: pd.DataFrame, mirrored_is_another: bool) -> np.ndarray:
    """(n,) int64: of each item the first with the same photograph, its own place if there is no other or its hash is not known.

    ``items``, by (face_id, view), have the columns that tell photographs apart: image_sha256 (without it all differ), and those
    of a box or landmarks.
    """
    own = np.arange(len(items))
    if "image_sha256" not in items:
        return own
    views = items.index.get_level_values("view")
    table = items.reset_index(drop=True).assign(
        flipped=[mirrored_is_another and view.endswith(FLIPPED) for view in views]
    )
    group = table.groupby(list(table.columns), sort=False, dropna=False).ngroup().to_numpy()
    _, first, group = np.unique(group, return_index=True, return_inverse=True)
    unknown = table["image_sha256"].isna() | table["image_sha256"].isin(["", "0" * 64])
    return np.where(unknown, own, first[group]).astype(np.int64)


def _key_index(keys: Keys, columns: Mapping[str, str]) -> pd.MultiIndex:
    if isinstance(keys, pd.DataFrame):
        names = [columns.get(name, name) for name in KEY]
        absent = [name for name in names if name not in keys]
        if absent or not columns.keys() <= set(KEY):
            raise FeatureStoreError(
                f"the table has no column {listing(absent) or listing(columns)}; it has {listing(keys.columns, 12)}. "
                'Say which are meant: `columns` {"face_id": …, "view": …}.'
            )
        parts = [keys[name] for name in names]
    elif isinstance(keys, pd.MultiIndex) and keys.nlevels == 2:
        parts = [keys.get_level_values(level) for level in range(2)]
    else:
        pairs: list[Any] = [keys] if isinstance(keys, tuple) else list(keys)
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise FeatureStoreError(
                f"keys are (face, view) pairs, such as ('s12', '3'), or faces alone, such as 's12'; got {listing(pairs, 2)}."
            )
        parts = [pd.Series([pair[i] for pair in pairs], dtype=object) for i in range(2)]
    return pd.MultiIndex.from_arrays([_as_text(part) for part in parts], names=KEY)


def _as_text(parts: "pd.Series | pd.Index") -> np.ndarray:
    """(n,) object: strings, of integers their digits."""
    values: np.ndarray = parts.to_numpy(object)
    if pd.api.types.infer_dtype(values, skipna=False) == "string":
        return values
    wrong = [
        part for part in values if not isinstance(part, str | numbers.Integral) or isinstance(part, bool | np.bool)
    ]
    if wrong:
        raise FeatureStoreError(
            f"keys are (face, view) pairs of strings, or of integers; {wrong[0]!r} is {type(wrong[0]).__name__}. A number with "
            "a point could be written in several ways: give the string as it is in the store."
        )
    return np.array([str(part) for part in values], object)
