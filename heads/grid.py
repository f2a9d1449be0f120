"""Grids: every layer with every head, learning rate and seed, in this process or through Dask; and the table of runs."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.text import human_bytes
from heads.models.triplet import BUILDERS, build_head
from heads.runs import (
    Report,
    Run,
    Task,
    identity_items,
    identity_task,
    items_hash,
    read_result,
    train_run,
    triplet_task,
    write_csv,
)
from heads.scores import paired_test
from heads.splits import FRACTIONS, Split, draw_split, split_trials
from heads.train import STOP, Epoch, Settings
from heads.trials.matching import Sessions, Trials, load_trials, match, same_person_trials

SAME_PERSON = "same-person"


@dataclass(frozen=True)
class Request:
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
    pull: float = 1e-2
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
                "some space, or train fewer at a time (--jobs) or on another disk (--out)."
            )


LARGE = 10_000_000  # parameters of a head that keeps all cores busy by itself


def default_jobs(grid: Grid) -> int:
    """One run at a time where a head is large, otherwise one for each core."""
    return 1 if max(grid.parameters.values(), default=0) > LARGE else min(cores(), grid.runs)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(request: Request) -> Grid:
    """Read and match trials, draw splits, and lay out the runs; nothing is trained or written.

    Triplet heads get a zero-shot run for each layer beside them. FeatureStoreError for whatever cannot be done.
    """
    for name in request.heads:
        if name not in BUILDERS:
            build_head(name, (1,))  # says which there are
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


def _layers(request: Request, store: FeatureStore) -> list[str]:
    source = store.source(request.source) if request.source or len(store.sources) == 1 else None
    if source is None and request.sessions and request.sessions.sources:
        source = store.source(next(iter(request.sessions.sources.values())))
    source = source or store.source(request.source)
    return [source.layer(name).name for name in dict.fromkeys(request.layers)] or list(source.layers)


def _triplets(request: Request, store: FeatureStore) -> tuple[Task, tuple[int, int]]:
    if request.trials is None:
        raise FeatureStoreError(
            "triplet heads learn from trials: give --trials FILE, or --trials same-person to make them from the keys."
        )
    trials: Trials
    if request.trials == SAME_PERSON:
        if request.view or (request.sessions and (request.sessions.views or request.sessions.sources)):
            raise FeatureStoreError(
                "same-person trials have no sessions, and show all views; restrict them with --where."
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


def _identities(request: Request, store: FeatureStore) -> Task:
    source = store.source(request.source)
    items = identity_items(source, request.where)
    of = items_hash(source, items)
    if request.split and request.split.endswith(".json"):
        split = Split.load(Path(request.split), of, len(items))
    elif request.split not in (None, "view"):
        raise FeatureStoreError(
            f"the multi-view head (identity) cannot be tested by --split {request.split}: it learns each face from some views "
            "and is tested on others, --split view."
        )
    else:
        views = source.keys[items].get_level_values(1).to_numpy(str)[:, None]
        split = draw_split(views, "view", request.split_seed, request.fractions, of, request.hold_out)
    return identity_task(store, source, items, split)


def _runs(request: Request, layers: Sequence[str], heads: Sequence[str]) -> list[Run]:
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
                options = {"rank": request.rank, "measure": request.measure, "pull": request.pull}
            for lr in dict.fromkeys(request.lr):
                for seed in dict.fromkeys(request.seeds):
                    runs.append(Run(layer, head, replace(request.settings, lr=lr, seed=seed), options))
    return runs


def run_grid(
    task: Task,
    runs: list[Run],
    folder: Path,
    jobs: int = 1,
    scheduler: str = "processes",
    report: Report = lambda label, epoch: None,
    done: Callable[[Run, dict[str, Any] | FeatureStoreError], None] = lambda run, result: None,
    connect: str = "20s",
    every: float = 60.0,
) -> None:
    """Do all ``runs``; ``done`` is told each one's result, or the error that ended it, while the others go on.

    With one job and no cluster they run one after the other in this process. ``scheduler`` is ``threads`` or
    ``processes`` of this machine, or the address of a Dask cluster whose workers see the same files.
    """
    folder = folder.resolve()
    task.split.save(folder / "splits")
    local = scheduler in ("threads", "processes")
    if local and min(jobs, len(runs)) <= 1:
        for each in runs:
            done(each, _attempt(task, each, folder, report, every))
        return
    from distributed import Client, LocalCluster, as_completed  # half a second that a single run need not wait for

    with ExitStack() as stack:
        address: Any = scheduler
        if local:
            processes = scheduler == "processes"
            address = stack.enter_context(
                LocalCluster(
                    n_workers=jobs if processes else 1,
                    threads_per_worker=1 if processes else jobs,
                    processes=processes,
                    dashboard_address=None,
                    memory_limit=None,
                )
            )
        try:
            client = stack.enter_context(Client(address, timeout=connect))
        except (OSError, ValueError, TimeoutError) as error:
            raise FeatureStoreError(
                f"there is no Dask scheduler at {scheduler!r}: {error}. Give --scheduler threads, processes, or an address "
                "such as tcp://host:8786."
            ) from None
        client.subscribe_topic("epoch", lambda event: report(event[1]["label"], Epoch(**event[1]["epoch"])))
        shared = client.scatter(task, broadcast=True)
        waiting = {client.submit(_remote, shared, each, folder, every, pure=False): each for each in runs}
        stack.callback(STOP.clear)
        try:
            for future in as_completed(waiting):
                try:
                    result = future.result()
                except Exception as error:  # a worker that died: the message is all there is
                    result = FeatureStoreError(f"the worker failed: {type(error).__name__}: {error}")
                done(waiting[future], result)
        except KeyboardInterrupt:
            STOP.set()
            client.cancel(list(waiting))
            raise


def _attempt(task: Task, each: Run, folder: Path, report: Report, every: float) -> dict[str, Any] | FeatureStoreError:
    try:
        return train_run(task, each, folder, report, every)
    except FeatureStoreError as error:
        return error
    except (ValueError, RuntimeError, OSError) as error:  # one bad run does not end the grid
        return FeatureStoreError(f"{type(error).__name__}: {error}")


def _remote(task: Task, each: Run, folder: Path, every: float) -> dict[str, Any] | FeatureStoreError:
    """In a Dask worker: epochs are sent to whoever waits."""
    from distributed import get_worker

    worker = get_worker()

    def report(label: str, epoch: Epoch) -> None:
        worker.log_event("epoch", {"label": label, "epoch": asdict(epoch)})

    return _attempt(task, each, folder, report, every)


def share_threads(runs: list[Run], jobs: int) -> list[Run]:
    """The machine's cores divided among ``jobs`` runs at a time."""
    threads = max(1, cores() // max(1, min(jobs, len(runs))))
    return [replace(each, settings=replace(each.settings, threads=threads)) for each in runs]


def runs_table(folder: Path) -> pd.DataFrame:
    """All finished runs under ``folder``, the best first: scores, settings, time, and a paired test against zero-shot."""
    rows, right = [], {}
    for path in sorted(folder.glob("*/result.json")):
        try:
            config = json.loads((path.parent / "config.json").read_text("utf-8"))
            correct = pd.read_csv(path.parent / "predictions.csv", usecols=["correct"])["correct"].to_numpy(bool)
            flat = {name: config[name] for name in ("layer", "head", "split", "split_name", "trials", "photographs")}
            flat |= {"sources": " ".join(config["sources"]), **config["settings"], **config["options"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run of ours, or one that is being written
        result = read_result(path.parent)
        if result is not None:
            rows.append({**result, **flat})
            right[result["name"]] = correct
    table = pd.DataFrame(rows)
    if table.empty:
        return table

    def same(row: dict[str, Any]) -> tuple:
        return *(row[name] for name in ("layer", "split", "sources", "photographs")), row.get("measure", "cosine")

    baseline = {same(row): row["name"] for row in rows if row["head"] == "zero-shot"}
    table["p_zero_shot"] = [
        np.nan
        if row["head"] == "zero-shot" or same(row) not in baseline
        else paired_test(right[row["name"]], right[baseline[same(row)]]).p
        for row in rows
    ]
    front = [
        "name",
        "layer",
        "head",
        "accuracy",
        "low",
        "high",
        "n_test",
        "chance",
        "ceiling",
        "normalised",
        "p_zero_shot",
    ]
    table = table[[*front, *(name for name in table if name not in front)]]
    return table.sort_values(["accuracy", "name"], ascending=[False, True], ignore_index=True)


def write_runs_table(folder: Path) -> pd.DataFrame:
    """Make ``runs.csv`` from the folders; returns it."""
    table = runs_table(folder)
    write_csv(folder / "runs.csv", table)
    return table
