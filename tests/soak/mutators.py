"""Damage to a file's bytes, drawn from random numbers that are the case's own.

Half of the damage is blind. The other half keeps the container right (see ``containers``), so that what is damaged gets past
checksums, or changes cells of a table.
"""

import random
from collections.abc import Callable, Sequence

from tests.soak.containers import STRUCTURES

MOST_BYTES = 1 << 22  # of a damaged file: none is made larger than that
_COUNTS = (1, 1, 1, 2, 3, 5, 8)  # of damages to a file
_BYTES = (0, 255, 0x80, 0x7F)
_ENDS = 512  # bytes at a file's beginning and end, which say what the rest is
_TEXTS = (".csv", ".txt", ".json", ".toml")


def damage(name: str, content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The content of the file ``name``, damaged; ``others`` are other files of its kind, parts of which may be put in."""
    for _ in range(rng.choice(_COUNTS)):
        structures = [change for recognised, change in STRUCTURES if recognised(name, content)]
        structures += [change_cells] if name.endswith(_TEXTS) else []
        if structures and rng.random() < 0.6:
            try:
                content = rng.choice(structures)(content, rng, damage_bytes)
            except (RecursionError, MemoryError):  # by what an earlier damage wrote
                content = damage_bytes(content, rng)
        elif others and rng.random() < 0.1:
            content = _splice(content, rng, rng.choice(others))
        else:
            content = damage_bytes(content, rng)
        content = content[:MOST_BYTES]  # each time, or what is doubled again and again takes minutes to make
    return content


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """One blind change."""
    return rng.choice(_BLIND)(bytearray(content), rng)


def _place(content: bytearray, rng: random.Random) -> int:
    """Often near the beginning or the end."""
    n = len(content)
    where = rng.random()
    if where < 0.4:
        return rng.randrange(min(n, _ENDS) or 1)
    if where < 0.55:
        return max(0, n - 1 - rng.randrange(min(n, _ENDS) or 1))
    return rng.randrange(n or 1)


def _block(content: bytearray, rng: random.Random) -> slice:
    start = _place(content, rng)
    return slice(start, start + rng.choice((1, 2, 4, 8, 16, 64, 512, 4096)))


def _flip_bit(content: bytearray, rng: random.Random) -> bytes:
    if content:
        content[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(content)


def _set_byte(content: bytearray, rng: random.Random) -> bytes:
    if content:
        content[_place(content, rng)] = rng.choice(_BYTES)
    return bytes(content)


def interesting(n_bytes: int, size: int, rng: random.Random) -> bytes:
    """An integer of ``n_bytes`` at an edge of what fits, or near the file's ``size``, in either order of bytes."""
    near = size + rng.choice((-8, -1, 0, 1, 8))
    value = rng.choice((0, 1, -1, 2, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, near, 4 * near))
    return (value % (1 << (8 * n_bytes))).to_bytes(n_bytes, rng.choice(("little", "big")))


def _set_integer(content: bytearray, rng: random.Random) -> bytes:
    n = rng.choice((2, 4, 8))
    start = _place(content, rng)
    content[start : start + n] = interesting(n, len(content), rng)
    return bytes(content)


def _cut(content: bytearray, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        del content[_place(content, rng) :]
    else:
        del content[_block(content, rng)]
    return bytes(content)


def _insert(content: bytearray, rng: random.Random) -> bytes:
    start = _place(content, rng)
    content[start:start] = rng.choice(
        (rng.randbytes(rng.randrange(1, 64)), bytes(rng.randrange(1, 4096)), b"\xff" * 16)
    )
    return bytes(content)


def _repeat(content: bytearray, rng: random.Random) -> bytes:
    where = _block(content, rng)
    block = content[where]
    most = max(1, min(1000, MOST_BYTES // 2 // max(len(block), 1)))
    content[where.start : where.start] = block * rng.choice((1, 1, 2, 16, most))
    return bytes(content)


def _move(content: bytearray, rng: random.Random) -> bytes:
    where = _block(content, rng)
    block = content[where]
    del content[where]
    start = _place(content, rng)
    content[start:start] = block
    return bytes(content)


def _splice(content: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning of one file with the end of another, or a part of another laid over this one."""
    start = _place(bytearray(content), rng)
    if rng.random() < 0.5:
        return content[:start] + other[_place(bytearray(other), rng) :]
    part = other[_block(bytearray(other), rng)]
    return content[:start] + part + content[start + len(part) :]


_BLIND: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_integer,
    _set_integer,
    _cut,
    _insert,
    _repeat,
    _move,
)

_CELLS = (
    b"", b" ", b"0", b"-1", b"1.5", b"007", b"1e999", b"-1e308", b"nan", b"NA", b"inf", b"True", b"1_000", b"0x10", b"1e-320",
    b"9" * 20, b"9" * 400, b"9" * 5000, b"1." + b"0" * 5000, b"18446744073709551616", b'"', b'""', b"'", b'"\n"', b"\0", b"a\0b",
    b"\r", b"\xff\xfe", b"\xc3(", "٣".encode(), "²".encode(), "\u2028".encode(), b"\xed\xa0\x80", b"a" * 1000, b"b" * 140_000,
    b"../../../etc/passwd", b"/dev/zero", b"~nobody/x.png", b"~/x.png", b"(" * 3000, b"((0, 1), 2)", b"(0, 1)", b"[" * 90,
    b"=1+1", b"#",
    b"a,b", b"|flipped", b"2024-01-01", b"x" * 300 + b".png", b"head-1_frontal.png",
)  # fmt: skip


def change_cells(content: bytes, rng: random.Random, inner: Callable[[bytes, random.Random], bytes]) -> bytes:
    """A table with a cell, a column or lines changed."""
    lines = [line.split(b",") for line in content.split(b"\n")]
    row = rng.randrange(len(lines))
    column = rng.randrange(len(lines[row]))
    action = rng.randrange(11)
    if action <= 3:
        lines[row][column] = rng.choice(_CELLS)
    elif action == 4:
        lines[row][column] = inner(lines[row][column], rng)[:200_000]
    elif action == 5:  # everywhere but in the header
        cell = rng.choice(_CELLS)[:5000]
        lines[1:] = [[*cells[:column], cell, *cells[column + 1 :]] for cells in lines[1:]]
    elif action == 6:  # a column twice
        lines = [[*cells, *cells[column : column + 1]] for cells in lines]
    elif action == 7:  # none
        lines = [[*cells[:column], *cells[column + 1 :]] for cells in lines]
    elif action == 8:
        times, length = rng.choice((1, 2, 50, 2000)), sum(map(len, lines[row])) + 1
        lines[row:row] = [lines[row]] * min(times, MOST_BYTES // length)
    elif action == 9:
        del lines[row : row + rng.choice((1, 1, 3, len(lines)))]
    else:
        other = rng.randrange(len(lines))
        lines[row], lines[other] = lines[other], lines[row]
    joined = (rng.choice((b"\n",) * 9 + (b"\r",))).join(
        rng.choice((b",",) * 19 + (b";",)).join(cells) for cells in lines
    )
    return rng.choice((b"",) * 19 + (b"\xef\xbb\xbf",)) + joined
