"""The pass in many processes: a task for each shard, the rows written by workers, registered by the one that holds the lock.

A worker writes a shard's files under names of its own in the store's folder, which it shares with the command, and returns their
checksums; the command puts them in their places in the order of rows. So a task that runs twice, because its worker died, harms
nothing, and a worker that outlives its command changes nothing: it sees between batches that the mark of the run is gone.
"""

import os
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featurestore.caching.extractor import Loaded, load
from featurestore.caching.job import CachingJob, CachingRequest, prepare_job
from featurestore.caching.plan import CountPhotographs
from featurestore.caching.shard_sink import Registration, ShardFiles, ShardPart, Written
from featurestore.caching.stream import decoding_threads, stream
from featurestore.checkpoints.packaged import PACKAGED
from featurestore.checkpoints.weights import BUILT
from featurestore.cluster import code_here, in_order, refuse_other_code, whole_worker
from featurestore.devices import PRECISIONS, reproducible
from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL
from featurestore.memory import keep_freed_memory
from featurestore.networks.registry import RECIPES
from featurestore.photos.files import anywhere
from featurestore.photos.loading import Batch, Failure, Photo, failures
from featurestore.remote.mirror import mirror_of

if TYPE_CHECKING:
    from distributed import Client
    from filelock import FileLock

_CHECKED_AT_ONCE = 256  # photographs
_ID = 12  # hex digits that tell a run, or an attempt at a task, from others
_TOLD_EVERY = 0.5  # seconds between a worker's messages of how far it is


def refuse_url(store: Path) -> None:
    """FeatureStoreError for a store that is not in a folder: workers write there."""
    mirror = mirror_of(store)
    if mirror is not None:
        raise FeatureStoreError(
            f"workers write into a folder that they share, not to {mirror.url}. Give `store` a folder and copy the store there: "
            f"pipelines/copy_store.py FOLDER {mirror.url}. Or leave out `processes` and `scheduler`."
        )


@dataclass(frozen=True)
class _Order:
    """What all tasks of a stage share. ``mark`` is a file that is there while the run goes on; ``threads`` None: Dask's."""

    request: CachingRequest
    identity: Mapping[str, Any]
    code: Mapping[str, str]
    mark: Path
    threads: int | None

    @property
    def attempt(self) -> str:
        """What begins the temporary names of this run's files."""
        return self.mark.name.removesuffix(PARTIAL)


@dataclass(frozen=True)
class _Task:
    """One shard: what each layer gets, ``end`` as of ShardWriter, and its photographs, whose rows are known; ``skip`` as of
    ``batches``.
    """

    shard: int
    parts: dict[str, ShardPart]
    end: int
    photos: list[Photo]
    skip: bool


@dataclass(frozen=True)
class _Done:
    """What became of a task: rows of photographs that gave no pixels and why, the error that ended it, seconds of loading."""

    written: Written | None
    failures: list[tuple[int, str]]
    error: FeatureStoreError | OSError | None
    loading: float


