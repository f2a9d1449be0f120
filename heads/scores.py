"""Scores of a test: accuracy with its intervals, the noise ceiling of the same trials, and two heads compared.

A *table* has a row per tested trial: ``face_1`` … ``view_3``, ``odd``, and ``participant`` where they are named; of
identities ``face_id`` and ``view``. ``correct`` has a value per row: bool, or a share where several seeds are averaged.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from featurestore.intervals import Accuracy, ClusteredMean, accuracy, accuracy_over, clustered_mean
from featurestore.text import natural_order
from heads.trials.tables import FACES, ODD, ODD_POSITION, VIEWS, free_name

CHANCE = 1 / 3  # one of three is odd
FEWEST_REPEATED, FEWEST_TRIPLETS = 30, 10  # answers, and triplets they are to, below which a ceiling is not estimated
CEILING_COLUMNS = (
    "n_repeated",
    "n_triplets",
    "ceiling",
    "ceiling_low",
    "ceiling_high",
    "accuracy_repeated",
    "accuracy_repeated_low",
    "accuracy_repeated_high",
    "of_ceiling",
    "of_ceiling_low",
    "of_ceiling_high",
    "ceiling_note",
)
FACES_SHOWN_COLUMNS = (
    "n_two_faces",
    *(f"accuracy_{n}_faces{end}" for n in ("two", "three") for end in ("", "_low", "_high")),
)
# columns that a head's answers add to the trials'
ANSWERS = ("predicted", "predicted_position", "correct", "p_1", "p_2", "p_3")


def clusters_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """What trials share: ``faces`` (n, 3) or (n, 1), and ``participants`` (n,) where three or more are named."""
    faces = list(FACES) if FACES[0] in table.columns else ["face_id"]
    shared = {"faces": table[faces].to_numpy(object)}
    participants = participants_of(table)
    if participants.nunique() > 2:
        shared["participants"] = participants.to_numpy(object)
    return shared


def participants_of(table: pd.DataFrame) -> pd.Series:
    """Who answered each trial; NaN where that is not known."""
    if "participant" not in table.columns:
        return pd.Series(np.nan, table.index)
    return table["participant"].mask(table["participant"].astype(str).str.strip() == "")


def cluster_text(table: pd.DataFrame) -> str:
    """How many faces, and participants, an interval is over."""
    told = [f"{pd.Series(labels.ravel()).nunique()} {kind}" for kind, labels in clusters_of(table).items()]
    few = participants_of(table).nunique()
    return ", ".join([*told, *([f"{few} participants not counted"] if 0 < few < 3 else [])])


def score(table: pd.DataFrame, correct: np.ndarray, chance: float, from_keys: bool = False) -> dict[str, Any]:
    """Every score of a test by name, NaN or empty where it cannot be given.

    ``accuracy``; ``low`` and ``high``, Wilson's interval, which takes trials for independent; ``cluster_low`` and
    ``cluster_high``, over the ``clusters`` named; ``n_test``, ``chance``; ``n_two_faces`` trials show one face twice, with the
    accuracies of these and of the others, and their intervals; and those of ``ceiling_scores``.
    """
    averaged = correct.dtype != bool  # over seeds: no count of right answers, which Wilson's interval is about
    whole = Accuracy(float(np.mean(correct)), math.nan, math.nan, len(correct)) if averaged else accuracy(correct)
    shared = clusters_of(table)
    over = accuracy_over(correct, list(shared.values()))
    return {
        "accuracy": whole.value,
        "low": whole.low,
        "high": whole.high,
        "cluster_low": over.low,
        "cluster_high": over.high,
        "clusters": cluster_text(table),
        "n_test": len(correct),
        "chance": chance,
        **_by_faces_shown(table, correct),
        **ceiling_scores(table, correct, chance, from_keys),
    }


def shows_a_face_twice(table: pd.DataFrame) -> np.ndarray:
    """bool per trial; none of identities does."""
    if FACES[0] not in table.columns:
        return np.zeros(len(table), bool)
    faces = table[list(FACES)].to_numpy(object)
    return np.asarray((faces[:, 0] == faces[:, 1]) | (faces[:, 0] == faces[:, 2]) | (faces[:, 1] == faces[:, 2]), bool)


def _by_faces_shown(table: pd.DataFrame, correct: np.ndarray) -> dict[str, Any]:
    """Trials of one person twice are easier than those of three, and survive a split by face more often: each apart."""
    twice = shows_a_face_twice(table)
    apart: dict[str, Any] = {**dict.fromkeys(FACES_SHOWN_COLUMNS, math.nan), "n_two_faces": int(twice.sum())}
    if 0 < twice.sum() < len(table):
        for name, shown in (("accuracy_two_faces", twice), ("accuracy_three_faces", ~twice)):
            found = accuracy_over(correct[shown], list(clusters_of(table[shown]).values()))
            apart |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return apart


def agreement(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Leave one rater out: how far each answer (n,) is the majority of the *other* participants' to the same three items.

    And the number of each trial's triplet (n,) int64. The agreement is 1 or 0; tied majorities count as a guess among them; NaN
    where no other participant answered. With the rater's own answer among the votes the mean would be inflated: five raters
    who choose by chance would read 0.556 instead of 0.333. Where participants are not named, every answer counts as another's.
    """
    n = len(table)
    if not n:
        return np.empty(0), np.empty(0, np.int64)
    shown = [
        table[face].astype(str).str.cat(table[view].astype(str), sep="\0")
        for face, view in zip(FACES, VIEWS, strict=True)
    ]
    items = pd.factorize(np.concatenate(shown))[0].reshape(3, n).T
    if "source" in table.columns:
        items = items + len(items) * 3 * pd.factorize(table["source"])[0][:, None]
    order = np.argsort(items, axis=1, kind="stable")
    vote = (order == odd_places(table)[:, None]).argmax(axis=1)  # the odd one's place among the sorted items
    triplet = np.unique(np.take_along_axis(items, order, axis=1), axis=0, return_inverse=True)[1].ravel()
    named = participants_of(table)
    rater = np.where(named.isna(), -1 - np.arange(n), pd.factorize(named)[0])
    own = pd.factorize(pd.MultiIndex.from_arrays([triplet, rater]))[0]
    counts = _votes(triplet, vote)[triplet] - _votes(own, vote)[own]
    favourite = counts == counts.max(axis=1, keepdims=True)
    agrees = favourite[np.arange(n), vote] / favourite.sum(axis=1)
    return np.where(counts.any(axis=1), agrees, np.nan), triplet


