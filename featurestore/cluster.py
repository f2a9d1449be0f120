"""A Dask cluster, one that runs or one of processes of this machine: reached within a time limit, its workers' code checked.

``in_order`` gives it calls a few at a time, so that the scheduler's memory does not grow with their number.
"""

import asyncio
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from threading import Lock, current_thread, main_thread
from typing import TYPE_CHECKING, Any, TypeVar

from featurestore.errors import FeatureStoreError

if TYPE_CHECKING:
    from distributed import Client, Worker

T = TypeVar("T")
# Calls a function with each of several tuples of arguments; the results come in the same order.
Calls = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]

_AHEAD = 2  # calls a worker has: one that runs, and the next one
_CODE = ("featurestore",)
_LIBRARIES = ("torch", "numpy")  # on whose versions last digits depend
_DIGITS = 12  # of a sha256 in a message
_NAMED = 3  # workers in a message


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connected(address: str, packages: Sequence[str] = _CODE) -> "Iterator[Client]":
    """A client of the Dask scheduler at ``address``, such as ``tcp://127.0.0.1:8786``, whose workers have our ``packages``.

    FeatureStoreError if nobody answers there within Dask's setting distributed.comm.timeouts.connect (30 s; set it by
    DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT=5s), and for workers with other code, which are named.
    """
    with ExitStack() as stack:
        quieten(stack)
        client = stack.enter_context(_answering(address))
        require_same_code(client, packages)
        yield client


@contextmanager
def _answering(address: str) -> "Iterator[Client]":
    """A client; FeatureStoreError if no scheduler answers."""
    # Half a second that commands which need no cluster need not wait for.
    import dask.config
    from dask.utils import parse_timedelta
    from distributed import Client

    limit = float(parse_timedelta(dask.config.get("distributed.comm.timeouts.connect", "30s")))
    try:
        if not address.startswith("inproc://"):
            with ThreadPoolExecutor(1) as thread:  # which runs no event loop, as a notebook's does
                thread.submit(asyncio.run, _greeted(address, limit)).result()
        client = Client(address, timeout=limit)
    except (OSError, ValueError, TypeError) as error:  # TimeoutError is an OSError
        reason = str(error) or f"no answer in {limit:g} s"
        raise FeatureStoreError(
            f"no Dask scheduler answers at {address}: {reason}. Start one (dask scheduler) and workers for it (dask worker "
            f"{address}), or check the address (`scheduler`), such as tcp://host:8786."
        ) from None
    with client:
        yield client


async def _greeted(address: str, limit: float) -> None:
    """TimeoutError unless a scheduler greets within ``limit`` seconds: Dask's client would wait for that for ever.

    OSError at once if nobody listens there, which Dask's client tries again until its limit.
    """
    from distributed.comm.addressing import get_address_host_port
    from distributed.comm.core import connect
    from distributed.security import Security

    socket.create_connection(get_address_host_port(address), timeout=limit).close()
    greeting = connect(address, timeout=limit, **Security().get_connection_args("client"))
    await (await asyncio.wait_for(greeting, limit)).close()


@contextmanager
def local_cluster(processes: int) -> "Iterator[Client]":
    """A client of a cluster of worker processes of this machine, on loopback, one task at a time in each."""
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        prepare_local(stack)
        with _ctrl_c_is_ours():
            cluster = LocalCluster(
                n_workers=processes,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=None,
                silence_logs=False,
            )
        yield stack.enter_context(Client(stack.enter_context(cluster)))


@contextmanager
def _ctrl_c_is_ours() -> Iterator[None]:
    """Processes that are started within ignore Ctrl-C, which a terminal sends to all: the command ends them in its own time."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def quieten(stack: ExitStack) -> None:
    """Dask's log lines below errors stay out of the output, of its workers all; ``stack`` undoes it.

    A worker's own errors come as its task's result; what it logs beside them is of the stopping, such as a heartbeat cut short.
    """
    import dask

    for handler in logging.getLogger("distributed").handlers:
        stack.callback(handler.setLevel, handler.level)
    log_from(logging.ERROR)
    # Workers read it from their environment, as they set up logging when they import distributed.
    stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ.DASK_LOGGING__DISTRIBUTED": "critical"}))


def prepare_local(stack: ExitStack) -> None:
    """``quieten``, and set up what worker processes of this machine are started with; ``stack`` undoes it."""
    import dask.config

    quieten(stack)
    # As Dask has it but for its setting of malloc, which would give back what a network frees and asks for again.
    single = {f"{name}_NUM_THREADS": 1 for name in ("OMP", "MKL", "OPENBLAS")}
    environment = {**single, "DASK_LOGGING__DISTRIBUTED": "critical"}
    stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": environment}))
    stack.callback(_restore, {name: os.environ.get(name) for name in environment})  # Dask sets them in this process too
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", category=UserWarning, module=r"distributed\b")  # such as of a port in use


def _restore(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def log_from(level: int) -> None:
    """Dask logs nothing below ``level`` in this process."""
    for handler in logging.getLogger("distributed").handlers:
        handler.setLevel(level)


def n_workers(client: "Client") -> int:
    """Workers that the scheduler has now."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _address(client: "Client") -> str:
    assert client.scheduler is not None
    return str(client.scheduler.address)


