"""Grids: every layer with every head, learning rate and seed, and what they cost."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from featurestore import FeatureStore
from featurestore.devices import fast_precision
from featurestore.errors import FeatureStoreError
from featurestore.files import sha256_of
from featurestore.store.reader import Source
from featurestore.text import human_bytes, in_natural_order, listing
from heads.finetuning import CHUNK_BYTES
from heads.finetuning_plan import FinetuningPlan, plan_finetuning
from heads.models.base import Head
from heads.registry import build_head, check_head
from heads.reuse import why_not_reused
from heads.run_files import read_result
from heads.runs import Run
from heads.splits import (
    FRACTIONS,
    Choice,
    Split,
    choices,
    draw_folds,
    draw_split,
    shown_photographs,
    split_trials,
    trial_labels,
)
from heads.tasks import Task, identity_items, identity_task, items_hash, triplet_task
from heads.train import Settings
from heads.trials.matching import Sessions, Trials, load_trials, match
from heads.trials.same_person import SAME_PERSON, same_person_trials


@dataclass(frozen=True)
class GridRequest:
    """What the user asked for. ``trials`` is a file, ``same-person``, or None if only identities are learned.

    ``split`` is a kind, a saved split's path, or None: by trial for triplets, by view for identities. ``folds`` trains each
    head that often, so that every face (view, triplet) is tested once. With ``finetune_from``, a layer or ``input``, each head is
    trained on with the network from there to its own layer, at ``backbone_lr`` (a tenth of ``lr`` by default); ``weights`` is
    the network's file, unless the source was made with random or packaged ones, ``backbone`` the name of one of your own.
    ``precision`` auto is that of such runs in ``out``, else what the device is fast at (for a head with a bridge; the others have
    float32); without it ``settings`` says which.
    """

    store: Path
    out: Path
    layers: Sequence[str] = ()
    heads: Sequence[str] = ("conv", "similarity")
    trials: Path | str | None = None
    source: str | None = None
    n_trials: int = 5000
    view: str | None = None
    sessions: Sessions | None = None
    where: Sequence[str] = ()
    split: str | None = None
    split_seed: int = 0
    fractions: Sequence[float] = FRACTIONS
    hold_out: Sequence[str] = ()
    folds: int | None = None
    on_error: Literal["stop", "skip"] = "stop"
    lr: Sequence[float] = (5e-4,)
    seeds: Sequence[int] = (0,)
    parallel: bool = False
    rank: int | None = 64
    measure: str = "cosine"
    l2: float = 1e-2
    finetune_from: str | None = None
    backbone_lr: float | None = None
    augment: str = ""
    weights: str | None = None
    backbone: str | None = None
    precision: Literal["auto"] | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Grid:
    """What will be done, as a value: tasks with their runs, and what they cost. ``finished`` runs will only be read.

    ``trials`` are those of the triplet heads, ``choices`` how many of them other ways to split would leave, if it matters.
    ``not_reused`` says for which earlier runs the same is done again, and why. ``parameters`` and ``finetuning`` are by
    ``Run.kind``.
    """

    out: Path
    parts: list[tuple[Task, list[Run]]]
    parameters: dict[str, int]
    finished: int
    trials: Trials | None = None
    choices: tuple[Choice, ...] = ()
    not_reused: tuple[str, ...] = ()
    finetuning: dict[str, FinetuningPlan] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """All of them."""
        return sum(len(runs) for _, runs in self.parts)

    def memory(self, jobs: int) -> int:
        """Bytes of weights, gradients, two moments and the best weights, of the ``jobs`` largest heads at a time.

        Of a fine-tuned one also what its backbone computes, at most.
        """
        tuned = sum(run.kind in self.finetuning for _, runs in self.parts for run in runs)
        return 5 * 4 * sum(sorted(self._weights)[-jobs:]) + 2 * CHUNK_BYTES * min(jobs, tuned)

    def disk(self, jobs: int) -> int:
        """Bytes of all runs' weights and tuned networks, and of the states and computed rows of ``jobs`` unfinished ones."""
        plans = [self.finetuning[run.kind] for _, runs in self.parts for run in runs if run.kind in self.finetuning]
        rows = sum(sorted(plan.bytes_of_rows for plan in plans)[-jobs:])
        networks = sum(plan.network_bytes for plan in plans)
        return 4 * (sum(self._weights) + 4 * sum(sorted(self._weights)[-jobs:])) + networks + rows

    @property
    def _weights(self) -> list[int]:
        return [self.parameters[run.kind] for _, runs in self.parts for run in runs]

    def refuse_if_full(self, jobs: int) -> None:
        """FeatureStoreError if the disk cannot take what is planned."""
        self.out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.out).free
        if self.disk(jobs) > free:
            raise FeatureStoreError(
                f"these runs need up to {human_bytes(self.disk(jobs))} in {self.out}, where {human_bytes(free)} are free. Free "
                "some space, or train fewer at a time (`jobs`) or on another disk (`out`)."
            )


