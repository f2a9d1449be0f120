"""Statistics of layers, and mean activations: streamed in blocks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from featurestore.queries.blocks import MEMORY, block_rows, computed, parsed_bytes, task, workers
from featurestore.queries.moments import MOST_TASKS, Moments, all_moments, block_moments, moment_rows, subset
from featurestore.queries.selection import Block, Data, Items, LayerRows, Names, groups, select
from featurestore.queries.units import one_layer, unit_dimensions


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
        found = _descriptions([subset(layer, places) for places in parts.values()], memory)
        for name, described in zip(parts, found, strict=True):
            rows.append({"layer": layer.name} | ({"group": name} if by else {}) | described)
    table = pd.DataFrame(rows).astype({"dead": "Int64"})
    table.attrs["left_out"] = list(chosen.notes)
    return table


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
    chosen, rows = one_layer(select(data, layer, sources=sources, where=where, items=items), "means")
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


def _descriptions(parts: Sequence[LayerRows], memory: str | int) -> list[dict[str, Any]]:
    """Of each group of rows of one layer: those of one block side by side, larger ones one after the other."""
    size = moment_rows(max(parts, key=len), memory, per_number=24, per_pair=12)
    small = iter(computed([task(_described_block, part.block(slice(None))) for part in parts if len(part) <= size]))
    return [next(small) if len(part) <= size else _described_blocks(part, size, memory) for part in parts]


def _described_block(block: Block) -> dict[str, Any]:
    values = block.load()
    moments = block_moments(values)
    values /= _scale(moments)
    return _described(moments, _square(values, values))


def _described_blocks(layer: LayerRows, size: int, memory: str | int) -> dict[str, Any]:
    moments = all_moments(layer, size, memory)
    starts = range(0, len(layer), size)
    tasks = [task(_gram_squares, layer, start, size, moments.mean, _scale(moments)) for start in starts]
    return _described(moments, sum(computed(tasks)))


def _scale(moments: Moments) -> float:
    """The largest difference to the mean, 1 if there is none: squares of numbers divided by it fit into float32."""
    return float(max((moments.most - moments.mean).max(), (moments.mean - moments.least).max())) or 1.0


def _gram_squares(layer: LayerRows, start: int, size: int, centre: np.ndarray, scale: float) -> float:
    """Sum of the squared products of the rows of the block at ``start`` with these and, twice, with all that come later."""
    mine = _centred(layer.block(slice(start, start + size)), centre, scale)
    total = _square(mine, mine)
    for first in range(start + size, len(layer), size):
        total += 2 * _square(mine, _centred(layer.block(slice(first, first + size)), centre, scale))
    return total


def _centred(block: Block, centre: np.ndarray, scale: float) -> np.ndarray:
    values = block.load()
    np.subtract(values, centre, out=values, casting="same_kind")
    values /= scale
    return values


def _square(one: np.ndarray, other: np.ndarray) -> float:
    products = one @ other.T
    return float(np.einsum("ij,ij->", products, products, dtype=np.float64))


def _described(moments: Moments, gram_squares: float) -> dict[str, Any]:
    """A row of the table; ``gram_squares`` of rows divided by ``_scale``."""
    n, units = moments.n, len(moments.mean)
    variance = moments.within / n
    several = n > 1
    trace = float(moments.within.sum()) / _scale(moments) ** 2
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


def _lifetime_sparseness(moments: Moments) -> float:
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
    most = min(MOST_TASKS, len(layer))
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
