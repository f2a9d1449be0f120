"""Names and JSON documents of the store: format version 2.

demo.zarr/zarr.json                               the root group: what this is, its format version, its sources' documents again
demo.zarr/vggface-3f0c…/zarr.json                 a source: attributes, and the metadata of all its arrays
demo.zarr/vggface-3f0c…/face_id/c/0               a coordinate chunk, and c/0.copy beside it
demo.zarr/vggface-3f0c…/maxp_5_3/c/0/0/0/0        a shard
demo.zarr/vggface-3f0c…/checksums/maxp_5_3/c/0    which row stands where: a chunk of crc32c per item, and its copy

What no network can compute again is there twice.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, read_file, write_atomically
from featurestore.store.shards import ALIGNMENT, COMPRESS, RecordFormat
from featurestore.text import listing

FORMAT = "face-featurestore"
FORMAT_VERSION = 2  # what is written; version 1 is read
READ_VERSIONS = (1, 2)
CHECKSUMS = "checksums"  # the group beside the layers that holds an array of each one's checksums
METADATA = "zarr.json"
DTYPES = ("float32", "float16")

_IDENTITY = ("backbone", "weights", "recipe", "precision", "graph")  # the attributes that make a source
_LARGEST_DOCUMENT = 1 << 28  # bytes
DIMENSIONS = {1: ("feature",), 2: ("token", "feature"), 3: ("channel", "y", "x")}  # of one image


@dataclass(frozen=True)
class Layer:
    """One cached layer: a (item, *shape) array, ``slots`` items to a shard.

    ``shape`` is one image's: (channel, y, x), (feature,), or (token, feature) of transformers. ``folder`` holds its files.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    compress: str
    slots: int
    n_items: int
    folder: Path
    version: int = FORMAT_VERSION

    @property
    def store(self) -> Path:
        """The store that holds it."""
        return self.folder.parent.parent

    @property
    def record(self) -> RecordFormat:
        """How its rows are written."""
        alignment = 1 if self.version == 1 else ALIGNMENT
        return RecordFormat(self.dtype, math.prod(self.shape), self.compress, alignment)  # type: ignore[arg-type]

    @property
    def stored_as(self) -> str:
        """Element type, and compression if there is one: ``float16 zstd``."""
        return self.dtype.name + ("" if self.compress == "none" else f" {self.compress}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one item's row, decoded."""
        return self.record.row_bytes

    @property
    def n_shards(self) -> int:
        """Shards that hold ``n_items`` items."""
        return -(-self.n_items // self.slots)

    def shard_path(self, shard: int) -> Path:
        """The file of shard number ``shard``."""
        return self.folder.joinpath("c", str(shard), *("0" for _ in self.shape))

    def shard_rows(self, shard: int) -> range:
        """The items, as row numbers, that shard number ``shard`` holds."""
        return range(shard * self.slots, min((shard + 1) * self.slots, self.n_items))

    def metadata(self) -> dict[str, Any]:
        """Its Zarr array document. Dimension names carry their size: one xarray dataset holds layers of many sizes."""
        names = DIMENSIONS[len(self.shape)]
        codecs = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, *self.shape],
                "codecs": self.record.zarr_codecs(),
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                "index_location": "end",
            },
        }
        return array_document(
            shape=(self.n_items, *self.shape),
            data_type=self.dtype.name,
            chunk=(self.slots, *self.shape),
            fill_value="NaN",  # absent means absent: with 0, an all-zero row would not be told from a missing one
            codecs=[codecs],
            dimensions=["item", *(f"{name}_{size}" for name, size in zip(names, self.shape, strict=True))],
        )


