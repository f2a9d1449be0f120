"""A layer as a lazy Dask array, a source as an xarray dataset."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from dask.base import tokenize
from dask.system import CPU_COUNT

from featurestore.errors import FeatureStoreError
from featurestore.files import OpenFolder
from featurestore.remote.mirror import mirror_of
from featurestore.store.rows import noted_rows, read_shard
from featurestore.store.zarr_format import Layer

BLOCK_BYTES = 1 << 26  # small shards are read together up to this, so that tasks outweigh their scheduling


def dask_array(layer: Layer, opened: OpenFolder) -> da.Array:
    """(item, *shape): blocks are whole shards, mapped from the file rather than read; absent rows are NaN.

    ``opened`` is the source's folder. Blocks that are computed after it was rewritten raise FeatureStoreError.
    """
    layer = replace(layer, folder=layer.folder.absolute())  # a worker may have another current directory
    blocks = block_bounds(layer.n_items, layer.slots, layer.row_bytes)
    items = tuple(stop - start for start, stop in blocks) or (0,)
    if mirror_of(layer.folder) is not None:
        written: Any = noted_rows(layer)
    else:
        files = [path.stat() for path in map(layer.shard_path, range(layer.n_shards)) if path.exists()]
        written = [(file.st_mtime_ns, file.st_ino, file.st_size) for file in files]
    array: da.Array = da.map_blocks(
        _read_block,
        layer=layer,
        opened=opened,
        blocks=blocks,
        chunks=(items, *((size,) for size in layer.shape)),
        dtype=layer.dtype,
        meta=np.empty((0,) * (1 + len(layer.shape)), layer.dtype),
        name=f"{layer.name}-{tokenize(layer, written)}",  # other rows have another name
    )
    return array


def block_bounds(n_items: int, slots: int, row_bytes: int) -> list[tuple[int, int]]:
    """First and last (exclusive) item of each block: whole shards up to ``BLOCK_BYTES``, but as many blocks as there are cores.

    A shard that is larger than that is divided.
    """
    most = max(1, min(BLOCK_BYTES // max(1, row_bytes), -(-n_items // CPU_COUNT)))
    if most >= slots:
        most -= most % slots
        starts = list(range(0, n_items, most))
    else:
        starts = [
            start for shard in range(0, n_items, slots) for start in range(shard, min(shard + slots, n_items), most)
        ]
    return [(start, stop) for start, stop in pairwise([*starts, n_items])]


def _read_block(
    layer: Layer, opened: OpenFolder, blocks: list[tuple[int, int]], block_id: tuple[int, ...] = (0,)
) -> np.ndarray:
    start, stop = blocks[block_id[0]] if blocks else (0, 0)
    with opened.unchanged():
        shards = [
            read_shard(layer, shard, slice(max(start - shard * layer.slots, 0), stop - shard * layer.slots))
            for shard in range(start // layer.slots, -(-stop // layer.slots))
        ]
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
    """What ``xarray.open_zarr`` gives, with blocks mapped from the files, and ``item`` indexed by face_id and view.

    Dimension names carry sizes: ``channel_512``.
    """
    keys = xr.Coordinates.from_pandas_multiindex(items.index, "item")
    columns = {str(name): ("item", items[name].to_numpy()) for name in items.columns}
    variables = {
        name: (layer.metadata()["dimension_names"], dask_array(layer, opened)) for name, layer in layers.items()
    }
    return xr.Dataset(variables, coords=keys.assign(columns), attrs=dict(attributes))
