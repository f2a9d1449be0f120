"""Rows that no store holds: computed for a run, from photographs or from other rows, into a temporary file of its folder."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from featurestore.caching.compute import compute, refuse_non_finite
from featurestore.caching.extractor import load_extractor
from featurestore.caching.provenance import photo_of, precision_of, recipe_of
from featurestore.checkpoints.weights import Weights
from featurestore.devices import PRECISIONS, reproducible
from featurestore.errors import FeatureStoreError
from featurestore.keys import FLIPPED
from featurestore.photos.files import is_there
from featurestore.photos.loading import Failure, Photo, batches
from featurestore.store.reader import Source
from featurestore.store.zarr_format import Layer
from featurestore.text import human_bytes
from heads.finetuning import INPUT

_BATCH = 16  # photographs at a time
_FLOAT32 = np.dtype(np.float32)
Done = Callable[[int], None]  # so many more photographs are done


@dataclass(frozen=True)
class Record:
    """What one item takes in the file, and how a row is made of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    to_rows: Callable[[torch.Tensor], torch.Tensor] = lambda stored: stored

    @property
    def bytes(self) -> int:
        """Of one item."""
        return math.prod(self.shape) * self.dtype.itemsize


class ComputedRows:
    """float32 rows of one layer for some ``items`` of a source, in a file without a name, gone when nobody holds it.

    What ``Features`` takes in the place of a store's ``Rows``. FeatureStoreError if the disk is full.
    """

    dtype = torch.float32

    def __init__(
        self, layer: Layer, items: np.ndarray, record: Record, parts: Iterable[np.ndarray], folder: Path
    ) -> None:
        self.layer = layer
        self._record = record
        self._places = np.full(layer.n_items, -1, np.int64)
        self._places[items] = np.arange(len(items))
        free = shutil.disk_usage(folder).free
        if len(items) * record.bytes > free:
            raise _full(folder, f"{human_bytes(len(items) * record.bytes)} are needed, {human_bytes(free)} are free")
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                for part in parts:
                    file.write(np.ascontiguousarray(part, record.dtype).data)
                file.flush()
            except OSError as error:
                raise _full(folder, error.strerror or error) from None
            shape = len(items), *record.shape
            self._kept = np.memmap(file, record.dtype, "r", shape=shape) if len(items) else np.empty(shape)

    def __len__(self) -> int:
        return self.layer.n_items

    def prefetch(self, indices: torch.Tensor) -> None:
        """Nothing: the file was written a moment ago, and is in memory if it fits."""

    def gather(self, indices: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of ``indices`` (int64), float32 (n, *shape), into ``out`` if given. FeatureStoreError for other items."""
        places = self._places[np.asarray(indices)]
        if (places < 0).any():
            raise FeatureStoreError(f"{int((places < 0).sum())} items of layer {self.layer.name!r} were not computed.")
        rows = self._record.to_rows(torch.from_numpy(np.asarray(self._kept[places])))
        return rows if out is None else out.copy_(rows)


def _full(folder: Path, reason: object) -> FeatureStoreError:
    return FeatureStoreError(
        f"the rows that are fine-tuned from do not fit into {folder}: {reason}. Free some space, write the runs to another disk "
        "(`out`), or cache that layer."
    )


def record_of(source: Source, layer: str, shape: tuple[int, ...]) -> Record:
    """A row of ``layer``, or for ``input`` the recipe's pixels."""
    if layer != INPUT:
        return Record(shape, _FLOAT32)
    recipe = recipe_of(source)
    return Record((recipe.size, recipe.size, 3), np.dtype(np.uint8), recipe.normalise)


def rows_of_photographs(
    source: Source,
    layer: str,
    shape: tuple[int, ...],
    weights: Weights,
    items: np.ndarray,
    folder: Path,
    device: torch.device,
    mirrored: bool,
    done: Done,
) -> ComputedRows:
    """Rows of ``layer`` (or ``input``) of ``items``, by the network and recipe that made the source; ``mirrored`` or as they are.

    Each photograph is read once and must be the one that was cached. FeatureStoreError, with its path, if it is not, or is gone.
    """
    record = record_of(source, layer, shape)
    described = Layer(layer, shape, _FLOAT32, "none", 1, source.n_items, source.folder / layer)
    made = _computed(source, layer, weights, items, device, mirrored, done)
    with reproducible():
        return ComputedRows(described, items, record, made, folder)


def _computed(
    source: Source, layer: str, weights: Weights, items: np.ndarray, device: torch.device, mirrored: bool, done: Done
) -> Iterator[np.ndarray]:
    recipe, dtype = recipe_of(source), PRECISIONS[precision_of(source)]
    network = None if layer == INPUT else load_extractor(weights.backbone, [layer], weights, device, dtype)
    stream = batches(
        list(_photos(source, items, mirrored)),
        recipe,
        slots=max(source.n_items, 1),
        next_row=0,
        batch_size=_BATCH,
        workers=min(4, os.cpu_count() or 1),
        skip=False,
    )
    for batch in stream:
        if isinstance(batch, Failure):
            raise FeatureStoreError(
                f"{batch}. Fine-tuning from {layer} needs the photographs as they were when {source.name} was cached: "
                f"put it back, or fine-tune from a layer that is cached, {', '.join(source.layers)}."
            )
        if network is None:
            yield batch.pixels.numpy()
        else:
            outputs = compute(network, recipe, batch.pixels, device, dtype, {layer: _FLOAT32})
            outputs.wait()
            refuse_non_finite(batch, outputs)
            yield outputs.rows[layer].numpy()
        done(len(batch.rows))


def _photos(source: Source, items: np.ndarray, mirrored: bool) -> Iterator[Photo]:
    for number, item in enumerate(items):
        photo = replace(photo_of(source, int(item)), row=number)
        if mirrored:
            view = photo.view
            view = view.removesuffix(FLIPPED) if view.endswith(FLIPPED) else view + FLIPPED
            photo = replace(photo, view=view)
        yield photo


def absent_photographs(source: Source, items: np.ndarray) -> list[str]:
    """Paths of ``items`` where there is no file."""
    return [path for path in source.items["path"].iloc[items] if not is_there(path)]
