"""Odd-one-out trials, matched to the items of a store by key.

A trial is three items and the face that was called the odd one. Rows are found by (face, view), never by position.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import KEY
from featurestore.store.reader import FeatureStore, Source
from featurestore.text import listing, near_matches
from heads.trials.conditions import divide_conditions, rows_that_meet
from heads.trials.tables import FACES, ODD, TIME_OUT, VIEWS, as_key, read_table


@dataclass(frozen=True)
class Trials:
    """Trials matched to the items of one or several sources.

    ``items`` (n, 3) int64 number the items of ``sources`` one source after the other; ``odd`` (n,) int64 is the place,
    0 … 2, of the odd one. ``table`` has a row per trial: face_1 … view_3 as they are called in the store, odd, and the
    columns of the file. ``unanswered`` trials of the file were left out because they name no odd face, ``excluded`` ones
    because conditions did not hold.
    """

    items: np.ndarray
    odd: np.ndarray
    table: pd.DataFrame
    sources: tuple[str, ...]
    unanswered: int = 0
    excluded: int = 0

    def __len__(self) -> int:
        return len(self.odd)

    @property
    def hash(self) -> str:
        """sha256 (hex) of who was shown and who was odd, in the file's order: what a split and a run belong to."""
        digest = hashlib.sha256()
        for name in (*FACES, *VIEWS, ODD):
            digest.update("\0".join(self.table[name].astype(str)).encode() + b"\1")
        digest.update(self.items.tobytes())
        return digest.hexdigest()

    def where(self, chosen: np.ndarray) -> "Trials":
        """Those trials alone; ``chosen`` is a bool per trial."""
        table = self.table[chosen].reset_index(drop=True)
        return replace(self, items=self.items[chosen], odd=self.odd[chosen], table=table)


@dataclass(frozen=True)
class Sessions:
    """What a trial's session says about the items shown: ``views`` or ``sources`` by session, e.g. {"2D": "frontal"}."""

    views: Mapping[str, str]
    sources: Mapping[str, str]


def load_trials(
    path: Path,
    store: FeatureStore,
    source: str | None = None,
    view: str | None = None,
    sessions: Sessions | None = None,
    where: Iterable[str] = (),
) -> Trials:
    """Trials from a CSV or Parquet file, matched to ``store``.

    Columns: ``face_1, face_2, face_3, odd`` or ``head1, head2, head3, head_odd``; optionally ``view_1 …``, ``session``,
    ``participant``, ``response_time`` and any others. Without ``view_*`` the view is the session's, ``view``, or the
    only one that every face has. ``where`` are pandas expressions on a column of the trials or on one of the store's
    items, which then must hold for all three. Raises FeatureStoreError for columns, faces, views or sessions that are
    not there, for an odd face that is not one of the three, and for an expression that cannot be evaluated.
    """
    sessions = sessions or Sessions({}, {})
    table = read_table(path)
    n_read = len(table)
    conditions = list(where)
    columns = _item_columns(store, source) if conditions else []
    of_trials, of_items = divide_conditions(conditions, list(table.columns), columns)
    for condition in of_trials:
        table = table[rows_that_meet(condition, table)].reset_index(drop=True)
    no_answer = {""} if (table[list(FACES)] == TIME_OUT).any(axis=None) else {"", TIME_OUT}
    answered = ~table[ODD].isin(no_answer)
    table, unanswered = table[answered].reset_index(drop=True), int((~answered).sum())
    if table.empty:
        raise FeatureStoreError(
            f"{path} has no trials with an answer{' that meet `where`' if of_trials else ''} ({unanswered} without)."
        )
    trials = replace(match(table, store, source, view, sessions, str(path)), unanswered=unanswered)
    for condition in of_items:
        parts = [rows_that_meet(condition, store.source(name).items) for name in trials.sources]
        trials = trials.where(np.concatenate(parts)[trials.items].all(axis=1))
    trials = replace(trials, excluded=n_read - unanswered - len(trials))
    if not len(trials):
        raise FeatureStoreError(f"no trial of {path} has three items with {' and '.join(of_items)}.")
    return trials


def match(
    table: pd.DataFrame,
    store: FeatureStore,
    source: str | None = None,
    view: str | None = None,
    sessions: Sessions | None = None,
    name: str = "the trials",
) -> Trials:
    """Find every trial's three items in the store. ``table`` as ``read_table`` gives it; errors as ``load_trials``."""
    sessions = sessions or Sessions({}, {})
    if view and sessions.views:
        raise FeatureStoreError(
            "the view shown is either one for all trials (`view`) or one for each session, not both."
        )
    table = table.reset_index(drop=True)
    if "line" not in table.columns:
        table["line"] = np.arange(1, len(table) + 1)
    table["source"] = _sources(table, store, source, sessions, name)
    names = tuple(sorted(table["source"].unique()))
    items = np.zeros((len(table), 3), np.int64)
    matched, start = [], 0
    for each in names:
        own = (table["source"] == each).to_numpy()
        part = _match_faces(table[own], store.source(each), name)
        part = _fill_views(part, store.source(each), view, sessions, name)
        items[own] = start + np.stack(
            [_find(part, store.source(each), face, seen, name) for face, seen in zip(FACES, VIEWS, strict=True)], axis=1
        )
        start += store.source(each).n_items
        matched.append(part)
    table = pd.concat(matched).sort_index()
    return Trials(items, _odd_places(table, name), table, names)