def _votes(group: np.ndarray, vote: np.ndarray) -> np.ndarray:
    counts = np.zeros((group.max() + 1, 3), int)
    np.add.at(counts, (group, vote), 1)
    return counts


def odd_places(table: pd.DataFrame) -> np.ndarray:
    """(n,) int64, 0 … 2: the place of the odd one."""
    if ODD_POSITION in table.columns:
        return np.asarray(table[ODD_POSITION], np.int64) - 1
    same = table[list(FACES)].to_numpy(str) == table[ODD].to_numpy(str)[:, None]
    return np.asarray(same.argmax(axis=1), np.int64)


def ceiling_scores(
    table: pd.DataFrame, correct: np.ndarray | None, chance: float = CHANCE, from_keys: bool = False
) -> dict[str, Any]:
    """The noise ceiling and the head beside it, both from the ``n_repeated`` answers to triplets that others answered too.

    ``ceiling`` is the mean ``agreement``, ``accuracy_repeated`` the head's accuracy on these answers, ``of_ceiling``
    (accuracy_repeated - chance) / (ceiling - chance), each of the latter with an interval over faces and participants (of a
    ratio: Fieller's). What cannot be given is NaN, and ``ceiling_note`` says why. Without ``correct``: the ceiling alone.
    """
    scores: dict[str, Any] = {**dict.fromkeys(CEILING_COLUMNS, math.nan), "n_repeated": 0, "ceiling_note": ""}
    if FACES[0] not in table.columns:
        return {**scores, "ceiling_note": "identities have no raters"}
    if from_keys:
        return {**scores, "ceiling_note": "the answers were made from the keys, not given by people"}
    agrees, triplet = agreement(table)
    repeated = np.isfinite(agrees)
    scores["n_repeated"], scores["n_triplets"] = n, triplets = int(repeated.sum()), len(np.unique(triplet[repeated]))
    if n < FEWEST_REPEATED or triplets < FEWEST_TRIPLETS:
        few = (
            f"{n} test answers are to triplets that another participant answered too, {triplets} of them; "
            f"{FEWEST_REPEATED} answers to {FEWEST_TRIPLETS} triplets are needed"
        )
        return {**scores, "ceiling_note": few}
    clusters = list(clusters_of(table[repeated]).values())
    above = agrees[repeated] - chance
    ceiling = clustered_mean(above, clusters)
    scores |= {
        "ceiling": ceiling.value + chance,
        "ceiling_low": float(np.clip(ceiling.low + chance, 0, 1)),
        "ceiling_high": float(np.clip(ceiling.high + chance, 0, 1)),
    }
    unanimous = above.min() == above.max()
    if unanimous:
        scores["ceiling_note"] = (
            "the raters agree in every repeated triplet, so nothing is known of the ceiling's spread"
        )
    elif not ceiling.low > 0:
        scores["ceiling_note"] = "the ceiling cannot be told from chance, so no share of it can be given"
    if correct is None:
        return scores
    head = np.asarray(correct, float)[repeated] - chance
    own = accuracy_over(np.asarray(correct)[repeated], clusters)
    scores |= {
        "accuracy_repeated": own.value,
        "accuracy_repeated_low": own.low,
        "accuracy_repeated_high": own.high,
    }
    low, high = _ratio_interval(head, above, clusters)
    if unanimous:  # a ceiling without spread scales the head's own interval
        low, high = ((end - chance) / ceiling.value for end in (own.low, own.high))
    elif math.isnan(low):
        return {
            **scores,
            "ceiling_note": scores["ceiling_note"] or "the interval of a share of the ceiling is unbounded",
        }
    return {**scores, "of_ceiling": float(head.mean()) / ceiling.value, "of_ceiling_low": low, "of_ceiling_high": high}


