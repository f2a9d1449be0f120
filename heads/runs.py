"""Runs: one head, one layer, one seed, one folder.

A run's folder holds ``config.json``, ``weights.safetensors``, ``metrics.csv``, TensorBoard events, ``predictions.csv``,
``accuracy_by_*.csv`` and, last of all, ``result.json``: a run with that file is finished. ``state.safetensors`` is
there while it is not.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.files import write_atomically
from featurestore.intervals import accuracy
from featurestore.store.reader import Source
from featurestore.text import natural_order
from heads.checkpoints import save_head
from heads.features import Features
from heads.models.triplet import Head, draw_head
from heads.scores import CHANCE, Ceiling, accuracy_by, audit_order, evaluate, noise_ceiling, normalised, predictions
from heads.splits import PARTS, Split
from heads.train import Checkpoint, Epoch, Examples, Settings, train
from heads.trials.matching import Trials, holds

VERSION = 1  # of what a run computes: part of its identity
Report = Callable[[str, Epoch], None]


@dataclass(frozen=True)
class Task:
    """What all runs of a grid learn: examples with their split, the same for every head and layer.

    ``items`` (n, 3) or (n, 1) int64 number the items of ``sources`` one after the other, ``labels`` (n,) int64 are places or
    identities. ``table`` has a row per example (for predictions), ``classes`` the names of identities, or none for
    triplets. ``photographs`` is a hash of the items' images: the same trials over other pictures are another task.
    """

    store: Path
    sources: tuple[str, ...]
    items: np.ndarray
    labels: np.ndarray
    split: Split
    table: pd.DataFrame
    photographs: str
    classes: tuple[str, ...] = ()
    ceiling: Ceiling | None = None

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / len(self.classes) if self.classes else CHANCE

    @property
    def examples(self) -> Examples:
        """Items and labels with the indices of each part."""
        return Examples(self.items, self.labels, *(self.split.indices(name) for name in PARTS))


def triplet_task(store: FeatureStore, trials: Trials, split: Split) -> Task:
    """Odd-one-out: three items, and which of them is odd."""
    return Task(
        store=store.path.resolve(),
        sources=trials.sources,
        items=trials.items,
        labels=trials.odd,
        split=split,
        table=trials.table,
        photographs=_photographs(store, trials.sources, trials.items),
        ceiling=noise_ceiling(trials),
    )


def identity_items(source: Source, where: Sequence[str] = ()) -> np.ndarray:
    """The items (n,) int64 of a source that meet all conditions on its columns."""
    kept = np.ones(source.n_items, bool)
    for condition in where:
        kept &= holds(condition, source.items)
    if not kept.any():
        raise FeatureStoreError(f"no item of {source.folder} has {' and '.join(where)}.")
    return np.flatnonzero(kept)


def items_hash(source: Source, items: np.ndarray) -> str:
    """sha256 (hex) of the keys of ``items``: what a split of them belongs to."""
    keys = "\0".join("\1".join(key) for key in source.keys[items])
    return hashlib.sha256(f"{source.name}\0{keys}".encode()).hexdigest()


def identity_task(store: FeatureStore, source: Source, items: np.ndarray, split: Split) -> Task:
    """Which face is it: one item, and its face. FeatureStoreError if a tested face has no view to train on."""
    table = source.keys[items].to_frame(index=False)
    classes = sorted(set(table["face_id"]), key=natural_order)
    labels = pd.Index(classes).get_indexer(table["face_id"])
    untrained = set(labels[split.part > 0]) - set(labels[split.part == 0])
    if untrained:
        raise FeatureStoreError(
            f"{len(untrained)} faces ({classes[min(untrained)]} …) have no view in the training part, so they cannot be "
            "learned. The multi-view head needs views that faces share; see --fractions and --hold-out."
        )
    return Task(
        store=store.path.resolve(),
        sources=(source.name,),
        items=items[:, None],
        labels=labels.astype(np.int64),
        split=split,
        table=table,
        photographs=_photographs(store, (source.name,), items),
        classes=tuple(classes),
    )


def _photographs(store: FeatureStore, sources: tuple[str, ...], items: np.ndarray) -> str:
    images = np.concatenate([store.source(name).coordinate("image_sha256") for name in sources])
    return hashlib.sha256("".join(images[np.unique(items)]).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """One head to train: on which layer, with which options and settings."""

    layer: str
    head: str
    settings: Settings
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, task: Task) -> dict[str, Any]:
        """Everything that the result depends on, but for the number of threads."""
        settings = asdict(self.settings)
        del settings["threads"]
        if self.head == "zero-shot":
            settings = {}
        return {
            "version": VERSION,
            "layer": self.layer,
            "head": self.head,
            "options": self.options,
            "settings": settings,
            "sources": list(task.sources),
            "trials": task.split.of,
            "photographs": task.photographs,
            "split": task.split.hash,
        }

    def identity(self, task: Task) -> str:
        """sha256 (hex) of ``config``."""
        return hashlib.sha256(json.dumps(self.config(task), sort_keys=True).encode()).hexdigest()

    def name(self, task: Task) -> str:
        """The folder's name: what a person looks for, and enough of the identity to be unique."""
        parts = [self.layer, self.head]
        if self.head != "zero-shot":
            parts += [f"lr{self.settings.lr:g}", f"seed{self.settings.seed}"]
        return "-".join([*parts, self.identity(task)[:8]])

    @property
    def label(self) -> str:
        """How its progress is announced."""
        trained = self.head != "zero-shot"
        return f"{self.layer} {self.head}" + (f" lr {self.settings.lr:g} seed {self.settings.seed}" if trained else "")


