"""Runs carried out side by side: in this process, in several on this machine, or on a Dask cluster."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from featurestore.cluster import connected, cores, log_from, prepare_local
from featurestore.errors import FeatureStoreError
from featurestore.memory import give_back_memory, keep_freed_memory
from heads.grid import Grid
from heads.runs import OnEpoch, Run, train_run
from heads.tasks import Task
from heads.train import STOP, Epoch, Pace, Preparation, Progress

_LARGE = 10_000_000  # parameters of a head that keeps all cores busy by itself


def default_jobs(grid: Grid) -> int:
    """One run at a time where a head is large, otherwise one for each core."""
    return 1 if max(grid.parameters.values(), default=0) > _LARGE else min(cores(), grid.runs)


def run_grid(
    parts: Sequence[tuple[Task, Sequence[Run]]],
    folder: Path,
    jobs: int = 1,
    scheduler: str = "processes",
    report: OnEpoch = lambda label, epoch: None,
    done: Callable[[Run, dict[str, Any] | FeatureStoreError], None] = lambda run, result: None,
    died: Callable[[Run], None] = lambda run: None,
    every: float = 60.0,
) -> None:
    """Do all runs of all tasks; ``done`` is told each one's result, or the error that ended it, while the others go on.

    ``died`` is told of a run whose worker process died; Dask tries it four times at most.

    With one job and no cluster they run one after the other in this process. ``scheduler`` is ``threads`` (fine-tuning cannot
    be done in them) or ``processes`` of this machine, or the address of a Dask cluster whose workers see the same files.
    """
    folder = folder.resolve()
    for task, _ in parts:
        task.save_description(folder)
    local = scheduler in ("threads", "processes")
    if local and min(jobs, sum(len(runs) for _, runs in parts)) <= 1:
        for task, runs in parts:
            for each in runs:
                done(each, _attempt(task, each, folder, report, every))
        return
    if scheduler == "threads" and any(each.settings.finetune_from for _, runs in parts for each in runs):
        raise _needs_processes("Choose `scheduler` processes, or one run at a time (`jobs` 1).")
    # Half a second that a single run need not wait for.
    from distributed import Client, KilledWorker, LocalCluster, as_completed

    with ExitStack() as stack:
        if local:
            prepare_local(stack)
            processes = scheduler == "processes"
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=jobs if processes else 1,
                    threads_per_worker=1 if processes else jobs,
                    processes=processes,
                    dashboard_address=None,
                    memory_limit=None,
                    silence_logs=False,
                )
            )
            client = stack.enter_context(Client(cluster))
        else:
            client = stack.enter_context(connected(scheduler, ("featurestore", "heads")))
        client.subscribe_topic("epoch", lambda event: report(event[1]["label"], _received(event[1])))
        waiting: dict[Any, Run] = {}
        for task, runs in parts:
            shared = client.scatter(task, broadcast=True)
            begun: dict[str, Any] = {}
            for each in runs:
                before = begun.get(each.frozen.name(task)) if each.settings.finetune_from else None
                future = client.submit(_remote, shared, each, folder, every, before, scheduler != "threads", pure=False)
                begun[each.name(task)] = future
                waiting[future] = each
        by_key = {future.key: each for future, each in waiting.items()}

        def seen(event: tuple[float, dict[str, Any]]) -> None:
            if event[1].get("action") == "remove-worker" and not event[1].get("expected"):
                for key in by_key.keys() & set(event[1].get("processing-tasks", ())):
                    died(by_key[key])

        client.subscribe_topic("all", seen)
        stack.callback(client.unsubscribe_topic, "all")  # or the scheduler would tell the client of its own leaving
        stack.callback(STOP.clear)
        try:
            for future in as_completed(waiting):
                try:
                    result = future.result()
                except KilledWorker:
                    result = FeatureStoreError(
                        "its worker process died each time it was tried, which the system does to a process when memory is "
                        "short. Train fewer at a time (`jobs`), then run the same command again: it goes on where it was saved."
                    )
                except Exception as error:  # the message is all there is
                    result = FeatureStoreError(f"the worker failed: {type(error).__name__}: {error}")
                done(waiting[future], result)
        except KeyboardInterrupt:
            STOP.set()
            log_from(logging.CRITICAL + 1)  # all that Dask still says is of the stopping
            client.cancel(list(waiting))
            raise


def _needs_processes(advice: str) -> FeatureStoreError:
    """While torch.fx traces a network, no other thread of the process can run one."""
    return FeatureStoreError(
        f"fine-tuned runs cannot be trained in threads side by side, since networks are divided by tracing them. {advice}"
    )


_KINDS = {kind.__name__: kind for kind in (Epoch, Pace, Preparation)}


def _received(event: dict[str, Any]) -> Progress:
    """What ``_remote`` sent."""
    line: Progress = _KINDS[event["kind"]](**event["line"])
    return line


def _attempt(task: Task, each: Run, folder: Path, report: OnEpoch, every: float) -> dict[str, Any] | FeatureStoreError:
    try:
        return train_run(task, each, folder, report, every)
    except FeatureStoreError as error:
        return error
    except (ValueError, RuntimeError, OSError) as error:  # one bad run does not end the grid
        return FeatureStoreError(f"{type(error).__name__}: {error}")


def _remote(
    task: Task, each: Run, folder: Path, every: float, before: object = None, own_process: bool = True
) -> dict[str, Any] | FeatureStoreError:
    """In a Dask worker: epochs and the pace are sent to the client. It waits for ``before``, another's result.

    ``own_process``: the worker's process is not the client's, so that its memory is its own to keep.
    """
    from distributed import get_worker

    worker = get_worker()
    if each.settings.finetune_from and worker.state.nthreads > 1:
        return _needs_processes("Start the cluster's workers with one thread each.")

    def report(label: str, line: Progress) -> None:
        worker.log_event("epoch", {"label": label, "kind": type(line).__name__, "line": asdict(line)})

    if own_process and each.settings.device == "cpu":
        keep_freed_memory()
    try:
        return _attempt(task, each, folder, report, every)
    finally:
        give_back_memory()


def share_threads(parts: Sequence[tuple[Task, Sequence[Run]]], jobs: int) -> list[tuple[Task, list[Run]]]:
    """The machine's cores divided among ``jobs`` runs at a time."""
    total = sum(len(runs) for _, runs in parts)
    threads = max(1, cores() // max(1, min(jobs, total)))
    return [
        (task, [replace(each, settings=replace(each.settings, threads=threads)) for each in runs])
        for task, runs in parts
    ]
