"""How many files a source will have, and how many bytes a layer, however its rows are stored."""

from collections.abc import Iterator, Sequence

import numpy as np

from featurestore.store.coordinates import COORDINATE_CHUNK
from featurestore.store.shards import COMPRESS, RecordFormat, index_bytes
from featurestore.store.zarr_format import DTYPES, Layer


def shard_files(n_items: int, layers: Sequence[Layer]) -> int:
    """Shards of all layers."""
    return sum(-(-n_items // layer.slots) for layer in layers)


def store_files(n_items: int, coordinates: int, layers: Sequence[Layer]) -> int:
    """Files, or objects of an object store, of a store that holds one source with that many coordinates.

    Shards; coordinates and checksums by chunks, each twice; documents.
    """
    chunks = -(-n_items // COORDINATE_CHUNK)
    documents = 3 + coordinates + 2 * len(layers)  # three: the root's, the source's, that of the checksums' group
    return shard_files(n_items, layers) + 2 * chunks * (coordinates + len(layers)) + documents


def layer_bytes(layer: Layer, n_items: int, record_bytes: float) -> int:
    """Bytes of a layer's shards with records of that mean length."""
    return round(n_items * record_bytes) + shard_files(n_items, [layer]) * index_bytes(layer.slots)


def stored_sizes(layer: Layer, rows: np.ndarray | None) -> Iterator[tuple[str, float | None]]:
    """Each way to store a layer and the mean bytes of its records, by what ``rows`` (n, elements) take; None without rows."""
    for dtype in DTYPES:
        for compress in COMPRESS:
            record = RecordFormat(np.dtype(dtype), layer.record.elements, compress)
            if compress == "none":
                yield dtype, float(record.stride)
            elif rows is None:
                yield f"{dtype} {compress}", None
            else:
                yield f"{dtype} {compress}", float(np.mean([len(record.encode(row.astype(dtype))) for row in rows]))
