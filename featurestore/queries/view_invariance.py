"""How similar a face stays to itself from view to view, and to other faces: what a layer generalises over."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import FLIPPED
from featurestore.queries.blocks import MEMORY, added_up, block_rows, task
from featurestore.queries.dissimilarity import Metric, get_metric, prepared
from featurestore.queries.pairs import photograph_numbers
from featurestore.queries.selection import Block, Data, Items, LayerRows, Names, Selection, select
from featurestore.queries.verification import few_faces
from featurestore.text import in_natural_order, near_matches

ANOTHER = "another photograph"
_ANGLES = 5  # degrees: names of digits alone are angles if all are multiples of it, else numbers of photographs
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_MOST_VIEWS = 1000  # of which all pairs are looked at
_FEWEST = 3  # faces, below which their spread says nothing
_RESAMPLES = 2000
_RESAMPLED_AT_ONCE = 100
_BYTES_PER_PAIR = 72  # the dissimilarity, its number, and what is made of these while they are summed up
_SUMS_AT_ONCE = 10  # that a worker holds while it adds them up


def invariance(
    data: Data,
    layers: Names = None,
    *,
    metric: str = "cosine",
    reference: str | None = None,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> pd.DataFrame:
    """Mean dissimilarities of a face's views, and of different faces', for each difference of views that a face has.

    Where each view's name holds one number (``yaw+30``, ``-30``, ``348.75``; ``frontal`` is 0, and a mirrored view,
    ``…|flipped``, has the opposite one), the difference is that of the numbers, taken for degrees, on the circle if one is
    above 180. Views that number photographs (``1``, ``0002``: digits alone, not all multiples of five) say nothing of angles:
    all differences are then one, ``another photograph`` (of another number, also of other faces). Otherwise it is the pair of
    views, ``a – b``. With ``reference``, a view, only pairs with an item of this view count. All pairs of items are compared,
    but for those known to show the same photograph (see ``verify_faces``). Other options are those of ``rdm``.

    Columns, a row for each layer and view difference: layer, difference (float64 or text), same and other (mean
    dissimilarity over pairs of one face, and of two faces, in the units of ``metric``), their 95 % intervals same_low …
    other_high, separation, n_faces (with a same pair), n_pairs (of the same face) and n_other_pairs. ``separation`` is d′
    (Green & Swets 1966): (other - same) / √((s² + o²) / 2), s² and o² the variances over pairs; NaN where both are zero.

    Intervals resample faces (2000 times, seed fixed): a pair of two faces counts by the first-order part of the product of their
    counts, so that sums for each face suffice. They are widened for few faces (``verification.few_faces``); NaN with fewer than
    three.

    Raises FeatureStoreError as ``rdm`` does, for fewer than three faces, a single view, an unknown ``reference``, more than 1000
    views, and faces without two views.
    """
    chosen = select(data, layers, sources=sources, where=where, items=items)
    measure = get_metric(metric)
    faces = pd.factorize(chosen.require_faces(3, "a comparison of views"))[0]
    kinds = _kinds(chosen, faces, reference)
    cells = len(kinds.differences) * (int(faces.max()) + 1)
    per_row = max(2 * (4 + measure.itemsize) * layer.features for layer in chosen.layers)
    size = block_rows(len(chosen), memory, per_row, _BYTES_PER_PAIR, fixed=_SUMS_AT_ONCE * 4 * 8 * cells)
    return pd.concat([_profile(layer, kinds, measure, metric, size) for layer in chosen.layers], ignore_index=True)


@dataclass(frozen=True)
class _Kinds:
    """Of items (n,), the numbers of their faces, views and photographs; ``of`` (views, views) int64 is the number of the views'
    difference in ``differences``, -1 for those that no face has.
    """

    faces: np.ndarray
    views: np.ndarray
    photographs: np.ndarray
    of: np.ndarray
    differences: list[Any]


def _kinds(chosen: Selection, faces: np.ndarray, reference: str | None) -> _Kinds:
    names = chosen.labels.index.get_level_values("view").to_numpy(object)
    views = in_natural_order(set(names))
    _check_views(views, reference)
    numbers = pd.Index(views).get_indexer(names)
    photographs = photograph_numbers(chosen.labels)
    differences, of = _differences(views)
    if reference is not None:
        apart = np.arange(len(views)) != views.index(reference)
        of[np.ix_(apart, apart)] = -1
    there = _that_a_face_has(of, faces, numbers, photographs, len(differences))
    if not there.any():
        with_what = f" of which one is {reference!r}" if reference is not None else ""
        raise FeatureStoreError(
            f"no face has two views{with_what} to be compared. Choose a wider `where` or another `reference`, or cache more "
            "photographs."
        )
    new = np.append(np.where(there, np.cumsum(there) - 1, -1), -1)  # -1 stays -1
    return _Kinds(faces, numbers, photographs, new[of], [differences[i] for i in np.flatnonzero(there)])


def _check_views(views: list[str], reference: str | None) -> None:
    if reference is not None and reference not in views:
        raise FeatureStoreError(f"there is no view {reference!r} for `reference`. {near_matches(reference, views)}")
    if len(views) < 2:
        raise FeatureStoreError(
            f"all items have the view {views[0]!r}, so there are no views to compare. Choose a wider `where`, or cache other "
            "views."
        )
    if len(views) > _MOST_VIEWS:
        raise FeatureStoreError(
            f"the items have {len(views):,} different views, and at most {_MOST_VIEWS:,} can be compared. Views have to be named "
            "alike for all faces, such as frontal or yaw+30; or choose some with `where`."
        )


def _differences(views: list[str]) -> tuple[list[Any], np.ndarray]:
    """The differences of all pairs of views, and (views, views) int64 which of them each pair has."""
    plain = [view.removesuffix(FLIPPED) for view in views]
    if all(view.isdecimal() for view in plain) and any(int(view) % _ANGLES for view in plain):
        return [ANOTHER], -np.eye(len(views), dtype=np.int64)
    angles = [_angle(view) for view in views]
    if None in angles:
        one, other = np.triu_indices(len(views))
        of = np.empty((len(views), len(views)), np.int64)
        of[one, other] = of[other, one] = np.arange(len(one))
        return [f"{views[i]} – {views[j]}" for i, j in zip(one, other, strict=True)], of
    degrees = np.array(angles, float)
    apart = np.abs(degrees[:, None] - degrees[None, :])
    if (np.abs(degrees) > 180).any():
        apart = np.minimum(apart % 360, 360 - apart % 360)
    values, of = np.unique(apart.round(6), return_inverse=True)
    return values.tolist(), of.reshape(apart.shape).astype(np.int64)


def _angle(view: str) -> float | None:
    """The one number in a view's name."""
    plain = view.removesuffix(FLIPPED)
    numbers = ["0"] if plain.lower() == "frontal" else _NUMBER.findall(plain)
    if len(numbers) != 1:
        return None
    return float(numbers[0]) * (-1 if plain != view else 1)


