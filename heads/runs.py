"""Runs: one head, one layer, one seed, one folder.

A run's folder holds ``config.json``, ``weights.safetensors``, ``metrics.csv``, TensorBoard events, ``predictions.csv``,
``accuracy_by_*.csv`` and, last of all, ``result.json``: a run with that file is finished. ``state.safetensors`` is
there while it is not. That of a fine-tuned run holds ``backbone.safetensors`` too, the tuned network.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from featurestore import FeatureStore
from featurestore.devices import reproducible
from featurestore.errors import FeatureStoreError
from featurestore.store.reader import Source
from featurestore.text import with_urls
from heads.checkpoints import save_head
from heads.evaluation import audit_order, evaluate
from heads.features import Features
from heads.finetuned_runs import finetuned_head, finetuning_features, save_network, weights_of_all, without_backbone
from heads.finetuning import FinetunedHead
from heads.models.base import Head
from heads.registry import draw_head, stored_options
from heads.run_files import TrainingCurves, read_json, read_predictions, read_result, write_csv, write_document
from heads.scores import ANSWERS, accuracy_by, accuracy_by_face, predictions, score, shown_columns
from heads.tasks import Task
from heads.train import Checkpoint, Epoch, Pace, Progress, Settings, train, validate

VERSION = 1  # of what a run computes: part of its identity
OnEpoch = Callable[[str, Progress], None]  # a run's label; every epoch, once the pace, photographs that are read before
_FINETUNING = ("finetune_from", "backbone_lr", "augment")  # settings that only a fine-tuned run's identity knows


@dataclass(frozen=True)
class Run:
    """One head to train: on which layer, with which options and settings. ``dtype`` is what the layer's rows are stored as.

    A fine-tuned one (``settings.finetune_from``) begins with the weights of the ``frozen`` run. ``start_dtype`` is what the rows
    that it takes are stored as, ``weights`` the network's file, if the source does not say all, and ``backbone`` the name of one
    of your own.
    """

    layer: str
    head: str
    settings: Settings
    options: dict[str, Any] = field(default_factory=dict)
    fold: tuple[int, int] | None = None
    dtype: str = "float32"
    start_dtype: str = "float32"
    weights: str | None = None
    backbone: str | None = None

    @property
    def frozen(self) -> "Run":
        """The run that a fine-tuned one continues."""
        settings = replace(self.settings, finetune_from=None, backbone_lr=None, augment="")
        return replace(self, settings=settings, start_dtype="float32", weights=None, backbone=None)

    @property
    def kind(self) -> str:
        """Layer and head, and where it is fine-tuned from."""
        start = self.settings.finetune_from
        return f"{self.layer} {self.head}{f' from {start}' if start else ''}"

    def config(self, task: Task) -> dict[str, Any]:
        """Everything that the result depends on, but for the number of threads."""
        settings = asdict(self.settings)
        del settings["threads"]
        if self.settings.finetune_from is None:
            settings = {name: value for name, value in settings.items() if name not in _FINETUNING}
        if self.settings.order == "random":
            del settings["order"]  # as in the runs of before there was another
        settings["device"] = settings["device"].partition(":")[0]  # which GPU of several makes no difference
        if self.head == "zero-shot":
            settings = {}
        return {
            "version": VERSION,
            "layer": self.layer,
            "head": self.head,
            "options": stored_options(self.options),
            "settings": settings,
            "sources": list(task.sources),
            "trials": task.split.examples_hash,
            "photographs": task.photographs,
            "split": task.split.hash,
            **({"dtype": self.dtype} if self.dtype != "float32" else {}),
            **({"start_dtype": self.start_dtype} if self.start_dtype != "float32" else {}),
        }

    def identity(self, task: Task) -> str:
        """sha256 (hex) of ``config``."""
        return hashlib.sha256(json.dumps(self.config(task), sort_keys=True).encode()).hexdigest()

    def name(self, task: Task) -> str:
        """The folder's name: what a person looks for, and enough of the identity to be unique."""
        parts = [self.layer, self.head]
        if self.settings.finetune_from:
            parts.append(f"from-{self.settings.finetune_from}")
        if self.head != "zero-shot":
            parts += [f"lr{self.settings.lr:g}", f"seed{self.settings.seed}"]
        if self.fold:
            parts.append("fold{}of{}".format(*self.fold))
        return "-".join([*parts, self.identity(task)[:8]])

    @property
    def label(self) -> str:
        """How its progress is announced."""
        trained = f" lr {self.settings.lr:g} seed {self.settings.seed}" if self.head != "zero-shot" else ""
        fold = " fold {} of {}".format(*self.fold) if self.fold else ""
        return f"{self.kind}{trained}{fold}"


