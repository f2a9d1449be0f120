"""The writing side of a caching run: batches into shards, layers in step with each other, and their rows into the store.

``ShardFiles`` writes one shard of every layer under temporary names, in any process; ``Registration``, in the one that holds the
store's lock, puts what was written in its place, in the order of rows; ``ShardSink`` joins the two.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from featurestore.caching.plan import LayerPlan
from featurestore.keys import KEY
from featurestore.photos.loading import Batch
from featurestore.store.shards import ShardWriter
from featurestore.store.writer import SourceWriter, shard_writer
from featurestore.store.zarr_format import Layer

_PUBLISH_SHARE = 0.05  # of the time, at most, goes into showing readers new items


@dataclass(frozen=True)
class ShardPart:
    """One layer's part of a shard, bool per slot: ``keep`` are carried over from the present file, ``wanted`` are written."""

    layer: Layer
    keep: np.ndarray
    wanted: np.ndarray


@dataclass
class Written:
    """What was written of one shard: of each photograph its row, key and sha256, and the bytes of all rows.

    ``files`` are, by layer, the finished file under its temporary name and each slot's checksum.
    """

    shard: int
    rows: list[int] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    files: dict[str, tuple[Path, np.ndarray]] = field(default_factory=dict)
    n_bytes: int = 0

    def drop(self) -> None:
        """Remove the files that were not put in their places."""
        for file, _ in self.files.values():
            file.unlink(missing_ok=True)


class ShardFiles:
    """One shard of every layer of ``parts``; ``end`` and ``attempt`` as of ShardWriter."""

    def __init__(self, shard: int, parts: Mapping[str, ShardPart], end: int, attempt: str = "") -> None:
        self.shard = shard
        self._parts = parts
        self._written = Written(shard)
        self._open: dict[str, ShardWriter] = {}
        self._out_of_step = False  # layers hold different rows
        try:
            for name, part in parts.items():
                keep = np.flatnonzero(part.keep).tolist()
                self._open[name] = shard_writer(part.layer, shard, keep, end, attempt=attempt)
        except BaseException:
            self._abandon()
            raise

    def write(self, batch: Batch, rows: Mapping[str, torch.Tensor]) -> None:
        """Put one batch of this shard into its files; rows (n, elements) of the stored dtype."""
        with self._in_step():
            for name, values in rows.items():
                part = self._parts[name]
                slots = np.array(batch.rows) - self.shard * part.layer.slots
                wanted = part.wanted[slots]
                kept = values.numpy() if wanted.all() else values.numpy()[wanted]
                self._open[name].write(slots[wanted].tolist(), kept)
                self._written.n_bytes += len(kept) * part.layer.row_bytes
        self._written.rows += batch.rows
        self._written.keys += [(photo.face, photo.view) for photo in batch.photos]
        self._written.hashes += batch.hashes

    def finish(self) -> Written | None:
        """Flush every file to disk if all layers hold the same rows; otherwise, and after an error, drop them all."""
        try:
            if self._out_of_step:
                return None
            for name, shard_writer in self._open.items():
                self._written.files[name] = shard_writer.partial, shard_writer.finish()
            self._open.clear()
            return self._written
        finally:
            self._abandon()

    def _abandon(self) -> None:
        for opened in self._open.values():
            opened.abandon()
        self._open.clear()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Marks the shard as not to be kept if an error ends what is done to all layers in turn."""
        try:
            yield
        except BaseException:
            self._out_of_step = True
            raise


class Registration:
    """What a stage of a pass has written, put into the store in the order of rows; ``new`` are the items that are appended.

    ``hashes`` collects the sha256 of every photograph written to a registered row, ``computed`` counts items and ``n_bytes``
    bytes of rows. Its methods are called on one thread at a time.
    """

    def __init__(self, writer: SourceWriter, plans: Mapping[str, LayerPlan], new: pd.DataFrame) -> None:
        self.hashes: dict[int, str] = {}
        self.computed = 0
        self.n_bytes = 0
        self.layers = {name: writer.layers[name] for name in plans}
        self.slots = next(iter(self.layers.values())).slots
        self.registered = writer.n_items  # rows from here on are new
        self._writer = writer
        self._plans = plans
        self._new = new.set_index(list(KEY), drop=False)
        self._published = time.perf_counter()
        self._publishing = 0.0

    def parts(self, shard: int) -> dict[str, ShardPart]:
        """What is to be written of a shard, and what is carried over."""
        first = shard * self.slots
        parts = {}
        for name, layer in self.layers.items():
            wanted = np.ones(self.slots, bool)
            needed = self._plans[name].needed[first : first + self.slots]
            wanted[: len(needed)] = needed
            parts[name] = ShardPart(layer, self._writer.present_slots(name, shard), wanted)
        return parts

    def end(self, shard: int) -> int:
        """One past the last slot of a shard that will be there."""
        return min(self.slots, self.registered + len(self._new) - shard * self.slots)

    def put(self, written: Written) -> None:
        """Put a shard's files in their places and register its items; every shard before it was put."""
        try:
            for name, (file, checksums) in written.files.items():
                self._writer.put_shard(name, written.shard, file, checksums)
        except BaseException:
            written.drop()
            raise
        self.computed += len(written.rows)
        self.n_bytes += written.n_bytes
        new = [row >= self.registered for row in written.rows]
        known = zip(written.rows, written.hashes, new, strict=True)
        self.hashes.update((row, digest) for row, digest, appended in known if not appended)
        if any(new):
            self._append(written.keys, written.hashes)
            self._publish_now_and_then()

    def publish(self) -> None:
        """Show readers all of it."""
        self._writer.publish()

    def _append(self, keys: Sequence[tuple[str, str]], hashes: Sequence[str]) -> None:
        table = self._new.loc[pd.MultiIndex.from_tuples(keys)]
        self._writer.append(table.assign(image_sha256=np.array(hashes, object)).reset_index(drop=True))

    def _publish_now_and_then(self) -> None:
        """Readers and a later resume see new items soon, but a store of a million items is not rewritten every second."""
        now = time.perf_counter()
        if now - self._published >= self._publishing / _PUBLISH_SHARE:
            self.publish()
            self._published = time.perf_counter()
            self._publishing = self._published - now


class ShardSink:
    """The batches of a pass in this process: one shard open at a time, registered when the next one begins."""

    def __init__(self, registration: Registration) -> None:
        self._registration = registration
        self._files: ShardFiles | None = None

    def write(self, batch: Batch, rows: Mapping[str, torch.Tensor]) -> None:
        """Put one batch into the shards; see ``ShardFiles.write``."""
        shard = batch.rows[0] // self._registration.slots
        if self._files is not None and self._files.shard != shard:
            self._end()
        if self._files is None:
            self._files = ShardFiles(shard, self._registration.parts(shard), self._registration.end(shard))
        self._files.write(batch, rows)

    def close(self) -> None:
        """Register the open shard if all its layers hold the same rows, drop it otherwise, and publish."""
        try:
            self._end()
        finally:
            self._registration.publish()

    def _end(self) -> None:
        files, self._files = self._files, None
        written = files.finish() if files else None
        if written:
            self._registration.put(written)
