"""Verification: whether two photographs show the same person, from how dissimilar they are to each layer."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import stats

from featurestore.errors import FeatureStoreError
from featurestore.intervals import accuracy_over
from featurestore.keys import BOX, FLIPPED, LANDMARKS
from featurestore.photos.csv_files import read_csv
from featurestore.queries.blocks import MEMORY, block_rows, computed, task
from featurestore.queries.dissimilarity import Metric, get_metric, prepared
from featurestore.queries.selection import Block, Data, Items, LayerRows, Names, Selection, select
from featurestore.text import in_natural_order, listing, near_matches

Pairs: TypeAlias = str | os.PathLike[str] | pd.DataFrame

FALSE_ACCEPTS = (0.1, 0.01, 0.001)  # rates at which true accepts are given
_ITEMS = ("face_1", "view_1", "face_2", "view_2")
_FOLDS = 10
_RESAMPLES = 1000
_BOOTSTRAP_SEED = 0
_TRUTH = {"1": True, "true": True, "0": False, "false": False}
_NEAR = 10_000  # names in the search for one that is near another


@dataclass(frozen=True)
class Verification:
    """Scores of each layer, and what they were computed from. A pair is accepted if its dissimilarity is at most a threshold.

    ``table`` has a row for each layer: layer, n_same and n_different (pairs), area (under the ROC, 0 … 1: the probability that
    a same pair is less dissimilar than a different one, ties counted half), equal_error_rate (0 … 1: where the ROC, straight
    between its points, has as many false accepts as false rejects), accuracy (share of pairs, each by the threshold that is
    best for the other folds), chance (the larger kind's share, which the same answer to all pairs gets), threshold (the mean over folds), and true_accepts_at_0.1, _0.01 and _0.001: the largest true
    accept rate of a threshold with at most this false accept rate, NaN with fewer different pairs than its inverse.

    The columns _low and _high are 95 % intervals. Those of accuracy are ``intervals.accuracy_over`` with the pairs' faces as
    clusters. Those of area and equal_error_rate are percentiles of 1000 resamples of the faces in pairs, with replacement and
    the same for each layer and call: a pair of two faces counts as often as the product of their counts, a pair of one face as
    often as this is drawn. Their distances from the score are widened for few faces, see ``few_faces``. They are too wide rather
    than too narrow where few pairs share faces, since what is particular to a pair is then counted several times (Owen 2007).
    NaN where all resamples give the same number, as where the kinds of pairs do not overlap: nothing is then known.

    ``roc`` has the columns layer, threshold (from -inf, where none are accepted, over all dissimilarities), false_accepts and
    true_accepts (rates, 0 … 1). ``pairs`` has face_1, view_1, face_2, view_2, same (bool), fold, and the dissimilarity of each
    layer (float32) under its name.
    """

    table: pd.DataFrame
    roc: pd.DataFrame
    pairs: pd.DataFrame


def verify_faces(
    data: Data,
    layers: Names = None,
    pairs: Pairs | None = None,
    *,
    metric: str = "cosine",
    n_pairs: int = 3000,
    seed: int = 0,
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    memory: str | int = MEMORY,
) -> Verification:
    """How well each layer tells pairs of photographs of the same face from pairs of different faces.

    ``pairs`` is a CSV or a table with the columns face_1, view_1, face_2, view_2 and, if wanted, same (1 or 0, true or false;
    else whether the faces are the same) and fold; or a file like LFW's ``pairs.txt``: a first line ``folds<TAB>n``, then for
    each fold n lines ``name<TAB>i<TAB>j`` and n lines ``name<TAB>i<TAB>name<TAB>j`` (``pairsDevTest.txt`` has ``n`` alone, and
    no folds). Photograph 1 of a face is then the view ``Name_0001``, ``0001`` or ``1``. Without ``pairs``, ``n_pairs`` of the
    same face and as many of different faces are drawn by ``seed``, each pair of items with equal probability and none twice;
    all, where there are fewer. No pair is drawn of two items that are known to show the same photograph: equal image_sha256
    and, if known, equal box and landmarks; mirrored, it is another.

    Folds that are not given are ten (fewer, if there are fewer pairs of a kind), drawn by ``seed`` from pairs of each kind; faces
    may then be in several. Other options are those of ``rdm``. Raises FeatureStoreError as ``rdm`` does, for pairs that cannot be
    read or name items that are not there, for fewer than two pairs of a kind, and fewer than three faces.
    """
    chosen = select(data, layers, sources=sources, where=where, items=items).require(3, "verification")
    measure = get_metric(metric)
    rng = np.random.default_rng(seed)
    table = _drawn_pairs(chosen, n_pairs, rng) if pairs is None else _given_pairs(pairs, chosen.labels.index)
    same = table["same"].to_numpy(bool)
    _require_both(same, table)
    if "fold" not in table:
        table["fold"] = _drawn_folds(same, rng)
    first, second = (table.pop(name).to_numpy(np.int64) for name in ("first", "second"))
    distances = _dissimilarities(chosen, first, second, measure, metric, memory)
    rows, curves = [], []
    for name, distance in distances.items():
        row, curve = _scores(distance.astype(np.float64), table)
        rows.append({"layer": name, **row})
        curves.append(curve.assign(layer=name)[["layer", *curve.columns]])
    return Verification(pd.DataFrame(rows), pd.concat(curves, ignore_index=True), table.assign(**distances))


def photograph_numbers(labels: pd.DataFrame) -> np.ndarray:
    """(n,) int64, equal for items that are known to show the same photograph, as ``Source.originals`` has it.

    ``labels`` are those of a ``Selection`` of items. The boxes and landmarks are those that the labels hold.
    """
    n = len(labels)
    if "image_sha256" not in labels:
        return np.arange(n)
    table = labels[[name for name in ("image_sha256", *BOX, *LANDMARKS) if name in labels]].reset_index(drop=True)
    table["flipped"] = [str(view).endswith(FLIPPED) for view in labels.index.get_level_values("view")]
    group = table.groupby(list(table.columns), sort=False, dropna=False).ngroup().to_numpy(np.int64)
    unknown = table["image_sha256"].isna() | table["image_sha256"].isin(["", "0" * 64])
    return np.where(unknown, n + np.arange(n), group)


def _drawn_pairs(chosen: Selection, n_pairs: int, rng: np.random.Generator) -> pd.DataFrame:
    """Columns first and second (places), _ITEMS and same."""
    if n_pairs < 2:
        raise FeatureStoreError(f"`n_pairs` {n_pairs} is too few: give at least 2 pairs of each kind.")
    faces = pd.factorize(chosen.labels.index.get_level_values("face_id").to_numpy(object))[0]
    photographs = photograph_numbers(chosen.labels)
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


def _given_pairs(pairs: Pairs, index: pd.Index) -> pd.DataFrame:
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
    folds, n = ([1, *map(int, header.split())])[-2:]
    if len(lines) != 2 * folds * n:
        raise FeatureStoreError(
            f"{path} has {len(lines)} pairs, and its first line {header!r} says {folds} × 2 × {n}. Restore it from a copy."
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
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            raise FeatureStoreError(
                f"{path} line {number} is no pair: {line!r:.100}. It needs name, i, j, or name, i, name, j, with tabs between."
            )
        one, other = (_lfw_item(fields[k], int(fields[k + 1]), known) for k in (0, 2))
        yield *one, *other


def _lfw_item(face: str, number: int, known: set[tuple[str, str]]) -> tuple[str, str]:
    views = (f"{face}_{number:04d}", f"{number:04d}", str(number))
    return face, next((view for view in views if (face, view) in known), views[0])


def _require_both(same: np.ndarray, table: pd.DataFrame) -> None:
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


def _drawn_folds(same: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) int64 from 0; each kind of pairs is spread over all folds."""
    n_folds = min(_FOLDS, int(same.sum()), int((~same).sum()))
    folds = np.empty(len(same), np.int64)
    for kind in (same, ~same):
        folds[kind] = rng.permutation(int(kind.sum())) % n_folds
    return folds


def _dissimilarities(
    chosen: Selection, first: np.ndarray, second: np.ndarray, measure: Metric, metric: str, memory: str | int
) -> dict[str, np.ndarray]:
    """Of each layer, (n,) float32."""
    per_row = max(2 * (4 + measure.itemsize) * layer.features for layer in chosen.layers)
    size = block_rows(len(first), memory, per_row)
    parts = [slice(start, start + size) for start in range(0, len(first), size)]

    def tasks(layer: LayerRows) -> list[Any]:
        return [task(_row_by_row, layer.block(first[part]), layer.block(second[part]), metric) for part in parts]

    found = computed([each for layer in chosen.layers for each in tasks(layer)])
    n = len(parts)
    return {layer.name: np.concatenate(found[i * n : (i + 1) * n]) for i, layer in enumerate(chosen.layers)}


def _row_by_row(one: Block, other: Block, metric: str) -> np.ndarray:
    """(n,) float32: each row of ``one`` with the row of ``other`` at its place."""
    measure = get_metric(metric)
    a, b = prepared(one, measure), prepared(other, measure)
    return np.array([measure.compare(a[i : i + 1], b[i : i + 1])[0, 0] for i in range(len(a))], np.float32)


def _scores(distance: np.ndarray, table: pd.DataFrame) -> tuple[dict[str, Any], pd.DataFrame]:
    """A layer's row of ``Verification.table``, and its ``roc``."""
    same = table["same"].to_numpy(bool)
    n_different = int((~same).sum())
    order = np.argsort(distance, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(distance[order]) != 0, True))  # the last of those that are tied
    false, true = _rates(np.ones(len(same)), same[order], ends)
    faces = np.reshape(pd.factorize(table[["face_1", "face_2"]].to_numpy(object).ravel())[0], (-1, 2))
    area, error = _area(false, true), _equal_error_rate(false, true)
    (area_low, area_high), (error_low, error_high) = _bootstrapped((area, error), same[order], ends, faces[order])
    correct, thresholds = _held_out(distance, same, pd.factorize(table["fold"])[0])
    score = accuracy_over(correct, [faces])
    row = {
        "n_same": int(same.sum()),
        "n_different": n_different,
        "area": area,
        "area_low": area_low,
        "area_high": area_high,
        "equal_error_rate": error,
        "equal_error_rate_low": error_low,
        "equal_error_rate_high": error_high,
        "accuracy": score.value,
        "accuracy_low": score.low,
        "accuracy_high": score.high,
        "chance": max(float(same.mean()), float((~same).mean())),
        "threshold": float(thresholds.mean()),
    }
    row |= {f"true_accepts_at_{rate}": _true_accepts(false, true, rate, n_different) for rate in FALSE_ACCEPTS}
    threshold = np.append(-np.inf, distance[order][ends])
    return row, pd.DataFrame({"threshold": threshold, "false_accepts": false, "true_accepts": true})


