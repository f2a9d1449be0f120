"""Photographs that went away, were renamed, or are there twice: the table asked for beside the items of a source.

A photograph is known by its content: the file's sha256, whether it is mirrored and, where faces are cut out, box or landmarks.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import FLIPPED, KEY
from featurestore.photos.files import is_there
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rewriting import rename_items

Key = tuple[str, str]
EVERY_GONE = "gone"  # stands for all items whose photographs are no longer there


@dataclass(frozen=True)
class Rename:
    """An item (its row, key and photograph's sha256) whose photograph now has the key ``new`` and lies at ``path``."""

    row: int
    old: Key
    new: Key
    path: str
    sha256: str

    def mirrored(self, row: int) -> "Rename":
        """The same for the item at ``row``, which holds the photograph mirrored."""
        old, new = ((face, view + FLIPPED) for face, view in (self.old, self.new))
        return Rename(row, old, new, self.path, self.sha256)

    def __str__(self) -> str:
        return f"{'/'.join(self.old)} → {'/'.join(self.new)}"


@dataclass(frozen=True)
class Moves:
    """What became of a source's photographs.

    ``gone`` are items without a photograph: neither key nor file is there any more. ``renamed`` pairs items whose photograph is
    not at their key with a key that has it now. ``copies`` are pairs of a photograph and an earlier one of the same content.
    """

    gone: tuple[Key, ...] = ()
    renamed: tuple[Rename, ...] = ()
    copies: tuple[tuple[Key, Key], ...] = ()

    @property
    def lost(self) -> list[Key]:
        """The gone ones that no other key has."""
        renamed = {each.old for each in self.renamed}
        return [key for key in self.gone if key not in renamed]


def find_moves(
    source: Source,
    old: pd.DataFrame,
    found: pd.DataFrame,
    known: np.ndarray,
    digests: Sequence[str | None],
    place: tuple[str, ...],
) -> Moves:
    """Compare the photographs ``found`` with the items ``old`` of ``source`` by content.

    ``known`` (int) gives each found photograph's row, -1 for a new one; ``digests`` its sha256, None if it cannot be read;
    ``place`` names the coordinates by which faces are cut out.
    """
    stored, given = _contents(old, old["image_sha256"], place), _contents(found, digests, place)
    gone = gone_rows(old, known)
    changed = [i for i, row in enumerate(known) if row >= 0 and given[i] and given[i] != stored[row]]
    displaced: dict[Hashable, deque[int]] = defaultdict(deque)
    for row in sorted([*gone, *(int(known[i]) for i in changed)]):
        if stored[row]:
            displaced[stored[row]].append(row)
    pairs = []
    for i in [*np.flatnonzero(known < 0).tolist(), *changed]:
        if given[i] and displaced.get(given[i]):
            pairs.append((displaced[given[i]].popleft(), i))
    pairs = _possible(pairs, known)
    old_keys, keys = (list(zip(table["face_id"], table["view"], strict=True)) for table in (old, found))
    renamed = [Rename(row, old_keys[row], keys[i], str(found["path"].iloc[i]), str(digests[i])) for row, i in pairs]
    renamed += _mirrored(renamed, {key: row for row, key in enumerate(old_keys)}, keys)
    now = {each.row: each.new for each in renamed}
    first: dict[Hashable, Key] = {}
    for row in np.flatnonzero(source.originals == np.arange(len(old))).tolist():
        if stored[row]:
            first[stored[row]] = now.get(row, old_keys[row])
    copies = []
    taken = set(now.values())
    for i, content in enumerate(given):
        if content and keys[i] not in taken and first.setdefault(content, keys[i]) != keys[i]:
            copies.append((keys[i], first[content]))
    return Moves(tuple(old_keys[row] for row in gone), tuple(renamed), tuple(copies))


def gone_rows(old: pd.DataFrame, known: np.ndarray) -> list[int]:
    """Rows of items whose key is not asked for and whose file is not there; ``known`` as ``find_moves`` takes it."""
    paths = old["path"].to_numpy(object)
    return [row for row in np.setdiff1d(np.arange(len(old)), known).tolist() if not is_there(paths[row])]


def rename_photographs(store: Path, name: str, renamed: Sequence[Rename]) -> dict[str, int]:
    """Give items the keys that their photographs have now, under ``store_lock``: how many in each source.

    Other sources than ``name`` follow where the old key has the same photograph and the new one is free.
    """
    counts = {}
    others = [other for other in FeatureStore.open(store).sources.values() if other.name != name]
    for other in others:  # first, so that a run that is killed finds the renames again
        possible = _in_another(other, renamed)
        if possible:
            rename_items(store, other.name, {each.old: (*each.new, each.path) for each in possible})
            counts[other.name] = len(possible)
    rename_items(store, name, {each.old: (*each.new, each.path) for each in renamed})
    return {name: len(renamed), **counts}


def rows_to_forget(source: Source, found: pd.DataFrame, names: Iterable[str]) -> np.ndarray:
    """Rows (int64) of the items that ``names`` mean: ``face/view``, a face, or ``gone``.

    FeatureStoreError for names that are not there, and for photographs that are ``found``: they would come back at once.
    """
    rows: set[int] = set()
    known = source.keys.get_indexer(pd.MultiIndex.from_frame(found[list(KEY)]))
    for name in names:
        if name == EVERY_GONE:
            rows.update(gone_rows(source.items.reset_index(), known))
            continue
        pairs = [(name[:i], name[i + 1 :]) for i, letter in enumerate(name) if letter == "/"]
        pairs = [pair for pair in pairs if pair in source.keys] or pairs[:1]
        is_face = not pairs or name in source.keys.get_level_values(0)
        rows.update(source.find(name if is_face else pairs).tolist())
    there = sorted(rows & set(known.tolist()))
    if there:
        raise FeatureStoreError(
            f"{'/'.join(source.keys[there[0]])} is still among the photographs of `images` ({len(there)} of those to forget "
            "are), so it would be cached again at once. Take it out of there first."
        )
    return np.array(sorted(rows), np.int64)


def _contents(table: pd.DataFrame, digests: Iterable[str | None], place: tuple[str, ...]) -> list[Hashable]:
    """What each photograph is known by; None for one without a hash."""
    places = table.reindex(columns=list(place)).to_numpy(np.float64).tolist()
    flipped = table["view"].str.endswith(FLIPPED)
    return [
        (digest, *how) if digest else None for digest, *how in zip(digests, flipped, map(tuple, places), strict=True)
    ]


def _possible(pairs: list[tuple[int, int]], known: np.ndarray) -> list[tuple[int, int]]:
    """Without those (row, photograph) whose new key belongs to an item that keeps it."""
    while True:
        moving = {row for row, _ in pairs}
        fit = [(row, i) for row, i in pairs if known[i] < 0 or int(known[i]) in moving]
        if len(fit) == len(pairs):
            return fit
        pairs = fit


def _mirrored(renamed: Sequence[Rename], rows: Mapping[Key, int], taken: Iterable[Key]) -> list[Rename]:
    """Where the photographs are asked for plain alone: the items among ``rows`` that hold the renamed ones mirrored."""
    old = {each.old for each in renamed}
    twins = [each.mirrored(rows.get((each.old[0], each.old[1] + FLIPPED), -1)) for each in renamed]
    twins = [twin for twin in twins if twin.row >= 0 and twin.old not in old and twin.new not in set(taken)]
    known = np.array([rows.get(twin.new, -1) for twin in twins], np.int64)
    return [twins[i] for _, i in _possible([(twin.row, i) for i, twin in enumerate(twins)], known)]


def _in_another(source: Source, renamed: Sequence[Rename]) -> list[Rename]:
    source.require_unique_keys()
    renamed = [*renamed, *_mirrored(renamed, {key: row for row, key in enumerate(source.keys)}, ())]
    rows = source.keys.get_indexer(pd.MultiIndex.from_tuples([each.old for each in renamed]))
    known = source.keys.get_indexer(pd.MultiIndex.from_tuples([each.new for each in renamed]))
    hashes = source.coordinate("image_sha256")
    pairs = [(int(row), i) for i, row in enumerate(rows) if row >= 0 and hashes[row] == renamed[i].sha256]
    return [renamed[i] for _, i in _possible(pairs, known)]
