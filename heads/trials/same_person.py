"""Trials made from keys alone: one person twice, and another one."""

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.store.reader import Source
from heads.trials.tables import FACES, ODD, VIEWS

SAME_PERSON = "same-person"  # what such trials are called where a file is expected


def same_person_trials(source: Source, n: int, seed: int, items: np.ndarray | None = None) -> pd.DataFrame:
    """``n`` trials from keys alone: two views of one face, one view of another, which is the odd one; places at random.

    Faces are drawn uniformly among those with two views or more, by a generator of their own, out of all items or of
    ``items``; of a photograph that is there under several keys, one alone. For ``match``.
    """
    if n < 1:
        raise FeatureStoreError(f"{n} same-person trials cannot be drawn; ask for 1 or more.")
    items = np.arange(source.n_items) if items is None else items
    first_of_each = np.unique(source.photographs[items], return_index=True)[1]
    keys = source.keys[np.sort(items[first_of_each])]
    views = keys.to_frame(index=False).groupby("face_id")["view"].agg(list)
    twice = views[views.map(len) > 1]
    if len(twice) < 1 or len(views) < 2:
        raise FeatureStoreError(
            f"{source.folder} has {len(twice)} faces with two views or more, of {len(views)}; same-person trials need one "
            "such face and another one."
        )
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        same = twice.index[rng.integers(len(twice))]
        other = same
        while other == same:
            other = views.index[rng.integers(len(views))]
        first, second = rng.choice(len(views[same]), 2, replace=False)
        three = [(same, views[same][first]), (same, views[same][second])]
        three.insert(int(rng.integers(3)), (other, views[other][rng.integers(len(views[other]))]))
        faces, seen = zip(*three, strict=True)
        rows.append([*faces, *seen, other])
    return pd.DataFrame(rows, columns=[*FACES, *VIEWS, ODD], dtype=object)
