"""Damage within a container that stays right: JSON, zip, PNG, safetensors, pickles, TIFF, and a store's chunks and shards.

Lengths and checksums fit what was changed, so that readers get to see it.
"""

import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import crc32c
from numcodecs import Zstd

from featurestore.store.zarr_format import source_document

Inner = Callable[[bytes, random.Random], bytes]  # blind damage
Change = Callable[[bytes, random.Random, Inner], bytes]

_PNG = b"\x89PNG\r\n\x1a\n"
_DEEP = "soak-deep"  # stands for nesting that json.dumps cannot write
_VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3.5, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63, 2**64, 10**30, 1e308, float("nan"), float("inf"), -0.0,
    "", "a", "../..", "/", "a\0b", "x" * 5000, "NaN", "float32", "int64", "string", "bool", "F4", "BF16", "I64", "\ud800",
    None, True, False, [], {}, [0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [2**31, 2**31], {"a": 1}, _DEEP,
)  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) within."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _places(value[key], found)
    return found


def change_value(document: Any, rng: random.Random) -> Any:
    """One value, or all that are equal to it, replaced or removed; JSON within a string is changed as JSON."""
    places = _places(document, [])
    if not places:
        return rng.choice(_VALUES)
    holder, key = rng.choice(places)
    old, new = holder[key], rng.choice(_VALUES)
    action = rng.randrange(8)
    if isinstance(old, str) and old.startswith("{") and rng.random() < 0.8:
        with suppress(ValueError):
            holder[key] = _dumps(change_value(json.loads(old), rng))
            return document
    if action == 0:
        del holder[key]
    elif action == 1:
        other, place = rng.choice(places)
        with suppress(KeyError, IndexError):
            holder[key] = json.loads(json.dumps(other[place]))
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice(("", "a", "../a", "shape", "x" * 300, key + "\0"))] = holder.pop(key)
    elif action == 3 and not isinstance(old, dict | list):
        for container, place in places:
            with suppress(KeyError, IndexError):
                if container[place] == old:
                    container[place] = new
    elif action == 4 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, float(old), str(old)))
    else:
        holder[key] = new
    return document


def _dumps(document: Any) -> str:
    text = json.dumps(document)
    return text.replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000)


