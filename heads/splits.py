"""Which trials train a head, which choose its best epoch, and which test it: drawn before any model exists.

A split has a generator of its own and depends on the trials, the kind, the fractions and its seed, on nothing else;
so every layer, every head and every training seed sees the same test set.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurestore.errors import FeatureStoreError
from featurestore.files import write_atomically
from featurestore.text import listing
from heads.trials.matching import Trials
from heads.trials.tables import FACES, VIEWS

PARTS = ("train", "validation", "test")
KINDS = ("trial", "face", "view")
FRACTIONS = (0.70, 0.15, 0.15)
_FORMAT = "face-featurestore-split"


@dataclass(frozen=True)
class Split:
    """``part`` (n,) int8 by example: 0 train, 1 validation, 2 test, -1 left out. ``examples_hash`` is what it belongs to."""

    kind: str
    seed: int
    fractions: tuple[float, float, float]
    examples_hash: str
    part: np.ndarray

    def indices(self, name: str) -> np.ndarray:
        """The examples of a part, ascending."""
        return np.flatnonzero(self.part == PARTS.index(name))

    @property
    def hash(self) -> str:
        """sha256 (hex) over everything: the same hash means the same test set."""
        head = json.dumps([self.kind, self.seed, list(self.fractions), self.examples_hash])
        return hashlib.sha256(head.encode() + self.part.astype(np.int8).tobytes()).hexdigest()

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.kind}-seed{self.seed}-{self.hash[:12]}"

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
            "n": len(self.part),
        }
        write_atomically(path, json.dumps(document) + "\n")
        return path

    @classmethod
    def load(cls, path: Path, examples_hash: str, n: int) -> "Split":
        """A saved split for the ``n`` examples with hash ``examples_hash``; FeatureStoreError if damaged."""
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
            split = cls(document["kind"], document["seed"], (a, b, c), examples_hash, part)
            sound = split.hash == document["hash"]
        except FileNotFoundError:
            raise FeatureStoreError(f"there is no split {path}.") from None
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
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
    """
    if kind == "trial":
        if len(test):
            raise FeatureStoreError("a split by trial has no faces or views to hold out; use `split` face or view.")
        labels = np.array(["|".join(map(str, three)) for three in np.sort(trials.items, axis=1)])[:, None]
    else:
        labels = trials.table[list(FACES if kind == "face" else VIEWS)].to_numpy(str)
    return draw_split(labels, kind, seed, fractions, trials.hash, test)


def draw_split(
    labels: np.ndarray, kind: str, seed: int, fractions: Sequence[float], examples_hash: str, test: Sequence[str] = ()
) -> Split:
    """Divide the distinct ``labels`` by ``fractions``; an example (a row of ``labels``, (n, k) str) goes where all its labels go.

    Every part with a fraction gets at least one label. Raises FeatureStoreError if fractions do not add up to 1, if
    there are fewer labels than parts, or if a part ends up without examples.
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
    split = Split(kind, seed, (a, b, c), examples_hash, part)
    for name, share in zip(PARTS, (a, b, 1.0), strict=True):
        if share and not len(split.indices(name)):
            raise FeatureStoreError(
                f"the {name} part of the split by {kind} is empty: of {len(part)} examples with {len(distinct)} different "
                f"{kind}s none has all of its {kind}s in that part. Give it more: `fractions`, now "
                f"{' '.join(f'{share:g}' for share in fractions)}; another `split_seed`; or more trials."
            )
    return split


def _held_out(distinct: np.ndarray, test: Sequence[str], kind: str) -> np.ndarray:
    unknown = sorted(set(test) - set(distinct))
    if unknown:
        raise FeatureStoreError(
            f"no {kind} {listing(map(repr, unknown))} to hold out; there are {listing(distinct, 10)}."
        )
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