def train_run(
    task: Task, run: Run, folder: Path, report: OnEpoch = lambda label, epoch: None, every: float = 60.0
) -> dict[str, Any]:
    """Train, test and write one run into ``folder``; go on where a killed one stopped; a finished one is only read.

    A fine-tuned run's frozen one is trained first, unless it is finished. Returns its result. Raises FeatureStoreError if another
    process is at it, the layer is not cached, a photograph is not what it was, the loss becomes NaN or the disk is full; what is
    there then stays.
    """
    run_folder = folder / run.name(task)
    if run.settings.finetune_from and read_result(run_folder) is None:
        train_run(task, run.frozen, folder, report, every)
    run_folder.mkdir(parents=True, exist_ok=True)
    with _lock(run_folder):
        finished = read_result(run_folder)
        if finished is not None:
            return _with_current_trials(finished, task, run_folder)
        exact = reproducible() if run.settings.finetune_from else nullcontext()
        with _threads(_begun_with(run_folder) or run.settings.threads), exact:
            return _train(task, run, run_folder, report, every)


def _train(task: Task, run: Run, run_folder: Path, report: OnEpoch, every: float) -> dict[str, Any]:
    start = time.perf_counter()
    store = FeatureStore.open(task.store)
    sources = [store.source(name) for name in task.sources]
    head: Head
    features: Features
    if run.settings.finetune_from:
        weights = weights_of_all(sources, run.weights, run.backbone)
        head = finetuned_head(task, run, run_folder.parent / run.frozen.name(task), weights)
        features = finetuning_features(task, run, head, weights, run_folder, lambda line: report(run.label, line))
    else:
        features = _features(task, run, sources)
        head = make_head(run, features.shape, task)
    examples = task.examples
    write_document(run_folder / "config.json", {**run.config(task), "threads": torch.get_num_threads(), **_about(task)})
    checkpoint = Checkpoint(run_folder / "state.safetensors", run.identity(task), every)
    with TrainingCurves(run_folder) as curves:

        def seen(line: Epoch | Pace) -> None:
            if isinstance(line, Epoch):
                curves.add(line)
            report(run.label, line)

        progress = train(head, features, examples, run.settings, checkpoint, seen)
    write_csv(run_folder / "metrics.csv", pd.DataFrame([asdict(epoch) for epoch in progress.history]))
    about = {
        "sources": list(task.sources),
        "split": task.split.hash,
        "trials": task.split.examples_hash,
        "epoch": progress.best_epoch,
    }
    save_head(head, run_folder / "weights.safetensors", run.layer, **about)
    parameters = sum(weight.numel() for weight in head.parameters())
    if isinstance(head, FinetunedHead):
        save_network(head, weights, run_folder, run_folder.name)
        head, features = without_backbone(head, features, task, run, run_folder)
    history = progress.history
    result = {
        "name": run_folder.name,
        **_scores(head, features, task, run_folder),
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        **_fit(head, features, task, progress.best_epoch),
        "examples_per_second": float(np.median([epoch.examples_per_second for epoch in history])) if history else None,
        "seconds": round(sum(epoch.seconds for epoch in history), 3),
        "wall_seconds": round(time.perf_counter() - start, 3),
        "parameters": parameters,
        "state": "finished",
    }
    result = write_document(run_folder / "result.json", result)
    checkpoint.remove()
    return result


