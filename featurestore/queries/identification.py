"""Identification accuracy of each layer: the nearest neighbour, by cosine, of views that were held out."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch

from featurestore.errors import FeatureStoreError
from featurestore.intervals import accuracy
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rows import Rows
from featurestore.text import listing

_COLUMNS = ["source", "backbone", "weights", "layer", "accuracy", "low", "high", "chance", "probes", "gallery"]
_BLOCK_BYTES = 1 << 25  # of rows held at once, on each side


def identification_table(
    store: FeatureStore,
    held_out: Iterable[str],
    layers: Iterable[str] | None = None,
    sources: Iterable[str] | None = None,
) -> pd.DataFrame:
    """Identification accuracy by nearest neighbour for every layer of every source, the best first.

    Each item whose view is in ``held_out`` (the probes) is compared by cosine with all items of the other views (the
    gallery), and is right if the nearest one is of the same face. Columns: source, backbone, weights, layer, accuracy,
    low and high (Wilson's 95 % interval), chance (expected of a random choice from the gallery), probes and gallery.
    Probes whose face has no other view are left out, and so are items that a layer has no row of. ``layers`` and
    ``sources`` choose some. Memory is bounded, whatever the size of a layer.
    Raises FeatureStoreError for views and layers that are not there.
    """
    held = {str(view) for view in held_out}
    wanted = None if layers is None else list(layers)
    chosen = [store.source(name) for name in (sources or store.sources)]
    if wanted is not None:
        there = {name for source in chosen for name in source.layers}
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise FeatureStoreError(f"no source of {store.path} holds the layer {listing(unknown)}.")
    rows = []
    for source in chosen:
        probes, gallery = _split(source, held)
        names = [name for name in source.layers if wanted is None or name in wanted]
        rows += [_row(source, name, probes, gallery) for name in names]
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return table.sort_values("accuracy", ascending=False, kind="stable").reset_index(drop=True)


def _split(source: Source, held: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the probes and of the gallery."""
    faces, views = (source.coordinate(name) for name in ("face_id", "view"))
    missing = held - set(views)
    if missing or not held:
        raise FeatureStoreError(
            f"no view {listing(sorted(missing) or ['(none given)'])} in {source.folder}; "
            f"it has {listing(sorted(set(views)), 12)}."
        )
    is_held = np.isin(views, list(held))
    gallery = np.flatnonzero(~is_held)
    probes = np.flatnonzero(is_held & np.isin(faces, faces[gallery]))
    if not len(probes):
        raise FeatureStoreError(
            f"no face of {source.folder} has views both held out and not, so nothing can be identified. Hold out fewer views."
        )
    return probes, gallery


def _row(source: Source, layer: str, probes: np.ndarray, gallery: np.ndarray) -> tuple[Any, ...]:
    rows = source.rows(layer)
    probes, gallery = probes[rows.present[probes]], gallery[rows.present[gallery]]
    faces = source.coordinate("face_id")
    probes = probes[np.isin(faces[probes], faces[gallery])]
    attributes = (source.name, source.attributes["backbone"], source.attributes.get("weights_name", ""), layer)
    if not len(probes):
        return (*attributes, *[np.nan] * 4, 0, len(gallery))
    score = accuracy(faces[nearest(rows, probes, gallery)] == faces[probes])
    _, place, counts = np.unique(faces[gallery], return_inverse=True, return_counts=True)
    share = dict(zip(faces[gallery], counts[place] / len(gallery), strict=True))
    chance = float(np.mean([share[face] for face in faces[probes]]))
    return (*attributes, score.value, score.low, score.high, chance, len(probes), len(gallery))


def nearest(rows: Rows, probes: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Of each probe (row numbers, int64), the row number of the gallery's item with the highest cosine."""
    features = int(np.prod(rows.shape[1:]))
    block = max(1, min(_BLOCK_BYTES // (4 * features), math.isqrt(_BLOCK_BYTES // 4)))  # rows; and their cosines
    best = torch.full((len(probes),), -torch.inf)
    which = torch.zeros(len(probes), dtype=torch.int64)
    for start in range(0, len(probes), block):
        mine = slice(start, start + block)
        left = _unit(rows, probes[mine])
        for first in range(0, len(gallery), block):
            cosine, place = (left @ _unit(rows, gallery[first : first + block]).T).max(dim=1)
            better = cosine > best[mine]
            best[mine] = torch.where(better, cosine, best[mine])
            which[mine] = torch.where(better, place + first, which[mine])
    return np.take(gallery, which.numpy())


def _unit(rows: Rows, items: np.ndarray) -> torch.Tensor:
    """Rows (n, features) of length 1, float32."""
    return torch.nn.functional.normalize(rows.gather(items).flatten(1).float(), dim=1)
