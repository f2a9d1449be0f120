"""Representational similarity analysis: a layer's dissimilarities beside those that people, or instruments, gave for pairs."""

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, LANDMARKS
from featurestore.photos.csv_files import as_numbers, read_csv
from featurestore.queries.blocks import MEMORY
from featurestore.queries.dissimilarity import rdm
from featurestore.queries.selection import Data, Items, Names, select
from featurestore.text import in_natural_order, listing, near_matches, shortened

_PAIR = ("face_1", "face_2")
_VIEWS = ("view_1", "view_2")
_FEWEST = 3  # faces
_MOST_DIGITS = 18  # of a place
_ENDS = (2.5, 97.5)  # percent: of a 95 % interval


def rsa(
    data: Data,
    pairs: str | os.PathLike[str] | pd.DataFrame,
    layers: Names = None,
    *,
    value: str | None = None,
    similarity: bool | None = None,
    metric: str = "cosine",
    by: str | None = "face",
    where: str | Sequence[str] = (),
    sources: Names = None,
    items: Items | None = None,
    permutations: int = 10_000,
    resamples: int = 1_000,
    seed: int = 0,
    memory: str | int = MEMORY,
) -> pd.DataFrame:
    """A row for each layer, in the network's order: how well its dissimilarities agree with those of ``pairs``.

    ``pairs`` is the name of a metadata column of numbers, for its absolute differences between faces (or items); or a CSV, or a
    table, in one of three forms: columns face_1 and face_2 (and view_1 and view_2 for items, with ``by`` None) beside numbers; a
    first column of pairs such as ``"(0, 1)"``, names, or places from 0 in the natural order of the
    faces; or a square table with names along both sides. ``value`` is the column of numbers (the first by default). They are
    similarities if ``similarity`` says so, or by default if the column's name begins with "similar": agreement is positive
    either way. Faces are averaged over views; ``by`` None compares items, called by their faces where each has one view.

    Columns: layer, n_faces, n_pairs, spearman and pearson each with _low and _high (95 % interval of ``resamples`` bootstrap
    samples of faces; pairs of a face with itself are left out) and _p (two-sided, ``permutations`` of faces among the layer's
    RDM, as Mantel's test; for Spearman of ranks over all pairs of its faces), kendall_tau_a (of the pairs, without an interval).
    NaN where the layer's dissimilarities, or those given, do not vary. ``attrs``: metric, value, ``unknown`` (names in ``pairs``
    that are not in the store), ``missing`` (pairs of the faces in common that ``pairs`` lacks), left_out.

    Raises FeatureStoreError as ``rdm`` does, for a table of another form, and for fewer than three faces in common.
    """
    dissimilarities = rdm(data, layers, metric=metric, by=by, where=where, sources=sources, items=items, memory=memory)
    if "layer" not in dissimilarities.dims:
        dissimilarities = dissimilarities.expand_dims("layer")
    names = _short_names(dissimilarities["item"].to_numpy(), dissimilarities.coords.get("face_id"))
    if isinstance(pairs, str) and not Path(pairs).exists():
        of_items = select(data, layers, sources=sources, where=where, items=items).labels
        long = _long(_differences(of_items, pairs, by, names)).rename(columns={"dissimilarity": "value"})
        given = _Given(f"difference of {pairs}", long, [])
    else:
        table = pairs if isinstance(pairs, pd.DataFrame) else _read_table(Path(pairs))
        names = dissimilarities["item"].to_numpy() if set(_VIEWS) <= set(table.columns) else names
        given = _read_pairs(table, value, similarity, names)
    chosen = _Pairs.of(given, names)
    rng, n = np.random.default_rng(seed), len(chosen.faces)
    shuffles = [rng.permutation(n) for _ in range(permutations)]
    draws = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples)]
    rows = []
    for i, layer in enumerate(dissimilarities["layer"].to_numpy()):
        matrix = dissimilarities[i].to_numpy()[np.ix_(chosen.faces, chosen.faces)].astype(np.float64)
        rows.append({"layer": layer, **_agreement(matrix, chosen, shuffles, draws)})
    table = pd.DataFrame(rows)
    table.attrs = {
        "metric": metric,
        "value": given.value,
        "unknown": given.unknown,
        "missing": [f"{names[a]}, {names[b]}" for a, b in chosen.missing],
        "left_out": dissimilarities.attrs["left_out"],
    }
    return table


@dataclass(frozen=True)
class _Given:
    """Pairs of names as the table has them, with a dissimilarity each; ``value`` is the column's name."""

    value: str
    table: pd.DataFrame
    unknown: list[str]


