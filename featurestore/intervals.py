"""Confidence intervals of scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

_RESAMPLES, _DRAWN_AT_ONCE = 2000, 100
_FEWEST = 3  # clusters, below which their spread says nothing


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, with Wilson's 95 % interval: ``low`` to ``high``, of ``n`` examples taken as independent."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def accuracy(correct: "np.ndarray") -> Accuracy:
    """Of a bool per example; all NaN for none."""
    n, right = len(correct), int(np.sum(correct))
    if not n:
        return Accuracy(math.nan, math.nan, math.nan, 0)
    interval = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    return Accuracy(right / n, float(interval.low), float(interval.high), n)


@dataclass(frozen=True)
class ClusteredMean:
    """A mean of values that share faces or participants, with the 95 % interval of a cluster bootstrap over these.

    ``p`` is that of a t-test (two-sided) of the mean being zero with the clustered ``standard_error``. NaN, but for ``value``,
    with fewer than three clusters of a kind, and where all values are the same, since nothing is then known of their spread (p
    is 1 if they are zero). ``width`` is the interval's half in standard errors: a quantile of Student's t.
    """

    value: float
    low: float
    high: float
    standard_error: float
    width: float
    p: float


def clustered_mean(values: np.ndarray, clusters: Sequence[np.ndarray], seed: int = 0) -> ClusteredMean:
    """The mean of ``values`` (n,) float, where values that share a cluster are not independent.

    ``clusters`` has a (n,) or (n, k) array of labels for each kind: the three faces of each trial, its participant; a missing
    label is a cluster of its own. Each resample draws the clusters of every kind anew, with replacement. A value belongs to
    several, so the resamples would count what is particular to it several times: their spread is scaled to the multiway
    cluster-robust standard error (Cameron, Gelbach & Miller 2011), with the jackknife's correction for few clusters (Bell &
    McCaffrey 2002) and Student's t with as many degrees of freedom as the smallest kind has clusters, less one.
    """
    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    off = np.asarray(values, float) - mean
    kinds = [_codes(labels) for labels in clusters]
    fewest = min((int(codes.max(initial=-1)) + 1 for codes in kinds), default=n)
    if fewest < _FEWEST:
        return ClusteredMean(mean, *[math.nan] * 5)
    if np.min(values) == np.max(values):
        return ClusteredMean(mean, math.nan, math.nan, math.nan, math.nan, math.nan if mean else 1.0)
    rng = np.random.default_rng(seed)
    variance, draws = 0.0, np.zeros(_RESAMPLES)
    for codes in kinds:
        members, counts = np.repeat(off, codes.shape[1]), np.bincount(codes.ravel())
        totals = np.bincount(codes.ravel(), members)
        corrected = totals / np.maximum(1 - counts / n, 0.2)
        variance += float((corrected**2).sum() - (totals**2).sum())
        equal = np.full(len(totals), 1 / len(totals))
        for start in range(0, _RESAMPLES, _DRAWN_AT_ONCE):
            drawn = rng.multinomial(len(totals), equal, _DRAWN_AT_ONCE)
            draws[start : start + _DRAWN_AT_ONCE] += (drawn - 1) @ corrected
    variance += _sharing(off, kinds) if kinds else 0.0
    error = math.sqrt(max(variance, float((off**2).sum()))) / n
    width = float(stats.t.ppf(0.975, fewest - 1))
    if not kinds or draws.std() <= 1e-12:
        draws = rng.standard_normal(_RESAMPLES)
    draws *= width / float(stats.norm.ppf(0.975)) * error / draws.std()
    low, high = mean - np.percentile(draws, [97.5, 2.5])
    p = float(2 * stats.t.sf(abs(mean) / error, fewest - 1))
    return ClusteredMean(mean, float(low), float(high), error, width, p)


def accuracy_over(correct: np.ndarray, clusters: Sequence[np.ndarray]) -> Accuracy:
    """Share of right answers with the interval of ``clustered_mean``, within 0 … 1.

    Where all are right or all are wrong nothing is known of the spread over clusters: then Wilson's, of as many answers as the
    smallest kind has clusters. ``correct`` is bool, or a share for each example.
    """
    mean = clustered_mean(correct, clusters)
    if len(correct) and mean.value in (0, 1):
        fewest = min((int(_codes(labels).max()) + 1 for labels in clusters), default=len(correct))
        return replace(accuracy(np.full(fewest, bool(mean.value))), n=len(correct))
    low, high = (float(np.clip(end, 0, 1)) for end in (mean.low, mean.high))
    return Accuracy(mean.value, low, high, len(correct))


def _codes(labels: np.ndarray) -> np.ndarray:
    """(n, k) int64 numbers of labels. What is missing, or repeats another of its row, has a number of its own."""
    columns = np.asarray(labels, object).reshape(len(labels), -1)
    codes = pd.factorize(columns.ravel())[0].reshape(columns.shape)
    again = np.zeros(columns.shape, bool)
    for one, other in combinations(range(columns.shape[1]), 2):
        again[:, other] |= codes[:, one] == codes[:, other]
    own = again | (codes < 0)
    codes[own] = codes.max(initial=-1) + 1 + np.arange(own.sum())
    return np.sort(codes, axis=1)


def _sharing(off: np.ndarray, kinds: Sequence[np.ndarray]) -> float:
    """Sum of the products of all pairs of values that share a cluster, each pair once: by inclusion and exclusion."""
    starts = np.cumsum([0, *(codes.max(initial=-1) + 1 for codes in kinds)])
    codes = np.concatenate([codes + start for codes, start in zip(kinds, starts, strict=False)], axis=1)
    total = 0.0
    for size in range(1, codes.shape[1] + 1):
        together = np.concatenate([codes[:, list(columns)] for columns in combinations(range(codes.shape[1]), size)])
        group = together[:, 0]
        for column in together.T[1:]:
            group = pd.factorize(group * starts[-1] + column)[0]
        sums = np.bincount(group, np.tile(off, len(together) // len(off)))
        total += (-1) ** (size + 1) * float((sums**2).sum())
    return total