def _sources(
    table: pd.DataFrame, store: FeatureStore, source: str | None, sessions: Sessions, name: str
) -> pd.Series | str:
    if not sessions.sources:
        return store.source(source).name
    by_session = {session: store.source(wanted).name for session, wanted in sessions.sources.items()}
    return _by_session(table, by_session, name)


def _by_session(table: pd.DataFrame, values: Mapping[str, str], name: str) -> pd.Series:
    if "session" not in table.columns:
        raise FeatureStoreError(f"{name} has no column session, so sessions cannot be distinguished.")
    session = table["session"].map(as_key)
    unknown = sorted(set(session) - set(values))
    if unknown:
        raise FeatureStoreError(
            f"{name} has the session {listing(map(repr, unknown))}, for which nothing is given; known are {listing(values)}. "
            f"Add it, or leave those trials out: `where` \"session == '{next(iter(values))}'\"."
        )
    return session.map(dict(values))


def _match_faces(table: pd.DataFrame, source: Source, name: str) -> pd.DataFrame:
    """Faces under their names in the store: the same text, or for a number the one face that ends in it."""
    known = set(source.keys.get_level_values(0))
    wanted = pd.unique(table[[*FACES, ODD]].to_numpy().ravel())
    numbers: dict[int, list[str]] = {}
    for face in known:
        digits = re.search(r"(\d+)$", face)
        if digits:
            numbers.setdefault(int(digits[1]), []).append(face)
    called: dict[str, str] = {}
    for face in wanted:
        candidates = numbers.get(int(face), []) if face.isdecimal() else []
        if face in known:
            called[face] = face
        elif len(candidates) == 1:
            called[face] = candidates[0]
    unknown = [face for face in pd.unique(table[list(FACES)].to_numpy().ravel()) if face not in called]
    if unknown:
        hint = (
            near_matches(unknown[0], sorted(known)) if len(known) <= 200 else f"It holds {listing(sorted(known), 3)}."
        )
        raise FeatureStoreError(
            f"{len(unknown)} faces of {name} are not in {source.folder}: {listing(map(repr, unknown))}. {hint} "
            "Cache their photographs too, or leave those trials out with `where`."
        )
    table = table.copy()
    for column in (*FACES, ODD):
        table[column] = table[column].map(lambda face: called.get(face, face)).astype(object)
    return table


def _fill_views(table: pd.DataFrame, source: Source, view: str | None, sessions: Sessions, name: str) -> pd.DataFrame:
    if all(column in table.columns for column in VIEWS):
        if view or sessions.views:
            raise FeatureStoreError(
                f"{name} says which view was shown, in {', '.join(VIEWS)}; leave `view` and the views of sessions out."
            )
        return table
    table = table.copy()
    seen: pd.Series | str | None = _by_session(table, sessions.views, name) if sessions.views else view
    if seen is None:
        views = source.keys.get_level_values(1).unique()
        if len(views) > 1:
            raise FeatureStoreError(
                f"{name} does not say which view was shown, and {source.folder} has {len(views)}: {listing(views)}. "
                f"Say which: `view` {'frontal' if 'frontal' in views else views[0]}, one for each session, or "
                "columns view_1, view_2, view_3."
            )
        seen = str(views[0])
    for column in VIEWS:
        table[column] = seen
    return table


def _find(table: pd.DataFrame, source: Source, face: str, view: str, name: str) -> np.ndarray:
    keys = pd.MultiIndex.from_arrays([table[face].to_numpy(object), table[view].to_numpy(object)])
    source.require_unique_keys()
    rows: np.ndarray = source.keys.get_indexer(keys)
    if (rows < 0).any():
        missing = keys[rows < 0].unique()
        raise FeatureStoreError(
            f"{name} shows {len(missing)} items that are not in {source.folder}: {listing(missing, 3)} (first in line "
            f"{table['line'].to_numpy()[rows < 0][0]}). The faces are there, in other views. Cache these photographs too."
        )
    return rows


def _odd_places(table: pd.DataFrame, name: str) -> np.ndarray:
    """0 … 2: which of the three is the odd face."""
    faces = table[list(FACES)].to_numpy(object)
    is_odd = faces == table[ODD].to_numpy(object)[:, None]
    for problem, what in ((~is_odd.any(axis=1), "is not one of"), (is_odd.sum(axis=1) > 1, "stands twice among")):
        if problem.any():
            first = int(np.flatnonzero(problem)[0])
            row = table.iloc[first]
            raise FeatureStoreError(
                f"{name}, line {row['line']}: the odd face {row[ODD]!r} {what} the three, {listing(map(repr, faces[first]))}; "
                f"so in {int(problem.sum())} trials. Correct them, or leave them out with `where`."
            )
    return np.asarray(is_odd.argmax(axis=1))


def _item_columns(store: FeatureStore, source: str | None) -> list[str]:
    sources = [store.source(source)] if source else list(store.sources.values())
    return sorted({*KEY, *(column for each in sources for column in each.items.columns)})
