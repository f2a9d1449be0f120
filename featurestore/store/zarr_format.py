"""Names, JSON documents and coordinate chunks of the store: format version 1.

demo.zarr/zarr.json                          the root group: what this is, and its format version
demo.zarr/vggface-3f0c…/zarr.json            a source: attributes, and the metadata of all its arrays
demo.zarr/vggface-3f0c…/face_id/c/0          a coordinate chunk
demo.zarr/vggface-3f0c…/maxp_5_3/c/0/0/0/0   a shard
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import VLenUTF8, Zstd

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, write_atomically
from featurestore.store.shards import COMPRESS, CRC_BYTES, RecordFormat

FORMAT = "face-featurestore"
FORMAT_VERSION = 1
METADATA = "zarr.json"
DTYPES = ("float32", "float16")

DIMENSIONS = {1: ("feature",), 2: ("token", "feature"), 3: ("channel", "y", "x")}  # of one image
COORDINATE_CHUNK = 16384  # items a chunk; an append rewrites the last one
_NUMBERS = {"float64": ("<f8", "NaN"), "int64": ("<i8", 0), "bool": ("|b1", False)}
_TAIL: list[dict[str, Any]] = [{"name": "zstd", "configuration": {"level": 3, "checksum": False}}, {"name": "crc32c"}]
# Chunks of different types have different names, so that a column which changes its type never overwrites
# a chunk that the published document still describes. Bool and int64 share one: their chunks differ in length.
_CHUNK_KEYS = {"string": ("default", "/"), "float64": ("default", "."), "int64": ("v2", "."), "bool": ("v2", ".")}


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

    @property
    def store(self) -> Path:
        """The store that holds it."""
        return self.folder.parent.parent

    @property
    def record(self) -> RecordFormat:
        """How its rows are written."""
        return RecordFormat(self.dtype, math.prod(self.shape), self.compress)  # type: ignore[arg-type]

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
        return _array(
            shape=(self.n_items, *self.shape),
            data_type=self.dtype.name,
            chunk=(self.slots, *self.shape),
            fill_value="NaN",  # absent means absent: with 0, an all-zero row would not be told from a missing one
            codecs=[codecs],
            dimensions=["item", *(f"{name}_{size}" for name, size in zip(names, self.shape, strict=True))],
        )


def parse_layer(name: str, document: Mapping[str, Any], folder: Path) -> Layer | None:
    """The layer that an array document describes; None if it is an array of another kind."""
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
        layer = Layer(name, tuple(shape), np.dtype(document["data_type"]), compress, slots, n_items, folder / name)
        # The codec settings do not matter for reading; everything else has to be what we would write.
        same = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "zarr_format")
        ours = layer.metadata()
        return layer if all(ours[key] == document[key] for key in same) else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _array(
    *,
    shape: tuple[int, ...],
    data_type: str,
    chunk: tuple[int, ...],
    fill_value: Any,
    codecs: list[dict[str, Any]],
    dimensions: list[str],
) -> dict[str, Any]:
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


def coordinate_metadata(kind: str, n_items: int) -> dict[str, Any]:
    """The array document of a coordinate; ``kind`` is ``string``, ``float64``, ``int64`` or ``bool``."""
    first: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
    fill: Any = ""
    if kind != "string":
        first = {"name": "bytes", "configuration": {"endian": "little"}}
        fill = _NUMBERS[kind][1]
    codecs = [first, *_TAIL]
    document = _array(
        shape=(n_items,), data_type=kind, chunk=(COORDINATE_CHUNK,), fill_value=fill, codecs=codecs, dimensions=["item"]
    )
    name, separator = _CHUNK_KEYS[kind]
    return {**document, "chunk_key_encoding": {"name": name, "configuration": {"separator": separator}}}


def coordinate_chunk(folder: Path, kind: str, chunk: int) -> Path:
    """The file of one chunk of a coordinate."""
    name, separator = _CHUNK_KEYS[kind]
    return folder / (f"c{separator}{chunk}" if name == "default" else str(chunk))


def coordinate_kind(values: np.ndarray) -> str:
    """The stored type of a column: bool, int64, float64 or string."""
    return {"b": "bool", "i": "int64", "u": "int64", "f": "float64"}.get(values.dtype.kind, "string")


def encode_coordinate(values: np.ndarray, kind: str) -> bytes:
    """One chunk of up to COORDINATE_CHUNK values, padded with the fill value, as Zarr wants it."""
    if kind == "string":
        padded = np.full(COORDINATE_CHUNK, "", object)
        padded[: len(values)] = values
        raw = VLenUTF8().encode(padded)
    else:
        dtype, fill = _NUMBERS[kind]
        raw = np.full(COORDINATE_CHUNK, np.nan if fill == "NaN" else fill, dtype)
        raw[: len(values)] = values
    packed = bytes(Zstd(level=3).encode(raw))
    return packed + crc32c(packed).to_bytes(CRC_BYTES, "little")


def _decode_coordinate(content: bytes, kind: str) -> np.ndarray:
    if crc32c(content[:-CRC_BYTES]) != int.from_bytes(content[-CRC_BYTES:], "little"):
        raise ValueError("the chunk does not match its checksum")
    raw = Zstd().decode(content[:-CRC_BYTES])
    values = VLenUTF8().decode(raw) if kind == "string" else np.frombuffer(raw, _NUMBERS[kind][0])
    if len(values) != COORDINATE_CHUNK:
        raise ValueError(f"the chunk has {len(values)} values, not {COORDINATE_CHUNK}")
    return values


def read_coordinate(folder: Path, document: Mapping[str, Any]) -> np.ndarray:
    """A whole coordinate: an object array of str, or numbers. Raises FeatureStoreError if a chunk is missing or damaged."""
    (n_items,), kind = document["shape"], document["data_type"]
    parts = [np.empty(0, object if kind == "string" else _NUMBERS[kind][0])]
    for chunk in range(-(-n_items // COORDINATE_CHUNK)):
        path = coordinate_chunk(folder, kind, chunk)
        try:
            parts.append(_decode_coordinate(path.read_bytes(), kind))
        except (OSError, RuntimeError, ValueError) as error:
            raise FeatureStoreError(
                f"{path} cannot be read: {error}. If a caching run has written the store since it was opened, open it again; "
                "otherwise it is damaged, and its items have to be cached again."
            ) from None
    return np.concatenate(parts)[:n_items]


def is_coordinate(document: Mapping[str, Any]) -> bool:
    """Whether an array document is one that this format writes for a coordinate."""
    kind, shape = document.get("data_type"), document.get("shape")
    return (
        kind in _CHUNK_KEYS
        and isinstance(shape, list)
        and len(shape) == 1
        and isinstance(shape[0], int)
        and shape[0] >= 0
        and dict(document) == coordinate_metadata(kind, shape[0])
    )


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


def source_document(attributes: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A source group's document. It repeats the arrays' documents, so one rename shows readers a new state whole."""
    document = _group({"format": FORMAT, "format_version": FORMAT_VERSION, **attributes})
    return {**document, "consolidated_metadata": _consolidated(arrays)}


