"""Odd-one-out trials, matched to the items of a store by key.

A trial is three items and the face that was called the odd one. Rows are found by (face, view), never by position.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from featurestore.conditions import rows_that_meet
from featurestore.errors import FeatureStoreError
from featurestore.keys import KEY
from featurestore.store.reader import FeatureStore, Source
from featurestore.text import listing, natural_order, near_matches
from heads.trials.conditions import divide_conditions
from heads.trials.faults import Faults
from heads.trials.tables import EXAMPLE, FACES, ODD, ODD_POSITION, ODD_VIEW, TIME_OUT, VIEWS, as_keys, read_table


@dataclass(frozen=True)
class Trials:
    """Trials matched to the items of one or several sources.

    ``items`` (n, 3) int64 number the items of ``sources`` one source after the other; ``odd`` (n,) int64 is the place,
    0 … 2, of the odd one. ``table`` has a row per trial: face_1 … view_3 as they are called in the store, odd,
    odd_position (1 … 3) and the columns of the file. ``unanswered`` trials of the file were left out because they name no
    odd face, ``excluded`` ones because conditions did not hold, and the rows of ``faulty`` for what its column ``fault`` says.
    ``photographs`` (n, 3) int64 is ``items``, but for a photograph that the store holds under several keys the first of them.
    """

    items: np.ndarray
    odd: np.ndarray
    table: pd.DataFrame
    sources: tuple[str, ...]
    unanswered: int = 0
    excluded: int = 0
    faulty: pd.DataFrame = field(default_factory=pd.DataFrame)
    photographs: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))

    def __len__(self) -> int:
        return len(self.odd)

    @property
    def hash(self) -> str:
        """sha256 (hex) of who was shown and who was odd, in the file's order: what a split and a run belong to."""
        digest = hashlib.sha256()
        for name in (*FACES, *VIEWS, ODD):
            digest.update("\0".join(self.table[name].astype(str)).encode() + b"\1")
        digest.update(self.items.tobytes())
        faces = self.table[list(FACES)].to_numpy(object)
        if ((faces == self.table[ODD].to_numpy(object)[:, None]).sum(axis=1) > 1).any():
            digest.update(self.odd.tobytes())  # the face alone does not say which of two pictures was odd
        return digest.hexdigest()

    def where(self, chosen: np.ndarray) -> "Trials":
        """Those trials alone; ``chosen`` is a bool per trial."""
        table = self.table[chosen].reset_index(drop=True)
        return replace(
            self, items=self.items[chosen], odd=self.odd[chosen], table=table, photographs=self.photographs[chosen]
        )


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
    on_error: Literal["stop", "skip"] = "stop",
) -> Trials:
    """Trials from a CSV or Parquet file, matched to ``store``.

    Columns: ``face_1, face_2, face_3, odd`` or ``head1, head2, head3, head_odd``; ``odd_position`` (1 … 3) or ``odd_view``
    beside ``odd`` where one face is shown twice; optionally ``view_1 …``, ``session``, ``participant``,
    ``response_time`` and any others. Without ``view_*`` the view is the session's, ``view``, or the only one that every
    face has. ``where`` are conditions on a column of the trials or on one of the store's items, which then must
    hold for all three. Rows with a face, view or session that is not there, or an odd one that is not one of the
    three, are faulty: FeatureStoreError lists all of them by kind, or with ``on_error="skip"`` they are left out.
    Raises it also for columns that are not there, for a condition that cannot be evaluated, and if no trial is left.
    """
    sessions = sessions or Sessions({}, {})
    table = read_table(path)
    n_read = len(table)
    conditions = list(where)
    columns = _item_columns(store, source) if conditions else []
    as_written = table.drop(columns=["line", "fault"]).rename(columns=table.attrs["renamed"])
    of_trials, of_items = divide_conditions(conditions, list(as_written.columns), columns)
    kept = np.ones(len(table), bool)
    for condition in of_trials:
        kept &= rows_that_meet(condition, as_written)
    table = table[kept | (table["fault"] != "")].reset_index(drop=True)
    answered = _answered(table) | (table["fault"] != "")
    table, unanswered = table[answered].reset_index(drop=True), int((~answered).sum())
    if table.empty:
        raise FeatureStoreError(
            f"{path} has no trials with an answer{' that meet `where`' if of_trials else ''} ({unanswered} without)."
        )
    trials = replace(match(table, store, source, view, sessions, str(path), on_error), unanswered=unanswered)
    for condition in of_items:
        parts = [rows_that_meet(condition, store.source(name).items) for name in trials.sources]
        trials = trials.where(np.concatenate(parts)[trials.items].all(axis=1))
    trials = replace(trials, excluded=n_read - unanswered - len(trials.faulty) - len(trials))
    if not len(trials):
        raise FeatureStoreError(f"no trial of {path} has three items with {' and '.join(of_items)}.")
    return trials


