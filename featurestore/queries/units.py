"""Statistics of the units of a layer, their names, and the units that go with a trait: streamed in blocks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from featurestore.errors import FeatureStoreError
from featurestore.queries.blocks import MEMORY, block_rows, computed, task
from featurestore.queries.moments import all_moments, face_moments, moment_rows, subset
from featurestore.queries.selection import Data, Items, LayerRows, Names, Selection, groups, select
from featurestore.store.zarr_format import DIMENSIONS
from featurestore.text import listing, near_matches

METHODS = ("spearman", "pearson")

_RANKED_AT_ONCE = 64  # units: SciPy holds some ten numbers for each one that it ranks
_READ_AT_ONCE = 32 << 20  # bytes of whole rows, of which a few units are kept


def unit_statistics(
    data: Data,
    layer: str | None = None,
    *,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> xr.Dataset:
    """Of each unit of one layer: its statistics over items, and how much of its variance is between faces.

    Variables, each of the layer's shape (channel, y, x), (token, feature) or (feature,): mean and spread (standard deviation)
    float64; dead (bool): the same for all items; between_faces and within_faces (float64): the variance of the faces' means
    and the mean variance within faces, both weighted by items, which add up to spread² (law of total variance);
    share_between (0 … 1): between_faces of their sum, NaN where the unit is dead. Variances are divided by the number of items.
    Faces of one item have no variance within: with no others, share_between is 1 and says nothing.

    Attributes: layer, items, faces, left_out. Options are those of ``rdm``, and so are the errors; FeatureStoreError for more
    than one layer and fewer than two items. Items are read face by face, each once.
    """
    chosen, rows = one_layer(
        select(data, layer, sources=sources, where=where, items=items).require(2, "a variance"), "these"
    )
    faces = pd.factorize(chosen.labels.index.get_level_values("face_id"))[0]
    bounds = np.flatnonzero(np.diff(np.sort(faces), prepend=-1, append=len(faces)))
    moments = face_moments(subset(rows, np.argsort(faces, kind="stable")), bounds, memory)
    total = moments.within + moments.between
    share = np.full(rows.features, np.nan)
    np.divide(moments.between, total, out=share, where=~moments.dead & (total > 0))
    found = {
        "mean": moments.mean,
        "spread": np.sqrt(total / moments.n),
        "dead": moments.dead,
        "between_faces": moments.between / moments.n,
        "within_faces": moments.within / moments.n,
        "share_between": share,
    }
    dimensions = unit_dimensions(rows.shape)
    variables = {name: (dimensions, values.reshape(rows.shape)) for name, values in found.items()}
    attributes = {"layer": rows.name, "items": len(rows), "faces": len(bounds) - 1, "left_out": list(chosen.notes)}
    return xr.Dataset(variables, attrs=attributes)


def unit_dimensions(shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the axes of one item: those of a store's layers, and ``axis_0`` … where an array has more axes than these."""
    return DIMENSIONS.get(len(shape), tuple(f"axis_{i}" for i in range(len(shape))))


def unit_name(unit: int | Sequence[int], shape: Sequence[int]) -> str:
    """``"channel 3, y 2, x 5"`` or ``"feature 17"``: a unit of a layer of that shape, by its flat number or by its index.

    FeatureStoreError if the layer has no such unit.
    """
    flat = isinstance(unit, int | np.integer)
    index = np.atleast_1d(np.asarray(unit))
    limits = [int(np.prod(shape))] if flat else list(shape)
    if len(index) != len(limits) or not ((index >= 0) & (index < limits)).all():
        raise FeatureStoreError(
            f"a layer of shape {tuple(shape)} has no `unit` {unit!r}: give a number from 0 to {int(np.prod(shape)) - 1}, or a "
            "number for each axis."
        )
    place = np.unravel_index(int(index[0]), tuple(shape)) if flat else index
    return ", ".join(f"{name} {int(i)}" for name, i in zip(unit_dimensions(shape), place, strict=True))


