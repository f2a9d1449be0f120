"""Other libraries' random rows of a Zarr array, in a Python of their own; see the section ``peers`` of bench_cold.

    python cold_peers.py READER ARRAY N     # prints the GB/s of a batch of N rows

It imports nothing of this project, since annbatch and zarr's fused pipeline need Python 3.12, and expects an empty page cache.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zarr

PIPELINES = {
    "zarr-python, fused pipeline": "zarr.core.codec_pipeline.FusedCodecPipeline",
    "zarr-python, zarrs pipeline": "zarrs.ZarrsCodecPipeline",
}


def indexed(array: zarr.Array, n: int) -> Iterator[np.ndarray]:
    """Batches of ``n`` random rows by orthogonal indexing."""
    rows = np.random.default_rng(1).permutation(array.shape[0])
    for start in range(0, len(rows) - n, n):
        yield array.oindex[rows[start : start + n]]


def annbatch_rows(array: zarr.Array, n: int) -> Iterator[Any]:
    """Batches of ``n`` rows of a random order, as its documentation says for perfect random sampling: chunks of one row."""
    from annbatch import Loader

    loader = Loader(batch_size=n, chunk_size=1, preload_nchunks=n, shuffle=True, preload_to_gpu=False)
    return iter(loader.add_dataset(array))


READERS: dict[str, Callable[[zarr.Array, int], Iterator[Any]]] = {
    "annbatch": annbatch_rows,
    **dict.fromkeys(PIPELINES, indexed),
}


def main(reader: str, path: str, n: int) -> None:
    """Time the first batch of an array that is open."""
    if reader in PIPELINES:
        if "zarrs" in reader:
            import zarrs  # noqa: F401 (registers its pipeline)
        zarr.config.set({"codec_pipeline.path": PIPELINES[reader]})
    array = zarr.open_array(path, mode="r")
    found = READERS[reader](array, n)
    start = time.perf_counter()
    next(found)
    seconds = time.perf_counter() - start
    print(n * array.dtype.itemsize * int(np.prod(array.shape[1:])) / seconds / 1e9)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
