"""Check every record of a store, recompute a few, and mend exactly what is damaged."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from featurestore.caching import run as cache
from featurestore.caching.extractor import load_extractor
from featurestore.caching.job import Job, Request
from featurestore.caching.plan import LayerPlan, Plan
from featurestore.checkpoints.weights import BUILT, BUILT_BY, Weights, open_weights
from featurestore.devices import PRECISIONS, choose_device, reproducible
from featurestore.errors import FeatureStoreError
from featurestore.keys import KEY
from featurestore.networks.digests import graph_digest
from featurestore.networks.registry import get_backbone, known_backbone
from featurestore.networks.shapes import layer_shapes, with_input_size
from featurestore.networks.spec import BackboneSpec
from featurestore.photos.boxes import box_of
from featurestore.photos.keys import FoundFaces
from featurestore.photos.loading import Photo, batches
from featurestore.photos.recipes import Recipe, recipe_from_dict
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rows import open_shard
from featurestore.store.shards import CRC_BYTES, DamagedShard, thread_pool
from featurestore.store.writer import free_bytes
from featurestore.store.zarr_format import Layer
from featurestore.text import listing

# max|difference| / max|expected| between two runs of the same network: batch size and machine move the last digits.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
RECOMPUTED = 4  # items, spread over the store


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong. ``row`` is -1 where a whole shard or layer is meant."""

    layer: str
    shard: int
    row: int
    item: str
    problem: str

    def __str__(self) -> str:
        where = f"layer {self.layer}" + (f", shard {self.shard}" if self.shard >= 0 else "")
        return f"{where}{', item ' + self.item if self.item else ''}: {self.problem}"


@dataclass
class Report:
    """What a check found in one source.

    ``absent`` counts rows per layer that were never cached, ``differing`` those in ``damage`` whose checksum is right but
    whose numbers are not those of a new computation.
    """

    source: str
    records: int = 0
    damage: list[Damage] = field(default_factory=list)
    absent: dict[str, int] = field(default_factory=dict)
    suspicious: list[str] = field(default_factory=list)
    recomputed: dict[str, float] = field(default_factory=dict)
    differing: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """No damage and nothing suspicious; absent rows are unfinished work, not damage."""
        return not self.damage and not self.suspicious


@dataclass(frozen=True)
class _ShardCheck:
    layer: str
    records: int
    absent: int
    damage: list[Damage]
    checksums: np.ndarray  # int64 per row, -1 where there is none


def check(source: Source, progress: Callable[[int], object] = lambda n: None) -> Report:
    """Checksum, length, NaN and infinity of every record, keys, and layers that repeat each other. Reads everything once."""
    report = Report(source.name)
    _check_keys(source, report)
    names = [f"({face!r}, {view!r})" for face, view in source.keys]
    checksums = {name: np.full(source.n_items, -1, np.int64) for name in source.layers}
    absent: dict[str, int] = defaultdict(int)
    for layer in source.layers.values():
        futures: list[tuple[int, Future[_ShardCheck]]] = [
            (shard, thread_pool().submit(_check_shard, layer, shard, names)) for shard in range(layer.n_shards)
        ]
        for shard, future in futures:
            result = future.result()
            rows = layer.shard_rows(shard)
            checksums[layer.name][rows.start : rows.stop] = result.checksums
            report.records += result.records
            report.damage += result.damage
            absent[layer.name] += result.absent
            progress(len(rows))
    report.absent = {name: count for name, count in absent.items() if count}
    spec = known_backbone(source.attributes["backbone"])
    repeats = list(_repeats(source, checksums, spec))
    if spec and spec.equal is not None:
        report.suspicious += repeats
    else:  # which of a stranger's layers are equal by construction, such as a dropout and what it is given, is not known
        report.notes += repeats
    return report


def _check_keys(source: Source, report: Report) -> None:
    keys = source.keys
    for face, view in keys[keys.duplicated()]:
        report.suspicious.append(f"key ({face!r}, {view!r}) is there twice")
    if any(not face or not view for face, view in keys):
        report.suspicious.append("an item has an empty face or view")
    hashes = source.coordinate("image_sha256") if "image_sha256" in source.items.columns else np.empty(0, object)
    unknown = int(sum(len(digest) != 64 for digest in hashes))
    if unknown:
        report.suspicious.append(
            f"{unknown} items have no photograph hash: a recompute was interrupted; run the pass again with --recompute-changed"
        )


