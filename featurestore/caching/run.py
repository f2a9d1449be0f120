"""The pass: photographs through a frozen network into the store, once.

``job.prepare`` checks what was asked for, ``plan.make_plan`` compares it with the store, ``run`` computes what is
missing. Decoding (threads), computing (this thread) and writing (one thread) overlap; at most two batches wait
between them, so memory is bounded by the batch and not by the store.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from featurestore.caching.extractor import load_extractor
from featurestore.caching.job import Job
from featurestore.caching.plan import LayerPlan, Plan, Progress
from featurestore.devices import PRECISIONS, reproducible
from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, KEY, Box
from featurestore.photos.boxes import box_of
from featurestore.photos.loading import Batch, Failure, Photo, batches
from featurestore.photos.recipes import Recipe
from featurestore.store.shards import ShardWriter
from featurestore.store.writer import SourceWriter

_WAITING = 2  # batches between the network and the disk
_PUBLISH_SHARE = 0.05  # of the time, at most, goes into showing readers new items


@dataclass
class Summary:
    """What a pass did. ``seconds`` from the first image on, ``loading`` to build the network and read its weights.

    ``interrupted``: it stopped at Ctrl-C and can be resumed.
    """

    computed: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    loading: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False


class NonFiniteError(FeatureStoreError):
    """An activation that is NaN or infinite."""


def run(job: Job, planned: Plan, progress: Progress = lambda n: None) -> Summary:
    """Carry out ``planned``, under ``store_lock``. Ctrl-C ends it early with everything computed so far in the store.

    Raises FeatureStoreError for a photograph that cannot be read (``on_error="stop"``), NaN or infinite activations,
    or a disk that takes no more; what was computed before is kept in each case.
    """
    started = time.perf_counter()
    summary = Summary(failures=list(planned.failures))
    try:
        writer = SourceWriter(job.request.store, job.source_name, job.attributes)
        for part in planned.layers:
            if part.new:
                writer.add_layer(
                    part.layer.name, part.layer.shape, part.layer.dtype.name, part.layer.compress, part.layer.slots
                )
        _begin(writer, planned)
        parts = {part.layer.name: part for part in planned.layers}
        fill = {name: part for name, part in parts.items() if part.needed.any()}
        if fill:
            hashes = _stage(job, writer, fill, _photos_to_fill(job, planned), planned.new.iloc[:0], summary, progress)
            if planned.recompute.any():
                _end_recompute(writer, planned, hashes)
        if len(planned.new):
            _stage(job, writer, parts, _photos_to_append(job, planned), planned.new, summary, progress)
    except KeyboardInterrupt:
        summary.interrupted = True
    except OSError as error:
        raise FeatureStoreError(
            f"{job.request.store} cannot be written: {error.strerror or error}. What was computed so far is kept; "
            "free some space or choose another --store, then run the same command again."
        ) from error
    summary.seconds = time.perf_counter() - started - summary.loading
    return summary


def _begin(writer: SourceWriter, planned: Plan) -> None:
    """Publish new layers (still without rows) and metadata; changed photographs lose their hash until all is recomputed."""
    table = planned.existing
    if planned.recompute.any():
        table = table.copy()
        table.loc[planned.recompute, "image_sha256"] = ""
    if planned.table_changed or planned.recompute.any():
        writer.replace_table(table)
    writer.publish()


def _end_recompute(writer: SourceWriter, planned: Plan, hashes: Mapping[int, str]) -> None:
    table = writer.table.copy()
    for row in np.flatnonzero(planned.recompute):
        table.loc[row, "image_sha256"] = hashes.get(int(row), "")
    writer.replace_table(table)
    writer.publish()


def _photos_to_fill(job: Job, planned: Plan) -> list[Photo]:
    rows = planned.to_fill
    table = planned.existing.iloc[rows]
    hashes = np.where(planned.recompute[rows], "", table["image_sha256"].to_numpy(object))
    known = zip(table["face_id"], table["view"], table["path"], rows.tolist(), hashes, _boxes(job, table), strict=True)
    return [Photo(face, view, path, row, sha256 or None, box) for face, view, path, row, sha256, box in known]


def _photos_to_append(job: Job, planned: Plan) -> list[Photo]:
    new = planned.new
    known = zip(new["face_id"], new["view"], new["path"], _boxes(job, new), strict=True)
    return [Photo(face, view, path, box=box) for face, view, path, box in known]


def _boxes(job: Job, table: pd.DataFrame) -> list[Box | None]:
    if job.recipe.box_margin is None:
        return [None] * len(table)
    return [box_of(item) for item in table[list(BOX)].to_dict("records")]


def _stage(
    job: Job,
    writer: SourceWriter,
    parts: dict[str, LayerPlan],
    photos: list[Photo],
    new: pd.DataFrame,
    summary: Summary,
    progress: Progress,
) -> dict[int, str]:
    """Decode, compute and write ``photos`` for the layers of ``parts``; ``new`` are the items they append, if they do.

    Returns the sha256 of each photograph by row, for those that have one already.
    """
    sink = _Sink(writer, parts, new, summary)
    precision = PRECISIONS[job.request.precision]
    stream = batches(
        photos,
        job.recipe,
        slots=next(iter(parts.values())).layer.slots,
        next_row=writer.n_items,
        batch_size=job.batch_size,
        workers=job.request.workers or min(4, os.cpu_count() or 1),
        skip=job.request.on_error == "skip",
        failures=summary.failures,
        pin=job.device.type == "cuda",
    )
    dtypes = {name: part.layer.dtype for name, part in parts.items()}
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread, reproducible():
        loading = time.perf_counter()
        network = load_extractor(job.spec, list(parts), job.weights, job.device, precision)
        summary.loading += time.perf_counter() - loading
        try:
            for batch in stream:
                outputs = compute(network, job.recipe, batch.pixels, job.device, precision, dtypes)
                waiting.append(thread.submit(sink.write, batch, outputs))
                while len(waiting) > _WAITING or (waiting and waiting[0].done()):
                    waiting.popleft().result()
                progress(len(batch.rows))
        finally:
            # Also on the way out of an error or Ctrl-C: whatever was computed before it is worth keeping.
            stream.close()
            try:
                while waiting:
                    waiting.popleft().result()
            finally:
                thread.submit(sink.close).result()
    return sink.hashes


@dataclass(frozen=True)
class Outputs:
    """A batch's rows on their way to the disk: (n, elements) per layer, and each layer's smallest and largest value.

    On a GPU the copies may still be running; ``wait`` before looking.
    """

    rows: dict[str, torch.Tensor]
    extremes: torch.Tensor
    wait: Callable[[], Any]


def compute(
    network: torch.nn.Module,
    recipe: Recipe,
    pixels: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    stored: Mapping[str, np.dtype],
) -> Outputs:
    """One forward pass: uint8 pixels (n, size, size, 3) to stored rows. Does not wait for the GPU."""
    with torch.inference_mode():
        inputs = recipe.normalise(pixels.to(device, non_blocking=True)).to(dtype)
        outputs: dict[str, torch.Tensor] = network(inputs)
        rows, extremes = {}, []
        for name, values in outputs.items():
            kept = values.to(getattr(torch, stored[name].name)).flatten(1).contiguous()  # C, H, W order
            extremes.append(torch.stack(torch.aminmax(kept)).float())  # NaN and infinity both survive into it
            rows[name] = _to_host(kept)
        limits = _to_host(torch.stack(extremes))
    if device.type != "cuda":
        return Outputs(rows, limits, lambda: None)
    event = torch.cuda.Event()
    event.record()
    return Outputs(rows, limits, event.synchronize)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    if values.device.type != "cuda":
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


class _Sink:
    """The writing side of a stage: one shard of every layer open at a time, committed together.

    ``hashes`` collects the sha256 of every photograph written to a registered row.
    """

    def __init__(self, writer: SourceWriter, parts: dict[str, LayerPlan], new: pd.DataFrame, summary: Summary) -> None:
        self.hashes: dict[int, str] = {}
        self._writer = writer
        self._parts = parts
        self._new = new.set_index(list(KEY), drop=False)
        self._summary = summary
        self._registered = writer.n_items  # rows from here on are new
        self._slots = next(iter(parts.values())).layer.slots
        self._shard: int | None = None
        self._open: dict[str, ShardWriter] = {}
        self._appended: list[pd.DataFrame] = []
        self._failed = False
        self._torn = False  # layers of the open shard hold different rows
        self._published = time.perf_counter()
        self._publishing = 0.0

    def write(self, batch: Batch, outputs: Outputs) -> None:
        """Put one batch into the shards; called in order, on the writing thread. After a failure it does nothing."""
        if self._failed:
            return
        self._failed = True
        outputs.wait()
        _refuse_non_finite(batch, outputs)
        shard = batch.rows[0] // self._slots
        if shard != self._shard:
            self._finish()
        self._torn = True
        if shard != self._shard:
            self._start(shard)
        rows = np.array(batch.rows)
        for name, values in outputs.rows.items():
            part = self._parts[name]
            wanted = self._wanted(part, rows)
            slots = (rows[wanted] - shard * self._slots).tolist()
            self._open[name].write(slots, values.numpy() if wanted.all() else values.numpy()[wanted])
            self._summary.bytes_written += len(slots) * part.layer.row_bytes
        self._torn = False
        self._register(batch)
        self._summary.computed += len(rows)
        self._failed = False

    def close(self) -> None:
        """Commit the open shard if all its layers hold the same rows, drop it otherwise, and publish."""
        try:
            if not self._torn:
                self._finish()
        finally:
            for shard_writer in self._open.values():
                shard_writer.abandon()
            self._open.clear()
            self._writer.publish()

    def _wanted(self, part: LayerPlan, rows: np.ndarray) -> np.ndarray:
        """bool per row: whether this layer is to get it."""
        if rows[0] >= self._registered:
            return np.ones(len(rows), bool)
        return part.needed[rows]

    def _register(self, batch: Batch) -> None:
        if batch.rows[0] < self._registered:
            self.hashes.update(zip(batch.rows, batch.hashes, strict=True))
            return
        keys = [(photo.face, photo.view) for photo in batch.photos]
        table = self._new.loc[pd.MultiIndex.from_tuples(keys)]
        self._appended.append(table.assign(image_sha256=np.array(batch.hashes, object)).reset_index(drop=True))

    def _start(self, shard: int) -> None:
        self._shard = shard
        first = shard * self._slots
        end = min(self._slots, self._registered + len(self._new) - first)
        for name in self._parts:
            keep = np.flatnonzero(self._writer.present_slots(name, shard)).tolist()
            self._open[name] = self._writer.open_shard(name, shard, keep=keep, end=end)

    def _finish(self) -> None:
        self._torn = True
        while self._open:
            name, shard_writer = next(iter(self._open.items()))
            shard_writer.commit()
            del self._open[name]
        self._torn = False
        self._shard = None
        if self._appended:
            self._writer.append(pd.concat(self._appended, ignore_index=True))
            self._appended.clear()
            self._publish_now_and_then()

    def _publish_now_and_then(self) -> None:
        """Readers and a later resume see new items soon, but a store of a million items is not rewritten every second."""
        now = time.perf_counter()
        if now - self._published >= self._publishing / _PUBLISH_SHARE:
            self._writer.publish()
            self._published = time.perf_counter()
            self._publishing = self._published - now


def _refuse_non_finite(batch: Batch, outputs: Outputs) -> None:
    if bool(torch.isfinite(outputs.extremes).all()):
        return
    for name, values in outputs.rows.items():
        bad = (~torch.isfinite(values)).sum(dim=1)
        if bad.any():
            first = int(torch.nonzero(bad)[0])
            raise NonFiniteError(
                f"layer {name!r} of {batch.photos[first]} has {int(bad[first])} NaN or infinite activations "
                f"({int((bad > 0).sum())} images of this batch have some). Nothing of this batch was stored. "
                "Half precision overflows at 65504: try --precision bf16 or fp32 and --dtype float32; "
                "if that is what you use, look at the weights."
            )