def _answered(table: pd.DataFrame) -> pd.Series:
    """bool per row: whether it names an odd one."""
    no_answer = {""} if (table[list(FACES)] == TIME_OUT).any(axis=None) else {"", TIME_OUT}
    answered = ~table[ODD].isin(no_answer)
    return answered | ~table[ODD_POSITION].isin(["", TIME_OUT]) if ODD_POSITION in table.columns else answered


def match(
    table: pd.DataFrame,
    store: FeatureStore,
    source: str | None = None,
    view: str | None = None,
    sessions: Sessions | None = None,
    name: str = "the trials",
    on_error: Literal["stop", "skip"] = "stop",
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
    if "participant" in table.columns:
        table["participant"] = as_keys(table["participant"])
    given = table
    faults = Faults(table["fault"] if "fault" in table.columns else pd.Series("", table.index))
    table = table.drop(columns="fault", errors="ignore")
    table["source"] = _sources(table, store, source, sessions, name, faults)
    fill = any(column not in table.columns for column in VIEWS)
    if not fill and (view or sessions.views):
        raise FeatureStoreError(
            f"{name} says which view was shown, in {', '.join(VIEWS)}; leave `view` and the views of sessions out."
        )
    table = table.assign(**dict.fromkeys(VIEWS, "")) if fill else table
    names = tuple(sorted(table["source"][~faults.found].unique()))
    items = np.zeros((len(table), 3), np.int64)
    starts = dict(zip(names, np.cumsum([0, *(store.source(each).n_items for each in names)]), strict=False))
    for each in names:
        found = store.source(each)
        found.require_unique_keys()
        own = (table["source"] == each).to_numpy() & ~faults.found
        table = _match_faces(table, own, found, faults)
        if fill:
            table = _fill_views(table, own, found, view, sessions, name, faults)
        for place, (face, seen) in enumerate(zip(FACES, VIEWS, strict=True)):
            items[:, place] = np.where(
                own, starts[each] + _find(table, own, found, face, seen, faults), items[:, place]
            )
    odd = _odd_places(table, faults)
    good = ~faults.found
    if not good.all():
        told = f"{name}: {int((~good).sum())} of {len(table)} trials are faulty.\n{faults.describe(table['line'].to_numpy())}"
        if on_error == "stop":
            raise FeatureStoreError(f"{told}\nCorrect them, or leave them out: `on_error` skip.")
        if not good.any():
            raise FeatureStoreError(f"{told}\nNo trial is left.")
    faulty = given[~good].assign(
        fault=[_fault(*pair) for pair in zip(faults.kind[~good], faults.value[~good], strict=True)]
    )
    table, odd = table[good].reset_index(drop=True), odd[good]
    table[ODD] = table[list(FACES)].to_numpy(object)[np.arange(len(odd)), odd]
    table[ODD_POSITION] = odd + 1
    originals = [store.source(each).photographs + start for each, start in starts.items()]
    return Trials(items[good], odd, table, names, faulty=faulty, photographs=np.concatenate(originals)[items[good]])


def _fault(kind: str, value: str) -> str:
    return f"{kind}: {value}" if value else kind


def _sources(
    table: pd.DataFrame, store: FeatureStore, source: str | None, sessions: Sessions, name: str, faults: Faults
) -> pd.Series | str:
    if not sessions.sources:
        return store.source(source).name
    by_session = {session: store.source(wanted).name for session, wanted in sessions.sources.items()}
    return _by_session(table, by_session, name, faults)


def _by_session(table: pd.DataFrame, values: Mapping[str, str], name: str, faults: Faults) -> pd.Series:
    if "session" not in table.columns:
        raise FeatureStoreError(f"{name} has no column session, so sessions cannot be distinguished.")
    session = as_keys(table["session"])
    unknown = ~session.isin(list(values))
    faults.note(
        unknown.to_numpy(), f"are of a session for which nothing is given; known are {listing(values)}", session
    )
    return session.map(dict(values)).fillna("")


def _match_faces(table: pd.DataFrame, own: np.ndarray, source: Source, faults: Faults) -> pd.DataFrame:
    """Faces under their names in the store: the same text, or for a number the one face that ends in it."""
    known = set(source.keys.get_level_values(0))
    numbers: dict[str, list[str]] = {}  # by their digits: a number may have any number of them
    for face in known:
        digits = re.search(r"[0-9]+$", face)
        if digits:
            numbers.setdefault(digits[0].lstrip("0"), []).append(face)
    called: dict[str, str] = {}
    for face in pd.unique(table.loc[own, [*FACES, ODD]].to_numpy().ravel()):
        candidates = numbers.get(face.lstrip("0"), []) if re.fullmatch("[0-9]+", face) else []
        if face in known:
            called[face] = face
        elif len(candidates) == 1:
            called[face] = candidates[0]
    faces = table[list(FACES)].to_numpy(object)
    unknown = own[:, None] & ~np.isin(faces, list(called))
    if unknown.any():
        hint = _known_faces(faces[unknown][0], known)
        first = faces[np.arange(len(faces)), unknown.argmax(axis=1)]
        faults.note(unknown.any(axis=1), f"name a face that is not in {source.folder} ({hint})", first)
    table = table.copy()
    for column in (*FACES, ODD):
        table.loc[own, column] = table.loc[own, column].map(lambda face: called.get(face, face)).astype(object)
    return table


def _known_faces(unknown: str, known: set[str]) -> str:
    names = sorted(known, key=natural_order)
    hint = near_matches(unknown, names) if len(known) <= 200 else f"It holds {listing(names, 3)}."
    return hint.removesuffix(".")


def _fill_views(
    table: pd.DataFrame,
    own: np.ndarray,
    source: Source,
    view: str | None,
    sessions: Sessions,
    name: str,
    faults: Faults,
) -> pd.DataFrame:
    seen: pd.Series | str | None = _by_session(table, sessions.views, name, faults) if sessions.views else view
    if seen is None:
        views = sorted(source.keys.get_level_values(1).unique(), key=natural_order)
        if len(views) > 1:
            raise FeatureStoreError(
                f"{name} does not say which view was shown, and {source.folder} has {len(views)}: {listing(views)}. "
                f"Say which: `view` {'frontal' if 'frontal' in views else views[0]}, one for each session, or "
                "columns view_1, view_2, view_3."
            )
        seen = str(views[0])
    table = table.copy()
    for column in VIEWS:
        table.loc[own, column] = seen if isinstance(seen, str) else seen[own]
    return table


def _find(table: pd.DataFrame, own: np.ndarray, source: Source, face: str, view: str, faults: Faults) -> np.ndarray:
    """(n,) row numbers in ``source``, of the rows that are its own."""
    own = own & ~faults.found
    keys = pd.MultiIndex.from_arrays([table[face].to_numpy(object), table[view].to_numpy(object)])
    rows: np.ndarray = source.keys.get_indexer(keys)
    kind = f"show an item that is not in {source.folder}, though its face is, in other views; cache its photograph too"
    absent = own & (rows < 0)
    shown = np.full(len(rows), "", object)
    shown[absent] = [f"{face}/{view}" for face, view in keys[absent]]
    faults.note(absent, kind, shown)
    return rows


def _odd_places(table: pd.DataFrame, faults: Faults) -> np.ndarray:
    """(n,) 0 … 2: the place that the odd face, its position and its view agree on, of those that are given."""
    faces, odd = table[list(FACES)].to_numpy(object), table[ODD].to_numpy(object)
    agreed: np.ndarray = np.where((odd == "")[:, None], True, faces == odd[:, None])
    faults.note(~agreed.any(axis=1), "name an odd face that is not one of the three", odd)
    if ODD_POSITION in table.columns:
        position = table[ODD_POSITION].astype(str).to_numpy(object)
        faults.note(~np.isin(position, ["", "1", "2", "3"]), "have an odd_position that is not 1, 2 or 3", position)
        agreed &= (position == "")[:, None] | (np.array(["1", "2", "3"]) == position[:, None])
        faults.note(~agreed.any(axis=1), "contradict themselves: the face at odd_position is not the odd face", odd)
    if ODD_VIEW in table.columns:
        seen = table[ODD_VIEW].astype(str).to_numpy(object)
        agreed &= (seen == "")[:, None] | (table[list(VIEWS)].to_numpy(object) == seen[:, None])
        faults.note(~agreed.any(axis=1), "name an odd_view in which the odd face was not shown", seen)
    twice = (
        f"name an odd face that is shown twice; say which with odd_position (1, 2, 3) or odd_view, such as: {EXAMPLE}"
    )
    faults.note(agreed.sum(axis=1) > 1, twice, odd)
    return np.asarray(agreed.argmax(axis=1), np.int64)


def _item_columns(store: FeatureStore, source: str | None) -> list[str]:
    sources = [store.source(source)] if source else list(store.sources.values())
    return sorted({*KEY, *(column for each in sources for column in each.items.columns)})
