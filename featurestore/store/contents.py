"""What a source's document says: attributes, coordinates, layers. Nothing of it is believed before it has been checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from featurestore.errors import FeatureStoreError
from featurestore.files import safe_name
from featurestore.keys import KEY
from featurestore.store.checksums import checksum_metadata
from featurestore.store.coordinates import COORDINATE_CHUNK, is_coordinate
from featurestore.store.zarr_format import CHECKSUMS, Layer, claims_to_be_layer, content_matches, parse_layer
from featurestore.text import listing

Document: TypeAlias = dict[str, Any]  # JSON


@dataclass(frozen=True)
class Contents:
    """What a source's document says, checked. ``foreign`` are the documents of arrays that are not ours."""

    attributes: dict[str, Any]
    n_items: int
    version: int
    coordinates: dict[str, Document]
    layers: dict[str, Layer]
    foreign: dict[str, Document]


def contents_of(document: Mapping[str, Any], folder: Path) -> Contents:
    """The contents of the source in ``folder``, whose document this is. FeatureStoreError says what is wrong with it."""
    try:
        attributes: dict[str, Any] = document["attributes"]
        version = attributes["format_version"]
        arrays: dict[str, Document] = document["consolidated_metadata"]["metadata"]
        coordinates = {name: arrays[name] for name in attributes["coordinates"].split()}
        problem = _problem(attributes, arrays, coordinates)
        if problem:
            raise FeatureStoreError(problem)
        ours = (
            {*coordinates, *(name for name in arrays if name.partition("/")[0] == CHECKSUMS)}
            if version > 1
            else coordinates
        )
        others = {name: array for name, array in arrays.items() if name not in ours}
        parsed = {name: parse_layer(name, array, folder, version) for name, array in others.items()}
        foreign = {name: others[name] for name, layer in parsed.items() if not layer}
        if version > 1 and not content_matches(document, foreign):
            raise FeatureStoreError("its content does not match its checksum")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise FeatureStoreError(f"{type(error).__name__} {error}") from None
    layers = {name: layer for name, layer in parsed.items() if layer}
    return Contents(attributes, arrays[KEY[0]]["shape"][0], version, coordinates, layers, foreign)


def _problem(attributes: dict[str, Any], arrays: dict[str, Document], coordinates: dict[str, Document]) -> str:
    """What is wrong with a source's document; empty if nothing is."""
    missing = [name for name in ("backbone", "weights", "recipe", "precision") if name not in attributes]
    if missing:
        return f"it has no attribute {listing(missing)}"
    texts = [name for name in ("backbone", "weights", "precision") if not isinstance(attributes[name], str)]
    if texts or not isinstance(attributes["recipe"], dict):
        return f"its attribute {(texts or ['recipe'])[0]} is of another type"
    old = attributes["format_version"] == 1
    unsafe = [name for name in arrays if not all(map(safe_name, name.split("/"))) or (old and "/" in name)]
    if unsafe:
        return f"{unsafe[0]!r} cannot name an array"
    n_items = arrays[KEY[0]]["shape"][0]
    for name in [*KEY, *coordinates]:
        if name not in coordinates or not is_coordinate(arrays[name]) or arrays[name]["shape"] != [n_items]:
            return f"coordinate {name!r} is not one of {n_items} items"
    slots, layers = set(), set()
    for name, document in arrays.items():
        if claims_to_be_layer(document):
            layer = parse_layer(name, document, Path())
            if layer is None or layer.n_items != n_items:
                return f"array {name!r} is not a layer of {n_items} items as this version writes them"
            slots.add(layer.slots)
            layers.add(name)
    if len(slots) > 1:
        return f"layers have different numbers of items to a shard: {sorted(slots)}"
    return "" if old else _problem_of_checksums(attributes, arrays, coordinates, layers, n_items)


def _problem_of_checksums(
    attributes: dict[str, Any],
    arrays: dict[str, Document],
    coordinates: dict[str, Document],
    layers: set[str],
    n_items: int,
) -> str:
    held = {name: array for name, array in arrays.items() if name.startswith(f"{CHECKSUMS}/")}
    if CHECKSUMS not in arrays or held != {f"{CHECKSUMS}/{name}": checksum_metadata(n_items) for name in layers}:
        return "it does not say where the checksums of each layer are"
    chunks = -(-n_items // COORDINATE_CHUNK)
    for name in coordinates:
        digests = attributes["digests"][name]
        if len(digests) != chunks or not all(isinstance(each, int) for each in digests):
            return f"it does not hold {chunks} checksums of coordinate {name!r}"
    return ""
