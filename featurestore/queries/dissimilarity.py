"""Representational dissimilarity matrices (RDMs): how different each pair of items, or of faces, is to a layer."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from dask.highlevelgraph import HighLevelGraph
from scipy.linalg import eigh
from scipy.spatial.distance import cdist

from featurestore.errors import FeatureStoreError
from featurestore.queries.blocks import MEMORY, added_up, block_rows, computed, parsed_bytes, run_task, task, workers
from featurestore.queries.selection import ArrayReader, Block, Data, Items, LayerRows, Names, Selection, select
from featurestore.text import human_bytes, listing, near_matches

_CONSTANT = 1e-6  # of a row's length: what is left of a constant row after its mean is taken off


def rdm(
    data: Data,
    layers: Names = None,
    *,
    metric: str = "cosine",
    by: str | None = None,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    pca: float | None = None,
    memory: str | int = MEMORY,
) -> xr.DataArray:
    """Dissimilarities (item, other) of all pairs, float32, computed when they are asked for; (layer, item, other) for
    several layers, or if ``layers`` is a list.

    ``metric``: ``cosine`` and ``correlation`` (1 - r, 0 … 2), ``euclidean``, ``cityblock``: those of scipy's ``pdist``, within
    1e-6 of it (of the largest, for the two that have units). ``pca`` keeps as many principal components as explain this share
    of the variance (0 … 1]. The coordinates ``item`` and ``other`` are ``face|view``, with ``face_id`` and ``view`` beside, or
    the groups' names. ``data``, ``layers``, ``by``, ``where``, ``sources`` and ``items`` are those of ``selection.select``.

    Computing holds at most ``memory`` bytes beside the result, which is quadratic in the items: for one larger than memory,
    write it: ``rdm(…).to_zarr(path)``. Raises FeatureStoreError as ``select`` does, for an unknown metric, fewer than three
    rows, a cap that one block exceeds, and (when computed) for rows that are NaN or have no direction.
    """
    chosen = select(data, layers, sources=sources, where=where, by=by, items=items).require(3, "an RDM")
    measure = get_metric(metric)
    if pca is not None:
        chosen = replace(chosen, layers=tuple(principal_components(layer, pca, memory) for layer in chosen.layers))
    size = pair_block_rows(chosen.layers, memory, measure)
    parts = [_dissimilarities(layer, measure, size) for layer in chosen.layers]
    coordinates = _coordinates(chosen, "item") | _coordinates(chosen, "other")
    attributes = {"metric": metric, "left_out": list(chosen.notes)} | ({"pca": pca} if pca is not None else {})
    if len(parts) == 1 and (layers is None or isinstance(layers, str)):
        name = {"layer": ((), np.array(chosen.layers[0].name, object))}
        return xr.DataArray(parts[0], coordinates | name, ("item", "other"), "dissimilarity", attributes)
    names = {"layer": np.array([layer.name for layer in chosen.layers], object)}
    return xr.DataArray(da.stack(parts), coordinates | names, ("layer", "item", "other"), "dissimilarity", attributes)


@dataclass(frozen=True)
class Metric:
    """``prepare`` makes of rows (n, features) float32, with their block for messages, what ``compare`` takes two of: (n, m).

    ``itemsize`` is that of the prepared rows' numbers, in bytes.
    """

    prepare: Callable[[np.ndarray, Block], np.ndarray]
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray]
    itemsize: int = 4


def unit_rows(values: np.ndarray, block: Block) -> np.ndarray:
    """Rows of length 1; FeatureStoreError names those of length 0."""
    lengths = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
    _refuse(lengths == 0, block, "are all zero, so they have no direction to be compared by cosine")
    values /= lengths[:, None].astype(np.float32)
    return values


def _centred_unit_rows(values: np.ndarray, block: Block) -> np.ndarray:
    lengths = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
    # in float64, rounded once: a rounded mean is far off where rows vary little about it
    np.subtract(values, values.mean(axis=1, dtype=np.float64, keepdims=True), out=values, casting="same_kind")
    centred = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
    _refuse(centred <= _CONSTANT * lengths, block, "do not vary over features, so they cannot be correlated")
    values /= centred[:, None].astype(np.float32)
    return values


def _refuse(wrong: np.ndarray, block: Block, why: str) -> None:
    if wrong.any():
        names = block.names[wrong]
        raise FeatureStoreError(
            f"layer {block.layer!r}: the rows of {len(names)} items {why}: {listing(names, 3)}. Choose `metric` euclidean, or "
            "leave them out with `where`."
        )


def _one_minus_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out: np.ndarray = a @ b.T
    np.subtract(1, out, out=out)
    np.maximum(out, 0, out=out)
    return out


def _euclidean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In float64: |a|² + |b|² − 2ab of near rows is the small difference of large numbers."""
    squares: np.ndarray = a @ b.T
    squares *= -2
    squares += np.einsum("ij,ij->i", a, a)[:, None]
    squares += np.einsum("ij,ij->i", b, b)[None, :]
    np.sqrt(np.maximum(squares, 0, out=squares), out=squares)
    return squares.astype(np.float32)


