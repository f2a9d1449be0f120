"""What is damaged put right: records that are whole are kept, exactly the others are computed again."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from featurestore.caching.job import CachingJob, CachingRequest
from featurestore.caching.plan import LayerPlan, Plan
from featurestore.caching.provenance import precision_of, recipe_of
from featurestore.caching.verify import Damage
from featurestore.checkpoints.weights import Weights
from featurestore.devices import choose_device
from featurestore.errors import FeatureStoreError
from featurestore.files import remove_file
from featurestore.keys import KEY
from featurestore.networks.digests import graph_digest
from featurestore.photos.keys import FoundFaces
from featurestore.remote.mirror import mirror_of
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rows import noted_rows, whole_records
from featurestore.store.shards import ShardWriter
from featurestore.store.writer import SourceWriter, free_bytes
from featurestore.text import listing

_LARGEST_BATCH = 4096  # that a source's document is believed


def keep_intact(store: FeatureStore, source: Source, damage: Sequence[Damage]) -> dict[str, np.ndarray]:
    """Write shards damaged as a whole anew, under ``store_lock``, from those of their records that are noted of their rows.

    Returns bool per item of each layer: the rows that are lost, which have to be computed again.
    """
    writer = SourceWriter(store.path, source.name, {})
    lost = {}
    for name in dict.fromkeys(found.layer for found in damage):
        layer, here = source.layers[name], [found for found in damage if found.layer == name]
        lost[name] = np.zeros(source.n_items, bool)
        lost[name][[found.row for found in here if found.row >= 0]] = True
        noted = noted_rows(layer)
        assert noted is not None  # writers refuse format version 1
        for shard in sorted({found.shard for found in here if found.row < 0 <= found.shard}):
            rows = layer.shard_rows(shard)
            gone = noted[rows.start : rows.stop] >= 0
            new: ShardWriter | None = None
            for row, record in whole_records(layer, shard):
                if layer.record.checksum(record) != noted[row]:
                    continue
                new = new or writer.open_shard(name, shard, end=len(rows))
                new.write_record(row - rows.start, record)
                gone[row - rows.start] = False
            if new:
                new.commit()
            elif not gone.any():  # a damaged file that no row is noted of
                remove_file(writer.layers[name].shard_path(shard))
            lost[name][rows.start : rows.stop] |= gone
    writer.publish()
    return lost


def repair_plan(store: FeatureStore, source: Source, lost: Mapping[str, np.ndarray]) -> Plan:
    """What has to be computed to bring back the rows that are ``lost`` (bool per item, by layer), and nothing else.

    The last digits of a row can depend on how many others are in its batch, so whole batches are computed, as the pass had them.
    """
    parts = [
        LayerPlan(source.layers[name], False, np.ones(source.n_items, bool), rows)
        for name, rows in lost.items()
        if rows.any()
    ]
    table = source.items.reset_index()
    return Plan(
        store=store.path,
        source=source.name,
        about=(("store", str(store.path)), ("source", source.name)),
        layers=tuple(parts),
        existing=table,
        new=table.iloc[:0],
        table_changed=False,
        changed=(),
        recompute=np.zeros(source.n_items, bool),
        beside=_in_batches_of(source, lost),
        free=None if mirror_of(store.path) else free_bytes(store.path),
    )


def _in_batches_of(source: Source, lost: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool per item: those that were in one batch with a lost row of theirs. Batches begin anew with each shard."""
    slots = next((layer.slots for layer in source.layers.values()), 1)
    size = min(_batch_size(source) or 1, slots)
    rows = np.arange(source.n_items)
    batch = rows // slots * slots + rows % slots // size
    needed = np.logical_or.reduce([np.zeros(source.n_items, bool), *lost.values()])
    return np.isin(batch, batch[needed])


def _batch_size(source: Source) -> int | None:
    """Images that went through the network at once, as far as the source says so."""
    said = source.attributes.get("batch_size")
    return said if isinstance(said, int) and 0 < said <= _LARGEST_BATCH else None


def repair_job(store: FeatureStore, source: Source, weights: Weights, device: str) -> CachingJob:
    """The job that made ``source``, to carry out a repair."""
    layers = list(source.layers)
    empty = FoundFaces(source.items.reset_index().iloc[:0][[*KEY, "path"]], "the store")
    request = CachingRequest(
        store=Path(store.path),
        faces=empty,
        layers=layers,
        weights=weights.name,
        backbone=source.attributes["backbone"],
        recipe=source.attributes["recipe"]["name"],
        device=device,
        precision=precision_of(source),
        batch_size=_batch_size(source),
        on_error="skip",
    )
    spec = weights.backbone
    shapes = {name: source.layers[name].shape for name in layers}
    graph = graph_digest(spec) if spec.imported else ""
    job = CachingJob(request, spec, layers, recipe_of(source), weights, choose_device(device), shapes, graph)
    if job.source_name != source.name:
        raise FeatureStoreError(
            f"{source.name} does not match its own attributes ({job.source_name}): they, or the network's code, were "
            f"edited. {listing(job.identity)}"
        )
    return job
