"""The caching run: photographs through a frozen network into the store, once.

``job.prepare_job`` checks what was asked for, ``planning.make_plan`` compares it with the store, ``cache_layers`` computes
what is missing, in this process (``stream``) or in many (``cluster``).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from featurestore.caching.extractor import Loaded, load
from featurestore.caching.job import CachingJob
from featurestore.caching.plan import CountPhotographs, LayerPlan, Plan
from featurestore.caching.shard_sink import Registration, ShardSink
from featurestore.caching.stream import stream
from featurestore.devices import PRECISIONS, reproducible
from featurestore.errors import FeatureStoreError
from featurestore.keys import KEY, Place
from featurestore.photos.boxes import place_of
from featurestore.photos.loading import Failure, Photo
from featurestore.store.reader import Source
from featurestore.store.rows import present_rows
from featurestore.store.writer import SourceWriter

# Carries out a stage in other processes, and returns the seconds that loading took them: the job, where its rows are put, the
# photographs, and what is to be told of each failure and of the number of photographs just finished.
Elsewhere = Callable[[CachingJob, Registration, list[Photo], Callable[[Failure], None], CountPhotographs], float]


@dataclass
class Summary:
    """What a caching run did. ``seconds`` from the first image on, ``loading`` to build the network and read its weights.

    ``interrupted``: it stopped at Ctrl-C and can be resumed.
    """

    computed: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    loading: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False


def cache_layers(
    job: CachingJob,
    plan: Plan,
    progress: CountPhotographs = lambda n: None,
    loaded: Loaded | None = None,
    elsewhere: Elsewhere | None = None,
) -> Summary:
    """Carry out ``plan``, under ``store_lock``. Ctrl-C ends it early with everything computed so far in the store.

    ``loaded`` is a network of this job that is there already; where the run needs other layers, it loads its own.
    ``elsewhere`` computes in other processes, such as ``cluster.ClusterPass``.

    Raises FeatureStoreError for a photograph that cannot be read (``on_error="stop"``), NaN or infinite activations,
    or a disk that takes no more; what was computed before is kept in each case.
    """
    run = _Run(job, plan, progress, loaded, elsewhere)
    started = time.perf_counter()
    try:
        run.carry_out()
    except KeyboardInterrupt:
        run.summary.interrupted = True
    except OSError as error:
        raise FeatureStoreError(
            f"{job.request.store} cannot be written: {error.strerror or error}. What was computed so far is kept; "
            "free some space or choose another `store`, then run the same command again."
        ) from error
    run.summary.seconds = time.perf_counter() - started - run.summary.loading
    run.summary.loading += loaded.seconds if loaded else 0.0
    return run.summary


class _Run:
    def __init__(
        self,
        job: CachingJob,
        plan: Plan,
        progress: CountPhotographs,
        loaded: Loaded | None,
        elsewhere: Elsewhere | None,
    ) -> None:
        self.job, self.plan, self.progress, self.loaded, self.elsewhere = job, plan, progress, loaded, elsewhere
        self.summary = Summary(failures=list(plan.failures))

    def carry_out(self) -> None:
        """Declare new layers, fill what registered items lack, append the others."""
        self.writer = SourceWriter(self.job.request.store, self.job.source_name, self.job.attributes)
        plan = self.plan
        for part in plan.layers:
            if part.new:
                layer = part.layer
                self.writer.add_layer(layer.name, layer.shape, layer.dtype.name, layer.compress, layer.slots)
        self._publish_table()
        plans = {part.layer.name: part for part in plan.layers}
        incomplete = {name: part for name, part in plans.items() if part.needed.any()}
        filled: list[int] = []
        if incomplete:
            hashes = self._stage(incomplete, photos_to_fill(self.job, plan), plan.new.iloc[:0])
            filled = list(hashes)
            if plan.recompute.any():
                self._end_recompute(hashes)
        first = self.writer.n_items
        if len(plan.new):
            self._stage(plans, photos_to_append(self.job, plan), plan.new)
        if self.summary.computed:
            self._require_written(filled, first)

    def _require_written(self, filled: list[int], first: int) -> None:
        """FeatureStoreError if rows that were ``filled``, or items from ``first`` on, are not in the store, read anew."""
        source = Source(self.job.request.store, self.job.source_name)
        gone = {}
        for part in self.plan.layers:
            due = np.zeros(self.writer.n_items, bool)
            due[[row for row in filled if part.needed[row]]] = True
            due[first:] = True
            present = np.zeros(len(due), bool)
            present[: source.n_items] = present_rows(source.layers[part.layer.name])
            gone[part.layer.name] = int((due & ~present).sum())
        lost = ", ".join(f"{n} rows of {name}" for name, n in gone.items() if n)
        if lost or not source.keys.equals(pd.MultiIndex.from_frame(self.writer.table[list(KEY)])):
            raise FeatureStoreError(
                f"{lost or 'items'} that were written to {source.folder} are gone: another program removed files while it was "
                "written. Run the same command again, which computes them."
            )

    def _publish_table(self) -> None:
        """Publish new layers (still without rows) and metadata; changed photographs lose their hash until all is recomputed."""
        plan = self.plan
        table = plan.existing
        if plan.recompute.any():
            table = table.copy()
            table.loc[plan.recompute, "image_sha256"] = ""
        if plan.table_changed or plan.recompute.any():
            self.writer.replace_table(table)
        self.writer.publish()

    def _end_recompute(self, hashes: Mapping[int, str]) -> None:
        table = self.writer.table.copy()
        for row in np.flatnonzero(self.plan.recompute):
            table.loc[row, "image_sha256"] = hashes.get(int(row), "")
        self.writer.replace_table(table)
        self.writer.publish()

    def _stage(self, plans: Mapping[str, LayerPlan], photos: list[Photo], new: pd.DataFrame) -> dict[int, str]:
        """Decode, compute and write ``photos`` for the layers of ``plans``; ``new`` are the items they append, if they do.

        Returns the sha256 of each photograph by row, for those that have one already.
        """
        registration = Registration(self.writer, plans, new)
        try:
            if self.elsewhere:
                loading = self.elsewhere(self.job, registration, photos, self._note, self.progress)
                self.summary.loading += loading
            else:
                self._stage_here(registration, photos)
        finally:
            self.summary.computed += registration.computed
            self.summary.bytes_written += registration.n_bytes
        return registration.hashes

    def _stage_here(self, registration: Registration, photos: list[Photo]) -> None:
        with reproducible():
            network = self._network(list(registration.layers))
        stream(
            self.job,
            network,
            photos,
            registration.layers,
            ShardSink(registration),
            next_row=registration.registered,
            skip=self.job.request.on_error == "skip",
            failed=self._note,
            progress=self.progress,
        )

    def _network(self, layers: list[str]) -> torch.nn.Module:
        """The extractor of ``layers``; the one before it is kept if it is the same, and freed otherwise."""
        if self.loaded is None or self.loaded.layers != layers:
            self.loaded = None
            job = self.job
            self.loaded = load(job.spec, layers, job.weights, job.device, PRECISIONS[job.request.precision])
            self.summary.loading += self.loaded.seconds
        return self.loaded.network

    def _note(self, failure: Failure) -> None:
        if self.job.request.on_error != "skip":
            raise FeatureStoreError(
                f"{failure}. Repair or remove it, or leave such photographs out with `on_error` skip. "
                "What was computed so far is kept."
            )
        self.summary.failures.append(failure)


def photos_to_fill(job: CachingJob, plan: Plan) -> list[Photo]:
    """The photographs of registered items that lack rows, which must still be those that were cached."""
    rows = plan.to_fill
    table = plan.existing.iloc[rows]
    hashes = np.where(plan.recompute[rows], "", table["image_sha256"].to_numpy(object))
    known = zip(table["face_id"], table["view"], table["path"], rows.tolist(), hashes, _places(job, table), strict=True)
    return [Photo(face, view, path, row, sha256 or None, place) for face, view, path, row, sha256, place in known]


def photos_to_append(job: CachingJob, plan: Plan) -> list[Photo]:
    """The photographs that are new."""
    new = plan.new
    known = zip(new["face_id"], new["view"], new["path"], _places(job, new), strict=True)
    return [Photo(face, view, path, place=place) for face, view, path, place in known]


def _places(job: CachingJob, table: pd.DataFrame) -> list[Place | None]:
    return [place_of(item, job.recipe) for item in table.to_dict("records")]
