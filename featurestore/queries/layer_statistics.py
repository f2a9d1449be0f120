"""Statistics of layers and of their units, mean activations, and the units that go with a trait: each streamed in blocks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from featurestore.errors import FeatureStoreError
from featurestore.queries.blocks import MEMORY, block_rows, computed, parsed_bytes, task, workers
from featurestore.queries.selection import Block, Data, Items, LayerRows, Names, Selection, groups, select
from featurestore.text import listing, near_matches

METHODS = ("spearman", "pearson")

_DIMENSIONS = {
    1: ("feature",),
    2: ("token", "feature"),
    3: ("channel", "y", "x"),
}  # without the sizes that a store adds
_MOST_TASKS = 32  # whose results, each of the size of a layer, are held at once
_RANKED_AT_ONCE = 64  # units: SciPy holds some ten numbers for each one that it ranks
_MOMENT_BYTES = 5 * 8  # of a unit
_READ_AT_ONCE = 32 << 20  # bytes of whole rows, of which a few units are kept


def statistics(
    data: Data,
    layers: Names = None,
    *,
    by: str | None = None,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> pd.DataFrame:
    """A row for each layer, and for each group of items within it if ``by`` is ``"face"``, ``"view"`` or a column of metadata.

    Columns: layer; group (text, only with ``by``); items and units (int64); mean and spread (standard deviation) over all
    numbers; spread_over_items: the root of the units' mean variance over items; sparsity: the share (0 … 1) of numbers that are
    exactly zero; lifetime_sparseness (0 … 1): of each unit 1 less (mean)²/(mean of squares), over 1 - 1/items, averaged over
    the units that are not zero throughout (Treves & Rolls 1991; Vinje & Gallant 2000); dead (Int64): units that are the same
    for all items; effective_dimension (1 … items - 1): the participation ratio (Σλ)²/Σλ² of the eigenvalues of the covariance
    over items. Floats are float64; variances are divided by the number of items.

    What describes differences between items is missing where there are fewer than two: spread_over_items, lifetime_sparseness,
    dead and effective_dimension. The last is also NaN where all units are dead, and lifetime_sparseness where numbers are below
    zero (it is of rates) or all zero. The groups are described, not averaged; ``attrs["left_out"]`` says what ``select`` left
    out. Other options are those of ``rdm``, and so are the errors.

    Σλ² is the sum of squares of the products of all pairs of items, so that the time is quadratic in the items (of a group) and
    memory depends neither on their number nor on the square of the units'.
    """
    chosen = select(data, layers, sources=sources, where=where, items=items)
    parts = groups(chosen.labels, by) if by else {"": np.arange(len(chosen))}
    rows: list[dict[str, Any]] = []
    for layer in chosen.layers:
        found = _descriptions([_subset(layer, places) for places in parts.values()], memory)
        for name, described in zip(parts, found, strict=True):
            rows.append({"layer": layer.name} | ({"group": name} if by else {}) | described)
    table = pd.DataFrame(rows).astype({"dead": "Int64"})
    table.attrs["left_out"] = list(chosen.notes)
    return table


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
    chosen, rows = _one_layer(
        select(data, layer, sources=sources, where=where, items=items).require(2, "a variance"), "these"
    )
    faces = pd.factorize(chosen.labels.index.get_level_values("face_id"))[0]
    bounds = np.flatnonzero(np.diff(np.sort(faces), prepend=-1, append=len(faces)))
    moments = _face_moments(_subset(rows, np.argsort(faces, kind="stable")), bounds, memory)
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
    return _DIMENSIONS.get(len(shape), tuple(f"axis_{i}" for i in range(len(shape))))


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


def mean(
    data: Data,
    layer: str | None = None,
    *,
    by: str | None = None,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> xr.DataArray:
    """Mean activation of one layer, float32 (group, *shape) with ``by``, else (*shape): added up in float64.

    ``by`` is ``"face"``, ``"view"`` or a column of metadata. The coordinates ``group`` and ``items`` name the groups, in natural
    order, and count their items; the other dimensions are those of ``unit_statistics``. Attributes: layer, by, items, left_out.
    Each row is read once. Computing holds ``memory`` bytes at most beside the result. Options are those of ``rdm``, and so are
    the errors; FeatureStoreError for more than one layer.
    """
    chosen, rows = _one_layer(select(data, layer, sources=sources, where=where, items=items), "a mean")
    parts = groups(chosen.labels, by) if by else {"": np.arange(len(chosen))}
    codes = np.empty(len(chosen), np.int64)
    for code, places in enumerate(parts.values()):
        codes[places] = code
    values = _group_means(rows, codes, len(parts), memory).reshape(len(parts), *rows.shape)
    attributes = {"layer": rows.name, "by": by or "", "items": len(chosen), "left_out": list(chosen.notes)}
    dimensions = unit_dimensions(rows.shape)
    if not by:
        return xr.DataArray(values[0], dims=dimensions, name="mean", attrs=attributes)
    counts = np.array([len(places) for places in parts.values()])
    coordinates = {"group": np.array(list(parts), object), "items": ("group", counts)}
    return xr.DataArray(values, coordinates, ("group", *dimensions), "mean", attributes)


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
    chosen, rows = _one_layer(select(data, layer, sources=sources, where=where, items=items), "correlations")
    name, per_item = _trait_of_items(trait, chosen.labels)
    rows, values, over = _with_trait(rows, chosen.labels, per_item)
    known = np.flatnonzero(~np.isnan(values))
    _require_trait(values[known], name, over)
    weights = _standardised(stats.rankdata(values[known]) if method == "spearman" else values[known])
    correlate = _spearman if method == "spearman" else _pearson
    table = _correlation_table(correlate(_subset(rows, known), weights, memory), len(known), rows.shape)
    table.attrs = {"layer": rows.name, "trait": name, "method": method, "over": over, "n": len(known)}
    table.attrs |= {"dead": rows.features - len(table), "without_trait": len(values) - len(known)}
    table.attrs["left_out"] = list(chosen.notes)
    return table


def _one_layer(chosen: Selection, what: str) -> tuple[Selection, LayerRows]:
    if len(chosen.layers) > 1:
        raise FeatureStoreError(
            f"{what} are of one layer; this would be {listing(each.name for each in chosen.layers)}. Name one `layer`, and "
            "one of `sources` if several hold it."
        )
    return chosen, chosen.layers[0]


def _subset(layer: LayerRows, places: np.ndarray) -> LayerRows:
    block = layer.block(places)
    return replace(layer, rows=block.rows, names=block.names)


class _Moments(NamedTuple):
    """Of some items, for each unit (features,): what the moments of more items are made of.

    ``within`` and ``between`` are sums over items of squared differences: of the item to the mean of its face, and of that to
    the ``mean`` of all. ``products`` are Σ weight × value. All float64, but for ``least`` and ``most`` float32.
    """

    n: int
    mean: np.ndarray
    within: np.ndarray
    between: np.ndarray
    least: np.ndarray
    most: np.ndarray
    zeros: int
    products: np.ndarray

    @property
    def dead(self) -> np.ndarray:
        """bool: the same for all items."""
        return np.asarray(self.least == self.most)


def _moments(
    values: np.ndarray, starts: Sequence[int] | np.ndarray = (0,), weights: np.ndarray | None = None
) -> _Moments:
    """Of rows (n, features) float32, of which each face's begin at ``starts``.

    Leaves in ``values`` their differences to the mean of their face.
    """
    n, features = values.shape
    zeros = values.size - np.count_nonzero(values)
    least, most = values.min(axis=0), values.max(axis=0)
    faces = np.split(values, starts[1:])
    counts = np.array([len(face) for face in faces], float)
    means = np.stack([face.mean(axis=0, dtype=np.float64) for face in faces])
    whole = counts @ means / n
    for face, centre in zip(faces, means, strict=True):
        np.subtract(face, centre, out=face, casting="same_kind")  # in float64, rounded once
    within = np.einsum("ij,ij->j", values, values, dtype=np.float64)
    products = np.zeros(0)
    if (
        weights is not None
    ):  # of a single face: the differences are smaller numbers than the values, so that less is lost
        products = np.einsum("i,ij->j", weights, values, dtype=np.float64) + weights.sum() * whole
    if len(faces) == 1:
        between = np.zeros(features)
    else:
        means -= whole
        between = np.einsum("i,ij,ij->j", counts, means, means)
    return _Moments(n, whole, within, between, least, most, int(zeros), products)


def _merged(one: _Moments, other: _Moments, same_face: bool = True) -> _Moments:
    """Of the items of both (Chan, Golub & LeVeque 1983), which are one face's, or have no face in common."""
    n = one.n + other.n
    apart = other.mean - one.mean
    within, between = one.within + other.within, one.between + other.between
    added = apart**2 * (one.n * other.n / n)
    if same_face:
        within += added
    else:
        between += added
    return _Moments(
        n,
        one.mean + apart * (other.n / n),
        within,
        between,
        np.minimum(one.least, other.least),
        np.maximum(one.most, other.most),
        one.zeros + other.zeros,
        one.products + other.products,
    )