def _that_a_face_has(
    of: np.ndarray, faces: np.ndarray, views: np.ndarray, photographs: np.ndarray, n: int
) -> np.ndarray:
    """Bool (n,): whether two items of a face, not of the same photograph, have the difference."""
    there = np.zeros(n, bool)
    for rows in pd.Series(faces).groupby(faces).indices.values():
        pairs = of[np.ix_(views[rows], views[rows])]
        other = photographs[rows][:, None] != photographs[rows][None, :]
        there[pairs[other & (pairs >= 0)]] = True
    return there


def _profile(layer: LayerRows, kinds: _Kinds, measure: Metric, metric: str, size: int) -> pd.DataFrame:
    """A layer's rows of the table."""
    blocks = layer.blocks(size)
    numbers = np.stack([kinds.faces, kinds.views, kinds.photographs])
    parts = [numbers[:, start : start + size] for start in range(0, len(layer), size)]
    shape = (len(kinds.differences), int(kinds.faces.max()) + 1)
    tasks = [task(_summed_from, blocks[i:], parts[i:], kinds.of, shape, metric) for i in range(len(blocks))]
    sums, squares = added_up(tasks, _added)
    return pd.DataFrame([
        {"layer": layer.name, "difference": difference, **_row(sums[:, i], squares[:, i])}
        for i, difference in enumerate(kinds.differences)
    ])  # fmt: skip


