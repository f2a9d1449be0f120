"""What a store holds, as a table: sources, layers, rows cached and bytes on disk."""

from collections.abc import Iterator

from featurestore.files import folder_bytes
from featurestore.keys import KEY
from featurestore.store.reader import FeatureStore, Source
from featurestore.store.rows import present_rows
from featurestore.store.shards import DamagedShard
from featurestore.store.zarr_format import Layer
from featurestore.text import aligned, human_bytes, in_natural_order, listing

_VIEWS_SHOWN = 8


def describe_store(store: FeatureStore) -> str:
    """A readable table of all sources and their layers. Shard indexes are read, rows are not."""
    head = f"{store.path}: {len(store.sources)} sources, {human_bytes(folder_bytes(store.path))} on disk"
    return "\n\n".join([head, *("\n".join(_describe(source)) for source in store.sources.values())])


def _describe(source: Source) -> Iterator[str]:
    said = source.attributes
    faces, views = (set(source.coordinate(name)) for name in KEY)
    yield source.name
    for name, value in (
        ("backbone", f"{said['backbone']}, weights {source.weights}"),
        ("recipe", f"{said['recipe'].get('name', 'unnamed')}, computed in {said['precision']}"),
        ("licence", said.get("licence", "not stated")),
        ("items", f"{source.n_items}, of {len(faces)} faces"),
        ("views", f"{len(views)}: {listing(in_natural_order(views), _VIEWS_SHOWN)}"),
        ("on disk", human_bytes(folder_bytes(source.folder))),
        *([("format", "version 1, only read: pipelines/upgrade_store.py")] if source.version == 1 else []),
    ):
        yield f"  {name:<9} {value}"
    if source.layers:
        yield ""
        rows = [("layer", "shape", "stored as", "rows cached", "on disk"), *map(_layer, source.layers.values())]
        yield from aligned(rows)


def _layer(layer: Layer) -> tuple[str, ...]:
    try:
        cached = f"{int(present_rows(layer).sum())} of {layer.n_items}"
    except DamagedShard:
        cached = "damaged: see pipelines/verify_store.py"
    return (
        layer.name,
        "×".join(map(str, layer.shape)),
        layer.stored_as,
        cached,
        human_bytes(folder_bytes(layer.folder)),
    )
