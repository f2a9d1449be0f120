"""What heads learn: examples with their split, made from trials or from face identities."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featurestore import FeatureStore
from featurestore.conditions import rows_that_meet
from featurestore.errors import FeatureStoreError
from featurestore.files import write_atomically
from featurestore.keys import KEY
from featurestore.store.reader import Source
from featurestore.text import listing, natural_order
from heads.scores import CHANCE, shows_a_face_twice
from heads.splits import PARTS, Split
from heads.train import Examples
from heads.trials.matching import Trials
from heads.trials.same_person import SAME_PERSON
from heads.trials.tables import VIEWS


@dataclass(frozen=True)
class Task:
    """What all runs of a grid learn: examples with their split, the same for every head and layer.

    ``items`` (n, 3) or (n, 1) int64 number the items of ``sources`` one after the other, ``labels`` (n,) int64 are places or
    identities. ``table`` has a row per example (for predictions), ``classes`` the names of identities, or none for
    triplets. ``photographs`` is a hash of the items' images: the same trials over other pictures are another task.
    ``about`` is what a person wants to know of it: files, conditions, sessions, weights.
    """

    store: Path
    sources: tuple[str, ...]
    items: np.ndarray
    labels: np.ndarray
    split: Split
    table: pd.DataFrame
    photographs: str
    classes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / len(self.classes) if self.classes else CHANCE

    @property
    def examples(self) -> Examples:
        """Items and labels with the indices of each part."""
        return Examples(self.items, self.labels, *(self.split.indices(name) for name in PARTS))

    @property
    def from_keys(self) -> bool:
        """Whether the answers were made from the keys, not given by raters."""
        return self.about.get("trials_file") == SAME_PERSON

    def description(self) -> dict[str, Any]:
        """``about`` with the split: of each part how many examples (and how many show one face twice), and those in none."""
        split, twice = self.split, shows_a_face_twice(self.table)
        return {
            **self.about,
            "split_kind": split.kind,
            "fold": "{} of {}".format(*split.fold) if split.fold else None,
            "test": split.test,
            **{f"n_{name}": len(split.indices(name)) for name in PARTS},
            **{f"n_two_faces_{name}": int(twice[split.indices(name)].sum()) for name in PARTS if twice.any()},
            "n_left_out": int((split.part < 0).sum()),
            "n_set_aside": split.set_aside,
        }

    def save_description(self, folder: Path) -> None:
        """Write the split to ``folder``/splits, and the hash of each photograph to ``folder``/photographs."""
        self.split.save(folder / "splits")
        path = photographs_file(folder, self.photographs)
        if not path.exists():
            store = FeatureStore.open(self.store)
            write_atomically(path, photographs_of(store, self.sources, self.items).to_csv(index=False))


def photographs_file(folder: Path, photographs: str) -> Path:
    """Where the hashes of a task's photographs are kept."""
    return folder / "photographs" / f"{photographs[:12]}.csv"


def photographs_of(store: FeatureStore, sources: Sequence[str], items: np.ndarray) -> pd.DataFrame:
    """source, face_id, view and image_sha256 of each item."""
    each = [store.source(name) for name in sources]
    tables = [
        found.keys.to_frame(index=False).assign(source=found.name, image_sha256=found.coordinate("image_sha256"))
        for found in each
    ]
    columns = ["source", *KEY, "image_sha256"]
    return pd.concat(tables, ignore_index=True).iloc[np.unique(items)][columns].reset_index(drop=True)


def about_sources(store: FeatureStore, sources: Sequence[str]) -> dict[str, Any]:
    """Networks and weights by name, random ones called so."""
    each = [store.source(name) for name in sources]
    return {
        "backbone": " + ".join(dict.fromkeys(found.attributes["backbone"] for found in each)),
        "weights": " + ".join(dict.fromkeys(found.weights for found in each)),
    }


def triplet_task(store: FeatureStore, trials: Trials, split: Split, about: dict[str, Any] | None = None) -> Task:
    """Odd-one-out: three items, and which of them is odd. ``about`` says where the trials are from."""
    views = sorted({view for name in VIEWS for view in trials.table[name].astype(str)}, key=natural_order)
    return Task(
        store=store.path.resolve(),
        sources=trials.sources,
        items=trials.items,
        labels=trials.odd,
        split=split,
        table=trials.table,
        photographs=_photographs(store, trials.sources, trials.items),
        about={
            **(about or {}),
            **about_sources(store, trials.sources),
            "views": listing(views, 10),
            "n_unanswered": trials.unanswered,
            "n_excluded": trials.excluded,
            "n_faulty": len(trials.faulty),
        },
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


def identity_task(
    store: FeatureStore, source: Source, items: np.ndarray, split: Split, about: dict[str, Any] | None = None
) -> Task:
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
        about={**(about or {}), **about_sources(store, [source.name])},
    )


def _photographs(store: FeatureStore, sources: tuple[str, ...], items: np.ndarray) -> str:
    images = np.concatenate([store.source(name).coordinate("image_sha256") for name in sources])
    return hashlib.sha256("".join(images[np.unique(items)]).encode()).hexdigest()
