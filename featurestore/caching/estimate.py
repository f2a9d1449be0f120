"""How long a caching run will take, from its first photographs going through the network on this machine."""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from featurestore.caching.compute import compute
from featurestore.caching.extractor import Loaded, load
from featurestore.caching.job import CachingJob
from featurestore.caching.plan import Plan
from featurestore.caching.run import photos_to_append, photos_to_fill
from featurestore.caching.stream import decoding_threads
from featurestore.demo.dataset import make_faces
from featurestore.devices import PRECISIONS, reproducible
from featurestore.photos.boxes import place_of
from featurestore.photos.files import is_there
from featurestore.photos.keys import find_faces
from featurestore.photos.loading import Batch, Photo, batches
from featurestore.text import human_bytes, human_duration

WORTH_MEASURING = 8  # batches: a run of fewer is under way as soon as it could be measured
_CPU_BATCH = 4  # images: on a CPU as fast per image as the run's own batches, and sooner done
_MEASURED_SECONDS, _MEASURED_BATCHES = 1.0, 8  # measured until either is reached
_SLOW_DISK = 100 * 2**20  # bytes per second that any disk takes


@dataclass(frozen=True)
class Estimate:
    """``images`` at ``rate`` images per second, reading and preprocessing included, on the device ``where``.

    ``writing`` is what the disk is asked to take at that rate, in bytes per second. ``loaded`` is the network
    it was measured with, for the run to go on with, ``rows`` what it gave for some photographs, float32 (n, elements) by layer.
    ``rendered`` if those were rendered faces, since the photographs are not there.
    """

    images: int
    rate: float
    where: str
    writing: float
    loaded: Loaded
    rows: Mapping[str, np.ndarray]
    rendered: bool = False

    def __str__(self) -> str:
        rate = f"{self.rate:,.{1 if self.rate < 100 else 0}f}"
        disk = f", if the disk takes {human_bytes(self.writing)}/s" if self.writing > _SLOW_DISK else ""
        return (
            f"about {human_duration(self.images / self.rate)}: {self.images:,} images at {rate} images/s, "
            f"measured on this machine ({self.where}{', with rendered faces' if self.rendered else ''}){disk}"
        )


def estimate(job: CachingJob, plan: Plan) -> Estimate | None:
    """Load the network and time it on the plan's first photographs, as the run will read, preprocess and compute them.

    Nothing is written. None if fewer than ``WORTH_MEASURING`` batches are to be computed, or none of the first photographs can be
    read; rendered faces are timed in the place of ones that are not there. Where registered items lack some layers and others are
    to be appended, the larger part is timed.
    """
    if plan.images < WORTH_MEASURING * job.batch_size:
        return None
    appending = len(plan.new) >= len(plan.to_fill)
    layers = [part.layer.name for part in plan.layers if appending or part.needed.any()]
    batch_size = min(job.batch_size, _CPU_BATCH) if job.device.type == "cpu" else job.batch_size
    photos = (photos_to_append if appending else photos_to_fill)(job, plan)[: (1 + _MEASURED_BATCHES) * batch_size]
    rendered = not any(is_there(photo.path) for photo in photos)
    with TemporaryDirectory() as folder, reproducible():
        if rendered:
            photos = _rendered(Path(folder), job, len(photos))
        loaded = load(job.spec, layers, job.weights, job.device, PRECISIONS[job.request.precision])
        stream = batches(
            photos,
            job.recipe,
            slots=len(plan.existing) + len(plan.new),
            next_row=0,
            batch_size=batch_size,
            workers=decoding_threads(job),
            skip=True,
            pin=job.device.type == "cuda",
            max_pixels=job.request.max_pixels,
        )
        with closing(stream):
            rate, rows = _rate(job, plan, loaded, (batch for batch in stream if isinstance(batch, Batch)))
    if rate is None:
        return None
    where = str(job.device) + (f", {torch.get_num_threads()} threads" if job.device.type == "cpu" else "")
    return Estimate(plan.images, rate, where, plan.bytes_to_write / plan.images * rate, loaded, rows, rendered)


def _rendered(folder: Path, job: CachingJob, n: int) -> list[Photo]:
    """``n`` photographs of rendered faces, in ``folder``, in the place of ones that are only listed."""
    make_faces(folder, n_faces=8, n_trials=1)
    items = find_faces(folder / "faces.csv").table.to_dict("records")
    found = [Photo(item["face_id"], item["view"], item["path"], place=place_of(item, job.recipe)) for item in items]
    return list(islice(cycle(found), n))


def _rate(
    job: CachingJob, plan: Plan, loaded: Loaded, stream: Iterator[Batch]
) -> tuple[float | None, dict[str, np.ndarray]]:
    """Images per second after a first batch, which is slower, None if there is none after it; and the first batch's rows."""
    dtypes = {part.layer.name: part.layer.dtype for part in plan.layers}
    rows: dict[str, np.ndarray] = {}
    precision = PRECISIONS[job.request.precision]
    started, images = 0.0, 0
    for number, batch in enumerate(stream):
        outputs = compute(loaded.network, job.recipe, batch.pixels, job.device, precision, dtypes)
        outputs.wait()
        if not number:
            rows = {name: values[:_CPU_BATCH].float().numpy().copy() for name, values in outputs.rows.items()}
            started = time.perf_counter()
            continue
        images += len(batch.rows)
        if time.perf_counter() - started >= _MEASURED_SECONDS:
            break
    return images / (time.perf_counter() - started) if images else None, rows
