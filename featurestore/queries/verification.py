"""Verification: whether two photographs show the same person, from how dissimilar they are to each layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from featurestore.intervals import accuracy_over
from featurestore.queries.blocks import MEMORY, block_rows, computed, task
from featurestore.queries.dissimilarity import Metric, get_metric, prepared
from featurestore.queries.pairs import Pairs, drawn_folds, drawn_pairs, given_pairs, require_both_kinds
from featurestore.queries.selection import Block, Data, Items, LayerRows, Names, Selection, select

FALSE_ACCEPTS = (0.1, 0.01, 0.001)  # rates at which true accepts are given
_RESAMPLES = 1000
_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Verification:
    """Scores of each layer, and what they were computed from. A pair is accepted if its dissimilarity is at most a threshold.

    ``table`` has a row for each layer: layer, n_same and n_different (pairs), area (under the ROC, 0 … 1: the probability that
    a same pair is less dissimilar than a different one, ties counted half), equal_error_rate (0 … 1: where the ROC, straight
    between its points, has as many false accepts as false rejects), accuracy (share of pairs, each by the threshold that is
    best for the other folds), chance (the larger kind's share, which the same answer to all pairs gets), threshold (the mean
    over folds), and true_accepts_at_0.1, _0.01 and _0.001: the largest true accept rate of a threshold with at most this false
    accept rate, NaN with fewer different pairs than its inverse.

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
    table = drawn_pairs(chosen, n_pairs, rng) if pairs is None else given_pairs(pairs, chosen.labels.index)
    same = table["same"].to_numpy(bool)
    require_both_kinds(same, table)
    if "fold" not in table:
        table["fold"] = drawn_folds(same, rng)
    first, second = (table.pop(name).to_numpy(np.int64) for name in ("first", "second"))
    distances = _dissimilarities(chosen, first, second, measure, metric, memory)
    rows, curves = [], []
    for name, distance in distances.items():
        row, curve = _scores(distance.astype(np.float64), table)
        rows.append({"layer": name, **row})
        curves.append(curve.assign(layer=name)[["layer", *curve.columns]])
    return Verification(pd.DataFrame(rows), pd.concat(curves, ignore_index=True), table.assign(**distances))


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