def plan_grid(request: GridRequest) -> Grid:
    """Read and match trials, draw splits, and lay out the runs; nothing is trained or written.

    Triplet heads get a zero-shot run for each layer beside them. FeatureStoreError for whatever cannot be done.
    """
    for name in request.heads:
        check_head(name)
    store = FeatureStore.open(request.store)
    layers = _layers(request, store)
    _refuse_useless(request)
    parts: list[tuple[Task, list[Run]]] = []
    trials: Trials | None = None
    other_choices: tuple[Choice, ...] = ()
    triplet_heads = [head for head in dict.fromkeys(request.heads) if head != "identity"]
    if triplet_heads:
        trials = _trials(request, store, layers)
        heads = ["zero-shot", *(head for head in triplet_heads if head != "zero-shot")]
        kind = request.split or "trial"
        if kind in ("face", "view") and not request.hold_out:
            other_choices = tuple(choices(trial_labels(trials, kind), kind, request.split_seed))
        for split in _trial_splits(request, trials, other_choices):
            task = triplet_task(store, trials, split, _about_trials(request))
            parts.append((task, _runs(request, store, layers, heads, task)))
    if "identity" in request.heads:
        for task in _identities(request, store, layers):
            parts.append((task, _runs(request, store, layers, ["identity"], task)))
    finetuning = plan_finetuning(store, parts)
    return Grid(
        request.out,
        parts,
        _parameters(store, parts, finetuning),
        sum(read_result(request.out / run.name(task)) is not None for task, runs in parts for run in runs),
        trials,
        other_choices,
        tuple(why_not_reused(request.out, store, parts)),
        finetuning,
    )


def _parameters(
    store: FeatureStore, parts: list[tuple[Task, list[Run]]], finetuning: Mapping[str, FinetuningPlan]
) -> dict[str, int]:
    """Of each head on each layer, with the part of the network that is fine-tuned."""
    parameters = {}
    for task, runs in parts:
        source = store.source(task.sources[0])
        for run in runs:
            if run.kind in parameters:
                continue
            parameters[run.kind] = sum(weight.numel() for weight in _unloaded(source, run, task).parameters())
            if run.kind in finetuning:
                parameters[run.kind] += finetuning[run.kind].parameters
    return parameters


def _unloaded(source: Source, run: Run, task: Task) -> Head:
    """The run's head without weights."""
    faces = {"faces": list(task.classes)} if run.head == "identity" else {}
    return build_head(run.head, source.layer(run.layer).shape, **run.options, **faces)


def _refuse_useless(request: GridRequest) -> None:
    """FeatureStoreError for options that contradict ``folds``, and for those of fine-tuning without it."""
    replace(
        request.settings,
        finetune_from=request.finetune_from,
        backbone_lr=request.backbone_lr,
        augment=request.augment,
    )  # which checks them
    if request.finetune_from and not set(request.heads) - {"zero-shot"}:
        raise FeatureStoreError(
            f"zero-shot has nothing to train, so nothing to fine-tune from {request.finetune_from!r}: leave `finetune_from` out, "
            "or choose other `heads`."
        )
    if (request.weights or request.backbone) and not request.finetune_from:
        name = "weights" if request.weights else "backbone"
        raise FeatureStoreError(
            f"`{name}` {getattr(request, name)} is needed only for fine-tuning: heads train on cached rows. Leave it out, or "
            "give `finetune_from` a layer."
        )
    saved = request.split is not None and request.split.endswith(".json")
    if request.folds and (request.hold_out or saved):
        raise FeatureStoreError(
            f"`folds` {request.folds} tests everything once, so nothing can be chosen to be tested: leave "
            f"{'`hold_out`' if request.hold_out else f'the saved split {request.split}'} out, or `folds`."
        )


def _layers(request: GridRequest, store: FeatureStore) -> list[str]:
    if request.source is None and request.sessions and request.sessions.sources:
        source = store.source(next(iter(request.sessions.sources.values())))
    else:
        source = store.source(request.source, request.layers)
    return [source.layer(name).name for name in dict.fromkeys(request.layers)] or list(source.layers)


def _trials(request: GridRequest, store: FeatureStore, layers: Sequence[str]) -> Trials:
    if request.trials is None:
        raise FeatureStoreError(
            "triplet heads learn from trials: give `trials` FILE, or `trials` same-person to make them from the keys."
        )
    by_source = request.sessions is not None and bool(request.sessions.sources)
    source = None if by_source else store.source(request.source, layers).name
    if request.trials != SAME_PERSON:
        return load_trials(
            Path(request.trials), store, source, request.view, request.sessions, request.where, request.on_error
        )
    if request.view or by_source or (request.sessions and request.sessions.views):
        raise FeatureStoreError("same-person trials have no sessions, and show all views; restrict them with `where`.")
    found = store.source(source)
    items = identity_items(found, request.where)
    return match(same_person_trials(found, request.n_trials, request.split_seed, items), store, source)


def _trial_splits(request: GridRequest, trials: Trials, others: Sequence[Choice]) -> list[Split]:
    try:
        return _asked_splits(request, trials)
    except FeatureStoreError as error:
        if not others:
            raise
        best = others[0]
        raise FeatureStoreError(
            f"{error} For example {best.option}, which leaves {best.train} trials to train on, {best.validation} for validation "
            f"and {best.test} to test."
        ) from None


def _asked_splits(request: GridRequest, trials: Trials) -> list[Split]:
    if request.split and request.split.endswith(".json"):
        return [Split.load(Path(request.split), trials.hash, len(trials))]
    kind = request.split or "trial"
    if request.folds:
        labels, shown = trial_labels(trials, kind), shown_photographs(trials, kind)
        return draw_folds(labels, kind, request.split_seed, request.fractions, trials.hash, request.folds, shown)
    return [split_trials(trials, kind, request.split_seed, request.fractions, request.hold_out)]


def _about_trials(request: GridRequest) -> dict[str, Any]:
    """Where the trials are from, in words."""
    made = request.trials == SAME_PERSON
    sessions = request.sessions or Sessions({}, {})
    return {
        "trials_file": str(request.trials),
        "trials_sha256": "" if made else sha256_of(str(request.trials)),
        "where": " and ".join(f"({condition})" for condition in request.where),
        "sessions": ", ".join(
            f"{session}={value}" for pairs in (sessions.views, sessions.sources) for session, value in pairs.items()
        ),
        "held_out": ", ".join(request.hold_out),
    }


def _identities(request: GridRequest, store: FeatureStore, layers: Sequence[str]) -> list[Task]:
    source = store.source(request.source, layers)
    items = identity_items(source, request.where)
    of, shown = items_hash(source, items), source.photographs[items][:, None]
    views = source.keys[items].get_level_values(1).to_numpy(str)[:, None]
    if request.split and request.split.endswith(".json"):
        splits = [Split.load(Path(request.split), of, len(items))]
    elif request.split not in (None, "view"):
        raise FeatureStoreError(
            f"the multi-view head (identity) cannot be tested by `split` {request.split}: it learns each face from some views "
            "and is tested on others, `split` view."
        )
    elif request.folds:
        splits = draw_folds(views, "view", request.split_seed, request.fractions, of, request.folds, shown)
    else:
        splits = [
            draw_split(views, "view", request.split_seed, request.fractions, of, request.hold_out, photographs=shown)
        ]
    about = {
        "where": " and ".join(f"({condition})" for condition in request.where),
        "held_out": ", ".join(request.hold_out),
        "views": listing(in_natural_order(set(views.ravel().tolist())), 10),
    }
    return [identity_task(store, source, items, split, about) for split in splits]


def _runs(
    request: GridRequest, store: FeatureStore, layers: Sequence[str], heads: Sequence[str], task: Task
) -> list[Run]:
    runs, fold = [], task.split.fold
    for layer in layers:
        dtypes = dict.fromkeys(store.source(name).layer(layer).dtype.name for name in task.sources)
        dtype = "+".join(dtypes)
        for head in heads:
            if head == "zero-shot":
                runs.append(Run(layer, head, request.settings, {"measure": request.measure}, fold, dtype))
                continue
            options: dict[str, Any] = {}
            if head in ("conv", "fc"):
                options = {"parallel": request.parallel}
            elif head == "similarity":
                options = {"rank": request.rank, "measure": request.measure, "l2": request.l2}
            frozen = [
                Run(layer, head, replace(request.settings, lr=lr, seed=seed), options, fold, dtype)
                for lr in dict.fromkeys(request.lr)
                for seed in dict.fromkeys(request.seeds)
            ]
            if request.precision == "auto":
                frozen = _at_fast_precision(request, store, task, frozen)
            for run in frozen:
                runs.append(run)
                if request.finetune_from:
                    runs.append(_finetuned(request, store, task, run))
    return runs


def _at_fast_precision(request: GridRequest, store: FeatureStore, task: Task, runs: Sequence[Run]) -> list[Run]:
    """``runs``, of one head, at the precision of those begun before, which may have been on another device; else at this one's.

    All have the same, so that their mean is over seeds and nothing else. A head without a bridge has float32.
    """
    if not _unloaded(store.source(task.sources[0]), runs[0], task).has_bridge:
        return [_at_precision(run, "fp32") for run in runs]
    fast = fast_precision(torch.device(request.settings.device))
    choices = [[_at_precision(run, name) for run in runs] for name in dict.fromkeys([fast, "fp32", "bf16"])]
    begun = (each for each in choices if any((request.out / run.name(task) / "config.json").exists() for run in each))
    return next(begun, choices[0])


def _at_precision(run: Run, precision: str) -> Run:
    return replace(run, settings=replace(run.settings, precision=precision))


def _finetuned(request: GridRequest, store: FeatureStore, task: Task, frozen: Run) -> Run:
    """The run that continues a frozen one."""
    start, lr = request.finetune_from, frozen.settings.lr
    backbone_lr = lr / 10 if request.backbone_lr is None else request.backbone_lr
    settings = replace(frozen.settings, finetune_from=start, backbone_lr=backbone_lr, augment=request.augment)
    layers = [store.source(name).layers.get(str(start)) for name in task.sources]
    dtypes = dict.fromkeys(layer.dtype.name if layer else "float32" for layer in layers)
    file = request.weights and Path(request.weights).expanduser()
    weights = str(file.resolve()) if file and file.exists() else request.weights  # workers may be in other folders
    return replace(frozen, settings=settings, start_dtype="+".join(dtypes), weights=weights, backbone=request.backbone)