def units_with_trait(
    data: Data,
    layer: str | None,
    trait: "str | pd.Series",
    *,
    method: str = "spearman",
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> pd.DataFrame:
    """Correlation of each unit of one layer with a trait, the least probable first.

    ``trait`` is a numeric column of metadata, or numbers indexed by face_id or by (face_id, view). One that is the same for
    all items of each face is the face's: units are then averaged over its items, and faces are counted, not items. ``method``
    is ``spearman`` (ranks, ties averaged) or ``pearson``.

    Columns: unit (its flat number, int64; ``unit_name`` names it), its index along each of ``unit_dimensions``, r (-1 … 1),
    p (two-sided, of no correlation: that of ``scipy.stats.pearsonr``, for Spearman of ``spearmanr``) and q (p adjusted for the
    number of units by Benjamini & Hochberg 1995). Units that are the same throughout are left out. ``attrs``: layer, trait,
    method, over (``faces`` or ``items``), n, dead (how many units are left out), without_trait (faces or items left out because
    it is missing), left_out.

    Spearman reads all rows once for each block of units that fits into ``memory``. Options are those of ``rdm``, and so are the
    errors; FeatureStoreError for more than one layer, an unknown trait or method, and a trait that is not numeric, the same for
    all, infinite, or known of fewer than three.
    """
    if method not in METHODS:
        raise FeatureStoreError(f"there is no `method` {method!r}. {near_matches(method, METHODS)}")
    chosen, rows = one_layer(select(data, layer, sources=sources, where=where, items=items), "correlations")
    name, per_item = _trait_of_items(trait, chosen.labels)
    rows, values, over = _with_trait(rows, chosen.labels, per_item)
    known = np.flatnonzero(~np.isnan(values))
    _require_trait(values[known], name, over)
    weights = _standardised(stats.rankdata(values[known]) if method == "spearman" else values[known])
    correlate = _spearman if method == "spearman" else _pearson
    table = _correlation_table(correlate(subset(rows, known), weights, memory), len(known), rows.shape)
    table.attrs = {"layer": rows.name, "trait": name, "method": method, "over": over, "n": len(known)}
    table.attrs |= {"dead": rows.features - len(table), "without_trait": len(values) - len(known)}
    table.attrs["left_out"] = list(chosen.notes)
    return table


def one_layer(chosen: Selection, what: str) -> tuple[Selection, LayerRows]:
    """The selection and its only layer; FeatureStoreError if it has several, of which ``what`` cannot be."""
    if len(chosen.layers) > 1:
        raise FeatureStoreError(
            f"{what} are of one layer; this would be {listing(each.name for each in chosen.layers)}. Name one `layer`, and "
            "one of `sources` if several hold it."
        )
    return chosen, chosen.layers[0]


def _trait_of_items(trait: "str | pd.Series", labels: pd.DataFrame) -> tuple[str, pd.Series]:
    """A name for the trait, and its value (float64) for each item, NaN where it is missing."""
    if isinstance(trait, str):
        if trait not in labels:
            known = [str(name) for name in labels if pd.api.types.is_numeric_dtype(labels[name])]
            near = near_matches(trait, known) if known else "They have no numeric column: give a Series of numbers."
            raise FeatureStoreError(f"items have no column {trait!r} for `trait`. {near}")
        return trait, _numbers(labels[trait], trait)
    if not isinstance(trait, pd.Series):
        raise FeatureStoreError(
            f"`trait` is the name of a column or a Series indexed by face_id or by (face_id, view), not {type(trait).__name__}."
        )
    name = "trait" if trait.name is None else str(trait.name)
    return name, _by_item(_numbers(trait, name), name, labels.index)


def _numbers(values: pd.Series, name: str) -> pd.Series:
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_complex_dtype(values):
        held = listing(map(repr, values.dropna().unique()), 3) or "nothing"
        raise FeatureStoreError(
            f"`trait` {name!r} is not numeric: it holds {held}. Give numbers, or compare its groups by `mean`."
        )
    return pd.Series(values.to_numpy(float, na_value=np.nan), values.index)


def _by_item(trait: pd.Series, name: str, index: pd.MultiIndex) -> pd.Series:
    """The value of each item's face, or of each item, as the trait's index has one level or two."""
    levels = trait.index.nlevels
    if levels > 2:
        raise FeatureStoreError(
            f"`trait` {name!r} is indexed by {levels} levels; it needs face_id, or face_id and view."
        )
    keys = pd.Index([str(key) if levels == 1 else tuple(map(str, key)) for key in trait.index])
    if not keys.is_unique:
        raise FeatureStoreError(
            f"`trait` {name!r} has two numbers for {keys[keys.duplicated()][0]!r}. Give one for each."
        )
    wanted = index.get_level_values("face_id") if levels == 1 else index
    found = trait.set_axis(keys).reindex(wanted).set_axis(index)
    if not wanted.isin(keys).any():
        raise FeatureStoreError(
            f"`trait` {name!r} is of none of the items: it is indexed by {listing(keys, 3)}, and the items "
            f"{'are of' if levels == 1 else 'are'} {listing(wanted.unique(), 3)}."
        )
    return found


def _with_trait(rows: LayerRows, labels: pd.DataFrame, trait: pd.Series) -> tuple[LayerRows, np.ndarray, str]:
    """The rows that the trait is one number of: the faces' means if it does not vary within any face, else the items."""
    values = trait.to_numpy()
    if trait.groupby(level="face_id", sort=False).nunique(dropna=False).max() > 1:
        return rows, values, "items"
    faces = groups(labels, "face")
    chosen = tuple(np.asarray(rows.rows)[places] for places in faces.values())
    names = np.array(list(faces), object)
    return replace(rows, rows=chosen, names=names), values[[places[0] for places in faces.values()]], "faces"


def _require_trait(values: np.ndarray, name: str, over: str) -> None:
    if len(values) < 3:
        raise FeatureStoreError(
            f"`trait` {name!r} is known of {len(values)} {over}, and a correlation needs at least 3. Choose a wider `where`."
        )
    if not np.isfinite(values).all():
        raise FeatureStoreError(
            f"`trait` {name!r} is infinite for {int(np.isinf(values).sum())} {over}. Leave them out."
        )
    if values.min() == values.max():
        raise FeatureStoreError(
            f"`trait` {name!r} is {values[0]:g} for all {len(values)} {over}, so nothing goes with it. Choose a wider `where`."
        )


def _standardised(values: np.ndarray) -> np.ndarray:
    """Of mean 0 and length 1, float64."""
    centred = values - values.mean()
    return np.asarray(centred / np.linalg.norm(centred))


def _pearson(layer: LayerRows, weights: np.ndarray, memory: str | int) -> np.ndarray:
    """r of each unit with ``weights`` (of mean 0 and length 1), NaN where it is dead."""
    moments = all_moments(layer, moment_rows(layer, memory), memory, weights)
    return _ratio(moments.products, np.where(moments.dead, 0, np.sqrt(moments.within)))


def _spearman(layer: LayerRows, weights: np.ndarray, memory: str | int) -> np.ndarray:
    """As ``_pearson``, of the units' ranks."""
    n, features = len(layer), layer.features
    size = int(np.clip(_READ_AT_ONCE // (12 * features), 1, n))
    fixed = size * 12 * features + 64 * n * min(_RANKED_AT_ONCE, features)
    width = block_rows(features, memory, 4 * n, fixed=fixed)
    starts = range(0, features, width)
    tasks = [task(_rank_correlations, layer, weights, slice(start, start + width), size) for start in starts]
    return np.concatenate(computed(tasks))


def _rank_correlations(layer: LayerRows, weights: np.ndarray, units: slice, size: int) -> np.ndarray:
    values = np.concatenate([block.load()[:, units].T.copy() for block in layer.blocks(size)], axis=1)
    found = []
    for start in range(0, len(values), _RANKED_AT_ONCE):
        ranks = stats.rankdata(values[start : start + _RANKED_AT_ONCE], axis=1)
        ranks -= (len(layer) + 1) / 2
        found.append(_ratio(ranks @ weights, np.sqrt(np.einsum("ij,ij->i", ranks, ranks))))
    return np.concatenate(found)


def _ratio(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    r = np.full(len(products), np.nan)
    np.divide(products, lengths, out=r, where=lengths > 0)
    return np.asarray(np.clip(r, -1, 1))


def _correlation_table(r: np.ndarray, n: int, shape: tuple[int, ...]) -> pd.DataFrame:
    units = np.flatnonzero(~np.isnan(r))
    r = r[units]
    p = np.minimum(1, 2 * stats.beta.sf(np.abs(r), n / 2 - 1, n / 2 - 1, loc=-1, scale=2))
    index = np.unravel_index(units, shape) if shape else ()
    columns = {"unit": units, **dict(zip(unit_dimensions(shape), index, strict=True)), "r": r, "p": p}
    columns["q"] = stats.false_discovery_control(p) if len(p) else p
    order = np.lexsort((-np.abs(r), p))
    return pd.DataFrame(columns).iloc[order].reset_index(drop=True)
