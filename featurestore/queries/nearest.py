"""The most similar items of each item: exact, block by block."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.queries.blocks import MEMORY, computed, task
from featurestore.queries.dissimilarity import Metric, get_metric, pair_block_rows, prepared
from featurestore.queries.selection import Block, Data, Items, LayerRows, Names, select
from featurestore.store.reader import Keys
from featurestore.text import listing, near_matches


def neighbours(
    data: Data,
    layer: str | None = None,
    of: "Keys | None" = None,
    *,
    k: int = 5,
    metric: str = "cosine",
    other_faces: bool = False,
    by: str | None = None,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> pd.DataFrame:
    """The ``k`` least dissimilar items of each item ``of`` the keys given (of all, by default), the nearest first.

    ``of`` are (face, view) pairs, ``"face|view"``, or faces for all their views. An item is not its own neighbour; with
    ``other_faces`` no item of its face is. Of equals the earlier item comes first.
    Columns: face_id, view (or, with ``by``, the group), rank from 1, and of the neighbour neighbour_face_id, neighbour_view
    and the dissimilarity. Options are those of ``rdm``. FeatureStoreError for keys that are not among the items, as ``rdm``
    for the rest.
    """
    chosen = select(data, layer, sources=sources, where=where, by=by, items=items).require(2, "a neighbour")
    if len(chosen.layers) > 1:
        raise FeatureStoreError(
            f"neighbours are those in one layer; this would be {listing(each.name for each in chosen.layers)}. Name one `layer`."
        )
    (rows,) = chosen.layers
    if k < 1:
        raise FeatureStoreError(f"`k` {k} is no number of neighbours: give 1 or more.")
    k = min(k, len(rows))
    asked = np.arange(len(rows)) if of is None else _places(of, chosen.labels.index)
    faces = chosen.labels.index.get_level_values(0).to_numpy(object)
    groups = pd.factorize(faces)[0] if other_faces and by is None else np.arange(len(rows))
    measure = get_metric(metric)
    size = pair_block_rows([rows], memory, measure, per_pair=24)
    starts = range(0, len(asked), size)
    tasks = [task(_nearest, rows, asked[start : start + size], groups, k, metric, size) for start in starts]
    found = computed(tasks)
    near, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _table(chosen.labels.index, asked, near, distance)


def _places(of: Keys, index: pd.Index) -> np.ndarray:
    """Places of the keys, of all views of the faces, or of the groups, that are asked for."""
    one_key = isinstance(of, str) or (isinstance(of, tuple) and len(of) == index.nlevels and of in index)
    given: list[Any] = [of] if one_key else list(of)
    by_face = pd.Series(0, index).groupby(level=0, sort=False).indices
    places: list[int] = []
    for named in given:
        key = _as_key(named, index, by_face)
        found = by_face.get(key) if isinstance(key, str) else np.flatnonzero(index.isin([key]))
        if found is None or not len(found):
            known = by_face if isinstance(key, str) else [view for face, view in index if face == key[0]] or by_face
            near = near_matches(
                key if isinstance(key, str) else key[1 if key[0] in by_face else 0], list(map(str, known))[:10_000]
            )
            raise FeatureStoreError(f"`of` {key!r} is not among the {len(index)} items. {near}")
        places += found.tolist()
    return np.array(places, np.int64)


def _as_key(named: Any, index: pd.Index, faces: Collection[str]) -> str | tuple[str, str]:
    """A face or group, or a (face, view) pair, which may be written ``face|view``."""
    if not isinstance(named, str):
        return str(named) if index.nlevels == 1 else (str(named[0]), str(named[1]))
    if index.nlevels == 1 or named in faces or "|" not in named:
        return named
    pieces = named.split("|")  # a mirrored view's own name has a bar
    keys = [("|".join(pieces[:i]), "|".join(pieces[i:])) for i in range(1, len(pieces))]
    return next((key for key in keys if key in index), keys[-1])


def _nearest(
    rows: LayerRows, asked: np.ndarray, groups: np.ndarray, k: int, metric: str, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places and dissimilarities (len(asked), k) of the nearest, -1 and infinity where there are fewer."""
    measure: Metric = get_metric(metric)
    mine = prepared(rows.block(asked), measure)
    places = np.full((len(asked), k), -1)
    nearest = np.full((len(asked), k), np.inf, np.float32)
    for start in range(0, len(rows), size):
        block: Block = rows.block(slice(start, start + size))
        distance = measure.compare(mine, prepared(block, measure))
        distance[groups[asked][:, None] == groups[start : start + len(block)][None, :]] = np.inf
        places, nearest = _merged(places, nearest, distance, start)
    return places, nearest


def _merged(places: np.ndarray, nearest: np.ndarray, distance: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of those known and of a block that begins at place ``start``."""
    k = nearest.shape[1]
    better = distance < nearest[:, -1:]
    counts = better.sum(axis=1)
    changed = np.flatnonzero(counts)
    if not len(changed):
        return places, nearest
    width = min(k, int(counts.max()))
    part = distance[changed] if len(changed) < len(distance) else distance
    best = _least(part, width)
    values = np.concatenate([nearest[changed], np.take_along_axis(part, best, 1)], axis=1)
    which = np.concatenate([places[changed], best + start], axis=1)
    order = np.lexsort((which, values), axis=1)[:, :k]
    nearest[changed] = np.take_along_axis(values, order, 1)
    places[changed] = np.take_along_axis(which, order, 1)
    return places, nearest


def _least(values: np.ndarray, width: int) -> np.ndarray:
    """(n, width) places of the least of each row, in ascending order of place; of equals the earlier ones."""
    if width == values.shape[1]:
        return np.tile(np.arange(width), (len(values), 1))
    last = np.partition(values, width - 1, axis=1)[:, width - 1 : width]
    chosen = values < last
    equal = values == last
    equal &= equal.cumsum(axis=1, dtype=np.int32) <= width - chosen.sum(axis=1, keepdims=True)
    chosen |= equal
    return np.nonzero(chosen)[1].reshape(-1, width)


def _table(index: pd.Index, asked: np.ndarray, near: np.ndarray, distance: np.ndarray) -> pd.DataFrame:
    k = near.shape[1]
    left, right = np.repeat(asked, k), near.ravel()
    rank = np.tile(np.arange(1, k + 1), len(asked))
    kept = right >= 0
    one, other = (index[places[kept]].to_frame(index=False) for places in (left, right))
    other.columns = [f"neighbour_{name}" for name in other.columns]
    return pd.concat([one, pd.Series(rank[kept], name="rank"), other], axis=1).assign(
        dissimilarity=distance.ravel()[kept]
    )