def train_run(
    task: Task, run: Run, folder: Path, report: Report = lambda label, epoch: None, every: float = 60.0
) -> dict[str, Any]:
    """Train, test and write one run into ``folder``; go on where a killed one stopped; a finished one is only read.

    Returns its result. Raises FeatureStoreError if another process is at it, the layer is not cached, the loss becomes
    NaN or the disk is full; what is there then stays.
    """
    home = folder / run.name(task)
    home.mkdir(parents=True, exist_ok=True)
    with _lock(home):
        finished = read_result(home)
        if finished is not None:
            return _with_ceiling(finished, task, home)
        with _threads(_begun_with(home) or run.settings.threads):
            return _train(task, run, home, report, every)


def _train(task: Task, run: Run, home: Path, report: Report, every: float) -> dict[str, Any]:
    start = time.perf_counter()
    store = FeatureStore.open(task.store)
    rows = [store.source(name).rows(run.layer) for name in task.sources]
    device = run.settings.device
    examples = task.examples
    features = Features(rows, device, np.unique(task.items[task.split.part >= 0]) if device != "cpu" else None)
    head = make_head(run, features.shape, task)
    write_json(home / "config.json", {**run.config(task), "threads": torch.get_num_threads(), **_about(store, task)})
    checkpoint = Checkpoint(home / "state.safetensors", run.identity(task), every)
    with _Curves(home) as curves:

        def seen(epoch: Epoch) -> None:
            curves.add(epoch)
            report(run.label, epoch)

        progress = train(head, features, examples, run.settings, checkpoint, seen)
    write_csv(home / "metrics.csv", pd.DataFrame([asdict(epoch) for epoch in progress.history]))
    about = {
        "sources": list(task.sources),
        "split": task.split.hash,
        "trials": task.split.of,
        "epoch": progress.best_epoch,
    }
    save_head(head, home / "weights.safetensors", run.layer, **about)
    history, best = progress.history, progress.history[progress.best_epoch - 1] if progress.best_epoch else None
    result = {
        "name": home.name,
        **_scores(head, features, task, home),
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "validation_accuracy": best.validation_accuracy if best else None,
        "examples_per_second": float(np.median([epoch.examples_per_second for epoch in history])) if history else None,
        "seconds": round(sum(epoch.seconds for epoch in history), 3),
        "wall_seconds": round(time.perf_counter() - start, 3),
        "parameters": sum(weight.numel() for weight in head.parameters()),
        "state": "finished",
    }
    write_json(home / "result.json", result)
    checkpoint.remove()
    return result


