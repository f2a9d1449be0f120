"""Scores: each accuracy with its interval, chance, and the noise ceiling of the participants."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import stats

from featurestore.intervals import accuracy
from heads.trials.matching import Trials
from heads.trials.tables import FACES, ODD, VIEWS

CHANCE = 1 / 3  # one of three is odd


@dataclass(frozen=True)
class Ceiling:
    """How well the other answers to the same three items predict one answer, over ``n`` answers to ``triplets`` triplets."""

    value: float
    n: int
    triplets: int


def noise_ceiling(trials: Trials) -> Ceiling | None:
    """Leave one rater out: each answer against the majority of the *other* participants' answers to the same items.

    Tied majorities count as a guess among them. With the rater's own answer among the votes the number would be
    inflated: five raters who choose by chance would read 0.556 instead of 0.333. Answers of the same participant do not
    predict each other. None where no triplet was answered by two participants (or twice, where participants are not named).
    """
    order = np.argsort(trials.items, axis=1, kind="stable")
    triplets = np.take_along_axis(trials.items, order, axis=1)
    votes = (order == trials.odd[:, None]).argmax(axis=1)  # the odd one's place among the sorted items
    raters = (
        trials.table["participant"].to_numpy(str)
        if "participant" in trials.table.columns
        else np.arange(len(trials)).astype(str)
    )
    _, group = np.unique(triplets, axis=0, return_inverse=True)
    agreement, used = [], set()
    for members in pd.Series(np.arange(len(trials))).groupby(group.ravel()).indices.values():
        if len(members) < 2:
            continue
        for i in members:
            others = members[raters[members] != raters[i]]
            if len(others):
                counts = np.bincount(votes[others], minlength=3)
                favourites = np.flatnonzero(counts == counts.max())
                agreement.append((votes[i] in favourites) / len(favourites))
                used.add(group.ravel()[i])
    return Ceiling(float(np.mean(agreement)), len(agreement), len(used)) if agreement else None


def normalised(value: float, ceiling: Ceiling | None, chance: float = CHANCE) -> float | None:
    """0 at chance, 1 at the ceiling; None where there is no ceiling above chance."""
    if ceiling is None or ceiling.value <= chance:
        return None
    return (value - chance) / (ceiling.value - chance)


@dataclass(frozen=True)
class Paired:
    """Two heads on the same trials: ``only_first`` right where the second was wrong, and the reverse; McNemar's exact p."""

    difference: float
    only_first: int
    only_second: int
    p: float


def paired_test(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> Paired:
    """Whether one head is right more often, from a bool per trial of each, in the same order. ValueError if lengths differ."""
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape:
        raise ValueError(f"two heads are compared on the same trials; got {len(a)} and {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return Paired(float(a.mean() - b.mean()) if len(a) else math.nan, only_a, only_b, p)


def accuracy_by(table: pd.DataFrame, correct: np.ndarray, what: str) -> pd.DataFrame:
    """Accuracy of the trials that show each face (``what='face'``) or view: a row each with value, low, high and n.

    A trial counts once for every face or view in it.
    """
    columns = [name for name in (FACES if what == "face" else VIEWS) if name in table.columns]
    correct = np.asarray(correct, bool)
    shown = pd.concat(
        [pd.DataFrame({what: table[name].to_numpy(object), "trial": range(len(table))}) for name in columns]
    )
    shown = shown.drop_duplicates().sort_values([what, "trial"])
    rows = {name: asdict(accuracy(correct[part["trial"]])) for name, part in shown.groupby(what, sort=True)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(what)


def by_position(odd: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """Order bias at a glance: for places 1 … 3, accuracy where the odd one was shown there, and how often it was answered."""
    rows = {}
    for place in range(3):
        there = odd == place
        rows[place + 1] = {
            **asdict(accuracy(predicted[there] == place)),
            "answered": float((predicted == place).mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("position")


def predictions(table: pd.DataFrame, logits: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """A row per tested trial: the table's columns, predicted face, whether it is right, and three probabilities."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    keep = [name for name in ("line", "trial", "session", "participant", *FACES, *VIEWS, ODD) if name in table.columns]
    faces = table[list(FACES)].to_numpy(object)
    out = table[keep].reset_index(drop=True).copy()
    out["predicted"] = faces[np.arange(len(faces)), predicted]
    out["correct"] = predicted == labels
    for place in range(3):
        out[f"p_{place + 1}"] = probabilities[:, place]
    return out
