"""What a caching run will do, as a value: computed before anything runs, printed, and only then carried out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featurestore.caching.renamed import Moves
from featurestore.errors import FeatureStoreError
from featurestore.photos.loading import Failure
from featurestore.store.shards import index_bytes
from featurestore.store.zarr_format import Layer
from featurestore.text import aligned, human_bytes, listing

CountPhotographs = Callable[[int], Any]  # called with the number of photographs just finished


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part. ``present`` and ``needed`` are bool per registered item: cached already, to be (re)computed."""

    layer: Layer
    new: bool
    present: np.ndarray
    needed: np.ndarray

    def bytes_to_write(self, appended: int) -> int:
        """Bytes of every shard that will be written, records carried over included; an upper bound if compressed."""
        record, slots = self.layer.record, self.layer.slots
        n_items = len(self.present)
        total = 0
        touched = {int(row) // slots for row in np.flatnonzero(self.needed)}
        if appended:
            touched |= set(range(n_items // slots, (n_items + appended - 1) // slots + 1))
        for shard in touched:
            rows = min((shard + 1) * slots, n_items + appended) - shard * slots
            total += rows * record.stride + index_bytes(slots)
        return total


@dataclass(frozen=True)
class Plan:
    """Everything a caching run will do to one source of one store.

    ``existing`` and ``new`` are the coordinates of registered items (as they will be) and of items to append. ``beside`` (bool
    per registered item) are computed too and not written: with them the others are in the batches that they were in at first.
    """

    store: Path
    source: str
    about: tuple[tuple[str, str], ...]
    layers: tuple[LayerPlan, ...]
    existing: pd.DataFrame
    new: pd.DataFrame
    table_changed: bool
    changed: tuple[str, ...]
    recompute: np.ndarray
    beside: np.ndarray | None = None
    failures: tuple[Failure, ...] = ()
    left_out: tuple[str, ...] = ()
    free: int | None = 0  # None where no disk is filled
    notes: tuple[str, ...] = field(default=())
    moves: Moves = field(default=Moves())

    @property
    def to_fill(self) -> np.ndarray:
        """Rows of registered items that are computed: what some layer lacks, what is recomputed, what is ``beside`` it."""
        needed = np.zeros(len(self.existing), bool) if self.beside is None else self.beside.copy()
        for part in self.layers:
            needed |= part.needed
        return np.flatnonzero(needed)

    @property
    def images(self) -> int:
        """Photographs that will go through the network."""
        return len(self.to_fill) + len(self.new)

    @property
    def bytes_to_write(self) -> int:
        """Upper bound on what the run adds to the disk while it runs."""
        return sum(part.bytes_to_write(len(self.new)) for part in self.layers)

    def refuse_if_full(self) -> None:
        """FeatureStoreError if the disk cannot take it."""
        if self.free is not None and self.bytes_to_write > self.free:
            raise FeatureStoreError(
                f"not enough disk for {self.store}: the caching run writes up to {human_bytes(self.bytes_to_write)}, "
                f"{human_bytes(self.free)} are free. Cache fewer layers, use `dtype` float16 or `compress` zstd on a "
                "larger disk, or choose another `store`."
            )

    def refuse_if_renamed(self) -> None:
        """FeatureStoreError if photographs seem to have been renamed: whether they were is for the user to say."""
        renamed = self.moves.renamed
        if renamed:
            gone = [each.old for each in renamed if each.old in self.moves.gone]
            forget = (
                f"`forget` {'/'.join(gone[0])} removes the item, and the photograph is computed anew; " if gone else ""
            )
            raise FeatureStoreError(
                f"{len(renamed)} photographs in the store seem to have been renamed: {listing(renamed)}. Cached as they are, the "
                "same photograph would be there under two keys, or under another's. Say which is right: `rename` gives the items "
                f"their new keys without computing; {forget}or put the files back."
            )

    def __str__(self) -> str:
        lines = [f"  {name:<9} {value}" for name, value in self.about]
        lines.append(f"  {'items':<9} {len(self.existing)} in the store, {len(self.new)} to append")
        if self.left_out:
            lines.append(
                f"  {'left out':<9} {len(self.left_out)} images do not match `pattern`: {listing(self.left_out, 3)}"
            )
        if self.changed:
            what = "recomputed" if self.recompute.any() else "kept as cached; `recompute_changed` recomputes them"
            lines.append(
                f"  {'changed':<9} {len(self.changed)} photographs (or their faces' places) differ from those cached ({what}): "
                f"{listing(self.changed, 5)}"
            )
        lines += [*self._moves(), "", *self._table(), ""]
        room = "to put there" if self.free is None else f"to write, {human_bytes(self.free)} free"
        lines.append(f"  {'disk':<9} up to {human_bytes(self.bytes_to_write)} {room}")
        lines.append(
            f"  {'network':<9} {self.images} images to compute" + ("" if self.images else ": everything is cached")
        )
        lines += [f"  {'note':<9} {note}" for note in self.notes]
        return "\n".join(lines)

    def _moves(self) -> list[str]:
        lost, renamed = ["/".join(key) for key in self.moves.lost], self.moves.renamed
        copies = [f"{'/'.join(key)} = {'/'.join(other)}" for key, other in self.moves.copies]
        parts = [
            ("gone", lost, "photographs in the store are no longer there; `forget` gone removes them"),
            ("renamed?", renamed, "photographs in the store now have another key"),
            ("copies", copies, "photographs have the same content as another"),
        ]
        return [f"  {name:<9} {len(found)} {what}: {listing(found, 5)}" for name, found, what in parts if found]

    def _table(self) -> list[str]:
        rows = [("layer", "shape", "stored as", "per image", "cached", "to compute", "shards")]
        for part in self.layers:
            layer = part.layer
            total = len(self.existing) + len(self.new)
            rows.append((
                layer.name,
                "×".join(map(str, layer.shape)),
                layer.stored_as,
                human_bytes(layer.row_bytes),
                str(int((part.present & ~part.needed).sum())),
                str(int(part.needed.sum()) + len(self.new)),
                f"{-(-total // layer.slots)} of {layer.slots}",
            ))  # fmt: skip
        return aligned(rows)