def _float64(values: np.ndarray, block: Block) -> np.ndarray:
    return values.astype(np.float64)


METRICS = {
    "cosine": Metric(unit_rows, _one_minus_product),
    "correlation": Metric(_centred_unit_rows, _one_minus_product),
    "euclidean": Metric(_float64, _euclidean, 8),
    "cityblock": Metric(_float64, lambda a, b: cdist(a, b, "cityblock").astype(np.float32), 8),
}


def get_metric(name: str) -> Metric:
    """The metric of that name; FeatureStoreError with those near it."""
    if name not in METRICS:
        raise FeatureStoreError(f"there is no `metric` {name!r}. {near_matches(name, METRICS)}")
    return METRICS[name]


def pair_block_rows(layers: Sequence[LayerRows], memory: str | int, metric: Metric, per_pair: float = 16.0) -> int:
    """Rows to a block where a task holds two blocks of one layer and what their pairs give, ``per_pair`` bytes each."""
    per_row = 2 * max((4 + metric.itemsize) * layer.features for layer in layers)
    return block_rows(len(layers[0]), memory, per_row, per_pair)


def prepared(block: Block, metric: Metric) -> np.ndarray:
    """A block's rows, read and made comparable."""
    return metric.prepare(block.load(), block)


def _compared(one: Block, other: Block, metric: str) -> np.ndarray:
    measure = METRICS[metric]
    a = prepared(one, measure)
    same = one is other
    out = measure.compare(a, a if same else prepared(other, measure))
    if same:
        np.fill_diagonal(out, 0)
    return out


def _dissimilarities(layer: LayerRows, metric: Metric, size: int) -> da.Array:
    """(n, n). Each block of pairs is a task that reads its own rows, so that none outlive it; the lower half is mirrored."""
    name = next(key for key, value in METRICS.items() if value is metric)
    blocks = layer.blocks(size)
    token = f"rdm-{uuid.uuid4().hex}"  # of Dask's tasks
    graph: dict[Any, Any] = {}
    for i, one in enumerate(blocks):
        for j, other in enumerate(blocks):
            graph[token, i, j] = (run_task, _compared, one, other, name) if i <= j else (np.transpose, (token, j, i))
    sizes = tuple(len(block) for block in blocks)
    return da.Array(HighLevelGraph.from_collections(token, graph, ()), token, (sizes, sizes), np.float32)


def _coordinates(chosen: Selection, along: str) -> dict[str, Any]:
    prefix = "" if along == "item" else "other_"
    found: dict[str, Any] = {along: (along, chosen.names)}
    if chosen.labels.index.nlevels > 1:
        for name in chosen.labels.index.names:
            found[prefix + str(name)] = (along, chosen.labels.index.get_level_values(name).to_numpy(object))
    return found


