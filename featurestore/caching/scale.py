"""What the store of a plan will take, where it is only planned: bytes however rows are stored, files, requests, many workers."""

from collections.abc import Iterator, Mapping

import numpy as np

from featurestore.caching.estimate import Estimate
from featurestore.caching.plan import Plan
from featurestore.keys import KEY
from featurestore.store.coordinates import COORDINATE_CHUNK
from featurestore.store.shards import COMPRESS, RecordFormat, index_bytes
from featurestore.store.zarr_format import DTYPES, Layer
from featurestore.text import aligned, human_bytes, human_duration

_WORKERS = (2, 8, 32, 128)


def store_files(plan: Plan) -> int:
    """Files, or objects of an object store, of a store that holds this source alone once the plan has been carried out.

    A shard for each layer and as many items as one takes; coordinates and checksums by chunks, each twice; documents.
    """
    n_items = len(plan.existing) + len(plan.new)
    columns = len({*plan.existing.columns, *plan.new.columns, *KEY, "path", "image_sha256"})
    layers = len(plan.layers)
    chunks = -(-n_items // COORDINATE_CHUNK)
    documents = (
        2 + columns + 1 + 2 * layers
    )  # the root's, the source's, of coordinates, of the checksums' group, of layers
    return sum(-(-n_items // part.layer.slots) for part in plan.layers) + 2 * chunks * (columns + layers) + documents


def layer_bytes(layer: Layer, n_items: int, record_bytes: float) -> int:
    """Bytes of a layer's shards with records of that mean length."""
    return round(n_items * record_bytes) + -(-n_items // layer.slots) * index_bytes(layer.slots)


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


def scale_lines(plan: Plan, timed: Estimate | None) -> list[str]:
    """Lines of a plan that is not run: a table of bytes by layer and storage, files and requests, hours of many workers."""
    n_items = len(plan.existing) + len(plan.new)
    rows: Mapping[str, np.ndarray] = timed.rows if timed else {}
    sizes = {part.layer.name: dict(stored_sizes(part.layer, rows.get(part.layer.name))) for part in plan.layers}
    names = [name for name in next(iter(sizes.values())) if any(each[name] is not None for each in sizes.values())]
    table = [("bytes of all items", *names)]
    for part in plan.layers:
        found = [sizes[part.layer.name][name] for name in names]
        table.append((
            part.layer.name,
            *("" if each is None else human_bytes(layer_bytes(part.layer, n_items, each)) for each in found),
        ))  # fmt: skip
    shards = sum(-(-n_items // part.layer.slots) for part in plan.layers)
    files = store_files(plan)
    lines = [*aligned(table), ""]
    if len(names) > len(DTYPES):
        what = "rendered faces" if timed and timed.rendered else "the first photographs"
        lines.append(f"  {'':<9} compressed sizes are those of {len(next(iter(rows.values())))} of {what}")
    lines += [
        f"  {'files':<9} {files:,} (of an object store: objects), {shards:,} of them shards of {_shard_sizes(plan)}",
        f"  {'requests':<9} to write {files:,} or more (PUT, class A); to read every row once {shards:,} through `cache`, "
        f"up to {n_items * len(plan.layers):,} by ranges (GET, class B)",
    ]
    if timed:
        hours = ", ".join(f"{n}: {human_duration(timed.images / timed.rate / n)}" for n in _WORKERS)
        busiest = human_bytes(timed.writing * _WORKERS[-1])
        lines.append(
            f"  {'workers':<9} as fast as this machine, {hours}; {_WORKERS[-1]} write {busiest}/s, if the store takes it"
        )
    return lines


def _shard_sizes(plan: Plan) -> str:
    sizes = {human_bytes(part.layer.record.largest_shard(part.layer.slots)) for part in plan.layers}
    return " and ".join(sorted(sizes))