def _check_shard(layer: Layer, shard: int, names: list[str]) -> _ShardCheck:
    rows = layer.shard_rows(shard)
    checksums = np.full(len(rows), -1, np.int64)
    damage: list[Damage] = []
    records = 0
    try:
        with open_shard(layer, shard) as opened:
            if opened is None:
                return _ShardCheck(layer.name, 0, len(rows), [], checksums)
            fd, index = opened
            with open(fd, "rb", closefd=False) as file:
                for slot in np.flatnonzero(index.present[: len(rows)]):
                    row = rows.start + int(slot)
                    file.seek(int(index.offsets[slot]))
                    record = file.read(int(index.nbytes[slot]))
                    records += 1
                    try:
                        values = layer.record.decode(record)
                        checksums[slot] = int.from_bytes(record[-CRC_BYTES:], "little")
                        bad = int((~np.isfinite(values)).sum())
                        if bad:
                            damage.append(
                                Damage(layer.name, shard, row, names[row], f"{bad} values are NaN or infinite")
                            )
                    except DamagedShard as error:
                        damage.append(Damage(layer.name, shard, row, names[row], str(error)))
            absent = int((~index.present[: len(rows)]).sum())
    except DamagedShard as error:
        problem = f"{error} ({len(rows)} items)"
        return _ShardCheck(layer.name, 0, 0, [Damage(layer.name, shard, -1, "", problem)], checksums)
    return _ShardCheck(layer.name, records, absent, damage, checksums)


def _repeats(source: Source, checksums: dict[str, np.ndarray], spec: BackboneSpec | None) -> Iterator[str]:
    """Pairs of layers with the same bytes in every row, where the network gives no reason for it.

    The mark of an in-place operation that overwrote a captured output. Equal checksums are taken for equal rows:
    a chance match of all of them is out of the question for two rows or more.
    """
    same = spec.equal if spec and spec.equal else frozenset()
    for one, other in combinations(source.layers.values(), 2):
        if (one.shape, one.dtype, one.compress) != (other.shape, other.dtype, other.compress):
            continue
        both = (checksums[one.name] >= 0) & (checksums[other.name] >= 0)
        alike = both & (checksums[one.name] == checksums[other.name])
        if both.any() and alike.sum() == both.sum() and frozenset({one.name, other.name}) not in same:
            yield (
                f"layers {one.name} and {other.name} are bit-identical in all {int(both.sum())} items: "
                "one of them was overwritten when it was captured, or holds the other's rows"
            )


def backbone_of(source: Source, trusted: str | None = None) -> BackboneSpec:
    """The network a source was made with. Code of a user's own is imported only if its name is given as ``trusted``."""
    name = source.attributes["backbone"]
    spec = known_backbone(name) or (get_backbone(name) if name == trusted else None)
    if spec is None:
        raise FeatureStoreError(
            f"{source.name} was computed by {name!r}, which is code outside of this program. To run it, if you trust it: "
            f"--backbone {name}"
        )
    recipe = recipe_of(source)
    if spec.input_size not in (None, recipe.size):
        raise FeatureStoreError(f"{source.name} says {recipe.size}-pixel inputs, {name} takes {spec.input_size}.")
    return with_input_size(spec, recipe.size)


def weights_of(source: Source, given: str | None, trusted: str | None = None) -> Weights:
    """The weights a source was made with: redrawn from their seed, or the file ``given`` if it is the same one.

    ``trusted`` names a network of the user's own that may be imported; see ``backbone_of``.
    """
    identity, name = source.attributes["weights"], source.attributes.get("weights_name", "")
    if identity.startswith("seed:") and given is None:
        given = f"random:{identity.partition(':')[2]}"
    if name.startswith(BUILT_BY) and given is None:
        given = BUILT
    if given is None:
        raise FeatureStoreError(
            f"recomputing needs the weights file {name} (sha256 {identity[:12]}…). Give it with --weights."
        )
    weights = open_weights(given, backbone_of(source, trusted))
    if weights.identity != identity:
        raise FeatureStoreError(
            f"{given} is not the weights of {source.name}: it is {weights.identity[:16]}…, "
            f"the source was made with {name}, {identity[:16]}…"
        )
    return weights


def precision_of(source: Source) -> str:
    """The precision a source was computed in."""
    precision = source.attributes["precision"]
    if precision not in PRECISIONS:
        raise FeatureStoreError(f"{source.name} was computed in {precision!r}, which this version does not know.")
    return precision


def recipe_of(source: Source) -> Recipe:
    """The recipe a source was made with."""
    stored = source.attributes["recipe"]
    recipe = recipe_from_dict(stored)
    if recipe.as_dict() != stored:
        raise FeatureStoreError(f"{source.name} was made with recipe {stored}, which this version does not have.")
    return recipe