def _consolidated(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": dict(members)}


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def read_document(folder: Path) -> dict[str, Any]:
    """A group's document, its format and version checked."""
    path = folder / METADATA
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        attributes = document["attributes"]
        found, version = attributes.get("format"), attributes.get("format_version")
    except (FileNotFoundError, NotADirectoryError):
        raise FeatureStoreError(f"{folder} is not a feature store: it has no {METADATA}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureStoreError(f"{path} is damaged: {error}.") from None
    if found != FORMAT:
        raise FeatureStoreError(f"{folder} is a Zarr group but not a feature store (its format is {found!r}).")
    if version != FORMAT_VERSION:
        raise FeatureStoreError(
            f"{folder} has format version {version!r}; this program reads version {FORMAT_VERSION}. "
            "Install the version of face-featurestore that wrote it, or a newer one."
        )
    return document


def source_names(store: Path) -> list[str]:
    """The member groups that are sources; groups and files of other programs, and folders being written, are ignored."""
    names = []
    for path in sorted(store.glob(f"*/{METADATA}")):
        if path.parent.name.endswith(PARTIAL):
            continue
        try:
            ours = json.loads(path.read_text("utf-8"))["attributes"].get("format") == FORMAT
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            ours = True  # it has to be read, and will say what is wrong with it
        if ours:
            names.append(path.parent.name)
    return names


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON document, in one step and the same bytes for the same content."""
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
