"""Runs carried out side by side: in this process, in several on this machine, or on a Dask cluster."""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from featurestore.errors import FeatureStoreError
from heads.grid import Grid
from heads.runs import OnEpoch, Run, train_run
from heads.tasks import Task
from heads.train import STOP, Epoch

_LARGE = 10_000_000  # parameters of a head that keeps all cores busy by itself


def default_jobs(grid: Grid) -> int:
    """One run at a time where a head is large, otherwise one for each core."""
    return 1 if max(grid.parameters.values(), default=0) > _LARGE else min(cores(), grid.runs)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_grid(
    task: Task,
    runs: list[Run],
    folder: Path,
    jobs: int = 1,
    scheduler: str = "processes",
    report: OnEpoch = lambda label, epoch: None,
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

    if not local:
        _require_scheduler(scheduler)
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
            raise _no_scheduler(scheduler, error) from None
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


def _require_scheduler(address: str) -> None:
    """FeatureStoreError at once if nobody answers there: Dask's own client retries until its timeout."""
    from distributed.comm.addressing import get_address_host_port

    try:
        with socket.create_connection(get_address_host_port(address), timeout=5):
            pass
    except (OSError, ValueError, TypeError) as error:
        raise _no_scheduler(address, error) from None


def _no_scheduler(address: str, error: Exception) -> FeatureStoreError:
    return FeatureStoreError(
        f"there is no Dask scheduler at {address!r}: {error}. Give `scheduler` threads, processes, or an address "
        "such as tcp://host:8786."
    )


def _attempt(task: Task, each: Run, folder: Path, report: OnEpoch, every: float) -> dict[str, Any] | FeatureStoreError:
    try:
        return train_run(task, each, folder, report, every)
    except FeatureStoreError as error:
        return error
    except (ValueError, RuntimeError, OSError) as error:  # one bad run does not end the grid
        return FeatureStoreError(f"{type(error).__name__}: {error}")


def _remote(task: Task, each: Run, folder: Path, every: float) -> dict[str, Any] | FeatureStoreError:
    """In a Dask worker: epochs are sent to the client."""
    from distributed import get_worker

    worker = get_worker()

    def report(label: str, epoch: Epoch) -> None:
        worker.log_event("epoch", {"label": label, "epoch": asdict(epoch)})

    return _attempt(task, each, folder, report, every)


def share_threads(runs: list[Run], jobs: int) -> list[Run]:
    """The machine's cores divided among ``jobs`` runs at a time."""
    threads = max(1, cores() // max(1, min(jobs, len(runs))))
    return [replace(each, settings=replace(each.settings, threads=threads)) for each in runs]