@dataclass(frozen=True)
class _Pairs:
    """``faces`` are places in the RDM; ``one`` and ``other`` places in ``faces``, of pairs with ``values``."""

    faces: np.ndarray
    one: np.ndarray
    other: np.ndarray
    values: np.ndarray
    missing: list[tuple[int, int]]

    @classmethod
    def of(cls, given: _Given, names: np.ndarray) -> "_Pairs":
        """FeatureStoreError if fewer than three faces are in both."""
        place = {name: i for i, name in enumerate(names)}
        known = given.table[given.table["one"].isin(place) & given.table["other"].isin(place)]
        one, other = (known[side].map(place).to_numpy(np.int64) for side in ("one", "other"))
        faces = np.unique(np.concatenate([one, other]))
        if len(faces) < _FEWEST:
            raise FeatureStoreError(
                f"`pairs` and the store have {len(faces)} faces in common, and RSA needs at least {_FEWEST}. `pairs` names "
                f"{listing(given.table['one'].unique(), 3)}; the store holds {listing(names, 3)}."
            )
        low, high = np.minimum(one, other), np.maximum(one, other)
        twice = pd.DataFrame({"low": low, "high": high}).duplicated().to_numpy()
        if twice.any() or (low == high).any():
            at = int(np.flatnonzero(twice | (low == high))[0])
            problem = "with itself" if low[at] == high[at] else "twice"
            raise FeatureStoreError(
                f"`pairs` has {names[low[at]]}, {names[high[at]]} {problem}. Give each pair once, averaged over participants."
            )
        there = set(zip(low.tolist(), high.tolist(), strict=True))
        listed = faces.tolist()
        missing = [(a, b) for i, a in enumerate(listed) for b in listed[i + 1 :] if (a, b) not in there]
        return cls(faces, np.searchsorted(faces, low), np.searchsorted(faces, high), known["value"].to_numpy(), missing)