def recompute_some(source: Source, weights: Weights, device: torch.device, report: Report, n: int = RECOMPUTED) -> None:
    """Compute ``n`` items anew and compare every layer's row; differences go into the report."""
    damaged = {(damage.layer, damage.row) for damage in report.damage}
    broken = {(damage.layer, damage.shard) for damage in report.damage if damage.row < 0}
    spec = weights.backbone
    layers = [name for name in spec.layers if name in source.layers]
    shapes = layer_shapes(spec, layers) if layers else {}
    others = [name for name, layer in source.layers.items() if shapes.get(name) != layer.shape]
    if others:
        raise FeatureStoreError(
            f"{listing(others)} of {source.name} cannot be a layer of {spec.name}, going by its shape."
        )
    rows = np.unique(np.linspace(0, source.n_items - 1, n).astype(int)) if source.n_items else np.empty(0, int)
    photos = [_photo(source, int(row)) for row in rows]
    failures: list = []
    recipe, precision = recipe_of(source), precision_of(source)
    network = load_extractor(spec, layers, weights, device, PRECISIONS[precision])
    stream = batches(
        photos,
        recipe,
        slots=max(source.n_items, 1),
        next_row=0,
        batch_size=len(photos) or 1,
        workers=2,
        skip=True,
        failures=failures,
    )
    dtypes = {name: source.layers[name].dtype for name in layers}
    with reproducible():
        for batch in stream:
            outputs = cache.compute(network, recipe, batch.pixels, device, PRECISIONS[precision], dtypes)
            outputs.wait()
            for name in layers:
                layer = source.layers[name]
                for row, expected in zip(batch.rows, outputs.rows[name].numpy(), strict=True):
                    shard = row // layer.slots
                    if (name, row) in damaged or (name, shard) in broken:
                        continue
                    stored = _stored_row(layer, row)
                    if stored is not None:
                        _compare(source, name, row, stored, expected, TOLERANCE[precision], report)
    report.notes += [f"not recomputed: {failure}" for failure in failures]


def _stored_row(layer: Layer, row: int) -> np.ndarray | None:
    shard, slot = divmod(row, layer.slots)
    with open_shard(layer, shard) as opened:
        if opened is None or not opened[1].present[slot]:
            return None
        fd, index = opened
        with open(fd, "rb", closefd=False) as file:
            file.seek(int(index.offsets[slot]))
            return layer.record.decode(file.read(int(index.nbytes[slot])))


def _compare(
    source: Source, name: str, row: int, stored: np.ndarray, expected: np.ndarray, most: float, report: Report
) -> None:
    scale = float(np.abs(expected.astype(np.float64)).max()) or 1.0
    difference = float(np.abs(stored.astype(np.float64) - expected).max()) / scale
    report.recomputed[name] = max(report.recomputed.get(name, 0.0), difference)
    if not difference <= most:
        layer = source.layers[name]
        item = f"({source.keys[row][0]!r}, {source.keys[row][1]!r})"
        problem = f"differs from a new computation by {difference:.1e} of its largest value (allowed: {most:.0e})"
        report.damage.append(Damage(name, row // layer.slots, row, item, problem))
        report.differing += 1


def _photo(source: Source, row: int) -> Photo:
    face, view = source.keys[row]
    item = source.items.iloc[row]
    box = box_of(item) if recipe_of(source).box_margin is not None else None
    return Photo(face, view, item["path"], row=row, sha256=item["image_sha256"], box=box)


def repair_plan(store: FeatureStore, source: Source, report: Report) -> Plan:
    """What ``cache.run`` has to compute to mend the damage in ``report``, and nothing else."""
    parts = []
    for layer in source.layers.values():
        needed = np.zeros(source.n_items, bool)
        for damage in report.damage:
            if damage.layer == layer.name:
                rows = layer.shard_rows(damage.shard) if damage.row < 0 else [damage.row]
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


def repair_job(store: FeatureStore, source: Source, weights: Weights, device: str) -> Job:
    """The job that made ``source``, for ``cache.run`` to carry out a repair."""
    layers = list(source.layers)
    empty = FoundFaces(source.items.reset_index().iloc[:0][[*KEY, "path"]], "the store")
    request = Request(
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
    job = Job(request, spec, layers, recipe_of(source), weights, choose_device(device), shapes, graph)
    if job.source_name != source.name:
        raise FeatureStoreError(
            f"{source.name} does not match its own attributes ({job.source_name}): they, or the network's code, were "
            f"edited. {listing(job.identity)}"
        )
    return job
