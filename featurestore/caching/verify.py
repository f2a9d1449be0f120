"""Every record of a source checked against its checksum, and a few rows computed again."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch

from featurestore.caching.compute import compute
from featurestore.caching.extractor import load_extractor
from featurestore.caching.provenance import photo_of, precision_of, recipe_of
from featurestore.checkpoints.weights import Weights
from featurestore.cluster import Calls
from featurestore.devices import PRECISIONS, reproducible
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import known_backbone
from featurestore.networks.shapes import layer_shapes
from featurestore.networks.spec import BackboneSpec
from featurestore.photos.loading import Failure, batches
from featurestore.store.checksums import NOT_ITS_OWN
from featurestore.store.reader import Source
from featurestore.store.rows import noted_rows, open_shard, stored_row
from featurestore.store.shards import DamagedShard, ShardIndex, read_record, thread_pool
from featurestore.store.zarr_format import Layer
from featurestore.text import listing

# max|difference| / max|expected| between two runs of the same network: batch size and machine move the last digits.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
RECOMPUTED = 4  # items, spread over the store
_MANY = 3  # items of a shard that get a line each


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


def described(damage: Iterable[Damage]) -> list[str]:
    """A line for each, or one for those of a shard that have the same thing wrong, if they are many."""
    groups: dict[tuple[str, int, str], list[Damage]] = {}
    for found in damage:
        groups.setdefault((found.layer, found.shard, found.problem), []).append(found)
    lines = []
    for (layer, shard, problem), alike in groups.items():
        if len(alike) > _MANY:
            lines.append(
                f"layer {layer}, shard {shard}, {len(alike)} items, {listing((each.item for each in alike), 2)}: {problem}"
            )
        else:
            lines += map(str, alike)
    return lines


@dataclass(frozen=True)
class StoreReport:
    """What a check found in one source.

    ``absent`` counts rows per layer that were never cached. ``suspicious`` is what cannot be right although every checksum
    is, ``notes`` what may be.
    """

    source: str
    records: int
    damage: tuple[Damage, ...]
    absent: dict[str, int]
    suspicious: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """No damage and nothing suspicious; absent rows are unfinished work, not damage."""
        return not self.damage and not self.suspicious


@dataclass(frozen=True)
class Recomputation:
    """Rows computed again beside those that are stored.

    ``difference`` is the largest one per layer, as a share of the row's largest value; ``damage`` the rows that differ by
    more than rounding although their checksums are right; ``failures`` the photographs that could not be computed.
    """

    difference: dict[str, float] = field(default_factory=dict)
    damage: tuple[Damage, ...] = ()
    failures: tuple[Failure, ...] = ()


def _in_threads(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    return thread_pool().map(lambda task: function(*task), tasks)


@dataclass(frozen=True)
class _ShardCheck:
    records: int
    absent: int
    damage: list[Damage]
    checksums: np.ndarray  # int64 per row, -1 where there is none


def check_source(
    source: Source, progress: Callable[[int], object] = lambda n: None, calls: Calls = _in_threads
) -> StoreReport:
    """Every byte of every shard, NaN and infinity, keys, and layers that repeat each other. Reads everything once.

    ``calls`` checks shards: in threads, or as tasks of a cluster. A record has to be whole and the one that is noted of its item;
    what lies between records has to be zero.
    """
    names = [f"({face!r}, {view!r})" for face, view in source.keys]
    checksums: dict[str, np.ndarray] = {}
    records, damage, absent = 0, [], {}
    for name, layer in source.layers.items():
        checks = []
        try:
            noted = noted_rows(layer)
        except DamagedShard as error:
            damage.append(Damage(name, -1, -1, "", str(error)))
            checksums[name] = np.full(layer.n_items, -1, np.int64)
            progress(layer.n_items)
            continue
        rows = [slice(each.start, each.stop) for each in map(layer.shard_rows, range(layer.n_shards))]
        tasks = [(layer, shard, names[each], None if noted is None else noted[each]) for shard, each in enumerate(rows)]
        for check in calls(_check_shard, tasks):
            checks.append(check)
            progress(len(check.checksums))
        checksums[name] = np.concatenate([check.checksums for check in checks]) if checks else np.empty(0, np.int64)
        records += sum(check.records for check in checks)
        damage += [found for check in checks for found in check.damage]
        missing = sum(check.absent for check in checks)
        if missing:
            absent[name] = missing
    spec = known_backbone(source.attributes["backbone"])
    repeats = tuple(_repeats(source, checksums, spec))
    # Which layers of a user's own network are equal by construction, such as a dropout and its input, is not known.
    known = spec is not None and spec.equal is not None
    suspicious = (*_suspicious_keys(source), *(repeats if known else ()))
    notes = (*(() if known else repeats), *_copies(source), *_unbound(source))
    return StoreReport(source.name, records, tuple(damage), absent, suspicious, notes)


def _suspicious_keys(source: Source) -> Iterator[str]:
    keys = source.keys
    for face, view in keys[keys.duplicated()]:
        yield f"key ({face!r}, {view!r}) is there twice"
    if any(not face or not view for face, view in keys):
        yield "an item has an empty face or view"
    hashes = source.coordinate("image_sha256") if "image_sha256" in source.items.columns else np.empty(0, object)
    unknown = int(sum(len(digest) != 64 for digest in hashes))
    if unknown and "imported" not in source.attributes:  # whose photographs were never seen
        yield (
            f"{unknown} items have no photograph hash: a recompute was interrupted; run pipelines/cache_layers.py "
            "again with --recompute-changed"
        )


def _unbound(source: Source) -> Iterator[str]:
    if source.version == 1:
        yield (
            "format version 1 does not say whose row stands where, so that was not checked; upgrade it: "
            f"pipelines/upgrade_store.py {source.folder.parent}"
        )


def _copies(source: Source) -> Iterator[str]:
    copies = np.flatnonzero(source.originals != np.arange(source.n_items))
    if len(copies):
        pairs = [f"{'/'.join(source.keys[row])} = {'/'.join(source.keys[source.originals[row]])}" for row in copies[:5]]
        more = f" and {len(copies) - len(pairs)} more" if len(copies) > len(pairs) else ""
        yield f"{len(copies)} items have the same photograph as another: {', '.join(pairs)}{more}"


def _check_shard(layer: Layer, shard: int, names: list[str], noted: np.ndarray | None) -> _ShardCheck:
    """``names`` and ``noted`` checksums are those of the shard's rows."""
    rows = layer.shard_rows(shard)
    checksums = np.full(len(rows), -1, np.int64)
    damage: list[Damage] = []
    records = 0
    try:
        with open_shard(layer, shard) as opened:
            present = opened[1].present[: len(rows)] if opened else np.zeros(len(rows), bool)
            cached = present if noted is None else noted >= 0
            for slot in np.flatnonzero(cached & ~present).tolist():
                damage.append(
                    Damage(layer.name, shard, rows.start + slot, names[slot], "the row was cached and is gone")
                )
            for slot in np.flatnonzero(cached & present).tolist():
                assert opened
                row = rows.start + slot
                records += 1
                try:
                    record = read_record(*opened, slot)
                    values = layer.record.decode(record)
                    checksums[slot] = layer.record.checksum(record)
                    if noted is not None and checksums[slot] != noted[slot]:
                        raise DamagedShard(NOT_ITS_OWN)
                    bad = int((~np.isfinite(values)).sum())
                    if bad:
                        damage.append(Damage(layer.name, shard, row, names[slot], f"{bad} values are NaN or infinite"))
                except DamagedShard as error:
                    damage.append(Damage(layer.name, shard, row, names[slot], str(error)))
            if opened and _filled_gap(layer, *opened):
                damage.append(Damage(layer.name, shard, -1, "", "bytes between its records are not zero"))
            absent = int((~cached).sum())
    except DamagedShard as error:
        problem = f"{error} ({len(rows)} items)"
        return _ShardCheck(0, 0, [Damage(layer.name, shard, -1, "", problem)], checksums)
    return _ShardCheck(records, absent, damage, checksums)


