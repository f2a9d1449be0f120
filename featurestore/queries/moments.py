"""Means and variances of units, streamed: the moments of blocks of rows, merged."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from featurestore.queries.blocks import block_rows, computed, parsed_bytes, task, workers
from featurestore.queries.selection import LayerRows

MOST_TASKS = 32  # whose results, each of the size of a layer, are held at once
_MOMENT_BYTES = 5 * 8  # of a unit


class Moments(NamedTuple):
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


def block_moments(
    values: np.ndarray, starts: Sequence[int] | np.ndarray = (0,), weights: np.ndarray | None = None
) -> Moments:
    """Of rows (n, features) float32, of which each face's begin at ``starts``; ``weights`` (n,) float64 give ``products``.

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
    # Of a single face: the differences are smaller numbers than the values, so that less is lost.
    if weights is not None:
        products = np.einsum("i,ij->j", weights, values, dtype=np.float64) + weights.sum() * whole
    if len(faces) == 1:
        between = np.zeros(features)
    else:
        means -= whole
        between = np.einsum("i,ij,ij->j", counts, means, means)
    return Moments(n, whole, within, between, least, most, int(zeros), products)


def all_moments(layer: LayerRows, size: int, memory: str | int, weights: np.ndarray | None = None) -> Moments:
    """Of all rows, ``size`` at once, taken as one face's; ``weights`` (n,) float64, one for each row, give ``products``."""
    edges = _spans(len(layer), size, _most_tasks(layer, memory))
    tasks = [task(_span_moments, layer, start, stop, size, weights) for start, stop in pairwise(edges.tolist())]
    return _all_merged(computed(tasks))


def face_moments(layer: LayerRows, bounds: np.ndarray, memory: str | int) -> Moments:
    """Of rows in the order of their faces, which begin at ``bounds`` and end at the last of these."""
    size = moment_rows(layer, memory, per_number=20)
    wanted = _spans(len(layer), size, _most_tasks(layer, memory))
    edges = np.unique(np.searchsorted(bounds, wanted))
    tasks = [task(_span_by_face, layer, bounds[first : last + 1], size) for first, last in pairwise(edges.tolist())]
    return _all_merged(computed(tasks), same_face=False)


def moment_rows(layer: LayerRows, memory: str | int, per_number: float = 12, per_pair: float = 0) -> int:
    """Rows to a block of which moments are made."""
    held = (_most_tasks(layer, memory) / workers()[0] + 3) * _MOMENT_BYTES * layer.features
    return block_rows(len(layer), memory, per_number * layer.features, per_pair, fixed=held)


def subset(layer: LayerRows, places: np.ndarray) -> LayerRows:
    """The rows at these places, in their order."""
    block = layer.block(places)
    return replace(layer, rows=block.rows, names=block.names)


def _merged(one: Moments, other: Moments, same_face: bool = True) -> Moments:
    """Of the items of both (Chan, Golub & LeVeque 1983), which are one face's, or have no face in common."""
    n = one.n + other.n
    apart = other.mean - one.mean
    within, between = one.within + other.within, one.between + other.between
    added = apart**2 * (one.n * other.n / n)
    if same_face:
        within += added
    else:
        between += added
    return Moments(
        n,
        one.mean + apart * (other.n / n),
        within,
        between,
        np.minimum(one.least, other.least),
        np.maximum(one.most, other.most),
        one.zeros + other.zeros,
        one.products + other.products,
    )


def _all_merged(parts: Iterable[Moments], same_face: bool = True) -> Moments:
    """One after the other, so that ``parts`` can be made as they are asked for."""
    return reduce(lambda one, other: _merged(one, other, same_face), parts)


def _span_moments(layer: LayerRows, start: int, stop: int, size: int, weights: np.ndarray | None = None) -> Moments:
    """Of the rows from ``start`` to ``stop``, ``size`` at once, taken as one face's."""
    parts = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
    return _all_merged(
        block_moments(layer.block(part).load(), weights=None if weights is None else weights[part]) for part in parts
    )


def _most_tasks(layer: LayerRows, memory: str | int) -> int:
    return int(np.clip(parsed_bytes(memory) // (16 * _MOMENT_BYTES * max(1, layer.features)), 1, MOST_TASKS))


def _spans(n: int, size: int, most: int) -> np.ndarray:
    """Edges of at most ``most`` spans of whole blocks."""
    blocks = -(-n // size)
    edges = np.linspace(0, blocks, min(most, blocks) + 1).astype(np.int64)
    return np.minimum(edges * size, n)


def _span_by_face(layer: LayerRows, bounds: np.ndarray, size: int) -> Moments:
    """Of several faces, which begin at ``bounds`` and end at the last of these."""
    return _all_merged(_of_whole_faces(layer, bounds, size), same_face=False)


def _of_whole_faces(layer: LayerRows, bounds: np.ndarray, size: int) -> Iterator[Moments]:
    """Of as many whole faces at once as ``size`` rows hold; of a face of more rows, block by block."""
    first = 0
    while first < len(bounds) - 1:
        start = int(bounds[first])
        last = max(first + 1, int(np.searchsorted(bounds, start + size, "right")) - 1)
        stop = int(bounds[last])
        if stop - start > size:
            yield _span_moments(layer, start, stop, size)
        else:
            yield block_moments(layer.block(slice(start, stop)).load(), bounds[first:last] - start)
        first = last
