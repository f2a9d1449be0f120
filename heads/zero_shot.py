"""What an observer would choose who goes by a layer's similarities alone: nothing is trained."""

import os
from pathlib import Path

import pandas as pd

from featurestore.store.reader import FeatureStore
from heads.evaluation import evaluate
from heads.features import Features
from heads.registry import draw_head
from heads.trials.matching import Trials, load_trials
from heads.trials.tables import FACES


def zero_shot_choices(
    store: FeatureStore,
    layer: str,
    trials: str | os.PathLike[str] | Trials,
    source: str | None = None,
    measure: str = "cosine",
) -> pd.DataFrame:
    """The trials with two columns more: ``choice``, the face that is not of the most similar pair, and ``right`` (bool).

    ``trials`` is a file as ``load_trials`` reads it, or what it gave. ``measure`` is ``cosine`` or ``dot``.
    Raises FeatureStoreError for layers, sources and trials as these do.
    """
    rows = store.rows(layer, source)
    matched = trials if isinstance(trials, Trials) else load_trials(Path(trials), store, source)
    head = draw_head("zero-shot", rows.shape[1:], seed=0, measure=measure).eval()
    chosen = evaluate(head, Features([rows]), matched.items).argmax(axis=1)
    faces = matched.table[list(FACES)].to_numpy(object)
    return matched.table.assign(choice=faces[range(len(chosen)), chosen], right=chosen == matched.odd)
