"""A layer as a lazy Dask array, a source as an xarray dataset."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from dask.base import tokenize

from featurestore.errors import FeatureStoreError
from featurestore.files import OpenFolder
from featurestore.store.rows import read_shard
from featurestore.store.zarr_format import Layer

BLOCK_BYTES = 1 << 26  # small shards are read together up to this, so that tasks outweigh their scheduling


def dask_array(layer: Layer, opened: OpenFolder) -> da.Array:
    """(item, *shape): blocks are whole shards, mapped from the file rather than read; absent rows are NaN.

    ``opened`` is the source's folder. Blocks that are computed after it was rewritten raise FeatureStoreError.
    """
    layer = replace(layer, folder=layer.folder.resolve())  # a worker may have another current directory
    per_block = max(1, BLOCK_BYTES // max(1, layer.slots * layer.row_bytes))
    block_items = per_block * layer.slots
    items = tuple(min(block_items, layer.n_items - first) for first in range(0, layer.n_items, block_items)) or (0,)
    files = [path.stat() for path in map(layer.shard_path, range(layer.n_shards)) if path.exists()]
    written = [(file.st_mtime_ns, file.st_ino, file.st_size) for file in files]  # other rows have another name
    array: da.Array = da.map_blocks(
        _read_block,
        layer=layer,
        opened=opened,
        per_block=per_block,
        chunks=(items, *((size,) for size in layer.shape)),
        dtype=layer.dtype,
        meta=np.empty((0,) * (1 + len(layer.shape)), layer.dtype),
        name=f"{layer.name}-{tokenize(layer, written)}",
    )
    return array


def _read_block(layer: Layer, opened: OpenFolder, per_block: int, block_id: tuple[int, ...] = (0,)) -> np.ndarray:
    first = block_id[0] * per_block
    with opened.unchanged():
        shards = [read_shard(layer, shard) for shard in range(first, min(first + per_block, layer.n_shards))]
    if not layer.folder.is_dir():
        raise FeatureStoreError(
            f"layer {layer.name!r} was removed since {layer.folder.parent} was opened: open it again."
        )
    if not shards:
        return np.empty((0, *layer.shape), layer.dtype)
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def dataset(
    items: pd.DataFrame, layers: Mapping[str, Layer], attributes: Mapping[str, Any], opened: OpenFolder
) -> xr.Dataset:
    """What ``xarray.open_zarr`` gives, with blocks mapped from the files. Dimension names carry sizes: ``channel_512``."""
    flat = items.reset_index()
    coordinates = {str(name): ("item", flat[name].to_numpy()) for name in flat.columns}
    variables = {
        name: (layer.metadata()["dimension_names"], dask_array(layer, opened)) for name, layer in layers.items()
    }
    return xr.Dataset(variables, coords=coordinates, attrs=dict(attributes))
