"""Chunks of one-dimensional arrays over items: keys and metadata, and the checksums of rows. Each is there twice."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import VLenUTF8, Zstd

from featurestore.errors import FeatureStoreError
from featurestore.files import read_file, write_atomically
from featurestore.store.shards import CRC_BYTES
from featurestore.store.zarr_format import array_document

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
_LONGEST = 1 << 14  # bytes of a string, on average over a chunk


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
    document = array_document(
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