def _ratio_interval(top: np.ndarray, bottom: np.ndarray, clusters: Sequence[np.ndarray]) -> tuple[float, float]:
    """Fieller's 95 % interval of mean(top) / mean(bottom); NaN where the denominator cannot be told from zero."""
    x, y, both = (clustered_mean(values, clusters) for values in (top, bottom, top + bottom))
    covariance = (both.standard_error**2 - x.standard_error**2 - y.standard_error**2) / 2
    a = y.value**2 - (y.width * y.standard_error) ** 2
    b = x.value * y.value - y.width**2 * covariance
    c = x.value**2 - (x.width * x.standard_error) ** 2
    if not a > 0:
        return math.nan, math.nan
    root = math.sqrt(max(0.0, b**2 - a * c))
    return (b - root) / a, (b + root) / a


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


def difference(table: pd.DataFrame, first: np.ndarray, second: np.ndarray) -> ClusteredMean:
    """Mean of ``first`` - ``second`` (n,) on the same trials, with interval and p over the faces and participants they share."""
    return clustered_mean(np.asarray(first, float) - np.asarray(second, float), list(clusters_of(table).values()))


def accuracy_by_face(table: pd.DataFrame, correct: np.ndarray) -> pd.DataFrame:
    """Of trials: each face where it was the odd one, and where it was merely shown beside the odd one; with Wilson's intervals.

    Columns ``when_odd, when_odd_low, when_odd_high, n_when_odd`` and the same of ``when_shown``, indexed by face. Of
    identities: as ``accuracy_by``.
    """
    if FACES[0] not in table.columns:
        return accuracy_by(table, correct, "face")
    is_odd = np.arange(3) == odd_places(table)[:, None]
    sides = []
    for name, there in (("when_odd", is_odd), ("when_shown", ~is_odd)):
        trial, place = np.nonzero(there)
        side = _by_name(table[list(FACES)].to_numpy(object)[trial, place], trial, correct)
        sides.append(side.set_axis([name, f"{name}_low", f"{name}_high", f"n_{name}"], axis=1))
    both = pd.concat(sides, axis=1).rename_axis("face").sort_index(key=_naturally)
    return both.fillna({"n_when_odd": 0, "n_when_shown": 0}).astype({"n_when_odd": int, "n_when_shown": int})


def accuracy_by(table: pd.DataFrame, correct: np.ndarray, what: str) -> pd.DataFrame:
    """Accuracy of the trials that show each view (``what='view'``), or of each face's items: value, low, high and n.

    A trial counts once for every view in it.
    """
    several, one = (FACES, "face_id") if what == "face" else (VIEWS, "view")
    columns = [name for name in several if name in table.columns] or [one]
    names = table[columns].to_numpy(object)
    by_name = _by_name(names.ravel(), np.repeat(np.arange(len(table)), len(columns)), correct)
    return by_name.rename_axis(what).sort_index(key=_naturally)


def _by_name(names: np.ndarray, trials: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Accuracy of the trials that go with each name; a trial counts once for a name."""
    pairs = pd.DataFrame({"name": names, "trial": trials}).drop_duplicates()
    right = np.asarray(correct, bool)
    rows = {name: asdict(accuracy(right[part["trial"]])) for name, part in pairs.groupby("name")}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"])


def _naturally(names: pd.Index) -> pd.Index:
    order = {name: i for i, name in enumerate(sorted(map(str, names), key=natural_order))}
    return pd.Index([order[str(name)] for name in names])


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
    """A row per tested trial: every column of the trials, predicted face and position (1 … 3), whether it is right, three
    probabilities. A column of the trials with one of these names becomes ``trial_…``.
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    faces = table[list(FACES)].to_numpy(object)
    out = shown_columns(table)
    out["predicted"] = faces[np.arange(len(faces)), predicted]
    out["predicted_position"] = predicted + 1
    out["correct"] = predicted == labels
    for place in range(3):
        out[f"p_{place + 1}"] = probabilities[:, place]
    return out


def shown_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The trials' own columns as ``predictions`` has them."""
    called = {name: free_name(f"trial_{name}", table.columns) for name in ANSWERS}
    return table.reset_index(drop=True).rename(columns=called)