def described(client: "Client") -> str:
    """Workers, address and dashboard, for a plan."""
    workers = n_workers(client)
    some = f"{workers} worker{'s' if workers != 1 else ''}" if workers else "no workers yet"
    return f"{some} at {_address(client)}; dashboard: {client.dashboard_link}"


def code_here(packages: Sequence[str] = _CODE) -> dict[str, str]:
    """The sha256 of each package's Python sources and the versions of torch and NumPy, here; "" for what is missing."""
    return dict(_code_function(packages)())


def _code_function(packages: Sequence[str]) -> Callable[[], dict[str, str]]:
    """As a function within one: it is sent by value, and so runs on workers with another ``featurestore``, or none."""

    def code(packages: Sequence[str] = tuple(packages), libraries: Sequence[str] = _LIBRARIES) -> dict[str, str]:
        found = {}
        for package in packages:
            spec = importlib.util.find_spec(package)
            digest = hashlib.sha256()
            folders = list(spec.submodule_search_locations or []) if spec else []
            for folder in map(Path, folders):
                for path in sorted(folder.rglob("*.py")):
                    digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
            found[package] = digest.hexdigest() if folders else ""
        for library in libraries:
            try:
                found[library] = importlib.metadata.version(library)
            except importlib.metadata.PackageNotFoundError:
                found[library] = ""
        return found

    return code


def require_same_code(client: "Client", packages: Sequence[str] = _CODE) -> None:
    """FeatureStoreError if workers have other ``packages``, torch or NumPy than this process; they are named, with both."""
    answers = client.run(_code_function(packages), on_error="return")  # what is no dict is of a worker that just left
    found = {address: answer for address, answer in answers.items() if isinstance(answer, dict)}
    refuse_other_code(found, code_here(packages))


def refuse_other_code(found: Mapping[str, Mapping[str, str]], ours: Mapping[str, str]) -> None:
    """FeatureStoreError if what ``code_here`` gave on workers, by address, is not ``ours``, the command's."""
    others = []
    for address, theirs in found.items():
        differ = [
            f"{name} {theirs.get(name, '')[:_DIGITS] or 'not installed'}, here {value[:_DIGITS]}"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if differ:
            others.append(f"the worker at {address} has {'; '.join(differ)}")
    if others:
        more = f", and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise FeatureStoreError(
            f"workers have other code: {', '.join(others[:_NAMED])}{more}. What they compute could differ: start them from the "
            "same installation (of a package, the sha256 of its sources is compared)."
        )


_one_at_a_time = Lock()


@contextmanager
def whole_worker(threads: int | None = None) -> "Iterator[Worker]":
    """Within a task: the worker, which does this task alone, with ``threads`` of torch (None: as many as Dask calls its own)."""
    import torch
    from distributed import get_worker

    worker = get_worker()
    with _one_at_a_time:
        torch.set_num_threads(threads or worker.state.nthreads)  # of this thread, which need not be the last task's
        yield worker


def in_order(
    client: "Client", function: Callable[..., T], calls: Iterable[tuple[Any, ...]]
) -> Generator[T, None, None]:
    """The results of ``function`` with each of ``calls`` as arguments, in their order; a worker has few of them at a time.

    A call whose worker died is made again by another one. What a call raises is raised; FeatureStoreError if the scheduler is
    gone, or workers died of one call again and again.
    """
    from distributed import KilledWorker, as_completed

    address = _address(client)
    numbered = enumerate(calls)
    running: dict[Any, int] = {}
    results: dict[int, T] = {}
    due = 0
    ended = as_completed()
    try:
        while True:
            for number, call in islice(numbered, max(0, _room(client, address) - len(running))):
                future = client.submit(function, *call, pure=False)
                running[future] = number
                ended.add(future)
            if not running:
                return
            future = next(ended)
            number = running.pop(future)
            try:
                results[number] = future.result()
            except CancelledError:
                raise _gone(address) from None
            except KilledWorker as error:
                raise FeatureStoreError(
                    f"workers died of the same task {error.allowed_failures + 1} times, which the system does to a process when "
                    "memory is short. Give each worker more of it, then run the same command again."
                ) from None
            future.release()
            while due in results:
                yield results.pop(due)
                due += 1
    finally:
        if client.status == "running":
            client.cancel(list(running))


def _room(client: "Client", address: str) -> int:
    """Calls that may run or wait at once; FeatureStoreError if the scheduler does not answer."""
    try:
        if client.status == "running":
            return _AHEAD * max(1, n_workers(client))
    except (OSError, ValueError, RuntimeError, KeyError):  # what Dask raises, or does not give, depends on when it died
        raise _gone(address) from None
    raise _gone(address)


def _gone(address: str) -> FeatureStoreError:
    return FeatureStoreError(
        f"the Dask scheduler at {address} is gone: it was stopped, or the connection is lost. What was done so far is kept; "
        "start it and its workers again, then run the same command again."
    )