def principal_components(layer: LayerRows, share: float, memory: str | int) -> LayerRows:
    """The scores (n, components) of as many principal components as explain ``share`` of the variance over items.

    Exact, from the smaller of the two Gram matrices; FeatureStoreError if that is too large for ``memory``.
    """
    if not 0 < share <= 1:
        raise FeatureStoreError(
            f"`pca` {share} is no share of the variance: give a number above 0, up to 1, such as 0.95."
        )
    n, features = len(layer), layer.features
    side = min(n, features)
    if 3 * 8 * side**2 > parsed_bytes(memory):
        raise FeatureStoreError(
            f"`pca` of {n:,} rows of {features:,} features needs {human_bytes(3 * 8 * side**2)}, more than `memory` "
            f"{human_bytes(parsed_bytes(memory))}. Raise it to {human_bytes(4 * 8 * side**2)}, or choose fewer items: `where`."
        )
    size = block_rows(n, memory, 2 * 12 * features, 8, fixed=3 * 8 * side**2)
    blocks = layer.blocks(size)
    mean = column_means(layer, size)
    if n <= features:
        gram = np.empty((n, n))
        starts = np.cumsum([0, *map(len, blocks)])
        for i, one in enumerate(blocks):
            products = computed([task(_centred_product, one, other, mean) for other in blocks[i:]])
            for j, product in enumerate(products, i):
                gram[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = product
                gram[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = product.T
        values, vectors = _largest(gram, share)
        scores = (vectors * np.sqrt(values)).astype(np.float32)
    else:
        edges = np.linspace(0, len(blocks), min(workers()[0], len(blocks)) + 1).astype(int).tolist()
        tasks = [task(_covariance, blocks[start:stop], mean) for start, stop in pairwise(edges)]
        _, vectors = _largest(_sum(computed(tasks)), share)
        scores = np.concatenate(computed([task(_projected, block, mean, vectors) for block in blocks]))
    return LayerRows(layer.name, scores.shape[1:], ArrayReader(scores), np.arange(n), layer.names)


def _largest(gram: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues that make ``share`` of their sum, in descending order, and their vectors."""
    values, vectors = eigh(gram, overwrite_a=True)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if not values[0] > 0:
        raise FeatureStoreError(
            "all rows are the same, so they have no principal components. Choose other items, or no `pca`."
        )
    explained = np.cumsum(values) / values.sum()
    count = int(np.searchsorted(explained, share * (1 - 1e-12))) + 1
    return values[:count], vectors[:, :count]


def column_means(layer: LayerRows, size: int) -> np.ndarray:
    """The mean of each feature over all rows, (features,) float64, ``size`` rows at a time."""
    total = added_up([task(_column_sums, block) for block in layer.blocks(size)], sum)
    means: np.ndarray = total / len(layer)
    return means


def _column_sums(block: Block) -> np.ndarray:
    sums: np.ndarray = block.load().sum(axis=0, dtype=np.float64)
    return sums


def _centred_product(one: Block, other: Block, mean: np.ndarray) -> np.ndarray:
    a = one.load() - mean
    product: np.ndarray = a @ (a if one is other else other.load() - mean).T
    return product


def _covariance(blocks: Sequence[Block], mean: np.ndarray) -> np.ndarray:
    """Times the number of rows. Of several blocks: a result for each would be too many squares of the features at once."""
    return _sum(_centred_square(block, mean) for block in blocks)


def _centred_square(block: Block, mean: np.ndarray) -> np.ndarray:
    centred = block.load() - mean
    product: np.ndarray = centred.T @ centred
    return product


def _sum(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Added to the first of them."""
    return reduce(np.ndarray.__iadd__, parts)


def _projected(block: Block, mean: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    scores: np.ndarray = (block.load() - mean) @ vectors
    return scores.astype(np.float32)


def summary(matrix: xr.DataArray) -> pd.DataFrame:
    """A row for each layer of an RDM: items, mean, least and largest dissimilarity of two, and means within and between faces."""
    names = np.atleast_1d(matrix["layer"].values)
    stack = matrix.values.reshape(len(names), *matrix.shape[-2:])
    upper = np.triu_indices(stack.shape[-1], 1)
    faces = matrix.coords["face_id"].values if "face_id" in matrix.coords else None
    rows = []
    for name, values in zip(names, stack, strict=True):
        pairs = values[upper]
        row = {"layer": name, "items": len(values), "mean": pairs.mean(), "least": pairs.min(), "largest": pairs.max()}
        if faces is not None:
            same = faces[upper[0]] == faces[upper[1]]
            row["within faces"], row["between faces"] = (_mean_of(pairs[part]) for part in (same, ~same))
        rows.append(row)
    return pd.DataFrame(rows)


def _mean_of(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan
