"""Grids: every layer with every head, learning rate and seed, and what they cost."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.text import human_bytes
from heads.registry import build_head, check_head
from heads.run_files import read_result
from heads.runs import Run
from heads.splits import FRACTIONS, Split, draw_split, split_trials
from heads.tasks import Task, identity_items, identity_task, items_hash, triplet_task
from heads.train import Settings
from heads.trials.matching import Sessions, Trials, load_trials, match
from heads.trials.same_person import same_person_trials

SAME_PERSON = "same-person"


@dataclass(frozen=True)
class GridRequest:
    """What the user asked for. ``trials`` is a file, ``same-person``, or None if only identities are learned.

    ``split`` is a kind, a saved split's path, or None: by trial for triplets, by view for identities.
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
    lr: Sequence[float] = (5e-4,)
    seeds: Sequence[int] = (0,)
    parallel: bool = False
    rank: int | None = 64
    measure: str = "cosine"
    l2: float = 1e-2
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Grid:
    """What will be done, as a value: tasks with their runs, and what they cost. ``finished`` runs will only be read."""

    out: Path
    parts: list[tuple[Task, list[Run]]]
    parameters: dict[str, int]
    finished: int
    unanswered: int = 0
    excluded: int = 0

    @property
    def runs(self) -> int:
        """All of them."""
        return sum(len(runs) for _, runs in self.parts)

    def memory(self, jobs: int) -> int:
        """Bytes of weights, gradients, two moments and the best weights, of the ``jobs`` largest heads at a time."""
        return 5 * 4 * sum(sorted(self._weights)[-jobs:])

    def disk(self, jobs: int) -> int:
        """Bytes of all runs' weights, and of the states of ``jobs`` unfinished ones."""
        return 4 * (sum(self._weights) + 4 * sum(sorted(self._weights)[-jobs:]))

    @property
    def _weights(self) -> list[int]:
        return [self.parameters[f"{run.layer} {run.head}"] for _, runs in self.parts for run in runs]

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
    parts, left_out = [], (0, 0)
    triplet_heads = [head for head in dict.fromkeys(request.heads) if head != "identity"]
    if triplet_heads:
        task, left_out = _triplets(request, store)
        heads = ["zero-shot", *(head for head in triplet_heads if head != "zero-shot")]
        parts.append((task, _runs(request, layers, heads)))
    if "identity" in request.heads:
        parts.append((_identities(request, store), _runs(request, layers, ["identity"])))
    parameters, finished = {}, 0
    for task, runs in parts:
        source = store.source(task.sources[0])
        for each in runs:
            faces = {"faces": list(task.classes)} if each.head == "identity" else {}
            head = build_head(each.head, source.layer(each.layer).shape, **each.options, **faces)
            parameters[f"{each.layer} {each.head}"] = sum(weight.numel() for weight in head.parameters())
            finished += read_result(request.out / each.name(task)) is not None
    return Grid(request.out, parts, parameters, finished, *left_out)


def _layers(request: GridRequest, store: FeatureStore) -> list[str]:
    source = store.source(request.source) if request.source or len(store.sources) == 1 else None
    if source is None and request.sessions and request.sessions.sources:
        source = store.source(next(iter(request.sessions.sources.values())))
    source = source or store.source(request.source)
    return [source.layer(name).name for name in dict.fromkeys(request.layers)] or list(source.layers)


def _triplets(request: GridRequest, store: FeatureStore) -> tuple[Task, tuple[int, int]]:
    if request.trials is None:
        raise FeatureStoreError(
            "triplet heads learn from trials: give `trials` FILE, or `trials` same-person to make them from the keys."
        )
    trials: Trials
    if request.trials == SAME_PERSON:
        if request.view or (request.sessions and (request.sessions.views or request.sessions.sources)):
            raise FeatureStoreError(
                "same-person trials have no sessions, and show all views; restrict them with `where`."
            )
        source = store.source(request.source)
        items = identity_items(source, request.where)
        trials = match(same_person_trials(source, request.n_trials, request.split_seed, items), store, request.source)
    else:
        trials = load_trials(Path(request.trials), store, request.source, request.view, request.sessions, request.where)
    if request.split and request.split.endswith(".json"):
        split = Split.load(Path(request.split), trials.hash, len(trials))
    else:
        kind = request.split or "trial"
        split = split_trials(trials, kind, request.split_seed, request.fractions, request.hold_out)
    return triplet_task(store, trials, split), (trials.unanswered, trials.excluded)


def _identities(request: GridRequest, store: FeatureStore) -> Task:
    source = store.source(request.source)
    items = identity_items(source, request.where)
    of = items_hash(source, items)
    if request.split and request.split.endswith(".json"):
        split = Split.load(Path(request.split), of, len(items))
    elif request.split not in (None, "view"):
        raise FeatureStoreError(
            f"the multi-view head (identity) cannot be tested by `split` {request.split}: it learns each face from some views "
            "and is tested on others, `split` view."
        )
    else:
        views = source.keys[items].get_level_values(1).to_numpy(str)[:, None]
        split = draw_split(views, "view", request.split_seed, request.fractions, of, request.hold_out)
    return identity_task(store, source, items, split)


def _runs(request: GridRequest, layers: Sequence[str], heads: Sequence[str]) -> list[Run]:
    runs = []
    for layer in layers:
        for head in heads:
            if head == "zero-shot":
                runs.append(Run(layer, head, request.settings, {"measure": request.measure}))
                continue
            options: dict[str, Any] = {}
            if head in ("conv", "fc"):
                options = {"parallel": request.parallel}
            elif head == "similarity":
                options = {"rank": request.rank, "measure": request.measure, "l2": request.l2}
            for lr in dict.fromkeys(request.lr):
                for seed in dict.fromkeys(request.seeds):
                    runs.append(Run(layer, head, replace(request.settings, lr=lr, seed=seed), options))
    return runs
