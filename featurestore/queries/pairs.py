"""Pairs of items, of the same person or not: drawn from the keys, from a table, or from LFW's ``pairs.txt``."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, LANDMARKS
from featurestore.photos.csv_files import read_csv
from featurestore.queries.selection import Selection
from featurestore.store.reader import first_of_photograph
from featurestore.text import in_natural_order, listing, near_matches, shortened

Pairs: TypeAlias = str | os.PathLike[str] | pd.DataFrame

_ITEMS = ("face_1", "view_1", "face_2", "view_2")
_FOLDS = 10
_TRUTH = {"1": True, "true": True, "0": False, "false": False}
_MOST_DIGITS = 12  # of a number in LFW's list
_NEAR = 10_000  # names in the search for one that is near another


def photograph_numbers(labels: pd.DataFrame, mirrored_is_another: bool = True) -> np.ndarray:
    """(n,) int64, equal for items of a ``Selection`` that are known to show the same photograph (``first_of_photograph``)."""
    known = [name for name in ("image_sha256", *BOX, *LANDMARKS) if name in labels]
    return first_of_photograph(labels[known], mirrored_is_another)


def drawn_pairs(chosen: Selection, n_pairs: int, rng: np.random.Generator) -> pd.DataFrame:
    """Columns first and second (places), _ITEMS and same."""
    if n_pairs < 2:
        raise FeatureStoreError(f"`n_pairs` {n_pairs} is too few: give at least 2 pairs of each kind.")
    faces = pd.factorize(chosen.labels.index.get_level_values("face_id").to_numpy(object))[0]
    photographs = photograph_numbers(chosen.labels, mirrored_is_another=False)
    order = np.argsort(faces, kind="stable")
    starts = np.searchsorted(faces[order], faces[order])  # of each item's face, in this order
    same = _draw(np.arange(len(order)) - starts, starts, photographs[order], n_pairs, rng)
    different = _draw(starts, np.zeros_like(starts), photographs[order], n_pairs, rng)
    places = np.sort(order[np.concatenate([same, different])], axis=1)
    is_same = np.arange(len(places)) < len(same)
    table = pd.DataFrame({"first": places[:, 0], "second": places[:, 1], "same": is_same})
    table = table.sort_values(["first", "second"], ignore_index=True)  # rows are then read in their order on disk
    return _with_names(table, chosen.labels.index)


def _draw(
    counts: np.ndarray, starts: np.ndarray, photographs: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """(≤ n, 2) places: some of the pairs of each item with the ``counts`` items from ``starts``, but for the same photograph."""
    ends = np.cumsum(counts)
    total = int(ends[-1])
    held = np.bincount(np.unique(photographs, return_inverse=True)[1])
    copies = int((held * (held - 1) // 2).sum())
    numbers = rng.choice(total, min(total, n + copies), replace=False)
    one = np.searchsorted(ends, numbers, side="right")
    other = starts[one] + numbers - (ends[one] - counts[one])
    apart = np.flatnonzero(photographs[one] != photographs[other])[:n]
    return np.stack([one[apart], other[apart]], axis=1)


def _with_names(table: pd.DataFrame, index: pd.Index) -> pd.DataFrame:
    for number, place in enumerate(("first", "second"), start=1):
        for level, name in enumerate(("face", "view")):
            table[f"{name}_{number}"] = index.get_level_values(level).to_numpy(object)[table[place]]
    return table[["first", "second", *_ITEMS, "same"]]


def given_pairs(pairs: Pairs, index: pd.Index) -> pd.DataFrame:
    """Columns first and second (places), _ITEMS, same and, if given, fold."""
    if not index.is_unique:
        raise FeatureStoreError(
            f"`items` holds {listing(index[index.duplicated()], 3)} twice, so `pairs` cannot name them. Give each its own view."
        )
    if isinstance(pairs, pd.DataFrame):
        table = _checked(pairs, "`pairs`", 0)
    else:
        path = Path(pairs).expanduser()
        header = _first_line(path)
        if re.fullmatch(r"\d+(\s+\d+)?", header):
            table = _lfw_pairs(path, set(index))
        else:
            table = _checked(read_csv(path, dtype=str, keep_default_na=False, na_values=[""]), str(path), 2)
    first, second = (
        pd.MultiIndex.from_arrays([table[f"face_{k}"], table[f"view_{k}"]], names=index.names) for k in (1, 2)
    )
    places = [index.get_indexer(keys) for keys in (first, second)]
    missing = first[places[0] < 0].union(second[places[1] < 0], sort=False).unique()
    if len(missing):
        _refuse_missing(missing, index)
    themselves = np.flatnonzero(places[0] == places[1])
    if len(themselves):
        raise FeatureStoreError(
            f"{len(themselves)} of {len(table)} `pairs` are an item and itself: {'|'.join(first[themselves[0]])}. Remove them."
        )
    return table.assign(first=places[0], second=places[1])


def _first_line(path: Path) -> str:
    if not path.is_file():
        raise FeatureStoreError(f"there is no file {path}. Check the path given with `pairs`.")
    return next(iter(_lines(path)), "")


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise FeatureStoreError(f"{path} cannot be read as a list of pairs: {error}.") from None


def _refuse_missing(missing: pd.Index, index: pd.Index) -> None:
    face = missing[0][0]
    views = [known for name, known in index if name == face]
    near = (
        f"Face {face!r} has the views {listing(in_natural_order(views), 12)}."
        if views
        else f"There is no face {face!r}. {near_matches(face, list(dict.fromkeys(index.get_level_values(0)))[:_NEAR])}"
    )
    raise FeatureStoreError(
        f"{len(missing)} items that `pairs` name are not among the {len(index)} items: {listing(map('|'.join, missing), 3)}. "
        f"{near} Cache them, choose a wider `where`, or leave their pairs out."
    )


def _checked(table: pd.DataFrame, what: str, offset: int) -> pd.DataFrame:
    """The columns of a table of pairs: _ITEMS as text, same as bool and, if there is one, fold."""
    absent = [name for name in _ITEMS if name not in table]
    if absent:
        raise FeatureStoreError(
            f"{what} has no column {listing(absent)}; it has {listing(table.columns, 12)}. Pairs need face_1, view_1, face_2 and "
            "view_2; same and fold may be there too."
        )
    kept = table[[*_ITEMS, *(name for name in ("same", "fold") if name in table)]].reset_index(drop=True)
    line = "line" if offset else "row"
    for name in kept:
        empty = np.flatnonzero(kept[name].isna())
        if len(empty):
            raise FeatureStoreError(f"{what} {line} {empty[0] + offset} has no {name}. Fill it in, or remove the pair.")
        if name in _ITEMS and pd.api.types.is_float_dtype(kept[name]):
            raise FeatureStoreError(
                f"{what} has numbers with a point in {name}, such as {kept[name].iloc[0]}, which could be written in several "
                "ways. Give text, as it is in the store."
            )
    made = kept.assign(**{name: kept[name].astype(str).to_numpy(object) for name in _ITEMS})
    made["same"] = _truth(kept["same"], what) if "same" in kept else (made["face_1"] == made["face_2"])
    if "fold" in made and made["fold"].nunique() < 2:
        raise FeatureStoreError(
            f"all pairs of {what} are in one fold, and a threshold is chosen on the others. Leave the column fold out."
        )
    return made[[*_ITEMS, "same", *made.columns.intersection(["fold"])]]


def _truth(column: pd.Series, what: str) -> np.ndarray:
    text = column.astype(str).str.strip().str.lower()
    wrong = column[~text.isin(_TRUTH)]
    if len(wrong):
        raise FeatureStoreError(f"{what} has {wrong.iloc[0]!r} in the column same. Give 1 or 0, or true or false.")
    return np.array([_TRUTH[value] for value in text], bool)


def _lfw_pairs(path: Path, known: set[tuple[str, str]]) -> pd.DataFrame:
    header, *lines = _lines(path)
    folds, n = ([1, *(int(number[:_MOST_DIGITS]) for number in header.split())])[-2:]  # so long, it fits no file
    if len(lines) != 2 * folds * n:
        raise FeatureStoreError(
            f"{path} has {len(lines)} pairs, and its first line {shortened(header)!r} says {folds} × 2 × {n}. "
            "Restore it from a copy."
        )
    rows = [(*pair, number // (2 * n)) for number, pair in enumerate(_lfw_lines(path, lines, known))]
    table = pd.DataFrame(rows, columns=[*_ITEMS, "fold"])
    table["same"] = table["face_1"] == table["face_2"]
    return table[[*_ITEMS, "same", "fold"]] if folds > 1 else table[[*_ITEMS, "same"]]


def _lfw_lines(path: Path, lines: list[str], known: set[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    """Face, view, face, view of each line."""
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) == 3:
            fields = [fields[0], fields[1], fields[0], fields[2]]
        if len(fields) != 4 or not all(each.isdecimal() and len(each) <= _MOST_DIGITS for each in fields[1::2]):
            raise FeatureStoreError(
                f"{path} line {number} is no pair: {line!r:.100}. It needs name, i, j, or name, i, name, j, with tabs between."
            )
        one, other = (_lfw_item(fields[k], int(fields[k + 1]), known) for k in (0, 2))
        yield *one, *other


def _lfw_item(face: str, number: int, known: set[tuple[str, str]]) -> tuple[str, str]:
    views = (f"{face}_{number:04d}", f"{number:04d}", str(number))
    return face, next((view for view in views if (face, view) in known), views[0])


def require_both_kinds(same: np.ndarray, table: pd.DataFrame) -> None:
    """FeatureStoreError unless there are two pairs of each kind, ``same`` (bool) and different."""
    n_same, n_different = int(same.sum()), int((~same).sum())
    if min(n_same, n_different) < 2:
        raise FeatureStoreError(
            f"there are {n_same} pairs of the same face and {n_different} of different faces, and verification needs at least "
            "2 of each. Choose a wider `where`, cache more photographs, or give other `pairs`."
        )
    n_faces = len(pd.unique(pd.concat([table["face_1"], table["face_2"]])))
    if n_faces < 3:
        raise FeatureStoreError(
            f"the pairs are of {n_faces} faces, and verification needs at least 3. Choose a wider `where`, cache more "
            "photographs, or give other `pairs`."
        )


def drawn_folds(same: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) int64 from 0; each kind of pairs is spread over all folds."""
    n_folds = min(_FOLDS, int(same.sum()), int((~same).sum()))
    folds = np.empty(len(same), np.int64)
    for kind in (same, ~same):
        folds[kind] = rng.permutation(int(kind.sum())) % n_folds
    return folds
