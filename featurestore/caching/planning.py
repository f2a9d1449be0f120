"""A request held against the store: what is cached, what is missing, what changed, and what it will cost."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore.caching.job import CachingJob, CachingRequest
from featurestore.caching.plan import CountPhotographs, LayerPlan, Plan
from featurestore.caching.renamed import Moves, find_moves
from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, FLIPPED, KEY, LANDMARKS
from featurestore.photos.decode import MOST_PIXELS, decode
from featurestore.photos.files import read_photograph, sha256_of_photograph
from featurestore.photos.loading import Failure, Photo
from featurestore.remote.mirror import mirror_of
from featurestore.store.mirrored import fetched
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rows import present_rows
from featurestore.store.shards import DamagedShard, thread_pool
from featurestore.store.writer import free_bytes, refuse_old_version, refuse_other_folder
from featurestore.store.zarr_format import CHECKSUMS, DTYPES, METADATA, Layer
from featurestore.text import listing
from featurestore.versions import library_versions

ITEMS_PER_SHARD = 256


def make_plan(job: CachingJob, progress: CountPhotographs = lambda n: None) -> Plan:
    """Compare the request with the store: what is cached, what is missing, what changed, what it will cost.

    If the source holds items, all photographs are hashed, to notice changed and renamed ones; ``progress`` counts them.
    """
    request = job.request
    ours = [*KEY, "path", "image_sha256", "item", CHECKSUMS, *BOX, *LANDMARKS]
    theirs = [name for name in request.faces.table.columns if name not in ours]
    clash = [name for name in theirs if name in job.spec.layers] + [name for name in ours if name in job.layers]
    if clash:
        raise FeatureStoreError(
            f"{clash[0]!r} is the name of a column of the photographs' table and of a layer of {job.spec.name}. "
            "Rename the column of the CSV, or the module of the network."
        )
    source = _existing_source(request.store, job.source_name)
    if source:
        source.require_unique_keys()
    found = request.faces.table
    old = source.items.reset_index() if source else pd.DataFrame(columns=[*KEY, "path", "image_sha256"])
    known = pd.MultiIndex.from_frame(old[list(KEY)]).get_indexer(pd.MultiIndex.from_frame(found[list(KEY)]))
    digests = _digests(found, progress) if len(old) else [None] * len(found)
    moves = find_moves(source, old, found, known, digests, job.recipe.place) if source else Moves()
    changed_rows, failures = _changed(old, found, known, digests, job.recipe.place, request.max_pixels or MOST_PIXELS)
    changed_rows = np.setdiff1d(changed_rows, [each.row for each in moves.renamed]).astype(np.int64)
    if failures and request.on_error == "stop":
        raise FeatureStoreError(
            f"a photograph that is cached has changed and cannot be read: {failures[0]}. "
            "Put back the file that was cached, or keep what is cached of it with `on_error` skip."
        )
    recompute = np.zeros(len(old), bool)
    if request.recompute_changed:
        recompute[changed_rows] = True
    keeps_old = np.setdiff1d(changed_rows, np.flatnonzero(recompute))
    stays = np.isin(known, keeps_old) & (known >= 0)  # rows of the earlier photograph keep what was said of it
    existing, new = _join(old, found, known, ~stays)
    parts = _layer_plans(job, source, recompute)
    needed_anyway = np.logical_or.reduce([part.needed for part in parts]) if parts else recompute
    mixed = keeps_old[needed_anyway[keeps_old]]
    if len(mixed):
        raise FeatureStoreError(
            f"{len(mixed)} photographs changed since they were cached (or recomputing them was interrupted), so another "
            f"layer of them would not belong to the cached ones: {listing(_names(old.iloc[mixed]))}. "
            "Add `recompute_changed` to recompute them in every layer."
        )
    return Plan(
        store=request.store,
        source=job.source_name,
        about=_about(job, request),
        layers=tuple(parts),
        existing=existing,
        new=new,
        table_changed=not existing.equals(old),
        changed=tuple(_names(old.iloc[changed_rows])),
        recompute=recompute,
        failures=tuple(failures),
        left_out=request.faces.left_out,
        free=None if mirror_of(request.store) else free_bytes(request.store),
        notes=_notes(job, source),
        moves=moves,
    )


def source_of(job: CachingJob) -> Source:
    """The source that a job adds to; FeatureStoreError if it is not there yet."""
    source = _existing_source(job.request.store, job.source_name)
    if source is None:
        raise FeatureStoreError(f"{job.request.store} holds nothing yet of source {job.source_name}.")
    return source


def _existing_source(store: Path, name: str) -> Source | None:
    fetched(store)
    refuse_other_folder(store)
    if not (store / METADATA).exists():
        return None
    refuse_old_version(store)
    return FeatureStore.open(store).sources.get(name)


def _about(job: CachingJob, request: CachingRequest) -> tuple[tuple[str, str], ...]:
    how = "random numbers, not a trained network" if job.weights.random else job.weights.layout
    weights = job.weights.name + (f" ({how})" if how else "")
    margin = job.recipe.box_margin
    boxes = "" if margin is None else f"; cut to each face's box and {margin:.0%} of it on each side"
    boxes = "; each face turned upright by its five landmarks" if job.recipe.place == LANDMARKS else boxes
    table = request.faces.table
    flipped = int(table["view"].str.endswith(FLIPPED).sum())
    photographs = f"{len(table) - flipped} photographs of {table['face_id'].nunique()} faces"
    mirrored = f", each also mirrored (view{FLIPPED})" if flipped else ""
    return (
        ("images", f"{photographs}{mirrored}, keyed by {request.faces.layout}"),
        ("store", str(request.store)),
        ("source", job.source_name),
        ("backbone", f"{job.spec.name}, weights {weights}"),
        ("recipe", f"{job.recipe.name}: {job.recipe.note or 'from a file'}{boxes}"),
        ("computed", f"{request.precision} on {job.device}, {job.batch_size} images at a time"),
    )


def _notes(job: CachingJob, source: Source | None) -> tuple[str, ...]:
    notes = [*job.weights.notes] if job.weights.random else [*job.weights.notes, job.weights.licence]
    if source and source.attributes.get("library_versions") != library_versions():
        was = source.attributes.get("library_versions", {})
        differ = [f"{name} {was.get(name)} → {now}" for name, now in library_versions().items() if was.get(name) != now]
        notes.append(f"the store was created with other versions: {listing(differ)}; last digits may differ")
    return tuple(notes)


def _names(table: pd.DataFrame) -> list[str]:
    return [f"({face!r}, {view!r})" for face, view in zip(table["face_id"], table["view"], strict=True)]


def _join(
    old: pd.DataFrame, found: pd.DataFrame, known: np.ndarray, current: np.ndarray
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Coordinates of registered items, updated from ``found`` where that is ``current``, and the coordinates of new items.

    Both have the same columns of the same types, so that the store's do not depend on how often it was appended to.
    """
    given = found.assign(image_sha256="")
    columns = list(dict.fromkeys([*KEY, "path", "image_sha256", *old.columns, *given.columns]))
    updated = old.reindex(columns=columns).astype(object)
    again = (known >= 0) & current
    for name in given.columns.difference([*KEY, "image_sha256"]):
        updated.loc[known[again], name] = given.loc[again, name].to_numpy(object)
    added = given[known < 0].reindex(columns=columns).astype(object)
    whole = pd.concat([updated, added], ignore_index=True)
    typed = pd.DataFrame({name: _typed(whole[name]) for name in columns})
    return typed.iloc[: len(old)].reset_index(drop=True), typed.iloc[len(old) :].reset_index(drop=True)


