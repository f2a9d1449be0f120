"""Every document and coordinate chunk of a store held against what it must say; what is right is there a second time.

A source's document carries a checksum of itself and the root's document repeats it. The documents of arrays repeat what the
source's says. Coordinate chunks and those of checksums have copies; the source's document holds a digest of each coordinate
chunk's values, and the checksums are right if they are those of the records.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, read_file, safe_name, write_atomically
from featurestore.store.checksums import checksum_metadata
from featurestore.store.contents import Contents, contents_of
from featurestore.store.coordinates import (
    COORDINATE_CHUNK,
    COPY,
    coordinate_chunk,
    decode_coordinate,
    encode_coordinate,
)
from featurestore.store.rows import open_shard
from featurestore.store.shards import CRC_BYTES, DamagedShard
from featurestore.store.zarr_format import (
    CHECKSUMS,
    FORMAT,
    METADATA,
    Layer,
    checksums_group,
    document_bytes,
    read_json,
    root_document,
    source_name,
    sources_of_root,
)

Document = Mapping[str, Any]
_MISSING = "it is missing"


@dataclass(frozen=True)
class FileDamage:
    """A file that is not what it has to be. ``content`` is what has to be there, None if that is lost."""

    path: Path
    problem: str
    content: bytes | None

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" + ("" if self.content is not None else "; what was there is lost")


def check_files(store: Path) -> list[FileDamage]:
    """Every document, coordinate chunk and chunk of checksums of ``store`` that is not what it has to be.

    Of sources of format version 1 nothing is said: nothing in them says what their files have to be.
    """
    documents = {path: _read(path) for path in [store / METADATA, *sorted(store.glob(f"*/{METADATA}"))]}
    whole = _whole_sources(store, documents)
    if documents[store / METADATA] == _MISSING and not any((store / name).is_dir() for name in whole):
        return []  # no store, as opening it will say
    damage: list[FileDamage] = []
    right: dict[str, Document] = {}
    for folder in _source_folders(store, documents, whole):
        path, candidates = folder / METADATA, whole.get(folder.name, [])
        own = documents.get(path)
        problem = own if isinstance(own, str) else _problem(own, folder)
        if problem:
            damage.append(FileDamage(path, problem, document_bytes(candidates[0]) if candidates else None))
            if not candidates:
                continue
        document = candidates[0] if problem else own
        assert isinstance(document, Mapping)
        right[folder.name] = document
        contents = contents_of(document, folder)
        if contents.version == 1:
            continue
        if not problem and not contents.foreign and _bytes(path) != document_bytes(document):
            damage.append(FileDamage(path, "it is not written as this program writes it", document_bytes(document)))
        damage += _check_arrays(folder, document, contents)
    return [*damage, *_check_root(store, documents[store / METADATA], right)]


def restore(damage: list[FileDamage]) -> list[FileDamage]:
    """Put the right content into the place of what is damaged, under ``store_lock``; what is left is lost.

    FeatureStoreError where that cannot be written.
    """
    for found in damage:
        if found.content is not None:
            try:
                write_atomically(found.path, found.content)
            except OSError as error:
                raise FeatureStoreError(
                    f"{found.path} cannot be written: {error.strerror or error}. Remove what stands in its place, or free some "
                    "space, and repair again: what was put back so far stays."
                ) from None
    return [found for found in damage if found.content is None]


def _read(path: Path) -> Document | str:
    """A document, or what is wrong with it."""
    try:
        document = read_json(path)
        return document if isinstance(document, dict) else "it is no JSON object"
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"it is no JSON: {error}"


def _bytes(path: Path) -> bytes | None:
    try:
        return read_file(path)
    except OSError:
        return None


def _problem(document: Document | None, folder: Path) -> str:
    """What is wrong with the document of the source in ``folder``; empty if nothing is."""
    if document is None:
        return _MISSING
    try:
        contents = contents_of(document, folder)
        made = contents.attributes
        if made["format"] != FORMAT or made["format_version"] not in (1, 2):
            return "it is not a source's document of a version that this program reads"
        if contents.version > 1 and "imported" not in made and source_name(made) != folder.name:
            return f"it is the document of another source, {source_name(made)}"
        if not contents.foreign:
            document_bytes(document)  # ValueError for what can be read and not written, such as half a surrogate pair
    except (FeatureStoreError, KeyError, TypeError, ValueError) as error:
        return str(error)
    return ""


def _whole_sources(store: Path, documents: Mapping[Path, Document | str]) -> dict[str, list[Document]]:
    """Documents of sources that are whole, wherever they stand, by the name of the source whose they are."""
    found: dict[str, list[Document]] = {}
    for path, document in documents.items():
        if isinstance(document, str):
            continue
        named: list[tuple[str, Document]] = [(path.parent.name, document)]
        try:
            named += sources_of_root(document).items()
            named.append((source_name(document["attributes"]), document))
        except (KeyError, TypeError, AttributeError):
            pass
        for name, each in named:
            if safe_name(name) and not name.endswith(PARTIAL) and not _problem(each, store / name):
                found.setdefault(name, []).append(each)
    return found


def _source_folders(
    store: Path, documents: Mapping[Path, Document | str], whole: Mapping[str, list[Document]]
) -> list[Path]:
    """Folders that are sources, or that a whole document says are."""
    found = {store / name for name in whole if (store / name).is_dir()}
    for path, document in documents.items():
        if path.parent == store or path.parent.name.endswith(PARTIAL):
            continue
        try:
            ours = isinstance(document, str) or document["attributes"].get("format") == FORMAT
        except (KeyError, TypeError, AttributeError):
            ours = True
        if ours:
            found.add(path.parent)
    return sorted(found)


def _check_arrays(folder: Path, document: Document, contents: Contents) -> Iterator[FileDamage]:
    arrays = document["consolidated_metadata"]["metadata"]
    ours = {name: array for name, array in arrays.items() if name not in contents.foreign and name != CHECKSUMS}
    for name, array in {CHECKSUMS: checksums_group(), **ours}.items():
        path, due = folder / name / METADATA, document_bytes(array)
        if _bytes(path) != due:
            yield FileDamage(path, "it does not say what the source's document says of it", due)
    for name, array in contents.coordinates.items():
        for chunk, digest in enumerate(contents.attributes["digests"][name]):
            path = coordinate_chunk(folder / name, array, chunk)
            n = min(COORDINATE_CHUNK, contents.n_items - chunk * COORDINATE_CHUNK)
            yield from _check_pair(path, array["data_type"], n, digest)
    for layer in contents.layers.values():
        for chunk in range(-(-contents.n_items // COORDINATE_CHUNK)):
            yield from _check_checksums(layer, chunk)


def _check_pair(path: Path, kind: str, n: int, digest: int | None) -> Iterator[FileDamage]:
    """A chunk and its copy, each of which restores the other."""
    pair = (path, path.with_name(path.name + COPY))
    problems = [_problem_of_chunk(each, kind, n, digest) for each in pair]
    for i, problem in enumerate(problems):
        if problem:
            yield FileDamage(pair[i], problem, None if problems[1 - i] else _bytes(pair[1 - i]))


def _problem_of_chunk(path: Path, kind: str, n: int, digest: int | None) -> str:
    try:
        decode_coordinate(read_file(path), kind, n, digest)
    except FileNotFoundError:
        return _MISSING
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def _check_checksums(layer: Layer, chunk: int) -> Iterator[FileDamage]:
    """Nothing else holds their digest: of two that are whole and differ, the one that more records agree with is right."""
    path = coordinate_chunk(layer.folder.parent / CHECKSUMS / layer.name, checksum_metadata(0), chunk)
    copy = path.with_name(path.name + COPY)
    if not (path.exists() or copy.exists()):
        return  # no row of these items was ever noted
    damage = list(_check_pair(path, "checksum", COORDINATE_CHUNK, None))
    if len(damage) == 2:  # the rows count as not cached, and are computed again
        nothing = encode_coordinate(np.empty(0, np.int64), "checksum")
        damage = [FileDamage(found.path, f"{found.problem}, and so is its copy", nothing) for found in damage]
    yield from damage
    contents = _bytes(path), _bytes(copy)
    if damage or contents[0] == contents[1] or None in contents:
        return
    rows = range(chunk * COORDINATE_CHUNK, min((chunk + 1) * COORDINATE_CHUNK, layer.n_items))
    stored = stored_checksums(layer, rows)
    first, second = (
        int(((decode_coordinate(content or b"", "checksum", len(rows)) == stored) & (stored >= 0)).sum())
        for content in contents
    )
    wrong = (path, contents[1]) if second > first else (copy, contents[0])
    yield FileDamage(wrong[0], "it differs from its copy, and fewer records agree with it", wrong[1])


def stored_checksums(layer: Layer, rows: range) -> np.ndarray:
    """int64 per row: the checksum that its record ends in; -1 where there is none or its shard cannot be read."""
    found = np.full(len(rows), -1, np.int64)
    for shard in range(rows.start // layer.slots, -(-rows.stop // layer.slots)):
        try:
            with open_shard(layer, shard) as opened:
                for row in layer.shard_rows(shard) if opened else ():
                    slot = row % layer.slots
                    if row in rows and opened and opened[1].present[slot]:
                        end = int(opened[1].offsets[slot] + opened[1].nbytes[slot])
                        found[row - rows.start] = layer.record.checksum(os.pread(opened[0], CRC_BYTES, end - CRC_BYTES))
        except DamagedShard:
            continue
    return found


def _check_root(store: Path, root: Document | str, sources: Mapping[str, Document]) -> Iterator[FileDamage]:
    path = store / METADATA
    said = root.get("attributes") if isinstance(root, Mapping) else None
    versions = [document["attributes"]["format_version"] for document in sources.values()]
    if 1 in versions or said == {"format": FORMAT, "format_version": 1}:
        return
    try:
        due = document_bytes(root_document(dict(sources)))
    except ValueError:  # what another program put beside our arrays
        return
    if isinstance(root, str):
        yield FileDamage(
            path, root, due if sources else None
        )  # without a source there is no telling whether it is a store
    elif sources and _bytes(path) != due and not _is_older_root(path, root, store):
        yield FileDamage(path, "it does not repeat its sources' documents", due)


def _is_older_root(path: Path, root: Document, store: Path) -> bool:
    """Whether it is whole and repeats documents that were whole: a writer was killed before it brought the root in step."""
    try:
        repeated = sources_of_root(root)
        return not any(_problem(document, store / name) for name, document in repeated.items()) and _bytes(
            path
        ) == document_bytes(root_document(repeated))
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
