"""Which trials train a head, which choose its best epoch, and which test it: drawn before any model exists.

A split has a generator of its own and depends on the trials, the kind, the fractions and its seed, on nothing else;
so every layer, every head and every training seed sees the same test set.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.errors import FeatureStoreError
from featurestore.files import write_atomically
from featurestore.text import listing, natural_order
from heads.trials.matching import Trials
from heads.trials.tables import FACES, VIEWS

PARTS = ("train", "validation", "test")
KINDS = ("trial", "face", "view")
FRACTIONS = (0.70, 0.15, 0.15)
_FORMAT = "face-featurestore-split"


@dataclass(frozen=True)
class Split:
    """``part`` (n,) int8 by example: 0 train, 1 validation, 2 test, -1 left out. ``examples_hash`` is what it belongs to.

    ``fold`` is (number from 1, of how many) where it is one of several splits that test every face (view, triplet) once.
    ``set_aside`` of those left out show a photograph that is also, under another key, on the other side.
    """

    kind: str
    seed: int
    fractions: tuple[float, float, float]
    examples_hash: str
    part: np.ndarray
    fold: tuple[int, int] | None = None
    set_aside: int = 0

    def indices(self, name: str) -> np.ndarray:
        """The examples of a part, ascending."""
        return np.flatnonzero(self.part == PARTS.index(name))

    @property
    def hash(self) -> str:
        """sha256 (hex) over everything: the same hash means the same test set."""
        head = json.dumps([self.kind, self.seed, list(self.fractions), self.examples_hash, *(self.fold or ())])
        return hashlib.sha256(head.encode() + self.part.astype(np.int8).tobytes()).hexdigest()

    @property
    def name(self) -> str:
        """What its file is called."""
        fold = "fold{}of{}-".format(*self.fold) if self.fold else ""
        return f"{self.kind}-seed{self.seed}-{fold}{self.hash[:12]}"

    @property
    def test(self) -> str:
        """What results are pooled under: all folds together, or this split alone."""
        if not self.fold:
            return self.name
        drawn = json.dumps([self.kind, self.seed, list(self.fractions), self.examples_hash, self.fold[1]])
        return f"{self.kind}-seed{self.seed}-{self.fold[1]}folds-{hashlib.sha256(drawn.encode()).hexdigest()[:12]}"

    def save(self, folder: Path) -> Path:
        """Write it as JSON into ``folder``; the file of an equal split is left as it is."""
        path = folder / f"{self.name}.json"
        if path.exists():
            return path
        document = {
            "format": _FORMAT,
            "format_version": 1,
            "kind": self.kind,
            "seed": self.seed,
            "fractions": list(self.fractions),
            "of": self.examples_hash,
            "hash": self.hash,
            **{name: self.indices(name).tolist() for name in PARTS},
            "left_out": int((self.part < 0).sum()),
            "set_aside": self.set_aside,
            "fold": self.fold,
            "n": len(self.part),
        }
        write_atomically(path, json.dumps(document) + "\n")
        return path

    @classmethod
    def load(cls, path: Path, examples_hash: str, n: int) -> "Split":
        """A saved split for the ``n`` examples with hash ``examples_hash``; FeatureStoreError if damaged."""
        if not path.is_file():  # a pipe would hang
            raise FeatureStoreError(f"there is no split {path}.")
        try:
            document = json.loads(path.read_text("utf-8"))
            if document["format"] != _FORMAT or document["format_version"] != 1:
                raise ValueError("its format is another one")
            if document["of"] != examples_hash:
                raise FeatureStoreError(
                    f"{path} was drawn for other examples ({document['of'][:12]}…, these are {examples_hash[:12]}…): another "
                    "file, order, `where` or store. Draw a new one: `split` trial, face or view."
                )
            part = np.full(n, -1, np.int8)
            for number, name in enumerate(PARTS):
                part[np.asarray(document[name], np.int64)] = number
            a, b, c = document["fractions"]
            fold = document.get("fold") and (document["fold"][0], document["fold"][1])
            aside = document.get("set_aside", 0)
            split = cls(document["kind"], document["seed"], (a, b, c), examples_hash, part, fold, aside)
            sound = split.hash == document["hash"]
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, OSError) as error:
            raise FeatureStoreError(f"{path} is not a split: {type(error).__name__} {error}") from None
        if not sound:
            raise FeatureStoreError(f"{path} was changed after it was written: its hash does not fit its content.")
        return split


def split_trials(
    trials: Trials,
    kind: str,
    seed: int,
    fractions: Sequence[float] = FRACTIONS,
    test: Sequence[str] = (),
) -> Split:
    """``trial``: by triplet, so that all answers to one triplet fall into one part. ``face``, ``view``: no face or view of
    one part is in another; trials that mix are left out. ``test`` names faces or views to hold out instead of drawing them.

    Photographs count by content: the same one under two keys makes two triplets one, and a trial that shows a photograph
    of the training under another key is set aside.
    """
    if kind == "trial" and len(test):
        raise FeatureStoreError("a split by trial has no faces or views to hold out; use `split` face or view.")
    return draw_split(
        trial_labels(trials, kind),
        kind,
        seed,
        fractions,
        trials.hash,
        test,
        photographs=shown_photographs(trials, kind),
    )


def shown_photographs(trials: Trials, kind: str) -> np.ndarray | None:
    """What must not be on both sides of a split by ``kind``; none by trial, where all photographs are in all parts."""
    return None if kind == "trial" else trials.photographs


def trial_labels(trials: Trials, kind: str) -> np.ndarray:
    """What a split by ``kind`` divides: (n, 1) or (n, 3) str, the triplet, or the faces or views of each trial."""
    if kind == "trial":
        return np.array(["|".join(map(str, three)) for three in np.sort(trials.photographs, axis=1)])[:, None]
    labels: np.ndarray = trials.table[list(FACES if kind == "face" else VIEWS)].to_numpy(str)
    return labels


def draw_folds(
    labels: np.ndarray,
    kind: str,
    seed: int,
    fractions: Sequence[float],
    examples_hash: str,
    folds: int,
    photographs: np.ndarray | None = None,
) -> list[Split]:
    """``folds`` splits that each test another part of the distinct ``labels``: every label is tested once.

    The others are divided into training and validation by their ``fractions``. Arguments and errors as ``draw_split``; also
    FeatureStoreError for fewer than two folds and for more than there are labels.
    """
    distinct = np.unique(labels)
    if not 2 <= folds <= len(distinct):
        raise FeatureStoreError(
            f"`folds` {folds}: it is 2 or more, and there are {len(distinct)} different {kind}s to divide into folds."
        )
    tests = np.array_split(np.random.default_rng([seed, folds]).permutation(distinct), folds)
    return [
        draw_split(labels, kind, seed, fractions, examples_hash, test, (number, folds), photographs)
        for number, test in enumerate(tests, start=1)
    ]


@dataclass(frozen=True)
class Choice:
    """What one way to split would leave: examples of each part, of folds the mean of training and validation and all tests."""

    option: str
    train: int
    validation: int
    test: int


def choices(labels: np.ndarray, kind: str, seed: int) -> list[Choice]:
    """How many examples each choice of fractions or folds would leave, the one to suggest first.

    That is the one whose smallest part is largest, where a quarter is enough for validation.
    """
    codes = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    found = []
    for fractions in (FRACTIONS, (0.6, 0.2, 0.2), (0.5, 0.2, 0.3), (0.4, 0.2, 0.4), (0.34, 0.33, 0.33)):
        with suppress(FeatureStoreError):
            found.append(_choice(_option(fractions), [draw_split(codes, kind, seed, fractions, "")]))
    for folds, fractions in product((2, 3, 4, 5, 10), (FRACTIONS, (0.5, 0.3, 0.2))):
        with suppress(FeatureStoreError):
            option = f"`folds` {folds} {_option(fractions)}"
            found.append(_choice(option, draw_folds(codes, kind, seed, fractions, "", folds)))
    return sorted(found, key=lambda choice: -min(choice.train, 4 * choice.validation, choice.test))


def _option(fractions: Sequence[float]) -> str:
    return "`fractions` " + " ".join(f"{share:.2f}".lstrip("0") for share in fractions)


def _choice(option: str, splits: Sequence[Split]) -> Choice:
    n = np.array([[len(split.indices(name)) for name in PARTS] for split in splits])
    return Choice(option, int(n[:, 0].mean()), int(n[:, 1].mean()), int(n[:, 2].sum()))


def draw_split(
    labels: np.ndarray,
    kind: str,
    seed: int,
    fractions: Sequence[float],
    examples_hash: str,
    test: Sequence[Any] | np.ndarray = (),
    fold: tuple[int, int] | None = None,
    photographs: np.ndarray | None = None,
) -> Split:
    """Divide the distinct ``labels`` by ``fractions``; an example (a row of ``labels``, (n, k)) goes where all its labels go.

    ``photographs`` (n, k) int64 say which are the same: an example of validation or test with one that an earlier part has is
    set aside. Every part with a fraction gets at least one label. Raises FeatureStoreError if fractions do not add up
    to 1, if there are fewer labels than parts, or if a part ends up without examples.
    """
    if kind not in KINDS:
        raise FeatureStoreError(f"there is no split by {kind!r}; it is one of {', '.join(KINDS)}.")
    shares = tuple(float(share) for share in fractions)
    if (
        len(shares) != 3
        or not all(0 <= share <= 1 for share in shares)
        or abs(sum(shares) - 1) > 1e-6
        or shares[0] == 0
        or shares[2] == 0
    ):
        raise FeatureStoreError(
            f"`fractions` {' '.join(map(str, fractions))}: give three numbers that add up to 1, for training, validation "
            "and test, such as .7 .15 .15. Only validation may be 0: training then runs all epochs."
        )
    distinct, inverse = np.unique(labels, return_inverse=True)
    held_out = _held_out(distinct, test, kind)
    order = np.random.default_rng(seed).permutation(len(distinct))
    part_of = np.full(len(distinct), -1, np.int8)
    if len(test):
        part_of[held_out] = 2
        order = order[~np.isin(order, held_out)]
        shares = (shares[0] / (shares[0] + shares[1]), shares[1] / (shares[0] + shares[1]), 0.0)
    counts = _counts(len(order), shares, kind)
    part_of[order] = np.repeat(np.arange(3), counts)
    parts = part_of[inverse].reshape(labels.shape)
    part = np.where((parts == parts[:, :1]).all(axis=1), parts[:, 0], -1).astype(np.int8)
    a, b, c = (float(share) for share in fractions)
    aside = 0 if photographs is None else _set_aside(part, photographs)
    split = Split(kind, seed, (a, b, c), examples_hash, part, fold, aside)
    for name, share in zip(PARTS, (a, b, 1.0), strict=True):
        if share and not len(split.indices(name)):
            raise FeatureStoreError(
                f"the {name} part of the split by {kind}{' (fold {} of {})'.format(*fold) if fold else ''} is empty: of "
                f"{len(part)} examples with {len(distinct)} different {kind}s none has all of its {kind}s in that part"
                f"{f', but for {aside} whose photographs an earlier part has under other keys' if aside else ''}. "
                f"Give it more: {'fewer `folds`; ' if fold else ''}`fractions`, now "
                f"{' '.join(f'{share:g}' for share in fractions)}; another `split_seed`; or more trials."
            )
    return split


def _set_aside(part: np.ndarray, photographs: np.ndarray) -> int:
    """Leave out of validation and test, in place, what shows a photograph of an earlier part; returns how many."""
    aside = 0
    for name in (1, 2):
        earlier = photographs[(part >= 0) & (part < name)]
        again = (part == name) & np.isin(photographs, earlier).any(axis=1)
        part[again] = -1
        aside += int(again.sum())
    return aside


def _held_out(distinct: np.ndarray, test: Sequence[Any] | np.ndarray, kind: str) -> np.ndarray:
    unknown = sorted(set(test) - set(distinct))
    there = sorted([str(label) for label in distinct], key=natural_order)
    if unknown:
        raise FeatureStoreError(f"no {kind} {listing(map(repr, unknown))} to hold out; there are {listing(there, 10)}.")
    return np.flatnonzero(np.isin(distinct, list(test)))


def _counts(n: int, shares: Sequence[float], kind: str) -> np.ndarray:
    """How many of ``n`` labels each part gets: by largest remainder, one at least where there is a share."""
    wanted = np.array(shares) * n
    counts = np.floor(wanted + 1e-9).astype(int)
    counts[np.argsort(counts - wanted, kind="stable")[: n - counts.sum()]] += 1
    for part in range(3):
        if shares[part] and not counts[part]:
            counts[part] += 1
            counts[int(counts.argmax())] -= 1
    if (counts < 0).any() or any(share and not count for share, count in zip(shares, counts, strict=True)):
        raise FeatureStoreError(f"{n} different {kind}s are too few to divide into {sum(map(bool, shares))} parts.")
    return counts