def _typed(values: pd.Series) -> np.ndarray:
    """A column as bool, int64 or float64 where all of it is, and as strings (missing: "") otherwise."""
    inferred = values.infer_objects()
    if not inferred.isna().any() and inferred.dtype.kind in "bi":
        return np.asarray(inferred, bool if inferred.dtype.kind == "b" else np.int64)
    present = inferred.dropna().infer_objects()
    if len(present) and present.dtype.kind in "if":
        return np.asarray(inferred, np.float64)
    return np.array(["" if pd.isna(value) else str(value) for value in values], object)


def _changed(
    old: pd.DataFrame,
    found: pd.DataFrame,
    known: np.ndarray,
    hashes: Sequence[str | None],
    place: tuple[str, ...],
    max_pixels: int,
) -> tuple[np.ndarray, list[Failure]]:
    """Rows whose photograph no longer has the hash, or its face the place, that was cached; and those that cannot be read."""
    again = np.flatnonzero(known >= 0)
    paths = found["path"].to_numpy(object)[again]
    cached = old["image_sha256"].to_numpy(object)
    changed, failures = [], []
    moved = set(known[again][_moved(old.iloc[known[again]], found.iloc[again], place)])
    digests = [hashes[i] for i in again.tolist()]
    for row, path, digest in zip(known[again], paths, digests, strict=True):
        if digest == cached[row]:
            if row in moved:
                changed.append(row)
            continue
        try:
            decode(read_photograph(path), max_pixels)
            changed.append(row)
        except (FeatureStoreError, OSError) as error:
            failures.append(Failure(Photo(old["face_id"].iloc[row], old["view"].iloc[row], path), str(error)))
    return np.array(sorted(changed), np.int64), failures