def _features(task: Task, run: Run, sources: list[Source]) -> Features:
    device = run.settings.device
    shown = np.unique(task.items[task.split.part >= 0]) if device != "cpu" else None
    return Features([source.rows(run.layer) for source in sources], device, shown)


def _fit(head: Head, features: Features, task: Task, best_epoch: int) -> dict[str, float]:
    """How well the weights saved fit the other two parts. What zero-shot answers are no probabilities, so they have no loss."""
    items, labels = task.examples.of(task.examples.train)
    right = float((evaluate(head, features, items).argmax(axis=1) == labels).mean())
    loss, validation = validate(head, features, task.examples, best_epoch)
    trained = any(weight.requires_grad for weight in head.parameters())
    return {
        "train_accuracy": right,
        "validation_loss": loss if trained else float("nan"),
        "validation_accuracy": validation,
    }


def _scores(head: Head, features: Features, task: Task, run_folder: Path) -> dict[str, Any]:
    """Test the weights as saved; writes predictions and the accuracies by face, view and position."""
    test = task.split.indices("test")
    items, labels, table = task.items[test], task.labels[test], task.table.iloc[test]
    logits = evaluate(head, features, items)
    correct = logits.argmax(axis=1) == labels
    if task.classes:
        names = np.array(task.classes, object)[logits.argmax(axis=1)]
        predicted = table.reset_index(drop=True).assign(predicted=names, correct=correct)
    else:
        predicted = predictions(table, logits, labels)
    write_csv(run_folder / "predictions.csv", predicted)
    write_csv(run_folder / "accuracy_by_face.csv", accuracy_by_face(table, correct).reset_index())
    write_csv(run_folder / "accuracy_by_view.csv", accuracy_by(table, correct, "view").reset_index())
    scores = score(table, correct, task.chance, task.from_keys)
    if not task.classes:
        audit = audit_order(head, features, items, labels)
        write_csv(run_folder / "accuracy_by_position.csv", audit.positions.reset_index())
        places = audit.positions["value"]
        scores |= {"order_consistent": audit.consistent, "order_spread": float(places.max() - places.min())}
    return scores


def make_head(run: Run, shape: tuple[int, ...], task: Task) -> Head:
    """The run's head with the initial weights of its seed."""
    options = {**run.options, **({"faces": list(task.classes)} if run.head == "identity" else {})}
    return draw_head(run.head, shape, run.settings.seed, **options)


def _with_current_trials(result: dict[str, Any], task: Task, run_folder: Path) -> dict[str, Any]:
    """A finished run's result beside the trials as they are now: participants may have been corrected, the file renamed."""
    if task.classes:
        return result
    answered = read_predictions(run_folder)
    if answered is None:
        return result
    table = task.table.iloc[task.split.indices("test")]
    result = {**result, **score(table, answered["correct"].to_numpy(bool), task.chance, task.from_keys)}
    answers = [name for name in answered.columns if name in ANSWERS]
    write_csv(run_folder / "predictions.csv", pd.concat([shown_columns(table), answered[answers]], axis=1))
    config = json.loads((run_folder / "config.json").read_text("utf-8"))
    write_document(run_folder / "config.json", {**config, **task.description()})
    return write_document(run_folder / "result.json", result)


def _begun_with(run_folder: Path) -> int:
    """The number of threads of an unfinished run: it must go on with as many, or its last bits would differ."""
    try:
        return int(read_json(run_folder / "config.json")["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _about(task: Task) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")}
    return {
        "split_name": task.split.name,
        "store": with_urls(str(task.store)),
        **task.description(),
        "library_versions": versions,
    }


@contextmanager
def _lock(run_folder: Path) -> Iterator[None]:
    lock = FileLock(run_folder / ".lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise FeatureStoreError(f"another process is training {run_folder}; wait for it, or stop it.") from None


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
