"""How alike layers are, of one network or of several: CKA, or the correlation of their RDMs, streamed over pairs of items."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.queries.blocks import MEMORY, added_up, block_rows, computed, task
from featurestore.queries.dissimilarity import column_means, get_metric
from featurestore.queries.moments import subset
from featurestore.queries.selection import Block, Data, Items, LayerRows, Names, select
from featurestore.text import near_matches

MEASURES = ("cka", "cka-biased", "rbf-cka", "rdm")
_FEWEST = 4  # items: the unbiased estimate divides by n - 3
_SAMPLE = 1000  # items, for the median distance


def compare_layers(
    data: Data,
    layers: Names = None,
    *,
    measure: str = "cka",
    metric: str = "cosine",
    bandwidth: float = 1.0,
    by: str | None = None,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> pd.DataFrame:
    """A symmetric matrix (layer × layer), float64, of how alike the layers are over the items that all of them share.

    ``measure``: ``cka``, linear centred kernel alignment with the unbiased estimate of Song et al. (2012), which few items do not
    inflate (Nguyen, Raghu & Kornblith 2021): 1 for the same up to rotation and scale, about 0 for unrelated, sometimes below;
    ``cka-biased``, as Kornblith et al. (2019) first gave it, 0 … 1; ``rbf-cka``, unbiased, with a Gaussian kernel whose width is
    ``bandwidth`` times the median distance (of at most 1,000 items, evenly spread); ``rdm``, Pearson's correlation of the two
    RDMs of ``metric``, -1 … 1. NaN for a layer that does not vary. Layers of several sources are compared on the photographs
    that all of them hold. Other options are those of ``rdm``. Two passes, in blocks, whatever the number of items.

    Raises FeatureStoreError as ``rdm`` does, and for fewer than four items.
    """
    if measure not in MEASURES:
        raise FeatureStoreError(f"there is no `measure` {measure!r}. {near_matches(measure, MEASURES)}")
    if not bandwidth > 0:
        raise FeatureStoreError(f"`bandwidth` {bandwidth} is no share of the median distance: give a number above 0.")
    chosen = select(data, layers, sources=sources, where=where, by=by, items=items).require(_FEWEST, "comparing layers")
    n, count = len(chosen), len(chosen.layers)
    widest = max(layer.features for layer in chosen.layers)
    size = block_rows(n, memory, per_row=24 * widest + 32 * count, per_pair=8 * count + 16, fixed=8 * widest)
    kernels = _kernels(chosen.layers, measure, metric, bandwidth, size)
    tasks = [task(_sums_from, chosen.layers, kernels, start, size) for start in range(0, n, size)]
    sums: _Sums = added_up(tasks, _add)
    alike = _correlations(sums, n) if measure == "rdm" else _alignments(sums, n, biased=measure == "cka-biased")
    names = [layer.name for layer in chosen.layers]
    table = pd.DataFrame(alike, pd.Index(names, name="layer"), pd.Index(names, name="other_layer"))
    table.attrs = {"measure": measure, "items": n, "left_out": list(chosen.notes)}
    return table


@dataclass(frozen=True)
class _Kernel:
    """What makes of the rows of two blocks a number for each pair: ``kind`` and what it needs."""

    kind: str
    mean: np.ndarray | None = None
    width: float = 1.0
    metric: str = "cosine"

    def of(self, one: Block, other: Block) -> np.ndarray:
        """(n, m), of two blocks."""
        if self.kind == "rdm":
            measure = get_metric(self.metric)
            a = measure.prepare(one.load(), one)
            return measure.compare(a, a if one is other else measure.prepare(other.load(), other))
        a = self._centred(one)
        b = a if one is other else self._centred(other)
        if self.kind == "linear":
            product: np.ndarray = a @ b.T
            return product
        distance: np.ndarray = get_metric("euclidean").compare(a.astype(np.float64), b.astype(np.float64))
        if self.kind == "euclidean":
            return distance
        kernel: np.ndarray = np.exp(-((distance / self.width) ** 2) / 2)
        return kernel

    def _centred(self, block: Block) -> np.ndarray:
        values = block.load()
        values -= self.mean
        return values


def _kernels(layers: Sequence[LayerRows], measure: str, metric: str, bandwidth: float, size: int) -> list[_Kernel]:
    """A kernel for each layer. Rows are centred first: the kernel's own centring would subtract large numbers."""
    if measure == "rdm":
        get_metric(metric)
        return [_Kernel("rdm", metric=metric) for _ in layers]
    means = [column_means(layer, size).astype(np.float32) for layer in layers]
    if measure != "rbf-cka":
        return [_Kernel("linear", mean) for mean in means]
    medians = [_median_distance(layer, mean, size) for layer, mean in zip(layers, means, strict=True)]
    return [_Kernel("rbf", mean, bandwidth * median) for mean, median in zip(means, medians, strict=True)]