def parse_layer(name: str, document: Mapping[str, Any], folder: Path, version: int = FORMAT_VERSION) -> Layer | None:
    """The layer that an array document describes, of a source in ``folder``; None if it is an array of another kind."""
    try:
        n_items, *shape = document["shape"]
        slots = document["chunk_grid"]["configuration"]["chunk_shape"][0]
        inner = [codec["name"] for codec in document["codecs"][0]["configuration"]["codecs"]]
        compress = inner[1] if len(inner) == 3 else "none"
        sizes = [n_items + 1, slots, *shape]  # an empty store has no items, but nothing else may be empty
        if compress not in COMPRESS or document["data_type"] not in DTYPES or len(shape) not in DIMENSIONS:
            return None
        if not all(isinstance(size, int) and 0 < size < 2**40 for size in sizes):
            return None
        layer = Layer(
            name, tuple(shape), np.dtype(document["data_type"]), compress, slots, n_items, folder / name, version
        )
        # The codec settings do not matter for reading; everything else has to be what we would write.
        same = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "zarr_format")
        ours = layer.metadata()
        return layer if all(ours[key] == document[key] for key in same) else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def array_document(
    *,
    shape: tuple[int, ...],
    data_type: str,
    chunk: tuple[int, ...],
    fill_value: Any,
    codecs: list[dict[str, Any]],
    dimensions: list[str],
) -> dict[str, Any]:
    """A Zarr array's document."""
    return {
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": dimensions,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def claims_to_be_layer(document: Mapping[str, Any]) -> bool:
    """Whether an array has items along its first of several dimensions; other arrays are none of ours."""
    names = document.get("dimension_names") or [None]
    return names[0] == "item" and len(names) > 1


def root_document(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The root group's document. It repeats the sources' documents for readers that open a group through the root."""
    members: dict[str, Any] = {}
    for source, document in sources.items():
        members[source] = {**document, "consolidated_metadata": _consolidated({})}
        for name, array in document["consolidated_metadata"]["metadata"].items():
            members[f"{source}/{name}"] = array
    document = _group({"format": FORMAT, "format_version": FORMAT_VERSION})
    return {**document, "consolidated_metadata": _consolidated(members)}


def sources_of_root(root: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sources' documents that a root's document repeats. KeyError, TypeError or AttributeError if it does not."""
    members = root["consolidated_metadata"]["metadata"]
    found = {}
    for name, document in members.items():
        if "/" not in name and document["attributes"].get("format") == FORMAT:
            arrays = {each.removeprefix(f"{name}/"): members[each] for each in members if each.startswith(f"{name}/")}
            found[name] = {**document, "consolidated_metadata": _consolidated(arrays)}
    return found


def source_document(
    attributes: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Any]], foreign: Iterable[str] = ()
) -> dict[str, Any]:
    """A source group's document. It repeats the arrays' documents, so one rename shows readers a new state whole.

    Its last attribute is a checksum of the others and of all arrays but the ``foreign`` ones, which are other programs'.
    """
    said = {"format": FORMAT, "format_version": 0, **attributes}
    said["format_version"] = FORMAT_VERSION
    said.pop("sha256", None)
    said["sha256"] = _content_digest(said, arrays, foreign)
    return {**_group(said), "consolidated_metadata": _consolidated(arrays)}


def content_matches(document: Mapping[str, Any], foreign: Iterable[str]) -> bool:
    """Whether a source's document has the checksum that it says; see ``source_document``. ValueError if it cannot be written."""
    said = dict(document["attributes"])
    found = said.pop("sha256", None)
    return bool(found == _content_digest(said, document["consolidated_metadata"]["metadata"], foreign))


def _content_digest(said: Mapping[str, Any], arrays: Mapping[str, Any], foreign: Iterable[str]) -> str:
    left_out = {*foreign, CHECKSUMS}
    ours = {name: array for name, array in arrays.items() if name not in left_out}
    text = json.dumps([dict(said), ours], sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def source_name(attributes: Mapping[str, Any]) -> str:
    """A source's name by what it was made with: the backbone, and a hash of the identity."""
    identity = {name: attributes[name] for name in _IDENTITY if name in attributes}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return (
        f"{attributes['backbone'].replace(':', '-')}-{digest[:12]}"  # a colon is no part of a folder's name everywhere
    )


def checksums_group() -> dict[str, Any]:
    """The document of the group of checksums."""
    return _group({})


def _consolidated(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": dict(members)}


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def read_json(path: Path) -> Any:
    """A document's content. OSError if it cannot be read, ValueError if it is no JSON."""
    try:
        return json.loads(read_file(path, _LARGEST_DOCUMENT))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_document(folder: Path) -> dict[str, Any]:
    """A group's document, its format and version checked."""
    path = folder / METADATA
    try:
        document: dict[str, Any] = read_json(path)
        attributes = document["attributes"]
        found, version = attributes.get("format"), attributes.get("format_version")
    except (FileNotFoundError, NotADirectoryError):
        raise FeatureStoreError(f"{folder} is not a feature store: it has no {METADATA}.") from None
    except OSError as error:
        raise FeatureStoreError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureStoreError(f"{path} is damaged: {error}. {_restored(folder)}") from None
    if found != FORMAT:
        raise FeatureStoreError(f"{folder} is a Zarr group but not a feature store (its format is {found!r}).")
    if version not in READ_VERSIONS or isinstance(version, bool):
        raise FeatureStoreError(
            f"{folder} has format version {version!r}; this program reads versions {listing(READ_VERSIONS)}. "
            "Install the version of face-featurestore that wrote it, or a newer one."
        )
    return document


def _restored(folder: Path) -> str:
    store = folder.parent if (folder.parent / METADATA).exists() else folder
    return f"Restore it: pipelines/verify_store.py {store} --repair"


def source_names(store: Path) -> list[str]:
    """The member groups that are sources; groups and files of other programs, and folders being written, are ignored.

    A group that the root's document calls a source is one, whatever it says of itself.
    """
    try:
        named = set(sources_of_root(read_json(store / METADATA)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        named = set()
    names = []
    for path in sorted(store.glob(f"*/{METADATA}")):
        if path.parent.name.endswith(PARTIAL):
            continue
        try:
            ours = path.parent.name in named or read_json(path)["attributes"].get("format") == FORMAT
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            ours = True  # it has to be read, and will say what is wrong with it
        if ours:
            names.append(path.parent.name)
    return names


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """A document as it is written: the same bytes for the same content."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode()


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON document, in one step and the same bytes for the same content."""
    write_atomically(path, document_bytes(document))
