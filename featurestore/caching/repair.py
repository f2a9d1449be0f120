"""Exactly what is damaged, computed again: the plan and the job for ``run.cache_layers``."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featurestore.caching.job import CachingJob, CachingRequest
from featurestore.caching.plan import LayerPlan, Plan
from featurestore.caching.provenance import precision_of, recipe_of
from featurestore.caching.verify import Damage
from featurestore.checkpoints.weights import Weights
from featurestore.devices import choose_device
from featurestore.errors import FeatureStoreError
from featurestore.keys import KEY
from featurestore.networks.digests import graph_digest
from featurestore.photos.keys import FoundFaces
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.writer import free_bytes
from featurestore.text import listing


def repair_plan(store: FeatureStore, source: Source, damage: Sequence[Damage]) -> Plan:
    """What has to be computed to repair ``damage``, and nothing else."""
    parts = []
    for layer in source.layers.values():
        needed = np.zeros(source.n_items, bool)
        for found in damage:
            if found.layer == layer.name:
                rows = layer.shard_rows(found.shard) if found.row < 0 else [found.row]
                needed[list(rows)] = True
        if needed.any():
            parts.append(LayerPlan(layer, False, np.ones(source.n_items, bool), needed))
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
        free=free_bytes(store.path),
    )


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