def _rates(weights: np.ndarray, same: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true accept rates (len(ends) + 1,) where pairs up to each end are accepted; pairs in order of dissimilarity."""
    false, true = (np.append(0.0, np.cumsum(weights * kind)[ends]) for kind in (~same, same))
    return false / false[-1], true / true[-1]


def _area(false: np.ndarray, true: np.ndarray) -> float:
    return float(np.trapezoid(true, false))


def _equal_error_rate(false: np.ndarray, true: np.ndarray) -> float:
    return float(np.interp(0, false + true - 1, false))


def _true_accepts(false: np.ndarray, true: np.ndarray, rate: float, n_different: int) -> float:
    if n_different < round(1 / rate):
        return math.nan
    return float(true[false * n_different <= rate * n_different + 1e-6][-1])


def _bootstrapped(
    scores: tuple[float, float], same: np.ndarray, ends: np.ndarray, faces: np.ndarray
) -> list[tuple[float, float]]:
    """95 % intervals of area and equal error rate; ``faces`` (n, 2) int64, pairs in order of dissimilarity."""
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    n = int(faces.max()) + 1
    one, other = faces.T
    drawn = []
    for _ in range(_RESAMPLES):
        counts = np.bincount(rng.integers(0, n, n), minlength=n)
        weights = np.where(one == other, counts[one], counts[one] * counts[other])
        if weights[same].any() and weights[~same].any():
            rates = _rates(weights, same, ends)
            drawn.append((_area(*rates), _equal_error_rate(*rates)))
    if not drawn:
        return [(math.nan, math.nan)] * 2
    return [
        _interval(score, np.array(values), n) for score, values in zip(scores, zip(*drawn, strict=True), strict=True)
    ]


def _interval(score: float, drawn: np.ndarray, n_faces: int) -> tuple[float, float]:
    if np.ptp(drawn) < 1e-12:
        return math.nan, math.nan
    off = np.percentile(drawn, [2.5, 97.5]) - score
    low, high = np.clip(score + few_faces(n_faces) * off, 0, 1)
    return float(low), float(high)


def few_faces(n: int) -> float:
    """By how much the percentiles of resamples of ``n`` ≥ 2 faces are too near for a 95 % interval: towards 1 for many.

    √(n / (n - 1)), since a resample's variance is that of n - 1 faces, times the quantile of Student's t with n - 1 degrees of
    freedom over the normal's.
    """
    return math.sqrt(n / (n - 1)) * float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975))


def _held_out(distance: np.ndarray, same: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bool (n,): whether the threshold of the other folds is right about each pair; and each fold's threshold."""
    correct = np.zeros(len(same), bool)
    thresholds = []
    for fold in range(folds.max() + 1):
        mine = folds == fold
        threshold = _best_threshold(distance[~mine], same[~mine])
        correct[mine] = (distance[mine] <= threshold) == same[mine]
        thresholds.append(threshold)
    return correct, np.array(thresholds)


def _best_threshold(distance: np.ndarray, same: np.ndarray) -> float:
    """Halfway between two dissimilarities, where most pairs are right; of several such, the middle one."""
    order = np.argsort(distance, kind="stable")
    values = distance[order]
    ends = np.flatnonzero(np.append(np.diff(values) != 0, True))
    gain = np.append(0, np.cumsum(np.where(same[order], 1, -1))[ends])  # right ones more than if none is accepted
    levels = values[ends]
    between = (levels[:-1] + levels[1:]) / 2
    thresholds = np.concatenate([[np.nextafter(levels[0], -np.inf)], between, levels[-1:]])
    best = np.flatnonzero(gain == gain.max())
    return float(thresholds[best[len(best) // 2]])