def _filled_gap(layer: Layer, fd: int, index: ShardIndex) -> bool:
    """Whether anything but zeros lies where a shard has no record: before the next one, and in empty slots."""
    record = layer.record
    if record.alignment == 1 or record.compress != "none":
        return False
    for slot in range(int(np.flatnonzero(index.present).max(initial=-1)) + 1):
        start = record.nbytes if index.present[slot] else 0
        if any(os.pread(fd, record.stride - start, slot * record.stride + start)):
            return True
    return False


def _repeats(source: Source, checksums: dict[str, np.ndarray], spec: BackboneSpec | None) -> Iterator[str]:
    """Pairs of layers with the same bytes in every row, where the network gives no reason for it.

    The sign of an in-place operation that overwrote a captured output. Equal checksums are taken for equal rows:
    a chance match of all of them is out of the question for two rows or more.
    """
    equal = spec.equal if spec and spec.equal else frozenset()
    for one, other in combinations(source.layers.values(), 2):
        if (one.shape, one.dtype, one.compress) != (other.shape, other.dtype, other.compress):
            continue
        both = (checksums[one.name] >= 0) & (checksums[other.name] >= 0)
        alike = both & (checksums[one.name] == checksums[other.name])
        if both.any() and alike.sum() == both.sum() and frozenset({one.name, other.name}) not in equal:
            yield (
                f"layers {one.name} and {other.name} are bit-identical in all {int(both.sum())} items: "
                "one of them was overwritten when it was captured, or holds the other's rows"
            )


