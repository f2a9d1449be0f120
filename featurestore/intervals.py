"""Confidence intervals of scores."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


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
