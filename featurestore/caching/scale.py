"""What the store of a plan will take, where it is only planned: bytes however rows are stored, files, requests, many workers."""

from collections.abc import Mapping

import numpy as np

from featurestore.caching.estimate import Estimate
from featurestore.caching.plan import Plan
from featurestore.keys import KEY
from featurestore.store.sizes import layer_bytes, shard_files, store_files, stored_sizes
from featurestore.store.zarr_format import DTYPES
from featurestore.text import aligned, human_bytes, human_duration

_WORKERS = (2, 8, 32, 128)


def planned_files(plan: Plan) -> int:
    """Files of a store that holds this source alone, once the plan has been carried out."""
    coordinates = {*plan.existing.columns, *plan.new.columns, *KEY, "path", "image_sha256"}
    return store_files(len(plan.existing) + len(plan.new), len(coordinates), [part.layer for part in plan.layers])


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
    layers = [part.layer for part in plan.layers]
    shards, files = shard_files(n_items, layers), planned_files(plan)
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