def recompute_some(
    source: Source, weights: Weights, device: torch.device, report: StoreReport, n: int = RECOMPUTED
) -> Recomputation:
    """Compute ``n`` items again, spread over the source, and compare every layer's row that ``report`` does not call damaged.

    FeatureStoreError for layers that the network cannot have.
    """
    spec = weights.backbone
    layers = _layers_of(source, spec)
    rows = np.unique(np.linspace(0, source.n_items - 1, n).astype(int)) if source.n_items else np.empty(0, int)
    recipe, precision = recipe_of(source), precision_of(source)
    network = load_extractor(spec, layers, weights, device, PRECISIONS[precision])
    stream = batches(
        [photo_of(source, int(row)) for row in rows],
        recipe,
        slots=max(source.n_items, 1),
        next_row=0,
        batch_size=len(rows) or 1,
        workers=2,
        skip=True,
    )
    dtypes = {name: source.layers[name].dtype for name in layers}
    known = {(found.layer, found.row) for found in report.damage}
    broken = {(found.layer, found.shard) for found in report.damage if found.row < 0}
    largest: dict[str, float] = {}
    damage, failures = [], []
    with reproducible():
        for batch in stream:
            if isinstance(batch, Failure):
                failures.append(batch)
                continue
            outputs = compute(network, recipe, batch.pixels, device, PRECISIONS[precision], dtypes)
            outputs.wait()
            for name in layers:
                for row, expected in zip(batch.rows, outputs.rows[name].numpy(), strict=True):
                    shard = row // source.layers[name].slots
                    stored = None
                    if (name, row) not in known and (name, shard) not in broken:
                        stored = stored_row(source.layers[name], row)
                    if stored is None:
                        continue
                    off = difference(stored, expected)
                    largest[name] = max(largest.get(name, 0.0), off)
                    if not off <= TOLERANCE[precision]:
                        damage.append(_differs(source, name, row, off, TOLERANCE[precision]))
    return Recomputation(largest, tuple(damage), tuple(failures))


def _layers_of(source: Source, spec: BackboneSpec) -> list[str]:
    layers = [name for name in spec.layers if name in source.layers]
    shapes = layer_shapes(spec, layers) if layers else {}
    others = [name for name, layer in source.layers.items() if shapes.get(name) != layer.shape]
    if others:
        raise FeatureStoreError(
            f"{listing(others)} of {source.name} cannot be a layer of {spec.name}, going by its shape."
        )
    return layers


def difference(stored: np.ndarray, expected: np.ndarray) -> float:
    """The largest one between two rows, as a share of the largest value expected; NaN if either holds NaN."""
    scale = float(np.abs(expected.astype(np.float64)).max()) or 1.0
    return float(np.abs(stored.astype(np.float64) - expected).max()) / scale


def _differs(source: Source, name: str, row: int, difference: float, most: float) -> Damage:
    item = f"({source.keys[row][0]!r}, {source.keys[row][1]!r})"
    problem = f"differs from a new computation by {difference:.1e} of its largest value (allowed: {most:.0e})"
    return Damage(name, row // source.layers[name].slots, row, item, problem)
