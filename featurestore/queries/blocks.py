"""How much of a layer is held at once: the size of blocks under a memory cap, and Dask tasks that add up."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import dask.base
import dask.config
from dask.delayed import Delayed, delayed
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from threadpoolctl import ThreadpoolController

from featurestore.cluster import connected, described
from featurestore.errors import FeatureStoreError
from featurestore.memory import give_back_memory
from featurestore.text import human_bytes

MEMORY = "1GiB"  # that a query may add to what the process holds, if no cap is given
_MOST_ROWS = 2048  # of a block: larger ones make products hardly faster
_FEWEST_BLOCKS = 4  # for each worker, so that they end at about the same time
_FEWEST_ROWS = 256  # unless the cap asks for less
_OVERHEAD = 48 << 20  # bytes of a query beside its blocks: Dask's graph, buffers of BLAS and of the result's file
_PROCESS = 350 << 20  # bytes of a worker process that does nothing yet: torch, NumPy, Dask
_FAN_IN = 8
_TRIMMED_SHARE = 0.5  # of what tasks need at their fullest
_trimmed_from: float = (
    3 << 28
)  # bytes of the process: what the tasks of the last query need; a cluster's workers are not told
_ONE_AT_A_TIME = ("sync", "synchronous", "single-threaded")
LOCAL_SCHEDULERS = ("threads", "processes", "synchronous")


def block_rows(n: int, memory: str | int, per_row: float, per_pair: float = 0.0, fixed: float = 0.0) -> int:
    """Rows to a block, so that a query adds no more than ``memory`` bytes (text such as ``"1GiB"``) to what the process holds.

    A task holds ``per_row`` bytes for each row of its blocks, ``per_pair`` for each pair of two blocks' rows, and ``fixed``
    beside; there are as many tasks at once as the scheduler has workers. Anonymous memory counts (what is not a mapped file);
    workers that are processes count whole. FeatureStoreError if one row is too much, with what would fit.
    """
    global _trimmed_from
    n_workers, processes = workers()
    own, cap = anonymous_bytes(), parsed_bytes(memory)
    taken = n_workers * (_PROCESS + _OVERHEAD) if processes else _OVERHEAD
    room = (cap - taken) / n_workers - fixed
    if room < per_row + per_pair:
        least = taken + n_workers * (per_row + per_pair + fixed)
        raise FeatureStoreError(
            f"`memory` {human_bytes(cap)} is too little: a block of one row in each of {n_workers} workers, and what they need "
            f"beside, take {human_bytes(least)}. Give at least {human_bytes(1.1 * least)}, or ask for smaller layers."
        )
    k = room / per_row if not per_pair else (math.sqrt(per_row**2 + 4 * per_pair * room) - per_row) / (2 * per_pair)
    blocks = n_workers if per_pair else _FEWEST_BLOCKS * n_workers  # pairs of blocks are more than blocks
    spread = max(_FEWEST_ROWS, math.ceil(n / blocks))
    rows = max(1, min(int(k), _MOST_ROWS, spread, n))
    _trimmed_from = own + _TRIMMED_SHARE * n_workers * (per_row * rows + per_pair * rows**2 + fixed)
    return rows


def beside_this_program(memory: str | int) -> int:
    """What is left of a cap on the whole process; FeatureStoreError if that is nothing."""
    left = parsed_bytes(memory) - anonymous_bytes()
    if left <= 0:
        raise FeatureStoreError(
            f"`memory` {human_bytes(parsed_bytes(memory))} is too little: the program alone takes "
            f"{human_bytes(anonymous_bytes())}. Give at least {human_bytes(anonymous_bytes() + 2 * _OVERHEAD)}."
        )
    return left


def parsed_bytes(memory: str | int) -> int:
    """``"1GiB"`` as a number of bytes; FeatureStoreError if it is none."""
    try:
        return int(parse_bytes(memory))
    except ValueError:
        raise FeatureStoreError(f"`memory` {memory!r} is no number of bytes, such as 1GiB or 500MB.") from None


def workers() -> tuple[int, bool]:
    """Tasks that run at once under one cap, and whether each is a process of its own."""
    scheduler = dask.config.get("scheduler", None)
    if scheduler in ("dask.distributed", "distributed"):  # the cap is for each of the cluster's workers
        from distributed import default_client

        cluster = default_client().scheduler_info(n_workers=-1)["workers"].values()
        return max((worker["nthreads"] for worker in cluster), default=1), False
    if scheduler in _ONE_AT_A_TIME:
        return 1, False
    n = dask.config.get("num_workers", None) or CPU_COUNT
    return int(n), scheduler in ("processes", "multiprocessing")


def anonymous_bytes() -> int:
    """Anonymous memory of this process; a guess where the system does not say."""
    if sys.platform == "linux":
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
    return 400 << 20


@contextmanager
def scheduler(name: str | None) -> Iterator[str]:
    """Queries within run in ``threads``, ``processes``, one after the other (``synchronous``), or on the cluster of an address.

    None leaves what is set. Gives a line about it, empty for this machine. FeatureStoreError for another name, and for a
    cluster that does not answer.
    """
    if name is None or name in LOCAL_SCHEDULERS:
        with dask.config.set({"scheduler": name} if name else {}):
            yield ""
        return
    if "://" not in name:
        raise FeatureStoreError(
            f"`scheduler` {name!r} is neither an address, such as tcp://127.0.0.1:8786, nor one of {', '.join(LOCAL_SCHEDULERS)}."
        )
    with connected(name) as client:
        yield described(client)


class _BlasThreads:
    """While any task is within, matrix products take one thread: the scheduler already runs a task on every core."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1 and dask.config.get("scheduler", None) not in _ONE_AT_A_TIME:
                self._limit = _blas().limit(limits=1, user_api="blas")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0 and self._limit is not None:
                self._limit.restore_original_limits()
                self._limit = None


_blas_threads = _BlasThreads()


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def task(function: Callable[..., Any], *arguments: Any) -> Delayed:
    """A call that Dask will make."""
    made: Delayed = delayed(run_task, pure=False)(function, *arguments)
    return made


def run_task(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` as one of many tasks: its matrix products do not compete with the others' for the cores."""
    with _blas_threads:
        try:
            return function(*arguments)
        finally:
            _give_back()


def _give_back() -> None:
    """Return freed memory to the system once there is more than tasks need: glibc keeps it, for each thread apart."""
    if anonymous_bytes() > _trimmed_from:
        give_back_memory()


def computed(tasks: Sequence[Delayed]) -> list[Any]:
    """The results of all tasks, by the scheduler that is set."""
    return list(dask.base.compute(*tasks))


def added_up(tasks: Sequence[Delayed], add: Callable[[Sequence[Any]], Any]) -> Any:
    """``add`` of all results, a few at a time, so that not all of them are held at once."""
    while len(tasks) > 1:
        tasks = [task(add, list(tasks[i : i + _FAN_IN])) for i in range(0, len(tasks), _FAN_IN)]
    return computed(tasks)[0]