class ClusterPass:
    """Carries out the stages of a pass on the workers of ``client``; see ``run.Elsewhere``.

    Each worker computes one shard at a time, with ``threads`` of torch on a CPU (None: as many as Dask gives it), or on a GPU of
    its own. Rows are those of one process with as many threads, bit for bit.
    """

    def __init__(self, client: "Client", threads: int | None = None) -> None:
        self._client = client
        self._threads = threads
        self._run = f"run-{uuid.uuid4().hex[:_ID]}"

    def __call__(
        self,
        job: CachingJob,
        registration: Registration,
        photos: list[Photo],
        failed: Callable[[Failure], None],
        progress: CountPhotographs,
    ) -> float:
        """Compute ``photos`` and register them. Returns seconds that a worker took to load the network."""
        folder = next(iter(registration.layers.values())).folder.parent.resolve()
        mark = folder / f"{self._run}{PARTIAL}"
        order = _Order(_portable(job, list(registration.layers)), job.identity, code_here(), mark, self._threads)
        appending = any(photo.row is None for photo in photos)
        mark.touch()
        counted = _Counted(progress)
        self._client.subscribe_topic(order.attempt, counted.told)
        waiting: deque[_Task] = deque()  # in the order of rows, begun and not registered
        try:
            if appending and job.request.on_error == "skip":  # which rows there are depends on which can be read
                photos = self._readable(order, photos, failed)
            return self._carry_out(
                order, registration, _numbered(photos, registration.registered), waiting, failed, counted
            )
        finally:
            mark.unlink(missing_ok=True)
            for task in waiting:
                _remove_files(order, task)
            with suppress(OSError, ValueError, RuntimeError):  # the scheduler may be gone
                self._client.unsubscribe_topic(order.attempt)
            registration.publish()

    def _carry_out(
        self,
        order: _Order,
        registration: Registration,
        photos: list[Photo],
        waiting: "deque[_Task]",
        failed: Callable[[Failure], None],
        counted: "_Counted",
    ) -> float:
        loading = 0.0
        # Where items are appended, photographs that cannot be read were left out, or end the run.
        skip = order.request.on_error == "skip" and bool(photos) and _row(photos[0]) < registration.registered

        def calls() -> Iterator[tuple[_Order, _Task]]:
            for shard, group in groupby(photos, lambda photo: _row(photo) // registration.slots):
                parts = {
                    name: replace(part, layer=replace(part.layer, folder=part.layer.folder.resolve()))
                    for name, part in registration.parts(shard).items()
                }
                task = _Task(shard, parts, registration.end(shard), list(group), skip)
                waiting.append(task)
                yield order, replace(task, photos=_found_anywhere(task.photos))

        with closing(in_order(self._client, _compute_shard, calls())) as results:
            for done in results:
                task = waiting[0]
                if done.written:
                    registration.put(done.written)
                _remove_files(order, waiting.popleft())  # of a worker that died
                counted.ended(task.shard, len(task.photos))
                by_row = {photo.row: photo for photo in task.photos}
                for row, reason in done.failures:
                    if order.request.on_error == "skip" and not skip:
                        raise FeatureStoreError(
                            f"{by_row[row]}: {reason}, although it could be read a short time ago. What was computed so far is "
                            "kept; run the same command again."
                        )
                    failed(Failure(by_row[row], reason))
                if done.error:
                    raise done.error
                loading = max(loading, done.loading)
        return loading

    def _readable(self, order: _Order, photos: list[Photo], failed: Callable[[Failure], None]) -> list[Photo]:
        """Those that can be decoded; ``failed`` is told of the others."""
        starts = range(0, len(photos), _CHECKED_AT_ONCE)
        calls = ((order, _found_anywhere(photos[start : start + _CHECKED_AT_ONCE])) for start in starts)
        left_out: set[int] = set()
        with closing(in_order(self._client, _unreadable, calls)) as results:
            for start, found in zip(starts, results, strict=True):
                for place, reason in found:
                    failed(Failure(photos[start + place], reason))
                    left_out.add(start + place)
        return [photo for i, photo in enumerate(photos) if i not in left_out]


class _Counted:
    """Photographs as they are finished, from messages of workers and the ends of tasks; one that runs twice counts once."""

    def __init__(self, progress: CountPhotographs) -> None:
        self._progress = progress
        self._of: dict[int, int] = {}
        self._ended: set[int] = set()
        self._lock = threading.Lock()

    def told(self, event: tuple[float, Any]) -> None:
        """A worker's message: a shard, and how many of its photographs are done."""
        self._up_to(*event[1])

    def ended(self, shard: int, total: int) -> None:
        """All of a shard's photographs are done."""
        self._up_to(shard, total)
        with self._lock:
            self._ended.add(shard)
            self._of.pop(shard, None)

    def _up_to(self, shard: int, n: int) -> None:
        with self._lock:
            if shard in self._ended:
                return
            more = n - self._of.get(shard, 0)
            if more > 0:
                self._of[shard] = n
                self._progress(more)


def _portable(job: CachingJob, layers: list[str]) -> CachingRequest:
    """The request without its photographs, its files by absolute paths, and what depends on this machine decided."""
    request = job.request

    def absolute(given: str | None, names: Collection[str]) -> str | None:
        if given is None or given in names or not Path(given).expanduser().exists():
            return given
        return str(Path(given).expanduser().resolve())

    return replace(
        request,
        store=request.store.resolve(),
        faces=replace(request.faces, table=request.faces.table.iloc[:0], left_out=()),
        layers=layers,
        weights=absolute(request.weights, (BUILT, PACKAGED)) or "",
        recipe=absolute(request.recipe, RECIPES),
        batch_size=job.batch_size,
    )


def _numbered(photos: list[Photo], first: int) -> list[Photo]:
    """Photographs with the rows they get."""
    return [replace(photo, row=first + i) if photo.row is None else photo for i, photo in enumerate(photos)]


def _found_anywhere(photos: list[Photo]) -> list[Photo]:
    """Photographs with paths that do not depend on the current folder."""
    return [replace(photo, path=anywhere(photo.path)) for photo in photos]


def _row(photo: Photo) -> int:
    assert photo.row is not None
    return photo.row


def _remove_files(order: _Order, task: _Task) -> None:
    """What attempts at a task left under temporary names."""
    for part in task.parts.values():
        path = part.layer.shard_path(task.shard)
        for file in path.parent.glob(f"{path.name}.{order.attempt}*{PARTIAL}"):
            file.unlink(missing_ok=True)


# In a worker.

_jobs: dict[str, CachingJob] = {}  # the last run's alone, as the network
_loaded: dict[tuple[str, tuple[str, ...]], Loaded] = {}


class _StoppedError(FeatureStoreError):
    """The run that a task belongs to is over."""


class _OneShard:
    """The files of a task as a sink."""

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        self.written: Written | None = None

    def write(self, batch: Batch, rows: Mapping[str, torch.Tensor]) -> None:
        """See ``ShardFiles.write``."""
        self._files.write(batch, rows)

    def close(self) -> None:
        """Keeps what was written for the task's result."""
        self.written = self._files.finish()


def _compute_shard(order: _Order, task: _Task) -> _Done:
    """Photographs of one shard to rows in its files. What ends it is returned beside what was written before."""
    told, n = 0.0, 0
    found: list[Failure] = []
    error: FeatureStoreError | OSError | None = None
    sink: _OneShard | None = None
    loading = 0.0

    def progress(more: int) -> None:
        nonlocal told, n
        _require_mark(order, worker.address)
        n += more
        if time.monotonic() - told > _TOLD_EVERY:
            told = time.monotonic()
            worker.log_event(order.attempt, (task.shard, n))

    with whole_worker(order.threads) as worker:
        try:
            _require_mark(order, worker.address)
            started = time.perf_counter()
            job, loaded, fresh = _prepared(order, list(task.parts), worker.address)
            loading = time.perf_counter() - started if fresh else 0.0
            attempt = f"{order.attempt}-{uuid.uuid4().hex[:_ID]}"
            told = time.monotonic()
            sink = _OneShard(ShardFiles(task.shard, task.parts, task.end, attempt))
            stream(
                job,
                loaded.network,
                task.photos,
                {name: part.layer for name, part in task.parts.items()},
                sink,
                skip=task.skip,
                failed=found.append,
                progress=progress,
            )
            _require_mark(order, worker.address)
        except (FeatureStoreError, OSError) as ended:
            error = ended
    written = sink.written if sink else None
    if written and isinstance(error, _StoppedError):
        written.drop()
        written = None
    return _Done(written, [(_row(failure.photo), failure.reason) for failure in found], error, loading)


def _unreadable(order: _Order, photos: list[Photo]) -> list[tuple[int, str]]:
    """Places of those photographs that give no pixels, and why."""
    with whole_worker(order.threads) as worker:
        _require_mark(order, worker.address)
        job = _checked(order, worker.address)
        found = failures(photos, job.recipe, decoding_threads(job), order.request.max_pixels)
    return [(photos.index(failure.photo), failure.reason) for failure in found]


def _require_mark(order: _Order, address: str) -> None:
    if not order.mark.exists():
        raise _StoppedError(
            f"the worker at {address} does not see {order.mark}: the run was stopped, or the store's folder is not the same one "
            "there. It has to be on a disk that the command and all workers share, under the same path."
        )


def _checked(order: _Order, address: str) -> CachingJob:
    """The job, prepared once by a worker from its own files. FeatureStoreError unless code, weights and recipe are ours."""
    if order.attempt in _jobs:
        return _jobs[order.attempt]
    refuse_other_code({address: code_here()}, order.code)
    request = replace(order.request, workers=order.request.workers or min(4, torch.get_num_threads()))
    try:
        job = prepare_job(replace(request, device=_own_gpu(request.device)))
    except (FeatureStoreError, OSError) as error:
        raise FeatureStoreError(f"the worker at {address} cannot take part: {error}") from None
    differ = [name for name in {**job.identity, **order.identity} if job.identity.get(name) != order.identity.get(name)]
    if differ:
        name = differ[0]
        what = f" in {request.weights}" if name == "weights" else ""
        raise FeatureStoreError(
            f"the worker at {address} has other {name}{what}: {job.identity.get(name)}, here {order.identity.get(name)}. Give "
            "all workers the same files, then run the same command again."
        )
    _jobs.clear()
    _jobs[order.attempt] = job
    return job


def _prepared(order: _Order, layers: list[str], address: str) -> tuple[CachingJob, Loaded, bool]:
    """The job and its network, and whether it was loaded just now: once in each process, as long as the layers are the same."""
    job = _checked(order, address)
    key = order.attempt, tuple(layers)
    fresh = key not in _loaded
    if fresh:
        _loaded.clear()
        if job.device.type == "cpu":
            keep_freed_memory()
        with reproducible():
            _loaded[key] = load(job.spec, layers, job.weights, job.device, PRECISIONS[job.request.precision])
    return job, _loaded[key], fresh


_gpu: "list[FileLock]" = []  # held as long as the process lives


@cache
def _own_gpu(device: str) -> str:
    """``cuda:N`` with a GPU that no other worker of this machine has, where ``device`` leaves open which; else ``device``."""
    from filelock import FileLock, Timeout

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    for number in range(torch.cuda.device_count()):
        name = f"featurestore-{os.getuid()}-gpu-{torch.cuda.get_device_properties(number).uuid}.lock"
        lock = FileLock(Path(tempfile.gettempdir()) / name)
        with suppress(Timeout):
            lock.acquire(timeout=0)
            _gpu.append(lock)
            return f"cuda:{number}"
    raise FeatureStoreError(
        f"all {torch.cuda.device_count()} GPUs of this machine have a worker already. Start as many workers as it has GPUs."
    )
