"""Identification accuracy of each layer: the nearest neighbour, by cosine, of views that were held out."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from featurestore.errors import FeatureStoreError
from featurestore.intervals import accuracy, accuracy_over
from featurestore.keys import KEY
from featurestore.queries.selection import shared_items
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rows import Rows
from featurestore.text import in_natural_order, listing, near_matches

_COLUMNS = [
    "source",
    "backbone",
    "weights",
    "layer",
    "accuracy",
    "low",
    "high",
    "cluster_low",
    "cluster_high",
    "chance",
]
_COLUMNS += ["probes", "gallery", "set_aside", "not_shared"]
_BLOCK_BYTES = 1 << 25  # of rows held at once, on each side


def identification_table(
    store: FeatureStore,
    held_out: str | Iterable[str],
    layers: str | Iterable[str] | None = None,
    sources: str | Iterable[str] | None = None,
) -> pd.DataFrame:
    """Identification accuracy by nearest neighbour for every layer of every source, the best first.

    Each item whose view is in ``held_out`` (the probes) is compared by cosine with all items of the other views (the
    gallery), and is right if the nearest one is of the same face. One view, layer or source may be given as a string;
    ``layers`` and ``sources`` choose some.

    Columns: source, backbone, weights (random ones called so), layer, accuracy, low and high (Wilson's 95 % interval, which
    takes probes for independent), cluster_low and cluster_high (over faces), chance (expected of a random choice from the
    gallery), probes and gallery (items compared); set_aside: probes that are not scored, because the gallery holds the same
    photograph, or its mirror image (see ``Source.photographs``); not_shared: items of the source that are left out, because not
    every source compared has the same photograph (sha256) under that key. Probes whose face has no other view are left out, and
    so are items that a layer has no row of. Accuracy is NaN where no probe is left. Memory is bounded, whatever the size of a
    layer.
    Raises FeatureStoreError for views and layers that are not there, and for sources without a photograph in common.
    """
    held, wanted = set(_names(held_out)), None if layers is None else _names(layers)
    chosen = [store.source(name) for name in _names(sources or store.sources)]
    if wanted is not None:
        there = {name: None for source in chosen for name in source.layers}
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise FeatureStoreError(
                f"no source of {store.path} holds the layer {listing(unknown)}. {near_matches(unknown[0], there)}"
            )
        chosen = [source for source in chosen if source.layers.keys() & set(wanted)]
    rows = []
    for source, shared in zip(chosen, shared_items(chosen), strict=True):
        split = _split(source, held, shared)
        names = [name for name in source.layers if wanted is None or name in wanted]
        rows += [_row(source, name, split) for name in names]
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return table.sort_values("accuracy", ascending=False, kind="stable").reset_index(drop=True)


def _names(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else [str(name) for name in given]


@dataclass(frozen=True)
class _Split:
    """Rows (int64) of the probes and of the gallery, and how many items were left out."""

    probes: np.ndarray
    gallery: np.ndarray
    set_aside: int
    not_shared: int


def _split(source: Source, held: set[str], shared: np.ndarray) -> _Split:
    faces, views = (source.coordinate(name) for name in KEY)
    present = set(views[shared])
    missing = held - present
    if missing or not held:
        raise FeatureStoreError(
            f"no view {listing(in_natural_order(missing) or ['(none given)'])} in {source.folder}; "
            f"it has {listing(in_natural_order(present), 12)}."
        )
    is_held = np.isin(views, list(held))
    gallery = np.flatnonzero(~is_held & shared)
    probes = np.flatnonzero(is_held & shared & np.isin(faces, faces[gallery]))
    if not len(probes):
        raise FeatureStoreError(
            f"no face of {source.folder} has views both held out and not, so nothing can be identified. Hold out fewer views."
        )
    copied = np.isin(source.photographs[probes], source.photographs[gallery])
    return _Split(probes[~copied], gallery, int(copied.sum()), int((~shared).sum()))


def _row(source: Source, layer: str, split: _Split) -> tuple[Any, ...]:
    rows = source.rows(layer)
    probes, gallery = split.probes[rows.present[split.probes]], split.gallery[rows.present[split.gallery]]
    faces = source.coordinate("face_id")
    probes = probes[np.isin(faces[probes], faces[gallery])]
    attributes = (source.name, source.attributes["backbone"], source.weights, layer)
    counts = (len(probes), len(gallery), split.set_aside, split.not_shared)
    if not len(probes):
        return (*attributes, *[np.nan] * 6, *counts)
    right = faces[nearest(rows, probes, gallery)] == faces[probes]
    score, over = accuracy(right), accuracy_over(right, [faces[probes]])
    _, place, sizes = np.unique(faces[gallery], return_inverse=True, return_counts=True)
    share = dict(zip(faces[gallery], sizes[place] / len(gallery), strict=True))
    chance = float(np.mean([share[face] for face in faces[probes]]))
    return (*attributes, score.value, score.low, score.high, over.low, over.high, chance, *counts)


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
    """Rows (n, features) of length 1 (those of zeros stay so), float32; FeatureStoreError if one holds NaN or infinity."""
    values = rows.gather(items).flatten(1).float()
    largest = values.abs().amax(dim=1, keepdim=True)
    if not largest.isfinite().all():
        raise FeatureStoreError(
            f"layer {rows.layer.name!r} holds NaN or infinite numbers for {int((~largest.isfinite()).sum())} of {len(items)} "
            "items. Find out why with pipelines/verify_store.py, or choose other `layers`."
        )
    values /= largest.masked_fill(largest == 0, 1)  # so that squares neither vanish nor overflow
    return torch.nn.functional.normalize(values, dim=1)
