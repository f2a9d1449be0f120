"""Names, JSON documents and coordinate chunks of the store: format version 2.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import VLenUTF8, Zstd

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, read_file, write_atomically
from featurestore.store.shards import ALIGNMENT, COMPRESS, CRC_BYTES, RecordFormat
from featurestore.text import listing

FORMAT = "face-featurestore"
FORMAT_VERSION = 2  # what is written; version 1 is read
READ_VERSIONS = (1, 2)
CHECKSUMS = "checksums"  # the group beside the layers that holds an array of each one's checksums
METADATA = "zarr.json"
DTYPES = ("float32", "float16")

_IDENTITY = ("backbone", "weights", "recipe", "precision", "graph")  # the attributes that make a source
_LARGEST_DOCUMENT = 1 << 28  # bytes
_LONGEST = 1 << 14  # bytes of a string, on average over a chunk
DIMENSIONS = {1: ("feature",), 2: ("token", "feature"), 3: ("channel", "y", "x")}  # of one image
COORDINATE_CHUNK = 16384  # items a chunk; an append rewrites the last one
_NUMBERS: dict[str, tuple[str, Any]] = {
    "float64": ("<f8", "NaN"),
    "int64": ("<i8", 0),
    "bool": ("|b1", False),
    "checksum": ("<i8", -1),  # of a row that is not there
}
_TAIL: list[dict[str, Any]] = [{"name": "zstd", "configuration": {"level": 3, "checksum": False}}, {"name": "crc32c"}]
_CHUNK_KEYS = [("default", "/"), ("default", "."), ("v2", ".")]  # c/0, c.0, 0: names that do not meet
COPY = ".copy"  # ending of a coordinate chunk's second copy


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
        return _array(
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


def coordinate_metadata(kind: str, n_items: int, names: int = 0) -> dict[str, Any]:
    """The array document of a coordinate; ``kind`` is ``string``, ``float64``, ``int64``, ``bool`` or ``checksum``.

    ``names`` chooses one of three ways to name chunks: a column whose values change is first published under other names, so
    that nothing which a published document describes is ever overwritten.
    """
    first: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
    fill: Any = ""
    if kind != "string":
        first = {"name": "bytes", "configuration": {"endian": "little"}}
        fill = _NUMBERS[kind][1]
    codecs = [first, *_TAIL]
    data_type = "int64" if kind == "checksum" else kind
    document = _array(
        shape=(n_items,),
        data_type=data_type,
        chunk=(COORDINATE_CHUNK,),
        fill_value=fill,
        codecs=codecs,
        dimensions=["item"],
    )
    name, separator = _CHUNK_KEYS[names]
    return {**document, "chunk_key_encoding": {"name": name, "configuration": {"separator": separator}}}


def coordinate_chunk(folder: Path, document: Mapping[str, Any], chunk: int) -> Path:
    """The file of one chunk of a coordinate."""
    encoding = document["chunk_key_encoding"]
    return folder / (
        f"c{encoding['configuration']['separator']}{chunk}" if encoding["name"] == "default" else str(chunk)
    )


def chunk_names(document: Mapping[str, Any]) -> int:
    """How a coordinate's chunks are named; see ``coordinate_metadata``."""
    encoding = document["chunk_key_encoding"]
    return _CHUNK_KEYS.index((encoding["name"], encoding["configuration"]["separator"]))


def coordinate_kind(values: np.ndarray) -> str:
    """The stored type of a column: bool, int64, float64 or string."""
    return {"b": "bool", "i": "int64", "u": "int64", "f": "float64"}.get(values.dtype.kind, "string")


def coordinate_content(values: np.ndarray, kind: str) -> bytes:
    """Values as a chunk that holds no others would, uncompressed."""
    if kind == "string":
        return bytes(VLenUTF8().encode(np.asarray(values, object)))
    return np.asarray(values, _NUMBERS[kind][0]).tobytes()


def encode_coordinate(values: np.ndarray, kind: str) -> bytes:
    """One chunk of up to COORDINATE_CHUNK values, padded with the fill value, as Zarr wants it."""
    fill = "" if kind == "string" else _NUMBERS[kind][1]
    padded = np.full(
        COORDINATE_CHUNK, np.nan if fill == "NaN" else fill, object if kind == "string" else _NUMBERS[kind][0]
    )
    padded[: len(values)] = values
    packed = bytes(Zstd(level=3).encode(coordinate_content(padded, kind)))
    return packed + crc32c(packed).to_bytes(CRC_BYTES, "little")


