"""The writing side of a caching run: batches into shards, layers in step with each other."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pandas as pd

from featurestore.caching.compute import Outputs, refuse_non_finite
from featurestore.caching.plan import LayerPlan
from featurestore.keys import KEY
from featurestore.photos.loading import Batch
from featurestore.store.shards import ShardWriter
from featurestore.store.writer import SourceWriter

_PUBLISH_SHARE = 0.05  # of the time, at most, goes into showing readers new items


class ShardSink:
    """One shard of every layer of ``plans`` open at a time, committed together; ``new`` are the items that are appended.

    ``hashes`` collects the sha256 of every photograph written to a registered row, ``computed`` counts items and
    ``bytes_written`` bytes of rows. Its methods are called in order, on one thread.
    """

    def __init__(self, writer: SourceWriter, plans: Mapping[str, LayerPlan], new: pd.DataFrame) -> None:
        self.hashes: dict[int, str] = {}
        self.computed = 0
        self.bytes_written = 0
        self._writer = writer
        self._plans = plans
        self._new = new.set_index(list(KEY), drop=False)
        self._registered = writer.n_items  # rows from here on are new
        self._slots = next(iter(plans.values())).layer.slots
        self._shard: int | None = None
        self._open: dict[str, ShardWriter] = {}
        self._appended: list[pd.DataFrame] = []
        self._failed = False
        self._out_of_step = False  # layers of the open shard hold different rows
        self._published = time.perf_counter()
        self._publishing = 0.0

    def write(self, batch: Batch, outputs: Outputs) -> None:
        """Put one batch into the shards. After an error it does nothing: batches that were already computed are dropped."""
        if self._failed:
            return
        try:
            outputs.wait()
            refuse_non_finite(batch, outputs)
            self._write(batch, outputs)
        except BaseException:
            self._failed = True
            raise

    def close(self) -> None:
        """Commit the open shard if all its layers hold the same rows, drop it otherwise, and publish."""
        try:
            if not self._out_of_step:
                self._commit()
        finally:
            for shard_writer in self._open.values():
                shard_writer.abandon()
            self._open.clear()
            self._writer.publish()

    def _write(self, batch: Batch, outputs: Outputs) -> None:
        shard = batch.rows[0] // self._slots
        if shard != self._shard:
            self._commit()
            self._begin(shard)
        rows = np.array(batch.rows)
        with self._in_step():
            for name, values in outputs.rows.items():
                plan = self._plans[name]
                wanted = self._wanted(plan, rows)
                slots = (rows[wanted] - shard * self._slots).tolist()
                self._open[name].write(slots, values.numpy() if wanted.all() else values.numpy()[wanted])
                self.bytes_written += len(slots) * plan.layer.row_bytes
        self._register(batch)
        self.computed += len(rows)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Marks the open shard as not to be committed if an error ends what is done to all layers in turn."""
        try:
            yield
        except BaseException:
            self._out_of_step = True
            raise

    def _wanted(self, plan: LayerPlan, rows: np.ndarray) -> np.ndarray:
        """bool per row: whether this layer is to get it."""
        if rows[0] >= self._registered:
            return np.ones(len(rows), bool)
        return np.take(plan.needed, rows)

    def _register(self, batch: Batch) -> None:
        if batch.rows[0] < self._registered:
            self.hashes.update(zip(batch.rows, batch.hashes, strict=True))
            return
        keys = [(photo.face, photo.view) for photo in batch.photos]
        table = self._new.loc[pd.MultiIndex.from_tuples(keys)]
        self._appended.append(table.assign(image_sha256=np.array(batch.hashes, object)).reset_index(drop=True))

    def _begin(self, shard: int) -> None:
        first = shard * self._slots
        end = min(self._slots, self._registered + len(self._new) - first)
        with self._in_step():
            for name in self._plans:
                keep = np.flatnonzero(self._writer.present_slots(name, shard)).tolist()
                self._open[name] = self._writer.open_shard(name, shard, keep=keep, end=end)
        self._shard = shard

    def _commit(self) -> None:
        with self._in_step():
            while self._open:
                name, shard_writer = next(iter(self._open.items()))
                shard_writer.commit()
                del self._open[name]
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
