"""What heads learn: examples with their split, made from trials or from face identities."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.store.reader import Source
from featurestore.text import natural_order
from heads.scores import CHANCE, Ceiling, noise_ceiling
from heads.splits import PARTS, Split
from heads.train import Examples
from heads.trials.conditions import rows_that_meet
from heads.trials.matching import Trials


@dataclass(frozen=True)
class Task:
    """What all runs of a grid learn: examples with their split, the same for every head and layer.

    ``items`` (n, 3) or (n, 1) int64 number the items of ``sources`` one after the other, ``labels`` (n,) int64 are places or
    identities. ``table`` has a row per example (for predictions), ``classes`` the names of identities, or none for
    triplets. ``photographs`` is a hash of the items' images: the same trials over other pictures are another task.
    """

    store: Path
    sources: tuple[str, ...]
    items: np.ndarray
    labels: np.ndarray
    split: Split
    table: pd.DataFrame
    photographs: str
    classes: tuple[str, ...] = ()
    ceiling: Ceiling | None = None

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / len(self.classes) if self.classes else CHANCE

    @property
    def examples(self) -> Examples:
        """Items and labels with the indices of each part."""
        return Examples(self.items, self.labels, *(self.split.indices(name) for name in PARTS))


def triplet_task(store: FeatureStore, trials: Trials, split: Split) -> Task:
    """Odd-one-out: three items, and which of them is odd."""
    return Task(
        store=store.path.resolve(),
        sources=trials.sources,
        items=trials.items,
        labels=trials.odd,
        split=split,
        table=trials.table,
        photographs=_photographs(store, trials.sources, trials.items),
        ceiling=noise_ceiling(trials),
    )


def identity_items(source: Source, where: Sequence[str] = ()) -> np.ndarray:
    """The items (n,) int64 of a source that meet all conditions on its columns."""
    kept = np.ones(source.n_items, bool)
    for condition in where:
        kept &= rows_that_meet(condition, source.items)
    if not kept.any():
        raise FeatureStoreError(f"no item of {source.folder} has {' and '.join(where)}.")
    return np.flatnonzero(kept)


def items_hash(source: Source, items: np.ndarray) -> str:
    """sha256 (hex) of the keys of ``items``: what a split of them belongs to."""
    keys = "\0".join("\1".join(key) for key in source.keys[items])
    return hashlib.sha256(f"{source.name}\0{keys}".encode()).hexdigest()


def identity_task(store: FeatureStore, source: Source, items: np.ndarray, split: Split) -> Task:
    """Which face is it: one item, and its face. FeatureStoreError if a tested face has no view to train on."""
    table = source.keys[items].to_frame(index=False)
    classes = sorted(set(table["face_id"]), key=natural_order)
    labels = pd.Index(classes).get_indexer(table["face_id"])
    untrained = set(labels[split.part > 0]) - set(labels[split.part == 0])
    if untrained:
        raise FeatureStoreError(
            f"{len(untrained)} faces ({classes[min(untrained)]} …) have no view in the training part, so they cannot be "
            "learned. The multi-view head needs views that faces share; see `fractions` and `hold_out`."
        )
    return Task(
        store=store.path.resolve(),
        sources=(source.name,),
        items=items[:, None],
        labels=labels.astype(np.int64),
        split=split,
        table=table,
        photographs=_photographs(store, (source.name,), items),
        classes=tuple(classes),
    )


def _photographs(store: FeatureStore, sources: tuple[str, ...], items: np.ndarray) -> str:
    images = np.concatenate([store.source(name).coordinate("image_sha256") for name in sources])
    return hashlib.sha256("".join(images[np.unique(items)]).encode()).hexdigest()