def _median_distance(layer: LayerRows, mean: np.ndarray, size: int) -> float:
    """Of the pairs of at most ``_SAMPLE`` items, ``size`` at once."""
    places = np.unique(np.linspace(0, len(layer) - 1, min(len(layer), _SAMPLE)).astype(int))
    blocks = subset(layer, places).blocks(size)
    kernel = _Kernel("euclidean", mean)
    tasks = [task(_distances_from, kernel, blocks[i:]) for i in range(len(blocks))]
    return float(np.median(np.concatenate(computed(tasks)))) or 1.0


def _distances_from(kernel: _Kernel, blocks: Sequence[Block]) -> np.ndarray:
    return np.concatenate([_distances(kernel, blocks[0], other) for other in blocks])


def _distances(kernel: _Kernel, one: Block, other: Block) -> np.ndarray:
    """Of all pairs of different items, (pairs,) float32."""
    distance = kernel.of(one, other)
    return distance[np.triu_indices(len(distance), 1)] if one is other else distance.ravel()


@dataclass(frozen=True)
class _Sums:
    """Over pairs of different items, of each two layers' kernels: the sum of ``products`` (count, count); of each layer the
    sum along each row, and each item's kernel with itself (count, n)."""

    products: np.ndarray
    rows: np.ndarray
    diagonal: np.ndarray


def _sums_from(layers: Sequence[LayerRows], kernels: Sequence[_Kernel], start: int, size: int) -> _Sums:
    """Of the block at ``start`` with itself and all that come later: a task for each pair would make Dask's graph too large."""
    mine = slice(start, start + size)
    others = (slice(first, first + size) for first in range(start, len(layers[0]), size))
    found = (_sums_of_blocks(layers, kernels, mine, other) for other in others)
    return reduce(lambda one, other: _add([one, other]), found)


def _sums_of_blocks(layers: Sequence[LayerRows], kernels: Sequence[_Kernel], one: slice, other: slice) -> _Sums:
    """Of the pairs of two blocks, and of those pairs turned round."""
    n, same = len(layers[0]), one == other
    shape = len(range(n)[one]), len(range(n)[other])
    values = np.empty((len(layers), *shape))
    rows, diagonal = np.zeros((2, len(layers), n))
    for i, (layer, kernel) in enumerate(zip(layers, kernels, strict=True)):
        left = layer.block(one)
        values[i] = kernel.of(left, left if same else layer.block(other))
        if same:
            diagonal[i, one] = np.diagonal(values[i])
            np.fill_diagonal(values[i], 0)
        else:
            rows[i, other] += values[i].sum(axis=0)
        rows[i, one] += values[i].sum(axis=1)
    flat = values.reshape(len(layers), -1)
    return _Sums((1 if same else 2) * (flat @ flat.T), rows, diagonal)


def _add(parts: Sequence[_Sums]) -> _Sums:
    return _Sums(*(sum(getattr(part, name) for part in parts) for name in ("products", "rows", "diagonal")))


def _alignments(sums: _Sums, n: int, biased: bool) -> np.ndarray:
    """CKA of every two layers, from HSIC of every two kernels."""
    if biased:
        rows = sums.rows + sums.diagonal
        total = rows.sum(axis=1)
        hsic = sums.products + sums.diagonal @ sums.diagonal.T - 2 / n * rows @ rows.T + np.outer(total, total) / n**2
    else:
        total = sums.rows.sum(axis=1)
        hsic = sums.products + np.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums.rows @ sums.rows.T
    return _normalised(hsic)


def _correlations(sums: _Sums, n: int) -> np.ndarray:
    """Pearson's correlation of every two RDMs, over pairs of different items."""
    total = sums.rows.sum(axis=1)
    return _normalised(sums.products - np.outer(total, total) / (n * (n - 1)))


def _normalised(products: np.ndarray) -> np.ndarray:
    """Divided by the roots of its diagonal; NaN where that is not above zero."""
    own = np.diagonal(products).copy()
    own[own <= 0] = np.nan
    alike: np.ndarray = products / np.sqrt(np.outer(own, own))
    return alike
