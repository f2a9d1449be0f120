"""Photographs through the network into a sink: decoded in threads, computed in this one, written in another.

At most two batches wait between them, so memory is bounded by the batch and not by the store.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from featurestore.caching.capture_check import check_among_others
from featurestore.caching.compute import Outputs, compute, refuse_non_finite
from featurestore.caching.job import CachingJob
from featurestore.caching.plan import CountPhotographs
from featurestore.devices import PRECISIONS, reproducible
from featurestore.photos.loading import Batch, Failure, Photo, batches
from featurestore.store.zarr_format import Layer

_WAITING = 2  # batches between the network and the disk


class Sink(Protocol):
    """What takes the rows; its methods are called in order, on one thread, and after an error only ``close``."""

    def write(self, batch: Batch, rows: Mapping[str, torch.Tensor]) -> None:
        """One batch's rows (n, elements), as they are stored, by layer."""

    def close(self) -> None:
        """Called once, at the end, also after an error."""


def stream(
    job: CachingJob,
    network: torch.nn.Module,
    photos: Iterable[Photo],
    layers: Mapping[str, Layer],
    sink: Sink,
    *,
    next_row: int = 0,
    skip: bool,
    failed: Callable[[Failure], None],
    progress: CountPhotographs,
) -> None:
    """Decode, compute and write ``photos``; ``next_row``, ``skip`` and failures as of ``batches``.

    Whatever was computed before an error or Ctrl-C is written. Raises FeatureStoreError as ``refuse_non_finite`` and ``failed``
    do, OSError as ``sink`` does.
    """
    precision = PRECISIONS[job.request.precision]
    dtypes = {name: layer.dtype for name, layer in layers.items()}
    broken = checked = False

    def write(batch: Batch, outputs: Outputs) -> None:
        nonlocal broken
        if broken:  # batches that were already computed when one could not be written
            return
        broken = True
        outputs.wait()
        refuse_non_finite(batch, outputs)
        sink.write(batch, outputs.rows)
        broken = False

    batched = batches(
        photos,
        job.recipe,
        slots=next(iter(layers.values())).slots,
        next_row=next_row,
        batch_size=job.batch_size,
        workers=decoding_threads(job),
        skip=skip,
        pin=job.device.type == "cuda",
        max_pixels=job.request.max_pixels,
    )
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread, reproducible():
        try:
            for batch in batched:
                if isinstance(batch, Failure):
                    failed(batch)
                    continue
                outputs = compute(network, job.recipe, batch.pixels, job.device, precision, dtypes)
                if job.spec.equal is None and len(batch.rows) > 1 and not checked:  # a network that is not ours
                    one = compute(network, job.recipe, batch.pixels[:1], job.device, precision, dtypes)
                    outputs.wait(), one.wait()
                    check_among_others(job.spec, outputs.rows, one.rows)
                    checked = True
                waiting.append(thread.submit(write, batch, outputs))
                while len(waiting) > _WAITING or (waiting and waiting[0].done()):
                    waiting.popleft().result()
                progress(len(batch.rows))
        finally:
            # Also on the way out of an error or Ctrl-C: whatever was computed before it is worth keeping.
            batched.close()
            try:
                while waiting:
                    waiting.popleft().result()
            finally:
                thread.submit(sink.close).result()


def decoding_threads(job: CachingJob) -> int:
    """Threads that read and decode, beside the one that computes."""
    return job.request.workers or min(4, os.cpu_count() or 1)