def _moved(old: pd.DataFrame, found: pd.DataFrame, place: tuple[str, ...]) -> np.ndarray:
    """bool per item: whether the box (the landmarks) that its rows were computed from is another one now."""
    cached, given = (np.asarray(table.reindex(columns=list(place)), np.float64) for table in (old, found))
    return np.asarray((cached != given).any(axis=1))


def _digests(found: pd.DataFrame, progress: CountPhotographs) -> list[str | None]:
    """The sha256 of each photograph; None for one that cannot be read."""
    paths = found["path"].unique()  # a mirrored photograph has the file of the plain one
    digests: dict[str, str | None] = {}
    for path, digest in zip(paths, thread_pool().map(_sha256_or_none, paths), strict=True):
        progress(1)
        digests[path] = digest
    return [digests[path] for path in found["path"]]


def _sha256_or_none(path: str) -> str | None:
    try:
        return sha256_of_photograph(path)
    except OSError:
        return None


def _layer_plans(job: CachingJob, source: Source | None, recompute: np.ndarray) -> list[LayerPlan]:
    request = job.request
    there = source.layers if source else {}
    n_items = source.n_items if source else 0
    slots = next((layer.slots for layer in there.values()), request.items_per_shard or ITEMS_PER_SHARD)
    # A changed photograph is recomputed in every layer, or its rows would come from two photographs.
    names = [name for name in job.spec.layers if name in job.layers or (recompute.any() and name in there)]
    plans = []
    for name in names:
        layer = there.get(name)
        if layer:
            _refuse_other_encoding(layer, request)
            try:
                present = present_rows(layer)
            except DamagedShard as error:
                raise DamagedShard(f"{error}. Repair it: pipelines/verify_store.py {request.store} --repair") from None
        else:
            present = np.zeros(n_items, bool)
            folder = request.store / job.source_name / name
            dtype = np.dtype(request.dtype or DTYPES[0])
            layer = Layer(name, job.shapes[name], dtype, request.compress or "none", slots, n_items, folder)
        missing = ~present if name in job.layers else np.zeros(n_items, bool)
        plans.append(LayerPlan(layer, name not in there, present, missing | (recompute & present)))
    return plans


def _refuse_other_encoding(layer: Layer, request: CachingRequest) -> None:
    for option, stored, asked in (
        ("dtype", layer.dtype.name, request.dtype),
        ("compress", layer.compress, request.compress),
    ):
        if asked is not None and asked != stored:
            raise FeatureStoreError(
                f"layer {layer.name!r} is stored with `{option}` {stored}, not {asked}. "
                f"Leave `{option}` out to add to it, or choose another `store`."
            )