def _summed_from(
    blocks: Sequence[Block], parts: Sequence[np.ndarray], of: np.ndarray, shape: tuple[int, int], metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Of the first block with itself and all others: a task for each pair would make Dask's graph too large."""
    found = (
        _summed(blocks[0], other, parts[0], part, of, shape, metric) for other, part in zip(blocks, parts, strict=True)
    )
    return reduce(lambda one, other: _added([one, other]), found)


def _added(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    sums, squares = parts[0]
    for other, more in parts[1:]:
        sums, squares = sums + other, squares + more
    return sums, squares


def _summed(
    one: Block,
    other: Block,
    first: np.ndarray,
    second: np.ndarray,
    of: np.ndarray,
    shape: tuple[int, int],
    metric: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the pairs of two blocks, float64; ``first`` and ``second`` (3, rows) are their faces, views and photographs.

    (4, differences, faces): the dissimilarities and the number of same pairs, and those of other pairs, where a pair counts for
    both its faces. (2, differences): squares of same and of other pairs.
    """
    measure = get_metric(metric)
    a = prepared(one, measure)
    distance = measure.compare(a, a if one is other else prepared(other, measure))
    (faces_1, views_1, photographs_1), (faces_2, views_2, photographs_2) = first, second
    number = of[np.ix_(views_1, views_2)]
    number[photographs_1[:, None] == photographs_2[None, :]] = -1
    if one is other:
        number[np.tril_indices(len(a))] = -1
    same = faces_1[:, None] == faces_2[None, :]
    sums, squares = np.zeros((4, *shape)), np.zeros((2, shape[0]))
    for kind, chosen in enumerate((same, ~same)):
        rows, columns = np.nonzero(chosen & (number >= 0))
        values, differences = distance[rows, columns].astype(np.float64), number[rows, columns]
        squares[kind] = np.bincount(differences, values**2, shape[0])
        for faces in (faces_1[rows],) if kind == 0 else (faces_1[rows], faces_2[columns]):
            cells = differences * shape[1] + faces
            sums[2 * kind] += np.bincount(cells, values, math.prod(shape)).reshape(shape)
            sums[2 * kind + 1] += np.bincount(cells, minlength=math.prod(shape)).reshape(shape)
    return sums, squares


def _row(sums: np.ndarray, squares: np.ndarray) -> dict[str, Any]:
    """The columns of a view difference from its sums (4, faces) and squares (2,)."""
    n_same, n_other = sums[1].sum(), sums[3].sum() / 2
    same, same_low, same_high = _mean(sums[0], sums[1], n_same)
    other, other_low, other_high = _mean(sums[2], sums[3], n_other)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(squares / [n_same, n_other] - np.square([same, other]), 0).mean()
    return {
        "same": same,
        "same_low": same_low,
        "same_high": same_high,
        "other": other,
        "other_low": other_low,
        "other_high": other_high,
        "separation": (other - same) / math.sqrt(variance) if variance > 0 else math.nan,
        "n_faces": int((sums[1] > 0).sum()),
        "n_pairs": int(n_same),
        "n_other_pairs": int(n_other),
    }


def _mean(sums: np.ndarray, counts: np.ndarray, n_pairs: float) -> tuple[float, float, float]:
    """The mean over pairs, and its 95 % interval, from each face's sum and number of pairs."""
    there = counts > 0
    if not there.any():
        return math.nan, math.nan, math.nan
    sums, counts = sums[there], counts[there]
    mean, n = float(sums.sum() / counts.sum()), len(sums)
    if n < _FEWEST:
        return mean, math.nan, math.nan
    off = (sums - mean * counts) / n_pairs  # what the mean changes by if the face counts once more
    rng = np.random.default_rng(0)
    rounds = range(0, _RESAMPLES, _RESAMPLED_AT_ONCE)
    drawn = np.concatenate([rng.multinomial(n, np.full(n, 1 / n), _RESAMPLED_AT_ONCE) @ off for _ in rounds])
    low, high = mean + few_faces(n) * np.percentile(drawn, [2.5, 97.5])
    return mean, float(low), float(high)
