"""What the layers of several networks know of faces, untrained: identification and same-person odd-one-out, in one table."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from featurestore import FeatureStore, identification_table
from featurestore.intervals import accuracy_over
from featurestore.keys import FLIPPED
from featurestore.queries.selection import shared_items
from featurestore.store.reader import Source
from featurestore.text import in_natural_order
from heads.scores import CHANCE, clusters_of
from heads.trials.matching import match
from heads.trials.same_person import same_person_trials
from heads.zero_shot import zero_shot_choices

HELD_OUT_SHARE = 0.3  # of the views, where none are named


def network_table(
    store: FeatureStore,
    held_out: str | Iterable[str] | None = None,
    layers: Iterable[str] | None = None,
    n_trials: int = 3000,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for every layer of every source, sources in the store's order and layers in the network's.

    ``identification`` as ``identification_table`` has it: the nearest neighbour, by cosine, of the views ``held_out`` (the last
    three tenths of them, in natural order, if none are named). ``same_person``: ``n_trials`` trials of two views of one face and
    one of another, drawn from the keys; right if the two are the most similar pair by cosine. Each with ``_low`` and ``_high``, a
    95 % interval over faces, and ``_chance``; ``probes`` and ``trials`` are how many. All sources are asked about the photographs
    that they share. Raises FeatureStoreError as ``identification_table`` and ``same_person_trials`` do.
    """
    held = default_held_out(store) if held_out is None else held_out
    found = identification_table(store, held, layers).rename(
        columns={
            "accuracy": "identification",
            "cluster_low": "identification_low",
            "cluster_high": "identification_high",
            "chance": "identification_chance",
        }
    )
    sources = [store.source(name) for name in dict.fromkeys(found["source"])]
    shared = shared_items(sources)
    drawn = same_person_trials(sources[0], n_trials, seed, np.flatnonzero(shared[0]))
    rows = [
        {"source": source.name, "layer": layer, **_same_person(store, source, layer, drawn)}
        for source in sources
        for layer in source.layers
        if layer in set(found.loc[found["source"] == source.name, "layer"])
    ]
    table = pd.DataFrame(rows).merge(found, on=["source", "layer"], validate="one_to_one")
    return table[list(_COLUMNS)]


_SCORES = ("identification", "same_person")
_COLUMNS = (
    "source",
    "backbone",
    "weights",
    "layer",
    *(f"{score}{end}" for score in _SCORES for end in ("", "_low", "_high", "_chance")),
    "probes",
    "gallery",
    "trials",
    "set_aside",
    "not_shared",
)


def default_held_out(store: FeatureStore) -> list[str]:
    """The last views, in natural order, three tenths of those that the first source has; one at least.

    A mirrored view goes with the one that it mirrors: apart, each would be identified by its own mirror image.
    """
    first = next(iter(store.sources.values()))
    views = in_natural_order(set(first.coordinate("view")))
    plain = in_natural_order({view.removesuffix(FLIPPED) for view in views})
    held = set(plain[-max(1, round(HELD_OUT_SHARE * len(plain))) :])
    return [view for view in views if view.removesuffix(FLIPPED) in held]


def _same_person(store: FeatureStore, source: Source, layer: str, drawn: pd.DataFrame) -> dict[str, float]:
    trials = match(drawn, store, source.name)
    right = zero_shot_choices(store, layer, trials, source.name)["right"].to_numpy()
    score = accuracy_over(right, list(clusters_of(trials.table).values()))
    return {
        "same_person": score.value,
        "same_person_low": score.low,
        "same_person_high": score.high,
        "same_person_chance": CHANCE,
        "trials": len(trials),
    }