def _all_merged(parts: Iterable[_Moments], same_face: bool = True) -> _Moments:
    """One after the other, so that ``parts`` can be made as they are asked for."""
    return reduce(lambda one, other: _merged(one, other, same_face), parts)


def _span_moments(layer: LayerRows, start: int, stop: int, size: int, weights: np.ndarray | None = None) -> _Moments:
    """Of the rows from ``start`` to ``stop``, ``size`` at once, taken as one face's."""
    parts = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
    return _all_merged(
        _moments(layer.block(part).load(), weights=None if weights is None else weights[part]) for part in parts
    )


def _all_moments(layer: LayerRows, size: int, memory: str | int, weights: np.ndarray | None = None) -> _Moments:
    edges = _spans(len(layer), size, _most_tasks(layer, memory))
    tasks = [task(_span_moments, layer, start, stop, size, weights) for start, stop in pairwise(edges.tolist())]
    return _all_merged(computed(tasks))


def _most_tasks(layer: LayerRows, memory: str | int) -> int:
    return int(np.clip(parsed_bytes(memory) // (16 * _MOMENT_BYTES * max(1, layer.features)), 1, _MOST_TASKS))


def _spans(n: int, size: int, most: int) -> np.ndarray:
    """Edges of at most ``most`` spans of whole blocks."""
    blocks = -(-n // size)
    edges = np.linspace(0, blocks, min(most, blocks) + 1).astype(np.int64)
    return np.minimum(edges * size, n)


def _moment_rows(layer: LayerRows, memory: str | int, per_number: float = 12, per_pair: float = 0) -> int:
    """Rows to a block of which moments are made."""
    held = (_most_tasks(layer, memory) / workers()[0] + 3) * _MOMENT_BYTES * layer.features
    return block_rows(len(layer), memory, per_number * layer.features, per_pair, fixed=held)


def _face_moments(layer: LayerRows, bounds: np.ndarray, memory: str | int) -> _Moments:
    """Of rows in the order of their faces, which begin at ``bounds`` and end at the last of these."""
    size = _moment_rows(layer, memory, per_number=20)
    wanted = _spans(len(layer), size, _most_tasks(layer, memory))
    edges = np.unique(np.searchsorted(bounds, wanted))
    tasks = [task(_span_by_face, layer, bounds[first : last + 1], size) for first, last in pairwise(edges.tolist())]
    return _all_merged(computed(tasks), same_face=False)


def _span_by_face(layer: LayerRows, bounds: np.ndarray, size: int) -> _Moments:
    """Of several faces, which begin at ``bounds`` and end at the last of these."""
    return _all_merged(_of_whole_faces(layer, bounds, size), same_face=False)


def _of_whole_faces(layer: LayerRows, bounds: np.ndarray, size: int) -> Iterator[_Moments]:
    """Of as many whole faces at once as ``size`` rows hold; of a face of more rows, block by block."""
    first = 0
    while first < len(bounds) - 1:
        start = int(bounds[first])
        last = max(first + 1, int(np.searchsorted(bounds, start + size, "right")) - 1)
        stop = int(bounds[last])
        if stop - start > size:
            yield _span_moments(layer, start, stop, size)
        else:
            yield _moments(layer.block(slice(start, stop)).load(), bounds[first:last] - start)
        first = last


def _descriptions(parts: Sequence[LayerRows], memory: str | int) -> list[dict[str, Any]]:
    """Of each group of rows of one layer: those of one block side by side, larger ones one after the other."""
    size = _moment_rows(max(parts, key=len), memory, per_number=24, per_pair=12)
    small = iter(computed([task(_described_block, part.block(slice(None))) for part in parts if len(part) <= size]))
    return [next(small) if len(part) <= size else _described_blocks(part, size, memory) for part in parts]


def _described_block(block: Block) -> dict[str, Any]:
    values = block.load()
    moments = _moments(values)
    return _described(moments, _square(values, values))


def _described_blocks(layer: LayerRows, size: int, memory: str | int) -> dict[str, Any]:
    moments = _all_moments(layer, size, memory)
    starts = range(0, len(layer), size)
    return _described(
        moments, sum(computed([task(_gram_squares, layer, start, size, moments.mean) for start in starts]))
    )


def _gram_squares(layer: LayerRows, start: int, size: int, centre: np.ndarray) -> float:
    """Sum of the squared products of the rows of the block at ``start`` with these and, twice, with all that come later."""
    mine = _centred(layer.block(slice(start, start + size)), centre)
    total = _square(mine, mine)
    for first in range(start + size, len(layer), size):
        total += 2 * _square(mine, _centred(layer.block(slice(first, first + size)), centre))
    return total


def _centred(block: Block, centre: np.ndarray) -> np.ndarray:
    values = block.load()
    np.subtract(values, centre, out=values, casting="same_kind")
    return values


def _square(one: np.ndarray, other: np.ndarray) -> float:
    products = one @ other.T
    return float(np.einsum("ij,ij->", products, products, dtype=np.float64))


def _described(moments: _Moments, gram_squares: float) -> dict[str, Any]:
    n, units = moments.n, len(moments.mean)
    variance = moments.within / n
    several = n > 1
    trace = float(moments.within.sum())
    return {
        "items": n,
        "units": units,
        "mean": float(moments.mean.mean()),
        "spread": float(np.sqrt(variance.mean() + moments.mean.var())),
        "spread_over_items": float(np.sqrt(variance.mean())) if several else np.nan,
        "sparsity": moments.zeros / (n * units),
        "lifetime_sparseness": _lifetime_sparseness(moments) if several else np.nan,
        "dead": int(moments.dead.sum()) if several else pd.NA,
        "effective_dimension": trace**2 / gram_squares if several and gram_squares > 0 else np.nan,
    }


def _lifetime_sparseness(moments: _Moments) -> float:
    squares = moments.within / moments.n + moments.mean**2
    active = squares > 0
    if moments.least.min() < 0 or not active.any():
        return np.nan
    share = moments.mean[active] ** 2 / squares[active]
    return float((1 - share).mean() / (1 - 1 / moments.n))


def _group_means(layer: LayerRows, codes: np.ndarray, n: int, memory: str | int) -> np.ndarray:
    """(n, features) float32: the mean of the rows of each code 0 … n - 1."""
    spans, held = _group_spans(layer, codes, n, memory)
    size = block_rows(len(layer), memory, 20 * layer.features, fixed=held / workers()[0])
    tasks = [task(_span_sums, layer, codes, start, stop, size) for start, stop in spans]
    total = np.zeros((n, layer.features))
    for present, sums in computed(tasks):
        total[present] += sums
    total /= np.bincount(codes, minlength=n)[:, None]
    return total.astype(np.float32)


def _group_spans(layer: LayerRows, codes: np.ndarray, n: int, memory: str | int) -> tuple[list[tuple[int, int]], int]:
    """As many spans of the rows as have sums that take a quarter of ``memory``, or one; bytes of these and of the total."""
    most = min(_MOST_TASKS, len(layer))
    while True:
        edges = np.linspace(0, len(layer), most + 1).astype(int).tolist()
        spans = list(pairwise(edges))
        held = 8 * layer.features * (n + sum(len(np.unique(codes[start:stop])) for start, stop in spans))
        if most == 1 or held <= parsed_bytes(memory) / 4:
            return spans, held
        most //= 2


def _span_sums(layer: LayerRows, codes: np.ndarray, start: int, stop: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes present from ``start`` to ``stop``, and the sums of their rows, float64 (codes, features)."""
    present, place = np.unique(codes[start:stop], return_inverse=True)
    sums = np.zeros((len(present), layer.features))
    for first in range(start, stop, size):
        part = slice(first, min(first + size, stop))
        _add_groups(sums, layer.block(part).load(), place[part.start - start : part.stop - start])
    return present, sums


def _add_groups(sums: np.ndarray, values: np.ndarray, codes: np.ndarray) -> None:
    """Add the rows of each code to its sum. A slice is summed without a copy, so groups that lie together are fastest."""
    order = np.argsort(codes, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 == len(places):
            sums[codes[first]] += values[first : last + 1].sum(axis=0, dtype=np.float64)
        else:
            for i in places:
                sums[codes[first]] += values[i]


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
    moments = _all_moments(layer, _moment_rows(layer, memory), memory, weights)
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