def write_chunk(path: Path, values: np.ndarray, kind: str) -> None:
    """One chunk of a coordinate, and its copy: that first, so that a writer killed between the two has it all to do again."""
    content = encode_coordinate(values, kind)
    write_atomically(path.with_name(path.name + COPY), content)
    write_atomically(path, content)


def decode_coordinate(content: bytes, kind: str, n: int, digest: int | None = None) -> np.ndarray:
    """The first ``n`` values of a chunk: an object array of str, or numbers. ValueError if they are not those of ``digest``.

    RuntimeError and ValueError for a damaged chunk.
    """
    if len(content) < CRC_BYTES or crc32c(content[:-CRC_BYTES]) != int.from_bytes(content[-CRC_BYTES:], "little"):
        raise ValueError("the chunk does not match its checksum")
    raw = _unpacked(content[:-CRC_BYTES], kind)
    held = int.from_bytes(raw[:4], "little") if kind == "string" else len(raw) // np.dtype(_NUMBERS[kind][0]).itemsize
    if held != COORDINATE_CHUNK:  # before memory is taken for as many as it says
        raise ValueError(f"the chunk has {held} values, not {COORDINATE_CHUNK}")
    values = VLenUTF8().decode(raw) if kind == "string" else np.frombuffer(raw, _NUMBERS[kind][0])
    values = values[:n]
    if digest is not None and crc32c(raw if n == COORDINATE_CHUNK else coordinate_content(values, kind)) != digest:
        raise ValueError("the chunk is sound but not the one that belongs here")
    return values


def _unpacked(packed: bytes, kind: str) -> bytes:
    """Zstd's content; ValueError before memory is taken for a size that no chunk has."""
    most = COORDINATE_CHUNK * (_LONGEST if kind == "string" else 8)
    # The frame's header (RFC 8878, 3.1.1.1): magic number, descriptor, window unless single segment, dictionary, size.
    descriptor = packed[4] if len(packed) > 5 else 0
    flag, single, dictionary = descriptor >> 6, descriptor >> 5 & 1, (0, 1, 2, 4)[descriptor & 3]
    start, width = 6 - single + dictionary, (single, 2, 4, 8)[flag]
    size = int.from_bytes(packed[start : start + width], "little") + (256 if flag == 1 else 0)
    if not width or size > most:
        raise ValueError(f"the chunk says that it unpacks to {size or 'an unknown number of'} bytes")
    return bytes(Zstd().decode(packed))


def read_coordinate(folder: Path, document: Mapping[str, Any], kind: str, digests: Sequence[int] | None) -> np.ndarray:
    """A whole coordinate: an object array of str, or numbers. ``digests``, one of each chunk, are not there in version 1.

    FeatureStoreError if a chunk is missing, damaged or another's.
    """
    (n_items,) = document["shape"]
    parts = [np.empty(0, object if kind == "string" else _NUMBERS[kind][0])]
    for chunk, start in enumerate(range(0, n_items, COORDINATE_CHUNK)):
        path = coordinate_chunk(folder, document, chunk)
        try:
            n, digest = min(COORDINATE_CHUNK, n_items - start), digests[chunk] if digests is not None else None
            parts.append(decode_coordinate(read_file(path), kind, n, digest))
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FeatureStoreError(
                f"{path} cannot be read: {reason}. If a caching run has written the store since it was opened, open it again; "
                f"otherwise it is damaged: pipelines/verify_store.py {folder.parent.parent} --repair puts its copy in its place."
            ) from None
    return np.concatenate(parts)


def is_coordinate(document: Mapping[str, Any]) -> bool:
    """Whether an array document is one that this format writes for a coordinate."""
    kind, shape = document.get("data_type"), document.get("shape")
    return (
        isinstance(kind, str)
        and (kind == "string" or kind in _NUMBERS)
        and isinstance(shape, list)
        and len(shape) == 1
        and isinstance(shape[0], int)
        and shape[0] >= 0
        and any(dict(document) == coordinate_metadata(kind, shape[0], names) for names in range(len(_CHUNK_KEYS)))
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
    """Whether a source's document has the checksum that it says; see ``source_document``."""
    said = dict(document["attributes"])
    found = said.pop("sha256", None)
    return bool(found == _content_digest(said, document["consolidated_metadata"]["metadata"], foreign))


def _content_digest(said: Mapping[str, Any], arrays: Mapping[str, Any], foreign: Iterable[str]) -> str:
    left_out = {*foreign, CHECKSUMS}
    ours = {name: array for name, array in arrays.items() if name not in left_out}
    return hashlib.sha256(json.dumps([dict(said), ours], sort_keys=True, ensure_ascii=True).encode()).hexdigest()


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