def change_json(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return inner(content, rng)
    changed = change_value(document, rng)
    with suppress(Exception):  # a source's document, with the checksum that it has now
        if "sha256" in changed["attributes"] and rng.random() < 0.8:
            changed = source_document(changed["attributes"], changed["consolidated_metadata"]["metadata"])
    return _dumps(changed).encode("utf-8", "surrogatepass")


def change_safetensors(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    (n,) = struct.unpack_from("<Q", content)
    header, rest = content[8 : 8 + n], content[8 + n :]
    if rng.random() < 0.8:
        header = change_json(header, rng, inner)
    else:
        rest = inner(rest, rng)
    return struct.pack("<Q", len(header)) + header + rest


def change_zip(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    """An entry changed, renamed, doubled or left out; checksums and the directory are made anew."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:
        return inner(content, rng)
    if not entries:
        return inner(content, rng)
    i = rng.randrange(len(entries))
    name, held = entries[i]
    action = rng.randrange(8)
    if action <= 4:
        is_pickle = name.endswith(".pkl")
        entries[i] = name, change_pickle(held, rng, inner) if is_pickle and rng.random() < 0.8 else inner(held, rng)
    elif action == 5:
        entries[i] = rng.choice((name + "x", name.upper(), "../" + name, "data.pkl", "a/data.pkl", "a.npy")), held
    elif action == 6:
        entries.insert(rng.randrange(len(entries)), (name, inner(held, rng)))
    else:
        del entries[i]
    buffer = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", packed) as archive:
        for name, held in entries:
            with suppress(ValueError, UnicodeError, struct.error):  # a name that a zip cannot have
                archive.writestr(zipfile.ZipInfo(name), held, packed)
    return buffer.getvalue()


_OPERATIONS = (
    b"0", b"2", b"(", b"1", b"N", b"}", b"]", b")", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"s", b"u", b"a", b"e", b"o",
    b"Q",
    b"\x81", b"\x88", b"\x93", b"\x94", b"\x8f", b"\x90", b"\x91", b"q\x00", b"h\x00", b"h\x01", b"h\xff", b"K\x00", b"K\xff",
    b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\x00",
    b"F1e999\n", b"L" + b"9" * 5000 + b"L\n",
    b"U\x03abc", b"X\x03\x00\x00\x00abc", b"C\x02ab", b"P0\n", b"p9999\n", b"g0\n", b"r\xff\xff\xff\x0f", b"j\xff\xff\xff\x0f",
    b"cos\nsystem\n(S'touch owned'\ntR", b"cbuiltins\neval\n(S'__import__(\"os\").system(\"touch owned\")'\ntR",
    b"csubprocess\nPopen\n(S'true'\ntR", b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR", b"ctorch\nTensor\n", b"cnumpy\nndarray\n",
    b"ccollections\nOrderedDict\n)R", b"cnumpy.core.multiarray\n_reconstruct\n", b"(S'x'\nios\nsystem\n", b"cos.path\njoin\n",
    b"N\x85\x85" * 40, b"2\x86" * 60, b"]" + b"q\x00h\x00a" * 3,
)  # fmt: skip


_PICKLES = 5  # of a .pth from before torch 1.6, one after the other


def change_pickle(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    """Operations removed, doubled, exchanged or put in, or the argument of one changed."""
    starts: list[int] = []
    file = io.BytesIO(content)
    with suppress(Exception):
        for _ in range(_PICKLES):
            starts += [place for _, _, place in pickletools.genops(file)]
    if len(starts) < 3:
        return inner(content, rng)
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    action = rng.randrange(7)
    if action == 0:
        del parts[i]
    elif action == 1:
        parts[i:i] = [parts[i]] * rng.choice((1, 2, 100, 5000))
    elif action == 2:
        parts[i], parts[j] = parts[j], parts[i]
    elif action <= 4:
        parts.insert(i, rng.choice(_OPERATIONS))
    elif action == 5:
        parts[i:i] = parts[min(i, j) : max(i, j)][:200]
    else:
        parts[i] = parts[i][:1] + inner(parts[i][1:], rng)
    return b"".join(parts)


def change_png(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    """A chunk, what is packed in it, or the order of chunks; with right checksums."""
    chunks, at = [], len(_PNG)
    while at + 12 <= len(content):
        (n,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + n]))
        at += 12 + n
    if not chunks:
        return inner(content, rng)
    i = rng.randrange(len(chunks))
    kind, held = chunks[i]
    action = rng.randrange(7)
    if action <= 2:
        chunks[i] = kind, inner(held, rng)
    elif action == 3:
        with suppress(zlib.error):
            chunks[i] = kind, zlib.compress(inner(zlib.decompress(held), rng))
    elif action == 4:
        chunks.insert(rng.randrange(len(chunks)), (kind, held))
    elif action == 5:
        text = b"a\0" + rng.choice((b"", b"\0")) + zlib.compress(bytes(rng.choice((1, 1000, 1 << 22))))
        chunks.insert(
            rng.randrange(len(chunks)),
            (rng.choice((b"zTXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"tRNS", b"sBIT")), text),
        )
    else:
        del chunks[i]
    return _PNG + b"".join(
        struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held)) for kind, held in chunks
    )


def change_tiff(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    """A field of the first directory: tag, type, count or value."""
    order = "<" if content[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (n,) = struct.unpack_from(f"{order}H", content, start)
        at = start + 2 + 12 * rng.randrange(n)
        fields = list(struct.unpack_from(f"{order}HHII", content, at))
    except (struct.error, ValueError):
        return inner(content, rng)
    which = rng.randrange(4)
    values = (0, 1, 2, 3, 4, 5, 8, 16, 255, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1, len(content), fields[which] + 1)
    fields[which] = rng.choice(values) % (1 << 16 if which < 2 else 1 << 32)
    return content[:at] + struct.pack(f"{order}HHII", *fields) + content[at + 12 :]


def _is_chunk(name: str, content: bytes) -> bool:
    """Of a store: ends with its CRC-32C."""
    return name.startswith("tiny.zarr/") and crc32c.crc32c(content[:-4]) == int.from_bytes(content[-4:], "little")


def change_chunk(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    """What is packed in a coordinate's chunk."""
    packed = content[:-4]
    try:
        packed = bytes(Zstd(level=3).encode(inner(bytes(Zstd().decode(packed)), rng)))
    except (RuntimeError, ValueError):
        packed = inner(packed, rng)
    return packed + crc32c.crc32c(packed).to_bytes(4, "little")


_INDEX = 4 * 16  # bytes: 4 records to a shard


def _is_shard(name: str, content: bytes) -> bool:
    index = content[-_INDEX - 4 : -4]
    return name.startswith("tiny.zarr/") and crc32c.crc32c(index) == int.from_bytes(content[-4:], "little")


def change_shard(content: bytes, rng: random.Random, inner: Inner) -> bytes:
    """The index of a shard's records, its checksum right."""
    records, index = content[: -_INDEX - 4], content[-_INDEX - 4 : -4]
    start = 8 * rng.randrange(8)
    n = len(content)
    value = rng.choice((0, 1, 3, n - 4, n, n + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 4))
    index = (
        index[:start] + struct.pack("<Q", value % 2**64) + index[start + 8 :]
        if rng.random() < 0.8
        else inner(index, rng)
    )
    return records + index + crc32c.crc32c(index).to_bytes(4, "little")


def _is_safetensors(name: str, content: bytes) -> bool:
    return content[8:9] == b"{" and 2 <= struct.unpack_from("<Q", content)[0] < len(content)


def _is_pickle(name: str, content: bytes) -> bool:
    return content[:1] == b"\x80" or name.endswith(".pkl") or (content[:1] in b"(}c" and content[-1:] == b".")


STRUCTURES: tuple[tuple[Callable[[str, bytes], bool], Change], ...] = (
    (lambda name, content: content[:1] == b"{" and name.endswith(".json"), change_json),
    (_is_safetensors, change_safetensors),
    (lambda name, content: content[:2] == b"PK", change_zip),
    (_is_pickle, change_pickle),
    (lambda name, content: content.startswith(_PNG), change_png),
    (lambda name, content: content[:4] in (b"II*\0", b"MM\0*"), change_tiff),
    (_is_chunk, change_chunk),
    (_is_shard, change_shard),
)