def _agreement(
    matrix: np.ndarray, pairs: _Pairs, shuffles: Sequence[np.ndarray], draws: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Coefficients of one layer, with intervals and p, by their column's name."""
    found: dict[str, Any] = {"n_faces": len(pairs.faces), "n_pairs": len(pairs.values)}
    values, wanted = matrix[pairs.one, pairs.other], pairs.values
    upper = np.triu_indices(len(matrix), 1)
    ranks = np.zeros_like(matrix)
    ranks[upper] = stats.rankdata(matrix[upper])
    ranks += ranks.T
    for name, of, against in (
        ("spearman", ranks, stats.rankdata(wanted)),
        ("pearson", matrix, wanted),
    ):
        ranked = stats.rankdata if name == "spearman" else np.asarray
        resampled = [_resampled(values, wanted, draw[pairs.one] * draw[pairs.other], ranked) for draw in draws]
        low, high = np.nanpercentile(resampled, _ENDS) if np.isfinite(resampled).any() else (np.nan, np.nan)
        observed = _pearson(of[pairs.one, pairs.other], against)
        shuffled = np.array([_pearson(of[shuffle[pairs.one], shuffle[pairs.other]], against) for shuffle in shuffles])
        as_far = 1 + (np.abs(shuffled) >= abs(observed) * (1 - 1e-12)).sum()
        found |= {
            name: _pearson(ranked(values), ranked(wanted)),
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_p": as_far / (1 + len(shuffles)) if np.isfinite(observed) else np.nan,
        }
    return found | {"kendall_tau_a": tau_a(values, wanted)}


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:  # their mean is rounded, so that differences to it need not be zero
        return np.nan
    a, b = one - one.mean(), other - other.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _resampled(values: np.ndarray, wanted: np.ndarray, counts: np.ndarray, ranked: Any) -> float:
    """The coefficient where each pair is there ``counts`` times."""
    chosen = np.repeat(np.arange(len(values)), counts)
    return _pearson(ranked(values[chosen]), ranked(wanted[chosen])) if len(chosen) > 1 else np.nan


def tau_a(one: np.ndarray, other: np.ndarray) -> float:
    """Kendall's tau-a: concordant less discordant pairs, of all pairs; ties count as neither (Nili et al. 2014 advise it)."""
    b = stats.kendalltau(one, other).statistic
    pairs = len(one) * (len(one) - 1) / 2
    untied = [pairs - sum(n * (n - 1) / 2 for n in np.unique(values, return_counts=True)[1]) for values in (one, other)]
    return float(b * np.sqrt(untied[0] * untied[1]) / pairs)


def _differences(items: pd.DataFrame, column: str, by: str | None, names: np.ndarray) -> pd.DataFrame:
    """A square table of the absolute differences of a metadata column between the means of groups, or between items."""
    numeric = [name for name in items.select_dtypes("number").columns if name not in (*BOX, *LANDMARKS)]
    if column not in numeric:
        near = near_matches(column, map(str, numeric)) if numeric else "There is no such column: give a CSV of pairs."
        raise FeatureStoreError(f"`pairs` {column!r} is neither a file nor a metadata column of numbers. {near}")
    key = {"face": "face_id"}.get(by or "", by)
    means = items.reset_index().groupby(key)[column].mean() if key else items[column]
    if key:
        means.index = means.index.astype(str)
        means = means[list(names)]
    values = means.to_numpy(np.float64)
    return pd.DataFrame(np.abs(values[:, None] - values[None, :]), names, names)


def _short_names(names: np.ndarray, faces: Any) -> np.ndarray:
    """Items' names; their faces alone where each face has one item."""
    if faces is None or len(set(faces.to_numpy())) < len(names):
        return names
    return np.asarray(faces.to_numpy(), object)


def _read_pairs(table: pd.DataFrame, value: str | None, similarity: bool | None, names: np.ndarray) -> _Given:
    long = _long(table)
    columns = [name for name in long.columns if name not in ("one", "other")]
    numeric = [name for name in columns if pd.api.types.is_numeric_dtype(long[name])]
    if not numeric:
        raise FeatureStoreError(f"`pairs` has no column of numbers; it has {listing(table.columns, 12)}.")
    chosen = value or numeric[0]
    if chosen not in numeric:
        raise FeatureStoreError(f"`pairs` has no column of numbers {chosen!r}. {near_matches(chosen, numeric)}")
    values = long[chosen].to_numpy(np.float64)
    if not np.isfinite(values).all():
        one, other = (shortened(str(name)) for name in long[~np.isfinite(values)].iloc[0][["one", "other"]])
        raise FeatureStoreError(f"`pairs` has no number in {chosen} for {one}, {other}. Leave such pairs out.")
    similar = chosen.lower().startswith("similar") if similarity is None else similarity
    long = long.assign(value=-values if similar else values)[["one", "other", "value"]]
    there = set(names)
    long = _places_named(long, in_natural_order(there), there)
    unknown = in_natural_order((set(long["one"]) | set(long["other"])) - there)
    return _Given(chosen, long, unknown)


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FeatureStoreError(f"there is no file {path} (or it is a folder). Check the path given with `pairs`.")
    table = read_csv(path)
    texts = read_csv(path, dtype=str, keep_default_na=False)  # faces may be called 007, or NA
    first = table.columns[0]
    for name in {first, *_PAIR, *_VIEWS} & set(table.columns):
        table[name] = texts[name]
    return table if first in (*_PAIR, *_VIEWS) else table.set_index(first)


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """Columns ``one`` and ``other`` (str) beside those of numbers."""
    if not len(table):
        raise FeatureStoreError("`pairs` has no rows. Give a row for each pair, or the whole matrix.")
    if set(_PAIR) <= set(table.columns):
        sides = [table[side].astype(str) for side in _PAIR]
        if set(_VIEWS) <= set(table.columns):
            sides = [face + "|" + table[view].astype(str) for face, view in zip(sides, _VIEWS, strict=True)]
        rest = table.drop(columns=[*_PAIR, *_VIEWS], errors="ignore")
        return rest.assign(one=sides[0], other=sides[1]).reset_index(drop=True)
    names = [str(name) for name in table.index]
    if len(table) == len(table.columns) and names == [str(name) for name in table.columns]:
        upper = np.triu_indices(len(table), 1)
        labels = np.array(names, object)
        numbers = table.apply(as_numbers).to_numpy(np.float64)[upper]
        return pd.DataFrame({"one": labels[upper[0]], "other": labels[upper[1]], "dissimilarity": numbers})
    parsed = [_parsed_pair(name) for name in table.index]
    if not all(parsed):
        wrong = shortened(repr(table.index[[not pair for pair in parsed]][0]))
        raise FeatureStoreError(
            f'`pairs` has neither columns face_1 and face_2, nor pairs such as "(0, 1)" in its first column ({wrong} is none), '
            f"nor the same names along both sides. It has {listing(table.columns, 12)}."
        )
    one, other = zip(*[pair for pair in parsed if pair], strict=True)
    return table.reset_index(drop=True).assign(one=list(one), other=list(other))


def _parsed_pair(text: Any) -> tuple[str, str] | None:
    """``(0, 1)`` or ``('a', 'b')``, as Python writes a pair."""
    if isinstance(text, tuple):
        pair: Any = text
    else:
        try:
            pair = ast.literal_eval(str(text)[:1000])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return (str(pair[0]), str(pair[1])) if isinstance(pair, tuple) and len(pair) == 2 else None


def _places_named(long: pd.DataFrame, ordered: Sequence[str], names: set[str]) -> pd.DataFrame:
    """Places from 0 in the faces' natural order as their names, if the table has such places and no name of a face."""
    used = set(long["one"]) | set(long["other"])
    if used & names or not all(
        name.isdecimal() and len(name) < _MOST_DIGITS and int(name) < len(ordered) for name in used
    ):
        return long
    if {int(name) for name in used} <= {int(name) for name in names if name.isdecimal() and len(name) < _MOST_DIGITS}:
        return long  # 1 and 2 are more likely the faces 01 and 02 than the second and the third
    return long.assign(**{side: [ordered[int(name)] for name in long[side]] for side in ("one", "other")})