def _scores(head: Head, features: Features, task: Task, home: Path) -> dict[str, Any]:
    """Test the weights as saved; writes predictions and the accuracies by face and view."""
    test = task.split.indices("test")
    items, labels, table = task.items[test], task.labels[test], task.table.iloc[test]
    logits = evaluate(head, features, items)
    correct = logits.argmax(axis=1) == labels
    if task.classes:
        predicted = table.reset_index(drop=True).assign(
            predicted=np.array(task.classes, object)[logits.argmax(axis=1)], correct=correct
        )
        table = table.rename(columns={"face_id": "face_1", "view": "view_1"})
    else:
        predicted = predictions(table, logits, labels)
    write_csv(home / "predictions.csv", predicted)
    for what in ("face", "view"):
        write_csv(home / f"accuracy_by_{what}.csv", accuracy_by(table, correct, what).reset_index())
    score = accuracy(correct)
    scores: dict[str, Any] = {
        "accuracy": score.value,
        "low": score.low,
        "high": score.high,
        "n_test": score.n,
        "chance": task.chance,
        "ceiling": task.ceiling.value if task.ceiling else None,
        "normalised": normalised(score.value, task.ceiling) if not task.classes else None,
    }
    if not task.classes:
        audit = audit_order(head, features, items, labels)
        write_csv(home / "accuracy_by_position.csv", audit.positions.reset_index())
        places = audit.positions["value"]
        scores |= {"order_consistent": audit.consistent, "order_spread": float(places.max() - places.min())}
    return scores


def make_head(run: Run, shape: tuple[int, ...], task: Task) -> Head:
    """The run's head with the initial weights of its seed."""
    options = {**run.options, **({"faces": list(task.classes)} if run.head == "identity" else {})}
    return draw_head(run.head, shape, run.settings.seed, **options)


def _with_ceiling(result: dict[str, Any], task: Task, home: Path) -> dict[str, Any]:
    """A finished run's result beside the ceiling as it is now: participants may have been put right since."""
    ceiling = task.ceiling.value if task.ceiling else None
    if not task.classes and result["ceiling"] != ceiling:
        result = {**result, "ceiling": ceiling, "normalised": normalised(result["accuracy"], task.ceiling)}
        write_json(home / "result.json", result)
    return result


def read_result(home: Path) -> dict[str, Any] | None:
    """A finished run's result; None for an unfinished one."""
    try:
        result = json.loads((home / "result.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("state") == "finished" else None


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all; NaN becomes null, which JSON has."""
    document = {key: None if isinstance(value, float) and value != value else value for key, value in document.items()}
    _write(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Whole or not at all."""
    _write(path, table.to_csv(index=False))


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise FeatureStoreError(
            f"{path} could not be written: {error}. If the disk is full, free some space and run the same command again: "
            "it goes on from the last checkpoint."
        ) from None


def _begun_with(home: Path) -> int:
    """The number of threads of an unfinished run: it must go on with as many, or its last bits would differ."""
    try:
        return int(json.loads((home / "config.json").read_text("utf-8"))["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _about(store: FeatureStore, task: Task) -> dict[str, Any]:
    source = store.source(task.sources[0])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")}
    return {
        "split_name": task.split.name,
        "store": str(task.store),
        "weights": source.attributes.get("weights_name", source.attributes["weights"]),
        "library_versions": versions,
    }


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    lock = FileLock(home / ".lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise FeatureStoreError(f"another process is training {home}; wait for it, or stop it.") from None


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Run with ``n`` of torch's threads; 0 for as many as there are."""
    before = torch.get_num_threads()
    if n:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Curves:
    """TensorBoard's event file of a run, made at the first epoch: a zero-shot run has none."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._to: Any = None

    def __enter__(self) -> "_Curves":
        return self

    def add(self, epoch: Epoch) -> None:
        """Losses, accuracies and speed after an epoch."""
        if self._to is None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to load

            self._to = SummaryWriter(str(self._home), purge_step=epoch.epoch)
        for name in ("loss", "accuracy"):
            self._to.add_scalar(f"{name}/train", getattr(epoch, f"train_{name}"), epoch.epoch)
            self._to.add_scalar(f"{name}/validation", getattr(epoch, f"validation_{name}"), epoch.epoch)
        self._to.add_scalar("examples_per_second", epoch.examples_per_second, epoch.epoch)

    def __exit__(self, *_: object) -> None:
        if self._to is not None:
            self._to.close()
